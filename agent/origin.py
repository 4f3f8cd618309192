"""Opening the files of a model's origin for a worker to read.

Covers: ``file://`` and control's store on this very machine (the worker gets the files themselves), every
other store that ``obstore`` knows and control's store elsewhere (feeds: sockets on which the worker asks for
ranges, fetched in parallel and answered in order). Does not cover: checking what is in the files: the worker
hashes every byte against the manifest before the version may serve. The worker's end of a feed is
``packer/sources.py``.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from obstore.store import from_url

from packer.sources import ASK, SMALL_ASK_BYTES
from packer.types import KIB, MIB, ModelSpec, OriginFile

if TYPE_CHECKING:
    from obstore.store import RetryConfig

# One piece of a stream from control; small enough that a slow link shows progress.
PIECE_BYTES = 256 * KIB
# One range: large enough that a request's round trip is little beside it.
RANGE_BYTES = 4 * MIB
# Ranges of one file on their way or waiting to be sent, to fill a link with a long round trip: 32 MiB
# every 100 ms is 335 MB/s.
RANGES_AHEAD = 8
# Files of one load that may hold that much at the same time; a worker reads two. A small ask (header, side
# file) is beside this, one per file, so that no file's start waits for another one's end.
LARGE_ASKS_MAX = 4
# So the agent holds at most 128 MiB of one load's weights, and 1 MiB per file besides.
CONTROL_ORIGIN = "control:"
# No link may lead out of the directory, and a fifo in it must not block the node for ever.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


# A store that hiccups is asked again; one that is away is said to be before the caller's patience ends.
_RETRIES: RetryConfig = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}


class ControlFetch(Protocol):
    """Streams a range of one file of a version that control's store holds (the uplink provides it)."""

    def __call__(self, spec: ModelSpec, path: str, start: int, nbytes: int, /) -> AsyncIterator[bytes]: ...


class OriginUnavailable(Exception):
    """The origin can not be read now; the text says which file and why, and the tenant gets to see it.

    ``private`` is what only the node's log may show: addresses and directories of the operator.
    """

    def __init__(self, message: str, private: str = "") -> None:
        super().__init__(message)
        self.private = private or message


@dataclass(frozen=True, slots=True)
class OpenOrigin:
    """Descriptors by path, and the tasks that answer those that are feeds."""

    descriptors: dict[str, int] = field(default_factory=dict)
    feeds: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def failure(self) -> OriginUnavailable | None:
        """What broke off in the middle, if anything did: then a short file is not the file's fault."""
        for path, feed in self.feeds.items():
            if feed.done() and not feed.cancelled() and (error := feed.exception()):
                if isinstance(error, OriginUnavailable):
                    return error
                return OriginUnavailable(f"{path}: its origin broke off in the middle", f"{path}: {error!r}")
        return None


@asynccontextmanager
async def open_origin(
    spec: ModelSpec, fetch: ControlFetch, control_store: Path | None = None
) -> AsyncIterator[OpenOrigin]:
    """Descriptors of every file for ``packer.sources.open_source``, closed on leaving.

    ``control_store`` is control's model directory when it is on this machine: then the worker reads its
    files themselves, at twice the speed of a TLS stream and whether control is up or not.

    A worker that gets a feed sees its end early when the origin fails in the middle; its length and
    hash checks then refuse the file, and ``failure`` tells why. Raises ``OriginUnavailable``.
    """
    if spec.origin.startswith("file://"):
        origin = OpenOrigin(_open_files(spec, unquote(urlsplit(spec.origin).path)))
    elif spec.origin == CONTROL_ORIGIN and (folder := _stored(spec, control_store)) is not None:
        origin = OpenOrigin(_open_files(spec, str(folder)))
    else:
        origin = OpenOrigin()
        try:
            _open_feeds(spec, fetch, origin)
        except OSError as error:
            await _close(origin)
            raise OriginUnavailable(f"{spec.ref}: {error.strerror}") from None
    try:
        yield origin
    finally:
        await _close(origin)


async def _close(origin: OpenOrigin) -> None:
    for descriptor in origin.descriptors.values():
        os.close(descriptor)
    for feed in origin.feeds.values():
        feed.cancel()
    await asyncio.gather(*origin.feeds.values(), return_exceptions=True)


def _stored(spec: ModelSpec, control_store: Path | None) -> Path | None:
    """The version's folder in control's store, if this machine has it."""
    if control_store is None:
        return None
    folder = control_store / spec.ref.tenant / spec.ref.name / spec.ref.version
    return folder if folder.is_dir() else None


def _open_files(spec: ModelSpec, root: str) -> dict[str, int]:
    descriptors: dict[str, int] = {}
    try:
        for file in spec.files:
            descriptors[file.path] = _open_beneath(root, file.path)
            if not stat.S_ISREG(os.fstat(descriptors[file.path]).st_mode):
                raise OSError(errno.EINVAL, f"{file.path}: is not a regular file")
    except OSError as error:
        for descriptor in descriptors.values():
            os.close(descriptor)
        message = f"{spec.ref}: its origin can not be read now: {error.strerror}"
        raise OriginUnavailable(message, f"{message} (below {root})") from None
    return descriptors


def _open_beneath(root: str, path: str) -> int:
    """Open a file without following a link in any component below ``root``: it could lead out."""
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *directories, name = path.split("/")
        for directory in directories:
            inner = os.open(directory, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(name, _OPEN_FLAGS, dir_fd=at)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from None
    finally:
        os.close(at)


# --- feeds ----------------------------------------------------------------------------------------


# Gives bytes, or what has the buffer protocol.
_Fetch = Callable[[int, int], Coroutine[Any, Any, Any]]


def _open_feeds(spec: ModelSpec, fetch: ControlFetch, origin: OpenOrigin) -> None:
    large = asyncio.Semaphore(LARGE_ASKS_MAX)
    store = None if spec.origin == CONTROL_ORIGIN else _open_store(spec)
    for file in spec.files:
        ours, theirs = socket.socketpair()
        origin.descriptors[file.path] = theirs.detach()
        ours.setblocking(False)
        ranges = _from_control(spec, file, fetch) if store is None else _from_store(spec, file, store)
        origin.feeds[file.path] = asyncio.create_task(_Feed(ours, file, ranges, large).serve())
        # The task owns the socket, also if it is cancelled before its first step.
        origin.feeds[file.path].add_done_callback(partial(_close_socket, ours))


def _close_socket(ours: socket.socket, _: asyncio.Task[None]) -> None:
    ours.close()


def _open_store(spec: ModelSpec) -> Any:
    try:
        # Only an operator registers origins; plain http inside its own network is its choice.
        http = spec.origin.startswith("http://")
        return from_url(spec.origin, client_options={"allow_http": http}, retry_config=_RETRIES)
    except Exception as error:  # obstore raises several unrelated types for a URL it can not use
        raise OriginUnavailable(
            f"{spec.ref}: its origin can not be opened", f"{spec.ref}: {spec.origin}: {error}"
        ) from None


def _from_store(spec: ModelSpec, file: OriginFile, store: Any) -> _Fetch:
    async def fetch_range(start: int, nbytes: int) -> Any:
        try:
            data = await store.get_range_async(file.path, start=start, length=nbytes)
        except Exception as error:  # obstore raises several unrelated types
            raise OriginUnavailable(
                f"{spec.ref}: {file.path}: its origin does not send it now",
                f"{spec.ref}: {file.path}: {error}",
            ) from None
        return _whole(spec, file, data, start, nbytes)

    return fetch_range


def _from_control(spec: ModelSpec, file: OriginFile, fetch: ControlFetch) -> _Fetch:
    async def fetch_range(start: int, nbytes: int) -> Any:
        data = bytearray()
        async for piece in fetch(spec, file.path, start, nbytes):
            data += piece
            if len(data) > nbytes:
                break
        return _whole(spec, file, data, start, nbytes)

    return fetch_range


def _whole(spec: ModelSpec, file: OriginFile, data: Any, start: int, nbytes: int) -> Any:
    if len(data) != nbytes:
        raise OriginUnavailable(
            f"{spec.ref}: {file.path}: its origin sent {len(data)} bytes instead of the {nbytes} at {start}; "
            "has it changed since it was registered?"
        )
    return data


@dataclass(frozen=True, slots=True)
class _Range:
    """A range on its way; the last one of an ask gives back what the ask held."""

    data: asyncio.Task[Any]
    frees: asyncio.Semaphore | None


class _Feed:
    """Answers the asks on one socket, in order, until the worker closes it."""

    def __init__(
        self, ours: socket.socket, file: OriginFile, fetch: _Fetch, large: asyncio.Semaphore
    ) -> None:
        self._socket, self._file, self._fetch, self._large = ours, file, fetch, large
        self._small = asyncio.Semaphore(1)
        self._slots = asyncio.Semaphore(RANGES_AHEAD)
        # No more than there are slots, and the end.
        self._ranges: asyncio.Queue[_Range | None] = asyncio.Queue()
        self._fetches: set[asyncio.Task[Any]] = set()
        self._large_held = 0

    async def serve(self) -> None:
        """Raises what the origin does, or what is wrong with an ask."""
        asking = asyncio.create_task(self._take_asks())
        try:
            await self._send_ranges()
            await asking
        except (BrokenPipeError, ConnectionResetError):
            return  # the worker has had enough
        finally:
            tasks = (asking, *self._fetches)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._socket.close()
            for _ in range(self._large_held):
                self._large.release()

    async def _take_asks(self) -> None:
        try:
            while (ask := await self._receive()) is not None:
                start, nbytes = ask
                frees = self._small if nbytes <= SMALL_ASK_BYTES else self._large
                await frees.acquire()
                self._large_held += frees is self._large
                for at in range(start, start + nbytes, RANGE_BYTES):
                    await self._slots.acquire()
                    count = min(RANGE_BYTES, start + nbytes - at)
                    task = asyncio.create_task(self._fetch(at, count))
                    self._fetches.add(task)
                    self._ranges.put_nowait(_Range(task, frees if at + count == start + nbytes else None))
        finally:
            self._ranges.put_nowait(None)

    async def _receive(self) -> tuple[int, int] | None:
        """The next ask; None when the worker has no more."""
        loop = asyncio.get_running_loop()
        data = b""
        while len(data) < ASK.size:
            piece = await loop.sock_recv(self._socket, ASK.size - len(data))
            if not piece:
                return None
            data += piece
        start, nbytes = ASK.unpack(data)
        if nbytes == 0 or start + nbytes > self._file.size_bytes:
            raise OriginUnavailable(
                f"{self._file.path}: {nbytes} bytes at {start} were asked of {self._file.size_bytes}"
            )
        return start, nbytes

    async def _send_ranges(self) -> None:
        loop = asyncio.get_running_loop()
        while (part := await self._ranges.get()) is not None:
            await loop.sock_sendall(self._socket, await part.data)
            self._fetches.discard(part.data)
            self._slots.release()
            if part.frees is not None:
                self._large_held -= part.frees is self._large
                part.frees.release()
