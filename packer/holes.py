"""Giving back the parts of a pack file that nobody refers to any more.

Covers: which ranges of a file extents of other packs lie in, and punching out the rest, where the file system
can. Does not cover: who refers to a file, and when its own version is gone (``agent/holdings.py``).

A file keeps its size and its first page, the header, by which its readers know it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator

from packer.index import HEADER_BYTES, PackIndex

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_libc = ctypes.CDLL(None, use_errno=True)

Range = tuple[int, int]  # from, to


def ranges_in(index: PackIndex, salt: bytes) -> list[Range]:
    """The extents of a pack that lie in the file with this salt: in order, as few ranges as possible."""
    numbers = {number for number, base in enumerate(index.bases) if base.salt == salt}
    found = sorted(
        (chunk.offset, chunk.offset + chunk.extent_bytes)
        for chunk in index.chunks
        if chunk.base in numbers and chunk.same_as is None
    )
    return list(joined(found))


def joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """Ranges in rising order with neighbours and overlaps made one."""
    start = end = -1
    for at, to in ranges:
        if at > end:
            if start >= 0:
                yield start, end
            start, end = at, to
        end = max(end, to)
    if start >= 0:
        yield start, end


def holes(kept: Iterable[Range], size_bytes: int) -> Iterator[Range]:
    """What lies between the header and the end of a file and in no range that is kept."""
    at = HEADER_BYTES
    for start, end in joined(sorted(kept)):
        if at < start:
            yield at, min(start, size_bytes)
        at = max(at, end)
    if at < size_bytes:
        yield at, size_bytes


def punch(fd: int, ranges: Iterable[Range]) -> bool:
    """Give these ranges of a file back to its file system; False where that is not possible."""
    fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
    if fallocate is None:
        return False
    for start, end in ranges:
        size = ctypes.c_int64(end - start)
        if fallocate(ctypes.c_int(fd), _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(start), size) != 0:
            return False
    return True


def allocated_bytes(fd: int) -> int:
    """What the file takes on disk: the blocks it has, at most its size."""
    state = os.fstat(fd)
    return min(state.st_size, 512 * state.st_blocks)
