"""What tenants use in a simulated cluster, and whether control adds up each use once.

Covers: the real meter over the simulated journal, a truth beside it, and the judge. Does not cover: who is
granted what (``simulated_member``), or the tables by themselves (``test_usage``).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from agent.usage_meter import UsageMeter
from agent.usage_spool import UsageSpool
from packer.database import Database
from packer.events import Action, Event, Grant
from packer.types import ModelRef
from packer.usage import UsageRow

if TYPE_CHECKING:
    from cluster_simulation import Fleet
    from simulated_member import Member


@dataclass(frozen=True, slots=True)
class Took:
    """A request that is over as soon as it was let in."""

    prompt_tokens: int = 3
    completion_tokens: int = 4
    device_ms: int = 5


class CountedSpool(UsageSpool):
    """The journal's spool of usage, and how many requests of each tenant it was ever given for good."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.requests: Counter[str] = Counter()

    def add(self, rows: Sequence[UsageRow]) -> None:
        super().add(rows)
        for row in rows:
            self.requests[row.tenant] += row.used.requests

    def left(self) -> int:
        """Rows that control has not confirmed."""
        return self._number("select (select count(*) from usage_open) + (select count(*) from usage_told)")


def meter_of(member: Member) -> UsageMeter:
    """For one life of a node."""
    return UsageMeter(
        cast(Any, member._thread),
        member.clock_of_the_wall_ms,
        member.keeper.journal_may_fail,
        lambda: member.uplink.changed(),
        asyncio.get_running_loop().time,
    )


def note_use(meter: UsageMeter, event: Event, actions: list[Action], ref_of: dict[str, ModelRef]) -> None:
    meter.observe(event)
    for action in actions:
        if isinstance(action, Grant) and action.request in ref_of:
            with meter.counting(ref_of[action.request], Took()):
                pass


async def keep_use(meter: UsageMeter) -> None:
    """One round of ``UsageMeter.run``, whose shield would outlive a simulated crash."""
    await meter.flush()
    if meter.due():
        meter._tell()


def judge_usage(fleet: Fleet) -> None:
    """What is in a journal for good is with control, once."""
    found = fleet.store._db.execute(
        "select tenant, sum(requests), sum(prompt_tokens), sum(completion_tokens), sum(device_ms) from usage "
        "group by tenant"
    ).fetchall()
    known = {row[0]: row[1] for row in found}
    for tenant, requests, read, written, device_ms in found:
        fleet.require(
            (read, written) == (3 * requests, 4 * requests) and device_ms >= 5 * requests,
            f"{tenant}: amounts of {requests} requests do not fit: {read}, {written}, {device_ms}",
        )
    kept: Counter[str] = Counter()
    for member in fleet.members.values():
        spool = member.spool_of_usage
        fleet.require(not spool.left(), f"{member.name} still has usage for control")
        kept += spool.requests
    fleet.require(set(known) <= set(kept), f"usage of nobody: {known}, of {kept}")
    for tenant, requests in sorted(kept.items()):
        counted = known.get(tenant, 0)
        lost = fleet.restored or tenant in fleet.tenants_dropped
        fleet.require(
            counted == requests or (counted < requests and lost),
            f"{tenant}: {requests} requests are {counted} with control",
        )
