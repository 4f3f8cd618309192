"""What the writer and the reader of a pack share: parts, buffers, exact reads and writes.

Covers: the place of each part in the seal (``Part``), a thread's buffers, reads and writes that are whole
or an error, and the end of a file (index, then header). Does not cover: the order of the work
(``pack_writer``, ``pack``). Needs no numpy: codecs load with the first chunk.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packer.index import PackError, PackHeader, encode_header, up_to_page
from packer.layout import CHUNK_BYTES, PAGE_BYTES
from packer.seal import TAG_BYTES, Part, PartKind

if TYPE_CHECKING:
    from packer.codec import Workspace

ZEROS = bytes(PAGE_BYTES)
NO_TAG = bytes(TAG_BYTES)
# The largest extent is a raw chunk; one page more has room for the tag behind the last plane.
SLOT_BYTES = CHUNK_BYTES + PAGE_BYTES


@dataclass(frozen=True, slots=True)
class FileFds:
    """Descriptors of one file: for buffered reads, and where the file system has them for direct ones."""

    fd: int
    direct_fd: int | None = None


def base_name(pack_name: str, number: int) -> str:
    """The name under which a pack keeps the file of its base of this number: a link beside it."""
    return f"{pack_name}.base-{number}"


def page_memory(nbytes: int) -> mmap.mmap:
    """Private memory that starts on a page, in large pages where the kernel has them: a direct read into
    thousands of small pages reached less than half of a disk's rate on the machines measured."""
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Scratch:
    """The buffers one thread needs to read or write chunks, kept for as long as the thread.

    The stored bytes lie in page-aligned memory of its own mapping, ready for direct I/O; together with
    the codec's workspace this is at most about four chunks, whatever the model's size.
    """

    def __init__(self) -> None:
        self.stored = memoryview(page_memory(SLOT_BYTES))
        self._wire: memoryview | None = None
        self._workspace: Workspace | None = None

    @property
    def wire(self) -> memoryview:
        """Room for a chunk's planes in wire form."""
        if self._wire is None:
            self._wire = memoryview(page_memory(CHUNK_BYTES))
        return self._wire

    @property
    def workspace(self) -> Workspace:
        if self._workspace is None:
            from packer.codec import Workspace  # loads numpy, which a reader of the index can do without

            self._workspace = Workspace()
        return self._workspace


def chunk_part(index: int, plane: int, chunk_bytes: int, codec_id: int, nbytes: int) -> Part:
    return Part(PartKind.CHUNK, index, plane, codec_id, nbytes, chunk_bytes)


def file_part(number: int, nbytes: int) -> Part:
    return Part(PartKind.FILE, number, 0, 0, nbytes, nbytes)


def index_part(nbytes: int) -> Part:
    return Part(PartKind.INDEX, 0, 0, 0, nbytes, nbytes)


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise PackError(f"writing {len(view)} bytes at {offset} failed: {error.strerror}") from error


def read_all(fd: int, out: memoryview, offset: int) -> None:
    try:
        while out:
            got = os.preadv(fd, [out], offset)
            if got == 0:
                raise PackError(f"file ends at {offset}; it was cut short", corrupt=True)
            out, offset = out[got:], offset + got
    except OSError as error:
        # The medium lost these bytes: another copy has to be found. Anything else is not its fault.
        raise PackError(
            f"reading {len(out)} bytes at {offset} failed: {error.strerror}", corrupt=error.errno == errno.EIO
        ) from error


def check_zero(padding: memoryview, offset: int) -> None:
    if padding != ZEROS[: len(padding)]:
        raise PackError(f"padding after {offset} is not zero", corrupt=True)


def write_end(fd: int, header: PackHeader, index: bytes, sync: bool) -> None:
    """Index, then header: a file that was cut off in between has no header and is no pack."""
    write_all(fd, index.ljust(up_to_page(len(index)), b"\0"), header.index_offset)
    if sync:
        os.fsync(fd)
    write_all(fd, encode_header(header), 0)
    if sync:
        os.fsync(fd)
