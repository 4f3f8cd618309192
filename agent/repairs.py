"""Mending a pack of which single chunks are bad, before anybody thinks of dropping it.

Covers: taking the bad extents from another node that has the same pack, having the worker make the others
again from the origin, and saying what happened. Does not cover: finding bad chunks (``packer/tiers.py``),
making them again (``packer/repair.py``), or checking them: nothing that was mended is used before its tags
were right in a restore, and what another node gave not before the weights were proven: who has a pack's key
can make other bytes with the same tags.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack

from agent.origin import OpenOrigin, OriginUnavailable
from agent.packs import PackDirectory
from agent.workers import WorkerFailure, WorkerHandle
from packer.pack_file import SLOT_BYTES
from packer.types import ModelRef, ModelSpec

log = logging.getLogger("bunk.orders")

# The kind of a record, whose model, what happened, how often.
Note = Callable[[str, ModelRef, str, int], None]
# A piece of another node's copy: of which pack, by its salt, from where on, how long. None: nobody has it.
FetchExtent = Callable[[ModelRef, bytes, int, int], Awaitable[bytes | None]]
# Raises ``OSError``; then the pack stays as it is.
Doubt = Callable[[ModelRef], Awaitable[None]]


class Repairs:
    """``fetch_extent`` None: there is no other node."""

    def __init__(
        self,
        packs: PackDirectory,
        open_origin: Callable[[ModelSpec], AbstractAsyncContextManager[OpenOrigin]],
    ) -> None:
        self._packs = packs
        self._open_origin = open_origin
        self.fetch_extent: FetchExtent | None = None
        self.note: Note = lambda kind, ref, detail, count: None
        # Waited for before a byte of another node comes into a pack: from then on its tags do not prove it.
        self.doubt: Doubt = _not_doubted

    async def mend(
        self, worker: WorkerHandle, spec: ModelSpec, key: bytes, failure: WorkerFailure, from_peers: bool
    ) -> bool:
        """Whether another restore is worth a try. Raises ``WorkerDead``."""
        ref, count = spec.ref, len(failure.chunks)
        self.note("chunk_corrupt", ref, f"chunks {list(failure.chunks)[:16]} of its pack", count)
        files = ExitStack()
        try:
            descriptor = self._packs.open_to_mend(ref)
            files.callback(os.close, descriptor)
            bases = [base.fd for base in self._packs.open_bases(ref, files, os.O_RDWR)]
            left = failure.chunks
            if from_peers and self.fetch_extent is not None:
                left = await self._from_peers(ref, descriptor, failure, self.fetch_extent)
            if left:
                async with self._open_origin(spec) as origin:
                    left = await worker.repair(spec, [descriptor, *bases], key, left, origin.descriptors)
        except (OSError, OriginUnavailable, WorkerFailure) as error:
            log.warning("mending the pack of %s: %s", ref, error)
            return False
        finally:
            files.close()
        if left:
            log.warning("the pack of %s: %d of %d bad chunks can not be mended", ref, len(left), count)
            return False
        self.note("chunk_repaired", ref, f"chunks {list(failure.chunks)[:16]} of its pack", count)
        return True

    async def _from_peers(
        self, ref: ModelRef, descriptor: int, failure: WorkerFailure, fetch: FetchExtent
    ) -> tuple[int, ...]:
        """Returns the chunks that nobody gave. Raises ``OSError``."""
        left: list[int] = []
        size_bytes = os.fstat(descriptor).st_size
        for chunk, (offset, nbytes) in zip(failure.chunks, failure.extents, strict=False):
            # The worker says where, and a worker is not trusted to stay inside its file.
            inside = 0 <= offset <= offset + nbytes <= size_bytes and nbytes <= SLOT_BYTES
            data = await fetch(ref, failure.salt, offset, nbytes) if inside else None
            if data is None or len(data) != nbytes:
                left.append(chunk)
                continue
            await self.doubt(ref)
            await asyncio.to_thread(os.pwrite, descriptor, data, offset)
        return tuple(left)


async def _not_doubted(ref: ModelRef) -> None:
    """Nobody keeps books of what is proven."""
