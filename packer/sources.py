"""Where an ingest reads the files of an origin: from the files themselves or from a feed.

Covers: exact reads at any offset, and asking a feed ahead of time for what will be read. Does not cover:
checking what was read (``ingest``) or fetching it from a store (``agent/origin.py``, a feed's other end).

A feed is a stream socket: this side asks for a range by its offset and its length (u64 each, little-endian),
the other side answers with exactly these bytes, asks in order. A feed that ends has failed.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Protocol

from packer.types import MIB

ASK = struct.Struct("<QQ")
# Asks on their way: enough that the other side always knows what comes next, and far below what the kernel
# buffers, so that asking never waits for an answer to be read.
ASKS_AHEAD = 16
# Asks up to this size are answered beside the larger ones of other feeds, which wait for one another. So
# only these may be made of many feeds at once, before any of them is read.
SMALL_ASK_BYTES = MIB


class SourceFailed(Exception):
    """The bytes can not be had now, or not all of them; the text says why."""


class Source(Protocol):
    """One file of an origin.

    ``ordered``: reads must come in the order that was announced, one at a time; otherwise any number of
    threads may read anywhere.
    """

    ordered: bool

    def size_bytes(self) -> int | None:
        """How long the file is, where that can be told without reading it."""

    def expect(self, runs: Iterable[tuple[int, int]]) -> None:
        """Announce runs (offset, length) that will be read next, in this order and completely."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes at ``offset``. Raises ``SourceFailed``."""

    def stop(self) -> None:
        """Make every read fail, also one that waits in another thread."""


class FileSource:
    """A file on this machine. The descriptor stays the caller's."""

    ordered = False

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stopped = False

    def size_bytes(self) -> int | None:
        return os.fstat(self._descriptor).st_size

    def expect(self, runs: Iterable[tuple[int, int]]) -> None:
        """Reads of several threads look random; the kernel must read ahead all the same."""
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = 0 if self._stopped else os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise SourceFailed(f"can not be read at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise SourceFailed(f"ends after {offset + done} bytes")
            done += count

    def stop(self) -> None:
        self._stopped = True


class FeedSource:
    """A feed. The descriptor stays the caller's."""

    ordered = True

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._asked: deque[tuple[int, int]] = deque()
        self._coming: Iterator[tuple[int, int]] = iter(())

    def size_bytes(self) -> int | None:
        return None

    def expect(self, runs: Iterable[tuple[int, int]]) -> None:
        self._coming = chain(self._coming, runs)
        self._ask_ahead()

    def _ask_ahead(self) -> None:
        while len(self._asked) < ASKS_AHEAD and (run := next(self._coming, None)) is not None:
            if run[1]:
                self._ask(*run)

    def _ask(self, offset: int, nbytes: int) -> None:
        ask = memoryview(ASK.pack(offset, nbytes))
        try:
            while ask:
                ask = ask[os.write(self._descriptor, ask) :]
        except OSError as error:
            raise SourceFailed(f"broke off before byte {offset}: {error.strerror}") from error
        self._asked.append((offset, nbytes))

    def read_into(self, offset: int, view: memoryview) -> None:
        if not len(view):
            return
        if not self._asked:
            self._ask(offset, len(view))
        start, left = self._asked[0]
        if start != offset or left < len(view):
            raise SourceFailed(f"was asked for {left} bytes at {start}, but is read at {offset}")
        done = 0
        while done < len(view):
            try:
                count = os.readv(self._descriptor, [view[done:]])
            except OSError as error:
                raise SourceFailed(f"broke off at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise SourceFailed(f"ends after {offset + done} bytes")
            done += count
        self._asked[0] = (start + done, left - done)
        if left == done:
            self._asked.popleft()
            self._ask_ahead()

    def stop(self) -> None:
        end = socket.socket(fileno=os.dup(self._descriptor))
        with end, suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def open_source(descriptor: int) -> Source:
    """The source behind a descriptor that the agent passed: a feed if it is a socket, else a file."""
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return FeedSource(descriptor)
    return FileSource(descriptor)
