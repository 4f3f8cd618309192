"""The keep-index: what is lost, in milliseconds per millisecond and byte, when a model's copy goes.

Covers: ranking copies for eviction by expected use x what a restore costs / bytes. Does not cover: how soon
a model is expected to be used again (``intensity``), what a restore costs (``estimate``), or who may evict
whom (``quota``, ``room``).
"""

from __future__ import annotations

from packer.intensity import Intensity, Ranking

# Share of the old value that survives a new measurement: 3 of 4, so one odd answer does not stick.
KEPT_OF_FOUR = 3


def keep_index(ranking: Ranking, known: Intensity, gain_ms: float, held_bytes: int) -> float:
    """Milliseconds of restoring saved per millisecond and byte by keeping ``held_bytes``.

    ``gain_ms`` is what one use would cost more without them.
    """
    return ranking.uses_per_ms(known) * max(gain_ms, 1) / max(held_bytes, 1)
