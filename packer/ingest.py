"""Bringing a model in from its origin, and writing its pack beside.

Covers: reading the files of an origin in parallel with every byte hashed in file order, placing the weights
in an image, packing each chunk when its last byte is there, and going on where an interrupted ingest stopped.
Does not cover: where bytes come from (``sources``, ``agent/origin.py``), the format of a pack
(``pack_writer``), restoring from one (``tiers``).

The model may serve when ``fill`` returns: every hash is right. The pack is finished afterwards. Nothing that
goes wrong with the pack stops the load. Beside the image a load takes the lanes' buffers for small tensors
and the encoders' scratch, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from packer.directory import SIDE_BYTES_MAX
from packer.index import PackError
from packer.layout import (
    CHUNK_BYTES,
    BadHeader,
    BadLayout,
    ImageLayout,
    PlacedTensor,
    TensorInfo,
    header_bytes,
    lay_out,
    parse_header,
)
from packer.pack_file import Scratch
from packer.pack_writer import PackSummary, PackWriter
from packer.progress import PartialChunk, ProgressLog
from packer.sources import Source, SourceFailed
from packer.tiers import Image, TierError, in_threads
from packer.types import KIB, MIB, ModelRef, OriginFile, Task

# One read of an origin: large enough to be cheap, small enough that its hash finds it in the cache.
PIECE_BYTES = MIB
# Read at once at the start of a weight file: the header of most files, so that it costs one round trip.
HEAD_BYTES = 64 * KIB
# Hashing one file is a chain, so a second file keeps a second core busy; more would only share them.
FILES_AT_ONCE = 2
# One piece is read while the one before is hashed.
LANES_PER_FILE = 2
# Encoding takes more than the rest together. While the load is on, one thread leaves it the other cores:
# a model that serves is worth more than a pack that is ready.
ENCODERS_FILLING = 1
ENCODERS = 2
# How soon a load notices that it is cancelled.
CANCEL_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class PackTarget:
    """Where the pack goes. The descriptors stay the caller's.

    ``part_fd``: the file of progress records (None: an interrupted ingest starts over). ``resume``: what
    both files hold may be of an earlier ingest of this version with this data key. ``floor_bytes``: what
    must stay free on the file system.
    """

    fd: int
    part_fd: int | None
    data_key: bytes
    limit_bytes: int
    resume: bool = False
    floor_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of one tensor in one chunk."""

    chunk: int
    file_offset: int
    image_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbours in a file that are read and hashed together. ``resumed``: they are in the image already."""

    number: int
    parts: tuple[_Part, ...]
    resumed: bool

    @property
    def offset(self) -> int:
        return self.parts[0].file_offset

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class Ingest:
    """One load from an origin, and the pack beside it.

    ``open`` reads side files and headers; then ``layout`` and ``side_files`` are there, and the caller can
    allocate the image and build the module while ``fill`` streams the weights. After ``fill`` either
    ``finish_pack`` or ``abandon``; the image must stay until then.
    """

    def __init__(
        self,
        files: Sequence[tuple[OriginFile, Source]],
        ref: ModelRef,
        engine: str,
        task: Task,
        target: PackTarget | None,
    ) -> None:
        self._files = [_OriginReader(file, source) for file, source in files]
        self._ref, self._engine, self._task, self._target = ref, engine, task, target
        self._pack: _Pack | None = None
        self.side_files: dict[str, bytes] = {}
        self.layout = ImageLayout(0, (), ())

    # --- headers ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Raises ``TierError``."""
        tensors: list[TensorInfo] = []
        self._check_side_bytes()
        for reader in self._files:
            reader.expect_start()
        for reader in self._files:
            if reader.is_weights:
                tensors.extend(reader.read_header())
            else:
                self.side_files[reader.file.path] = reader.read_whole()
        try:
            self.layout = lay_out(tensors)
        except BadLayout as error:
            raise TierError(str(error), broken=True) from None

    def _check_side_bytes(self) -> None:
        side_bytes = sum(reader.file.size_bytes for reader in self._files if not reader.is_weights)
        if side_bytes > SIDE_BYTES_MAX:
            raise TierError(
                f"the files beside the weights are {side_bytes} bytes, above the limit of {SIDE_BYTES_MAX}",
                broken=True,
            )

    # --- weights ----------------------------------------------------------------------------------

    def fill(self, image: Image, cancelled: threading.Event | None = None) -> None:
        """Stream the weights into the image. Returns when every hash is right. Raises ``TierError``."""
        weights = [reader for reader in self._files if reader.is_weights]
        resumed: frozenset[int] = frozenset()
        chunk_done: Callable[[int], None] = lambda number: None  # noqa: E731
        if self._target is not None:
            pack = _Pack(self._target, self._ref, self._engine, self._task, self.layout, image)
            self._pack = pack
            resumed = pack.start(self.side_files)
            chunk_done = pack.put
        _zero_gaps(image, self.layout)
        run = _Run(image, _Arrivals(self.layout, resumed, chunk_done), resumed)
        placed: dict[str, list[PlacedTensor]] = {reader.file.path: [] for reader in weights}
        for tensor in self.layout.tensors:
            placed[tensor.info.file].append(tensor)
        streams = [_Stream(reader, placed[reader.file.path], self.layout, run) for reader in weights]
        try:
            run.carry_out(streams, cancelled or threading.Event())
            for stream in streams:
                stream.reader.check()
        except TierError as error:
            raise self._failed(error, bool(resumed)) from error
        except BaseException:
            self.abandon()
            raise

    def _failed(self, error: TierError, had_resumed: bool) -> TierError:
        self.abandon()
        if not error.corrupt:
            return error
        # Whatever was packed is not this version.
        if self._pack is not None:
            self._pack.forget()
        if had_resumed:
            return TierError(
                f"{error.message}; some of it was kept from an interrupted load, which is dropped now"
            )
        return error

    # --- the pack ---------------------------------------------------------------------------------

    @property
    def resumed_bytes(self) -> int:
        """Raw bytes that were not asked of the origin again."""
        return self._pack.resumed_bytes if self._pack is not None else 0

    def finish_pack(self) -> PackSummary:
        """Wait for the encoders and complete the pack. Raises ``PackError``: then there is none, its bytes on
        disk are given back, and the model serves without one."""
        if self._pack is None:
            raise PackError(f"no pack of {self._ref} was asked for")
        return self._pack.finish()

    def abandon(self) -> None:
        """Stop packing. What is stored so far stays, for a later ingest to go on from."""
        if self._pack is not None:
            self._pack.stop()


class _OriginReader:
    """Reads one file of an origin, hashing on the way."""

    def __init__(self, file: OriginFile, source: Source) -> None:
        self.file = file
        self.source = source
        self.digest = hashlib.sha256()

    @property
    def is_weights(self) -> bool:
        return self.file.path.endswith(".safetensors")

    def expect_start(self) -> None:
        """Announce what will be read first, so that the files of a distant origin come all at once."""
        self._check_size()
        head = min(HEAD_BYTES, self.file.size_bytes) if self.is_weights else self.file.size_bytes
        with self._named():
            self.source.expect([(0, head)])

    def _check_size(self) -> None:
        size = self.source.size_bytes()
        if size is not None and size > self.file.size_bytes:
            raise TierError(
                f"{self.file.path}: is longer than the {self.file.size_bytes} bytes it was registered with",
                corrupt=True,
            )

    def read(self, offset: int, view: memoryview) -> None:
        with self._named():
            self.source.read_into(offset, view)

    def _named(self) -> _Named:
        return _Named(self.file)

    def read_whole(self) -> bytes:
        """A side file, checked. Raises ``TierError``."""
        data = bytearray(self.file.size_bytes)
        with memoryview(data) as view:
            self.read(0, view)
        self.digest.update(data)
        self.check()
        return bytes(data)

    def read_header(self) -> tuple[TensorInfo, ...]:
        """The header of a weight file; the hash stands behind it. Raises ``TierError``."""
        size_bytes = self.file.size_bytes
        head = bytearray(min(HEAD_BYTES, size_bytes))
        with memoryview(head) as view:
            self.read(0, view)
        try:
            size = 8 + header_bytes(bytes(head[:8]), size_bytes, self.file.path)
            if size > len(head):
                rest = bytearray(size - len(head))
                with memoryview(rest) as view:
                    self.read(len(head), view)
                head += rest
            del head[size:]
            tensors = parse_header(bytes(head[8:]), self.file.path, size_bytes)
        except BadHeader as error:
            self._hash_all()
            raise TierError(str(error), broken=True) from None
        self.digest.update(head)
        return tensors

    def _hash_all(self) -> None:
        """Hash everything and check: tells a changed file from a bad one."""
        piece = bytearray(PIECE_BYTES)
        with memoryview(piece) as view, self._named():
            self.source.expect([(0, self.file.size_bytes)])
            for at in range(0, self.file.size_bytes, PIECE_BYTES):
                count = min(PIECE_BYTES, self.file.size_bytes - at)
                self.source.read_into(at, view[:count])
                self.digest.update(view[:count])
        self.check()

    def check(self) -> None:
        """Raises ``TierError`` when what was hashed is not what was registered."""
        if self.digest.hexdigest() != self.file.sha256.lower():
            raise TierError(
                f"{self.file.path}: the content has changed since it was registered (sha256 differs); "
                "push or register the directory again",
                corrupt=True,
            )


class _Named:
    """Gives the errors of a source the name of its file."""

    def __init__(self, file: OriginFile) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SourceFailed):
            raise TierError(f"{self._file.path}: {error} of {self._file.size_bytes}") from error


# --- streaming ------------------------------------------------------------------------------------


class _Arrivals:
    """Counts the bytes of each chunk that are in the image; says when the last one is."""

    def __init__(self, layout: ImageLayout, resumed: frozenset[int], done: Callable[[int], None]) -> None:
        self._lock = threading.Lock()
        self._done = done
        self._missing = [0] * len(layout.chunks)
        for part in (part for tensor in layout.tensors for part in _cut(tensor, layout)):
            self._missing[part.chunk] += part.nbytes
        self._resumed = resumed

    def add(self, part: _Part) -> None:
        with self._lock:
            self._missing[part.chunk] -= part.nbytes
            complete = self._missing[part.chunk] == 0
        if complete and part.chunk not in self._resumed:
            self._done(part.chunk)


@dataclass(slots=True)
class _Run:
    """What the lanes of one load share."""

    image: Image
    arrivals: _Arrivals
    resumed: frozenset[int]
    changed: threading.Condition = field(default_factory=threading.Condition)
    errors: list[BaseException] = field(default_factory=list)

    def carry_out(self, streams: Sequence[_Stream], cancelled: threading.Event) -> None:
        """Stream all files. Raises ``TierError``, or what the image raises."""
        threads = [
            threading.Thread(
                target=self._lane, args=(streams[group::FILES_AT_ONCE],), name="bunk-ingest", daemon=True
            )
            for group in range(min(FILES_AT_ONCE, len(streams)))
            for _ in range(LANES_PER_FILE)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(CANCEL_POLL_S)
                if cancelled.is_set() and not self.errors:
                    self._fail(TierError("the load was cancelled", cancelled=True))
                if self.errors:
                    # A read that waits for its origin wakes up and fails.
                    for stream in streams:
                        stream.reader.source.stop()
        if self.errors:
            raise self.errors[0]

    def _lane(self, streams: Sequence[_Stream]) -> None:
        try:
            buffer = memoryview(bytearray(PIECE_BYTES))
            for stream in streams:
                while not self.errors and stream.advance(buffer):
                    pass
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.errors.append(error)
            self.changed.notify_all()


class _Stream:
    """The body of one weight file on its way into the image."""

    def __init__(
        self, reader: _OriginReader, tensors: Sequence[PlacedTensor], layout: ImageLayout, run: _Run
    ) -> None:
        self.reader = reader
        self._run = run
        # The strict header has no holes, so the tensors in file order are the whole body.
        self._tensors = sorted(tensors, key=lambda tensor: tensor.info.file_offset)
        self._layout = layout
        self._take = threading.Lock()
        self._pieces = _pieces(self._tensors, layout, run.resumed)
        self._expected = False
        self._hashed = 0

    def advance(self, buffer: memoryview) -> bool:
        """Bring the next piece in; False when there is none. Any number of threads."""
        run, source = self._run, self.reader.source
        with ExitStack() as held:
            with self._take:
                if not self._expected:
                    self._expected = True
                    with self.reader._named():
                        source.expect(_runs(_pieces(self._tensors, self._layout, run.resumed)))
                piece = next(self._pieces, None)
                if piece is None:
                    return False
                # Memory is taken in file order, so the piece whose turn it is never waits for memory that
                # a later one of the same file holds.
                view = self._memory(piece, buffer, held)
                if source.ordered and not piece.resumed:
                    self.reader.read(piece.offset, view)
            if not source.ordered and not piece.resumed:
                self.reader.read(piece.offset, view)
            if not self._hash_in_turn(piece.number, view):
                return False
        if len(piece.parts) > 1:
            self._scatter(piece, view)
        for part in piece.parts:
            run.arrivals.add(part)
        return True

    def _memory(self, piece: _Piece, buffer: memoryview, held: ExitStack) -> memoryview:
        """Where the piece is read to: its place in the image if it has one, else the lane's buffer."""
        if len(piece.parts) > 1:
            return buffer[: piece.nbytes]
        image, part = self._run.image, piece.parts[0]
        memory = image.reading if piece.resumed else image.filling
        return held.enter_context(memory(part.image_offset, part.nbytes))

    def _hash_in_turn(self, number: int, view: memoryview) -> bool:
        run = self._run
        with run.changed:
            run.changed.wait_for(lambda: self._hashed == number or bool(run.errors))
            if run.errors:
                return False
        self.reader.digest.update(view)
        with run.changed:
            self._hashed += 1
            run.changed.notify_all()
        return True

    def _scatter(self, piece: _Piece, view: memoryview) -> None:
        for part in piece.parts:
            at = part.file_offset - piece.offset
            with self._run.image.filling(part.image_offset, part.nbytes) as place:
                place[:] = view[at : at + part.nbytes]


def _cut(tensor: PlacedTensor, layout: ImageLayout) -> Iterator[_Part]:
    """The tensor in parts that lie in one chunk each."""
    chunks, at = layout.chunks, tensor.image_offset
    end = at + tensor.info.nbytes
    low, high = 0, len(chunks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chunks[middle].image_offset <= at else (low, middle)
    number = low
    while at < end:
        count = min(end, chunks[number].image_offset + chunks[number].nbytes) - at
        yield _Part(number, tensor.info.file_offset + at - tensor.image_offset, at, count)
        at, number = at + count, number + 1


def _pieces(
    tensors: Sequence[PlacedTensor], layout: ImageLayout, resumed: frozenset[int]
) -> Iterator[_Piece]:
    """Cut the body of a file into pieces, in file order."""
    number, waiting = 0, []  # type: int, list[_Part]
    for part in (part for tensor in tensors for part in _cut(tensor, layout)):
        small = part.nbytes < PIECE_BYTES and part.chunk not in resumed
        if waiting and not (small and sum(other.nbytes for other in waiting) + part.nbytes <= PIECE_BYTES):
            yield _Piece(number, tuple(waiting), False)
            number, waiting = number + 1, []
        if small:
            waiting.append(part)
            continue
        for start in range(0, part.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, part.nbytes - start)
            cut = _Part(part.chunk, part.file_offset + start, part.image_offset + start, count)
            yield _Piece(number, (cut,), part.chunk in resumed)
            number += 1
    if waiting:
        yield _Piece(number, tuple(waiting), False)


def _runs(pieces: Iterator[_Piece]) -> Iterator[tuple[int, int]]:
    """What will be read of a file, neighbours joined."""
    start = end = -1
    for piece in pieces:
        if piece.resumed:
            continue
        if piece.offset != end:
            if end > start:
                yield start, end - start
            start = piece.offset
        end = piece.offset + piece.nbytes
    if end > start:
        yield start, end - start


def _zero_gaps(image: Image, layout: ImageLayout) -> None:
    """Between tensors an image holds zeros; its memory may have held another model of this tenant."""
    at = 0
    for tensor in layout.tensors:
        _zero(image, at, tensor.image_offset)
        at = max(at, tensor.image_offset + tensor.info.nbytes)
    _zero(image, at, layout.image_bytes)


def _zero(image: Image, start: int, end: int) -> None:
    if start < end:
        with image.filling(start, end - start) as view:
            view[:] = bytes(end - start)


# --- the pack beside ------------------------------------------------------------------------------


class _Pack:
    """Packs the chunks of an image while it is being filled. An error stops it; ``finish`` raises it."""

    def __init__(
        self, target: PackTarget, ref: ModelRef, engine: str, task: Task, layout: ImageLayout, image: Image
    ) -> None:
        self._target, self._layout, self._image = target, layout, image
        self._make: Callable[[ProgressLog | None], PackWriter] = lambda log: PackWriter(
            target.fd, ref, engine, task, layout, target.data_key, target.limit_bytes, target.floor_bytes, log
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

    def start(self, side_files: Mapping[str, bytes]) -> frozenset[int]:
        """Begin the file. Returns the chunks that an earlier attempt had stored; they are in the image."""
        resumed: set[int] = set()
        try:
            partial = self._earlier()
            self._writer = self._make(self._log)
            for path in sorted(side_files):
                self._writer.add_file(path, side_files[path])
            self._take_over(self._writer, partial, resumed)
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

    def _take_over(self, writer: PackWriter, partial: Sequence[PartialChunk], resumed: set[int]) -> None:
        spans = self._layout.chunks
        for found in partial:
            if self._stopped.is_set():
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


class OriginLoad:
    """A load without a pack, from descriptors of files or feeds; see ``Ingest``."""

    def __init__(self, files: Sequence[tuple[OriginFile, int]]) -> None:
        from packer.sources import open_source

        sources = [(file, open_source(descriptor)) for file, descriptor in files]
        self._ingest = Ingest(sources, ModelRef("", "", ""), "", Task.EMBEDDING, None)

    @property
    def layout(self) -> ImageLayout:
        return self._ingest.layout

    @property
    def side_files(self) -> dict[str, bytes]:
        return self._ingest.side_files

    def open(self) -> None:
        """Raises ``TierError``."""
        self._ingest.open()

    def fill(self, image: Image) -> None:
        """Raises ``TierError``."""
        self._ingest.fill(image)
