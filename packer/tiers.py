"""Moving a model's bytes from a pack or a host segment into its image on a device.

Covers: the restore pipeline with its threads and bounds, what an error means for the copy it came from,
and filling a host segment on the way. Does not cover: origins (``ingest``), formats (``layout``, ``pack``),
how an extent is read (``extents``), device memory (the agent implements ``Image``), or who decides to move
(``residency``).

Every chunk of a pack is authenticated before the model may serve. Chunks that are bad do not stop the
others: they are listed, so that only they have to be fetched again. Nothing is allocated because a file
claims a size.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from packer.extents import ExtentReader
from packer.host_segment import HostWriter, image_start
from packer.index import PackError, PackIndex, StoredChunk
from packer.layout import CHUNK_BYTES, ChunkSpan
from packer.mapping import drop_mapped
from packer.pack import PackReader
from packer.pack_file import SLOT_BYTES, Scratch, page_memory
from packer.types import MIB, HostForm

if TYPE_CHECKING:
    from packer.codec import Workspace

# Two restore threads read, open and decode at the same time; their scratch is two chunks each.
TIER_THREADS = 2
# A decode thread keeps a core busy; above this many the memory of the others would be the limit.
DECODE_THREADS_MAX = 4
# Reads that wait for a disk at the same time: disks reach their rate at two to four of this size.
IO_THREADS = 4
# Extents that are read and wait to be opened, beside those being read and being opened.
READY_SLOTS = 4
# Codec workspace (up to 2.5 chunks), own extent and wire form of one decode thread.
_DECODER_BYTES = SLOT_BYTES + CHUNK_BYTES + 5 * CHUNK_BYTES // 2
# What a restore takes beside the image and the host segment, whatever the model's size.
RESTORE_BYTES_MAX = (IO_THREADS + READY_SLOTS + DECODE_THREADS_MAX) * SLOT_BYTES + (
    DECODE_THREADS_MAX * _DECODER_BYTES
)
# More bad chunks than this are not worth mending one by one: the whole copy is bad.
BAD_CHUNKS_MAX = 64


class TierError(Exception):
    """A copy could not be moved. ``corrupt``: the source is bad and must go; ``broken``: the model
    itself can not be built from any tier; neither: another try may help.

    ``chunks``: of a corrupt pack exactly these chunks are bad and all others that were asked for are in
    the image; empty when too many are. ``cancelled``: the caller wanted it to end.
    """

    def __init__(
        self,
        message: str,
        corrupt: bool = False,
        broken: bool = False,
        chunks: tuple[int, ...] = (),
        cancelled: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.corrupt = corrupt
        self.broken = broken
        self.chunks = chunks
        self.cancelled = cancelled


class Image(Protocol):
    """Device memory that several threads may write at once; see ``agent/arena.py``."""

    def filling(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]: ...
    def reading(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]: ...

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        """Put one opened chunk into the image. The planes are the caller's again when this returns.
        Raises ``BadPlanes``."""

    def lay_in(self, fd: int, start: int) -> bool:
        """Lie in a memory file from ``start`` on, where chunks are placed from now on. False: it can not."""

    def map_from(self, fd: int, start: int) -> bool:
        """Have the bytes of a memory file from ``start`` on, without a copy. False: it can not."""


class Watch(Protocol):
    """Somebody who uses the image while it is filled. Called from several threads."""

    urgent: frozenset[int]  # chunks to bring before the others

    def laid(self) -> None:
        """The image lies where it will stay."""

    def placed(self, number: int) -> None:
        """This chunk is in the image, and its bytes change no more."""


@dataclass(frozen=True, slots=True)
class RestoreFacts:
    """What a restore did. ``direct_bytes`` of the ``read_bytes`` went past the page cache; ``mapped``: all of
    the image lies in the host segment."""

    read_bytes: int
    direct_bytes: int
    chunks: int
    host_filled: bool
    mapped: bool = False


# --- restore --------------------------------------------------------------------------------------


def restore(
    reader: PackReader,
    image: Image,
    *,
    first_chunk: int = 0,
    only: Sequence[int] | None = None,
    host: HostWriter | None = None,
    cancelled: threading.Event | None = None,
    watch: Watch | None = None,
    past_cache: bool = False,
) -> RestoreFacts:
    """Restore the chunks from ``first_chunk`` on, or ``only`` some, into the image, which has the others.

    A raw host segment that is sealed for good is mapped, all of it, whatever the image has already.

    ``host`` is filled and finished: what it still misses of the others is read and opened like the rest,
    and placed nowhere. A whole restore places its chunks in a raw segment, where the image lies from then on.
    A host segment that can not be written (no memory left) costs only itself.
    ``cancelled`` is looked at before each chunk; ``watch`` is told of each. ``past_cache``: extents are read
    from the disk wherever they are. Raises ``TierError``.
    """
    count = len(reader.index.chunks)
    wanted = range(first_chunk, count) if only is None else sorted(set(only))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < count:
        raise TierError(f"chunks {wanted[0]} to {wanted[-1]} are not all of {count}")
    if host is None and only is None and _is_final(reader):
        start = image_start(reader.index)
        if start is not None and image.map_from(reader.fd, start):
            return RestoreFacts(0, 0, len(wanted), False, mapped=True)
    run = _Restore(reader, image, host, cancelled or threading.Event(), watch, past_cache)
    if host is not None and len(wanted) == count and host.image_start is not None:
        run.in_place = image.lay_in(host.fd, host.image_start)
    if watch is not None:
        watch.laid()
    try:
        run.run(_jobs(reader.index, wanted, host))
        filled = run.finish_host()
        if host is not None and run.in_place:
            # From here on nobody can write it; it may be sealed.
            assert host.image_start is not None
            image.map_from(host.fd, host.image_start)
    except PackError as error:
        raise TierError(str(error), corrupt=error.corrupt) from error
    finally:
        if host is not None:
            host.close()
    return RestoreFacts(run.read_bytes, run.direct_bytes, len(wanted), filled, run.in_place)


def fill(reader: PackReader, host: HostWriter) -> None:
    """Fill and finish a host segment, past the page cache, whose room others may need. Raises
    ``TierError``."""
    run = _Restore(reader, Passing(), host, threading.Event(), None, past_cache=True)
    chunks = reader.index.chunks
    jobs = _jobs(reader.index, (), host)
    # What the segment keeps in another form than the pack is decoded on the way.
    jobs = [
        replace(job, targets=tuple(n for n in job.fills if host.codec_id(n) != chunks[job.owner].codec_id))
        for job in jobs
    ]
    try:
        run.run(jobs)
        if not run.finish_host():
            raise TierError("the segment can not be written")
    except PackError as error:
        raise TierError(str(error), corrupt=error.corrupt) from error
    finally:
        host.close()


class Passing:
    """An image of which each thread keeps the last chunk, for as long as it takes to look at it."""

    def __init__(self) -> None:
        self._last = threading.local()

    @contextmanager
    def filling(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        memory = getattr(self._last, "memory", None)
        if memory is None:
            self._last.memory = memory = memoryview(page_memory(CHUNK_BYTES))
        yield memory[:nbytes]

    reading = filling

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        from packer.codec import decode_into

        with self.filling(span.image_offset, span.nbytes) as view:
            decode_into(codec_id, planes, view, workspace)

    def lay_in(self, fd: int, start: int) -> bool:
        return False

    def map_from(self, fd: int, start: int) -> bool:
        return False


def _jobs(index: PackIndex, wanted: Sequence[int], host: HostWriter | None) -> list[_Job]:
    targets: dict[int, list[int]] = {}
    fills: dict[int, list[int]] = {}
    for number in wanted:
        targets.setdefault(index.owner(number), []).append(number)
    for number in sorted(host.missing()) if host is not None else ():
        fills.setdefault(index.owner(number), []).append(number)
    owners = dict.fromkeys((*targets, *fills))
    return [_Job(owner, tuple(targets.get(owner, ())), tuple(fills.get(owner, ()))) for owner in owners]


@dataclass(frozen=True, slots=True)
class _Job:
    """One extent to read, the chunks to place that have its bytes, and those that the host segment wants."""

    owner: int
    targets: tuple[int, ...]
    fills: tuple[int, ...] = ()


_Ready: TypeAlias = "tuple[_Job, memoryview] | None"


@dataclass(slots=True)
class _Restore:
    """One restore. Io threads read cold extents into a ring of slots; decode threads open and place them,
    and while none is ready read cached extents themselves: such a read is a copy, which is best done by
    the core that needs the bytes next."""

    reader: PackReader
    image: Image
    host: HostWriter | None
    cancelled: threading.Event
    watch: Watch | None = None
    past_cache: bool = False
    in_place: bool = False  # the image lies in the host segment
    read_bytes: int = 0
    direct_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ready: queue.SimpleQueue[_Ready] = field(default_factory=queue.SimpleQueue)
    _free: queue.SimpleQueue[memoryview | None] = field(default_factory=queue.SimpleQueue)
    _bad: dict[int, str] = field(default_factory=dict)
    _errors: list[BaseException] = field(default_factory=list)
    _stopped: bool = False
    _placed: int = 0  # extents whose every wanted chunk is in the image
    _is_cold: bool = False  # whether there are extents to wait for
    _reading: int = 0  # io threads that may still bring one
    _decoders: int = 0
    # Of this pack (None) and of each file that it has extents in.
    _extents: dict[int | None, ExtentReader] = field(default_factory=dict)
    _mapped: _Mapped | None = None

    def run(self, jobs: Sequence[_Job]) -> None:
        """Raises ``TierError`` and ``PackError``."""
        self._mapped = _map(self.reader)
        jobs = list(jobs)
        self._bring_forward(jobs)
        warm, cold = (jobs, []) if self._mapped is not None else self._sort(jobs)
        cores = len(os.sched_getaffinity(0))
        self._decoders = min(max(TIER_THREADS, cores), DECODE_THREADS_MAX, max(1, len(jobs)))
        self._is_cold = bool(cold)
        self._reading = min(IO_THREADS, len(cold))
        if self._is_cold:
            self._make_ring()
        self._in_threads(warm, cold)
        if self._mapped is not None:
            self._mapped.close()
        if self._errors:
            raise self._errors[0]
        if self.cancelled.is_set():
            raise TierError("the restore was cancelled", cancelled=True)
        if self._bad:
            self._raise_bad()
        wanted = sum(bool(job.targets) for job in jobs)
        if self._placed != wanted:
            # An image with a hole must never serve, whatever mistake here made it.
            raise RuntimeError(f"{self._placed} of {wanted} extents were placed and no error was seen")

    def _sort(self, jobs: Sequence[_Job]) -> tuple[list[_Job], list[_Job]]:
        """The extents to read through the page cache, which has them, and those to read past it."""
        for base in (None, *range(len(self.reader.index.bases))):
            file = self.reader.fds(base)
            self._extents[base] = ExtentReader(file.fd, file.direct_fd)
        chunks = self.reader.index.chunks
        warm: list[_Job] = []
        cold: list[_Job] = []
        for job in jobs:
            chunk = chunks[job.owner]
            through = not self.past_cache and self._extents[chunk.base].is_cached(
                chunk.offset, chunk.extent_bytes
            )
            (warm if through else cold).append(job)
        # In the order of the files, which may be another one than that of execution.
        cold.sort(key=lambda job: _place(chunks[job.owner]))
        self._bring_forward(cold)
        return warm, cold

    def _bring_forward(self, jobs: list[_Job]) -> None:
        """What somebody waits for comes first, else the order stays."""
        if self.watch is not None:
            urgent = self.watch.urgent
            jobs.sort(key=lambda job: urgent.isdisjoint(job.targets))

    def _make_ring(self) -> None:
        slots = IO_THREADS + READY_SLOTS + self._decoders
        memory = memoryview(page_memory(slots * SLOT_BYTES))
        for at in range(0, slots * SLOT_BYTES, SLOT_BYTES):
            self._free.put(memory[at : at + SLOT_BYTES])

    def _in_threads(self, warm: list[_Job], cold: list[_Job]) -> None:
        warm_jobs, cold_jobs = iter(warm), iter(cold)
        works: list[tuple[str, Callable[[Iterator[_Job]], None], Iterator[_Job]]] = [
            *[("bunk-read", self._read_cold, cold_jobs)] * self._reading,
            *[("bunk-decode", self._decode, warm_jobs)] * self._decoders,
        ]
        threads = [
            threading.Thread(target=self._guarded, args=(work, source), name=name)
            for name, work, source in works
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _guarded(self, work: Callable[[Iterator[_Job]], None], source: Iterator[_Job]) -> None:
        try:
            work(source)
        except BaseException as error:
            self._errors.append(error)
            self._stop()

    def _stop(self) -> None:
        """Wake every thread that waits; what is on its way is dropped."""
        self._stopped = True
        for _ in range(IO_THREADS):
            self._free.put(None)
        for _ in range(self._decoders):
            self._ready.put(None)

    def _next(self, source: Iterator[_Job]) -> _Job | None:
        if self.cancelled.is_set() or self._stopped:
            return None
        with self._lock:
            for job in source:
                if job.targets or (job.fills and self.host is not None):
                    return job
        return None

    # --- reading ---

    def _read_cold(self, source: Iterator[_Job]) -> None:
        while (slot := self._free.get()) is not None:
            job = self._next(source)
            if job is None:
                self._free.put(slot)
                break
            if self._read(job, slot, cold=True):
                self._ready.put((job, slot))
            else:
                self._free.put(slot)
        with self._lock:
            self._reading -= 1
            last = self._reading == 0
        if last:
            for _ in range(self._decoders):
                self._ready.put(None)

    def _read(self, job: _Job, slot: memoryview, cold: bool) -> bool:
        """Read one extent; False when the medium lost it."""
        chunk = self.reader.index.chunks[job.owner]
        try:
            past_cache = self._extents[chunk.base].read(slot[: chunk.extent_bytes], chunk.offset, cold)
        except PackError as error:
            self._note_bad(job, error)
            return False
        with self._lock:
            self.read_bytes += chunk.extent_bytes
            self.direct_bytes += past_cache
        return True

    # --- opening and placing ---

    def _decode(self, source: Iterator[_Job]) -> None:
        scratch = Scratch()
        drained = not self._is_cold
        while True:
            found: _Ready = None
            if not drained:
                with suppress(queue.Empty):
                    found = self._ready.get_nowait()
                    drained = found is None
            if found is None:
                job = self._next(source)
                if job is not None:
                    self._place_warm(job, scratch)
                    continue
                if drained:
                    return
                found = self._ready.get()
                if found is None:
                    return
            job, slot = found
            if not self._stopped and not self.cancelled.is_set():
                self._place(job, slot, scratch)
            self._free.put(slot)

    def _place_warm(self, job: _Job, scratch: Scratch) -> None:
        if self._mapped is None:
            if self._read(job, scratch.stored, cold=False):
                self._place(job, scratch.stored, scratch)
            return
        chunk = self.reader.index.chunks[job.owner]
        self._place(job, self._mapped.take(chunk.offset, chunk.extent_bytes), scratch)
        self._mapped.put_back(chunk.offset, chunk.extent_bytes)
        with self._lock:
            self.read_bytes += chunk.extent_bytes

    def _place(self, job: _Job, extent: memoryview, scratch: Scratch) -> None:
        from packer.codec import BadPlanes

        codec_id = self.reader.index.chunks[job.owner].codec_id
        try:
            planes = self.reader.open_chunk(job.owner, extent)
            self._place_planes(job, codec_id, planes, scratch)
        except BadPlanes as error:
            self._note_bad(job, PackError(f"chunk {job.owner}: {error}", corrupt=True))
        except PackError as error:
            self._note_bad(job, error)

    def _place_planes(self, job: _Job, codec_id: int, planes: Sequence[memoryview], scratch: Scratch) -> None:
        from packer.codec import has_wire_form, wire_planes

        host, spans = self.host, self.reader.index.layout.chunks
        if host is not None and host.form is HostForm.WIRE and has_wire_form(codec_id):
            # Placed from the wire form, so that what zstd packed is unpacked once.
            raw_bytes = spans[job.owner].nbytes
            planes = wire_planes(codec_id, planes, raw_bytes, scratch.wire, scratch.workspace)
        for number in job.targets:
            if host is not None and self.in_place:
                host.prepare(number)
            self.image.place(spans[number], codec_id, planes, scratch.workspace)
            if self.watch is not None:
                self.watch.placed(number)
        with self._lock:
            self._placed += bool(job.targets)
        if host is not None:
            self._add_to_host(host, job, codec_id, planes)

    def _add_to_host(self, host: HostWriter, job: _Job, codec_id: int, planes: Sequence[memoryview]) -> None:
        try:
            for number in job.fills:
                if self.in_place:
                    host.note_placed(number)
                elif host.codec_id(number) == codec_id:
                    host.add_chunk(number, codec_id, planes)
                else:
                    # Another codec than the pack's is always the raw one.
                    span = self.reader.index.layout.chunks[number]
                    with self.image.reading(span.image_offset, span.nbytes) as view:
                        host.add_chunk(number, host.codec_id(number), [view])
        except PackError:
            # No memory left for it, most likely. The model itself does not need it.
            self.host = None

    def finish_host(self) -> bool:
        """Complete the host segment; whether it now is one."""
        if self.host is None:
            return False
        try:
            self.host.finish()
        except PackError:
            return False
        return True

    # --- errors ---

    def _note_bad(self, job: _Job, error: PackError) -> None:
        """Remember a bad chunk and go on. Anything else than a bad chunk ends the restore."""
        if not error.corrupt:
            raise error
        with self._lock:
            self._bad.update(dict.fromkeys(job.targets or job.fills, str(error)))
            too_many = len(self._bad) > BAD_CHUNKS_MAX
        if too_many:
            self._stop()

    def _raise_bad(self) -> None:
        chunks = tuple(sorted(self._bad))
        first = self._bad[chunks[0]]
        if self._stopped:
            raise TierError(f"more than {BAD_CHUNKS_MAX} chunks are bad, one is: {first}", corrupt=True)
        message = first if len(chunks) == 1 else f"{len(chunks)} chunks are bad, the first is: {first}"
        raise TierError(message, corrupt=True, chunks=chunks)


def _place(chunk: StoredChunk) -> tuple[int, int]:
    """Orders extents by their file, then by where they lie in it."""
    return (-1 if chunk.base is None else chunk.base, chunk.offset)


class _Mapped:
    """A whole memory file as memory: nobody can change or cut it meanwhile."""

    def __init__(self, fd: int, nbytes: int) -> None:
        import numpy as np

        self._memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._view = memoryview(self._memory)
        self._address = int(np.frombuffer(self._view, dtype=np.uint8, count=1).ctypes.data)

    def take(self, offset: int, nbytes: int) -> memoryview:
        return self._view[offset : offset + nbytes]

    def put_back(self, offset: int, nbytes: int) -> None:
        """This range is not needed any more; so what is mapped stays small, whatever the model's size."""
        drop_mapped(self._address + offset, nbytes)

    def close(self) -> None:
        # An error on its way up may still refer to a piece of it; then the mapping goes with that.
        with suppress(BufferError):
            self._view.release()
            self._memory.close()


def _map(reader: PackReader) -> _Mapped | None:
    """The file as memory, when it is a memory file that is sealed for good."""
    return _Mapped(reader.fd, reader.file_bytes) if _is_final(reader) else None


def _is_final(reader: PackReader) -> bool:
    """Whether this is a host segment of which nobody can change a byte any more. Its end may be cut off by
    its own tenant's workers, which then have only themselves to blame (see ``agent/packs.py``)."""
    if reader.sealed:
        return False
    try:
        return bool(fcntl.fcntl(reader.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)
    except OSError:
        return False  # not a memory file


# --- threads --------------------------------------------------------------------------------------


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


assert RESTORE_BYTES_MAX <= 128 * MIB
