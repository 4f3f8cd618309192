"""What ``invariants.check`` remembers from step to step: what each model added to every sum.

Covers: the plain records only. Does not cover: what is compared with what (``invariants``). Nothing in
the core reads them: they are the proof's own books, made from the models alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from packer.types import ModelRef


class Shares(NamedTuple):
    """What one model adds to the sums of its device, its tiers and its tenant. ``shares``: of a gang, to the
    sums of each device of its place."""

    device: str = ""
    device_bytes: int = 0
    device_leaving: int = 0
    host_bytes: int = 0
    host_leaving: int = 0
    disk_bytes: int = 0
    disk_leaving: int = 0
    waiting: int = 0
    models: int = 0
    shares: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True, eq=False)
class Sums:
    """Bytes held and leaving, waiting requests and models: of a device, of a tenant, or of the tiers."""

    device_bytes: int = 0
    device_leaving: int = 0
    host_bytes: int = 0
    host_leaving: int = 0
    disk_bytes: int = 0
    disk_leaving: int = 0
    waiting: int = 0
    models: int = 0


@dataclass(slots=True, eq=False)
class Proof:
    """All sums as last proved, and whose turn it is to be looked at again."""

    shares: dict[ModelRef, Shares] = field(default_factory=dict)
    devices: dict[str, Sums] = field(default_factory=dict)
    tenants: dict[str, Sums] = field(default_factory=dict)
    tiers: Sums = field(default_factory=Sums)
    waiting: int = 0
    round: list[ModelRef] = field(default_factory=list)
    place: int = 0
    # Steps since then that ``invariants.check_after`` did not look at whole.
    quiet_steps: int = 0
