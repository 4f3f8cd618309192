"""What a node knows again after a restart of its agent: what tenants have used up, owe and have learned.

Covers: taking it out of the journal, telling the core of it with the first plan, and writing it down while
the node runs. Does not cover: when each part is due (``spending``, ``debts``, ``remembering``), how large
models are found to be (``footprints``), or the tables (``journal``).
"""

from __future__ import annotations

from collections.abc import Callable

from agent.debts import Debts
from agent.journal_thread import JournalThread
from agent.keeper import Keeper
from agent.remembering import Changed, Remembering
from agent.spending import Spending
from packer.events import Event
from packer.ledger import Node


class Recollection:
    """``core`` is read between steps, by ``now_ms``; ``owed_rates`` and ``owed_cold_ms`` ask it."""

    def __init__(
        self,
        journal: JournalThread,
        keeper: Keeper,
        core: Callable[[], Node],
        owed_rates: Callable[[], dict[str, tuple[int, int]]],
        owed_cold_ms: Callable[[], dict[str, int]],
        now_ms: Callable[[], int],
        wall_ms: Callable[[], int],
    ) -> None:
        stored = journal.journal
        self._journal = journal
        self._keeper = keeper
        self._spending = Spending(stored.spent(), owed_rates, wall_ms)
        self._debts = Debts(stored.debts(), owed_cold_ms, now_ms)
        self._remembering = Remembering(stored.remembered_node(), stored.remembered(), core, now_ms, wall_ms)

    def planned(self) -> list[Event]:
        """After each plan: what the core must hear, which is something after the first one only."""
        return [*self._spending.planned(), *self._debts.planned(), *self._remembering.planned()]

    async def keep(self) -> None:
        """All of it, at once: the node stops."""
        await self.keep_spent(at_once=True)
        await self.keep_debts(at_once=True)
        await self.keep_remembered(at_once=True)

    async def keep_spent(self, at_once: bool = False) -> None:
        rows = self._spending.due(at_once)
        if rows is not None:
            await self._keeper.save(self._journal.journal.save_spent, rows)

    async def keep_debts(self, at_once: bool = False) -> None:
        debts = self._debts.due(at_once)
        if debts is not None and await self._keeper.save(self._journal.journal.save_debts, debts):
            self._debts.kept(debts)

    async def keep_remembered(self, at_once: bool = False) -> None:
        with self._keeper.journal_may_fail():
            await self._remembering.keep(self._save_remembered, at_once)

    async def _save_remembered(self, changed: Changed) -> None:
        await self._journal.call(self._journal.journal.save_remembered, changed)
