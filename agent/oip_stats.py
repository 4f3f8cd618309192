"""Counts and times of requests by model, as the Open Inference Protocol's statistics have them.

Covers: requests on every surface of the gateway since the agent started. Does not cover: who is shown which
(``agent/oip.py`` shows a tenant its own), or usage that is charged for (``agent/metering.py``).
"""

from __future__ import annotations

import time
from collections import OrderedDict

from packer.oip import ModelStats
from packer.types import ModelRef

# Versions that are counted; beyond that the one that was used least recently starts anew. 1 KB each.
MODELS_MAX = 10_000


class Timing:
    """One request as it goes: counted when the block ends, as failed unless it ends well."""

    __slots__ = ("_ref", "_statistics", "began_ns", "granted_ns", "rows")

    def __init__(self, statistics: Statistics, ref: ModelRef, rows: int) -> None:
        self._statistics = statistics
        self._ref = ref
        self.rows = rows
        self.began_ns = time.monotonic_ns()
        self.granted_ns: int | None = None

    def granted(self) -> None:
        """It has its model; the wait is over."""
        self.granted_ns = time.monotonic_ns()

    def __enter__(self) -> Timing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._statistics.count(self._ref, self, failed=kind is not None)


class Statistics:
    """What each version has answered since the agent started."""

    def __init__(self, models_max: int = MODELS_MAX) -> None:
        self._models_max = models_max
        self._by_ref: OrderedDict[ModelRef, ModelStats] = OrderedDict()

    def of(self, ref: ModelRef) -> ModelStats:
        """Nothing is counted by asking."""
        return self._by_ref.get(ref) or ModelStats(str(ref.model), ref.version)

    def timing(self, ref: ModelRef, rows: int) -> Timing:
        """A request begins, which is ``rows`` inferences."""
        return Timing(self, ref, rows)

    def count(self, ref: ModelRef, timing: Timing, failed: bool) -> None:
        counted = self._by_ref.get(ref)
        if counted is None:
            counted = self._by_ref[ref] = ModelStats(str(ref.model), ref.version)
        self._by_ref.move_to_end(ref)
        if len(self._by_ref) > self._models_max:
            self._by_ref.popitem(last=False)
        now_ns = time.monotonic_ns()
        granted_ns = now_ns if timing.granted_ns is None else timing.granted_ns
        counted.last_inference = time.time_ns() // 1_000_000
        stats = counted.inference_stats
        stats.queue.add(granted_ns - timing.began_ns)
        if failed:
            stats.fail.add(now_ns - timing.began_ns)
            return
        counted.inference_count += timing.rows
        counted.execution_count += 1
        stats.success.add(now_ns - timing.began_ns)
        stats.compute_infer.add(now_ns - granted_ns)
