"""Requests: who waits, whose turn it is, who may evict, and every grant and refusal.

Covers: granting, waiting, deadlines and timers, retry hints, the fair order between tenants, claims on
devices, starting restores and evictions for waiting models. Does not cover: what an event means
(``residency``), which victims to take (``room``), or bytes below the device (``upkeep``).

Whose turn it is says ``turns``. Each device has at most one **claim**: the first waiting model that needs
room there; a gang has one on each of its devices. Only the claim may evict, and its room is promised to it,
so two waiting models can not evict each other's prey for ever; a later one may pass only if it fits into what
is free beyond the promise. A claim that waited ``CLAIM_PATIENCE_MS`` for models in use condemns them: what
runs goes on, what comes new waits, so that a model in constant use can not starve another tenant. A model
whose tenant is above its rate of restores keeps its place, claims nothing and holds up nobody.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from packer import choice, estimate, explain, moving, room, turns, victims
from packer.events import Action, Drop, Evict, Grant, RefusalReason, Refuse, Restore, StopFill, Wake
from packer.ledger import (
    Claim,
    CopyState,
    Device,
    Lease,
    Model,
    Moving,
    Node,
    State,
    Waiter,
    hold_copy,
    hold_device,
    leave_copy,
    leave_device,
    next_order,
    pack_room_bytes,
)
from packer.types import ModelRef, Tier

# Waiting requests cost some 500 bytes each here and a socket in the gateway; a tenant that queues more
# than this is better served by a 429 that says when to come back.
WAITING_PER_TENANT_MAX = 256
WAITING_MAX = 4096
# Blocked models looked at in one step. Beyond that they keep their place and are tried in a later step;
# it bounds the time of a step when very many models wait.
BLOCKED_PER_STEP_MAX = 64
# How long a claim lets newcomers go on using the models that it needs gone: some hundred warm answers,
# and short against the seconds that people wait for a cold model.
CLAIM_PATIENCE_MS = 2_000
# Retry hints: not sooner than a network round trip makes sense, not later than a client keeps waiting.
RETRY_MS_MIN = 100
RETRY_MS_MAX = 120_000
# Stale timers are swept once there are this many more than live ones.
STALE_TIMERS_MAX = 256


# --- timers ---------------------------------------------------------------------------------------


def wake_at(node: Node, at_ms: int, request: str = "") -> None:
    """Look again at ``at_ms``: at the request's deadline, or (no request) at whatever waits then."""
    node.timer_sequence += 1
    heapq.heappush(node.timers, (at_ms, node.timer_sequence, request))


def _stale(node: Node, request: str) -> bool:
    return bool(request) and not isinstance(node.requests.get(request), Waiter)


def expire(node: Node, now_ms: int, out: list[Action]) -> None:
    """Handle the timers that are due: refuse waiters past their deadline."""
    timers = node.timers
    while timers and timers[0][0] <= now_ms:
        _, _, request = heapq.heappop(timers)
        if not request:
            node.dirty = True
            continue
        waiter = node.requests.get(request)
        if isinstance(waiter, Waiter):
            model = waiter.model
            retry = retry_ms(node, model, now_ms)
            waited_ms = now_ms - waiter.arrived_ms
            detail = f"{model.ref} was not ready after {waited_ms} ms; it is {_standing(model)}"
            refuse_waiter(node, waiter, RefusalReason.TIMEOUT, detail, retry, out)


def _standing(model: Model) -> str:
    if model.state is State.RESTORING:
        return f"being restored from the {model.source} tier"
    return "waiting for room" if model.startable else f"{model.state} and not free"


def schedule_wake(node: Node, now_ms: int, out: list[Action]) -> None:
    """Ask to be woken for the next live timer, unless an earlier wake-up is on its way."""
    timers = node.timers
    if len(timers) > 2 * node.waiting + STALE_TIMERS_MAX:
        node.timers = timers = [entry for entry in timers if not _stale(node, entry[2])]
        heapq.heapify(timers)
    while timers and _stale(node, timers[0][2]):
        heapq.heappop(timers)
    if not timers:
        return
    at_ms = timers[0][0]
    if node.wake_ms is None or node.wake_ms <= now_ms or at_ms < node.wake_ms:
        node.wake_ms = at_ms
        out.append(Wake(at_ms))


# --- answers --------------------------------------------------------------------------------------


def grantable(node: Node, model: Model) -> bool:
    """May a request use the model right now?"""
    device = model.device
    return (
        (model.state is State.RESIDENT or model.serving)
        and model.planned
        and device is not None
        and device.healthy
        and model.ref not in node.condemned
    )


def grant(
    node: Node,
    request: str,
    model: Model,
    tier: Tier,
    waited_ms: int,
    now_ms: int,
    out: list[Action],
    tokens: int,
) -> None:
    """``tokens`` are reserved of the tenant's rate already."""
    assert model.device is not None
    node.requests[request] = Lease(request, model, model.residency, tokens)
    model.leases += 1
    model.tenant.granted += 1
    node.granted += 1
    node.touched[model.ref] = None
    if node.chosen is not None:
        room.note_use(node, model, now_ms)
    out.append(Grant(request, model.ref, model.device.name, tier, waited_ms))


def enqueue(node: Node, request: str, model: Model, now_ms: int, deadline_ms: int, tokens: int) -> None:
    """``tokens`` are reserved of the tenant's rate already."""
    tenant = model.tenant
    if not tenant.waiting:
        turns.forgive(node, tenant)
    waiter = Waiter(request, model, now_ms, deadline_ms, tokens)
    node.requests[request] = waiter
    model.waiters[request] = waiter
    node.queue[model.ref] = model
    tenant.waiting += 1
    node.waiting += 1
    node.touched[model.ref] = None
    wake_at(node, deadline_ms, request)


def leave_queue(node: Node, waiter: Waiter) -> None:
    """Take a waiter out of every book but its tokens' reservation; it is answered or gone."""
    model = waiter.model
    del node.requests[waiter.request]
    del model.waiters[waiter.request]
    model.tenant.waiting -= 1
    node.waiting -= 1
    node.touched[model.ref] = None
    if not model.waiters:
        del node.queue[model.ref]
        model.tenant.slice.give_up(model.shade)
        node.dirty = True


def withdraw(node: Node, waiter: Waiter) -> None:
    """A waiter leaves and will never run: what was reserved for it is free."""
    model = waiter.model
    leave_queue(node, waiter)
    model.tenant.rates.tokens.reserved -= waiter.tokens
    if not model.waiters and model.startable:
        model.counted = False


def refuse_waiter(
    node: Node, waiter: Waiter, reason: RefusalReason, detail: str, retry: int | None, out: list[Action]
) -> None:
    withdraw(node, waiter)
    out.append(Refuse(waiter.request, reason, detail, retry))


def refuse_all(
    node: Node, model: Model, reason: RefusalReason, detail: str, retry: int | None, out: list[Action]
) -> None:
    for waiter in list(model.waiters.values()):
        refuse_waiter(node, waiter, reason, detail, retry, out)


def grant_waiters(node: Node, model: Model, tier: Tier, now_ms: int, out: list[Action]) -> None:
    """Grant everybody who waits for a model that is there; oldest first."""
    for waiter in list(model.waiters.values()):
        leave_queue(node, waiter)
        # Whoever waited only for a condemnation to pass did not wait for a restore.
        waited_ms = 0 if tier is Tier.DEVICE else now_ms - waiter.arrived_ms
        grant(node, waiter.request, model, tier, waited_ms, now_ms, out, waiter.tokens)


def clamp_retry_ms(ms: int) -> int:
    return min(max(ms, RETRY_MS_MIN), RETRY_MS_MAX)


def retry_ms(node: Node, model: Model, now_ms: int) -> int:
    """When to come back for a model: what its restore still takes, and those before it in the queue."""
    if model.state is State.RESTORING:
        return clamp_retry_ms(model.expected_ms - (now_ms - model.started_ms))
    expected_ms = room.restore_ms(node, model)
    if model.state is State.RESIDENT:
        return clamp_retry_ms(0)
    for before in node.queue.values():
        if before is model:
            break
        expected_ms += room.restore_ms(node, before)
        if expected_ms >= RETRY_MS_MAX:
            break
    return clamp_retry_ms(max(expected_ms, model.not_before_ms - now_ms))


# --- orders on devices ----------------------------------------------------------------------------


def order_evict(
    node: Node, model: Model, out: list[Action], keep_chunks: int = 0, forced: bool = False
) -> None:
    """``forced``: no policy could have helped it, so what its tenant's slice does not allow is excused."""
    assert model.device is not None
    model.state = State.EVICTING
    model.order = next_order(node)
    leave_device(node, model, keep_chunks)
    slice_ = model.tenant.slice
    if forced and slice_.is_over(node.terms):
        slice_.lose(model.shade, model.device_bytes - model.leaving_bytes)
    node.unpacked.pop(model.ref, None)
    node.condemned.pop(model.ref, None)
    out.append(Evict(model.ref, model.device.name, keep_chunks, model.order))


def start_restore(node: Node, model: Model, device: Device, now_ms: int, out: list[Action]) -> None:
    source = room.source_tier(model)
    if source is None:
        # The last tier that had tries left lost its copy meanwhile: a new round over all tiers.
        model.tries.clear()
        source = room.source_tier(model) or Tier.ORIGIN
    # The origin gives whole models only; what is there already is brought again with the rest.
    first_chunk = 0 if source is Tier.ORIGIN else model.resident_chunks
    model.moving_bytes = room.moved_bytes(model, source)
    hold_device(node, model, device)
    model.state = State.RESTORING
    model.kept_chunks = first_chunk
    model.source = source
    model.order = next_order(node)
    model.started_ms = now_ms
    if not model.counted:
        model.tenant.rates.restores.take(now_ms)
        model.counted = True
    # The node's virtual time follows whoever is served, so that newcomers start level with them.
    node.virtual_us = max(node.virtual_us, model.tenant.virtual_us)
    host_bytes = 0
    if source is not Tier.ORIGIN:
        model.copy(source).readers += 1
    if source is Tier.HOST:
        node.prefetch.ahead.pop(model.ref, None)
    else:
        stop_fill(node, out)
    if source is Tier.DISK:
        make_host_room(node, model, now_ms, out)
        host_bytes = _reserve_host(node, model)
    if host_bytes:
        # The host copy wants all chunks, so all are read, whatever is on the device already.
        model.moving_bytes = model.spec.image_bytes
    disk_bytes = pack_order = 0
    if source is Tier.ORIGIN:
        make_pack_room(node, model, now_ms, out)
        disk_bytes = _reserve_pack(node, model, now_ms)
        pack_order = model.disk.order if disk_bytes else 0
        if not disk_bytes:
            node.unpacked[model.ref] = model
    estimate.expect_fill(model.history, source, host_bytes or disk_bytes)
    model.expected_ms = room.restore_ms_from(node, model, source, model.moving_bytes)
    turns.expect(model)
    explain.placed(node, model, device, moved=not model.waiters)
    out.append(
        Restore(model.ref, device.name, source, first_chunk, host_bytes, model.order, disk_bytes, pack_order)
    )


def stop_fill(node: Node, out: list[Action]) -> None:
    """Somebody needs the disk, or the room: what is filled ahead of need ends."""
    state = node.prefetch
    if state.filling is not None and not state.stopping:
        state.stopping = True
        out.append(StopFill(state.filling.ref, state.filling.host.order))


def make_host_room(node: Node, model: Model, now_ms: int, out: list[Action]) -> None:
    """Drop less valuable host copies so that this model's next restore from disk can leave one.

    Nobody waits for it: if the room is there when the restore starts, the copy is made on the way.
    """
    if model.host.state is not CopyState.ABSENT or not model.opened_bytes or node.host.limit_bytes is None:
        return
    if not room.has_copy(model, Tier.DISK):
        return
    for victim in room.copy_victims(node, model, Tier.HOST, model.opened_bytes, 0, 0, now_ms) or ():
        order_drop(node, victim, Tier.HOST, out)


def _reserve_host(node: Node, model: Model) -> int:
    nbytes = model.opened_bytes
    known = nbytes > 0 and node.host.limit_bytes is not None and model.host.state is CopyState.ABSENT
    if not known or not node.host.fits(nbytes) or not model.tenant.host.fits(nbytes):
        return 0
    hold_copy(node, model, Tier.HOST, nbytes)
    return nbytes


def wants_pack(node: Node, model: Model, now_ms: int) -> bool:
    """May a pack of this model be reserved now, as far as it depends on the model alone?"""
    return (
        model.planned
        and not node.draining
        and node.disk.limit_bytes is not None
        and model.disk.state in (CopyState.ABSENT, CopyState.BEGUN)
        and now_ms >= model.pack_not_before_ms
    )


def make_pack_room(node: Node, model: Model, now_ms: int, out: list[Action]) -> None:
    """Drop less valuable packs so that this model's load from its origin can leave one beside it.

    Nobody waits for it: if the room is not there when the load starts, the pack is written afterwards.
    """
    if not wants_pack(node, model, now_ms):
        return
    nbytes = pack_room_bytes(model)
    for victim in room.copy_victims(node, model, Tier.DISK, nbytes, 0, 0, now_ms) or ():
        order_drop(node, victim, Tier.DISK, out)


def _reserve_pack(node: Node, model: Model, now_ms: int) -> int:
    """Take the room of a pack that is written beside the load; 0 when there is none."""
    nbytes = pack_room_bytes(model)
    if (
        not wants_pack(node, model, now_ms)
        or not node.disk.fits(nbytes)
        or not model.tenant.disk.fits(nbytes)
    ):
        return 0
    hold_pack(node, model, nbytes)
    return model.disk.held_bytes


def hold_pack(node: Node, model: Model, nbytes: int) -> None:
    """Reserve the room of a pack that is written from this stay on the device, and pin the stay."""
    hold_copy(node, model, Tier.DISK, nbytes)
    model.packing = True
    model.disk.order = next_order(node)


def order_drop(node: Node, model: Model, tier: Tier, out: list[Action]) -> None:
    leave_copy(node, model, tier)
    if tier is Tier.HOST:
        node.prefetch.ahead.pop(model.ref, None)
    copy = model.copy(tier)
    copy.order = next_order(node)
    out.append(Drop(model.ref, tier, copy.order))


# --- whose turn -----------------------------------------------------------------------------------


def start_waiting(node: Node, now_ms: int, out: list[Action]) -> None:
    """Start what can start, let the claims evict, refuse what can never fit."""
    before = node.condemned
    promises = choice.standing(node, now_ms)
    condemned: dict[Model, Model] = {}
    blocked = 0
    claiming: dict[str, int] = {}  # by tenant: models with a claim that will count as a restore
    for model in turns.in_turn(node, now_ms) if not node.draining else ():
        if blocked >= BLOCKED_PER_STEP_MAX:
            break
        if not model.startable:
            continue  # a model whose turn came first has taken its first chunks meanwhile
        promises.lay_down(model)
        if not _may_restore(node, model, claiming, now_ms):
            continue
        if not _try_start(node, model, promises, condemned, now_ms, out):
            blocked += 1
            if not model.counted and any(claim.ref == model.ref for claim in promises.claims.values()):
                name = model.tenant.spec.tenant
                claiming[name] = claiming.get(name, 0) + 1
    _finish_moves(node, promises, now_ms, out)
    for device in node.devices.values():
        device.claim = promises.claims.get(device.name)
    node.condemned = {victim.ref: wanted.ref for victim, wanted in condemned.items()}
    for ref in before:
        if ref not in node.condemned:
            release_condemned(node, ref, now_ms, out)


def _finish_moves(node: Node, promises: choice.Promises, now_ms: int, out: list[Action]) -> None:
    """Restore what was evicted to be moved where it was to go, if that is still possible; else it stays
    away until somebody wants it."""
    for ref, move in list(node.moves.items()):
        model, device = node.models[ref], node.devices[move.target]
        if model.state is State.EVICTING or moving.waits(model, device, promises.earlier):
            continue
        del node.moves[ref]
        promises.lay_down(model)
        if model.state is not State.ABSENT or model.waiters or not model.planned or node.draining:
            continue
        if not device.healthy or room.source_tier(model) is not Tier.HOST or model.spec.devices > 1:
            continue
        if turns.startable(model, now_ms) and victims.fits_now(model, device, promises.earlier):
            model.counted, model.payer = True, move.payer
            start_restore(node, model, device, now_ms, out)


def _may_restore(node: Node, model: Model, claiming: dict[str, int], now_ms: int) -> bool:
    """Does the tenant's rate of restores let this model start or claim a device now? If not, it keeps
    its place, holds up nobody and is looked at again when the rate allows it."""
    tenant = model.tenant
    rate = tenant.rates.restores
    if model.counted or rate.limit is None:
        return True
    wait_ms = rate.wait_ms(now_ms, 1 + claiming.get(tenant.spec.tenant, 0))
    if wait_ms and not now_ms < tenant.restores_wake_ms <= now_ms + wait_ms:
        tenant.restores_wake_ms = now_ms + wait_ms
        wake_at(node, tenant.restores_wake_ms)
        explain.delayed(node, model, wait_ms)
    return not wait_ms


def release_condemned(node: Node, ref: ModelRef, now_ms: int, out: list[Action]) -> None:
    """A claim that no longer needs this model lets its waiters go on."""
    model = node.queue.get(ref)
    if model is not None and grantable(node, model):
        grant_waiters(node, model, Tier.DEVICE, now_ms, out)


def _try_start(
    node: Node,
    model: Model,
    promises: choice.Promises,
    condemned: dict[Model, Model],
    now_ms: int,
    out: list[Action],
) -> bool:
    """Start a restore if it fits, else claim a device; True when the model no longer waits for room."""
    chosen = choice.choose(node, model, promises, now_ms)
    device = chosen.device
    if chosen.turn is choice.Turn.START and device is not None:
        if model.payer is not None:
            # It was moved for somebody else and that failed: this is its own restore.
            model.payer, model.counted = None, False
        start_restore(node, model, device, now_ms, out)
        return True
    if chosen.turn is choice.Turn.GIVE_UP:
        order_evict(node, model, out, forced=True)
    if chosen.hope is not None:
        refuse_all(node, model, chosen.hope.reason, chosen.hope.detail, chosen.hope.retry_ms, out)
        return True
    if device is not None and chosen.turn is choice.Turn.HOLD:
        _hold(node, model, device, promises, now_ms)
    elif device is not None:
        _claim(node, model, device, chosen.takings, promises, condemned, now_ms, out)
    return False


def _claimed_since(model: Model, device: Device) -> int | None:
    """Since when it claims the device, or all devices of the place; None: it does not."""
    claims = [each.claim for each in device.parts]
    mine = [claim.since_ms for claim in claims if claim is not None and claim.ref == model.ref]
    return max(mine) if len(mine) == len(claims) else None


def _hold(node: Node, model: Model, place: Device, promises: choice.Promises, now_ms: int) -> None:
    """Claim some of the devices that a gang needs: what gets free there stays so until it has them all."""
    since_ms = _claimed_since(model, place)
    if since_ms is None:
        explain.held(node, model, place)
    promises.add(place, model, Claim(model.ref, now_ms if since_ms is None else since_ms))


def _claim(
    node: Node,
    model: Model,
    device: Device,
    takings: Sequence[victims.Taking],
    promises: choice.Promises,
    condemned: dict[Model, Model],
    now_ms: int,
    out: list[Action],
) -> None:
    """Claim the device, evict what may go there now, and lose patience with what is in use for too long."""
    since_ms = _claimed_since(model, device)
    if since_ms is None:
        since_ms = now_ms
        wake_at(node, now_ms + CLAIM_PATIENCE_MS)
        explain.claimed(node, model, device, takings, now_ms)
    if all(taking.model.idle for taking in takings):
        if takings and since_ms != now_ms:
            explain.claimed(node, model, device, takings, now_ms)
        for taking in takings:
            order_evict(node, taking.model, out, taking.keep_chunks, taking.forced)
            if taking.moves_to:
                node.moves[taking.model.ref] = Moving(taking.moves_to, model.tenant)
                promises.add_move(taking.model, taking.moves_to)
        if room.source_tier(model) is Tier.ORIGIN:
            make_pack_room(node, model, now_ms, out)
        else:
            make_host_room(node, model, now_ms, out)
    elif now_ms - since_ms >= CLAIM_PATIENCE_MS:
        busy = [taking.model for taking in takings if taking.model.state is State.RESIDENT]
        condemned.update((victim, model) for victim in busy)
        explain.condemned(node, model, device, busy)
    promises.add(device, model, Claim(model.ref, since_ms))


def waiting_refusal(node: Node, model: Model, now_ms: int) -> victims.Hopeless | None:
    """Why one more request for this model may not wait, or None."""
    failure = model.failure
    if failure is not None and now_ms < failure.until_ms:
        lasting = failure.reason is RefusalReason.MODEL_BROKEN
        retry = None if lasting else clamp_retry_ms(failure.until_ms - now_ms)
        return victims.Hopeless(failure.reason, failure.message, retry)
    if model.tenant.waiting >= WAITING_PER_TENANT_MAX or node.waiting >= WAITING_MAX:
        mine = model.tenant.waiting >= WAITING_PER_TENANT_MAX
        whose = f"tenant {model.ref.tenant}" if mine else "this node"
        limit = WAITING_PER_TENANT_MAX if mine else WAITING_MAX
        return victims.Hopeless(
            RefusalReason.QUEUE_FULL,
            f"{limit} requests of {whose} are waiting already, the limit",
            retry_ms(node, model, now_ms),
        )
    if model.startable and not model.waiters:
        return choice.hopeless(node, model, now_ms)
    return None
