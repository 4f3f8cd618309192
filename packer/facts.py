"""Facts about one node that are nobody's answer: its plan, devices, budgets, rates, packs found, leaving.

Covers: what each of these events changes in the state. Does not cover: requests and the answers of orders
(``residency``), or what follows from a change (``upkeep``, ``queueing``).
"""

from __future__ import annotations

from dataclasses import replace

from packer import admission, estimate, prefetch, queueing, quota, room, upkeep
from packer.events import (
    Action,
    DebtFound,
    DeviceSeen,
    DrainAsked,
    PackBegun,
    PackFound,
    Planned,
    RatesSeen,
    RefusalReason,
    SharesSeen,
    TierBudgetSeen,
)
from packer.ledger import (
    CopyState,
    Device,
    Model,
    Node,
    keep_begun,
    know_copies,
    release_copy,
    renew_shade,
    settle_copy,
    take_spec,
)
from packer.lending import MARGIN_PERCENT_MAX
from packer.quota import Tenant
from packer.shares import NO_LAGS, Lags
from packer.types import ModelRef, ModelSpec, Task, TenantSpec, Tier


def pack_found(node: Node, event: PackFound) -> None:
    model = node.models.get(event.ref)
    if model is None:
        # Before the first plan nothing is known about it; afterwards it is nobody's and is dropped.
        model = _add_model(node, _unknown_spec(event.ref), planned=False)
    if model.disk.state not in (CopyState.ABSENT, CopyState.BEGUN, CopyState.HELD):
        return
    model.opened_bytes = event.host_bytes
    model.read_bytes = event.read_bytes or event.disk_bytes
    settle_copy(node, model, Tier.DISK, event.disk_bytes)
    room.note_copy(node, model, Tier.DISK)
    know_copies(node, model)
    node.unpacked.pop(model.ref, None)
    node.dirty = True


def pack_begun(node: Node, event: PackBegun) -> None:
    model = node.models.get(event.ref)
    if model is None and event.disk_bytes > 0:
        model = _add_model(node, _unknown_spec(event.ref), planned=False)
    if model is None or model.disk.state not in (CopyState.ABSENT, CopyState.BEGUN):
        return
    if event.disk_bytes > 0:
        keep_begun(node, model, event.disk_bytes)
    elif model.disk.state is CopyState.BEGUN:
        release_copy(node, model, Tier.DISK)
    node.dirty = True


def _unknown_spec(ref: ModelRef) -> ModelSpec:
    """Stands in for the description of a version that no plan has named yet; it is never restored."""
    return ModelSpec(ref, "", (), "", Task.EMBEDDING, 0, (), 0, 0, latest=False)


def _add_model(node: Node, spec: ModelSpec, planned: bool) -> Model:
    name = spec.ref.tenant
    tenant = node.tenants.get(name)
    if tenant is None:
        tenant = node.tenants[name] = Tenant(TenantSpec(name), planned=False)
    tenant.models += 1
    model = node.models[spec.ref] = Model(spec, tenant, planned)
    renew_shade(node, model)
    node.touched[spec.ref] = None
    if not planned:
        node.removed[spec.ref] = model
    return model


def planned(node: Node, event: Planned, now_ms: int, out: list[Action]) -> None:
    if not node.has_plan:
        prefetch.begin(node, now_ms)
    node.has_plan = True
    for tenant in node.tenants.values():
        tenant.planned = False
    for spec in event.tenants:
        known = node.tenants.get(spec.tenant)
        if known is None:
            known = node.tenants[spec.tenant] = Tenant(spec)
            known.rates.set_share(node.shares.share_of(spec.tenant), NO_LAGS, 0, now_ms)
            quota.apply_quota(known, spec, now_ms)
            if node.shares.used_up:
                known.rates.use_up(now_ms)
        quota.apply_quota(known, spec, now_ms)
    for model in node.models.values():
        model.planned = False
    for model_spec in event.models:
        ref = model_spec.ref
        planned_tenant = node.tenants.get(ref.tenant)
        if planned_tenant is None or not planned_tenant.planned:
            continue  # a model of a tenant that the plan does not name is not served
        model_known = node.models.get(ref) or _add_model(node, model_spec, planned=True)
        if model_known.spec.image_bytes != model_spec.image_bytes:
            model_known.gains = None
        take_spec(node, model_known, model_spec)
        model_known.tenant.slice.measure(model_known.shade, model_known.need_bytes)
        model_known.planned = True
        know_copies(node, model_known)
        node.removed.pop(ref, None)
    for model in list(node.models.values()):
        if not model.planned:
            node.removed[model.ref] = model
            model.tenant.slice.forget(model.shade)
            detail = f"there is no model {model.ref}"
            queueing.refuse_all(node, model, RefusalReason.UNKNOWN_MODEL, detail, None, out)
    for tenant in list(node.tenants.values()):
        if not tenant.planned:
            quota.apply_quota(tenant, TenantSpec(tenant.spec.tenant), now_ms)
            tenant.planned = False
            upkeep.forget_tenant(node, tenant)
    _capacity_changed(node)


def shares_seen(node: Node, event: SharesSeen, now_ms: int) -> None:
    held = node.shares
    held.rest, held.halve_at_ms, held.used_up = event.rest, event.halve_at_ms, event.used_up
    held.by_tenant = {each.tenant: each.share for each in event.shares}
    lags = {each.tenant: each.lags for each in event.shares}
    for name, tenant in node.tenants.items():
        _share(node, tenant, lags.get(name, NO_LAGS), tenant.in_flight, now_ms)
        if event.used_up:
            tenant.rates.use_up(now_ms)


def halve_shares(node: Node, now_ms: int) -> None:
    """Control was not heard for the whole term: keep half, whatever is in flight."""
    node.shares.halve()
    for tenant in node.tenants.values():
        _share(node, tenant, NO_LAGS, 0, now_ms)


def _share(node: Node, tenant: Tenant, lags: Lags, in_flight: int, now_ms: int) -> None:
    tenant.rates.set_share(node.shares.share_of(tenant.spec.tenant), lags, in_flight, now_ms)
    if tenant.waiting:
        node.dirty = True  # models may wait for the rate of restores


def device_seen(node: Node, event: DeviceSeen) -> None:
    device = node.devices.get(event.device)
    if device is None:
        device = node.devices[event.device] = Device(event.device, event.healthy)
    device.healthy, device.partial = event.healthy, event.partial
    for place in node.places.values():
        place.healthy = all(member.healthy for member in place.members)
    device.account.set_limit(max(event.budget_bytes, 0))
    _capacity_changed(node)


def tier_budget_seen(node: Node, event: TierBudgetSeen) -> None:
    if event.tier in (Tier.HOST, Tier.DISK):
        node.account(event.tier).set_limit(max(event.budget_bytes, 0))
        _capacity_changed(node)


def rates_seen(node: Node, event: RatesSeen) -> None:
    node.gains_epoch += 1
    estimate.recalibrate(node.learned, event.rates)
    node.learned.host_form, node.learned.on_cuda = event.host_form, event.on_cuda
    for model in node.models.values():
        know_copies(node, model)


def _capacity_changed(node: Node) -> None:
    devices_bytes = sum(d.account.limit_bytes or 0 for d in node.devices.values() if d.healthy)
    quota.share_reserves(node.tenants, Tier.DEVICE, devices_bytes)
    _share_slices(node)
    for tier in (Tier.HOST, Tier.DISK):
        quota.share_reserves(node.tenants, tier, node.account(tier).limit_bytes or 0)
    node.dirty = True
    node.unproven = True


def _share_slices(node: Node) -> None:
    """Every private slice is as large as the reserve; one that grows starts with what is there."""
    held: dict[str, list[Model]] = {}
    for tenant in node.tenants.values():
        if tenant.device.reserved_bytes > tenant.slice.reserved_bytes:
            held[tenant.spec.tenant] = []
    for device in (*node.devices.values(), *node.places.values()) if held else ():
        for model in device.models.values():
            if model.planned and model.ref.tenant in held and model.device is device:
                held[model.ref.tenant].append(model)
    for name, tenant in node.tenants.items():
        models = held.get(name, [])
        models.sort(key=lambda model: (-model.reuse.last_ms, model.name))
        for model in models:
            tenant.slice.price(model.shade, room.price(node, model))
        tenant.slice.reserve(tenant.device.reserved_bytes, [model.shade for model in models])


def policy_chosen(node: Node, policy: str) -> None:
    room.choose_policy(node, policy)
    # A slice divides models as the policy does: it starts anew with what is there.
    for tenant in node.tenants.values():
        tenant.slice.reserve(0, [])
    for model in node.models.values():
        renew_shade(node, model)
    _capacity_changed(node)


def lending_chosen(node: Node, margin_percent: int) -> None:
    node.terms = replace(node.terms, margin_percent=min(max(margin_percent, 0), MARGIN_PERCENT_MAX))
    for tenant in node.tenants.values():
        tenant.slice.agree(node.terms)
    node.dirty = True


def debt_found(node: Node, event: DebtFound) -> None:
    tenant = node.tenants.get(event.tenant)
    if tenant is not None:
        tenant.slice.recall(event.debt_ms, node.terms)


def drain_asked(node: Node, event: DrainAsked, out: list[Action]) -> None:
    node.dirty = True
    node.draining = event.drain
    if not node.draining:
        return
    detail = "this node is leaving; ask another one"
    for model in list(node.queue.values()):
        queueing.refuse_all(node, model, RefusalReason.DRAINING, detail, admission.DRAINING_RETRY_MS, out)
