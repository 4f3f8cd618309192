"""The shortcut for the common case makes the very changes that the whole step makes.

Covers: ``packer/hits.py`` against ``residency.step_in_full``, over random histories with every kind of
trouble (``simulation``) and over calm ones made of hits. Does not cover: whether the whole step is right
(``test_residency``, ``test_simulation``), or how fast either is (``scripts/bench_core.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import World

from packer import hits, residency
from packer.events import (
    Action,
    Cancelled,
    DeviceSeen,
    DrainAsked,
    Event,
    Evict,
    Evicted,
    Finished,
    Grant,
    PackFound,
    Planned,
    Requested,
    Restore,
    Restored,
    Ticked,
    TierBudgetSeen,
)
from packer.invariants import QUIET_STEPS_MAX
from packer.ledger import Lease, State
from packer.types import MIB, ByteQuota, ModelRef, ModelSpec, Task, TenantQuota, TenantSpec, Tier

MODELS = 4
TENANTS = 2


ATOMS = frozenset({str, int, float, bool, type(None), bytes})


def as_text(value: object, known: dict[int, int] | None = None) -> str:
    """The whole state as text, in order, every record once; two equal states give equal texts."""
    kind: Any = type(value)
    if kind in ATOMS or isinstance(value, str):
        return repr(value)
    known = {} if known is None else known
    if id(value) in known:
        return f"#{known[id(value)]}"
    if names := field_names(kind):
        known[id(value)] = len(known)
        parts = [f"{name}={as_text(getattr(value, name), known)}" for name in names]
        return f"{kind.__name__}({', '.join(parts)})"
    if isinstance(value, dict):
        rows = [f"{key_text(type(key).__name__, key)}: {as_text(each, known)}" for key, each in value.items()]
        return "{" + ", ".join(rows) + "}"
    assert isinstance(value, (list, tuple)), kind
    return "[" + ", ".join([as_text(each, known) for each in value]) + "]"


@cache
def field_names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()


@cache
def key_text(_kind: str, key: object) -> str:
    """Of a key alone; the kind is there because True and 1 are equal."""
    return as_text(key)


def whole_core() -> Any:
    """The residency module as if there were no shortcut."""
    whole = {name: getattr(residency, name) for name in dir(residency) if not name.startswith("_")}
    return SimpleNamespace(**{**whole, "step": residency.step_in_full})


@pytest.mark.parametrize("seed", range(30))
def test_both_live_through_the_same_trouble(seed: int) -> None:
    short = World(seed).run()
    whole = World(seed, core=cast(Any, whole_core())).run()
    assert short.steps == whole.steps
    assert short.digest.hexdigest() == whole.digest.hexdigest()
    assert as_text(short.node) == as_text(whole.node)


class Pair:
    """Two nodes that are told the same; orders are answered in the next step."""

    def __init__(self, budget: int, quota: TenantQuota) -> None:
        self.short, self.whole = residency.Node(), residency.Node()
        self.now_ms = 0
        self.taken: Counter[str] = Counter()
        self.answers: list[Event] = []
        self.granted: list[str] = []
        self.requests = 0
        chunks = (10 * MIB,) * 3
        self.specs = tuple(
            ModelSpec(
                ModelRef(f"t{i % TENANTS}", f"m{i}", f"{i:016x}"),
                "control:",
                (),
                "transformers",
                Task.EMBEDDING,
                sum(chunks),
                chunks,
                MIB,
                0,
            )
            for i in range(MODELS)
        )
        self.tell(TierBudgetSeen(Tier.HOST, 70 * MIB))
        self.tell(TierBudgetSeen(Tier.DISK, 500 * MIB))
        self.tell(DeviceSeen("cpu:0", budget * MIB))
        self.tell(Planned((TenantSpec("t0"), TenantSpec("t1", quota)), self.specs))
        for spec in self.specs:
            self.tell(PackFound(spec.ref, 20 * MIB, 21 * MIB))

    def tell(self, event: Event) -> None:
        actions = residency.step(self.short, event, self.now_ms)
        assert actions == residency.step_in_full(self.whole, event, self.now_ms)
        for node in (self.short, self.whole):
            residency.check_after(node, event, actions)
        residency.check(self.short)
        residency.check(self.whole)
        assert as_text(self.short) == as_text(self.whole)
        for action in actions:
            self._note(action)

    def _note(self, action: Action) -> None:
        match action:
            case Restore():
                filled = action.host_bytes > 0
                took = Restored(action.ref, action.device, action.from_tier, 300, filled, action.order)
                self.answers.append(took)
            case Evict():
                self.answers.append(Evicted(action.ref, action.device, action.order))
            case Grant():
                self.granted.append(action.request)
            case _:
                pass

    def do(self, kind: str, number: int, passed_ms: int) -> None:
        self.now_ms += passed_ms
        if kind == "ask":
            self.requests += 1
            ref = self.specs[number % MODELS].ref
            self.tell(Requested(f"r{self.requests}", ref, self.now_ms + 2_000, number % 7))
        elif kind == "answer" and self.answers:
            self.tell(self.answers.pop(0))
        elif kind == "finish" and self.granted:
            self.tell(Finished(self.granted.pop(number % len(self.granted)), number, number % 11))
        elif kind == "cancel" and self.requests:
            self.tell(Cancelled(f"r{1 + number % self.requests}"))
        elif kind == "drain":
            self.tell(DrainAsked(number % 2 == 0))
        elif kind == "shrink":
            self.tell(DeviceSeen("cpu:0", (40 + number) * MIB, healthy=number % 5 != 0))
        elif kind == "replan":
            self.tell(Planned((TenantSpec("t0"), TenantSpec("t1")), self.specs[number % 2 :]))
        elif kind == "tick":
            self.tell(Ticked())


DOINGS = st.tuples(
    st.sampled_from(
        ("ask", "ask", "ask", "answer", "answer", "finish", "finish", "cancel", "tick", "shrink", "replan")
    )
    | st.sampled_from(("ask", "ask", "answer", "finish", "drain")),
    st.integers(0, 60),
    st.sampled_from((0, 0, 1, 40, 700, 5_000)),
)
QUOTAS = st.sampled_from(
    (
        TenantQuota(),
        TenantQuota(requests_per_minute=60, concurrency=2),
        TenantQuota(tokens_per_minute=30, restores_per_minute=3),
        TenantQuota(device_seconds_per_day=1),
        TenantQuota(device=ByteQuota(31 * MIB, 62 * MIB), weight=3),
    )
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from((35, 70, 130)), QUOTAS, st.lists(DOINGS, max_size=60))
def test_both_reach_the_same_state_after_every_step(
    budget: int, quota: TenantQuota, doings: list[tuple[str, int, int]]
) -> None:
    pair = Pair(budget, quota)
    for kind, number, passed_ms in doings:
        pair.do(kind, number, passed_ms)


def test_the_shortcut_is_taken_for_a_resident_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would compare the whole step with itself."""
    pair = Pair(130, TenantQuota())
    for number in range(MODELS):
        pair.do("ask", number, 100)
    while pair.answers:
        pair.do("answer", 0, 100)
    pair.now_ms += 10_000
    pair.tell(Ticked())
    full: list[Event] = []
    real = residency.step_in_full

    def watched(node: residency.Node, event: Event, now_ms: int) -> list[Action]:
        full.append(event)
        return real(node, event, now_ms)

    monkeypatch.setattr(residency, "step_in_full", watched)
    for _ in range(MODELS):
        residency.step(pair.short, Finished(pair.granted.pop(0), 5), pair.now_ms)
    assert full == []
    for spec in pair.specs:
        assert residency.step(pair.short, Requested(f"again {spec.ref}", spec.ref, 1 << 40), pair.now_ms)
    assert full == []


def test_it_stands_back_when_anything_is_out_of_the_ordinary() -> None:
    pair = Pair(130, TenantQuota(requests_per_minute=6))
    model = pair.short.models[pair.specs[0].ref]
    assert hits.grant_at_once(pair.short, "absent", model, pair.now_ms) is None
    pair.do("ask", 0, 0)
    while pair.answers:
        pair.do("answer", 0, 100)
    pair.tell(DrainAsked())
    assert hits.grant_at_once(pair.short, "draining", model, pair.now_ms) is None
    lease = pair.short.requests[pair.granted[0]]
    assert isinstance(lease, Lease)
    pair.tell(Planned((TenantSpec("t0"), TenantSpec("t1")), pair.specs[1:]))
    assert not hits.finish_quietly(pair.short, lease, 5, pair.now_ms)
    assert as_text(pair.short) == as_text(pair.whole)


def books(node: residency.Node) -> str:
    """The whole state, but for what the next proof has to look at."""
    touched, node.touched = node.touched, {}
    text = as_text(node)
    node.touched = touched
    return text


@pytest.mark.parametrize(
    "quota", [TenantQuota(), TenantQuota(device=ByteQuota(31 * MIB, 62 * MIB), weight=3)]
)
def test_a_use_that_is_over_before_anything_happens_leaves_what_its_two_ends_leave(
    quota: TenantQuota,
) -> None:
    pair = Pair(130, quota)
    for number in range(MODELS):
        pair.do("ask", number, 100)
    while pair.answers:
        pair.do("answer", 0, 100)
    for _ in range(MODELS):
        pair.do("finish", 0, 100)
    pair.do("tick", 0, 10_000)
    assert books(pair.short) == books(pair.whole)
    at_ms, taken = pair.now_ms, 0
    for number in range(200):
        at_ms += (number * 7919) % 90_000
        end_ms = at_ms + (number * 31) % 900
        ref = pair.specs[number % 3].ref
        known = pair.short.models[ref]
        calm = end_ms < hits.calm_until_ms(pair.short)
        if calm and hits.use_at_once(pair.short, known, at_ms, end_ms):
            taken += 1
        else:
            residency.step(pair.short, Requested(f"n{number}", ref, at_ms + 2_000), at_ms)
            residency.step(pair.short, Finished(f"n{number}", end_ms - at_ms), end_ms)
        residency.step(pair.whole, Requested(f"n{number}", ref, at_ms + 2_000), at_ms)
        residency.step(pair.whole, Finished(f"n{number}", end_ms - at_ms), end_ms)
        assert books(pair.short) == books(pair.whole)
        for node in (pair.short, pair.whole):
            residency.check(node, full=True)
        at_ms = end_ms
    assert taken > 150


def test_it_is_never_calm_while_somebody_waits_or_must_go() -> None:
    pair = Pair(130, TenantQuota())
    pair.do("ask", 0, 0)
    assert hits.calm_until_ms(pair.short) == 0, "a restore is under way for somebody"
    while pair.answers:
        pair.do("answer", 0, 100)
    pair.do("finish", 0, 0)
    pair.do("tick", 0, 10_000)
    assert hits.calm_until_ms(pair.short) == hits.NEVER_MS
    limited = Pair(130, TenantQuota(concurrency=2))
    model = limited.short.models[limited.specs[1].ref]
    assert not hits.use_at_once(limited.short, model, limited.now_ms, limited.now_ms), "it is not there"
    pair.do("drain", 0, 0)
    assert hits.calm_until_ms(pair.short) == 0


def calm_pair() -> Pair:
    """Everything is there, nobody waits, and the last proof has seen it all."""
    pair = Pair(130, TenantQuota())
    for number in range(MODELS):
        pair.do("ask", number, 100)
    while pair.answers:
        pair.do("answer", 0, 100)
    for _ in range(MODELS):
        pair.do("finish", 0, 100)
    pair.do("tick", 0, 10_000)
    return pair


def steps_until_found(node: residency.Node, events: Sequence[Event], now_ms: int) -> int:
    """After how many of the steps the proof says that something is wrong."""
    for number, event in enumerate(events, start=1):
        actions = residency.step(node, event, now_ms)
        try:
            residency.check_after(node, event, actions)
        except residency.InvariantBroken:
            return number
    raise AssertionError("never found")


def warm_requests(ref: ModelRef, count: int) -> list[Event]:
    asks = [Requested(f"w{number}", ref, 1 << 40) for number in range(count)]
    return [event for asked in asks for event in (asked, Finished(asked.request, 3))]


def test_wrong_bytes_of_a_model_in_use_are_found_within_a_few_warm_requests() -> None:
    pair = calm_pair()
    node, ref = pair.short, pair.specs[0].ref
    node.models[ref].device_bytes += 1
    found = steps_until_found(node, warm_requests(ref, 50), pair.now_ms)
    assert 1 < found <= QUIET_STEPS_MAX + 1


def test_any_other_step_has_what_warm_requests_touched_proven_at_once() -> None:
    pair = calm_pair()
    node, ref = pair.short, pair.specs[0].ref
    node.models[ref].device_bytes += 1
    assert steps_until_found(node, [*warm_requests(ref, 1), Ticked()], pair.now_ms) == 3


@pytest.mark.parametrize("wrong", ["granted", "leases", "state", "residency", "device"])
def test_what_a_grant_itself_gets_wrong_is_found_at_once(wrong: str) -> None:
    pair = calm_pair()
    node, model = pair.short, pair.short.models[pair.specs[0].ref]
    asked = Requested("w", model.ref, 1 << 40)
    actions = residency.step(node, asked, pair.now_ms)
    residency.check_after(node, asked, actions)
    match wrong:
        case "granted":
            node.granted += 1
        case "leases":
            model.leases = 0
        case "state":
            model.state = State.EVICTING
        case "residency":
            model.residency += 1
        case "device":
            model.device = None
    with pytest.raises(residency.InvariantBroken):
        residency.check_after(node, asked, actions)


def test_an_end_that_forgets_its_lease_is_found_at_once() -> None:
    pair = calm_pair()
    node, ref = pair.short, pair.specs[0].ref
    residency.step(node, Requested("w", ref, 1 << 40), pair.now_ms)
    with pytest.raises(residency.InvariantBroken, match="has ended and is known"):
        residency.check_after(node, Finished("w", 3), [])
