"""Our codecs as the codec bench runs them, and the bytes that all codecs are run on.

Covers: the real MiniLM weights in every dtype, laid out as a pack would, or tiled for timing; their order-0
entropy; chunks stored, sealed and in wire form; timed runs whose results are compared with the original
every time. Does not cover: peers (``codec_peers``), tables and goals (``bench_codec``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from codec_peers import timed
from numpy.typing import NDArray
from safetensors.torch import load_file

from packer import kernels
from packer.codec import (
    CodecId,
    Encoded,
    Workspace,
    decode_into,
    encode,
    has_wire_form,
    wire_planes,
    wire_sizes,
)
from packer.layout import CHUNK_BYTES, PAGE_BYTES, TensorInfo, lay_out
from packer.pack_file import chunk_part
from packer.seal import TAG_BYTES, ChunkSeal, new_key
from packer.transforms import Transforms

U8 = NDArray[np.uint8]
Weights = dict[str, torch.Tensor]

FP8_MOST = {"fp8": 448.0, "fp8_e5m2": 57344.0}
# As the file format calls them.
DTYPES = {
    "bf16": "BF16",
    "fp32": "F32",
    "fp16": "F16",
    "fp8": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
    "int8": "I8",
}
TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


class NotExact(RuntimeError):
    """A codec did not give back the same bytes. No figure of such a run is shown."""


# --- data -----------------------------------------------------------------------------------------


def real_weights(file: Path) -> Weights:
    """The fp32 tensors of a safetensors file."""
    tensors = load_file(file)
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.float32}


def cast(weights: Weights, dtype: str) -> Weights:
    """The same weights in another dtype, scaled as is usual: fp8 by tensor, int8 by row, to the greatest."""
    target = TORCH_DTYPES[dtype]
    cast: Weights = {}
    for name, tensor in weights.items():
        if dtype in FP8_MOST:
            tensor = tensor * (FP8_MOST[dtype] / tensor.abs().max().clamp(min=1e-12))
        elif dtype == "int8":
            rows = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)
            greatest = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
            tensor = (rows / greatest * 127).round().reshape(tensor.shape)
        cast[name] = tensor.to(target).contiguous()
    return cast


def bytes_of(tensor: torch.Tensor) -> U8:
    octets: U8 = tensor.reshape(-1).view(torch.uint8).numpy()
    return octets


def tiled(weights: Weights, nbytes: int) -> U8:
    """All tensors one behind the other, repeated to a size: for timing. The repeat is far longer than any
    frame, so nobody finds it."""
    whole = np.concatenate([bytes_of(tensor) for tensor in weights.values()])
    result: U8 = np.resize(whole, nbytes)
    return result


def pack_chunks(weights: Weights, dtype: str) -> list[U8]:
    """The chunks of a pack of these weights: execution order, large tensors alone, padding included."""
    infos = [
        TensorInfo(name, DTYPES[dtype], tuple(tensor.shape), "model.safetensors", 0, tensor.nbytes)
        for name, tensor in weights.items()
    ]
    layout = lay_out(infos)
    image = np.zeros(layout.image_bytes, dtype=np.uint8)
    for placed in layout.tensors:
        start = placed.image_offset
        image[start : start + placed.info.nbytes] = bytes_of(weights[placed.info.name])
    return [image[span.image_offset : span.image_offset + span.nbytes] for span in layout.chunks]


def entropy_bytes(chunk: U8, dtype: str) -> float:
    """The order-0 bound of one chunk: what an ideal code for its exponents, or for its whole bytes where a
    weight has eight bits, would take; sign and mantissa lie as they are."""
    if dtype in ("bf16", "fp16", "fp32"):
        wide, shift, mask = {"bf16": (2, 7, 255), "fp16": (2, 10, 31), "fp32": (4, 23, 255)}[dtype]
        words = chunk[: len(chunk) // wide * wide].view(f"u{wide}")
        exponents = (words >> shift & mask).astype(np.uint8)
        rest_bits = wide * 8 - int(mask).bit_length()
    else:
        exponents, rest_bits = chunk, 0
    counts = np.bincount(exponents, minlength=256)
    shares = counts[counts > 0] / len(exponents)
    bits = float(-(shares * np.log2(shares)).sum()) + rest_bits
    return bits * len(exponents) / 8


@dataclass(frozen=True, slots=True)
class Size:
    """What a model takes in one dtype."""

    raw_bytes: int
    planes_bytes: int
    pages_bytes: int
    wire_bytes: int
    entropy_bytes: float
    codecs: str


def stored_size(weights: Weights, dtype: str) -> Size:
    """Sizes of a pack of these weights, every chunk decoded again and compared."""
    space, planes, pages, wire, entropy = Workspace(), 0, 0, 0, 0.0
    used: dict[int, int] = {}
    for chunk in pack_chunks(weights, dtype):
        encoded = encode(DTYPES[dtype], chunk.data, space)
        out = np.empty(len(chunk), dtype=np.uint8)
        decode_into(encoded.codec_id, encoded.planes, out.data, space)
        if not np.array_equal(out, chunk):
            raise NotExact(f"codec {encoded.codec_id} on {dtype}")
        planes += encoded.stored_bytes
        pages += -(-encoded.stored_bytes // PAGE_BYTES) * PAGE_BYTES
        if has_wire_form(encoded.codec_id):
            sizes = [len(plane) for plane in encoded.planes]
            wire += sum(wire_sizes(encoded.codec_id, sizes, len(chunk)))
        else:
            wire += len(chunk)
        entropy += entropy_bytes(chunk, dtype)
        used[encoded.codec_id] = used.get(encoded.codec_id, 0) + 1
    names = ", ".join(f"{count} x {name_of(codec)}" for codec, count in sorted(used.items()))
    raw = sum(tensor.nbytes for tensor in weights.values())
    return Size(raw, planes, pages, wire, entropy, names)


def name_of(codec_id: int) -> str:
    return CodecId(codec_id).name.lower()


# --- our runs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SealedChunk:
    """A chunk as it lies in a pack: each plane with its tag behind it."""

    codec_id: int
    planes: tuple[bytes, ...]


class OurCodec:
    """One dtype's bytes in chunks, stored, sealed, and room for everything that comes out."""

    def __init__(self, raw: U8, dtype: str) -> None:
        self.raw, self.dtype = raw, DTYPES[dtype]
        space = Workspace()
        self._places = [
            (start, min(start + CHUNK_BYTES, len(raw))) for start in range(0, len(raw), CHUNK_BYTES)
        ]
        self.stored: list[Encoded] = [
            encode(self.dtype, raw[start:stop].data, space) for start, stop in self._places
        ]
        self._seal = ChunkSeal(new_key(), b"bench")
        self._stored_views = [[memoryview(plane) for plane in each.planes] for each in self.stored]
        self._rooms = [np.ones(each.stored_bytes, dtype=np.uint8) for each in self.stored]
        self._sealed = [self._sealed_chunk(number) for number in range(len(self.stored))]
        self._out = np.zeros(len(raw), dtype=np.uint8)
        self._out[:] = 1  # faulted in: no run is charged for the kernel's zeroing

    @property
    def stored_bytes(self) -> int:
        return sum(encoded.stored_bytes for encoded in self.stored)

    @property
    def has_wire_form(self) -> bool:
        return all(has_wire_form(encoded.codec_id) for encoded in self.stored)

    def _sealed_chunk(self, number: int) -> SealedChunk:
        encoded, (start, stop) = self.stored[number], self._places[number]
        planes: list[bytes] = []
        for plane, data in enumerate(encoded.planes):
            out = bytearray(len(data) + TAG_BYTES)
            part = chunk_part(number, plane, stop - start, encoded.codec_id, len(data))
            self._seal.seal_into(part, memoryview(data), memoryview(out))
            planes.append(bytes(out))
        return SealedChunk(encoded.codec_id, tuple(planes))

    def encode(self, transforms: Callable[[], Transforms]) -> float:
        """Encode everything once; what comes out must be what was decoded and compared before."""
        space, took_s = workspace(transforms), 0.0
        for (start, stop), stored in zip(self._places, self.stored, strict=True):
            view = self.raw[start:stop].data
            started_s = time.perf_counter()
            again = encode(self.dtype, view, space)
            took_s += time.perf_counter() - started_s
            # Compared and dropped, as an ingest drops what it has written.
            if again != stored:
                raise NotExact(f"encoding {self.dtype} twice gave different planes")
        return took_s * 1000

    def decode(self, transforms: Callable[[], Transforms], threads: int = 1) -> float:
        """Stored chunks to the tensor's bytes, in memory that is there."""
        spaces = [workspace(transforms) for _ in range(threads)]
        views = [self._out[start:stop].data for start, stop in self._places]
        self._out[:] = 0xA5

        def work(thread: int) -> None:
            for number in range(thread, len(views), threads):
                encoded = self.stored[number]
                decode_into(encoded.codec_id, encoded.planes, views[number], spaces[thread])

        took_ms = timed(work, threads)
        if not np.array_equal(self._out, self.raw):
            raise NotExact(f"{self.dtype} to the tensor")
        return took_ms

    def to_wire(self, threads: int = 1) -> float:
        """Stored chunks to wire planes, what a device decodes itself: frames decoded, the rest in place."""
        return self._wire(threads, sealed=False)

    def open_to_wire(self, threads: int = 1) -> float:
        """Sealed chunks authenticated, opened and brought to wire planes."""
        return self._wire(threads, sealed=True)

    def _wire(self, threads: int, sealed: bool) -> float:
        spaces = [workspace(kernels.transforms) for _ in range(threads)]
        rooms = [self._rooms[number].data for number in range(len(self.stored))]
        frames = [self._out[start:stop].data for start, stop in self._places]
        found: list[tuple[memoryview, ...]] = [()] * len(self.stored)
        self._out[:] = 0xA5

        def work(thread: int) -> None:
            for number in range(thread, len(frames), threads):
                codec_id, (start, stop) = self.stored[number].codec_id, self._places[number]
                planes = self._open(number, rooms[number]) if sealed else self._stored_views[number]
                found[number] = wire_planes(codec_id, planes, stop - start, frames[number], spaces[thread])

        took_ms = timed(work, threads)
        space, chunk = workspace(kernels.transforms), np.zeros(CHUNK_BYTES, dtype=np.uint8)
        for number, (start, stop) in enumerate(self._places):
            out = chunk[: stop - start]
            decode_into(self.stored[number].codec_id, found[number], out.data, space)
            if not np.array_equal(out, self.raw[start:stop]):
                raise NotExact(f"{self.dtype} by way of wire planes")
        return took_ms

    def _open(self, number: int, room: memoryview) -> list[memoryview]:
        """Opened into a slot: what is already in wire form has reached its place."""
        chunk, (start, stop) = self._sealed[number], self._places[number]
        views: list[memoryview] = []
        at = 0
        for plane, data in enumerate(chunk.planes):
            size = len(data) - TAG_BYTES
            part = chunk_part(number, plane, stop - start, chunk.codec_id, size)
            self._seal.open_into(part, memoryview(data), room[at : at + size])
            views.append(room[at : at + size])
            at += size
        return views

    def copy(self) -> float:
        """The limit: the raw bytes moved once, chunk by chunk, into memory that is there."""
        started_s = time.perf_counter()
        for start, stop in self._places:
            np.copyto(self._out[start:stop], self.raw[start:stop])
        took_ms = (time.perf_counter() - started_s) * 1000
        if not np.array_equal(self._out, self.raw):
            raise NotExact("memcpy")
        return took_ms


def workspace(transforms: Callable[[], Transforms]) -> Workspace:
    space = Workspace()
    space.transforms = transforms()
    return space
