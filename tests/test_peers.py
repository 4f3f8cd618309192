"""Packs between nodes: what a listener gives, and what a fetch makes of good, bad and broken peers.

Covers: ``PeerServer`` and ``PeerFetch`` over real TLS sockets. Does not cover: control's part
(``test_sources_route``), what a node does with what it fetched (``test_sources``), hostile callers
(``attacks/test_peers``).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pack_samples import KEY, REF, memory_file, pack_bytes, weights
from pack_samples import model_of as model_with
from running_peers import PATH, SAMPLE, Node, Site, ask, dial, exchange, get

from agent import peer_fetch
from agent.peer_calls import PeerCalls
from agent.peer_fetch import FetchedPack, PeerFetch
from agent.peer_http import Connection
from agent.peers import Pacer, PeerServer
from packer.pack import PackReader
from packer.types import KIB, MIB, ModelRef
from packer.wire import PeerSpec

OTHER = ModelRef("acme", "other", "b" * 16)
LIMIT_BYTES = 64 * MIB


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many ranges in a small pack."""
    monkeypatch.setattr(peer_fetch, "RANGE_BYTES", 4 * KIB)


@contextmanager
def fetching(node: Node) -> Iterator[PeerFetch]:
    fetch = PeerFetch(node.identity)
    try:
        yield fetch
    finally:
        fetch.close()


async def fetch_whole(
    node: Node, *others: Node, limit_bytes: int = LIMIT_BYTES, fetch: PeerFetch | None = None
) -> tuple[FetchedPack | None, bytes]:
    """What came of a fetch, and the file."""
    with fetching(node) as own, memory_file() as fd:
        specs = [other.spec() for other in others]
        got = await (fetch or own).fetch_pack(REF, specs, fd, limit_bytes)
        return got, os.pread(fd, os.fstat(fd).st_size, 0)


def salt_of(data: bytes) -> bytes:
    with memory_file(data) as fd:
        return PackReader(fd, KEY, REF).salt


# --- giving ---------------------------------------------------------------------------------------


def test_a_range_comes_as_it_lies_on_disk(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    with dial(giver.port, asker.identity.peer_context(server=False)) as tls:
        for start, end in ((0, 1), (100, 5000), (len(SAMPLE) - 7, len(SAMPLE)), (0, len(SAMPLE))):
            got = exchange(tls, get(PATH, Range=f"bytes={start}-{end - 1}"))
            assert got is not None
            assert (got.status, got.body) == (206, SAMPLE[start:end])
            assert got.headers["content-range"] == f"bytes {start}-{end - 1}/{len(SAMPLE)}"
            assert got.headers["etag"] == f'"{salt_of(SAMPLE).hex()}"'
    assert giver.server.served_bytes == 1 + 4900 + 7 + len(SAMPLE)


def test_the_key_is_given_uncached_and_on_record(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    got = ask(giver, asker, get(f"{PATH}/key"))
    assert got is not None
    assert (got.status, got.body, got.headers["cache-control"]) == (200, KEY, "no-store")
    assert got.headers["x-pack-bytes"] == str(len(SAMPLE))
    assert giver.store.given == [(REF, "b")]


def test_only_the_pack_that_was_meant(site: Site) -> None:
    """A pack that was made anew has another salt: ranges of the two never mix."""
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    for path in (PATH, f"{PATH}/key"):
        got = ask(giver, asker, get(path, Range="bytes=0-9", If_Match=f'"{"00" * 32}"'))
        assert got is not None
        assert (got.status, got.body) == (412, b"")
    assert giver.store.given == []


def test_a_pack_that_is_not_there_or_not_whole_or_keyless_is_absent(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    path = giver.store.packs.path(REF)
    path.parent.mkdir()
    path.with_name(path.name + ".tmp").write_bytes(SAMPLE)
    for data in (None, b"", SAMPLE[:-4096], b"\0" * len(SAMPLE)):
        if data is not None:
            giver.store.put(data)
        for route in (PATH, f"{PATH}/key"):
            got = ask(giver, asker, get(route, Range="bytes=0-9"))
            assert got is not None
            assert got.status == 404
    giver.store.put(SAMPLE)
    giver.store.keys.clear()
    got = ask(giver, asker, get(f"{PATH}/key"))
    assert got is not None
    assert got.status == 404


def test_the_pacer_keeps_to_its_rate() -> None:
    pacer = Pacer(1000)
    assert pacer.wait_s(500, 10.0) == 0
    assert pacer.wait_s(500, 10.0) == pytest.approx(0.5)
    assert pacer.wait_s(500, 10.25) == pytest.approx(0.75)
    assert pacer.wait_s(500, 99.0) == 0  # nothing is saved up


def test_close_ends_transfers_and_connections(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    with dial(giver.port, asker.identity.peer_context(server=False)) as tls:
        assert exchange(tls, get(PATH, Range="bytes=0-9")) is not None
        giver.server.close()
        assert exchange(tls, get(PATH, Range="bytes=0-9")) is None
    assert giver.server._threads == {}
    with pytest.raises(OSError, match=r"refused|reset"):
        dial(giver.port, asker.identity.peer_context(server=False))


def test_a_new_certificate_is_taken_up_without_a_restart(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    shown = []
    for _ in range(2):
        with dial(giver.port, asker.identity.peer_context(server=False)) as tls:
            shown.append(tls.getpeercert(binary_form=True))
        site.certify(giver.identity, "a")
        giver.server.certify(giver.identity)
    assert shown[0] != shown[1]


# --- fetching -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_ranges")
async def test_a_pack_arrives_whole_and_examined(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    got, data = await fetch_whole(asker, giver)
    assert got is not None
    assert data == SAMPLE
    assert (got.data_key, got.disk_bytes, got.salt) == (KEY, len(SAMPLE), salt_of(SAMPLE))
    assert got.peers == ("a",)
    with memory_file(SAMPLE) as fd:
        assert got.host == PackReader(fd, KEY, REF).host_sizes
    assert repr(KEY) not in repr(got)


async def test_a_pack_of_many_ranges_arrives_whole(site: Site) -> None:
    data = pack_bytes(model=model_with([("w", "U8", [20 * MIB], weights("U8", 20 * MIB, 1))]))
    assert len(data) > 2 * peer_fetch.RANGE_BYTES
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(data)
    got, copy = await fetch_whole(asker, giver)
    assert got is not None
    assert copy == data


async def test_nothing_larger_than_the_limit_is_begun(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    got, data = await fetch_whole(asker, giver, limit_bytes=len(SAMPLE) - 1)
    assert got is None
    assert data == b""
    assert giver.server.served_bytes == 0


@pytest.mark.parametrize("part", ["header", "index"])
async def test_a_changed_header_or_index_is_refused(site: Site, part: str) -> None:
    """Whatever the peer says about itself: the tags decide. The next peer is asked."""
    giver, good, asker = site.join("a"), site.join("g"), site.join("b")
    with memory_file(SAMPLE) as fd:
        header = PackReader(fd, KEY, REF)._header
    changed = bytearray(SAMPLE)
    changed[header.index_offset + 10 if part == "index" else 100] ^= 1
    giver.store.put(bytes(changed))
    got, _ = await fetch_whole(asker, giver)
    assert got is None
    good.store.put(SAMPLE)
    got, data = await fetch_whole(asker, giver, good)
    assert got is not None
    assert (got.peers, data) == (("g",), SAMPLE)


async def test_another_models_pack_under_this_name_is_refused(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(pack_bytes(ref=OTHER))
    got, _ = await fetch_whole(asker, giver)
    assert got is None


async def test_a_wrong_key_is_refused(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE, key=bytes(32))
    got, _ = await fetch_whole(asker, giver)
    assert got is None


async def test_a_copy_that_was_refused_is_not_fetched_again(site: Site) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    with fetching(asker) as fetch:
        got, _ = await fetch_whole(asker, giver, fetch=fetch)
        assert got is not None
        fetch.refuse(REF, got.peers)
        before = giver.server.served_bytes
        assert (await fetch_whole(asker, giver, fetch=fetch))[0] is None
        assert giver.server.served_bytes == before
        # Another node's copy of the very same pack may be good.
        other = site.join("o")
        other.store.put(SAMPLE)
        got, _ = await fetch_whole(asker, giver, other, fetch=fetch)
        assert got is not None
        assert got.peers == ("o",)


@contextmanager
def hanging_up(monkeypatch: pytest.MonkeyPatch, port: int, after: int, times: int) -> Iterator[list[int]]:
    """The listener at this port hangs up in the middle of ranges, ``times`` times after some good ones."""
    broke: list[int] = []
    lock, given = threading.Lock(), [0]
    send_range = PeerServer._send_range

    def breaks(
        self: PeerServer,
        connection: Connection,
        descriptor: int,
        asked: tuple[int, int],
        tag: str,
        size: int,
    ) -> None:
        with lock:
            given[0] += 1
            if given[0] > after and len(broke) < times and connection.tls.getsockname()[1] == port:
                broke.append(port)
                (start, end), until_s = asked, time.monotonic() + 9
                span = f"bytes {start}-{end - 1}/{size}"
                headers: dict[str, str | int] = {
                    "Content-Length": end - start,
                    "Content-Range": span,
                    "ETag": tag,
                }
                connection.send_head("HTTP/1.1 206 Partial Content", headers, until_s)
                connection.send(SAMPLE[start : start + 9], until_s)
                raise ConnectionResetError("in the middle")
        send_range(self, connection, descriptor, asked, tag, size)

    with monkeypatch.context() as patched:
        patched.setattr(PeerServer, "_send_range", breaks)
        yield broke


@pytest.mark.usefixtures("small_ranges")
async def test_a_broken_connection_costs_the_range_it_was_in(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same peer is asked again, for what is missing only."""
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    with hanging_up(monkeypatch, giver.port, after=2, times=1) as broke:
        got, data = await fetch_whole(asker, giver)
    assert broke == [giver.port]
    assert got is not None
    assert data == SAMPLE
    assert giver.server.served_bytes == len(SAMPLE)


@pytest.mark.usefixtures("small_ranges")
async def test_another_peer_goes_on_where_one_broke_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    giver, other, asker = site.join("a"), site.join("o"), site.join("b")
    for node in (giver, other):
        node.store.put(SAMPLE)
    with hanging_up(monkeypatch, giver.port, after=2, times=1000) as broke:
        got, data = await fetch_whole(asker, giver, other)
    assert len(broke) >= peer_fetch.BREAKS_MAX
    assert got is not None
    assert data == SAMPLE
    assert got.peers == ("a", "o")
    assert 0 < other.server.served_bytes < len(SAMPLE)
    assert giver.server.served_bytes + other.server.served_bytes == len(SAMPLE)


@pytest.mark.usefixtures("small_ranges")
async def test_a_busy_peer_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    monkeypatch.setattr(giver.server, "_transfers", threading.BoundedSemaphore(1))
    got, data = await fetch_whole(asker, giver)
    assert got is not None
    assert data == SAMPLE


async def test_silent_and_absent_peers_are_skipped_for_a_while(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, giver, asker = site.join("a"), site.join("g"), site.join("b")
    giver.store.put(SAMPLE)
    gone.server.close()
    dialled: list[str] = []
    connect = PeerCalls.connect

    def noted(self: PeerCalls, peer: PeerSpec, cancel: Callable[[], bool]) -> Connection:
        dialled.append(peer.node)
        return connect(self, peer, cancel)

    monkeypatch.setattr(PeerCalls, "connect", noted)
    with fetching(asker) as fetch:
        for _ in range(2):
            got, data = await fetch_whole(asker, gone, giver, fetch=fetch)
            assert got is not None
            assert data == SAMPLE
    assert dialled.count("a") == 1


async def test_a_node_that_is_not_the_one_expected_is_told_nothing(site: Site) -> None:
    """The address of one node with the name or the key of another: no request reaches it."""
    giver, other, asker = site.join("a"), site.join("o"), site.join("b")
    for node in (giver, other):
        node.store.put(SAMPLE)
    with fetching(asker) as fetch, memory_file() as fd:
        for spec in (
            PeerSpec("a", giver.key_sha256(), other.spec().peer_url),
            PeerSpec("o", giver.key_sha256(), other.spec().peer_url),
            PeerSpec("x", other.key_sha256(), other.spec().peer_url),
        ):
            assert await fetch.fetch_pack(REF, [spec], fd, LIMIT_BYTES) is None
    assert giver.store.given == other.store.given == []


async def test_an_extent_comes_from_the_very_same_pack_or_not_at_all(site: Site) -> None:
    other, giver, asker = site.join("a"), site.join("g"), site.join("b")
    other.store.put(pack_bytes())  # made by itself: the same model, another salt
    giver.store.put(SAMPLE)
    specs = [other.spec(), giver.spec()]
    with fetching(asker) as fetch:
        salt = salt_of(SAMPLE)
        assert await fetch.fetch_extent(REF, specs, salt, 4096, 4096) == SAMPLE[4096:8192]
        assert await fetch.fetch_extent(REF, specs, bytes(32), 4096, 4096) is None
        assert await fetch.fetch_extent(REF, specs, salt, len(SAMPLE) - 10, 20) is None
        with pytest.raises(ValueError, match="can be fetched"):
            await fetch.fetch_extent(REF, specs, salt, 0, peer_fetch.RANGE_BYTES + 1)


async def test_a_full_disk_is_an_error_of_the_disk_and_no_peers_fault(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)

    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with fetching(asker) as fetch, memory_file() as fd:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            await fetch.fetch_pack(REF, [giver.spec()], fd, LIMIT_BYTES)
        assert fetch._calls._dead == {}


async def test_a_cancelled_fetch_writes_no_more_once_it_has_returned(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller closes its file next, and another file may get that number."""
    giver, asker = site.join("a"), site.join("b")
    giver.store.put(SAMPLE)
    writing, go_on = threading.Event(), threading.Event()
    wrote: list[int] = []
    pwrite = os.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        writing.set()
        assert go_on.wait(30)
        wrote.append(offset)
        return pwrite(fd, data, offset)

    with fetching(asker) as fetch, memory_file() as fd:
        monkeypatch.setattr(os, "pwrite", slow)
        task = asyncio.create_task(fetch.fetch_pack(REF, [giver.spec()], fd, LIMIT_BYTES))
        assert await asyncio.to_thread(writing.wait, 30)
        task.cancel()
        waited = asyncio.create_task(asyncio.wait({task}))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        await waited
        assert task.cancelled()
        count = len(wrote)
    assert len(wrote) == count
