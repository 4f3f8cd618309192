"""The async client: the methods of ``_client.Client`` on asyncio.

Covers: one short method per call, over the same ``_calls``, ``_admin`` and ``_push``. Does not cover:
what they send or how answers are read. Hashing and reading files during a push run in a thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from bunkhouse import _admin, _calls, _plans
from bunkhouse._admin import UNSET, Int, MaybeInt, UsageSpan
from bunkhouse._calls import EmbeddingInput, Message
from bunkhouse._errors import BunkhouseError
from bunkhouse._push import Done, advance, push_steps
from bunkhouse._request import Answer, Call, Listing, pages, resolve_address
from bunkhouse._retry import RetryPolicy
from bunkhouse._stream import AsyncTextStream
from bunkhouse._transport import AsyncSender
from bunkhouse._types import (
    About,
    Classification,
    Completion,
    Embeddings,
    Events,
    Explanation,
    Forecasts,
    Key,
    Model,
    NewKey,
    Node,
    NodeToken,
    Placements,
    ProgressCallback,
    QuotaUse,
    Router,
    Tenant,
    UsageItem,
)

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
U = TypeVar("U")


class AsyncClient:
    """A connection to a Bunkhouse control server, or to a node's gateway for the ``/v1`` calls.

    ``base_url`` and ``api_key`` default to the environment's BUNKHOUSE_URL and BUNKHOUSE_API_KEY.
    ``timeout_s`` overrides the limit of every call; by default it suits the call. Calls of models go to the
    node that has the model where that can be reached, else through the server: ``direct=True`` asks for it
    before the first call of a model, ``False`` never, and by default before the second. Safe to share
    between tasks of one event loop; close it, or use it in an ``async with`` statement.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        direct: bool | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        address = resolve_address(base_url, api_key)
        self._sender = AsyncSender(address, timeout_s, retry or RetryPolicy(), transport, direct=direct)

    @property
    def base_url(self) -> str:
        return self._sender.address.base_url

    def __repr__(self) -> str:
        return f"AsyncClient(base_url={self.base_url!r})"

    async def close(self) -> None:
        """Close the connections."""
        await self._sender.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        return call.parse(await self._sender.send(call.request))

    async def _whole(self, listing: Listing[T, U]) -> U:
        steps = pages(listing)
        request = next(steps)
        while True:
            try:
                request = steps.send(await self._sender.send(request))
            except StopIteration as stop:
                whole: U = stop.value
                return whole

    async def _stream(self, call: Call[Completion]) -> AsyncTextStream:
        head, response = await self._sender.open(_calls.streamed(call))
        return AsyncTextStream(self._sender, head, response)

    # Calling models.

    async def embed(self, model: str, inputs: EmbeddingInput, *, dimensions: int | None = None) -> Embeddings:
        """Embed one text, several, or token ids. One vector per input."""
        return await self._run(_calls.embed(model, inputs, dimensions))

    async def classify(self, model: str, inputs: str | Sequence[str]) -> Classification:
        """Classify one text or several. One label per input."""
        return await self._run(_calls.classify(model, inputs))

    @overload
    async def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        stream: Literal[False] = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Completion: ...
    @overload
    async def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        stream: Literal[True],
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> AsyncTextStream: ...
    async def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Completion | AsyncTextStream:
        """Answer a conversation (a string is one user message). ``stream=True`` iterates over text."""
        call = _calls.chat(
            model,
            messages,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        if stream:
            return await self._stream(call)
        return await self._run(call)

    @overload
    async def complete(
        self,
        model: str,
        prompt: str,
        *,
        stream: Literal[False] = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Completion: ...
    @overload
    async def complete(
        self,
        model: str,
        prompt: str,
        *,
        stream: Literal[True],
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> AsyncTextStream: ...
    async def complete(
        self,
        model: str,
        prompt: str,
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Completion | AsyncTextStream:
        """Continue a text. ``stream=True`` iterates over text as it is generated."""
        call = _calls.complete(
            model, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        if stream:
            return await self._stream(call)
        return await self._run(call)

    # Models.

    async def push(
        self,
        model: str,
        directory: str | os.PathLike[str],
        progress: ProgressCallback | None = None,
        *,
        ignore: Iterable[str] = (),
        devices: int | None = None,
        replicas: int | None = None,
    ) -> Model:
        """Upload a Hugging Face style directory as a version of ``tenant/name``.

        Resumes where an interrupted push of the same files stopped, and uploads nothing when the
        latest version is the same. ``ignore``: glob patterns of files to leave out. ``devices``,
        ``replicas``: as of ``set_model``; where they do not do, there is no new version. ``progress`` is
        called from a worker thread.
        """
        patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        steps = push_steps(model, directory, patterns, progress, devices=devices, replicas=replicas)
        outcome: Answer | BunkhouseError | None = None
        while True:
            step = await asyncio.to_thread(advance, steps, outcome)
            if isinstance(step, Done):
                return step.model
            try:
                outcome = await self._sender.send(step)
            except BunkhouseError as error:
                outcome = error

    async def register(self, model: str, origin: str) -> Model:
        """Register a directory that the server reads itself, by URL, instead of uploading it."""
        return await self._run(_calls.register(model, origin))

    async def models(self, tenant: str | None = None) -> tuple[Model, ...]:
        """All versions this key may see, or one tenant's."""
        return await self._whole(_calls.models(tenant))

    async def model(self, model: str) -> Model:
        """One version; the latest when the reference names none."""
        return await self._run(_calls.model(model))

    async def set_model(
        self,
        model: str,
        *,
        batch_max: int | None = None,
        batch_delay_ms: int | None = None,
        devices: int | None = None,
        replicas: int | None = None,
    ) -> Model:
        """Change settings of a version, or with ``tenant/name`` of all of them; None leaves one as it is.

        ``batch_max`` inputs of waiting requests share a forward pass; with 1 (as pushed) an answer is what
        the model gives alone, to the bit. The first input of a pass waits ``batch_delay_ms`` for company.
        ``devices`` of one node hold it together, from when it next comes to them. ``replicas``: nodes that
        may hold a copy each, when one is too busy with it.
        """
        return await self._run(_calls.set_model(model, batch_max, batch_delay_ms, devices, replicas))

    async def delete_model(self, model: str) -> None:
        """Delete a version, or with ``tenant/name`` all of them."""
        await self._run(_calls.delete_model(model))

    # Tenants, keys and quotas.

    async def create_tenant(self, tenant: str) -> Tenant:
        return await self._run(_admin.create_tenant(tenant))

    async def tenants(self) -> tuple[Tenant, ...]:
        return await self._whole(_admin.tenants())

    async def delete_tenant(self, tenant: str) -> None:
        """Delete a tenant with its keys and models."""
        await self._run(_admin.delete_tenant(tenant))

    async def create_key(self, tenant: str, *, label: str | None = None, ttl_s: int | None = None) -> NewKey:
        """Create a key. The answer holds the only copy of its text."""
        return await self._run(_admin.create_key(tenant, label, ttl_s))

    async def keys(self, tenant: str) -> tuple[Key, ...]:
        return await self._whole(_admin.keys(tenant))

    async def revoke_key(self, key_id: str) -> None:
        await self._run(_admin.revoke_key(key_id))

    async def quota(self, tenant: str) -> QuotaUse:
        """A tenant's quota and its use on each node."""
        return await self._run(_admin.quota(tenant))

    async def set_quota(
        self,
        tenant: str,
        *,
        device_reserved: Int = UNSET,
        device_max: MaybeInt = UNSET,
        host_reserved: Int = UNSET,
        host_max: MaybeInt = UNSET,
        disk_reserved: Int = UNSET,
        disk_max: MaybeInt = UNSET,
        requests_per_minute: MaybeInt = UNSET,
        tokens_per_minute: MaybeInt = UNSET,
        restores_per_minute: MaybeInt = UNSET,
        device_seconds_per_day: MaybeInt = UNSET,
        concurrency: MaybeInt = UNSET,
        weight: Int = UNSET,
        priority: Int = UNSET,
        if_match: str | None = None,
    ) -> QuotaUse:
        """Change what is given and keep the rest. None takes a limit away. Bytes are per node.

        ``if_match``: only if the quota is still as when this ``QuotaUse.etag`` was given.
        """
        return await self._run(
            _admin.set_quota(
                tenant,
                if_match,
                device_reserved=device_reserved,
                device_max=device_max,
                host_reserved=host_reserved,
                host_max=host_max,
                disk_reserved=disk_reserved,
                disk_max=disk_max,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                restores_per_minute=restores_per_minute,
                device_seconds_per_day=device_seconds_per_day,
                concurrency=concurrency,
                weight=weight,
                priority=priority,
            )
        )

    # The fleet.

    async def nodes(self, pool: str | None = None) -> tuple[Node, ...]:
        """All nodes, or one pool's."""
        return await self._whole(_admin.nodes(pool))

    async def create_node_token(
        self, *, name: str | None = None, ttl_s: int | None = None, pool: str | None = None
    ) -> NodeToken:
        """Create a join token for one node. Hand it over in a file, never on a command line."""
        return await self._run(_admin.create_node_token(name, ttl_s, pool))

    async def delete_node(self, name: str) -> None:
        await self._run(_admin.delete_node(name))

    async def set_node(self, name: str, *, draining: bool) -> Node:
        """Whether the node is to take no new requests. Its ``state`` becomes ``draining``, and ``drained``
        when none runs there any more."""
        return await self._run(_admin.set_node(name, draining))

    async def routers(self) -> tuple[Router, ...]:
        """All routers that are processes of their own."""
        return await self._whole(_admin.routers())

    async def create_router_token(self, *, name: str | None = None, ttl_s: int | None = None) -> NodeToken:
        """Create a join token for one router. Hand it over in a file, never on a command line."""
        return await self._run(_admin.create_router_token(name, ttl_s))

    async def delete_router(self, name: str) -> None:
        await self._run(_admin.delete_router(name))

    async def about(self) -> About:
        """Which server answers, its clock, and what this client's key is."""
        return await self._run(_admin.about())

    async def plan(self, model: str, *, node: str | None = None) -> Forecasts:
        """What a request for the model would meet now, on one node or where the router would try first."""
        return await self._run(_plans.plan(model, node))

    async def explain(
        self, model: str | None = None, *, request: str | None = None, node: str | None = None
    ) -> Explanation:
        """What nodes decided about a model lately, or about one request, and why."""
        return await self._run(_plans.explain(model, request, node))

    async def ps(self) -> Placements:
        """Where every version's bytes are now, and what it has done."""
        return await self._whole(_admin.ps())

    async def usage(
        self,
        *,
        tenant: str | None = None,
        by: UsageSpan = "total",
        since_ms: int | None = None,
        until_ms: int | None = None,
    ) -> tuple[UsageItem, ...]:
        """What was used, by tenant and model in all, by the day or the hour (Unix time, UTC), or by key."""
        return await self._whole(_admin.usage(tenant, by, since_ms, until_ms))

    async def events(
        self, *, after: int | None = None, limit: int = 100, tenant: str | None = None
    ) -> Events:
        """What happened, oldest first: after the event with id ``after``, or the newest."""
        return await self._run(_admin.events(after, limit, tenant))
