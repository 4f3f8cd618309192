"""Fetching packs from other nodes of the cluster, verbatim and sealed.

Covers: several connections that each bring ranges of one pack into a file, going on elsewhere when a node
breaks off, being told the data key, and looking into what came before anybody trusts it. Does not cover:
who has it (control says so), calling one (``agent/peer_calls.py``), publishing it or keeping its key
(``agent/sources.py``).

No peer is believed. That it is the node it should be is proven by its certificate before it is asked
anything; that the pack is the one that it announced, by the tags in it, which bind tenant, name and version.
A node that sends garbage costs time. One that made a pack of its own is not found out here: what the plan
has digests of is compared by ``agent/sources.py``.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from agent.peer_calls import ANSWER_S, Later, PeerCalls, PeerFailed
from agent.peer_http import PIECE_BYTES, BadHead, Connection, parse_content_range
from packer.holes import Range, ranges_in
from packer.identity import Identity
from packer.index import HEADER_BYTES, PackError
from packer.pack import PackReader
from packer.seal import KEY_BYTES, SALT_BYTES
from packer.types import MIB, HostSizes, ModelRef
from packer.wire import PeerSpec

log = logging.getLogger("bunk.peers")

T = TypeVar("T")

# What one ask brings, and connections of one fetch: enough that encryption runs on several cores and that a
# round trip is small beside a range; a node gives one other node twelve connections.
RANGE_BYTES = 8 * MIB
STREAMS = 4
# Packs fetched at one time; more would only share the same link and disk.
FETCHES_MAX = 2
# Single extents fetched at one time, for repairs.
EXTENTS_MAX = 2
READ_BYTES_S_LEAST = 1 * MIB
# A fetch that nobody has sent a byte to for this long has failed, however politely all say "later".
STALL_S = 20.0
# The same for one that goes on and on: as long as any load may take. A peer that sends drop by drop must not
# keep a model away that its origin would give.
FETCH_S_MAX = 1_800.0
# Connections to one peer that may break off during one fetch before it is given up.
BREAKS_MAX = 3


SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


@dataclass(frozen=True, slots=True)
class FetchedPack:
    """A pack whose own file lies complete in the caller's; its header and index are authentic. ``bases``: the
    salts of other files that extents of it lie in, and which parts of these it needs."""

    data_key: bytes = field(repr=False)
    disk_bytes: int
    salt: bytes
    host: HostSizes
    peers: tuple[str, ...]  # nodes that gave a part of it, first the one that named the key
    fetch_ms: int
    bases: tuple[tuple[bytes, tuple[Range, ...]], ...] = ()
    deduplicated_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Described:
    peer: PeerSpec
    key: bytes = field(repr=False)
    tag: str
    size: int


class _Job:
    """What the threads of one fetch share."""

    def __init__(self, described: _Described, path: str, fd: int, peers: Sequence[PeerSpec]) -> None:
        self.described = described
        self.path = path
        self.fd = fd
        self.lock = threading.Lock()
        self.usable = list(peers)
        self.breaks: dict[str, int] = {}
        self.gave: dict[str, None] = {described.peer.node: None}
        starts = range(0, described.size, RANGE_BYTES)
        self.ranges = deque((at, min(at + RANGE_BYTES, described.size)) for at in starts)
        self.left_bytes = described.size
        self.began_s = self.moved_s = time.monotonic()
        self.failed = False

    def next_range(self) -> tuple[int, int] | None:
        with self.lock:
            return self.ranges.popleft() if self.ranges and not self.failed else None

    def put_back(self, start: int, end: int) -> None:
        if start < end:
            with self.lock:
                self.ranges.appendleft((start, end))

    def moved(self, nbytes: int) -> None:
        with self.lock:
            self.left_bytes -= nbytes
            self.moved_s = time.monotonic()

    def stalled(self) -> bool:
        now_s = time.monotonic()
        return now_s - self.moved_s > STALL_S or now_s - self.began_s > FETCH_S_MAX

    def lose(self, peer: PeerSpec, failed: PeerFailed) -> bool:
        """A connection is lost, and with it perhaps the peer: true then."""
        with self.lock:
            self.breaks[peer.node] = self.breaks.get(peer.node, 0) + 1
            if failed.broke and self.breaks[peer.node] < BREAKS_MAX:
                return False
            self.usable = [other for other in self.usable if other.node != peer.node]
            return True

    def peer_for(self, turn: int) -> PeerSpec | None:
        """The first one for all connections, as long as it can: then it is clear whose copy was bad."""
        with self.lock:
            return self.usable[turn % len(self.usable)] if self.usable else None


class PeerFetch:
    """Fetches on threads of its own. ``close`` ends what runs."""

    def __init__(self, identity: Identity) -> None:
        self._calls = PeerCalls(identity)
        self._threads = ThreadPoolExecutor(
            FETCHES_MAX * (STREAMS + 1) + EXTENTS_MAX, thread_name_prefix="peer-fetch"
        )
        self._fetches = asyncio.Semaphore(FETCHES_MAX)
        self._extents = asyncio.Semaphore(EXTENTS_MAX)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.fetched_bytes = 0

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    # --- what callers use -------------------------------------------------------------------------

    async def fetch_pack(
        self, ref: ModelRef, peers: Sequence[PeerSpec], fd: int, limit_bytes: int
    ) -> FetchedPack | None:
        """Bring the whole pack into ``fd`` (open to read and write, empty); None when no peer could give a
        good one. Cancelling ends the transfer before it returns. Raises ``OSError`` when the file can not
        be written."""
        async with self._fetches:
            return await self._on_thread(lambda cancel: self._fetch(ref, peers, fd, limit_bytes, cancel))

    async def fetch_extent(
        self,
        ref: ModelRef,
        peers: Sequence[PeerSpec],
        salt: bytes,
        offset: int,
        nbytes: int,
        base: int | None = None,
    ) -> bytes | None:
        """A piece of the very file with this salt, the pack or what it keeps for this base, as it lies on a
        peer's disk; None when nobody gives it. Whoever asked checks its tags."""
        wanted = (offset, offset + nbytes)
        path = _path(ref) + ("" if base is None else f"/base-{base}")
        async with self._extents:
            return await self._on_thread(
                lambda cancel: self._fetch_extent(ref, peers, salt, wanted, path, cancel)
            )

    def refuse(self, ref: ModelRef, peers: Sequence[str]) -> None:
        """See ``PeerCalls.refuse``."""
        self._calls.refuse(ref, peers)

    async def _on_thread(self, work: Callable[[Callable[[], bool]], T]) -> T:
        """Run blocking work that looks at ``cancel`` often; returns only when it has ended."""
        cancelled = threading.Event()
        future = self._threads.submit(work, lambda: cancelled.is_set() or self._closing.is_set())
        waits = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waits)
        except asyncio.CancelledError:
            cancelled.set()
            # The caller closes its file next: nobody may write to that number any more.
            while not waits.done():
                with suppress(asyncio.CancelledError, Exception):
                    await asyncio.shield(waits)
            raise

    # --- a whole pack -----------------------------------------------------------------------------

    def _fetch(
        self,
        ref: ModelRef,
        peers: Sequence[PeerSpec],
        fd: int,
        limit_bytes: int,
        cancel: Callable[[], bool],
    ) -> FetchedPack | None:
        left = self._calls.usable(ref, peers)
        while left:
            described = self._describe(ref, left, limit_bytes, cancel)
            if described is None:
                return None
            others = [peer for peer in left if peer.node != described.peer.node]
            job = _Job(described, _path(ref), fd, [described.peer, *others])
            os.ftruncate(fd, 0)
            # Also the way to learn of a full disk before the first byte has come.
            os.posix_fallocate(fd, 0, described.size)
            if self._transfer(job, cancel):
                os.fsync(fd)
                fetched = self._examine(ref, job)
                if fetched is not None:
                    return fetched
                self._calls.refuse(ref, tuple(job.gave))
            left = [peer for peer in self._calls.usable(ref, others) if not cancel()]
        return None

    def _describe(
        self, ref: ModelRef, peers: Sequence[PeerSpec], limit_bytes: int, cancel: Callable[[], bool]
    ) -> _Described | None:
        """The first peer that has an acceptable pack, with the pack's key, size and entity tag."""
        waiting = deque(peers)
        until_s = time.monotonic() + STALL_S
        while waiting and time.monotonic() < until_s and not cancel():
            peer = waiting.popleft()
            try:
                connection = self._calls.connect(peer, cancel)
                with connection.tls:
                    described = self._read_key(connection, peer, _path(ref))
            except PeerFailed as error:
                if not cancel() and (error.dead or error.broke):
                    self._calls.bury(peer, error)
                log.info("pack of %s: node %s: %s", ref, peer.node, error)
                continue
            except Later as later:
                self._closing.wait(later.wait_s)
                waiting.append(peer)
                continue
            if not HEADER_BYTES < described.size <= limit_bytes:
                log.warning(
                    "pack of %s on %s has %d bytes, the limit is %d",
                    ref,
                    peer.node,
                    described.size,
                    limit_bytes,
                )
                continue
            return described
        return None

    def _read_key(self, connection: Connection, peer: PeerSpec, path: str) -> _Described:
        head, length = self._calls.ask(connection, f"{path}/key", {})
        size, tag = head.headers.get("x-pack-bytes", ""), head.headers.get("etag", "")
        if length != KEY_BYTES or not size.isdecimal() or len(size) > 18 or not _salt(tag):
            raise PeerFailed("an answer that is none", dead=True)
        key = bytearray(KEY_BYTES)
        self._calls.read_body(connection, memoryview(key), time.monotonic() + ANSWER_S)
        return _Described(peer, bytes(key), tag, int(size))

    def _transfer(self, job: _Job, cancel: Callable[[], bool]) -> bool:
        """Bring all ranges in over several connections; True when none is missing."""
        streams = min(STREAMS, len(job.ranges))
        done = [self._threads.submit(self._stream, job, cancel) for _ in range(streams)]
        # An error of the disk leaves by here, once no thread writes any more.
        errors = [future.exception() for future in done]
        for error in errors:
            if error is not None:
                raise error
        return job.left_bytes == 0

    def _stream(self, job: _Job, cancel: Callable[[], bool]) -> None:
        """One connection after the other, each for as many ranges as it gives."""
        turn = 0
        piece = memoryview(bytearray(PIECE_BYTES))
        try:
            while job.left_bytes and not job.failed and not cancel():
                peer = job.peer_for(turn)
                if peer is None or job.stalled():
                    job.failed = True
                    return
                try:
                    connection = self._calls.connect(peer, cancel)
                    with connection.tls:
                        job.gave[peer.node] = None
                        if self._ranges(job, connection, piece, cancel):
                            return
                except PeerFailed as error:
                    if not cancel() and job.lose(peer, error) and (error.dead or error.broke):
                        self._calls.bury(peer, error)
                except Later as later:
                    self._closing.wait(later.wait_s)
                    turn += 1  # perhaps another one has time
        except BaseException:
            job.failed = True
            raise

    def _ranges(
        self, job: _Job, connection: Connection, piece: memoryview, cancel: Callable[[], bool]
    ) -> bool:
        """Ranges over one connection until there are none; False when cancelled, or too late."""
        while not cancel() and not job.stalled():
            taken = job.next_range()
            if taken is None:
                return True
            start, end = taken
            try:
                start = self._one_range(job, connection, piece, start, end, cancel)
            except _Broken as broken:
                start = broken.at
                if not isinstance(broken.why, Later) or broken.why.closed or job.stalled():
                    raise broken.why from None
                self._closing.wait(broken.why.wait_s)
            finally:
                job.put_back(start, end)
        return False

    def _one_range(
        self,
        job: _Job,
        connection: Connection,
        piece: memoryview,
        start: int,
        end: int,
        cancel: Callable[[], bool],
    ) -> int:
        """Bring one range in; returns where it ended. Raises ``_Broken`` with what came before it broke."""
        at = start
        try:
            asked = {"Range": f"bytes={start}-{end - 1}", "If-Match": job.described.tag}
            head, length = self._calls.ask(connection, job.path, asked)
            given = parse_content_range(head.headers.get("content-range"))
            right = (start, end, job.described.size)
            if given != right or length != end - start or head.headers.get("etag") != job.described.tag:
                raise PeerFailed("sends something else than was asked for", dead=True)
            until_s = time.monotonic() + ANSWER_S + length / READ_BYTES_S_LEAST
            while at < end and not cancel():
                part = piece[: end - at]
                filled = 0
                # Small records are gathered, so that the file is written in large pieces.
                while filled < len(part):
                    filled += connection.read_into(part[filled:], until_s)
                _write(job.fd, part, at)
                at += filled
                job.moved(filled)
            _begin_writeback(job.fd, start, at - start)
        except (PeerFailed, Later) as error:
            raise _Broken(at, error) from None
        except _DiskFailed as error:
            raise error.why from None
        except (OSError, BadHead) as error:
            raise _Broken(at, PeerFailed(f"{type(error).__name__}: {error}", broke=True)) from None
        finally:
            with self._lock:
                self.fetched_bytes += at - start
        return at

    def _examine(self, ref: ModelRef, job: _Job) -> FetchedPack | None:
        """Header and index are checked completely here; every chunk is when it is restored."""
        described = job.described
        try:
            reader = PackReader(job.fd, described.key, ref, bases=None)
            if reader.salt != _salt(described.tag):
                raise PackError("is not the pack that was announced")
            host, index = reader.host_sizes, reader.index
            bases = tuple((base.salt, tuple(ranges_in(index, base.salt))) for base in index.bases)
        except PackError as error:
            log.error("refused the pack of %s from %s: %s", ref, ", ".join(job.gave), error)
            return None
        fetch_ms = round((time.monotonic() - job.began_s) * 1000)
        return FetchedPack(
            described.key,
            described.size,
            reader.salt,
            host,
            tuple(job.gave),
            fetch_ms,
            bases,
            index.deduplicated_bytes,
        )

    # --- one extent -------------------------------------------------------------------------------

    def _fetch_extent(
        self,
        ref: ModelRef,
        peers: Sequence[PeerSpec],
        salt: bytes,
        wanted: tuple[int, int],
        path: str,
        cancel: Callable[[], bool],
    ) -> bytes | None:
        start, end = wanted
        if not 0 <= start < end or end - start > RANGE_BYTES:
            raise ValueError(f"an extent of {end - start} bytes; 1 to {RANGE_BYTES} can be fetched")
        tag = f'"{salt.hex()}"'
        for peer in self._calls.usable(ref, peers):
            if cancel():
                break
            try:
                connection = self._calls.connect(peer, cancel)
                with connection.tls:
                    asked = {"Range": f"bytes={start}-{end - 1}", "If-Match": tag}
                    head, length = self._calls.ask(connection, path, asked)
                    given = parse_content_range(head.headers.get("content-range"))
                    if given is None or given[:2] != wanted or length != end - start:
                        raise PeerFailed("sends something else than was asked for", dead=True)
                    data = bytearray(length)
                    self._calls.read_body(connection, memoryview(data), time.monotonic() + ANSWER_S)
                    with self._lock:
                        self.fetched_bytes += length
                    return bytes(data)
            except PeerFailed as error:
                if not cancel() and (error.dead or error.broke):
                    self._calls.bury(peer, error)
            except Later:
                continue
        return None


class _Broken(Exception):
    """A range broke off; what lies before ``at`` is in the file."""

    def __init__(self, at: int, why: PeerFailed | Later) -> None:
        super().__init__(str(why))
        self.at = at
        self.why = why


class _DiskFailed(Exception):
    """Our own file can not be written: no peer's fault."""

    def __init__(self, why: OSError) -> None:
        super().__init__(str(why))
        self.why = why


def _write(fd: int, data: memoryview, offset: int) -> None:
    try:
        while data:
            count = os.pwrite(fd, data, offset)
            data, offset = data[count:], offset + count
    except OSError as error:
        raise _DiskFailed(error) from None


def _begin_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Have the disk write this now, so that the fsync at the end finds little left. Only a hint."""
    if _sync_file_range is not None and nbytes:
        _sync_file_range(fd, offset, nbytes, SYNC_FILE_RANGE_WRITE)


def _path(ref: ModelRef) -> str:
    return f"/peer/v1/packs/{ref.tenant}/{ref.name}/{ref.version}"


def _salt(tag: str) -> bytes:
    """The salt in an entity tag; empty when it is none."""
    with suppress(ValueError):
        salt = bytes.fromhex(tag.strip('"'))
        if f'"{salt.hex()}"' == tag and len(salt) == SALT_BYTES:
            return salt
    return b""
