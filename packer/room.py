"""Making room: which models or copies must go so that another fits, and whether it ever can.

Covers: restore-time estimates, the value of each copy, the choice of victims under the tenants'
reserves and limits, and the arithmetic of a request that no waiting can help. Pure questions: nothing
here changes the state. Does not cover: acting on the answers (``residency``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from packer import estimate, keep
from packer.events import RefusalReason
from packer.ledger import Copy, CopyState, Device, Model, Node, State
from packer.quota import Tenant, may_take
from packer.types import MIB, Tier

# A passing fault (a full pipe, a dropped connection) is usually over after one retry; a tier that fails
# three times in a row is left alone and the next one is asked.
TRIES_PER_TIER_MAX = 3
# When no device is there, one may come back at the next look of the agent, which is within seconds.
NO_DEVICE_RETRY_MS = 5_000


# --- what a restore costs -------------------------------------------------------------------------


def has_copy(model: Model, tier: Tier) -> bool:
    return model.copy(tier).state is CopyState.HELD


def source_tier(model: Model) -> Tier | None:
    """The fastest tier to restore from that has not failed too often; None when all have."""
    for tier in (Tier.HOST, Tier.DISK):
        if has_copy(model, tier) and model.tries.get(tier, 0) < TRIES_PER_TIER_MAX:
            return tier
    return Tier.ORIGIN if model.tries.get(Tier.ORIGIN, 0) < TRIES_PER_TIER_MAX else None


def restore_ms_from(node: Node, model: Model, tier: Tier, moved_bytes: int | None = None) -> int:
    """Expected time of moving ``moved_bytes`` of the model, or all of it, from a tier."""
    nbytes = model.spec.image_bytes if moved_bytes is None else moved_bytes
    return estimate.expect_ms(node.learned, model.history, tier, nbytes)


def restore_ms(node: Node, model: Model) -> int:
    """Expected time of this model's next restore."""
    return restore_ms_from(node, model, source_tier(model) or Tier.ORIGIN)


def device_index(node: Node, model: Model, now_ms: int) -> float:
    """What keeping the model on its device is worth."""
    return keep.keep_index(model.reuse, restore_ms(node, model), model.device_bytes, now_ms)


def copy_index(node: Node, model: Model, tier: Tier, nbytes: int, now_ms: int) -> float:
    """What a copy of ``nbytes`` in the host or disk tier is, or would be, worth."""
    below = Tier.DISK if tier is Tier.HOST and has_copy(model, Tier.DISK) else Tier.ORIGIN
    gain_ms = restore_ms_from(node, model, below) - restore_ms_from(node, model, tier)
    return keep.keep_index(model.reuse, gain_ms, nbytes, now_ms)


# --- victims on devices ---------------------------------------------------------------------------


@dataclass(slots=True)
class Earlier:
    """Bytes promised to waiting models that come first: by device and, beside that, by tenant."""

    devices: dict[str, int]
    tenants: dict[str, int]

    def add(self, device: str, tenant: str, nbytes: int) -> None:
        self.devices[device] = self.devices.get(device, 0) + nbytes
        self.tenants[tenant] = self.tenants.get(tenant, 0) + nbytes


def fits_now(model: Model, device: Device, earlier: Earlier) -> bool:
    """Can it start on the device at once, evicting nothing and taking nothing that was promised?"""
    need = model.need_bytes
    account, own = device.account, model.tenant.device
    promised = earlier.devices.get(device.name, 0)
    promised_own = earlier.tenants.get(model.tenant.spec.tenant, 0)
    return (
        account.fits(need)
        and own.fits(need)
        and account.short_bytes(need + promised) <= 0
        and own.short_bytes(need + promised_own) <= 0
    )


def _takable(node: Node, model: Model, busy: bool) -> bool:
    """May it be a victim at all; ``busy``: also count what is in use now and must end some day."""
    if model.state is State.RESIDENT:
        return busy or (not model.leases and not model.packing)
    return busy and model.state is State.RESTORING


def _ranked(
    node: Node, wanted: Model, device: Device, own_elsewhere: bool, busy: bool, now_ms: int
) -> list[tuple[Model, bool]]:
    """Candidates, least valuable first; the flag tells whether it is the wanted model's own tenant's.

    A candidate that was condemned for the same claim before stays first, so that the choice does not
    wander while its leases end.
    """
    candidates: list[Model] = [m for m in device.models.values() if _takable(node, m, busy)]
    if own_elsewhere:
        for other in node.devices.values():
            if other is not device:
                candidates += [
                    m for m in other.models.values() if m.tenant is wanted.tenant and _takable(node, m, busy)
                ]

    def rank(model: Model) -> tuple[bool, bool, bool, float, str]:
        return (
            model.planned,
            node.condemned.get(model.ref) != wanted.ref,
            not model.idle,
            device_index(node, model, now_ms),
            str(model.ref),
        )

    candidates.sort(key=rank)
    return [(m, m.tenant is wanted.tenant) for m in candidates]


def device_victims(
    node: Node, wanted: Model, device: Device, earlier: Earlier, busy: bool, now_ms: int
) -> list[Model] | None:
    """Models whose going lets ``wanted`` onto ``device``, as few and worthless as possible.

    Counts what is leaving already. None: even all that may be taken is not enough. ``busy`` asks
    whether it could ever be: models in use count as takable, since leases, packs and restores end.
    """
    need = wanted.need_bytes
    tenant = wanted.tenant
    promised_own = earlier.tenants.get(tenant.spec.tenant, 0)
    short = device.account.short_bytes(need + earlier.devices.get(device.name, 0))
    short_own = tenant.device.short_bytes(need + promised_own)
    if short <= 0 and short_own <= 0:
        return []
    entitled = tenant.device.kept_bytes + need + promised_own <= tenant.device.reserved_bytes
    ranked = _ranked(node, wanted, device, short_own > 0, busy, now_ms)
    chosen: list[Model] = []
    if short_own > 0:
        # Above its own max only the tenant's own models can help; those here help twice.
        for model, _ in sorted((r for r in ranked if r[1]), key=lambda r: r[0].device is not device):
            if short_own <= 0:
                break
            chosen.append(model)
            short_own -= model.device_bytes
            if model.device is device:
                short -= model.device_bytes
    kept: dict[str, int] = {}
    for reach in (False, True) if entitled else (False,):
        for model, own in ranked:
            if short <= 0:
                break
            if model.device is not device or model in chosen:
                continue
            if not own and model.planned and not _may_take(model, kept, reach):
                continue
            chosen.append(model)
            short -= model.device_bytes
    if short > 0 or short_own > 0:
        return None
    return _prune(chosen, wanted, device, -short, -short_own)


def _may_take(model: Model, kept: dict[str, int], entitled: bool) -> bool:
    """Apply ``quota.may_take`` and keep count of what the choice so far leaves each tenant."""
    account = model.tenant.device
    name = model.tenant.spec.tenant
    left = kept.get(name, account.kept_bytes)
    if not may_take(left, account.reserved_bytes, model.device_bytes, entitled):
        return False
    kept[name] = left - model.device_bytes
    return True


def _prune(chosen: list[Model], wanted: Model, device: Device, surplus: int, surplus_own: int) -> list[Model]:
    """Spare the most valuable models that a later, larger victim made needless."""
    capped = wanted.tenant.device.limit_bytes is not None
    victims: list[Model] = []
    for model in reversed(chosen):
        here = model.device_bytes if model.device is device else 0
        own = model.device_bytes if capped and model.tenant is wanted.tenant else 0
        if here <= surplus and own <= surplus_own:
            surplus -= here
            surplus_own -= own
        else:
            victims.append(model)
    victims.reverse()
    return victims


# --- victims among copies -------------------------------------------------------------------------


def droppable(copy: Copy) -> bool:
    return copy.state is CopyState.HELD and not copy.readers


def copy_victims(
    node: Node, wanted: Model, tier: Tier, nbytes: int, pending: int, pending_own: int, now_ms: int
) -> list[Model] | None:
    """Models whose copy in ``tier`` must go so that ``wanted`` gets ``nbytes`` there, or None.

    ``pending`` bytes were promised before in this step (``pending_own`` to the same tenant). Only copies
    that are worth less go, except that an unmet reserve is filled from whoever is above its own.
    """
    tenant = wanted.tenant
    own = tenant.account(tier)
    short = node.account(tier).short_bytes(nbytes + pending)
    short_own = own.short_bytes(nbytes + pending_own)
    if short <= 0 and short_own <= 0:
        return []
    entitled = own.kept_bytes + nbytes + pending_own <= own.reserved_bytes
    worth = copy_index(node, wanted, tier, nbytes, now_ms)
    ranked = _ranked_copies(node, (m for m in node.copies(tier).values() if m is not wanted), tier, now_ms)
    chosen: list[Model] = []
    kept: dict[str, int] = {}
    for index, _, model in ranked:
        if short <= 0 and short_own <= 0:
            break
        held = model.copy(tier).held_bytes
        if model.tenant is tenant:
            if index >= worth:
                continue
            short_own -= held
        elif short_own > 0 and short <= 0:
            continue
        elif model.planned:
            account = model.tenant.account(tier)
            left = kept.get(model.tenant.spec.tenant, account.kept_bytes)
            if not may_take(left, account.reserved_bytes, held, entitled) or (
                index >= worth and not entitled
            ):
                continue
            kept[model.tenant.spec.tenant] = left - held
        chosen.append(model)
        short -= held
    return None if short > 0 or short_own > 0 else chosen


def _ranked_copies(
    node: Node, models: Iterable[Model], tier: Tier, now_ms: int
) -> list[tuple[float, str, Model]]:
    ranked = [
        (copy_index(node, m, tier, m.copy(tier).held_bytes, now_ms), str(m.ref), m)
        for m in models
        if droppable(m.copy(tier))
    ]
    ranked.sort(key=lambda entry: entry[:2])
    return ranked


# --- shedding -------------------------------------------------------------------------------------


def device_surplus(node: Node, device: Device, now_ms: int) -> list[Model]:
    """Idle models to evict because the device's budget sank below what it holds (or it is unhealthy).

    Tenants above their reserve give first; a budget is a fact, so the others give next.
    """
    if device.healthy and not device.account.excess_bytes:
        return []
    idle = [m for m in device.models.values() if m.idle]

    def rank(model: Model) -> tuple[bool, float, str]:
        account = model.tenant.device
        return (
            account.kept_bytes <= account.reserved_bytes,
            device_index(node, model, now_ms),
            str(model.ref),
        )

    idle.sort(key=rank)
    return idle if not device.healthy else _until(idle, device.account.excess_bytes)


def tenant_surplus(node: Node, tenant: Tenant, now_ms: int) -> list[Model]:
    """Idle models to evict because the tenant's max sank below what it holds."""
    idle = [m for d in node.devices.values() for m in d.models.values() if m.tenant is tenant and m.idle]
    idle.sort(key=lambda m: (device_index(node, m, now_ms), str(m.ref)))
    return _until(idle, tenant.device.excess_bytes)


def _until(models: list[Model], excess_bytes: int) -> list[Model]:
    going: list[Model] = []
    for model in models:
        if excess_bytes <= 0:
            break
        going.append(model)
        excess_bytes -= model.device_bytes
    return going


def copies_surplus(node: Node, tier: Tier, tenant: Tenant | None, now_ms: int) -> list[Model]:
    """Copies to drop because the tier's budget (or the tenant's max in it) sank below what is held."""
    account = node.account(tier) if tenant is None else tenant.account(tier)
    excess = account.excess_bytes
    if not excess:
        return []
    models = [m for m in node.copies(tier).values() if tenant is None or m.tenant is tenant]
    going: list[Model] = []
    for _, _, model in _ranked_copies(node, models, tier, now_ms):
        if excess <= 0:
            break
        going.append(model)
        excess -= model.copy(tier).held_bytes
    return going


# --- what can never be ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hopeless:
    """Why a request is refused at once."""

    reason: RefusalReason
    detail: str
    retry_ms: int | None = None


def _size(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / MIB:.1f} MiB)"


def hopeless(node: Node, model: Model, now_ms: int) -> Hopeless | None:
    """The arithmetic of a model that could not fit even if everything evictable were evicted, or None."""
    need = model.need_bytes
    spec = model.spec
    sum_text = (
        f"{spec.ref} needs {_size(need)} on one device: {spec.image_bytes} of weights and "
        f"{spec.workspace_bytes} of workspace"
    )
    most = model.tenant.device.limit_bytes
    if most is not None and need > most:
        return Hopeless(
            RefusalReason.QUOTA_BYTES,
            f"{sum_text}; tenant {spec.ref.tenant} may hold at most {_size(most)} on "
            "devices (device max); use a smaller model, or ask the operator to raise the quota",
        )
    healthy = [d for d in node.devices.values() if d.healthy]
    if not healthy:
        return Hopeless(
            RefusalReason.RESTORE_FAILED, "this node has no healthy device now", NO_DEVICE_RETRY_MS
        )
    largest = max(healthy, key=lambda d: d.account.limit_bytes or 0)
    budget = largest.account.limit_bytes or 0
    if need > budget:
        return Hopeless(
            RefusalReason.NEVER_FITS,
            f"{sum_text}; the largest device here, {largest.name}, has a budget of "
            f"{_size(budget)}; use a smaller model (or bfloat16 weights), or a node with a larger device",
        )
    if not any(tenant.device.reserved_bytes for tenant in node.tenants.values()):
        return None  # everything is takable once it is idle
    alone = Earlier({}, {})
    if any(device_victims(node, model, device, alone, True, now_ms) is not None for device in healthy):
        return None
    held: dict[str, int] = {}
    for other in largest.models.values():
        if other.tenant is not model.tenant:
            name = other.ref.tenant
            held[name] = held.get(name, 0) + other.device_bytes
    others = sum(min(nbytes, node.tenants[name].device.reserved_bytes) for name, nbytes in held.items())
    return Hopeless(
        RefusalReason.NEVER_FITS,
        f"{sum_text}; of the {_size(budget)} of the largest device here, {largest.name}, {_size(others)} "
        f"are held under other tenants' reserves, and {spec.ref.tenant} has "
        f"{_size(model.tenant.device.reserved_bytes)} reserved; ask the operator for a larger reserve",
    )
