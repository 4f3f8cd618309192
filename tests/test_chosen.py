"""Eviction policies in the core: the one that an operator chose decides, on devices and below.

Covers: ``PolicyChosen`` in the residency core: what goes first under each policy, that the core and the
pool model of the benches agree, the timer of ``ttl``, copies in the host and disk tier, and changing the
policy of a running node. Does not cover: how a policy ranks (``test_policies``), or strange histories
(``test_simulation`` runs every policy through them).
"""

from __future__ import annotations

import random

import pytest
from pool_model import Pool, replayed
from request_traces import Trace
from scene import Scene, model, of, the

from packer import residency
from packer.events import Drop, Evict, Grant, PolicyChosen, Restore, Ticked
from packer.invariants import InvariantBroken
from packer.policies import POLICY_NAMES, TTL_MS
from packer.types import MIB, BadValue, ModelSpec, Tier

A, B, C, D = (model(f"t/{name}", 40) for name in "abcd")


def scene(policy: str, *specs: ModelSpec, host_mib: int = 0, disk_mib: int = 10_000) -> Scene:
    made = Scene(*specs, host_mib=host_mib, disk_mib=disk_mib)
    made.feed(PolicyChosen(policy))
    return made


def victims_of(made: Scene, spec: ModelSpec) -> list[str]:
    actions = made.settle(made.later(1_000).ask(spec))
    made.settle(made.finish(made.requests))
    return [order.ref.name for order in of(actions, Evict)]


def test_a_name_that_is_no_policy_is_refused_and_changes_nothing() -> None:
    made = scene("lru", A)
    with pytest.raises(BadValue, match="one of keep, lru"):
        made.feed(PolicyChosen("arc"))
    assert made.node.chosen is not None
    assert made.node.chosen.name == "lru"


def test_under_lru_the_longest_unused_goes_however_often_it_was_used_before() -> None:
    order = {}
    for policy in ("lru", "keep"):
        made = scene(policy, A, B, C)
        for _ in range(30):
            made.later(60_000).warm(A)
        made.later(60_000).warm(B)
        order[policy] = victims_of(made, C)
    assert order == {"lru": ["a"], "keep": ["b"]}


def test_classic_policies_evict_whole_models_and_keep_cuts_them() -> None:
    for policy in POLICY_NAMES:
        # Chunks, so that there is something to cut.
        specs = [chunked(f"t/{name}") for name in "abc"]
        made = scene(policy, *specs)
        for spec in specs[:2]:
            made.later(1_000).warm(spec)
        evict = the(made.settle(made.later(1_000).ask(specs[2])), Evict)
        assert bool(evict.keep_chunks) == (policy == "keep"), policy


def chunked(text: str) -> ModelSpec:
    from dataclasses import replace

    return replace(model(text, 40), chunk_bytes=(10 * MIB,) * 4)


@pytest.mark.parametrize("policy", ["lru", "sieve", "s3fifo"])
def test_the_core_has_the_misses_of_the_pool_model(policy: str) -> None:
    """Whole models of one size on one device: then both must take the same victims, request by request."""
    rng = random.Random(7)
    specs = [model(f"t/m{number:02}", 10) for number in range(12)]
    wanted = [min(int(rng.expovariate(0.35)), 11) for _ in range(400)]
    times = tuple(range(1_000, 1_000 * (len(wanted) + 1), 1_000))
    trace = Trace("hand", times, tuple(wanted), tuple(str(s.ref) for s in specs), (10 * MIB,) * 12)
    pool = Pool(replayed(policy, trace), trace, 50 * MIB)
    made = Scene(*specs, devices_mib=(50,))
    made.feed(PolicyChosen(policy))
    missed: list[tuple[int, bool, bool]] = []
    for at, number in enumerate(wanted):
        actions = made.settle(made.later(1_000).ask(specs[number]))
        made.settle(made.finish(made.requests))
        missed.append((at, bool(of(actions, Restore)), bool(pool.use(number, made.now_ms))))
    assert [at for at, core, pooled in missed if core != pooled] == []
    assert 40 < sum(core for _, core, _ in missed) < 300


def test_a_timer_unloads_from_device_and_host_and_leaves_the_pack() -> None:
    made = scene("ttl", A, host_mib=100)
    made.warm(A)  # from its origin, with a pack beside it
    made.settle(made.later(TTL_MS).feed(Ticked()))
    assert made.state(A) == "absent"
    made.warm(A)  # from disk, with a host copy on the way
    view = residency.model_view(made.node, A.ref)
    assert view is not None
    assert view.host_bytes
    assert not of(made.later(TTL_MS - 1).feed(Ticked()), Evict)
    actions = made.settle(made.later(1).feed(Ticked()))
    assert [order.ref for order in of(actions, Evict)] == [A.ref]
    assert [order.tier for order in of(actions, Drop)] == [Tier.HOST]
    view = residency.model_view(made.node, A.ref)
    assert view is not None
    assert view.packed


def test_a_timer_counts_from_the_end_of_a_use() -> None:
    made = scene("ttl", A)
    made.settle(made.ask(A))
    assert not of(made.later(2 * TTL_MS).feed(Ticked()), Evict)  # in use all the time
    assert not of(made.finish(1), Evict)
    assert not of(made.later(TTL_MS - 1).feed(Ticked()), Evict)
    the(made.later(1).feed(Ticked()), Evict)


def test_only_the_timer_unloads_what_nobody_needs_the_room_of() -> None:
    for policy in POLICY_NAMES:
        made = scene(policy, A, B, host_mib=100)
        made.warm(A)
        made.warm(B)
        gone = of(made.later(100 * TTL_MS).feed(Ticked()), Evict)
        assert bool(gone) == (policy == "ttl"), policy


@pytest.mark.parametrize("policy", [name for name in POLICY_NAMES if name != "keep"])
def test_a_dropped_copy_is_not_made_again_before_the_next_use(policy: str) -> None:
    """Two resident models and disk for one pack: each new pack throws the other's out, and no further."""
    made = scene(policy, A, B, disk_mib=60)
    drops = []
    for spec in (A, B):
        actions = made.settle(made.later(1_000).ask(spec))
        drops += of(actions, Drop) + of(made.settle(made.finish(made.requests)), Drop)
    assert len(drops) <= 1
    quiet = made.settle(made.later(10 * TTL_MS if policy != "ttl" else 1).feed(Ticked()))
    assert not of(quiet, Drop)


def test_lru_ranks_the_host_tier_by_use_too() -> None:
    made = scene("lru", A, B, C, host_mib=12)  # two copies of 5 MiB
    dropped: list[str] = []
    for _ in range(2):
        for spec in (A, B, C):
            dropped += [drop.ref.name for drop in of(made.settle(made.later(1_000).ask(spec)), Drop)]
            made.settle(made.finish(made.requests))
    assert dropped == ["a"]


def test_a_policy_chosen_later_knows_the_last_uses() -> None:
    made = scene("keep", A, B, C)
    for _ in range(30):
        made.later(60_000).warm(A)
    made.later(60_000).warm(B)
    made.feed(PolicyChosen("lru"))
    assert victims_of(made, C) == ["a"]
    made.feed(PolicyChosen("keep"))
    assert made.node.partial
    assert victims_of(made, A) == ["b"]


def test_models_that_leave_the_plan_are_forgotten() -> None:
    for policy in POLICY_NAMES:
        made = scene(policy, A, B, host_mib=100)
        made.warm(A)
        made.warm(B)
        made.settle(made.plan(B))
        chosen = made.node.chosen
        if chosen is not None:
            assert not any(chosen.counts(tier, A.ref) for tier in Tier if tier is not Tier.ORIGIN), policy


def test_the_invariants_see_a_policy_that_ranks_what_is_not_there() -> None:
    made = scene("lru", A)
    assert made.node.chosen is not None
    made.node.chosen.note_use(Tier.HOST, A.ref, 0, 1.0, 1)
    with pytest.raises(InvariantBroken, match="ranked in host"):
        residency.check(made.node, full=True)


def test_a_hit_under_a_chosen_policy_is_a_use() -> None:
    made = scene("lru", A, B, C)
    made.warm(A)
    made.later(1_000).warm(B)
    the(made.later(1_000).ask(A), Grant)
    made.finish(made.requests)
    assert victims_of(made, C) == ["b"]
