"""What is brought into host memory ahead of need: what, when, in whose room, and what ends it.

Covers: ``packer/prefetch.py`` in single scenes. Does not cover: strange histories (``test_simulation``), the
process that fills a segment (``test_orders_tiers``) or what it is worth (``scripts/bench_prefetch.py``).
"""

from __future__ import annotations

import pytest
from scene import Scene, model, of, the

from packer import prefetch, remember
from packer.decisions import Kind
from packer.events import (
    Action,
    DrainAsked,
    Drop,
    Dropped,
    Fill,
    Filled,
    FillFailed,
    Grant,
    PackFound,
    PolicyChosen,
    PrefetchChosen,
    Restore,
    RestoreFailed,
    StopFill,
    Ticked,
    TierBudgetSeen,
    UsesRemembered,
)
from packer.intensity import Ranking
from packer.ledger import CopyState
from packer.prefetch import FIRST_MS, LOOK_MS, PAUSE_PARTS, RETRY_MS
from packer.types import MIB, ByteQuota, ModelSpec, TenantQuota, Tier

HOT, WARM, COLD, OTHER = (model(f"acme/{name}", 40) for name in ("hot", "warm", "cold", "other"))
THEIRS = model("umbrella/theirs", 40)
COPY_MIB = 10


def uses_of(counts: dict[ModelSpec, int]) -> list[UsesRemembered]:
    """What a node knows of models that were used so often, a minute apart, up to a minute ago."""
    past = Scene(*counts, devices_mib=(1000,))
    for number in range(max(counts.values())):
        past.later(60_000)
        for spec, count in counts.items():
            if number >= max(counts.values()) - count:
                past.settle(past.ask(spec))
                past.settle(past.finish(past.requests))
    past.later(60_000)
    return [remember.of_model(past.node.models[spec.ref], past.now_ms) for spec in counts]


def restarted(
    counts: dict[ModelSpec, int],
    host_mib: int = 100,
    on: bool = True,
    quotas: dict[str, TenantQuota] | None = None,
) -> Scene:
    """A node that has just started, with the packs of these models and what was known of their uses."""
    scene = Scene(*counts, host_mib=host_mib, quotas=quotas)
    scene.feed(PrefetchChosen(on))
    for known in uses_of(counts):
        scene.feed(known)
    for spec in counts:
        scene.feed(PackFound(spec.ref, COPY_MIB * MIB, COPY_MIB * MIB))
    return scene


def first(scene: Scene) -> list[Action]:
    return scene.later(FIRST_MS).feed(Ticked())


def filled(scene: Scene, order: Fill, took_ms: int = 10) -> list[Action]:
    return scene.later(took_ms).feed(Filled(order.ref, order.order))


def until_idle(scene: Scene) -> list[Fill]:
    """Every order that follows when each is carried out and nobody comes."""
    found: list[Fill] = []
    todo = of(first(scene), Fill)
    while todo:
        found += todo
        scene.settle(filled(scene, todo[0]))
        todo = of(scene.later(LOOK_MS).feed(Ticked()), Fill)
    return found


def test_after_a_restart_the_most_valuable_copies_come_first_and_are_restored_from() -> None:
    scene = restarted({COLD: 1, HOT: 40, WARM: 10})
    order = the(first(scene), Fill)
    assert (order.ref, order.host_bytes) == (HOT.ref, COPY_MIB * MIB)
    assert [decision.kind for decision in scene.node.why] == [Kind.PREFETCHED]
    assert scene.node.models[HOT.ref].host.state is CopyState.FILLING
    filled(scene, order)
    restore = the(scene.ask(HOT), Restore)
    assert restore.from_tier is Tier.HOST
    # The others follow, but for the room that stays free for one copy.
    scene = restarted({COLD: 1, HOT: 40, WARM: 10}, host_mib=35)
    assert [order.ref for order in until_idle(scene)] == [HOT.ref, WARM.ref]


def test_nothing_is_brought_before_the_packs_are_found_or_when_it_is_off() -> None:
    scene = restarted({HOT: 40})
    assert not of(scene.later(FIRST_MS - 1).feed(Ticked()), Fill)
    assert not of(first(restarted({HOT: 40}, on=False)), Fill)
    scene = restarted({HOT: 40})
    scene.feed(PolicyChosen("lru"))
    assert not of(first(scene), Fill), "another policy says nothing of what will be used"
    scene = restarted({HOT: 40})
    scene.feed(DrainAsked())
    assert not of(first(scene), Fill)
    assert not of(first(restarted({HOT: 40}, host_mib=0)), Fill)


def test_a_model_that_is_used_less_than_once_a_week_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "USES_PER_MS_MIN", 1.0)
    assert not of(first(restarted({HOT: 40})), Fill)


def test_a_restore_that_needs_the_disk_ends_it_and_waits_for_nothing() -> None:
    scene = restarted({HOT: 40, WARM: 10})
    order = the(first(scene), Fill)
    actions = scene.ask(WARM)
    assert of(actions, StopFill) == [StopFill(HOT.ref, order.order)]
    assert the(actions, Restore).from_tier is Tier.DISK
    scene.feed(FillFailed(HOT.ref, "killed", order.order, stopped=True))
    assert scene.node.models[HOT.ref].host.state is CopyState.ABSENT
    # While it comes nothing is filled; afterwards what was stopped is tried again.
    assert not of(scene.later(LOOK_MS).feed(Ticked()), Fill)
    coming = [action for action in scene.settle(actions) if isinstance(action, Fill)]
    assert [fill.ref for fill in coming] == [HOT.ref]


def test_a_request_for_the_very_model_restores_it_from_disk_beside_its_end() -> None:
    scene = restarted({HOT: 40})
    order = the(first(scene), Fill)
    actions = scene.ask(HOT)
    restore = the(actions, Restore)
    assert (restore.from_tier, restore.host_bytes) == (Tier.DISK, 0)
    assert of(actions, StopFill)
    # It was done before it could be stopped: then the copy is there as well.
    assert of(scene.restored(restore), Grant)
    filled(scene, order)
    assert scene.node.models[HOT.ref].host.state is CopyState.HELD
    assert scene.node.models[HOT.ref].disk.readers == 0


def test_a_bad_pack_is_not_dropped_while_it_is_open_and_not_tried_again_at_once() -> None:
    scene = restarted({HOT: 40})
    order = the(first(scene), Fill)
    restore = the(scene.ask(HOT), Restore)
    bad = RestoreFailed(HOT.ref, restore.device, Tier.DISK, "bad", corrupt=True, order=restore.order)
    assert not of(scene.feed(bad), Drop)
    scene.feed(FillFailed(HOT.ref, "bad", order.order))
    scene = restarted({HOT: 40})
    order = the(first(scene), Fill)
    scene.feed(FillFailed(HOT.ref, "bad", order.order))
    assert not of(scene.later(RETRY_MS - 1).feed(Ticked()), Fill)
    scene.settle(scene.ask(HOT))
    scene.settle(scene.finish(1))
    assert scene.state(HOT) == "resident"


def test_the_disk_has_a_pause_of_nine_times_what_it_worked() -> None:
    scene = restarted({HOT: 40, WARM: 10})
    took_ms = 1_000
    assert not of(filled(scene, the(first(scene), Fill), took_ms), Fill)
    assert not of(scene.later(PAUSE_PARTS * took_ms - 1).feed(Ticked()), Fill)
    assert the(scene.later(1).feed(Ticked()), Fill).ref == WARM.ref


def test_another_tenants_copy_never_goes_for_one_that_nobody_asked_for() -> None:
    counts = {HOT: 40, OTHER: 1, THEIRS: 1}
    scene = restarted(counts, host_mib=30, on=False)
    for number, spec in enumerate((THEIRS, OTHER), start=1):
        scene.settle(scene.ask(spec))
        scene.settle(scene.finish(number))
    assert set(scene.node.in_host) == {THEIRS.ref, OTHER.ref}
    scene.feed(PrefetchChosen(True))
    actions = scene.later(FIRST_MS).feed(Ticked())
    # Ten of thirty stay free for the next restore, so one of the others must go: its own tenant's.
    drop = the(actions, Drop)
    assert drop.ref == OTHER.ref
    assert not of(actions, Fill), "the room is not free yet"
    assert the(scene.feed(Dropped(drop.ref, drop.tier, drop.order)), Fill).ref == HOT.ref
    # Where its own tenant has nothing of less value, it stays where it is.
    scene = restarted({HOT: 40, THEIRS: 1}, host_mib=20, on=False)
    scene.settle(scene.ask(THEIRS))
    scene.settle(scene.finish(1))
    scene.feed(PrefetchChosen(True))
    assert not of(scene.later(FIRST_MS).feed(Ticked()), Drop)


def test_a_copy_that_nobody_has_read_makes_room_for_the_next_restore() -> None:
    """Whatever it is worth: as if it had never been brought."""
    scene = restarted({HOT: 40, WARM: 10, THEIRS: 1}, host_mib=35)
    assert len(until_idle(scene)) == 2
    restore = the(scene.ask(THEIRS), Restore)
    assert restore.host_bytes == COPY_MIB * MIB, "room was kept for it"
    drop = next(action for action in scene.node.in_host.values() if action.host.state is CopyState.DROPPING)
    assert drop.ref == WARM.ref, "the least of what nobody has asked for"
    # What a restore has read is anybody's copy from then on.
    scene = restarted({HOT: 40, WARM: 10, THEIRS: 1}, host_mib=35)
    until_idle(scene)
    for spec in (HOT, WARM):
        assert the(scene.ask(spec), Restore).from_tier is Tier.HOST
    assert not scene.node.prefetch.ahead


def test_very_many_packs_are_gone_through_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LOOKED_MAX", 1)
    scene = restarted({COLD: 1, HOT: 40, WARM: 10})
    monkeypatch.setattr(prefetch, "USES_PER_MS_MIN", scene_rate(scene, WARM) / 2)
    assert not of(first(scene), Fill), "the first part has nothing worth it"
    # Nobody comes: it wakes itself until all parts were looked at.
    order = the(scene.later(LOOK_MS).feed(Ticked()), Fill)
    assert order.ref == HOT.ref
    filled(scene, order)
    assert the(scene.later(LOOK_MS).feed(Ticked()), Fill).ref == WARM.ref


def scene_rate(scene: Scene, spec: ModelSpec) -> float:
    return Ranking(scene.node.shared, scene.now_ms).uses_per_ms(scene.node.models[spec.ref].reuse)


def test_a_max_is_kept_and_a_smaller_tier_takes_it_back() -> None:
    most = TenantQuota(host=ByteQuota(0, COPY_MIB * MIB))
    scene = restarted({HOT: 40, WARM: 10}, quotas={"acme": most})
    assert [order.ref for order in until_idle(scene)] == [HOT.ref]
    scene = restarted({HOT: 40, WARM: 10})
    order = the(first(scene), Fill)
    actions = scene.feed(TierBudgetSeen(Tier.HOST, 5 * MIB))
    assert of(actions, StopFill)
    filled(scene, order)
    assert scene.node.models[HOT.ref].host.state is CopyState.DROPPING


def test_an_answer_to_another_order_changes_nothing() -> None:
    scene = restarted({HOT: 40})
    order = the(first(scene), Fill)
    scene.feed(Filled(HOT.ref, order.order + 1))
    scene.feed(Filled(WARM.ref, order.order))
    scene.feed(FillFailed(HOT.ref, "", order.order + 1))
    assert scene.node.prefetch.filling is scene.node.models[HOT.ref]
    filled(scene, order)
    scene.feed(FillFailed(HOT.ref, "", order.order))
    assert scene.node.models[HOT.ref].host.state is CopyState.HELD
