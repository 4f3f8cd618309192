"""Nodes' exchanges about shares of their tenants' limits.

Covers: checking what a node says, and what its tenants' limits are. Does not cover: who gets how much
(``control/shares.py``) or waiting (``control/share_desk.py``).
"""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web

from control.catalog import NodeRow
from control.routes.access import Access, Caller, Route
from control.routes.nodes import NAME_CHARS_MAX, REPORTED_MAX, decode_message, row_of
from control.shares import SharesAsked, Wish
from control.state import Control
from packer.http import ApiError
from packer.rates import full_lags, grains
from packer.shares import GRAINS_MAX, NOTHING, Share, TenantShare
from packer.types import MIB, BadValue, TenantQuota
from packer.wire import NUMBER_MAX, SharesAnswer, SharesAsk, encode

# Shares of 20,000 tenants are about 4 MB.
SHARES_BYTES_MAX = 8 * MIB
# Less than what a node waits for its answer.
WAIT_MS_MAX = 2_000


async def exchange(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = row_of(control, caller)
    async with control.bodies.body(request, caller.owner, SHARES_BYTES_MAX) as body:
        ask = decode_message(body, SharesAsk)
    return web.Response(body=encode(await answer_shares(control, row, ask)), content_type="application/json")


async def answer_shares(control: Control, row: NodeRow, ask: SharesAsk) -> SharesAnswer:
    """What a node may have of its tenants' limits now; what it says is checked first."""
    _check(ask)
    wishes = tuple(wish for said in ask.shares if (wish := _wish(control, row.node, said)) is not None)
    asked = SharesAsked(
        row.node, ask.session, ask.number, ask.rest, wishes, ask.lasting, ask.divided, ask.begun
    )
    answer = await control.shares.ask(asked, min(ask.wait_ms, WAIT_MS_MAX))
    current = control.catalog.nodes.get(row.node)
    if answer is None or current is None or current.incarnation != row.incarnation:
        raise ApiError(403, "node_removed", f"The node {row.node!r} was removed from this cluster.")
    return answer


def _wish(control: Control, node: str, said: TenantShare) -> Wish | None:
    """With the tenant's limits. What a node still has of a tenant that is no more, or has no limits any
    more, counts until it has given it up: there may be limits again before that. Of what it names beside
    those, having been heard before, it has nothing that it was given, and it is in no book."""
    quota, book = control.catalog.quotas.get(said.tenant), control.shares.book
    if quota is None and not said.share.parts:
        return None
    if quota is None and said.tenant not in book.tenants and node not in book.unbound:
        return None
    count = grains(quota) if quota is not None else 0
    wished = said if count else replace(said, want=NOTHING)
    return Wish(wished, max(count, 1), full_lags(quota or TenantQuota()))


def _check(ask: SharesAsk) -> None:
    if len(ask.shares) > REPORTED_MAX:
        raise BadValue("shares", f"at most {REPORTED_MAX} tenants")
    if len({said.tenant for said in ask.shares}) < len(ask.shares):
        raise BadValue("shares", "names a tenant twice")
    if len(ask.session) > NAME_CHARS_MAX:
        raise BadValue("session", f"at most {NAME_CHARS_MAX} characters")
    if any(len(said.tenant) > NAME_CHARS_MAX for said in ask.shares):
        raise BadValue("tenant", f"at most {NAME_CHARS_MAX} characters")
    numbers = [ask.number, ask.wait_ms, *(lag for said in ask.shares for lag in said.lags.each())]
    if any(not 0 <= number <= NUMBER_MAX for number in numbers):
        raise BadValue("shares", f"numbers must be from 0 to {NUMBER_MAX}")
    _check_share(ask.rest)
    for said in ask.shares:
        _check_share(said.share)
        _check_share(said.want)


def _check_share(share: Share) -> None:
    if not 0 <= share.parts <= share.of <= GRAINS_MAX or not share.of:
        raise BadValue("share", f"must be some of 1 to {GRAINS_MAX} equal parts")


NODE_ROUTES = (Route("POST", "/node/v1/shares", Access.NODE, exchange, stays=False),)
