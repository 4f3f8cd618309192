"""Where a pack comes from: every way from asking control to a pack of one's own or the origin.

Covers: ``Sources`` with a real journal and real files, and control and peers that say what a test wants.
Does not cover: real transfers (``test_peers``) or control's decision (``test_cluster``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from pack_samples import KEY, REF, pack_bytes
from running_control import until

from agent import sources as module
from agent.journal import JournalFailed, open_journal
from agent.journal_thread import JournalThread
from agent.packs import PackDirectory
from agent.peer_fetch import FetchedPack
from agent.sources import ControlAway, Sources
from packer.types import MIB, HostSizes, ModelRef
from packer.wire import PEERS_TRIED_MAX, WIRE_VERSION, OriginTurn, PeerSpec, SourcesAnswer

SAMPLE = pack_bytes()
HOST = HostSizes(1, 2, 3)
PEER = PeerSpec("a", "k", "https://a:1")
OTHER = PeerSpec("b", "k", "https://b:1")
LIMIT_BYTES = 64 * MIB


def granted(wait_ms: int = 10_000) -> SourcesAnswer:
    return SourcesAnswer(WIRE_VERSION, OriginTurn.GRANTED, (), wait_ms)


def waits(*peers: PeerSpec) -> SourcesAnswer:
    return SourcesAnswer(WIRE_VERSION, OriginTurn.WAIT, peers, 10_000)


@dataclass(slots=True)
class Control:
    """Answers in order; the last one for ever."""

    answers: list[SourcesAnswer | ControlAway]
    asked: list[tuple[tuple[str, ...], bool]] = field(default_factory=list)

    async def __call__(
        self, ref: ModelRef, wait_ms: int, failed: Sequence[str] = (), *, ended: bool = False
    ) -> SourcesAnswer:
        assert ref == REF
        self.asked.append((tuple(failed), ended))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, ControlAway):
            raise answer
        return answer


@dataclass(slots=True)
class Peers:
    """In place of ``PeerFetch``: who of the peers has a good pack."""

    good: frozenset[str] = frozenset({"a", "b"})
    fails: OSError | None = None
    limits: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    closed: bool = False

    async def fetch_pack(
        self, ref: ModelRef, peers: Sequence[PeerSpec], fd: int, limit_bytes: int
    ) -> FetchedPack | None:
        self.limits.append(limit_bytes)
        if self.fails is not None:
            raise self.fails
        for peer in peers:
            if peer.node in self.good:
                os.pwrite(fd, SAMPLE, 0)
                return FetchedPack(KEY, len(SAMPLE), bytes(32), HOST, (peer.node,), 5)
        return None

    async def fetch_extent(
        self, ref: ModelRef, peers: Sequence[PeerSpec], salt: bytes, offset: int, nbytes: int
    ) -> bytes | None:
        return SAMPLE[offset : offset + nbytes] if peers else None

    def refuse(self, ref: ModelRef, peers: Sequence[str]) -> None:
        self.refused += peers

    def close(self) -> None:
        self.closed = True


@dataclass(slots=True)
class Scene:
    packs: PackDirectory
    journal: JournalThread
    folder: Path
    planned: set[ModelRef] = field(default_factory=lambda: {REF})
    made: list[Sources] = field(default_factory=list)

    def sources(self, control: Control | None, peers: Peers | None = None) -> Sources:
        fetch = peers or Peers()
        made = Sources(
            control,
            fetch,  # type: ignore[arg-type]  # has what is used
            self.packs,
            self.journal,
            lambda: 7,
            lambda ref: ref in self.planned,
        )
        self.made.append(made)
        return made

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "packs").glob("*/*"))


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    made = Scene(PackDirectory(tmp_path / "packs"), JournalThread(open_journal(tmp_path)), tmp_path)
    yield made
    for sources in made.made:
        await sources.close()
    made.journal.close()


async def test_a_node_without_control_reads_the_origin(scene: Scene) -> None:
    sources = scene.sources(None)
    assert (await sources.obtain(REF, LIMIT_BYTES)).pack is None
    assert await sources.fetch_extent(REF, bytes(32), 0, 10) is None


async def test_with_control_away_the_origin_is_read(scene: Scene) -> None:
    sources = scene.sources(Control([ControlAway("away")]))
    obtained = await sources.obtain(REF, LIMIT_BYTES)
    assert obtained.pack is None
    obtained.end(packed=False)
    assert await sources.fetch_extent(REF, bytes(32), 0, 10) is None


async def test_a_peers_pack_becomes_this_nodes_own(scene: Scene) -> None:
    """Published under its name, its key wrapped by this node's key for the tenant; an interrupted load's
    leftovers go."""
    journal = scene.journal.journal
    await scene.journal.call(journal.seal_partial_key, REF)
    for descriptor in scene.packs.create_partial(REF, False):
        os.write(descriptor, b"x")
        os.close(descriptor)
    obtained = await scene.sources(Control([waits(), waits(PEER)])).obtain(REF, LIMIT_BYTES)
    assert obtained.pack is not None
    assert scene.packs.path(REF).read_bytes() == SAMPLE
    assert await scene.journal.call(journal.data_key, REF) == KEY
    (row,) = await scene.journal.call(journal.packs)
    assert (row.ref, row.disk_bytes, row.host_bytes, row.host) == (REF, len(SAMPLE), 1, HOST)
    assert scene.files() == [scene.packs.path(REF).name]
    assert await scene.journal.call(journal.partial_packs) == []
    assert KEY not in (scene.folder / "journal.db").read_bytes()
    assert KEY not in (scene.folder / "journal.db-wal").read_bytes()
    await scene.journal.call(journal.shred_tenants, [])
    assert await scene.journal.call(journal.data_key, REF) is None


async def test_peers_that_fail_are_named_and_then_the_origin_is_granted(scene: Scene) -> None:
    control, peers = Control([waits(PEER), waits(OTHER), granted()]), Peers(frozenset())
    assert (await scene.sources(control, peers).obtain(REF, LIMIT_BYTES)).pack is None
    assert control.asked == [((), False), (("a",), False), (("a", "b"), False)]
    assert scene.files() == []


async def test_waiting_ends_with_the_origin(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the other node says it still reads."""
    monkeypatch.setattr(module, "WAIT_S", 0.05)
    monkeypatch.setattr(module, "ASK_AGAIN_S", 0.01)
    control = Control([waits()])
    assert (await scene.sources(control).obtain(REF, 0)).pack is None
    assert len(control.asked) >= 1


async def test_peers_that_keep_failing_do_not_keep_it_for_ever(scene: Scene) -> None:
    control, peers = Control([waits(PEER)]), Peers(frozenset())
    assert (await scene.sources(control, peers).obtain(REF, LIMIT_BYTES)).pack is None
    assert len(control.asked) == PEERS_TRIED_MAX + 1


async def test_nothing_above_the_limit_or_the_free_disk_is_asked_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = Peers()
    sources = scene.sources(Control([waits(PEER)]), peers)
    await sources.obtain(REF, LIMIT_BYTES)
    monkeypatch.setattr(PackDirectory, "free_bytes", lambda self: len(SAMPLE))
    await sources.obtain(REF, LIMIT_BYTES)
    assert peers.limits == [LIMIT_BYTES, len(SAMPLE)]


async def test_a_full_disk_leads_to_the_origin(scene: Scene) -> None:
    """Which can be served without a pack."""
    sources = scene.sources(Control([waits(PEER)]), Peers(fails=OSError(28, "No space left on device")))
    assert (await sources.obtain(REF, LIMIT_BYTES)).pack is None
    assert scene.files() == []


async def test_a_version_that_left_the_plan_meanwhile_is_not_kept(scene: Scene) -> None:
    """Its tenant may be gone, and the tenant's key with it: none may be made anew."""
    scene.planned.clear()
    control = Control([waits(PEER), granted()])
    assert (await scene.sources(control).obtain(REF, LIMIT_BYTES)).pack is None
    assert scene.files() == []
    assert await scene.journal.call(scene.journal.journal.packs) == []


async def test_a_pack_without_its_key_in_the_journal_is_not_left(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise JournalFailed("full")

    monkeypatch.setattr(scene.journal.journal, "add_pack", fail)
    assert (await scene.sources(Control([waits(PEER)])).obtain(REF, LIMIT_BYTES)).pack is None
    assert scene.files() == []


async def test_a_turn_is_kept_until_the_load_is_over(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again in time, also when control is away once; given back when there is no pack."""
    monkeypatch.setattr(module, "RENEW_S_LEAST", 0.01)
    control = Control([granted(5), granted(5), ControlAway("once"), granted(5)])
    sources = scene.sources(control)
    obtained = await sources.obtain(REF, LIMIT_BYTES)
    await until(lambda: len(control.asked) > 4)
    assert all(asked == ((), False) for asked in control.asked)
    obtained.end(packed=False)
    await until(lambda: control.asked[-1] == ((), True))
    count = len(control.asked)
    obtained.end(packed=False)
    await until(lambda: not sources._background.tasks)
    assert len(control.asked) == count


async def test_a_turn_that_brought_a_pack_is_given_back_after_the_report(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's report ends it: until then the next in line would read the origin for nothing. A pack that
    was dropped at once is in no report; others waited half a minute for it, found by ``cluster_simulation``
    (seed 15)."""
    control = Control([granted()])
    sources = scene.sources(control)
    (await sources.obtain(REF, LIMIT_BYTES)).end(packed=True)
    for _ in range(20):  # everything that does not wait for time has run by then
        await asyncio.sleep(0)
    assert control.asked == [((), False)]
    assert len(sources._background.tasks) >= 1
    monkeypatch.setattr(module, "REPORTED_S", 0.0)
    again = Control([granted()])
    sources = scene.sources(again)
    (await sources.obtain(REF, LIMIT_BYTES)).end(packed=True)
    await until(lambda: not sources._background.tasks)
    assert again.asked == [((), False), ((), True)]


async def test_an_extent_for_a_repair_takes_no_turn(scene: Scene) -> None:
    control = Control([waits(PEER)])
    assert await scene.sources(control).fetch_extent(REF, bytes(32), 4, 8) == SAMPLE[4:12]
    assert control.asked == [((), True)]


async def test_close_ends_turns_and_transfers(scene: Scene) -> None:
    peers = Peers()
    sources = scene.sources(Control([granted()]), peers)
    await sources.obtain(REF, LIMIT_BYTES)
    assert len(sources._background.tasks) == 1
    await sources.close()
    assert peers.closed
    assert not [task for task in asyncio.all_tasks() if task in sources._background.tasks]


def test_what_is_refused_are_the_nodes_that_gave_it(tmp_path: Path) -> None:
    peers = Peers()
    sources = Sources(
        None,
        peers,  # type: ignore[arg-type]
        PackDirectory(tmp_path),
        None,  # type: ignore[arg-type]
        lambda: 0,
        lambda ref: True,
    )
    told: list[tuple[str, ModelRef, str]] = []
    sources.note = lambda kind, ref, detail: told.append((kind, ref, detail))
    sources.refuse(REF, FetchedPack(KEY, 1, bytes(32), HOST, ("a", "b"), 1))
    assert peers.refused == ["a", "b"]
    assert told == [("pack_refused", REF, "corrupt, from a, b")]
