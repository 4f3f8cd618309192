"""Eviction policies: each ranks as its paper says, and ours beats them where it should.

Covers: ``packer/policies.py`` and the pool model of the benches (``scripts/pool_model.py``). Does not
cover: the core's use of a policy (``test_residency``).
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from pool_model import FIXED_MS, replay, restore_ms
from request_traces import CATALOGUE_BYTES, GB, NoTrace, Trace, servegen
from stress_traces import stress

from packer.policies import POLICY_NAMES, TTL_MS, Item, Policy, make_policy
from packer.types import BadValue

SIZE = 1_000
COST_MS = 100.0


def trace_of(wanted: list[int], sizes: list[int], step_ms: int = 1_000) -> Trace:
    names = tuple(f"m{number}" for number in range(len(sizes)))
    return Trace("hand", tuple(range(0, step_ms * len(wanted), step_ms)), tuple(wanted), names, tuple(sizes))


def used(policy: Policy, order: str) -> dict[str, Item]:
    """Use single-letter models one per second."""
    items: dict[str, Item] = {}
    for at, name in enumerate(order):
        policy.note_use(items.setdefault(name, Item(name)), at * 1_000, COST_MS, SIZE)
    return items


def ranked(policy: Policy, items: dict[str, Item], now_ms: int = 10**6) -> str:
    value = policy.at(now_ms)
    held = [item for item in items.values() if item.is_held]
    return "".join(item.name for item in sorted(held, key=lambda item: value(item, COST_MS, SIZE)))


def test_names_make_policies_and_others_are_refused_by_name() -> None:
    assert [make_policy(name).name for name in POLICY_NAMES] == list(POLICY_NAMES)
    with pytest.raises(BadValue, match="one of keep, lru"):
        make_policy("arc")


def test_lru_ranks_by_last_use() -> None:
    policy = make_policy("lru")
    assert ranked(policy, used(policy, "abcab")) == "cab"


def test_ttl_expires_after_five_minutes_and_not_before() -> None:
    policy = make_policy("ttl")
    items = used(policy, "ab")
    assert policy.expired(items.values(), TTL_MS - 1) == []
    assert [item.name for item in policy.expired(items.values(), TTL_MS)] == ["a"]
    policy.note_gone(items["a"])
    assert [item.name for item in policy.expired(items.values(), TTL_MS + 1_000)] == ["b"]


def test_only_the_timer_unloads_without_need() -> None:
    for name in POLICY_NAMES:
        policy = make_policy(name)
        gone = policy.expired(used(policy, "abc").values(), 10**12)
        assert bool(gone) == policy.timed == (name == "ttl")


def test_gdsf_prefers_frequent_small_and_costly_and_ages() -> None:
    policy = make_policy("gdsf")
    items = {name: Item(name) for name in ("often", "large", "cheap", "late")}
    for _ in range(3):
        policy.note_use(items["often"], 0, COST_MS, SIZE)
    policy.note_use(items["large"], 1, COST_MS, 10 * SIZE)
    policy.note_use(items["cheap"], 2, COST_MS / 2, SIZE)
    assert [item.name for item in sorted(items.values(), key=lambda i: i.value)][-1] == "often"
    assert items["large"].value < items["cheap"].value
    policy.note_gone(items["often"])
    policy.note_use(items["late"], 3, COST_MS, SIZE)
    assert items["late"].value > items["often"].value  # one use now outweighs three that were evicted


def test_sieve_spares_what_was_used_and_its_hand_moves_on() -> None:
    policy = make_policy("sieve")
    items = used(policy, "abcda")
    assert ranked(policy, items) == "bcda"
    policy.note_gone(items["b"])
    # The hand has passed a and cleared its mark; it stands at c, and comes to a after d.
    assert ranked(policy, items) == "cda"
    policy.note_use(items["c"], 9_000, COST_MS, SIZE)
    assert ranked(policy, items) == "dac"


def test_s3fifo_evicts_one_hit_wonders_first_and_remembers_them() -> None:
    policy = make_policy("s3fifo")
    items = used(policy, "aaabcd")
    # All are on probation; a was used more than once and moves to the main queue when its turn comes.
    assert ranked(policy, items) == "bcda"
    policy.note_gone(items["b"])
    policy.note_use(items["b"], 9_000, COST_MS, SIZE)
    # b was remembered and comes back into the main queue; c and d are still on probation and go first.
    assert ranked(policy, items)[:2] == "cd"


def test_keep_weighs_use_against_cost_and_bytes() -> None:
    policy = make_policy("keep")
    items = used(policy, "aab")
    value = policy.at(10_000)
    assert value(items["a"], COST_MS, SIZE) > value(items["b"], COST_MS, SIZE)
    assert value(items["b"], COST_MS, SIZE) > value(items["b"], COST_MS, 2 * SIZE)
    assert value(items["b"], COST_MS, SIZE) > value(items["b"], COST_MS / 2, SIZE)


@pytest.mark.parametrize("name", [*POLICY_NAMES, "lfu", "hybrid", "belady", "belady fractions"])
def test_a_pool_never_holds_more_than_it_has_and_serves_what_fits_for_nothing(name: str) -> None:
    everything = trace_of([0, 1, 2, 0, 1, 2], [GB, GB, GB])
    assert replay(everything, name, 3 * GB).cold_s_mean == pytest.approx(3 * restore_ms(GB) / 6 / 1_000)
    # One model at a time: every change of model is cold, whatever the policy.
    one = replay(trace_of([0, 1, 0, 0, 1], [GB, GB]), name, GB)
    assert one.hit_share == pytest.approx(1 / 5)
    assert one.moved_bytes == 4 * GB


def test_a_policy_that_may_evict_parts_takes_exactly_the_bytes_needed() -> None:
    trace = trace_of([0, 1, 0], [4 * GB, 2 * GB])
    assert replay(trace, "keep", 5 * GB).moved_bytes == 4 * GB + 2 * GB + 1 * GB
    assert replay(trace, "lru", 5 * GB).moved_bytes == 4 * GB + 2 * GB + 4 * GB


def drawn(seed: int, requests: int = 4_000, models: int = 60) -> Trace:
    """Zipf popularity that drifts, in sessions: nothing of any real trace."""
    generator = random.Random(seed)
    at_ms, wanted, now = [], [], 0
    while len(wanted) < requests:
        now += int(generator.expovariate(1 / 240_000))
        model = (int(generator.paretovariate(0.7)) + len(wanted) // 400) % models
        for _ in range(1 + int(generator.expovariate(0.5))):
            now += int(generator.expovariate(1 / 20_000))
            at_ms.append(now)
            wanted.append(model)
    names = tuple(f"m{number}" for number in range(models))
    sizes = tuple(generator.choice(CATALOGUE_BYTES) for _ in range(models))
    return Trace("drawn", tuple(at_ms), tuple(wanted), names, sizes)


def test_ours_stands_between_the_peers_and_the_clairvoyant_on_a_trace_it_was_not_made_for() -> None:
    for seed in (1, 2, 3):
        trace = drawn(seed)
        cold_s = {
            name: replay(trace, name, 300 * GB).cold_s_mean for name in (*POLICY_NAMES, "belady fractions")
        }
        ours = cold_s.pop("keep")
        # One seed's best peer in hindsight may be luck; none may be ahead by more than a little.
        assert cold_s.pop("belady fractions") < ours < 1.05 * min(cold_s.values())
        assert ours < 0.97 * cold_s["lru"]


@pytest.mark.parametrize(("shape", "most"), [("drift", 1.0), ("days", 1.11), ("loop", 0.9)])
def test_ours_follows_traffic_whose_shape_changes(shape: str, most: float) -> None:
    """Popularity that moves on, models that rest at night, models in turns; the first three days, of which
    the first is for learning. Without what silences say these are 1.17, 1.14 and 1.42."""
    trace = stress(shape, 4)
    requests = 8_000
    trace = Trace(shape, trace.at_ms[:requests], trace.models[:requests], trace.names, trace.size_bytes)
    half_bytes, names = sum(trace.size_bytes) // 2, ("keep", "lru", "sieve", "s3fifo")
    ours, *peers = (replay(trace, name, half_bytes).cold_s_mean for name in names)
    assert ours < most * min(peers)


def test_a_trace_is_the_same_for_the_same_seed_and_in_order_of_time() -> None:
    try:
        first, again, other = servegen(1e-6, 1), servegen(1e-6, 1), servegen(1e-6, 2)
    except NoTrace:
        pytest.skip("the public traces are not beside this checkout")
    assert first == again != other
    assert all(earlier <= later for earlier, later in pairwise(first.at_ms))
    assert set(first.size_bytes) <= set(CATALOGUE_BYTES)


def test_a_missing_trace_names_the_file_and_the_option(tmp_path: object) -> None:
    from pathlib import Path

    with pytest.raises(NoTrace, match=r"servegen_client_rates_600s\.csv\.gz.*--traces"):
        servegen(1e-6, 1, Path(str(tmp_path)))


def test_a_restore_has_a_fixed_part() -> None:
    assert restore_ms(0) == FIXED_MS
