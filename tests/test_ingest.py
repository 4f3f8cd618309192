"""Bringing a model in from its origin: every byte right and hashed, and the pack beside.

Covers: files and feeds, bad and broken origins, cancelling, what a failing pack costs, and equal chunks
stored once. Does not cover: going on after an interruption (``test_resume``), the agent's end of a feed
(``test_origin``), the pack file itself (``test_pack``), hostile headers (``tests/attacks``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from origin_samples import (
    CountedSource,
    Tensor,
    big,
    check_pack,
    contents,
    expected_image,
    feed,
    feed_sources,
    file_sources,
    ingest,
    listed,
    load,
    weight_files,
)
from pack_samples import KEY, REF, MemoryImage, image_of, memory_file, small_model, weights

from packer import pack_writer
from packer.index import PackError
from packer.ingest import Ingest
from packer.origin_headers import ORIGIN_HEADERS
from packer.packing import PackTarget
from packer.sources import ASKS_AHEAD, FeedSource, FileSource, SourceFailed, open_source
from packer.tiers import TierError
from packer.types import KIB, MIB, OriginFile, Task

LIMIT = 256 * MIB


def mixed_shards() -> list[list[Tensor]]:
    """Two weight files: tensors of several chunks, many tiny ones, one of no bytes, several dtypes."""
    tiny: list[Tensor] = [(f"h.{at}.bias", "F32", [3], weights("F32", 3, at)) for at in range(40)]
    first: list[Tensor] = [
        ("h.0.wide.weight", "BF16", [2 * MIB + 4321], big(4 * MIB + 8642, 1)),
        ("embed.weight", "BF16", [MIB], big(2 * MIB, 2)),
        *tiny[:20],
        ("h.1.empty", "F32", [0, 8], b""),
        ("h.1.mask", "U8", [5], b"\x01\x02\x03\x04\x05"),
    ]
    second: list[Tensor] = [
        *tiny[20:],
        ("head.weight", "F32", [300 * KIB], big(1200 * KIB, 3)),
        ("h.2.half", "F16", [77], weights("F16", 77, 5)),
    ]
    return [first, second]


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [file_sources, feed_sources])
def test_every_byte_arrives_and_the_pack_beside_restores_it(kind: Callable[..., object]) -> None:
    """From files and from feeds; the image was dirty, so the zeros between tensors are written too."""
    files = weight_files(mixed_shards())
    with kind(files) as sources, memory_file() as fd, memory_file() as part_fd:  # type: ignore[attr-defined]
        done = ingest(sources, PackTarget(fd, part_fd, KEY, LIMIT))
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
        beside = {path: data for path, data in done.ingest.side_files.items() if path != ORIGIN_HEADERS}
        assert beside == {path: data for path, data in files.items() if not path.endswith(".safetensors")}
        reader = check_pack(fd, files)
        assert done.summary is not None
        assert done.summary.disk_bytes == os.fstat(fd).st_size
        assert done.summary.host == reader.host_sizes
        assert contents(part_fd) == b""
        assert done.ingest.resumed_bytes == 0


def test_without_a_target_nothing_is_packed() -> None:
    files = weight_files(mixed_shards())
    with file_sources(files) as sources:
        done = ingest(sources)
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
        with pytest.raises(PackError, match="no pack"):
            done.ingest.finish_pack()


tensor_sizes = st.lists(
    st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.integers(0, 300_000)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=25)
@given(st.lists(tensor_sizes, min_size=1, max_size=3), st.booleans())
def test_any_tensors_arrive(shards: list[list[tuple[str, int]]], ordered: bool) -> None:
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "I64": 8}
    files = weight_files(
        [
            [
                (f"h.{at}.s{number}", dtype, [count], big(count * sizes[dtype], at + 7 * number))
                for at, (dtype, count) in enumerate(tensors)
            ]
            for number, tensors in enumerate(shards)
        ]
    )
    sources = [(file, CountedSource(files[file.path], ordered)) for file in listed(files)]
    done = ingest(sources)
    assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)


def test_an_ordered_source_is_read_in_order_and_nothing_twice_but_headers() -> None:
    files = weight_files(mixed_shards())
    sources = {file.path: CountedSource(files[file.path], ordered=True) for file in listed(files)}
    ingest([(file, sources[file.path]) for file in listed(files)])
    for path, source in sources.items():
        body = source.asked[1:] if path.endswith(".safetensors") else source.asked[:0]
        assert body == sorted(body)
        assert all(one[0] + one[1] == other[0] for one, other in pairwise(body))
        assert not body or body[-1][0] + body[-1][1] == len(files[path])


# --- bad origins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [file_sources, feed_sources])
@pytest.mark.parametrize("victim", ["model-0.safetensors", "model-1.safetensors", "config.json"])
def test_a_changed_file_never_serves_and_leaves_no_pack(victim: str, kind: Callable[..., object]) -> None:
    files = weight_files(mixed_shards())
    changed = bytearray(files[victim])
    changed[-1] ^= 0x10
    with (
        kind({**files, victim: bytes(changed)}) as sources,  # type: ignore[attr-defined]
        memory_file() as fd,
        memory_file() as part_fd,
    ):
        registered = {file.path: file for file in listed(files)}
        run = Ingest(
            [(registered[file.path], source) for file, source in sources],
            REF,
            "transformers",
            Task.EMBEDDING,
            PackTarget(fd, part_fd, KEY, LIMIT),
        )
        with pytest.raises(TierError, match="has changed since it was registered") as refused:
            load(run)
        assert refused.value.corrupt
        assert victim in refused.value.message
        with pytest.raises(PackError):
            run.finish_pack()
        assert contents(fd) == contents(part_fd) == b""


def test_a_file_that_is_too_long_or_too_short_is_refused() -> None:
    files = weight_files(mixed_shards())
    registered = listed(files)
    for change, corrupt, words in ((b"x", True, "longer than"), (b"", False, "ends after")):
        name = "model-1.safetensors"
        wrong = {**files, name: files[name] + change if change else files[name][:-100]}
        with file_sources(wrong) as sources:
            run = Ingest(
                [(file, source) for file, (_, source) in zip(registered, sources, strict=True)],
                REF,
                "transformers",
                Task.EMBEDDING,
                None,
            )
            with pytest.raises(TierError, match=words) as refused:
                load(run)
            assert refused.value.corrupt == corrupt
            assert name in refused.value.message


def test_a_bad_header_is_broken_and_a_changed_one_is_corrupt() -> None:
    """Only the hash of the whole file tells which of the two it is."""
    bad = {"model.safetensors": (5).to_bytes(8, "little") + b"[1,2]" + bytes(3 * MIB)}
    with file_sources(bad) as sources, pytest.raises(TierError, match="not a JSON object") as refused:
        Ingest(sources, REF, "transformers", Task.EMBEDDING, None).open()
    assert refused.value.broken
    with file_sources(bad) as sources:
        file, source = sources[0]
        other = OriginFile(file.path, file.size_bytes, "0" * 64)
        with pytest.raises(TierError, match="has changed") as refused:
            Ingest([(other, source)], REF, "transformers", Task.EMBEDDING, None).open()
    assert refused.value.corrupt


def test_side_files_above_the_limit_are_refused_before_anything_is_read() -> None:
    files = [OriginFile("tokenizer.json", 2**40, "0" * 64)]
    source = CountedSource(b"")
    with pytest.raises(TierError, match="above the limit") as refused:
        Ingest([(files[0], source)], REF, "transformers", Task.EMBEDDING, None).open()
    assert refused.value.broken
    assert source.asked == []


def test_a_feed_that_ends_in_the_middle_is_an_error_that_may_pass() -> None:
    files = weight_files(mixed_shards())
    sources = [
        (file, CountedSource(files[file.path], ordered=True, fail_at=3 * MIB)) for file in listed(files)
    ]
    run = Ingest(sources, REF, "transformers", Task.EMBEDDING, None)
    run.open()
    with pytest.raises(TierError, match=r"model-0\.safetensors: broke off") as refused:
        run.fill(MemoryImage(run.layout.image_bytes))
    assert not refused.value.corrupt
    assert not refused.value.broken
    assert all(source.stopped.is_set() for file, source in sources if file.path.endswith(".safetensors"))


class StuckSource(CountedSource):
    """Delivers headers; everything else waits until somebody stops it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, ordered=True)
        self.waiting = threading.Event()

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset == 0:
            super().read_into(offset, view)
            return
        self.waiting.set()
        self.stopped.wait()
        raise SourceFailed("was stopped")


def test_a_load_that_waits_for_its_origin_can_be_cancelled() -> None:
    files = weight_files(mixed_shards()[:1])
    sources = {file.path: StuckSource(files[file.path]) for file in listed(files)}
    run = Ingest(
        [(file, sources[file.path]) for file in listed(files)], REF, "transformers", Task.EMBEDDING, None
    )
    run.open()
    cancelled = threading.Event()
    ended: list[TierError] = []

    def fill() -> None:
        with pytest.raises(TierError) as refused:
            run.fill(MemoryImage(run.layout.image_bytes), cancelled)
        ended.append(refused.value)

    thread = threading.Thread(target=fill)
    thread.start()
    assert sources["model-0.safetensors"].waiting.wait(30)
    cancelled.set()
    thread.join(30)
    assert [error.cancelled for error in ended] == [True]


def test_a_feed_that_waits_is_woken_by_stop() -> None:
    with feed(b"") as descriptor:
        source = open_source(descriptor)
        assert isinstance(source, FeedSource)
        failed: list[SourceFailed] = []

        def read() -> None:
            with pytest.raises(SourceFailed) as refused:
                source.read_into(0, memoryview(bytearray(5)))
            failed.append(refused.value)

        thread = threading.Thread(target=read)
        thread.start()
        source.stop()
        thread.join(30)
        assert len(failed) == 1


def test_a_feed_is_asked_ahead_but_never_for_more_than_the_limit() -> None:
    """Thousands of runs must not fill the socket with asks that nobody reads while answers wait."""
    data = bytes(range(256)) * 40
    runs = [(at * 2, 1) for at in range(len(data) // 2)]
    with feed(data) as descriptor:
        source = FeedSource(descriptor)
        seen: list[tuple[int, int]] = []

        def counted() -> Iterator[tuple[int, int]]:
            for run in runs:
                seen.append(run)
                yield run

        source.expect(counted())
        assert len(seen) == ASKS_AHEAD
        view = memoryview(bytearray(1))
        for offset, _ in runs:
            source.read_into(offset, view)
            assert view[0] == data[offset]
        source.expect([(0, 4)])
        with pytest.raises(SourceFailed, match="was asked for"):
            source.read_into(1, view)


def test_a_file_source_stops_and_tells_what_is_missing() -> None:
    with memory_file(b"abc") as fd:
        source = FileSource(fd)
        assert source.size_bytes() == 3
        with pytest.raises(SourceFailed, match="ends after 3 bytes"):
            source.read_into(0, memoryview(bytearray(5)))
        source.stop()
        with pytest.raises(SourceFailed):
            source.read_into(0, memoryview(bytearray(1)))
    with pytest.raises(SourceFailed, match="can not be read"):
        FileSource(fd).read_into(0, memoryview(bytearray(1)))


# --- what a failing pack costs --------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 4096, 8192, 100 * KIB, 2 * MIB, 4 * MIB])
def test_a_pack_above_its_limit_costs_only_itself(limit: int) -> None:
    files = weight_files(mixed_shards())
    with file_sources(files) as sources, memory_file() as fd, memory_file() as part_fd:
        run = Ingest(sources, REF, "transformers", Task.EMBEDDING, PackTarget(fd, part_fd, KEY, limit))
        image = load(run)
        assert bytes(image.bytes) == expected_image(files, run.layout)
        with pytest.raises(PackError, match="limit"):
            run.finish_pack()
        # The disk is full for others, too, so nothing of it stays.
        assert contents(fd) == contents(part_fd) == b""


def test_the_limit_is_exact() -> None:
    files = weight_files(mixed_shards())

    def pack(limit_bytes: int) -> int:
        with file_sources(files) as sources, memory_file() as fd:
            summary = ingest(sources, PackTarget(fd, None, KEY, limit_bytes)).summary
            assert summary is not None
            return summary.disk_bytes

    disk_bytes = pack(LIMIT)
    assert pack(disk_bytes) == disk_bytes
    with pytest.raises(PackError, match=f"its limit of {disk_bytes - 1} bytes"):
        pack(disk_bytes - 1)


def test_the_floor_of_free_space_is_respected_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    files = weight_files(mixed_shards())
    asked: list[int] = []

    def fstatvfs(fd: int) -> SimpleNamespace:
        asked.append(fd)
        # Somebody else fills the disk meanwhile.
        return SimpleNamespace(
            f_bavail=100 * MIB // 4096 - (len(asked) > 4) * 90 * MIB // 4096, f_frsize=4096
        )

    monkeypatch.setattr(pack_writer.os, "fstatvfs", fstatvfs)
    with file_sources(files) as sources, memory_file() as fd:
        run = Ingest(
            sources,
            REF,
            "transformers",
            Task.EMBEDDING,
            PackTarget(fd, None, KEY, LIMIT, floor_bytes=20 * MIB),
        )
        image = load(run)
        with pytest.raises(PackError, match="free on the file system"):
            run.finish_pack()
    assert bytes(image.bytes) == expected_image(files, run.layout)
    assert len(asked) >= 5


def test_a_disk_that_fails_costs_only_the_pack() -> None:
    files = weight_files(mixed_shards())
    with file_sources(files) as sources, memory_file() as fd:
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            run = Ingest(
                sources, REF, "transformers", Task.EMBEDDING, PackTarget(read_only, None, KEY, LIMIT)
            )
            image = load(run)
            assert bytes(image.bytes) == expected_image(files, run.layout)
            with pytest.raises(PackError):
                run.finish_pack()
        finally:
            os.close(read_only)


# --- equal chunks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("embed.weight", "head.weight"), ("head.weight", "embed.weight")])
@pytest.mark.parametrize("together", [True, False])
def test_tied_weights_are_stored_once(order: tuple[str, str], together: bool) -> None:
    """In either order in the file, although only an earlier chunk may own what a later one shares."""
    data = big(5 * MIB, 4)
    one, other = ((name, "BF16", [len(data) // 2], data) for name in order)
    middle: Tensor = ("h.0.weight", "BF16", [MIB], big(2 * MIB, 5))
    files = weight_files([[one, middle, other]] if together else [[one, middle], [other]])
    with file_sources(files) as sources, memory_file() as fd, memory_file() as part_fd:
        done = ingest(sources, PackTarget(fd, part_fd, KEY, LIMIT))
        reader = check_pack(fd, files)
        assert done.summary is not None
        assert done.summary.deduplicated_bytes == 5 * MIB
        shared = [chunk.same_as for chunk in reader.index.chunks if chunk.same_as is not None]
        assert len(shared) == 2
        alone = sum(chunk.stored_bytes for chunk in reader.index.chunks if chunk.same_as is None)
        assert os.fstat(fd).st_size < alone + 64 * KIB
        assert done.summary.host == reader.host_sizes


def test_many_equal_chunks_share_one_extent() -> None:
    """Arriving in any order, from several threads: one owner, and it is the first of them all."""
    data = big(MIB, 6)
    shards: list[list[Tensor]] = [
        [(f"h.{(number * 7 + at * 3) % 20}.{number}.w", "BF16", [MIB // 2], data) for at in range(5)]
        for number in range(2)
    ]
    files = weight_files(shards)
    with file_sources(files) as sources, memory_file() as fd, memory_file() as part_fd:
        ingest(sources, PackTarget(fd, part_fd, KEY, LIMIT))
        reader = check_pack(fd, files)
        assert [chunk.same_as for chunk in reader.index.chunks] == [None, *[0] * 9]


def test_the_same_bytes_of_another_dtype_are_another_chunk() -> None:
    data = big(MIB, 7)
    files = weight_files([[("h.0.a", "BF16", [MIB // 2], data), ("h.1.a", "F16", [MIB // 2], data)]])
    with file_sources(files) as sources, memory_file() as fd:
        ingest(sources, PackTarget(fd, None, KEY, LIMIT))
        assert [chunk.same_as for chunk in check_pack(fd, files).index.chunks] == [None, None]


def test_image_of_the_samples_is_what_these_tests_expect() -> None:
    """The reference of this file is not the one of the pack tests: they must agree."""
    file, layout = small_model()
    assert bytes(image_of(file, layout)) == expected_image({"model.safetensors": file}, layout)
