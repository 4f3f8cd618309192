"""The keep-index: what is lost, in milliseconds per second and byte, when a model's copy goes.

Covers: how often a model is expected to be used again, what a restore costs from each tier, and the
index that ranks copies for eviction. Does not cover: who may evict whom (``quota``, ``room``).

The interface is small on purpose, so that a better predictor replaces the inside of ``Reuse`` without
touching the core: ``note_use``, ``expected_uses_per_s``, ``keep_index``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from packer.types import Tier

# Rates are averaged over several horizons at once: bursts live in minutes, habits in days. Five scales
# spaced by about six cover both and cost five exponentials per ranked model.
SCALES_MS = (60_000, 600_000, 3_600_000, 21_600_000, 86_400_000)
# Before anything was measured: deliberately slow figures, so that the first retry hint is not too short.
BYTES_PER_MS_FIRST = {Tier.HOST: 1_000_000, Tier.DISK: 500_000, Tier.ORIGIN: 100_000}
# What a restore costs whatever its size: orders, wake-ups, building the module.
RESTORE_FIXED_MS = 20
# Share of the old value that survives a new measurement: 3 of 4, so one odd disk stall does not stick.
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


@dataclass(slots=True, eq=False)
class RestoreSpeeds:
    """What this node measured per tier; stands in for models that were not restored from it yet."""

    bytes_per_ms: dict[Tier, int] = field(default_factory=lambda: dict(BYTES_PER_MS_FIRST))


def note_restore(
    speeds: RestoreSpeeds, measured_ms: dict[Tier, int], tier: Tier, nbytes: int, restore_ms: int
) -> None:
    """Learn from one finished restore: the model's own time from this tier, and the tier's speed."""
    taken_ms = max(restore_ms, 1)
    before_ms = measured_ms.get(tier)
    measured_ms[tier] = taken_ms if before_ms is None else (KEPT_OF_FOUR * before_ms + taken_ms) // 4
    moving_ms = max(taken_ms - RESTORE_FIXED_MS, 1)
    speed = KEPT_OF_FOUR * speeds.bytes_per_ms.get(tier, 1) + nbytes // moving_ms
    speeds.bytes_per_ms[tier] = max(speed // 4, 1)


def restore_ms_from(speeds: RestoreSpeeds, measured_ms: dict[Tier, int], tier: Tier, nbytes: int) -> int:
    """Expected time of a restore from ``tier``: this model's own if known, else by size; 0 from device."""
    if tier is Tier.DEVICE:
        return 0
    known_ms = measured_ms.get(tier)
    if known_ms is not None:
        return known_ms
    return RESTORE_FIXED_MS + nbytes // speeds.bytes_per_ms[tier]
