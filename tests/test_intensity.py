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
    BACK_SHARE,
    BASE_MS,
    BASE_USES,
    ENDED_USES,
    EPOCH_MS,
    HORIZON_MS,
    KERNELS,
    PRIOR_SHARE,
    SCALES_MS,
    SHARED_PENDING_MAX,
    SILENCE_ENDS,
    SILENCES_MAX,
    Intensity,
    Ranking,
    Shared,
    decode,
    decode_shared,
    encode,
    encode_shared,
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
    # One in eleven is never used again for long, and of these a tenth.
    goes_on = BACK_SHARE + (1 - BACK_SHARE) / (1 + ENDED_USES)
    assert math.isclose(rate(after(5_000), 5_000), BASE_USES / BASE_MS + kernels * goes_on, rel_tol=1e-12)


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


HOUR_MS = 3_600_000
MINUTE_MS = 60_000


def test_a_model_that_has_stopped_gives_way_to_a_slower_one_that_has_not() -> None:
    """Used every five minutes for two days and then no more, against one that is used every two hours."""
    stopped, slow = after(*range(0, 2 * DAY_MS, 5 * MINUTE_MS)), after(*range(0, 2 * DAY_MS, 2 * HOUR_MS))
    assert rate(stopped, 2 * DAY_MS) > 10 * rate(slow, 2 * DAY_MS)
    for at_ms in range(2 * DAY_MS, 2 * DAY_MS + 6 * HOUR_MS, 2 * HOUR_MS):
        note_use(slow, Shared(), at_ms)
    assert rate(stopped, 2 * DAY_MS + 5 * HOUR_MS) < rate(slow, 2 * DAY_MS + 5 * HOUR_MS)


def test_a_silence_that_is_nothing_special_cuts_little_and_a_long_one_nine_tenths() -> None:
    """What the kernels say alone is what is said of a model whose uses never end."""
    known = after(*range(0, 2 * DAY_MS, HOUR_MS))
    endless = decode([1e14, *encode(known)[1:]])
    last_ms = known.last_ms
    shares = [
        rate(known, last_ms + hours * HOUR_MS) / rate(endless, last_ms + hours * HOUR_MS) for hours in (1, 24)
    ]
    assert 0.95 < shares[0] < 1.0
    assert BACK_SHARE < shares[1] < 0.5


def test_the_more_often_it_was_used_the_longer_a_silence_is_forgiven() -> None:
    known = after(*range(0, 2 * DAY_MS, HOUR_MS))
    rates = [
        rate(decode([uses, *encode(known)[1:]]), known.last_ms + 8 * HOUR_MS) for uses in (10.0, 100.0, 1e4)
    ]
    assert rates == sorted(rates)
    assert rates[2] > 2 * rates[0]


def in_turns(rounds: int, gap_ms: int = 10 * MINUTE_MS) -> tuple[list[Intensity], Shared, int]:
    """Eight models, one after the other, round and round; and when the next would be used."""
    models, shared = [Intensity() for _ in range(8)], Shared()
    for at in range(rounds * len(models)):
        note_use(models[at % len(models)], shared, at * gap_ms)
    return models, shared, rounds * len(models) * gap_ms


def test_of_models_used_in_turns_the_one_just_used_is_expected_last() -> None:
    models, shared, now_ms = in_turns(60)
    rates = Ranking(shared, now_ms).rates(models)
    assert rates[0] > 2 * rates[-1]
    early, early_shared, then_ms = in_turns(2)
    rates = Ranking(early_shared, then_ms).rates(early)
    assert rates[0] < rates[-1]  # two rounds prove nothing


def test_what_is_used_every_few_minutes_is_wanted_although_it_was_used_just_now() -> None:
    models, shared, now_ms = in_turns(60, 15_000)  # each every two minutes
    rates = Ranking(shared, now_ms).rates(models)
    assert min(rates) > max(rates) / 2
    assert min(rates) * HORIZON_MS > 3


def test_no_model_speaks_for_all_and_uses_within_a_minute_not_at_all() -> None:
    known, shared = Intensity(), Shared()
    for at in range(10_000):
        note_use(known, shared, at * 59_999)
    assert sum(shared.ended) == sum(shared.expected) == 0.0
    for at in range(10_000):
        note_use(known, shared, 10_000 * 60_000 + at * 60_000)
    assert 50 < sum(shared.ended) < 200  # two roots of ten thousand in a model's life, this is half of it


def test_what_is_known_of_silences_is_bounded_and_can_be_learned_anew() -> None:
    shared = Shared()
    for number in range(3 * int(SILENCES_MAX)):
        known = Intensity()
        note_use(known, shared, number * 7_200_000)
        note_use(known, shared, number * 7_200_000 + 600_000)
    assert SILENCES_MAX / 2 <= sum(shared.ended) <= SILENCES_MAX + SHARED_PENDING_MAX
    assert max(shared.expected) < 2 * SILENCES_MAX


def test_silences_survive_a_journal_and_one_without_them_is_taken() -> None:
    _, shared, now_ms = in_turns(60)
    numbers = encode_shared(shared, -now_ms)
    again = decode_shared(numbers, now_ms)
    assert again.hazards == shared.hazards != Shared().hazards
    assert again.offsets == shared.offsets
    older = decode_shared(numbers[: 2 + 2 * KERNELS], now_ms)
    assert older.levels == shared.levels
    assert older.hazards == Shared().hazards
    for wrong in (numbers[:-1], [*numbers, 0.0], [*numbers[:-1], -1.0], [*numbers[:-1], math.nan]):
        with pytest.raises(ValueError, match="learned of uses"):
            decode_shared(wrong, now_ms)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2 * DAY_MS)), max_size=80),
    st.integers(0, 4 * DAY_MS),
)
@settings(max_examples=100, deadline=None)
def test_no_history_makes_a_rate_negative_or_a_silence_count_twice(
    uses: list[tuple[int, int]], later_ms: int
) -> None:
    models, shared, now_ms = [Intensity() for _ in range(5)], Shared(), 0
    for number, passed_ms in uses:
        now_ms += passed_ms
        note_use(models[number], shared, now_ms)
    assert sum(shared.ended) <= len(uses)
    assert all(hazard > 0.0 for hazard in shared.hazards)
    # The sum of hazards over a silence has no steps: that is what the offsets are for.
    for place, end in enumerate(SILENCE_ENDS):
        below = shared.offsets[place] + shared.hazards[place] * end
        assert math.isclose(below, shared.offsets[place + 1] + shared.hazards[place + 1] * end, rel_tol=1e-9)
    for known, found in zip(models, Ranking(shared, now_ms + later_ms).rates(models), strict=True):
        assert found > 0.0 if known.uses else found == 0.0


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
