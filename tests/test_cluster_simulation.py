"""Nodes and control in hundreds of strange histories over a bad network: safe always, and alive afterwards.

Covers: seeded clusters, the rare branches they must reach, and the same trace whatever the hash seed. Does
not cover: planted bugs (``test_mutation`` and ``scripts/mutation.py``), one node's core by itself
(``test_simulation``), single rules (``test_cluster``, ``test_uplink``, ``test_control``). Thousands of seeds:
``scripts/simulate_faults.py``.
"""

from __future__ import annotations

import os
from collections import Counter

from cluster_simulation import Fleet
from hash_seeds import digests_under_two_hash_seeds

SEEDS = range(19, 82)
# Fresh histories on every commit without a clock or randomness: another range can be named.
SEED_FIRST = int(os.environ.get("BUNK_SEED_FIRST", "0"))

RARE = (
    "NoteBack",
    "NoteSilent",
    "NudgeHolder",
    "WakeAsks",
    "a backup was put back",
    "a beat of another release",
    "a beat with a plan of an earlier epoch",
    "a disk was full",
    "a further copy was due",
    "a gang was evicted for a claim",
    "a gang was refused for want of devices",
    "a gang was restored",
    "a late beat",
    "a limit was divided among nodes",
    "a node crashed",
    "a node was removed",
    "a peer gave nothing",
    "a peer's pack was corrupt",
    "a plan was skipped",
    "a removed node joined again",
    "a request came twice",
    "a request met a partition",
    "a request was lost",
    "a routed caller left",
    "a share was halved",
    "a tenant was removed",
    "a turn was granted",
    "an answer of another release",
    "an answer was cut short",
    "an answer was lost",
    "cancelled after grant",
    "cancelled while waiting",
    "control crashed during a turn",
    "crashed while packing",
    "crashed with a lease",
    "device became unhealthy",
    "knew again what was learned",
    "knew again what was owed",
    "knew again what was spent",
    "let in under a limit of the fleet",
    "loaded from a peer's pack",
    "met again",
    "nobody listens",
    "parted",
    "read an origin",
    "refused for a share",
    "routed: 200",
    "routed: 503",
    "routed: 507",
    "routed: 599",
    "several holders",
    "waits for another's turn",
    "was deleted and stopped",
    "worker died while leased",
)


def test_every_cluster_is_safe_and_ends_well_and_together_they_reach_every_rare_branch() -> None:
    reached: Counter[str] = Counter()
    for seed in SEEDS:
        reached += Fleet(SEED_FIRST + seed).run().reached
    missed = [name for name in RARE if not reached[name]]
    assert not missed, f"these branches were never taken: {missed}"


def test_a_router_of_its_own_follows_every_cluster() -> None:
    """In the end it knows what control knows, whatever was lost, and however often control came anew."""
    reached: Counter[str] = Counter()
    for seed in range(46, 56):
        fleet = Fleet(SEED_FIRST + seed)
        fleet.follows = True
        reached += fleet.run().reached
    assert reached["a router heard a control that was started again"]
    assert reached["a router's answer was lost"]
    assert reached["a router took no old answer"]
    assert reached["a router was started again with what it kept"]


PRINT_DIGESTS = """
from cluster_simulation import Fleet
print(*(Fleet(seed).run().digest.hexdigest() for seed in range(4)))
"""


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    """A set that was iterated in either core, or at either edge, would order things by the hash seed."""
    first, second = digests_under_two_hash_seeds(PRINT_DIGESTS)
    assert len(first) == 4
    assert first == second
