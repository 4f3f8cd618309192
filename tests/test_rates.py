"""Rates: exact GCRA for requests, tokens, restores and device time, against a slow model of themselves.

Covers: the arithmetic, and how the core admits, waits, charges and forgets. Does not cover: the share of
turns (``test_turns``), HTTP headers (``test_gateway``), or what survives on disk (``test_journal``).
"""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from packer.rates import Rate


class SlowRate:
    """GCRA in exact fractions of a millisecond, as it is in the textbook."""

    def __init__(self, per_minute: int) -> None:
        self.gap = Fraction(60_000, per_minute)
        self.tolerance = self.gap * (max(1, per_minute // 6) - 1)
        self.due = Fraction(0)

    def wait(self, now_ms: int) -> Fraction:
        return max(self.due - now_ms - self.tolerance, Fraction(0))

    def take(self, now_ms: int) -> None:
        self.due = max(self.due, Fraction(now_ms)) + self.gap


@given(st.integers(1, 100_000), st.lists(st.integers(0, 5_000), max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_rate_is_exactly_gcra(per_minute: int, gaps: list[int]) -> None:
    rate, slow, now_ms = Rate(per_minute), SlowRate(per_minute), 0
    for gap in gaps:
        now_ms += gap
        wait = slow.wait(now_ms)
        assert rate.wait_ms(now_ms) == -(-wait.numerator // wait.denominator)
        if not wait:
            rate.take(now_ms)
            slow.take(now_ms)


@given(st.integers(1, 10_000), st.integers(0, 10_000))
@settings(deadline=None)
def test_whoever_comes_back_after_the_wait_is_let_in_and_not_a_millisecond_before(
    per_minute: int, start_ms: int
) -> None:
    rate = Rate(per_minute)
    while not rate.wait_ms(start_ms):
        rate.take(start_ms)
    wait_ms = rate.wait_ms(start_ms)
    assert rate.wait_ms(start_ms + wait_ms) == 0
    assert rate.wait_ms(start_ms + wait_ms - 1) == 1


def test_remaining_and_reset_say_what_will_be_let_in() -> None:
    rate = Rate(60)
    assert (rate.burst, rate.remaining(0), rate.reset_ms(0)) == (10, 10, 0)
    for left in range(9, -1, -1):
        rate.take(0)
        assert rate.remaining(0) == left
    assert (rate.wait_ms(0), rate.reset_ms(0)) == (1_000, 10_000)
    assert rate.remaining(2_500) == 2


def test_a_changed_rate_keeps_what_is_owed_in_requests() -> None:
    rate = Rate(60)
    for _ in range(10):
        rate.take(5_000)
    rate.set_limit(120, 5_000)
    assert (rate.remaining(5_000), rate.reset_ms(5_000)) == (10, 5_000)
    rate.set_limit(None, 5_000)
    assert rate.wait_ms(5_000) == 0
