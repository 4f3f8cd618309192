"""Partial residency: exactly the chunks that are needed go, and only the missing ones come back.

Covers: cutting victims, what a partly evicted model holds, restoring the rest, failures and deaths in
between, the choice between a tail and a whole model, and models on the wrong device. Does not cover: long
random histories (``test_simulation``), which the same rules are judged in.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from scene import Scene, device_quota, model, of, the

from packer import estimate, residency, room
from packer.events import (
    Action,
    Cancelled,
    DeviceSeen,
    Drop,
    Evict,
    Grant,
    PackFound,
    Planned,
    RefusalReason,
    Refuse,
    Restore,
    RestoreFailed,
    ServingBegun,
    ServingEnded,
    Ticked,
    TierBudgetSeen,
    WorkerDied,
)
from packer.residency import InvariantBroken
from packer.types import MIB, ModelSpec, TenantQuota, TenantSpec, Tier


def chunked(text: str, *chunks_mib: int, workspace_mib: int = 0) -> ModelSpec:
    spec = model(text, sum(chunks_mib), workspace_mib * MIB)
    return replace(spec, chunk_bytes=tuple(mib * MIB for mib in chunks_mib))


A = chunked("acme/a", 10, 10, 10, 10)
B = chunked("bolt/b", 10, 10, 10, 10)


def held_mib(scene: Scene, spec: ModelSpec) -> int:
    view = residency.model_view(scene.node, spec.ref)
    assert view is not None
    assert view.device_bytes % MIB == 0
    return view.device_bytes // MIB


def cut(free_mib: int) -> tuple[Scene, list[Action]]:
    """A was warm and idle and gave what B needed beyond ``free_mib``; returns the orders of that step."""
    scene = Scene(A, B, devices_mib=(40 + free_mib,))
    scene.warm(A)
    return scene, scene.later(10_000).ask(B)


def test_exactly_the_chunks_that_are_needed_go() -> None:
    scene, actions = cut(25)
    evict = the(actions, Evict)
    assert (evict.ref, evict.keep_chunks) == (A.ref, 2), "15 are short, two chunks of 10 cover them"
    assert held_mib(scene, A) == 40, "held until they are gone"
    restore = the(scene.evicted(evict), Restore)
    assert (restore.ref, scene.state(A), held_mib(scene, A)) == (B.ref, "partial", 20)
    assert residency.device_bytes_used(scene.node, "cpu:0") == 60 * MIB


def test_a_byte_less_room_takes_a_chunk_more() -> None:
    small = chunked("core/s", 10, 10, workspace_mib=0)
    scene = Scene(A, small, devices_mib=(50,))
    scene.warm(A)
    assert the(scene.ask(small), Evict).keep_chunks == 3
    scene = Scene(A, replace(small, workspace_bytes=1), devices_mib=(50,))
    scene.warm(A)
    assert the(scene.ask(small), Evict).keep_chunks == 2


def test_the_workspace_goes_first() -> None:
    """A model that can not run needs none."""
    roomy = chunked("acme/r", 10, 10, workspace_mib=20)
    scene = Scene(roomy, B, devices_mib=(60,))
    scene.warm(roomy)
    evict = the(scene.ask(B), Evict)
    assert evict.keep_chunks == 1, "workspace and one chunk are 30, 20 were short, and a part can not run"
    scene.evicted(evict)
    assert held_mib(scene, roomy) == 10


def test_only_the_missing_chunks_come_back_and_then_it_is_granted() -> None:
    scene, actions = cut(25)
    scene.settle(actions)
    scene.settle(scene.finish(2))
    actions = scene.later(10_000).ask(A)
    assert not of(actions, Grant)
    evict = the(actions, Evict)
    assert (evict.ref, evict.keep_chunks) == (B.ref, 2), "only 15 are short, for the 20 that are missing"
    restore = the(scene.evicted(evict), Restore)
    assert (restore.ref, restore.first_chunk, restore.from_tier) == (A.ref, 2, Tier.DISK)
    assert (held_mib(scene, A), scene.state(A)) == (40, "restoring")
    grant = the(scene.later(80).restored(restore), Grant)
    assert (grant.ref, grant.tier) == (A.ref, Tier.DISK)


def test_a_part_is_restored_from_the_fastest_whole_copy() -> None:
    scene = Scene(A, B, devices_mib=(65,), host_mib=100)
    scene.feed(PackFound(A.ref, 30 * MIB, 30 * MIB))
    scene.warm(A)
    assert residency.tier_bytes_used(scene.node, Tier.HOST) == 30 * MIB
    scene.warm(B)
    assert scene.state(A) == "partial"
    restore = the(scene.settle(scene.ask(A)), Restore)
    assert (restore.from_tier, restore.first_chunk) == (Tier.HOST, 2)


def test_a_part_from_disk_fills_a_host_segment_with_all_of_it() -> None:
    """So two models that take turns on a device slightly too small read their packs once, not each turn."""
    scene = Scene(A, B, devices_mib=(65,))
    scene.warm(A)
    scene.warm(B)
    scene.feed(TierBudgetSeen(Tier.HOST, 100 * MIB))
    sources = []
    for spec in (A, B) * 3:
        restore = the(scene.settle(scene.ask(spec)), Restore)
        scene.settle(scene.later(1_000).finish(scene.requests))
        sources.append((restore.first_chunk, restore.from_tier, restore.host_bytes))
    pack_bytes = 5 * MIB
    assert sources == [(2, Tier.DISK, pack_bytes)] * 2 + [(2, Tier.HOST, 0)] * 4
    assert residency.tier_bytes_used(scene.node, Tier.HOST) == 2 * pack_bytes


def test_a_part_from_disk_fills_no_host_segment_that_has_no_room() -> None:
    scene = Scene(A, B, devices_mib=(65,))
    scene.warm(A)
    scene.warm(B)
    scene.feed(TierBudgetSeen(Tier.HOST, 5 * MIB - 1))
    restore = the(scene.settle(scene.ask(A)), Restore)
    assert (restore.first_chunk, restore.from_tier, restore.host_bytes) == (2, Tier.DISK, 0)


def test_a_part_that_fills_a_host_segment_is_expected_to_read_all_of_it() -> None:
    scene = Scene(A, B, devices_mib=(65,))
    scene.warm(A)
    scene.warm(B)
    charged = []
    for host_mib in (1, 100):
        scene.feed(TierBudgetSeen(Tier.HOST, host_mib * MIB))
        restore = the(scene.evicted(the(scene.ask(A), Evict)), Restore)
        model = scene.node.models[A.ref]
        charged.append((model.moving_bytes, bool(restore.host_bytes)))
        scene.settle(scene.restored(restore, filled=False))
        scene.settle(scene.finish(scene.requests))
        scene.warm(B)
    assert charged == [(20 * MIB, False), (40 * MIB, True)]


def test_a_model_without_a_copy_goes_as_a_whole() -> None:
    """The origin gives whole models only, so its first chunks would be of no use."""
    scene = Scene(A, B, devices_mib=(65,), disk_mib=0)
    scene.warm(A)
    assert the(scene.ask(B), Evict).keep_chunks == 0


def test_a_part_whose_copy_went_is_loaded_as_a_whole_in_its_place() -> None:
    scene, actions = cut(25)
    scene.settle(actions)
    scene.settle(scene.finish(2))
    scene.settle(scene.feed(TierBudgetSeen(Tier.DISK, 0)))
    scene.settle(scene.feed(DeviceSeen("cpu:0", 200 * MIB)))
    restore = the(scene.ask(A), Restore)
    assert (restore.from_tier, restore.first_chunk) == (Tier.ORIGIN, 0)
    assert held_mib(scene, A) == 40


def test_a_part_is_cut_further_and_then_goes() -> None:
    scene, actions = cut(25)
    scene.settle(actions)
    small = [chunked(f"core/s{i}", 5) for i in range(5)]
    scene.specs = (A, B, *small)
    scene.plan(A, B, *small)
    kept = []
    for spec in small:
        kept += [
            evict.keep_chunks for evict in of(scene.settle(scene.ask(spec)), Evict) if evict.ref == A.ref
        ]
    assert kept == [1, 0], "5 were free; then 10 a time"
    assert scene.state(A) == "absent"


def test_the_tail_of_a_warm_model_is_left_alone_while_cold_ones_are_enough() -> None:
    cold = chunked("core/c", 10, 10, 10)
    scene = Scene(A, cold, B, devices_mib=(75,))
    scene.warm(cold)
    scene.later(3_600_000)
    for _ in range(5):
        scene.warm(A)
        scene.later(1_000)
    evicts = of(scene.ask(B), Evict)
    assert [(evict.ref, evict.keep_chunks) for evict in evicts] == [(cold.ref, 0), (A.ref, 3)]


def test_a_piece_of_one_model_is_taken_where_many_small_ones_would_cost_more() -> None:
    """Every model that must be restored costs the fixed part again."""
    crumbs = [chunked(f"acme/c{i}", 1) for i in range(20)]
    large = chunked("bolt/l", *[10] * 10)
    wanted = chunked("core/w", 20)
    scene = Scene(*crumbs, large, wanted, devices_mib=(120,))
    for spec in (*crumbs, large):
        scene.warm(spec)
    scene.warm(large)
    evicts = of(scene.later(1_000).ask(wanted), Evict)
    assert [(evict.ref, evict.keep_chunks) for evict in evicts] == [(large.ref, 8)]


def test_chunks_of_a_model_that_somebody_waits_for_go_last() -> None:
    scene = Scene(A, B, chunked("core/c", 10), devices_mib=(65,))
    scene.warm(A)
    scene.settle(scene.ask(B))
    assert scene.state(A) == "partial"
    scene.ask(A)  # waits: B is leased
    other = chunked("dora/d", 5)
    scene.specs = (*scene.specs, other)
    scene.plan(*scene.specs)
    assert not of(scene.ask(other), Evict), "the room beside B is promised to the rest of A"
    assert held_mib(scene, A) == 20


# --- failures -------------------------------------------------------------------------------------


def restoring_the_rest() -> tuple[Scene, Restore]:
    scene, actions = cut(25)
    scene.settle(actions)
    scene.settle(scene.finish(2))
    restore = the(scene.evicted(the(scene.later(10_000).ask(A), Evict)), Restore)
    assert restore.first_chunk == 2
    return scene, restore


def failed(order: Restore, kept_chunks: int, **flags: bool) -> RestoreFailed:
    return RestoreFailed(
        order.ref, order.device, order.from_tier, "no", order=order.order, kept_chunks=kept_chunks, **flags
    )


@pytest.mark.parametrize(("kept", "state", "mib"), [(2, "partial", 20), (1, "partial", 10), (0, "absent", 0)])
def test_a_failed_restore_leaves_what_the_worker_says(kept: int, state: str, mib: int) -> None:
    scene, restore = restoring_the_rest()
    scene.feed(failed(restore, kept))
    assert (scene.state(A), held_mib(scene, A)) == (state, mib)
    again = the(scene.later(200).feed(Ticked()), Restore)
    assert again.first_chunk == kept
    assert the(scene.restored(again), Grant)


def test_a_failed_restore_leaves_no_more_than_was_there() -> None:
    scene, restore = restoring_the_rest()
    scene.feed(failed(restore, 4))
    assert held_mib(scene, A) == 20


def test_a_corrupt_copy_is_dropped_and_the_whole_model_comes_from_the_origin() -> None:
    scene, restore = restoring_the_rest()
    actions = scene.feed(failed(restore, 2, corrupt=True))
    again = the(actions, Restore)
    assert the(actions, Drop).tier is Tier.DISK
    assert (again.from_tier, again.first_chunk) == (Tier.ORIGIN, 0)
    assert held_mib(scene, A) == 40


def test_a_dead_worker_takes_the_first_chunks_with_it() -> None:
    scene, actions = cut(25)
    evict = the(actions, Evict)
    scene.feed(WorkerDied("acme", "cpu:0"))
    assert scene.evicted(evict) == [], "the answer comes too late"
    assert (scene.state(A), held_mib(scene, A)) == ("absent", 0)
    scene, actions = cut(25)
    scene.evicted(the(actions, Evict))
    scene.feed(WorkerDied("acme", "cpu:0"))
    assert (scene.state(A), held_mib(scene, A)) == ("absent", 0)


def test_a_part_of_a_model_that_left_the_plan_goes() -> None:
    scene, actions = cut(25)
    scene.evicted(the(actions, Evict))
    gone = scene.plan(B)
    assert the(gone, Evict).keep_chunks == 0
    scene.settle(gone)
    assert residency.model_view(scene.node, A.ref) is None


def test_a_smaller_budget_takes_only_what_is_too_much() -> None:
    scene = Scene(A, B)
    scene.warm(A)
    scene.later(1_000).warm(B)
    evict = the(scene.feed(DeviceSeen("cpu:0", 71 * MIB)), Evict)
    assert (evict.ref, evict.keep_chunks) == (A.ref, 3)
    scene.evicted(evict)
    evict = the(scene.feed(DeviceSeen("cpu:0", 45 * MIB)), Evict)
    assert (evict.ref, evict.keep_chunks) == (A.ref, 0)


def test_a_device_that_gives_back_whole_models_only_is_asked_for_nothing_else() -> None:
    scene = Scene(A, B)
    scene.feed(DeviceSeen("cpu:0", 100 * MIB, partial=False))
    scene.warm(A)
    scene.later(1_000).warm(B)
    evict = the(scene.feed(DeviceSeen("cpu:0", 71 * MIB, partial=False)), Evict)
    assert (evict.ref, evict.keep_chunks) == (A.ref, 0)


def test_a_sick_device_keeps_no_chunk() -> None:
    scene, actions = cut(25)
    scene.evicted(the(actions, Evict))
    evict = the(scene.feed(DeviceSeen("cpu:0", 65 * MIB, healthy=False)), Evict)
    assert (evict.ref, evict.keep_chunks) == (A.ref, 0)


def test_a_plan_that_describes_other_chunks_waits_until_those_here_are_gone() -> None:
    """What is on a device is counted by the chunks that it came in."""
    scene, actions = cut(25)
    scene.evicted(the(actions, Evict))
    other = replace(A, chunk_bytes=(40 * MIB,))
    tenants = (TenantSpec("acme"), TenantSpec("bolt"))
    scene.feed(Planned(tenants, (other, B)))
    assert held_mib(scene, A) == 20
    scene.feed(WorkerDied("acme", "cpu:0"))
    scene.feed(Planned(tenants, (other, B)))
    assert scene.node.models[A.ref].spec is other


# --- devices and tenants --------------------------------------------------------------------------


def test_a_tenants_max_counts_the_chunks_that_stay() -> None:
    other = chunked("acme/o", 10, 10)
    quotas = {"acme": device_quota(max_mib=50)}
    scene = Scene(A, other, quotas=quotas)
    scene.warm(A)
    evict = the(scene.ask(other), Evict)
    assert (evict.ref, evict.keep_chunks) == (A.ref, 3), "30 and 20 are the 50 that it may hold"
    scene.settle(scene.evicted(evict))
    assert scene.node.tenants["acme"].device.used_bytes == 50 * MIB


def test_a_lender_keeps_its_reserve_to_the_chunk() -> None:
    quotas = {"acme": device_quota(reserved_mib=20), "bolt": device_quota(reserved_mib=40)}
    scene = Scene(A, B, quotas=quotas, devices_mib=(65,))
    scene.warm(A)
    assert the(scene.ask(B), Evict).keep_chunks == 2


def test_chunks_on_a_device_that_can_not_take_the_rest_are_given_up_for_one_that_can() -> None:
    scene = Scene(A, B, devices_mib=(65, 30))
    scene.warm(A)
    scene.settle(scene.ask(B))  # leased on cpu:0 from here on
    assert (scene.state(A), scene.device(A), scene.device(B)) == ("partial", "cpu:0", "cpu:0")
    assert not of(scene.ask(A), Evict), "the other device is too small for all of it"
    evict = the(scene.feed(DeviceSeen("cpu:1", 40 * MIB)), Evict)
    assert (evict.ref, evict.device, evict.keep_chunks) == (A.ref, "cpu:0", 0)
    restore = the(scene.evicted(evict), Restore)
    assert (restore.device, restore.first_chunk) == ("cpu:1", 0)


def test_who_waits_for_the_rest_is_told_when_it_can_never_come() -> None:
    scene, actions = cut(25)
    scene.settle(actions)
    scene.ask(A)
    evict = the(scene.feed(DeviceSeen("cpu:0", 39 * MIB)), Evict)
    refusal = the(scene.evicted(evict), Refuse)
    assert refusal.reason is RefusalReason.NEVER_FITS


def test_cancelled_waiters_leave_the_part_where_it_is() -> None:
    scene, actions = cut(25)
    scene.settle(actions)
    scene.ask(A)
    assert not of(scene.feed(Cancelled("r3")), Evict)
    assert (scene.state(A), held_mib(scene, A)) == ("partial", 20)


def test_estimates_are_of_the_missing_bytes() -> None:
    scene, actions = cut(25)
    scene.settle(actions)
    part_ms = residency.restore_ms_estimate(scene.node, A.ref)
    scene.feed(WorkerDied("acme", "cpu:0"))
    whole_ms = residency.restore_ms_estimate(scene.node, A.ref)
    assert 0 < part_ms < whole_ms


def test_the_time_of_a_part_is_not_taken_for_that_of_the_whole() -> None:
    large, other = chunked("acme/l", *[1000] * 4), chunked("bolt/o", *[1000] * 4)
    scene = Scene(large, other, devices_mib=(6000,))
    for spec in (large, other):
        scene.feed(PackFound(spec.ref, 2700 * MIB, 2700 * MIB))
    scene.warm(large)
    scene.warm(other)
    restore = the(scene.settle(scene.ask(large)), Restore)
    assert restore.first_chunk == 2
    node = scene.node
    before_ms = room.restore_ms_from(node, node.models[large.ref], Tier.DISK)
    for _ in range(9):
        estimate.note_restore(node.learned, node.models[large.ref].history, Tier.DISK, 2000 * MIB, 5_000)
    after_ms = room.restore_ms_from(node, node.models[large.ref], Tier.DISK)
    assert before_ms < 9_000 < after_ms < 11_000, "half of it took 5 s"


def test_whole_models_only_where_somebody_asked_for_it() -> None:
    scene = Scene(A, B, devices_mib=(65,))
    scene.node.partial = False
    scene.warm(A)
    assert the(scene.ask(B), Evict).keep_chunks == 0


def test_two_models_that_want_the_same_room_are_both_served() -> None:
    """Each is served before its chunks are taken again: nobody steals for ever."""
    scene = Scene(A, B, devices_mib=(65,), quotas={"acme": TenantQuota(), "bolt": TenantQuota()})
    granted = 0
    for round_number in range(10):
        spec = (A, B)[round_number % 2]
        actions = scene.settle(scene.ask(spec))
        granted += len(of(actions, Grant))
        actions += scene.settle(scene.later(100).finish(scene.requests))
        assert len(of(actions, Evict)) <= 1
        assert len(of(actions, Restore)) == 1
    assert granted == 10


def test_check_finds_a_chunk_that_is_not_counted() -> None:
    scene, actions = cut(25)
    scene.evicted(the(actions, Evict))
    scene.node.models[A.ref].resident_chunks = 3
    with pytest.raises(InvariantBroken, match="3 of 4 chunks"):
        residency.check(scene.node, full=True)


# --- serving while the rest comes -----------------------------------------------------------------


def test_requests_run_while_layers_still_come_and_the_stay_is_one() -> None:
    scene = Scene(A)
    scene.warm(A)
    scene.settle(scene.feed(DeviceSeen("cpu:0", 0)))
    scene.feed(DeviceSeen("cpu:0", 100 * MIB))
    order = the(scene.ask(A), Restore)
    begun = scene.later(40).feed(ServingBegun(A.ref, order.device, order.order, 10))
    grant = the(begun, Grant)
    assert (grant.tier, grant.restore_ms) == (order.from_tier, 40)
    # Who comes now sees where the weights were; nobody may take it away.
    assert the(scene.ask(A), Grant).tier is order.from_tier
    assert scene.feed(ServingBegun(A.ref, order.device, order.order)) == []
    assert not of(scene.restored(order), Grant)
    scene.settle(scene.finish(3))
    assert scene.node.models[A.ref].leases == 1
    scene.settle(scene.finish(2))
    assert scene.node.models[A.ref].idle


def test_a_restore_that_fails_after_all_pins_nothing_and_the_next_one_serves() -> None:
    scene = Scene(A)
    scene.warm(A)
    scene.settle(scene.feed(DeviceSeen("cpu:0", 0)))
    scene.feed(DeviceSeen("cpu:0", 100 * MIB))
    order = the(scene.ask(A), Restore)
    scene.feed(ServingBegun(A.ref, order.device, order.order))
    failed = scene.feed(RestoreFailed(A.ref, order.device, order.from_tier, "a fault", order=order.order))
    assert scene.node.models[A.ref].device is None
    # The caller's request ends by itself, late, and is taken for nothing else.
    scene.settle(failed + scene.later(60_000).ask(A))
    assert scene.state(A) == "resident"
    scene.finish(2)
    assert scene.node.models[A.ref].leases == 1


def test_nobody_is_let_in_while_a_chunk_of_what_served_already_is_mended() -> None:
    scene = Scene(A)
    scene.warm(A)
    scene.settle(scene.feed(DeviceSeen("cpu:0", 0)))
    scene.feed(DeviceSeen("cpu:0", 100 * MIB))
    order = the(scene.ask(A), Restore)
    assert scene.feed(ServingEnded(A.ref, order.device, order.order)) == [], "nobody had been let in"
    scene.feed(ServingBegun(A.ref, order.device, order.order))
    assert of(scene.ask(A), Grant)
    assert not scene.feed(ServingEnded(A.ref, order.device, order.order + 1)), "of an order long over"
    assert of(scene.ask(A), Grant)
    scene.feed(ServingEnded(A.ref, order.device, order.order))
    assert not of(scene.ask(A), Grant)
    assert scene.state(A) == "restoring"
    assert len(of(scene.restored(order), Grant)) == 1
    # Those who were let in end late, and the stay that followed is not theirs.
    scene.settle(scene.finish(2) + scene.finish(3))
    assert scene.node.models[A.ref].leases == 1
