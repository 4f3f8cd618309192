"""The residency core in thousands of strange histories: safe at every step, and alive afterwards.

Covers: seeded worlds, the rare branches they must reach, the same trace whatever the hash seed, and
planted bugs that the worlds must catch. Does not cover: single rules (``test_residency``, ``test_quota``).
"""

from __future__ import annotations

import os
from collections import Counter
from types import ModuleType

import pytest
from catching_seeds import is_caught
from hash_seeds import digests_under_two_hash_seeds
from mutants import MUTANTS, Mutant, load
from prefetch_mutants import PREFETCH_MUTANTS
from quota_mutants import RATE_MUTANTS
from simulated_hands import Violated
from simulation import World

from packer import residency, room, shortlist, victims
from packer.policies import POLICY_NAMES
from packer.residency import InvariantBroken

# Small bounds, so that full queues are common; every seed then reaches them within seconds.
SMALL = (
    ("WAITING_PER_TENANT_MAX", "queueing", 6),
    ("WAITING_MAX", "queueing", 12),
    # So are copies that are filled ahead of need.
    ("FIRST_MS", "prefetch", 1_000),
    ("LOOK_MS", "prefetch", 200),
    ("PAUSE_PARTS", "prefetch", 1),
    ("RETRY_MS", "prefetch", 2_000),
)
SEEDS = range(130)
# Fresh histories on every commit without a clock or randomness: another range can be named.
SEED_FIRST = int(os.environ.get("BUNK_SEED_FIRST", "0"))
MUTANT_SEEDS = range(200)
POLICY_SEEDS = range(15)
RARE_UNDER_ANY_POLICY = (
    "condemned",
    "dropped from disk",
    "dropped from host",
    "evicted for a claim",
    "evicted wholly, resident before",
    "host copy filled",
    "restored from disk",
    "restored from host",
    "shed for a smaller budget",
    "worker died while leased",
)

RARE = (
    "a file outlived its version",
    "a load failed beside its pack",
    "budget sank below what is leased",
    "budget sank while restoring",
    "cancelled after grant",
    "cancelled while waiting",
    "charged to one that goes as well",
    "a failed restore left chunks",
    "a failed restore lost chunks",
    "condemned",
    "device became unhealthy",
    "dropped from disk",
    "dropped from host",
    "evicted chunks of a waiting model",
    "evicted for a claim",
    "evicted in part, partial before",
    "evicted in part, resident before",
    "evicted wholly, partial before",
    "evicted wholly, resident before",
    "excused",
    "gave up its chunks for the origin's",
    "host copy filled",
    "host copy filled beside a part",
    "measured more where it is held",
    "served while it came",
    "leased before it was all there",
    "failed while it was served from",
    "sent away again",
    "filled ahead of need",
    "stopped filling",
    "could not fill",
    "restored from what was filled ahead",
    "what was filled ahead made room",
    "measured less where it is held",
    "joined a restore",
    "late answer",
    "pack failed",
    "pack beside a load failed",
    "went on with a pack",
    "dropped what was begun",
    "packed after the worker died",
    "packed before it was restored",
    "packed with parts in other files",
    "passed a claim",
    "planned again",
    "refused: concurrency",
    "refused: device_time",
    "refused: model_broken",
    "refused: never_fits",
    "refused: queue_full",
    "refused: quota_bytes",
    "refused: rate",
    "refused: restore_failed",
    "refused: restore_rate",
    "refused: timeout",
    "refused: tokens",
    "refused: unknown_model",
    "refused: worker_died",
    "removed while leased",
    "removed while packing",
    "removed while partial",
    "removed while restoring",
    "restored from disk",
    "restored from host",
    "restored from origin",
    "restored under a rate",
    "restored what was missing",
    "shed for a smaller budget",
    "took what a slice has",
    "took what no slice has",
    "worker died while evicting",
    "worker died while leased",
    "worker died while loading and packing",
    "worker died while packing",
    "worker died while partial",
    "worker died while restoring",
)


def world(seed: int, core: ModuleType = residency, policy: str = "keep", kind: type[World] = World) -> World:
    with pytest.MonkeyPatch.context() as patch:
        for name, module, value in SMALL:
            patch.setattr(vars(core)[module], name, value)
        return kind(seed, core, policy=policy).run()


def test_every_history_is_safe_and_ends_well_and_together_they_reach_every_rare_branch() -> None:
    reached: Counter[str] = Counter()
    for seed in SEEDS:
        reached += world(SEED_FIRST + seed).reached
    missed = [name for name in RARE if not reached[name]]
    assert not missed, f"these branches were never taken: {missed}"


@pytest.mark.parametrize("policy", [name for name in POLICY_NAMES if name != "keep"])
def test_every_history_is_safe_and_ends_well_under_every_policy(policy: str) -> None:
    reached: Counter[str] = Counter()
    for seed in POLICY_SEEDS:
        reached += world(SEED_FIRST + seed, policy=policy).reached
    missed = [name for name in RARE_UNDER_ANY_POLICY if not reached[name]]
    assert not missed, f"these branches were never taken: {missed}"
    assert not [name for name in reached if "in part" in name], "the classic policies are about whole models"


def test_every_history_is_safe_and_ends_well_when_not_everything_is_ranked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short lists of two, so that worlds of a few models have more than is looked at."""
    for module in (shortlist, victims, room):
        monkeypatch.setattr(module, "EXACT_MAX", 2)
    for name in ("SHORT_MAX", "BATCH"):
        monkeypatch.setattr(shortlist, name, 2)
    monkeypatch.setattr(shortlist, "SHORT_MIN", 1)
    reached: Counter[str] = Counter()
    for seed in range(20):
        reached += world(SEED_FIRST + seed).reached
    assert reached["evicted for a claim"] > 30
    assert reached["dropped from host"]


PRINT_DIGESTS = """
from test_simulation import world
print(*(world(seed).digest.hexdigest() for seed in range(6)))
"""


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    """A set that was iterated anywhere in the core would order things by the hash seed."""
    first, second = digests_under_two_hash_seeds(PRINT_DIGESTS)
    assert len(first) == 6
    assert first == second


@pytest.mark.parametrize(
    "mutant", MUTANTS + RATE_MUTANTS + PREFETCH_MUTANTS, ids=lambda mutant: mutant.what.replace(" ", "-")
)
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    core = load(mutant)
    broken = vars(core)["InvariantBroken"]
    assert broken is not InvariantBroken, "the mutant is a copy, not the real core"

    def catches(seed: int) -> bool:
        try:
            world(seed, core)
        except (broken, Violated):
            return True
        return False

    assert is_caught(mutant, MUTANT_SEEDS, catches), "no history told it from the real core"
