"""How far the node's restore estimates were off, by tier.

Covers: remembering what was expected when a restore was ordered, and comparing it with what it took.
Does not cover: making estimates (``packer/estimate.py``) or exporting these figures (``metrics``,
``reports``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from packer import residency, room
from packer.events import Action, Event, Restore, Restored, RestoreFailed, WorkerDied
from packer.types import ModelRef, Tier

# Enough for a steady 95th percentile; older restores are of a node that has learned since.
ERRORS_MAX = 512
# Upper bounds of the histogram, as shares of the real time: the goal is 0.15.
BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0)
# A timer tick and a wake-up: differences up to this are not the estimate's, however short the restore.
GRAIN_MS = 2


@dataclass(slots=True)
class TierAccuracy:
    """The errors of one tier: |expected - real| / real."""

    count: int = 0
    total: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    last: deque[float] = field(default_factory=lambda: deque(maxlen=ERRORS_MAX))

    def add(self, error: float) -> None:
        self.count += 1
        self.total += error
        self.last.append(error)
        place = next((i for i, bound in enumerate(BUCKETS) if error <= bound), len(BUCKETS))
        self.buckets[place] += 1

    def quantile(self, share: float) -> float:
        """Of the last ones; 0 when there are none."""
        ordered = sorted(self.last)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Accuracy:
    """Told of every restore when it is ordered and when it is over."""

    def __init__(self) -> None:
        self.tiers: dict[Tier, TierAccuracy] = {}
        self._expected_ms: dict[ModelRef, tuple[Tier, int]] = {}

    def observe(self, core: residency.Node, event: Event, actions: list[Action]) -> None:
        """One step of the core."""
        match event:
            case Restored(ref=ref, from_tier=tier, restore_ms=restore_ms):
                self.restored(ref, tier, restore_ms)
            case RestoreFailed(ref=ref):
                self.failed(ref)
            case WorkerDied(tenant=tenant):
                for ref in [ref for ref in self._expected_ms if ref.tenant == tenant]:
                    self.failed(ref)
            case _:
                pass
        for action in actions:
            if isinstance(action, Restore):
                model = core.models[action.ref]
                # A host segment that is filled on the way wants all chunks.
                first_chunk = 0 if action.host_bytes else action.first_chunk
                moved_bytes = sum(model.spec.chunk_bytes[first_chunk:])
                expected_ms = room.restore_ms_from(core, model, action.from_tier, moved_bytes)
                self.ordered(action.ref, action.from_tier, expected_ms)

    def ordered(self, ref: ModelRef, tier: Tier, expected_ms: int) -> None:
        self._expected_ms[ref] = (tier, expected_ms)

    def restored(self, ref: ModelRef, tier: Tier, restore_ms: int) -> None:
        expected = self._expected_ms.pop(ref, None)
        if expected is None or expected[0] is not tier:
            return
        off_ms = abs(expected[1] - restore_ms)
        error = 0.0 if off_ms <= GRAIN_MS else off_ms / max(restore_ms, 1)
        self.tiers.setdefault(tier, TierAccuracy()).add(error)

    def failed(self, ref: ModelRef) -> None:
        """The restore did not happen; what it would have taken is not known."""
        self._expected_ms.pop(ref, None)

    def start_anew(self) -> None:
        """New rates make new estimates: percentiles are of these from now on. Counters only grow."""
        for seen in self.tiers.values():
            seen.last.clear()

    def forget(self, kept: frozenset[ModelRef]) -> None:
        self._expected_ms = {ref: each for ref, each in self._expected_ms.items() if ref in kept}
