"""What a node keeps while it serves: the plan that is in force, and the records on their way to control.

Covers: which plans are accepted, that a plan is on disk before it is in force, handing records to the
journal and from there to control once, and serving on while the journal fails. Does not cover: the
journal's tables (``agent/journal.py``) or what a plan changes on the node (``agent/node.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ParamSpec

from agent.counters import Counters
from agent.journal import JournalFailed
from agent.journal_thread import JournalThread
from packer.wire import NO_PLAN, Plan, PlanNumber, Record

log = logging.getLogger("bunk.keeper")

P = ParamSpec("P")


class Keeper:
    """``apply`` puts a plan in force and must not wait; ``settle`` removes afterwards what left with it."""

    def __init__(
        self,
        journal: JournalThread,
        counters: Counters,
        wall_ms: Callable[[], int],
        apply: Callable[[Plan], None],
        settle: Callable[[Plan], Awaitable[None]],
    ) -> None:
        self._journal = journal
        self._counters = counters
        self._wall_ms = wall_ms
        self._apply = apply
        self._settle = settle
        self._lock = asyncio.Lock()
        self._kept = True
        self._failing = False
        self.plan: Plan | None = None

    # --- plans ------------------------------------------------------------------------------------

    @property
    def number(self) -> PlanNumber:
        """Of the plan in force."""
        return self.plan.number if self.plan else NO_PLAN

    def number_in(self, cluster: str) -> PlanNumber:
        """As a node of this cluster: another one's plan does not count, however high its number."""
        return NO_PLAN if self.plan is None or cluster not in ("", self.plan.cluster) else self.plan.number

    async def take_up(self) -> None:
        """At a start: the plan that was in force before."""
        plan = await self._journal.call(self._journal.journal.plan)
        if plan is not None:
            self._put_in_force(plan)

    async def accept(self, plan: Plan) -> None:
        """Keep a newer plan and act on it; it is on disk before it is in force.

        Unless the disk is full: then revoked keys and deleted models, which make room, must not wait.
        """
        async with self._lock:
            same = self.plan is not None and plan.cluster == self.plan.cluster
            if same and plan.number <= self.number:
                return
            self._kept = False
            saved = await self.save(self._journal.journal.save_plan, plan)
            self._put_in_force(plan)
            with self.journal_may_fail():
                await self._shred(plan)
                self._kept = saved
            await self._settle(plan)

    def _put_in_force(self, plan: Plan) -> None:
        self.plan = plan
        self._apply(plan)

    async def _shred(self, plan: Plan) -> None:
        tenants = sorted(tenant.tenant for tenant in plan.tenants)
        for tenant in await self._journal.call(self._journal.journal.shred_tenants, tenants):
            log.info("tenant %s is gone; its keys are destroyed", tenant)

    async def _keep_plan(self) -> None:
        """Another try to keep the plan that is in force, after the journal failed."""
        async with self._lock:
            if self.plan is not None and not self._kept:
                with self.journal_may_fail():
                    await self._journal.call(self._journal.journal.save_plan, self.plan)
                    await self._shred(self.plan)
                    self._kept = True

    @contextmanager
    def journal_may_fail(self) -> Iterator[None]:
        """Serve on without the journal."""
        try:
            yield
        except JournalFailed as error:
            self._fail(error)

    def _fail(self, error: JournalFailed) -> None:
        """Say once that it fails, until it has taken records again.

        On a full disk small writes go on working by chance, so nothing else says that it is over.
        """
        if not self._failing:
            log.error("%s; serving on, but what happens now is forgotten at a restart", error)
        self._failing = True

    async def save(self, write: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the journal has taken it; serves on if not."""
        try:
            await self._journal.call(write, *args, **kwargs)
        except JournalFailed as error:
            self._fail(error)
            return False
        return True

    # --- records ----------------------------------------------------------------------------------

    async def flush(self) -> bool:
        """Bring what waits into the journal; true when there are new records for control."""
        await self._keep_plan()
        records = self._counters.take_records(self._wall_ms())
        if not records:
            return False
        if not await self.save(self._journal.journal.spool, records):
            self._counters.put_back(records)
            return False
        if self._failing and self._kept:
            log.info("the journal works again")
            self._failing = False
        return True

    @property
    def spool_id(self) -> str:
        return self._journal.journal.spool_id

    async def spooled(self, limit: int) -> tuple[Record, ...]:
        with suppress(JournalFailed):
            return await self._journal.call(self._journal.journal.spooled, limit)
        return ()

    async def acknowledge(self, acked_seq: int) -> None:
        await self.save(self._journal.journal.acknowledge, acked_seq)
