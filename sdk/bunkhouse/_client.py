"""The blocking client.

Covers: one short method per call, over the shared calls of ``_calls``, ``_admin`` and ``_push``. Does
not cover: what they send or how answers are read. ``_async_client`` has the same methods (a test
compares the signatures).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from bunkhouse import _admin, _calls, _plans
from bunkhouse._admin import UNSET, Int, MaybeInt, UsageSpan
from bunkhouse._calls import EmbeddingInput, Message
from bunkhouse._errors import BunkhouseError
from bunkhouse._push import Done, advance, push_steps
from bunkhouse._request import Call, Listing, pages, resolve_address
from bunkhouse._retry import RetryPolicy
from bunkhouse._stream import TextStream
from bunkhouse._transport import Sender
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


class Client:
    """A connection to a Bunkhouse control server, or to a node's gateway for the ``/v1`` calls.

    ``base_url`` and ``api_key`` default to the environment's BUNKHOUSE_URL and BUNKHOUSE_API_KEY.
    ``timeout_s`` overrides the limit of every call; by default it suits the call. Calls of models go to the
    node that has the model where that can be reached, else through the server: ``direct=True`` asks for it
    before the first call of a model, ``False`` never, and by default before the second. Safe to share
    between threads; close it, or use it in a ``with`` statement.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        direct: bool | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        address = resolve_address(base_url, api_key)
        self._sender = Sender(address, timeout_s, retry or RetryPolicy(), transport, direct=direct)

    @property
    def base_url(self) -> str:
        return self._sender.address.base_url

    def __repr__(self) -> str:
        return f"Client(base_url={self.base_url!r})"

    def close(self) -> None:
        """Close the connections."""
        self._sender.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        return call.parse(self._sender.send(call.request))

    def _whole(self, listing: Listing[T, U]) -> U:
        steps = pages(listing)
        request = next(steps)
        while True:
            try:
                request = steps.send(self._sender.send(request))
            except StopIteration as stop:
                whole: U = stop.value
                return whole

    def _stream(self, call: Call[Completion]) -> TextStream:
        head, response = self._sender.open(_calls.streamed(call))
        return TextStream(self._sender, head, response)

    # Calling models.

    def embed(self, model: str, inputs: EmbeddingInput, *, dimensions: int | None = None) -> Embeddings:
        """Embed one text, several, or token ids. One vector per input."""
        return self._run(_calls.embed(model, inputs, dimensions))

    def classify(self, model: str, inputs: str | Sequence[str]) -> Classification:
        """Classify one text or several. One label per input."""
        return self._run(_calls.classify(model, inputs))

    @overload
    def chat(
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
    def chat(
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
    ) -> TextStream: ...
    def chat(
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
    ) -> Completion | TextStream:
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
        return self._stream(call) if stream else self._run(call)

    @overload
    def complete(
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
    def complete(
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
    ) -> TextStream: ...
    def complete(
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
    ) -> Completion | TextStream:
        """Continue a text. ``stream=True`` iterates over text as it is generated."""
        call = _calls.complete(
            model, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        return self._stream(call) if stream else self._run(call)

    # Models.

    def push(
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
        ``replicas``: as of ``set_model``; where they do not do, there is no new version.
        """
        patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        steps = push_steps(model, directory, patterns, progress, devices=devices, replicas=replicas)
        step = advance(steps, None)
        while not isinstance(step, Done):
            try:
                outcome = self._sender.send(step)
            except BunkhouseError as error:
                step = advance(steps, error)
            else:
                step = advance(steps, outcome)
        return step.model

    def register(self, model: str, origin: str) -> Model:
        """Register a directory that the server reads itself, by URL, instead of uploading it."""
        return self._run(_calls.register(model, origin))

    def models(self, tenant: str | None = None) -> tuple[Model, ...]:
        """All versions this key may see, or one tenant's."""
        return self._whole(_calls.models(tenant))

    def model(self, model: str) -> Model:
        """One version; the latest when the reference names none."""
        return self._run(_calls.model(model))

    def set_model(
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
        return self._run(_calls.set_model(model, batch_max, batch_delay_ms, devices, replicas))

    def delete_model(self, model: str) -> None:
        """Delete a version, or with ``tenant/name`` all of them."""
        self._run(_calls.delete_model(model))

    # Tenants, keys and quotas.

    def create_tenant(self, tenant: str) -> Tenant:
        return self._run(_admin.create_tenant(tenant))

    def tenants(self) -> tuple[Tenant, ...]:
        return self._whole(_admin.tenants())

    def delete_tenant(self, tenant: str) -> None:
        """Delete a tenant with its keys and models."""
        self._run(_admin.delete_tenant(tenant))

    def create_key(self, tenant: str, *, label: str | None = None, ttl_s: int | None = None) -> NewKey:
        """Create a key. The answer holds the only copy of its text."""
        return self._run(_admin.create_key(tenant, label, ttl_s))

    def keys(self, tenant: str) -> tuple[Key, ...]:
        return self._whole(_admin.keys(tenant))

    def revoke_key(self, key_id: str) -> None:
        self._run(_admin.revoke_key(key_id))

    def quota(self, tenant: str) -> QuotaUse:
        """A tenant's quota and its use on each node."""
        return self._run(_admin.quota(tenant))

    def set_quota(
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
        return self._run(
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

    def nodes(self, pool: str | None = None) -> tuple[Node, ...]:
        """All nodes, or one pool's."""
        return self._whole(_admin.nodes(pool))

    def create_node_token(
        self, *, name: str | None = None, ttl_s: int | None = None, pool: str | None = None
    ) -> NodeToken:
        """Create a join token for one node. Hand it over in a file, never on a command line."""
        return self._run(_admin.create_node_token(name, ttl_s, pool))

    def delete_node(self, name: str) -> None:
        self._run(_admin.delete_node(name))

    def set_node(self, name: str, *, draining: bool) -> Node:
        """Whether the node is to take no new requests. Its ``state`` becomes ``draining``, and ``drained``
        when none runs there any more."""
        return self._run(_admin.set_node(name, draining))

    def routers(self) -> tuple[Router, ...]:
        """All routers that are processes of their own."""
        return self._whole(_admin.routers())

    def create_router_token(self, *, name: str | None = None, ttl_s: int | None = None) -> NodeToken:
        """Create a join token for one router. Hand it over in a file, never on a command line."""
        return self._run(_admin.create_router_token(name, ttl_s))

    def delete_router(self, name: str) -> None:
        self._run(_admin.delete_router(name))

    def about(self) -> About:
        """Which server answers, its clock, and what this client's key is."""
        return self._run(_admin.about())

    def plan(self, model: str, *, node: str | None = None) -> Forecasts:
        """What a request for the model would meet now, on one node or where the router would try first."""
        return self._run(_plans.plan(model, node))

    def explain(
        self, model: str | None = None, *, request: str | None = None, node: str | None = None
    ) -> Explanation:
        """What nodes decided about a model lately, or about one request, and why."""
        return self._run(_plans.explain(model, request, node))

    def ps(self) -> Placements:
        """Where every version's bytes are now, and what it has done."""
        return self._whole(_admin.ps())

    def usage(
        self,
        *,
        tenant: str | None = None,
        by: UsageSpan = "total",
        since_ms: int | None = None,
        until_ms: int | None = None,
    ) -> tuple[UsageItem, ...]:
        """What was used, by tenant and model in all, by the day or the hour (Unix time, UTC), or by key."""
        return self._whole(_admin.usage(tenant, by, since_ms, until_ms))

    def events(self, *, after: int | None = None, limit: int = 100, tenant: str | None = None) -> Events:
        """What happened, oldest first: after the event with id ``after``, or the newest."""
        return self._run(_admin.events(after, limit, tenant))
