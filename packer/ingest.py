"""Bringing a model in from its origin, and writing its pack beside.

Covers: reading the files of an origin in parallel with every byte hashed in file order, placing the weights
in an image, packing each chunk when its last byte is there, and going on where an interrupted ingest stopped.
Does not cover: where bytes come from (``sources``, ``agent/origin.py``), packing itself
(``packing``), restoring from a pack (``tiers``).

The model may serve when ``fill`` returns: every hash is right. The pack is finished afterwards. Nothing that
goes wrong with the pack stops the load. Beside the image a load takes the lanes' buffers for small tensors
and the encoders' scratch, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from packer.directory import SIDE_BYTES_MAX
from packer.index import PackError
from packer.layout import (
    TENSORS_MAX,
    BadHeader,
    BadLayout,
    ImageLayout,
    PlacedTensor,
    TensorInfo,
    header_bytes,
    lay_out,
    parse_header,
)
from packer.origin_headers import ORIGIN_HEADERS, Headers
from packer.pack_writer import PackSummary
from packer.packing import Pack, PackTarget
from packer.pieces import PIECE_BYTES, Part, Piece, cut, pieces, runs
from packer.sources import SMALL_ASK_BYTES, Source, SourceFailed
from packer.tensor_model import BadTensorModel, execution_order
from packer.tiers import Image, TierError
from packer.types import KIB, ModelRef, OriginFile, Task

# Read at once at the start of a weight file: the header of most files, so that it costs one round trip.
HEAD_BYTES = 64 * KIB
# Hashing one file is a chain, so a second file keeps a second core busy; more would only share them.
FILES_AT_ONCE = 2
# One piece is read while the one before is hashed.
LANES_PER_FILE = 2
# How soon a load notices that it is cancelled.
CANCEL_POLL_S = 0.05


class Ingest:
    """One load from an origin, and the pack beside it.

    ``open`` reads side files and headers; then ``layout`` and ``side_files`` are there (the headers are one
    of them, see ``origin_headers``), and the caller can allocate the image and build the module while
    ``fill`` streams the weights. After ``fill`` either ``finish_pack`` or ``abandon``; the image must stay
    until then.
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
        self._pack: Pack | None = None
        self.side_files: dict[str, bytes] = {}
        self.layout = ImageLayout(0, (), ())

    # --- headers ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Raises ``TierError``."""
        tensors: list[TensorInfo] = []
        headers = Headers()
        self._check_side_bytes()
        for reader in self._files:
            reader.expect_start()
        for reader in self._files:
            if reader.is_weights:
                tensors.extend(reader.read_header(headers))
                if len(tensors) > TENSORS_MAX:
                    # Each file may have that many; all of 256 files together must not take the memory.
                    raise TierError(f"the weights have more than {TENSORS_MAX} tensors", broken=True)
            else:
                self.side_files[reader.file.path] = reader.read_whole()
        try:
            self.layout = lay_out(tensors, execution_order(self._engine, self.side_files))
        except (BadLayout, BadTensorModel) as error:
            raise TierError(str(error), broken=True) from None
        data = headers.data(self.layout.image_bytes)
        if data is not None:
            self.side_files[ORIGIN_HEADERS] = data

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
        cancelled = cancelled or threading.Event()
        resumed: frozenset[int] = frozenset()
        chunk_done: Callable[[int], None] = lambda number: None  # noqa: E731
        if self._target is not None:
            pack = Pack(self._target, self._ref, self._engine, self._task, self.layout, image)
            self._pack = pack
            resumed = pack.start(self.side_files, cancelled)
            chunk_done = pack.put
        _zero_gaps(image, self.layout)
        arrivals = _Arrivals(self.layout, resumed, chunk_done)
        run = _Run(image, arrivals, resumed, [reader.source for reader in weights])
        placed: dict[str, list[PlacedTensor]] = {reader.file.path: [] for reader in weights}
        for tensor in self.layout.tensors:
            placed[tensor.info.file].append(tensor)
        streams = [_Stream(reader, placed[reader.file.path], self.layout, run) for reader in weights]
        try:
            run.carry_out(streams, cancelled)
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
        if head <= SMALL_ASK_BYTES:
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

    def read_header(self, headers: Headers) -> tuple[TensorInfo, ...]:
        """The header of a weight file, also into ``headers``; the hash stands behind it. Raises
        ``TierError``."""
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
        headers.add(self.file.path, bytes(head))
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
        for part in (part for tensor in layout.tensors for part in cut(tensor, layout)):
            self._missing[part.chunk] += part.nbytes
        self._resumed = resumed

    def add(self, part: Part) -> None:
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
    sources: Sequence[Source]
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
        # A read that waits for its origin wakes up and fails.
        for source in self.sources:
            source.stop()


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
        self._pieces = pieces(self._tensors, layout, run.resumed)
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
                        source.expect(runs(pieces(self._tensors, self._layout, run.resumed)))
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

    def _memory(self, piece: Piece, buffer: memoryview, held: ExitStack) -> memoryview:
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

    def _scatter(self, piece: Piece, view: memoryview) -> None:
        for part in piece.parts:
            at = part.file_offset - piece.offset
            with self._run.image.filling(part.image_offset, part.nbytes) as place:
                place[:] = view[at : at + part.nbytes]


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
