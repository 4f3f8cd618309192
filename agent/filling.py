"""Filling a host segment from a pack ahead of need, in a process that does nothing else.

Covers: carrying out the core's ``Fill`` and ``StopFill``. Does not cover: when and of what
(``packer/prefetch.py``), the bytes (``packer/tiers.py``), or segments that a restore fills on its way
(``orders``).

The process is a worker of the model's tenant without a device: it sees what any worker of that tenant may
see, starts no CUDA, runs at the lowest priority, and ends with the one order that it was forked for. To stop
is to kill it: then the disk is free at once, and nothing is left but a segment that nobody uses.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack

from agent.devices import DeviceConfig
from agent.explained import public
from agent.journal_thread import JournalThread
from agent.packs import PackDirectory
from agent.segments import HostSegments, freed
from agent.spawning import Nursery
from agent.workers import PackCopy, Segment, WorkerDead, WorkerFailure, WorkerHandle
from packer.events import Event, Fill, Filled, FillFailed
from packer.seal import BadSeal
from packer.types import HostForm, ModelRef, ModelSpec

log = logging.getLogger("bunk.orders")

# No device of the node: what the process is called, and that no driver is loaded in it.
NO_DEVICE = DeviceConfig("host", "cpu", "cpu", 0)
# Half an hour, as long as a restore may take: a disk that needs longer is broken.
FILL_TIMEOUT_S = 1_800.0


async def open_copy(
    packs: PackDirectory, journal: JournalThread, ref: ModelRef, files: ExitStack
) -> PackCopy:
    """A pack with its key, open until ``files`` close. Raises ``WorkerFailure`` (corrupt) and ``OSError``."""
    try:
        key = await journal.call(journal.journal.data_key, ref)
    except BadSeal as error:
        # The node key was replaced: nothing on disk can be opened any more, all of it can be rebuilt.
        raise WorkerFailure(str(error), corrupt=True, broken=False) from None
    if key is None:
        raise WorkerFailure("the journal has no key for this pack", corrupt=True, broken=False)
    own = packs.open(ref)
    files.callback(os.close, own)
    direct = packs.open_direct(ref)
    if direct is not None:
        files.callback(os.close, direct)
    return PackCopy(own, key, direct, tuple(packs.open_bases(ref, files)), packs.reads_past_cache())


class Filling:
    """One segment at a time. ``may``: is the pack's own word enough for what is in it?"""

    def __init__(
        self,
        nursery: Nursery,
        packs: PackDirectory,
        segments: HostSegments,
        journal: JournalThread,
        spec_of: Callable[[ModelRef], ModelSpec],
        may: Callable[[ModelRef], bool],
    ) -> None:
        self._nursery = nursery
        self._packs = packs
        self._segments = segments
        self._journal = journal
        self._spec_of = spec_of
        self._may = may
        self._worker: WorkerHandle | None = None
        self._order = 0  # the one that the worker was forked for
        self._stopped = 0  # the last one that was to stop, which may not have begun then

    async def fill(self, order: Fill, form: HostForm) -> Event:
        try:
            if not self._may(order.ref):
                raise WorkerFailure("its weights have not been compared with the registered ones yet")
            with ExitStack() as files:
                copy = await open_copy(self._packs, self._journal, order.ref, files)
                segment = Segment(self._segments.create(order.ref, order.host_bytes), form)
                async with asyncio.timeout(FILL_TIMEOUT_S):
                    await self._in_a_process(order, copy, segment)
            if not self._segments.seal(order.ref):
                raise WorkerFailure("the segment is still being written")
        except (WorkerDead, WorkerFailure, OSError) as error:  # a timeout is one of the last
            await freed(self._segments.drop(order.ref))
            stopped = self._stopped == order.order
            if not stopped:
                log.warning("prefetching %s into host memory: %s", order.ref, error)
            return FillFailed(order.ref, public(error), order.order, stopped)
        return Filled(order.ref, order.order)

    async def _in_a_process(self, order: Fill, copy: PackCopy, segment: Segment) -> None:
        """Raises ``WorkerDead`` and ``WorkerFailure``. The process is gone when this returns."""
        if self._stopped == order.order:
            raise WorkerDead("it was told to stop")
        worker = await self._nursery.fork(order.ref.tenant, NO_DEVICE)
        self._worker, self._order = worker, order.order
        try:
            if self._stopped == order.order:
                raise WorkerDead("it was told to stop")
            await worker.fill(self._spec_of(order.ref), copy, segment)
        finally:
            self._worker = None
            await worker.close()

    def stop(self, order: int) -> None:
        """End the fill of this number, be it over, under way or about to begin."""
        self._stopped = order
        if self._worker is not None and self._order == order:
            self._worker.kill()
