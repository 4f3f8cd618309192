"""The clairvoyant bound: exact where it can be counted out, below everything else where it can not.

Covers: ``packer/regret.py`` against brute force over all schedules on small logs, against the pool model of
the benches on larger ones, the two tiers, and what does not count. Does not cover: keeping the log or
showing the figures (``test_regret_meter``).
"""

from __future__ import annotations

import random
from functools import cache
from itertools import product

import pytest
from pool_model import BYTES_PER_MS, Pool, replayed
from request_traces import Trace

from packer import regret
from packer.regret import Costs, Memory, Regret, UseLog

FREE_START = Costs(fixed_ms=0.0, host_ms_per_byte=1.0, disk_ms_per_byte=3.0)


def log_of(models: list[int], sizes: list[int], cold_ms: list[int] | None = None) -> UseLog:
    return UseLog([1_000 * at for at in range(len(models))], models, cold_ms or [0] * len(models), sizes)


def cheapest(log: UseLog, capacity: int) -> int:
    """The fewest bytes that any schedule brings in, by trying all of them unit by unit."""
    sizes = tuple(log.size_bytes)

    @cache
    def from_here(at: int, held: tuple[int, ...]) -> int:
        if at == len(log.models):
            return 0
        model = log.models[at]
        # Whatever it keeps of the others, it must hold all of the model that is used.
        choices = [range(have + 1) if i != model else (sizes[i],) for i, have in enumerate(held)]
        kept = [after for after in product(*choices) if sum(after) <= capacity]
        return sizes[model] - held[model] + min(from_here(at + 1, after) for after in kept)

    return from_here(0, (0,) * len(sizes))


def test_belady_on_bytes_is_the_optimum_of_all_schedules() -> None:
    rng = random.Random(3)
    short = 0
    for _ in range(60):
        sizes = [rng.randrange(1, 4) for _ in range(4)]
        capacity = rng.randrange(max(sizes), sum(sizes) + 1)
        log = log_of([rng.randrange(4) for _ in range(9)], sizes)
        found = sum(regret.missing_bytes(log, capacity))
        assert found == cheapest(log, capacity), (sizes, capacity, log.models)
        short += found > sum(size for i, size in enumerate(sizes) if i in log.models)
    assert short > 15, "in most of these logs memory must be short, or nothing is shown"


def cheapest_in_two_tiers(log: UseLog, memory: Memory, costs: Costs) -> float:
    """The least cost of any schedule over a device tier and a host tier below it; what is used moves to
    the device, and what leaves the device may stay in host. First uses cost nothing."""
    sizes = tuple(log.size_bytes)
    first = [log.models.index(model) == at for at, model in enumerate(log.models)]

    @cache
    def from_here(at: int, device: tuple[int, ...], host: tuple[int, ...]) -> float:
        if at == len(log.models):
            return 0.0
        model = log.models[at]
        lacks = sizes[model] - device[model]
        near = min(lacks, host[model])
        cost = near * costs.host_ms_per_byte + (lacks - near) * costs.disk_ms_per_byte
        had = [device[i] + host[i] for i in range(len(sizes))]
        had[model] = sizes[model]
        best = float("inf")
        on_device = [range(device[i] + 1) if i != model else (sizes[i],) for i in range(len(sizes))]
        for after in product(*on_device):
            if sum(after) > memory.device_bytes:
                continue
            below = [range(had[i] - after[i] + 1) for i in range(len(sizes))]
            for under in product(*below):
                if sum(under) <= memory.host_bytes:
                    best = min(best, from_here(at + 1, after, under))
        return (0.0 if first[at] else cost) + best

    return from_here(0, (0,) * len(sizes), (0,) * len(sizes))


def test_two_tiers_are_bounded_by_every_schedule_over_both() -> None:
    """First uses are free, which a schedule could exploit by fetching again what is free: it can not, since
    each model is first used once. So the bound is met exactly here too."""
    rng = random.Random(5)
    for _ in range(12):
        sizes = [rng.randrange(1, 3) for _ in range(3)]
        memory = Memory(max(sizes), rng.randrange(0, 3))
        log = log_of([rng.randrange(3) for _ in range(6)], sizes)
        found = regret.replay(log, memory, FREE_START)
        assert found.bound_ms == pytest.approx(cheapest_in_two_tiers(log, memory, FREE_START))
        assert found.optimum_ms == found.bound_ms


def zipf_log(rng: random.Random, uses: int = 2_000, unit: int = 1) -> UseLog:
    sizes = [rng.randrange(10, 80) * unit for _ in range(30)]
    weights = [1 / (1 + rank) for rank in range(30)]
    return log_of(rng.choices(range(30), weights, k=uses), sizes)


def test_the_bound_agrees_with_the_pool_model_and_no_policy_is_below_it() -> None:
    # So large that the pool model's fixed cost of a restore is nothing beside the bytes.
    log = zipf_log(random.Random(11), unit=10**14)
    trace = Trace(
        "zipf",
        tuple(log.at_ms),
        tuple(log.models),
        tuple(f"m{i:02}" for i in range(30)),
        tuple(log.size_bytes),
    )
    for units in (100, 300, 900):
        capacity = units * 10**14
        bound = sum(regret.missing_bytes(log, capacity))
        assert bound <= _pool_bytes(trace, "belady fractions", capacity) <= bound * 1.05
        for policy in ("keep", "lru", "gdsf", "s3fifo", "sieve", "belady"):
            assert _pool_bytes(trace, policy, capacity) >= bound
        hits = regret.lru_hits(log, capacity)
        missed = sum(log.size_bytes[model] for model, hit in zip(log.models, hits, strict=True) if not hit)
        assert missed == _pool_bytes(trace, "lru", capacity)


def _pool_bytes(trace: Trace, policy: str, capacity: int) -> int:
    pool = Pool(replayed(policy, trace), trace, capacity)
    return sum(pool.use(model, now_ms) for model, now_ms in zip(trace.models, trace.at_ms, strict=True))


def test_more_memory_never_misses_more_use_by_use() -> None:
    """The device tier is the front of one ordered list: without that the two tiers could not be added up."""
    log = zipf_log(random.Random(12))
    before = regret.missing_bytes(log, 80)
    for capacity in (120, 200, 500, 2_000):
        now = regret.missing_bytes(log, capacity)
        assert all(after <= earlier for after, earlier in zip(now, before, strict=True)), capacity
        before = now


def test_the_order_of_all_figures() -> None:
    log = zipf_log(random.Random(13))
    costs = Costs(20.0, 1 / BYTES_PER_MS * 1e6, 7 / BYTES_PER_MS * 1e6)
    found = regret.replay(log, Memory(200, 300), costs)
    assert 0 < found.bound_ms < found.optimum_ms < found.lru_ms
    alone = regret.replay(log, Memory(200, 0), costs)
    assert alone.optimum_ms > found.optimum_ms
    assert alone.lru_ms > found.lru_ms


def test_first_uses_and_what_never_fits_count_for_nobody() -> None:
    log = log_of([0, 1, 0, 2, 2, 1], [5, 5, 99], cold_ms=[700, 700, 40, 9_000, 9_000, 60])
    found = regret.replay(log, Memory(5, 0), Costs(1.0, 2.0, 2.0))
    assert (found.uses, found.counted, found.window_ms) == (6, 2, 5_000)
    assert found.actual_ms == 100.0
    assert found.optimum_ms == 2 * (1.0 + 5 * 2.0)
    assert found.ratio == pytest.approx(100.0 / 22.0)


def test_a_log_that_says_nothing_has_no_ratio() -> None:
    assert regret.replay(log_of([], []), Memory(5, 5), FREE_START) == Regret(0, 0, 0, 0.0, 0.0, 0.0, 0.0)
    warm = regret.replay(log_of([0, 0, 0], [5]), Memory(5, 0), FREE_START)
    assert (warm.counted, warm.optimum_ms, warm.ratio) == (2, 0.0, None)
