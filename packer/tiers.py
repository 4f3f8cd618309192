"""Moving a model's bytes between tiers: origin to image, pack or host segment to image, image to pack.

Covers: the order of the work, its threads, its bounds, and what an error means for the copy it came
from. Does not cover: formats (``layout``, ``pack``), device memory (``agent/arena.py`` implements
``Image``), or who decides to move (``residency``).

Every byte is checked before a model may serve: origin files against the sha256 of the manifest,
chunks of a pack by their authentication tag. Nothing is allocated because a file claims a size: the
sizes come from the plan and are compared first.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from packer.directory import SIDE_BYTES_MAX
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
from packer.pack import PackError, PackReader, PackWriter, Scratch
from packer.types import OriginFile

# Two restore threads read, open and decode at the same time; their scratch is two chunks each.
TIER_THREADS = 2
# One read of an origin: large enough to be cheap, small enough that its hash finds it in the cache.
PIECE_BYTES = 1024 * 1024


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


# --- origin ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _OriginReader:
    """Reads one origin file from first byte to last, from a file or a pipe, hashing on the way."""

    file: OriginFile
    descriptor: int
    at: int
    digest: hashlib._Hash

    def fill(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes. Raises ``TierError`` when the file ends before that."""
        done = 0
        while done < len(view):
            count = os.readv(self.descriptor, [view[done : done + PIECE_BYTES]])
            if count == 0:
                raise TierError(f"{self.file.path}: ends after {self.at} of {self.file.size_bytes} bytes")
            self.digest.update(view[done : done + count])
            done += count
            self.at += count

    def take(self, count: int) -> bytes:
        data = bytearray(count)
        with memoryview(data) as view:
            self.fill(view)
        return bytes(data)

    def finish(self) -> None:
        """Check the end and the hash. Raises ``TierError``."""
        if os.read(self.descriptor, 1):
            raise TierError(
                f"{self.file.path}: is longer than the {self.file.size_bytes} bytes it was registered with",
                corrupt=True,
            )
        if self.digest.hexdigest() != self.file.sha256.lower():
            raise TierError(
                f"{self.file.path}: the content has changed since it was registered (sha256 differs); "
                "push or register the directory again",
                corrupt=True,
            )

    def skip_to_end(self) -> None:
        """Read and hash what is left, then check: tells a changed file from a bad one."""
        piece = bytearray(PIECE_BYTES)
        with memoryview(piece) as view:
            while self.at < self.file.size_bytes:
                self.fill(view[: min(PIECE_BYTES, self.file.size_bytes - self.at)])
        self.finish()


class OriginLoad:
    """One load from origin. All descriptors must be fed at the same time: every header is read before
    the first body, because the layout depends on them all.

    ``open`` reads side files and headers; then ``layout`` and ``side_files`` are there, and the caller
    can allocate the image and build the module while ``fill`` streams the weights.
    """

    def __init__(self, files: Sequence[tuple[OriginFile, int]]) -> None:
        self._readers = [_OriginReader(file, descriptor, 0, hashlib.sha256()) for file, descriptor in files]
        self.side_files: dict[str, bytes] = {}
        self.layout = ImageLayout(0, (), ())

    def open(self) -> None:
        """Raises ``TierError``."""
        tensors: list[TensorInfo] = []
        side_bytes = 0
        for reader in self._readers:
            if reader.file.path.endswith(".safetensors"):
                tensors.extend(self._header(reader))
                continue
            side_bytes += reader.file.size_bytes
            if side_bytes > SIDE_BYTES_MAX:
                raise TierError(
                    f"the files beside the weights are above the limit of {SIDE_BYTES_MAX} bytes", broken=True
                )
            self.side_files[reader.file.path] = reader.take(reader.file.size_bytes)
            reader.finish()
        try:
            self.layout = lay_out(tensors)
        except BadLayout as error:
            raise TierError(str(error), broken=True) from None

    def _header(self, reader: _OriginReader) -> tuple[TensorInfo, ...]:
        file = reader.file
        try:
            size = header_bytes(reader.take(min(8, file.size_bytes)), file.size_bytes, file.path)
            return parse_header(reader.take(size), file.path, file.size_bytes)
        except BadHeader as error:
            reader.skip_to_end()
            raise TierError(str(error), broken=True) from None

    def fill(self, image: Image) -> None:
        """Stream the weights into the image. Raises ``TierError``."""
        placed: dict[str, list[PlacedTensor]] = {}
        for tensor in self.layout.tensors:
            placed.setdefault(tensor.info.file, []).append(tensor)
        for reader in self._readers:
            if reader.file.path.endswith(".safetensors"):
                # The strict header has no holes, so the tensors in file order are the whole body.
                tensors = sorted(placed.get(reader.file.path, ()), key=lambda tensor: tensor.info.file_offset)
                for tensor in tensors:
                    _fill_tensor(reader, image, tensor)
                reader.finish()


def _fill_tensor(reader: _OriginReader, image: Image, tensor: PlacedTensor) -> None:
    for start in range(0, tensor.info.nbytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, tensor.info.nbytes - start)
        with image.filling(tensor.image_offset + start, count) as view:
            reader.fill(view)


# --- packs and host segments ----------------------------------------------------------------------


def _in_threads(count: int, work: Callable[[int, Scratch], None]) -> None:
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
        _in_threads(len(chunks), restore)
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


def write_pack(
    writer: PackWriter, image: Image, layout: ImageLayout, side_files: Mapping[str, bytes]
) -> None:
    """Add everything to a pack; the caller finishes it. Raises ``PackError``."""
    for path in sorted(side_files):
        writer.add_file(path, side_files[path])

    def add(index: int, scratch: Scratch) -> None:
        chunk = layout.chunks[index]
        with image.reading(chunk.image_offset, chunk.nbytes) as view:
            writer.add_chunk(index, view)

    _in_threads(len(layout.chunks), add)
