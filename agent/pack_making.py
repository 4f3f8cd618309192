"""Packs in the making: their files, keys and room, from the first byte to the journal's row.

Covers: beginning a pack, beginning one again where an interrupted load stopped, publishing it, giving it up,
and what a crash left. Does not cover: its bytes (the worker writes them), which packs to make
(``packer/residency.py``), or names and directories (``packs``).

A partial pack is kept only after a load that may be tried again. Its bytes stay in the core's ledger, in its
tenant's account, and the core drops it before anything else when it needs the room.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from agent.holdings import Holdings, Offers, base_paths
from agent.journal import JournalFailed, PackRow
from agent.journal_thread import JournalThread
from agent.packs import DISK_FREE_FLOOR_BYTES, PackDirectory
from agent.workers import PackDone, PackFiles
from packer.types import HostForm, ModelRef, ModelSpec

log = logging.getLogger("bunk.orders")

# Interrupted loads that can be gone on with; one more, and the oldest of the tenant that has most is given
# up. A load that nobody has asked for again since so many others were interrupted is not worth its row in
# the journal.
PARTIALS_MAX = 64


@dataclass(slots=True)
class Making:
    """One pack that is being written. ``resumed``: an earlier attempt may have left chunks in its file.
    ``offers``: packs that chunks of it are looked for in."""

    ref: ModelRef
    fd: int
    part_fd: int
    data_key: bytes
    wrapped_key: bytes
    resumed: bool
    offers: Offers | None = None
    loaded: bool = False  # the load beside which it is written has come to its end

    def files(self, limit_bytes: int) -> PackFiles:
        """What a worker needs to write it."""
        offered = self.offers.packs if self.offers is not None else ()
        return PackFiles(
            self.fd, self.part_fd, self.data_key, limit_bytes, DISK_FREE_FLOOR_BYTES, self.resumed, offered
        )

    def close(self) -> None:
        for descriptor in (self.fd, self.part_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.fd = self.part_fd = -1


class PackMaking:
    """``gone``: told of a partial pack that was removed without the core having ordered it."""

    def __init__(
        self,
        packs: PackDirectory,
        journal: JournalThread,
        holdings: Holdings,
        clock_ms: Callable[[], int],
        gone: Callable[[ModelRef], None],
    ) -> None:
        self._packs = packs
        self._journal = journal
        self._holdings = holdings
        self._clock_ms = clock_ms
        self._gone = gone
        self._partial_bytes: dict[ModelRef, int] = {}

    async def find_partials(self) -> dict[ModelRef, int]:
        """After a start: the partial packs that have their key and both files, with what they take. Raises
        ``JournalFailed``."""
        journal = self._journal.journal
        for ref in await self._journal.call(journal.partial_packs):
            nbytes = self._packs.partial_bytes(ref)
            if nbytes is None:
                with suppress(JournalFailed):  # the next start tries again
                    await self._journal.call(journal.forget_partial, ref)
            else:
                self._partial_bytes[ref] = nbytes
        for ref in too_many(list(self._partial_bytes)):
            await self._remove(ref)
        return dict(self._partial_bytes)

    def partial_bytes(self, ref: ModelRef) -> int:
        """What is left on disk of a pack that was begun; 0: nothing."""
        return self._partial_bytes.get(ref, 0)

    async def begin(self, spec: ModelSpec, limit_bytes: int, resume: bool = True) -> Making:
        """Files and key of a new pack, or of the one that was interrupted. Raises ``OSError``."""
        ref = spec.ref
        kept_bytes = self.partial_bytes(ref)
        if limit_bytes > self._packs.free_bytes() + kept_bytes:
            raise OSError(f"the file system has less than {limit_bytes} bytes free above its floor")
        key, wrapped = await self._journal.call(self._journal.journal.seal_partial_key, ref, self._clock_ms())
        resumed = ref in self._partial_bytes and resume
        fd, part_fd = self._packs.create_partial(ref, resumed)
        self._partial_bytes.pop(ref, None)  # it is counted as a pack in the making from here on
        making = Making(ref, fd, part_fd, key, wrapped, resumed)
        try:
            making.offers = await self._holdings.offer(spec)
        except BaseException:
            making.close()
            if (nbytes := self._packs.partial_bytes(ref)) is not None:
                self._partial_bytes[ref] = nbytes
            raise
        return making

    async def publish(self, making: Making, done: PackDone, form: HostForm) -> int:
        """Make it the version's pack; returns the bytes of a host segment of it. Raises ``OSError``.

        The worker must state the size that the file has: it is charged to a tier that all tenants share."""
        file_bytes = os.fstat(making.fd).st_size
        making.close()
        if done.disk_bytes != file_bytes:
            raise OSError(f"the worker speaks of a pack of {done.disk_bytes} bytes, it has {file_bytes}")
        host_bytes = done.host.of(form)
        # Publish before the journal knows: a crash in between leaves a file that the next start sweeps.
        await asyncio.to_thread(self._packs.publish, making.ref, base_paths(done, making.offers))
        row = PackRow(making.ref, done.disk_bytes, done.host.stored_bytes, done.host, done.deduplicated_bytes)
        await self._journal.call(self._journal.journal.add_pack, row, making.wrapped_key, self._clock_ms())
        self._packs.abandon(making.ref)  # the records of its progress
        self._holdings.add(making.ref, done.disk_bytes, done.deduplicated_bytes)
        return host_bytes

    async def end(self, making: Making) -> None:
        """The core knows of the published pack: what chunks were looked for in may go now."""
        await self._holdings.release(making.offers)

    async def give_up(self, making: Making, keep: bool = False) -> None:
        """No pack came of it. ``keep``: a later load may go on from what is there."""
        making.close()
        await self._holdings.release(making.offers)
        ref = making.ref
        nbytes = self._packs.partial_bytes(ref) if keep else None
        if nbytes is not None:
            self._partial_bytes[ref] = nbytes
            for one in too_many(list(self._partial_bytes)):
                await self._remove(one)
                self._gone(one)
        else:
            await self._remove(ref)
            # Also the file that was published, if only the journal failed: nobody can open it.
            with suppress(OSError):
                await asyncio.to_thread(self._packs.drop, ref)

    async def forget(self, kept: Callable[[ModelRef], bool]) -> None:
        """Remove the partial packs that are not wanted any more."""
        for ref in [ref for ref in self._partial_bytes if not kept(ref)]:
            await self._remove(ref)

    async def _remove(self, ref: ModelRef) -> None:
        self._partial_bytes.pop(ref, None)
        with suppress(OSError):
            await asyncio.to_thread(self._packs.abandon, ref)
        with suppress(JournalFailed):  # the key of nothing; the next start forgets it
            await self._journal.call(self._journal.journal.forget_partial, ref)


def too_many(refs: Sequence[ModelRef]) -> list[ModelRef]:
    """Which of these, oldest first, are above ``PARTIALS_MAX``: the oldest of whichever tenant has most, so
    that no tenant's interrupted loads push those of others out."""
    left, gone = list(refs), []
    while len(left) > PARTIALS_MAX:
        counts = Counter(ref.tenant for ref in left)
        most = max(counts.values())
        oldest = next(ref for ref in left if counts[ref.tenant] == most)
        left.remove(oldest)
        gone.append(oldest)
    return gone
