"""When a worker counts as stuck in a request, and what each answer is charged.

Does not cover: killing it (``attacks/test_hostile_work``), or what the charges are added to.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.due import LEFT_SECONDS_MAX, SILENT_SECONDS_MAX, Due


def test_a_worker_that_owes_nothing_is_never_stuck() -> None:
    due = Due()
    assert due.stuck_s(1e9) == 0
    due.asked(1, 0.0)
    due.heard(1, True, 1.0)
    assert due.stuck_s(1e9) == 0


def test_silence_counts_from_the_last_frame_of_any_answer() -> None:
    due = Due()
    due.asked(1, 100.0)
    due.asked(2, 101.0)
    due.heard(1, False, 500.0)
    assert due.stuck_s(500.0 + SILENT_SECONDS_MAX) == 0
    assert due.stuck_s(501.0 + SILENT_SECONDS_MAX) > 0


def test_only_the_oldest_answer_decides() -> None:
    """A caller that left while its request still waits behind another says nothing about the worker."""
    due = Due()
    due.asked(1, 0.0)
    due.asked(2, 0.0)
    due.left(2, 1.0)
    assert due.stuck_s(SILENT_SECONDS_MAX) == 0
    due.heard(1, True, 300.0)
    assert due.stuck_s(300.0 + LEFT_SECONDS_MAX) == 0
    assert due.stuck_s(301.0 + LEFT_SECONDS_MAX) > 0


def test_an_answer_for_nobody_has_less_time() -> None:
    due = Due()
    due.asked(1, 0.0)
    due.left(1, 10.0)
    due.left(7, 10.0)
    assert due.stuck_s(10.0 + LEFT_SECONDS_MAX) == 0
    assert due.stuck_s(11.0 + LEFT_SECONDS_MAX) > 0


# --- charges --------------------------------------------------------------------------------------


def test_one_after_the_other_each_is_charged_its_own_time() -> None:
    due = Due()
    due.asked(1, 0.0)
    due.asked(2, 0.5)
    assert due.heard(1, False, 1.0) == 0
    assert due.heard(1, True, 2.0, stated_s=2.0) == 2000
    assert due.heard(2, True, 5.0, stated_s=3.0) == 3000


def test_answers_that_share_passes_are_charged_their_shares() -> None:
    due = Due()
    for number in (1, 2, 3):
        due.asked(number, 0.0)
    assert due.heard(1, True, 1.0, stated_s=0.25) == 250
    assert due.heard(2, True, 1.0, stated_s=0.25) == 250
    assert due.heard(3, True, 1.0, stated_s=0.5) == 500


def test_who_states_nothing_is_paid_for_by_the_next_and_the_last_pays_the_rest() -> None:
    due = Due()
    due.asked(1, 0.0)
    due.asked(2, 0.0)
    assert due.heard(1, True, 1.0, stated_s=0.0) == 0
    assert due.heard(2, True, 1.0, stated_s=0.0) == 1000


def test_an_answer_without_end_defers_no_other_s_time_for_longer_than_it_runs() -> None:
    """A worker that states nothing, and always owes a young answer, is charged all the same."""
    due, charged_ms = Due(), 0
    due.asked(0, 0.0)
    for number in range(1, 100):
        due.asked(number, float(number))
        charged_ms += due.heard(number - 1, True, number + 0.5)
    assert charged_ms == 99_000


def test_a_stated_hour_is_no_more_than_what_passed() -> None:
    due = Due()
    due.asked(1, 0.0)
    due.asked(2, 0.0)
    assert due.heard(1, True, 1.0, stated_s=3600.0) == 1000
    assert due.heard(2, True, 1.0, stated_s=3600.0) == 0


def test_of_many_small_answers_no_fraction_is_lost() -> None:
    due = Due()
    now, charged_ms = 0.0, 0
    for number in range(1000):
        due.asked(number, now)
        now += 0.0004
        charged_ms += due.heard(number, True, now, stated_s=0.0004)
        now += 1.0  # nobody asks: nobody's time
    assert charged_ms in (399, 400)


def test_a_worker_that_dies_owes_all_that_passed_to_those_who_waited() -> None:
    due = Due()
    due.asked(1, 0.0)
    due.asked(2, 6.0)
    due.asked(3, 9.0)
    due.left(2, 7.0)
    assert due.died(9.0) == {3: 0, 2: 3000, 1: 6000}
    assert due.died(10.0) == {}
    assert due.heard(1, True, 20.0, 5.0) == 0


def test_a_worker_that_ends_itself_after_each_answer_computes_nothing_for_free() -> None:
    due = Due()
    due.asked(1, 0.0)
    due.asked(2, 0.0)
    assert due.heard(1, True, 4.0, stated_s=1.0) == 1000
    assert due.died(5.0) == {2: 4000}


def test_nobody_pays_for_longer_than_a_worker_may_be_silent() -> None:
    due = Due()
    due.asked(1, 100.0)
    assert due.died(100.0 + 10 * SILENT_SECONDS_MAX) == {1: int(SILENT_SECONDS_MAX * 1000)}


_STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 2, allow_nan=False), st.floats(0, 5, allow_nan=False)),
    max_size=60,
)


@given(_STEPS, st.booleans())
def test_charges_add_up_to_the_time_in_which_anything_was_owed(
    steps: list[tuple[int, float, float]], dies: bool
) -> None:
    due, owed, now = Due(), list[int](), 0.0
    busy_s, charged_ms = 0.0, 0
    for number, (what, passed_s, stated_s) in enumerate(steps):
        now += passed_s
        busy_s += passed_s if owed else 0.0
        if what < 2:
            due.asked(number, now)
            owed.append(number)
        elif owed:
            ended = owed.pop(0 if what == 2 else -1)
            charge_ms = due.heard(ended, True, now, stated_s)
            assert charge_ms >= 0
            charged_ms += charge_ms
    if dies:
        charges = due.died(now)
        assert sorted(charges) == sorted(owed)
        assert min(charges.values(), default=0) >= 0
        charged_ms += sum(charges.values())
        owed.clear()
    while owed:
        charged_ms += due.heard(owed.pop(), True, now)
    assert abs(charged_ms - busy_s * 1000) < 1.01
