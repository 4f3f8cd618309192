"""Small models, images and packs for the tests of the byte side of packer.

Covers: building safetensors files, images and sealed packs in memory files. Holds no test.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import zstandard

from packer.codec import Workspace, decode_into
from packer.host_segment import HostWriter
from packer.layout import DTYPE_BITS, ChunkSpan, ImageLayout, TensorInfo, lay_out, parse_header
from packer.pack import PackReader
from packer.pack_file import Scratch
from packer.pack_writer import PackWriter
from packer.tiers import restore
from packer.types import MIB, HostForm, ModelRef, Task

REF = ModelRef("acme", "tiny", "0123456789abcdef")
KEY = bytes(range(32))
SIDE = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"t" * 5000, "vocab.txt": b""}


def safetensors_bytes(tensors: Sequence[tuple[str, str, list[int], bytes]]) -> bytes:
    """A safetensors file of (name, dtype, shape, data)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors)


def split_safetensors(file: bytes) -> tuple[bytes, int]:
    """The header of a safetensors file, and the file's size."""
    size = int.from_bytes(file[:8], "little")
    return file[8 : 8 + size], len(file)


def weights(dtype: str, count: int, seed: int) -> bytes:
    """Bytes that look like weights of this dtype: floating points have few exponents, the rest is noise."""
    draw = random.Random(seed)
    size = DTYPE_BITS[dtype] // 8
    tops = {"BF16": (0x3C, 0x3B, 0x3D, 0xBC), "F16": (0x2C, 0x28, 0xAC), "F32": (0x3C, 0x3B, 0xBC)}
    if dtype in ("F8_E4M3", "F8_E5M2"):
        bits = draw.getrandbits
        return bytes(bits(1) << 7 | draw.choice((6, 6, 7, 8)) << 3 | bits(3) for _ in range(count))
    if dtype not in tops:
        return draw.randbytes(count * size)
    data = bytearray(draw.randbytes(count * size))
    data[size - 1 :: size] = bytes(draw.choice(tops[dtype]) for _ in range(count))
    return bytes(data)


def model_of(tensors: Sequence[tuple[str, str, list[int], bytes]]) -> tuple[bytes, ImageLayout]:
    """The safetensors file of these tensors, and its layout."""
    file = safetensors_bytes(tensors)
    header, size = split_safetensors(file)
    return file, lay_out(parse_header(header, "model.safetensors", size))


def every_codec_model() -> tuple[bytes, ImageLayout]:
    """One small chunk for each codec, and more."""
    coarse, top = random.Random(9), weights("BF16", 2048, 7)
    tensors = [
        ("embed.weight", "F32", [64, 32], weights("F32", 2048, 1)),
        ("embed.ids", "I64", [512], b"".join(n.to_bytes(8, "little") for n in range(512))),
        ("h.0.weight", "BF16", [64, 64], weights("BF16", 4096, 3)),
        ("h.0.half", "F16", [64, 64], weights("F16", 4096, 4)),
        ("h.0.eight", "F8_E4M3", [64, 128], weights("F8_E4M3", 8192, 5)),
        ("h.1.noise", "U8", [8192], weights("U8", 8192, 6)),
        # Exponents all over the place: no window of 16 holds them, but the low bytes are few.
        ("h.1.wild", "BF16", [4096], bytes(coarse.choice((0, 1, 2, 77, 200)) for _ in range(8192))),
        (
            "h.1.int",
            "I8",
            [8192],
            bytes(coarse.choice((0, 0, 0, 0xF0)) + coarse.getrandbits(4) for _ in range(8192)),
        ),
        # Once bf16: the plane of low halves is zeros, which take no bytes.
        ("h.2.up", "F32", [64, 32], b"".join(b"\0\0" + top[at : at + 2] for at in range(0, 4096, 2))),
        ("h.3.noise", "U8", [4096], weights("U8", 4096, 8)),
        ("head.zeros", "F32", [1024], bytes(4096)),
    ]
    return model_of(tensors)


def many_chunks_model(chunks: int) -> tuple[bytes, ImageLayout]:
    """A model whose every chunk is one page: two dtypes that take turns."""
    tensors = [
        (f"h.{at // 2}.{'ab'[at % 2]}", ("I8", "U8")[at % 2], [100], weights("U8", 100, at))
        for at in range(chunks)
    ]
    return model_of(tensors)


def small_model() -> tuple[bytes, ImageLayout]:
    """A model of several dtypes and chunks, a few pages in all: its file and its layout."""
    tensors = [
        ("embeddings.word.weight", "F32", [40, 32], weights("F32", 1280, 1)),
        ("embeddings.position_ids", "I64", [1, 64], weights("I64", 64, 2)),
        ("encoder.layer.0.dense.weight", "BF16", [64, 33], weights("BF16", 2112, 3)),
        ("encoder.layer.0.dense.bias", "BF16", [33], weights("BF16", 33, 4)),
        ("encoder.layer.1.dense.weight", "F16", [77], weights("F16", 77, 5)),
        ("encoder.layer.1.scale", "U8", [], b"\x07"),
        ("pooler.weight", "F32", [30], bytes(120)),
        ("pooler.empty", "F32", [0, 8], b""),
    ]
    return model_of(tensors)


def image_of(file: bytes, layout: ImageLayout) -> bytearray:
    """The image that the layout makes of the file's tensors."""
    image = bytearray(layout.image_bytes)
    for placed in layout.tensors:
        info: TensorInfo = placed.info
        data = file[info.file_offset : info.file_offset + info.nbytes]
        image[placed.image_offset : placed.image_offset + info.nbytes] = data
    return image


@contextmanager
def memory_file(data: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("bunk-test")
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


def write_pack(
    fd: int,
    layout: ImageLayout,
    image: bytearray,
    ref: ModelRef = REF,
    key: bytes = KEY,
    limit_bytes: int = 64 * MIB,
) -> PackWriter:
    """Write and finish a sealed pack of this image."""
    writer = PackWriter(fd, ref, "transformers", Task.EMBEDDING, layout, key, limit_bytes)
    for path, data in SIDE.items():
        writer.add_file(path, data)
    view = memoryview(image)
    for i, span in enumerate(layout.chunks):
        writer.add_chunk(i, view[span.image_offset : span.image_offset + span.nbytes])
    writer.finish()
    return writer


def pack_bytes(
    ref: ModelRef = REF, key: bytes = KEY, model: tuple[bytes, ImageLayout] | None = None
) -> bytes:
    """A finished sealed pack (of ``small_model`` when none is given)."""
    file, layout = model or small_model()
    with memory_file() as fd:
        write_pack(fd, layout, image_of(file, layout), ref, key)
        return os.pread(fd, os.fstat(fd).st_size, 0)


def read_image(reader: PackReader) -> bytearray:
    """The whole image, chunk by chunk, into dirty memory, so that every byte must be written."""
    layout = reader.index.layout
    image = bytearray(b"\xa5" * layout.image_bytes)
    view, scratch = memoryview(image), Scratch()
    for i, span in enumerate(layout.chunks):
        reader.read_chunk(i, view[span.image_offset : span.image_offset + span.nbytes], scratch)
    return image


class MemoryImage:
    """An image in plain memory that is dirty at first; remembers which chunks were placed."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = bytearray(b"\xa5" * nbytes)
        self.placed: list[int] = []

    @contextmanager
    def filling(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        yield memoryview(self.bytes)[offset : offset + nbytes]

    reading = filling

    def lay_in(self, fd: int, start: int) -> bool:
        return False

    map_from = lay_in

    def place(
        self, span: ChunkSpan, codec_id: int, planes: Sequence[memoryview], workspace: Workspace
    ) -> None:
        with self.filling(span.image_offset, span.nbytes) as view:
            decode_into(codec_id, planes, view, workspace)
        self.placed.append(span.image_offset)


def host_bytes(form: HostForm, data: bytes | None = None) -> bytes:
    """The host segment that restoring a pack fills (that of ``small_model`` when none is given)."""
    with memory_file(data or pack_bytes()) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        side_files = {path: reader.file(path) for path, _ in reader.index.files}
        writer = HostWriter(host_fd, reader.index, side_files, form)
        facts = restore(reader, MemoryImage(reader.index.layout.image_bytes), host=writer)
        assert facts.host_filled
        return os.pread(host_fd, os.fstat(host_fd).st_size, 0)


def twin_pack() -> tuple[bytes, bytearray]:
    """A host segment whose second chunk has the bytes of the first, and its image."""
    twin = weights("BF16", MIB // 2, 1)
    model = model_of(
        [
            ("h.0.tied", "BF16", [MIB // 2], twin),
            ("h.1.tied", "BF16", [MIB // 2], twin),
            ("h.2.weight", "F32", [1024], weights("F32", 1024, 2)),
        ]
    )
    return _with_duplicates(model, (None, 0, None)), image_of(*model)


def three_twins() -> bytes:
    """A host segment with three equal chunks."""
    twin = bytes(range(256)) * 4096
    model = model_of([(f"h.{at}.tied", "U8", [MIB], twin) for at in range(3)])
    return _with_duplicates(model, (None, 0, 0))


def _with_duplicates(model: tuple[bytes, ImageLayout], same_as: Sequence[int | None]) -> bytes:
    with memory_file(pack_bytes(model=model)) as fd, memory_file() as host_fd:
        reader = PackReader(fd, KEY)
        own = reader.index.chunks
        chunks = [
            own[at] if same is None else replace(own[same], same_as=same) for at, same in enumerate(same_as)
        ]
        writer = HostWriter(host_fd, replace(reader.index, chunks=tuple(chunks)), SIDE, HostForm.STORED)
        restore(reader, MemoryImage(model[1].image_bytes), host=writer)
        return os.pread(host_fd, os.fstat(host_fd).st_size, 0)


def frame(plain: bytes, declare: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=declare).compress(plain)


def lying_frame(declared: int, plain: bytes) -> bytes:
    """A frame whose header declares another size: 4 bytes of size, not single-segment, then the blocks."""
    parts = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    blocks = (parts.compress(plain) + parts.flush())[6:]
    return b"\x28\xb5\x2f\xfd" + bytes([0x80, 0x58]) + declared.to_bytes(4, "little") + blocks
