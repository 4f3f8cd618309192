"""Where a pack that is not on this node comes from: another node of the cluster, or the origin.

Covers: asking control, waiting while another node reads the origin for all, fetching from who has it and
making that pack this node's own, keeping the turn at the origin while it is read. Does not cover: the
transfer (``agent/peer_fetch.py``), reading the origin (``agent/orders.py``), deciding whose turn it is
(control).

Availability comes before economy: when control is away, when nobody gives the pack, or when waiting takes
too long, the origin is read.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.background import Background
from agent.journal import JournalFailed, PackRow
from agent.journal_thread import JournalThread
from agent.packs import PackDirectory
from agent.peer_fetch import FETCH_S_MAX, RANGE_BYTES, FetchedPack, PeerFetch
from packer.durable import sync_folder
from packer.index import BASES_MAX, HEADER_BYTES, PackError, decode_header
from packer.layout import IMAGE_BYTES_MAX
from packer.origin_headers import ORIGIN_HEADERS
from packer.pack import PackReader
from packer.pack_file import base_name
from packer.types import MIB, ModelRef, OriginFile
from packer.wire import PEERS_TRIED_MAX, OriginTurn, PeerSpec, SourcesAnswer

log = logging.getLogger("bunk.peers")

# How long to wait for another node that reads the origin: half a minute, and what its load may well take.
WAIT_S = 30.0
WAIT_BYTES_S = 500 * MIB
WAIT_S_MAX = 120.0
# The size of a file of which parts are fetched: no pack is larger. It takes only what is written.
FILE_BYTES_MAX = 2 * IMAGE_BYTES_MAX
# One question to control is held open for at most this long.
ASK_WAIT_MS = 20_000
# Control may answer at once that there is nothing yet, when it stops for example.
ASK_AGAIN_S = 0.2
# A turn at the origin is not asked for again after this: as long as any load may take.
TURN_S_MAX = 1_800.0
RENEW_S_LEAST = 1.0
# A report that says what this node has is with control by then, unless control is away.
REPORTED_S = 3.0


class ControlAway(Exception):
    """Control does not answer, or not this."""


class AskControl(Protocol):
    """``agent.uplink.Uplink.sources``. Raises ``ControlAway``."""

    async def __call__(
        self, ref: ModelRef, wait_ms: int, failed: Sequence[str] = (), *, ended: bool = False
    ) -> SourcesAnswer: ...


class Lender(Protocol):
    """``agent.holdings.Holdings``."""

    def borrow(self, ref: ModelRef, salt: bytes, link: Path) -> bool:
        """Give the file of the tenant with this salt another name, if it is here."""

    async def repay(self, ref: ModelRef) -> None:
        """The names are in the books now, or gone."""


@dataclass(slots=True)
class Obtained:
    """``pack``: it is on disk, published, and its key in the journal. None: the origin is to be read, and
    ``end`` to be called when that is over, whatever came of it."""

    pack: FetchedPack | None
    _end: Callable[[bool], None] = lambda packed: None

    def end(self, packed: bool) -> None:
        """``packed``: this node has the pack now, or soon says so itself. May be called again."""
        end, self._end = self._end, lambda packed: None
        end(packed)


class Sources:
    """``ask`` None: a node without control, which reads origins only."""

    def __init__(
        self,
        ask: AskControl | None,
        fetch: PeerFetch,
        packs: PackDirectory,
        journal: JournalThread,
        clock_ms: Callable[[], int],
        wanted: Callable[[ModelRef], bool],
    ) -> None:
        self._ask = ask
        self._fetch = fetch
        self._packs = packs
        self._journal = journal
        self._clock_ms = clock_ms
        self._wanted = wanted
        # Told what is worth a record: the kind, whose pack, what happened.
        self.note: Callable[[str, ModelRef, str], None] = lambda kind, ref, detail: None
        # Has files of the tenant that are here already; None: nothing is.
        self.lender: Lender | None = None
        # The files that the plan names for a version; None: it is in no plan.
        self.files_of: Callable[[ModelRef], Sequence[OriginFile] | None] = lambda ref: None
        self._background = Background()

    async def close(self) -> None:
        await self._background.close()
        await asyncio.to_thread(self._fetch.close)

    def refuse(self, ref: ModelRef, pack: FetchedPack, why: str = "corrupt") -> None:
        """A pack that came from peers turned out bad: it is not fetched from them for a while."""
        self.note("pack_refused", ref, f"{why}, from {', '.join(pack.peers)}")
        self._fetch.refuse(ref, pack.peers)

    async def obtain(self, ref: ModelRef, limit_bytes: int) -> Obtained:
        """The pack of ``ref``, of at most ``limit_bytes``, from a peer; or leave to read the origin."""
        if self._ask is None:
            return Obtained(None)
        wait_s = min(WAIT_S_MAX, WAIT_S + limit_bytes / WAIT_BYTES_S)
        until_s = asyncio.get_running_loop().time() + wait_s
        failed: list[str] = []
        while True:
            left_s = until_s - asyncio.get_running_loop().time()
            if left_s <= 0 or len(failed) > PEERS_TRIED_MAX:
                log.info("pack of %s: nobody gave it in %.0f s; reading the origin", ref, wait_s)
                return Obtained(None)
            try:
                answer = await self._ask(ref, min(ASK_WAIT_MS, int(left_s * 1000)), failed[:PEERS_TRIED_MAX])
            except ControlAway as error:
                log.info("pack of %s: %s; reading the origin", ref, error)
                return Obtained(None)
            if answer.origin is OriginTurn.GRANTED:
                return Obtained(None, self._hold_turn(ref, answer.wait_ms))
            if not answer.peers:
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            try:
                pack = await self._fetch_from(ref, answer.peers, limit_bytes)
            except OSError as error:
                log.warning("pack of %s: %s; reading the origin", ref, error)
                return Obtained(None)
            if pack is not None:
                return Obtained(pack)
            failed += [peer.node for peer in answer.peers]

    async def fetch_extent(self, ref: ModelRef, salt: bytes, offset: int, nbytes: int) -> bytes | None:
        """A piece of the pack with this salt from whoever has it, for a repair; the caller checks it."""
        if self._ask is None:
            return None
        try:
            answer = await self._ask(ref, 0, ended=True)
        except ControlAway:
            return None
        return await self._fetch.fetch_extent(ref, answer.peers, salt, offset, nbytes)

    # --- from a peer ------------------------------------------------------------------------------

    async def _fetch_from(
        self, ref: ModelRef, peers: Sequence[PeerSpec], limit_bytes: int
    ) -> FetchedPack | None:
        """Fetch, publish, and keep the key under this node's own. Raises ``OSError``."""
        limit_bytes = min(limit_bytes, self._packs.free_bytes())
        path = self._packs.path(ref)
        # Not the name of a pack in the making: an interrupted load may go on from that one.
        arriving = path.with_name(path.name + ".peer")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags, adopted = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, False
        descriptor = os.open(arriving, flags, 0o600)
        try:
            try:
                pack = await self._fetch.fetch_pack(ref, peers, descriptor, limit_bytes)
                files = self.files_of(ref)
                if pack is not None and files is not None:
                    wrong = await asyncio.to_thread(_wrong_file, descriptor, pack.data_key, ref, files)
                    if wrong is not None:
                        self.refuse(ref, pack, wrong)
                        return None
            finally:
                os.close(descriptor)
            if pack is None or not self._wanted(ref):
                return None
            # As long as all of a pack may take: each part alone is quick, but there may be very many.
            try:
                async with asyncio.timeout(FETCH_S_MAX):
                    if not await self._bring_bases(ref, pack, peers, limit_bytes, arriving):
                        return None
            except TimeoutError:
                self.refuse(ref, pack, f"its parts take more than {FETCH_S_MAX:g} s")
                return None
            await self._adopt(ref, pack, arriving, path)
            adopted = True
        finally:
            if not adopted and self.lender is not None:
                await self.lender.repay(ref)
            for left in (arriving, *(_base(arriving, number) for number in range(BASES_MAX))):
                with suppress(FileNotFoundError):
                    left.unlink()
        told = f"{pack.disk_bytes} bytes from {', '.join(pack.peers)}"
        log.info("pack of %s: %s", ref, told)
        self.note("pack_fetched", ref, f"{told} in {pack.fetch_ms} ms")
        return pack

    async def _bring_bases(
        self, ref: ModelRef, pack: FetchedPack, peers: Sequence[PeerSpec], limit_bytes: int, arriving: Path
    ) -> bool:
        """Have what the pack needs of other files beside it: files that are here already, or those parts from
        peers. False when nobody gives them. Raises ``OSError``."""
        needed_bytes = sum(HEADER_BYTES + end - start for _, ranges in pack.bases for start, end in ranges)
        if pack.disk_bytes + needed_bytes > limit_bytes:
            self.refuse(ref, pack, f"its parts take more than {limit_bytes} bytes")
            return False
        started = asyncio.get_running_loop().time()
        for number, (salt, ranges) in enumerate(pack.bases):
            into = _base(arriving, number)
            if self.lender is not None and self.lender.borrow(ref, salt, into):
                continue
            with into.open("xb") as file:
                os.chmod(into, 0o600)
                for start, end in ((0, HEADER_BYTES), *ranges):
                    for at in range(start, end, RANGE_BYTES):
                        size = min(RANGE_BYTES, end - at)
                        data = await self._fetch.fetch_extent(ref, peers, salt, at, size, number)
                        if data is None:
                            return False
                        if at == 0:
                            await asyncio.to_thread(os.ftruncate, file.fileno(), _file_bytes(data, salt))
                        await asyncio.to_thread(os.pwrite, file.fileno(), data, at)
                await asyncio.to_thread(os.fsync, file.fileno())
        log.info(
            "pack of %s: %d parts in other files, %.1f s",
            ref,
            sum(len(ranges) for _, ranges in pack.bases),
            asyncio.get_running_loop().time() - started,
        )
        return True

    async def _adopt(self, ref: ModelRef, pack: FetchedPack, arriving: Path, path: Path) -> None:
        journal = self._journal.journal
        _, wrapped = await self._journal.call(journal.wrap_data_key, ref, pack.data_key)

        def publish() -> None:
            for number in range(len(pack.bases)):
                os.replace(_base(arriving, number), self._packs.base_path(ref, number))
            os.replace(arriving, path)
            sync_folder(path.parent)

        # The file first: a crash in between leaves one that the next start sweeps.
        await asyncio.to_thread(publish)
        row = PackRow(ref, pack.disk_bytes, pack.host.stored_bytes, pack.host, pack.deduplicated_bytes)
        try:
            await self._journal.call(journal.add_pack, row, wrapped, self._clock_ms(), False)
        except JournalFailed:
            self._packs.drop(ref)
            raise
        # What an interrupted load left is of no use any more; the row above took its key away.
        self._packs.abandon(ref)

    # --- a turn at the origin ---------------------------------------------------------------------

    def _hold_turn(self, ref: ModelRef, wait_ms: int) -> Callable[[bool], None]:
        """Keep the turn until the function returned here is called."""
        holding = self._background.start(self._renew(ref, wait_ms))

        def end(packed: bool) -> None:
            holding.cancel()
            # With a pack, this node's next report ends the turn; ended before it, another would read. A pack
            # that was dropped at once is in no report, and nobody shall wait for it.
            self._background.start(self._give_back(ref, REPORTED_S if packed else 0.0))

        return end

    async def _renew(self, ref: ModelRef, wait_ms: int) -> None:
        assert self._ask is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(TURN_S_MAX):
                while True:
                    await asyncio.sleep(max(RENEW_S_LEAST, wait_ms / 1000))
                    with suppress(ControlAway):
                        wait_ms = (await self._ask(ref, 0)).wait_ms

    async def _give_back(self, ref: ModelRef, after_s: float) -> None:
        assert self._ask is not None
        await asyncio.sleep(after_s)
        with suppress(ControlAway):  # then it ends by itself
            await self._ask(ref, 0, ended=True)


def _base(arriving: Path, number: int) -> Path:
    return arriving.with_name(base_name(arriving.name, number))


def _file_bytes(page: bytes, salt: bytes) -> int:
    """The size of the file that this is the header of. Raises ``OSError`` when it is not that of the file."""
    size = int.from_bytes(page[64:72], "little")
    try:
        header = decode_header(page, size)
    except PackError as error:
        raise OSError(f"a peer sent another file: {error}") from None
    if header.salt != salt or not header.sealed or size > FILE_BYTES_MAX:
        raise OSError("a peer sent another file than the pack names")
    return size


def _wrong_file(descriptor: int, key: bytes, ref: ModelRef, files: Sequence[OriginFile]) -> str | None:
    """What in a fetched pack is not of the registered version, as far as that can be told.

    Whoever has a pack's key can make another pack with it, tags and all, so what the plan has a digest of is
    compared: every file that is parsed. Weights have none but that of their whole file.
    """
    try:
        reader = PackReader(descriptor, key, ref, bases=None)
        side_files = {file.path: file.sha256.lower() for file in files if not _is_weights(file)}
        if {path for path, _ in reader.index.files} - {ORIGIN_HEADERS} != set(side_files):
            return "other files than registered"
        for path, sha256 in side_files.items():
            if hashlib.sha256(reader.file(path)).hexdigest() != sha256:
                return f"{path} is not the registered one"
    except PackError as error:
        return str(error)[:200]
    return None


def _is_weights(file: OriginFile) -> bool:
    return file.path.endswith(".safetensors")
