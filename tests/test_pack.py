"""The pack file: what was written comes back, and nothing else does.

Covers writing, reading, the opened image, flips and cuts anywhere, limits, and the command line.
Does not cover packs that were forged with care (attacks/test_hostile_packs).
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pack_samples import (
    KEY,
    REF,
    SIDE,
    host_bytes,
    image_of,
    memory_file,
    pack_bytes,
    read_image,
    small_model,
    write_pack,
)

from packer import pack
from packer.codec import CodecId
from packer.index import HEADER_BYTES, PackError
from packer.layout import PAGE_BYTES, TensorInfo, lay_out
from packer.pack import PackReader, verify
from packer.pack_file import Scratch
from packer.pack_writer import PackWriter
from packer.types import MIB, HostForm, ModelRef, Task


def corrupt(data: bytes, key: bytes | None = KEY, expect: ModelRef | None = REF) -> str:
    """Reading all of this file must find it corrupt."""
    with memory_file(data) as fd, pytest.raises(PackError) as caught:
        verify(PackReader(fd, key, expect))
    assert caught.value.corrupt, caught.value
    return str(caught.value)


# --- round trip -----------------------------------------------------------------------------------


def test_image_side_files_and_facts_come_back() -> None:
    file, layout = small_model()
    image = image_of(file, layout)
    with memory_file() as fd:
        write_pack(fd, layout, image)
        reader = PackReader(fd, KEY, REF)
        assert read_image(reader) == image
        assert {path: reader.file(path) for path, _ in reader.index.files} == SIDE
        assert reader.index.layout == layout
        assert (reader.index.ref, reader.index.engine, reader.index.task) == (
            REF,
            "transformers",
            Task.EMBEDDING,
        )
        assert reader.file_bytes == os.fstat(fd).st_size
        assert verify(reader) == layout.image_bytes


def test_large_chunks_of_every_codec_written_and_read_by_two_threads() -> None:
    counts = {"a.0.w": ("BF16", 5_000_000), "a.1.w": ("F32", 1_500_000), "a.2.w": ("I8", 5_000_000)}
    layout = lay_out(
        [
            TensorInfo(name, dtype, (count,), "m", 0, count * {"BF16": 2, "F32": 4, "I8": 1}[dtype])
            for name, (dtype, count) in counts.items()
        ]
    )
    import numpy as np

    draw = np.random.default_rng(1)
    image = bytearray(layout.image_bytes)
    for placed in layout.tensors:
        values = (draw.standard_normal(placed.info.shape[0]) * 0.02).astype(np.float32)
        if placed.info.dtype == "F32":
            data = values.tobytes()
        elif placed.info.dtype == "BF16":
            data = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            data = draw.bytes(len(values))
        image[placed.image_offset : placed.image_offset + len(data)] = data
    view, spans = memoryview(image), layout.chunks
    with memory_file() as fd, ThreadPoolExecutor(2) as pool:
        writer = PackWriter(fd, REF, "transformers", Task.EMBEDDING, layout, KEY, 64 * MIB)
        list(
            pool.map(
                lambda i: writer.add_chunk(i, view[spans[i].image_offset :][: spans[i].nbytes]),
                reversed(range(len(spans))),
            )
        )
        summary = writer.finish()
        assert summary.disk_bytes == os.fstat(fd).st_size == summary.host_bytes
        reader = PackReader(fd, KEY, REF)
        out = bytearray(layout.image_bytes)
        target = memoryview(out)

        def read(half: int) -> None:
            scratch = Scratch()
            for i in range(half, len(spans), 2):
                reader.read_chunk(i, target[spans[i].image_offset :][: spans[i].nbytes], scratch)

        list(pool.map(read, (0, 1)))
        assert out == image
        used = {CodecId(chunk.codec_id) for chunk in reader.index.chunks}
        assert used == {CodecId.N12, CodecId.N12_TOP, CodecId.RAW}
        assert all(chunk.offset % PAGE_BYTES == 0 for chunk in reader.index.chunks)


def test_two_packs_of_the_same_bytes_share_no_sealed_bytes() -> None:
    """Each file has its own salt, so a counter as nonce never meets the same key twice."""
    assert pack_bytes()[HEADER_BYTES : HEADER_BYTES + 64] != pack_bytes()[HEADER_BYTES : HEADER_BYTES + 64]


def test_no_plain_bytes_are_in_a_sealed_pack() -> None:
    file, layout = small_model()
    data = pack_bytes()
    for plain in (b'{"model_type"', b"ttttttttttttttt", b"embeddings.word", b"acme", file[-32:-16]):
        assert plain == bytes(len(plain)) or plain not in data
    assert layout.image_bytes


# --- unsealed --------------------------------------------------------------------------------------


def test_a_host_segment_never_passes_for_a_sealed_pack_nor_the_reverse() -> None:
    """Else a thief of the disk could put unauthenticated bytes in a pack's place."""
    assert "not sealed" in corrupt(host_bytes(HostForm.STORED), KEY)
    with memory_file(pack_bytes()) as fd, pytest.raises(PackError, match="data key is needed"):
        PackReader(fd, None)


# --- flips and cuts -------------------------------------------------------------------------------


def test_a_flip_of_any_header_bit_is_found() -> None:
    data = bytearray(pack_bytes())
    for bit in [*range(8 * 160), *range(8 * 160, 8 * HEADER_BYTES, 61)]:
        data[bit // 8] ^= 1 << bit % 8
        corrupt(bytes(data))
        data[bit // 8] ^= 1 << bit % 8


def test_a_flip_in_any_byte_of_the_file_is_found() -> None:
    """Chunks, tags, side files, index and all padding: there is no byte that may change unseen."""
    data = bytearray(pack_bytes())
    for at in range(HEADER_BYTES, len(data), 11):
        data[at] ^= 1 << (at // 11) % 8
        corrupt(bytes(data))
        data[at] ^= 1 << (at // 11) % 8
    with memory_file(bytes(data)) as fd:
        verify(PackReader(fd, KEY, REF))


def test_a_cut_anywhere_is_found() -> None:
    data = pack_bytes()
    for size in [0, 1, 7, 8, HEADER_BYTES - 1, HEADER_BYTES, *range(1, len(data), 997), len(data) - 1]:
        corrupt(data[:size])


def test_a_file_without_its_header_is_torn() -> None:
    """What a crash before the last write leaves behind."""
    data = pack_bytes()
    assert "interrupted" in corrupt(bytes(HEADER_BYTES) + data[HEADER_BYTES:])


def test_pages_swapped_zeroed_or_taken_from_another_pack_are_found() -> None:
    data, other = pack_bytes(), pack_bytes()
    pages = len(data) // PAGE_BYTES

    def with_page(number: int, page: bytes) -> bytes:
        return data[: number * PAGE_BYTES] + page + data[(number + 1) * PAGE_BYTES :]

    for number in range(1, pages):
        corrupt(with_page(number, bytes(PAGE_BYTES)))
        corrupt(with_page(number, other[number * PAGE_BYTES :][:PAGE_BYTES]))
        if number + 1 < pages:
            first, second = (data[(number + k) * PAGE_BYTES :][:PAGE_BYTES] for k in (0, 1))
            swapped = data[: number * PAGE_BYTES] + second + first + data[(number + 2) * PAGE_BYTES :]
            corrupt(swapped)


def test_header_of_one_pack_on_the_body_of_another_is_found() -> None:
    data, other = pack_bytes(), pack_bytes()
    assert len(data) == len(other)
    corrupt(other[:HEADER_BYTES] + data[HEADER_BYTES:])


def test_wrong_key_and_wrong_model_are_found() -> None:
    corrupt(pack_bytes(), bytes(32))
    assert "instead of" in corrupt(pack_bytes(), KEY, ModelRef("evil", REF.name, REF.version))
    assert "instead of" in corrupt(pack_bytes(replace(REF, version="f" * 16)))


# --- limits and misuse ----------------------------------------------------------------------------


def test_writer_stops_at_its_limit() -> None:
    file, layout = small_model()
    image = image_of(file, layout)
    size = len(pack_bytes())
    for limit in range(0, size, PAGE_BYTES):
        with memory_file() as fd:
            with pytest.raises(PackError, match="limit") as caught:
                write_pack(fd, layout, image, limit_bytes=limit)
            assert not caught.value.corrupt
            assert os.fstat(fd).st_size <= limit
    with memory_file() as fd:
        write_pack(fd, layout, image, limit_bytes=size)


def test_misuse_of_the_writer_is_refused() -> None:
    file, layout = small_model()
    image = memoryview(image_of(file, layout))
    first = image[: layout.chunks[0].nbytes]
    with memory_file() as fd:
        writer = PackWriter(fd, REF, "transformers", Task.EMBEDDING, layout, KEY, MIB)
        with pytest.raises(PackError, match="missing"):
            writer.finish()
        for i, raw in ((-1, first), (99, first), (0, first[:-1])):
            with pytest.raises(PackError, match="not in the layout"):
                writer.add_chunk(i, raw)
        writer.add_chunk(0, first)
        with pytest.raises(PackError, match="added before"):
            writer.add_chunk(0, first)
        writer.add_file("config.json", b"{}")
        with pytest.raises(PackError, match="added before"):
            writer.add_file("config.json", b"{}")
        with pytest.raises(PackError, match="limit"):
            writer.add_file("big.txt", bytes(64 * MIB))
        for i, span in enumerate(layout.chunks[1:], start=1):
            writer.add_chunk(i, image[span.image_offset :][: span.nbytes])
        writer.finish()
        with pytest.raises(PackError, match="finished"):
            writer.finish()
        with pytest.raises(PackError, match="finished"):
            writer.add_chunk(0, first)


def test_misuse_of_the_reader_is_refused_and_is_not_corruption() -> None:
    with memory_file(pack_bytes()) as fd:
        reader, scratch = PackReader(fd, KEY), Scratch()
        nbytes = reader.index.layout.chunks[0].nbytes
        for i, size in ((-1, nbytes), (99, nbytes), (0, nbytes - 1), (0, nbytes + 1)):
            with pytest.raises(PackError) as caught:
                reader.read_chunk(i, memoryview(bytearray(size)), scratch)
            assert not caught.value.corrupt
        with pytest.raises(PackError, match="no side file"):
            reader.file("../config.json")


def test_leftovers_of_an_earlier_attempt_are_cut_off() -> None:
    file, layout = small_model()
    with memory_file(os.urandom(MIB)) as fd:
        write_pack(fd, layout, image_of(file, layout))
        verify(PackReader(fd, KEY, REF))


def test_full_disk_is_an_error_of_the_write_and_a_lost_sector_is_corruption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, layout = small_model()

    def fail(code: int) -> None:
        raise OSError(code, os.strerror(code))

    with memory_file(pack_bytes()) as fd:
        reader, scratch = PackReader(fd, KEY), Scratch()
        out = memoryview(bytearray(layout.chunks[0].nbytes))
        with monkeypatch.context() as patch, memory_file() as full:
            patch.setattr(os, "pwrite", lambda *_: fail(errno.ENOSPC))
            with pytest.raises(PackError, match="No space") as caught:
                write_pack(full, layout, image_of(file, layout))
            assert not caught.value.corrupt
        for code, is_corrupt in ((errno.EIO, True), (errno.EBADF, False)):
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", lambda *_, code=code: fail(code))
                with pytest.raises(PackError) as caught:
                    reader.read_chunk(0, out, scratch)
            assert caught.value.corrupt is is_corrupt


def test_short_reads_and_writes_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    file, layout = small_model()
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1000]], offset))
    with memory_file() as fd:
        write_pack(fd, layout, image_of(file, layout))
        assert read_image(PackReader(fd, KEY)) == image_of(file, layout)


# --- command line ---------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "m.pack").write_bytes(pack_bytes())
    (tmp_path / "hex.key").write_text(KEY.hex() + "\n")
    return tmp_path / "m.pack", tmp_path / "hex.key"


def test_inspect_and_verify_print_facts(
    stored: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, key = stored
    (tmp_path / "raw.key").write_bytes(KEY)
    for key_file in (key, tmp_path / "raw.key"):
        assert pack.main(["verify", str(path), "--key-file", str(key_file), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["model"] == str(REF)
        assert facts["verified_bytes"] == facts["image_bytes"] > 0
        assert set(facts["host_bytes"]) == {"stored", "wire", "raw"}
        assert facts["host_bytes"]["raw"] > facts["image_bytes"]
        assert facts["duplicate_bytes"] == 0
    assert pack.main(["inspect", str(path), "--key-file", str(key)]) == 0
    assert "codecs:" in capsys.readouterr().out
    assert pack.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "sealed: True" in printed
    assert "acme" not in printed


def test_bad_files_and_keys_exit_1_with_the_reason(
    stored: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, key = stored
    (tmp_path / "short.key").write_bytes(b"short")
    (tmp_path / "torn.pack").write_bytes(path.read_bytes()[:-1])
    for arguments, reason in (
        (["verify", str(path)], "--key-file"),
        (["verify", str(path), "--key-file", str(tmp_path / "short.key")], "64 hex digits"),
        (["verify", str(tmp_path / "torn.pack"), "--key-file", str(key)], "header says"),
        (["inspect", str(tmp_path / "absent.pack")], "No such file"),
    ):
        assert pack.main(arguments) == 1
        assert reason in capsys.readouterr().err


def test_reading_an_index_needs_neither_numpy_nor_torch(stored: tuple[Path, Path]) -> None:
    script = (
        "import sys, os; from packer.pack import PackReader;"
        f"PackReader(os.open({str(stored[0])!r}, os.O_RDONLY), bytes(range(32))).file('config.json');"
        "assert not {'numpy', 'torch', 'zstandard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
