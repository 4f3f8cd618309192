"""What the core has learned of uses and restores, over a restart of the agent.

Covers: which models have changed since they were last written, encoding them a few at a time, and telling
the core of what was kept at the next start. Does not cover: the values (``packer/remember.py``) or the
table (``agent/journal.py``).

Written every ``KEEP_S`` and at an orderly stop. A kill -9 loses what was learned since the last time: at
most ``KEEP_S``, and on a node that uses more than ``ROWS_PER_TIME`` models in that time, as many times
longer as it uses more. Nothing is lost but knowledge: the models then rank as they did before. The time in
between is read off the wall clock, since the monotonic one starts anew with the machine; a clock that was
set back counts as no time at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from packer import remember
from packer.events import Event, NodeRemembered, UsesRemembered
from packer.ledger import Node
from packer.types import ModelRef

log = logging.getLogger("bunk.remembering")

# Twenty minutes ahead is what the core looks; a minute more or less of the past moves little.
KEEP_S = 60.0
# At some 1.5 KB each a write stays below 3 MB.
ROWS_PER_TIME = 2_000
# Models encoded before the loop may serve somebody else: about half a millisecond.
ROWS_AT_ONCE = 25
# Models that the journal remembers, some 15 MB of them. The longest unused go first: their intensity has
# faded the most, so that they lose the least by starting from what all models have in common.
REMEMBERED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class RememberedRow:
    """What was known of a model at a moment of the wall clock. ``used_ms``: its last use, on that clock."""

    uses: UsesRemembered
    at_ms: int
    used_ms: int


@dataclass(frozen=True, slots=True)
class RememberedNode:
    node: NodeRemembered
    at_ms: int


@dataclass(frozen=True, slots=True)
class Changed:
    """What should be written: the models that changed, all that the node knows, what they share."""

    rows: tuple[RememberedRow, ...]
    known: tuple[ModelRef, ...]
    node: RememberedNode


class Remembering:
    """``core`` is read between steps; its clock is ``now_ms``."""

    def __init__(
        self,
        node: RememberedNode | None,
        rows: Sequence[RememberedRow],
        core: Callable[[], Node],
        now_ms: Callable[[], int],
        wall_ms: Callable[[], int],
    ) -> None:
        self._stored: tuple[RememberedNode | None, Sequence[RememberedRow]] | None = (node, rows)
        self._core = core
        self._now_ms = now_ms
        self._wall_ms = wall_ms
        # Of each model the last use that was written, and how many restores were known by then.
        self._written: dict[ModelRef, tuple[int, int]] = {}
        self._kept_at_ms = now_ms()

    def planned(self) -> list[Event]:
        """After each plan: what the core must hear, which is something after the first one only."""
        if self._stored is None:
            return []
        node, rows = self._stored
        self._stored = None
        wall_ms = self._wall_ms()
        found: list[Event] = []
        if node is not None:
            found.append(replace(node.node, ago_ms=max(wall_ms - node.at_ms, 0)))
        if rows:
            log.info("the uses of %d versions are known from before", len(rows))
        return found + [replace(row.uses, ago_ms=max(wall_ms - row.at_ms, 0)) for row in rows]

    async def keep(self, save: Callable[[Changed], Awaitable[None]], at_once: bool = False) -> None:
        """Write what changed if it is time, or ``at_once``, at the end, all of it; what ``save`` raises comes
        out of here, and stays to be written."""
        now_ms = self._now_ms()
        if self._stored is not None or (not at_once and now_ms - self._kept_at_ms < KEEP_S * 1000):
            return  # before the first plan the core knows of nothing, and what is stored must stay
        self._kept_at_ms = now_ms
        core = self._core()
        changed = [ref for ref, mark in self._marks(core) if self._written.get(ref) != mark]
        while changed:
            batch, changed = changed[:ROWS_PER_TIME], changed[ROWS_PER_TIME:]
            await self._write(core, batch, save)
            if not at_once:
                return

    def _marks(self, core: Node) -> list[tuple[ModelRef, tuple[int, int]]]:
        return [(ref, _mark(core, ref)) for ref, model in core.models.items() if model.reuse.uses]

    async def _write(
        self, core: Node, refs: Sequence[ModelRef], save: Callable[[Changed], Awaitable[None]]
    ) -> None:
        rows: list[RememberedRow] = []
        marks: dict[ModelRef, tuple[int, int]] = {}
        for number, ref in enumerate(refs):
            if number % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
                await asyncio.sleep(0)
            model = core.models.get(ref)
            if model is None:
                continue
            now_ms, wall_ms = self._now_ms(), self._wall_ms()
            marks[ref] = _mark(core, ref)
            used_ms = wall_ms - max(now_ms - model.reuse.last_ms, 0)
            rows.append(RememberedRow(remember.of_model(model, now_ms), wall_ms, used_ms))
        node = RememberedNode(remember.of_node(core, self._now_ms()), self._wall_ms())
        await save(Changed(tuple(rows), tuple(core.models), node))
        self._written |= marks
        self._written = {ref: mark for ref, mark in self._written.items() if ref in core.models}


def _mark(core: Node, ref: ModelRef) -> tuple[int, int]:
    model = core.models[ref]
    samples = model.history.samples.values()
    return model.reuse.last_ms, sum(sample.restore_ms for each in samples for sample in each)
