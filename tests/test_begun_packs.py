"""Packs that an interrupted load left unfinished, in the core's books.

Covers: whose bytes they are, that they go before anything else, and going on with one. Does not cover: their
files (test_orders_tiers, test_resume).
"""

from __future__ import annotations

import pytest
from scene import Scene, model, of, the

from agent.pack_making import PARTIALS_MAX, too_many
from packer import residency, upkeep
from packer.events import (
    Drop,
    Pack,
    PackBegun,
    PackFailed,
    PackFound,
    Planned,
    Restore,
    RestoreFailed,
    TierBudgetSeen,
)
from packer.ledger import pack_reservation_bytes
from packer.residency import ModelView
from packer.types import MIB, ByteQuota, ModelRef, ModelSpec, TenantQuota, Tier

A, A2, B = model("acme/a", 40), model("acme/b", 40), model("bolt/b", 40)
KEPT = 15 * MIB
ROOM = pack_reservation_bytes(A)


def test_interrupted_loads_of_one_tenant_push_out_its_own() -> None:
    """Above the limit the oldest of whoever has most goes, however old those of others are."""
    mine = [ModelRef("acme", f"m{number}", "0" * 16) for number in range(PARTIALS_MAX)]
    others = [ModelRef("bolt", f"m{number}", "0" * 16) for number in range(3)]
    assert too_many([*others, *mine[: PARTIALS_MAX - 3]]) == []
    assert too_many([*others, *mine]) == mine[:3]
    assert too_many([mine[0], *others, *mine[1:]]) == mine[:3]
    alike = [ModelRef(f"t{number}", "m", "0" * 16) for number in range(PARTIALS_MAX + 1)]
    assert too_many(alike) == alike[:1]


def disk(scene: Scene, spec: ModelSpec | None = None) -> int:
    if spec is None:
        return residency.tier_bytes_used(scene.node, Tier.DISK)
    return scene.node.tenants[spec.ref.tenant].disk.used_bytes


def view(scene: Scene, spec: ModelSpec) -> ModelView:
    found = residency.model_view(scene.node, spec.ref)
    assert found is not None
    return found


def interrupt(scene: Scene, spec: ModelSpec, kept: int = KEPT) -> None:
    """A load and the pack beside it fail, and leave so much of the pack."""
    restore = the(scene.ask(spec), Restore)
    scene.feed(RestoreFailed(spec.ref, restore.device, Tier.ORIGIN, "a fault", order=restore.order))
    scene.feed(PackFailed(spec.ref, restore.device, "the load failed", restore.pack_order, kept))


def test_what_is_left_of_a_pack_is_its_tenants_and_is_no_pack() -> None:
    scene = Scene(A, B)
    interrupt(scene, A)
    assert (disk(scene), disk(scene, A), disk(scene, B)) == (KEPT, KEPT, 0)
    assert not view(scene, A).packed
    restore = the(scene.later(1000).ask(A), Restore)
    assert restore.from_tier is Tier.ORIGIN, "nothing can be restored from it"


def test_the_load_that_goes_on_reserves_only_what_is_missing() -> None:
    """And orders as much as a whole pack may take; a tenant's max counts what is begun once."""
    quotas = {"acme": TenantQuota(disk=ByteQuota(0, ROOM))}
    scene = Scene(A, disk_mib=ROOM // MIB + 1, quotas=quotas)
    interrupt(scene, A)
    restore = the(scene.later(1000).ask(A), Restore)
    assert restore.disk_bytes == disk(scene) == disk(scene, A) == ROOM
    scene.packed_beside(restore, 20)
    assert disk(scene) == disk(scene, A) == 20 * MIB
    assert view(scene, A).packed


def test_it_counts_against_its_tenants_share_and_nobody_elses() -> None:
    quotas = {name: TenantQuota(disk=ByteQuota(0, ROOM + KEPT - 1)) for name in ("acme", "bolt")}
    scene = Scene(A, A2, B, devices_mib=(200,), quotas=quotas)
    interrupt(scene, A)
    drop = the(scene.ask(A2), Drop)
    assert (drop.ref, drop.tier) == (A.ref, Tier.DISK), "its own tenant is short of disk"
    scene = Scene(A, A2, B, devices_mib=(200,), quotas=quotas)
    interrupt(scene, A)
    actions = scene.ask(B)
    assert not of(actions, Drop)
    assert the(actions, Restore).disk_bytes == ROOM


def test_it_goes_before_any_pack_however_little_that_is_used() -> None:
    """In every policy, when the budget sinks and when another pack wants the room."""
    scene = Scene(A, A2, B, devices_mib=(100,), disk_mib=10_000)
    scene.warm(B)
    scene.later(86_400_000)
    interrupt(scene, A)
    drops = of(scene.feed(TierBudgetSeen(Tier.DISK, disk(scene) - 1)), Drop)
    assert [drop.ref for drop in drops] == [A.ref]
    scene.settle(list(drops))
    assert disk(scene) == disk(scene, B)
    assert not view(scene, A).disk_bytes


def test_it_is_found_at_a_start_and_dropped_when_it_left_the_plan() -> None:
    scene = Scene(A)
    scene.feed(PackBegun(A.ref, KEPT))
    scene.settle(scene.feed(PackBegun(B.ref, 7)))
    assert (disk(scene), disk(scene, A)) == (KEPT, KEPT)
    drops = of(scene.plan(), Drop)
    assert [drop.ref for drop in drops] == [A.ref]
    scene.settle(list(drops))
    assert disk(scene) == 0
    assert residency.model_view(scene.node, A.ref) is None


@pytest.mark.parametrize("before_plan", [True, False])
def test_one_of_nobody_is_dropped_once_there_is_a_plan(before_plan: bool) -> None:
    scene = Scene(A)
    if before_plan:
        scene.node = residency.Node()
        scene.feed(TierBudgetSeen(Tier.DISK, MIB))
    drops = of(scene.feed(PackBegun(B.ref, 7)), Drop)
    if before_plan:
        assert not drops
        drops = of(scene.feed(Planned((), ())), Drop)
    assert [drop.ref for drop in drops] == [B.ref]
    scene.settle(list(drops))
    assert disk(scene) == 0


def test_one_that_was_removed_is_free_and_one_that_became_a_pack_is_a_pack() -> None:
    scene = Scene(A)
    scene.feed(PackBegun(A.ref, KEPT))
    scene.feed(PackBegun(A.ref, 0))
    assert disk(scene) == 0
    scene.feed(PackBegun(A.ref, KEPT))
    scene.feed(PackFound(A.ref, 20 * MIB, 30 * MIB))
    assert disk(scene) == 20 * MIB
    scene.feed(PackBegun(A.ref, KEPT))
    assert disk(scene) == 20 * MIB
    assert view(scene, A).packed


def test_a_resident_model_is_packed_anew_in_the_room_of_what_was_begun() -> None:
    scene = Scene(A, disk_mib=ROOM // MIB + 1)
    restore = the(scene.ask(A), Restore)
    scene.restored(restore)
    scene.feed(PackFailed(A.ref, restore.device, "the worker died", restore.pack_order, KEPT))
    assert disk(scene) == KEPT
    actions = scene.later(upkeep.PACK_RETRY_MS).finish(1)
    assert disk(scene) == the(actions, Pack).disk_bytes == ROOM


def test_nobody_is_believed_who_says_that_more_is_left_than_was_reserved() -> None:
    scene = Scene(A)
    interrupt(scene, A, kept=10 * ROOM)
    assert disk(scene) == ROOM
