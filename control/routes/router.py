"""The router: tenants' calls under ``/v1`` go to the node that can answer soonest.

Covers: reading the model's name out of a call, choosing and trying nodes before the first byte of an
answer, and passing request and answer through, streamed, never gathered. ``/v1/models`` is answered
here. Does not cover: what an answer means or who may use how much (``agent/gateway.py`` and the node's
own quotas), or the order of nodes (``control.cluster``).

The tenant's own key is handed on: the node checks it again by itself, so that it can also be called
without this router.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import aiohttp
import msgspec
from aiohttp import web

from control import cluster as fleet
from control.routes.access import Access, Caller, Route
from control.state import Control
from packer.http import (
    CROWD,
    JSON_BYTES_MAX,
    PASSED_HEADERS,
    REQUEST_ID_HEADER,
    ApiError,
    decode_json,
    json_response,
    model_card,
    model_list,
    model_not_found,
    openai_error,
)
from packer.types import BadValue, ModelSpec, parse_model

# Requests that are being answered through this router. Each costs a socket on both sides.
IN_FLIGHT_MAX = 4_096
# A node that does not take a connection by then is not there.
CONNECT_SECONDS = 5.0
# A node says something at least every few seconds (SSE comments) or answers within a restore's time.
SILENT_SECONDS = 600.0
# A model or key that was made a moment ago is waited for this long to be known on a node.
PLAN_SECONDS = 5.0
# Nodes asked for one request; more would multiply a bad request's cost over the fleet.
TRIES_MAX = 3
RETRY_NO_NODE_MS = 2_000
RETRY_BUSY_MS = 1_000
# What may follow /v1/ and reach a node: plain words. No dots, no percent signs, so that a path means
# the same to this router and to the node.
PATH = re.compile(r"[a-z0-9_-]{1,64}(?:/[a-z0-9_-]{1,64}){0,7}")
# Request headers handed on. A list of what may pass, not of what may not: what a node does with an
# unknown header is not known here.
REQUEST_HEADERS = ("Authorization", "Content-Type", "Accept", "User-Agent", REQUEST_ID_HEADER)
REQUEST_HEADER_PREFIXES = ("x-bunkhouse-", "x-stainless-", "openai-")
ANSWER_HEADERS = frozenset({*PASSED_HEADERS, "content-type", "cache-control", "www-authenticate", "allow"})


class Names(msgspec.Struct):
    """The one field of a call that the router reads; the node checks all others."""

    model: str


@dataclass(frozen=True, slots=True)
class Call:
    """One tenant's call, ready to be sent to any node."""

    spec: ModelSpec
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


class NodeUnreachable(Exception):
    """A node gave no answer at all; another may."""


async def list_models(control: Control, request: web.Request, caller: Caller) -> web.Response:
    return json_response(model_list(control.catalog.models_of(caller.tenant or "")))


async def show_model(control: Control, request: web.Request, caller: Caller) -> web.Response:
    return json_response(model_card(_resolve(control, caller, request.match_info["ref"])))


def _resolve(control: Control, caller: Caller, text: str) -> ModelSpec:
    """The version that a call names, if it is the caller's; the one 404 for everything else."""
    try:
        model, version = parse_model(text)
    except BadValue:
        raise model_not_found(text) from None
    spec = control.catalog.resolve(model, version) if model.tenant == caller.tenant else None
    if spec is None:
        raise model_not_found(text)
    return spec


async def route(control: Control, request: web.Request, caller: Caller) -> web.StreamResponse:
    path = request.raw_path.partition("?")[0].removeprefix("/v1/")
    if request.method != "POST" or not PATH.fullmatch(path):
        raise ApiError(404, "unknown_route", f"There is no {request.method[:16]} /v1/{path[:80]!r} here.")
    if sum(view.in_flight for view in control.cluster.nodes.values()) >= IN_FLIGHT_MAX:
        raise ApiError(
            503,
            "router_busy",
            f"This router is answering {IN_FLIGHT_MAX} requests, its limit.",
            kind="server_error",
            retry_ms=RETRY_BUSY_MS,
            should_retry=True,
        )
    # The body is held until a node has answered with its first byte, so that another can be tried.
    async with control.bodies.body(request, caller.owner, JSON_BYTES_MAX) as body:
        spec = _resolve(control, caller, decode_json(body, Names).model)
        call = Call(spec, path, request.query_string, _request_headers(request), body)
        node, answer = await first_answer(control, caller, call, _send)
    reached = False
    try:
        response = await _pass_on(request, node, answer)
        reached = True
        return response
    finally:
        answer.close()
        control.act(fleet.step(control.cluster, fleet.Answered(node, reached), control.now_ms()))


def _request_headers(request: web.Request) -> dict[str, str]:
    names = [name for name in request.headers if name.lower().startswith(REQUEST_HEADER_PREFIXES)]
    kept = [name for name in (*REQUEST_HEADERS, *names) if name in request.headers]
    return {"Accept-Encoding": "identity", **{name: request.headers[name] for name in kept}}


class Head(Protocol):
    """The beginning of a node's answer."""

    @property
    def status(self) -> int: ...
    def close(self) -> None: ...


H = TypeVar("H", bound=Head)


async def first_answer(
    control: Control, caller: Caller, call: Call, send: Callable[[Control, str, Call], Awaitable[H]]
) -> tuple[str, H]:
    """The node that answers and the head of its answer; tries the next while nothing was passed on.

    ``send`` brings the call to a node and raises ``NodeUnreachable``. Whoever calls this owes the cluster
    core an ``Answered`` for the node that is returned.
    """
    await _until_known(control, caller, call.spec)
    nodes = _candidates(control, caller, call.spec)[:TRIES_MAX]
    for position, node in enumerate(nodes):
        last = position == len(nodes) - 1
        routed = fleet.Routed(node, call.spec.ref, call.spec.image_bytes)
        control.act(fleet.step(control.cluster, routed, control.now_ms()))
        answered, reached = False, False
        try:
            answer = await send(control, node, call)
            reached = True
            # 502 and 503 mean "not here, not now": it drains, or every tier failed it.
            if last or answer.status not in (502, 503):
                answered = True
                return node, answer
            answer.close()
        except NodeUnreachable as error:
            control.log_fault(f"node {node}", error)
        except asyncio.CancelledError:
            reached = True  # the caller left; that says nothing about the node
            raise
        finally:
            if not answered:
                control.act(fleet.step(control.cluster, fleet.Answered(node, reached), control.now_ms()))
    raise ApiError(
        503,
        "no_node",
        "No node can answer now: none is connected, or none could be reached.",
        kind="server_error",
        hint="The operator sees the nodes with: bunk node ls",
        retry_ms=RETRY_NO_NODE_MS,
        should_retry=True,
    )


def _seq_needed(control: Control, caller: Caller, spec: ModelSpec) -> int:
    catalog = control.catalog
    return max(catalog.model_seq.get(spec.ref, 0), catalog.key_seq.get(caller.key_id, 0))


def _candidates(control: Control, caller: Caller, spec: ModelSpec) -> list[str]:
    """Nodes in the core's order, those that have heard of the model and the key before the others."""
    seq = _seq_needed(control, caller, spec)
    nodes = fleet.choose_node(control.cluster, spec.ref, spec.image_bytes, control.now_ms())
    return sorted(nodes, key=lambda node: not fleet.knows(control.cluster, node, seq))


async def _until_known(control: Control, caller: Caller, spec: ModelSpec) -> None:
    """Wait until some node has confirmed a plan that has the model and the key.

    They may have been made a moment ago, or control may have started a moment ago and its nodes are on
    their way back.
    """

    def known() -> bool:
        seq = _seq_needed(control, caller, spec)
        nodes = fleet.choose_node(control.cluster, spec.ref, spec.image_bytes, control.now_ms())
        if nodes:
            return any(fleet.knows(control.cluster, node, seq) for node in nodes)
        views = control.cluster.nodes.values()
        return not any(view.report is None and not view.silent for view in views)

    await control.until_heard(known, PLAN_SECONDS)


async def _send(control: Control, node: str, call: Call) -> aiohttp.ClientResponse:
    view = control.cluster.nodes.get(node)
    if view is None:
        raise NodeUnreachable("removed")
    url = f"{view.gateway_url.rstrip('/')}/v1/{call.path}"
    try:
        return await control.session.post(
            url,
            params=call.query or None,
            data=call.body,
            headers=call.headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
        )
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NodeUnreachable(f"{type(error).__name__}: {error}") from None


async def _pass_on(request: web.Request, node: str, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """Hand the answer on piece by piece, each as soon as it is here."""
    response = web.StreamResponse(status=answer.status, headers=_answer_headers(answer))
    if answer.content_length is not None:
        response.content_length = answer.content_length
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await _write(request, response, piece)
    except (aiohttp.ClientError, TimeoutError) as error:
        await _break_off(response, node, error)
    await response.write_eof()
    return response


async def _write(request: web.Request, response: web.StreamResponse, piece: bytes) -> None:
    """A caller that does not read would keep the node's answer, and a place here, for ever."""
    stall_seconds = request.app[CROWD].stall_seconds
    try:
        async with asyncio.timeout(stall_seconds):
            await response.write(piece)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(f"the caller took nothing for {stall_seconds:g} s") from None


async def _break_off(response: web.StreamResponse, node: str, error: Exception) -> None:
    """The node went away in mid-answer: a stream can say so; anything else must not look complete."""
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        raise ConnectionResetError(f"node {node} broke off: {type(error).__name__}")
    lost = ApiError(
        503,
        "node_lost",
        "The node that was answering went away; the answer is not complete. Send the request again.",
        kind="server_error",
    )
    await response.write(b"data: " + json.dumps(openai_error(lost)).encode() + b"\n\n")


def _answer_headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.lower() in ANSWER_HEADERS}


ROUTES = (
    Route("GET", "/v1/models", Access.TENANT, list_models, stays=False),
    Route("GET", "/v1/models/{ref:.+}", Access.TENANT, show_model, stays=False),
    Route("*", "/v1/{path:.*}", Access.TENANT, route, stays=False),
)
