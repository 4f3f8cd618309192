"""The Open Inference Protocol v2 on a node's gateway.

Covers: its routes, which model a path means and whether its key may know of it, and an inference from body to
answer. Does not cover: tensors in bodies (``oip_tensors``), what models make of them (``oip_models``), leases
(``gateway``), or the shapes that the router shares (``packer/oip.py``).

The same keys, quotas, limits and headers as OpenAI's routes: all of them come from the gateway's own
middlewares and its one way to run a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from aiohttp import web

from agent.facade import EngineError, EngineFrame, EngineRequest, NodeFacade
from agent.guard import KEY
from agent.oip_answers import Answer, write_answer
from agent.oip_models import order_of, tensors_of
from agent.oip_stats import Statistics
from agent.oip_tensors import WantedOutput, header_length, read_inference
from agent.openai_shapes import bad_field
from packer.body_budget import BodyBudget
from packer.http import ApiError, json_response, model_not_found
from packer.oip import (
    HEADER_LENGTH,
    QUESTION_BYTES_MAX,
    Asks,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    StatsAnswer,
    asked_path,
    body_limit,
    check_index_ask,
    index,
    model_config,
    model_metadata,
    no_loading,
    parse_load_path,
    signature_of,
    unknown_route,
)
from packer.release import server_version
from packer.types import KIB, ModelSpec, Task, TensorSignature
from packer.whole_answer import WholeAnswer

P = ParamSpec("P")
T = TypeVar("T")

# Runs one order under a lease and gives its one frame: the gateway's.
RunOne = Callable[[web.Request, ModelSpec, EngineRequest], Awaitable[EngineFrame]]

# A larger body or answer is read or written on a thread, one at a time: its numbers are Python objects then.
INLINE_BYTES_MAX = 64 * KIB


class OipRoutes:
    """The handlers. ``bodies`` is the gateway's: one budget for all that a tenant sends."""

    def __init__(self, node: NodeFacade, bodies: BodyBudget, statistics: Statistics, run_one: RunOne) -> None:
        self._node = node
        self._bodies = bodies
        self._statistics = statistics
        self._run_one = run_one
        self._large = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v2", self.server),
            web.get("/v2/", self.server),
            web.get("/v2/health/live", self.live),
            web.get("/v2/health/ready", self.ready),
            web.get("/v2/models/stats", self.all_stats),
            # Raw and encoded slashes alike: the path is decoded once, then parsed by the one parser.
            web.get("/v2/models/{path:.+}", self.about_model),
            web.post("/v2/models/{path:.+}", self.infer),
            web.post("/v2/repository/index", self.index),
            web.post("/v2/repository/models/{path:.+}", self.load),
        ]

    # --- the server -----------------------------------------------------------------------------------

    async def server(self, request: web.Request) -> web.Response:
        return json_response(ServerMetadata(server_version()))

    async def live(self, request: web.Request) -> web.Response:
        return json_response(ServerLive())

    async def ready(self, request: web.Request) -> web.Response:
        ready = self._node.ready()
        return json_response(ServerReady(ready), status=200 if ready else 503)

    async def index(self, request: web.Request) -> web.Response:
        tenant = request[KEY].tenant
        async with self._bodies.body(request, tenant, QUESTION_BYTES_MAX) as body:
            check_index_ask(body)
        return json_response(index(self._node.models_of(tenant)))

    async def load(self, request: web.Request) -> web.Response:
        asked = parse_load_path(request.match_info["path"])
        if asked is None:
            raise unknown_route(request.method, request.path)
        self._resolve(request, asked.model)
        raise no_loading(asked.model, asked.word)

    # --- a model --------------------------------------------------------------------------------------

    async def about_model(self, request: web.Request) -> web.Response:
        path = asked_path(request)
        spec = self._resolve(request, path.model)
        match path.asks:
            case Asks.READY:
                ready = self._node.ready()
                answer = ModelReady(str(spec.ref.model), ready)
                return json_response(answer, status=200 if ready else 503)
            case Asks.CONFIG:
                return json_response(model_config(spec))
            case Asks.STATS:
                return json_response(StatsAnswer([self._statistics.of(spec.ref)]))
        return json_response(model_metadata(spec, self._node.models_of(spec.ref.tenant)))

    async def all_stats(self, request: web.Request) -> web.Response:
        own = sorted(self._node.models_of(request[KEY].tenant), key=lambda spec: spec.ref)
        return json_response(StatsAnswer([self._statistics.of(spec.ref) for spec in own]))

    async def infer(self, request: web.Request) -> web.Response:
        path = asked_path(request)
        spec = self._resolve(request, path.model)
        signature = signature_of(spec)
        if signature is None:
            raise bad_field(
                "model",
                "this is a model for generation, which this protocol has no request for: call it at "
                "/v1/chat/completions or /v1/completions.",
                "wrong_task",
            )
        header_bytes = header_length(request.headers.getall(HEADER_LENGTH, []))
        limit_bytes = body_limit(header_bytes is not None, request.content_length or 0)
        async with self._bodies.body(request, request[KEY].tenant, limit_bytes) as body:
            asked = await self._sized(len(body), _read, body, header_bytes, spec, signature)
            del body
            try:
                frame = await self._run_one(request, spec, asked.order)
            except EngineError as error:
                raise _at_fault(spec, error) from None
            asked = asked.answered()
            answer = await self._sized(len(frame.body), _write, spec, signature, asked, frame)
        headers = {} if answer.header_bytes is None else {HEADER_LENGTH: str(answer.header_bytes)}
        kind = "application/json" if answer.header_bytes is None else "application/octet-stream"
        return WholeAnswer(request.app, answer.body, kind, headers=headers).send_now(request)

    # --- how ------------------------------------------------------------------------------------------

    def _resolve(self, request: web.Request, asked: str) -> ModelSpec:
        """One answer for absent and foreign, before anything is read or spent."""
        spec = self._node.resolve(request[KEY].tenant, asked)
        if spec is None:
            raise model_not_found(asked)
        return spec

    async def _sized(self, nbytes: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Read or write here when it is small, else on a thread, one after the other."""
        if nbytes <= INLINE_BYTES_MAX:
            return call(*args, **kwargs)
        async with self._large:
            return await asyncio.to_thread(call, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is left of a request once its tensors are in the order: they are large, and held once only."""

    id: str | None
    outputs: tuple[WantedOutput, ...]
    order: EngineRequest

    def answered(self) -> Asked:
        """Without the tensors, which nobody needs any more."""
        return replace(self, order=replace(self.order, body=b""))


def _read(body: bytes, header_bytes: int | None, spec: ModelSpec, signature: TensorSignature) -> Asked:
    inference = read_inference(body, header_bytes, signature)
    return Asked(inference.id, inference.outputs, order_of(spec, inference))


def _write(spec: ModelSpec, signature: TensorSignature, asked: Asked, frame: EngineFrame) -> Answer:
    tensors = tensors_of(spec, signature, asked.order, frame)
    return write_answer(str(spec.ref.model), spec.ref.version, asked.id, asked.outputs, tensors)


def _at_fault(spec: ModelSpec, error: EngineError) -> ApiError:
    """An engine of texts speaks of ``inputs[3]``, the caller of the fourth element of ``text``."""
    field = error.field
    if field is not None and spec.task is not Task.TENSORS:
        name, bracket, rest = field.partition("[")
        field = ("text" if name == "inputs" else name) + bracket + rest
    return ApiError(400, error.code, f"{field}: {error.message}" if field else error.message, field=field)
