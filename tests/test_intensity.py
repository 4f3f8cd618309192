"""The learned intensity of a model's uses: what it must follow, that it stays bounded, that it survives.

Covers: ``packer/intensity.py``. Does not cover: how policies use it (``test_policies``).
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packer.intensity import (
    BASE_MS,
    BASE_USES,
    EPOCH_MS,
    HORIZON_MS,
    KERNELS,
    PRIOR_SHARE,
    SCALES_MS,
    Intensity,
    Ranking,
    Shared,
    decode,
    encode,
    note_use,
)

DAY_MS = 86_400_000


def after(*times_ms: int) -> Intensity:
    """A model of a node of its own, so that nothing but its own past and the prior count."""
    known, shared = Intensity(), Shared()
    for at_ms in times_ms:
        note_use(known, shared, at_ms)
    return known


def rate(known: Intensity, now_ms: int, shared: Shared | None = None) -> float:
    return Ranking(shared or Shared(), now_ms).uses_per_ms(known)


def test_scales_reach_from_a_minute_to_ten_days() -> None:
    assert SCALES_MS[0] == 60_000
    assert math.isclose(SCALES_MS[-1], 10 * DAY_MS)
    assert len(SCALES_MS) == KERNELS


def test_after_one_use_the_rate_is_the_prior_integrated_over_the_horizon() -> None:
    kernels = sum(PRIOR_SHARE * (1 - math.exp(-HORIZON_MS / scale)) / HORIZON_MS for scale in SCALES_MS)
    assert math.isclose(rate(after(5_000), 5_000), BASE_USES / BASE_MS + kernels, rel_tol=1e-12)


def test_a_model_never_used_has_no_rate() -> None:
    assert rate(Intensity(), 1_000) == 0.0


def test_the_rate_only_falls_while_nobody_uses_the_model() -> None:
    known = after(0, 1_000, 900_000)
    rates = [rate(known, 900_000 + step * 500_000) for step in range(200)]
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_a_steady_model_is_expected_at_about_its_own_rate() -> None:
    """Every 40 minutes for ten days: the next twenty minutes bring about half a use."""
    known = after(*range(0, 10 * DAY_MS, 2_400_000))
    assert 0.25 < rate(known, 10 * DAY_MS) * HORIZON_MS < 1.0


def test_what_the_node_does_on_the_whole_is_the_prior_of_a_new_model() -> None:
    """On a node of pairs one use promises another; after a scan that touched everything once it does not."""
    rates = []
    for in_pairs in (True, False):
        shared = Shared()
        for at_ms in range(0, 400 * 1_800_000, 1_800_000):
            known = Intensity()
            note_use(known, shared, at_ms)
            if in_pairs:
                note_use(known, shared, at_ms + 30_000)
        new = Intensity()
        note_use(new, shared, 400 * 1_800_000)
        rates.append(rate(new, 400 * 1_800_000, shared))
    assert rates[0] > 3 * rates[1]


def test_it_learns_whether_a_use_is_followed_by_another() -> None:
    """Two models used equally often: one in pairs a minute apart, the other evenly. Right after a use the
    first one's next use is expected sooner, and hours later the even one's."""
    pairs = after(*(t for hour in range(100) for t in (hour * 7_200_000, hour * 7_200_000 + 60_000)))
    even = after(*(hour * 3_600_000 for hour in range(200)))
    lone_use_ms = 101 * 7_200_000
    note_use(pairs, Shared(), lone_use_ms)
    note_use(even, Shared(), lone_use_ms)
    assert rate(pairs, lone_use_ms + 1_000) > rate(even, lone_use_ms + 1_000)


@given(st.lists(st.integers(0, 40 * DAY_MS), min_size=1, max_size=60), st.integers(0, 60 * DAY_MS))
@settings(max_examples=200, deadline=None)
def test_the_rate_is_finite_positive_and_the_same_from_any_epoch(times: list[int], later_ms: int) -> None:
    known = after(*sorted(times))
    now_ms = max(times) + later_ms
    fresh = rate(known, now_ms)
    for at_ms in range(max(times), now_ms, max(EPOCH_MS * 9 // 10, later_ms // 50 + 1)):
        rate(known, at_ms)
    assert 0.0 < fresh < 1.0
    assert math.isclose(rate(known, now_ms), fresh, rel_tol=1e-9)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(-(10**9), 10**9))
@settings(max_examples=100, deadline=None)
def test_what_was_learned_survives_a_journal_and_another_clock(times: list[int], shift_ms: int) -> None:
    known = after(*sorted(times))
    again = decode(encode(known), shift_ms)
    now_ms = max(times) + 1_234
    assert math.isclose(rate(again, now_ms + shift_ms), rate(known, now_ms), rel_tol=1e-12)
    note_use(known, Shared(), now_ms)
    note_use(again, Shared(), now_ms + shift_ms)
    assert math.isclose(rate(again, now_ms + shift_ms), rate(known, now_ms), rel_tol=1e-9)


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [1.0] * 27,
        [0.0] * 28,
        [1.0, 5.0, 4.0, *[0.0] * 25],
        [1.0, 0.0, 0.0, float("nan"), *[0.0] * 24],
        [1.0, 0.0, 0.0, -1.0, *[0.0] * 24],
        [1.0, 0.0, 0.0, 0.0, float("inf"), *[0.0] * 23],
    ],
)
def test_a_row_that_was_not_written_by_encode_is_refused(numbers: list[float]) -> None:
    with pytest.raises(ValueError, match="learned intensity"):
        decode(numbers)


def test_state_does_not_grow_with_uses() -> None:
    generator = random.Random(1)
    known = after(*sorted(generator.randrange(DAY_MS) for _ in range(2_000)))
    assert len(encode(known)) == 4 + 3 * KERNELS
    assert len(known.levels) == len(known.explained) == len(known.elapsed) == KERNELS
    assert all(explained <= known.uses for explained in known.explained)
