"""Device memory for images: where a model's weights lie while it is resident.

Covers: allocating an image on a cpu or CUDA device, writing and reading it in pieces from any thread,
tensors that are views of it (never copies), and giving the memory back. Does not cover: what is
written there (``packer/tiers.py``) or who may (the worker holds one tenant only, for life).

A cpu image is its own named memory file, so that ``/proc/PID/smaps`` shows the exact bytes of every
resident model under ``/memfd:bunk-arena DEVICE`` and so that a hole punched into it really frees memory,
even if something still refers to the mapping.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import ClassVar

import torch

from packer.layout import CHUNK_BYTES, PAGE_BYTES, PlacedTensor

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
ARENA_NAME = "bunk-arena"
# Linux 5.14; fills page tables in one call instead of one fault per 4 KiB.
_MADV_POPULATE_WRITE = 23
# Pinned buffers of one chunk each through which a CUDA image is written and read: enough for two
# restore threads to decode into one while the other is still being copied.
STAGING_BUFFERS = 4


class Image(ABC):
    """The bytes of one model on one device. ``filling`` and ``reading`` may be used by several threads
    on ranges that do not overlap; a range is at most one chunk."""

    nbytes: int

    @abstractmethod
    def filling(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Memory to write; what it holds is in the image when the context ends without an error."""

    @abstractmethod
    def reading(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Memory that holds the image's bytes as long as the context lasts."""

    @abstractmethod
    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        """A view of the image, never a copy; using it after ``close`` is a mistake of the caller."""

    @abstractmethod
    def release(self, offset: int, nbytes: int) -> None:
        """Give the memory of a range of whole pages back to the device."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Harmless when called twice."""


def allocate_image(kind: str, device: str, nbytes: int) -> Image:
    """A zeroed image on this worker's one device. Raises ``MemoryError`` or ``OSError``."""
    return CudaImage(nbytes) if kind == "cuda" else CpuImage(device, nbytes)


class CpuImage(Image):
    """An image in a memory file of its own."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.nbytes = nbytes
        descriptor = os.memfd_create(f"{ARENA_NAME} {device}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, nbytes)
            self._map = mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED)
        finally:
            os.close(descriptor)  # the mapping keeps the file
        self._bytes: torch.Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)

    @contextmanager
    def filling(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        start = offset - offset % PAGE_BYTES
        # Populating in the thread that will write spreads the faults over the restore threads. An older
        # kernel refuses; then every page faults on its own, as it would have anyway.
        with suppress(OSError):
            self._map.madvise(_MADV_POPULATE_WRITE, start, offset + nbytes - start)
        with self.reading(offset, nbytes) as view:
            yield view

    @contextmanager
    def reading(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        with memoryview(self._map) as whole, whole[offset : offset + nbytes] as view:
            yield view

    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        assert self._bytes is not None, "the image is closed"
        return _view(self._bytes, placed)

    def release(self, offset: int, nbytes: int) -> None:
        assert offset % PAGE_BYTES == 0
        assert nbytes % PAGE_BYTES == 0
        self._map.madvise(mmap.MADV_REMOVE, offset, nbytes)

    def close(self) -> None:
        if self._bytes is None:
            return
        self._bytes = None
        self.release(0, self.nbytes)
        # A tensor that something still refers to (a traceback, say) keeps the mapping, not the memory:
        # the hole has freed that, and a stray read sees zeros.
        with suppress(BufferError):
            self._map.close()


class CudaImage(Image):
    """An image in one buffer of the CUDA allocator, written and read through pinned memory."""

    # Made once and kept for the life of the process: pinning costs a quarter of a second per GiB.
    _staging: ClassVar[queue.SimpleQueue[torch.Tensor] | None] = None
    _staging_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # A stream of its own, so that restores neither wait for the requests of other models nor race
        # with the zeroing of this image.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(self._stream):
                # Zeros, because the padding between tensors is part of what a pack stores.
                self._bytes: torch.Tensor | None = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the device has no room for {nbytes} bytes: {error}") from None
        self._stream.synchronize()
        with self._staging_lock:
            if CudaImage._staging is None:
                CudaImage._staging = queue.SimpleQueue()
                for _ in range(STAGING_BUFFERS):
                    CudaImage._staging.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True))

    @contextmanager
    def _staged(self) -> Iterator[torch.Tensor]:
        assert self._staging is not None
        buffer = self._staging.get()
        try:
            yield buffer
        finally:
            self._staging.put(buffer)

    @contextmanager
    def filling(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        assert self._bytes is not None, "the image is closed"
        with self._staged() as buffer:
            yield _memory(buffer)[:nbytes]
            with torch.cuda.stream(self._stream):
                self._bytes[offset : offset + nbytes].copy_(buffer[:nbytes], non_blocking=True)
                copied = self._stream.record_event()
            copied.synchronize()

    @contextmanager
    def reading(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        assert self._bytes is not None, "the image is closed"
        with self._staged() as buffer:
            with torch.cuda.stream(self._stream):
                buffer[:nbytes].copy_(self._bytes[offset : offset + nbytes], non_blocking=True)
                copied = self._stream.record_event()
            copied.synchronize()
            yield _memory(buffer)[:nbytes]

    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        assert self._bytes is not None, "the image is closed"
        return _view(self._bytes, placed)

    def release(self, offset: int, nbytes: int) -> None:
        # The allocator frees whole buffers only; a part goes back when the rest does.
        if offset == 0 and nbytes == self.nbytes:
            self.close()

    def close(self) -> None:
        if self._bytes is None:
            return
        self._bytes = None
        # Without this the allocator would keep the memory for this process, and the ledger would lie.
        torch.cuda.empty_cache()


def _view(image: torch.Tensor, placed: PlacedTensor) -> torch.Tensor:
    info = placed.info
    flat = image[placed.image_offset : placed.image_offset + info.nbytes]
    return flat.view(DTYPES[info.dtype]).view(info.shape)


def _memory(buffer: torch.Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # arrays are buffers, the stubs lag
