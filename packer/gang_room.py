"""Room for gangs: which k devices of the node, whom to evict there, and what can never be.

Covers: best fit over k devices, victims on all of them together, and the arithmetic of a gang that no
waiting can help. Pure questions, as in ``victims``, whose ranking and slices it uses. Does not cover: models
of one device (``victims``), whose turn it is (``queueing``), or where a gang is cut (``gangs``).

Every device is asked for room for the largest share, so it does not matter which of them gets which. A gang
evicts nothing before it has claimed all its devices: what goes for it goes for one decision. Moves are for
models of one device only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packer import giving, victims
from packer.events import RefusalReason
from packer.ledger import Device, Model, Node
from packer.placement import Bin, Wanted, place
from packer.places import bytes_on, freed_on, lies_on, room_left
from packer.room import Earlier
from packer.types import MIB
from packer.victims import Hopeless, Taking, candidates_of, cut


def fitting(model: Model, healthy: Sequence[Device], earlier: Earlier) -> tuple[Device, ...]:
    """The devices on which it can start at once, evicting nothing and taking nothing that was promised:
    those with the least room left over. Empty: there are not enough."""
    own, need = model.tenant.device, model.need_bytes
    promised_own = earlier.tenants.get(model.tenant.spec.tenant, 0)
    if not own.fits(need) or own.short_bytes(need + promised_own) > 0 or not model.run_bytes:
        return ()
    bins = [Bin(each.name, room_left(each)) for each in healthy if _fits_now(model, each, earlier)]
    placing = place(bins, Wanted(model.name, model.share_bytes, devices=model.spec.devices))
    if placing is None:
        return ()
    return tuple(each for each in healthy if each.name in placing.bins)


def _fits_now(model: Model, device: Device, earlier: Earlier) -> bool:
    share = model.share_bytes
    promised = earlier.devices.get(device.name, 0)
    return device.account.fits(share) and device.account.short_bytes(share + promised) <= 0


def reachable(
    node: Node, model: Model, free: Sequence[Device], earlier: Earlier, busy: bool, reach: bool, now_ms: int
) -> tuple[Device, ...]:
    """Of these devices those that could give it a share, as many as it needs at most: those that it claims
    already, then those whose victims cost least."""
    ranked: list[tuple[bool, float, int, int, str]] = []
    for device in free:
        if (device.account.limit_bytes or 0) < model.share_bytes:
            continue
        takings = takings_on(node, model, (device,), earlier, busy, reach, now_ms)
        if takings is not None:
            stands = device.claim is not None and device.claim.ref == model.ref
            evicted = sum(freed_on(taking.model, device, taking.freed_bytes) for taking in takings)
            loss = sum(taking.loss for taking in takings) if node.chosen is None else 0.0
            ranked.append((not stands, loss, evicted, room_left(device), device.name))
    names = [entry[-1] for entry in sorted(ranked)[: model.spec.devices]]
    return tuple(device for device in free if device.name in names)


# --- victims --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Short:
    """What still lacks on each device, and below the tenant's max; less than nothing is to spare."""

    devices: dict[Device, int]
    own: int

    @property
    def is_over(self) -> bool:
        return self.own <= 0 and all(nbytes <= 0 for nbytes in self.devices.values())

    def relieve(self, model: Model, wanted: Model, nbytes: int) -> None:
        for device in self.devices:
            self.devices[device] -= freed_on(model, device, nbytes) if nbytes else 0
        self.own -= nbytes if model.tenant is wanted.tenant else 0


def takings_on(
    node: Node,
    wanted: Model,
    devices: Sequence[Device],
    earlier: Earlier,
    busy: bool,
    reach: bool,
    now_ms: int,
) -> list[Taking] | None:
    """What must go so that ``wanted`` gets a share on each of ``devices``; see ``victims.device_victims``."""
    tenant = wanted.tenant
    need_own = wanted.missing_bytes + earlier.tenants.get(tenant.spec.tenant, 0)
    lack = {
        each: each.account.short_bytes(wanted.share_bytes + earlier.devices.get(each.name, 0))
        for each in devices
    }
    short = _Short(lack, tenant.device.short_bytes(need_own))
    if short.is_over:
        return []
    entitled = tenant.device.kept_bytes + need_own <= tenant.device.reserved_bytes
    choice = giving.Choice(node)
    if short.own > 0:
        _take_own(node, wanted, short, choice, busy, reach, now_ms)
    ranked = {
        device: candidates_of(
            node, wanted, device, device.models.values(), max(lacking, 1), False, busy, reach, now_ms
        )
        for device, lacking in short.devices.items()
    }
    # As in ``victims``: what slices allow, then the tenant's own, then what others have above their own.
    for step in ("allowed", "own", "others"):
        if step == "own" and entitled and not reach:
            break
        for device in devices if step != "others" or entitled else ():
            for candidate in ranked[device]:
                if short.devices[device] <= 0:
                    break
                model = candidate[3]
                if step == "own" and model.tenant is not tenant:
                    continue
                if step == "others" and choice.kept_bytes(model.tenant) <= model.tenant.device.reserved_bytes:
                    continue
                gives = choice.take(candidate, short.devices[device], forced=step != "allowed")
                short.relieve(model, wanted, gives)
    return _spare(node, wanted, short, choice) if short.is_over else None


def _take_own(
    node: Node, wanted: Model, short: _Short, choice: giving.Choice, busy: bool, reach: bool, now_ms: int
) -> None:
    """Above its own max only the tenant's own models can help; those on the devices wanted help twice."""
    tenant, first = wanted.tenant, next(iter(short.devices))
    there = {model: None for device in node.devices.values() for model in device.models.values()}
    models = [model for model in there if model.tenant is tenant]
    ranked = candidates_of(node, wanted, first, models, short.own, True, busy, reach, now_ms)
    own = sorted(ranked, key=lambda candidate: not any(lies_on(candidate[3], d) for d in short.devices))
    for forced in (False, True):
        for candidate in own:
            if short.own <= 0:
                return
            short.relieve(candidate[3], wanted, choice.take(candidate, short.own, forced))


def _spare(node: Node, wanted: Model, short: _Short, choice: giving.Choice) -> list[Taking]:
    """Spare what is not needed, of the most valuable first: all of it, or of a model of one device its first
    chunks."""
    capped = wanted.tenant.device.limit_bytes is not None
    takings: list[Taking] = []
    for given in reversed(list(choice.given.values())):
        model = given.candidate[3]
        own = capped and model.tenant is wanted.tenant
        spare = [-short.devices[device] for device in short.devices if lies_on(model, device)]
        spare += [-short.own] if own else []
        kept = given.nbytes
        if model.spec.devices > 1:
            fits = all(-left >= bytes_on(model, device) for device, left in short.devices.items())
            kept = kept if fits and (not own or -short.own >= kept) else 0
            if not kept:
                takings.append(cut(node, given, 0))
        elif kept > min(spare):
            takings.append(cut(node, given, max(min(spare), 0)))
            kept -= takings[-1].freed_bytes
        short.relieve(model, wanted, -kept)
    takings.reverse()
    return takings


# --- what can never be ----------------------------------------------------------------------------


def hopeless(node: Node, model: Model, now_ms: int) -> Hopeless | None:
    """The arithmetic of a gang that could not fit even if everything evictable were evicted, or None."""
    spec, need, share = model.spec, model.need_bytes, model.share_bytes
    sum_text = (
        f"{spec.ref} needs {spec.devices} devices of one node and {_size(share)} on each: {spec.image_bytes} "
        f"bytes of weights in {spec.devices} parts, {share - model.workspace_bytes} in the largest, and "
        f"{model.workspace_bytes} of workspace on each"
    )
    if not model.run_bytes:
        detail = f"{spec.ref} can not be cut into {spec.devices} parts; set fewer devices, or push it again"
        return Hopeless(RefusalReason.NEVER_FITS, detail, None)
    most = model.tenant.device.limit_bytes
    if most is not None and need > most:
        return Hopeless(
            RefusalReason.QUOTA_BYTES,
            f"{sum_text}; tenant {spec.ref.tenant} may hold at most {_size(most)} on devices (device max), "
            f"and it takes {_size(need)}; use a smaller model, or ask the operator to raise the quota",
            None,
        )
    healthy = [device for device in node.devices.values() if device.healthy]
    if len(healthy) < spec.devices <= len(node.devices):
        detail = f"{sum_text}; this node has {len(healthy)} healthy devices now"
        return Hopeless(RefusalReason.RESTORE_FAILED, detail, victims.NO_DEVICE_RETRY_MS)
    large = [device for device in healthy if (device.account.limit_bytes or 0) >= share]
    if len(large) < spec.devices:
        return Hopeless(
            RefusalReason.NEVER_FITS,
            f"{sum_text}; this node has {len(node.devices)} devices, {len(large)} of them with such a "
            "budget; use a smaller model, more devices for it (bunk model set --devices), or a node with "
            "more or larger devices",
            None,
        )
    if not any(tenant.device.reserved_bytes for tenant in node.tenants.values()):
        return None  # everything is takable once it is idle
    alone = Earlier({}, {})
    for busy in (False, True):
        if joint(node, model, large, alone, busy, True, now_ms) is not None:
            return None
    return Hopeless(
        RefusalReason.NEVER_FITS,
        f"{sum_text}; what other tenants have within their reserves and is not lent now leaves too little "
        f"room on {len(large)} devices, and {spec.ref.tenant} has "
        f"{_size(model.tenant.device.reserved_bytes)} reserved; ask the operator for a larger reserve",
        None,
    )


def joint(
    node: Node, model: Model, free: Sequence[Device], earlier: Earlier, busy: bool, reach: bool, now_ms: int
) -> tuple[tuple[Device, ...], list[Taking]] | None:
    """The devices to make room on, all together, and whom to evict there; None: there are not enough."""
    devices = reachable(node, model, free, earlier, busy, reach, now_ms)
    if len(devices) < model.spec.devices:
        return None
    takings = takings_on(node, model, devices, earlier, busy, reach, now_ms)
    return None if takings is None else (devices, takings)


def _size(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / MIB:.1f} MiB)"
