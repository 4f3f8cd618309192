"""The keep-index: what is used more often, costs more to restore or is smaller is worth more to keep.

Covers: the index. Does not cover: how use is learned (``test_intensity``), restore times
(``test_estimate``), who may evict whom.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from packer.intensity import Intensity, Ranking, Shared, note_use
from packer.keep import keep_index
from packer.types import MIB


def used_every(gap_ms: int, times: int) -> Intensity:
    known, shared = Intensity(), Shared()
    for i in range(times):
        note_use(known, shared, i * gap_ms)
    return known


def index(known: Intensity, gain_ms: float, nbytes: int, now_ms: int) -> float:
    return keep_index(Ranking(Shared(), now_ms), known, gain_ms, nbytes)


def test_a_model_never_used_is_worth_nothing() -> None:
    assert index(Intensity(), 1_000, MIB, 1_000) == 0.0


def test_a_burst_long_ago_is_worth_less_than_steady_use() -> None:
    burst, steady = used_every(100, 20), used_every(600_000, 20)
    now_ms = steady.last_ms + 1_000
    assert index(burst, 100, MIB, now_ms) < index(steady, 100, MIB, now_ms)


@given(st.integers(1, 10_000), st.integers(1, 10**12))
def test_the_index_grows_with_cost_and_sinks_with_bytes(gain_ms: int, nbytes: int) -> None:
    known = used_every(1_000, 5)
    worth = index(known, gain_ms, nbytes, 5_000)
    assert index(known, gain_ms + 1, nbytes, 5_000) > worth > 0
    assert index(known, gain_ms, nbytes + 1, 5_000) <= worth


def test_a_gain_of_nothing_or_less_still_ranks_by_use() -> None:
    often, seldom = used_every(1_000, 50), used_every(30_000, 2)
    assert index(often, -5, MIB, 60_000) > index(seldom, 0, MIB, 60_000)
