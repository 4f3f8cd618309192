"""Host segments: each form has exactly the bytes that were foretold, and gives the image back.

Does not cover forged segments (attacks/test_hostile_packs) or the memory files that hold them (the agent).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pack_samples import (
    KEY,
    SIDE,
    MemoryImage,
    every_codec_model,
    host_bytes,
    image_of,
    many_chunks_model,
    memory_file,
    pack_bytes,
    read_image,
    small_model,
    twin_pack,
)

from packer.codec import CodecId
from packer.host_segment import HostWriter, host_index, host_sizes, image_start
from packer.index import PackError
from packer.layout import PAGE_BYTES, ImageLayout
from packer.pack import PackReader
from packer.tiers import DECODE_THREADS_MAX, TierError, fill, restore
from packer.types import HostForm

FORMS = list(HostForm)


@contextmanager
def sealed_segment(form: HostForm, model: tuple[bytes, ImageLayout]) -> Iterator[PackReader]:
    """A segment in a memory file that nobody can change any more, as the agent keeps it."""
    fd = os.memfd_create("bunk-test", os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(fd, host_bytes(form, pack_bytes(model=model)), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        yield PackReader(fd, None)
    finally:
        os.close(fd)


# --- what a segment holds -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [every_codec_model, small_model])
def test_each_form_gives_the_image_back_and_has_the_foretold_size(form: HostForm, model) -> None:  # type: ignore[no-untyped-def]
    file, layout = model()
    data = pack_bytes(model=(file, layout))
    with memory_file(data) as fd:
        sizes = PackReader(fd, KEY).host_sizes
    segment = host_bytes(form, data)
    assert len(segment) == sizes.of(form)
    with memory_file(segment) as fd:
        reader = PackReader(fd, None)
        assert reader.file_bytes == len(segment)
        assert read_image(reader) == image_of(file, layout)
        assert {path: reader.file(path) for path, _ in reader.index.files} == SIDE
        assert reader.host_sizes.of(form) == len(segment)
        image = MemoryImage(layout.image_bytes)
        restore(reader, image)
        assert image.bytes == image_of(file, layout)


@pytest.mark.parametrize("form", FORMS)
def test_a_sealed_memory_file_is_restored_out_of_its_mapping(
    form: HostForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = every_codec_model()
    with sealed_segment(form, model) as reader:
        monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read although it can be mapped"))
        image = MemoryImage(reader.index.layout.image_bytes)
        facts = restore(reader, image)
        assert image.bytes == image_of(*model)
        assert facts.direct_bytes == 0
        assert facts.read_bytes == sum(chunk.extent_bytes for chunk in reader.index.chunks)


def test_forms_hold_what_they_say() -> None:
    with memory_file(pack_bytes(model=every_codec_model())) as fd:
        index = PackReader(fd, KEY).index
    stored, wire, raw = (host_index(index, form) for form in FORMS)
    assert [c.codec_id for c in stored.chunks] == [c.codec_id for c in index.chunks]
    assert CodecId.FILL in {c.codec_id for c in wire.chunks}
    assert {c.codec_id for c in raw.chunks} == {CodecId.RAW}
    assert [image_start(form) is None for form in (stored, wire, raw)] == [True, True, False]
    for plain, chunk, span in zip(index.chunks, wire.chunks, index.layout.chunks, strict=True):
        if plain.codec_id in (CodecId.N12, CodecId.N12_TOP):
            assert chunk.codec_id == plain.codec_id
            assert plain.stored_bytes < chunk.stored_bytes < span.nbytes
    for form in (stored, wire, raw):
        assert all(chunk.offset % PAGE_BYTES == 0 for chunk in form.chunks)


@pytest.mark.parametrize("form", FORMS)
def test_a_duplicate_takes_no_place_unless_the_image_is_mapped(form: HostForm) -> None:
    """In raw form it has its own place, because there the segment is what the image is."""
    data, image = twin_pack()
    raw = form is HostForm.RAW
    with memory_file(data) as fd, memory_file() as host_fd:
        reader = PackReader(fd, None)
        index = host_index(reader.index, form)
        assert (index.chunks[1].offset == index.chunks[0].offset) is not raw
        writer = HostWriter(host_fd, reader.index, SIDE, form)
        assert writer.missing() == ({0, 1, 2} if raw else {0, 2})
        facts = restore(reader, MemoryImage(len(image)), host=writer)
        assert facts.host_filled
        assert os.fstat(host_fd).st_size == host_sizes(reader.index).of(form)
        assert read_image(PackReader(host_fd, None)) == image
        start = image_start(index)
        assert start is None or os.pread(host_fd, len(image), start) == image


# --- filling it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [[4, 5], [0, 2], []])
def test_a_partial_restore_fills_the_segment_with_all_of_it(form: HostForm, wanted: list[int]) -> None:
    """What the image has already is read for the segment and not placed again."""
    model = many_chunks_model(6)
    with memory_file(pack_bytes(model=model)) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        image = MemoryImage(reader.index.layout.image_bytes)
        restore(reader, image)
        spans = [reader.index.layout.chunks[number] for number in wanted]
        for span in spans:
            image.bytes[span.image_offset : span.image_offset + span.nbytes] = bytes(span.nbytes)
        image.placed.clear()
        facts = restore(reader, image, only=wanted, host=HostWriter(host_fd, reader.index, SIDE, form))
        assert facts.host_filled
        assert facts.chunks == len(spans)
        assert sorted(image.placed) == [span.image_offset for span in spans]
        assert facts.read_bytes == sum(chunk.extent_bytes for chunk in reader.index.chunks)
        assert image.bytes == image_of(*model)
        assert read_image(PackReader(host_fd, None)) == image.bytes


def test_a_bad_chunk_that_only_the_segment_wants_is_listed_as_well() -> None:
    """The next whole restore would stumble over it; so it is mended now."""
    with memory_file(pack_bytes(model=many_chunks_model(6))) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        os.pwrite(fd, b"\xff", reader.index.chunks[1].offset)
        writer = HostWriter(host_fd, reader.index, SIDE, HostForm.STORED)
        with pytest.raises(TierError) as caught:
            restore(reader, MemoryImage(reader.index.layout.image_bytes), first_chunk=4, host=writer)
        assert (caught.value.corrupt, caught.value.chunks) == (True, (1,))


def test_no_more_is_read_for_a_segment_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, views: list[memoryview], offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with memory_file(pack_bytes(model=many_chunks_model(40))) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        writer = HostWriter(host_fd, reader.index, SIDE, HostForm.STORED)
        image = MemoryImage(reader.index.layout.image_bytes)
        monkeypatch.setattr(os, "pwritev", write)
        facts = restore(reader, image, first_chunk=39, host=writer)
        assert not facts.host_filled
        assert image.placed == [reader.index.layout.chunks[39].image_offset]
        assert facts.read_bytes <= PAGE_BYTES * DECODE_THREADS_MAX


def test_a_repair_completes_the_segment_that_the_first_try_began() -> None:
    model = many_chunks_model(6)
    data = pack_bytes(model=model)
    with memory_file(data) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        at = reader.index.chunks[4].offset
        os.pwrite(fd, b"\xff", at)
        writer = HostWriter(host_fd, reader.index, SIDE, HostForm.STORED)
        image = MemoryImage(reader.index.layout.image_bytes)
        with pytest.raises(TierError) as caught:
            restore(reader, image, host=writer)
        assert writer.missing() == {4}
        with pytest.raises(PackError):
            PackReader(host_fd, None)
        os.pwrite(fd, data[at : at + 1], at)
        assert restore(reader, image, only=caught.value.chunks, host=writer).host_filled
        assert image.bytes == image_of(*model)
        assert read_image(PackReader(host_fd, None)) == image.bytes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("good_writes", [0, 3, 6])
def test_a_segment_that_can_not_be_written_costs_only_itself(
    form: HostForm, good_writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = many_chunks_model(6)
    with memory_file(pack_bytes(model=model)) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        writer = HostWriter(host_fd, reader.index, SIDE, form)
        pwritev, left = os.pwritev, [None] * good_writes

        def write(descriptor: int, views: list[memoryview], offset: int) -> int:
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left.pop()
            return pwritev(descriptor, views, offset)

        monkeypatch.setattr(os, "pwritev", write)
        image = MemoryImage(reader.index.layout.image_bytes)
        assert not restore(reader, image, host=writer).host_filled
        assert image.bytes == image_of(*model)
        with pytest.raises(PackError):
            PackReader(host_fd, None)


def test_short_writes_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = host_bytes(HostForm.STORED)
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: pwritev(fd, [views[0][:100]], at))
    with memory_file(host_bytes(HostForm.STORED)) as fd:
        assert read_image(PackReader(fd, None)) == image_of(*small_model())
    assert len(host_bytes(HostForm.STORED)) == len(expected)


def test_misuse_of_the_writer_is_refused() -> None:
    with memory_file(pack_bytes(model=many_chunks_model(2))) as fd, memory_file() as host_fd:
        index = PackReader(fd, KEY).index
        with pytest.raises(PackError, match="side files"):
            HostWriter(host_fd, index, {}, HostForm.RAW)
        with pytest.raises(PackError, match="side files"):
            HostWriter(host_fd, index, {**SIDE, "vocab.txt": b"more"}, HostForm.RAW)
        writer = HostWriter(host_fd, index, SIDE, HostForm.RAW)
        raw = bytes(index.layout.chunks[0].nbytes)
        for codec_id, planes in ((CodecId.ZSTD, [raw]), (CodecId.RAW, [raw[:-1]]), (CodecId.RAW, [])):
            with pytest.raises(PackError, match="not in the form"):
                writer.add_chunk(0, codec_id, planes)
        writer.add_chunk(0, CodecId.RAW, [raw])
        with pytest.raises(PackError, match="1 chunks were not added, the first is 1"):
            writer.finish()


@pytest.mark.parametrize("form", FORMS)
def test_a_segment_filled_on_no_device_is_the_one_that_a_restore_leaves(form: HostForm) -> None:
    data = pack_bytes(model=every_codec_model())
    with memory_file(data) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        fill(reader, HostWriter(host_fd, reader.index, SIDE, form))
        filled = os.pread(host_fd, os.fstat(host_fd).st_size, 0)
    assert filled == host_bytes(form, data)


def test_a_segment_is_not_filled_with_bad_chunks_nor_where_there_is_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = bytearray(pack_bytes(model=many_chunks_model(6)))
    with memory_file(bytes(data)) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        at = reader.index.chunks[3].offset
        os.pwrite(fd, bytes([data[at] ^ 1]), at)
        with pytest.raises(TierError) as caught:
            fill(reader, HostWriter(host_fd, reader.index, SIDE, HostForm.WIRE))
        assert (caught.value.corrupt, caught.value.chunks) == (True, (3,))
        os.pwrite(fd, data[at : at + 1], at)

    def no_memory(*given: object) -> None:
        raise PackError("no memory left")

    monkeypatch.setattr(HostWriter, "add_chunk", no_memory)
    with memory_file(bytes(data)) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        with pytest.raises(TierError, match="can not be written"):
            fill(reader, HostWriter(host_fd, reader.index, SIDE, HostForm.STORED))
