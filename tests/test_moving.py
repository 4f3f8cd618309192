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
from packer.types import MIB, ModelSpec, TenantQuota, TenantSpec, Tier

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


SEEDS = range(24)


def test_histories_with_moves_are_safe_and_end_well() -> None:
    reached: Counter[str] = Counter()
    for seed in SEEDS:
        reached += Roomy(seed).run().reached
    assert reached["moved to another device"] >= 3, reached
    assert reached["came where it was moved to"] >= 3, reached


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
        "nothing is promised to what moves",
        "choice",
        "        self.earlier.add(target, model.tenant.spec.tenant, model.need_bytes)\n",
        "        pass\n",
    ),
    Mutant(
        "a move is never finished",
        "queueing",
        "        if model.state is State.EVICTING:\n            continue\n        del node.moves[ref]",
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
