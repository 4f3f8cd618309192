"""What ``bunk plan`` foretells is what then happens, and asking changes nothing; decisions say why.

Covers: packer/forecast.py in random histories, where the request that follows must meet what was foretold,
and packer/explain.py. Does not cover: how questions travel (``test_questions``).
"""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from scene import Scene, device_quota, model, the
from simulation import World

from packer import residency, room
from packer.decisions import Decision, Forecast, Kind, Outcome
from packer.events import (
    Action,
    Answer,
    Asked,
    DeviceSeen,
    DrainAsked,
    Event,
    Evict,
    Grant,
    RefusalReason,
    Refuse,
    Requested,
    Restore,
    RestoreFailed,
    Ticked,
)
from packer.types import MIB, ModelSpec, TenantQuota, Tier

# The whole state is looked at for every so many questions: it costs ten times what the question does.
LOOK_EVERY = 4


class Asking(World):
    """Asks before every request, and compares."""

    def __init__(self, seed: int) -> None:
        self.last: list[Action] = []
        self.asked = 0
        names = {name: getattr(residency, name) for name in dir(residency) if not name.startswith("_")}
        super().__init__(seed, core=cast(Any, SimpleNamespace(**{**names, "step": self._step})))

    def _step(self, node: residency.Node, event: Event, now_ms: int) -> list[Action]:
        self.last = residency.step(node, event, now_ms)
        return self.last

    def feed(self, event: Event) -> None:
        if not isinstance(event, Requested):
            return super().feed(event)
        for each in self.node.models.values():
            for tier in Tier:  # estimates are worked out once and remembered
                room.restore_ms_from(self.node, each, tier)
        self.asked += 1
        look = self.asked % LOOK_EVERY == 0
        before = pickle.dumps(self.node) if look else b""
        (answer,) = residency.step(self.node, Asked("q", event.ref), self.now_ms)
        assert isinstance(answer, Answer)
        assert not look or pickle.dumps(self.node) == before, "a question changed the state"
        # What is due happens first and may change everything.
        due = bool(self.node.timers) and self.node.timers[0][0] <= self.now_ms
        others = any(ref != event.ref for ref in self.node.queue)
        super().feed(event)
        if not due:
            self._compare(event, answer.forecast, others)
        return None

    def _compare(self, event: Requested, told: Forecast, others: bool) -> None:
        refusal = next((a for a in self.last if isinstance(a, Refuse) and a.request == event.request), None)
        if refusal is not None and refusal.reason in (RefusalReason.RESTORE_RATE, RefusalReason.TOKENS):
            return  # these look at the request's own deadline and tokens
        self.reached[f"foretold: {told.outcome}"] += 1
        restores = [(a.ref, a.device, a.from_tier.value) for a in self.last if isinstance(a, Restore)]
        evicts = {(str(a.ref), a.device, a.keep_chunks) for a in self.last if isinstance(a, Evict)}
        grants = [a for a in self.last if isinstance(a, Grant) and a.request == event.request]
        ended = f"{told} and then {self.last}"
        assert (told.outcome is Outcome.RESIDENT) == bool(grants), ended
        assert (told.outcome is Outcome.REFUSED) == (refusal is not None), ended
        assert told.outcome is not Outcome.REFUSED or told.refusal == cast(Refuse, refusal).reason, ended
        mine = [(device, tier) for ref, device, tier in restores if ref == event.ref]
        assert mine == ([(told.device, told.from_tier)] if told.outcome is Outcome.FITS else []), ended
        expected = [victim for victim in told.victims if told.outcome is Outcome.EVICTS]
        victims = {(victim.ref, victim.device, victim.kept_chunks) for victim in expected}
        # Others that wait may move in the same step.
        assert victims <= evicts if others else victims == evicts, ended


def test_the_next_request_meets_what_was_foretold() -> None:
    reached: Counter[str] = Counter()
    for seed in range(10):
        reached += Asking(seed).run().reached
    assert all(reached[f"foretold: {outcome}"] for outcome in Outcome), reached


A, B, C = model("acme/a", 40), model("bolt/b", 40), model("core/c", 40)


def told(scene: Scene, spec: ModelSpec) -> Forecast:
    return the(scene.feed(Asked("q", spec.ref)), Answer).forecast


def test_a_forecast_names_victims_their_scores_and_the_time_of_the_restore() -> None:
    scene = Scene(A, B, C)
    scene.warm(A)
    scene.later(1000).warm(B)
    found = told(scene.later(1000), C)
    assert (found.outcome, found.device, found.from_tier) == (Outcome.EVICTS, "cpu:0", "origin")
    assert [victim.ref for victim in found.victims] == [str(A.ref)]
    assert found.victims[0].keep_index is not None
    assert found.victims[0].keep_index > 0
    assert found.restore_bytes == 40 * MIB
    assert found.restore_ms == residency.restore_ms_estimate(scene.node, C.ref) > 0
    (room,) = found.devices
    assert (room.verdict, room.needed_bytes, room.used_bytes) == ("chosen", 40 * MIB, 80 * MIB)


def test_every_device_says_why_it_is_not_the_one() -> None:
    scene = Scene(A, B, C, devices_mib=(45, 60, 30, 50))
    scene.warm(A)
    scene.feed(DeviceSeen("cpu:3", 50 * MIB, healthy=False))
    found = told(scene, B)
    assert (found.outcome, found.device) == (Outcome.FITS, "cpu:1")
    assert {room.device: room.verdict for room in found.devices} == {
        "cpu:0": "would have to evict more",
        "cpu:1": "chosen",
        "cpu:2": "too small, even empty",
        "cpu:3": "unhealthy",
    }


def test_models_in_use_and_claims_are_waited_for() -> None:
    scene = Scene(A, B, C, devices_mib=(50,))
    scene.settle(scene.ask(A))
    found = told(scene, B)
    assert (found.outcome, found.victims[0].in_use) == (Outcome.WAITS, True)
    scene.ask(B)
    behind = told(scene, C)
    assert (behind.outcome, behind.victims, behind.waiting_before) == (Outcome.WAITS, (), 1)
    assert behind.devices[0].verdict == f"claimed by {B.ref}"


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    scene = Scene(A, devices_mib=(30,))
    found = told(scene, A)
    assert (found.outcome, found.refusal) == (Outcome.REFUSED, "never_fits")
    assert "needs 41943040 bytes" in found.reason
    scene = Scene(A, quotas={"acme": device_quota(max_mib=10)})
    assert told(scene, A).refusal == "quota_bytes"
    assert told(scene, B).refusal == "unknown_model"
    scene.feed(DrainAsked())
    assert told(scene, A).refusal == "draining"


def test_a_restore_under_way_a_pause_and_a_rate_are_told() -> None:
    scene = Scene(A, B, quotas={"bolt": TenantQuota(restores_per_minute=1)})
    order = the(scene.ask(A), Restore)
    assert told(scene.later(10), A).outcome is Outcome.RESTORING
    scene.feed(RestoreFailed(A.ref, "cpu:0", Tier.ORIGIN, "gone", order=order.order))
    assert "next try in" in told(scene, A).reason
    scene.settle(scene.ask(B))
    scene.settle(scene.finish(2))
    scene.feed(DeviceSeen("cpu:0", 0))
    scene.settle(scene.feed(DeviceSeen("cpu:0", 100 * MIB)))


# --- why ------------------------------------------------------------------------------------------


def why(scene: Scene, kind: Kind) -> Decision:
    found = [decision for decision in scene.node.why if decision.kind is kind]
    assert len(found) == 1, scene.node.why
    return found[0]


def test_a_restore_that_waits_for_its_tenants_rate_is_explained_once_until_it_may_come() -> None:
    other = model("acme/other", 40)
    scene = Scene(A, other, quotas={"acme": TenantQuota(restores_per_minute=1)})
    scene.warm(A)
    scene.ask(other, 100_000)
    delayed = why(scene, Kind.DELAYED)
    assert delayed.ref == str(other.ref)
    assert "restores_per_minute): the next in 60000 ms" in delayed.reason
    scene.later(1_000).feed(Ticked())
    assert not scene.node.why
    scene.later(59_000).feed(Ticked())
    assert why(scene, Kind.PLACED).ref == str(other.ref)


def test_each_decision_is_explained_until_the_next_step() -> None:
    scene = Scene(A, B, C)
    scene.warm(A)
    scene.later(1000).warm(B)
    order = the(scene.later(1000).ask(C), Evict)
    claimed = why(scene, Kind.CLAIMED)
    assert (claimed.ref, claimed.device, claimed.nbytes) == (str(C.ref), "cpu:0", 40 * MIB)
    assert [victim.ref for victim in claimed.victims] == [str(A.ref)]
    scene.evicted(order)
    placed = why(scene, Kind.PLACED)
    assert (placed.ref, placed.from_tier, placed.nbytes) == (str(C.ref), "origin", 40 * MIB)
    assert placed.expected_ms > 0
    scene.ask(B)
    assert not scene.node.why


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (DeviceSeen("cpu:0", 10 * MIB), "its budget sank"),
        (DeviceSeen("cpu:0", 100 * MIB, healthy=False), "it is unhealthy"),
    ],
)
def test_what_goes_without_being_in_the_way_of_anybody_is_explained(event: Event, text: str) -> None:
    scene = Scene(A)
    scene.warm(A)
    scene.feed(event)
    assert text in why(scene, Kind.SHED).reason
    scene = Scene(A)
    scene.warm(A)
    scene.plan()
    assert why(scene, Kind.SHED).reason == "it left the plan"
