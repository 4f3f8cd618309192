"""Which bytes of a weight file go where in an image, in the order of the file.

Covers: cutting tensors at the borders of chunks, joining small ones and cutting large ones to pieces of one
read, and what has to be asked of the origin when some chunks are here already. Does not cover: reading
(``ingest``) or the layout itself (``layout``). Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packer.layout import ImageLayout, PlacedTensor
from packer.types import KIB, MIB

# One read of an origin: large enough to be cheap, small enough that its hash finds it in the cache.
PIECE_BYTES = MIB
# Parts below this are read together and copied to their places: a call costs more than copying them.
SMALL_BYTES = 128 * KIB


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one tensor in one chunk."""

    chunk: int
    file_offset: int
    image_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbours in a file that are read and hashed together. ``resumed``: they are in the image already."""

    number: int
    parts: tuple[Part, ...]
    resumed: bool

    @property
    def offset(self) -> int:
        return self.parts[0].file_offset

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def cut(tensor: PlacedTensor, layout: ImageLayout) -> Iterator[Part]:
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
        yield Part(number, tensor.info.file_offset + at - tensor.image_offset, at, count)
        at, number = at + count, number + 1


def pieces(tensors: Sequence[PlacedTensor], layout: ImageLayout, resumed: frozenset[int]) -> Iterator[Piece]:
    """Cut the body of a file into pieces, in file order."""
    number, joined_bytes = 0, 0
    joined: list[Part] = []
    for part in (part for tensor in tensors for part in cut(tensor, layout)):
        resumed_here = part.chunk in resumed
        small = part.nbytes < SMALL_BYTES and not resumed_here
        if joined and not (small and joined_bytes + part.nbytes <= PIECE_BYTES):
            yield Piece(number, tuple(joined), False)
            number, joined_bytes = number + 1, 0
            joined.clear()
        if small:
            joined.append(part)
            joined_bytes += part.nbytes
            continue
        for start in range(0, part.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, part.nbytes - start)
            slice_ = Part(part.chunk, part.file_offset + start, part.image_offset + start, count)
            yield Piece(number, (slice_,), resumed_here)
            number += 1
    if joined:
        yield Piece(number, tuple(joined), False)


def runs(pieces: Iterator[Piece]) -> Iterator[tuple[int, int]]:
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
