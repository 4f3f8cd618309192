"""What tenants have used up of their rates, over a restart of the agent.

Covers: writing what each tenant owes to the journal every few seconds, and telling the core of it at the
next start. Does not cover: the arithmetic (``packer/rates.py``) or the table (``agent/journal.py``).

Requests and restores per minute forget within a minute and are not kept. Tokens and device time may be owed
for hours: without this a tenant that makes the agent fall over would start afresh each time. What was used
in the last ``KEEP_S`` before a kill, and by requests that were running then, is lost; an orderly stop loses
nothing. The time in between is read off the wall clock: a clock that is set forward by an hour forgives an
hour of debt, one that is set back forgives nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packer.events import SpentFound

# A kill forgives a tenant what it used since the last time; a write is one small transaction.
KEEP_S = 5.0


@dataclass(frozen=True, slots=True)
class SpentRow:
    """What a tenant owed at a moment of the wall clock."""

    tenant: str
    tokens: int
    device_ms: int
    at_ms: int


class Spending:
    """``owed`` asks the core: tokens and device milliseconds by tenant."""

    def __init__(
        self,
        stored: Sequence[SpentRow],
        owed: Callable[[], dict[str, tuple[int, int]]],
        wall_ms: Callable[[], int],
    ) -> None:
        self._stored: tuple[SpentRow, ...] | None = tuple(stored)
        self._owed = owed
        self._wall_ms = wall_ms
        self._any_kept = bool(stored)
        self._kept_at_ms: int | None = None

    def planned(self) -> list[SpentFound]:
        """After each plan: what the core must hear, which is something after the first one only."""
        now_ms = self._wall_ms()
        stored, self._stored = self._stored or (), None
        return [
            SpentFound(row.tenant, row.tokens, row.device_ms, max(now_ms - row.at_ms, 0)) for row in stored
        ]

    def due(self, at_once: bool = False) -> tuple[SpentRow, ...] | None:
        """All rows as they should be written now; None: no need to write."""
        now_ms = self._wall_ms()
        if self._stored is not None:
            return None  # before the first plan the core knows of nobody, and what is stored must stay
        # A clock that was set back must not stop the writing.
        lately = self._kept_at_ms is not None and 0 <= now_ms - self._kept_at_ms < KEEP_S * 1000
        if lately and not at_once:
            return None
        self._kept_at_ms = now_ms
        rows = tuple(SpentRow(tenant, *amounts, now_ms) for tenant, amounts in self._owed().items())
        needed = bool(rows) or self._any_kept
        self._any_kept = bool(rows)
        return rows if needed else None
