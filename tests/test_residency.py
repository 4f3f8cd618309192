"""Scenarios of the residency core: event lists in, orders out, every invariant checked after each step.

Covers: restores, evictions, leases, failures, plans and budgets. Does not cover: quotas and fairness
(``test_quota``), or long random histories (``test_simulation``).
"""

from __future__ import annotations

import pytest
from scene import Scene, model, of, the

from packer import admission, queueing, residency, room, upkeep, victims
from packer.events import (
    Cancelled,
    DeviceSeen,
    DrainAsked,
    Drop,
    Dropped,
    Evict,
    Evicted,
    Finished,
    Grant,
    Pack,
    PackFailed,
    PackFound,
    RefusalReason,
    Refuse,
    Requested,
    Restore,
    Restored,
    RestoreFailed,
    Ticked,
    TierBudgetSeen,
    Wake,
    WorkerDied,
)
from packer.residency import InvariantBroken
from packer.types import MIB, ModelRef, Tier

A, B, C = model("acme/a", 40), model("bolt/b", 40), model("core/c", 40)


# --- restoring ------------------------------------------------------------------------------------

DAY_MS = 86_400_000


def test_a_cold_request_is_restored_from_the_origin_and_packed_beside_it() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    assert (restore.device, restore.from_tier, restore.first_chunk) == ("cpu:0", Tier.ORIGIN, 0)
    assert residency.device_bytes_used(scene.node, "cpu:0") == 40 * MIB
    assert restore.disk_bytes == 40 * MIB + 40 * MIB // 16 + MIB
    assert restore.pack_order not in (0, restore.order)
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == restore.disk_bytes
    actions = scene.later(300).restored(restore)
    grant = the(actions, Grant)
    assert (grant.request, grant.tier, grant.restore_ms) == ("r1", Tier.ORIGIN, 300)
    assert not of(actions, Pack), "it is being written already"
    scene.packed_beside(restore, 27)
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == 27 * MIB


def test_callers_of_a_restoring_model_join_it_and_a_resident_one_is_granted_at_once() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    assert not of(scene.later(50).ask(A), Restore)
    grants = of(scene.later(50).restored(restore), Grant)
    assert [(g.request, g.restore_ms) for g in grants] == [("r1", 100), ("r2", 50)]
    warm = the(scene.ask(A), Grant)
    assert (warm.tier, warm.restore_ms) == (Tier.DEVICE, 0)


def test_restores_prefer_host_over_disk_over_origin() -> None:
    scene = Scene(A, B, devices_mib=(60,), host_mib=100)
    scene.warm(A)
    scene.warm(B)
    from_disk = the(scene.settle(scene.ask(A)), Grant)
    assert from_disk.tier is Tier.DISK
    scene.settle(scene.finish(scene.requests))
    scene.warm(B)
    assert the(scene.settle(scene.ask(A)), Grant).tier is Tier.HOST


def test_a_restore_from_disk_reserves_host_room_and_keeps_it_only_when_filled() -> None:
    scene = Scene(A, host_mib=50)
    scene.feed(PackFound(A.ref, 30 * MIB, 31 * MIB))
    restore = the(scene.ask(A), Restore)
    assert (restore.from_tier, restore.host_bytes) == (Tier.DISK, 31 * MIB)
    assert residency.tier_bytes_used(scene.node, Tier.HOST) == 31 * MIB
    scene.restored(restore, filled=False)
    assert residency.tier_bytes_used(scene.node, Tier.HOST) == 0


def test_host_room_is_made_for_a_more_valuable_model_and_never_waited_for() -> None:
    scene = Scene(A, B, devices_mib=(60,), host_mib=35)
    for spec in (A, B):
        scene.feed(PackFound(spec.ref, 30 * MIB, 30 * MIB))
    scene.warm(A)
    scene.later(3_600_000)
    actions = scene.ask(B)
    assert the(actions, Drop).ref == A.ref, "A was last used an hour ago"
    scene.feed(Dropped(A.ref, Tier.HOST))
    restore = the(scene.evicted(the(actions, Evict)), Restore)
    assert restore.host_bytes == 30 * MIB


def test_a_copy_beneath_a_resident_model_goes_before_one_that_is_all_there_is() -> None:
    newcomer = model("acme/newcomer", 40)
    scene = Scene(A, B, newcomer, devices_mib=(A.image_bytes * 2 // MIB,), host_mib=65)
    for spec in (B, A, newcomer):
        scene.feed(PackFound(spec.ref, 30 * MIB, 30 * MIB))
    scene.warm(B)
    scene.later(300_000).warm(A)
    actions = scene.later(3_600_000).ask(newcomer)
    assert (the(actions, Evict).ref, the(actions, Drop).ref) == (B.ref, A.ref), "A is on the device still"


def test_of_two_devices_the_tighter_fit_is_taken() -> None:
    scene = Scene(A, devices_mib=(100, 50))
    assert the(scene.ask(A), Restore).device == "cpu:1"


def test_a_model_that_exactly_fills_the_device_fits_and_one_byte_more_never_does() -> None:
    exact, more = model("acme/exact", 100), model("acme/more", 99, MIB + 1)
    scene = Scene(exact, more)
    assert the(scene.ask(exact), Restore)
    refusal = the(scene.ask(more), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.NEVER_FITS, None)
    for number in (100 * MIB + 1, 99 * MIB, MIB + 1, 100 * MIB):
        assert str(number) in refusal.detail


def test_without_any_device_callers_are_told_to_come_back() -> None:
    refusal = the(Scene(A, devices_mib=()).ask(A), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.RESTORE_FAILED, victims.NO_DEVICE_RETRY_MS)


# --- evicting -------------------------------------------------------------------------------------


def test_a_cold_request_evicts_the_least_used_idle_model_and_nothing_else() -> None:
    small = [model(f"acme/m{i}", 30) for i in range(3)]
    wanted = model("acme/w", 30)
    scene = Scene(*small, wanted)
    for spec in small:
        scene.warm(spec)
        scene.later(10_000)
    scene.warm(small[0])
    evict = the(scene.ask(wanted), Evict)
    assert evict.ref == small[1].ref
    assert the(scene.evicted(evict), Restore).ref == wanted.ref


def test_a_leased_model_is_evicted_only_after_its_last_lease() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.settle(scene.ask(A))
    scene.ask(A)
    assert not of(scene.ask(B), Evict)
    assert not of(scene.finish(1), Evict)
    assert the(scene.finish(2), Evict).ref == A.ref


def test_a_model_is_not_evicted_before_its_pack_is_written() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    restore = the(scene.ask(A), Restore)
    scene.restored(restore)
    scene.finish(1)
    assert not of(scene.ask(B), Evict)
    assert the(scene.packed_beside(restore), Evict).ref == A.ref


def test_a_small_model_passes_a_waiting_large_one_only_into_free_room() -> None:
    busy, large, small, tiny = (model(f"acme/{n}", m) for n, m in (("b", 50), ("l", 60), ("s", 45), ("t", 5)))
    scene = Scene(busy, large, small, tiny)
    scene.settle(scene.ask(busy))
    assert not of(scene.ask(large), Restore), "it waits for the leased model"
    assert not of(scene.ask(small), Restore), "45 of the 50 free would cut into the 60 that were promised"
    scene.feed(Cancelled("r2"))
    assert scene.state(small) == "restoring", "nobody waits for the large one any more"
    assert the(scene.ask(tiny), Restore)


def test_a_claim_with_no_patience_left_makes_newcomers_of_a_busy_model_wait() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.settle(scene.ask(A))
    scene.ask(B)
    assert the(scene.ask(A), Grant)
    scene.later(queueing.CLAIM_PATIENCE_MS).feed(Ticked())
    assert not of(scene.ask(A), Grant)
    scene.finish(1)
    evict = the(scene.finish(3), Evict)
    assert evict.ref == A.ref
    assert the(scene.settle(scene.evicted(evict)), Grant).request == "r2"
    assert [g.request for g in of(scene.settle(scene.finish(2)), Grant)] == ["r4"]


def test_when_the_claim_goes_away_the_condemned_model_serves_again() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.settle(scene.ask(A))
    scene.ask(B)
    scene.later(queueing.CLAIM_PATIENCE_MS).feed(Ticked())
    scene.ask(A)
    grant = the(scene.feed(Cancelled("r2")), Grant)
    assert (grant.request, grant.tier, grant.restore_ms) == ("r3", Tier.DEVICE, 0)


# --- ends of requests -----------------------------------------------------------------------------


def test_cancelled_of_a_granted_request_ends_its_lease_and_later_words_are_ignored() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.settle(scene.ask(A))
    scene.ask(B)
    assert the(scene.feed(Cancelled("r1")), Evict).ref == A.ref
    assert scene.feed(Finished("r1")) == []
    assert scene.feed(Cancelled("r1")) == []
    assert scene.feed(Finished("never-seen")) == []


def test_a_model_that_nobody_waits_for_any_more_still_arrives_and_is_idle() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    scene.feed(Cancelled("r1"))
    assert not of(scene.restored(restore), Grant)
    assert scene.state(A) == "resident"


def test_a_request_name_that_is_in_use_is_a_defect_of_the_caller() -> None:
    scene = Scene(A)
    scene.ask(A)
    with pytest.raises(InvariantBroken, match="requested twice"):
        scene.feed(Requested("r1", A.ref, 1))


def test_a_deadline_refuses_with_the_time_that_the_restore_still_takes() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.settle(scene.ask(A))
    wakes = of(scene.ask(B, deadline_ms=500), Wake)
    assert wakes[0].at_ms == scene.now_ms + 500
    assert not of(scene.later(499).feed(Ticked()), Refuse)
    refusal = the(scene.later(1).feed(Ticked()), Refuse)
    assert refusal.reason is RefusalReason.TIMEOUT
    assert refusal.retry_ms == residency.restore_ms_estimate(scene.node, B.ref)


def test_the_core_asks_to_be_woken_again_when_a_wake_up_crossed_with_another_event() -> None:
    """The loop keeps only the earlier of two wake-ups, so a spent one must be replaced on its tick."""
    scene = Scene(A, B)
    restore = the(scene.ask(A, deadline_ms=500), Restore)
    scene.later(600).ask(B, deadline_ms=5_000)  # expires r1 before its tick arrives
    assert scene.state(A) == "restoring"
    assert any(wake.at_ms == 5_600 for wake in of(scene.feed(Ticked()), Wake))
    scene.restored(restore)


def test_unknown_models_are_refused_for_good() -> None:
    refusal = the(Scene(A).ask(B), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.UNKNOWN_MODEL, None)


def test_a_draining_node_refuses_who_waits_and_who_comes_and_lets_the_granted_finish() -> None:
    scene = Scene(A, B)
    scene.settle(scene.ask(A))
    restore = the(scene.ask(B), Restore)
    refused = the(scene.feed(DrainAsked()), Refuse)
    assert (refused.request, refused.reason) == ("r2", RefusalReason.DRAINING)
    assert the(scene.ask(A), Refuse).retry_ms == admission.DRAINING_RETRY_MS
    scene.restored(restore)
    assert scene.finish(1) == []
    scene.feed(DrainAsked(drain=False))
    assert the(scene.ask(A), Grant)


# --- failures -------------------------------------------------------------------------------------


def failed(order: Restore, **flags: bool) -> RestoreFailed:
    return RestoreFailed(order.ref, order.device, order.from_tier, "no luck", order=order.order, **flags)


def test_a_corrupt_copy_is_dropped_and_the_next_tier_is_asked_at_once() -> None:
    scene = Scene(A)
    scene.feed(PackFound(A.ref, 30 * MIB, 30 * MIB))
    actions = scene.feed(failed(the(scene.ask(A), Restore), corrupt=True))
    drop, again = the(actions, Drop), the(actions, Restore)
    assert (drop.tier, again.from_tier) == (Tier.DISK, Tier.ORIGIN)
    assert not of(scene.restored(again), Pack), "the old file is still going"
    assert the(scene.feed(Dropped(A.ref, Tier.DISK, drop.order)), Pack)


def test_a_broken_model_is_refused_for_a_minute_without_trying() -> None:
    scene = Scene(A)
    refusal = the(scene.feed(failed(the(scene.ask(A), Restore), broken=True)), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.MODEL_BROKEN, None)
    assert the(scene.later(residency.BROKEN_MS - 1).ask(A), Refuse).reason is RefusalReason.MODEL_BROKEN
    assert the(scene.later(1).ask(A), Restore)


def test_a_passing_fault_is_tried_again_with_growing_pauses_and_then_given_up_for_a_while() -> None:
    scene = Scene(A)
    actions = scene.ask(A)
    for pause_ms in (200, 400):
        actions = scene.feed(failed(the(actions, Restore)))
        assert not of(actions, Restore)
        assert not of(scene.later(pause_ms - 1).feed(Ticked()), Restore)
        actions = scene.later(1).feed(Ticked())
    refusal = the(scene.feed(failed(the(actions, Restore))), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.RESTORE_FAILED, residency.FAILED_MS)
    assert the(scene.later(2_000).ask(A), Refuse).retry_ms == residency.FAILED_MS - 2_000
    assert the(scene.later(3_000).ask(A), Restore)


def test_a_tier_that_keeps_failing_is_left_for_the_next() -> None:
    scene = Scene(A)
    scene.feed(PackFound(A.ref, 30 * MIB, 30 * MIB))
    actions = scene.ask(A)
    for _ in range(room.TRIES_PER_TIER_MAX):
        assert the(actions, Restore).from_tier is Tier.DISK
        scene.feed(failed(the(actions, Restore)))
        actions = scene.later(residency.BACKOFF_MS_MAX).feed(Ticked())
    assert the(actions, Restore).from_tier is Tier.ORIGIN


def test_a_worker_that_dies_while_restoring_counts_as_a_fault_and_its_late_answer_as_nothing() -> None:
    scene = Scene(A)
    first = the(scene.ask(A), Restore)
    scene.feed(WorkerDied("acme", "cpu:0"))
    assert residency.device_bytes_used(scene.node, "cpu:0") == 0
    assert scene.restored(first) == []
    second = the(scene.later(200).feed(Ticked()), Restore)
    assert not of(scene.restored(first), Grant), "the answer carries the number of the order given up"
    assert the(scene.restored(second), Grant).request == "r1"


def test_workers_that_always_die_end_as_worker_died() -> None:
    scene = Scene(A)
    actions = scene.ask(A)
    while of(actions, Restore):
        refusals = of(scene.feed(WorkerDied("acme", "cpu:0")), Refuse)
        actions = scene.later(residency.BACKOFF_MS_MAX).feed(Ticked()) if not refusals else []
    assert (refusals[0].reason, refusals[0].retry_ms) == (RefusalReason.WORKER_DIED, residency.FAILED_MS)


def test_leases_of_a_dead_worker_pin_nothing_and_end_with_their_own_finished() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.settle(scene.ask(A))
    scene.feed(WorkerDied("acme", "cpu:0"))
    assert the(scene.ask(B), Restore), "the room is free at once"
    scene.settle(scene.feed(Cancelled("r2")))
    assert scene.node.tenants["acme"].in_flight == 1
    scene.finish(1)
    assert scene.node.tenants["acme"].in_flight == 0


def test_evicted_after_worker_died_changes_nothing() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.warm(A)
    evict = the(scene.ask(B), Evict)
    assert the(scene.feed(WorkerDied("acme", "cpu:0")), Restore).ref == B.ref
    assert scene.evicted(evict) == []
    assert scene.feed(Evicted(A.ref, "cpu:0")) == []


def test_a_pack_outlives_its_worker_until_its_own_answer() -> None:
    scene = Scene(A)
    first = the(scene.ask(A), Restore)
    scene.restored(first)
    scene.feed(WorkerDied("acme", "cpu:0"))
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == first.disk_bytes
    again = the(scene.ask(A), Restore)
    assert (again.from_tier, again.disk_bytes) == (Tier.ORIGIN, 0)
    scene.packed_beside(first, 20)
    assert not of(scene.restored(again), Pack), "the file was complete after all"
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == 20 * MIB


def test_a_pack_that_failed_frees_its_room_and_is_tried_again_later() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    scene.restored(restore)
    assert not of(scene.feed(pack_failed(restore)), Pack)
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == 0
    scene.later(upkeep.PACK_RETRY_MS)
    assert the(scene.finish(1), Pack)


def pack_failed(order: Restore) -> PackFailed:
    return PackFailed(order.ref, order.device, "full", order.pack_order)


def test_a_pack_beside_a_load_may_be_complete_before_the_load() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    restore = the(scene.ask(A), Restore)
    scene.packed_beside(restore, 20)
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == 20 * MIB
    assert not of(scene.restored(restore), Pack)
    scene.finish(1)
    assert the(scene.ask(B), Evict).ref == A.ref, "nothing pins it any more"


def test_a_load_that_fails_keeps_its_packs_room_until_the_packs_own_answer() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    scene.feed(failed(restore))
    assert residency.device_bytes_used(scene.node, "cpu:0") == 0
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == restore.disk_bytes
    scene.feed(pack_failed(restore))
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == 0
    again = the(scene.later(200).feed(Ticked()), Restore)
    assert again.disk_bytes == restore.disk_bytes, "the next load goes on where this one stopped"


def test_a_load_is_not_accompanied_while_the_last_ones_pack_is_not_answered() -> None:
    scene = Scene(A)
    first = the(scene.ask(A), Restore)
    scene.feed(failed(first))
    second = the(scene.later(200).feed(Ticked()), Restore)
    assert (second.from_tier, second.disk_bytes, second.pack_order) == (Tier.ORIGIN, 0, 0)
    assert the(scene.feed(Finished("nobody")) + scene.restored(second), Grant)
    assert the(scene.feed(pack_failed(first)), Pack), "now that the room is free, from the device"


def test_after_a_worker_died_packing_beside_a_load_the_next_load_goes_without() -> None:
    scene = Scene(A)
    first = the(scene.ask(A), Restore)
    scene.feed(WorkerDied("acme", "cpu:0"))
    scene.feed(pack_failed(first))
    second = the(scene.later(200).feed(Ticked()), Restore)
    assert second.disk_bytes == 0
    assert not of(scene.restored(second), Pack)
    scene.later(upkeep.PACK_RETRY_MS)
    assert the(scene.finish(1), Pack)


def test_a_load_without_room_for_its_pack_makes_some_and_packs_afterwards() -> None:
    scene = Scene(A, B, disk_mib=45)
    scene.warm(A)
    actions = scene.later(DAY_MS).ask(B)
    drop, restore = the(actions, Drop), the(actions, Restore)
    assert (drop.ref, restore.disk_bytes) == (A.ref, 0)
    scene.feed(Dropped(A.ref, Tier.DISK, drop.order))
    assert the(scene.restored(restore), Pack).ref == B.ref


# --- the disk tier --------------------------------------------------------------------------------


def test_a_less_valuable_pack_makes_room_for_a_new_one() -> None:
    scene = Scene(A, B, disk_mib=45)
    scene.warm(A)
    actions = scene.later(DAY_MS).ask(B)
    drop = the(actions, Drop)
    assert drop.ref == A.ref
    assert not of(scene.restored(the(actions, Restore)), Pack), "the old one is not gone yet"
    assert the(scene.feed(Dropped(A.ref, Tier.DISK, drop.order)), Pack).ref == B.ref


def test_a_pack_does_not_push_out_more_valuable_ones() -> None:
    scene = Scene(A, B, disk_mib=45)
    scene.warm(A)
    for _ in range(50):
        scene.warm(A)
    actions = scene.later(1_000).ask(B)
    assert the(actions, Restore).disk_bytes == 0
    actions += scene.restored(the(actions, Restore))
    assert not of(actions, Drop)
    assert not of(actions, Pack)


def test_packs_found_before_the_first_plan_are_kept_and_after_it_foreign_ones_are_dropped() -> None:
    scene = Scene(A)
    node = scene.node = residency.Node()
    scene.feed(PackFound(A.ref, 30 * MIB, 30 * MIB))
    scene.feed(PackFound(B.ref, 30 * MIB, 30 * MIB))
    scene.feed(TierBudgetSeen(Tier.DISK, 100 * MIB))
    assert residency.tier_bytes_used(node, Tier.DISK) == 60 * MIB
    assert the(scene.plan(A), Drop).ref == B.ref
    stranger = ModelRef("acme", "stranger", "f" * 16)
    assert the(scene.feed(PackFound(stranger, MIB, MIB)), Drop).ref == stranger


def test_packs_above_a_smaller_disk_budget_are_dropped_least_valuable_first() -> None:
    scene = Scene(A, B)
    scene.warm(A)
    scene.later(60_000).warm(B)
    assert the(scene.feed(TierBudgetSeen(Tier.DISK, 6 * MIB)), Drop).ref == A.ref


def test_a_copy_that_is_being_read_is_not_dropped() -> None:
    scene = Scene(A)
    scene.feed(PackFound(A.ref, 30 * MIB, 30 * MIB))
    restore = the(scene.ask(A), Restore)
    assert not of(scene.feed(TierBudgetSeen(Tier.DISK, 0)), Drop)
    assert the(scene.restored(restore), Drop).tier is Tier.DISK


# --- plans and budgets that change ----------------------------------------------------------------


def test_a_model_removed_while_it_is_restoring_goes_when_it_has_come() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    refusal = the(scene.plan(), Refuse)
    assert (refusal.request, refusal.reason) == ("r1", RefusalReason.UNKNOWN_MODEL)
    assert the(scene.packed_beside(restore), Drop).tier is Tier.DISK
    evict = the(scene.restored(restore), Evict)
    scene.evicted(evict)
    scene.feed(Dropped(A.ref, Tier.DISK))
    assert residency.model_view(scene.node, A.ref) is None


def test_a_model_removed_while_it_is_packed_or_leased_goes_from_every_tier_afterwards() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    scene.restored(restore)
    assert scene.plan() == []
    assert the(scene.packed_beside(restore), Drop).tier is Tier.DISK
    scene.feed(Dropped(A.ref, Tier.DISK))
    scene.evicted(the(scene.finish(1), Evict))
    assert residency.model_view(scene.node, A.ref) is None


def test_a_model_planned_again_while_it_is_leaving_is_restored_afresh() -> None:
    scene = Scene(A)
    scene.warm(A)
    leaving = scene.plan()
    scene.plan(A)
    scene.ask(A)
    actions = scene.evicted(the(leaving, Evict))
    assert the(actions, Restore).from_tier is Tier.ORIGIN, "its pack is still being dropped"
    scene.feed(Dropped(A.ref, Tier.DISK))
    assert the(scene.restored(the(actions, Restore)), Pack)


def test_a_budget_below_what_is_held_evicts_what_is_idle_and_waits_for_the_leased() -> None:
    scene = Scene(A, B)
    scene.warm(A)
    scene.settle(scene.ask(B))
    scene.evicted(the(scene.feed(DeviceSeen("cpu:0", 30 * MIB)), Evict))
    assert (scene.state(A), scene.state(B)) == ("absent", "resident")
    assert the(scene.finish(2), Evict).ref == B.ref


def test_a_budget_that_sinks_while_a_model_is_restoring_evicts_it_after_its_callers() -> None:
    scene = Scene(A)
    restore = the(scene.ask(A), Restore)
    scene.feed(DeviceSeen("cpu:0", 30 * MIB))
    scene.restored(restore)
    scene.packed_beside(restore)
    assert the(scene.finish(1), Evict)


def test_a_sick_device_is_emptied_and_its_callers_move_to_another() -> None:
    scene = Scene(A, devices_mib=(100, 50))
    scene.settle(scene.ask(A))
    assert scene.device(A) == "cpu:1"
    scene.feed(DeviceSeen("cpu:1", 50 * MIB, healthy=False))
    assert not of(scene.ask(A), Grant)
    evict = the(scene.finish(1), Evict)
    assert the(scene.evicted(evict), Restore).device == "cpu:0"


def test_who_waits_for_room_that_no_longer_exists_is_told_so() -> None:
    scene = Scene(A, B, devices_mib=(60,))
    scene.settle(scene.ask(A))
    scene.ask(B)
    refusal = the(scene.feed(DeviceSeen("cpu:0", 39 * MIB)), Refuse)
    assert (refusal.request, refusal.reason) == ("r2", RefusalReason.NEVER_FITS)


# --- the proof itself -----------------------------------------------------------------------------


def test_check_finds_a_byte_that_is_in_one_book_only() -> None:
    scene = Scene(A)
    scene.settle(scene.ask(A))
    scene.node.devices["cpu:0"].account.used_bytes -= 1
    with pytest.raises(InvariantBroken, match="the account says"):
        residency.check(scene.node)


def test_a_change_that_says_nothing_of_itself_is_found_within_one_round() -> None:
    specs = [model(f"acme/m{i}", 1) for i in range(20)]
    scene = Scene(*specs)
    for spec in specs:
        scene.warm(spec)
    scene.node.models[specs[7].ref].device_bytes += 1
    with pytest.raises(InvariantBroken):  # noqa: PT012
        for _ in range(2 * len(specs)):
            residency.check(scene.node)


def test_views_of_unknown_names_are_empty() -> None:
    node = residency.Node()
    assert residency.model_view(node, A.ref) is None
    assert residency.tenant_view(node, "acme", 0) is None
    assert residency.device_bytes_used(node, "cpu:9") == 0
    assert residency.restore_ms_estimate(node, A.ref) == 0
    assert residency.step(node, Restored(A.ref, "cpu:9", Tier.DISK, 1), 0) == []
