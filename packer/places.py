"""Devices taken together: the places where gangs lie, and what of a model is on one device.

Covers: questions about them. Does not cover: the books, which make and forget places (``ledger``), or which
devices a gang gets (``gang_room``).
"""

from __future__ import annotations

from collections.abc import Sequence

from packer.gangs import place_name
from packer.ledger import Device, Model, Node


def place_of(node: Node, members: Sequence[Device]) -> Device:
    """These devices together; one alone is itself. A place that nothing lies at is not remembered."""
    if len(members) == 1:
        return members[0]
    name = place_name([member.name for member in members])
    healthy = all(member.healthy for member in members)
    return node.places.get(name) or Device(name, healthy, partial=False, members=tuple(members))


def lies_on(model: Model, device: Device) -> bool:
    at = model.device
    return at is device or (at is not None and device in at.members)


def bytes_on(model: Model, device: Device) -> int:
    """What the model holds on one device: all of it, its share, or nothing."""
    at = model.device
    if at is device:
        return model.device_bytes
    if at is None or device not in at.members:
        return 0
    return model.shares[at.members.index(device)]


def freed_on(model: Model, device: Device, freed_bytes: int) -> int:
    """What of the bytes that a model gives is on one device. A gang gives all that it has."""
    at = model.device
    return freed_bytes if at is device else bytes_on(model, device)


def room_left(place: Device) -> int:
    """Bytes that nothing holds on the device, or on the fullest one of a place."""
    return min((each.account.limit_bytes or 0) - each.account.used_bytes for each in place.parts)
