"""The proof, after every step, that the node's books add up and its promises hold.

Covers: ``check(node)``, which recomputes every ledger from the models and requests alone and compares,
and the rules of DESIGN section 4 that can be read off one state. Does not cover: rules about sequences
(each request answered exactly once, liveness): the simulation in the tests watches those.
"""

from __future__ import annotations

from packer import queueing
from packer.ledger import Copy, CopyState, Lease, Model, Node, State, Waiter
from packer.queueing import grantable
from packer.quota import Account, InvariantBroken
from packer.types import Tier

__all__ = ["InvariantBroken", "check"]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)


class _Sums:
    """What the accounts must say, recomputed: [held, leaving] by device and by (tenant, tier)."""

    __slots__ = ("devices", "leases", "tenants", "tiers")

    def __init__(self, node: Node) -> None:
        self.devices: dict[str, list[int]] = {name: [0, 0] for name in node.devices}
        self.tiers: dict[Tier, list[int]] = {Tier.HOST: [0, 0], Tier.DISK: [0, 0]}
        self.tenants: dict[str, list[int]] = {name: [0] * 9 for name in node.tenants}
        self.leases: dict[str, int] = {}


# Places in a tenant's row of sums.
_DEVICE, _HOST, _DISK, _WAITING, _GRANTED, _MODELS = 0, 2, 4, 6, 7, 8


def check(node: Node) -> None:
    """Raises ``InvariantBroken`` when the state contradicts itself or a promise."""
    sums = _Sums(node)
    leased: dict[Model, int] = {}
    waiting = 0
    for known in node.requests.values():
        if isinstance(known, Waiter):
            waiting += 1
            sums.tenants[known.model.ref.tenant][_WAITING] += 1
        else:
            _count_lease(node, known, sums, leased)
    _require(waiting == node.waiting, f"{node.waiting} requests count as waiting, {waiting} wait")
    _require(waiting <= queueing.WAITING_MAX, f"{waiting} requests wait, above the limit")
    queued = 0
    for model in node.models.values():
        row = sums.tenants[model.spec.ref.tenant]
        row[_MODELS] += 1
        if model.device is not None:
            _check_on_device(node, model, row, sums, leased)
        elif model.state is not State.ABSENT or model.device_bytes or model.leases or model.packing:
            raise InvariantBroken(f"{model.ref} is {model.state} on no device")
        if model.host.state is not CopyState.ABSENT:
            _check_copy(model, Tier.HOST, model.host, row, _HOST, sums)
        if model.disk.state is not CopyState.ABSENT:
            _check_copy(model, Tier.DISK, model.disk, row, _DISK, sums)
        if model.waiters:
            queued += len(model.waiters)
            _require(model.ref in node.queue, f"{model.ref} has waiters and is not in the queue")
            _require(not grantable(node, model), f"{model.ref} is there and requests wait for it")
    _require(queued == waiting, f"{waiting} requests wait, {queued} of them for a model")
    _check_accounts(node, sums)
    _check_removed(node)
    _check_progress(node)


def _count_lease(node: Node, lease: Lease, sums: _Sums, leased: dict[Model, int]) -> None:
    model = lease.model
    row = sums.tenants.get(model.spec.ref.tenant)
    if row is not None and node.tenants[model.spec.ref.tenant] is model.tenant:
        row[_GRANTED] += 1
    if lease.residency == model.residency:
        leased[model] = leased.get(model, 0) + 1


def _check_on_device(node: Node, model: Model, row: list[int], sums: _Sums, leased: dict[Model, int]) -> None:
    device = model.device
    assert device is not None
    ref, state, nbytes = model.ref, model.state, model.device_bytes
    if (
        state is State.ABSENT
        or device.models.get(ref) is not model
        or node.devices[device.name] is not device
    ):
        raise InvariantBroken(f"{ref} is {state} and its device {device.name} does not agree")
    total = sums.devices[device.name]
    total[0] += nbytes
    row[_DEVICE] += nbytes
    if state is State.EVICTING:
        total[1] += nbytes
        row[_DEVICE + 1] += nbytes
    count = leased.get(model, 0)
    if model.leases != count:
        raise InvariantBroken(f"{ref} counts {model.leases} leases, {count} are held")
    if (count or model.packing) and state is not State.RESIDENT:
        raise InvariantBroken(f"{ref} is {state} with {count} leases, packing: {model.packing}")
    if model.packing and model.disk.state is not CopyState.FILLING:
        raise InvariantBroken(f"{ref} is being packed and has no room reserved for it")
    if state is State.RESTORING and model.source is not Tier.ORIGIN:
        copy = model.copy(model.source)
        if copy.state is not CopyState.HELD or copy.readers != 1:
            raise InvariantBroken(f"{ref} is restored from a {model.source} copy that is {copy.state}")


def _check_copy(model: Model, tier: Tier, copy: Copy, row: list[int], place: int, sums: _Sums) -> None:
    total = sums.tiers[tier]
    total[0] += copy.held_bytes
    row[place] += copy.held_bytes
    if copy.state is CopyState.DROPPING:
        total[1] += copy.held_bytes
        row[place + 1] += copy.held_bytes
    reading = model.state is State.RESTORING and model.source is tier
    if copy.readers != int(reading):
        raise InvariantBroken(f"{model.ref}: {copy.readers} restores count as readers of its {tier} copy")
    if tier is Tier.HOST and copy.state is CopyState.FILLING and model.state is not State.RESTORING:
        raise InvariantBroken(f"{model.ref}: a host segment is filled by no restore")


def _check_accounts(node: Node, sums: _Sums) -> None:
    for name, device in node.devices.items():
        _check_account(device.account, sums.devices[name], name)
        if not device.healthy or device.account.excess_bytes:
            idle = [m for m in device.models.values() if m.idle]
            _require(not idle, f"{name} is over its budget or unhealthy and keeps an idle model")
    for tier in (Tier.HOST, Tier.DISK):
        account = node.account(tier)
        _check_account(account, sums.tiers[tier], str(tier))
        if account.excess_bytes:
            free = [m for m in node.copies(tier).values() if _droppable(m.copy(tier))]
            _require(not free, f"the {tier} tier is over its budget and keeps a copy nobody reads")
    for name, tenant in node.tenants.items():
        row = sums.tenants[name]
        _check_account(tenant.device, row[_DEVICE : _DEVICE + 2], f"{name} on devices")
        _check_account(tenant.host, row[_HOST : _HOST + 2], f"{name} in the host tier")
        _check_account(tenant.disk, row[_DISK : _DISK + 2], f"{name} in the disk tier")
        if tenant.device.excess_bytes and node.has_plan:
            for device in node.devices.values():
                idle = [m for m in device.models.values() if m.tenant is tenant and m.idle]
                _require(not idle, f"{name} is above its max on devices and keeps an idle model")
        counted = [tenant.waiting, tenant.granted, tenant.models]
        if counted != row[_WAITING:]:
            raise InvariantBroken(
                f"{name} counts {counted} waiting, granted, models; they are {row[_WAITING:]}"
            )
        if tenant.waiting > queueing.WAITING_PER_TENANT_MAX:
            raise InvariantBroken(f"{tenant.waiting} requests of {name} wait, above the limit")


def _droppable(copy: Copy) -> bool:
    return copy.state is CopyState.HELD and not copy.readers


def _check_account(account: Account, expected: list[int], whose: str) -> None:
    if account.used_bytes != expected[0] or account.leaving_bytes != expected[1]:
        raise InvariantBroken(
            f"{whose}: the account says {account.used_bytes} bytes held and {account.leaving_bytes} leaving, "
            f"the models say {expected[0]} and {expected[1]}"
        )
    if account.limit_bytes is not None and account.used_bytes > account.ceiling_bytes:
        raise InvariantBroken(
            f"{whose}: {account.used_bytes} bytes held, above the limit of {account.limit_bytes}"
        )


def _check_removed(node: Node) -> None:
    """What left the plan is on its way out of every tier as soon as nobody uses it."""
    for model in node.removed.values() if node.has_plan else ():
        copies = (model.host, model.disk)
        if model.idle or model.empty or any(_droppable(copy) for copy in copies):
            raise InvariantBroken(f"{model.ref} left the plan and is kept")


def _check_progress(node: Node) -> None:
    """Whoever waits is waited for: a deadline is set, and something is under way that will end."""
    if not node.waiting:
        return
    _require(node.wake_ms is not None, "requests wait and nobody wakes the core at their deadline")
    _require(not node.draining, "requests wait on a draining node")
    for device in node.devices.values():
        if device.claim is not None:
            _require(device.claim.ref in node.queue, f"{device.name} is claimed by a model nobody waits for")
    under_way = any(device.models for device in node.devices.values())
    paused = any(model.not_before_ms > node.now_ms for model in node.queue.values())
    _require(under_way or paused, "requests wait, the devices are empty and nothing is under way")
