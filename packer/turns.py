"""Whose turn it is: fair queueing between tenants, over device time and the restores that each causes.

Covers: a tenant's virtual time when it comes, what it is charged, priorities, and the order of the models
that wait. Does not cover: starting them (``queueing``), rates (``rates``), or who may take whose bytes.

A tenant's virtual time is the cost that it caused, by its weight: measured device time of its requests, and
the time of the restores that they needed. The least goes first. While two tenants both wait without a
pause for the same room, neither gets ahead of the other, by weight, by more than two turns of its own and
one of the other's. A turn is one restore (as expected or as it was, whichever is longer) and the requests
that it serves: whose turn is next is chosen before the cost of the present one is known. Idle time saves
nothing up: who comes back starts level with the least served of those in flight.

Priorities decide until a model has waited ``PRIORITY_PATIENCE_MS``; from then on it has the highest priority
of those that wait, so that virtual time decides and a tenant of any priority gets its share.
"""

from __future__ import annotations

import heapq

from packer import keep, quota, room
from packer.ledger import Lease, Model, Node
from packer.quota import Tenant
from packer.rates import REQUEST_DEVICE_MS_MAX, REQUEST_TOKENS_MAX, bounded

# A higher priority goes first until the other has waited this long; from then on only virtual time
# counts, so that nobody starves. A tenth of what the gateway lets a request wait.
PRIORITY_PATIENCE_MS = 30_000
# How far a tenant's virtual time may be ahead of the node's when it comes back to the queue: what it used
# earlier is held against it for two minutes of others' use, and less than a request may wait.
# And how far behind the node's it may start, where who waits is so far behind, for want of restores perhaps.
AHEAD_US_MAX = 120_000_000


def arrive(node: Node, tenant: Tenant) -> None:
    """Before a tenant's request comes in: one that was away does not come back with saved-up turns.

    The node's virtual time is that of the least served tenant with requests in flight, so that nobody is
    behind who used the node alone; once nobody is in flight all start level.
    """
    if tenant.granted or tenant.waiting:
        return
    busy = node.busy
    if len(busy) == 1:  # as below, and most requests come by here
        known = busy[0]
        level_us = known.virtual_us
        if known.granted or known.waiting:
            busy.append(tenant)
        else:
            busy[0] = tenant
    else:
        level_us = max((known.virtual_us for known in busy), default=0)
        busy = [known for known in busy if known.granted or known.waiting]
        if busy:
            level_us = min(known.virtual_us for known in busy)
        busy.append(tenant)
        node.busy = busy
    if level_us > node.virtual_us:
        node.virtual_us = level_us
    # Whoever is served may be a turn ahead of those who wait, since it was chosen before its last turn's cost
    # was known. Who comes is level with the least served of them, and not behind all.
    start_us = node.virtual_us
    for known in node.busy:
        if known.waiting and known.virtual_us < start_us:
            start_us = known.virtual_us
    start_us = max(start_us, node.virtual_us - AHEAD_US_MAX)
    if start_us > tenant.virtual_us:
        tenant.virtual_us = start_us


def forgive(node: Node, tenant: Tenant) -> None:
    """Before a tenant with nothing waiting waits: what it used is not held against it for ever."""
    tenant.virtual_us = min(tenant.virtual_us, node.virtual_us + AHEAD_US_MAX)


def in_turn(node: Node, now_ms: int) -> list[Model]:
    """Waiting models that could start, in the order of their turn; claims that stand come first."""
    found = [
        model
        for device in node.devices.values()
        if device.claim is not None
        and (model := node.queue.get(device.claim.ref)) is not None
        and startable(model, now_ms)
    ]
    claimed = list(dict.fromkeys(found))  # a gang claims several
    # What a tenant's earlier models in this order will cost counts before they are charged.
    ahead_us: dict[str, int] = {}
    for model in claimed:
        name = model.tenant.spec.tenant
        ahead_us[name] = ahead_us.get(name, 0) + _cost_us(node, model)
    by_tenant: dict[str, list[Model]] = {}
    for model in node.queue.values():
        if startable(model, now_ms) and model not in claimed:
            by_tenant.setdefault(model.tenant.spec.tenant, []).append(model)
    top = max((models[-1].tenant.quota.priority for models in by_tenant.values()), default=0)
    heap: list[tuple[int, int, int, str]] = []
    for place, (name, models) in enumerate(by_tenant.items()):
        models.reverse()
        tenant = models[-1].tenant
        virtual_us = tenant.virtual_us + tenant.pending_us + ahead_us.get(name, 0)
        heap.append((_rank(models[-1], top, now_ms), virtual_us, place, name))
    heapq.heapify(heap)
    ordered = claimed
    while heap:
        _, virtual_us, place, name = heap[0]
        models = by_tenant[name]
        model = models.pop()
        ordered.append(model)
        if models:
            virtual_us += _cost_us(node, model)
            heapq.heapreplace(heap, (_rank(models[-1], top, now_ms), virtual_us, place, name))
        else:
            heapq.heappop(heap)
    return ordered


def _rank(model: Model, top: int, now_ms: int) -> int:
    """The least goes first: by priority; what waited long has the highest there is, and no more than that,
    so that weights decide between it and the others."""
    oldest = next(iter(model.waiters.values()))
    long = now_ms - oldest.arrived_ms >= PRIORITY_PATIENCE_MS
    return -(top if long else model.tenant.quota.priority)


def _cost_us(node: Node, model: Model) -> int:
    """What a restore will add to its tenant's virtual time."""
    return room.restore_ms(node, model) * 1000 // max(model.tenant.quota.weight, 1)


def startable(model: Model, now_ms: int) -> bool:
    return model.startable and model.not_before_ms <= now_ms


def note_use_of(lease: Lease, device_ms: int, tokens: int, now_ms: int) -> None:
    """Meter a finished request: fair queueing's charge, the tenant's rates and its mean use."""
    tenant = lease.model.tenant
    rates = tenant.rates
    if rates.limited or lease.tokens:
        rates.tokens.reserved -= lease.tokens
        rates.tokens.take(now_ms, bounded(tokens, REQUEST_TOKENS_MAX))
        rates.device.take(now_ms, bounded(device_ms, REQUEST_DEVICE_MS_MAX))
    note_device_time(tenant, device_ms)


def note_device_time(tenant: Tenant, device_ms: int) -> None:
    """A request took so long: its tenant's turns, and what the next ones are expected to take."""
    if device_ms > 0:
        if device_ms > REQUEST_DEVICE_MS_MAX:
            device_ms = REQUEST_DEVICE_MS_MAX
        quota.charge(tenant, device_ms)
        use_ms = tenant.use_ms
        tenant.use_ms = (keep.KEPT_OF_FOUR * use_ms + device_ms) // 4 if use_ms else device_ms


def note_late_use(tenant: Tenant, device_ms: int, now_ms: int) -> None:
    """What a request took after its end in the books."""
    device_ms = bounded(device_ms, REQUEST_DEVICE_MS_MAX)
    tenant.rates.device.take(now_ms, device_ms)
    quota.charge(tenant, device_ms)


def expect(model: Model) -> None:
    """A restore of ``expected_ms`` is ordered: until it is over it counts in the order of turns, and in
    nothing else. A wrong estimate must not lift those who come meanwhile."""
    payer = model.payer or model.tenant
    model.pending_us = model.expected_ms * 1000 // max(payer.quota.weight, 1)
    payer.pending_us += model.pending_us


def end_restore(model: Model, taken_ms: int) -> None:
    """The restore is over, well or not: its tenant pays what it took, or for whom it was moved."""
    payer = model.payer or model.tenant
    payer.pending_us -= model.pending_us
    model.pending_us = 0
    quota.charge(payer, max(taken_ms, 0))


def note_restore_time(model: Model, taken_ms: int, now_ms: int) -> None:
    """A restore is over for good: it counts against the device time of whoever caused it."""
    payer = model.payer or model.tenant
    model.counted, model.payer = False, None
    payer.rates.device.take(now_ms, bounded(taken_ms, REQUEST_DEVICE_MS_MAX))
