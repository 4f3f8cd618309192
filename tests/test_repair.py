"""Mending chunks of a pack from the origin: the very same bytes, or nothing.

Covers: every kind of damage to an extent, equal chunks that share one, origins that changed, are away or are
incomplete, another codec version, and a file that can not be written. Does not cover: who orders a repair
(the agent).
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

import pytest
from origin_samples import CountedSource, Tensor, contents, feed_sources, file_sources, weight_files
from pack_samples import KEY, REF, MemoryImage, memory_file, weights

from packer import codec, repair
from packer.codec import BadPlanes, Encoded
from packer.index import PackError, PackIndex
from packer.ingest import Ingest
from packer.pack import PackReader, verify
from packer.packing import PackTarget
from packer.repair import repair_chunks
from packer.sources import Source
from packer.tiers import TierError, restore
from packer.types import MIB, Task


def shards() -> list[list[Tensor]]:
    """Chunks of many codecs, one of several small tensors, one all noise, and two that are equal."""
    tied = weights("BF16", MIB // 2, 1)
    coarse = random.Random(3)
    return [
        [
            ("h.0.wild", "BF16", [4096], bytes(coarse.choice((0, 1, 2, 77, 200)) for _ in range(8192))),
            ("embed.weight", "BF16", [MIB // 2], tied),
            ("h.0.a", "F32", [9001], weights("F32", 9001, 2)),
            ("h.0.b", "F32", [33], weights("F32", 33, 3)),
            ("h.0.half", "F16", [4096], weights("F16", 4096, 4)),
        ],
        [
            ("h.1.ids", "I64", [512], b"".join(n.to_bytes(8, "little") for n in range(512))),
            ("h.1.noise", "U8", [12288], weights("U8", 12288, 6)),
            ("tail.zeros", "F32", [1024], bytes(4096)),
            ("head.weight", "BF16", [MIB // 2], tied),
        ],
    ]


FILES = weight_files(shards())
PACK: list[bytes] = []


def pack() -> bytes:
    """A good pack of ``FILES``."""
    if not PACK:
        with file_sources(FILES) as sources, memory_file() as fd:
            run = Ingest(sources, REF, "transformers", Task.EMBEDDING, PackTarget(fd, None, KEY, 64 * MIB))
            run.open()
            run.fill(MemoryImage(run.layout.image_bytes))
            run.finish_pack()
            PACK.append(contents(fd))
    return PACK[0]


def index() -> PackIndex:
    with memory_file(pack()) as fd:
        return PackReader(fd, KEY, REF).index


def weight_sources(files: Mapping[str, bytes] = FILES) -> dict[str, Source]:
    return {path: CountedSource(data) for path, data in files.items() if path.endswith(".safetensors")}


def bad_chunks(fd: int) -> tuple[int, ...]:
    reader = PackReader(fd, KEY, REF)
    try:
        restore(reader, MemoryImage(reader.index.layout.image_bytes))
    except TierError as error:
        return error.chunks
    return ()


def test_the_samples_have_many_codecs_and_a_shared_extent() -> None:
    found = index()
    assert {chunk.codec_id for chunk in found.chunks} >= {0, 1, 2, 3, 4, 5}
    assert sum(chunk.same_as is not None for chunk in found.chunks) == 1


def damages() -> list[tuple[int, str]]:
    chunks = index().chunks
    kinds = [(number, kind) for number in range(len(chunks)) for kind in ("bit", "zeros", "noise", "swapped")]
    padded = [
        (number, "padding") for number, chunk in enumerate(chunks) if chunk.extent_bytes > chunk.stored_bytes
    ]
    assert padded
    return kinds + padded


@pytest.mark.parametrize(("number", "damage"), damages())
def test_a_damaged_chunk_is_mended_bit_by_bit(number: int, damage: str) -> None:
    good, chunk = pack(), index().chunks[number]
    broken = bytearray(good)
    at = chunk.offset + chunk.stored_bytes // 2
    if damage == "bit":
        broken[at] ^= 0x40
    elif damage == "padding":
        broken[chunk.offset + chunk.extent_bytes - 1] = 1
    elif damage == "swapped":
        other = next(one for one in index().chunks if one.offset != chunk.offset)
        size = min(chunk.extent_bytes, other.extent_bytes)
        broken[chunk.offset : chunk.offset + size] = good[other.offset : other.offset + size]
    else:
        noise = bytes(chunk.extent_bytes) if damage == "zeros" else os.urandom(chunk.extent_bytes)
        broken[chunk.offset : chunk.offset + chunk.extent_bytes] = noise
    with memory_file(bytes(broken)) as fd:
        bad = bad_chunks(fd)
        assert number in bad
        assert repair_chunks(fd, KEY, REF, bad, weight_sources()) == ()
        assert contents(fd) == good
        assert bad_chunks(fd) == ()


def test_all_chunks_at_once_from_files_and_from_feeds() -> None:
    good, found = pack(), index()
    broken = bytearray(good)
    for chunk in found.chunks:
        broken[chunk.offset] ^= 1
    # Equal chunks share an extent, so the first flip of it was taken back.
    for chunk in found.chunks:
        if chunk.same_as is not None:
            broken[chunk.offset] ^= 1
    for kind in (file_sources, feed_sources):
        with kind(FILES) as sources, memory_file(bytes(broken)) as fd:
            bad = bad_chunks(fd)
            assert bad == tuple(range(len(found.chunks)))
            assert repair_chunks(fd, KEY, REF, bad, {file.path: source for file, source in sources}) == ()
            assert contents(fd) == good
            verify(PackReader(fd, KEY, REF))


def test_only_the_bad_chunk_is_asked_of_the_origin() -> None:
    found = index()
    number = next(at for at, span in enumerate(found.layout.chunks) if span.dtype == "F16")
    sources = weight_sources()
    with memory_file(pack()) as fd:
        os.pwrite(fd, b"\xff" * 8, found.chunks[number].offset)
        assert repair_chunks(fd, KEY, REF, [number], sources) == ()
    asked = [row for source in sources.values() if isinstance(source, CountedSource) for row in source.asked]
    assert sum(nbytes for _, nbytes in asked) == 2 * 4096


def test_an_origin_that_changed_mends_only_what_it_did_not_change() -> None:
    """A flip in one tensor; its chunk keeps what it has, also its damage."""
    found = index()
    wild = next(at for at, chunk in enumerate(found.chunks) if chunk.codec_id == codec.CodecId.PLANES2)
    changed = dict(FILES)
    placed = next(tensor for tensor in found.layout.tensors if tensor.info.name == "h.0.wild")
    assert placed.image_offset == found.layout.chunks[wild].image_offset
    data = bytearray(FILES[placed.info.file])
    data[placed.info.file_offset + 4000] ^= 1
    changed[placed.info.file] = bytes(data)
    broken = bytearray(pack())
    broken[found.chunks[0].offset] ^= 1
    broken[found.chunks[wild].offset] ^= 1
    with memory_file(bytes(broken)) as fd:
        bad = bad_chunks(fd)
        assert set(bad) > {0, wild}
        assert repair_chunks(fd, KEY, REF, bad, weight_sources(changed)) == (wild,)
        assert bad_chunks(fd) == (wild,)
        start = found.chunks[wild].offset
        size = found.chunks[wild].extent_bytes
        assert contents(fd)[start : start + size] == broken[start : start + size]
    wrong = {path: bytes(len(data)) for path, data in FILES.items()}
    with memory_file(bytes(broken)) as fd:
        assert repair_chunks(fd, KEY, REF, bad, weight_sources(wrong)) == bad
        assert contents(fd) == bytes(broken)


@pytest.mark.parametrize("fault", ["away", "short", "missing"])
def test_an_origin_that_does_not_deliver_leaves_the_chunk_bad(fault: str) -> None:
    found = index()
    broken = bytearray(pack())
    broken[found.chunks[1].offset] ^= 1
    sources = weight_sources()
    if fault == "missing":
        sources = {}
    for source in sources.values():
        assert isinstance(source, CountedSource)
        source.fail_at = 0 if fault == "away" else 3000
    with memory_file(bytes(broken)) as fd:
        assert repair_chunks(fd, KEY, REF, [1], sources) == (1,)
        assert contents(fd) == bytes(broken)


@pytest.mark.parametrize("change", ["level", "shape", "refuses"])
def test_another_codec_version_leaves_the_chunk_bad(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It packs the same bytes in another way: no tag fits, or not even the sizes."""
    broken = bytearray(pack())
    found = index()
    number = next(at for at, chunk in enumerate(found.chunks) if chunk.codec_id == codec.CodecId.N12)
    broken[found.chunks[number].offset] ^= 1

    def other(codec_id: int, dtype: str, raw: memoryview, workspace: object) -> Encoded:
        real = codec.encode(dtype, raw)
        if change == "refuses":
            raise BadPlanes("codec is not known")
        if change == "shape":
            return Encoded(codec_id, (*real.planes[:-1], real.planes[-1] + b"x"))
        last = real.planes[0]
        return Encoded(codec_id, (last[:-1] + bytes([last[-1] ^ 1]), *real.planes[1:]))

    monkeypatch.setattr(codec, "encode_as", other)
    with memory_file(bytes(broken)) as fd:
        assert repair_chunks(fd, KEY, REF, [number], weight_sources()) == (number,)
        assert contents(fd) == bytes(broken)


def test_chunks_that_are_not_there_stay_bad_and_good_ones_are_harmless() -> None:
    count = len(index().chunks)
    with memory_file(pack()) as fd:
        left = repair_chunks(fd, KEY, REF, [-1, 0, count, 2**40], weight_sources())
        assert left == (-1, count, 2**40)
        assert contents(fd) == pack()


def test_a_pack_that_can_not_be_opened_or_written_is_an_error() -> None:
    with memory_file(pack()) as fd:
        with pytest.raises(PackError):
            repair_chunks(fd, bytes(32), REF, [0], weight_sources())
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            with pytest.raises(PackError, match="writing"):
                repair_chunks(read_only, KEY, REF, [0], weight_sources())
        finally:
            os.close(read_only)
        os.pwrite(fd, b"\0" * 8, 0)
        with pytest.raises(PackError) as refused:
            repair_chunks(fd, KEY, REF, [0], weight_sources())
        assert refused.value.corrupt


def test_a_mended_chunk_is_on_the_disk_before_the_repair_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(repair.os, "fdatasync", synced.append)
    with memory_file(pack()) as fd:
        assert repair_chunks(fd, KEY, REF, [0], {}) == (0,)
        assert synced == []
        assert repair_chunks(fd, KEY, REF, [0], weight_sources()) == ()
        assert synced == [fd]
