"""Carrying out the core's orders: workers, packs, host segments, origins.

Covers: one coroutine per kind of order; each returns the event that says how it went. Does not cover:
deciding anything (``packer/residency.py``), which workers there are (``agent/roster.py``) or moving a byte
(the worker does). A worker that dies answers all its orders at once, through ``WorkerDied``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from agent.background import Background
from agent.devices import DeviceConfig
from agent.explained import Explained, public, worker_died
from agent.facade import EngineFrame, EngineRequest
from agent.filling import Filling, open_copy
from agent.holdings import Holdings
from agent.journal import JournalFailed, PackRow
from agent.journal_thread import JournalThread
from agent.origin import ControlFetch, OriginUnavailable, open_origin
from agent.pack_making import Making, PackMaking
from agent.packs import PackDirectory
from agent.peer_fetch import FetchedPack
from agent.repairs import Repairs
from agent.roster import Roster
from agent.segments import HostSegments, freed
from agent.sources import Obtained, Sources
from agent.spawning import Nursery
from agent.workers import (
    LoadDone,
    PackCopy,
    Segment,
    WorkerDead,
    WorkerFailure,
    WorkerHandle,
)
from packer.events import (
    Drop,
    Dropped,
    Event,
    Evict,
    Evicted,
    Fill,
    Pack,
    PackBegun,
    Packed,
    PackFailed,
    Restore,
    Restored,
    RestoreFailed,
    ServingBegun,
    ServingEnded,
    StopFill,
)
from packer.types import HostForm, ModelRef, ModelSpec, Tier

log = logging.getLogger("bunk.orders")

# A worker that has not answered an order by then hangs and is killed; its death answers all its orders.
# 100 GiB from a slow origin at 100 MB/s takes 18 minutes; giving memory back takes milliseconds.
MOVE_TIMEOUT_S = 1_800.0
EVICT_TIMEOUT_S = 30.0
# A file system that refuses to remove a file is looked after by a person, in minutes at best.
DROP_RETRY_S = 60.0


class Orders:
    """The node's hands. ``post`` takes the events that are nobody's answer, such as a worker's death;
    ``repairs`` has a ``note`` for what is worth a record and a count though nobody decides by it."""

    def __init__(
        self,
        nursery: Nursery,
        devices: Mapping[str, DeviceConfig],
        packs: PackDirectory,
        segments: HostSegments,
        journal: JournalThread,
        fetch: ControlFetch,
        spec_of: Callable[[ModelRef], ModelSpec],
        clock_ms: Callable[[], int],
        control_store: Path | None = None,
        host_form: HostForm = HostForm.STORED,
    ) -> None:
        self._control_store = control_store
        # In which form new host segments are kept.
        self.host_form = host_form
        self.repairs = Repairs(packs, lambda spec: open_origin(spec, fetch, control_store))
        self.holdings = Holdings(packs, journal, spec_of)
        self._making = PackMaking(
            packs, journal, self.holdings, clock_ms, lambda ref: self.post(PackBegun(ref, 0))
        )
        self.roster = Roster(nursery, devices, segments, lambda event: self.post(event))
        self._packs = packs
        self._segments = segments
        self._journal = journal
        self._fetch = fetch
        self._spec_of = spec_of
        self._clock_ms = clock_ms
        self.post: Callable[[Event], None] = lambda event: None
        # Packs with bytes of other nodes whose weights nobody has compared with the registered ones yet.
        self._unproven: set[ModelRef] = set()
        self.repairs.doubt = self._doubt
        unproven = self._unproven
        self._ahead = Filling(nursery, packs, segments, journal, spec_of, lambda ref: ref not in unproven)
        # Where packs come from; None: origins only.
        self.sources: Sources | None = None
        self._background = Background()
        # Packs of models that serve already: the rest of those beside a load that is over, and those that are
        # made of what lies on a device.
        self._packing = Background()
        # None before the first plan.
        self._planned: frozenset[ModelRef] | None = None

    async def start(self, rows: Sequence[PackRow]) -> dict[ModelRef, int]:
        """Take up what a crash left; returns the packs whose unfinished files stay, with what they take."""
        partial_packs = await self._making.find_partials()
        await self.holdings.find(rows, partial_packs)
        return partial_packs

    def keep_only(self, planned: frozenset[ModelRef]) -> None:
        """Stop bringing in what is not in the plan any more. The core, which has what is half packed of it in
        its books, orders the drop."""
        self._planned = planned
        self.roster.keep_only(planned)

    def _is_planned(self, ref: ModelRef) -> bool:
        return self._planned is None or ref in self._planned

    async def finish_packs(self, within_s: float) -> None:
        """Before ``close``: what was read from an origin that may be away at the next start is kept. A pack
        that takes longer stays begun, and a later load goes on from there."""
        if not await self._packing.finish(within_s):
            log.warning("stopped before %d packs were whole; later loads go on", len(self._packing.tasks))

    async def close(self) -> None:
        await self.roster.close()
        await self._packing.close()
        await self._background.close()

    # --- orders -----------------------------------------------------------------------------------

    async def restore(self, order: Restore) -> Event | None:
        """A load may have a pack beside it, whose own answer is posted, whatever became of the load."""
        if order.from_tier is not Tier.ORIGIN:
            return await self._restore(order, partial(self._restore_cached, order))
        obtained = Obtained(None)
        if order.disk_bytes and self.sources is not None:
            obtained = await self.sources.obtain(order.ref, order.disk_bytes)
        if obtained.pack is not None and self.sources is not None:
            answer = await self._restore_obtained(order, obtained.pack)
            if not (isinstance(answer, RestoreFailed) and answer.corrupt):
                return answer
            self.sources.refuse(order.ref, obtained.pack)
            await self._drop_pack(order.ref)
        making = await self._begin_pack(order) if order.disk_bytes else None
        answer = await self._restore(order, partial(self._load, order, making, obtained))
        if making is None or not making.loaded:
            obtained.end(packed=False)
        if making is not None and not making.loaded:
            # What is stored already is worth keeping if another try may help.
            hopeless = isinstance(answer, RestoreFailed) and (answer.broken or answer.corrupt)
            await self._making.give_up(making, keep=not hopeless and self._is_planned(order.ref))
            self._post_pack_failed(order, "the load failed")
        return answer

    async def _restore(
        self, order: Restore, move: Callable[[WorkerHandle], Awaitable[Event]]
    ) -> Event | None:
        failed = partial(RestoreFailed, order.ref, order.device, order.from_tier, order=order.order)
        # A part whose image was to be moved into a segment may lie in either: then none of it is kept.
        kept_chunks = 0 if order.from_tier is Tier.HOST else order.first_chunk
        kept = partial(failed, kept_chunks=kept_chunks)
        self.roster.hold(order.ref, order.device)
        try:
            worker = await self.roster.find_or_fork(order.ref, order.device)
        except WorkerDead as error:
            self.roster.let_go(order.ref, order.device)
            return failed(f"no worker: {error}")
        try:
            async with self.roster.in_time(worker, MOVE_TIMEOUT_S):
                return await move(worker)
        except WorkerDead:
            return None
        except WorkerFailure as failure:
            if not await self._keep_to(order, worker, kept_chunks):
                return None
            return kept(failure.message, corrupt=failure.corrupt, broken=failure.broken)
        except (OriginUnavailable, OSError) as error:
            if not await self._keep_to(order, worker, kept_chunks):
                return None
            missing = isinstance(error, FileNotFoundError) and order.from_tier is Tier.DISK
            private = error.private if isinstance(error, OriginUnavailable) else str(error)
            log.warning("restore of %s from %s: %s", order.ref, order.from_tier.value, private)
            return kept(public(error), corrupt=missing)

    async def _restore_obtained(self, order: Restore, pack: FetchedPack) -> Event | None:
        """From the pack that another node gave: it lies in its place already."""
        await self._making.forget(lambda ref: ref != order.ref)
        self._unproven.add(order.ref)
        answer = await self._restore(order, partial(self._restore_cached, order))
        if isinstance(answer, Restored):
            answer = replace(answer, restore_ms=answer.restore_ms + pack.fetch_ms)
        if not (isinstance(answer, RestoreFailed) and answer.corrupt):
            charge = self.holdings.add(order.ref, pack.disk_bytes, pack.deduplicated_bytes)
            host_bytes, read_bytes = pack.host.of(self.host_form), pack.host.stored_bytes
            self.post(Packed(order.ref, order.device, charge, host_bytes, order.pack_order, read_bytes))
        await self.holdings.repay(order.ref)
        return answer

    async def _load(
        self, order: Restore, making: Making | None, obtained: Obtained, worker: WorkerHandle
    ) -> Event:
        spec = self._spec_of(order.ref)
        async with open_origin(spec, self._fetch, self._control_store) as origin:
            files = making.files(order.disk_bytes) if making is not None else None
            try:
                done = await worker.load_origin(spec, origin.descriptors, files)
            except WorkerFailure as failure:
                if (broken_off := origin.failure()) is not None:
                    raise broken_off from failure
                raise
        await self._note_image(order, worker, mapped=False)
        if making is not None:
            making.loaded = True
            self._packing.start(self._finish_pack(order, making, obtained, worker, done))
        return Restored(
            order.ref,
            order.device,
            Tier.ORIGIN,
            done.restore_ms,
            order=order.order,
            restored_bytes=done.restored_bytes,
        )

    async def _restore_cached(self, order: Restore, worker: WorkerHandle) -> Event:
        spec = self._spec_of(order.ref)
        restored = partial(Restored, order.ref, order.device, order.from_tier, order=order.order)
        if order.from_tier is Tier.HOST:
            segment = self._segments.get(order.ref)
            if segment is None:
                raise WorkerFailure("the host segment is gone", corrupt=True, broken=False)
            source = Segment(segment, self.host_form)
            done = await worker.restore(spec, source, order.first_chunk, serving=self._serving(order))
            await self._note_image(order, worker, done.mapped)
            return restored(done.restore_ms, restored_bytes=done.restored_bytes)
        with ExitStack() as files:
            copy = await open_copy(self._packs, self._journal, order.ref, files)
            async with self._filling(order) as host:
                done = await self._restore_pack(worker, spec, copy, order, host)
                await self._note_proven(order)
                await self._note_image(order, worker, done.mapped)
                filled = host is not None and done.host_filled and order.ref not in self._unproven
                filled = filled and self._segments.seal(order.ref)
                if host is not None and not filled:
                    await self._drop_segment(order.ref)
        return restored(done.restore_ms, filled, restored_bytes=done.restored_bytes, cached=done.cached)

    async def _restore_pack(
        self, worker: WorkerHandle, spec: ModelSpec, copy: PackCopy, order: Restore, host: Segment | None
    ) -> LoadDone:
        """Chunks that are bad are mended before the pack is given up: other nodes' bytes are tried once."""
        first_chunk = order.first_chunk
        serving = None if order.ref in self._unproven else self._serving(order)
        # Other packs that have extents in this file would be changed with it, and not be proven.
        give = not self.holdings.has_users(order.ref)
        for from_peers in (give, False):
            prove = order.ref in self._unproven
            try:
                return await worker.restore(spec, copy, first_chunk, host, serving, prove)
            except WorkerFailure as failure:
                if not failure.chunks:
                    raise
                # Whoever was let in is sent away, and mending may take long.
                self.post(ServingEnded(order.ref, order.device, order.order))
                if not await self.repairs.mend(worker, spec, copy.data_key, failure, from_peers):
                    raise
            serving = None  # now all must be there
        return await worker.restore(spec, copy, first_chunk, host, prove=order.ref in self._unproven)

    async def _note_proven(self, order: Restore) -> None:
        """Of a part that came to another, the image is proven, and what the pack has of the other is not."""
        if order.ref in self._unproven and not order.first_chunk:
            self._unproven.discard(order.ref)
            with suppress(JournalFailed):  # then the next start makes the pack anew
                await self._journal.call(self._journal.journal.note_proven, order.ref)

    async def _doubt(self, ref: ModelRef) -> None:
        if ref not in self._unproven:
            await self._journal.call(self._journal.journal.note_proven, ref, False)
            self._unproven.add(ref)

    def _serving(self, order: Restore) -> Callable[[int], None]:
        """Tell the core when requests may come before all is there."""
        return lambda nbytes: self.post(ServingBegun(order.ref, order.device, order.order, nbytes))

    @asynccontextmanager
    async def _filling(self, order: Restore) -> AsyncIterator[Segment | None]:
        """A host segment to fill on the way, if the order has room for one; gone if the restore fails."""
        segment: Segment | None = None
        if order.host_bytes:
            try:
                segment = Segment(self._segments.create(order.ref, order.host_bytes), self.host_form)
            except OSError as error:
                log.warning("no host segment for %s, which does not need it: %s", order.ref, error)
        try:
            yield segment
        except BaseException:
            if segment is not None:
                await self._drop_segment(order.ref)
            raise

    async def _drop_segment(self, ref: ModelRef) -> None:
        await freed(self._segments.drop(ref))

    async def _note_image(self, order: Restore, worker: WorkerHandle, mapped: bool) -> None:
        """The worker's image may lie in the segment that it was given: then its memory outlives a drop."""
        if not mapped:
            await self._give_back(order.ref, order.first_chunk)
        elif not worker.died.is_set():  # its end was noted, or will be
            image_bytes = self._spec_of(order.ref).image_bytes
            await freed(self._segments.lend(order.ref, order.device, image_bytes))

    async def _give_back(self, ref: ModelRef, keep_chunks: int) -> None:
        """Of an image only the first chunks are left on its device."""
        image_bytes = sum(self._spec_of(ref).chunk_bytes[:keep_chunks]) if keep_chunks else 0
        await freed(self._segments.give_back(ref, image_bytes))

    async def evict(self, order: Evict) -> Event | None:
        worker = self.roster.find(order.ref, order.device)
        if worker is None:
            return None
        try:
            async with self.roster.in_time(worker, EVICT_TIMEOUT_S):
                await worker.evict(order.ref, order.keep_chunks)
        except WorkerDead:
            return None
        except WorkerFailure as failure:
            # A worker that can not give memory back is of no use; its death frees it all.
            log.error("evict %s on %s: %s; killing the worker", order.ref, order.device, failure.message)
            worker.kill()
            return None
        await self._give_back(order.ref, order.keep_chunks)
        if not order.keep_chunks:
            self.roster.let_go(order.ref, order.device)
        return Evicted(order.ref, order.device, order.order)

    async def fill(self, order: Fill) -> Event:
        return await self._ahead.fill(order, self.host_form)

    def stop_fill(self, order: StopFill) -> None:
        self._ahead.stop(order.order)

    # --- packs ------------------------------------------------------------------------------------

    async def pack(self, order: Pack) -> Event:
        return await self._packing.start(self._pack(order))

    async def _pack(self, order: Pack) -> Event:
        ref = order.ref
        worker = self.roster.find(ref, order.device)
        making: Making | None = None
        try:
            if worker is None:
                raise WorkerDead("the worker is gone")
            making = await self._making.begin(self._spec_of(ref), order.disk_bytes, resume=False)
            async with self.roster.in_time(worker, MOVE_TIMEOUT_S):
                done = await worker.pack(ref, making.files(order.disk_bytes))
            host_bytes = await self._making.publish(making, done, self.host_form)
        except (WorkerDead, WorkerFailure, OSError) as error:
            if making is not None:
                await self._making.give_up(making)
            log.warning("no pack of %s: %s", ref, error)
            kept_bytes = self._making.partial_bytes(ref)
            return PackFailed(ref, order.device, public(error), order.order, kept_bytes)
        self._background.start(self._making.end(making))
        read_bytes = done.host.stored_bytes
        return Packed(ref, order.device, done.disk_bytes, host_bytes, order.order, read_bytes)

    async def _begin_pack(self, order: Restore) -> Making | None:
        """The pack beside a load. None when there can be none: the load goes on without."""
        try:
            return await self._making.begin(self._spec_of(order.ref), order.disk_bytes)
        except OSError as error:
            log.warning("no pack of %s: %s", order.ref, error)
            self._post_pack_failed(order, public(error))
            return None

    async def _finish_pack(
        self, order: Restore, making: Making, obtained: Obtained, worker: WorkerHandle, load: LoadDone
    ) -> None:
        try:
            async with self.roster.in_time(worker, MOVE_TIMEOUT_S):
                done = await worker.packed(load)
            host_bytes = await self._making.publish(making, done, self.host_form)
        except (WorkerDead, WorkerFailure, OSError) as error:
            # A worker that died in the middle leaves what the next load can go on from.
            await self._making.give_up(making, keep=isinstance(error, WorkerDead))
            log.warning("no pack of %s: %s", order.ref, error)
            obtained.end(packed=False)
            self._post_pack_failed(order, public(error))
        else:
            ref, read_bytes = order.ref, done.host.stored_bytes
            self.post(Packed(ref, order.device, done.disk_bytes, host_bytes, order.pack_order, read_bytes))
            obtained.end(packed=True)
            await self._making.end(making)

    def _post_pack_failed(self, order: Restore, message: str) -> None:
        kept_bytes = self._making.partial_bytes(order.ref)
        self.post(PackFailed(order.ref, order.device, message, order.pack_order, kept_bytes))

    async def drop(self, order: Drop) -> Event | None:
        if order.tier is Tier.HOST:
            await self._drop_segment(order.ref)
            return Dropped(order.ref, order.tier, order.order)
        charged = await self._drop_pack(order.ref)
        # Nothing may wait in between: a byte is always on somebody's account.
        return Dropped(order.ref, order.tier, order.order, charged)

    async def _drop_pack(self, ref: ModelRef) -> tuple[tuple[ModelRef, int], ...]:
        """Returns when the file is gone, finished or not, or only what others need of it is left, with what
        these are charged from now on; its bytes are held until then."""
        self._unproven.discard(ref)
        await self._making.forget(lambda other: other != ref)
        await self.holdings.prepare_drop(ref)
        try:
            # The key first: from then on the file is noise, whatever happens to it.
            await self._journal.call(self._journal.journal.remove_pack, ref)
        except JournalFailed as error:
            # On a full disk the file must go first. The next start sweeps the row of a file that is gone.
            log.error("the key of the pack of %s stays until the next start: %s", ref, error)
        while True:
            try:
                return await self.holdings.drop(ref)
            except OSError as error:
                log.error("the pack of %s can not be removed: %s", ref, error)
                await asyncio.sleep(DROP_RETRY_S)

    def run(
        self, ref: ModelRef, device: str, request: EngineRequest, took: Callable[[int], None]
    ) -> AsyncIterator[EngineFrame]:
        worker = self.roster.find(ref, device)
        if worker is None:
            raise worker_died(ref)
        return Explained(ref, worker.run(ref, request, took, self._spec_of(ref).batching))

    async def _keep_to(self, order: Restore, worker: WorkerHandle, kept_chunks: int) -> bool:
        """After a failed restore: have the worker hold what the order said is there, and nothing else. A part
        that a whole load was to replace may be there still. False: the worker is gone with everything."""
        self.post(ServingEnded(order.ref, order.device, order.order))
        try:
            async with self.roster.in_time(worker, EVICT_TIMEOUT_S):
                await worker.evict(order.ref, kept_chunks)
        except (WorkerDead, WorkerFailure):
            worker.kill()
            return False
        await self._give_back(order.ref, kept_chunks)
        if not kept_chunks:
            self.roster.let_go(order.ref, order.device)
        return True
