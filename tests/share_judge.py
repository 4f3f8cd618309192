"""What a simulated cluster forbids of tenants' limits: all nodes together let in no more than one would.

Covers: books of its own over the requests that every node let in, and the sum of the shares that nodes hold,
judged at every step of every node. Does not cover: one node's own rates (``rate_judge``).

A node is of the cluster while control's catalog has it; what an operator removed while it was cut off is
nobody's to bound. Where a tenant's limit changes, or a node that was alone begins anew and knows nothing of
its last requests, the books begin anew as well.
"""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import TYPE_CHECKING

from rate_judge import MINUTE_MS, Bucket

from packer.events import Event, Planned, Requested, SharesSeen
from packer.rates import BURST_PARTS
from packer.shares import Share

if TYPE_CHECKING:
    from cluster_simulation import Fleet
    from simulated_member import Member


class ShareJudge:
    """Sees every step of every node, after it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._books: dict[str, Bucket] = {}
        self._nodes: dict[str, str] = {}

    def judge(self, member: Member, event: Event) -> None:
        # After a backup was put back control knows nodes that were removed, and what they had is others'.
        if self._fleet.restored or not isinstance(event, SharesSeen | Planned | Requested):
            return
        self._look_who_is_there()
        if member not in self._inside():
            return
        if isinstance(event, SharesSeen) and event.rest.is_whole:
            self._books.clear()
        for name in member.node.tenants:
            self._judge_shares(name)
        if isinstance(event, Requested):
            self._judge_request(member, event)

    def _look_who_is_there(self) -> None:
        control = self._fleet.control
        nodes = (
            {name: row.incarnation for name, row in control.catalog.nodes.items()} if control.ready else None
        )
        if nodes is not None and nodes != self._nodes:
            self._nodes = nodes
            self._books.clear()

    def _inside(self) -> list[Member]:
        """Nodes of the cluster that run."""
        members = self._fleet.members.items()
        return [each for name, each in members if each.up and name in self._nodes and each.papers.answer]

    def _judge_shares(self, name: str) -> None:
        inside = self._inside()
        held = [(each.name, each.node.tenants[name]) for each in inside if name in each.node.tenants]
        parts = {each.name: _share_of(each, name) for each in inside if name in each.node.tenants}
        total = sum((share.value for share in parts.values()), Fraction(0))
        self._fleet.require(total <= 1, f"nodes hold {parts} of the limits of {name}")
        some = sum(1 for share in parts.values() if share.parts)
        self._fleet.reached["a limit was divided among nodes"] += some > 1
        self._fleet.reached["a share was halved"] += any(
            each.node.shares.halve_at_ms is None
            and not each.node.shares.rest.parts
            and each.node.shares.by_tenant
            for each in inside
        )
        limits = [known.quota.requests_per_minute for _, known in held if known.planned]
        if len(limits) < len(inside) or any(limit is None for limit in limits):
            self._books.pop(name, None)
            return
        book = self._books.setdefault(name, Bucket(MINUTE_MS, BURST_PARTS))
        book.pass_to(self._now_ms())
        book.limit = max(limit for limit in limits if limit is not None)
        book.level = min(book.level, Fraction(book.burst))

    def _judge_request(self, member: Member, event: Requested) -> None:
        """Whoever was not refused at once came in."""
        name = event.ref.tenant
        book = self._books.get(name)
        if book is None or event.request not in member.node.requests:
            return
        book.take(1)
        self._fleet.reached["let in under a limit of the fleet"] += 1
        self._fleet.require(
            book.level <= book.burst, f"{event.request} of {name} is one too many for all nodes together"
        )

    def _now_ms(self) -> int:
        return round(asyncio.get_running_loop().time() * 1000)


def _share_of(member: Member, name: str) -> Share:
    """What a node may let in by: once the term is over it halves before whatever it does next."""
    share = member.node.tenants[name].rates.share
    return share.halved() if member.node.shares.are_due(member.clock_ms()) else share
