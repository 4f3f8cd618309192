"""Shares of a tenant's limits: rates that are divided anew at any moment, and the book that divides them.

Covers: that nodes together let in no more than one would, however shares change hands; the book over a
network that loses, repeats and delays, with crashes on both sides; who gets how much; turns where there are
fewer grains than nodes. Does not cover: the whole stack (``test_cluster_simulation``,
``test_shares_running``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from random import Random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from share_boxes import GRAINS, QUOTA, Box, Desk, boxes

from control.share_book import Held
from control.shares import (
    FREE_AFTER_MS,
    HOLD_MS,
    HolderJoined,
    HolderRemoved,
    SharesAsked,
    SharesAwaited,
    Ticked,
    free_part,
)
from packer.rates import MINUTE_MS, Rate, TenantRates, burst_of, full_lags, grains
from packer.shares import NO_LAGS, NOTHING, TERM_MS, WHOLE, Lags, Share
from packer.types import TenantQuota
from packer.wire import SharesAnswer

# --- one rate in parts ----------------------------------------------------------------------------


class Judge:
    """Books of its own: when how much was let in, of all nodes together."""

    def __init__(self, limit: int, period_ms: int, burst: int) -> None:
        self.per_ms, self.burst = Fraction(limit, period_ms), burst
        self.let_in: list[tuple[int, int]] = []

    def judge(self) -> None:
        """No window of any length passes more than the burst and what the limit brings meanwhile."""
        level, at_ms = Fraction(0), 0
        for when_ms, amount in self.let_in:
            level = max(level - self.per_ms * (when_ms - at_ms), Fraction(0)) + amount
            at_ms = when_ms
            assert level <= self.burst, f"{level} of {self.burst} at {when_ms} ms"


STEPS = st.lists(
    st.tuples(
        st.integers(0, 20_000),  # how long nothing happens
        st.integers(0, 2),  # which node
        st.integers(0, 40),  # how many come there
        st.integers(0, 2),  # from which node grains move
        st.integers(0, 2),  # to which
        st.integers(0, 8),  # how many
        st.integers(0, 10_000),  # how long they are on the way
    ),
    max_size=30,
)


@given(st.integers(1, 5_000), st.sampled_from((1, 6)), st.integers(1, 64), STEPS)
@settings(max_examples=150, deadline=None)
def test_however_shares_move_nodes_together_let_in_no_more_than_one_would(
    limit: int, parts: int, of: int, steps: Sequence[tuple[int, ...]]
) -> None:
    nodes = [Rate(limit, MINUTE_MS, parts) for _ in range(3)]
    for node, share in zip(nodes, (WHOLE, NOTHING, NOTHING), strict=True):
        node.set_share(Share(share.parts * of, of), 0, 0)
    judge, now_ms = Judge(limit, MINUTE_MS, burst_of(limit, parts)), 0
    on_the_way: list[tuple[int, int, int, int, int]] = []  # when, to, grains, lag, given up at
    for gap_ms, at, come, source, target, count, delay_ms in steps:
        now_ms += gap_ms
        for each in [each for each in on_the_way if each[0] <= now_ms]:
            on_the_way.remove(each)
            _, to, moved, lag_ms, gone_ms = each
            has = nodes[to].share.parts
            nodes[to].set_share(Share(has + moved, of), max(lag_ms - (now_ms - gone_ms), 0), now_ms)
        for _ in range(come):
            if nodes[at].wait_ms(now_ms):
                break
            nodes[at].take(now_ms)
            judge.let_in.append((now_ms, 1))
        moved = min(count, nodes[source].share.parts)
        nodes[source].set_share(Share(nodes[source].share.parts - moved, of), 0, now_ms)
        on_the_way.append((now_ms + delay_ms, target, moved, nodes[source].lag_ms(now_ms), now_ms))
    judge.judge()


@given(st.integers(1, 5_000), st.integers(1, 60), st.integers(1, 60), st.integers(0, 90_000))
@settings(max_examples=100, deadline=None)
def test_a_share_that_goes_and_comes_back_frees_nothing(
    limit: int, first: int, second: int, away_ms: int
) -> None:
    """Given up and taken up in one moment it changes nothing but by rounding up; later, nothing either."""
    rate, alone = Rate(limit, MINUTE_MS, 1), Rate(limit, MINUTE_MS, 1)
    for each in (rate, alone):
        each.take(0, 3 * limit)
    for share in (Share(first, 60), Share(second, 60)):
        lag_ms = rate.lag_ms(away_ms)
        rate.set_share(share, lag_ms, away_ms)
    rate.set_share(WHOLE, rate.lag_ms(away_ms), away_ms)
    assert alone.wait_ms(away_ms) <= rate.wait_ms(away_ms) <= alone.wait_ms(away_ms) + 10


@given(st.integers(60, 5_000), st.integers(2, 60), st.integers(0, 20_000))
@settings(max_examples=100, deadline=None)
def test_what_a_node_gave_up_unheard_frees_nothing_when_it_comes_back_as_unused(
    limit: int, kept: int, away_ms: int
) -> None:
    """It halved by itself, and whoever gives it the rest has not heard so: the rest comes without a lag."""
    rate, alone = Rate(limit, MINUTE_MS, 1), Rate(limit, MINUTE_MS, 1)
    for each in (rate, alone):
        each.take(0, limit)
    rate.set_share(Share(kept, 64), 0, 0)
    rate.set_share(WHOLE, 0, away_ms)
    assert alone.wait_ms(away_ms) <= rate.wait_ms(away_ms)


def test_a_whole_share_is_the_rate_itself_and_a_part_of_it_a_slower_one() -> None:
    rate = Rate(600)
    rate.set_share(Share(64, 64), 0, 0)
    assert (rate.burst, rate.remaining(0)) == (100, 100)
    for _ in range(100):
        rate.take(0)
    assert rate.wait_ms(0) == 100
    half = Rate(600)
    half.set_share(Share(1, 2), 0, 0)
    for _ in range(50):
        assert half.wait_ms(0) == 0
        half.take(0)
    assert (half.wait_ms(0), half.lag_ms(0)) == (200, 10_000)


def test_a_node_without_a_share_lets_nobody_in_and_says_to_come_back_soon() -> None:
    rate = Rate(600)
    rate.set_share(NOTHING, 0, 0)
    assert (rate.wait_ms(0), rate.remaining(0), rate.reset_ms(0)) == (1_000, 0, 0)
    rate.take(0, 5)
    rate.set_share(Share(1, 10), 0, 10_000)
    assert rate.owed(10_000) == 5, "what came late is paid when there is a share again"


def test_requests_in_flight_keep_what_they_stand_on() -> None:
    rates = TenantRates()
    rates.set_limits(TenantQuota(concurrency=4, requests_per_minute=600), 0)
    rates.set_share(NOTHING, NO_LAGS, 3, 0)
    assert rates.slots == 3 or rates.slots == 4, "three of four"
    rates.set_share(Share(1, 4), NO_LAGS, 1, 0)
    assert rates.slots == 1
    rates.set_share(NOTHING, NO_LAGS, 0, 0)
    assert rates.slots == 0


# --- the book -------------------------------------------------------------------------------------


def test_a_node_that_is_alone_has_the_whole_with_the_first_word() -> None:
    desk, (box,) = Desk("a"), boxes("a")
    asked = box.ask(0, 0)
    answer = desk.step(asked, 0)
    assert answer is not None
    box.take(asked, answer, 0, 0)
    assert (box.parts, box.held.halve_at_ms, box.held.rest) == (1, None, WHOLE)
    box.talk(desk, 0, 5)
    box.pass_to(10**12)
    assert box.parts == 1, "and keeps it while control is away"


def test_a_node_that_is_alone_keeps_no_tenant_in_the_book_that_is_gone() -> None:
    """They stayed for ever: it has the whole of every tenant's limits, so none of them was given up."""
    desk, (box,) = Desk("a"), boxes("a")
    for _ in range(2):
        box.talk(desk, 64, 0)
    assert list(desk.book.tenants) == ["t"]
    gone = replace(box.ask(0, 10), wishes=())
    for number in (1, 2):
        desk.step(replace(gone, number=gone.number + number), 10)
    assert (desk.book.tenants, desk.book.holders["a"].tenants) == ({}, {})
    assert free_part(desk.book, "t", 10) == 0, "and it has the whole all the same"
    desk.step(HolderJoined("b", fresh=True), 20)
    (other,) = boxes("b")
    other.talk(desk, 64, 20)
    assert other.parts == 0


def test_an_exchange_looks_at_no_more_nodes_when_there_are_more() -> None:
    """Of those who have some there are 64 at the most; of those who wait only the first are looked at."""
    desk = Desk(*(f"n{number}" for number in range(100)))
    fleet = boxes(*desk.book.holders)
    for now_ms in (0, 1, 2):
        for box in fleet:
            box.talk(desk, 64, now_ms)
    known = desk.book.tenants["t"]
    assert (len(known.held), len(known.having), len(known.waiting)) == (100, 64, 36)
    with mock.patch.object(Held, "value", property(lambda held: pytest.fail("it is kept up"))):
        assert free_part(desk.book, "t", HOLD_MS) == 0


def test_shares_follow_what_is_wanted_and_are_equal_when_all_want_everything() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    a.talk(desk, 48, 0)
    assert a.parts == 48 / GRAINS
    b.talk(desk, 64, 10)
    assert b.parts == 16 / GRAINS, "what nobody has, at once"
    assert desk.nudged == ["a"]
    a.talk(desk, 64, 20)
    assert a.parts == 1 / 2
    a.talk(desk, 64, 30)
    b.talk(desk, 64, 30)
    assert b.parts == 1 / 2
    a.talk(desk, 0, 40)
    a.talk(desk, 0, 50)
    b.talk(desk, 64, 60)
    assert (a.parts, b.parts) == (0, 1), "one that serves alone has the whole limit"


def test_what_was_taken_of_a_share_goes_with_it() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    a.talk(desk, 64, 0)
    for _ in range(100):
        assert not a.rates.requests.wait_ms(0)
        a.rates.requests.take(0)
    for box, want in ((a, 0), (b, 64), (a, 0), (a, 0), (b, 64)):
        box.talk(desk, want, 1_000)
    assert (a.parts, b.parts) == (0, 1)
    assert b.rates.requests.remaining(1_000) <= 10, "a second brings ten, and no burst comes with it"
    assert b.rates.requests.remaining(11_000) == 100


def test_a_silent_node_keeps_half_and_gets_nothing_taken_until_its_term_is_over() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    a.talk(desk, 64, 0)
    b.talk(desk, 64, 0)
    desk.step(Ticked(), TERM_MS)
    b.talk(desk, 64, TERM_MS)
    assert b.parts == 0
    desk.step(Ticked(), FREE_AFTER_MS)
    b.talk(desk, 64, FREE_AFTER_MS)
    assert b.parts == 1 / 2
    assert b.rates.requests.remaining(FREE_AFTER_MS) == 0, "nobody knows what the other took"
    a.pass_to(TERM_MS)
    assert a.parts == 1 / 2
    a.pass_to(10**12)
    assert a.parts == 1 / 2, "and that it keeps"


def test_a_node_halves_once_though_control_hears_of_it_and_is_not_heard() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    for _ in range(2):
        a.talk(desk, 64, 0)
    a.pass_to(TERM_MS)
    assert a.parts == 1 / 2
    assert desk.step(a.ask(32, TERM_MS), TERM_MS), "and the answer is lost"
    later_ms = TERM_MS + FREE_AFTER_MS
    desk.step(Ticked(), later_ms)
    a.pass_to(later_ms)
    for _ in range(2):
        b.talk(desk, 64, later_ms)
    assert (a.parts, b.parts) == (1 / 2, 1 / 2)


def test_what_a_removed_node_had_is_free() -> None:
    desk, (a, b, _) = Desk("a", "b", "c"), boxes("a", "b", "c")
    a.talk(desk, 64, 0)
    b.talk(desk, 64, 0)
    desk.step(HolderRemoved("a"), 5)
    b.talk(desk, 64, 5)
    assert b.parts == 1
    assert b.rates.requests.remaining(5) == 0


def test_a_new_control_gives_nothing_until_it_has_heard_every_node() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    a.talk(desk, 40, 0)
    b.talk(desk, 8, 0)
    desk = Desk("a", "b", name="c2", now_ms=10, fresh=False)
    b.talk(desk, 64, 20)
    assert b.parts == 8 / 64
    a.talk(desk, 40, 30)
    b.talk(desk, 64, 40)
    assert b.parts == 24 / 64


def test_what_was_said_to_an_earlier_control_counts_for_nothing() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    a.talk(desk, 0, 0)
    late = a.ask(0, 0)
    a.talk(desk, 64, 1)
    assert a.parts == 1
    desk = Desk("a", "b", name="c2", now_ms=10, fresh=False)
    for _ in range(3):
        answer = desk.step(late, 20)
        assert answer is not None
        assert not answer.known
    b.talk(desk, 64, 30)
    assert b.parts == 0


def test_a_node_that_may_be_alone_blocks_everything_until_it_is_heard_or_removed() -> None:
    desk, (a, b) = Desk("a"), boxes("a", "b")
    a.talk(desk, 0, 0)
    desk.step(HolderJoined("b", fresh=True), 5)
    b.talk(desk, 64, 10)
    assert b.parts == 0
    desk = Desk("a", "b", name="c2", now_ms=20, fresh=False)
    desk.step(Ticked(), 20 + FREE_AFTER_MS)
    b.talk(desk, 64, 20 + FREE_AFTER_MS)
    assert b.parts == 0, "the other has the whole and does not know of this one"
    a.talk(desk, 64, 30 + FREE_AFTER_MS)
    b.talk(desk, 64, 30 + FREE_AFTER_MS)
    assert (a.parts, b.parts) == (1 / 2, 0)
    a.talk(desk, 64, 40 + FREE_AFTER_MS)
    b.talk(desk, 64, 40 + FREE_AFTER_MS)
    assert (a.parts, b.parts) == (1 / 2, 1 / 2)


def test_a_limit_of_one_goes_round() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    quota = TenantQuota(requests_per_minute=600, concurrency=1)

    def talk(box: Box, want: int, now_ms: int) -> None:
        if not box.session:
            first = desk.step(box.ask(want, now_ms), now_ms)
            assert first is not None
            box.session = first.session
        asked = box.ask(want, now_ms, 1, quota)
        answer = desk.step(asked, now_ms)
        assert answer is not None
        box.take(asked, answer, now_ms, now_ms)

    for box in (a, b):
        box.rates.set_limits(quota, 0)
        talk(box, 0, 0)
    talk(a, 1, 0)
    talk(b, 1, 0)
    assert (a.parts, b.parts) == (1, 0)
    talk(a, 1, HOLD_MS - 1)
    assert a.parts == 1, "for a few requests"
    for box in (a, a, b):
        talk(box, 1, 2 * HOLD_MS)
    assert (a.parts, b.parts) == (0, 1)


def test_a_node_can_not_claim_what_it_was_not_given() -> None:
    desk, (liar, b) = Desk("a", "b"), boxes("a", "b")
    b.talk(desk, 32, 0)
    liar.talk(desk, 8, 0)
    liar.rates.set_share(WHOLE, NO_LAGS, 0, 0)
    liar.held.rest = WHOLE
    liar.talk(desk, 8, 10)
    assert free_part(desk.book, "t", 10) == Fraction(24, 64), "its word took nothing from anybody"
    b.talk(desk, 64, 20)
    assert b.parts == 56 / 64


def test_a_greedy_node_gets_no_more_than_its_part() -> None:
    desk, (greedy, *others) = Desk("a", "b", "c", "d"), boxes("a", "b", "c", "d")
    greedy.talk(desk, 64, 0)
    for now_ms in (1, 2, 3):
        for box in others:
            box.talk(desk, 10, now_ms)
        greedy.talk(desk, 64, now_ms)
        greedy.talk(desk, 64, now_ms)
    assert [box.parts * 64 for box in others] == [10, 10, 10]


@pytest.mark.parametrize("count", [1, 2, 5, 20, 60])
def test_whoever_could_serve_a_tenant_comes_to_have_the_same_of_it_ahead(count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    desk, fleet = Desk(*names, "z"), boxes(*names)
    (other,) = boxes("z")
    other.talk(desk, 0, 0)
    for box in fleet:
        box.ahead = True
    for now_ms in range(20):
        for box in fleet:
            box.talk(desk, 0, now_ms)
    grains_held = sorted(box.parts * GRAINS for box in fleet)
    assert grains_held[-1] - grains_held[0] <= 1
    assert 0 < sum(grains_held) <= GRAINS / 2
    before = list(grains_held)
    for box in fleet:
        box.talk(desk, 0, 20)
    assert sorted(box.parts * GRAINS for box in fleet) == before, "it comes to rest"
    known = desk.book.tenants["t"]
    assert len(known.held) <= GRAINS // 2, "who has none is not in the book"
    other.talk(desk, GRAINS // 2, 30)
    assert other.parts == 1 / 2, "nobody had to be asked"
    assert desk.nudged == []


def test_what_is_held_ahead_goes_to_whoever_is_short_of_it_all_of_it() -> None:
    desk, (a, b) = Desk("a", "b"), boxes("a", "b")
    a.ahead = True
    for now_ms in (0, 1):
        a.talk(desk, 0, now_ms)
    assert a.parts == 1 / 4
    b.talk(desk, 52, 2)
    assert (b.parts, desk.nudged) == (3 / 4, ["a"])
    a.talk(desk, 0, 3)
    assert a.parts == 0
    a.talk(desk, 0, 4)
    b.talk(desk, 52, 5)
    assert b.parts == 52 / GRAINS
    a.talk(desk, 0, 6)
    assert 0 < a.parts < 1 / 8, "nobody is short of anything"


# --- the book over a bad network ------------------------------------------------------------------


@dataclass(slots=True)
class Underway:
    """A message: an ask (``answer`` None) or an answer to one."""

    box: Box
    process: object
    asked: SharesAsked
    sent_ms: int
    answer: SharesAnswer | None = None


class Weather:
    """Boxes, a control that is started anew now and then, and messages that are lost, late and doubled."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Random(seed)
        self.now_ms = 0
        self.names = ["a", "b", "c"][: rng.choice((2, 3))]
        self.quota = rng.choice((QUOTA, TenantQuota(requests_per_minute=rng.choice((6, 12, 60)))))
        self.count = grains(self.quota)
        self.desk = Desk(*self.names)
        self.boxes = {box.name: box for box in boxes(*self.names)}
        self.process: dict[str, object] = {name: object() for name in self.names}
        self.busy: dict[str, int | None] = dict.fromkeys(self.names)
        self.sent_ms = dict.fromkeys(self.names, 0)
        self.wants = dict.fromkeys(self.names, 0)
        self.away: dict[str, int] = dict.fromkeys(self.names, 0)
        self.underway: list[Underway] = []
        limit = self.quota.requests_per_minute or 0
        self.judge = Judge(limit, MINUTE_MS, burst_of(limit, 6))
        self.controls = 1
        for box in self.boxes.values():
            box.set_limits(self.quota)

    def run(self) -> Weather:
        for _ in range(600):
            self.now_ms += self.rng.choice((0, 1, 10, 100, 1_000, 1_000, 30_000))
            if self.rng.random() < 0.01:
                self.now_ms += FREE_AFTER_MS
            self.desk.step(Ticked(), self.now_ms)
            self._mishap()
            for name in self.names:
                self._serve(name)
            self._deliver()
            total = sum((box.rates.share.value for box in self.boxes.values()), Fraction(0))
            assert total <= 1, f"{total} at {self.now_ms}"
        self.judge.judge()
        return self

    def _mishap(self) -> None:
        rng = self.rng
        name = rng.choice(self.names)
        if rng.random() < 0.05:
            self.away[name] = self.now_ms + rng.choice((1_000, 60_000, 2 * FREE_AFTER_MS))
        if rng.random() < 0.03:
            self._restart(name)
        if rng.random() < 0.03:
            self.controls += 1
            fresh = Desk(*self.names, name=f"c{self.controls}", now_ms=self.now_ms, fresh=False)
            self.desk = fresh

    def _restart(self, name: str) -> None:
        """As ``agent.shares`` and the core do it."""
        old = self.boxes[name]
        new = self.boxes[name] = Box(name, divided=old.divided)
        new.set_limits(self.quota)
        new.held.rest = old.held.rest if old.lasting else old.held.rest.halved()
        new.lasting = old.lasting
        new.held.by_tenant = {
            tenant: share if old.lasting else share.halved() for tenant, share in old.held.by_tenant.items()
        }
        new.rates.set_share(new.held.share_of("t"), NO_LAGS, 0, self.now_ms)
        new.rates.use_up(self.now_ms)
        self.process[name] = object()
        self.busy[name] = None

    def _serve(self, name: str) -> None:
        box, rng = self.boxes[name], self.rng
        box.pass_to(self.now_ms)
        for _ in range(rng.choice((0, 0, 1, 5, 200))):
            if box.rates.requests.wait_ms(self.now_ms):
                break
            box.rates.requests.take(self.now_ms)
            self.judge.let_in.append((self.now_ms, 1))
        if rng.random() < 0.1:
            box.ahead = not box.ahead
        if rng.random() < 0.3:
            self.wants[name] = rng.choice((0, 1, self.count // 2, self.count))
        if self.busy[name] is None or self.now_ms - self.sent_ms[name] > 5_000:
            asked = box.ask(self.wants[name], self.now_ms, self.count, self.quota)
            self.busy[name], self.sent_ms[name] = asked.number, self.now_ms
            for _ in range(rng.choice((0, 1, 1, 1, 2))):
                self.underway.append(Underway(box, self.process[name], asked, self.now_ms))

    def _deliver(self) -> None:
        self.rng.shuffle(self.underway)
        late, self.underway = (
            self.underway[: len(self.underway) // 3],
            self.underway[len(self.underway) // 3 :],
        )
        for message in self.underway:
            name = message.box.name
            if self.now_ms < self.away[name] and self.rng.random() < 0.9:
                late.append(message)
            elif message.answer is None:
                answer = self.desk.step(message.asked, self.now_ms)
                if answer is not None and self.rng.random() < 0.8:
                    late.append(
                        Underway(message.box, message.process, message.asked, message.sent_ms, answer)
                    )
                if self.rng.random() < 0.1:
                    self.desk.step(SharesAwaited(name), self.now_ms)
            elif message.process is self.process[name] and self.busy[name] == message.asked.number:
                message.box.take(message.asked, message.answer, message.sent_ms, self.now_ms)
                self.busy[name] = None
        self.underway = late


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_lost_late_doubled_or_crashed_no_more_than_the_limit_is_let_in(seed: int) -> None:
    weather = Weather(seed).run()
    assert weather.judge.let_in, "somebody was let in"


def test_lags_are_of_the_whole_burst_where_nothing_is_known() -> None:
    assert full_lags(QUOTA) == Lags(10_000, MINUTE_MS, MINUTE_MS, 86_400_000)
