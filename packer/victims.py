"""Room on devices: which models give how many of their chunks, and whether it can ever be enough.

Covers: the choice of victims under the tenants' reserves and limits, down to the chunk; what must go
because a budget sank; and the arithmetic of a request that no waiting can help. Pure questions: nothing
here changes the state. Does not cover: copies below the device (``room``), or acting on the answers
(``queueing``, ``upkeep``).

Candidates go in the order of their keep-index, per byte, least valuable first. Only the last one is cut:
it keeps as many of its first chunks as the room allows, so that exactly the bytes needed go. Where one
model alone could give them at a smaller loss than several together, it gives them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, nsmallest
from itertools import accumulate
from math import exp
from operator import itemgetter
from typing import NamedTuple

from packer import room
from packer.events import RefusalReason
from packer.giving import Candidate, Choice, Given, is_closed, is_divisible, may_open_ms
from packer.intensity import Intensity, Ranking
from packer.keep import keep_index
from packer.ledger import Device, Model, Node, State
from packer.places import freed_on, lies_on
from packer.quota import Tenant
from packer.room import Earlier
from packer.shortlist import BATCH, EXACT_MAX, SHORT_MAX
from packer.types import MIB, Tier

# When no device is there, one may come back at the next look of the agent, which is within seconds.
NO_DEVICE_RETRY_MS = 5_000


@dataclass(frozen=True, slots=True)
class Taking:
    """A victim and what it may keep: its first ``keep_chunks`` chunks; 0: nothing. ``forced``: whether or
    not its tenant's slice allows it."""

    model: Model
    freed_bytes: int
    keep_chunks: int = 0
    forced: bool = False
    moves_to: str = ""  # the device that all of it moves to; empty: it is evicted
    # Expected milliseconds of restoring per millisecond that its going brings about; ``_loss``.
    loss: float = 0.0


# What left the plan goes before all else; most candidates stand here, idle and condemned by nobody.
PLANNED = 8
# A choice seldom looks further than this down the order, so only as many are singled out at first; as few
# as a short list are simply sorted.
LOOKED_AT = 16
SORTED_MAX = SHORT_MAX + BATCH


@dataclass(slots=True)
class _Class:
    """Candidates of the same standing, column by column: what is laid out like this is fetched fast."""

    models: list[Model] = field(default_factory=list)
    uses: list[Intensity] = field(default_factory=list)
    gains_ms: list[float] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)


class _Ranked:
    """Candidates, least valuable first; put in order only as far as somebody looks: seldom beyond a few."""

    def __init__(self, classes: dict[int, _Class], node: Node, now_ms: int) -> None:
        self._ordered: list[Candidate] = []
        ordered = sorted(classes.items(), key=itemgetter(0))
        valued = [(rank, members, _values(node, members, now_ms)) for rank, members in ordered]
        self._order = _in_order(valued)

    def __iter__(self) -> Iterator[Candidate]:
        ordered, order = self._ordered, self._order
        place = 0
        while True:
            if place == len(ordered):
                found = next(order, None)
                if found is None:
                    return
                ordered.append(found)
            yield ordered[place]
            place += 1


def _values(node: Node, members: _Class, now_ms: int) -> list[float]:
    """The keep-index of each, or what the chosen policy makes of it."""
    if node.chosen is not None:
        value = node.chosen.values(Tier.DEVICE, now_ms)
        return [value(model.ref) for model in members.models]
    rates = Ranking(node.shared, now_ms).rates(members.uses)
    gains = zip(rates, members.gains_ms, members.held_bytes, strict=True)
    return [rate * gain_ms / (held or 1) for rate, gain_ms, held in gains]


def value_of(node: Node, model: Model, now_ms: int) -> float:
    """What the model's bytes on its device are worth keeping, per byte, as candidates are ranked."""
    if node.chosen is not None:
        return node.chosen.values(Tier.DEVICE, now_ms)(model.ref)
    held = model.device_bytes - model.leaving_bytes
    return keep_index(Ranking(node.shared, now_ms), model.reuse, room.gains(node, model).device_ms, held)


def expected_ms(node: Node, taking: Taking, horizon_ms: int, now_ms: int) -> float:
    """The restoring that taking these bytes is expected to cause within the horizon; under the keep-index."""
    model = taking.model
    gains = room.gains(node, model)
    held = max(model.device_bytes - model.leaving_bytes, 1)
    fixed_ms = gains.fixed_ms if model.state is State.RESIDENT else 0.0
    cost_ms = fixed_ms + (gains.device_ms - fixed_ms) * min(taking.freed_bytes / held, 1.0)
    uses = Ranking(node.shared, now_ms).uses_per_ms(model.reuse) * horizon_ms
    return cost_ms * (1.0 - exp(-uses))


def _in_order(classes: list[tuple[int, _Class, list[float]]]) -> Iterator[Candidate]:
    for rank, members, indices in classes:
        if len(indices) <= SORTED_MAX:
            found = zip(indices, members.models, members.held_bytes, strict=True)
            yield from sorted((rank, index, m.name, m, held) for index, m, held in found)
            continue
        most = nsmallest(LOOKED_AT, indices)[-1] if indices else 0.0
        every = list(zip(indices, members.models, members.held_bytes, strict=True))
        yield from sorted((rank, index, m.name, m, held) for index, m, held in every if index <= most)
        rest = [(rank, index, m.name, m, held) for index, m, held in every if index > most]
        heapify(rest)
        while rest:
            yield heappop(rest)


def need_on(model: Model, device: Device) -> int:
    """Bytes that the model must still be given to be on this device as a whole, or with its share."""
    if model.spec.devices > 1:
        return 0 if lies_on(model, device) else model.share_bytes
    return model.missing_bytes if model.device is device else model.need_bytes


def fits_now(model: Model, device: Device, earlier: Earlier) -> bool:
    """Can it start on the device at once, evicting nothing and taking nothing that was promised?"""
    if model.device is not None and model.device is not device:
        return False  # the first chunks lie elsewhere
    need = model.missing_bytes
    account, own = device.account, model.tenant.device
    promised = earlier.devices.get(device.name, 0)
    promised_own = earlier.tenants.get(model.tenant.spec.tenant, 0)
    return (
        account.fits(need)
        and own.fits(need)
        and account.short_bytes(need + promised) <= 0
        and own.short_bytes(need + promised_own) <= 0
    )


# --- candidates -----------------------------------------------------------------------------------


def _shortlisted(
    node: Node,
    wanted: Model,
    device: Device,
    wanted_bytes: int,
    own_elsewhere: bool,
    reach: bool,
    now_ms: int,
) -> _Ranked | None:
    """What is idle on the device and worth little, of very many; None: look at everything."""
    unusual = own_elsewhere or node.condemned or node.removed or node.chosen is not None
    if unusual or len(device.models) <= EXACT_MAX:
        return None
    few = device.short.look(device.models.values())
    there = [model for model in few or device.models.values() if lies_on(model, device)]
    ranked = candidates_of(node, wanted, device, there, wanted_bytes, own_elsewhere, False, reach, now_ms)
    device.short.keep(candidate[3] for candidate in ranked)
    return ranked


def _everything(node: Node, device: Device, own_elsewhere: bool) -> list[Model]:
    if not own_elsewhere:
        return list(device.models.values())
    there = {model: None for other in node.devices.values() for model in other.models.values()}
    return list(there)  # a gang once


def candidates_of(
    node: Node,
    wanted: Model,
    device: Device,
    models: Iterable[Model],
    wanted_bytes: int,
    own_elsewhere: bool,
    busy: bool,
    reach: bool,
    now_ms: int,
) -> _Ranked:
    """Which of the models may be taken. ``busy``: also what is in use now and must end some day. Without
    ``reach`` those of others are left out of which no slice allows a byte to go: there may be very many.

    What left the plan goes before all, then what was condemned for the same claim before, so that the
    choice does not wander while its leases end. What is in use comes last, and before it the chunks of
    models that somebody waits for.
    """
    gains_of, epoch = room.Renewal(node).gains, node.gains_epoch
    condemned, resident = node.condemned, State.RESIDENT
    usual = _Class()
    classes = {PLANNED: usual}
    limits_ms = {} if reach else may_open_ms(node, wanted.tenant)
    for model in models:
        limit_ms = limits_ms.get(model.tenant)
        if limit_ms is not None and is_closed(model.shade, limit_ms, wanted_bytes):
            continue
        rank = PLANNED if model.planned else 0
        if model.state is resident:
            if model.leases or model.packing:
                if not busy:
                    continue
                rank += 2
        else:
            standing = _standing_of_part(model, wanted, busy)
            if standing is None:
                continue
            rank += standing
        if own_elsewhere and model.tenant is not wanted.tenant and not lies_on(model, device):
            continue
        if condemned and condemned.get(model.ref) != wanted.ref:
            rank += 4
        known = model.gains
        if known is None or known.epoch != epoch:
            known = gains_of(model)
        members = usual if rank == PLANNED else classes.setdefault(rank, _Class())
        members.models.append(model)
        members.uses.append(model.reuse)
        members.gains_ms.append(known.device_ms * model.tenant.slice.weight)
        members.held_bytes.append(model.device_bytes - model.leaving_bytes)
    return _Ranked(classes, node, now_ms)


def _standing_of_part(model: Model, wanted: Model, busy: bool) -> int | None:
    """The rank of what is coming, going or there in part; None: it can not be taken."""
    if model.state is State.PARTIAL:
        return None if model is wanted else int(bool(model.waiters))
    return 2 if busy and (model.state is State.RESTORING or model.kept_chunks) else None


# --- victims --------------------------------------------------------------------------------------


def device_victims(
    node: Node, wanted: Model, device: Device, earlier: Earlier, busy: bool, reach: bool, now_ms: int
) -> list[Taking] | None:
    """What must go so that ``wanted`` gets onto ``device``, as little and worthless as possible.

    Counts what is leaving already. None: even all that may be taken is not enough. ``busy`` asks
    whether it could ever be: models in use count as takable, since leases, packs and restores end.
    ``reach``: the last resort, when nothing else can ever be enough; see ``_greedy``.
    """
    tenant = wanted.tenant
    promised_own = earlier.tenants.get(tenant.spec.tenant, 0)
    # What it holds elsewhere it gives up before it comes here, so its tenant needs the missing bytes only.
    need_own = wanted.missing_bytes + promised_own
    short = device.account.short_bytes(need_on(wanted, device) + earlier.devices.get(device.name, 0))
    short_own = tenant.device.short_bytes(need_own)
    if short <= 0 and short_own <= 0:
        return []
    entitled = tenant.device.kept_bytes + need_own <= tenant.device.reserved_bytes
    elsewhere = short_own > 0
    ranked = None if busy else _shortlisted(node, wanted, device, short, elsewhere, reach, now_ms)
    chosen = None
    if ranked is not None:
        chosen = _greedy(node, ranked, wanted, device, short, short_own, entitled, reach)
    if ranked is None or chosen is None or any(each.forced for each in chosen):
        models = _everything(node, device, elsewhere)
        ranked = candidates_of(node, wanted, device, models, short, elsewhere, busy, reach, now_ms)
        chosen = _greedy(node, ranked, wanted, device, short, short_own, entitled, reach)
    if chosen is None:
        return None
    if len(chosen) > 1 and short_own <= 0 and not busy and not any(each.forced for each in chosen):
        alone = _alone(node, ranked, chosen, short)
        if alone is not None:
            return [alone]
    capped = tenant.device.limit_bytes is not None
    helps = []
    for each in chosen:
        model = each.candidate[3]
        here = freed_on(model, device, each.nbytes)
        helps.append(_Helps(each, here, capped and model.tenant is tenant))
    short -= sum(help_.here for help_ in helps)
    short_own -= sum(help_.given.nbytes for help_ in helps if help_.own)
    return _spare(node, helps, -short, -short_own)


def _greedy(
    node: Node,
    ranked: _Ranked,
    wanted: Model,
    device: Device,
    short: int,
    short_own: int,
    entitled: bool,
    reach: bool,
) -> list[Given] | None:
    """Victims in the order of their rank until it is enough; None when it never is.

    First what may go by everybody's slice. Then the tenant's own models, whatever its slice says: alone it
    would have nothing else to give; but while it is within its reserve others have bytes of it, for whose
    leases it waits (unless ``reach``). Last, for a tenant within its reserve: whoever holds more than its
    own gives, since models, devices and bytes in use do not always divide as reserves do.
    """
    choice = Choice(node)
    tenant = wanted.tenant
    if short_own > 0:
        # Above its own max only the tenant's own models can help; those here help twice.
        own = [candidate for candidate in ranked if candidate[3].tenant is tenant]
        own.sort(key=lambda candidate: not lies_on(candidate[3], device))
        for forced in (False, True):
            for candidate in own if short_own > 0 else ():
                here = lies_on(candidate[3], device)
                gives = choice.take(candidate, max(short_own, short if here else 0), forced)
                short_own -= gives
                short -= freed_on(candidate[3], device, gives) if gives else 0
                if short_own <= 0:
                    break
    for step in ("allowed", "own", "others"):
        if step == "own" and entitled and not reach:
            break
        for candidate in ranked if short > 0 and (step != "others" or entitled) else ():
            model = candidate[3]
            if not lies_on(model, device) or (step == "own" and model.tenant is not tenant):
                continue
            if step == "others" and choice.kept_bytes(model.tenant) <= model.tenant.device.reserved_bytes:
                continue
            if gives := choice.take(candidate, short, forced=step != "allowed"):
                short -= freed_on(model, device, gives)
            if short <= 0:
                break
    return None if short > 0 or short_own > 0 else list(choice.given.values())


class _Helps(NamedTuple):
    """A victim, and what its bytes count for: so many for the device's shortage, all for its tenant's own."""

    given: Given
    here: int
    own: bool


def _spare(node: Node, chosen: list[_Helps], surplus: int, surplus_own: int) -> list[Taking]:
    """Spare what is not needed, of the most valuable first: its first chunks, or all of it where a later,
    larger victim made it needless. Afterwards no chunk more could stay."""
    takings: list[Taking] = []
    for given, here, own in reversed(chosen):
        spare = min(surplus if here else surplus_own, surplus_own if own else surplus)
        kept = given.nbytes
        if here < kept and here:  # a gang stays as a whole or not at all
            kept = kept if surplus >= here and (surplus_own >= kept or not own) else 0
            if not kept:
                takings.append(cut(node, given, 0))
        elif kept > spare:
            taking = cut(node, given, spare)
            takings.append(taking)
            kept -= taking.freed_bytes
        surplus -= min(kept, here)
        surplus_own -= kept if own else 0
    takings.reverse()
    return takings


def cut(node: Node, given: Given, spare_bytes: int) -> Taking:
    """Evict what a model gives, but as many of its first chunks as fit into ``spare_bytes``."""
    model, spared = given.candidate[3], given.spared_bytes
    chunks = model.spec.chunk_bytes
    if not spared and (spare_bytes < (chunks or (0,))[0] or not model.idle or not is_divisible(node, model)):
        return Taking(model, given.nbytes, 0, given.forced, loss=_loss(node, given.candidate, given.nbytes))
    # One chunk at least goes, or it would not be a victim.
    ends = list(accumulate(chunks[: model.resident_chunks - 1]))
    kept = bisect_right(ends, spared + spare_bytes)
    freed = given.nbytes + spared - ends[kept - 1] if kept else given.nbytes
    return Taking(model, freed, kept, given.forced, loss=_loss(node, given.candidate, freed))


def _alone(node: Node, ranked: _Ranked, chosen: list[Given], short: int) -> Taking | None:
    """The one model that could give ``short`` bytes at a smaller loss than several together.

    Every victim's next restore costs something whatever its size, so many small ones may be dearer than
    a piece of one that is worth more per byte.
    """
    if not node.partial:
        return None
    # The last of the chosen gives only what is needed of it.
    last = chosen[-1]
    needed = short - sum(each.nbytes for each in chosen[:-1])
    limit = sum(_loss(node, each.candidate, each.nbytes) for each in chosen[:-1])
    limit += _loss(node, last.candidate, min(needed, last.nbytes))
    best: Taking | None = None
    for candidate in ranked:
        rank, index, _, model, held = candidate
        if rank != last.candidate[0] or index * short >= limit:
            break  # from here on each is worth more than all that it would save
        if held < short or model.spec.devices > 1 or _loss(node, candidate, short) >= limit:
            continue
        choice = Choice(node)
        if choice.take(candidate, short) < short:
            continue
        given = choice.given[model]
        taking = cut(node, given, given.nbytes - short)
        if taking.loss < limit:
            best, limit = taking, taking.loss
    return best


def _loss(node: Node, candidate: Candidate, freed_bytes: int) -> float:
    """Expected milliseconds of restoring per second that evicting so many bytes brings about."""
    _, index, _, model, held = candidate
    gains = model.gains or room.gains(node, model)
    fixed_share = gains.fixed_ms / gains.device_ms if model.state is State.RESIDENT else 0.0
    return index * held * (fixed_share + (1.0 - fixed_share) * freed_bytes / max(held, 1))


# --- shedding -------------------------------------------------------------------------------------


def device_surplus(node: Node, device: Device, now_ms: int) -> list[Taking]:
    """What to evict because the device's budget sank below what it holds (or it is unhealthy).

    What tenants' slices do not have gives first; a budget is a fact, so the rest gives next.
    """
    if device.healthy and not device.account.excess_bytes:
        return []
    idle = sorted(_idle(node, (device,), None, now_ms))
    if not device.healthy:
        return [Taking(model, held, forced=True) for _, _, _, model, held in idle]
    return _until(node, idle, device, device.account.excess_bytes)


def tenant_surplus(node: Node, tenant: Tenant, now_ms: int) -> list[Taking]:
    """What to evict because the tenant's max sank below what it holds."""
    idle = sorted(_idle(node, node.devices.values(), tenant, now_ms))
    return _until(node, idle, None, tenant.device.excess_bytes)


def _idle(node: Node, devices: Iterable[Device], tenant: Tenant | None, now_ms: int) -> list[Candidate]:
    ranking = Ranking(node.shared, now_ms)
    value = None if node.chosen is None else node.chosen.values(Tier.DEVICE, now_ms)
    found: list[Candidate] = []
    seen: dict[Model, None] = {}  # a gang is on several devices
    for device in devices:
        for model in device.models.values():
            if model.idle and (tenant is None or model.tenant is tenant) and model not in seen:
                seen[model] = None
                held = model.device_bytes
                if value is not None:
                    index = value(model.ref)
                else:
                    index = keep_index(ranking, model.reuse, room.gains(node, model).device_ms, held)
                    index *= model.tenant.slice.weight
                found.append((0, index, model.name, model, held))
    return found


def _until(node: Node, candidates: list[Candidate], device: Device | None, excess_bytes: int) -> list[Taking]:
    """Victims until so much is gone from the device, or from all together."""
    choice = Choice(node)
    for forced in (False, True):
        for candidate in candidates:
            if excess_bytes <= 0:
                break
            if gives := choice.take(candidate, excess_bytes, forced):
                excess_bytes -= gives if device is None else freed_on(candidate[3], device, gives)
    going = []
    for given in choice.given.values():
        here = given.nbytes if device is None else freed_on(given.candidate[3], device, given.nbytes)
        going.append(_Helps(given, here, own=False))
    return _spare(node, going, max(-excess_bytes, 0), 0)


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
        f"{model.workspace_bytes} of workspace"
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
    for busy in (False, True):  # the first is the cheap question and mostly the last
        if any(
            device_victims(node, model, device, alone, busy, True, now_ms) is not None for device in healthy
        ):
            return None
    others = 0
    for other in largest.models.values():
        if other.tenant is not model.tenant and other.tenant.slice.reserved_bytes:
            others += min(other.shade.slice_bytes, other.device_bytes)
    return Hopeless(
        RefusalReason.NEVER_FITS,
        f"{sum_text}; of the {_size(budget)} of the largest device here, {largest.name}, {_size(others)} "
        "are held within other tenants' reserves and are not lent now, and "
        f"{spec.ref.tenant} has {_size(model.tenant.device.reserved_bytes)} reserved; ask the operator for a "
        "larger reserve",
    )
