"""When a worker counts as stuck in a request. Does not cover: killing it (``attacks/test_hostile_work``)."""

from __future__ import annotations

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
