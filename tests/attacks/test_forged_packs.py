"""Threat: a node that was taken over gives another node a pack that it made itself.

Whoever has a data key can make a pack with right tags for any model, so what is parsed on the other side (a
configuration, a tokenizer) must be compared with the plan, and a transfer must end. Cut, changed and foreign
packs are in ``tests/test_peers.py``; forged weights, with real nodes, in ``tests/test_peer_boxes.py``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from pack_samples import KEY, REF, SIDE, pack_bytes

from agent import peer_fetch
from agent.journal import open_journal
from agent.journal_thread import JournalThread
from agent.packs import PackDirectory
from agent.peer_fetch import FetchedPack
from agent.sources import Sources
from packer.types import MIB, HostSizes, ModelRef, OriginFile
from packer.wire import WIRE_VERSION, OriginTurn, PeerSpec, SourcesAnswer

PACK = pack_bytes()
PEER = PeerSpec("taken-over", "k", "https://a:1")
WEIGHTS = OriginFile("model.safetensors", 10, "0" * 64)


class OneLiar:
    """In place of ``PeerFetch``: a peer whose pack opens with the key that it names."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    async def fetch_pack(
        self, ref: ModelRef, peers: Sequence[PeerSpec], fd: int, limit_bytes: int
    ) -> FetchedPack | None:
        os.pwrite(fd, PACK, 0)
        return FetchedPack(KEY, len(PACK), bytes(32), HostSizes(1, 1, 1), (PEER.node,), 1)

    def refuse(self, ref: ModelRef, peers: Sequence[str]) -> None:
        self.refused += peers

    def close(self) -> None:
        return


async def ask(
    ref: ModelRef, wait_ms: int, failed: Sequence[str] = (), *, ended: bool = False
) -> SourcesAnswer:
    """Control: it believes the peer's report until that has failed."""
    if failed:
        return SourcesAnswer(WIRE_VERSION, OriginTurn.GRANTED, (), 10_000)
    return SourcesAnswer(WIRE_VERSION, OriginTurn.WAIT, (PEER,), 10_000)


def plan_of(side_files: Mapping[str, bytes]) -> list[OriginFile]:
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in side_files.items()}
    return [WEIGHTS, *(OriginFile(path, len(SIDE.get(path, b"")), digests[path]) for path in digests)]


@pytest.mark.parametrize(
    ("registered", "taken"),
    [
        (SIDE, True),
        ({**SIDE, "config.json": b'{"model_type": "gpt2"}'}, False),  # the same size or not
        ({**SIDE, "tokenizer.json": b"T" * 5000}, False),
        ({path: SIDE[path] for path in SIDE if path != "vocab.txt"}, False),  # one more in the pack
        ({**SIDE, "merges.txt": b""}, False),  # one less
    ],
)
async def test_files_that_are_not_the_registered_ones_are_refused(
    tmp_path: Path, registered: Mapping[str, bytes], taken: bool
) -> None:
    packs, journal = PackDirectory(tmp_path / "packs"), JournalThread(open_journal(tmp_path))
    liar, notes = OneLiar(), list[str]()
    sources = Sources(ask, liar, packs, journal, lambda: 1, lambda ref: True)  # type: ignore[arg-type]
    sources.note = lambda kind, ref, detail: notes.append(kind)
    sources.files_of = {REF: plan_of(registered)}.get
    try:
        obtained = await sources.obtain(REF, 64 * MIB)
        assert (obtained.pack is not None) == taken
        assert packs.path(REF).exists() == taken
        assert (await journal.call(journal.journal.data_key, REF)) == (KEY if taken else None)
        assert liar.refused == ([] if taken else [PEER.node])
        assert notes == (["pack_fetched"] if taken else ["pack_refused"])
    finally:
        await sources.close()
        journal.close()


def test_a_transfer_that_never_stands_still_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(peer_fetch.time, "monotonic", lambda: now_s[0])
    job = peer_fetch._Job(peer_fetch._Described(PEER, KEY, "", 64 * MIB), "", -1, [PEER])
    while not job.stalled() and now_s[0] < 10_000:
        now_s[0] += 10
        job.moved(1)
    assert job.left_bytes > 0
    assert now_s[0] - 1000 == pytest.approx(peer_fetch.FETCH_S_MAX, abs=20)
