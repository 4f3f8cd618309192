"""Noting what the core decides, with its scores, as it decides it.

Covers: one function per kind of decision; each adds to ``Node.why``, which lives until the next whole step.
Does not cover: keeping them longer (``agent/decisions.py``). Nothing here decides or changes anything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from packer import victims
from packer.decisions import Decision, Kind, Victim
from packer.ledger import Device, Model, Node
from packer.places import room_left
from packer.types import GIB, Tier


def score(node: Node, model: Model, now_ms: int) -> float | None:
    """The model's keep-index on its device, in ms of restoring per second and GiB; see ``decisions``."""
    value = victims.value_of(node, model, now_ms)
    if not math.isfinite(value):
        return None
    return value if node.chosen is not None else value * 1000 * GIB


def victims_of(node: Node, takings: Sequence[victims.Taking], now_ms: int) -> tuple[Victim, ...]:
    return tuple(
        Victim(
            taking.model.name,
            taking.model.device.name if taking.model.device is not None else "",
            taking.freed_bytes,
            taking.keep_chunks,
            score(node, taking.model, now_ms),
            in_use=not taking.model.idle,
            moves_to=taking.moves_to,
        )
        for taking in takings
    )


def placed(node: Node, model: Model, device: Device, moved: bool) -> None:
    """Its restore starts; the bytes are held already."""
    left = room_left(device)
    only = sum(other.healthy for other in node.devices.values()) == 1
    why = "the only device" if only else "the device with the least room that is enough"
    if device.members:
        why = f"the {len(device.members)} devices with the least room that is enough"
    if moved:
        why = "moved here to make room on another device"
    node.why.append(
        Decision(
            Kind.PLACED,
            model.name,
            why,
            device.name,
            left_bytes=left,
            from_tier=model.source.value,
            nbytes=model.moving_bytes,
            expected_ms=model.expected_ms,
        )
    )


def held(node: Node, model: Model, place: Device) -> None:
    """It claims some of the devices that it needs, and waits for others."""
    why = f"{len(place.parts)} of the {model.spec.devices} devices that it needs are not claimed by others"
    node.why.append(Decision(Kind.CLAIMED, model.name, why, place.name, nbytes=model.need_bytes))


def claimed(node: Node, model: Model, device: Device, takings: Sequence[victims.Taking], now_ms: int) -> None:
    """It needs room on the device: these go, at once if nobody uses them."""
    busy = sum(not taking.model.idle for taking in takings)
    if busy:
        why = f"waits: {busy} of the {len(takings)} that must go are in use"
    elif any(taking.moves_to for taking in takings):
        why = "moving costs less than evicting"
    elif takings and device.members:
        why = "the least valuable bytes of the devices that have to give the fewest"
    elif takings:
        why = "the least valuable bytes of the device that has to give the fewest"
    else:
        why = "what is leaving already is enough"
    who = victims_of(node, takings, now_ms)
    need = model.need_bytes if device.members else victims.need_on(model, device)
    node.why.append(Decision(Kind.CLAIMED, model.name, why, device.name, nbytes=need, victims=who))


def delayed(node: Node, model: Model, wait_ms: int) -> None:
    """Its tenant is above its rate of restores; told once for all that wait with it."""
    limit = model.tenant.rates.restores.limit
    why = f"its tenant may have {limit} restores per minute (restores_per_minute): the next in {wait_ms} ms"
    node.why.append(Decision(Kind.DELAYED, model.name, why))


def condemned(node: Node, model: Model, device: Device, busy: Sequence[Model]) -> None:
    for other in busy:
        if node.condemned.get(other.ref) != model.ref:
            why = "new requests wait: its room was wanted for too long"
            node.why.append(Decision(Kind.CONDEMNED, other.name, why, device.name, model.name))


def prefetched(node: Node, model: Model, nbytes: int) -> None:
    """It is brought into host memory ahead of need."""
    why = "nobody needs the disk, and it is likely to be used again"
    node.why.append(Decision(Kind.PREFETCHED, model.name, why, from_tier=Tier.DISK.value, nbytes=nbytes))


def shed(node: Node, takings: Sequence[victims.Taking], why: str, now_ms: int) -> None:
    """These go although nobody waits for their room."""
    for taking, victim in zip(takings, victims_of(node, takings, now_ms), strict=True):
        device = taking.model.device
        name = device.name if device is not None else ""
        node.why.append(
            Decision(Kind.SHED, victim.ref, why, name, nbytes=victim.freed_bytes, victims=(victim,))
        )
