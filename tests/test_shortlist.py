"""Ranking very many: what is looked at is bounded, everything is looked at in turn, and choices stay good.

Covers: ``packer/shortlist.py``, and the core's choice of victims among more models than it ranks at once, on
the device and in the host tier. Does not cover: how long it takes (``scripts/bench_core.py``), or the
choice among few (``test_residency``).
"""

from __future__ import annotations

import random

from scene import Scene, model, of

from packer import residency
from packer.events import Action, Drop, Event, Evict, Restore
from packer.shortlist import BATCH, EXACT_MAX, SHORT_MAX, Shortlist
from packer.types import ModelSpec

MANY = 2 * EXACT_MAX


def test_few_are_always_ranked_in_full() -> None:
    shortlist: Shortlist[int] = Shortlist()
    shortlist.keep(range(SHORT_MAX))
    assert shortlist.look(range(EXACT_MAX)) is None
    assert shortlist.look(range(EXACT_MAX + 1)) is not None


def test_of_very_many_a_bounded_part_is_looked_at_and_all_in_turn() -> None:
    members = list(range(MANY))
    shortlist: Shortlist[int] = Shortlist()
    assert shortlist.look(members) is None  # nothing is known yet
    seen: dict[int, None] = {}
    for _ in range(-(-MANY // BATCH)):
        shortlist.keep([7, *range(100, 99 + SHORT_MAX)])
        looked_at = shortlist.look(members)
        assert looked_at is not None
        assert len(looked_at) == len(dict.fromkeys(looked_at)) <= SHORT_MAX + BATCH
        assert looked_at[0] == 7
        seen |= dict.fromkeys(looked_at)
    assert sorted(seen) == members


def test_a_short_list_that_ran_out_is_made_anew() -> None:
    shortlist: Shortlist[int] = Shortlist()
    shortlist.keep([1, 2, 3])
    assert shortlist.look(range(MANY)) is None


class Large(Scene):
    """A scene of so many models that everything can not be recounted after every step."""

    def feed(self, event: Event) -> list[Action]:
        actions = residency.step(self.node, event, self.now_ms)
        residency.check(self.node)
        return actions

    def use(self, spec: ModelSpec) -> list[Action]:
        actions = self.settle(self.later(1_000).ask(spec))
        return actions + self.settle(self.finish(self.requests))


def worn() -> tuple[Large, list[ModelSpec]]:
    """A full device with many models, each used once, the first the longest ago."""
    specs = [model(f"t{i % 3}/m{i:04}", 1) for i in range(MANY + 40)]
    made = Large(*specs, devices_mib=(MANY,))
    for spec in specs[:MANY]:
        made.use(spec)
    residency.check(made.node, full=True)
    return made, specs


def test_victims_among_very_many_are_the_oldest_and_not_what_is_used() -> None:
    made, specs = worn()
    hot = specs[5]
    evicted: list[str] = []
    for spec in specs[MANY:]:
        made.use(hot)
        actions = made.use(spec)
        assert of(actions, Restore)
        evicted += [order.ref.name for order in of(actions, Evict)]
    assert len(evicted) == 40
    assert hot.ref.name not in evicted
    assert max(evicted) < "m0060"  # all were among the first


def test_a_model_that_fell_in_value_is_found_within_a_turn() -> None:
    """Everything is used again but one, which stood far back in the order when the list was made."""
    made, specs = worn()
    left_out = specs[MANY - 1]
    made.use(specs[MANY])  # makes the list; m0000 goes
    rng = random.Random(1)
    for spec in rng.sample(specs[1 : MANY - 1], MANY - 2):
        made.use(spec)
        made.use(spec)
    evicted: list[str] = []
    for spec in specs[MANY + 1 : MANY + 2 + MANY // BATCH]:
        actions = made.use(spec)
        evicted += [order.ref.name for order in of(actions, Evict)]
    assert left_out.ref.name in evicted


def test_models_that_left_the_plan_go_first_among_very_many_too() -> None:
    made, specs = worn()
    gone = specs[MANY - 3]
    actions = made.plan(*[spec for spec in specs if spec is not gone])
    assert [order.ref for order in of(actions, Evict)] == [gone.ref]


def test_host_copies_among_very_many_give_way_to_what_is_worth_more() -> None:
    specs = [model(f"t{i % 3}/m{i:04}", 1) for i in range(EXACT_MAX + 60)]
    made = Large(*specs, devices_mib=(4,), host_mib=5 * (EXACT_MAX + 20))
    dropped: list[str] = []
    # From the origin, then from disk, which leaves host copies until the tier is full, then once more.
    for _ in range(2):
        for spec in specs:
            dropped += [drop.ref.name for drop in of(made.use(spec), Drop)]
    assert len(made.node.in_host) > EXACT_MAX
    hot = next(spec for spec in specs if made.node.models[spec.ref].host.held_bytes)
    dropped = []
    for spec in specs[:40]:
        made.use(hot)
        dropped += [drop.ref.name for drop in of(made.use(spec), Drop)]
    assert dropped
    assert hot.ref.name not in dropped
