"""The tenants' HTTP surface on a node: OpenAI's routes, health and metrics.

Covers: routes, which model a request means and whether its key may know of it, leases, running a request
and answering it whole or as a stream, and turning refusals into answers. Does not cover: keys at the door
(``guard``), shapes of bodies (``openai_shapes``), limits of bodies and the error shape (``packer/http.py``),
or who is granted what (``packer/residency.py``, behind ``NodeFacade``).

Nothing here reads weights, blocks, or logs what a caller sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, closing
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from agent.event_stream import STALL_SECONDS, EventStream, with_silences
from agent.facade import EngineError, EngineFault, EngineFrame, EngineRequest, Lease, NodeFacade, Refused
from agent.guard import FACTS, KEY, SCRAPER, add_headers, require_key
from agent.metering import expected_tokens
from agent.oip import OipRoutes
from agent.oip_models import rows_of
from agent.oip_stats import Statistics, Timing
from agent.openai_answers import GeneratedShape
from agent.openai_shapes import (
    ChatAsk,
    ClassifyAsk,
    CompletionAsk,
    EmbeddingAsk,
    bad_field,
    chat_request,
    classify_answer,
    classify_request,
    completion_requests,
    embed_request,
    embedding_answer,
)
from agent.scrape_key import ScrapeKey
from packer.body_budget import BodyBudget
from packer.http import (
    REQUEST_ID,
    ApiError,
    decode_json,
    internal_error,
    json_response,
    model_card,
    model_id,
    model_list,
    model_not_found,
    openai_error,
    protect,
    refusal,
)
from packer.oip import tenants_response
from packer.types import ModelSpec, Task
from packer.whole_answer import WholeAnswer

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("bunkhouse.gateway")

# A restore from the slowest origin that anybody should wait for; openai's client gives up after 600 s.
LEASE_TIMEOUT_MS = 300_000
# How often a stream that has nothing to say shows that it is alive; also how long a streamed request's
# status may still become an error. Proxies give up after 30 to 60 s.
KEEP_ALIVE_MS = 3_000
# A larger answer is written as JSON on a thread, row by row; below it the hand-over costs more.
INLINE_BYTES_MAX = 64 * 1024

ENDPOINTS = {
    Task.EMBEDDING: "/v1/embeddings",
    Task.CLASSIFICATION: "/v1/classify",
    Task.GENERATION: "/v1/chat/completions or /v1/completions",
    Task.TENSORS: "/v2/models/{model}/infer",
}
# An engine speaks of its own fields; the caller knows these.
_API_FIELDS = {"inputs": "input", "tokens": "prompt"}

ASKED: web.RequestKey[str] = web.RequestKey("asked", str)


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What a gateway needs to know beside its node. ``node_name`` goes into every answer's headers;
    ``scraper``: whose key shows figures of tenants (None: nobody's)."""

    node_name: str
    lease_timeout_ms: int = LEASE_TIMEOUT_MS
    keep_alive_ms: int = KEEP_ALIVE_MS
    stall_seconds: float = STALL_SECONDS
    scraper: ScrapeKey | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One request to one model of the caller's own tenant."""

    request: web.Request
    spec: ModelSpec

    @property
    def request_id(self) -> str:
        return self.request[REQUEST_ID]

    @property
    def model_id(self) -> str:
        return model_id(self.spec)


def build_app(node: NodeFacade, config: GatewayConfig) -> web.Application:
    """The gateway's application; serve it with ``packer.http.runner``."""
    app = web.Application(middlewares=[require_key(node, config.scraper), _explain])
    protect(app, tenants_response)
    add_headers(app, node, config.node_name)
    gateway = Gateway(node, config)
    app.add_routes(
        [
            web.get("/healthz", gateway.healthz),
            web.get("/readyz", gateway.readyz),
            web.get("/metrics", gateway.metrics),
            web.get("/v1/models", gateway.models),
            # Raw and encoded slashes alike: the path is decoded once, then parsed by the one parser.
            web.get("/v1/models/{ref:.+}", gateway.model),
            web.post("/v1/embeddings", gateway.embeddings),
            web.post("/v1/classify", gateway.classify),
            web.post("/v1/completions", gateway.completions),
            web.post("/v1/chat/completions", gateway.chat),
            *gateway.oip.routes(),
        ]
    )
    return app


def api_error(error: Refused | EngineError | EngineFault, asked: str) -> ApiError:
    """The answer to a request that the node or the engine did not carry out."""
    if isinstance(error, Refused):
        return refusal(error.reason, error.detail, error.retry_ms, asked)
    if isinstance(error, EngineError):
        field = _caller_field(error.field) if error.field else None
        return ApiError(400, error.code, f"{field}: {error.message}" if field else error.message, field=field)
    # Its text names sizes and fields only, so it may be logged; the caller can do nothing with it.
    logger.error("an engine broke its contract: %s", error)
    return ApiError(
        500, "engine_fault", "The engine failed on this request; it was logged.", kind="server_error"
    )


def _caller_field(field: str) -> str:
    """``inputs[3]`` of an engine is ``input[3]`` of the caller's body."""
    name, bracket, rest = field.partition("[")
    return _API_FIELDS.get(name, name) + bracket + rest


@web.middleware
async def _explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except (Refused, EngineError, EngineFault) as error:
        raise api_error(error, request.get(ASKED, "")) from None


class Gateway:
    """The handlers. Holds no state of a tenant but the bytes of bodies that are being answered."""

    def __init__(self, node: NodeFacade, config: GatewayConfig) -> None:
        self._node = node
        self._config = config
        self._bodies = BodyBudget()
        self._statistics = Statistics()
        self.oip = OipRoutes(node, self._bodies, self._statistics, self._run_one)

    # --- routes without a model -----------------------------------------------------------------------

    async def healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        ready = self._node.ready()
        return web.json_response({"status": "ready" if ready else "not ready"}, status=200 if ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text=self._node.metrics_text(tenants=request[SCRAPER]),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def models(self, request: web.Request) -> web.Response:
        return json_response(model_list(self._node.models_of(request[KEY].tenant)))

    async def model(self, request: web.Request) -> web.Response:
        asked = request.match_info["ref"]
        spec = self._node.resolve(request[KEY].tenant, asked)
        if spec is None:
            raise model_not_found(asked)
        return json_response(model_card(spec))

    # --- routes with a model --------------------------------------------------------------------------

    async def embeddings(self, request: web.Request) -> web.Response:
        async with self._bodies.body(request, request[KEY].tenant) as body:
            ask = decode_json(body, EmbeddingAsk)
            order = embed_request(ask)
            call = self._call(request, ask.model, Task.EMBEDDING)
            frame = await self._one_frame(call, order)
            answer = await _written(
                len(frame.body), embedding_answer, ask, call.model_id, _count(order), frame
            )
        return WholeAnswer(request.app, answer, "application/json").send_now(request)

    async def classify(self, request: web.Request) -> web.Response:
        async with self._bodies.body(request, request[KEY].tenant) as body:
            ask = decode_json(body, ClassifyAsk)
            order = classify_request(ask)
            call = self._call(request, ask.model, Task.CLASSIFICATION)
            frame = await self._one_frame(call, order)
            answer_id = f"classify-{call.request_id}"
            answer = await _written(
                len(frame.body),
                classify_answer,
                answer_id,
                int(time.time()),
                call.model_id,
                _count(order),
                frame,
            )
        return WholeAnswer(request.app, answer, "application/json").send_now(request)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        async with self._bodies.body(request, request[KEY].tenant) as body:
            ask = decode_json(body, CompletionAsk)
            orders = completion_requests(ask)
            call = self._call(request, ask.model, Task.GENERATION)
            return await self._generated(call, orders, ask, chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        async with self._bodies.body(request, request[KEY].tenant) as body:
            ask = decode_json(body, ChatAsk)
            orders = (chat_request(ask),)
            call = self._call(request, ask.model, Task.GENERATION)
            try:
                return await self._generated(call, orders, ask, chat=True)
            except EngineError as error:
                if error.field != "max_tokens" or ask.max_completion_tokens is None:
                    raise
                newer = "max_completion_tokens"  # what the caller calls it
                message = error.message.replace("max_tokens", newer)
                raise EngineError(error.code, message, newer) from None

    # --- how ------------------------------------------------------------------------------------------

    def _call(self, request: web.Request, asked: str, task: Task) -> Call:
        """The model that the caller means; one answer for absent and foreign, before anything is spent."""
        request[ASKED] = asked
        spec = self._node.resolve(request[KEY].tenant, asked)
        if spec is None:
            raise model_not_found(asked)
        if spec.task is not task:
            raise bad_field(
                "model",
                f"this is a model for {spec.task.value}: call it at {ENDPOINTS[spec.task]}.",
                "wrong_task",
            )
        return Call(request, spec)

    def _timing(self, call: Call, orders: Sequence[EngineRequest]) -> Timing:
        return self._statistics.timing(call.spec.ref, sum(rows_of(order) for order in orders))

    def _lease(self, call: Call, orders: Sequence[EngineRequest]) -> AbstractAsyncContextManager[Lease]:
        timeout_ms, tokens = self._config.lease_timeout_ms, expected_tokens(orders)
        key_id = call.request[KEY].key_id
        return self._node.lease(call.spec, call.request_id, timeout_ms, tokens, key_id)

    async def _run_one(self, request: web.Request, spec: ModelSpec, order: EngineRequest) -> EngineFrame:
        """For a surface that has found its model by itself."""
        request[ASKED] = str(spec.ref.model)
        return await self._one_frame(Call(request, spec), order)

    async def _one_frame(self, call: Call, order: EngineRequest) -> EngineFrame:
        """The answer of an operation that gives one frame. The lease is over when it is returned."""
        found: EngineFrame | None = None
        with self._timing(call, (order,)) as timing:
            async with self._lease(call, (order,)) as lease:
                _granted(call, timing, lease)
                frames = lease.run(order)
                try:
                    async for frame in frames:
                        if found is not None:
                            raise EngineFault(f"the engine sent several frames for {order.op}")
                        found = frame
                        if frame.last:  # most are; nothing is asked for that will not come
                            break
                finally:
                    await _close(frames)
        if found is None:
            raise EngineFault(f"the engine sent no frame for {order.op}")
        return found

    async def _frames(
        self, call: Call, orders: tuple[EngineRequest, ...]
    ) -> AsyncGenerator[Lease | tuple[int, EngineFrame], None]:
        """First the lease, then every frame of every order with the order's index."""
        with self._timing(call, orders) as timing:
            async with self._lease(call, orders) as lease:
                _granted(call, timing, lease)
                yield lease
                for index, order in enumerate(orders):
                    frames = lease.run(order)
                    try:
                        async for frame in frames:
                            yield index, frame
                    finally:
                        await _close(frames)

    async def _generated(
        self, call: Call, orders: tuple[EngineRequest, ...], ask: CompletionAsk | ChatAsk, chat: bool
    ) -> web.StreamResponse:
        options = ask.stream_options
        shape = GeneratedShape(
            f"{'chatcmpl' if chat else 'cmpl'}-{call.request_id}",
            int(time.time()),
            call.model_id,
            call.spec.ref.version,
            chat,
            include_usage=bool(options and options.include_usage),
            orders=len(orders),
            choices=ask.n or 1,
            logprobs=any("logprobs" in order.fields for order in orders),
        )
        if ask.stream:
            with closing(EventStream(call.request, self._config.stall_seconds)) as stream:
                return await self._streamed(stream, call, orders, shape)
        async with aclosing(self._frames(call, orders)) as items:
            async for item in items:
                if isinstance(item, tuple):
                    shape.keep(shape.read(*item))
        answer = await _written(shape.about_bytes, shape.whole)
        return WholeAnswer(call.request.app, answer, "application/json").send_now(call.request)

    async def _streamed(
        self, stream: EventStream, call: Call, orders: tuple[EngineRequest, ...], shape: GeneratedShape
    ) -> web.StreamResponse:
        """The answer as it is made. Before its first event an error has its own status; later it is an
        event, which OpenAI's clients raise. The lease is over when the last event is sent."""
        source = with_silences(self._frames(call, orders), self._config.keep_alive_ms / 1000)
        doing = "restoring"
        try:
            async with aclosing(source) as items:
                async for item in items:
                    if item is None:
                        await stream.comment(doing)
                    elif isinstance(item, tuple):
                        for chunk in shape.chunks(shape.read(*item)):
                            await stream.data(chunk)
                    else:
                        doing = "working"
                        if stream.begun:  # too late for headers
                            await stream.comment(
                                f"restored tier={item.tier.value} restore_ms={item.restore_ms}"
                            )
            for chunk in shape.last_chunks():
                await stream.data(chunk)
            await stream.data(b"[DONE]")
        except ConnectionError:
            raise  # there is nobody to tell
        except Exception as error:
            if not stream.begun:
                raise
            body = openai_error(_broken_off(call.request, error))
            await stream.data(msgspec.json.encode(body))
        return await stream.end()


def _broken_off(request: web.Request, error: Exception) -> ApiError:
    """What a stream that can not go on says as its last event; nothing else may look like its end."""
    if isinstance(error, Refused | EngineError | EngineFault):
        return api_error(error, request[ASKED])
    return error if isinstance(error, ApiError) else internal_error(request, error)


def _count(order: EngineRequest) -> int:
    inputs = order.fields["inputs"]
    return len(inputs) if isinstance(inputs, list) else 0


async def _written(about_bytes: int, write: Callable[P, bytes], *args: P.args, **kwargs: P.kwargs) -> bytes:
    """Write an answer here when it is small, else on a thread, so that nobody else waits for it."""
    if about_bytes <= INLINE_BYTES_MAX:
        return write(*args, **kwargs)
    return await asyncio.to_thread(write, *args, **kwargs)


def _granted(call: Call, timing: Timing, lease: Lease) -> None:
    """The request has its model: note it for the answer's headers and for statistics."""
    timing.granted()
    facts = call.request[FACTS]
    facts.tier, facts.restore_ms, facts.device = lease.tier, lease.restore_ms, lease.device
    facts.restored_bytes = lease.restored_bytes


async def _close(frames: AsyncIterator[T]) -> None:
    """Close the iterator if it can be closed: that is what cancels in the worker."""
    close = getattr(frames, "aclose", None)
    if close is not None:
        await close()
