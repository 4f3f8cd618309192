"""Whose turn it is: shares of time by weight, no credit for idle time, priorities that starve nobody.

Covers: ``packer/turns.py`` in the core, as properties over random costs. Does not cover: rates
(``test_rates``), or whose bytes may be taken (``test_quota``).

Everybody here thrashes: the device has room for one model, every request needs a restore, and every tenant
has requests waiting all the time. Then what each is given is restore time and device time alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scene import Scene, model, of, the

from packer import queueing, residency, turns
from packer.events import Action, Event, Evict, Finished, Grant, PackFound, Refuse, Restore, Restored
from packer.types import MIB, ModelRef, ModelSpec, TenantQuota

MODELS = 3
# A history that breaks a bound is short enough to read; making it shorter still takes minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
DEADLINE_MS = 10_000_000


@dataclass(slots=True)
class Thrasher:
    """A tenant that always has requests waiting; its requests cost these times in turn."""

    name: str
    weight: int
    restores_ms: list[int]
    devices_ms: list[int]
    priority: int = 0
    joins_at: int = 0
    specs: tuple[ModelSpec, ...] = ()
    asked: int = 0
    served: int = 0
    given_ms: int = 0  # restore time and device time so far
    seen: list[tuple[int, int]] = field(default_factory=list)  # (turn, given) after each turn

    expected_ms: int = 0  # of a restore, at the most

    @property
    def most_ms(self) -> int:
        """The longest turn; whose is next is chosen by what the present one is expected to take."""
        return max(*self.restores_ms, self.expected_ms) + max(self.devices_ms)


class QuickScene(Scene):
    """Checked like a node in production; the full check of every step would take most of the time."""

    def feed(self, event: Event) -> list[Action]:
        actions = residency.step(self.node, event, self.now_ms)
        residency.check(self.node)
        return actions


class Thrash:
    """One device with room for one model at a time, and tenants that all want it."""

    def __init__(self, tenants: list[Thrasher]) -> None:
        self.tenants = {each.name: each for each in tenants}
        for each in tenants:
            each.specs = tuple(model(f"{each.name}/m{i}", 60) for i in range(MODELS))
        quotas = {each.name: TenantQuota(weight=each.weight, priority=each.priority) for each in tenants}
        specs = [spec for each in tenants for spec in each.specs]
        self.scene = QuickScene(*specs, devices_mib=(100,), quotas=quotas)
        for spec in specs:
            self.scene.feed(PackFound(spec.ref, 30 * MIB, 30 * MIB))
        self.turn = 0
        self.granted: list[str] = []  # the tenants, in the order in which they were served
        self.waits: dict[str, int] = {}  # by request: since when
        self.longest_ms: dict[str, int] = {}

    def run(self, rounds: int) -> None:
        """Serve this many turns, every restore and request taking its drawn time."""
        todo = self._join()
        while self.turn < rounds:
            assert todo, "somebody always waits, so something is always under way"
            action = todo.pop(0)
            match action:
                case Restore():
                    todo += self._restored(action)
                case Evict():
                    todo += self.scene.evicted(action)
                case Grant():
                    todo += self._serve(action)
                case Refuse():
                    raise AssertionError(f"nobody is refused: {action}")
                case _:
                    pass

    def _join(self) -> list[Action]:
        actions: list[Action] = []
        for each in self.tenants.values():
            if each.joins_at == self.turn:
                for _ in range(MODELS - 1):
                    actions += self._ask(each)
        return actions

    def _ask(self, tenant: Thrasher) -> list[Action]:
        spec = tenant.specs[tenant.asked % MODELS]
        tenant.asked += 1
        actions = self.scene.ask(spec, DEADLINE_MS)
        self.waits[f"r{self.scene.requests}"] = self.scene.now_ms
        return actions

    def _restored(self, order: Restore) -> list[Action]:
        tenant = self.tenants[order.ref.tenant]
        took_ms = tenant.restores_ms[tenant.served % len(tenant.restores_ms)]
        tenant.expected_ms = max(tenant.expected_ms, self.scene.node.models[order.ref].expected_ms)
        tenant.given_ms += took_ms
        self.scene.later(took_ms)
        event = Restored(order.ref, order.device, order.from_tier, took_ms, order.host_bytes > 0, order.order)
        return self.scene.feed(event)

    def _serve(self, grant: Grant) -> list[Action]:
        tenant = self.tenants[grant.ref.tenant]
        waited_ms = self.scene.now_ms - self.waits.pop(grant.request)
        self.longest_ms[tenant.name] = max(self.longest_ms.get(tenant.name, 0), waited_ms)
        took_ms = tenant.devices_ms[tenant.served % len(tenant.devices_ms)]
        tenant.served += 1
        # The next one is asked for while this one runs, so that the tenant is never without a wish.
        actions = self._ask(tenant)
        self.scene.later(took_ms)
        tenant.given_ms += took_ms
        self.turn += 1
        self.granted.append(tenant.name)
        actions += self.scene.feed(Finished(grant.request, took_ms))
        for each in self.tenants.values():
            if each.joins_at < self.turn:
                each.seen.append((self.turn, each.given_ms))
        return actions + self._join()


def spread(one: Thrasher, two: Thrasher) -> float:
    """The most that the two ever got apart between any two moments since both are there, by weight."""
    others = dict(two.seen)
    gaps = [given / one.weight - others[turn] / two.weight for turn, given in one.seen if turn in others]
    return max(gaps) - min(gaps) if gaps else 0.0


def bound(one: Thrasher, two: Thrasher) -> float:
    """Start-time fair queueing lets the one get ahead of the other by one turn of each, by weight; whose
    claim stands is chosen before the last turn's cost is known, which is one turn more. On either side."""
    return 3 * (one.most_ms / one.weight + two.most_ms / two.weight)


COSTS = st.lists(st.integers(1, 3_000), min_size=1, max_size=4)
TENANTS = st.lists(st.tuples(st.integers(1, 5), COSTS, COSTS), min_size=2, max_size=4)


@settings(max_examples=40, deadline=None, phases=PHASES)
@given(TENANTS)
def test_everybody_who_waits_gets_its_share_by_weight(
    drawn: list[tuple[int, list[int], list[int]]],
) -> None:
    tenants = [Thrasher(f"t{i}", weight, a, b) for i, (weight, a, b) in enumerate(drawn)]
    Thrash(tenants).run(60)
    for one in tenants:
        for two in tenants:
            assert spread(one, two) <= bound(one, two)


@settings(max_examples=40, deadline=None, phases=PHASES)
@given(TENANTS, st.lists(st.integers(0, 30), min_size=4, max_size=4))
def test_who_comes_later_gets_its_share_from_then_on_and_nothing_for_the_time_before(
    drawn: list[tuple[int, list[int], list[int]]], joins: list[int]
) -> None:
    tenants = [
        Thrasher(f"t{i}", weight, a, b, joins_at=joins[i] if i else 0)
        for i, (weight, a, b) in enumerate(drawn)
    ]
    Thrash(tenants).run(70)
    for one in tenants:
        for two in tenants:
            assert spread(one, two) <= bound(one, two)


def test_who_comes_while_a_long_turn_was_chosen_too_early_waits_for_no_others_to_catch_up_with_it() -> None:
    """The second long turn in a row stands as a claim before the first one's cost is known."""
    long = Thrasher("long", 1, [2295, 593, 440], [3, 3000])
    late = Thrasher("late", 1, [1], [441], joins_at=20)
    short, other = Thrasher("short", 1, [1], [223]), Thrasher("other", 1, [1385], [3, 1116])
    Thrash([short, long, other, late]).run(70)
    assert spread(short, late) <= bound(short, late)


@pytest.mark.parametrize("weight", [1, 2, 5])
def test_a_weight_is_a_share(weight: int) -> None:
    heavy, light = Thrasher("heavy", weight, [100], [50]), Thrasher("light", 1, [100], [50])
    Thrash([heavy, light]).run(24 * (weight + 1))
    assert heavy.served == pytest.approx(weight * light.served, abs=weight + 1)


def test_a_tenant_whose_restores_are_dear_gets_fewer_of_them() -> None:
    dear, cheap = Thrasher("dear", 1, [900], [0]), Thrasher("cheap", 1, [100], [0])
    Thrash([dear, cheap]).run(100)
    assert dear.served == pytest.approx(10, abs=1)


def test_device_time_counts_like_restore_time() -> None:
    slow, quick = Thrasher("slow", 1, [100], [800]), Thrasher("quick", 1, [100], [0])
    Thrash([slow, quick]).run(100)
    assert slow.served == pytest.approx(10, abs=1)


# --- priorities -----------------------------------------------------------------------------------


def test_the_higher_priority_goes_first_while_the_lower_has_not_waited_long() -> None:
    high = Thrasher("high", 1, [100], [10], priority=1)
    low = Thrasher("low", 1, [100], [10])
    thrash = Thrash([low, high])
    thrash.run(turns.PRIORITY_PATIENCE_MS // 110)
    assert thrash.granted.count("low") <= 2, "one found the device empty, the claim of one stood already"


@settings(max_examples=20, deadline=None, phases=PHASES)
@given(st.integers(1, 100), st.integers(1, 4), COSTS, COSTS)
def test_no_priority_starves_another_tenant(
    priority: int, weight: int, restores_ms: list[int], devices_ms: list[int]
) -> None:
    """Whoever waited ``PRIORITY_PATIENCE_MS`` goes by virtual time, where it is far behind: its turn comes
    after the turns that run and stand, and one per weight of those that wait as long."""
    high = Thrasher("high", weight, restores_ms, devices_ms, priority=priority)
    low = Thrasher("low", 1, [500], [100])
    thrash = Thrash([high, low])
    thrash.run(300)
    longest_ms = turns.PRIORITY_PATIENCE_MS + 3 * (weight + 1) * (high.most_ms + low.most_ms)
    assert thrash.longest_ms.get("low", 0) <= longest_ms
    if thrash.scene.now_ms > 2 * longest_ms:
        assert low.served > 1


# --- arrivals -------------------------------------------------------------------------------------


def virtual(scene: Scene, name: str) -> int:
    return scene.node.tenants[name].virtual_us


def test_who_used_the_node_alone_is_not_behind_who_comes_then() -> None:
    """Warm use of an idle device takes nothing from anybody, so it is not held against its tenant."""
    hot, new = model("hot/a", 10), model("new/b", 10)
    scene = Scene(hot, new)
    scene.warm(hot)
    for _ in range(50):
        scene.ask(hot)
        scene.finish(scene.requests, device_ms=60_000)
    scene.ask(new)
    assert virtual(scene, "new") >= virtual(scene, "hot")


def test_who_used_it_while_others_waited_is_behind_by_a_bounded_time() -> None:
    hot, slow, cold = model("hot/a", 10), model("slow/b", 10), model("hot/c", 10)
    scene = Scene(hot, slow, cold)
    scene.warm(hot)
    scene.ask(slow)  # in flight all the time, and little of it
    for _ in range(50):
        scene.ask(hot)
        scene.finish(scene.requests, device_ms=60_000)
    assert virtual(scene, "hot") > virtual(scene, "slow") + 2 * turns.AHEAD_US_MAX
    scene.ask(cold)
    assert virtual(scene, "hot") <= scene.node.virtual_us + turns.AHEAD_US_MAX


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(("ask", "finish")), st.integers(0, 900_000))))
def test_nobody_starts_below_the_least_served_in_flight(doings: list[tuple[int, str, int]]) -> None:
    specs = [model(f"t{i}/m", 10) for i in range(4)]
    scene = Scene(*specs)
    for spec in specs:
        scene.warm(spec)
    running: dict[int, list[int]] = {i: [] for i in range(4)}
    for number, doing, device_ms in doings:
        tenants = scene.node.tenants
        if doing == "finish" and running[number]:
            scene.finish(running[number].pop(), device_ms)
        elif doing == "ask":
            level = min((tenants[f"t{i}"].virtual_us for i, runs in running.items() if runs), default=0)
            the(scene.ask(specs[number]), Grant)
            running[number].append(scene.requests)
            assert tenants[f"t{number}"].virtual_us >= level
            assert len(scene.node.busy) <= len(tenants), "each tenant is remembered once"


# --- bounds ---------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=60, max_size=120))
def test_every_queue_is_bounded_whatever_comes(which: list[int]) -> None:
    specs = [model(f"t{i}/m", 60) for i in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queueing, "WAITING_PER_TENANT_MAX", 5)
        patch.setattr(queueing, "WAITING_MAX", 17)
        scene = Scene(*specs, devices_mib=(70,))
        for number in which:
            refused = of(scene.ask(specs[number]), Refuse)
            node, tenant = scene.node, scene.node.tenants[f"t{number}"]
            full = tenant.waiting == 5 or node.waiting == 17
            assert bool(refused) <= full, "nobody is refused while there is room"
            assert tenant.waiting <= 5
            assert node.waiting <= 17
            assert len(node.timers) <= 2 * node.waiting + queueing.STALE_TIMERS_MAX + 2 * len(which)


def test_models_of_a_tenant_above_its_restores_hold_up_nobody() -> None:
    """Its models keep their places and its claim is laid down; others are served meanwhile."""
    mine = [model(f"mine/m{i}", 60) for i in range(3)]
    other = [model(f"other/m{i}", 60) for i in range(2)]
    quotas = {"mine": TenantQuota(restores_per_minute=1, priority=5)}
    scene = Scene(*mine, *other, devices_mib=(100,), quotas=quotas)
    for spec in (*mine, *other):
        scene.feed(PackFound(spec.ref, 30 * MIB, 30 * MIB))
    served: list[ModelRef] = []
    todo = [action for spec in (*mine[:2], *other) for action in scene.ask(spec, 100_000)]
    while todo:
        action = todo.pop(0)
        match action:
            case Restore():
                served.append(action.ref)
                todo += scene.later(500).restored(action)
            case Evict():
                todo += scene.evicted(action)
            case Grant():
                todo += scene.feed(Finished(action.request, 10))
    assert served == [mine[0].ref, other[0].ref, other[1].ref]
    assert scene.node.devices["cpu:0"].claim is None
    assert scene.node.tenants["mine"].waiting == 1
