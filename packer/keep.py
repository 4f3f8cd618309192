"""The keep-index: what is lost, in milliseconds per second and byte, when a model's copy goes.

Covers: how often a model is expected to be used again, and the index that ranks copies for eviction.
Does not cover: what a restore costs (``estimate``), or who may evict whom (``quota``, ``room``).

The interface is small on purpose, so that a better predictor replaces the inside of ``Reuse`` without
touching the core: ``note_use``, ``expected_uses_per_s``, ``keep_index``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Rates are averaged over several horizons at once: bursts live in minutes, habits in days. Five scales
# spaced by about six cover both and cost five exponentials per ranked model.
SCALES_MS = (60_000, 600_000, 3_600_000, 21_600_000, 86_400_000)
# Share of the old value that survives a new measurement: 3 of 4, so one odd answer does not stick.
KEPT_OF_FOUR = 3


@dataclass(slots=True, eq=False)
class Reuse:
    """How often a model was used lately: one exponentially decaying count per scale."""

    at_ms: int = 0
    counts: list[float] = field(default_factory=lambda: [0.0] * len(SCALES_MS))


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


def expected_uses_per_s(reuse: Reuse, now_ms: int) -> float:
    """Expected uses per second from now on: the mean of the rates seen at every scale."""
    passed_ms = now_ms - reuse.at_ms
    total = 0.0
    for count, scale_ms in zip(reuse.counts, SCALES_MS, strict=True):
        if count:
            total += count * math.exp(-passed_ms / scale_ms) / scale_ms
    return total * 1000.0 / len(SCALES_MS)


def keep_index(reuse: Reuse, gain_ms: int, held_bytes: int, now_ms: int) -> float:
    """Milliseconds of restoring saved per second and byte by keeping a copy of ``held_bytes``.

    ``gain_ms`` is what one use would cost more without the copy.
    """
    return expected_uses_per_s(reuse, now_ms) * max(gain_ms, 1) / max(held_bytes, 1)
