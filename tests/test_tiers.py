"""The restore pipeline: every chunk comes to its place, by either way of reading, or is named.

Covers whole and partial restores, cached and cold extents, cancelling, errors of the medium, the image and
the pack, duplicates, and the bound on memory. Does not cover what host segments hold (test_host_segment)
or flips of single bits (test_flips).
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from pack_samples import (
    KEY,
    REF,
    MemoryImage,
    every_codec_model,
    image_of,
    many_chunks_model,
    memory_file,
    model_of,
    pack_bytes,
    twin_pack,
    weights,
)

from packer import extents, tiers
from packer.codec import Workspace
from packer.extents import ExtentReader
from packer.layout import PAGE_BYTES, ChunkSpan, ImageLayout
from packer.mapping import resident_bytes
from packer.pack import PackReader
from packer.tiers import BAD_CHUNKS_MAX, TierError, restore
from packer.types import MIB

Residency = Callable[[ExtentReader, int, int], bool]


def all_cold(_: ExtentReader, offset: int, nbytes: int) -> bool:
    return False


def every_second(_: ExtentReader, offset: int, nbytes: int) -> bool:
    return offset // PAGE_BYTES % 2 == 0


def image_for(reader: PackReader) -> MemoryImage:
    return MemoryImage(reader.index.layout.image_bytes)


@contextmanager
def broken_pack(bad: Sequence[int], model: tuple[bytes, ImageLayout]) -> Iterator[PackReader]:
    """A pack in which one byte of each of these chunks was changed."""
    data = bytearray(pack_bytes(model=model))
    with memory_file(bytes(data)) as fd:
        reader = PackReader(fd, KEY)
        for number in bad:
            at = reader.index.chunks[number].offset
            os.pwrite(fd, bytes([data[at] ^ 1]), at)
        yield reader


def raise_error(error: BaseException) -> None:
    raise error


# --- what is restored -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residency", "past_cache"), [(None, False), (None, True), (all_cold, False), (every_second, False)]
)
def test_every_codec_comes_back_by_either_way_of_reading(
    residency: Residency | None, past_cache: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if residency is not None:
        monkeypatch.setattr(ExtentReader, "is_cached", residency)
    model = every_codec_model()
    path = tmp_path / "m.pack"
    path.write_bytes(pack_bytes(model=model))
    fd, direct_fd = os.open(path, os.O_RDONLY), open_direct(path)
    try:
        reader = PackReader(fd, KEY, REF, direct_fd)
        image = image_for(reader)
        facts = restore(reader, image, past_cache=past_cache)
        assert image.bytes == image_of(*model)
        assert facts.read_bytes == sum(chunk.extent_bytes for chunk in reader.index.chunks)
        assert facts.chunks == len(reader.index.chunks) == len(image.placed)
        assert not facts.host_filled
        if (past_cache or residency is all_cold) and direct_fd is not None:
            assert facts.direct_bytes == facts.read_bytes
        else:
            assert facts.direct_bytes < facts.read_bytes
    finally:
        os.close(fd)
        if direct_fd is not None:
            os.close(direct_fd)


def open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None


def test_partial_restores_move_only_what_is_missing() -> None:
    model = many_chunks_model(20)
    with memory_file(pack_bytes(model=model)) as fd:
        reader = PackReader(fd, KEY)
        for keywords, wanted in (
            ({"first_chunk": 17}, [17, 18, 19]),
            ({"first_chunk": 20}, []),
            ({"only": [7, 3, 7]}, [3, 7]),
            ({"only": []}, []),
        ):
            image = image_for(reader)
            facts = restore(reader, image, **keywords)
            spans = [reader.index.layout.chunks[number] for number in wanted]
            assert sorted(image.placed) == [span.image_offset for span in spans]
            assert facts.chunks == len(wanted)
            assert facts.read_bytes == PAGE_BYTES * len(wanted)
            expected = bytearray(b"\xa5" * len(image.bytes))
            for span in spans:
                part = slice(span.image_offset, span.image_offset + span.nbytes)
                expected[part] = image_of(*model)[part]
            assert image.bytes == expected


def test_chunks_that_the_pack_does_not_have_are_refused() -> None:
    with memory_file(pack_bytes()) as fd:
        reader = PackReader(fd, KEY)
        for keywords in ({"first_chunk": -1}, {"only": [0, 99]}, {"only": [-1]}):
            with pytest.raises(TierError) as caught:
                restore(reader, image_for(reader), **keywords)
            assert not caught.value.corrupt


def test_a_duplicate_is_read_once_and_placed_everywhere() -> None:
    data, image = twin_pack()
    with memory_file(data) as fd:
        reader = PackReader(fd, None)
        assert [chunk.same_as for chunk in reader.index.chunks] == [None, 0, None]
        found = image_for(reader)
        facts = restore(reader, found)
        assert found.bytes == image
        assert len(found.placed) == facts.chunks == 3
        own = [chunk for chunk in reader.index.chunks if chunk.same_as is None]
        assert facts.read_bytes == sum(chunk.extent_bytes for chunk in own)
        # A part that has only the duplicate must find the bytes too.
        found = image_for(reader)
        restore(reader, found, only=[1])
        span = reader.index.layout.chunks[1]
        part = slice(span.image_offset, span.image_offset + span.nbytes)
        assert found.bytes[part] == image[part]
        assert found.placed == [span.image_offset]


def test_a_sealed_duplicate_opens_under_the_number_of_its_owner() -> None:
    """What the writer finds to be equal is sealed once; the key binds it to the first chunk's place."""
    twin, other = weights("U8", MIB, 1), weights("U8", MIB, 2)
    rows = (("h.0.tied", twin), ("h.1.other", other), ("h.2.tied", twin), ("h.3.tied", twin))
    model = model_of([(name, "U8", [MIB], data) for name, data in rows])
    with memory_file(pack_bytes(model=model)) as fd:
        reader = PackReader(fd, KEY)
        assert [chunk.same_as for chunk in reader.index.chunks] == [None, None, 0, 0]
        image = image_for(reader)
        facts = restore(reader, image)
        assert image.bytes == image_of(*model)
        assert facts.read_bytes == 2 * MIB
        image = image_for(reader)
        assert restore(reader, image, first_chunk=3).read_bytes == MIB
        at = reader.index.chunks[0].offset
        os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1]), at)
        with pytest.raises(TierError) as caught:
            restore(reader, image_for(reader))
        assert caught.value.chunks == (0, 2, 3)


# --- bad chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", [None, all_cold, every_second])
@pytest.mark.parametrize("bad", [[0], [3], [19], [0, 1, 2], [4, 9, 11, 18], list(range(20))])
def test_bad_chunks_are_named_and_all_others_are_in_the_image(
    bad: list[int], residency: Residency | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if residency is not None:
        monkeypatch.setattr(ExtentReader, "is_cached", residency)
    model = many_chunks_model(20)
    good = image_of(*model)
    with broken_pack(bad, model) as reader:
        image = image_for(reader)
        with pytest.raises(TierError) as caught:
            restore(reader, image)
        assert caught.value.corrupt
        assert caught.value.chunks == tuple(bad)
        for number, span in enumerate(reader.index.layout.chunks):
            part = slice(span.image_offset, span.image_offset + span.nbytes)
            assert (span.image_offset in image.placed) == (number not in bad)
            assert number in bad or image.bytes[part] == good[part]


def test_repaired_chunks_complete_the_image() -> None:
    model = many_chunks_model(20)
    with broken_pack([2, 5], model) as reader:
        image = image_for(reader)
        with pytest.raises(TierError) as caught:
            restore(reader, image)
        for number in (2, 5):
            at = reader.index.chunks[number].offset
            os.pwrite(reader.fd, bytes([os.pread(reader.fd, 1, at)[0] ^ 1]), at)
        facts = restore(reader, image, only=caught.value.chunks)
        assert facts.chunks == 2
        assert image.bytes == image_of(*model)


def test_a_bad_extent_spoils_every_chunk_that_has_its_bytes() -> None:
    data, _ = twin_pack()
    with memory_file(data) as fd:
        reader = PackReader(fd, None)
        os.pwrite(fd, b"\xff" * reader.index.chunks[0].extent_bytes, reader.index.chunks[0].offset)
        with pytest.raises(TierError) as caught:
            restore(reader, image_for(reader))
        assert caught.value.chunks == (0, 1)


@pytest.mark.parametrize("residency", [None, all_cold])
def test_too_many_bad_chunks_make_the_whole_copy_bad(
    residency: Residency | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if residency is not None:
        monkeypatch.setattr(ExtentReader, "is_cached", residency)
    model = many_chunks_model(BAD_CHUNKS_MAX + 1)
    for bad in (BAD_CHUNKS_MAX, BAD_CHUNKS_MAX + 1):
        with broken_pack(range(bad), model) as reader, pytest.raises(TierError) as caught:
            restore(reader, image_for(reader))
        assert caught.value.corrupt
        assert len(caught.value.chunks) == (bad if bad <= BAD_CHUNKS_MAX else 0)


# --- errors of the medium -------------------------------------------------------------------------


@pytest.mark.parametrize("residency", [None, all_cold])
def test_a_lost_sector_is_a_bad_chunk(residency: Residency | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if residency is not None:
        monkeypatch.setattr(ExtentReader, "is_cached", residency)
    model = many_chunks_model(12)
    with memory_file(pack_bytes(model=model)) as fd:
        reader = PackReader(fd, KEY)
        lost, preadv = reader.index.chunks[6].offset, os.preadv

        def read(descriptor: int, views: list[memoryview], offset: int) -> int:
            if offset == lost:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, views, offset)

        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(TierError, match="Input/output") as caught:
            restore(reader, image_for(reader))
        assert caught.value.corrupt
        assert caught.value.chunks == (6,)


@pytest.mark.parametrize("residency", [None, all_cold])
def test_a_passing_error_ends_the_restore_and_blames_no_chunk(
    residency: Residency | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if residency is not None:
        monkeypatch.setattr(ExtentReader, "is_cached", residency)
    with memory_file(pack_bytes()) as fd:
        reader = PackReader(fd, KEY)
        monkeypatch.setattr(os, "preadv", lambda *_: raise_error(OSError(errno.ENOMEM, "no memory")))
        with pytest.raises(TierError, match="no memory") as caught:
            restore(reader, image_for(reader))
        assert not caught.value.corrupt
        assert caught.value.chunks == ()


def test_a_file_cut_short_while_it_is_read_is_bad() -> None:
    model = many_chunks_model(12)
    with memory_file(pack_bytes(model=model)) as fd:
        reader = PackReader(fd, KEY)
        os.ftruncate(fd, reader.index.chunks[10].offset)
        with pytest.raises(TierError, match="cut short") as caught:
            restore(reader, image_for(reader))
        assert caught.value.chunks == (10, 11)


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_refused_direct_reads_fall_back_to_the_cache_for_good(
    refusal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems accept the flag and refuse the read; some devices want larger blocks."""
    monkeypatch.setattr(ExtentReader, "is_cached", all_cold)
    model = many_chunks_model(200)
    with memory_file(pack_bytes(model=model)) as fd:
        direct_fd, preadv = os.dup(fd), os.preadv
        asked: list[int] = []

        def read(descriptor: int, views: list[memoryview], offset: int) -> int:
            if descriptor == direct_fd:
                asked.append(offset)
                raise OSError(refusal, os.strerror(refusal))
            return preadv(descriptor, views, offset)

        monkeypatch.setattr(os, "preadv", read)
        reader = PackReader(fd, KEY, direct_fd=direct_fd)
        image = image_for(reader)
        facts = restore(reader, image)
        os.close(direct_fd)
        assert image.bytes == image_of(*model)
        assert facts.direct_bytes == 0
        assert 1 <= len(asked) <= tiers.IO_THREADS


def test_short_direct_reads_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExtentReader, "is_cached", all_cold)
    model = every_codec_model()
    with memory_file(pack_bytes(model=model)) as fd:
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda d, views, at: preadv(d, [views[0][:PAGE_BYTES]], at))
        reader = PackReader(fd, KEY, direct_fd=fd)
        image = image_for(reader)
        restore(reader, image)
        assert image.bytes == image_of(*model)


# --- cancelling, and errors of the image ----------------------------------------------------------


class WatchedImage(MemoryImage):
    """Calls back before each chunk is placed."""

    def __init__(self, nbytes: int, watch: Callable[[int], None]) -> None:
        super().__init__(nbytes)
        self.watch = watch

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        self.watch(len(self.placed))
        super().place(span, codec_id, planes, workspace)


@pytest.mark.parametrize("residency", [None, all_cold, every_second])
def test_a_cancelled_restore_ends_between_chunks(
    residency: Residency | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if residency is not None:
        monkeypatch.setattr(ExtentReader, "is_cached", residency)
    before = {*threading.enumerate()}
    with memory_file(pack_bytes(model=many_chunks_model(200))) as fd:
        reader = PackReader(fd, KEY)
        cancelled = threading.Event()
        image = WatchedImage(
            reader.index.layout.image_bytes, lambda placed: cancelled.set() if placed >= 20 else None
        )
        with pytest.raises(TierError) as caught:
            restore(reader, image, cancelled=cancelled)
        assert caught.value.cancelled
        assert not caught.value.corrupt
        assert len(image.placed) < 20 + 2 * tiers.DECODE_THREADS_MAX
        with pytest.raises(TierError) as caught:
            restore(reader, image, cancelled=cancelled)
        assert caught.value.cancelled
    assert not {*threading.enumerate()} - before


@pytest.mark.parametrize("residency", [None, all_cold, every_second])
@pytest.mark.parametrize("error", [MemoryError("the device is full"), OSError(errno.EFAULT, "gone")])
def test_errors_of_the_image_come_out_as_they_are(
    error: BaseException, residency: Residency | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if residency is not None:
        monkeypatch.setattr(ExtentReader, "is_cached", residency)
    before = {*threading.enumerate()}
    with memory_file(pack_bytes(model=many_chunks_model(200))) as fd:
        reader = PackReader(fd, KEY)
        image = WatchedImage(
            reader.index.layout.image_bytes, lambda placed: raise_error(error) if placed >= 10 else None
        )
        with pytest.raises(type(error)) as caught:
            restore(reader, image)
        assert caught.value is error
    assert not {*threading.enumerate()} - before


# --- residency ------------------------------------------------------------------------------------


def test_cached_pages_are_counted_and_dropped_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * PAGE_BYTES))
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.pread(fd, 64 * PAGE_BYTES, 0)
        assert extents.cached_pages(fd, 0, 64 * PAGE_BYTES) == 64
        assert extents.cached_pages(fd, 8 * PAGE_BYTES, 4 * PAGE_BYTES) == 4
        assert resident_bytes(fd, 0, 64 * PAGE_BYTES) == 64 * PAGE_BYTES
        assert resident_bytes(fd, 8 * PAGE_BYTES, 4 * PAGE_BYTES) == 4 * PAGE_BYTES
        assert extents.cached_pages(fd, 0, 0) == 0
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if extents.cached_pages(fd, 0, 64 * PAGE_BYTES) == 0:  # a memory file system never drops
            assert resident_bytes(fd, 0, 64 * PAGE_BYTES) == 0
            assert not ExtentReader(fd).is_cached(0, 64 * PAGE_BYTES)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("cached", "expected"), [(None, True), (0, False), (56, True), (55, False), (64, True)]
)
def test_extents_with_few_missing_pages_count_as_cached(
    cached: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extents, "cached_pages", lambda *_: cached)
    assert ExtentReader(0).is_cached(0, 64 * PAGE_BYTES) is expected


def test_a_kernel_that_does_not_tell_is_no_error() -> None:
    assert extents.cached_pages(-1, 0, PAGE_BYTES) is None
    assert ExtentReader(-1).is_cached(0, PAGE_BYTES)


# --- memory ---------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import fcntl, os, sys
sys.path[:0] = [sys.argv[1]]
from contextlib import contextmanager
from packer.codec import decode_into
from packer.extents import ExtentReader
from packer.host_segment import HostWriter
from packer.layout import CHUNK_BYTES, TensorInfo, lay_out
from packer.pack import PackReader
from packer.pack_writer import PackWriter
from packer.tiers import restore
from packer.types import HostForm, ModelRef, Task

chunks, way = int(sys.argv[2]), sys.argv[3]
size = CHUNK_BYTES
layout = lay_out([TensorInfo(f"h.{n}.w", "BF16", (size // 2,), "m", 0, size) for n in range(chunks)])
fd = os.memfd_create("pack")
writer = PackWriter(fd, ModelRef("a", "b", "0" * 16), "e", Task.EMBEDDING, layout, bytes(32), 1 << 40)
block = bytearray(os.urandom(size // 2) * 2)
block[1::2] = bytes(b"\\x3c\\x3b\\xbc\\x3d"[v & 3] for v in os.urandom(size // 2))
for n in range(chunks):
    block[0:4] = n.to_bytes(4, "little")
    writer.add_chunk(n, memoryview(block))
writer.finish()
out = memoryview(bytearray(size))

class Nowhere:
    @contextmanager
    def filling(self, offset, nbytes):
        yield out[:nbytes]
    reading = filling
    def place(self, span, codec_id, planes, workspace):
        decode_into(codec_id, planes, out[: span.nbytes], workspace)

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

if way == "cold":
    ExtentReader.is_cached = lambda *_: False
reader = PackReader(fd, bytes(32))
if way == "mapped":
    host_fd = os.memfd_create("host", os.MFD_ALLOW_SEALING)
    assert restore(reader, Nowhere(), host=HostWriter(host_fd, reader.index, {}, HostForm.STORED)).host_filled
    fcntl.fcntl(host_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    reader = PackReader(host_fd, None)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak from here on
before = peak()
assert restore(reader, Nowhere()).chunks == chunks
print(peak() - before)
"""


@pytest.mark.parametrize("way", ["cold", "warm", "mapped"])
def test_a_restore_takes_bounded_memory_beside_the_image(way: str) -> None:
    """The pack is larger than what may be taken; the image goes nowhere, so that it is not counted."""
    chunks = 4 * tiers.RESTORE_BYTES_MAX // (8 * 1024 * 1024)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(Path(__file__).parent.parent), str(chunks), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= tiers.RESTORE_BYTES_MAX
