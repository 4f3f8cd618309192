"""The common case in a few microseconds: the model is there, nobody waits, the request may use it at once.

Covers: granting such a request and ending it, with the very changes that the whole step would make. Does
not cover: everything else. The functions say None or False and change nothing as soon as anything is out
of the ordinary, and the whole step (``residency.step_in_full``) is taken instead. That they agree in every
field of the state is tested over many random histories (``tests/test_hits.py``).

Who adds a rule to ``residency._requested`` or a consequence to the end of a lease must add it here, or make
these functions stand back when it applies.
"""

from __future__ import annotations

from packer.intensity import note_use
from packer.ledger import Lease, Model, Node, State, Waiter
from packer.room import use_slice
from packer.turns import arrive, note_device_time, note_use_of

_RESIDENT = State.RESIDENT
# More timers than this beyond two per waiting request: the whole step, which sweeps stale ones some time
# later (``queueing.STALE_TIMERS_MAX``).
TIMERS_LOOKED_PAST = 128
# Later than any request: three hundred years.
NEVER_MS = 10**13


def is_quiet(node: Node, now_ms: int) -> bool:
    """Is nothing due at this moment, and would nobody have to be asked for another wake-up?"""
    timers = node.timers
    if node.why:
        return False  # the whole step takes away what the one before it explained
    if node.shares.are_due(now_ms):
        return False
    if not timers:
        return not node.dirty
    at_ms, _, request = timers[0]
    wake_ms = node.wake_ms
    return (
        not node.dirty
        and wake_ms is not None
        and now_ms < wake_ms <= at_ms
        # A timer of an answered request would be swept.
        and (not request or type(node.requests.get(request)) is Waiter)
        and len(timers) <= 2 * node.waiting + TIMERS_LOOKED_PAST
    )


def grant_at_once(node: Node, request: str, model: Model, now_ms: int, tokens: int = 0) -> Lease | None:
    """Grant the request in its first moment, or None: take the whole step.

    ``now_ms`` is not before ``node.now_ms``.
    """
    device, tenant = model.device, model.tenant
    if (
        model.state is not _RESIDENT
        or device is None
        or not device.healthy
        or not model.planned
        or node.draining
        or node.chosen is not None
        or request in node.requests
        or (node.condemned and model.ref in node.condemned)
        or not is_quiet(node, now_ms)
    ):
        return None
    rates = tenant.rates
    if rates.slots is not None and tenant.waiting + tenant.granted >= rates.slots:
        return None
    reserved = 0
    if rates.limited:
        if rates.blocked(now_ms, (tenant.waiting + tenant.granted) * tenant.use_ms):
            return None
        reserved = rates.admit(tokens, now_ms)
    node.now_ms = now_ms
    if not tenant.granted and not tenant.waiting:
        arrive(node, tenant)
    note_use(model.reuse, node.shared, now_ms)
    if tenant.slice.reserved_bytes:
        use_slice(node, model)
    node.requests[request] = lease = Lease(request, model, model.residency, reserved)
    model.leases += 1
    tenant.granted += 1
    node.granted += 1
    node.touched[model.spec.ref] = None
    return lease


def calm_until_ms(node: Node) -> int:
    """Before this moment nothing is due, and no end of a lease is followed by anything: 0 when somebody
    waits, must go or may not stay. It holds until the next whole step."""
    if (
        node.draining
        or node.chosen is not None
        or node.condemned
        or node.queue
        or node.removed
        or node.unpacked
        or any(not device.healthy or device.account.excess_bytes for device in node.devices.values())
        or any(not tenant.planned or tenant.device.excess_bytes for tenant in node.tenants.values())
    ):
        return 0
    least_ms, most_ms = node.now_ms, NEVER_MS
    if is_quiet(node, most_ms):
        return most_ms
    # When it stops being quiet is one of two moments, if it is quiet at all.
    until_ms = min(node.wake_ms or most_ms, node.shares.halve_at_ms or most_ms)
    return until_ms if until_ms > least_ms and is_quiet(node, until_ms - 1) else 0


def use_at_once(node: Node, model: Model, now_ms: int, end_ms: int) -> bool:
    """Grant a request and end it, when nothing at all happens in between and ``end_ms`` is calm; False and
    nothing is changed: take ``grant_at_once``. For a simulation, which knows both moments beforehand.

    What the two would do and undo again is left out: the lease, and whatever counts it.
    """
    tenant = model.tenant
    rates = tenant.rates
    if model.state is not _RESIDENT or not model.planned or rates.limited or rates.slots is not None:
        return False
    if not tenant.granted and not tenant.waiting:
        arrive(node, tenant)
    note_use(model.reuse, node.shared, now_ms)
    if tenant.slice.reserved_bytes:
        node.now_ms = now_ms
        use_slice(node, model)
        node.touched[model.spec.ref] = None
    node.now_ms = end_ms
    note_device_time(tenant, end_ms - now_ms)
    return True


def finish_quietly(node: Node, lease: Lease, device_ms: int, now_ms: int, tokens: int = 0) -> bool:
    """End the lease if nothing follows from that; False: take the whole step.

    ``now_ms`` is not before ``node.now_ms``.
    """
    model = lease.model
    tenant, device = model.tenant, model.device
    ends = lease.residency == model.residency and model.leases == 1
    # When it becomes idle: does somebody want its room, or must it go? If not, the whole step would look
    # around and find nothing to do.
    if ends and (
        node.queue
        or node.chosen is not None
        or node.removed
        or node.unpacked
        or node.condemned
        or device is None
        or not device.healthy
        or device.account.excess_bytes
        or device.members  # any of them may be over its budget
        or tenant.device.excess_bytes
    ):
        return False
    if not tenant.planned or not is_quiet(node, now_ms):
        return False
    node.now_ms = now_ms
    del node.requests[lease.request]
    tenant.granted -= 1
    node.granted -= 1
    node.touched[model.spec.ref] = None
    note_use_of(lease, device_ms, tokens, now_ms)
    if lease.residency == model.residency:
        model.leases -= 1
    return True
