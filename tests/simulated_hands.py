"""The hands of the simulated node: workers, devices, disks and memory, and how they fail.

Covers: the world's clock, what is really where, and carrying out restores, evictions, packs and drops,
each judged as it is ordered and answered later, well or badly. Does not cover: callers, plans and
budgets (``simulation``) or judging whole steps (``judges``).
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from simulated_files import Files

from packer.events import (
    Drop,
    Dropped,
    Event,
    Evict,
    Evicted,
    Fill,
    Filled,
    FillFailed,
    Pack,
    Packed,
    PackFailed,
    Restore,
    Restored,
    RestoreFailed,
    ServingBegun,
    ServingEnded,
    StopFill,
    WorkerDied,
)
from packer.ledger import pack_reservation_bytes
from packer.residency import Node
from packer.types import ModelRef, ModelSpec, TenantSpec, Tier

GRID_MS = 100


class Violated(AssertionError):
    """The core ordered something that the world forbids, or broke a promise to a caller."""


@dataclass(slots=True)
class Faults:
    """Chances per occasion, drawn per seed."""

    fail: float
    corrupt: float
    broken: float
    pack_fail: float
    leave: float
    die: float
    late: float
    shrink: float
    replan: float
    measure: float


@dataclass(slots=True)
class Stay:
    """Bytes of a model on a device, as the worker that holds them knows them."""

    ref: ModelRef
    device: str
    nbytes: int
    chunks: int  # held, from the first on
    state: str  # "restoring", "resident", "evicting", "partial"
    order: int
    source: Tier
    kept_chunks: int = 0  # what was there before the restore, or stays after the eviction
    tee_bytes: int = 0
    leases: int = 0
    packing: bool = False
    serving: bool = False  # restoring, and answering with the layers that are there
    ended: int = 0  # how often it stopped answering before it was all there

    @property
    def devices(self) -> tuple[str, ...]:
        """Those of a gang are joined in the name of its place, in the order of its shares."""
        return tuple(self.device.split("+"))


class Hands:
    """What is really there, and what happens to it. The core's books must agree with these."""

    faults: Faults
    tenants: dict[str, TenantSpec]
    seen_limits: dict[Tier, int]

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_ms = 0
        self.calm = False
        self.rng = random.Random(seed)
        # For what was added later, so that histories without it stay what they were.
        self.apart = random.Random(seed)
        self.reached: Counter[str] = Counter()
        self.heap: list[tuple[int, int, Callable[[], Event | None]]] = []
        self.sequence = 0
        self.node: Node
        self.models: dict[ModelRef, ModelSpec] = {}
        self.planned: dict[ModelRef, ModelSpec] = {}
        self.healthy: dict[str, bool] = {}
        self.stays: dict[ModelRef, Stay] = {}
        # What requests of a model need beside its weights, where that was measured.
        self.workspaces: dict[ModelRef, int] = {}
        # What each version is charged there, and the files.
        self.disk: dict[ModelRef, int] = {}
        self.files = Files(seed)
        self.host: dict[ModelRef, int] = {}
        self.packing: dict[ModelRef, int] = {}
        # What is on disk of packs that failed, and can be gone on with.
        self.begun: set[ModelRef] = set()
        self.dropping: dict[tuple[ModelRef, Tier], int] = {}
        # The one host copy that is being filled ahead of need, and those that were and that nobody has read.
        self.filling: Fill | None = None
        self.fill_stopped = False
        self.ahead: set[ModelRef] = set()
        self.moving: dict[ModelRef, str] = {}  # ordered away to go to another device

    # --- time -------------------------------------------------------------------------------------

    def later(self, make: Callable[[], Event | None], steps_most: int = 10) -> None:
        self.at(self.now_ms + GRID_MS * self.rng.randrange(0, steps_most + 1), make)

    def at(self, at_ms: int, make: Callable[[], Event | None]) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (at_ms, self.sequence, make))

    def chance(self, share: float) -> bool:
        return not self.calm and self.rng.random() < share

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise Violated(f"seed {self.seed}, {self.now_ms} ms: {what}")

    def tier_bytes(self, tier: Tier) -> int:
        return sum((self.disk if tier is Tier.DISK else self.host).values())

    # --- orders -----------------------------------------------------------------------------------

    def _restore(self, order: Restore) -> None:
        ref = order.ref
        before = self.stays.get(ref)
        if before is None:
            self.require(not order.first_chunk, f"restore of the rest of {ref}, of which nothing is there")
        else:
            self.require(before.state == "partial", f"restore of {ref}, which is on a device")
            self.require(before.device == order.device, f"the rest of {ref} goes to another device")
            # The origin gives whole models only.
            first_chunk = 0 if order.from_tier is Tier.ORIGIN else before.chunks
            self.require(order.first_chunk == first_chunk, f"restore of other chunks than {ref} lacks")
            self.reached["restored what was missing"] += bool(first_chunk)
            self.reached["gave up its chunks for the origin's"] += not first_chunk
        self.require(ref in self.planned, f"restore of {ref}, which left the plan")
        target = self.moving.pop(ref, None)
        if self.unasked(ref):
            self.require(target == order.device, f"restore of {ref}, which nobody wants")
            self.require(order.from_tier is Tier.HOST, f"{ref} moves by way of the {order.from_tier} tier")
            self.reached["came where it was moved to"] += 1
        places = order.device.split("+")
        self.require(
            all(self.healthy[name] for name in places), f"restore onto {order.device}, which is unhealthy"
        )
        wanted = self.models[ref].devices
        self.require(
            len(set(places)) == len(places) == wanted, f"{ref} needs {wanted} devices, not {order.device}"
        )
        self.reached["a gang was restored"] += wanted > 1
        self.require(self.readable(ref, order.from_tier), f"restore from {order.from_tier}, nothing there")
        claims = [self.node.devices[name].claim for name in places]
        self.reached["passed a claim"] += any(claim is not None and claim.ref != ref for claim in claims)
        spec = self.models[ref]
        nbytes = self.need_bytes(ref)
        stay = Stay(
            ref,
            order.device,
            nbytes,
            len(spec.chunk_bytes),
            "restoring",
            order.order,
            order.from_tier,
            order.first_chunk,
            order.host_bytes,
        )
        self.stays[ref] = stay
        if order.from_tier is not Tier.HOST and self.filling is not None:
            self.require(self.fill_stopped, f"{ref} comes from {order.from_tier} beside a copy nobody needs")
        if order.from_tier is Tier.HOST:
            self.reached["restored from what was filled ahead"] += ref in self.ahead
            self.ahead.discard(ref)
        if order.host_bytes:
            self.require(order.from_tier is Tier.DISK and ref not in self.host, "host copy twice")
            self.host[ref] = order.host_bytes
        elif order.from_tier is Tier.DISK:
            self.require(not self._fits_host(ref), f"{ref} comes from disk and leaves no host copy")
        self._await_restore(stay, order)
        if order.from_tier is not Tier.ORIGIN and self.rng.random() < 0.4:
            self.later(lambda: self._begin_serving(stay))
        if order.disk_bytes:
            self.require(order.from_tier is Tier.ORIGIN, f"a pack beside a restore from {order.from_tier}")
            self._start_pack(stay, order.disk_bytes, order.pack_order)

    def _await_restore(self, stay: Stay, order: Restore) -> None:
        self.later(lambda: self._end_restore(stay))

    def _await_pack(self, stay: Stay, order: int) -> None:
        self.later(lambda: self._end_pack(stay, order), 20)

    def _fits_host(self, ref: ModelRef) -> bool:
        """Would a host copy of this pack fit in now, beside what is going?"""
        nbytes, most = self.models[ref].image_bytes, self.tenants[ref.tenant].quota.host.max
        own = sum(held for other, held in self.host.items() if other.tenant == ref.tenant)
        return (
            ref not in self.host
            and self.tier_bytes(Tier.HOST) + nbytes <= self.seen_limits[Tier.HOST]
            and (most is None or own + nbytes <= most)
        )

    def readable(self, ref: ModelRef, tier: Tier) -> bool:
        if tier is Tier.ORIGIN:
            return True
        there = self.disk if tier is Tier.DISK else self.host
        filled = self.filling is None or self.filling.ref != ref
        whole = filled if tier is Tier.HOST else ref not in self.packing and ref not in self.begun
        return ref in there and whole and (ref, tier) not in self.dropping

    def _begin_serving(self, stay: Stay) -> Event | None:
        event = ServingBegun(stay.ref, stay.device, stay.order)
        if self.stays.get(stay.ref) is not stay or stay.state != "restoring":
            return self._late(event)
        stay.serving = True
        self.reached["served while it came"] += 1
        if self.apart.random() < 0.3:
            self.at(self.now_ms + GRID_MS * self.apart.randrange(4), lambda: self._end_serving(stay))
        return event

    def _end_serving(self, stay: Stay) -> Event | None:
        """A chunk was bad; it is mended, and the rest comes after all, or not."""
        event = ServingEnded(stay.ref, stay.device, stay.order)
        if self.stays.get(stay.ref) is not stay or stay.state != "restoring":
            return self._late(event)
        self.reached["sent away again"] += bool(stay.leases)
        stay.serving, stay.leases = False, 0
        stay.ended += 1
        return event

    def _end_restore(self, stay: Stay) -> Event | None:
        if self.stays.get(stay.ref) is not stay:
            return self._late(Restored(stay.ref, stay.device, stay.source, 100, order=stay.order))
        ref, device, source, order = stay.ref, stay.device, stay.source, stay.order
        fail = self.chance(self.faults.fail)
        corrupt = fail and self.rng.random() < self.faults.corrupt
        broken = fail and not corrupt and self.rng.random() < self.faults.broken
        if fail:
            self.reached["failed while it was served from"] += bool(stay.serving and stay.leases)
            kept = stay.kept_chunks if self.rng.random() < 0.7 else self.rng.randrange(stay.kept_chunks + 1)
            self.keep_part(stay, kept)
            if stay.tee_bytes:
                del self.host[ref]
            self.reached["a load failed beside its pack"] += stay.packing
            self.reached["a failed restore left chunks"] += bool(kept)
            self.reached["a failed restore lost chunks"] += kept < stay.kept_chunks
            return RestoreFailed(ref, device, source, "a fault", corrupt, broken, order, kept)
        stay.state, stay.serving = "resident", False
        self.reached["leased before it was all there"] += bool(stay.leases)
        filled = bool(stay.tee_bytes) and self.rng.random() < 0.8
        if stay.tee_bytes and not filled:
            del self.host[ref]
        stay.tee_bytes = 0
        self.reached["host copy filled"] += filled
        self.reached["host copy filled beside a part"] += filled and bool(stay.kept_chunks)
        return Restored(ref, device, source, self.rng.randrange(1, 500), filled, order)

    def unasked(self, ref: ModelRef) -> bool:
        """Does nobody wait for the model?"""
        return not self.node.models[ref].waiters

    def prefix_bytes(self, ref: ModelRef, chunks: int) -> int:
        return sum(self.models[ref].chunk_bytes[:chunks])

    def need_bytes(self, ref: ModelRef, devices: int = 0) -> int:
        """On all its devices, as many as it needs now or as it lies on."""
        spec = self.models[ref]
        workspace_bytes = self.workspaces.get(ref, spec.workspace_bytes)
        return spec.image_bytes + workspace_bytes * (devices or spec.devices)

    def runs_of(self, ref: ModelRef, devices: int) -> list[int]:
        """The weights of each share: cut where it is nearest to equal parts."""
        spec = self.models[ref]
        ends = [self.prefix_bytes(ref, cut) for cut in spec.cuts]
        bounds = [0]
        for part in range(1, devices):
            bounds.append(min(ends, key=lambda end: (abs(end * devices - spec.image_bytes * part), end)))
        bounds.append(spec.image_bytes)
        return [end - start for start, end in pairwise(bounds)]

    def held_on(self, stay: Stay, device: str) -> int:
        """What of a stay is on one device."""
        names = stay.devices
        if device not in names:
            return 0
        if len(names) == 1:
            return stay.nbytes
        workspace_bytes = (stay.nbytes - self.models[stay.ref].image_bytes) // len(names)
        return self.runs_of(stay.ref, len(names))[names.index(device)] + workspace_bytes

    def share_bytes(self, ref: ModelRef) -> int:
        """What it needs on each of its devices: the largest share."""
        spec = self.models[ref]
        if spec.devices == 1:
            return self.need_bytes(ref)
        return max(self.runs_of(ref, spec.devices)) + self.workspaces.get(ref, spec.workspace_bytes)

    def keep_part(self, stay: Stay, kept_chunks: int) -> None:
        """What the device holds of a model after a failed restore or an eviction."""
        del self.stays[stay.ref]
        if kept_chunks:
            nbytes = self.prefix_bytes(stay.ref, kept_chunks)
            self.stays[stay.ref] = Stay(stay.ref, stay.device, nbytes, kept_chunks, "partial", 0, stay.source)

    def _late(self, event: Event) -> Event | None:
        """An answer of a worker that is dead by now: usually lost, sometimes still in the pipe."""
        if not self.chance(self.faults.late):
            return None
        self.reached["late answer"] += 1
        return event

    def _evict(self, order: Evict) -> None:
        stay = self.stays.get(order.ref)
        there = stay is not None and stay.state in ("resident", "partial")
        self.require(there, f"evict of {order.ref}, not resident")
        assert stay is not None
        self.require(order.keep_chunks < stay.chunks, f"an eviction of {order.ref} that frees nothing")
        whole = any(self.readable(order.ref, tier) for tier in (Tier.HOST, Tier.DISK))
        self.require(whole or not order.keep_chunks, f"part of {order.ref} is kept and no copy has the rest")
        part = "in part" if order.keep_chunks else "wholly"
        self.reached[f"evicted {part}, {stay.state} before"] += 1
        self.require(len(stay.devices) == 1 or not order.keep_chunks, f"part of the gang {order.ref} goes")
        self.require(not stay.leases, f"evict of {order.ref}, which is leased")
        self.require(not stay.packing, f"evict of {order.ref}, which is being packed")
        stay.state, stay.order, stay.kept_chunks = "evicting", order.order, order.keep_chunks
        self.later(lambda: self._end_evict(stay), 3)

    def _end_evict(self, stay: Stay) -> Event | None:
        event = Evicted(stay.ref, stay.device, stay.order)
        if self.stays.get(stay.ref) is not stay:
            return self._late(event)
        self.keep_part(stay, stay.kept_chunks)
        return event

    def _pack(self, order: Pack) -> None:
        stay = self.stays.get(order.ref)
        self.require(stay is not None and stay.state == "resident", f"pack of {order.ref}, not resident")
        assert stay is not None
        self._start_pack(stay, order.disk_bytes, order.order)

    def _start_pack(self, stay: Stay, disk_bytes: int, order: int) -> None:
        ref = stay.ref
        self.require(ref not in self.disk or ref in self.begun, f"pack of {ref}, which has one")
        room = pack_reservation_bytes(self.models[ref])
        self.require(disk_bytes == room, f"{disk_bytes} bytes for a pack of {ref}, which may take {room}")
        self.reached["went on with a pack"] += ref in self.begun
        self.begun.discard(ref)
        self.require(order > 0, f"a pack of {ref} without a number")
        stay.packing = True
        self.disk[ref] = self.packing[ref] = disk_bytes
        self._await_pack(stay, order)

    def _end_pack(self, stay: Stay, order: int) -> Event:
        """The end of a pack, written beside a load or from a resident model: in any order with the load's
        own end, and whatever became of the stay."""
        ref = stay.ref
        alive = self.stays.get(ref) is stay
        loading = alive and stay.state == "restoring"
        beside = "beside a load " if loading else ""
        stay.packing = False
        del self.packing[ref]
        # A worker's death usually fails its pack; a file that was complete by then still counts.
        if self.chance(self.faults.pack_fail) or (not alive and self.rng.random() < 0.5):
            self.reached[f"pack {beside}failed"] += 1
            if self.rng.random() < 0.5:
                self.begun.add(ref)
                self.disk[ref] = self.rng.randrange(1, self.disk[ref] + 1)
                return PackFailed(ref, stay.device, "no", order, self.disk[ref])
            del self.disk[ref]
            return PackFailed(ref, stay.device, "no", order)
        if not alive:
            self.reached["packed after the worker died"] += 1
        self.reached["packed before it was restored"] += loading
        image_bytes = self.models[ref].image_bytes
        self.disk[ref] = self.files.write(ref, image_bytes)
        self.reached["packed with parts in other files"] += self.disk[ref] < image_bytes
        return Packed(ref, stay.device, self.disk[ref], image_bytes, order, image_bytes)

    def _fill(self, order: Fill) -> None:
        ref = order.ref
        self.require(self.filling is None, f"{ref} is filled beside another")
        self.require(self.readable(ref, Tier.DISK), f"{ref} is filled, and has no pack")
        self.require(ref in self.planned, f"{ref} is filled, and left the plan")
        self.require(ref not in self.host and ref not in self.stays, f"{ref} is filled, and is there")
        waited_for = any(model.waiters for model in self.node.models.values())
        busy = any(s.state == "restoring" and s.source is not Tier.HOST for s in self.stays.values())
        self.require(not waited_for and not busy, f"{ref} is filled while somebody needs the disk")
        self.host[ref] = order.host_bytes
        self.filling, self.fill_stopped = order, False
        self.reached["filled ahead of need"] += 1
        self._await_fill(order)

    def _await_fill(self, order: Fill) -> None:
        self.at(self.now_ms + GRID_MS * self.apart.randrange(30), lambda: self._end_fill(order))

    def _stop_fill(self, order: StopFill) -> None:
        fill = self.filling
        self.require(fill is not None and fill.order == order.order, "nothing of that number is filled")
        assert fill is not None
        self.require(not self.fill_stopped, f"{order.ref} is stopped twice")
        self.fill_stopped = True
        self.at(self.now_ms + GRID_MS * self.apart.randrange(9), lambda: self._end_fill(fill))

    def _end_fill(self, order: Fill) -> Event | None:
        if self.filling is not order:
            return None
        self.filling = None
        # What was told to stop may be done by then.
        if self.apart.random() < (0.7 if self.fill_stopped else 0.2 * (not self.calm)):
            self.reached["stopped filling" if self.fill_stopped else "could not fill"] += 1
            del self.host[order.ref]
            return FillFailed(order.ref, "no", order.order, self.fill_stopped)
        self.ahead.add(order.ref)
        return Filled(order.ref, order.order)

    def _drop(self, order: Drop) -> None:
        stay = self.stays.get(order.ref)
        reading = stay is not None and stay.state == "restoring" and stay.source is order.tier
        self.require(order.tier is not Tier.ORIGIN, f"drop of {order.ref} at its origin")
        self.require(not reading, f"drop of the {order.tier} copy of {order.ref}, which is being read")
        begun = order.tier is Tier.DISK and order.ref in self.begun
        self.reached["dropped what was begun"] += begun
        there = self.readable(order.ref, order.tier)
        there = there or (begun and (order.ref, order.tier) not in self.dropping)
        self.require(there, f"drop of a {order.tier} copy that is not there")
        self.require(
            not (stay and stay.tee_bytes and order.tier is Tier.HOST), "drop of a segment being filled"
        )
        reading = self.filling is not None and self.filling.ref == order.ref
        self.require(not reading, f"drop of the {order.tier} copy of {order.ref}, which is being filled")
        self.reached[f"dropped from {order.tier}"] += 1
        if order.tier is Tier.HOST:
            self.reached["what was filled ahead made room"] += order.ref in self.ahead
            self.ahead.discard(order.ref)
        self.dropping[(order.ref, order.tier)] = order.order
        self.later(lambda: self._end_drop(order), 5)

    def _end_drop(self, order: Drop) -> Event:
        del self.dropping[(order.ref, order.tier)]
        if order.tier is Tier.HOST:
            del self.host[order.ref]
            return Dropped(order.ref, order.tier, order.order)
        del self.disk[order.ref]
        if order.ref in self.begun:
            self.begun.remove(order.ref)
            return Dropped(order.ref, order.tier, order.order)
        charged = self.files.drop(order.ref)
        self.disk.update(charged)
        self.reached["a file outlived its version"] += bool(charged)
        self.reached["charged to one that goes as well"] += any(
            (ref, Tier.DISK) in self.dropping for ref, _ in charged
        )
        packs = sum(self.charge_of(ref) for ref in self.disk)
        self.require(self.files.used_bytes == packs, "bytes on disk that nobody is charged for")
        return Dropped(order.ref, order.tier, order.order, charged)

    def charge_of(self, ref: ModelRef) -> int:
        """Of a complete pack; one in the making has its reservation, one that was begun a file of its own."""
        return 0 if ref in self.packing or ref in self.begun else self.disk[ref]

    def _kill(self, tenant: str, device: str) -> Event:
        for stay in list(self.stays.values()):
            if stay.ref.tenant != tenant or stay.device != device:
                continue
            use = "packing" if stay.packing else ("leased" if stay.leases else stay.state)
            self.reached[f"worker died while {use}"] += 1
            self.reached["the worker of a gang died"] += len(stay.devices) > 1
            self.reached["worker died while loading and packing"] += (
                stay.packing and stay.state == "restoring"
            )
            if stay.tee_bytes:
                del self.host[stay.ref]
            del self.stays[stay.ref]
        return WorkerDied(tenant, device)

    def gang_claims(self) -> list[ModelRef]:
        """Gangs that claim devices, each as often as it has one."""
        claims = [device.claim.ref for device in self.node.devices.values() if device.claim is not None]
        return [ref for ref in claims if self.models[ref].devices > 1]
