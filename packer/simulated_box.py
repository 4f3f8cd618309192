"""One box of the simulator: a production node, and pipes that carry its orders out on a virtual clock.

Covers: starting a box as an agent would (budgets, rates, plan, packs), what every order takes, and who
waits for what. Does not cover: the clock and the trace (``simulate``), or failures: here every order
succeeds, evictions and drops at once.

Restores share what they pass through: all reads of a box its disk, all fetches its line, all copies to one
device that device's link (of a gang each share its device's). Each pipe gives every transfer in it the same
part of its rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from packer import residency
from packer.estimate import DecodeRates, Rates
from packer.events import (
    Action,
    DeviceSeen,
    Drop,
    Dropped,
    Event,
    Evict,
    Evicted,
    Fill,
    Filled,
    FillFailed,
    Grant,
    Pack,
    Packed,
    PackFound,
    Planned,
    PolicyChosen,
    PrefetchChosen,
    RatesSeen,
    Refuse,
    Restore,
    Restored,
    StopFill,
    TierBudgetSeen,
    Wake,
)
from packer.fleet import Fleet
from packer.gangs import devices_in, run_bytes
from packer.hits import calm_until_ms
from packer.ledger import Model
from packer.traces import Sized
from packer.types import Batching, ModelRef, ModelSpec, Task, TenantSpec, Tier

# Chunks are some hundred to a model, so that what eviction takes is exact to a percent; production's are of
# a few MiB, and a step costs by their number.
CHUNKS_MAX = 96
CHUNK_BYTES_MIN = 4 * 1024 * 1024
# Nothing but the pipes takes time.
_AT_ONCE = 10**13


@dataclass(slots=True, eq=False)
class Transfer:
    """One restore in a pipe, or a copy that is filled ahead of need."""

    order: Restore | Fill
    started_ms: int
    moved_bytes: int  # of raw weights
    left_bytes: float  # as they lie in the tier


@dataclass(slots=True, eq=False)
class Pipe:
    """A disk, a line or a link. ``version`` counts up with every change: older wake-ups are stale."""

    bytes_per_ms: float
    transfers: list[Transfer] = field(default_factory=list)
    seen_ms: float = 0.0
    version: int = 0

    def add(self, transfer: Transfer, now_ms: int) -> None:
        self._advance(now_ms)
        self.transfers.append(transfer)
        self.version += 1

    def done(self, now_ms: int) -> list[Transfer]:
        """Take out what has passed by now."""
        self._advance(now_ms)
        done = [each for each in self.transfers if each.left_bytes <= 0.5]
        if done:
            self.transfers = [each for each in self.transfers if each.left_bytes > 0.5]
            self.version += 1
        return done

    def remove(self, order: Fill, now_ms: int) -> None:
        self._advance(now_ms)
        self.transfers = [each for each in self.transfers if each.order is not order]
        self.version += 1

    def next_ms(self) -> int | None:
        """When the next transfer will have passed, if nothing changes."""
        if not self.transfers:
            return None
        least = min(each.left_bytes for each in self.transfers)
        return ceil(self.seen_ms + max(least, 0.0) * len(self.transfers) / self.bytes_per_ms)

    def _advance(self, now_ms: int) -> None:
        if self.transfers:
            share = (now_ms - self.seen_ms) * self.bytes_per_ms / len(self.transfers)
            for each in self.transfers:
                each.left_bytes -= share
        self.seen_ms = now_ms


class Hands(Protocol):
    """What a box tells the simulation, which has the clock and keeps the tally."""

    def granted(self, box: Box, action: Grant, now_ms: int) -> None: ...
    def refused(self, box: Box, action: Refuse, now_ms: int) -> None: ...
    def wake(self, box: Box, at_ms: int) -> None: ...
    def pipe_changed(self, box: Box, pipe: Pipe) -> None: ...
    def restored_at(self, box: Box, transfer: Transfer, at_ms: int) -> None: ...
    def moved(self, tier: Tier, nbytes: int) -> None: ...


def spec_of(sized: Sized, number: int, fleet: Fleet) -> ModelSpec:
    """The model as control would describe it."""
    size = sized.size_bytes
    chunk_bytes = max(CHUNK_BYTES_MIN, -(-size // CHUNKS_MAX))
    full, rest = divmod(size, chunk_bytes)
    chunks = (chunk_bytes,) * full + ((rest,) if rest else ())
    ref = ModelRef(sized.tenant, sized.name, f"{number:016x}")
    return ModelSpec(
        ref,
        "control:",
        (),
        "transformers",
        Task.GENERATION,
        size,
        chunks,
        sized.workspace_bytes,
        0,
        devices=sized.devices,
        replicas=sized.replicas or fleet.replicas,
        batching=Batching(max(fleet.together, 1)),
        # Its layers are unknown: it is taken to be cut anywhere, as many layers nearly can.
        cuts=tuple(range(1, len(chunks))) if sized.devices > 1 else (),
    )


class Box:
    """A node of the fleet. ``models`` are its records in the order of the trace's catalog."""

    def __init__(
        self,
        name: str,
        number: int,
        fleet: Fleet,
        specs: tuple[ModelSpec, ...],
        hands: Hands,
        remembered: Sequence[Event] = (),
    ) -> None:
        """``remembered``: what the node knows of an earlier life, as its journal tells it at the start."""
        self.name = name
        self.number = number
        self.node = residency.Node()
        self.fleet = fleet
        self.steps = 0
        # Until when nothing is due, and after how many steps that was looked up; see ``hits``.
        self.calm_ms = 0
        self.calm_step = -1
        self._hands = hands
        self.disk = Pipe(fleet.disk_gbps * 1e6)
        self.line = Pipe(fleet.origin_gbps * 1e6)
        self.links = {f"gpu:{at}": Pipe(fleet.host_gbps * 1e6) for at in range(fleet.devices)}
        self._filling: Fill | None = None
        # Shares of gangs that are still on their links, by their orders.
        self._shares: dict[int, int] = {}
        self._begin(specs, remembered)
        self.models: list[Model] = [self.node.models[spec.ref] for spec in specs]

    def _begin(self, specs: tuple[ModelSpec, ...], remembered: Sequence[Event]) -> None:
        fleet = self.fleet
        disk, link = round(fleet.disk_gbps * 1e9), round(fleet.host_gbps * 1e9)
        at_once = DecodeRates(_AT_ONCE, _AT_ONCE, _AT_ONCE)
        rates = Rates(
            disk, disk, disk, _AT_ONCE, _AT_ONCE, _AT_ONCE, link, _AT_ONCE, _AT_ONCE, _AT_ONCE,
            at_once, at_once, at_once, link=round(fleet.origin_gbps * 1e9),
        )  # fmt: skip
        self.feed(RatesSeen(rates), 0)
        self.feed(TierBudgetSeen(Tier.HOST, fleet.ram_bytes), 0)
        self.feed(TierBudgetSeen(Tier.DISK, fleet.disk_bytes), 0)
        for device in self.links:
            self.feed(DeviceSeen(device, fleet.device_bytes), 0)
        known = {spec.tenant: None for spec in fleet.tenants}
        others = {spec.ref.tenant: None for spec in specs if spec.ref.tenant not in known}
        tenants = (*fleet.tenants, *(TenantSpec(name) for name in others))
        self.feed(Planned(tenants, specs), 0)
        if fleet.policy != "keep":
            self.feed(PolicyChosen(fleet.policy), 0)
        if fleet.prefetch:
            self.feed(PrefetchChosen(True), 0)
        for event in remembered:
            self.feed(event, 0)
        left = fleet.disk_bytes if fleet.packs else 0
        for spec in specs:
            on_disk, in_ram = self._stored(spec)
            if on_disk <= left:
                left -= on_disk
                self.feed(PackFound(spec.ref, on_disk, in_ram), 0)

    def _stored(self, spec: ModelSpec) -> tuple[int, int]:
        """What a model takes on disk and in RAM."""
        fleet = self.fleet
        on_disk, in_ram = (max(1, round(spec.image_bytes * part)) for part in (fleet.ratio, fleet.ram_ratio))
        return on_disk, in_ram

    def look_how_calm(self) -> int:
        self.calm_ms, self.calm_step = calm_until_ms(self.node), self.steps
        return self.calm_ms

    # --- steps ------------------------------------------------------------------------------------

    def feed(self, event: Event, now_ms: int) -> None:
        """A step of the core, and of whatever follows from it at this very moment."""
        todo: list[Event] = [event]
        for each in todo:
            self.steps += 1
            for action in residency.step(self.node, each, now_ms):
                answer = self._carry_out(action, now_ms)
                if answer is not None:
                    todo.append(answer)

    def _carry_out(self, action: Action, now_ms: int) -> Event | None:
        """Begin what takes time; the answer of what does not."""
        match action:
            case Grant():
                self._hands.granted(self, action, now_ms)
            case Refuse():
                self._hands.refused(self, action, now_ms)
            case Restore():
                self._restore(action, now_ms)
            case Evict():
                return Evicted(action.ref, action.device, action.order)
            case Drop():
                return Dropped(action.ref, action.tier, action.order)
            case Pack():
                return self._packed(action.ref, action.device, action.order)
            case Fill():
                self._fill(action, now_ms)
            case StopFill():
                return self._stop_fill(now_ms)
            case Wake():
                self._hands.wake(self, action.at_ms)
        return None

    def _packed(self, ref: ModelRef, device: str, order: int) -> Packed:
        on_disk, in_ram = self._stored(self.node.models[ref].spec)
        return Packed(ref, device, on_disk, in_ram, order)

    def _restore(self, order: Restore, now_ms: int) -> None:
        spec = self.node.models[order.ref].spec
        there = sum(spec.chunk_bytes[: order.first_chunk])
        # A host copy wants all chunks, so all are read for it.
        moved = spec.image_bytes if order.host_bytes else spec.image_bytes - there
        fleet = self.fleet
        share = {Tier.HOST: fleet.ram_ratio, Tier.DISK: fleet.ratio}.get(order.from_tier, 1.0)
        self._hands.moved(order.from_tier, moved)
        for pipe, part in self._parts(order, spec, moved):
            pipe.add(Transfer(order, now_ms, moved, part * share), now_ms)
            self._hands.pipe_changed(self, pipe)

    def _fill(self, order: Fill, now_ms: int) -> None:
        spec = self.node.models[order.ref].spec
        self._filling = order
        self._hands.moved(Tier.DISK, spec.image_bytes)
        left_bytes = spec.image_bytes * self.fleet.ratio
        self.disk.add(Transfer(order, now_ms, spec.image_bytes, left_bytes), now_ms)
        self._hands.pipe_changed(self, self.disk)

    def _stop_fill(self, now_ms: int) -> Event | None:
        order, self._filling = self._filling, None
        if order is None:
            return None  # it was done at that very moment
        self.disk.remove(order, now_ms)
        self._hands.pipe_changed(self, self.disk)
        return FillFailed(order.ref, "stopped", order.order, stopped=True)

    def _parts(self, order: Restore, spec: ModelSpec, moved: int) -> list[tuple[Pipe, int]]:
        """What passes through which pipe: from RAM each share of a gang through its device's link."""
        if order.from_tier is not Tier.HOST:
            return [(self.disk if order.from_tier is Tier.DISK else self.line, moved)]
        links = [self.links[device] for device in devices_in(order.device)]
        if len(links) == 1:
            return [(links[0], moved)]
        self._shares[order.order] = len(links)
        return list(zip(links, run_bytes(spec), strict=True))

    def pipe_due(self, pipe: Pipe, now_ms: int) -> None:
        """Something has passed: what every restore costs whatever its size comes on top."""
        for transfer in pipe.done(now_ms):
            if isinstance(transfer.order, Fill):
                self._filling = None
                self.feed(Filled(transfer.order.ref, transfer.order.order), now_ms)
                continue
            left = self._shares.pop(transfer.order.order, 1) - 1
            if left:
                self._shares[transfer.order.order] = left
                continue
            self._hands.restored_at(self, transfer, now_ms + self.fleet.fixed_ms)
        self._hands.pipe_changed(self, pipe)

    def restored(self, transfer: Transfer, now_ms: int) -> None:
        order = transfer.order
        assert isinstance(order, Restore)
        filled = order.host_bytes > 0
        took_ms = now_ms - transfer.started_ms
        done = Restored(
            order.ref, order.device, order.from_tier, took_ms, filled, order.order, transfer.moved_bytes
        )
        self.feed(done, now_ms)
        if order.disk_bytes:
            self.feed(self._packed(order.ref, order.device, order.pack_order), now_ms)


Choice = Callable[[list[Box], int, int], int]
# Whoever chose is told of the end of a request for a model that may have replicas: box, model, whether it was
# served, when.
Ended = Callable[[int, int, bool, int], None]
