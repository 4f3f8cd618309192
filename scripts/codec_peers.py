"""The codecs that the codec bench compares with, in a process of their own virtualenv.

Covers: zipnn, plain zstd and blosc2, each at the settings that were fastest for it where this was written,
on the same bytes as ours; the time of one run; and the comparison of every result with the original.
Does not cover: installing them (``peers_venv``) or our own codecs (``codec_cases``). Imports nothing of this
project.

The parent writes one JSON line per job and reads one per answer.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

CHUNK_BYTES = 4 * 1024 * 1024
FRAME_BYTES = 1024 * 1024  # of plain zstd: larger frames are no smaller and decode no faster
TORCH_NAMES = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
}
WIDTHS = {"bf16": 2, "fp32": 4, "fp16": 2, "fp8": 1, "fp8_e5m2": 1, "int8": 1}


class Codec(ABC):
    """One peer. A piece is what is compressed by one call; ``decode`` returns something with bytes."""

    piece_bytes = CHUNK_BYTES

    def __init__(self, dtype: str, threads: int) -> None:
        self.dtype = dtype
        self.threads = threads

    def prepare(self, piece: Any) -> Any:
        """What ``encode`` is given; not on the clock."""
        return piece

    @abstractmethod
    def encode(self, piece: Any) -> Any:
        """The packed form of one piece."""

    @abstractmethod
    def decode(self, packed: Any, out: Any) -> Any:
        """The plain bytes: ``out`` itself where the peer can write there, else memory of its own."""


class ZipNN(Codec):
    """zipnn on torch tensors, its fastest input, in pieces; its results lie in memory that it allocates."""

    def __init__(self, dtype: str, threads: int) -> None:
        super().__init__(dtype, threads)
        torch, zipnn = import_module("torch"), import_module("zipnn")
        self._torch = torch
        self._type = getattr(torch, TORCH_NAMES[dtype])
        self._codec = zipnn.ZipNN(input_format="torch", bytearray_dtype=TORCH_NAMES[dtype], threads=threads)

    def prepare(self, piece: Any) -> Any:
        # A copy, because zipnn reorders the bits of what it compresses where they lie and leaves them so.
        return self._torch.from_numpy(piece.copy()).view(self._type)

    def encode(self, piece: Any) -> Any:
        return self._codec.compress(piece)

    def decode(self, packed: Any, out: Any) -> Any:
        return self._codec.decompress(packed).view(self._torch.uint8).numpy()


class ZipNNCopied(ZipNN):
    """zipnn in pieces that are copied to where they belong, while they are in a cache: a copy costs less
    than what the kernel takes for memory that is new every time."""

    def decode(self, packed: Any, out: Any) -> Any:
        np.copyto(out, super().decode(packed, out))
        return out


class ZipNNWhole(ZipNN):
    """zipnn with everything in one call."""

    piece_bytes = 1 << 62


class Zstd(Codec):
    """Plain zstd of level 1 over the bytes as they are."""

    piece_bytes = FRAME_BYTES

    def __init__(self, dtype: str, threads: int) -> None:
        super().__init__(dtype, threads)
        zstandard = import_module("zstandard")
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, piece: Any) -> Any:
        return self._compressor.compress(piece.data)

    def decode(self, packed: Any, out: Any) -> Any:
        with self._decompressor.stream_reader(packed) as reader:
            if reader.readinto(out.data) != len(out):
                raise RuntimeError("zstd gave fewer bytes")
        return out


class Blosc2(Codec):
    """blosc2: bytes shuffled by the width of a weight, then zstd of level 1."""

    def __init__(self, dtype: str, threads: int) -> None:
        super().__init__(dtype, threads)
        self._blosc2 = import_module("blosc2")
        self._blosc2.set_nthreads(1)

    def encode(self, piece: Any) -> Any:
        return self._blosc2.compress2(
            piece,
            codec=self._blosc2.Codec.ZSTD,
            clevel=1,
            typesize=WIDTHS[self.dtype],
            filters=[self._blosc2.Filter.SHUFFLE],
            nthreads=1,
        )

    def decode(self, packed: Any, out: Any) -> Any:
        self._blosc2.decompress2(packed, dst=out, nthreads=1)
        return out


PEERS: dict[str, type[Codec]] = {
    "zipnn": ZipNN,
    "zipnn, copied": ZipNNCopied,
    "zipnn, one call": ZipNNWhole,
    "zstd": Zstd,
    "blosc2": Blosc2,
}


class Bench:
    """The data of one dtype, and what each peer made of it."""

    def __init__(self) -> None:
        self.dtype = ""
        self.raw = np.empty(0, dtype=np.uint8)
        self.out = np.empty(0, dtype=np.uint8)
        self.packed: dict[str, list[Any]] = {}

    def load(self, path: str, dtype: str) -> dict[str, Any]:
        self.dtype, self.packed = dtype, {}
        self.raw = np.fromfile(path, dtype=np.uint8)
        self.out = np.zeros_like(self.raw)  # and faulted in by the first run, which nobody counts
        return {}

    def pieces(self, name: str) -> list[tuple[int, int]]:
        step = min(PEERS[name].piece_bytes, len(self.raw))
        return [(start, min(start + step, len(self.raw))) for start in range(0, len(self.raw), step)]

    def encode(self, name: str) -> dict[str, Any]:
        codec = PEERS[name](self.dtype, 1)
        places = self.pieces(name)
        took_s, nbytes = 0.0, 0
        packed: list[Any] = []
        for start, stop in places:
            piece = codec.prepare(self.raw[start:stop])
            started_s = time.perf_counter()
            made = codec.encode(piece)
            took_s += time.perf_counter() - started_s
            nbytes += len(made)
            self.compare(name, codec.decode(made, self.out[start:stop]), start, stop)
            # Kept the first time, for decoding, and dropped later, as ours are.
            packed += [] if name in self.packed else [made]
        self.packed.setdefault(name, packed)
        return {"ms": took_s * 1000, "bytes": nbytes}

    def compare(self, name: str, got: Any, start: int, stop: int) -> None:
        if not np.array_equal(np.frombuffer(got, dtype=np.uint8), self.raw[start:stop]):
            raise RuntimeError(f"{name} did not give back the same bytes")

    def decode(self, name: str, threads: int = 1) -> dict[str, Any]:
        """Everything once. All results are there at the end: a tensor that is gone was not loaded."""
        if name not in self.packed:
            self.encode(name)
        packed, places = self.packed[name], self.pieces(name)
        inner, outer = (threads, 1) if len(places) == 1 else (1, threads)
        codecs = [PEERS[name](self.dtype, inner) for _ in range(outer)]
        results: list[Any] = [None] * len(packed)
        self.out[:] = 0xA5

        def work(number: int) -> None:
            for at in range(number, len(packed), outer):
                start, stop = places[at]
                results[at] = codecs[number].decode(packed[at], self.out[start:stop])

        took_ms = timed(work, outer)
        for got, (start, stop) in zip(results, places, strict=True):
            self.compare(name, got, start, stop)
        return {"ms": took_ms}


def timed(work: Callable[[int], None], threads: int) -> float:
    """Milliseconds until ``work`` is done in all threads; they are there before the clock starts."""
    if threads == 1:
        started_s = time.perf_counter()
        work(0)
        return (time.perf_counter() - started_s) * 1000
    barrier = threading.Barrier(threads + 1)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    barrier.wait()
    started_s = time.perf_counter()
    for thread in running:
        thread.join()
    took_ms = (time.perf_counter() - started_s) * 1000
    if errors:
        raise errors[0]
    return took_ms


def main() -> None:
    bench = Bench()
    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "load": bench.load,
        "encode": bench.encode,
        "decode": bench.decode,
    }
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = jobs[job.pop("do")](**job)
        except Exception as error:  # a peer may raise whatever it likes: the parent says so and goes on
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
