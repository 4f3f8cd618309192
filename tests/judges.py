"""What the simulated world forbids: byte budgets, needless or unfair evictions, broken claims, bad ends.

Covers: judging one step of the core, or its last state, by the world's own books. Does not cover: the
orders themselves, which ``simulation`` judges as it carries them out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packer.events import (
    Action,
    DeviceSeen,
    Event,
    Evict,
    FootprintSeen,
    Grant,
    Planned,
    Restore,
    RestoreFailed,
    WorkerDied,
)
from packer.ledger import Claim
from packer.types import ModelRef, Tier

if TYPE_CHECKING:
    from simulation import World

# The core's patience, then the longest restore, lease, pack and eviction of this world in a row, twice.
CLAIM_MS_MAX = 2_000 + 2 * (1_000 + 3_000 + 2_000 + 300)


def judge_bytes(world: World) -> None:
    """No budget and no max is exceeded by what is really there, unless it sank below what was."""
    used = dict.fromkeys(world.budgets, 0)
    by_tenant: dict[str, int] = dict.fromkeys(world.tenants, 0)
    for stay in world.stays.values():
        for device in stay.devices:
            used[device] += world.held_on(stay, device)
        by_tenant[stay.ref.tenant] += stay.nbytes
    for device, nbytes in used.items():
        ledger = world.core.device_bytes_used(world.node, device)
        world.require(nbytes == ledger, f"{device} holds {nbytes} bytes, the ledger says {ledger}")
        _within(world, nbytes, world.seen_budgets[device], device)
    for tier in (Tier.HOST, Tier.DISK):
        nbytes = world.tier_bytes(tier)
        ledger = world.core.tier_bytes_used(world.node, tier)
        world.require(nbytes == ledger, f"{tier} holds {nbytes} bytes, the ledger says {ledger}")
        _within(world, nbytes, world.seen_limits[tier], tier)
    for name, nbytes in by_tenant.items():
        _within(world, nbytes, world.tenants[name].quota.device.max, name)


def _within(world: World, nbytes: int, limit: int | None, key: str) -> None:
    if limit is None or nbytes <= limit:
        world.excused[key] = 0
        return
    excuse = world.excused.get(key, 0)
    world.require(nbytes <= excuse, f"{key} holds {nbytes} bytes, above {limit}; excused {excuse}")
    world.excused[key] = nbytes


def judge_evictions(world: World, event: Event, actions: list[Action], kept: dict[str, int]) -> None:
    """Evictions for a claim: no chunk too many, and nothing that a tenant's slice has but on credit."""
    if isinstance(event, Planned | DeviceSeen | WorkerDied | FootprintSeen):
        return
    claimants = {d.claim.ref.tenant for d in world.node.devices.values() if d.claim is not None}
    starting = {action.ref.tenant for action in actions if isinstance(action, Restore)}
    evicted: dict[str, list[Evict]] = {}
    for action in actions:
        if isinstance(action, Evict) and action.ref in world.planned:
            stay = world.stays[action.ref]
            if all(world.healthy[name] for name in stay.devices):
                evicted.setdefault(action.device, []).append(action)
    if any("+" in name for name in evicted) or world.gang_claims():
        every = [order for orders in evicted.values() for order in orders]
        judge_evictions_of_gangs(world, every, kept, exact=not starting)
        return
    for name, orders in evicted.items():
        claim = world.node.devices[name].claim
        if any(order.ref in world.node.moves for order in orders):
            judge_moves(world, orders)
            continue
        if claim is None and kept[name] <= world.seen_budgets[name] and not starting:
            judge_makes_way(world, name, orders, kept[name])
        if claim is None or kept[name] > world.seen_budgets[name]:
            continue  # what a device holds above its budget goes whoever's it is
        world.reached["evicted for a claim"] += 1
        # Another waiting model of a tenant at its max may take them, to stay under it.
        own = any(order.ref == claim.ref for order in orders)
        capped = world.tenants[claim.ref.tenant].quota.device.max is not None
        world.require(not own or capped, f"{claim.ref} evicts its own chunks")
        if any(order.ref in world.node.queue for order in orders):
            # Chunks of a model that waits too: taken for the claim, or given up to go to another device.
            world.reached["evicted chunks of a waiting model"] += 1
            continue
        need = _missing(world, claim.ref, name) + _coming(world, name)
        freed = sum(_freed(world, order) for order in orders)
        # Who is held to a max may have to give up models of its own that take no room here.
        capped = any(world.tenants[name].quota.device.max is not None for name in claimants)
        if not capped and not starting:
            spare = world.seen_budgets[name] - (kept[name] - freed) - need
            least = min(_could_stay(world, order) for order in orders)
            world.require(spare < least, f"evicted {orders}: a chunk too many by {spare} bytes")
        for order in orders:
            shade = world.node.models[order.ref].shade
            if shade.slice_bytes and order.ref.tenant not in claimants:
                lent = world.prefix_bytes(order.ref, order.keep_chunks) < shade.slice_bytes
                world.reached["took what a slice has" if lent else "took what no slice has"] += 1


def judge_evictions_of_gangs(world: World, orders: list[Evict], kept: dict[str, int], exact: bool) -> None:
    """Nobody goes for a gang that has not all its devices yet, nor anybody whom it could do without.
    ``exact``: no restore began in the same step."""
    freed = {name: sum(_freed_on(world, order, name) for order in orders) for name in world.budgets}
    claims = {name: device.claim for name, device in world.node.devices.items() if device.claim is not None}
    for order in orders:
        names = world.stays[order.ref].devices
        claimed = [name for name in names if name in claims]
        refs = [claims[name].ref for name in claimed]
        counts = [sum(claim.ref == ref for claim in claims.values()) for ref in refs]
        world.reached["a gang was evicted for a claim"] += bool(refs) and len(names) > 1
        world.reached["evicted for a gang"] += any(world.models[ref].devices > 1 for ref in refs)
        capped = any(tenant.quota.device.max is not None for tenant in world.tenants.values())
        over = any(kept[each] > world.seen_budgets[each] for each in names)
        elsewhere = order.ref in world.node.moves or order.ref in world.node.queue
        if refs and not (capped or over or elsewhere):  # else it may have had to go in any case
            whole = any(count == world.models[ref].devices for ref, count in zip(refs, counts, strict=True))
            world.require(whole, f"{order} goes for {refs}, none of which has all its devices")
        if exact and len(claimed) == len(names) and not capped and not over:
            left = {name: world.seen_budgets[name] - kept[name] + freed[name] for name in names}
            needed = [
                left[name] - _least_on(world, order, name) < _missing(world, claims[name].ref, name)
                for name in names
            ]
            moved = any(other.ref in world.node.moves for other in orders)
            world.require(any(needed) or moved, f"{order} goes, and some of it need not")


def _freed_on(world: World, order: Evict, device: str) -> int:
    stay = world.stays[order.ref]
    if len(stay.devices) > 1:
        return world.held_on(stay, device)
    return _freed(world, order) if stay.device == device else 0


def _least_on(world: World, order: Evict, device: str) -> int:
    """The least that it could have spared there: of a gang its share."""
    stay = world.stays[order.ref]
    return world.held_on(stay, device) if len(stay.devices) > 1 else _could_stay(world, order)


def judge_gangs(world: World) -> None:
    """Of those that hold some of the devices that they need, and wait for others, there is one at most."""
    claims = world.gang_claims()
    halves = [ref for ref in dict.fromkeys(claims) if claims.count(ref) < world.models[ref].devices]
    world.require(len(halves) <= 1, f"{halves} hold what the others may need")
    world.reached["a gang held some of its devices"] += bool(halves)
    waiting = [ref for ref in world.node.queue if world.models[ref].devices > 1]
    world.reached["two gangs waited for room"] += len(waiting) > 1 and bool(claims)


def judge_excuses(
    world: World,
    event: Event,
    actions: list[Action],
    kept: dict[str, int],
    tenants: dict[str, int],
    excused: dict[str, int],
) -> None:
    """What a slice has is taken without credit only where something failed or shrank, from the waiting
    tenant itself, or from one above its reserve for one within its own."""
    for name, tenant in world.node.tenants.items():
        if tenant.slice.excused_ms <= excused.get(name, 0):
            continue
        world.reached["excused"] += 1
        timed = world.node.chosen is not None and world.node.chosen.timed
        if timed or isinstance(event, Planned | DeviceSeen | WorkerDied | RestoreFailed | FootprintSeen):
            continue
        waiting = {d.claim.ref.tenant for d in world.node.devices.values() if d.claim is not None}
        waiting |= {action.ref.tenant for action in actions if isinstance(action, Restore)}
        waiting |= {action.ref.tenant for action in actions if isinstance(action, Evict)} & {
            ref.tenant for ref in world.node.queue
        }
        entitled = any(tenants[other] < world.node.tenants[other].device.reserved_bytes for other in waiting)
        own, above = name in waiting, tenants[name] > tenant.device.reserved_bytes
        over = [d for d, budget in world.seen_budgets.items() if kept[d] > budget or not world.healthy[d]]
        most = world.tenants[name].quota.device.max
        shrunk = bool(over) or (most is not None and tenants[name] > most)
        world.require(own or (above and entitled) or shrunk, f"{name} was taken from without credit")
        world.reached["took beyond a slice"] += not own


def judge_moves(world: World, orders: list[Evict]) -> None:
    """What moves goes wholly, to another device, is in host memory, and its tenant has nothing reserved."""
    for order in orders:
        move = world.node.moves.get(order.ref)
        if move is None:
            continue
        world.reached["moved to another device"] += 1
        world.require(move.target != order.device, f"{order.ref} moves to where it is")
        world.require(not order.keep_chunks, f"{order.ref} moves in part")
        world.require(world.readable(order.ref, Tier.HOST), f"{order.ref} moves and is not in host memory")
        lent = world.node.tenants[order.ref.tenant].device.reserved_bytes
        world.require(not lent, f"{order.ref} moves, whose tenant has reserved bytes")
        world.moving[order.ref] = move.target
    world.require(len(world.node.moves) <= 2 * len(world.node.devices), "more moves than two for each claim")


def judge_makes_way(world: World, name: str, orders: list[Evict], kept_bytes: int) -> None:
    """What goes where nobody claims makes way for what moves there: no chunk too many, and nothing of a
    tenant that has reserved bytes."""
    coming = _coming(world, name)
    capped = any(tenant.quota.device.max is not None for tenant in world.tenants.values())
    if not coming or capped or any(order.ref in world.node.queue for order in orders):
        return
    world.reached["made way for what moves"] += 1
    for order in orders:
        lent = world.node.tenants[order.ref.tenant].device.reserved_bytes
        world.require(not lent, f"{order.ref} makes way, whose tenant has reserved bytes")
    spare = world.seen_budgets[name] - (kept_bytes - sum(_freed(world, order) for order in orders)) - coming
    least = min(_could_stay(world, order) for order in orders)
    world.require(spare < least, f"{orders} make way: a chunk too many by {spare} bytes")


def _missing(world: World, ref: ModelRef, device: str) -> int:
    """Bytes that a model must still get to be on a device as a whole."""
    stay = world.stays.get(ref)
    if world.models[ref].devices > 1:
        return world.share_bytes(ref)
    there = stay.nbytes if stay is not None and stay.device == device else 0
    return world.need_bytes(ref) - there


def _coming(world: World, device: str) -> int:
    """Bytes that are promised to models on their way to the device."""
    coming = [world.models[ref] for ref, move in world.node.moves.items() if move.target == device]
    return sum(spec.image_bytes + spec.workspace_bytes for spec in coming)


def _freed(world: World, order: Evict) -> int:
    return world.stays[order.ref].nbytes - world.prefix_bytes(order.ref, order.keep_chunks)


def _could_stay(world: World, order: Evict) -> int:
    """The least that this eviction could have spared: its next chunk, or all of it."""
    stay = world.stays[order.ref]
    copied = any(world.readable(order.ref, tier) for tier in (Tier.HOST, Tier.DISK)) and world.node.partial
    if order.keep_chunks + 1 >= stay.chunks or not copied:
        return _freed(world, order)
    return world.models[order.ref].chunk_bytes[order.keep_chunks]


def judge_shedding(world: World, event: Event, actions: list[Action], kept: dict[str, int]) -> None:
    """When a budget sinks, no chunk too many goes."""
    if not isinstance(event, DeviceSeen) or not event.healthy:
        return
    orders = [action for action in actions if isinstance(action, Evict) and action.device == event.device]
    if len(orders) == 0 or world.node.devices[event.device].claim is not None:
        return
    if any(order.ref not in world.planned for order in orders):
        return
    if any(isinstance(action, Evict) and "+" in action.device for action in actions):
        world.reached["a gang was shed for a smaller budget"] += 1
        return
    spare = event.budget_bytes - (kept[event.device] - sum(_freed(world, order) for order in orders))
    least = min(_could_stay(world, order) for order in orders)
    world.require(spare < least, f"{event.device} shed {orders}: a chunk too many by {spare} bytes")
    world.reached["shed for a smaller budget"] += 1


def judge_chunks(world: World) -> None:
    """The core knows of every model how many of its chunks are there."""
    for ref, stay in world.stays.items():
        view = world.core.model_view(world.node, ref)
        world.require(
            view is not None and view.resident_chunks == stay.chunks, f"{ref} has {stay.chunks} chunks"
        )
        world.require(view.device_bytes == stay.nbytes, f"{ref} holds {stay.nbytes} bytes")


def judge_fills(world: World) -> None:
    """While anything lies in host memory that nobody has asked for, the largest copy finds room there."""
    if world.filling is not None and not world.fill_stopped:
        ref = world.filling.ref
        world.require(ref in world.planned, f"{ref} left the plan and is filled on")
    waits = [ref for ref in world.ahead if (ref, Tier.HOST) not in world.dropping]
    if not waits:
        return
    limit = world.seen_limits[Tier.HOST]
    leaving = sum(world.host[ref] for ref, tier in world.dropping if tier is Tier.HOST)
    sizes = [world.models[ref].image_bytes for ref in world.disk if world.readable(ref, Tier.DISK)]
    need = max((size for size in sizes if 2 * size <= limit), default=0)
    free = limit - world.tier_bytes(Tier.HOST) + leaving
    # What a restore is reading can not go; what is filled goes when it has ended.
    fixed = world.fill_stopped and world.filling is not None
    world.require(free >= need or fixed, f"{waits} lie in host memory and leave {free} of {need} bytes free")


def judge_passing(world: World, event: Event, kept: dict[str, int], claims: dict[str, Claim | None]) -> None:
    """Room that was made for a claim is not taken by a model that comes later."""
    if isinstance(event, Planned | DeviceSeen | FootprintSeen):
        return
    for device in world.node.devices.values():
        claim, budget = device.claim, world.seen_budgets[device.name]
        before = claims.get(device.name)
        if claim is None or before is None or claim.ref != before.ref:
            continue
        need = _missing(world, claim.ref, device.name)
        if kept[device.name] + need <= budget:
            world.require(device.account.kept_bytes + need <= budget, f"the room of {claim} was taken")


def judge_patience(world: World) -> None:
    """A claim is served once what runs has ended, however busy the models are that it needs gone."""
    for device in world.node.devices.values():
        claim = device.claim
        waited_ms = world.now_ms - claim.since_ms if claim is not None else 0
        world.require(waited_ms <= world.claim_ms_max, f"{claim} stands since {waited_ms} ms")


def judge_end(world: World) -> None:
    """All is answered, all is at rest, and what is held is what should be."""
    for request, call in world.calls.items():
        world.require(call.answer is not None or call.left, f"{request} was never answered")
        world.require(not isinstance(call.answer, Grant) or call.over, f"{request} never ended")
    world.require(not world.node.requests and not world.node.queue, "the core remembers requests")
    world.require(not world.node.condemned, "models stay condemned for nobody")
    world.require(all(d.claim is None for d in world.node.devices.values()), "a claim of nobody stands")
    rest = ("resident", "partial")
    world.require(all(s.state in rest for s in world.stays.values()), "orders are never answered")
    world.require(not world.node.removed, "removed models are remembered for ever")
