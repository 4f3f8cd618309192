"""The promise about damage: a pack in which any one bit changed, or whose writing was cut off anywhere, is
found out by the real restore, chunk by chunk, and no image of it is accepted.

Every bit of the header page and of the index is flipped, and 10,000 bits of the chunks. Does not cover
packs forged with the key (attacks/test_hostile_packs) or how damage is repaired (test_repair).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest
from pack_samples import (
    KEY,
    REF,
    MemoryImage,
    every_codec_model,
    image_of,
    memory_file,
    pack_bytes,
    write_pack,
)

from packer.codec import CodecId
from packer.extents import ExtentReader
from packer.index import HEADER_BYTES, PackError, PackIndex, up_to_page
from packer.pack import PackReader, read_header
from packer.tiers import TierError, restore

CHUNK_FLIPS = 10_000
SECTOR_BYTES = 512


def flip(fd: int, bit: int) -> None:
    byte = os.pread(fd, 1, bit // 8)[0]
    os.pwrite(fd, bytes([byte ^ (1 << bit % 8)]), bit // 8)


def found_out(fd: int) -> bool:
    """Whether opening or restoring this file finds it corrupt; anything else than that or success fails."""
    try:
        reader = PackReader(fd, KEY, REF)
        restore(reader, MemoryImage(reader.index.layout.image_bytes))
        for path, _ in reader.index.files:
            reader.file(path)
    except (PackError, TierError) as error:
        if not error.corrupt:
            raise
        return True
    return False


# --- single bits ----------------------------------------------------------------------------------


def unseen_flips(first_byte: int, last_byte: int) -> list[int]:
    """The bits in this range whose flip the reader does not find, each flipped on its own."""
    unseen: list[int] = []
    with memory_file(pack_bytes(model=every_codec_model())) as fd:
        assert not found_out(fd)
        for bit in range(8 * first_byte, 8 * last_byte):
            flip(fd, bit)
            if not found_out(fd):
                unseen.append(bit)
            flip(fd, bit)
        assert not found_out(fd)
    return unseen


def test_every_flipped_bit_of_the_header_page_is_found() -> None:
    assert unseen_flips(0, HEADER_BYTES) == []


def test_every_flipped_bit_of_the_index_and_its_padding_is_found() -> None:
    with memory_file(pack_bytes(model=every_codec_model())) as fd:
        header = read_header(fd)
    assert unseen_flips(header.index_offset, header.file_bytes) == []


def test_every_flipped_bit_of_a_side_file_is_found() -> None:
    data = pack_bytes(model=every_codec_model())
    with memory_file(data) as fd:
        reader = PackReader(fd, KEY)
        for stored in reader.index.side_files:
            for bit in range(8 * stored.offset, 8 * (stored.offset + stored.extent_bytes), 7):
                flip(fd, bit)
                with pytest.raises(PackError) as caught:
                    reader.file(stored.path)
                assert caught.value.corrupt
                flip(fd, bit)
        assert not found_out(fd)


def test_sampled_flips_of_chunks_are_found_each_in_its_chunk_and_never_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One bit in each of some chunks at a time: the restore must name exactly those chunks, so each flip
    is found on its own. Planes and padding; every codec; cached and cold reads alike."""
    file, layout = every_codec_model()
    good = image_of(file, layout)
    draw = random.Random(20261121)
    flipped = 0
    monkeypatch.setattr(ExtentReader, "is_cached", lambda *_: draw.random() < 0.5)
    with memory_file(pack_bytes(model=(file, layout))) as fd:
        reader = PackReader(fd, KEY, REF)
        index = reader.index
        assert {chunk.codec_id for chunk in index.chunks} == set(CodecId)
        while flipped < CHUNK_FLIPS:
            chunks = sorted(draw.sample(range(len(index.chunks)), draw.randint(1, len(index.chunks))))
            bits = [one_bit(index, number, draw) for number in chunks]
            for bit in bits:
                flip(fd, bit)
            image = MemoryImage(layout.image_bytes)
            with pytest.raises(TierError) as caught:
                restore(reader, image)
            assert caught.value.corrupt
            assert caught.value.chunks == tuple(chunks), bits
            check_others(image, good, index, chunks)
            for bit in bits:
                flip(fd, bit)
            flipped += len(bits)
        assert not found_out(fd)


def one_bit(index: PackIndex, number: int, draw: random.Random) -> int:
    """A bit of this chunk's extent; half of them in its planes, which padding outweighs in small chunks."""
    chunk = index.chunks[number]
    nbytes = draw.choice((chunk.stored_bytes, chunk.extent_bytes))
    return 8 * chunk.offset + draw.randrange(8 * nbytes)


def check_others(image: MemoryImage, good: bytearray, index: PackIndex, bad: Sequence[int]) -> None:
    for number, span in enumerate(index.layout.chunks):
        part = slice(span.image_offset, span.image_offset + span.nbytes)
        assert (span.image_offset in image.placed) == (number not in bad)
        assert number in bad or image.bytes[part] == good[part]


# --- torn writes ----------------------------------------------------------------------------------


class Writes:
    """Every write of a pack, in order, and after which of them a sync came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self.syncs: list[int] = []
        file, layout = every_codec_model()
        with monkeypatch.context() as patch, memory_file() as fd:
            patch.setattr(os, "pwrite", self._pwrite)
            patch.setattr(os, "fsync", lambda _: self.syncs.append(len(self.writes)))
            write_pack(fd, layout, image_of(file, layout))
            self.size_bytes = os.fstat(fd).st_size

    def _pwrite(self, _: int, data: bytes | memoryview, offset: int) -> int:
        self.writes.append((offset, bytes(data)))
        return len(data)

    def crashed(self, survivors: Sequence[tuple[int, bytes]], size_bytes: int | None = None) -> bool:
        """Whether a file with only these writes is found out. Its size is the final one if not given:
        sizes may reach the disk before the bytes do."""
        with memory_file() as fd:
            os.ftruncate(fd, self.size_bytes if size_bytes is None else size_bytes)
            for offset, data in survivors:
                os.pwrite(fd, data, offset)
            if size_bytes is not None:
                os.ftruncate(fd, size_bytes)
            return found_out(fd)


def test_a_crash_after_any_write_or_in_the_middle_of_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Writes(monkeypatch)
    assert not log.crashed(log.writes)
    for count in range(len(log.writes)):
        offset, data = log.writes[count]
        for done in (0, 1, len(data) // 2, len(data) - 1):
            assert log.crashed([*log.writes[:count], (offset, data[:done])]), (count, done)


def test_the_header_is_written_last_and_after_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Writes(monkeypatch)
    assert log.writes[-1][0] == 0
    assert len(log.writes[-1][1]) == HEADER_BYTES
    assert [offset for offset, _ in log.writes].count(0) == 1
    assert log.syncs == [len(log.writes) - 1, len(log.writes)]


def test_writes_that_reach_the_disk_in_any_order_before_a_crash_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first sync any subset of the writes may be on the disk, the header not among them; after
    it the header may come in any of its sectors."""
    log = Writes(monkeypatch)
    draw = random.Random(7)
    body, (_, header) = log.writes[:-1], log.writes[-1]
    for _ in range(200):
        survivors = [write for write in body if draw.random() < 0.8]
        assert log.crashed(survivors, draw.choice((None, draw.randrange(log.size_bytes))))
    sectors = [(at, header[at : at + SECTOR_BYTES]) for at in range(0, HEADER_BYTES, SECTOR_BYTES)]
    full = [sector for sector in sectors if any(sector[1])]
    for _ in range(50):
        some = draw.sample(full, draw.randrange(len(full)))
        assert log.crashed([*body, *some])


def test_a_body_write_that_was_lost_in_spite_of_the_sync_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lies about its cache: the header is there and one of the parts is not."""
    log = Writes(monkeypatch)
    for lost in range(len(log.writes) - 1):
        offset, data = log.writes[lost]
        rest = [write for at, write in enumerate(log.writes) if at != lost]
        assert log.crashed(rest), lost
        stale = bytes(data[: up_to_page(len(data)) // 2]).ljust(len(data), b"\0")
        if stale != data:
            assert log.crashed([*rest, (offset, stale)]), lost
