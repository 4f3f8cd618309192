"""The router's routes: tenants' calls under ``/v1`` go to the node that can answer soonest.

Covers: reading the model's name out of a call; ``/v1/models`` is answered here. Does not cover: bringing a
call to a node and its answer back (``forwarding``), or what an answer means (``agent/gateway.py``).
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from control.operations import JSON, Operation, Passed, Result
from control.routes.access import Access, Caller, Route
from control.routes.forwarding import (
    Call,
    Stopwatch,
    ask_nodes,
    call_query,
    check_room,
    hand_on,
    request_headers,
)
from control.routing import Routing
from packer.http import (
    JSON_BYTES_MAX,
    ApiError,
    ModelCard,
    ModelList,
    decode_json,
    json_response,
    model_card,
    model_list,
    model_not_found,
)
from packer.types import BadValue, ModelSpec, parse_model


class Names(msgspec.Struct):
    """The one field of a call that the router reads; the node checks all others."""

    model: str


async def list_models(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    return json_response(model_list(control.catalog.models_of(caller.tenant or "")))


async def show_model(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    return json_response(model_card(resolve(control, caller, request.match_info["ref"])))


def resolve(control: Routing, caller: Caller, text: str) -> ModelSpec:
    """The version that a call names, if it is the caller's; the one 404 for everything else."""
    try:
        model, version = parse_model(text)
    except BadValue:
        raise model_not_found(text) from None
    spec = control.catalog.resolve(model, version) if model.tenant == caller.tenant else None
    if spec is None:
        raise model_not_found(text)
    return spec


def unknown_route(method: str, path: str) -> ApiError:
    """Also for what OpenAI has and we have not: before anybody looks for its model."""
    there = "/v1/models, /v1/embeddings, /v1/classify, /v1/completions and /v1/chat/completions"
    message = f"There is no {method[:16]} {path[:80]!r} here; there are {there}."
    return ApiError(404, "unknown_route", message)


async def route(control: Routing, request: web.Request, caller: Caller) -> web.StreamResponse:
    """A call that names its model in its JSON body."""
    watch = Stopwatch()
    path = request.raw_path.partition("?")[0]
    # As it came: a path means the same to this router and to the node.
    if request.method != "POST" or path not in SERVED:
        raise unknown_route(request.method, path)
    check_room(control)
    # The body is held until a node has answered with its first byte, so that another can be tried.
    async with control.bodies.body(request, caller.owner, JSON_BYTES_MAX) as body:
        watch.waited_since(watch.begun_s)
        spec = resolve(control, caller, decode_json(body, Names).model)
        call = Call(spec, "POST", path, call_query(request), request_headers(request), body)
        begun = await ask_nodes(control, caller, call, watch)
    return await hand_on(control, request, begun)


def _passed(path: str, name: str, summary: str, *media: str) -> Passed:
    # Answers are OpenAI's own shapes: its document describes them, ours does not repeat it.
    result = Result(200, "As OpenAI's API answers.", dict[str, msgspec.Raw], (JSON, *media))
    refusals = {
        404: "There is no such model, or it is not yours.",
        422: "The model can not do this.",
        500: "The node failed.",
        502: "The node failed.",
        507: "The model does not fit; waiting can not help.",
    }
    return Passed("POST", path, Operation(name, summary, [result], Names, refusals=refusals))


PASSED = (
    _passed("/v1/embeddings", "createEmbedding", "Embed texts or tokens."),
    _passed("/v1/classify", "classify", "Classify texts."),
    _passed("/v1/completions", "createCompletion", "Continue a text.", "text/event-stream"),
    _passed("/v1/chat/completions", "createChatCompletion", "Answer a conversation.", "text/event-stream"),
)
SERVED = frozenset(each.path for each in PASSED)
ROUTES = (
    Route(
        "GET",
        "/v1/models",
        Access.TENANT,
        list_models,
        stays=False,
        operation=Operation(
            "listOpenAiModels", "The models that the key may call.", [Result(200, "All of them.", ModelList)]
        ),
    ),
    Route(
        "GET",
        "/v1/models/{ref:.+}",
        Access.TENANT,
        show_model,
        stays=False,
        operation=Operation("showOpenAiModel", "One model.", [Result(200, "The model.", ModelCard)]),
    ),
    Route("*", "/v1/{path:.*}", Access.TENANT, route, stays=False, passes=PASSED),
)
