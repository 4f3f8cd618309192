"""Bringing a model in from its origin: every byte right and hashed, the pack beside, and going on later.

Covers: files and feeds, bad and broken origins, cancelling, what a failing pack costs, equal chunks stored
once, and resuming after a death between any two writes. Does not cover: the agent's end of a feed
(``test_origin``), the pack file itself (``test_pack``), hostile headers (``tests/attacks``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from origin_samples import (
    CountedSource,
    Tensor,
    contents,
    feed,
    feed_sources,
    file_sources,
    listed,
    weight_files,
)
from pack_samples import KEY, REF, MemoryImage, image_of, memory_file, read_image, weights

from packer import pack_file, pack_writer, progress
from packer.index import PackError
from packer.ingest import Ingest
from packer.layout import CHUNK_BYTES, ImageLayout
from packer.pack import PackReader, verify
from packer.pack_writer import PackSummary
from packer.packing import PackTarget
from packer.pieces import PIECE_BYTES
from packer.progress import PROGRESS_BYTES_MAX, ProgressLog
from packer.sources import ASKS_AHEAD, FeedSource, FileSource, Source, SourceFailed, open_source
from packer.tiers import TierError
from packer.types import KIB, MIB, ModelRef, OriginFile, Task

LIMIT = 256 * MIB


def big(nbytes: int, seed: int) -> bytes:
    """Bytes like weights of bf16: few exponents, no run of them twice."""
    draw = np.random.default_rng(seed)
    words = draw.standard_normal(nbytes // 2 + 1, dtype=np.float32) * np.float32(0.02)
    return (words.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:nbytes]


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


def expected_image(files: Mapping[str, bytes], layout: ImageLayout) -> bytes:
    image = bytearray(layout.image_bytes)
    for placed in layout.tensors:
        info = placed.info
        data = files[info.file][info.file_offset : info.file_offset + info.nbytes]
        image[placed.image_offset : placed.image_offset + info.nbytes] = data
    return bytes(image)


@dataclass
class Done:
    """What an ingest left."""

    ingest: Ingest
    image: MemoryImage
    summary: PackSummary | None = None


def ingest(sources: Sequence[tuple[OriginFile, Source]], target: PackTarget | None = None) -> Done:
    """Load, and finish the pack if one is wanted."""
    run = Ingest(sources, REF, "transformers", Task.EMBEDDING, target)
    image = load(run)
    return Done(run, image, run.finish_pack() if target is not None else None)


def load(run: Ingest) -> MemoryImage:
    run.open()
    image = MemoryImage(run.layout.image_bytes)
    run.fill(image)
    return image


def check_pack(fd: int, files: Mapping[str, bytes]) -> PackReader:
    reader = PackReader(fd, KEY, REF)
    assert bytes(read_image(reader)) == expected_image(files, reader.index.layout)
    for path, data in files.items():
        if not path.endswith(".safetensors"):
            assert reader.file(path) == data
    assert verify(reader) == reader.index.layout.image_bytes
    return reader


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [file_sources, feed_sources])
def test_every_byte_arrives_and_the_pack_beside_restores_it(kind: Callable[..., object]) -> None:
    """From files and from feeds; the image was dirty, so the zeros between tensors are written too."""
    files = weight_files(mixed_shards())
    with kind(files) as sources, memory_file() as fd, memory_file() as part_fd:  # type: ignore[attr-defined]
        done = ingest(sources, PackTarget(fd, part_fd, KEY, LIMIT))
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
        assert done.ingest.side_files == {
            path: data for path, data in files.items() if not path.endswith(".safetensors")
        }
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
    files = weight_files(resume_shards())

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


# --- going on -------------------------------------------------------------------------------------


def resume_shards() -> list[list[Tensor]]:
    """Some ten chunks of one page to three, two of them equal, in a file order that is not the image's."""
    return [
        [
            ("head.weight", "BF16", [700 * KIB], big(1400 * KIB, 1)),
            *[(f"h.{at}.w", ("U8", "I8")[at % 2], [5000], weights("U8", 5000, at)) for at in range(7)],
            ("embed.weight", "BF16", [700 * KIB], big(1400 * KIB, 1)),
        ]
    ]


@dataclass
class Snapshots:
    """Both files as they are before each write, and with half of that write."""

    fd: int
    part_fd: int
    taken: list[tuple[bytes, bytes]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        with self._lock:
            if fd in (self.fd, self.part_fd):
                before = (contents(self.fd), contents(self.part_fd))
                self.taken.append(before)
                real_pwrite(fd, data[: len(data) // 2], offset)
                self.taken.append((contents(self.fd), contents(self.part_fd)))
            return real_pwrite(fd, data, offset)


real_pwrite = os.pwrite


def snapshots_of(
    files: Mapping[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    start: tuple[bytes, bytes] = (b"", b""),
    resume: bool = False,
) -> list[tuple[bytes, bytes]]:
    """What a killed process could leave, at every point of an ingest."""
    with file_sources(files) as sources, memory_file(start[0]) as fd, memory_file(start[1]) as part_fd:
        spy = Snapshots(fd, part_fd)
        with monkeypatch.context() as patch:
            patch.setattr(pack_file.os, "pwrite", spy.pwrite)
            ingest(sources, PackTarget(fd, part_fd, KEY, LIMIT, resume))
        return spy.taken


def go_on(files: Mapping[str, bytes], left: tuple[bytes, bytes]) -> tuple[int, int]:
    """Ingest from what was left; returns the bytes resumed, and the body bytes asked of the origin."""
    sources = {file.path: CountedSource(files[file.path]) for file in listed(files)}
    with memory_file(left[0]) as fd, memory_file(left[1]) as part_fd:
        done = ingest(
            [(file, sources[file.path]) for file in listed(files)],
            PackTarget(fd, part_fd, KEY, LIMIT, resume=True),
        )
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
        check_pack(fd, files)
        assert contents(part_fd) == b""
    asked = sum(
        sum(nbytes for _, nbytes in source.asked[1:])
        for path, source in sources.items()
        if path.endswith(".safetensors")
    )
    return done.ingest.resumed_bytes, asked


def test_an_ingest_goes_on_after_a_death_between_any_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the middle of each. What was stored is not asked of the origin again, ever more of it."""
    files = weight_files(resume_shards())
    taken = snapshots_of(files, monkeypatch)
    assert len(taken) > 40
    resumed, asked = zip(*(go_on(files, left) for left in taken), strict=True)
    assert resumed[0] == 0
    assert asked[0] > 2 * 1400 * KIB
    assert max(resumed) > 2 * 1400 * KIB
    assert min(asked) == 0
    # Extents land before their records, so what can be resumed grows but for a chunk that changes hands.
    assert sorted(resumed)[len(resumed) // 2] > 0
    for came, fetched in zip(resumed, asked, strict=True):
        assert came + fetched >= asked[0]


def test_an_ingest_goes_on_after_dying_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt moves and re-seals what the first one stored; it may die at any moment of that."""
    files = weight_files(resume_shards())
    first = snapshots_of(files, monkeypatch)
    left = first[len(first) * 2 // 3]
    whole, _ = go_on(files, left)
    assert whole > 0
    again = snapshots_of(files, monkeypatch, left, resume=True)
    resumed = [go_on(files, later)[0] for later in again]
    # A chunk that is being moved may be lost with the process, and its duplicate with it; others are not.
    assert min(resumed) >= whole - 2 * 1404 * KIB
    assert max(resumed) >= whole


def test_every_attempt_seals_with_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead attempt sealed and did not record would otherwise share a nonce with what replaces it."""
    files = weight_files(resume_shards())
    left = snapshots_of(files, monkeypatch)[-1]
    with file_sources(files) as sources, memory_file(left[0]) as fd, memory_file(left[1]) as part_fd:
        run = Ingest(
            sources, REF, "transformers", Task.EMBEDDING, PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        )
        run.open()
        first = {found.salt for found in ProgressLog(part_fd, KEY, REF, run.layout).read()}
        run.fill(MemoryImage(run.layout.image_bytes))
        second = {found.salt for found in ProgressLog(part_fd, KEY, REF, run.layout).read()}
        run.finish_pack()
        assert len(first) == len(second) == 1
        assert PackReader(fd, KEY, REF).salt in second - first


def test_what_was_left_by_somebody_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another key, another version, noise, cut and swapped files: the load is right and starts over."""
    files = weight_files(resume_shards())
    pack, part = snapshots_of(files, monkeypatch)[-1]
    for left in (
        (pack, b""),
        (b"", part),
        (pack, os.urandom(5000)),
        (os.urandom(len(pack)), part),
        (pack[::-1], part),
        (pack, part[1:]),
        (pack[4096:], part),
        (pack, (2**32 - 1).to_bytes(4, "little") + part),
    ):
        assert go_on(files, left)[0] == 0
    with file_sources(files) as sources, memory_file(pack) as fd, memory_file(part) as part_fd:
        done = ingest(sources, PackTarget(fd, part_fd, bytes(32), LIMIT, resume=True))
        assert done.ingest.resumed_bytes == 0
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)
    with file_sources(files) as sources, memory_file(pack) as fd, memory_file(part) as part_fd:
        other = ModelRef(REF.tenant, REF.name, "f" * 16)
        run = Ingest(
            sources, other, "transformers", Task.EMBEDDING, PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        )
        load(run)
        assert run.resumed_bytes == 0
        run.abandon()


def test_a_flipped_bit_of_what_was_left_costs_that_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    files = weight_files(resume_shards())
    pack, part = snapshots_of(files, monkeypatch)[-1]
    whole, _ = go_on(files, (pack, part))
    for at in range(5000, len(pack), len(pack) // 23):
        flipped = bytearray(pack)
        flipped[at] ^= 1 << at % 8
        assert go_on(files, (bytes(flipped), part))[0] <= whole
    for at in range(0, len(part), len(part) // 23):
        flipped = bytearray(part)
        flipped[at] ^= 1 << at % 8
        assert go_on(files, (pack, bytes(flipped)))[0] < whole


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=3000))
def test_any_bytes_as_progress_are_harmless(noise: bytes) -> None:
    _, layout = small()
    with memory_file(noise) as fd:
        assert ProgressLog(fd, KEY, REF, layout).read() == []
        assert contents(fd) == b""


def small() -> tuple[bytes, ImageLayout]:
    from pack_samples import small_model

    return small_model()


def test_progress_above_its_limit_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout = small()
    with memory_file() as fd:
        os.truncate(fd, PROGRESS_BYTES_MAX + 1)
        read: list[int] = []
        monkeypatch.setattr(progress.os, "pread", lambda *arguments: read.append(1))
        assert ProgressLog(fd, KEY, REF, layout).read() == []
        assert read == []
        assert os.fstat(fd).st_size == 0


def test_an_origin_that_changed_in_between_drops_what_was_kept() -> None:
    """The kept chunks may be the bad ones, so the next try has to read everything anew."""
    files = weight_files(resume_shards())
    name = "model-0.safetensors"
    bad = bytearray(files[name])
    bad[-1] ^= 1
    registered = listed(files)
    with memory_file() as fd, memory_file() as part_fd:
        sources = [(file, CountedSource(files[file.path])) for file in registered]
        target = PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        # The first load stores chunks of the changed file, and dies before its hash is known.
        run = Ingest(
            [(file, CountedSource(bytes(bad)) if file.path == name else source) for file, source in sources],
            REF,
            "transformers",
            Task.EMBEDDING,
            target,
        )
        run.open()
        with pytest.MonkeyPatch.context() as patch:
            # The encoders catch up before the hash is known.
            patch.setattr("packer.ingest._OriginReader.check", lambda reader: drain(run))
            run.fill(MemoryImage(run.layout.image_bytes))
        assert contents(part_fd) != b""
        with pytest.raises(TierError, match="interrupted load, which is dropped now") as refused:
            ingest(sources, target)
        assert not refused.value.corrupt
        assert contents(part_fd) == b""
        done = ingest(sources, target)
        assert done.ingest.resumed_bytes == 0
        check_pack(fd, files)


def drain(run: Ingest) -> None:
    """Let the pack get everything that is complete, and stop, as a death would."""
    pack = run._pack
    assert pack is not None
    pack._join()


def test_a_load_that_fails_keeps_what_it_has_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An origin that goes away in the middle: the second load asks only for the rest."""
    tensors: list[Tensor] = [
        (f"h.{at}.w", "BF16", [CHUNK_BYTES // 2], big(CHUNK_BYTES, at)) for at in range(4)
    ]
    files = weight_files([tensors])
    name = "model-0.safetensors"
    with memory_file() as fd, memory_file() as part_fd:
        target = PackTarget(fd, part_fd, KEY, LIMIT, resume=True)
        stored = threading.Event()
        real_add = ProgressLog.add

        def add(log: ProgressLog, *arguments: object) -> None:
            real_add(log, *arguments)  # type: ignore[arg-type]
            stored.set()

        monkeypatch.setattr(ProgressLog, "add", add)

        class Breaking(CountedSource):
            def read_into(self, offset: int, view: memoryview) -> None:
                if offset > 2 * CHUNK_BYTES + PIECE_BYTES:
                    stored.wait(30)
                    raise SourceFailed("the store is away")
                super().read_into(offset, view)

        sources = [
            (file, Breaking(files[name]) if file.path == name else CountedSource(files[file.path]))
            for file in listed(files)
        ]
        with pytest.raises(TierError, match="the store is away"):
            ingest(sources, target)
        assert contents(part_fd) != b""
        counted = {file.path: CountedSource(files[file.path]) for file in listed(files)}
        done = ingest([(file, counted[file.path]) for file in listed(files)], target)
        assert done.ingest.resumed_bytes >= CHUNK_BYTES
        body = sum(nbytes for _, nbytes in counted[name].asked[1:])
        assert body == 4 * CHUNK_BYTES - done.ingest.resumed_bytes
        check_pack(fd, files)
        assert bytes(done.image.bytes) == expected_image(files, done.ingest.layout)


def test_image_of_the_samples_is_what_these_tests_expect() -> None:
    """The reference of this file is not the one of the pack tests: they must agree."""
    file, layout = small()
    assert bytes(image_of(file, layout)) == expected_image({"model.safetensors": file}, layout)
