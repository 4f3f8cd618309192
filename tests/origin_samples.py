"""Origins for the tests of ingest and repair: files, feeds, and sources that misbehave.

Covers: a model directory in memory files, a thread that answers a feed, counting what is asked for, and
whole ingests in memory. Holds no test.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from pack_samples import KEY, REF, SIDE, MemoryImage, memory_file, read_image, safetensors_bytes

from packer.ingest import Ingest
from packer.layout import ImageLayout
from packer.pack import PackReader, verify
from packer.pack_writer import PackSummary
from packer.packing import PackTarget
from packer.sources import ASK, FileSource, Source, SourceFailed, open_source
from packer.types import OriginFile, Task

Tensor = tuple[str, str, list[int], bytes]


class CountedSource:
    """A source in memory that remembers every range that was read, and may fail from an offset on."""

    def __init__(self, data: bytes, ordered: bool = False, fail_at: int | None = None) -> None:
        self.data = data
        self.ordered = ordered
        self.fail_at = fail_at
        self.asked: list[tuple[int, int]] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    def size_bytes(self) -> int | None:
        return None

    def expect(self, runs: Iterable[tuple[int, int]]) -> None:
        pass

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._lock:
            self.asked.append((offset, len(view)))
        if self.fail_at is not None and offset + len(view) > self.fail_at:
            raise SourceFailed(f"broke off at byte {self.fail_at}")
        view[:] = self.data[offset : offset + len(view)]

    def stop(self) -> None:
        self.stopped.set()


def weight_files(shards: Sequence[Sequence[Tensor]]) -> dict[str, bytes]:
    """A model directory: side files, and one weight file per shard."""
    files = {path: data for path, data in SIDE.items() if data}
    for number, tensors in enumerate(shards):
        files[f"model-{number}.safetensors"] = safetensors_bytes(tensors)
    return files


def listed(files: Mapping[str, bytes]) -> list[OriginFile]:
    return [
        OriginFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())
    ]


@contextmanager
def file_sources(files: Mapping[str, bytes]) -> Iterator[list[tuple[OriginFile, Source]]]:
    with ExitStack() as stack:
        yield [
            (file, FileSource(stack.enter_context(memory_file(files[file.path])))) for file in listed(files)
        ]


@contextmanager
def feed_sources(files: Mapping[str, bytes]) -> Iterator[list[tuple[OriginFile, Source]]]:
    """Every file behind a socket, answered by a thread as the agent does."""
    with ExitStack() as stack:
        sources: list[tuple[OriginFile, Source]] = []
        for file in listed(files):
            theirs = stack.enter_context(feed(files[file.path]))
            sources.append((file, open_source(theirs)))
        yield sources


@contextmanager
def feed(data: bytes) -> Iterator[int]:
    """A descriptor on which ranges of ``data`` can be asked for."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            while ask := ours.recv(ASK.size, socket.MSG_WAITALL):
                start, nbytes = ASK.unpack(ask)
                ours.sendall(data[start : start + nbytes])
        except OSError:
            return

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield theirs.fileno()
    finally:
        theirs.shutdown(socket.SHUT_RDWR)
        thread.join()
        ours.close()
        theirs.close()


def contents(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def big(nbytes: int, seed: int) -> bytes:
    """Bytes like weights of bf16: few exponents, no run of them twice."""
    draw = np.random.default_rng(seed)
    words = draw.standard_normal(nbytes // 2 + 1, dtype=np.float32) * np.float32(0.02)
    return (words.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:nbytes]


def expected_image(files: Mapping[str, bytes], layout: ImageLayout) -> bytes:
    image = bytearray(layout.image_bytes)
    for placed in layout.tensors:
        info = placed.info
        data = files[info.file][info.file_offset : info.file_offset + info.nbytes]
        image[placed.image_offset : placed.image_offset + info.nbytes] = data
    return bytes(image)


@dataclass
class Done:
    """What an ingest left."""

    ingest: Ingest
    image: MemoryImage
    summary: PackSummary | None = None


def ingest(sources: Sequence[tuple[OriginFile, Source]], target: PackTarget | None = None) -> Done:
    """Load, and finish the pack if one is wanted."""
    run = Ingest(sources, REF, "transformers", Task.EMBEDDING, target)
    image = load(run)
    return Done(run, image, run.finish_pack() if target is not None else None)


def load(run: Ingest) -> MemoryImage:
    run.open()
    image = MemoryImage(run.layout.image_bytes)
    run.fill(image)
    return image


def check_pack(fd: int, files: Mapping[str, bytes]) -> PackReader:
    reader = PackReader(fd, KEY, REF)
    assert bytes(read_image(reader)) == expected_image(files, reader.index.layout)
    for path, data in files.items():
        if not path.endswith(".safetensors"):
            assert reader.file(path) == data
    assert verify(reader) == reader.index.layout.image_bytes
    return reader
