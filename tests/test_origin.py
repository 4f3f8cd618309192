"""Packs, segments and origins: what a worker is handed, and what is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.origin import CONTROL_ORIGIN, OriginUnavailable, open_origin
from agent.packs import HostSegments, PackDirectory
from packer.types import MIB, ModelRef, ModelSpec, OriginFile, Task

REF = ModelRef("acme", "minilm", "0" * 16)
OTHER = ModelRef("acme", "other", "1" * 16)


def spec(origin: str, *paths: str) -> ModelSpec:
    files = tuple(OriginFile(path, 1, "0" * 64) for path in paths)
    return ModelSpec(REF, origin, files, "transformers", Task.EMBEDDING, 4096, (4096,), 0, 0)


async def nothing(spec: ModelSpec, path: str) -> AsyncIterator[bytes]:
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


async def test_control_origin_arrives_through_a_pipe_in_any_order() -> None:
    """More than a pipe holds, of two files, read last first: nothing waits for the other."""
    sizes = {"a": 5 * MIB, "b": 3 * MIB}

    async def fetch(_: ModelSpec, path: str) -> AsyncIterator[bytes]:
        for _piece in range(sizes[path] // MIB):
            yield path.encode() * MIB

    async with open_origin(spec(CONTROL_ORIGIN, "a", "b"), fetch) as origin:
        for path in ("b", "a"):
            got = await asyncio.to_thread(read_all, origin.descriptors[path])
            assert got == path.encode() * sizes[path]
        assert origin.failure() is None


async def test_controls_store_on_this_machine_is_read_directly(tmp_path: Path) -> None:
    """Without asking control; a version that the store does not have (yet) is fetched as ever."""
    folder = tmp_path / "acme" / "minilm" / ("0" * 16)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    async with open_origin(spec(CONTROL_ORIGIN, "config.json"), nothing, tmp_path) as origin:
        assert read_all(origin.descriptors["config.json"]) == b"{}"

    async def fetch(_: ModelSpec, path: str) -> AsyncIterator[bytes]:
        yield b"fetched"

    async with open_origin(spec(CONTROL_ORIGIN, "config.json"), fetch, tmp_path / "other") as origin:
        assert await asyncio.to_thread(read_all, origin.descriptors["config.json"]) == b"fetched"


async def test_an_origin_that_breaks_off_says_why() -> None:
    """The worker sees a short file; the reason is the origin's, not the file's."""

    async def fetch(_: ModelSpec, path: str) -> AsyncIterator[bytes]:
        yield b"half"
        raise OriginUnavailable(f"{path}: control is away")

    async with open_origin(spec(CONTROL_ORIGIN, "a"), fetch) as origin:
        assert await asyncio.to_thread(read_all, origin.descriptors["a"]) == b"half"
        await asyncio.wait(list(origin.pumps.values()))
        assert "control is away" in str(origin.failure())


async def test_leaving_early_stops_the_pumps() -> None:
    """A reader that gives up in the middle leaves no task and no descriptor behind."""
    endless_closed = asyncio.Event()

    async def fetch(_: ModelSpec, path: str) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * MIB
        finally:
            endless_closed.set()

    before = len(os.listdir("/proc/self/fd"))
    async with open_origin(spec(CONTROL_ORIGIN, "a"), fetch) as origin:
        assert len(await asyncio.to_thread(os.read, origin.descriptors["a"], 10)) == 10
    assert all(pump.done() for pump in origin.pumps.values())
    assert len(os.listdir("/proc/self/fd")) == before


def test_packs_are_published_whole_and_swept(tmp_path: Path) -> None:
    """After a crash only what the journal knows stays; what it knows and is gone is reported."""
    packs = PackDirectory(tmp_path / "packs")
    descriptor = packs.create(REF)
    os.write(descriptor, b"pack")
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        packs.open(REF)
    packs.publish(REF)
    os.close(packs.create(OTHER))
    assert packs.sweep([REF, OTHER]) == [OTHER]
    assert sorted(path.name for path in (tmp_path / "packs").glob("*/*")) == [packs.path(REF).name]
    os.close(packs.open(REF))
    packs.drop(REF)
    assert packs.sweep([REF]) == [REF]


def test_segments_give_their_memory_back() -> None:
    """Closing the agent's descriptor frees what the kernel had allocated."""
    segments = HostSegments()
    descriptor = segments.create(REF, MIB)
    os.pwrite(descriptor, b"x" * MIB, 0)
    assert segments.allocated_bytes() == MIB
    assert segments.get(REF) == descriptor
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 2 * MIB)
    assert segments.seal(REF)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    assert segments.take(REF) == descriptor
    os.close(descriptor)
    assert segments.get(REF) is None
    assert segments.allocated_bytes() == 0


async def test_leaving_before_the_pumps_started_leaves_no_descriptor() -> None:
    """A worker that is dead already is noticed before anything else gets a turn."""
    before = len(os.listdir("/proc/self/fd"))
    async with open_origin(spec(CONTROL_ORIGIN, "a", "b"), nothing):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
