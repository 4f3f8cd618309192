"""Moves: idle models that go to another device of the node, so that a waiting one fits.

Covers: when moving costs less than evicting, and which models may be moved: into room that is free already
(``propose``), and in a full node into the room of others that are missed less (``trade``). Does not cover:
the search for moves into free room (``placement``) or carrying them out: a move is an eviction whose model is
restored on another device as soon as its bytes are gone there (``queueing``).

What a move costs is the restore of what moves, by the chance that somebody asks for it meanwhile, and a
share of it in any case. What it is worth is the restoring that the eviction in its place is expected to
cause within ``HORIZON_MS``. Only models that the host tier holds are moved, and none of a tenant with
reserved bytes: a move takes a model away for a moment, which its slice would not have done. Gangs stay where
they are: a device has room for a share, and to move one is to move all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from packer import room, victims
from packer.intensity import Ranking
from packer.ledger import CopyState, Device, Model, Node, State
from packer.placement import MOVES_MAX, Bin, Piece, Rule, Wanted, place
from packer.room import Earlier
from packer.types import Tier
from packer.victims import Taking

# How long what is evicted now would have been missed. Longer would move models for uses that a later
# eviction makes worthless, shorter would forget what is used every few minutes.
HORIZON_MS = 600_000
# Of a restore that nobody waits for this share counts: it takes the link from those that somebody waits for.
UNASKED_SHARE = 0.25
# At most so many times the bytes of what comes may move: a link that copies is not free for restores.
MOVED_PARTS = 2
# Models of a device that may be moved; the others are too many to look at in one step.
PIECES_MAX = 32


def propose(
    node: Node,
    wanted: Model,
    free: Sequence[Device],
    healthy: Sequence[Device],
    earlier: Earlier,
    instead: Sequence[Taking] | None,
    now_ms: int,
) -> tuple[Device, list[Taking]] | None:
    """Moves to make room on one of the ``free`` devices, if they cost less than evicting ``instead`` (None:
    nothing idle would be enough). None: evict."""
    if node.chosen is not None or len(healthy) < 2 or wanted.device is not None or not wanted.need_bytes:
        return None
    # In a full node nothing can move, and that is the usual case.
    holes = sum(max(_left_bytes(device, earlier), 0) for device in healthy)
    if not free or holes < wanted.need_bytes:
        return None
    own, promised_own = wanted.tenant.device, earlier.tenants.get(wanted.ref.tenant, 0)
    if own.short_bytes(wanted.need_bytes + promised_own) > 0:
        return None  # its tenant has to give something up in any case
    worth = math.inf if instead is None else _loss_ms(node, instead, now_ms)
    bins = [_bin(node, device, device in free, earlier, now_ms) for device in healthy]
    rule = Rule(MOVES_MAX, MOVED_PARTS * wanted.need_bytes)
    found = place(bins, Wanted(wanted.name, wanted.need_bytes, worth=worth), rule)
    if found is None or not found.moves or found.bins[0] not in [device.name for device in free]:
        return None
    takings = []
    for move in found.moves:
        there = node.devices[move.source].models.values()
        model = next(model for model in there if model.name == move.piece)
        takings.append(Taking(model, model.device_bytes, moves_to=move.target))
    return node.devices[found.bins[0]], takings


def trade(
    node: Node,
    wanted: Model,
    takings: Sequence[Taking],
    others: Sequence[Device],
    earlier: Earlier,
    now_ms: int,
) -> list[Taking]:
    """These victims of one device, but who would be missed moves to one of the ``others`` that has bytes
    which are missed less, and these go in its place.

    The victims of one device are its least valuable bytes and not the node's. Whoever uses a model that was
    evicted has it restored, mostly on another device, and waits for that: a move does the same before."""
    own = wanted.tenant.device
    if own.short_bytes(wanted.missing_bytes + earlier.tenants.get(wanted.ref.tenant, 0)) > 0:
        return list(takings)  # its tenant has to give something up, wherever that lies
    ranking = Ranking(node.shared, now_ms)
    missed = {taking.model: victims.expected_ms(node, taking, HORIZON_MS, now_ms) for taking in takings}
    going, coming = list(takings), list(others)
    budget_bytes, moves = MOVED_PARTS * wanted.need_bytes, 0
    for taking in sorted(takings, key=lambda each: (-missed[each.model], each.model.name)):
        model = taking.model
        if not _may_move(model) or taking not in going or model.device_bytes > budget_bytes:
            continue
        saved_ms = missed[model] - _cost_ms(node, model, ranking)
        if saved_ms <= 0:
            continue
        found = _worse(node, model, coming, earlier, saved_ms, now_ms)
        if found is None:
            continue
        target, instead = found
        budget_bytes -= model.device_bytes
        moves += 1
        coming.remove(target)
        going.remove(taking)
        _spare(going, model.device_bytes - taking.freed_bytes, missed)
        going += [Taking(model, model.device_bytes, moves_to=target.name), *instead]
        if moves == MOVES_MAX:
            break
    return going


def _spare(going: list[Taking], surplus_bytes: int, missed: Mapping[Model, float]) -> None:
    """Who moves leaves more room than the part of it that was to go: others of the device may stay."""
    for taking in sorted(going, key=lambda each: (-missed.get(each.model, 0.0), each.model.name)):
        if taking.model in missed and not taking.moves_to and taking.freed_bytes <= surplus_bytes:
            surplus_bytes -= taking.freed_bytes
            going.remove(taking)


def _worse(
    node: Node, model: Model, others: Sequence[Device], earlier: Earlier, saved_ms: float, now_ms: int
) -> tuple[Device, list[Taking]] | None:
    """The device where the model would push out what is missed least, and less than ``saved_ms``."""
    best: tuple[float, str, Device, list[Taking]] | None = None
    for device in others:
        if (device.account.limit_bytes or 0) < model.need_bytes:
            continue
        there = victims.device_victims(node, model, device, earlier, False, False, now_ms)
        if there is None or not all(_may_make_way(taking) for taking in there):
            continue
        loss_ms = _loss_ms(node, there, now_ms)
        if loss_ms < saved_ms and (best is None or (loss_ms, device.name) < best[:2]):
            best = (loss_ms, device.name, device, there)
    return None if best is None else best[2:]


def _may_make_way(taking: Taking) -> bool:
    """May it go for a model that only moves? Then nobody waits for it, and no slice has bytes of it: what
    slices give is counted for one device at a time."""
    model, tenant = taking.model, taking.model.tenant
    return (
        not taking.forced
        and model.state is State.RESIDENT
        and model.spec.devices == 1
        and not model.waiters
        and not tenant.device.reserved_bytes
    )


def _cost_ms(node: Node, model: Model, ranking: Ranking) -> float:
    """What it costs to move the model."""
    away_ms = room.restore_ms_from(node, model, Tier.HOST)
    asked = 1.0 - math.exp(-ranking.uses_per_ms(model.reuse) * away_ms)
    return away_ms * min(UNASKED_SHARE + asked, 1.0)


def _bin(node: Node, device: Device, may_give: bool, earlier: Earlier, now_ms: int) -> Bin:
    """The device as placement sees it, with what may move from it."""
    movable = [model for model in device.models.values() if _may_move(model)] if may_give else []
    ranking = Ranking(node.shared, now_ms)
    pieces = []
    for model in movable[:PIECES_MAX]:
        pieces.append(Piece(model.name, model.device_bytes, _cost_ms(node, model, ranking)))
    return Bin(device.name, _left_bytes(device, earlier), tuple(pieces))


def _left_bytes(device: Device, earlier: Earlier) -> int:
    """What leaves counts as gone, and what was promised as taken."""
    account = device.account
    return (account.limit_bytes or 0) - account.kept_bytes - earlier.devices.get(device.name, 0)


def waits(model: Model, device: Device, earlier: Earlier) -> bool:
    """Whether what moves there and is gone from where it was waits for the last bytes of who makes way."""
    return (
        model.state is State.ABSENT
        and not model.waiters
        and model.planned
        and device.healthy
        and _left_bytes(device, earlier) >= 0
        and not device.account.fits(model.need_bytes)
    )


def _may_move(model: Model) -> bool:
    return (
        model.state is State.RESIDENT
        and model.spec.devices == 1
        and model.idle
        and model.planned
        and model.host.state is CopyState.HELD
        and not model.tenant.device.reserved_bytes
    )


def _loss_ms(node: Node, takings: Sequence[Taking], now_ms: int) -> float:
    """Restoring that evicting these is expected to cause within the horizon."""
    return sum(victims.expected_ms(node, taking, HORIZON_MS, now_ms) for taking in takings)
