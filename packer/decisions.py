"""What the core decided, or would decide, and why: values for ``bunk plan`` and ``bunk explain``.

Covers: their shapes. Does not cover: making them (``choice``, ``forecast``, ``queueing``, ``upkeep``) or
keeping them (``agent/decisions.py``). Models are named by text, so that these values go over the wire as
they are.

``keep_index`` is what keeping one GiB of a model for one second saves, in milliseconds of restoring; under
another policy than ours it is whatever that policy ranks by, and None where it has no opinion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

# Victims that an answer names; one that needs more shows these and how many there are beside them.
VICTIMS_MAX = 32


class Outcome(StrEnum):
    """What a request for a model would meet now."""

    RESIDENT = "resident"  # it is on a device and may be used at once
    RESTORING = "restoring"  # it is on its way
    FITS = "fits"  # a device has room
    EVICTS = "evicts"  # others must go first, and may
    WAITS = "waits"  # for models in use, a claim or a rate
    REFUSED = "refused"


class Kind(StrEnum):
    """What was decided."""

    PLACED = "placed"  # a restore was started
    CLAIMED = "claimed"  # a device was chosen to make room on
    DELAYED = "delayed"  # its restore waits for its tenant's rate of restores
    CONDEMNED = "condemned"  # new requests of a model wait, because a claim needs its room
    SHED = "shed"  # evicted although nobody waits for its room
    PREFETCHED = "prefetched"  # brought into host memory although nobody waits for it
    REFUSED = "refused"
    RESTORED = "restored"
    FAILED = "failed"
    DROPPED = "dropped"  # from a tier below the device


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that goes from its device, wholly or down to its first ``kept_chunks`` chunks."""

    ref: str
    device: str
    freed_bytes: int
    kept_chunks: int = 0
    keep_index: float | None = None
    in_use: bool = False
    moves_to: str = ""  # the device that it goes to; empty: it is evicted


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """One device in a forecast, and why it is or is not the one."""

    device: str
    budget_bytes: int
    used_bytes: int
    needed_bytes: int  # what the model must still be given there
    verdict: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a request for this model would meet at this moment, decided by the same code. ``reason`` is in
    words that name no other model: who may not know others is shown only the words."""

    ref: str
    outcome: Outcome
    reason: str  # in words
    device: str = ""
    from_tier: str = ""
    restore_bytes: int = 0
    restore_ms: int = 0  # expected, once it starts
    victims: tuple[Victim, ...] = ()
    victims_left_out: int = 0
    devices: tuple[DeviceRoom, ...] = ()
    by: str = ""  # the model that it waits for
    waiting_before: int = 0  # models that wait for room already
    refusal: str = ""  # the code of the refusal
    at_ms: int = 0  # wall clock of the node


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of the past. ``by``: the model that it was taken for, if that is another one."""

    kind: Kind
    ref: str
    reason: str
    device: str = ""
    by: str = ""
    left_bytes: int | None = None  # what stays free on the device
    request: str = ""
    from_tier: str = ""
    nbytes: int = 0
    expected_ms: int = 0
    took_ms: int = 0
    victims: tuple[Victim, ...] = ()
    victims_left_out: int = 0
    at_ms: int = 0  # wall clock of the node


Told = TypeVar("Told", Forecast, Decision)


def shortened(what: Told) -> Told:
    """With no more victims than ``VICTIMS_MAX``."""
    left_out = len(what.victims) - VICTIMS_MAX
    if left_out <= 0:
        return what
    return replace(what, victims=what.victims[:VICTIMS_MAX], victims_left_out=left_out)
