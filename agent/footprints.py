"""What the node has learned of its models' workspaces: checked, kept in the journal, told to the core.

Covers: doubting what a worker claims, one record per (version, engine, kind of device), and when the core
must be told. Does not cover: measuring (``peak``), the rule (``packer/footprint.py``) or the ledger.

A worker is not trusted: what it claims can not be more than its process ever had, as the kernel or the
driver says. One that really takes that much harms its tenant's budget and its device's as if it had been
measured there, which it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import devices
from agent.devices import DeviceConfig
from agent.frames import STATED_MAX
from packer.events import Event, FootprintSeen
from packer.footprint import Footprint, workspace_bytes
from packer.gangs import share_bytes
from packer.types import KIB, ModelRef, ModelSpec

log = logging.getLogger("bunk.footprints")

# Records of one node: more versions than it can ever plan to serve at a time; those that left the plan go.
FOOTPRINTS_MAX = 20_000


@dataclass(frozen=True, slots=True)
class FootprintRow:
    """What is kept of a version under one engine on one kind of device."""

    ref: ModelRef
    engine: str
    kind: str
    footprint: Footprint


class Footprints:
    """``post`` feeds the core; ``held_bytes``: what it counts for a model now; None: it knows no such."""

    def __init__(
        self,
        devices_: Mapping[str, DeviceConfig],
        post: Callable[[Event], None],
        held_bytes: Callable[[ModelRef], int | None],
    ) -> None:
        self._devices = devices_
        self._kinds = sorted({device.kind for device in devices_.values()})
        self._post = post
        self._held_bytes = held_bytes
        self._known: dict[tuple[ModelRef, str], FootprintRow] = {}
        self._unsaved: dict[tuple[ModelRef, str], None] = {}

    def take_stored(self, rows: Iterable[FootprintRow]) -> None:
        """What the journal has; a row that holds what nobody can have measured is left out."""
        for row in rows:
            figures = (row.footprint.peak_bytes, row.footprint.samples)
            if all(type(figure) is int and 0 < figure <= STATED_MAX for figure in figures):
                self._known[row.ref, row.kind] = row

    def seen(self, spec: ModelSpec, device: str, pid: int, peak_bytes: int) -> None:
        """A worker says that a request of this model took so much beside the weights."""
        config = devices.at_place(self._devices, device)
        most_bytes = had_bytes(config, pid)
        if not 0 < peak_bytes <= most_bytes:
            log.warning("worker %d claims %d bytes of workspace and had %d", pid, peak_bytes, most_bytes)
            return
        key = (spec.ref, config.kind)
        row = self._known.get(key)
        if row is None and len(self._known) >= FOOTPRINTS_MAX:
            return
        before = row.footprint if row is not None and row.engine == spec.engine else Footprint()
        self._known[key] = FootprintRow(spec.ref, spec.engine, config.kind, before.seeing(peak_bytes))
        self._unsaved[key] = None
        self._tell(spec)

    def planned(self, specs: Sequence[ModelSpec]) -> None:
        """A plan is in force: the core hears what is known of models that are new to it; what left goes."""
        refs = {spec.ref for spec in specs}
        for key in [key for key in self._known if key[0] not in refs]:
            del self._known[key]
            self._unsaved.pop(key, None)
        for spec in specs:
            self._tell(spec)

    def take_unsaved(self) -> tuple[FootprintRow, ...]:
        """What the journal has not got yet."""
        rows = tuple(self._known[key] for key in self._unsaved)
        self._unsaved.clear()
        return rows

    def put_back(self, rows: Sequence[FootprintRow]) -> None:
        """The journal did not take them."""
        self._unsaved.update(
            {(row.ref, row.kind): None for row in rows if (row.ref, row.kind) in self._known}
        )

    def _tell(self, spec: ModelSpec) -> None:
        """One figure for all devices of the node: it is not known yet on which the model will be."""
        held_bytes = self._held_bytes(spec.ref)
        if held_bytes is None:
            return
        needed_bytes = max(self._needed_bytes(spec, kind) for kind in self._kinds)
        # One request that took more than any device has beside the weights must not keep the model away from
        # all of them for ever: it gets the largest device to itself.
        room_bytes = max(device.budget_bytes for device in self._devices.values()) - share_bytes(spec)
        needed_bytes = min(needed_bytes, max(room_bytes, spec.workspace_bytes))
        if needed_bytes != held_bytes:
            self._post(FootprintSeen(spec.ref, needed_bytes))

    def _needed_bytes(self, spec: ModelSpec, kind: str) -> int:
        row = self._known.get((spec.ref, kind))
        known = row.footprint if row is not None and row.engine == spec.engine else Footprint()
        return workspace_bytes(known, spec.workspace_bytes, may_shrink=kind == "cpu")


def had_bytes(device: DeviceConfig, pid: int) -> int:
    """The most memory that a process can have used on a device; 0 when it is gone."""
    if device.kind == "cuda":
        used_bytes = devices.used_bytes(device, pid)
        return device.budget_bytes if used_bytes is None else used_bytes
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB
    except OSError:
        pass
    return 0
