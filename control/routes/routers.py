"""Routers that are processes of their own: tokens and the list for operators; joining and the feed for them.

Covers both sides, because a router's name means the same on each. The second table is served on the node
listener only. Does not cover: what must be shown for a certificate (``control.routes.certifying``), what a
router is told (``control.router_wire``), how the feed is numbered (``control.feed``), or what a router does
(``control.router_process``).

A router's certificate opens these routes and no node's; a node's opens none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
from aiohttp import web
from cryptography import x509

from control import etags
from control.authority import (
    TOKEN_TTL_S_DEFAULT,
    TOKEN_TTL_S_MAX,
    Authority,
    parse_node,
)
from control.catalog import ROUTERS_MAX, Change, DropRouter, DropToken, Joiner, PutRouter, RouterRow
from control.etags import CHANGED, IF_MATCH, IF_NONE_MATCH, SAME_TEXT, TAGGED
from control.operations import NodeText, Operation, Result
from control.pages import PAGED, Page, asked_page, page_of
from control.router_wire import NO_MORE, RouterAnswer, RouterAsk, Told
from control.routers_said import SILENT_AFTER_MS
from control.routes.access import Access, Caller, Route, cloned, identify_key, not_found, read_json, removed
from control.routes.certifying import Entry, Kind, certificate_routes
from control.routes.direct import show_route
from control.routes.nodes import (
    NAME_CHARS_MAX,
    POLL_MS_MAX,
    TokenAnswer,
    check_box,
    decode_message,
    give_token,
)
from control.state import Control
from packer.certificates import Speaker
from packer.http import json_response
from packer.types import KIB, BadValue
from packer.wire import NUMBER_MAX, WIRE_VERSION, JoinAsk, PlanNumber, encode

# A question is a few numbers and names.
ASK_BYTES_MAX = 4 * KIB
URL_CHARS_MAX = 256


# --- operators ------------------------------------------------------------------------------------


class RouterTokenAsk(msgspec.Struct, forbid_unknown_fields=True):
    ttl_s: Annotated[int, msgspec.Meta(ge=1, le=TOKEN_TTL_S_MAX)] = TOKEN_TTL_S_DEFAULT
    name: NodeText | None = None


@dataclass(frozen=True, slots=True)
class RouterShown:
    """``behind``: words of the feed that it has not confirmed; None while it is not heard."""

    router: str
    state: str  # "up", "silent", "unheard" (not since control started), "cloned" (two boxes are it)
    url: str  # where it serves tenants, as it says
    peer: str  # the address that it calls from
    joined_ms: int
    heard_ago_ms: int | None
    behind: int | None
    in_flight: int
    calls: int
    release: str
    clock_skew_ms: int | None  # its clock less control's, when it was last heard


async def make_token(control: Control, request: web.Request, caller: Caller) -> web.Response:
    ask = await read_json(control, request, caller, RouterTokenAsk)
    name = parse_node(ask.name) if ask.name is not None else None
    return await give_token(control, caller, name, ask.ttl_s, joiner=Joiner.ROUTER)


async def list_all(control: Control, request: web.Request, caller: Caller) -> web.Response:
    rows = sorted(control.catalog.routers.values(), key=lambda row: row.router)
    asked = asked_page(request, None, parts=1)
    return json_response(page_of(asked, rows, lambda row: (row.router,), lambda row: _shown(control, row)))


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = _named(control, request)
    return etags.read(request, row.incarnation, _shown(control, row))


def _named(control: Control, request: web.Request) -> RouterRow:
    router = request.match_info["router"]
    row = control.catalog.routers.get(router)
    if row is None:
        raise not_found("router", router)
    return row


def _shown(control: Control, row: RouterRow) -> RouterShown:
    said = control.routers.of(row.router)
    if said is None:
        return RouterShown(row.router, "unheard", "", "", row.joined_ms, None, None, 0, 0, "", None)
    ago_ms = control.now_ms() - said.heard_ms
    state = "silent" if ago_ms > SILENT_AFTER_MS else "up"
    if control.routers.is_cloned(row.router):
        state = "cloned"
    ask = said.ask
    current = ask.start == control.start_name
    return RouterShown(
        row.router,
        state,
        ask.url,
        said.peer,
        row.joined_ms,
        ago_ms,
        control.feed.behind(ask.have) if current and state == "up" else None,
        ask.in_flight,
        ask.calls,
        ask.release,
        said.clock_skew_ms,
    )


async def remove(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """Its certificate is refused from now on, here at once and by each node with its next plan."""
    async with control.writing:
        row = _named(control, request)
        router = row.router
        etags.check_match(request, row.incarnation, lambda: _shown(control, row))
        spent = [
            token
            for token in control.catalog.tokens.values()
            if token.joiner is Joiner.ROUTER and token.used_node == router
        ]
        changes: list[Change] = [DropToken(token.token_id) for token in spent]
        await control.write([*changes, DropRouter(router)])
        control.routers.forget(router)
        if not control.catalog.routers:
            control.feed.shut()
        control.feed.wake()
    control.record("router_removed", detail=f"{router}, by key {caller.key_id}")
    return web.Response(status=204)


# --- certificates ---------------------------------------------------------------------------------


class Routers(Kind[RouterRow]):
    joiner, access, most = Joiner.ROUTER, Access.ROUTER, ROUTERS_MAX

    def rows(self, control: Control) -> Mapping[str, RouterRow]:
        return control.catalog.routers

    def caller(self, caller: Caller) -> tuple[str, RouterRow]:
        row = _row_of(caller)
        return row.router, row

    def named(self, speaker: Speaker) -> str:
        return speaker.router

    def url(self, ask: JoinAsk, request: web.Request) -> str:
        return ""  # routers call

    async def enter(self, control: Control, entry: Entry[RouterRow]) -> None:
        made = RouterRow(entry.name, entry.incarnation, entry.key_sha256, entry.joined_ms)
        await control.write([entry.used, PutRouter(entry.known or made)])

    def refuse_copy(self, control: Control, name: str) -> None:
        if control.routers.is_cloned(name):
            raise cloned(Joiner.ROUTER, name)

    def issue(self, authority: Authority, csr: x509.CertificateSigningRequest, name: str) -> str:
        return authority.issue_router(csr, name)


ROUTERS = Routers()


def _row_of(caller: Caller) -> RouterRow:
    assert caller.router is not None  # Access.ROUTER gives every handler one
    return caller.router


def _check_still(control: Control, row: RouterRow) -> None:
    """Raises ``ApiError`` 403 when it was removed meanwhile."""
    current = control.catalog.routers.get(row.router)
    if current is None or current.incarnation != row.incarnation:
        raise removed(Joiner.ROUTER, row.router)


# --- the feed -------------------------------------------------------------------------------------


async def view(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """What is new; a long poll."""
    row = _row_of(caller)
    async with control.bodies.body(request, caller.owner, ASK_BYTES_MAX) as body:
        ask = decode_message(body, RouterAsk)
    answer = await answer_view(control, row, ask, request.remote)
    return web.Response(body=encode(answer), content_type="application/json")


async def answer_view(control: Control, row: RouterRow, ask: RouterAsk, peer: str | None) -> RouterAnswer:
    _check_ask(ask)
    _check_still(control, row)
    if ask.epoch > control.meta.epoch:
        # This database is a backup that was put back, and the router would take no word of it.
        await control.leap_epoch(PlanNumber(ask.epoch, 0))
    control.note_router(row.router, ask, peer)
    ROUTERS.refuse_copy(control, row.router)
    turn = control.routers.boxes.turn(row.router)

    def may_wait() -> bool:
        current = control.catalog.routers.get(row.router)
        trusts = ask.ca_sha256 == control.authority.ca_sha256
        same = current is not None and current.incarnation == row.incarnation
        alone = control.routers.boxes.turn(row.router) == turn and not control.routers.is_cloned(row.router)
        return trusts and same and alone

    have = ask.have if ask.start == control.start_name else 0
    piece = await control.feed.piece(have, min(ask.wait_ms, POLL_MS_MAX), may_wait)
    _check_still(control, row)
    ROUTERS.refuse_copy(control, row.router)
    words = tuple(
        Told(word.name, msgspec.Raw(word.text) if word.text is not None else NO_MORE) for word in piece.words
    )
    return RouterAnswer(
        WIRE_VERSION,
        control.meta.cluster,
        control.start_name,
        control.meta.epoch,
        control.meta.seq,
        ask.life,
        ask.number,
        piece.base,
        piece.number,
        piece.more,
        words,
        control.wall_ms(),
        control.authority.ca_pem if ask.ca_sha256 != control.authority.ca_sha256 else "",
        control.routers.boxes.told(row.router),
    )


def _check_ask(ask: RouterAsk) -> None:
    numbers = (ask.number, ask.have, ask.wait_ms, ask.epoch, ask.in_flight, ask.calls, ask.sent_ms)
    if any(not 0 <= number <= NUMBER_MAX for number in numbers):
        raise BadValue("ask", f"numbers must be from 0 to {NUMBER_MAX}")
    if max(map(len, (ask.life, ask.start, ask.ca_sha256, ask.release, ask.told))) > NAME_CHARS_MAX:
        raise BadValue("life, start, ca_sha256, release, told", f"at most {NAME_CHARS_MAX} characters")
    check_box(ask.box)
    if len(ask.url) > URL_CHARS_MAX:
        raise BadValue("url", f"at most {URL_CHARS_MAX} characters")


async def pass_route(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """Where a tenant's program may call nodes itself: asked through a router, answered by control, which
    alone signs tickets. The router shows the tenant's own key, so it gets none for whom it does not serve."""
    ROUTERS.refuse_copy(control, _row_of(caller).router)
    tenant = identify_key(control, request, Access.TENANT)
    return await show_route(control, request, tenant)


# "tokens" is a path of its own, and no router's name (``parse_node``).
ONE_ROUTER = r"/api/v1/routers/{router:(?!tokens$)[^/]+}"
ROUTES: tuple[Route[Control], ...] = (
    Route(
        "GET",
        "/api/v1/routers",
        Access.OPERATOR,
        list_all,
        operation=Operation(
            "listRouters",
            "All routers that are processes of their own, by name, as each last said it.",
            [Result(200, "A page.", Page[RouterShown])],
            takes=PAGED,
        ),
    ),
    Route(
        "POST",
        "/api/v1/routers/tokens",
        Access.OPERATOR,
        make_token,
        operation=Operation(
            "createRouterToken",
            "Create a token that one router may join with. The answer has the only copy of it.",
            [Result(201, "The token.", TokenAnswer)],
            RouterTokenAsk,
        ),
    ),
    Route(
        "GET",
        ONE_ROUTER,
        Access.OPERATOR,
        show,
        operation=Operation(
            "showRouter",
            "One router, as it last said it.",
            [Result(200, "The router.", RouterShown, headers=TAGGED), Result(304, SAME_TEXT)],
            takes=[IF_NONE_MATCH],
        ),
    ),
    Route(
        "DELETE",
        ONE_ROUTER,
        Access.OPERATOR,
        remove,
        operation=Operation(
            "removeRouter",
            "Remove a router: its certificate is refused from now on.",
            [Result(204, "It is removed.")],
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
)

NODE_ROUTES: tuple[Route[Control], ...] = (
    *certificate_routes(ROUTERS),
    Route("POST", "/router/v1/view", Access.ROUTER, view, stays=False),
    Route("GET", "/router/v1/route", Access.ROUTER, pass_route, stays=False),
)
