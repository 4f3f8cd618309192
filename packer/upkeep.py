"""Upkeep after every change: what must go because it may not stay, and packs that should be written.

Covers: models that left the plan, budgets and limits that sank, unhealthy devices, ordering packs of
models that came from their origin without one. Does not cover: room for waiting requests or packs
written beside a load (``queueing``).
"""

from __future__ import annotations

from packer import explain, room, victims
from packer.events import Action, Pack
from packer.ledger import (
    CopyState,
    Model,
    Node,
    State,
    pack_room_bytes,
)
from packer.queueing import hold_pack, order_drop, order_evict, wake_at, wants_pack
from packer.quota import Tenant
from packer.types import ModelRef, Tier

# A pack that could not be written, or for which nothing may be dropped, is tried again after this long:
# a disk that is full stays full for a while, and every try reads the whole model.
PACK_RETRY_MS = 60_000


def retire(node: Node, out: list[Action]) -> None:
    """Take models that left the plan out of every tier; leased ones finish first.

    Before the first plan nothing has left it: packs found at start-up wait for it.
    """
    if not node.has_plan:
        return
    for model in list(node.removed.values()):
        if model.idle:
            whole = victims.Taking(model, model.device_bytes)
            explain.shed(node, (whole,), "it left the plan", node.now_ms)
            order_evict(node, model, out)
        for tier in (Tier.HOST, Tier.DISK):
            if room.droppable(model.copy(tier)):
                order_drop(node, model, tier, out)
        if model.empty:
            forget(node, model)


def forget(node: Node, model: Model) -> None:
    del node.removed[model.ref]
    del node.models[model.ref]
    node.moves.pop(model.ref, None)
    if node.chosen is not None:
        node.chosen.forget(model.ref)
    node.touched[model.ref] = None
    model.tenant.models -= 1
    forget_tenant(node, model.tenant)


def forget_tenant(node: Node, tenant: Tenant) -> None:
    """Let go of a tenant that left the plan, once nothing of it is left."""
    name = tenant.spec.tenant
    if not tenant.planned and not tenant.models and not tenant.granted and node.tenants.get(name) is tenant:
        del node.tenants[name]


def shed(node: Node, now_ms: int, out: list[Action]) -> None:
    """Evict and drop what is idle until every budget and every max is kept again."""
    for device in node.devices.values():
        if not device.healthy or device.account.excess_bytes:
            going = victims.device_surplus(node, device, now_ms)
            why = "its budget sank" if device.healthy else "it is unhealthy"
            explain.shed(node, going, f"{device.name}: {why}", now_ms)
            for taking in going:
                order_evict(node, taking.model, out, taking.keep_chunks, taking.forced)
    for tier in (Tier.HOST, Tier.DISK):
        if node.account(tier).excess_bytes:
            for model in room.copies_surplus(node, tier, None, now_ms):
                order_drop(node, model, tier, out)
    for tenant in node.tenants.values():
        if tenant.device.excess_bytes:
            going = victims.tenant_surplus(node, tenant, now_ms)
            explain.shed(node, going, "its tenant's max sank", now_ms)
            for taking in going:
                order_evict(node, taking.model, out, taking.keep_chunks, taking.forced)
        for tier in (Tier.HOST, Tier.DISK):
            if tenant.account(tier).excess_bytes:
                for model in room.copies_surplus(node, tier, tenant, now_ms):
                    order_drop(node, model, tier, out)


def expire(node: Node, now_ms: int, out: list[Action]) -> None:
    """Evict and drop what a timer wants gone, and be woken for the next; no other policy has one."""
    chosen = node.chosen
    if chosen is None or not chosen.timed or now_ms < chosen.next_expiry_ms:
        return
    coming: list[int] = []
    busy = False
    for device in node.devices.values():
        for model in list(device.models.values()):
            at_ms = chosen.expires_ms(Tier.DEVICE, model.ref)
            if at_ms is None:
                continue
            if at_ms > now_ms:
                coming.append(at_ms)
            elif model.idle:
                whole = victims.Taking(model, model.device_bytes)
                explain.shed(node, (whole,), "its timer ran out", now_ms)
                order_evict(node, model, out, forced=True)
            else:
                busy = True
    for model in list(node.in_host.values()):
        at_ms = chosen.expires_ms(Tier.HOST, model.ref)
        if at_ms is None:
            continue
        if at_ms > now_ms:
            coming.append(at_ms)
        elif room.droppable(model.host) and not model.leases:
            order_drop(node, model, Tier.HOST, out)
        else:
            busy = True
    # What is due and in use is looked at again with the next change, as is a node that holds nothing.
    chosen.next_expiry_ms = min(coming) if coming and not busy else now_ms
    if coming and min(coming) != chosen.woken_ms:
        chosen.woken_ms = min(coming)
        wake_at(node, chosen.woken_ms)


def order_packs(node: Node, now_ms: int, out: list[Action]) -> None:
    """Order a pack of every resident model that has none, as far as the disk tier has room for it."""
    if not node.unpacked:
        return
    pending = 0
    pending_by_tenant: dict[str, int] = {}
    done: list[ModelRef] = []
    for ref, model in node.unpacked.items():
        coming = model.state is State.RESTORING
        if not (coming or model.state is State.RESIDENT) or not wants_pack(node, model, now_ms):
            if not (coming or model.state is State.RESIDENT) or model.disk.state is CopyState.HELD:
                done.append(ref)
            continue
        nbytes = pack_room_bytes(model)
        own = pending_by_tenant.get(ref.tenant, 0)
        going = room.copy_victims(node, model, Tier.DISK, nbytes, pending, own, now_ms)
        if going is None:
            model.pack_not_before_ms = now_ms + PACK_RETRY_MS
            continue
        for victim in going:
            order_drop(node, victim, Tier.DISK, out)
        # A model that is still coming keeps the room that was made for it, until it can be packed.
        fits = node.disk.fits(nbytes + pending) and model.tenant.disk.fits(nbytes + own)
        if fits and not coming:
            _order_pack(node, model, nbytes, out)
            done.append(ref)
        else:
            pending += nbytes
            pending_by_tenant[ref.tenant] = own + nbytes
    for ref in done:
        node.unpacked.pop(ref, None)


def _order_pack(node: Node, model: Model, nbytes: int, out: list[Action]) -> None:
    assert model.device is not None
    hold_pack(node, model, nbytes)
    out.append(Pack(model.ref, model.device.name, model.disk.held_bytes, model.disk.order))
