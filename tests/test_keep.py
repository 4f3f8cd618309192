"""The keep-index: what is used more often, costs more to restore or is smaller is worth more to keep.

Covers: the estimator and the index. Does not cover: restore times (``test_estimate``), who may evict whom.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from packer.keep import (
    SCALES_MS,
    Reuse,
    expected_uses_per_s,
    keep_index,
    note_use,
)
from packer.types import MIB


def used_every(gap_ms: int, times: int) -> Reuse:
    reuse = Reuse()
    for i in range(times):
        note_use(reuse, i * gap_ms)
    return reuse


def test_a_model_never_used_is_worth_nothing() -> None:
    assert expected_uses_per_s(Reuse(), 1_000) == 0.0


def test_a_steady_rate_is_found_by_the_scales_that_have_seen_enough_of_it() -> None:
    reuse = used_every(1_000, 40_000)
    rate = expected_uses_per_s(reuse, 40_000 * 1_000)
    assert 0.7 < rate < 1.05, "once a second; the scale of a day has not filled up yet"


@given(st.integers(0, 10 * SCALES_MS[-1]), st.integers(1, 10 * SCALES_MS[-1]))
def test_the_expectation_sinks_while_nothing_happens(wait_ms: int, longer_ms: int) -> None:
    reuse = used_every(5_000, 10)
    at_ms = reuse.at_ms + wait_ms
    assert expected_uses_per_s(reuse, at_ms + longer_ms) <= expected_uses_per_s(reuse, at_ms)


def test_a_burst_long_ago_is_worth_less_than_steady_use() -> None:
    burst, steady = used_every(100, 20), used_every(600_000, 20)
    now_ms = steady.at_ms + 1_000
    assert expected_uses_per_s(burst, now_ms) < expected_uses_per_s(steady, now_ms)


@given(st.integers(1, 10_000), st.integers(1, 10**12))
def test_the_index_grows_with_cost_and_sinks_with_bytes(gain_ms: int, nbytes: int) -> None:
    reuse = used_every(1_000, 5)
    index = keep_index(reuse, gain_ms, nbytes, 5_000)
    assert keep_index(reuse, gain_ms + 1, nbytes, 5_000) > index > 0
    assert keep_index(reuse, gain_ms, nbytes + 1, 5_000) <= index


def test_a_gain_of_nothing_or_less_still_ranks_by_use() -> None:
    often, seldom = used_every(1_000, 50), used_every(30_000, 2)
    assert keep_index(often, -5, MIB, 60_000) > keep_index(seldom, 0, MIB, 60_000)
