"""What tenants owe or are owed for reserved bytes that were lent, over a restart of the agent.

Covers: writing each tenant's debt to the journal now and then, and telling the core of it at the next start.
Does not cover: the arithmetic (``packer/lending.py``) or the table (``agent/journal.py``).

Only the debt is kept. The ghost of the private slice starts empty: a restart empties the devices, and alone
on its slice a tenant would have lost what was there as well. What changed in the last ``KEEP_S`` before a
kill is lost, some seconds of restoring at most; an orderly stop loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from packer.events import DebtFound

# Debts change with every restore; a write is one small transaction, and a lost one does little harm.
KEEP_S = 30.0


class Debts:
    """``owed`` asks the core: cold milliseconds by tenant."""

    def __init__(
        self, stored: Mapping[str, int], owed: Callable[[], dict[str, int]], now_ms: Callable[[], int]
    ) -> None:
        self._stored: dict[str, int] | None = dict(stored)
        self._kept = dict(stored)
        self._owed = owed
        self._now_ms = now_ms
        self._kept_at_ms = now_ms()

    def planned(self) -> list[DebtFound]:
        """After each plan: what the core must hear, which is something after the first one only."""
        stored, self._stored = self._stored or {}, None
        return [DebtFound(tenant, debt_ms) for tenant, debt_ms in stored.items()]

    def due(self, at_once: bool = False) -> dict[str, int] | None:
        """All debts as they should be written now; None: no need to write."""
        if self._stored is not None:
            return None  # before the first plan the core knows of nobody, and what is stored must stay
        now_ms = self._now_ms()
        if now_ms - self._kept_at_ms < KEEP_S * 1000 and not at_once:
            return None
        self._kept_at_ms = now_ms
        debts = self._owed()
        return debts if debts != self._kept else None

    def kept(self, debts: Mapping[str, int]) -> None:
        """They are on disk now."""
        self._kept = dict(debts)
