"""The header and the index of a pack file: their bytes, their limits, their checks.

Covers: encoding and strict decoding of both, and the proof that the index describes one file without
holes or overlaps and one image (``layout.check_layout``). Does not cover: reading, writing and sealing
them (``pack``). The format in words is FORMAT.md. Standard library and msgspec only.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import msgspec

from packer.layout import (
    CHUNK_BYTES,
    DIMS_MAX,
    IMAGE_BYTES_MAX,
    PAGE_BYTES,
    TENSOR_NAME_CHARS_MAX,
    TENSORS_MAX,
    BadLayout,
    ChunkSpan,
    ImageLayout,
    PlacedTensor,
    TensorInfo,
    check_layout,
)
from packer.seal import FINGERPRINT_BYTES, KEY_BYTES, SALT_BYTES, TAG_BYTES
from packer.types import MIB, BadValue, ModelRef, Task, parse_ref

FORMAT = 3
MAGIC = b"BUNKPACK"
HEADER_BYTES = PAGE_BYTES
# 50,000 tensors and 131,072 chunks with their tags stay below 24 MiB.
INDEX_BYTES_MAX = 32 * MIB
# A chunk per CHUNK_BYTES of the greatest image, and one more per change of dtype.
CHUNKS_MAX = IMAGE_BYTES_MAX // CHUNK_BYTES + TENSORS_MAX
# As in ``directory``: a model directory has no more files, and no more bytes beside its weights. One of its
# files at least holds weights, which leaves room for the headers of these (``origin_headers``).
FILES_MAX = 256
SIDE_BYTES_MAX = 64 * MIB
PATH_CHARS_MAX = 200
PLANES_MAX = 4
CODEC_ID_MAX = 65_535
# Other files that the extents of one pack may lie in. Each is two descriptors of a worker during a restore.
BASES_MAX = 8

_SEALED = 1
_HEADER = struct.Struct("<8sHHI32sQQQ16s32s")
_DIGEST_AT = HEADER_BYTES - 32


class PackError(ValueError):
    """A pack can not be written or read. ``corrupt``: this copy is bad and must be dropped and rebuilt."""

    def __init__(self, message: str, corrupt: bool = False) -> None:
        super().__init__(message)
        self.corrupt = corrupt


@dataclass(frozen=True, slots=True)
class PackHeader:
    """The first page of the file. Written last, so that a torn file has none."""

    sealed: bool
    salt: bytes
    index_offset: int
    index_bytes: int
    file_bytes: int
    index_tag: bytes
    index_sha256: bytes

    def binding(self) -> bytes:
        """What the seal of the index is bound to beside its place: the shape of the whole file."""
        return struct.pack(
            "<8sH32sQQQ",
            MAGIC,
            FORMAT,
            self.salt,
            self.index_offset,
            self.index_bytes,
            self.file_bytes,
        )


@dataclass(frozen=True, slots=True)
class StoredPlane:
    """One plane of a chunk: its bytes in the file, and the tag that authenticates them."""

    nbytes: int
    tag: bytes


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where a chunk lies in the file. Planes follow each other; the extent is padded to a page."""

    codec_id: int
    offset: int
    planes: tuple[StoredPlane, ...]
    # The number of an earlier chunk whose bytes these are: the extent, its number in the seal and its tags
    # are that chunk's. None for a chunk with an extent of its own, here or in a base.
    same_as: int | None = None
    # What the raw bytes are recognised by; empty in a host segment.
    fingerprint: bytes = b""
    # The base that the extent lies in, None for this file, and the number of the chunk there.
    base: int | None = None
    base_chunk: int = 0

    @property
    def stored_bytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    @property
    def extent_bytes(self) -> int:
        return up_to_page(self.stored_bytes)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A side file (config, tokenizer), stored as it is."""

    path: str
    nbytes: int
    offset: int
    tag: bytes

    @property
    def extent_bytes(self) -> int:
        return up_to_page(self.nbytes)


@dataclass(frozen=True, slots=True)
class BaseFile:
    """Another pack of the same tenant, written for ``ref``, in which extents of this one lie."""

    ref: ModelRef
    salt: bytes
    pack_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PackIndex:
    """What a pack holds. ``fingerprint_key``: what its chunks' fingerprints were made with."""

    ref: ModelRef
    engine: str
    task: Task
    layout: ImageLayout
    side_files: tuple[StoredFile, ...]
    chunks: tuple[StoredChunk, ...]
    bases: tuple[BaseFile, ...] = ()
    fingerprint_key: bytes = field(default=b"", repr=False)

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        return tuple((stored.path, stored.nbytes) for stored in self.side_files)

    @property
    def deduplicated_bytes(self) -> int:
        """Bytes of the image that are not in this file, because an equal chunk is, here or in another one."""
        spans = zip(self.layout.chunks, self.chunks, strict=True)
        return sum(
            span.nbytes for span, chunk in spans if chunk.same_as is not None or chunk.base is not None
        )

    def owner(self, number: int) -> int:
        """The chunk whose extent holds this chunk's bytes: itself, unless it is a duplicate."""
        same_as = self.chunks[number].same_as
        return number if same_as is None else same_as

    def part_number(self, number: int) -> int:
        """The number under which this chunk's extent is sealed, in the file that it lies in."""
        chunk = self.chunks[number]
        return self.owner(number) if chunk.base is None else chunk.base_chunk


def up_to_page(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


# --- header ---------------------------------------------------------------------------------------


def encode_header(header: PackHeader) -> bytes:
    front = _HEADER.pack(
        MAGIC,
        FORMAT,
        _SEALED if header.sealed else 0,
        HEADER_BYTES,
        header.salt,
        header.index_offset,
        header.index_bytes,
        header.file_bytes,
        header.index_tag,
        header.index_sha256,
    )
    body = front.ljust(_DIGEST_AT, b"\0")
    return body + hashlib.sha256(body).digest()


def decode_header(page: bytes, size_bytes: int) -> PackHeader:
    """Check and decode the first page of a file of ``size_bytes``. Raises ``PackError`` (corrupt)."""
    if len(page) != HEADER_BYTES or size_bytes < HEADER_BYTES:
        raise PackError(f"file of {size_bytes} bytes is too short to be a pack", corrupt=True)
    if page[: len(MAGIC)] != MAGIC:
        raise PackError("not a pack, or one whose writing was interrupted", corrupt=True)
    if hashlib.sha256(page[:_DIGEST_AT]).digest() != page[_DIGEST_AT:]:
        raise PackError("header digest does not match", corrupt=True)
    _, version, flags, length, salt, offset, nbytes, file_bytes, tag, digest = _HEADER.unpack_from(page)
    if version != FORMAT or length != HEADER_BYTES or flags & ~_SEALED:
        raise PackError(
            f"format {version} with flags {flags}; this version reads format {FORMAT}", corrupt=True
        )
    header = PackHeader(flags == _SEALED, salt, offset, nbytes, file_bytes, tag, digest)
    if not 0 < nbytes <= INDEX_BYTES_MAX or offset % PAGE_BYTES or offset < HEADER_BYTES:
        raise PackError(f"index of {nbytes} bytes at {offset} breaks a limit", corrupt=True)
    if file_bytes != offset + up_to_page(nbytes):
        raise PackError(f"index does not end the file of {file_bytes} bytes", corrupt=True)
    # A memfd may have been given its reserved size; a file on disk has exactly its own.
    if size_bytes < file_bytes or (header.sealed and size_bytes != file_bytes):
        raise PackError(f"file has {size_bytes} bytes, its header says {file_bytes}", corrupt=True)
    return header


# --- index ----------------------------------------------------------------------------------------

_Size = Annotated[int, msgspec.Meta(ge=0, le=2 * IMAGE_BYTES_MAX)]
_Word = Annotated[str, msgspec.Meta(max_length=PATH_CHARS_MAX)]
_Tag = Annotated[bytes, msgspec.Meta(max_length=TAG_BYTES)]
_ChunkNumber = Annotated[int, msgspec.Meta(ge=0, lt=CHUNKS_MAX)]


class _Tensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(max_length=TENSOR_NAME_CHARS_MAX)]
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[list[_Size], msgspec.Meta(max_length=DIMS_MAX)]
    file: Annotated[int, msgspec.Meta(ge=0, lt=FILES_MAX)]
    file_offset: _Size
    nbytes: _Size
    image_offset: _Size


class _Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    nbytes: _Size
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    codec_id: Annotated[int, msgspec.Meta(ge=0, le=CODEC_ID_MAX)]
    offset: _Size
    planes: Annotated[list[_Size], msgspec.Meta(max_length=PLANES_MAX)]
    tags: Annotated[bytes, msgspec.Meta(max_length=PLANES_MAX * TAG_BYTES)]
    same_as: _ChunkNumber | None
    fingerprint: Annotated[bytes, msgspec.Meta(max_length=FINGERPRINT_BYTES)]
    base: tuple[Annotated[int, msgspec.Meta(ge=0, lt=BASES_MAX)], _ChunkNumber] | None


class _Base(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    ref: _Word
    salt: Annotated[bytes, msgspec.Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)]
    pack_key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class _File(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    path: _Word
    nbytes: _Size
    offset: _Size
    tag: _Tag


class _Index(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    ref: _Word
    engine: Annotated[str, msgspec.Meta(max_length=40)]
    task: Annotated[str, msgspec.Meta(max_length=40)]
    image_bytes: _Size
    weight_files: Annotated[list[_Word], msgspec.Meta(max_length=FILES_MAX)]
    tensors: Annotated[list[_Tensor], msgspec.Meta(max_length=TENSORS_MAX)]
    chunks: Annotated[list[_Chunk], msgspec.Meta(max_length=CHUNKS_MAX)]
    files: Annotated[list[_File], msgspec.Meta(max_length=FILES_MAX)]
    bases: Annotated[list[_Base], msgspec.Meta(max_length=BASES_MAX)]
    fingerprint_key: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]


_decoder = msgspec.msgpack.Decoder(_Index)
_encoder = msgspec.msgpack.Encoder()


def encode_index(index: PackIndex) -> bytes:
    names = sorted({placed.info.file for placed in index.layout.tensors})
    number = {name: at for at, name in enumerate(names)}
    tensors = [
        _Tensor(
            placed.info.name,
            placed.info.dtype,
            list(placed.info.shape),
            number[placed.info.file],
            placed.info.file_offset,
            placed.info.nbytes,
            placed.image_offset,
        )
        for placed in index.layout.tensors
    ]
    chunks = [_raw_chunk(*row) for row in zip(index.layout.chunks, index.chunks, strict=True)]
    files = [_File(stored.path, stored.nbytes, stored.offset, stored.tag) for stored in index.side_files]
    bases = [_Base(str(base.ref), base.salt, base.pack_key) for base in index.bases]
    whole = _Index(
        str(index.ref),
        index.engine,
        index.task,
        index.layout.image_bytes,
        names,
        tensors,
        chunks,
        files,
        bases,
        index.fingerprint_key,
    )
    return _encoder.encode(whole)


def _raw_chunk(span: ChunkSpan, chunk: StoredChunk) -> _Chunk:
    if chunk.same_as is not None:
        return _Chunk(span.nbytes, span.dtype, 0, 0, [], b"", chunk.same_as, b"", None)
    sizes = [plane.nbytes for plane in chunk.planes]
    tags = b"".join(plane.tag for plane in chunk.planes)
    base = (chunk.base, chunk.base_chunk) if chunk.base is not None else None
    return _Chunk(
        span.nbytes,
        span.dtype,
        chunk.codec_id,
        chunk.offset,
        sizes,
        tags,
        None,
        chunk.fingerprint,
        base,
    )


def decode_index(data: bytes, header: PackHeader) -> PackIndex:
    """Decode and check everything about an index. Raises ``PackError`` (corrupt)."""
    try:
        raw = _decoder.decode(data)
        ref, task = parse_ref(raw.ref), Task(raw.task)
        layout = _layout(raw)
        check_layout(layout)
    except (msgspec.MsgspecError, BadValue, BadLayout, ValueError, RecursionError) as error:
        raise PackError(f"index does not decode: {str(error)[:200]}", corrupt=True) from None
    chunks = _chunks(raw.chunks)
    files = tuple(StoredFile(file.path, file.nbytes, file.offset, file.tag) for file in raw.files)
    _check_files(files)
    own = [chunk for chunk in chunks if chunk.same_as is None and chunk.base is None]
    extents = [(chunk.offset, chunk.extent_bytes) for chunk in own]
    extents += [(file.offset, file.extent_bytes) for file in files]
    _check_extents(extents, header)
    _check_fingerprints(chunks, raw.fingerprint_key, header)
    bases = _bases(raw.bases, ref, header, chunks)
    return PackIndex(ref, raw.engine, task, layout, files, chunks, bases, raw.fingerprint_key)


def _layout(raw: _Index) -> ImageLayout:
    tensors: list[PlacedTensor] = []
    for tensor in raw.tensors:
        if tensor.file >= len(raw.weight_files):
            raise BadLayout(f"tensor {tensor.name} is in file {tensor.file} of {len(raw.weight_files)}")
        info = TensorInfo(
            tensor.name,
            tensor.dtype,
            tuple(tensor.shape),
            raw.weight_files[tensor.file],
            tensor.file_offset,
            tensor.nbytes,
        )
        tensors.append(PlacedTensor(info, tensor.image_offset))
    spans: list[ChunkSpan] = []
    at = 0
    for chunk in raw.chunks:
        spans.append(ChunkSpan(at, chunk.nbytes, chunk.dtype))
        at += chunk.nbytes
    return ImageLayout(raw.image_bytes, tuple(tensors), tuple(spans))


def _chunks(rows: Sequence[_Chunk]) -> tuple[StoredChunk, ...]:
    chunks: list[StoredChunk] = []
    for row in rows:
        chunks.append(_chunk(row) if row.same_as is None else _duplicate(row, rows, chunks))
    return tuple(chunks)


def _duplicate(row: _Chunk, rows: Sequence[_Chunk], before: Sequence[StoredChunk]) -> StoredChunk:
    number, same_as = len(before), row.same_as
    if same_as is None or same_as >= number or before[same_as].same_as is not None:
        raise PackError(
            f"chunk {number} has the bytes of chunk {same_as}, which has none before", corrupt=True
        )
    other = rows[same_as]
    if (row.nbytes, row.dtype) != (other.nbytes, other.dtype):
        raise PackError(f"chunk {number} can not have the bytes of chunk {same_as}", corrupt=True)
    if row.codec_id or row.offset or row.planes or row.tags or row.fingerprint or row.base is not None:
        # One way to write each index: these fields would be bytes that nothing reads.
        raise PackError(f"chunk {number} is a duplicate and has an extent too", corrupt=True)
    return replace(before[same_as], same_as=same_as)


def _chunk(raw: _Chunk) -> StoredChunk:
    if not raw.planes:
        raise PackError(f"chunk at {raw.offset} has no planes", corrupt=True)
    if len(raw.tags) != TAG_BYTES * len(raw.planes):
        raise PackError(f"chunk at {raw.offset}: {len(raw.tags)} bytes of tags", corrupt=True)
    if sum(raw.planes) > raw.nbytes:
        # The encoder stores a chunk raw before it lets one grow, so buffers are sized by raw bytes.
        raise PackError(f"chunk at {raw.offset}: stored form is larger than the chunk", corrupt=True)
    planes = tuple(
        StoredPlane(nbytes, raw.tags[TAG_BYTES * at : TAG_BYTES * (at + 1)])
        for at, nbytes in enumerate(raw.planes)
    )
    if raw.base is None:
        return StoredChunk(raw.codec_id, raw.offset, planes, None, raw.fingerprint)
    base, base_chunk = raw.base
    if raw.offset % PAGE_BYTES or raw.offset < HEADER_BYTES:
        # Of extents in this file the tiling says the same.
        raise PackError(f"chunk at {raw.offset} of base {base} starts on no page of it", corrupt=True)
    return StoredChunk(raw.codec_id, raw.offset, planes, None, raw.fingerprint, base, base_chunk)


def _bases(
    rows: Sequence[_Base], ref: ModelRef, header: PackHeader, chunks: Sequence[StoredChunk]
) -> tuple[BaseFile, ...]:
    """The files that chunks refer to: of the same tenant, each of them needed, none of them this one."""
    try:
        bases = tuple(BaseFile(parse_ref(row.ref), row.salt, row.pack_key) for row in rows)
    except BadValue as error:
        raise PackError(f"index does not decode: {str(error)[:200]}", corrupt=True) from None
    if bases and not header.sealed:
        raise PackError("a host segment refers to another file", corrupt=True)
    for number, base in enumerate(bases):
        if base.ref.tenant != ref.tenant:
            raise PackError(f"base {number} is of another tenant", corrupt=True)
    if len({header.salt, *(base.salt for base in bases)}) != 1 + len(bases):
        raise PackError("a base appears twice, or is this file", corrupt=True)
    used = {chunk.base for chunk in chunks if chunk.base is not None}
    if used != set(range(len(bases))):
        raise PackError(f"chunks refer to bases {sorted(used)} of {len(bases)}", corrupt=True)
    return bases


def _check_fingerprints(chunks: Sequence[StoredChunk], key: bytes, header: PackHeader) -> None:
    """A sealed pack has them all; a host segment, whose chunks nobody looks for, has none."""
    key_bytes, nbytes = (KEY_BYTES, FINGERPRINT_BYTES) if header.sealed else (0, 0)
    if len(key) != key_bytes or any(len(chunk.fingerprint) != nbytes for chunk in chunks):
        raise PackError(f"fingerprints are not of {nbytes} bytes each", corrupt=True)


def _check_files(files: Sequence[StoredFile]) -> None:
    if len({stored.path for stored in files}) != len(files):
        raise PackError("a side file appears twice", corrupt=True)
    if sum(stored.nbytes for stored in files) > SIDE_BYTES_MAX:
        raise PackError(f"side files are larger than {SIDE_BYTES_MAX} bytes", corrupt=True)
    for stored in files:
        if len(stored.tag) != TAG_BYTES:
            raise PackError(f"side file {stored.path[:80]!r}: {len(stored.tag)} bytes of tag", corrupt=True)


def _check_extents(extents: Sequence[tuple[int, int]], header: PackHeader) -> None:
    """Between header and index, extents must tile the file, so that every byte belongs to one part."""
    at = HEADER_BYTES
    for offset, nbytes in sorted(extents):
        if offset != at:
            raise PackError(f"a part starts at {offset} instead of {at}", corrupt=True)
        at += nbytes
    if at != header.index_offset:
        raise PackError(f"parts end at {at}, the index starts at {header.index_offset}", corrupt=True)


assert len(MAGIC) == 8
assert _HEADER.size <= _DIGEST_AT
assert SALT_BYTES == 32
