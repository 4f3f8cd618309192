"""Threat: a pack or a host segment whose index or planes were forged with care.

A forger of a sealed pack needs the version's key; a host segment could be forged by a compromised
worker of the same tenant. Either way every case is refused as corrupt, in bounded memory, and decoding
writes nowhere but into its destination.
"""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_samples import (
    MemoryImage,
    frame,
    host_bytes,
    lying_frame,
    memory_file,
    pack_bytes,
    three_twins,
    twin_pack,
)

from packer.codec import CodecId
from packer.index import (
    HEADER_BYTES,
    INDEX_BYTES_MAX,
    PackError,
    PackHeader,
    decode_header,
    encode_header,
    up_to_page,
)
from packer.layout import CHUNK_BYTES, PAGE_BYTES
from packer.pack import PackReader, verify
from packer.pack_file import Scratch
from packer.tiers import TierError, restore
from packer.types import HostForm

Raw = list[object]
# Fields of the index, of a tensor, of a chunk and of a side file, as they lie in the file.
REF, ENGINE, TASK, IMAGE, WEIGHT_FILES, TENSORS, CHUNKS, FILES, BASES, FINGERPRINT_KEY = range(10)
NAME, DTYPE, SHAPE, FILE, FILE_OFFSET, NBYTES, IMAGE_OFFSET = range(7)
CHUNK_NBYTES, CHUNK_DTYPE, CODEC, OFFSET, PLANES, TAGS, SAME_AS, FINGERPRINT, BASE = range(9)


def opened(data: bytes | None = None) -> tuple[bytes, PackHeader, Raw]:
    """A host segment: its body up to the index, its header, its index as plain lists."""
    data = data or host_bytes(HostForm.STORED)
    header = decode_header(data[:HEADER_BYTES], len(data))
    index = data[header.index_offset : header.index_offset + header.index_bytes]
    return data[: header.index_offset], header, msgspec.msgpack.decode(index)


def forged(body: bytes, header: PackHeader, index: bytes) -> bytes:
    """The image with another index, its header right in every digest and size."""
    good = replace(
        header,
        index_offset=len(body),
        index_bytes=len(index),
        file_bytes=len(body) + up_to_page(len(index)),
        index_sha256=hashlib.sha256(index).digest(),
    )
    return encode_header(good) + body[HEADER_BYTES:] + index.ljust(up_to_page(len(index)), b"\0")


def refused(data: bytes) -> str:
    with memory_file(data) as fd, pytest.raises(PackError) as caught:
        verify(PackReader(fd, None))
    assert caught.value.corrupt, caught.value
    return str(caught.value)


def rows(index: Raw, field: int) -> list[Raw]:
    found = index[field]
    assert isinstance(found, list)
    return found


def put(field: int, row: int, column: int, value: object) -> Callable[[Raw], None]:
    def change(index: Raw) -> None:
        rows(index, field)[row][column] = value

    return change


def top(field: int, value: object) -> Callable[[Raw], None]:
    def change(index: Raw) -> None:
        index[field] = value

    return change


def twice(field: int, row: int) -> Callable[[Raw], None]:
    def change(index: Raw) -> None:
        rows(index, field).append(rows(index, field)[row])

    return change


def gone(field: int, row: int) -> Callable[[Raw], None]:
    def change(index: Raw) -> None:
        del rows(index, field)[row]

    return change


CASES: dict[str, Callable[[Raw], None]] = {
    "no model": top(REF, ""),
    "a model that climbs": top(REF, "acme/../x@0123456789abcdef"),
    "a model without version": top(REF, "acme/tiny"),
    "unknown task": top(TASK, "mining"),
    "engine is a number": top(ENGINE, 7),
    "huge image": top(IMAGE, 2**62),
    "image of another size": top(IMAGE, PAGE_BYTES),
    "negative image": top(IMAGE, -PAGE_BYTES),
    "no weight files": top(WEIGHT_FILES, []),
    "a field too few": lambda index: index.__delitem__(-1),
    "a field too many": lambda index: index.append(1),
    "tensor named twice": twice(TENSORS, 0),
    "tensor that climbs": put(TENSORS, 0, NAME, "../../etc/x"),
    "tensor of unknown dtype": put(TENSORS, 0, DTYPE, "F99"),
    "tensor of another dtype than its chunk": put(TENSORS, 0, DTYPE, "I32"),
    "tensor larger than its shape": put(TENSORS, 0, NBYTES, 10**6),
    "tensor outside of the image": put(TENSORS, 0, IMAGE_OFFSET, 2**38),
    "tensor over another": put(TENSORS, 1, IMAGE_OFFSET, 0),
    "tensor misaligned": put(TENSORS, 0, IMAGE_OFFSET, 4),
    "tensor with nine dimensions": put(TENSORS, 0, SHAPE, [1] * 9),
    "tensor with a shape that overflows": put(TENSORS, 0, SHAPE, [2**40] * 8),
    "tensor in a file that is not there": put(TENSORS, 0, FILE, 200),
    "chunk missing": gone(CHUNKS, 0),
    "chunk twice": twice(CHUNKS, 0),
    "empty chunk": put(CHUNKS, 0, CHUNK_NBYTES, 0),
    "chunk larger than any buffer": put(CHUNKS, 0, CHUNK_NBYTES, 2 * CHUNK_BYTES),
    "chunk of half a page": put(CHUNKS, 0, CHUNK_NBYTES, 2048),
    "chunk of unknown dtype": put(CHUNKS, 0, CHUNK_DTYPE, "X"),
    "chunk before the file": put(CHUNKS, 0, OFFSET, -4096),
    "chunk in the header": put(CHUNKS, 0, OFFSET, 0),
    "chunk over another": put(CHUNKS, 1, OFFSET, HEADER_BYTES + PAGE_BYTES),
    "chunk behind the file": put(CHUNKS, 0, OFFSET, 2**39),
    "chunk stored larger than it is": put(CHUNKS, 0, PLANES, [CHUNK_BYTES, CHUNK_BYTES]),
    "plane of huge size": put(CHUNKS, 0, PLANES, [2**63]),
    "plane of negative size": put(CHUNKS, 0, PLANES, [-1, 4000]),
    "no planes": put(CHUNKS, 0, PLANES, []),
    "five planes": put(CHUNKS, 0, PLANES, [1] * 5),
    "tags missing": put(CHUNKS, 0, TAGS, b""),
    "codec from the future": put(CHUNKS, 0, CODEC, 77),
    "codec above its limit": put(CHUNKS, 0, CODEC, 2**20),
    "another codec": put(CHUNKS, 0, CODEC, CodecId.FILL),
    "side file twice": twice(FILES, 0),
    "side file missing": gone(FILES, 0),
    "side file without tag": put(FILES, 0, 3, b""),
    "side file over another": put(FILES, 1, 2, HEADER_BYTES),
    "side file of huge size": put(FILES, 0, 1, 2**39),
    "side file with a long path": put(FILES, 0, 0, "x" * 10_000),
}


@pytest.mark.parametrize("case", list(CASES))
def test_forged_indexes_are_refused(case: str) -> None:
    body, header, index = opened()
    CASES[case](index)
    refused(forged(body, header, msgspec.msgpack.encode(index)))


# Chunk 1 of this model has the bytes of chunk 0; each case makes it, or chunk 2, something that lies.
DUPLICATES: dict[str, Callable[[Raw], None]] = {
    "of itself": put(CHUNKS, 1, SAME_AS, 1),
    "of a later chunk": put(CHUNKS, 1, SAME_AS, 2),
    "of a chunk that is not there": put(CHUNKS, 1, SAME_AS, 3),
    "of a negative chunk": put(CHUNKS, 1, SAME_AS, -1),
    "of a huge number": put(CHUNKS, 1, SAME_AS, 2**64 - 1),
    "of a text": put(CHUNKS, 1, SAME_AS, "0"),
    "of a truth": put(CHUNKS, 1, SAME_AS, False),
    "of nothing, and without an extent": put(CHUNKS, 1, SAME_AS, None),
    "of a chunk of another size and dtype": lambda index: row_of(index, 2).__setitem__(
        slice(CODEC, None), [0, 0, [], b"", 0]
    ),
    "of a chunk of another size": put(CHUNKS, 1, CHUNK_NBYTES, PAGE_BYTES),
    "of a chunk of another dtype": put(CHUNKS, 1, CHUNK_DTYPE, "F16"),
    "with a codec": put(CHUNKS, 1, CODEC, CodecId.N12),
    "with an offset": put(CHUNKS, 1, OFFSET, HEADER_BYTES),
    "with planes": put(CHUNKS, 1, PLANES, [1]),
    "with tags": put(CHUNKS, 1, TAGS, bytes(16)),
    "whose owner is a duplicate": lambda index: row_of(index, 0).__setitem__(
        slice(CODEC, None), [0, 0, [], b"", 0]
    ),
}


def row_of(index: Raw, number: int) -> Raw:
    return rows(index, CHUNKS)[number]


@pytest.mark.parametrize("case", list(DUPLICATES))
def test_forged_duplicates_are_refused(case: str) -> None:
    body, header, index = opened(twin_pack()[0])
    assert row_of(index, 1)[SAME_AS] == 0
    DUPLICATES[case](index)
    refused(forged(body, header, msgspec.msgpack.encode(index)))


def test_a_chain_of_duplicates_is_refused() -> None:
    """Each would have to be followed; the writer names the chunk that has the bytes."""
    body, header, index = opened(three_twins())
    row_of(index, 2)[SAME_AS] = 1
    assert "which has none" in refused(forged(body, header, msgspec.msgpack.encode(index)))


def test_a_codec_from_the_future_costs_only_its_chunk() -> None:
    """Ids are added in later versions; a reader can still tell sizes and restore everything else."""
    body, header, index = opened()
    row_of(index, 2)[CODEC] = 60_000
    with memory_file(forged(body, header, msgspec.msgpack.encode(index))) as fd:
        reader = PackReader(fd, None)
        assert reader.file("config.json")
        assert reader.host_sizes.stored_bytes > 0
        image = MemoryImage(reader.index.layout.image_bytes)
        with pytest.raises(TierError, match="not known to this version") as caught:
            restore(reader, image)
        assert caught.value.corrupt
        assert caught.value.chunks == (2,)
        assert len(image.placed) == len(reader.index.chunks) - 1


def test_parts_must_tile_the_file() -> None:
    """A hole could hide bytes that nobody checks, an overlap would make one part of another's bytes."""
    body, header, index = opened()
    plain = msgspec.msgpack.encode(index)
    assert "parts end at" in refused(forged(body + bytes(PAGE_BYTES), header, plain))
    last = max(rows(index, CHUNKS), key=lambda row: int(str(row[OFFSET])))
    last[OFFSET] = int(str(last[OFFSET])) + PAGE_BYTES
    moved = msgspec.msgpack.encode(index)
    assert "a part starts at" in refused(forged(body + bytes(PAGE_BYTES), header, moved))


def test_a_chunk_may_not_be_stored_larger_than_it_is() -> None:
    """Buffers for stored bytes are sized by the chunk; here the file itself is without fault."""
    assert "larger than the chunk" in refused(with_first_chunk(CodecId.ZSTD, [os.urandom(3 * PAGE_BYTES)]))
    assert "larger than the chunk" in refused(with_first_chunk(CodecId.ZSTD, [bytes(2 * CHUNK_BYTES)]))


def test_the_forger_of_these_tests_makes_valid_files_otherwise() -> None:
    body, header, index = opened()
    with memory_file(forged(body, header, msgspec.msgpack.encode(index))) as fd:
        verify(PackReader(fd, None))


@pytest.mark.parametrize(
    "change",
    [
        {"index_bytes": 0},
        {"index_bytes": INDEX_BYTES_MAX + 1},
        {"index_bytes": 2**63},
        {"index_offset": 0},
        {"index_offset": 2**63 - PAGE_BYTES},
        {"index_offset": HEADER_BYTES + 1},
        {"file_bytes": 0},
        {"file_bytes": 2**64 - 1},
    ],
)
def test_forged_headers_are_refused(change: dict[str, int]) -> None:
    body, header, index = opened()
    data = forged(body, header, msgspec.msgpack.encode(index))
    good = decode_header(data[:HEADER_BYTES], len(data))
    page = encode_header(
        replace(
            good,
            index_offset=change.get("index_offset", good.index_offset),
            index_bytes=change.get("index_bytes", good.index_bytes),
            file_bytes=change.get("file_bytes", good.file_bytes),
        )
    )
    refused(page + data[HEADER_BYTES:])


def test_other_formats_and_flags_are_refused() -> None:
    data = bytearray(pack_bytes())
    for at, value in ((8, 2), (8, 4), (10, 3), (10, 0x81), (12, 1)):
        page = bytearray(data[:HEADER_BYTES])
        page[at] = value
        page[-32:] = hashlib.sha256(page[:-32]).digest()
        with pytest.raises(PackError) as caught:
            decode_header(bytes(page), len(data))
        assert caught.value.corrupt


# --- planes ---------------------------------------------------------------------------------------


def with_first_chunk(codec: int, planes: list[bytes]) -> bytes:
    """An opened image whose first chunk (two pages of fp32) is stored as these planes."""
    body, header, index = opened()
    chunk = min(rows(index, CHUNKS), key=lambda row: int(str(row[OFFSET])))
    sizes = chunk[PLANES]
    assert isinstance(sizes, list)
    old, stored = up_to_page(sum(sizes)), b"".join(planes)
    moved = up_to_page(len(stored)) - old
    for row, column in [
        *((row, OFFSET) for row in rows(index, CHUNKS)),
        *((row, 2) for row in rows(index, FILES)),
    ]:
        if row is not chunk and int(str(row[column])) > int(str(chunk[OFFSET])):
            row[column] = int(str(row[column])) + moved
    start = int(str(chunk[OFFSET]))
    chunk[CODEC], chunk[PLANES], chunk[TAGS] = (
        codec,
        [len(plane) for plane in planes],
        bytes(16 * len(planes)),
    )
    new_body = body[:start] + stored.ljust(up_to_page(len(stored)), b"\0") + body[start + old :]
    return forged(new_body, header, msgspec.msgpack.encode(index))


SIZE = 2 * PAGE_BYTES


FRAMES = {
    "not zstd": b"garbage" * 9,
    "magic only": b"\x28\xb5\x2f\xfd",
    "declares less": frame(bytes(range(256)) * 31),
    "declares more": frame(bytes(range(256)) * 64),
    "declares nothing": frame(bytes(range(256)) * 32, declare=False),
    "declares right, holds more": lying_frame(SIZE, bytes(range(256)) * 64),
    "declares right, holds less": lying_frame(SIZE, bytes(range(256)) * 16),
    "declares right, holds a bomb": lying_frame(SIZE, bytes(2**24)),
    "two frames": frame(bytes(SIZE // 2)) * 2,
    "one frame and another": frame(b"ab" * (SIZE // 2)) + frame(b"c"),
    "one frame and garbage": frame(b"ab" * (SIZE // 2)) + b"garbage",
    "skippable frame": b"\x50\x2a\x4d\x18" + SIZE.to_bytes(4, "little") + bytes(64),
    "cut short": frame(os.urandom(SIZE // 2) + bytes(SIZE // 2))[:-40],
    "2 GiB window": b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00",
    "needs a dictionary": b"\x28\xb5\x2f\xfd\x61\x07\x00\x1f" + b"\x01\x00\x00",
}


@pytest.mark.parametrize("case", list(FRAMES))
def test_frames_that_lie_are_refused(case: str) -> None:
    assert "frame" in refused(with_first_chunk(CodecId.ZSTD, [FRAMES[case]]))


def test_an_honest_frame_in_the_same_place_is_read() -> None:
    with memory_file(with_first_chunk(CodecId.ZSTD, [frame(b"ab" * (SIZE // 2))])) as fd:
        reader, out = PackReader(fd, None), bytearray(SIZE)
        reader.read_chunk(0, memoryview(out), Scratch())
        assert out == b"ab" * (SIZE // 2)


def test_decoding_writes_only_into_its_destination() -> None:
    """The bytes on both sides of the chunk keep their values, whatever the frame tries."""
    for plain in FRAMES.values():
        with memory_file(with_first_chunk(CodecId.ZSTD, [plain])) as fd:
            memory = bytearray(b"\x5a" * (3 * SIZE))
            with pytest.raises(PackError):
                PackReader(fd, None).read_chunk(0, memoryview(memory)[SIZE : 2 * SIZE], Scratch())
            assert memory[:SIZE] == memory[2 * SIZE :] == b"\x5a" * SIZE


@settings(deadline=None)
@given(st.data())
def test_mutated_indexes_are_refused_or_read_within_their_bounds(data: st.DataObject) -> None:
    body, header, index = opened()
    changed = bytearray(msgspec.msgpack.encode(index))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with memory_file(forged(body, header, bytes(changed))) as fd:
        try:
            verify(PackReader(fd, None))
        except PackError:
            return


# Indexes as large as allowed, of the msgpack that costs a decoder the most memory: the first bytes in
# hex, then one byte over and over. dd is an array and db a text, each with its length in four bytes.
BOMBS = {
    "a billion tensors": ("98 a0 a0 a0 00 90 dd 3b9aca00", 0x00),
    "tensors of empty lists": ("98 a0 a0 a0 00 90 dd 01ffff00", 0x90),
    "weight files of empty texts": ("98 a0 a0 a0 00 dd 01ffff00", 0xA0),
    "a shape of millions": ("98 a0 a0 a0 00 90 91 97 a161 a162 dd 01ffff00", 0x00),
    "planes of millions": ("98 a0 a0 a0 00 90 90 91 97 00 a0 00 00 dd 01ffff00", 0x00),
    "deep nesting": ("", 0x91),
    "one long text": ("98 db 01ffff00", 0x78),
}
BOMB_SCRIPT = """
import hashlib, os, resource, sys, time
from packer.index import HEADER_BYTES, INDEX_BYTES_MAX, PackHeader, encode_header
from packer.pack import PackReader
from packer.index import PackError
start, size = bytes.fromhex(sys.argv[1]), INDEX_BYTES_MAX
index = start + bytes([int(sys.argv[2])]) * (size - len(start))
digest = hashlib.sha256(index).digest()
header = PackHeader(False, bytes(32), HEADER_BYTES, size, HEADER_BYTES + size, bytes(16), digest)
fd = os.memfd_create("evil")
os.pwrite(fd, encode_header(header), 0)
assert os.pwrite(fd, index, HEADER_BYTES) == size
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, started = peak(), time.monotonic()
try:
    PackReader(fd, None)
except PackError as error:
    assert error.corrupt and "decode" in str(error)
    print(peak() - before, time.monotonic() - started)
"""


@pytest.mark.parametrize("bomb", list(BOMBS))
def test_index_bombs_are_refused_in_bounded_memory_and_time(bomb: str) -> None:
    """The index itself and one copy, then at most as much again; here the index has its greatest size."""
    start, fill = BOMBS[bomb]
    command = [sys.executable, "-c", BOMB_SCRIPT, start, str(fill)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    grown_kib, seconds = done.stdout.split()
    assert int(grown_kib) * 1024 <= 4 * INDEX_BYTES_MAX
    assert float(seconds) < 5


def test_bomb_frames_grow_no_memory() -> None:
    """A declared size that matches its destination is all that is ever allocated."""
    with memory_file(with_first_chunk(CodecId.ZSTD, [lying_frame(SIZE, bytes(2**28))])) as fd:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(PackError):
            verify(PackReader(fd, None))
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 <= 32 * 2**20
