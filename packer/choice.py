"""What a waiting model's turn leads to: start, make room on a device, refuse, or go on waiting. Pure.

Covers: the choice of the device, of who goes for it and of what moves. One function answers the real turn
(``queueing``) and the question what would be (``forecast``), so that a plan can not differ from the deed.
Does not cover: whose turn it is (``turns``), victims on one device (``victims``), or acting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from packer import gang_room, moving, victims
from packer.ledger import Claim, Device, Model, Node, State
from packer.placement import Bin, Wanted, place
from packer.places import place_of
from packer.room import Earlier
from packer.turns import startable
from packer.types import ModelRef


class Turn(StrEnum):
    START = "start"
    CLAIM = "claim"
    HOLD = "hold"  # claim some of the devices that a gang needs, and evict nothing before it has all
    GIVE_UP = "give_up"  # its first chunks, which lie where the rest can not come
    REFUSE = "refuse"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Choice:
    """``device`` (of a gang its place) is set to start, claim or hold, ``takings`` to claim, ``hope`` to
    refuse."""

    turn: Turn
    device: Device | None = None
    takings: tuple[victims.Taking, ...] = ()
    hope: victims.Hopeless | None = None


@dataclass(slots=True)
class Promises:
    """What is spoken for: claims by device, moves under way, and the bytes that both were promised."""

    claims: dict[str, Claim]
    earlier: Earlier
    moves: dict[ModelRef, str] = field(default_factory=dict)

    def add(self, device: Device, model: Model, claim: Claim) -> None:
        for each in device.parts:
            self.claims[each.name] = claim
            self.earlier.add(each.name, model.tenant.spec.tenant, _promised_bytes(model))

    def lay_down(self, model: Model) -> None:
        """The model's turn has come: it claims anew, if it still has to."""
        for name, standing in list(self.claims.items()):
            if standing.ref == model.ref:
                del self.claims[name]
                self.earlier.add(name, model.tenant.spec.tenant, -_promised_bytes(model))
        target = self.moves.pop(model.ref, None)
        if target is not None:
            self.earlier.add(target, model.tenant.spec.tenant, -model.need_bytes)

    def add_move(self, model: Model, target: str) -> None:
        """The model will come to this device once it is evicted where it is."""
        self.moves[model.ref] = target
        self.earlier.add(target, model.tenant.spec.tenant, model.need_bytes)


def _promised_bytes(model: Model) -> int:
    """On each device that it claims."""
    return model.missing_bytes if model.spec.devices == 1 else model.share_bytes


def standing(node: Node, now_ms: int) -> Promises:
    """The claims that stand: they stay promised while the others are looked at one after the other."""
    promises = Promises({}, Earlier({}, {}))
    for device in node.devices.values():
        claim = device.claim
        claimant = node.queue.get(claim.ref) if claim is not None else None
        if claim is not None and claimant is not None and startable(claimant, now_ms):
            promises.add(device, claimant, claim)
    for ref, move in node.moves.items():
        promises.add_move(node.models[ref], move.target)
    return promises


def choose(node: Node, model: Model, promises: Promises, now_ms: int) -> Choice:
    """What the model does in its turn."""
    healthy = [device for device in node.devices.values() if device.healthy]
    if model.wanted is not None and model.state is State.PARTIAL:
        return Choice(Turn.GIVE_UP)  # it came to another number of devices than it is to have now
    if model.spec.devices > 1:
        return _choose_gang(node, model, healthy, promises, now_ms)
    device = _fitting(model, healthy, promises.earlier)
    if device is not None:
        return Choice(Turn.START, device)
    claim = _claim(node, model, healthy, promises, now_ms)
    if claim is not None:
        return claim
    if model.state is State.PARTIAL and _serves_elsewhere(node, model, healthy, promises, now_ms):
        return Choice(Turn.GIVE_UP)
    hope = hopeless(node, model, now_ms)
    return Choice(Turn.WAIT) if hope is None else Choice(Turn.REFUSE, hope=hope)


def hopeless(node: Node, model: Model, now_ms: int) -> victims.Hopeless | None:
    """Why no waiting can help this model, or None."""
    if model.spec.devices > 1:
        return gang_room.hopeless(node, model, now_ms)
    return victims.hopeless(node, model, now_ms)


def _choose_gang(node: Node, model: Model, healthy: list[Device], promises: Promises, now_ms: int) -> Choice:
    """All its devices or none. Only one gang at a time holds some while it waits for others: two could each
    hold what the other needs. Whoever claims all that it needs waits for nobody who waits for it."""
    members = gang_room.fitting(model, healthy, promises.earlier)
    if members:
        return Choice(Turn.START, place_of(node, members))
    free = [device for device in healthy if device.name not in promises.claims]
    some: tuple[Device, ...] = ()
    for busy, reach in ((False, False), (True, False), (False, True), (True, True)):
        found = gang_room.joint(node, model, free, promises.earlier, busy, reach, now_ms)
        if found is not None:
            return Choice(Turn.CLAIM, place_of(node, found[0]), tuple(found[1]))
        some = gang_room.reachable(node, model, free, promises.earlier, busy, reach, now_ms)
    hope = gang_room.hopeless(node, model, now_ms)
    if hope is not None:
        return Choice(Turn.REFUSE, hope=hope)
    held = [claim.ref for claim in promises.claims.values()]
    if not some or any(held.count(ref) < node.models[ref].spec.devices for ref in held):
        return Choice(Turn.WAIT)
    return Choice(Turn.HOLD, place_of(node, some))


def _fitting(model: Model, healthy: list[Device], earlier: Earlier) -> Device | None:
    """Best fit: the device with the least room left over, so that large holes stay whole."""
    fitting = {each.name: each for each in healthy if victims.fits_now(model, each, earlier)}
    bins = [
        Bin(name, (each.account.limit_bytes or 0) - each.account.used_bytes) for name, each in fitting.items()
    ]
    placing = place(bins, Wanted(model.name, model.missing_bytes))
    return fitting[placing.bins[0]] if placing is not None else None


def _claim(node: Node, model: Model, healthy: list[Device], promises: Promises, now_ms: int) -> Choice | None:
    """The device to make room on and whom to evict there: idle models whose going costs least, now; else
    models in use, for later; else, as a last resort, beyond what slices allow. A claim that stands keeps
    its device unless another can serve at once, and a model of which some chunks are there claims no
    other."""
    free = [device for device in healthy if device.name not in promises.claims]
    if model.device is not None:
        free = [device for device in free if device is model.device]
    for busy, reach in ((False, False), (True, False), (False, True), (True, True)):
        if busy and model.device is not None and _serves_elsewhere(node, model, healthy, promises, now_ms):
            return None
        best: tuple[tuple[bool, float, int, int, str], Device, list[victims.Taking]] | None = None
        for device in free:
            if (device.account.limit_bytes or 0) < model.need_bytes:
                continue
            takings = victims.device_victims(node, model, device, promises.earlier, busy, reach, now_ms)
            if takings is None:
                continue
            stands = device.claim is not None and device.claim.ref == model.ref
            evicted = sum(taking.freed_bytes for taking in takings)
            # A chosen policy knows an order of its victims and no loss to compare devices by.
            loss = sum(taking.loss for taking in takings) if node.chosen is None else 0.0
            rank = (not stands, loss, evicted, *_left_over(device))
            if best is None or rank < best[0]:
                best = (rank, device, takings)
        if not busy and not reach:
            instead = None if best is None else best[2]
            moved = moving.propose(node, model, free, healthy, promises.earlier, instead, now_ms)
            if moved is not None:
                return Choice(Turn.CLAIM, moved[0], tuple(moved[1]))
        if best is not None:
            takings = best[2]
            if not busy and not reach and node.chosen is None:
                claimed = promises.claims
                others = [each for each in healthy if each is not best[1] and each.name not in claimed]
                takings = moving.trade(node, model, takings, others, promises.earlier, now_ms)
            return Choice(Turn.CLAIM, best[1], tuple(takings))
    return None


def _serves_elsewhere(
    node: Node, model: Model, healthy: list[Device], promises: Promises, now_ms: int
) -> bool:
    """Could another device take the whole model at once, while the one with its first chunks can not take
    the rest? Then these chunks lie in the wrong place."""
    return any(
        (device.account.limit_bytes or 0) >= model.need_bytes
        and victims.device_victims(node, model, device, promises.earlier, False, False, now_ms) is not None
        for device in healthy
        if device is not model.device and device.name not in promises.claims
    )


def _left_over(device: Device) -> tuple[int, str]:
    return ((device.account.limit_bytes or 0) - device.account.used_bytes, device.name)
