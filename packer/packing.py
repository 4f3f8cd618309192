"""Packing the chunks of an image: beside an ingest as they arrive, or all of a resident model.

Covers: the encode threads, what an interrupted attempt left, and what a failure costs: the pack, never the
model. Does not cover: the file itself (``pack_writer``) or when a chunk is complete (``ingest``).
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from packer.bases import BasePack, Bases
from packer.index import PackError
from packer.layout import CHUNK_BYTES, ImageLayout
from packer.pack_file import Scratch
from packer.pack_writer import PackSummary, PackWriter
from packer.progress import PartialChunk, ProgressLog
from packer.tiers import Image, in_threads
from packer.types import ModelRef, Task

# Encoding takes more than the rest of an ingest together. While the load is on, one thread leaves it the
# other cores: a model that serves is worth more than a pack that is ready.
ENCODERS_FILLING = 1
ENCODERS = 2


@dataclass(frozen=True, slots=True)
class PackTarget:
    """Where the pack goes. The descriptors stay the caller's.

    ``part_fd``: the file of progress records (None: an interrupted ingest starts over). ``resume``: what
    both files hold may be of an earlier ingest of this version with this data key. ``floor_bytes``: what
    must stay free on the file system. ``bases``: packs of the same tenant to look for chunks in.
    """

    fd: int
    part_fd: int | None
    data_key: bytes
    limit_bytes: int
    resume: bool = False
    floor_bytes: int = 0
    bases: tuple[BasePack, ...] = ()


class Pack:
    """Packs the chunks of an image while it is being filled. An error stops it; ``finish`` raises it."""

    def __init__(
        self, target: PackTarget, ref: ModelRef, engine: str, task: Task, layout: ImageLayout, image: Image
    ) -> None:
        self._target, self._layout, self._image = target, layout, image
        self._make: Callable[[ProgressLog | None], PackWriter] = lambda log: PackWriter(
            target.fd,
            ref,
            engine,
            task,
            layout,
            target.data_key,
            target.limit_bytes,
            target.floor_bytes,
            log,
            Bases(target.bases, ref),
        )
        self._log: ProgressLog | None = None
        if target.part_fd is not None:
            self._log = ProgressLog(target.part_fd, target.data_key, ref, layout)
        self._writer: PackWriter | None = None
        # Numbers of chunks that are complete in the image: as many as the layout has, and no memory else.
        self._ready: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self.resumed_bytes = 0

    def start(self, side_files: Mapping[str, bytes], cancelled: threading.Event) -> frozenset[int]:
        """Begin the file. Returns the chunks that an earlier attempt had stored; they are in the image."""
        resumed: set[int] = set()
        try:
            partial = self._earlier()
            self._writer = self._make(self._log)
            for path in sorted(side_files):
                self._writer.add_file(path, side_files[path])
            self._take_over(self._writer, partial, resumed, cancelled)
        except (PackError, OSError) as error:
            # Chunks that were taken over are in the image all the same.
            self._give_up(error)
        for number in resumed:
            self.resumed_bytes += self._layout.chunks[number].nbytes
        self._add_encoders(ENCODERS_FILLING)
        return frozenset(resumed)

    def _earlier(self) -> list[PartialChunk]:
        if self._log is not None and self._target.resume:
            return self._log.read()
        if self._log is not None:
            self._log.clear()
        os.ftruncate(self._target.fd, 0)
        return []

    def _take_over(
        self,
        writer: PackWriter,
        partial: Sequence[PartialChunk],
        resumed: set[int],
        cancelled: threading.Event,
    ) -> None:
        spans = self._layout.chunks
        for found in partial:
            if cancelled.is_set():
                return
            span = spans[found.number]
            if found.chunk.same_as is None:
                with self._image.filling(span.image_offset, span.nbytes) as view:
                    taken = writer.take_over(found, view)
                if taken:
                    resumed.add(found.number)
        buffer = memoryview(bytearray(CHUNK_BYTES)) if partial else memoryview(b"")
        for found in partial:
            same_as = found.chunk.same_as
            if same_as is not None and writer.take_over_duplicate(found):
                _copy(
                    self._image,
                    spans[same_as].image_offset,
                    spans[found.number].image_offset,
                    buffer[: spans[same_as].nbytes],
                )
                resumed.add(found.number)

    def put(self, number: int) -> None:
        """A chunk is complete in the image."""
        self._ready.put(number)

    def _add_encoders(self, count: int) -> None:
        while len(self._threads) < count:
            thread = threading.Thread(target=self._encode, name="bunk-encode", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _encode(self) -> None:
        writer = self._writer
        while (number := self._ready.get()) is not None and not self._stopped.is_set():
            assert writer is not None
            span = self._layout.chunks[number]
            try:
                with self._image.reading(span.image_offset, span.nbytes) as view:
                    writer.add_chunk(number, view)
            except BaseException as error:
                self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._stopped.set()

    def finish(self) -> PackSummary:
        """Raises ``PackError``."""
        if not self._stopped.is_set():
            self._add_encoders(ENCODERS)
        self._join()
        try:
            if self._error is None and self._writer is not None and not self._stopped.is_set():
                summary = self._writer.finish()
                if self._log is not None:
                    self._log.clear()
                return summary
        except (PackError, OSError) as error:
            self._error = error
        self.forget()
        if isinstance(self._error, PackError):
            raise self._error
        raise PackError(f"the pack was not written: {self._error or 'it was abandoned'}") from self._error

    def stop(self) -> None:
        self._stopped.set()
        self._join()

    def _join(self) -> None:
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def forget(self) -> None:
        """Give the bytes back at once: on a full disk somebody else needs them."""
        with suppress(OSError):
            os.ftruncate(self._target.fd, 0)
        if self._log is not None:
            with suppress(PackError):
                self._log.clear()


def _copy(image: Image, start: int, to: int, buffer: memoryview) -> None:
    with image.reading(start, len(buffer)) as view:
        buffer[:] = view
    with image.filling(to, len(buffer)) as view:
        view[:] = buffer


def write_pack(
    writer: PackWriter, image: Image, layout: ImageLayout, side_files: Mapping[str, bytes]
) -> None:
    """Add everything of a resident model to a pack; the caller finishes it. Raises ``PackError``."""
    for path in sorted(side_files):
        writer.add_file(path, side_files[path])

    def add(index: int, scratch: Scratch) -> None:
        chunk = layout.chunks[index]
        with image.reading(chunk.image_offset, chunk.nbytes) as view:
            writer.add_chunk(index, view)

    in_threads(len(layout.chunks), add)
