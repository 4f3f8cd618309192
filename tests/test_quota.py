"""Quotas: exact rates, byte limits and reserves, and whose turn it is between tenants.

Covers: accounts, lending and reclaiming, concurrency, queue bounds and fair queueing, in the core. Does
not cover: rates (``test_rates``), or HTTP headers (the gateway's tests).
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import Scene, device_quota, model, of, the

from packer import queueing, residency
from packer.events import Cancelled, Evict, Grant, RefusalReason, Refuse, Restore
from packer.quota import Account, InvariantBroken, may_take, scaled_reserve
from packer.rates import RateView
from packer.types import MIB, TenantQuota

# --- rates ----------------------------------------------------------------------------------------


def test_a_refused_request_does_not_count_against_the_rate() -> None:
    scene = Scene(model("acme/a"), quotas={"acme": TenantQuota(requests_per_minute=6)})
    spec = scene.specs[0]
    scene.settle(scene.ask(spec))
    for _ in range(3):
        refusal = the(scene.ask(spec), Refuse)
        assert (refusal.reason, refusal.retry_ms) == (RefusalReason.RATE, 10_000)
    assert the(scene.later(10_000).ask(spec), Grant)
    view = residency.tenant_view(scene.node, "acme", scene.now_ms)
    assert view is not None
    assert view.rates == (RateView("requests_per_minute", 6, 1, 0, 10_000),)


# --- counts ---------------------------------------------------------------------------------------


def test_concurrency_counts_waiting_and_granted_and_its_hint_is_the_measured_use() -> None:
    spec = model("acme/a")
    scene = Scene(spec, quotas={"acme": TenantQuota(concurrency=2)})
    scene.settle(scene.ask(spec))
    scene.finish(1, device_ms=700)
    scene.ask(spec)
    scene.ask(spec)
    refusal = the(scene.ask(spec), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.CONCURRENCY, 700)
    scene.feed(Cancelled("r2"))
    assert the(scene.ask(spec), Grant)


def test_a_full_queue_refuses_with_the_measured_restore_time() -> None:
    spec, other = model("acme/a", 80), model("bolt/b")
    scene = Scene(spec, other)
    scene.ask(spec)
    for _ in range(queueing.WAITING_PER_TENANT_MAX - 1):
        assert not of(scene.ask(spec), Refuse)
    refusal = the(scene.ask(spec), Refuse)
    assert refusal.reason is RefusalReason.QUEUE_FULL
    assert refusal.retry_ms == residency.restore_ms_estimate(scene.node, spec.ref)
    assert the(scene.ask(other), Restore), "another tenant is not concerned"


def test_the_whole_nodes_queue_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "WAITING_MAX", 3)
    specs = [model(f"t{i}/m") for i in range(4)]
    scene = Scene(*specs)
    for spec in specs[:3]:
        scene.ask(spec)
    assert the(scene.ask(specs[3]), Refuse).reason is RefusalReason.QUEUE_FULL


# --- bytes ----------------------------------------------------------------------------------------


def test_a_model_above_the_tenants_max_is_refused_with_the_arithmetic() -> None:
    fits, above = model("acme/fits", 50), model("acme/above", 50, 1)
    scene = Scene(fits, above, quotas={"acme": device_quota(max_mib=50)})
    assert the(scene.ask(fits), Restore)
    refusal = the(scene.ask(above), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.QUOTA_BYTES, None)
    assert str(50 * MIB + 1) in refusal.detail
    assert str(50 * MIB) in refusal.detail


def test_a_tenant_at_its_max_evicts_its_own_idle_model_though_the_device_has_room() -> None:
    one, two, other = model("acme/one", 30), model("acme/two", 30), model("bolt/b", 10)
    scene = Scene(one, two, other, quotas={"acme": device_quota(max_mib=50)})
    scene.warm(other)
    scene.warm(one)
    evict = the(scene.ask(two), Evict)
    assert evict.ref == one.ref
    assert the(scene.evicted(evict), Restore).ref == two.ref


def test_a_tenant_at_its_max_waits_for_its_own_leases() -> None:
    one, two = model("acme/one", 30), model("acme/two", 30)
    scene = Scene(one, two, quotas={"acme": device_quota(max_mib=50)})
    scene.settle(scene.ask(one))
    assert not of(scene.ask(two), Evict)
    assert the(scene.finish(1), Evict).ref == one.ref


def test_a_max_that_sank_below_what_is_held_evicts_idle_models() -> None:
    one, two = model("acme/one", 30), model("acme/two", 30)
    scene = Scene(one, two)
    scene.warm(one)
    scene.later(60_000).warm(two)
    scene.quotas["acme"] = device_quota(max_mib=40)
    assert the(scene.plan(*scene.specs), Evict).ref == one.ref


def test_idle_reserved_bytes_are_lent_and_reclaimed() -> None:
    mine, theirs = model("acme/mine", 50), [model(f"bolt/{i}", 45) for i in range(2)]
    scene = Scene(mine, *theirs, quotas={"acme": device_quota(reserved_mib=60)})
    for spec in theirs:
        scene.warm(spec)
    evict = the(scene.ask(mine), Evict)
    assert evict.ref.tenant == "bolt", "one of the two is enough"
    assert the(scene.settle([evict]), Grant).request == "r3"


def test_a_borrower_can_not_take_from_a_tenant_within_its_reserve() -> None:
    mine, theirs = model("acme/mine", 60), model("bolt/b", 45)
    scene = Scene(mine, theirs, quotas={"acme": device_quota(reserved_mib=60)})
    scene.warm(mine)
    refusal = the(scene.ask(theirs), Refuse)
    assert (refusal.reason, refusal.retry_ms) == (RefusalReason.NEVER_FITS, None)
    assert str(60 * MIB) in refusal.detail, "the bytes that others' reserves protect"
    assert scene.state(mine) == "resident"


def test_a_tenant_within_its_reserve_may_still_replace_its_own() -> None:
    one, two = model("acme/one", 60), model("acme/two", 60)
    scene = Scene(one, two, quotas={"acme": device_quota(reserved_mib=60)})
    scene.warm(one)
    assert the(scene.ask(two), Evict).ref == one.ref


def test_an_unmet_reserve_takes_an_indivisible_borrowed_model_even_below_its_owners_reserve() -> None:
    mine, big = model("acme/mine", 30), model("bolt/big", 80)
    quotas = {"acme": device_quota(reserved_mib=40), "bolt": device_quota(reserved_mib=60)}
    scene = Scene(mine, big, quotas=quotas)
    scene.warm(big)
    assert the(scene.ask(mine), Evict).ref == big.ref


def test_reserves_that_promise_more_than_there_is_shrink_in_proportion() -> None:
    one, two = model("acme/one", 80), model("bolt/two", 40)
    quotas = {"acme": device_quota(reserved_mib=100), "bolt": device_quota(reserved_mib=100)}
    scene = Scene(one, two, quotas=quotas)
    scene.warm(one)
    assert the(scene.ask(two), Evict).ref == one.ref, "each may count on 50 of the 100"


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=8), st.integers(0, 10**12))
def test_scaled_reserves_never_promise_more_than_exists(reserves: list[int], capacity: int) -> None:
    scaled = [scaled_reserve(r, sum(reserves), capacity) for r in reserves]
    assert sum(scaled) <= max(capacity, 0) or scaled == reserves
    assert all(new <= old for new, old in zip(scaled, reserves, strict=True))


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 100), st.booleans())
def test_nobody_takes_from_a_tenant_within_its_reserve(
    kept: int, reserved: int, nbytes: int, entitled: bool
) -> None:
    if kept <= reserved:
        assert not may_take(kept, reserved, nbytes, entitled)
    elif not entitled and may_take(kept, reserved, nbytes, entitled):
        assert kept - nbytes >= reserved


def test_an_account_refuses_to_hold_above_its_limit_and_remembers_what_a_sunk_limit_excused() -> None:
    account = Account()
    account.set_limit(100)
    account.hold(100)
    with pytest.raises(InvariantBroken):
        account.hold(1)
    account.set_limit(50)
    assert (account.ceiling_bytes, account.excess_bytes) == (100, 50)
    account.release(30, leaving=False)
    assert account.ceiling_bytes == 70, "what was given back is not excused again"


# --- whose turn -----------------------------------------------------------------------------------


def served(scene: Scene, blocker: int) -> list[str]:
    """End the lease that blocks everybody; the models in the order of their restores."""
    actions = scene.settle(scene.finish(blocker))
    order: list[str] = []
    while grants := of(actions, Grant):
        order += [str(restore.ref.model) for restore in of(actions, Restore)]
        actions = [a for g in grants for a in scene.settle(scene.finish(int(g.request[1:])))]
    return order


def crowd(quotas: dict[str, TenantQuota] | None = None) -> Scene:
    """One model in use fills the device; hog's three models and meek's one wait for it, in this order."""
    specs = [model("busy/b", 60), *(model(f"hog/{i}", 60) for i in range(3)), model("meek/m", 60)]
    scene = Scene(*specs, quotas=quotas)
    scene.settle(scene.ask(specs[0]))
    for spec in specs[1:]:
        scene.ask(spec)
    return scene


def test_a_tenant_that_waits_for_many_models_does_not_delay_another_behind_all_of_them() -> None:
    assert served(crowd(), 1) == ["hog/0", "meek/m", "hog/1", "hog/2"]


@pytest.mark.parametrize(
    ("weight", "order"), [(1, ["a0", "b0", "a1", "b1", "a2"]), (3, ["a0", "b0", "a1", "a2", "b1"])]
)
def test_a_heavier_tenant_gets_more_turns(weight: int, order: list[str]) -> None:
    specs = [model(f"{name[0]}/{name}", 60) for name in ("a0", "a1", "a2", "b0", "b1")]
    scene = Scene(model("busy/b", 60), *specs, quotas={"a": TenantQuota(weight=weight)})
    scene.settle(scene.ask(scene.specs[0]))
    for spec in specs:
        scene.ask(spec)
    assert [name.partition("/")[2] for name in served(scene, 1)] == order


def test_priority_goes_first() -> None:
    quotas = {"meek": TenantQuota(priority=5), "hog": TenantQuota(priority=9)}
    assert served(crowd(quotas), 1) == ["hog/0", "hog/1", "hog/2", "meek/m"]
    assert served(crowd({"meek": TenantQuota(priority=5)}), 1)[1] == "meek/m", "after the claim that stood"
