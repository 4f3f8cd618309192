"""The origin's digests, made again from a restored image.

Covers: headers kept by an ingest, in the pack and in a host segment, digests of several files, and images,
layouts and headers that are not the origin's. Does not cover: who compares them with the plan (the agent).
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import replace

import pytest
import zstandard
from origin_samples import big, file_sources, ingest, weight_files
from pack_samples import (
    KEY,
    SIDE,
    MemoryImage,
    host_bytes,
    memory_file,
    safetensors_bytes,
    small_model,
    split_safetensors,
    weights,
)

from packer.index import PackError
from packer.layout import lay_out, parse_header
from packer.origin_headers import (
    HEADERS_BYTES_MAX,
    ORIGIN_HEADERS,
    Headers,
    origin_digests,
    pack_headers,
    unpack_headers,
)
from packer.pack import PackReader
from packer.packing import PackTarget
from packer.tiers import restore
from packer.types import MIB, HostForm

SHARDS = [
    [
        ("h.0.weight", "BF16", [3 * MIB], big(6 * MIB, 1)),
        ("h.0.bias", "F32", [33], weights("F32", 33, 2)),
        ("h.0.none", "F32", [0, 4], b""),
        ("z.first", "U8", [5], b"12345"),
    ],
    [("embed.weight", "F32", [400, 1000], weights("F32", 400_000, 3)), ("h.1.one", "F16", [], b"ab")],
    [],  # a file without tensors has a digest too
]


def restored(data: bytes, key: bytes | None) -> tuple[PackReader, MemoryImage]:
    with memory_file(data) as fd:
        reader = PackReader(fd, key)
        image = MemoryImage(reader.index.layout.image_bytes)
        restore(reader, image)
        side_files = {path: reader.file(path) for path, _ in reader.index.files}
    assert origin_digests(reader.index.layout, unpack_headers(side_files[ORIGIN_HEADERS]), image)
    return reader, image


def packed(files: dict[str, bytes]) -> bytes:
    with file_sources(files) as sources, memory_file() as fd:
        ingest(sources, PackTarget(fd, None, KEY, 64 * MIB))
        return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.parametrize("form", [None, *HostForm])
def test_digests_of_the_origin_come_out_of_a_restored_image(form: HostForm | None) -> None:
    """From the pack, and from a host segment of it in every form."""
    files = weight_files(SHARDS)
    data = packed(files)
    if form is not None:
        data = host_bytes(form, data)
    reader, image = restored(data, KEY if form is None else None)
    with memory_file(data) as fd:
        headers = unpack_headers(PackReader(fd, KEY if form is None else None).file(ORIGIN_HEADERS))
    assert origin_digests(reader.index.layout, headers, image) == {
        path: hashlib.sha256(content).hexdigest()
        for path, content in files.items()
        if path.endswith(".safetensors")
    }


def small() -> tuple[dict[str, bytes], MemoryImage]:
    """The headers of ``small_model`` and its image."""
    file, layout = small_model()
    image = MemoryImage(layout.image_bytes)
    for placed in layout.tensors:
        info = placed.info
        with image.filling(placed.image_offset, info.nbytes) as view:
            view[:] = file[info.file_offset : info.file_offset + info.nbytes]
    header, _ = split_safetensors(file)
    return {"model.safetensors": file[:8] + header}, image


def test_one_wrong_byte_is_another_digest() -> None:
    file, layout = small_model()
    headers, image = small()
    right = {"model.safetensors": hashlib.sha256(file).hexdigest()}
    assert origin_digests(layout, headers, image) == right
    for placed in layout.tensors:
        if placed.info.nbytes:
            image.bytes[placed.image_offset] ^= 1
            assert origin_digests(layout, headers, image) != right
            image.bytes[placed.image_offset] ^= 1


def test_a_layout_with_names_exchanged_is_refused() -> None:
    """The bytes of the files are the same then, so no digest would tell."""
    data = weights("F32", 64, 1)
    file = safetensors_bytes([("a", "F32", [32], data[:128]), ("b", "F32", [32], data[128:])])
    header, size = split_safetensors(file)
    tensors = parse_header(header, "model.safetensors", size)
    turned = lay_out([replace(tensors[0], name="b"), replace(tensors[1], name="a")])
    image = MemoryImage(turned.image_bytes)
    with pytest.raises(PackError, match="not those of the header") as caught:
        origin_digests(turned, {"model.safetensors": file[:8] + header}, image)
    assert caught.value.corrupt


def test_headers_of_another_model_are_refused() -> None:
    _, layout = small_model()
    headers, image = small()
    header = headers["model.safetensors"]
    for wrong in (
        {},
        {"other.safetensors": header},
        {"model.safetensors": header[:-8]},
        {"model.safetensors": (len(header)).to_bytes(8, "little") + header[8:]},
        {"model.safetensors": header.replace(b'"F16"', b'"I16"')},
        {"model.safetensors": header.replace(b"layer.1", b"layer.2")},
        {"model.safetensors": header[:8] + b"[" * (len(header) - 8)},
    ):
        with pytest.raises(PackError) as caught:
            origin_digests(layout, wrong, image)
        assert caught.value.corrupt


def test_headers_that_are_too_large_are_left_out() -> None:
    """Together, or because they are noise that would take the room of weights."""
    headers = Headers()
    headers.add("a.safetensors", bytes(HEADERS_BYTES_MAX))
    assert headers.data(MIB) is not None
    headers.add("b.safetensors", bytes(8))
    assert headers.data(MIB) is None
    noise = {"a.safetensors": random.Random(1).randbytes(MIB)}
    assert pack_headers(noise, MIB) is None
    assert unpack_headers(pack_headers(noise, 256 * MIB) or b"") == noise


def test_side_files_that_are_no_headers_are_refused() -> None:
    """Also a frame that says nothing of its size, or lies about it, before anything of that size is there."""
    good = pack_headers({"a.safetensors": bytes(100)}, MIB) or b""
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 * MIB))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    twice = zstandard.ZstdCompressor().compress(b"\x92" + 2 * (b"\x92\xa1a\xc4\x08" + bytes(8)))
    for data in (b"", b"x", good[:-1], bomb, silent, good + good, twice, SIDE["tokenizer.json"]):
        with pytest.raises(PackError) as caught:
            unpack_headers(data)
        assert caught.value.corrupt


def test_an_ingest_without_a_pack_keeps_them_too() -> None:
    """They are a side file of the model, so a pack that is made from the device later has them."""
    files = weight_files(SHARDS)
    with file_sources(files) as sources:
        kept = ingest(sources).ingest.side_files[ORIGIN_HEADERS]
    assert set(unpack_headers(kept)) == {path for path in files if path.endswith(".safetensors")}
