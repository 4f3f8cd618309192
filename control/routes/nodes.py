"""Nodes: join tokens and the list for operators; beat, sources and origins for nodes.

Covers both sides, because a node's name means the same on each. The second table is served on the node
listener only, where all of it needs a client certificate whose node exists. Does not cover: joining and
certificates (``control.routes.certifying``), or who is sent a plan (``control.cluster``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import msgspec
from aiohttp import web

from control import cluster as fleet
from control import etags
from control.authority import (
    TOKEN_TTL_S_DEFAULT,
    TOKEN_TTL_S_MAX,
    hash_secret,
    make_token,
    parse_node,
)
from control.catalog import (
    CONTROL_ORIGIN,
    POOL_DEFAULT,
    TOKENS_MAX,
    Change,
    DropNode,
    DropToken,
    Joiner,
    NodeRow,
    PutToken,
    TokenRow,
)
from control.etags import CHANGED, IF_MATCH, IF_NONE_MATCH, SAME_TEXT, TAGGED
from control.operations import Given, NodeText, Operation, Result
from control.pages import PAGED, Page, asked_page, page_of
from control.places import check_gateway_url, check_url, dialled_url, own_address
from control.record_desk import Stored, TooManyRecords
from control.routes.access import Access, Caller, Route, cloned, not_found, read_json, removed
from control.routing import wall_ms
from control.shares import HolderRemoved
from control.state import Control
from control.store import StoreUnavailable
from packer.http import ApiError, json_response
from packer.questions import QUESTIONS_MAX, REPLIES_BYTES_MAX, Replies
from packer.types import KIB, MIB, BadValue, ModelRef, OriginFile, parse_ref
from packer.usage import USAGE_ROWS_PER_BEAT_MAX, amounts
from packer.wire import (
    NUMBER_MAX,
    PEERS_TRIED_MAX,
    SPOOL_RECORDS_MAX,
    WIRE_VERSION,
    BadMessage,
    Beat,
    BeatAnswer,
    BoxFacts,
    CalibrationReport,
    DeviceReport,
    OriginTurn,
    PeerSpec,
    RegretReport,
    SourcesAnswer,
    SourcesAsk,
    TenantReport,
    decode,
    encode,
)

T = TypeVar("T")

# A report of 20,000 models and 1,000 records is about 12 MB.
BEAT_BYTES_MAX = 16 * MIB
# Names that a node repeats or makes up: of a start of control, of its spool. Ours have 16.
NAME_CHARS_MAX = 64
# As many as a box can have.
BOX_DEVICES_MAX = 64
# What a node measures of itself is a few KiB; the agent keeps no more than this either.
CALIBRATION_CHARS_MAX = 256 * KIB
# Eight numbers with their names.
REGRET_CHARS_MAX = KIB
# Held open this long at most: shorter than what middleboxes cut, and than fleet.SILENT_AFTER_MS.
POLL_MS_MAX = 30_000
# A version's name and the names of a few nodes.
SOURCES_BYTES_MAX = 4 * KIB
# Reported models and tenants; no node can hold more than the cluster has.
REPORTED_MAX = 20_000


# --- operators ------------------------------------------------------------------------------------


class TokenAsk(msgspec.Struct, forbid_unknown_fields=True):
    ttl_s: Annotated[int, msgspec.Meta(ge=1, le=TOKEN_TTL_S_MAX)] = TOKEN_TTL_S_DEFAULT
    name: NodeText | None = None
    pool: NodeText | None = None


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    token: str
    token_id: str
    name: str | None
    expires_ms: int
    pool: str


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    node: str
    # "up", "draining", "drained" (nothing runs there any more), "silent", "unheard" (not since control
    # started), "cloned" (two boxes are it)
    state: str
    gateway_url: str
    joined_ms: int
    heard_ago_ms: int | None
    have_epoch: int
    have_seq: int
    devices: Sequence[DeviceReport]
    host_budget_bytes: int
    host_used_bytes: int
    disk_budget_bytes: int
    disk_used_bytes: int
    calibration: CalibrationReport | None
    regret: RegretReport | None
    pool: str
    route_url: str  # where the router calls it over mutual TLS; empty: nowhere
    clock_skew_ms: int | None  # its clock less control's, when it was last heard


async def make_join_token(control: Control, request: web.Request, caller: Caller) -> web.Response:
    ask = await read_json(control, request, caller, TokenAsk)
    node = parse_node(ask.name) if ask.name is not None else None
    pool = parse_node(ask.pool, "pool") if ask.pool is not None else POOL_DEFAULT
    return await give_token(control, caller, node, ask.ttl_s, pool=pool)


async def give_token(
    control: Control,
    caller: Caller,
    name: str | None,
    ttl_s: int,
    pool: str = POOL_DEFAULT,
    joiner: Joiner = Joiner.NODE,
) -> web.Response:
    """A new join token for a ``joiner``, by that name alone if one is given."""
    token = make_token(control.authority.pin)
    now_ms = wall_ms()
    ends_ms = now_ms + ttl_s * 1000
    row = TokenRow(token.token_id, hash_secret(token.secret), name, now_ms, ends_ms, pool=pool, joiner=joiner)
    async with control.writing:
        ended = [old for old in control.catalog.tokens.values() if old.expires_ms <= now_ms]
        live = [old.expires_ms for old in control.catalog.tokens.values() if old.expires_ms > now_ms]
        if len(live) >= TOKENS_MAX:
            raise ApiError(
                429,
                "too_many_tokens",
                f"There are {TOKENS_MAX} live join tokens, the limit; wait for some to end.",
                retry_ms=min(live) - now_ms,
                should_retry=False,
            )
        changes: list[Change] = [DropToken(old.token_id) for old in ended]
        answer = json_response(TokenAnswer(token.text, row.token_id, name, row.expires_ms, pool), 201)
        await control.write([*changes, PutToken(row), *caller.remembering(answer)])
    control.record("token_created", detail=f"{row.token_id} for a {joiner}, by key {caller.key_id}")
    return answer


async def list_all(control: Control, request: web.Request, caller: Caller) -> web.Response:
    pool = request.query.get("pool")
    named = parse_node(pool, "pool") if pool is not None else None
    rows = [row for row in control.catalog.nodes.values() if named is None or row.pool == named]
    rows.sort(key=lambda row: row.node)
    asked = asked_page(request, None, parts=1)
    return json_response(page_of(asked, rows, lambda row: (row.node,), lambda row: shown(control, row)))


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    node = request.match_info["node"]
    row = control.catalog.nodes.get(node)
    if row is None:
        raise not_found("node", node)
    return etags.read(request, state_of(row), shown(control, row))


def state_of(row: NodeRow) -> tuple[str, bool]:
    """What others change of a node: what it says of itself changes all the time."""
    return row.incarnation, row.draining


def shown(control: Control, row: NodeRow) -> NodeAnswer:
    skew_ms = control.said.clock_skew_ms(row.node)
    return _node_answer(row, control.cluster.nodes[row.node], skew_ms, control.now_ms())


def _node_answer(row: NodeRow, view: fleet.NodeView, clock_skew_ms: int | None, now_ms: int) -> NodeAnswer:
    report = view.report
    if view.cloned:
        state = "cloned"
    elif view.silent:
        state = "silent"
    elif report is None:
        state = "unheard"
    elif row.draining:
        busy = not report.draining or any(model.leases or model.waiting for model in report.models)
        state = "draining" if busy else "drained"
    else:  # also while it has not heard yet that it no longer drains
        state = "up"
    return NodeAnswer(
        node=row.node,
        state=state,
        gateway_url=view.gateway_url,
        joined_ms=row.joined_ms,
        heard_ago_ms=now_ms - view.heard_ms if report is not None and view.heard_ms is not None else None,
        have_epoch=view.have[0],
        have_seq=view.have[1],
        devices=report.devices if report else (),
        host_budget_bytes=report.host_budget_bytes if report else 0,
        host_used_bytes=report.host_used_bytes if report else 0,
        disk_budget_bytes=report.disk_budget_bytes if report else 0,
        disk_used_bytes=report.disk_used_bytes if report else 0,
        calibration=_reported(report.calibration, CalibrationReport) if report else None,
        regret=_reported(report.regret, RegretReport) if report else None,
        pool=row.pool,
        route_url=view.route_url,
        clock_skew_ms=clock_skew_ms,
    )


def _reported(text: str, kind: type[T]) -> T | None:
    """What a node found out of itself; a node that reports nonsense must not break the list."""
    if not text or len(text) > CALIBRATION_CHARS_MAX:
        return None
    try:
        return decode(text.encode(), kind)
    except BadMessage:
        return None


async def remove(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """The node's certificate is refused from now on; it is told at its next word."""
    node = request.match_info["node"]

    def check(row: NodeRow) -> None:
        etags.check_match(request, state_of(row), lambda: shown(control, row))

    await remove_node(control, node, check)
    control.record("node_removed", detail=f"{node}, by key {caller.key_id}")
    return web.Response(status=204)


async def remove_node(
    control: Control, node: str, check: Callable[[NodeRow], None] = lambda row: None
) -> None:
    async with control.writing:
        row = control.catalog.nodes.get(node)
        if row is None:
            raise not_found("node", node)
        check(row)
        changes: list[Change] = [
            DropToken(token.token_id)
            for token in control.catalog.tokens.values()
            if token.used_node == node and token.joiner is Joiner.NODE
        ]
        await control.write([*changes, DropNode(node)])
        control.said.forget(node)
        control.boxes.forget(node)
        control.act(fleet.step(control.cluster, fleet.NodeRemoved(node), control.now_ms()))
        control.feed.note_node(node)
        control.wake_sources()
        control.shares.step(HolderRemoved(node))


def row_of(control: Control, caller: Caller) -> NodeRow:
    """The node that calls. Raises ``ApiError`` 409 for one of two boxes that share an identity."""
    row = _caller_row(caller)
    refuse_clone(control, row.node)
    return row


def _caller_row(caller: Caller) -> NodeRow:
    assert caller.node is not None  # Access.NODE gives every handler one
    return caller.node


def refuse_clone(control: Control, node: str) -> None:
    """Raises ``ApiError`` 409 while two boxes use the node's identity: nobody knows which is right."""
    view = control.cluster.nodes.get(node)
    if view is not None and view.cloned:
        raise cloned(Joiner.NODE, node)


# --- beats ----------------------------------------------------------------------------------------


async def beat(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """Take the report and the records in; answer at once with a newer plan, or when there is one."""
    row = _caller_row(caller)
    async with control.bodies.body(request, caller.owner, BEAT_BYTES_MAX) as body:
        message = decode_message(body, Beat)
    answer = await answer_beat(control, row, message, request.remote, own_address(request))
    return web.Response(body=control.encode_answer(answer), content_type="application/json")


async def answer_beat(
    control: Control, row: NodeRow, message: Beat, peer: str | None, own: str | None = None
) -> BeatAnswer:
    """What a beat that came from the address ``peer`` to ``own`` means; ``row``: the node as it was then."""
    _check_beat(message, row)
    _check_still(control, row)  # its body may have been on its way for long
    if control.is_behind(message.have) and not await control.leap_epoch(message.have):
        raise ApiError(
            409,
            "epoch_ahead",
            f"The node has a plan of epoch {message.have_epoch}, control is at {control.meta.epoch}; is this "
            "the right control server?",
        )
    control.note_said(row.node, message, peer)
    refuse_clone(control, row.node)
    stored = Stored()
    if message.records or message.usage:
        # The node goes by what is acknowledged and brings the rest again; a disk of control's that is full
        # must not make its nodes look silent.
        with suppress(TooManyRecords, StoreUnavailable):
            stored = await control.records.store(row, message)
    acked_seq = stored.acked_seq
    informed = message.ca_sha256 in ("", control.authority.ca_sha256)
    waits = message.wait_ms > 0 and informed and not control.stopping
    waits = waits and not control.questions.pending(row.node)
    waits = waits and not control.shares.nudged(row.node)
    url = dialled_url(message.report.gateway_url, peer, own)
    peer_url = dialled_url(message.report.peer_url, peer, own)
    route_url = dialled_url(message.report.route_url, peer, own)
    report = replace(message.report, gateway_url=url, peer_url=peer_url, route_url=route_url)
    heard = fleet.NodeBeat(
        row.node, report, message.have_epoch, message.have_seq, waits, message.life, message.number
    )
    due = control.hear(heard)
    if waits and not due:
        due = await control.poll(row.node, min(message.wait_ms, POLL_MS_MAX))
    current = _check_still(control, row)
    refuse_clone(control, row.node)
    plan = control.plan_for(row.node, message.have_peers) if due else None
    if current.spool in ("", message.spool):
        acked_seq = max(acked_seq, current.acked_seq)
    nudged = control.shares.take_nudge(row.node)
    questions = control.questions.take(row.node)
    ca_pem = control.authority.ca_pem if message.ca_sha256 not in ("", control.authority.ca_sha256) else ""
    told, now_ms = control.boxes.told(row.node), control.wall_ms()
    answered = (message.life, message.number)
    usage_acked = stored.usage_acked
    return BeatAnswer(
        WIRE_VERSION, plan, acked_seq, questions, now_ms, nudged, *answered, told, ca_pem, usage_acked
    )


def _check_still(control: Control, row: NodeRow) -> NodeRow:
    """The node as it is now, after a wait. Raises ``ApiError`` 403 when it was removed meanwhile."""
    current = control.catalog.nodes.get(row.node)
    if current is None or current.incarnation != row.incarnation:
        raise removed(Joiner.NODE, row.node)
    return current


def _check_beat(message: Beat, row: NodeRow) -> None:
    if message.node != row.node:
        raise BadValue("node", f"{message.node[:80]!r} is not what this certificate is for")
    if len(message.records) > SPOOL_RECORDS_MAX:
        raise BadValue("records", f"at most {SPOOL_RECORDS_MAX} in one beat; send the rest with the next")
    if len(message.usage) > USAGE_ROWS_PER_BEAT_MAX:
        raise BadValue("usage", f"at most {USAGE_ROWS_PER_BEAT_MAX} in one beat; send the rest with the next")
    report = message.report
    if max(len(report.models), len(report.tenants), len(report.devices)) > REPORTED_MAX:
        raise BadValue("report", f"at most {REPORTED_MAX} models, tenants or devices")
    numbers = [message.have_epoch, message.have_seq, message.wait_ms, message.number, message.sent_ms]
    numbers += [number for record in message.records for number in (record.seq, record.at_ms)]
    numbers += [message.usage_seq, *(row.hour_ms for row in message.usage)]
    numbers += [amount for row in message.usage for amount in amounts(row.used)]
    numbers += [abs(number) for tenant in report.tenants for number in _counted(tenant)]
    if any(not 0 <= number <= NUMBER_MAX for number in numbers):
        raise BadValue("beat", f"numbers must be from 0 to {NUMBER_MAX}")
    names = [message.have_start, message.spool, message.life, message.told, message.ca_sha256]
    if max(map(len, names)) > NAME_CHARS_MAX:
        raise BadValue("have_start, spool, life, told, ca_sha256", f"at most {NAME_CHARS_MAX} characters")
    check_box(message.box)
    check_gateway_url(report.gateway_url)
    if report.peer_url:
        check_url(report.peer_url, "peer_url", ("https",))
    if report.route_url:
        check_url(report.route_url, "route_url", ("https",))
    if len(report.regret) > REGRET_CHARS_MAX:
        raise BadValue("regret", f"at most {REGRET_CHARS_MAX} characters")
    if len(report.calibration) > CALIBRATION_CHARS_MAX:
        raise BadValue("calibration", f"at most {CALIBRATION_CHARS_MAX} characters")


def check_box(box: BoxFacts) -> None:
    """Raises ``BadValue`` for what no box says of itself."""
    if max(map(len, (box.host, box.boot, *box.devices))) > NAME_CHARS_MAX:
        raise BadValue("box", f"names of at most {NAME_CHARS_MAX} characters")
    if len(box.devices) > BOX_DEVICES_MAX:
        raise BadValue("box", f"at most {BOX_DEVICES_MAX} devices")


def _counted(report: TenantReport) -> Iterator[int]:
    """Numbers that the cores' own shapes say nothing of."""
    lending = report.lending
    yield from (lending.debt_ms, lending.lent_bytes, lending.borrowed_bytes, lending.excused_ms)
    for rate in report.rates:
        yield from (rate.limit, rate.burst, rate.remaining, rate.reset_ms)


def decode_message(body: bytes, kind: type[T]) -> T:
    try:
        return decode(body, kind)
    except BadMessage as error:
        raise ApiError(400, "bad_message", str(error)[:500]) from None


async def replies(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """What the node answers to the questions that its beats brought."""
    row = row_of(control, caller)
    async with control.bodies.body(request, caller.owner, REPLIES_BYTES_MAX) as body:
        message = decode_message(body, Replies)
    if len(message.replies) > QUESTIONS_MAX:
        raise BadValue("replies", f"at most {QUESTIONS_MAX} in one message")
    control.questions.settle(row.node, message.replies)
    return web.Response(status=204)


# --- sources of packs -----------------------------------------------------------------------------


async def sources(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """Peers that have a pack, or a turn at the origin; held open while another node reads it."""
    row = row_of(control, caller)
    async with control.bodies.body(request, caller.owner, SOURCES_BYTES_MAX) as body:
        ask = decode_message(body, SourcesAsk)
    answer = await answer_sources(control, row, ask)
    _check_still(control, row)
    return web.Response(body=encode(answer), content_type="application/json")


async def answer_sources(control: Control, row: NodeRow, ask: SourcesAsk) -> SourcesAnswer:
    """Who has the pack, or whose turn it is; within the time that the asker gives."""
    if len(ask.failed) > PEERS_TRIED_MAX:
        raise BadValue("failed", f"at most {PEERS_TRIED_MAX} nodes; read the origin instead")
    if not 0 <= ask.wait_ms <= NUMBER_MAX:
        raise BadValue("wait_ms", f"must be from 0 to {NUMBER_MAX}")
    ref = parse_ref(ask.ref)
    if ref not in control.catalog.models:
        raise ApiError(410, "version_gone", "There is no such version in this node's plan.")
    asked = fleet.SourceAsked(row.node, ref, ask.failed, ask.ended)
    found = await control.source(asked, min(ask.wait_ms, POLL_MS_MAX))
    peers = []
    for node in found.peers:
        known, view = control.catalog.nodes.get(node), control.cluster.nodes.get(node)
        if known is not None and view is not None:
            peers.append(PeerSpec(node, known.key_sha256, view.peer_url))
    turn = OriginTurn.GRANTED if found.granted else OriginTurn.WAIT
    return SourcesAnswer(WIRE_VERSION, turn, tuple(peers), found.wait_ms)


# --- origins --------------------------------------------------------------------------------------


async def origin(control: Control, request: web.Request, caller: Caller) -> web.StreamResponse:
    """One file of a version that control's store holds; a single ``Range`` is honoured."""
    info = request.match_info
    spec = control.catalog.models.get(ModelRef(info["tenant"], info["name"], info["version"]))
    files = spec.files if spec is not None and spec.origin == CONTROL_ORIGIN else ()
    file = next((file for file in files if file.path == info["path"]), None)
    if spec is None or file is None:
        # 410 and not 404: to a node, 404 from control means that the node itself is unknown.
        raise ApiError(410, "file_gone", "There is no such file of such a version in control's store.")
    start, end = _range(request, file)
    partial = (start, end) != (0, file.size_bytes)
    answer = web.StreamResponse(status=206 if partial else 200)
    answer.content_type = "application/octet-stream"
    answer.content_length = end - start
    answer.headers["Accept-Ranges"] = "bytes"
    answer.headers["ETag"] = f'"{file.sha256}"'
    if partial:
        answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size_bytes}"
    pieces = control.models.stream(spec.ref, file.path, start, end)
    first = await anext(pieces, b"")  # fails before the head is sent, if it fails
    await answer.prepare(request)
    await answer.write(first)
    async for piece in pieces:
        if caller.node is not None and caller.node.node not in control.catalog.nodes:
            raise ConnectionResetError("the node was removed while it read")
        await answer.write(piece)
    await answer.write_eof()
    return answer


def _range(request: web.Request, file: OriginFile) -> tuple[int, int]:
    size = file.size_bytes
    try:
        asked = request.http_range
    except ValueError:
        asked = None
    if asked is not None:
        start, end, _ = asked.indices(size)
        if asked.start is None and asked.stop is None:
            return 0, size
        if start < end:
            return start, end
    raise ApiError(
        416,
        "range_not_satisfiable",
        f"The file has {size} bytes.",
        headers={"Content-Range": f"bytes */{size}"},
    )


# "tokens" is a path of its own, and no node's name (``parse_node``).
ONE_NODE = r"/api/v1/nodes/{node:(?!tokens$)[^/]+}"
ROUTES = (
    Route(
        "GET",
        "/api/v1/nodes",
        Access.OPERATOR,
        list_all,
        operation=Operation(
            "listNodes",
            "All nodes by name, as each last said it.",
            [Result(200, "A page.", Page[NodeAnswer])],
            takes=(*PAGED, Given("pool", NodeText, "Only the nodes of this pool.")),
        ),
    ),
    Route(
        "POST",
        "/api/v1/nodes/tokens",
        Access.OPERATOR,
        make_join_token,
        operation=Operation(
            "createJoinToken",
            "Create a token that one node may join with. The answer has the only copy of it.",
            [Result(201, "The token.", TokenAnswer)],
            TokenAsk,
        ),
    ),
    Route(
        "GET",
        ONE_NODE,
        Access.OPERATOR,
        show,
        operation=Operation(
            "showNode",
            "One node, as it last said it.",
            [Result(200, "The node.", NodeAnswer, headers=TAGGED), Result(304, SAME_TEXT)],
            takes=[IF_NONE_MATCH],
        ),
    ),
    Route(
        "DELETE",
        ONE_NODE,
        Access.OPERATOR,
        remove,
        operation=Operation(
            "removeNode",
            "Remove a node: its certificate is refused from now on.",
            [Result(204, "It is removed.")],
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
)

NODE_ROUTES = (
    Route("POST", "/node/v1/beat", Access.NODE, beat, stays=False),
    Route("POST", "/node/v1/replies", Access.NODE, replies, stays=False),
    Route("POST", "/node/v1/sources", Access.NODE, sources, stays=False),
    Route("GET", "/node/v1/origins/{tenant}/{name}/{version}/{path:.+}", Access.NODE, origin, stays=False),
)
