"""Images on a GPU: filled through pinned memory, decoded on the device, given back in part or whole.

Covers: the buffers of an image, cut where no tensor lies across, so that a part can be given back; a ring of
pinned slots through which chunks travel in wire form, copied by one stream and decoded by another. Does not
cover: images on a cpu device and what every image does (``agent/arena.py``), or the decoding itself
(``packer/device_decode.py``).

With the torch device "cpu" everything but streams and pinning runs the same way: that is how it is tested
where there is no GPU.
"""

from __future__ import annotations

import gc
import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from agent.arena import Image, view_of
from packer.codec import CodecId, decode_into, has_wire_form, wire_planes
from packer.device_decode import decode_on_device
from packer.layout import CHUNK_BYTES, ChunkSpan, ImageLayout, PlacedTensor
from packer.types import MIB

if TYPE_CHECKING:
    from packer.codec import Workspace

# A chunk each: two restore threads fill one while others are being copied and decoded.
SLOTS = 6
# Planes start at such a multiple in a slot, which every kind of access on a device can take.
PLANE_ALIGN_BYTES = 256
# Wire planes are never more than the chunk; three of them may each be moved by the alignment.
SLOT_BYTES = CHUNK_BYTES + 4 * PLANE_ALIGN_BYTES
# The allocator frees whole buffers and rounds each up to 2 MiB: less than a hundredth of this.
SEGMENT_BYTES = 256 * MIB


@dataclass(slots=True)
class _Slot:
    """Room for one chunk on its way. ``used``: the last work on the device that needs what is in it."""

    pinned: torch.Tensor
    unpacked: memoryview
    staged: torch.Tensor
    used: torch.cuda.Event | None = None

    @property
    def memory(self) -> memoryview:
        return memoryview(self.pinned.numpy())  # type: ignore[arg-type]  # arrays are buffers, the stubs lag


@dataclass(slots=True)
class _Segment:
    """A run of the image in one buffer, or the start of that run, or nothing of it."""

    start: int
    nbytes: int
    buffer: torch.Tensor | None = None

    def part(self, offset: int, nbytes: int) -> torch.Tensor:
        assert self.buffer is not None, "the image is closed, or these bytes were given back"
        at = offset - self.start
        assert at + nbytes <= len(self.buffer), "these bytes were given back"
        return self.buffer[at : at + nbytes]


class CudaImage(Image):
    """An image in buffers of torch's allocator."""

    # By torch device; made once and kept for the life of the process: pinning costs a quarter of a second
    # per GiB.
    _rings: ClassVar[dict[str, queue.SimpleQueue[_Slot]]] = {}
    _rings_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, layout: ImageLayout, device: str) -> None:
        self.nbytes = layout.image_bytes
        self._device = device
        # Streams of its own, so that restores wait neither for requests to other models nor for each other.
        self._copying = torch.cuda.Stream(device) if device != "cpu" else None  # type: ignore[no-untyped-call]
        self._working = torch.cuda.Stream(device) if device != "cpu" else None  # type: ignore[no-untyped-call]
        self._segments = [_Segment(start, end - start) for start, end in _cut(layout)]
        self._starts = [segment.start for segment in self._segments]
        self._ring = self._make_ring()
        self.grow()

    def _make_ring(self) -> queue.SimpleQueue[_Slot]:
        with self._rings_lock:
            if self._device not in self._rings:
                ring: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
                for _ in range(SLOTS):
                    pinned = torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=self._device != "cpu")
                    staged = torch.empty(SLOT_BYTES, dtype=torch.uint8, device=self._device)
                    ring.put(_Slot(pinned, memoryview(bytearray(CHUNK_BYTES)), staged))
                self._rings[self._device] = ring
            return self._rings[self._device]

    def _at(self, offset: int) -> _Segment:
        return self._segments[bisect_right(self._starts, offset) - 1]

    # --- filling and reading ----------------------------------------------------------------------

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """A slot that nothing on the device needs any more."""
        slot = self._ring.get()
        try:
            if slot.used is not None:
                slot.used.synchronize()
                slot.used = None
            yield slot
        finally:
            self._ring.put(slot)

    @contextmanager
    def filling(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        with self._slot() as slot:
            yield slot.memory[:nbytes]
            with _on(self._working):
                self._at(offset).part(offset, nbytes).copy_(slot.pinned[:nbytes], non_blocking=True)
                slot.used = _event(self._working)

    @contextmanager
    def reading(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        with self._slot() as slot:
            with _on(self._working):
                slot.pinned[:nbytes].copy_(self._at(offset).part(offset, nbytes), non_blocking=True)
                done = _event(self._working)
            if done is not None:
                done.synchronize()
            yield slot.memory[:nbytes]

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        if codec_id == CodecId.RAW or not has_wire_form(codec_id):
            with self.filling(span.image_offset, span.nbytes) as view:
                decode_into(codec_id, planes, view, workspace)
            return
        out = self._at(span.image_offset).part(span.image_offset, span.nbytes)
        with self._slot() as slot:
            wire = wire_planes(codec_id, planes, span.nbytes, slot.unpacked, workspace)
            large, small = wire[:-1], bytearray(wire[-1])
            starts, end = _pack_planes(large, slot.memory)
            with _on(self._copying):
                slot.staged[:end].copy_(slot.pinned[:end], non_blocking=True)
                copied = _event(self._copying)
            with _on(self._working):
                if copied is not None and self._working is not None:
                    self._working.wait_event(copied)
                staged = [
                    slot.staged[start : start + len(plane)]
                    for start, plane in zip(starts, large, strict=True)
                ]
                try:
                    # The escapes stay on the host, which checks them before anything is written.
                    decode_on_device(codec_id, [*staged, _tensor(small)], out, workspace)
                finally:
                    slot.used = _event(self._working)

    def settle(self) -> None:
        for stream in (self._copying, self._working):
            if stream is not None:
                stream.synchronize()

    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        segment = self._at(placed.image_offset)
        assert segment.buffer is not None, "the image is closed, or these bytes were given back"
        return view_of(segment.buffer, placed, segment.start)

    # --- giving back and taking again -------------------------------------------------------------

    def release(self, offset: int) -> None:
        self.settle()
        for segment in self._segments:
            if segment.start >= offset:
                segment.buffer = None
        self._empty_cache()
        segment = self._at(offset)
        kept = offset - segment.start
        if segment.buffer is not None and kept < len(segment.buffer):
            segment.buffer = self._buffer(kept, segment.buffer)
            self._empty_cache()

    def grow(self) -> None:
        for segment in self._segments:
            held = 0 if segment.buffer is None else len(segment.buffer)
            if held < segment.nbytes:
                segment.buffer = self._buffer(segment.nbytes, segment.buffer)
        self._empty_cache()

    def _buffer(self, nbytes: int, held: torch.Tensor | None) -> torch.Tensor:
        """A buffer that starts with what is held, and is zero behind it: the padding between tensors is part
        of what a pack stores. Raises ``MemoryError``."""
        try:
            with _on(self._working):
                buffer = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
                if held is not None:
                    common = min(nbytes, len(held))
                    buffer[:common].copy_(held[:common])
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the device has no room for {nbytes} bytes: {error}") from None
        self.settle()
        return buffer

    def close(self) -> bool:
        if all(segment.buffer is None for segment in self._segments):
            return True
        self.settle()
        for segment in self._segments:
            segment.buffer = None
        # A view that only a cycle still refers to would hold its whole buffer.
        gc.collect()
        self._empty_cache()
        return True

    def _empty_cache(self) -> None:
        """Or the allocator would keep the memory for this process, and the ledger would lie."""
        if self._device != "cpu":
            torch.cuda.empty_cache()


def _cut(layout: ImageLayout) -> list[tuple[int, int]]:
    """Runs of whole chunks of at least ``SEGMENT_BYTES``, cut where no tensor lies across."""
    runs: list[tuple[int, int]] = []
    tensors = iter(sorted(layout.tensors, key=lambda tensor: tensor.image_offset))
    tensor = next(tensors, None)
    start = reach = 0
    for chunk in layout.chunks:
        at = chunk.image_offset
        while tensor is not None and tensor.image_offset < at:
            reach = max(reach, tensor.image_offset + tensor.info.nbytes)
            tensor = next(tensors, None)
        if reach <= at and at - start >= SEGMENT_BYTES:
            runs.append((start, at))
            start = at
    return [*runs, (start, layout.image_bytes)]


def _pack_planes(planes: Sequence[memoryview], memory: memoryview) -> tuple[list[int], int]:
    """Copy planes into a slot; returns where each starts and where the last one ends."""
    starts: list[int] = []
    end = 0
    for plane in planes:
        start = -(-end // PLANE_ALIGN_BYTES) * PLANE_ALIGN_BYTES
        end = start + len(plane)
        memory[start:end] = plane
        starts.append(start)
    return starts, end


def _tensor(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return stream.record_event() if stream is not None else None
