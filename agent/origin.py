"""Opening the files of a model's origin for a worker to read.

Covers: ``file://`` and control's store on this very machine (the worker gets the files themselves), every
other store that ``obstore`` knows and control's store elsewhere (pipes that are fed from here). Does not
cover: checking what is in the files: the worker hashes every byte against the manifest before the version
may serve.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.store import from_url

from packer.types import KIB, MIB, ModelSpec, OriginFile

# The kernel's usual ceiling for an unprivileged pipe; a larger pipe means fewer wake-ups per byte.
PIPE_BYTES = 1 * MIB
# One read of a remote origin; small enough that a slow link shows progress, large enough to be cheap.
PIECE_BYTES = 256 * KIB
CONTROL_ORIGIN = "control:"
# No link may lead out of the directory, and a fifo in it must not block the node for ever.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# Opens a stream of one file of a version that control's store holds (the uplink provides it).
ControlFetch = Callable[[ModelSpec, str], AsyncIterator[bytes]]


class OriginUnavailable(Exception):
    """The origin can not be read now; the text says which file and why, and the tenant gets to see it.

    ``private`` is what only the node's log may show: addresses and directories of the operator.
    """

    def __init__(self, message: str, private: str = "") -> None:
        super().__init__(message)
        self.private = private or message


@dataclass(frozen=True, slots=True)
class OpenOrigin:
    """Descriptors by path, and the pumps that feed those that are pipes."""

    descriptors: dict[str, int]
    pumps: dict[str, asyncio.Task[None]]

    def failure(self) -> OriginUnavailable | None:
        """What broke off in the middle, if anything did: then a short file is not the file's fault."""
        for path, pump in self.pumps.items():
            if pump.done() and not pump.cancelled() and (error := pump.exception()):
                if isinstance(error, OriginUnavailable):
                    return error
                return OriginUnavailable(f"{path}: its origin broke off in the middle", f"{path}: {error!r}")
        return None


@asynccontextmanager
async def open_origin(
    spec: ModelSpec, fetch: ControlFetch, control_store: Path | None = None
) -> AsyncIterator[OpenOrigin]:
    """Descriptors of every file, readable from first byte to last, closed on leaving.

    ``control_store`` is control's model directory when it is on this machine: then the worker reads its
    files themselves, at twice the speed of a TLS stream and whether control is up or not.

    A worker that gets a pipe sees its end early when the origin fails in the middle; its length and
    hash checks then refuse the file, and ``failure`` tells why. Raises ``OriginUnavailable``.
    """
    descriptors: dict[str, int] = {}
    pumps: dict[str, asyncio.Task[None]] = {}
    writers: list[FileIO] = []
    if spec.origin.startswith("file://"):
        descriptors = _open_files(spec, unquote(urlsplit(spec.origin).path))
    elif spec.origin == CONTROL_ORIGIN and (folder := _stored(spec, control_store)) is not None:
        descriptors = _open_files(spec, str(folder))
    else:
        try:
            for file in spec.files:
                reader, descriptor = os.pipe2(os.O_CLOEXEC)
                descriptors[file.path] = reader
                writer = FileIO(descriptor, "w")
                writers.append(writer)
                # A user may own few large pipes; a small one is only slower.
                with suppress(PermissionError):
                    fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                stream = fetch(spec, file.path) if spec.origin == CONTROL_ORIGIN else _read_store(spec, file)
                pumps[file.path] = asyncio.create_task(_pump(stream, writer))
        except OSError as error:
            await _stop(pumps, descriptors, writers)
            raise OriginUnavailable(f"{spec.ref}: {error.strerror}") from None
    try:
        yield OpenOrigin(descriptors, pumps)
    finally:
        await _stop(pumps, descriptors, writers)


async def _stop(
    pumps: dict[str, asyncio.Task[None]], descriptors: dict[str, int], writers: list[FileIO]
) -> None:
    # Readers close first: a pump that is blocked in a full pipe then gets EPIPE and ends.
    for descriptor in descriptors.values():
        os.close(descriptor)
    for pump in pumps.values():
        pump.cancel()
    try:
        await asyncio.gather(*pumps.values(), return_exceptions=True)
    finally:
        for writer in writers:
            writer.close()  # a pump that was cancelled before its first step never came to close its own


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


async def _read_store(spec: ModelSpec, file: OriginFile) -> AsyncIterator[bytes]:
    store = from_url(spec.origin)
    answer = await store.get_async(file.path)
    async for piece in answer.stream(min_chunk_size=PIECE_BYTES):
        yield bytes(piece)


async def _pump(stream: AsyncIterator[bytes], writer: FileIO) -> None:
    """Copy a stream into a pipe; ends early and quietly when either side goes away."""
    loop = asyncio.get_running_loop()
    descriptor = writer.fileno()
    os.set_blocking(descriptor, False)
    try:
        async for piece in stream:
            view = memoryview(piece)
            while view:
                try:
                    view = view[os.write(descriptor, view) :]
                except BlockingIOError:
                    await _writable(loop, descriptor)
    except BrokenPipeError:
        return
    finally:
        writer.close()


async def _writable(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)
