"""Packs with parts in files of other versions, as the core counts them.

Covers: what stays of a pack that goes is charged to one that needs it, in the same step; charges of packs
that go as well; restores that read more than a pack is charged for. Does not cover: who holds which file
(``test_holdings``), random histories (``test_simulation``).
"""

from __future__ import annotations

import pytest
from scene import Scene, model, of, the

from packer import residency
from packer.events import Drop, Dropped, PackFound, TierBudgetSeen
from packer.residency import InvariantBroken
from packer.types import MIB, Tier

A, B, C = model("acme/a", 40), model("acme/b", 40), model("bolt/c", 40)


def found(*charges_mib: int) -> Scene:
    """Packs of A, B and C on disk, charged this much."""
    scene = Scene(A, B, C)
    for spec, charge_mib in zip((A, B, C), charges_mib, strict=False):
        scene.feed(PackFound(spec.ref, charge_mib * MIB, 30 * MIB, 30 * MIB))
    return scene


def used_mib(scene: Scene) -> tuple[int, int, int]:
    """Of the node, of acme, of bolt."""
    node = residency.tier_bytes_used(scene.node, Tier.DISK)
    tenants = [residency.tenant_view(scene.node, name, scene.now_ms) for name in ("acme", "bolt")]
    return (node // MIB, *(view.disk_bytes // MIB for view in tenants if view is not None))  # type: ignore[return-value]


def test_what_stays_of_a_pack_is_charged_to_one_that_needs_it() -> None:
    scene = found(30, 4, 20)
    assert used_mib(scene) == (54, 34, 20)
    drop = the(scene.plan(B, C), Drop)
    assert drop.ref == A.ref
    # Until it is gone it is held as a whole.
    assert used_mib(scene) == (54, 34, 20)
    scene.feed(Dropped(A.ref, Tier.DISK, drop.order, ((B.ref, 24 * MIB),)))
    assert used_mib(scene) == (44, 24, 20)
    view = residency.model_view(scene.node, B.ref)
    assert view is not None
    assert view.disk_bytes == 24 * MIB


def test_a_charge_follows_a_pack_that_goes_as_well() -> None:
    scene = found(30, 4)
    first, second = of(scene.plan(C), Drop)
    assert (first.ref, second.ref) == (A.ref, B.ref)
    scene.feed(Dropped(A.ref, Tier.DISK, first.order, ((B.ref, 24 * MIB),)))
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == 24 * MIB
    scene.feed(Dropped(B.ref, Tier.DISK, second.order))
    assert residency.tier_bytes_used(scene.node, Tier.DISK) == 0


def test_a_charge_above_the_budget_is_shed() -> None:
    """The pack that had to go gave less than it had: another one goes too."""
    scene = found(30, 4)
    going = the(scene.feed(TierBudgetSeen(Tier.DISK, 32 * MIB)), Drop)
    assert going.ref == A.ref
    more = the(scene.feed(Dropped(A.ref, Tier.DISK, going.order, ((B.ref, 33 * MIB),))), Drop)
    assert more.ref == B.ref
    scene.feed(Dropped(more.ref, Tier.DISK, more.order))
    assert used_mib(scene)[0] == 0


def test_a_charge_to_a_version_without_a_pack_is_a_defect() -> None:
    scene = found(30)
    drop = the(scene.plan(B, C), Drop)
    with pytest.raises(InvariantBroken, match="is not in it"):
        residency.step(scene.node, Dropped(A.ref, Tier.DISK, drop.order, ((B.ref, MIB),)), 0)


def test_the_expected_time_is_that_of_what_a_restore_reads() -> None:
    """Not of what the version is charged for: a restore reads the other file as well."""
    small, whole = found(4), found(30)
    assert residency.restore_ms_estimate(small.node, A.ref) == residency.restore_ms_estimate(
        whole.node, A.ref
    )
