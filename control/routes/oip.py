"""The Open Inference Protocol v2 on the router.

Covers: health, metadata, configuration and the index from control's own catalog, statistics added up over the
nodes, and bringing an inference to a node. Does not cover: carrying it there and back (``forwarding``),
tensors (a body is not looked at here), or the shapes that nodes share (``packer/oip.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import msgspec
from aiohttp import web

from control.cluster import NodeView
from control.node_tls import NoLine
from control.operations import JSON, Operation, Passed, Result
from control.routes.access import Access, Caller, Route
from control.routes.forwarding import (
    Call,
    Once,
    Stopwatch,
    ask_nodes,
    check_room,
    hand_on,
    request_headers,
)
from control.routes.router import resolve
from control.routing import Routing
from packer.http import CROWD, JSON_BYTES_MAX, json_response
from packer.oip import (
    HEADER_LENGTH,
    QUESTION_BYTES_MAX,
    Asks,
    IndexEntry,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    StatsAnswer,
    add_stats,
    asked_path,
    body_limit,
    check_index_ask,
    empty_stats,
    index,
    model_config,
    model_metadata,
    model_path,
    no_loading,
    parse_load_path,
    unknown_route,
)
from packer.release import server_version
from packer.types import MIB, ModelSpec

# Nodes that are asked for one answer to a question for statistics: those that answered the models most.
STATS_NODES_MAX = 16
# A node that does not answer by then is left out.
STATS_SECONDS = 5.0
# 10,000 versions, the most that a node counts, take 7 MB.
STATS_BYTES_MAX = 8 * MIB


# --- the server -----------------------------------------------------------------------------------


async def server(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    return json_response(ServerMetadata(server_version()))


async def live(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    return json_response(ServerLive())


async def ready(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    is_ready = _ready(control)
    return json_response(ServerReady(is_ready), 200 if is_ready else 503)


def _ready(control: Routing) -> bool:
    """Whether some node takes requests now."""
    return not control.stopping and any(_up(view) for view in control.cluster.nodes.values())


def _up(view: NodeView) -> bool:
    return view.report is not None and not view.silent and not view.report.draining


async def list_models(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    async with control.bodies.body(request, caller.owner, QUESTION_BYTES_MAX) as body:
        check_index_ask(body)
    return json_response(index(_own(control, caller)))


async def load(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    asked = parse_load_path(request.match_info["path"])
    if asked is None:
        raise unknown_route(request.method, request.path)
    resolve(control, caller, asked.model)
    raise no_loading(asked.model, asked.word)


# --- a model --------------------------------------------------------------------------------------


async def about_model(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    path = asked_path(request)
    spec = resolve(control, caller, path.model)
    match path.asks:
        case Asks.READY:
            is_ready = _ready(control)
            return json_response(ModelReady(str(spec.ref.model), is_ready), 200 if is_ready else 503)
        case Asks.CONFIG:
            return json_response(model_config(spec))
        case Asks.STATS:
            return json_response(await _statistics(control, request, [spec]))
    return json_response(model_metadata(spec, _own(control, caller)))


async def all_stats(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    return json_response(await _statistics(control, request, _own(control, caller)))


async def infer(control: Routing, request: web.Request, caller: Caller) -> web.StreamResponse:
    """Small bodies are held, so that another node can be tried; larger ones pass through, once."""
    watch = Stopwatch()
    path = asked_path(request)
    spec = resolve(control, caller, path.model)
    check_room(control)
    declared = request.content_length
    limit_bytes = body_limit(HEADER_LENGTH in request.headers, declared or 0)
    # The version is said to the node, so that both mean the same although its plan may be another.
    to, headers = f"/{model_path(spec.ref, Asks.INFER)}", request_headers(request)
    if declared is None or declared > JSON_BYTES_MAX:
        once = Once(request, limit_bytes, request.app[CROWD].stall_seconds)
        begun = await ask_nodes(control, caller, Call(spec, "POST", to, "", headers, once), watch)
        return await hand_on(control, request, begun)
    async with control.bodies.body(request, caller.owner) as body:
        watch.waited_since(watch.begun_s)
        begun = await ask_nodes(control, caller, Call(spec, "POST", to, "", headers, body), watch)
    return await hand_on(control, request, begun)


def _own(control: Routing, caller: Caller) -> Sequence[ModelSpec]:
    return control.catalog.models_of(caller.tenant or "")


# --- statistics -----------------------------------------------------------------------------------


async def _statistics(control: Routing, request: web.Request, specs: Sequence[ModelSpec]) -> StatsAnswer:
    """Of these versions, added up over the nodes that answered them, each since its agent started."""
    wanted = {str(spec.ref) for spec in specs}
    counted: list[tuple[int, NodeView]] = []
    for view in control.cluster.nodes.values():
        refs = wanted & view.by_ref.keys()
        if refs and not view.silent:
            counted.append((sum(view.by_ref[ref].requests for ref in refs), view))
    counted.sort(key=lambda each: (-each[0], each[1].node))
    asked = [view for _, view in counted[:STATS_NODES_MAX]]
    headers = request_headers(request)
    rows = empty_stats(specs)
    for answer in await asyncio.gather(*(_ask_stats(control, view, headers) for view in asked)):
        for row in answer.model_stats:
            if (found := rows.get((row.name, row.version))) is not None:
                add_stats(found, row)
    return StatsAnswer(list(rows.values()))


async def _ask_stats(control: Routing, view: NodeView, headers: dict[str, str]) -> StatsAnswer:
    """What a node counted of the caller's models; nothing when it does not say in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(STATS_SECONDS):
            line = control.lines.to(view.node)
            url = f"{line.url}/v2/models/stats"
            async with control.session.get(
                url, headers=headers, ssl=line.tls, allow_redirects=False
            ) as answer:
                while answer.status == 200 and len(body) <= STATS_BYTES_MAX:
                    piece = await answer.content.readany()
                    if not piece:
                        return msgspec.json.decode(body, type=StatsAnswer)
                    body += piece
    except (aiohttp.ClientError, NoLine, TimeoutError, OSError, msgspec.MsgspecError, UnicodeError) as error:
        control.log_fault(f"node {view.node}", error)
    return StatsAnswer([])


# --- the table ------------------------------------------------------------------------------------

_MODEL = "/v2/models/{ref}"
_NO_MODEL = {404: "There is no such model, or it is not yours."}
_INFER = {
    **_NO_MODEL,
    422: "The model can not do this.",
    500: "The node failed.",
    502: "The node failed.",
    504: "The node said nothing for too long.",
    507: "The model does not fit; waiting can not help.",
}
_LOAD = {
    400: "A model can not be loaded or unloaded by hand.",
    **_NO_MODEL,
}


def _asked(word: str, name: str, summary: str, kind: object, *more: Result) -> tuple[Passed, Passed]:
    """One question about a model, with and without a version in the path."""
    results = [Result(200, "The answer.", kind), *more]
    return (
        Passed("GET", f"{_MODEL}{word}", Operation(name, summary, results, refusals=_NO_MODEL)),
        Passed(
            "GET",
            f"{_MODEL}/versions/{{version}}{word}",
            Operation(f"{name}Version", summary, results, refusals=_NO_MODEL),
        ),
    )


def _infer(path: str, name: str) -> Passed:
    # Tensors may follow the JSON as raw bytes: the protocol describes them, the document does not repeat it.
    result = Result(200, "The outputs.", dict[str, msgspec.Raw], (JSON, "application/octet-stream"))
    return Passed(
        "POST",
        path,
        Operation(name, "Run a model on tensors.", [result], dict[str, msgspec.Raw], refusals=_INFER),
    )


_NOT_READY = Result(503, "No node takes requests now.", ModelReady)
ABOUT = (
    *_asked("", "showOipModel", "What a model takes and gives.", ModelMetadata),
    *_asked("/ready", "oipModelReady", "Whether a model may be called.", ModelReady, _NOT_READY),
    *_asked("/config", "showOipConfig", "A model's configuration.", ModelConfig),
    *_asked("/stats", "showOipStats", "A model's counts and times.", StatsAnswer),
)
INFER = (
    _infer(f"{_MODEL}/infer", "infer"),
    _infer(f"{_MODEL}/versions/{{version}}/infer", "inferVersion"),
)
LOAD = tuple(
    Passed(
        "POST",
        f"/v2/repository/models/{{ref}}/{word}",
        Operation(f"{word}OipModel", f"Refused: no {word}ing by hand.", [], refusals=_LOAD),
    )
    for word in ("load", "unload")
)


def _shown(name: str, summary: str, kind: object, *more: Result) -> Operation:
    return Operation(name, summary, [Result(200, "The answer.", kind), *more])


ROUTES = (
    *(
        Route(
            "GET",
            path,
            Access.TENANT,
            server,
            stays=False,
            operation=_shown(name, "What this server is.", ServerMetadata),
        )
        for path, name in (("/v2", "showOipServer"), ("/v2/", "showOipServerSlash"))
    ),
    Route(
        "GET",
        "/v2/health/live",
        Access.OPEN,
        live,
        stays=False,
        operation=_shown("oipLive", "Whether this server runs.", ServerLive),
    ),
    Route(
        "GET",
        "/v2/health/ready",
        Access.OPEN,
        ready,
        stays=False,
        operation=_shown(
            "oipReady",
            "Whether a node takes requests.",
            ServerReady,
            Result(503, "None does now.", ServerReady),
        ),
    ),
    Route(
        "GET",
        "/v2/models/stats",
        Access.TENANT,
        all_stats,
        stays=False,
        operation=_shown("listOipStats", "Counts and times of the caller's models.", StatsAnswer),
    ),
    Route("GET", "/v2/models/{path:.+}", Access.TENANT, about_model, stays=False, passes=ABOUT),
    Route("POST", "/v2/models/{path:.+}", Access.TENANT, infer, stays=False, passes=INFER),
    Route(
        "POST",
        "/v2/repository/index",
        Access.TENANT,
        list_models,
        stays=False,
        operation=_shown("listOipModels", "The caller's models.", tuple[IndexEntry, ...]),
    ),
    Route("POST", "/v2/repository/models/{path:.+}", Access.TENANT, load, stays=False, passes=LOAD),
)
