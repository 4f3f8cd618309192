"""Packs, segments and origins: what a worker is handed, and what is left behind."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from agent.origin import (
    CONTROL_ORIGIN,
    LARGE_ASKS_MAX,
    RANGE_BYTES,
    RANGES_AHEAD,
    OriginUnavailable,
    open_origin,
)
from agent.packs import PackDirectory
from packer.ingest import Ingest
from packer.origin_headers import ORIGIN_HEADERS
from packer.sources import ASK, FeedSource, SourceFailed, open_source
from packer.types import MIB, ModelRef, ModelSpec, OriginFile, Task

REF = ModelRef("acme", "minilm", "0" * 16)
OTHER = ModelRef("acme", "other", "1" * 16)


def spec(origin: str, *paths: str) -> ModelSpec:
    files = tuple(OriginFile(path, 1, "0" * 64) for path in paths)
    return ModelSpec(REF, origin, files, "transformers", Task.EMBEDDING, 4096, (4096,), 0, 0)


def sized(origin: str, sizes: dict[str, int]) -> ModelSpec:
    return replace(
        spec(origin), files=tuple(OriginFile(path, size, "0" * 64) for path, size in sizes.items())
    )


async def nothing(spec: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
    raise AssertionError("control must not be asked")
    yield b""


def read_all(descriptor: int) -> bytes:
    pieces = []
    while piece := os.read(descriptor, MIB):
        pieces.append(piece)
    return b"".join(pieces)


async def test_file_origin_gives_the_files_themselves(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "1_Pooling" / "config.json").write_bytes(b"[1]")
    wanted = spec(tmp_path.as_uri(), "config.json", "1_Pooling/config.json")
    async with open_origin(wanted, nothing) as origin:
        got = {path: read_all(descriptor) for path, descriptor in origin.descriptors.items()}
        kept = list(origin.descriptors.values())
    assert got == {"config.json": b"{}", "1_Pooling/config.json": b"[1]"}
    for descriptor in kept:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("kind", ["missing", "link", "directory", "fifo"])
async def test_file_origin_refuses_what_is_no_plain_file(tmp_path: Path, kind: str) -> None:
    """A link could lead anywhere, a fifo would block the node for ever."""
    target = tmp_path / "config.json"
    if kind == "link":
        target.symlink_to("/etc/hostname")
    elif kind == "directory":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    with pytest.raises(OriginUnavailable, match=r"config\.json") as refused:
        async with open_origin(spec(tmp_path.as_uri(), "config.json"), nothing):
            pass
    # The tenant reads the message; where the operator keeps origins is not the tenant's business.
    assert str(tmp_path) not in str(refused.value)
    assert str(tmp_path) in refused.value.private


async def test_no_component_of_a_path_may_be_a_link(tmp_path: Path) -> None:
    """A linked folder inside the origin is refused like a linked file."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_bytes(b"{}")
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "1_Pooling").symlink_to(tmp_path / "real")
    with pytest.raises(OriginUnavailable, match="1_Pooling"):
        async with open_origin(spec(origin.as_uri(), "1_Pooling/config.json"), nothing):
            pass


def ask(descriptor: int, offset: int, nbytes: int) -> bytes:
    """What a worker does on a feed."""
    data = bytearray(nbytes)
    source = FeedSource(descriptor)
    source.expect([(offset, nbytes)])
    with memoryview(data) as view:
        source.read_into(offset, view)
    return bytes(data)


def pattern(path: str, start: int, nbytes: int) -> bytes:
    """Bytes of which every range is different."""
    numbers = range(start // 8, (start + nbytes) // 8 + 1)
    whole = b"".join(number.to_bytes(7, "little") + path[:1].encode() for number in numbers)
    return whole[start % 8 :][:nbytes]


async def patterned(_: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
    for at in range(start, start + nbytes, MIB):
        yield pattern(path, at, min(MIB, start + nbytes - at))


async def test_control_origin_arrives_through_feeds_in_any_order() -> None:
    """More than a socket holds, of two files, read last first: nothing waits for the other."""
    sizes = {"a": 9 * MIB + 5, "b": 3 * MIB}
    wanted = sized(CONTROL_ORIGIN, sizes)
    async with open_origin(wanted, patterned) as origin:
        for path in ("b", "a"):
            got = await asyncio.to_thread(ask, origin.descriptors[path], 0, sizes[path])
            assert got == pattern(path, 0, sizes[path])
        got = await asyncio.to_thread(ask, origin.descriptors["a"], 4 * MIB - 3, 11)
        assert got == pattern("a", 4 * MIB - 3, 11)
        assert origin.failure() is None


async def test_ranges_are_fetched_ahead_and_no_more_than_the_limit() -> None:
    """With a worker that reads nothing, as many ranges are on their way as one file may hold."""
    size = (RANGES_AHEAD + 4) * RANGE_BYTES
    started: list[int] = []
    enough = asyncio.Event()

    async def fetch(spec: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        started.append(start)
        if len(started) == RANGES_AHEAD:
            enough.set()
        async with asyncio.timeout(30):
            await enough.wait()
        async for piece in patterned(spec, path, start, nbytes):
            yield piece

    async with open_origin(sized(CONTROL_ORIGIN, {"a": size}), fetch) as origin:
        source = FeedSource(origin.descriptors["a"])
        source.expect([(0, size)])
        async with asyncio.timeout(30):
            await enough.wait()
        assert started == [number * RANGE_BYTES for number in range(RANGES_AHEAD)]
        data = bytearray(size)
        await asyncio.to_thread(source.read_into, 0, memoryview(data))
    assert bytes(data) == pattern("a", 0, size)
    assert sorted(started) == [number * RANGE_BYTES for number in range(RANGES_AHEAD + 4)]


async def test_large_asks_of_many_files_wait_for_one_another_and_small_ones_do_not() -> None:
    """One load may hold only so much in the agent, and the start of every file comes at once."""
    names = [chr(97 + number) for number in range(LARGE_ASKS_MAX + 2)]
    sizes = dict.fromkeys([*names, "small"], 8 * MIB)
    begun: set[str] = set()
    enough, freed = asyncio.Event(), asyncio.Event()

    async def fetch(spec: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        if nbytes > 1000:
            begun.add(path)
            if len(begun) == LARGE_ASKS_MAX:
                enough.set()
            if len(begun) > LARGE_ASKS_MAX:
                freed.set()
        async for piece in patterned(spec, path, start, nbytes):
            yield piece

    async with open_origin(sized(CONTROL_ORIGIN, sizes), fetch) as origin:
        sources = {path: FeedSource(origin.descriptors[path]) for path in names}
        for source in sources.values():
            source.expect([(0, 8 * MIB)])
        async with asyncio.timeout(30):
            await enough.wait()
        got = await asyncio.to_thread(ask, origin.descriptors["small"], 5, 1000)
        assert got == pattern("small", 5, 1000)
        assert len(begun) == LARGE_ASKS_MAX
        one = min(begun)
        data = bytearray(8 * MIB)
        await asyncio.to_thread(sources[one].read_into, 0, memoryview(data))
        assert bytes(data) == pattern(one, 0, 8 * MIB)
        async with asyncio.timeout(30):
            await freed.wait()
        for path in names:
            if path != one:
                await asyncio.to_thread(sources[path].read_into, 0, memoryview(data))
                assert bytes(data) == pattern(path, 0, 8 * MIB)
    assert begun == set(names)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 9), (8, 1), (2**63, 8), (2**64 - 1, 2**64 - 1), (0, 2**62), (3, 0)]
)
async def test_an_ask_beyond_the_file_ends_the_feed(offset: int, nbytes: int) -> None:
    """A worker that lost its senses gets nothing, and nothing is fetched for it."""
    asked: list[str] = []

    async def fetch(_: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        asked.append(path)
        yield bytes(nbytes)

    async with open_origin(sized(CONTROL_ORIGIN, {"a": 8}), fetch) as origin:
        os.write(origin.descriptors["a"], ASK.pack(offset, nbytes))
        assert await asyncio.to_thread(os.read, origin.descriptors["a"], 10) == b""
        await asyncio.wait(list(origin.feeds.values()))
        assert "were asked" in str(origin.failure())
    assert asked == []


async def test_controls_store_on_this_machine_is_read_directly(tmp_path: Path) -> None:
    """Without asking control; a version that the store does not have (yet) is fetched as ever."""
    folder = tmp_path / "acme" / "minilm" / ("0" * 16)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    async with open_origin(spec(CONTROL_ORIGIN, "config.json"), nothing, tmp_path) as origin:
        assert read_all(origin.descriptors["config.json"]) == b"{}"

    wanted = sized(CONTROL_ORIGIN, {"config.json": 100})
    async with open_origin(wanted, patterned, tmp_path / "other") as origin:
        got = await asyncio.to_thread(ask, origin.descriptors["config.json"], 0, 100)
        assert got == pattern("config.json", 0, 100)


async def test_many_large_side_files_are_read_in_any_order() -> None:
    """More than may be on their way at once, the last one first: none waits for one that nobody reads."""
    files = {f"side-{number}.json": pattern("s", number, 3 * MIB) for number in range(LARGE_ASKS_MAX + 3)}

    async def fetch(_: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        yield files[path][start : start + nbytes]

    registered = tuple(
        OriginFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()
    )
    async with open_origin(replace(spec(CONTROL_ORIGIN), files=registered), fetch) as origin:
        sources = [(file, open_source(origin.descriptors[file.path])) for file in reversed(registered)]
        load = Ingest(sources, REF, "transformers", Task.EMBEDDING, None)
        async with asyncio.timeout(60):
            await asyncio.to_thread(load.open)
    assert {path: data for path, data in load.side_files.items() if path != ORIGIN_HEADERS} == files


@pytest.mark.parametrize("fault", ["raises", "short", "long"])
async def test_an_origin_that_breaks_off_says_why(fault: str) -> None:
    """The worker sees the feed end; the reason is the origin's, not the file's."""

    async def fetch(_: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        if start == 0:
            yield bytes(nbytes)
            return
        if fault == "raises":
            raise OriginUnavailable(f"{path}: control is away")
        yield bytes(nbytes + (1 if fault == "long" else -1))

    async with open_origin(sized(CONTROL_ORIGIN, {"a": 3 * RANGE_BYTES}), fetch) as origin:
        source = FeedSource(origin.descriptors["a"])
        source.expect([(0, 3 * RANGE_BYTES)])
        data = bytearray(3 * RANGE_BYTES)
        with pytest.raises(SourceFailed, match=r"ends after|broke off"):
            await asyncio.to_thread(source.read_into, 0, memoryview(data))
        await asyncio.wait(list(origin.feeds.values()))
        assert ("control is away" if fault == "raises" else "instead of") in str(origin.failure())


async def test_leaving_early_stops_the_feeds() -> None:
    """A reader that gives up in the middle leaves no task and no descriptor behind."""
    endless_closed = asyncio.Event()

    async def fetch(_: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        if start == 0:
            yield bytes(nbytes)
            return
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            endless_closed.set()

    before = len(os.listdir("/proc/self/fd"))
    async with open_origin(sized(CONTROL_ORIGIN, {"a": 2 * RANGE_BYTES}), fetch) as origin:
        os.write(origin.descriptors["a"], ASK.pack(0, 2 * RANGE_BYTES))
        assert await asyncio.to_thread(os.read, origin.descriptors["a"], 10) == bytes(10)
    assert endless_closed.is_set()
    assert all(feed.done() for feed in origin.feeds.values())
    assert len(os.listdir("/proc/self/fd")) == before


async def test_leaving_before_the_feeds_started_leaves_no_descriptor() -> None:
    """A worker that is dead already is noticed before anything else gets a turn."""
    before = len(os.listdir("/proc/self/fd"))
    async with open_origin(spec(CONTROL_ORIGIN, "a", "b"), nothing):
        pass
    await asyncio.sleep(0)  # the callbacks of the cancelled tasks close their sockets
    assert len(os.listdir("/proc/self/fd")) == before


# --- object stores --------------------------------------------------------------------------------


@asynccontextmanager
async def http_store(files: dict[str, bytes], honest: bool = True) -> AsyncIterator[tuple[str, list[str]]]:
    """A store on loopback that speaks ranges, and the ranges it was asked for."""
    asked: list[str] = []

    async def serve(request: web.Request) -> web.Response:
        data = files.get(request.match_info["path"])
        if data is None:
            return web.Response(status=404)
        asked.append(request.headers.get("Range", ""))
        part = request.http_range
        start, end, _ = part.indices(len(data))
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        body = data[start:end] if honest else data[start : end - 1]
        return web.Response(status=206, body=body, headers=headers)

    app = web.Application()
    app.router.add_get("/models/m/{path:.+}", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/models/m", asked
    finally:
        await runner.cleanup()


async def test_an_object_store_is_read_in_parallel_ranges() -> None:
    """Through the same library that reads S3: every range is asked for once, and comes in order."""
    files = {
        "config.json": b"{}",
        "1_Pooling/config.json": b"[1]",
        "m": pattern("m", 0, 3 * RANGE_BYTES + 77),
    }
    async with http_store(files) as (url, asked):
        wanted = sized(url, {path: len(data) for path, data in files.items()})
        async with open_origin(wanted, patterned) as origin:
            for path, data in files.items():
                assert await asyncio.to_thread(ask, origin.descriptors[path], 0, len(data)) == data
            assert origin.failure() is None
    starts = [0, RANGE_BYTES, 2 * RANGE_BYTES, 3 * RANGE_BYTES]
    ranges = [f"bytes={start}-{min(start + RANGE_BYTES, len(files['m'])) - 1}" for start in starts]
    assert sorted(asked) == sorted(["bytes=0-1", "bytes=0-2", *ranges])


@pytest.mark.parametrize("fault", ["no file", "short answers", "nobody there"])
async def test_an_object_store_that_does_not_deliver_is_unavailable(fault: str) -> None:
    """The tenant reads which file; the address of the store is the operator's."""
    files = {} if fault == "no file" else {"m": bytes(1000)}
    async with http_store(files, honest=fault != "short answers") as (url, _), AsyncExitStack() as later:
        if fault == "nobody there":
            url, _ = await later.enter_async_context(http_store(files))
            await later.aclose()
        async with open_origin(sized(url, {"m": 1000}), patterned) as origin:
            with pytest.raises(SourceFailed):
                await asyncio.to_thread(ask, origin.descriptors["m"], 0, 1000)
            await asyncio.wait(list(origin.feeds.values()))
            failure = origin.failure()
    assert failure is not None
    assert "m: " in str(failure)
    assert "127.0.0.1" not in str(failure)


@pytest.mark.parametrize("url", ["nonsense://x", "s3://", "http://[::1"])
async def test_an_origin_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(OriginUnavailable, match="can not be opened"):
        async with open_origin(spec(url, "m"), patterned):
            pass


def test_packs_are_published_whole_and_swept(tmp_path: Path) -> None:
    """After a crash only what the journal knows stays; what it knows and is gone is reported."""
    packs = PackDirectory(tmp_path / "packs")
    descriptor, part = packs.create_partial(REF, resumed=False)
    os.close(part)
    os.write(descriptor, b"pack")
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        packs.open(REF)
    packs.publish(REF)
    for unfinished in packs.create_partial(OTHER, resumed=False):
        os.close(unfinished)
    assert packs.sweep([REF, OTHER]) == [OTHER]
    assert sorted(path.name for path in (tmp_path / "packs").glob("*/*")) == [packs.path(REF).name]
    os.close(packs.open(REF))
    packs.drop(REF)
    assert packs.sweep([REF]) == [REF]
