"""Models that need several devices, in thousands of strange histories: whole or not at all, and never stuck.

Covers: worlds with gangs, the branches they must reach, the same trace whatever the hash seed, and planted
bugs. Does not cover: single rules (``test_gangs``) or worlds without (``test_simulation``).
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from catching_seeds import is_caught
from gang_mutants import GANG_MUTANTS
from gang_world import GangWorld
from hash_seeds import digests_under_two_hash_seeds
from mutants import Mutant, load
from simulated_hands import Violated
from test_simulation import world

from packer.residency import InvariantBroken

SEEDS = range(20)
SEED_FIRST = int(os.environ.get("BUNK_SEED_FIRST", "0"))
MUTANT_SEEDS = range(200)

REACHED = (
    "a device of a gang became unhealthy",
    "a gang held some of its devices",
    "a gang was evicted for a claim",
    "a gang was measured where it is held",
    "a gang was refused for want of devices",
    "a gang was restored",
    "evicted for a gang",
    "regrouped while on a device",
    "the worker of a gang died",
    "two gangs waited for room",
)


def test_every_history_with_gangs_is_safe_and_ends_well() -> None:
    reached: Counter[str] = Counter()
    for seed in SEEDS:
        reached += world(SEED_FIRST + seed, kind=GangWorld).reached
    assert not [name for name in REACHED if not reached[name]], dict(reached)


PRINT_DIGESTS = """
from gang_world import GangWorld
from test_simulation import world
print(*(world(seed, kind=GangWorld).digest.hexdigest() for seed in range(3)))
"""


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    first, second = digests_under_two_hash_seeds(PRINT_DIGESTS)
    assert len(first) == 3
    assert first == second


@pytest.mark.parametrize("mutant", GANG_MUTANTS, ids=lambda mutant: mutant.what.replace(" ", "-"))
def test_a_planted_bug_of_gangs_is_caught(mutant: Mutant) -> None:
    core = load(mutant)

    def catches(seed: int) -> bool:
        try:
            world(seed, core, kind=GangWorld)
        except (vars(core)["InvariantBroken"], InvariantBroken, Violated):
            return True
        return False

    assert is_caught(mutant, MUTANT_SEEDS, catches), "no history told it from the real core"
