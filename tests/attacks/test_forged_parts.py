"""Threat: a peer whose pack refers to other files, and who sends something else for them.

What it sends is taken only into files of the asking node's own making, of the size and identity that the pack
names, within the room kept for the pack; nothing of it is used before its tags. Covers: other files, other
sizes, refusals, too much. Does not cover: the listener (``test_peer_listener``), indexes
(``test_hostile_bases``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from base_samples import KEYS, base, pack_file, ref, version_of, write

from agent.journal import open_journal
from agent.journal_thread import JournalThread
from agent.packs import PackDirectory
from agent.peer_fetch import FetchedPack
from agent.sources import Sources
from packer.holes import ranges_in
from packer.index import HEADER_BYTES
from packer.pack import PackReader, read_header
from packer.types import MIB, HostSizes, ModelRef
from packer.wire import WIRE_VERSION, OriginTurn, PeerSpec, SourcesAnswer

REF = ref("b")
PEER = PeerSpec("liar", "https://192.0.2.1:1", "0" * 64)
Forge = Callable[[bytes, int, int], bytes | None]


class OnePeer:
    """Gives a good pack, and for the file that it refers to what ``forge`` makes of it."""

    def __init__(self, forge: Forge) -> None:
        self.forge = forge
        self.refused: list[str] = []
        with pack_file() as a, pack_file() as b:
            write(a, version_of(1, 2), "a")
            write(b, version_of(1, 3), "b", [base(a, "a")])
            self.base, self.pack = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in (a, b))
            index = PackReader(b, KEYS["b"], bases=None).index
            self.salt = read_header(a).salt
            self.fetched = FetchedPack(
                KEYS["b"],
                len(self.pack),
                read_header(b).salt,
                HostSizes(1, 1, 1),
                ("liar",),
                1,
                ((self.salt, tuple(ranges_in(index, self.salt))),),
                MIB,
            )

    async def fetch_pack(self, whose: ModelRef, peers: object, fd: int, limit: int) -> FetchedPack | None:
        if self.refused:
            return None
        os.pwrite(fd, self.pack, 0)
        return self.fetched

    async def fetch_extent(
        self, whose: ModelRef, peers: object, salt: bytes, offset: int, nbytes: int, number: int
    ) -> bytes | None:
        assert (salt, number) == (self.salt, 0)
        return self.forge(self.base, offset, nbytes)

    def refuse(self, whose: ModelRef, peers: tuple[str, ...]) -> None:
        self.refused += peers

    def close(self) -> None:
        pass


@pytest_asyncio.fixture
async def journal(tmp_path: Path) -> AsyncIterator[JournalThread]:
    thread = JournalThread(open_journal(tmp_path))
    yield thread
    thread.close()


async def ask(whose: ModelRef, wait_ms: int, failed: object = (), *, ended: bool = False) -> SourcesAnswer:
    if failed:
        return SourcesAnswer(WIRE_VERSION, OriginTurn.GRANTED, (), 10_000)
    return SourcesAnswer(WIRE_VERSION, OriginTurn.WAIT, (PEER,), 10_000)


async def obtained(tmp_path: Path, journal: JournalThread, peer: OnePeer, limit: int = 64 * MIB) -> bool:
    packs = PackDirectory(tmp_path / "packs")
    sources = Sources(ask, peer, packs, journal, lambda: 1, lambda whose: True)  # type: ignore[arg-type]
    got = await sources.obtain(REF, limit)
    await sources.close()
    names = sorted(path.name for path in (tmp_path / "packs").rglob("*.*") if path.is_file())
    own = packs.path(REF).name
    assert names == ([own, f"{own}.base-0"] if got.pack is not None else [])
    return got.pack is not None


def honest(data: bytes, offset: int, nbytes: int) -> bytes:
    return data[offset : offset + nbytes]


async def test_honest_parts_are_taken_and_no_others(tmp_path: Path, journal: JournalThread) -> None:
    """Of the other file only what the pack needs is asked for."""
    asked: list[tuple[int, int]] = []

    def note(data: bytes, offset: int, nbytes: int) -> bytes:
        asked.append((offset, nbytes))
        return honest(data, offset, nbytes)

    peer = OnePeer(note)
    assert await obtained(tmp_path, journal, peer)
    assert asked[0] == (0, HEADER_BYTES)
    assert sum(nbytes for _, nbytes in asked) < len(peer.base) * 2 // 3
    path = PackDirectory(tmp_path / "packs").base_path(REF, 0)
    assert path.stat().st_size == len(peer.base)
    assert path.stat().st_mode & 0o777 == 0o600


def other_header(data: bytes, offset: int, nbytes: int) -> bytes:
    with pack_file() as fd:
        write(fd, version_of(1, 2), "a")
        return os.pread(fd, nbytes, offset)


@pytest.mark.parametrize(
    "forge",
    [
        lambda data, offset, nbytes: None,
        lambda data, offset, nbytes: None if offset else honest(data, offset, nbytes),
        lambda data, offset, nbytes: bytes(nbytes),
        lambda data, offset, nbytes: b"\xff" * nbytes,
        other_header,
        lambda data, offset, nbytes: bytes(64) + b"\xff" * 8 + bytes(nbytes - 72),
    ],
)
async def test_other_files_are_refused(tmp_path: Path, journal: JournalThread, forge: Forge) -> None:
    """A file of another salt, noise, a huge size, nothing: then the origin is read, and nothing is left."""
    assert not await obtained(tmp_path, journal, OnePeer(forge))
    assert await journal.call(journal.journal.data_key, REF) is None


async def test_parts_that_never_end_are_given_up(
    tmp_path: Path, journal: JournalThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that is quick with each of very many parts must not keep a model away for days."""
    monkeypatch.setattr("agent.sources.FETCH_S_MAX", 0)
    peer = OnePeer(honest)
    assert not await obtained(tmp_path, journal, peer)
    assert peer.refused == ["liar"]


async def test_parts_beyond_the_room_kept_are_not_asked_for(tmp_path: Path, journal: JournalThread) -> None:
    def never(data: bytes, offset: int, nbytes: int) -> bytes:
        raise AssertionError("asked for a part")

    peer = OnePeer(never)
    assert not await obtained(tmp_path, journal, peer, limit=len(peer.pack) + 1000)
    assert peer.refused == ["liar"]
