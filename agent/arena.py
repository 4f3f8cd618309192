"""Device memory for images: where a model's weights lie while it is resident.

Covers: what an image is on any device (``Image``), and images on a cpu device: private memory in pages of
2 MiB where the kernel has them, filled and read in pieces from any thread, seen by tensors that are views of
it (never copies), and given back in part or whole. Does not cover: images on a GPU (``agent/cuda_image.py``),
what is written there (``packer/tiers.py``) or who may (the worker holds one tenant only, for life).

A cpu image is a private mapping of ``/dev/zero``, so that ``/proc/PID/smaps`` tells the exact bytes of
resident models apart from everything else that the process holds. Private memory is given back by
``MADV_DONTNEED`` at once, even if something still refers to the mapping, and the kernel zeroes every page
before it hands it out again: no byte of one model can be found in the memory of another.

Or it is a mapping of a raw host segment, private and not to be written: then a restore moves no byte, and
pages stay in memory for as long as the segment does. Such an image starts in the segment up to some chunk,
and goes on in memory of its own where later chunks were given back and restored from another copy.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch

from packer.codec import decode_into
from packer.layout import PAGE_BYTES, ChunkSpan, ImageLayout, PlacedTensor
from packer.mapping import HUGE_PAGE_BYTES, advise, map_over, populate_read, populate_write

if TYPE_CHECKING:
    from packer.codec import Workspace

# The names of safetensors for what torch can hold.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
ARENA_FILE = "/dev/zero"
_PROT_NONE = 0

# Called through ctypes because the methods of mmap objects keep the GIL: threads that fill an image would
# wait for one another's page faults.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Image(ABC):
    """The bytes of one model on one device. ``place``, ``filling`` and ``reading`` may be used by several
    threads on ranges that do not overlap; a range is at most one chunk."""

    nbytes: int

    @abstractmethod
    def filling(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Memory to write; what it holds is in the image when the context ends without an error."""

    @abstractmethod
    def reading(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Memory that holds the image's bytes as long as the context lasts."""

    @abstractmethod
    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        """Decode one opened chunk to where it belongs. Raises ``packer.codec.BadPlanes``."""

    def lay_in(self, fd: int, start: int) -> bool:
        """Have all bytes in a host segment from ``start`` on, to be filled there. What was here is gone.
        False: this device can not, and nothing changed. Raises ``OSError``."""
        return False

    def map_from(self, fd: int, start: int) -> bool:
        """Have all bytes of a host segment from ``start`` on, without a copy and not to be changed. What was
        here is gone. False: this device can not, and nothing changed. Raises ``OSError``."""
        return False

    @abstractmethod
    def settle(self) -> None:
        """Wait until everything placed so far is in the image; raises what went wrong on the way."""

    @abstractmethod
    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        """A view of the image, never a copy; using it after its bytes were released is a mistake."""

    @abstractmethod
    def release(self, offset: int) -> None:
        """Give the memory from ``offset`` (where a chunk starts) to the end back to the device."""

    @abstractmethod
    def grow(self) -> None:
        """Make room again for what was released, to be filled. Raises ``MemoryError`` or ``OSError``."""

    @abstractmethod
    def close(self) -> bool:
        """Give everything back; False: something still refers to it and only the bytes are free.
        Harmless when called twice."""


def allocate_image(kind: str, layout: ImageLayout, number: int = 0) -> Image:
    """An image on one of this worker's devices. Raises ``MemoryError`` or ``OSError``."""
    if kind == "cuda":
        from agent.cuda_image import CudaImage

        return CudaImage(layout, f"cuda:{number}")
    return CpuImage(layout.image_bytes)


class CpuImage(Image):
    """An image in private memory, or, from its start on, in a host segment. Pages are there from the moment
    they are filled until they are released; what is not there reads as zeros."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._end = _up_to_page(nbytes)
        with _zeros() as descriptor:
            # Larger by what it takes to start where a large page does, or a segment's image in one; that
            # much more address space, no memory.
            self._map = mmap.mmap(
                descriptor,
                self._end + 2 * HUGE_PAGE_BYTES,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Around the image nothing may be touched, or the last large page would count up to 2 MiB too many.
        _protect(self._base, len(self._map), _PROT_NONE)
        self._segment_bytes = 0  # what lies in a host segment, from the start on
        self._start_at(0)
        self.grow()

    def _start_at(self, within: int) -> None:
        """Choose where the image starts: so many bytes behind the start of a large page."""
        self._start = -self._base % HUGE_PAGE_BYTES + within
        self._address = self._base + self._start
        # Of a view, because torch keeps the object alive but not its buffer: through the view the mapping
        # knows that tensors refer to it, and is not closed under them.
        self._bytes: torch.Tensor | None = torch.frombuffer(
            memoryview(self._map), dtype=torch.uint8, offset=self._start, count=self.nbytes
        )

    # --- in a host segment ---

    def lay_in(self, fd: int, start: int) -> bool:
        self._lay(fd, start, mmap.PROT_READ | mmap.PROT_WRITE, shared=True)
        return True

    def map_from(self, fd: int, start: int) -> bool:
        # Not to be written: weights never change, and a page that did would be charged to nobody.
        self._lay(fd, start, mmap.PROT_READ, shared=False)
        populate_read(self._address, self._end)
        return True

    def _lay(self, fd: int, start: int, protection: int, shared: bool) -> None:
        if os.fstat(fd).st_size < start + self._end:
            raise OSError(errno.EINVAL, "the host segment is shorter than the image")
        if self._start != -self._base % HUGE_PAGE_BYTES + start % HUGE_PAGE_BYTES:
            # A file's large page is mapped as one only at such an address.
            self.release(0)
            _protect(self._address, self._end, _PROT_NONE)
            self._start_at(start % HUGE_PAGE_BYTES)
        map_over(self._address, self._end, fd, start, protection, shared)
        self._segment_bytes = self._end

    # --- bytes ---

    @contextmanager
    def filling(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        assert self._bytes is not None, "the image is closed"
        start = offset - offset % PAGE_BYTES
        # Populating in the thread that will write spreads the faults over the restore threads, and says where
        # there is no memory, in the host segment that it may lie in for one.
        populate_write(self._address + start, offset + nbytes - start)
        with self.reading(offset, nbytes) as view:
            yield view

    @contextmanager
    def reading(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        first = self._start + offset
        with memoryview(self._map) as whole, whole[first : first + nbytes] as view:
            yield view

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        with self.filling(span.image_offset, span.nbytes) as view:
            decode_into(codec_id, planes, view, workspace)

    def settle(self) -> None:
        """Nothing to wait for: what was placed is there."""

    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        assert self._bytes is not None, "the image is closed"
        return view_of(self._bytes, placed)

    # --- giving back ---

    def release(self, offset: int) -> None:
        assert offset % PAGE_BYTES == 0
        if offset >= self._end:
            return
        own = max(offset, self._segment_bytes)
        if offset < own:
            with _zeros() as descriptor:
                map_over(self._address + offset, own - offset, descriptor, 0, mmap.PROT_READ, shared=False)
            self._segment_bytes = offset
        if own < self._end:
            _give_back(self._address + own, self._end - own)
            # A limit of the process counts what could be written, so what was given back must not count; a
            # stray read still finds zeros. It also keeps the kernel from joining what is left to a huge page.
            _protect(self._address + own, self._end - own, mmap.PROT_READ)

    def grow(self) -> None:
        at, nbytes = self._address + self._segment_bytes, self._end - self._segment_bytes
        if nbytes:
            _protect(at, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
            advise(at, nbytes, mmap.MADV_HUGEPAGE)

    def close(self) -> bool:
        if self._map.closed:
            return True
        self._bytes = None
        self.release(0)
        # A tensor that something still refers to (a traceback, say) keeps the mapping, not the memory:
        # that is free already, and a stray read finds zeros.
        try:
            self._map.close()
        except BufferError:
            return False
        return True


@contextmanager
def _zeros() -> Iterator[int]:
    descriptor = os.open(ARENA_FILE, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def view_of(buffer: torch.Tensor, placed: PlacedTensor, start: int = 0) -> torch.Tensor:
    """A tensor of the model as a view of the buffer that holds the image from ``start`` on."""
    info = placed.info
    at = placed.image_offset - start
    flat = buffer[at : at + info.nbytes]
    return flat.view(DTYPES[info.dtype]).view(info.shape)


def _up_to_page(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _give_back(address: int, nbytes: int) -> None:
    if _libc.madvise(address, nbytes, mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), f"giving {nbytes} bytes of an image back failed")


def _protect(address: int, nbytes: int, protection: int) -> None:
    if nbytes and _libc.mprotect(address, nbytes, protection):
        number = ctypes.get_errno()
        raise OSError(number, f"{nbytes} bytes of an image: {os.strerror(number)}")
