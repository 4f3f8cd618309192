"""The residency core of one node: ``step(node, event, now_ms) -> [Action]``.

Covers: what every event means for the state, in one place. Does not cover: the books (``ledger``), whose
turn it is (``queueing``), who must go (``room``, ``upkeep``), quotas (``quota``), what the agent reads of
the state (``views``), or the proof after every step (``invariants.check_after``).

Promises, besides those of ``check``: pure and deterministic (no clock, no I/O, no randomness, no set is
ever iterated); a late answer (to an order that a worker's death has ended) changes nothing; ``Finished``
and ``Cancelled`` of a request that is not known are ignored; ``Cancelled`` of a granted request ends it.
"""

from __future__ import annotations

from packer import (
    admission,
    estimate,
    facts,
    hits,
    prefetch,
    queueing,
    remember,
    room,
    turns,
    upkeep,
)
from packer.events import (
    Action,
    Answer,
    Asked,
    Cancelled,
    DebtFound,
    DeviceSeen,
    DrainAsked,
    Dropped,
    Event,
    Evicted,
    Filled,
    FillFailed,
    Finished,
    FootprintSeen,
    Grant,
    LendingChosen,
    NodeRemembered,
    PackBegun,
    Packed,
    PackFailed,
    PackFound,
    Planned,
    PolicyChosen,
    PrefetchChosen,
    RatesSeen,
    RefusalReason,
    Refuse,
    Requested,
    Restored,
    RestoreFailed,
    ServingBegun,
    ServingEnded,
    SharesSeen,
    SpentFound,
    Ticked,
    TierBudgetSeen,
    TookLate,
    UsesRemembered,
    WorkerDied,
)
from packer.forecast import forecast
from packer.intensity import note_use
from packer.invariants import check, check_after
from packer.ledger import (
    CopyState,
    Failure,
    Lease,
    Model,
    Node,
    State,
    Waiter,
    charge_copy,
    keep_begun,
    know_copies,
    measure_workspace,
    release_copy,
    release_device,
    settle_copy,
)
from packer.quota import InvariantBroken
from packer.types import Tier
from packer.views import (
    ModelView,
    TenantView,
    debts,
    device_bytes_used,
    model_view,
    rate_views,
    restore_ms_estimate,
    spent,
    tenant_view,
    tier_bytes_used,
)

__all__ = [
    "InvariantBroken",
    "ModelView",
    "Node",
    "TenantView",
    "check",
    "check_after",
    "debts",
    "device_bytes_used",
    "model_view",
    "rate_views",
    "restore_ms_estimate",
    "spent",
    "step",
    "step_in_full",
    "tenant_view",
    "tier_bytes_used",
]

# A model that can not be built is not tried again for this long: building fails the same way each time.
BROKEN_MS = 60_000
# After every tier failed, callers are turned away this long instead of queueing up behind one more try.
FAILED_MS = 5_000
# Pause before another try after a passing fault; doubles per try up to the limit.
BACKOFF_MS_FIRST = 200
BACKOFF_MS_MAX = 5_000


def step(node: Node, event: Event, now_ms: int) -> list[Action]:
    """Take in one fact; returns the orders that follow from it, in the order to carry them out."""
    now_ms = max(node.now_ms, now_ms)
    kind = type(event)
    if kind is Requested:
        assert isinstance(event, Requested)
        model = node.models.get(event.ref)
        if model is not None and hits.grant_at_once(node, event.request, model, now_ms, event.tokens):
            assert model.device is not None
            return [Grant(event.request, model.spec.ref, model.device.name, Tier.DEVICE, 0)]
    elif kind is Finished:
        assert isinstance(event, Finished)
        lease = node.requests.get(event.request)
        if type(lease) is Lease and hits.finish_quietly(node, lease, event.device_ms, now_ms, event.tokens):
            return []
    elif kind is Asked:
        assert isinstance(event, Asked)
        return [Answer(event.question, forecast(node, event.ref, now_ms))]
    return step_in_full(node, event, now_ms)


def step_in_full(node: Node, event: Event, now_ms: int) -> list[Action]:
    """``step`` without the shortcut for the common case, which makes the same changes."""
    now_ms = node.now_ms = max(node.now_ms, now_ms)
    out: list[Action] = []
    node.why.clear()
    if node.shares.are_due(now_ms):
        facts.halve_shares(node, now_ms)
    _take_in(node, event, now_ms, out)
    queueing.expire(node, now_ms, out)
    _settle(node, event, now_ms, out)
    queueing.schedule_wake(node, now_ms, out)
    return out


def _take_in(node: Node, event: Event, now_ms: int, out: list[Action]) -> None:
    """What the event says of requests and orders; other facts go on from here."""
    match event:
        case Requested():
            _requested(node, event, now_ms, out)
        case Finished():
            _finished(node, event.request, event.device_ms, event.tokens, now_ms)
        case Cancelled():
            _cancelled(node, event.request, now_ms)
        case Restored():
            _restored(node, event, now_ms, out)
        case ServingBegun():
            _serving_begun(node, event, now_ms, out)
        case ServingEnded():
            _serving_ended(node, event)
        case RestoreFailed():
            _restore_failed(node, event, now_ms, out)
        case Evicted():
            _evicted(node, event)
        case Packed():
            _packed(node, event)
        case PackFailed():
            _pack_failed(node, event, now_ms)
        case Dropped():
            _dropped(node, event)
        case WorkerDied():
            _worker_died(node, event, now_ms, out)
        case _:
            _take_fact(node, event, now_ms, out)


def _take_fact(node: Node, event: Event, now_ms: int, out: list[Action]) -> None:
    match event:
        case TookLate():
            if (tenant := node.tenants.get(event.tenant)) is not None:
                turns.note_late_use(tenant, event.device_ms, now_ms)
        case SpentFound():
            _spent_found(node, event, now_ms)
        case UsesRemembered():
            remember.take_up_uses(node, event, now_ms)
        case NodeRemembered():
            remember.take_up_node(node, event, now_ms)
        case PackFound():
            facts.pack_found(node, event)
        case PackBegun():
            facts.pack_begun(node, event)
        case Planned():
            facts.planned(node, event, now_ms, out)
        case DeviceSeen():
            facts.device_seen(node, event)
        case TierBudgetSeen():
            facts.tier_budget_seen(node, event)
        case RatesSeen():
            facts.rates_seen(node, event)
        case SharesSeen():
            facts.shares_seen(node, event, now_ms)
        case PolicyChosen():
            facts.policy_chosen(node, event.policy)
        case Filled() | FillFailed():
            prefetch.ended(node, event, now_ms)
        case PrefetchChosen():
            prefetch.choose(node, event)
        case LendingChosen():
            facts.lending_chosen(node, event.margin_percent)
        case DebtFound():
            facts.debt_found(node, event)
        case FootprintSeen():
            measure_workspace(node, event.ref, event.workspace_bytes)
        case DrainAsked():
            facts.drain_asked(node, event, out)
        case Ticked():
            # The wake-up asked for is spent; whatever is still due is asked for again below.
            node.wake_ms = None


def _settle(node: Node, event: Event, now_ms: int, out: list[Action]) -> None:
    """Draw the consequences until nothing more follows.

    A refusal or a grant inside may make room for the next; every round answers at least one request or
    starts something, so the rounds end.
    """
    while node.dirty:
        node.dirty = False
        upkeep.retire(node, out)
        upkeep.shed(node, now_ms, out)
        upkeep.expire(node, now_ms, out)
        for model in list(node.queue.values()):
            if queueing.grantable(node, model):
                queueing.grant_waiters(node, model, model.tier_now, now_ms, out)
        queueing.start_waiting(node, now_ms, out)
        upkeep.order_packs(node, now_ms, out)
        prefetch.look(node, event, now_ms, out)


# --- requests -------------------------------------------------------------------------------------


def _requested(node: Node, event: Requested, now_ms: int, out: list[Action]) -> None:
    if event.request in node.requests:
        raise InvariantBroken(f"request {event.request} was requested twice")
    model = node.models.get(event.ref)
    refusal = admission.refusal_of(node, event, model, now_ms)
    if refusal is not None or model is None:
        assert refusal is not None
        out.append(Refuse(event.request, refusal.reason, refusal.detail, refusal.retry_ms))
        return
    turns.arrive(node, model.tenant)
    tokens = model.tenant.rates.admit(event.tokens, now_ms)
    note_use(model.reuse, node.shared, now_ms)
    room.use_slice(node, model)
    if queueing.grantable(node, model):
        queueing.grant(node, event.request, model, model.tier_now, 0, now_ms, out, tokens)
    else:
        if not model.waiters:
            node.dirty = True
        queueing.enqueue(node, event.request, model, now_ms, event.deadline_ms, tokens)


def _finished(node: Node, request: str, device_ms: int, tokens: int, now_ms: int) -> None:
    lease = node.requests.get(request)
    if not isinstance(lease, Lease):
        return
    del node.requests[request]
    model = lease.model
    model.tenant.granted -= 1
    node.granted -= 1
    node.touched[model.ref] = None
    turns.note_use_of(lease, device_ms, tokens, now_ms)
    if lease.residency == model.residency:
        model.leases -= 1
        if not model.leases:
            node.dirty = True
            if node.chosen is not None:
                node.chosen.note_end(model.ref, node.now_ms)
    upkeep.forget_tenant(node, model.tenant)


def _cancelled(node: Node, request: str, now_ms: int) -> None:
    known = node.requests.get(request)
    if isinstance(known, Waiter):
        queueing.withdraw(node, known)
    else:
        _finished(node, request, 0, 0, now_ms)


def _spent_found(node: Node, event: SpentFound, now_ms: int) -> None:
    tenant = node.tenants.get(event.tenant)
    if tenant is not None and tenant.planned:
        tenant.rates.tokens.take_up(event.tokens, event.ago_ms, now_ms)
        tenant.rates.device.take_up(event.device_ms, event.ago_ms, now_ms)


# --- answers of orders ----------------------------------------------------------------------------


def _answers(model: Model | None, state: State, device: str, order: int) -> bool:
    """Is this the answer to the order that is under way, and not to one that was given up?"""
    return (
        model is not None
        and model.state is state
        and model.device is not None
        and model.device.name == device
        and order in (0, model.order)
    )


def _end_restore(node: Node, model: Model, host_filled: bool, taken_ms: int) -> None:
    """The running restore is over: its source may go, its host reservation is a copy or is free, and its
    tenant pays for it."""
    turns.end_restore(model, taken_ms)
    if model.source is not Tier.ORIGIN:
        model.copy(model.source).readers -= 1
    if model.host.state is CopyState.FILLING and not model.host.order:
        if host_filled:
            settle_copy(node, model, Tier.HOST, model.host.held_bytes)
            room.note_copy(node, model, Tier.HOST)
        else:
            release_copy(node, model, Tier.HOST)
    model.order = 0
    node.dirty = True


def _restored(node: Node, event: Restored, now_ms: int, out: list[Action]) -> None:
    model = node.models.get(event.ref)
    if model is None or not _answers(model, State.RESTORING, event.device, event.order):
        return
    model.state = State.RESIDENT
    taken_ms = max(event.restore_ms, 0)
    if model.serving:
        # Requests have computed meanwhile, which they are charged for, and slowed it down.
        taken_ms = min(taken_ms, model.expected_ms)
    _end_restore(node, model, event.host_filled, taken_ms)
    if not model.serving:
        model.residency += 1
        model.leases = 0
        # What was read for the host copy alone took its time as well.
        moved_bytes = max(event.restored_bytes, model.moving_bytes)
        estimate.note_restore(node.learned, model.history, model.source, moved_bytes, taken_ms, event.cached)
    model.serving, model.kept_chunks = False, 0
    model.tries.clear()
    model.gains = None
    model.failure = None
    room.watch_estimates(node, model.source, now_ms)
    room.gains(node, model)
    turns.note_restore_time(model, taken_ms, now_ms)
    if model.disk.state in (CopyState.ABSENT, CopyState.BEGUN):
        node.unpacked[model.ref] = model
    # Leased in the same step, before anyone may evict it.
    if queueing.grantable(node, model):
        queueing.grant_waiters(node, model, model.source, now_ms, out)


def _serving_begun(node: Node, event: ServingBegun, now_ms: int, out: list[Action]) -> None:
    """The stay begins here: leases pin nothing while bytes come, but they count from now on."""
    model = node.models.get(event.ref)
    if model is None or model.serving or not _answers(model, State.RESTORING, event.device, event.order):
        return
    model.serving = True
    model.residency += 1
    model.leases = 0
    node.touched[model.ref] = None
    if queueing.grantable(node, model):
        queueing.grant_waiters(node, model, model.source, now_ms, out)


def _serving_ended(node: Node, event: ServingEnded) -> None:
    model = node.models.get(event.ref)
    if model is not None and _answers(model, State.RESTORING, event.device, event.order):
        _send_away(node, model)


def _send_away(node: Node, model: Model) -> None:
    """Who was let in before all was there ends with the worker's error; such a lease pins nothing any
    more, and the next stay is another."""
    if model.serving:
        model.serving, model.leases = False, 0
        model.residency += 1
        node.touched[model.ref] = None


def _restore_failed(node: Node, event: RestoreFailed, now_ms: int, out: list[Action]) -> None:
    model = node.models.get(event.ref)
    if model is None or not _answers(model, State.RESTORING, event.device, event.order):
        return
    source = model.source
    _give_up_restore(node, model, min(max(event.kept_chunks, 0), model.kept_chunks))
    # A pack that was written beside this load failed with it: the next load may try one again at once
    # and go on where this one stopped.
    model.pack_not_before_ms = min(model.pack_not_before_ms, now_ms)
    if event.broken:
        # The model's own fault: its tenant pays for the time.
        turns.note_restore_time(model, now_ms - model.started_ms, now_ms)
        model.failure = Failure(RefusalReason.MODEL_BROKEN, event.message, now_ms + BROKEN_MS)
        queueing.refuse_all(node, model, RefusalReason.MODEL_BROKEN, event.message, None, out)
    elif event.corrupt and source is not Tier.ORIGIN and not model.copy(source).readers:
        # The copy is bad, the next tier is asked at once.
        queueing.order_drop(node, model, source, out)
    else:
        _try_again_later(node, model, source, RefusalReason.RESTORE_FAILED, event.message, now_ms, out)


def _give_up_restore(node: Node, model: Model, kept_chunks: int) -> None:
    """A pack that was being written beside it keeps its reservation until its own answer says what is
    left of the file, but pins nothing any more."""
    _end_restore(node, model, host_filled=False, taken_ms=node.now_ms - model.started_ms)
    model.packing = False
    _send_away(node, model)
    release_device(node, model, kept_chunks)


def _try_again_later(
    node: Node,
    model: Model,
    source: Tier,
    reason: RefusalReason,
    message: str,
    now_ms: int,
    out: list[Action],
) -> None:
    """Count a passing fault of a tier: back off and try again, or turn callers away for a while."""
    model.tries[source] = model.tries.get(source, 0) + 1
    if room.source_tier(model) is not None:
        failed = sum(model.tries.values())
        model.not_before_ms = now_ms + min(BACKOFF_MS_FIRST << min(failed - 1, 16), BACKOFF_MS_MAX)
        queueing.wake_at(node, model.not_before_ms)
        return
    model.tries.clear()
    model.counted = False
    model.not_before_ms = 0
    detail = f"{model.ref} could not be restored from any tier: {message}"
    model.failure = Failure(reason, detail, now_ms + FAILED_MS)
    queueing.refuse_all(node, model, reason, detail, FAILED_MS, out)


def _evicted(node: Node, event: Evicted) -> None:
    model = node.models.get(event.ref)
    if model is None or not _answers(model, State.EVICTING, event.device, event.order):
        return
    release_device(node, model, model.kept_chunks)
    node.dirty = True


def _packed(node: Node, event: Packed) -> None:
    model = node.models.get(event.ref)
    if model is None or model.disk.state is not CopyState.FILLING:
        return
    if event.order not in (0, model.disk.order):
        return
    model.packing = False
    model.opened_bytes = event.host_bytes
    model.read_bytes = event.read_bytes or event.disk_bytes
    settle_copy(node, model, Tier.DISK, event.disk_bytes)
    room.note_copy(node, model, Tier.DISK)
    # It was written through the page cache a moment ago.
    know_copies(node, model, cached=True)
    node.dirty = True


def _pack_failed(node: Node, event: PackFailed, now_ms: int) -> None:
    model = node.models.get(event.ref)
    if model is None or model.disk.state is not CopyState.FILLING:
        return
    if event.order not in (0, model.disk.order):
        return
    if model.packing:
        # The stay is there, so the disk is to blame. What a failed load took with it may be tried again.
        model.pack_not_before_ms = now_ms + upkeep.PACK_RETRY_MS
    model.packing = False
    if event.kept_bytes > 0:
        # Never more than was reserved, whoever says so.
        keep_begun(node, model, min(event.kept_bytes, model.disk.held_bytes))
    else:
        release_copy(node, model, Tier.DISK)
    if model.state is State.RESIDENT:
        node.unpacked[model.ref] = model
    node.dirty = True


def _dropped(node: Node, event: Dropped) -> None:
    model = node.models.get(event.ref)
    if model is None or event.tier not in (Tier.HOST, Tier.DISK):
        return
    copy = model.copy(event.tier)
    if copy.state is not CopyState.DROPPING or event.order not in (0, copy.order):
        return
    release_copy(node, model, event.tier)
    for ref, nbytes in event.charged:
        charge_copy(node, node.models[ref], event.tier, nbytes)
    if event.tier is Tier.DISK and model.state is State.RESIDENT:
        node.unpacked[model.ref] = model
    node.dirty = True


def _worker_died(node: Node, event: WorkerDied, now_ms: int, out: list[Action]) -> None:
    device = node.devices.get(event.device) or node.places.get(event.device)
    for model in [m for m in (device.models.values() if device else ()) if m.ref.tenant == event.tenant]:
        if model.device is not device:
            continue  # a gang has a worker of its own
        if model.packing:
            # If it was the packing that killed the worker, the next load shall come through without.
            model.pack_not_before_ms = now_ms + upkeep.PACK_RETRY_MS
        if model.state is State.RESTORING:
            source = model.source
            _give_up_restore(node, model, kept_chunks=0)
            message = f"the worker on {event.device} died"
            _try_again_later(node, model, source, RefusalReason.WORKER_DIED, message, now_ms, out)
        else:
            # Its leases end with their own Finished, but pin nothing any more. A pack that was being
            # written keeps its reservation until its answer says what is left of the file.
            release_device(node, model, kept_chunks=0)
            model.leases = 0
            model.residency += 1
            model.packing = False
            node.unpacked.pop(model.ref, None)
            node.condemned.pop(model.ref, None)
    node.dirty = True
