"""Idle models move to another device of the node when that costs less than evicting, and only then.

Covers: packer/moving.py and what queueing makes of it, in scenes and in random histories of nodes with
several devices and much host memory; bugs planted there. Does not cover: the search (``test_placement``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
from catching_seeds import is_caught
from mutants import Mutant, load
from scene import Scene, device_quota, model, of, the
from simulated_hands import Violated
from simulation import World

from packer import moving
from packer.decisions import Kind, Outcome
from packer.events import (
    Answer,
    Asked,
    DeviceSeen,
    DrainAsked,
    Evict,
    PolicyChosen,
    Restore,
)
from packer.room import Earlier
from packer.types import MIB, ModelSpec, TenantQuota, TenantSpec, Tier
from packer.victims import Taking

# X and Y lie on the first device, Z on the second; 20 and 40 MiB are free, and W needs 50.
X, Y, Z, W = model("acme/x", 30), model("bolt/y", 50), model("core/z", 60), model("deli/w", 50)


def laid_out(host_mib: int = 500, **quotas: TenantQuota) -> Scene:
    scene = Scene(X, Y, Z, W, devices_mib=(100, 100), host_mib=host_mib, quotas=quotas)
    # The second time they come from disk, which leaves a copy in host memory.
    for _ in range(2):
        for spec in (X, Y, Z):
            scene.later(1000).warm(spec)
        assert [scene.device(spec) for spec in (X, Y, Z)] == ["cpu:0", "cpu:0", "cpu:1"]
        last = scene.requests == 6
        for name in ("cpu:0", "cpu:1") if not last else ():
            scene.settle(scene.feed(DeviceSeen(name, 0)))
            scene.feed(DeviceSeen(name, 100 * MIB))
    return scene


def test_an_idle_model_moves_into_a_hole_and_nothing_is_lost() -> None:
    scene = laid_out()
    found = the(scene.feed(Asked("q", W.ref)), Answer).forecast
    assert (found.outcome, found.device) == (Outcome.EVICTS, "cpu:0")
    assert [(victim.ref, victim.moves_to) for victim in found.victims] == [(str(X.ref), "cpu:1")]
    evict = the(scene.ask(W), Evict)
    assert (evict.ref, evict.keep_chunks) == (X.ref, 0)
    (claimed,) = [each for each in scene.node.why if each.kind is Kind.CLAIMED]
    assert claimed.reason == "moving costs less than evicting"
    actions = scene.evicted(evict)
    orders = {(order.ref, order.device, order.from_tier) for order in of(actions, Restore)}
    assert orders == {(W.ref, "cpu:0", Tier.ORIGIN), (X.ref, "cpu:1", Tier.HOST)}
    scene.settle(actions)
    assert [scene.state(spec) for spec in (X, Y, Z, W)] == ["resident"] * 4
    assert not scene.node.moves


def test_whoever_needs_the_room_pays_for_the_move() -> None:
    scene = laid_out()
    before = {name: tenant.virtual_us for name, tenant in scene.node.tenants.items()}
    actions = scene.evicted(the(scene.ask(W), Evict))
    assert scene.node.tenants["deli"].pending_us > 0
    assert scene.node.tenants["acme"].pending_us == 0
    scene.settle(actions)
    assert scene.node.tenants["acme"].virtual_us == before["acme"]
    assert scene.node.tenants["deli"].virtual_us > before["deli"]


@pytest.mark.parametrize("why", ["no host copy", "reserved", "in use", "another policy", "max"])
def test_what_may_not_move_is_not_moved(why: str) -> None:
    quotas = {"acme": device_quota(reserved_mib=30)} if why == "reserved" else {}
    quotas |= {"deli": device_quota(max_mib=40)} if why == "max" else {}
    scene = laid_out(host_mib=0 if why == "no host copy" else 500, **quotas)
    if why == "in use":
        scene.ask(X)
    if why == "another policy":
        scene.feed(PolicyChosen("lru"))
    actions = scene.ask(W)
    assert not scene.node.moves
    assert X.ref not in {evict.ref for evict in of(actions, Evict)} or why in (
        "no host copy",
        "another policy",
    )


def test_a_model_that_nobody_will_miss_is_evicted_instead() -> None:
    scene = laid_out().later(365 * 86_400_000)
    assert the(scene.ask(W), Evict)
    assert not scene.node.moves


def test_a_caller_meanwhile_gets_the_model_wherever_there_is_room() -> None:
    scene = laid_out()
    evict = the(scene.ask(W), Evict)
    scene.ask(X)
    actions = scene.evicted(evict)
    assert {(order.ref, order.device) for order in of(actions, Restore)} == {
        (W.ref, "cpu:0"),
        (X.ref, "cpu:1"),
    }
    scene.settle(actions)
    assert not scene.node.moves


@pytest.mark.parametrize("what", ["budget", "health", "drain", "plan"])
def test_a_move_that_has_become_impossible_is_forgotten(what: str) -> None:
    scene = laid_out()
    evict = the(scene.ask(W), Evict)
    match what:
        case "budget":
            scene.settle(scene.feed(DeviceSeen("cpu:1", 70 * MIB)))
        case "health":
            scene.settle(scene.feed(DeviceSeen("cpu:1", 100 * MIB, healthy=False)))
        case "drain":
            scene.feed(DrainAsked())
        case _:
            scene.plan(Y, Z, W)
    restores = of(scene.evicted(evict), Restore)
    assert X.ref not in {order.ref for order in restores}
    assert not scene.node.moves


# --- in a full node ---------------------------------------------------------------------------------

# P and Q are hardly used, V and U all the time. V and P fill the first device, U and Q the second, and BIG
# needs a whole one.
V, P, U, Q = model("acme/v", 30), model("bolt/p", 70), model("core/u", 40), model("deli/q", 60)
BIG = model("eden/big", 100)
FULL = {V: "cpu:0", P: "cpu:0", U: "cpu:1", Q: "cpu:1"}


def full(host_mib: int = 600, used: int = 20, **quotas: TenantQuota) -> Scene:
    scene = Scene(*FULL, BIG, devices_mib=(100, 100), host_mib=host_mib, quotas=quotas)
    for again in (False, True):
        for name in ("cpu:0", "cpu:1") if again else ():
            scene.settle(scene.feed(DeviceSeen(name, 0)))
            scene.feed(DeviceSeen(name, 100 * MIB))
        for spec in FULL:
            scene.later(1000).warm(spec)
    scene.later(3_600_000)
    for _ in range(used):
        for spec in (V, U):
            scene.later(1000).warm(spec)
    assert {spec: scene.device(spec) for spec in FULL} == FULL
    return scene


def evictions_for_big(scene: Scene) -> dict[ModelSpec, Evict]:
    orders = {evict.ref: evict for evict in of(scene.ask(BIG), Evict)}
    return {spec: orders[spec.ref] for spec in FULL if spec.ref in orders}


def test_in_a_full_node_who_would_be_missed_moves_where_others_are_missed_less() -> None:
    scene = full()
    found = the(scene.feed(Asked("q", BIG.ref)), Answer).forecast
    assert found.reason == "2 models must give bytes and 1 model must move, which costs less than evicting"
    gives = {victim.ref: (victim.device, victim.moves_to) for victim in found.victims}
    assert gives == {str(P.ref): ("cpu:0", ""), str(V.ref): ("cpu:0", "cpu:1"), str(Q.ref): ("cpu:1", "")}
    evictions = evictions_for_big(scene)
    assert list(evictions) == [V, P, Q]
    scene.evicted(evictions[P])
    orders = the(scene.evicted(evictions[V]), Restore)
    assert (orders.ref, orders.device) == (BIG.ref, "cpu:0")
    assert list(scene.node.moves) == [V.ref], "it waits for Q's bytes"
    there = the(scene.evicted(evictions[Q]), Restore)
    assert (there.ref, there.device, there.from_tier) == (V.ref, "cpu:1", Tier.HOST)
    scene.settle([orders, there])
    assert [scene.state(spec) for spec in (BIG, V, U, P, Q)] == ["resident"] * 3 + ["absent"] * 2
    assert not scene.node.moves


@pytest.mark.parametrize("why", ["missed as little", "no host copy", "its reserve", "others' reserve", "max"])
def test_what_may_not_be_traded_is_evicted(why: str) -> None:
    quotas = {"acme": device_quota(reserved_mib=1)} if why == "its reserve" else {}
    quotas |= {"deli": device_quota(reserved_mib=1)} if why == "others' reserve" else {}
    quotas |= {"eden": device_quota(max_mib=99)} if why == "max" else {}
    used = 0 if why == "missed as little" else 20
    scene = full(host_mib=0 if why == "no host copy" else 600, used=used, **quotas)
    evictions = evictions_for_big(scene)
    assert not scene.node.moves
    assert bool(evictions) != (why == "max")
    assert len({scene.device(spec) for spec in evictions}) <= 1


@pytest.mark.parametrize("capped", [False, True])
def test_who_moves_as_a_whole_spares_others_unless_the_tenant_itself_must_give(capped: bool) -> None:
    scene = full(**({"eden": device_quota(max_mib=100)} if capped else {}))
    here = {spec: scene.node.models[spec.ref] for spec in (*FULL, BIG)}
    takings = [Taking(here[P], 10 * MIB), Taking(here[V], 15 * MIB)]
    earlier = Earlier({}, {"eden": MIB})
    others = [scene.node.devices["cpu:1"]]
    going = moving.trade(scene.node, here[BIG], takings, others, earlier, scene.now_ms)
    if capped:
        assert going == takings
    else:
        assert [(each.model, each.moves_to) for each in going] == [(here[V], "cpu:1"), (here[Q], "")]


def test_what_waits_for_its_new_room_is_there_for_whoever_asks() -> None:
    scene = full()
    evictions = evictions_for_big(scene)
    scene.evicted(evictions[V])
    assert not of(scene.ask(V), Restore)
    assert not scene.node.moves, "it waits as everybody does"
    there = the(scene.evicted(evictions[Q]), Restore)
    assert (there.ref, there.device) == (V.ref, "cpu:1")


@pytest.mark.parametrize("what", ["budget", "health", "drain", "plan"])
def test_a_trade_that_has_become_impossible_is_forgotten(what: str) -> None:
    scene = full()
    evictions = evictions_for_big(scene)
    scene.evicted(evictions[V])
    assert list(scene.node.moves) == [V.ref]
    match what:
        case "budget":
            scene.settle(scene.feed(DeviceSeen("cpu:1", 60 * MIB)))
        case "health":
            scene.feed(DeviceSeen("cpu:1", 100 * MIB, healthy=False))
        case "drain":
            scene.feed(DrainAsked())
        case _:
            scene.plan(P, U, Q, BIG)
    restores = of(scene.evicted(evictions[Q]), Restore)
    assert V.ref not in {order.ref for order in restores}
    assert not scene.node.moves


# --- histories ------------------------------------------------------------------------------------


class Roomy(World):
    """Several devices of the same size, many models of which most fit together, and host memory for all."""

    def _draw(self) -> None:
        super()._draw()
        rng = self.rng
        self.budgets = {f"cpu:{i}": rng.randrange(90, 110) * MIB for i in range(rng.choice((2, 3)))}
        self.limits = {Tier.HOST: 600 * MIB, Tier.DISK: 900 * MIB}
        self.seen_budgets, self.seen_limits = dict(self.budgets), dict(self.limits)
        self.healthy = dict.fromkeys(self.budgets, True)
        for name in self.tenants:
            if rng.random() < 0.8:
                self.tenants[name] = TenantSpec(name)
        self.models.clear()
        for i in range(rng.choice((8, 10, 12, 14))):
            self._add_spec(rng.choice(list(self.tenants)), i)
        self.models = {ref: self._sized(spec) for ref, spec in self.models.items()}
        self.planned = dict(self.models)

    def _sized(self, spec: ModelSpec) -> ModelSpec:
        nbytes = self.rng.choice((10, 16, 24, 30, 24, 30, 60, 70)) * MIB
        return replace(spec, image_bytes=nbytes, chunk_bytes=(nbytes // 2, nbytes - nbytes // 2))


# In the last two models make way for others that move.
SEEDS = (*range(24), 44, 46)


def test_histories_with_moves_are_safe_and_end_well() -> None:
    reached: Counter[str] = Counter()
    for seed in SEEDS:
        reached += Roomy(seed).run().reached
    assert reached["moved to another device"] >= 3, reached
    assert reached["came where it was moved to"] >= 3, reached
    assert reached["made way for what moves"] >= 3, reached


MUTANTS = (
    Mutant(
        "what the host tier does not hold is moved",
        "moving",
        "        and model.host.state is CopyState.HELD\n",
        "",
    ),
    Mutant(
        "a reserve does not keep others from moving a model",
        "moving",
        "        and not model.tenant.device.reserved_bytes\n",
        "",
    ),
    Mutant(
        "as much makes way as if nothing else lay there",
        "moving",
        "node, model, device, earlier, False, False, now_ms)\n        if there",
        "node, model, device, Earlier({device.name: 10 << 20}, {}), False, False, now_ms)\n        if there",
    ),
    Mutant(
        "nothing is promised to what moves",
        "choice",
        "        self.earlier.add(target, model.tenant.spec.tenant, model.need_bytes)\n",
        "        pass\n",
    ),
    Mutant(
        "a move is never finished",
        "queueing",
        "        if model.state is State.EVICTING or moving.waits(model, device, promises.earlier):\n"
        "            continue\n        del node.moves[ref]",
        "        if model.state is not State.RESIDENT:\n            continue\n        del node.moves[ref]",
    ),
    Mutant(
        "whoever is moved pays",
        "turns",
        "    payer = model.payer or model.tenant\n    payer.pending_us -= model.pending_us",
        "    payer = model.tenant\n    payer.pending_us -= model.pending_us",
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    core: ModuleType = load(mutant)

    def catches(seed: int) -> bool:
        try:
            Roomy(seed, core).run()
        except (vars(core)["InvariantBroken"], Violated):
            return True
        return False

    assert is_caught(mutant, range(150), catches), "no history told it from the real core"
