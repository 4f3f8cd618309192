"""Origins for the tests of ingest and repair: files, feeds, and sources that misbehave.

Covers: a model directory in memory files, a thread that answers a feed, and counting what is asked for.
Holds no test.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from pack_samples import SIDE, memory_file, safetensors_bytes

from packer.sources import ASK, FileSource, Source, open_source
from packer.types import OriginFile

Tensor = tuple[str, str, list[int], bytes]
Opener = Callable[[str, bytes], Source]


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
        from packer.sources import SourceFailed

        with self._lock:
            self.asked.append((offset, len(view)))
        if self.fail_at is not None and offset + len(view) > self.fail_at:
            raise SourceFailed(f"broke off at byte {self.fail_at}")
        view[:] = self.data[offset : offset + len(view)]

    def stop(self) -> None:
        self.stopped.set()

    @property
    def asked_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.asked)


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
