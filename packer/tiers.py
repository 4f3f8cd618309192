"""Moving a model's bytes between tiers: origin to image, pack or host segment to image, image to pack.

Covers: the order of the work, its threads, its bounds, and what an error means for the copy it came
from. Does not cover: origins (``ingest``), formats (``layout``, ``pack``), device memory (the agent's
``arena`` implements ``Image``), or who decides to move (``residency``).

Every byte is checked before a model may serve: origin files against the sha256 of the manifest,
chunks of a pack by their authentication tag. Nothing is allocated because a file claims a size: the
sizes come from the plan and are compared first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from packer.index import PackError
from packer.pack import PackReader
from packer.pack_file import Scratch

# Two restore threads read, open and decode at the same time; their scratch is two chunks each.
TIER_THREADS = 2


class TierError(Exception):
    """A copy could not be moved. ``corrupt``: the source is bad and must go; ``broken``: the model
    itself can not be built from any tier; neither: another try may help."""

    def __init__(self, message: str, corrupt: bool = False, broken: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.corrupt = corrupt
        self.broken = broken


class Image(Protocol):
    """Device memory that several threads may write at once; see ``agent/arena.py``."""

    def filling(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]: ...
    def reading(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]: ...


# --- packs and host segments ----------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int, Scratch], None]) -> None:
    """Call ``work`` for 0 .. count-1, in order of start, from ``TIER_THREADS`` threads.

    The first error stops the rest and is raised here.
    """
    lock = threading.Lock()
    indices = iter(range(count))
    errors: list[BaseException] = []

    def drain() -> None:
        scratch = Scratch()
        while not errors:
            with lock:
                index = next(indices, None)
            if index is None:
                return
            try:
                work(index, scratch)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=drain, name="bunk-tier") for _ in range(min(TIER_THREADS, count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def restore_image(reader: PackReader, image: Image, tee_fd: int | None) -> bool:
    """Restore every chunk, in execution order; returns whether ``tee_fd`` now holds a full host copy.

    A host segment that can not be written (no memory left) costs only itself. Raises ``TierError``.
    """
    chunks = reader.index.layout.chunks
    tee = _Tee(tee_fd)

    def restore(index: int, scratch: Scratch) -> None:
        chunk = chunks[index]
        with image.filling(chunk.image_offset, chunk.nbytes) as view:
            tee.read_chunk(reader, index, view, scratch)

    try:
        in_threads(len(chunks), restore)
        return tee.finish(reader)
    except PackError as error:
        raise TierError(str(error), corrupt=error.corrupt) from error


@dataclass(slots=True)
class _Tee:
    """The host segment being filled on the way; None once there is none or it failed."""

    descriptor: int | None

    def read_chunk(self, reader: PackReader, index: int, view: memoryview, scratch: Scratch) -> None:
        descriptor = self.descriptor
        if descriptor is not None:
            try:
                reader.read_chunk(index, view, scratch, descriptor)
                return
            except PackError as error:
                if error.corrupt:
                    raise
                # Most likely the segment could not be written; if it is the pack, the next try says so.
                self.descriptor = None
        reader.read_chunk(index, view, scratch)

    def finish(self, reader: PackReader) -> bool:
        if self.descriptor is None:
            return False
        try:
            reader.finish_tee(self.descriptor)
        except PackError:
            return False
        return True
