"""What the router counts of its own work.

Covers: calls, tries, calls that ended early, and the time that this router itself adds, as numbers and in
Prometheus' text format. Does not cover: what nodes do with the calls (``agent/metrics.py``). No tenant and
no model is named.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

# Upper bounds of the histogram, ms. The goal is a median below 2.
ADDED_BOUNDS_MS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 100.0, 1_000.0)


@dataclass(slots=True)
class RouterCounters:
    """Since this control started."""

    calls: int = 0
    tries: int = 0  # calls sent to a node, the second and third tries of one call included
    unreachable: int = 0  # of the tries: no answer at all
    elsewhere: int = 0  # of the tries: answered "not here, not now", and another node was asked
    broken: int = 0  # the node went away in mid-answer
    left: int = 0  # the caller went away before the end
    added_ms_sum: float = 0.0
    added_counts: list[int] = field(default_factory=lambda: [0] * (len(ADDED_BOUNDS_MS) + 1))

    def added(self, own_ms: float) -> None:
        """Until the head of an answer went out: all but waiting for the caller's body and for nodes."""
        self.added_ms_sum += own_ms
        self.added_counts[bisect_left(ADDED_BOUNDS_MS, own_ms)] += 1

    def text(self, in_flight: int) -> str:
        lines = []
        for name in ("calls", "tries", "unreachable", "elsewhere", "broken", "left"):
            lines.append(f"# TYPE bunkhouse_router_{name}_total counter")
            lines.append(f"bunkhouse_router_{name}_total {getattr(self, name)}")
        lines.append("# TYPE bunkhouse_router_in_flight gauge")
        lines.append(f"bunkhouse_router_in_flight {in_flight}")
        lines.append("# TYPE bunkhouse_router_added_seconds histogram")
        total = 0
        for bound_ms, count in zip((*ADDED_BOUNDS_MS, None), self.added_counts, strict=True):
            total += count
            le = "+Inf" if bound_ms is None else f"{bound_ms / 1000:g}"
            lines.append(f'bunkhouse_router_added_seconds_bucket{{le="{le}"}} {total}')
        lines.append(f"bunkhouse_router_added_seconds_sum {self.added_ms_sum / 1000:.6f}")
        lines.append(f"bunkhouse_router_added_seconds_count {total}")
        return "\n".join(lines) + "\n"
