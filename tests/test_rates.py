"""Rates: exact GCRA for requests, tokens, restores and device time, against a slow model of themselves.

Covers: the arithmetic, and how the core admits, waits, charges and forgets. Does not cover: the share of
turns (``test_turns``), HTTP headers (``test_gateway``), or what survives on disk (``test_journal``).
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import Scene, model, of, the

from packer import residency
from packer.events import (
    Action,
    Cancelled,
    Evict,
    Finished,
    Grant,
    PackFound,
    RefusalReason,
    Refuse,
    Restore,
    RestoreFailed,
    SpentFound,
    Ticked,
    TookLate,
)
from packer.rates import (
    DAY_MS,
    MINUTE_MS,
    REQUEST_DEVICE_MS_MAX,
    REQUEST_TOKENS_MAX,
    Rate,
    TenantRates,
    grains,
    span_text,
)
from packer.shares import NO_LAGS, Share
from packer.types import MIB, TenantQuota

# --- one at a time --------------------------------------------------------------------------------


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


# --- amounts --------------------------------------------------------------------------------------


class SlowBucket:
    """A leaky bucket in exact fractions: what drips away with time, and what is reserved and does not."""

    def __init__(self, limit: int, period_ms: int, burst: int) -> None:
        self.per_ms, self.burst = Fraction(limit, period_ms), burst
        self.level, self.reserved, self.at_ms = Fraction(0), 0, 0

    def pass_to(self, now_ms: int) -> None:
        self.level = max(self.level - self.per_ms * (now_ms - self.at_ms), Fraction(0))
        self.at_ms = now_ms

    @property
    def used(self) -> Fraction:
        return self.level + self.reserved

    def wait_ms(self, units: int) -> int:
        over = self.used + units - self.burst
        return ceil(over / self.per_ms) if over > 0 else 0


LIMITS = st.tuples(st.integers(1, 50_000), st.sampled_from((MINUTE_MS, DAY_MS)), st.sampled_from((1, 6)))
STEPS = st.lists(
    st.tuples(st.integers(0, 90_000), st.integers(0, 60_000), st.integers(0, 60_000)), max_size=40
)


@given(LIMITS, STEPS)
@settings(max_examples=200, deadline=None)
def test_amounts_known_afterwards_are_charged_exactly(
    limits: tuple[int, int, int], steps: list[tuple[int, int, int]]
) -> None:
    """Every step lets one in by its estimate, or ends the oldest with what it took."""
    limit, period_ms, parts = limits
    rate = Rate(limit, period_ms, parts)
    slow, now_ms = SlowBucket(limit, period_ms, rate.burst), 0
    running: list[int] = []
    for gap_ms, estimate, took in steps:
        now_ms += gap_ms
        slow.pass_to(now_ms)
        for units in (1, 5):
            assert rate.wait_ms(now_ms, units) == slow.wait_ms(units)
        assert rate.remaining(now_ms) == max(floor(rate.burst - slow.used), 0)
        assert rate.reset_ms(now_ms) == ceil(slow.used / slow.per_ms)
        assert rate.owed(now_ms) == ceil(slow.level)
        if not rate.wait_ms(now_ms):
            rate.reserved += estimate
            slow.reserved += estimate
            running.append(estimate)
        elif running:
            reserved = running.pop(0)
            rate.reserved -= reserved
            slow.reserved -= reserved
            rate.take(now_ms, took)
            slow.level += took


@given(LIMITS, STEPS)
@settings(max_examples=200, deadline=None)
def test_no_window_of_any_length_passes_more_than_the_limit_and_what_nobody_could_know(
    limits: tuple[int, int, int], steps: list[tuple[int, int, int]]
) -> None:
    limit, period_ms, parts = limits
    rate, now_ms = Rate(limit, period_ms, parts), 0
    running: list[int] = []
    charged: list[tuple[int, int, int]] = []  # when, how much, how much more than was reserved
    largest = 0
    for gap_ms, estimate, took in steps:
        now_ms += gap_ms
        while not rate.wait_ms(now_ms) and len(running) < 4:
            rate.reserved += estimate
            running.append(estimate)
            largest = max(largest, estimate)
        if running:
            reserved = running.pop(0)
            rate.reserved -= reserved
            rate.take(now_ms, took)
            charged.append((now_ms, took, max(took - reserved, 0)))
    for first in range(len(charged)):
        passed = unknown = 0
        for at_ms, took, more in charged[first:]:
            passed += took
            unknown += more
            allowed = rate.burst + largest + Fraction(limit * (at_ms - charged[first][0]), period_ms)
            assert passed <= allowed + unknown


@given(LIMITS, STEPS, st.integers(0, 10**7), st.integers(0, 10**7))
@settings(max_examples=100, deadline=None)
def test_a_restart_forgets_nothing_and_invents_less_than_one_unit(
    limits: tuple[int, int, int], steps: list[tuple[int, int, int]], down_ms: int, later_ms: int
) -> None:
    before, now_ms = Rate(*limits), 0
    for gap_ms, took, _ in steps:
        now_ms += gap_ms
        before.take(now_ms, took)
    # The clock of a new process starts anywhere.
    after, start_ms = Rate(*limits), 77_777
    after.take_up(before.owed(now_ms), down_ms, start_ms)
    then_ms = now_ms + down_ms + later_ms
    lost = before.owed(then_ms) - after.owed(start_ms + later_ms)
    assert lost in (0, -1)


def test_what_is_owed_comes_on_top_of_what_was_used_since_the_start() -> None:
    rate = Rate(60)
    rate.take(0, 5)
    rate.take_up(10, 4_000, 0)
    assert rate.owed(0) == 11
    rate.take_up(3, 10**12, 0)
    rate.take_up(0, 0, 0)
    assert rate.owed(0) == 11
    rate.take_up(3, -5_000, 0)
    assert rate.owed(0) == 14, "a clock that was set back forgives nothing"


@given(st.lists(st.one_of(st.none(), st.integers(1, 10**9)), max_size=6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_limits_that_change_in_mid_request_lose_no_reservation(limits: list[int | None], took: int) -> None:
    rate = Rate(100)
    rate.reserved += 40
    for step, limit in enumerate(limits):
        rate.set_limit(limit, step * 10)
    rate.reserved -= 40
    rate.take(100, took)
    last = next((limit for limit in reversed(limits)), 100)
    assert rate.owed(100) == (took if last is not None else 0)


@pytest.mark.parametrize(
    ("span_ms", "text"),
    [
        (-5, "0 s"),
        (1, "1 s"),
        (59_001, "1 min"),
        (61_000, "1 min 1 s"),
        (3_600_000, "1 h"),
        (3_600_001, "1 h 1 min"),
        (DAY_MS, "24 h"),
    ],
)
def test_spans_are_written_for_people_and_rounded_up(span_ms: int, text: str) -> None:
    assert span_text(span_ms) == text


# --- tokens in the core ---------------------------------------------------------------------------


def scene_of(count: int = 2, **limits: int) -> Scene:
    """A tenant ``acme`` with these limits, ``count`` models of which two fit, and a neighbour."""
    specs = [model(f"acme/m{i}", 40) for i in range(count)]
    scene = Scene(*specs, model("bolt/b", 10), quotas={"acme": TenantQuota(**limits)})
    for spec in specs:
        scene.feed(PackFound(spec.ref, 20 * MIB, 20 * MIB))
    return scene


def left(scene: Scene, name: str) -> int:
    view = residency.tenant_view(scene.node, "acme", scene.now_ms)
    assert view is not None
    return next(rate.remaining for rate in view.rates if rate.name == name)


def test_what_is_expected_counts_until_what_was_used_is_known() -> None:
    scene = scene_of(tokens_per_minute=100)
    spec = scene.specs[0]
    scene.settle(scene.ask(spec, tokens=60))
    assert left(scene, "tokens_per_minute") == 40
    assert the(scene.ask(spec, tokens=500), Grant), "while there is a token, one may come in"
    refusal = the(scene.ask(spec, tokens=1), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.TOKENS, 276_600)
    assert "100 tokens per minute" in refusal.detail
    scene.finish(2, tokens=0)
    assert left(scene, "tokens_per_minute") == 40
    scene.finish(1, tokens=90)
    assert left(scene, "tokens_per_minute") == 10


def test_tokens_beyond_the_limit_are_a_debt_that_time_pays() -> None:
    scene = scene_of(tokens_per_minute=60)
    spec = scene.specs[0]
    scene.settle(scene.ask(spec, tokens=1))
    scene.finish(1, tokens=360)
    refusal = the(scene.ask(spec), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.TOKENS, 301_000)
    assert "5 min 1 s" in refusal.detail
    assert the(scene.later(300_999).ask(spec), Refuse).retry_ms == 1
    assert the(scene.later(1).ask(spec), Grant)


@pytest.mark.parametrize("end", ["leaves the queue", "times out", "leaves", "is refused with its model"])
def test_what_was_reserved_for_a_request_that_never_ran_is_free_again(end: str) -> None:
    scene = scene_of(tokens_per_minute=100)
    restore = the(scene.ask(scene.specs[0], 5_000, tokens=100), Restore)
    assert left(scene, "tokens_per_minute") == 0
    if end == "leaves the queue":
        scene.feed(Cancelled("r1"))
    elif end == "times out":
        assert the(scene.later(5_000).feed(Ticked()), Refuse).reason is RefusalReason.TIMEOUT
    elif end == "leaves":
        scene.restored(restore)
        scene.feed(Cancelled("r1"))
    else:
        broken = RestoreFailed(restore.ref, restore.device, restore.from_tier, "no", broken=True)
        assert the(scene.feed(broken), Refuse).reason is RefusalReason.MODEL_BROKEN
    assert left(scene, "tokens_per_minute") == 100


@pytest.mark.parametrize("claim", [-(10**30), -1, 2**63, 10**30])
def test_claims_about_tokens_and_time_are_bounded(claim: int) -> None:
    """Whatever a gateway or a worker says, the books stay within what one request can take."""
    scene = scene_of(tokens_per_minute=100, device_seconds_per_day=1)
    scene.settle(scene.ask(scene.specs[0], tokens=claim))
    tenant = scene.node.tenants["acme"]
    assert 0 <= tenant.rates.tokens.reserved <= REQUEST_TOKENS_MAX
    scene.finish(1, device_ms=claim, tokens=claim)
    assert 0 <= tenant.rates.tokens.owed(scene.now_ms) <= REQUEST_TOKENS_MAX
    assert 0 <= tenant.rates.device.owed(scene.now_ms) <= REQUEST_DEVICE_MS_MAX + 1_000
    assert 0 <= tenant.virtual_us <= (REQUEST_DEVICE_MS_MAX + 1_000) * 1_000
    assert the(scene.ask(scene.specs[-1]), Restore), "its neighbour is not concerned"


# --- device time in the core ----------------------------------------------------------------------


def test_device_time_is_charged_for_answers_and_for_the_restores_that_they_needed() -> None:
    scene = scene_of(device_seconds_per_day=2)
    spec = scene.specs[0]
    scene.settle(scene.ask(spec))  # restored in 100 ms
    scene.finish(1, device_ms=1_000)
    scene.feed(TookLate("acme", 900))
    refusal = the(scene.ask(spec), Refuse)
    assert refusal.reason is RefusalReason.DEVICE_TIME
    # The mean of its requests fits again when one second has dripped away, which takes half a day.
    assert refusal.retry_ms == DAY_MS // 2000
    assert "24 h" in refusal.detail
    assert the(scene.later(DAY_MS // 2000).ask(spec), Grant)


def test_requests_in_flight_are_expected_to_take_what_those_before_them_took() -> None:
    scene = scene_of(device_seconds_per_day=10)
    spec = scene.specs[0]
    scene.settle(scene.ask(spec))
    scene.finish(1, device_ms=4_000)
    assert the(scene.ask(spec), Grant)
    assert the(scene.ask(spec), Grant), "4.1 s are used and 4 s expected"
    assert the(scene.ask(spec), Refuse).reason is RefusalReason.DEVICE_TIME


def test_a_model_that_can_not_be_built_costs_its_tenant_the_time() -> None:
    scene = scene_of(device_seconds_per_day=5)
    restore = the(scene.ask(scene.specs[0]), Restore)
    scene.later(7_000).feed(
        RestoreFailed(restore.ref, restore.device, restore.from_tier, "no", broken=True, order=restore.order)
    )
    assert left(scene, "device_seconds_per_day") == 0
    assert the(scene.ask(scene.specs[1]), Refuse).reason is RefusalReason.DEVICE_TIME


def test_what_was_owed_before_a_restart_is_owed_after_it() -> None:
    scene = scene_of(tokens_per_minute=60, device_seconds_per_day=100)
    scene.settle(scene.ask(scene.specs[0]))
    scene.finish(1, device_ms=90_000, tokens=600)
    owed = residency.spent(scene.node, scene.now_ms)
    assert owed == {"acme": (600, 90_100)}
    again = scene_of(tokens_per_minute=60, device_seconds_per_day=100)
    again.feed(SpentFound("acme", *owed["acme"], ago_ms=60_000))
    again.feed(SpentFound("nobody", 5, 5, 0))
    assert the(again.ask(again.specs[0]), Refuse).retry_ms == 481_000
    assert left(again, "device_seconds_per_day") == 9
    assert residency.spent(again.later(DAY_MS).node, again.now_ms) == {}


# --- restores in the core -------------------------------------------------------------------------


def test_above_its_restores_a_tenant_waits_and_its_resident_models_answer() -> None:
    scene = scene_of(count=3, restores_per_minute=2)
    one, two, three, _ = scene.specs
    scene.warm(one)
    scene.warm(two)
    scene.later(10_000)
    assert not of(scene.ask(three), Restore)
    assert the(scene.ask(two), Grant)
    scene.finish(scene.requests)
    assert scene.node.wake_ms == 30_000
    evict = the(scene.later(20_000).feed(Ticked()), Evict)
    assert the(scene.evicted(evict), Restore).ref == three.ref


def test_a_request_whose_restore_would_come_after_its_deadline_is_refused_at_once() -> None:
    scene = scene_of(count=4, restores_per_minute=1)
    one, two, three, four, _ = scene.specs
    scene.warm(one)
    assert not of(scene.ask(two, 70_000), Refuse)
    assert not of(scene.ask(two, 1_000), Refuse), "it joins one that waits, and may time out"
    refusal = the(scene.ask(three, 70_000), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.RESTORE_RATE, 120_000)
    for part in ("restores_per_minute", "1 of its models", "2 min", "are on a device answer"):
        assert part in refusal.detail
    assert not of(scene.ask(four, 121_000), Refuse)
    assert the(scene.ask(one), Grant)


def test_a_restore_that_is_tried_again_is_counted_once() -> None:
    scene = scene_of(restores_per_minute=1)
    first, second, _ = scene.specs
    order = the(scene.ask(first, 100_000), Restore)
    failed = RestoreFailed(order.ref, order.device, order.from_tier, "a fault", order=order.order)
    scene.feed(failed)
    assert scene.node.wake_ms is not None
    order = the(scene.later(scene.node.wake_ms - scene.now_ms).feed(Ticked()), Restore)
    scene.restored(order)
    assert left(scene, "restores_per_minute") == 0
    assert not of(scene.ask(second, 100_000), Restore)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40_000)), min_size=5, max_size=40)
)
def test_no_window_has_more_restores_than_the_rate_allows(limit: int, asks: list[tuple[int, int]]) -> None:
    """A tenant that thrashes four models through room for two, whatever it asks for and when."""
    scene = scene_of(count=4, restores_per_minute=limit)
    started: list[int] = []
    for which, gap_ms in asks:
        until_ms = scene.now_ms + gap_ms
        while scene.node.wake_ms is not None and scene.now_ms < scene.node.wake_ms <= until_ms:
            scene.later(scene.node.wake_ms - scene.now_ms)
            started += answered(scene, scene.feed(Ticked()))
        scene.later(until_ms - scene.now_ms)
        started += answered(scene, scene.ask(scene.specs[which], 100_000))
    for first in range(len(started)):
        for last in range(first, len(started)):
            allowed = limit + Fraction(limit * (started[last] - started[first]), MINUTE_MS)
            assert last - first + 1 <= allowed


def answered(scene: Scene, actions: list[Action]) -> list[int]:
    """Let everything end well at once; returns when restores of ``acme`` started."""
    started, todo = [], list(actions)
    while todo:
        match action := todo.pop(0):
            case Restore():
                if action.ref.tenant == "acme":
                    started.append(scene.now_ms)
                todo += scene.restored(action)
            case Evict():
                todo += scene.evicted(action)
            case Grant():
                todo += scene.feed(Finished(action.request, 1))
    return started


# --- how finely a limit divides --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        (TenantQuota(), 0),
        (TenantQuota(requests_per_minute=6), 1),
        (TenantQuota(requests_per_minute=600), 64),
        (TenantQuota(requests_per_minute=600, concurrency=3), 3),
        (TenantQuota(tokens_per_minute=1_000_000), 64),
        (TenantQuota(restores_per_minute=2, tokens_per_minute=1_000), 2),
    ],
)
def test_a_grain_lets_at_least_one_unit_of_every_limit_through(quota: TenantQuota, count: int) -> None:
    assert grains(quota) == count
    if count:
        rates = TenantRates()
        rates.set_limits(quota, 0)
        rates.set_share(Share(1, count), NO_LAGS, 0, 0)
        assert not rates.blocked(0, 0)
        assert rates.slots != 0
