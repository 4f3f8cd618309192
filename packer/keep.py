"""The keep-index: what is lost, in milliseconds per second and byte, when a model's copy goes.

Covers: how often a model is expected to be used again, and the index that ranks copies for eviction.
Does not cover: what a restore costs (``estimate``), or who may evict whom (``quota``, ``room``).

The interface is small on purpose, so that a better predictor replaces the inside of ``Reuse`` without
touching the core: ``note_use``, ``Ranking``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Rates are averaged over several horizons at once: bursts live in minutes, habits in days. Five scales
# spaced by about six cover both and cost five exponentials per ranked model.
SCALES_MS = (60_000, 600_000, 3_600_000, 21_600_000, 86_400_000)
# Rates are kept relative to the start of the hour: the factor of the shortest scale stays below e^60.
SPAN_MS = 3_600_000
# Share of the old value that survives a new measurement: 3 of 4, so one odd answer does not stick.
KEPT_OF_FOUR = 3


@dataclass(slots=True, eq=False)
class Reuse:
    """How often a model was used lately: one exponentially decaying count per scale."""

    at_ms: int = 0
    counts: list[float] = field(default_factory=lambda: [0.0] * len(SCALES_MS))
    # The counts per second as of the start of a span; see ``Ranking``.
    span: int = -1
    rates: tuple[float, ...] = (0.0,) * len(SCALES_MS)


def note_use(reuse: Reuse, now_ms: int) -> None:
    """Count one use now."""
    passed_ms = now_ms - reuse.at_ms
    counts = reuse.counts
    if passed_ms:
        for i, scale_ms in enumerate(SCALES_MS):
            counts[i] *= math.exp(-passed_ms / scale_ms)
    for i in range(len(counts)):
        counts[i] += 1.0
    reuse.at_ms = now_ms
    reuse.span = -1


def expected_uses_per_s(reuse: Reuse, now_ms: int) -> float:
    """Expected uses per second from now on: the mean of the rates seen at every scale."""
    return Ranking(now_ms).uses_per_s(reuse)


class Ranking:
    """The rates of many models at one moment.

    All counts decay by the same factors, so relative to the start of a common span a model's rate is five
    products; a model pays for its exponentials once per use and span.
    """

    __slots__ = ("_decay", "_span")

    def __init__(self, now_ms: int) -> None:
        self._span = now_ms // SPAN_MS
        passed_ms = now_ms - self._span * SPAN_MS
        self._decay = tuple(math.exp(-passed_ms / scale_ms) for scale_ms in SCALES_MS)

    def uses_per_s(self, reuse: Reuse) -> float:
        if reuse.span != self._span:
            since_ms = reuse.at_ms - self._span * SPAN_MS
            per_s = 1000.0 / len(SCALES_MS)
            reuse.rates = tuple(
                count * math.exp(since_ms / scale_ms) * per_s / scale_ms
                for count, scale_ms in zip(reuse.counts, SCALES_MS, strict=True)
            )
            reuse.span = self._span
        r0, r1, r2, r3, r4 = reuse.rates
        d0, d1, d2, d3, d4 = self._decay
        return r0 * d0 + r1 * d1 + r2 * d2 + r3 * d3 + r4 * d4

    def index(self, reuse: Reuse, gain_ms: float, held_bytes: int) -> float:
        """Milliseconds of restoring saved per second and byte by keeping ``held_bytes``.

        ``gain_ms`` is what one use would cost more without them.
        """
        return self.uses_per_s(reuse) * max(gain_ms, 1) / max(held_bytes, 1)


def keep_index(reuse: Reuse, gain_ms: float, held_bytes: int, now_ms: int) -> float:
    """``Ranking.index`` of one copy alone."""
    return Ranking(now_ms).index(reuse, gain_ms, held_bytes)
