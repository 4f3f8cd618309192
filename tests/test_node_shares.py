"""A node's own part of its tenants' limits: ``agent.shares`` and control's desk on a clock that jumps.

Covers: waiting a moment instead of a refusal, asking for more and giving back, control away, restarts and
full disks, a control of an earlier release. Does not cover: the book by itself (``test_shares``), faults of
the network (``test_cluster_simulation``), processes (``test_shares_running``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from virtual_clock import VirtualLoop, run_virtual

from agent.shares import BARREN_MS, LOOK_MS, PATIENCE_MS, RENEW_MS, Shares
from control.catalog import NodeRow
from control.routes.shares import answer_shares
from control.share_desk import ShareDesk
from control.shares import KEPT_MS, KEPT_PART, STEADY_MS, HolderJoined, HolderRemoved, free_part
from packer import residency
from packer.events import Event, Planned
from packer.rates import TenantRates
from packer.shares import TERM_MS, WHOLE, Share
from packer.types import TenantQuota, TenantSpec
from packer.wire import SharesAsk, encode

QUOTA = TenantQuota(requests_per_minute=600)
# A message and its answer.
WAY_S = 0.005


@dataclass(frozen=True, slots=True)
class Said:
    status: int
    body: bytes


class Box:
    """A node: its core, its shares, and a line to control that can be cut."""

    def __init__(self, fleet: Fleet, name: str, stored: str | None = None) -> None:
        self.fleet, self.name = fleet, name
        self.core = residency.Node()
        self.disk, self.disk_full = stored, False
        self.status = 200
        self.online = asyncio.Event()
        self.online.set()
        self.asked: list[SharesAsk] = []
        self.shares = Shares(lambda: self.core, self.post, fleet.now_ms, self.save, stored)
        self.shares.take_up()
        self.plan(fleet.quota)
        self.task = asyncio.create_task(self.shares.run(self.send, self.online))

    def plan(self, quota: TenantQuota) -> None:
        self.post(Planned((TenantSpec("t", quota),), ()))

    def post(self, event: Event) -> None:
        residency.step(self.core, event, self.fleet.now_ms())
        residency.check(self.core)

    async def save(self, text: str) -> bool:
        if not self.disk_full:
            self.disk = text
        return not self.disk_full

    async def send(self, path: str, message: object, timeout_s: float, connect_s: float) -> Said:
        assert isinstance(message, SharesAsk)
        self.asked.append(message)
        await asyncio.sleep(WAY_S)
        if not self.online.is_set():
            raise aiohttp.ClientConnectionError("cut")
        if self.status != 200:
            return Said(self.status, b"")
        row = cast(NodeRow, self.fleet.nodes[self.name])
        return Said(200, encode(await answer_shares(cast(Any, self.fleet), row, message)))

    @property
    def rates(self) -> TenantRates:
        return self.core.tenants["t"].rates

    @property
    def part(self) -> float:
        return float(self.rates.share.value)

    async def let_in(self) -> bool:
        """One request, as ``agent.node`` takes it."""
        await asyncio.sleep(0)
        await self.shares.until_let_in("t", 60_000)
        now_ms = self.fleet.now_ms()
        if self.rates.requests.wait_ms(now_ms):
            return False
        self.rates.requests.take(now_ms)
        return True

    async def let_in_all(self, count: int) -> int:
        return sum([await self.let_in() for _ in range(count)])

    def kill(self) -> None:
        self.task.cancel()


class Fleet:
    """Control, as far as its desk for shares needs it, and its nodes."""

    def __init__(self, *names: str, quota: TenantQuota = QUOTA) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.now_ms = loop.now_ms
        self.quota = quota
        self.nodes = {name: SimpleNamespace(node=name, incarnation=name) for name in names}
        self.catalog = SimpleNamespace(quotas={"t": quota}, nodes=self.nodes)
        self.shares = ShareDesk(self.now_ms, self.wake)
        self.shares.open("c1", ())
        for name in names:
            self.shares.step(HolderJoined(name, fresh=True))
        self.boxes: dict[str, Box] = {}
        for name in names:
            self.start(name)

    def start(self, name: str, stored: str | None = None) -> Box:
        self.boxes[name] = box = Box(self, name, stored)
        return box

    def wake(self, node: str) -> None:
        self.boxes[node].shares.nudge()

    def free(self) -> float:
        return float(free_part(self.shares.book, "t", self.now_ms()))


@pytest.fixture
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes hold nothing of the tenant, and there are too many tenants to ask for some of each."""
    monkeypatch.setattr("agent.shares.AHEAD_ALL_MAX", 0)


@pytest.mark.parametrize("turns", range(5))
def test_exchanges_end_when_they_are_told_to_also_in_the_moment_of_a_reason_to_go_on(turns: int) -> None:
    """The uplink waits for that end before it joins anew; at a node that goes on it never would."""

    async def work() -> None:
        box = Fleet("a", "b").boxes["a"]
        await asyncio.sleep(10)
        box.shares.nudge()
        for _ in range(turns):
            await asyncio.sleep(0)
        box.kill()
        await asyncio.wait([box.task], timeout=1)
        assert box.task.cancelled()

    fleet_test(work())


def fleet_test(work: Coroutine[Any, Any, None]) -> None:
    run_virtual(work)


def test_a_node_that_is_alone_has_the_whole_at_once_and_nobody_waits() -> None:
    async def work() -> None:
        fleet = Fleet("a")
        (box,) = fleet.boxes.values()
        await asyncio.sleep(1)
        began_ms = fleet.now_ms()
        assert await box.let_in_all(200) == 100
        assert fleet.now_ms() == began_ms
        assert len(box.asked) <= 3, "there is nothing to talk about"

    fleet_test(work())


def test_the_first_requests_on_a_node_wait_a_moment_and_are_not_refused() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        assert await a.let_in_all(60) == 60
        began_ms = fleet.now_ms()
        assert await b.let_in()
        assert fleet.now_ms() - began_ms < PATIENCE_MS
        assert a.part + b.part <= 1

    fleet_test(work())


def test_an_exchange_waits_for_what_others_give_up() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        await a.let_in_all(80)
        assert a.part == 1
        before, began_ms = len(b.asked), fleet.now_ms()
        assert await b.let_in()
        assert len(b.asked) - before == 1, "one question, answered when there was something"
        assert fleet.now_ms() - began_ms < 200

    fleet_test(work())


def test_both_together_let_in_the_burst_and_no_more_and_soon_nobody_waits_to_hear_it() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        let_in = 0
        for _ in range(150):
            let_in += await a.let_in()
            let_in += await b.let_in()
        passed_ms = fleet.now_ms()
        assert 100 <= let_in <= 100 + passed_ms / 100
        began_ms = fleet.now_ms()
        await a.let_in()
        await a.let_in()
        assert fleet.now_ms() - began_ms <= BARREN_MS

    fleet_test(work())


@pytest.mark.usefixtures("nothing_ahead")
def test_what_is_not_used_goes_back_and_who_needs_it_gets_all() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        await a.let_in_all(70)
        assert a.part > 0.5
        await asyncio.sleep(4 * LOOK_MS / 1000)
        assert (a.part, fleet.free()) == (1 / KEPT_PART, 1 - 1 / KEPT_PART), "should control go away"
        assert await b.let_in_all(100) == 100
        assert (a.part, b.part) == (0, 1)
        await asyncio.sleep((KEPT_MS + 2 * RENEW_MS) / 1000)
        assert (b.part, fleet.free()) == (0, 1), "not for ever"

    fleet_test(work())


def test_a_tenant_that_asks_everywhere_gets_its_limit_and_no_more() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b", "c", "d")

        async def rush(box: Box) -> int:
            let_in = 0
            while fleet.now_ms() < 30_000:
                let_in += await box.let_in()
                await asyncio.sleep(0.03)
            return let_in

        let_in = await asyncio.gather(*(rush(box) for box in fleet.boxes.values()))
        passed_ms = fleet.now_ms()
        # What is late by a step of 30 ms on each of four nodes is not let in.
        assert 0.8 * (100 + passed_ms / 100) <= sum(let_in) <= 100 + passed_ms / 100, let_in
        assert min(let_in) >= sum(let_in) / 8, "and every node its part"

    fleet_test(work())


def test_a_concurrency_of_one_serves_both_nodes_in_turn() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b", quota=TenantQuota(concurrency=1))
        a, b = fleet.boxes.values()
        await asyncio.sleep(0)
        await a.shares.until_let_in("t", 60_000)
        assert (a.rates.slots, b.rates.slots) == (1, 0)
        tries = 0
        while not b.rates.slots:
            await b.shares.until_let_in("t", 60_000)
            tries += 1
            assert a.rates.slots == 0 or b.rates.slots == 0
        assert tries <= 2, "within a second or two"

    fleet_test(work())


def test_a_node_keeps_serving_while_control_is_away_with_half_after_the_term() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, _ = fleet.boxes.values()
        await a.let_in_all(70)
        part = a.rates.share
        a.online.clear()
        began_ms = fleet.now_ms()
        await asyncio.sleep((TERM_MS - 20_000) / 1000)
        assert await a.let_in()
        assert a.rates.share == part
        await asyncio.sleep(21)
        a.plan(QUOTA)  # any step
        assert a.rates.share == part.halved()
        await asyncio.sleep(24 * 3_600)
        a.plan(QUOTA)
        assert a.rates.share == part.halved()
        assert await a.let_in_all(1_000) >= part.halved().of_count(100)
        assert fleet.now_ms() - began_ms > TERM_MS
        a.online.set()
        await asyncio.sleep(1)
        assert a.core.shares.halve_at_ms is not None, "heard again"

    fleet_test(work())


@pytest.mark.usefixtures("nothing_ahead")
def test_who_is_served_for_a_while_has_more_than_it_wants_should_control_go_away() -> None:
    """A tenant that comes now and then would have a few grains, and be refused at the first rush that nobody
    can give it more for. What is left for others is enough for them to come at once."""

    async def work() -> None:
        fleet = Fleet("a", "b", "c")
        a, b, c = fleet.boxes.values()
        while fleet.now_ms() < STEADY_MS + 2 * LOOK_MS:
            assert await a.let_in()
            assert await b.let_in()
            await asyncio.sleep(4)
        assert min(a.part, b.part) >= 0.2
        assert fleet.free() >= 0.4
        began_ms = fleet.now_ms()
        assert await c.let_in_all(20) == 20
        assert fleet.now_ms() - began_ms < 200, "nobody had to give up anything"
        a.online.clear()
        assert await a.let_in_all(20) == 20
        assert await b.let_in_all(60) >= 40, "who can be asked gets what others do not need"

    fleet_test(work())


def test_a_node_that_begins_anew_goes_on_with_half_used_up() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, _ = fleet.boxes.values()
        await a.let_in_all(70)
        part = a.rates.share
        a.kill()
        again = Box(fleet, "a", a.disk)
        again.kill()
        assert again.rates.share == part.halved()
        assert again.rates.requests.remaining(fleet.now_ms()) == 0

    fleet_test(work())


def test_a_node_that_was_alone_begins_anew_with_the_whole() -> None:
    async def work() -> None:
        fleet = Fleet("a")
        (a,) = fleet.boxes.values()
        await a.let_in_all(50)
        a.kill()
        again = Box(fleet, "a", a.disk)
        again.kill()
        assert again.rates.share == WHOLE
        assert again.rates.requests.remaining(fleet.now_ms()) == 100

    fleet_test(work())


@pytest.mark.usefixtures("nothing_ahead")
def test_what_can_not_be_kept_on_disk_is_not_given_back() -> None:
    """Else it would be there again after a restart, while another node has it."""

    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        await a.let_in_all(20)
        a.disk_full = True
        before = a.part
        assert 0 < before < 1
        await asyncio.sleep(4 * LOOK_MS / 1000)
        assert a.part >= before
        b.disk_full = True
        await b.let_in()
        assert b.part > 0, "more needs no disk"
        a.disk_full = False
        await asyncio.sleep(4 * LOOK_MS / 1000)
        assert a.part == 1 / KEPT_PART

    fleet_test(work())


def test_a_node_that_joins_again_has_nothing() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        await a.let_in_all(70)
        a.kill()
        fleet.shares.step(HolderRemoved("a"))
        fleet.shares.step(HolderJoined("a", fresh=True))
        again = fleet.start("a", a.disk)
        await again.shares.forget()
        assert again.part == 0
        await b.let_in_all(200)
        assert b.part == 1

    fleet_test(work())


def test_a_node_whose_disk_failed_when_it_joined_begins_anew_with_nothing() -> None:
    """It had the whole of everything until control answered it, while another node had some."""

    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        b.disk_full = True
        await b.shares.forget()
        assert await a.let_in()
        b.kill()
        again = Box(fleet, "b", b.disk)
        assert again.part == 0

    fleet_test(work())


def test_a_node_that_joins_again_and_is_alone_keeps_the_whole_on_disk() -> None:
    """What is answered after it is what it had before: it is on disk again all the same."""

    async def work() -> None:
        fleet = Fleet("a")
        a = fleet.boxes["a"]
        await a.let_in_all(1)
        had = a.disk
        assert had is not None
        fleet.shares.step(HolderRemoved("a"))
        fleet.shares.step(HolderJoined("a", fresh=True))
        await a.shares.forget()
        assert a.part == 0
        assert a.disk != had
        await a.let_in_all(1)
        assert a.part == 1
        assert a.disk == had

    fleet_test(work())


def test_a_control_of_an_earlier_release_leaves_the_limits_to_the_node() -> None:
    async def work() -> None:
        fleet = Fleet("a")
        (a,) = fleet.boxes.values()
        a.status = 404
        await asyncio.sleep(0.1)
        assert a.part == 1
        assert len(a.asked) == 1, "and is not asked again"

    fleet_test(work())


@pytest.mark.usefixtures("nothing_ahead")
def test_a_node_without_use_tells_a_new_control_at_once_that_it_has_nothing() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        await asyncio.sleep(60)
        fleet.shares = ShareDesk(fleet.now_ms, fleet.wake)
        fleet.shares.open("c2", fleet.nodes)
        for box in (a, b):
            assert fleet.shares.take_nudge(box.name), "a beat brings it, should it miss the plan"
            box.shares.planned("2 c2")
        await asyncio.sleep(1)
        assert (fleet.free(), fleet.shares.take_nudge("a")) == (1, False)
        assert await a.let_in()

    fleet_test(work())


def test_an_unreadable_journal_means_nothing_until_control_answers() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        fleet.boxes["a"].kill()
        again = Box(fleet, "a", '{"rest": 7}')
        assert again.part == 0
        assert await again.let_in()

    fleet_test(work())


@pytest.mark.usefixtures("nothing_ahead")
def test_only_what_is_held_or_wanted_is_talked_about() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        await asyncio.sleep(3_600)
        assert len(b.asked) <= 3, "a node without use says nothing for an hour"
        await a.let_in()
        assert a.asked[-1].shares[0].tenant == "t"
        assert a.asked[-1].rest == Share(0)

    fleet_test(work())


# --- ahead ----------------------------------------------------------------------------------------


def test_a_node_that_never_served_a_tenant_lets_it_in_while_control_is_away() -> None:
    """It was refused there, far below its limit: all nodes that could serve it have some ahead, the same."""

    async def work() -> None:
        fleet = Fleet("a", "b", "c")
        await asyncio.sleep(4 * RENEW_MS / 1000)
        parts = [box.part for box in fleet.boxes.values()]
        assert parts == [parts[0]] * 3
        assert parts[0] >= 1 / 8
        assert fleet.free() >= 0.5, "whoever needs more has it at once"
        a, b, c = fleet.boxes.values()
        a.online.clear()
        assert await a.let_in_all(12) == 12
        began_ms = fleet.now_ms()
        assert await b.let_in_all(40) == 40
        assert fleet.now_ms() - began_ms < 200, "nobody had to give up anything"
        # What is ahead is nobody's own: who can be asked gives it to whoever needs it.
        assert await b.let_in_all(45) >= 40
        assert c.part == 0

    fleet_test(work())


def test_what_is_held_ahead_is_not_less_once_the_tenant_comes() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, _ = fleet.boxes.values()
        await asyncio.sleep(2 * RENEW_MS / 1000)
        before = a.part
        for _ in range(30):
            assert await a.let_in()
            assert a.part >= before
            await asyncio.sleep(1)

    fleet_test(work())


def test_a_limit_too_small_for_two_is_not_given_out_ahead() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b", quota=TenantQuota(concurrency=1))
        await asyncio.sleep(4 * RENEW_MS / 1000)
        assert fleet.free() == 1

    fleet_test(work())


@pytest.mark.usefixtures("nothing_ahead")
def test_of_many_tenants_a_node_asks_for_those_whose_models_it_has() -> None:
    async def work() -> None:
        fleet = Fleet("a", "b")
        a, b = fleet.boxes.values()
        a.core.tenants["t"].disk.used_bytes += 1
        await asyncio.sleep(2 * RENEW_MS / 1000)
        assert (a.part > 0, b.part) == (True, 0)
        assert len(b.asked) <= 3, "who has nothing to say says nothing"
        a.core.tenants["t"].disk.used_bytes -= 1
        await asyncio.sleep(3 * RENEW_MS / 1000)
        assert fleet.free() == 1, "it goes back when they are gone"

    fleet_test(work())
