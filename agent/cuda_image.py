"""Images on a GPU: one buffer of torch's allocator, written and read through pinned memory.

Covers: allocating, filling and reading in pieces from several threads, and giving the memory back. Does not
cover: images on a cpu device and what every image does (``agent/arena.py``).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch

from agent.arena import Image, view_of
from packer.codec import decode_into
from packer.layout import CHUNK_BYTES, ChunkSpan, ImageLayout, PlacedTensor

if TYPE_CHECKING:
    from packer.codec import Workspace

# Pinned buffers of one chunk each through which a CUDA image is written and read: enough for two
# restore threads to decode into one while the other is still being copied.
STAGING_BUFFERS = 4


class CudaImage(Image):
    """An image in one buffer of the CUDA allocator, written and read through pinned memory."""

    # Made once and kept for the life of the process: pinning costs a quarter of a second per GiB.
    _staging: ClassVar[queue.SimpleQueue[torch.Tensor] | None] = None
    _staging_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, layout: ImageLayout, device: str) -> None:
        self.nbytes = layout.image_bytes
        # A stream of its own, so that restores neither wait for the requests of other models nor race
        # with the zeroing of this image.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(self._stream):
                # Zeros, because the padding between tensors is part of what a pack stores.
                self._bytes: torch.Tensor | None = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the device has no room for {self.nbytes} bytes: {error}") from None
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

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        with self.filling(span.image_offset, span.nbytes) as view:
            decode_into(codec_id, planes, view, workspace)

    def settle(self) -> None:
        self._stream.synchronize()

    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        assert self._bytes is not None, "the image is closed"
        return view_of(self._bytes, placed)

    def release(self, offset: int) -> None:
        # The allocator frees whole buffers only; a part goes back when the rest does.
        if offset == 0:
            self.close()

    def grow(self) -> None:
        """Nothing was given back that has to come again."""

    def close(self) -> bool:
        if self._bytes is not None:
            self._bytes = None
            # Without this the allocator would keep the memory for this process, and the ledger would lie.
            torch.cuda.empty_cache()
        return True


def _memory(buffer: torch.Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # arrays are buffers, the stubs lag
