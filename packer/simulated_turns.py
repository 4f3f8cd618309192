"""Requests of the simulator that wait for each other: so many of one model run at once on a box.

Covers: when each of them begins, and what they waited in all. Does not cover: which box is asked
(``simulate``), or devices that several models keep busy: only requests for one model wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappush, heapreplace


@dataclass(frozen=True, slots=True)
class Waited:
    """What the answered requests waited for others of their model, beside their cold seconds. ``copies``: how
    often one more box was sent for a copy of a model that another had."""

    waited_s_mean: float
    waited_s_p99: float
    waited_s_most: float
    copies: int


class Turns:
    """``together``: how many requests for one model a box works on at once."""

    def __init__(self, together: int) -> None:
        self._together = together
        # By box and model: when each of its places is free again.
        self._free_ms: dict[tuple[int, int], list[int]] = {}
        self.waits_ms: list[int] = []
        self.copies = 0

    def take(self, box: int, model: int, now_ms: int, duration_ms: int) -> int:
        """When a request begins that was granted now. It keeps its place until it ends."""
        free_ms = self._free_ms.setdefault((box, model), [])
        if len(free_ms) < self._together:
            begins_ms = now_ms
            heappush(free_ms, begins_ms + duration_ms)
        else:
            begins_ms = max(now_ms, free_ms[0])
            heapreplace(free_ms, begins_ms + duration_ms)
        self.waits_ms.append(begins_ms - now_ms)
        return begins_ms

    def waited(self) -> Waited:
        ordered = sorted(self.waits_ms)
        count = max(len(ordered), 1)
        at_p99 = ordered[min(int(0.99 * count), count - 1)] if ordered else 0
        most = ordered[-1] if ordered else 0
        return Waited(sum(ordered) / count / 1000, at_p99 / 1000, most / 1000, self.copies)
