"""The node's own log of uses: which model was used when, and what restoring it took then.

Covers: taking it off the core's steps, its bounds, and its form on the way to the process that replays it.
Does not cover: the replay (``packer/regret.py``) or when there is one (``agent/regret.py``).

In memory only: a restart begins a new window, which the figures state.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from packer.events import Action, Event, Grant, Restored
from packer.types import ModelRef

# Twenty bytes each, 4 MB together: a week of a request every three seconds, or an hour of fifty a second.
# More would say little more, and a replay would take longer than a second.
USES_MAX = 200_000
# The oldest go this many at a time, since moving the others costs a millisecond.
USES_DROPPED = 20_000
# Versions numbered in one window: more than a node is ever planned to serve at a time.
MODELS_MAX = 20_000


@dataclass(slots=True)
class UseColumns:
    """Uses in order, column by column, and the versions by number."""

    at_ms: array[int] = field(default_factory=lambda: array("q"))
    models: array[int] = field(default_factory=lambda: array("I"))
    cold_ms: array[int] = field(default_factory=lambda: array("Q"))
    refs: list[ModelRef] = field(default_factory=list)


class UseLog:
    """Told of every step."""

    def __init__(self) -> None:
        self.columns = UseColumns()
        self._numbers: dict[ModelRef, int] = {}

    def observe(self, now_ms: int, event: Event, actions: Sequence[Action]) -> None:
        """Each grant is a use. Of those that waited for one restore the first one has its cost: the restore
        alone, not the wait for its turn, since the question is what should have been kept."""
        cold_ms = event.restore_ms if isinstance(event, Restored) else 0
        for action in actions:
            if isinstance(action, Grant):
                self._add(now_ms, action.ref, cold_ms if isinstance(event, Restored) else 0)
                cold_ms = 0

    def _add(self, now_ms: int, ref: ModelRef, cold_ms: int) -> None:
        number = self._numbers.get(ref)
        if number is None:
            if len(self.columns.refs) >= MODELS_MAX:
                self.columns, self._numbers = UseColumns(), {}
            number = self._numbers[ref] = len(self.columns.refs)
            self.columns.refs.append(ref)
        columns = self.columns
        if len(columns.at_ms) >= USES_MAX:
            for column in (columns.at_ms, columns.models, columns.cold_ms):
                del column[:USES_DROPPED]
        columns.at_ms.append(now_ms)
        columns.models.append(number)
        columns.cold_ms.append(max(cold_ms, 0))

    def __len__(self) -> int:
        return len(self.columns.at_ms)
