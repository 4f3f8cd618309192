"""The node's own log of uses: which model was used when, and what restoring it took then.

Covers: taking it off the core's steps, its bounds, and its form on the way to the process that replays it.
Does not cover: the replay (``packer/regret.py``) or when there is one (``agent/regret.py``).

In memory only: a restart begins a new window, which the figures state.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from packer.events import Action, Event, Grant, Restore, Restored, ServingEnded
from packer.types import ModelRef, Tier

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
        # Uses that were let in before all was there, by model, counted since the window began: the restore
        # that they pay is not over yet. One of each model.
        self._early: dict[ModelRef, int] = {}
        self._dropped = 0

    def used(self, now_ms: int, ref: ModelRef) -> None:
        """A request was granted at once what was on its device."""
        self._add(now_ms, ref, 0)

    def observe(self, now_ms: int, event: Event, actions: Sequence[Action]) -> None:
        """Each grant is a use. Of those that waited for one restore the first one has its cost: the restore
        alone, not the wait for its turn, since the question is what should have been kept. Whoever was let
        in early has all of it as well: no answer comes before the last layer does."""
        restored = event if isinstance(event, Restored) else None
        cold_ms = restored.restore_ms if restored is not None and not self._has_paid(restored) else 0
        if isinstance(event, ServingEnded):
            self._early.pop(event.ref, None)  # it ends with an error; whoever waits on pays
        for action in actions:
            if isinstance(action, Grant):
                pays = restored is not None and action.ref == restored.ref
                self._add(now_ms, action.ref, cold_ms if pays else 0)
                cold_ms = 0 if pays else cold_ms
                if action.tier is not Tier.DEVICE and restored is None:
                    self._early.setdefault(action.ref, self._dropped + len(self) - 1)
            elif isinstance(action, Restore):
                self._early.pop(action.ref, None)  # of a restore that failed

    def _has_paid(self, restored: Restored) -> bool:
        """Give the cost to the one that was let in before the end, if somebody was."""
        number = self._early.pop(restored.ref, None)
        if number is None:
            return False
        if number >= self._dropped:
            self.columns.cold_ms[number - self._dropped] = max(restored.restore_ms, 0)
        return True

    def _add(self, now_ms: int, ref: ModelRef, cold_ms: int) -> None:
        number = self._numbers.get(ref)
        if number is None:
            if len(self.columns.refs) >= MODELS_MAX:
                self.columns, self._numbers = UseColumns(), {}
                self._early, self._dropped = {}, 0
            number = self._numbers[ref] = len(self.columns.refs)
            self.columns.refs.append(ref)
        columns = self.columns
        if len(columns.at_ms) >= USES_MAX:
            for column in (columns.at_ms, columns.models, columns.cold_ms):
                del column[:USES_DROPPED]
            self._dropped += USES_DROPPED
        columns.at_ms.append(now_ms)
        columns.models.append(number)
        columns.cold_ms.append(max(cold_ms, 0))

    def __len__(self) -> int:
        return len(self.columns.at_ms)
