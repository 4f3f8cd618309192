"""Bringing a model in from its origin, and writing its pack.

Covers: reading the files of an origin from first byte to last with their hashes checked, streaming the
weights into an image, and packing an image. Does not cover: opening the files (``agent/origin.py``), the
format of a pack (``pack_writer``), restoring from one (``tiers``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from packer.pack_file import Scratch
from packer.pack_writer import PackWriter
from packer.tiers import Image, TierError, in_threads
from packer.types import OriginFile

# One read of an origin: large enough to be cheap, small enough that its hash finds it in the cache.
PIECE_BYTES = 1024 * 1024


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

    in_threads(len(layout.chunks), add)
