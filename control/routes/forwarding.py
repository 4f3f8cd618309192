"""Carrying a tenant's call to a node and the answer back: the core of the router, whatever the protocol.

Covers: choosing and trying nodes before the first byte of an answer, and bringing them the request, streamed
or held within a fixed size. Does not cover: the answer's way back (``answers``), which routes there are and
where a call names its model (``router``), what an answer means or who may use how much
(``agent/gateway.py`` and the node's own quotas), or the order of nodes (``control.choosing``).

The tenant's own key is handed on: the node checks it again by itself, so that it can also be called
without this router.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import aiohttp
from aiohttp import web
from yarl import URL

from control import choosing, copies
from control import cluster as fleet
from control.node_session import ask_for_connection
from control.node_tls import NoLine
from control.routes.access import Caller
from control.routes.answers import NodeAnswer, NodeFailed, hold, pass_on
from control.routing import Routing
from control.waits import REFUSED_STATUSES
from packer.gangs import share_bytes
from packer.http import (
    CONNECT_ANEW,
    REQUEST_ID_HEADER,
    ApiError,
    too_large,
)
from packer.types import ModelSpec

# Requests that are being answered through this router. Each costs a socket on both sides.
IN_FLIGHT_MAX = 4_096
# A model or key that was made a moment ago is waited for this long to be known on a node.
PLAN_SECONDS = 5.0
# Nodes asked for one request; more would multiply a bad request's cost over the fleet.
TRIES_MAX = 3
# Connections that turn out to be dropped, met by one call to one node.
STALE_MAX = 3
RETRY_NO_NODE_MS = 2_000
RETRY_BUSY_MS = 1_000
# Request headers handed on. A list of what may pass, not of what may not: what a node does with an
# unknown header is not known here. No Host, no hop-by-hop header, nothing about who forwarded what.
REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Accept",
    "User-Agent",
    "Inference-Header-Content-Length",
    REQUEST_ID_HEADER,
)
REQUEST_HEADER_PREFIXES = ("x-bunkhouse-", "x-stainless-", "openai-")
# "Not here, not now": worth another node.
ELSEWHERE_STATUSES = frozenset({502, 503})
# A node that says so is not the place for the model at all; after any other refusal only a node that has
# the model is worth a try, since loading it a second time costs more than coming back.
ANYWHERE_CODES = frozenset({"node_draining", "restore_failed"})
# What a node answers that has not heard of a key or a model yet.
BEHIND_CODES = frozenset({"invalid_api_key", "model_not_found"})


class NodeUnreachable(Exception):
    """A node gave no answer at all; another may."""


class Once:
    """A request's body that passes through piece by piece, and can be sent only once.

    Nothing is gathered: what the node does not take, the caller can not send.
    """

    def __init__(self, request: web.Request, limit_bytes: int, stall_seconds: float) -> None:
        declared = request.content_length
        if declared is not None and declared > limit_bytes:
            raise too_large(limit_bytes)
        self.length = declared
        self.begun = False
        self.failed: ApiError | ConnectionResetError | None = None
        self._content = request.content
        self._limit_bytes = limit_bytes
        self._stall_seconds = stall_seconds

    async def pieces(self) -> AsyncIterator[bytes]:
        self.begun = True
        passed = 0
        try:
            while True:
                async with asyncio.timeout(self._stall_seconds):
                    piece = await self._content.readany()
                if not piece:
                    return
                passed += len(piece)
                if passed > self._limit_bytes:
                    self.failed = too_large(self._limit_bytes)
                    raise self.failed
                yield piece
        except TimeoutError:
            self.failed = ApiError(
                408, "body_timeout", f"Nothing of the request's body came for {self._stall_seconds:g} s."
            )
            raise self.failed from None
        except (ConnectionError, aiohttp.ClientPayloadError, web.RequestPayloadError) as error:
            self.failed = ConnectionResetError(f"the caller left: {type(error).__name__}")
            raise self.failed from None


@dataclass(frozen=True, slots=True)
class Call:
    """One tenant's call, ready to be sent to any node. ``path`` and ``query`` are quoted already."""

    spec: ModelSpec
    method: str
    path: str  # from the node's first slash on
    query: str
    headers: Mapping[str, str]
    body: bytes | Once

    @property
    def sendable(self) -> bool:
        """Whether it can (still) be sent to a node."""
        return not (isinstance(self.body, Once) and self.body.begun)


@dataclass(slots=True)
class Stopwatch:
    """How much of a request's time was the router's own: all but waiting for the caller and the node."""

    begun_s: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0

    @property
    def own_ms(self) -> float:
        return (time.perf_counter() - self.begun_s - self.waited_s) * 1000

    def waited_since(self, since_s: float) -> None:
        self.waited_s += time.perf_counter() - since_s


class Head(Protocol):
    """The beginning of a node's answer."""

    @property
    def status(self) -> int: ...
    @property
    def code(self) -> str: ...
    def close(self) -> None: ...


H = TypeVar("H", bound=Head)


# --- the whole way --------------------------------------------------------------------------------


@dataclass(slots=True)
class Begun:
    """A call that a node has begun to answer. ``hand_on`` must follow."""

    spec: ModelSpec
    node: str
    answer: NodeAnswer
    watch: Stopwatch


async def ask_nodes(control: Routing, caller: Caller, call: Call, watch: Stopwatch) -> Begun:
    """Bring a call to a node that answers. The call's body is of no use any more after that."""

    async def send(control: Routing, node: str, call: Call) -> NodeAnswer:
        return await _send(control, node, call, watch)

    control.routed.calls += 1
    return Begun(call.spec, *await first_answer(control, caller, call, send), watch)


async def hand_on(control: Routing, request: web.Request, begun: Begun) -> web.StreamResponse:
    """Hand the answer to the caller, to its end."""

    def head_out() -> None:
        control.routed.added(begun.watch.own_ms)

    answer = begun.answer
    try:
        return await pass_on(control, request, begun.node, answer, head_out)
    except (asyncio.CancelledError, ConnectionError):
        control.routed.left += not answer.broke
        raise
    finally:
        answer.close()
        # That a caller leaves says nothing about the node.
        ended = fleet.Answered(begun.node, not answer.broke, begun.spec.ref, answer.status)
        control.act(fleet.step(control.cluster, ended, control.now_ms()))


def check_room(control: Routing) -> None:
    """Refuse a request beyond what this router carries at one time, before its body is read."""
    if control.cluster.in_flight >= IN_FLIGHT_MAX:
        raise ApiError(
            503,
            "router_busy",
            f"This router is answering {IN_FLIGHT_MAX} requests, its limit.",
            kind="server_error",
            retry_ms=RETRY_BUSY_MS,
            should_retry=True,
        )


def call_query(request: web.Request) -> str:
    """The query as the caller wrote it."""
    query = request.raw_path.partition("?")[2].partition("#")[0]
    if not query.isascii() or not query.isprintable() or " " in query:
        raise ApiError(400, "invalid_query", "The query must be percent-encoded ASCII.")
    return query


def request_headers(request: web.Request) -> dict[str, str]:
    """What of a request's headers reaches the node. One that ``Connection`` names ends here."""
    ended = {
        name.strip().lower()
        for value in request.headers.getall("Connection", ())
        for name in value.split(",")
    }
    names = [name for name in request.headers if name.lower().startswith(REQUEST_HEADER_PREFIXES)]
    kept = {"Accept-Encoding": "identity"}
    for name in (*REQUEST_HEADERS, *names):
        if name in request.headers and (name.lower() not in ended or name == "Authorization"):
            kept[name] = request.headers[name]
    return kept


# --- to a node ------------------------------------------------------------------------------------


async def first_answer(
    control: Routing, caller: Caller, call: Call, send: Callable[[Routing, str, Call], Awaitable[H]]
) -> tuple[str, H]:
    """The node that answers and the head of its answer; tries the next while nothing was passed on.

    ``send`` brings the call to a node and raises ``NodeUnreachable``. Whoever calls this owes the cluster
    core an ``Answered`` for the node that is returned.
    """
    left = await candidates(control, caller, call.spec)
    refused: tuple[str, H] | None = None
    asked: list[str] = []
    try:
        while len(asked) < TRIES_MAX and call.sendable:
            if not left:
                left = _others(control, caller, call.spec, asked, refused[1].code if refused else None)
            if not left:
                break
            node = left.pop(0)
            asked.append(node)
            control.routed.tries += 1
            answer = await _try(control, node, call, send)
            if answer is None:
                continue
            if refused is not None:
                _settle(control, call.spec, refused)
                refused = None
            if not _worth_another(control, caller, call.spec, node, answer):
                return node, answer
            control.routed.elsewhere += 1
            refused = (node, answer)
            left = []
    except BaseException:
        if refused is not None:
            _settle(control, call.spec, refused)
        raise
    if refused is not None and refused[1].code not in BEHIND_CODES:
        return refused
    if refused is not None:
        _settle(control, call.spec, refused)
    raise ApiError(
        503,
        "no_node",
        "No node can answer now: none is connected, all drain, none could be reached, or none knows of it "
        "yet.",
        kind="server_error",
        hint="The operator sees the nodes with: bunk node ls",
        retry_ms=RETRY_NO_NODE_MS,
        should_retry=True,
    )


def _others(
    control: Routing, caller: Caller, spec: ModelSpec, asked: Sequence[str], code: str | None
) -> list[str]:
    """All other nodes that may be asked, after a refusal with ``code`` if there was one."""
    nodes = [node for node in _known_first(control, caller, spec) if node not in asked]
    if code is None or code in ANYWHERE_CODES | BEHIND_CODES:
        return nodes
    return [node for node in nodes if choosing.is_there(control.cluster, node, spec.ref)]


def _worth_another(control: Routing, caller: Caller, spec: ModelSpec, node: str, answer: Head) -> bool:
    if answer.status in ELSEWHERE_STATUSES:
        return True
    # What a node would not take a further copy for, one that has it may answer all the same.
    if answer.status in REFUSED_STATUSES and copies.is_further(control.cluster, spec, node):
        return True
    if answer.code not in BEHIND_CODES:
        return False
    # Control knows the key and the model: a node that does not has an older plan.
    return not fleet.knows(control.cluster, node, seq_needed(control, caller, spec))


async def _try(
    control: Routing, node: str, call: Call, send: Callable[[Routing, str, Call], Awaitable[H]]
) -> H | None:
    """One node's answer; None when it could not be reached. Its end is told to the core if it is none."""
    spec = call.spec
    wait_ms = copies.wait_ms(control.cluster, spec, node, control.now_ms()) if spec.replicas > 1 else None
    routed = fleet.Routed(node, spec.ref, share_bytes(spec), spec.devices, wait_ms)
    control.act(fleet.step(control.cluster, routed, control.now_ms()))
    answered, reached = False, True  # that a caller leaves, or sends too much, says nothing about the node
    try:
        answer = await send(control, node, call)
        answered = True
        return answer
    except NodeUnreachable as error:
        reached = False
        control.routed.unreachable += 1
        control.log_fault(f"node {node}", error)
        return None
    except NodeFailed:
        reached = False
        raise
    finally:
        if not answered:
            ended = fleet.Answered(node, reached, spec.ref)
            control.act(fleet.step(control.cluster, ended, control.now_ms()))


def _settle(control: Routing, spec: ModelSpec, refused: tuple[str, Head]) -> None:
    """An answer that is not passed on."""
    node, answer = refused
    answer.close()
    ended = fleet.Answered(node, True, spec.ref, answer.status)
    control.act(fleet.step(control.cluster, ended, control.now_ms()))


def seq_needed(control: Routing, caller: Caller, spec: ModelSpec) -> int:
    catalog = control.catalog
    return max(catalog.model_seq.get(spec.ref, 0), catalog.key_seq.get(caller.key_id, 0))


async def candidates(control: Routing, caller: Caller, spec: ModelSpec) -> list[str]:
    """The first nodes in order, of those that have heard of the model and the key; others if there are none.

    Waits until some node has confirmed a plan that has both: they may have been made a moment ago, or
    control may have started a moment ago and its nodes are on their way back.
    """
    chosen: list[str] = []

    def known() -> bool:
        cluster, seq = control.cluster, seq_needed(control, caller, spec)
        near = copies.choose(cluster, spec, control.now_ms())
        chosen[:] = [node for node in near if fleet.knows(cluster, node, seq)]
        if chosen:
            return True
        chosen[:] = _known_first(control, caller, spec)
        if chosen:
            return fleet.knows(cluster, chosen[0], seq)
        return not any(view.report is None and not view.silent for view in cluster.nodes.values())

    await control.until_heard(known, PLAN_SECONDS)
    return chosen


def _known_first(control: Routing, caller: Caller, spec: ModelSpec) -> list[str]:
    """All nodes in the core's order, those that have heard of the model and the key before the others."""
    seq = seq_needed(control, caller, spec)
    nodes = copies.choose_all(control.cluster, spec, control.now_ms())
    return sorted(nodes, key=lambda node: not fleet.knows(control.cluster, node, seq))


async def _send(control: Routing, node: str, call: Call, watch: Stopwatch) -> NodeAnswer:
    """Bring the call to a node and get the beginning of its answer."""
    begun_s = time.perf_counter()
    try:
        for again in range(STALE_MAX, -1, -1):
            connection = ask_for_connection()
            try:
                response = await _request(control, node, call)
                if response.status != CONNECT_ANEW:
                    break
                response.close()
                if not again or not call.sendable:
                    raise NodeUnreachable("it does not let this router in")
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # The node dropped an idle connection, or was started anew: that is no answer of its.
                if not again or connection.made or not call.sendable:
                    raise
        if 300 <= response.status < 400:
            response.close()  # no node sends its callers elsewhere, and nobody is sent there by one
            raise NodeFailed(
                502, "node_failed", "The node gave no answer but a redirect.", kind="server_error"
            )
        return await hold(control, node, response)
    except aiohttp.SocketTimeoutError:
        raise NodeFailed(
            504, "node_timeout", "The node that was asked has said nothing for too long.", kind="server_error"
        ) from None
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        if isinstance(call.body, Once) and call.body.failed is not None:
            raise call.body.failed from None
        raise NodeUnreachable(f"{type(error).__name__}: {error}") from None
    finally:
        watch.waited_since(begun_s)


async def _request(control: Routing, node: str, call: Call) -> aiohttp.ClientResponse:
    try:
        line = control.lines.to(node)
    except NoLine as error:
        raise NodeUnreachable(str(error)) from None
    headers, body = call.headers, call.body
    if isinstance(body, Once):
        if body.begun:
            raise RuntimeError("a body that was begun can not be sent again")
        if body.length is not None:
            headers = {**headers, "Content-Length": str(body.length)}
        data: bytes | AsyncIterator[bytes] | None = body.pieces()
    else:
        data = body or None
    query = f"?{call.query}" if call.query else ""
    return await control.session.request(
        call.method,
        URL(f"{line.url}{call.path}{query}", encoded=True),
        ssl=line.tls,
        data=data,
        headers=headers,
        allow_redirects=False,
    )
