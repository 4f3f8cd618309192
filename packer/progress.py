"""What a pack that is not finished holds so far, so that an interrupted ingest can go on.

Covers: the records in the file beside the pack, written as chunks are stored and read by the next attempt.
Does not cover: the chunks themselves (``pack_writer``) or keeping the data key meanwhile (the agent).

Nothing here is trusted for more than where to look: a record opens only with the version's data key and for
the same layout, the chunk it names only with its own tags, and every byte is hashed with its origin file
before the model may serve. So a torn, old or foreign file costs time and nothing else.

A record is its length (u32, little-endian), a random nonce, and a MessagePack array sealed with AES-256-GCM:
salt of the attempt, number of the chunk, codec id, offset, sizes of the planes, tags, ``same_as``; of an
extent in a base the salt of that file and its number there, else nothing and 0.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from dataclasses import dataclass
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from packer.index import CHUNKS_MAX, CODEC_ID_MAX, PLANES_MAX, PackError, StoredChunk, StoredPlane
from packer.layout import CHUNK_BYTES, IMAGE_BYTES_MAX, PAGE_BYTES, ImageLayout
from packer.pack_file import write_all
from packer.seal import KEY_BYTES, NONCE_BYTES, SALT_BYTES, TAG_BYTES, seal_context
from packer.types import MIB, ModelRef

# A record takes some 200 bytes: the longest chunk table and another one of an earlier attempt fit.
PROGRESS_BYTES_MAX = 96 * MIB
RECORD_BYTES_MAX = 1024

_DERIVE_INFO = b"bunkhouse progress of an ingest, format 3"
_LENGTH = struct.Struct("<I")


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    salt: Annotated[bytes, msgspec.Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)]
    number: Annotated[int, msgspec.Meta(ge=0, lt=CHUNKS_MAX)]
    codec_id: Annotated[int, msgspec.Meta(ge=0, le=CODEC_ID_MAX)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=2 * IMAGE_BYTES_MAX)]
    planes: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES)]],
        msgspec.Meta(min_length=1, max_length=PLANES_MAX),
    ]
    tags: Annotated[bytes, msgspec.Meta(max_length=PLANES_MAX * TAG_BYTES)]
    same_as: Annotated[int, msgspec.Meta(ge=0, lt=CHUNKS_MAX)] | None
    base_salt: Annotated[bytes, msgspec.Meta(max_length=SALT_BYTES)]
    base_chunk: Annotated[int, msgspec.Meta(ge=0, lt=CHUNKS_MAX)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Record)


@dataclass(frozen=True, slots=True)
class PartialChunk:
    """A chunk that an earlier attempt says it has stored, sealed with the key of that attempt's salt; or that
    it found in the file with ``base_salt``, under the number ``chunk.base_chunk``."""

    salt: bytes
    number: int
    chunk: StoredChunk
    base_salt: bytes = b""


class ProgressLog:
    """The records of one version. ``read`` first, then ``add`` from any thread. The descriptor stays the
    caller's."""

    def __init__(self, fd: int, data_key: bytes, ref: ModelRef, layout: ImageLayout) -> None:
        self._fd = fd
        self._layout = layout
        key = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=_DERIVE_INFO).derive(data_key)
        self._cipher = AESGCM(key)
        self._context = _context(ref, layout)
        self._lock = threading.Lock()
        self._end = 0

    def read(self) -> list[PartialChunk]:
        """What can be read, the last record of each chunk, in the order of their offsets; what follows the
        first torn record is gone. Raises ``PackError`` when the file can not be read at all."""
        try:
            size = os.fstat(self._fd).st_size
            data = os.pread(self._fd, size, 0) if size <= PROGRESS_BYTES_MAX else b""
        except OSError as error:
            raise PackError(f"reading the progress of {size} bytes failed: {error.strerror}") from error
        found: dict[int, PartialChunk] = {}
        while (
            record := self._record(data[self._end : self._end + _LENGTH.size + RECORD_BYTES_MAX])
        ) is not None:
            partial, length = record
            found[partial.number] = partial
            self._end += length
        self._cut(self._end)
        return sorted(found.values(), key=lambda partial: (partial.chunk.offset, partial.number))

    def _record(self, data: bytes) -> tuple[PartialChunk, int] | None:
        if len(data) < _LENGTH.size:
            return None
        length = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        if not _LENGTH.size + NONCE_BYTES < length <= len(data):
            return None
        nonce, sealed = data[_LENGTH.size :][:NONCE_BYTES], data[_LENGTH.size + NONCE_BYTES : length]
        try:
            raw = _decoder.decode(self._cipher.decrypt(nonce, sealed, self._context))
        except (InvalidTag, msgspec.MsgspecError):
            return None
        spans = self._layout.chunks
        wrong = (
            raw.number >= len(spans)
            or len(raw.tags) != TAG_BYTES * len(raw.planes)
            or sum(raw.planes) > spans[raw.number].nbytes
            or raw.offset % PAGE_BYTES != 0
            or raw.same_as == raw.number
        )
        if wrong:
            return None
        planes = tuple(
            StoredPlane(nbytes, raw.tags[TAG_BYTES * at : TAG_BYTES * (at + 1)])
            for at, nbytes in enumerate(raw.planes)
        )
        chunk = StoredChunk(raw.codec_id, raw.offset, planes, raw.same_as, base_chunk=raw.base_chunk)
        return PartialChunk(raw.salt, raw.number, chunk, raw.base_salt), length

    def add(self, salt: bytes, number: int, chunk: StoredChunk, base_salt: bytes = b"") -> None:
        """Record a chunk whose extent is written; one that has no room is read again after an interruption.
        Raises ``PackError``."""
        body = _encoder.encode(
            _Record(
                salt,
                number,
                chunk.codec_id,
                chunk.offset,
                [plane.nbytes for plane in chunk.planes],
                b"".join(plane.tag for plane in chunk.planes),
                chunk.same_as,
                base_salt,
                chunk.base_chunk,
            )
        )
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, body, self._context)
        data = _LENGTH.pack(len(sealed)) + sealed
        with self._lock:
            if self._end + len(data) > PROGRESS_BYTES_MAX:
                return
            write_all(self._fd, data, self._end)
            self._end += len(data)

    def clear(self) -> None:
        """Forget everything. Raises ``PackError``."""
        with self._lock:
            self._end = 0
            self._cut(0)

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise PackError(f"cutting the progress to {size} bytes failed: {error.strerror}") from error


def _context(ref: ModelRef, layout: ImageLayout) -> bytes:
    """What a record is bound to: a chunk's number means the same bytes of the same model."""
    digest = hashlib.sha256()
    for span in layout.chunks:
        digest.update(b"%d %d %s\n" % (span.image_offset, span.nbytes, span.dtype.encode()))
    return seal_context(ref) + digest.digest()
