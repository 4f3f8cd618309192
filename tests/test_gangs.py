"""Models that need several devices: where they are cut, their room, their end, and what is refused.

Covers: cuts and shares by numbers, and single rules of the core for gangs. Does not cover: strange histories
(``test_gang_simulation``) or real memory (``test_gang_box``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from scene import Scene, device_quota, model, of, the

from packer import gangs, residency
from packer.decisions import Outcome
from packer.events import DeviceSeen, Evict, FootprintSeen, Grant, RefusalReason, Refuse, Restore, WorkerDied
from packer.forecast import forecast
from packer.layout import TensorInfo, lay_out
from packer.types import DEVICES_PER_MODEL_MAX, MIB, BadValue, ModelSpec


def gang(text: str, *chunks_mib: int, devices: int = 2, workspace_mib: int = 0) -> ModelSpec:
    """A version with these chunks, which may be cut before any of them."""
    chunks = tuple(mib * MIB for mib in chunks_mib)
    spec = model(text, sum(chunks_mib), workspace_mib * MIB)
    return replace(spec, chunk_bytes=chunks, cuts=tuple(range(1, len(chunks))), devices=devices)


def tensor(name: str, nbytes: int) -> TensorInfo:
    return TensorInfo(name, "U8", (nbytes,), "model.safetensors", 0, nbytes)


# --- where a model is cut ---------------------------------------------------------------------------


def test_a_model_is_cut_where_no_tensor_lies_across() -> None:
    layout = lay_out([tensor(f"layers.{at}.w", 9 * MIB) for at in range(4)])
    assert len(layout.chunks) == 12
    assert gangs.cuts_of(layout, by_layer=True) == (3, 6, 9)


def test_small_tensors_that_share_chunks_are_not_cut() -> None:
    # Five of 0.9 MiB are a run of two chunks, and one of them lies across.
    layout = lay_out([tensor(f"layers.0.w{at}", 900 * 1024) for at in range(5)])
    assert len(layout.chunks) == 2
    assert gangs.cuts_of(layout, by_layer=False) == ()


def test_the_parts_are_as_equal_as_the_tensors_allow() -> None:
    sizes = (8, 2, 3, 3, 4, 4)
    spec = gang("acme/m", *sizes)
    assert gangs.run_ends(spec.chunk_bytes, spec.cuts, 2) == (3, 6)
    assert gangs.run_bytes(spec) == (13 * MIB, 11 * MIB)
    assert gangs.run_bytes(replace(spec, devices=3)) == (8 * MIB, 8 * MIB, 8 * MIB)


def test_what_can_not_be_cut_so_often_is_refused_with_the_field_and_the_most() -> None:
    spec = gang("acme/m", 30, 2, 2)
    with pytest.raises(BadValue, match="the most is 2") as caught:
        gangs.check_devices(spec, 3)
    assert caught.value.field == "devices"
    with pytest.raises(BadValue, match="push it again"):
        gangs.check_devices(replace(spec, cuts=()), 2)
    for count in (0, DEVICES_PER_MODEL_MAX + 1):
        with pytest.raises(BadValue, match=f"from 1 to {DEVICES_PER_MODEL_MAX}"):
            gangs.check_devices(spec, count)
    assert gangs.check_devices(spec, 1) == 1


def test_few_cuts_are_kept_of_very_many_and_each_number_of_devices_has_its_best() -> None:
    layout = lay_out([tensor(f"layers.{at}.w", MIB) for at in range(1000)])
    cuts = gangs.cuts_of(layout, by_layer=True)
    assert len(cuts) < 80
    for devices in range(2, DEVICES_PER_MODEL_MAX + 1):
        ends = gangs.run_ends(layout.chunk_bytes, cuts, devices)
        sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        assert max(sizes) - min(sizes) <= 1


# --- on the devices ---------------------------------------------------------------------------------


def test_a_model_too_large_for_one_device_comes_to_two_and_each_holds_its_share() -> None:
    big = gang("acme/big", 40, 30, 30, workspace_mib=5)
    scene = Scene(big, devices_mib=(70, 75))
    order = the(scene.ask(big), Restore)
    assert order.device == "cpu:0+cpu:1"
    assert the(scene.restored(order), Grant).device == "cpu:0+cpu:1"
    view = residency.model_view(scene.node, big.ref)
    assert view is not None
    assert view.shares == (("cpu:0", 45 * MIB), ("cpu:1", 65 * MIB))
    assert view.device_bytes == 110 * MIB
    tenant = residency.tenant_view(scene.node, "acme", 0)
    assert tenant is not None
    assert tenant.device_bytes == 110 * MIB


def test_it_takes_the_devices_with_the_least_room_that_is_enough() -> None:
    big = gang("acme/big", 20, 20)
    scene = Scene(big, devices_mib=(100, 30, 25, 10))
    assert the(scene.ask(big), Restore).device == "cpu:1+cpu:2"


def test_it_evicts_on_all_its_devices_at_once_and_no_more_than_needed() -> None:
    big = gang("acme/big", 40, 40)
    small = [model(f"acme/s{at}", 30) for at in range(4)]
    scene = Scene(big, *small, devices_mib=(70, 70))
    for spec in small:
        scene.warm(spec)
    orders = of(scene.ask(big), Evict)
    assert sorted(order.device for order in orders) == ["cpu:0", "cpu:1"]
    assert scene.evicted(orders[0]) == []
    assert the(scene.evicted(orders[1]), Restore).device == "cpu:0+cpu:1"


def test_a_gang_that_must_go_frees_all_its_devices() -> None:
    big, other = gang("acme/big", 50, 50), model("acme/other", 60)
    scene = Scene(big, other, devices_mib=(70, 70))
    scene.warm(big)
    order = the(scene.ask(other), Evict)
    assert (order.device, order.keep_chunks) == ("cpu:0+cpu:1", 0)
    assert the(scene.evicted(order), Restore).device == "cpu:0"
    assert residency.device_bytes_used(scene.node, "cpu:1") == 0


def test_two_gangs_that_want_the_same_devices_take_turns() -> None:
    first, second = gang("acme/a", 50, 50), gang("beta/b", 60, 60)
    scene = Scene(first, second, devices_mib=(70, 70))
    scene.warm(first)
    scene.settle(scene.ask(second))
    assert (scene.state(first), scene.state(second)) == ("absent", "resident")
    scene.settle(scene.finish(2))
    scene.settle(scene.ask(first))
    assert (scene.state(first), scene.state(second)) == ("resident", "absent")


def claims(scene: Scene) -> dict[str, str]:
    found = scene.node.devices.values()
    return {device.name: device.claim.ref.name for device in found if device.claim is not None}


def test_a_gang_claims_all_its_devices_and_another_one_waits() -> None:
    big, other = gang("acme/big", 50, 50), gang("acme/other", 50, 50)
    used, idle, first = model("acme/used", 60), model("acme/idle", 60), model("acme/first", 60)
    scene = Scene(big, other, used, idle, first, devices_mib=(60, 60))
    scene.settle(scene.ask(used))
    scene.settle(scene.ask(idle))
    scene.ask(first)
    assert claims(scene) == {"cpu:0": "first"}
    scene.settle(scene.finish(2))
    assert scene.device(first) == "cpu:1"  # it did not have to wait for what it had claimed
    scene.ask(big)
    assert claims(scene) == {"cpu:0": "big", "cpu:1": "big"}
    scene.ask(other)
    assert claims(scene) == {"cpu:0": "big", "cpu:1": "big"}


def test_it_leaves_when_one_of_its_devices_is_unhealthy_and_comes_back_with_it() -> None:
    big = gang("acme/big", 40, 40)
    scene = Scene(big, devices_mib=(50, 50))
    scene.warm(big)
    order = the(scene.feed(DeviceSeen("cpu:1", 50 * MIB, healthy=False)), Evict)
    scene.evicted(order)
    refused = the(scene.ask(big), Refuse)
    assert (refused.reason, refused.retry_ms is not None) == (RefusalReason.RESTORE_FAILED, True)
    scene.feed(DeviceSeen("cpu:1", 50 * MIB))
    assert of(scene.ask(big), Restore)


def test_one_worker_serves_a_gang_and_others_do_not_end_it() -> None:
    big, small = gang("acme/big", 30, 30), model("acme/small", 10)
    scene = Scene(big, small, devices_mib=(50, 50))
    scene.warm(big)
    scene.warm(small)
    scene.feed(WorkerDied("acme", "cpu:0"))
    scene.feed(WorkerDied("acme", "cpu:1"))
    assert (scene.state(big), scene.state(small)) == ("resident", "absent")
    scene.feed(WorkerDied("acme", "cpu:0+cpu:1"))
    assert scene.state(big) == "absent"
    assert scene.node.places == {}


def test_what_requests_need_is_held_on_each_device() -> None:
    big = gang("acme/big", 30, 30, workspace_mib=2)
    scene = Scene(big, devices_mib=(50, 50))
    scene.warm(big)
    scene.feed(FootprintSeen(big.ref, 5 * MIB))
    assert residency.device_bytes_used(scene.node, "cpu:1") == 35 * MIB
    scene.feed(FootprintSeen(big.ref, 30 * MIB))  # fits on no device now: held from the next stay on
    assert residency.device_bytes_used(scene.node, "cpu:1") == 35 * MIB


# --- what is refused --------------------------------------------------------------------------------


def test_a_node_with_too_few_devices_refuses_at_once_with_the_arithmetic() -> None:
    big = gang("acme/big", 20, 20, 20, devices=3, workspace_mib=1)
    refused = the(Scene(big, devices_mib=(100, 100)).ask(big), Refuse)
    assert (refused.reason, refused.retry_ms) == (RefusalReason.NEVER_FITS, None)
    assert "needs 3 devices of one node" in refused.detail
    assert "this node has 2 devices, 2 of them with such a budget" in refused.detail


def test_a_share_too_large_for_all_but_one_device_is_refused_at_once() -> None:
    big = gang("acme/big", 40, 40)
    refused = the(Scene(big, devices_mib=(100, 30)).ask(big), Refuse)
    assert refused.reason is RefusalReason.NEVER_FITS
    assert "1 of them with such a budget" in refused.detail


def test_the_sum_counts_against_the_tenants_max() -> None:
    big = gang("acme/big", 40, 40)
    scene = Scene(big, devices_mib=(50, 50), quotas={"acme": device_quota(max_mib=70)})
    assert the(scene.ask(big), Refuse).reason is RefusalReason.QUOTA_BYTES


def test_what_can_not_be_cut_into_so_many_is_refused_and_breaks_nothing() -> None:
    spec = replace(gang("acme/big", 40, 40), devices=3)
    refused = the(Scene(spec, devices_mib=(50, 50, 50)).ask(spec), Refuse)
    assert "can not be cut into 3 parts" in refused.detail


# --- plans ------------------------------------------------------------------------------------------


def test_another_number_of_devices_counts_from_the_next_stay_on() -> None:
    big = gang("acme/big", 20, 20)
    scene = Scene(big, devices_mib=(50, 50))
    scene.warm(big)
    alone = replace(big, devices=1)
    assert scene.plan(alone) == []
    assert scene.device(big) == "cpu:0+cpu:1"
    scene.feed(WorkerDied("acme", "cpu:0+cpu:1"))
    assert the(scene.ask(alone), Restore).device == "cpu:0"


def test_a_plan_shows_all_devices_of_a_gang() -> None:
    big, small = gang("acme/big", 40, 40), model("beta/small", 30)
    scene = Scene(big, small, devices_mib=(50, 50, 20))
    found = forecast(scene.node, big.ref, 0)
    assert (found.outcome, found.device) == (Outcome.FITS, "cpu:0+cpu:1")
    assert [room.verdict for room in found.devices] == ["chosen", "chosen", "too small, even empty"]
    assert [room.needed_bytes for room in found.devices] == [40 * MIB] * 3
    scene.warm(small)
    found = forecast(scene.node, big.ref, 0)
    assert found.outcome is Outcome.EVICTS
    assert [victim.ref for victim in found.victims] == [str(small.ref)]
