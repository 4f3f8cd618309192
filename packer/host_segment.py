"""Host segments: a model's opened chunks in the memory file from which it is restored the fastest.

Covers: the three forms of a segment (``HostForm``), their exact sizes, known from the index of a pack, and
filling one while a pack is being restored. Does not cover: owning and sealing the memory file (the agent)
or reading a segment (``pack``, ``tiers``).

A segment is a pack file that is not sealed, with offsets of its own. Like every pack it is nothing until
its header, written last, says that it is complete.

In raw form the chunks lie behind the header exactly as in the image, duplicates and constants too: a cpu
device maps them instead of copying them (``image_start``), and a restore that fills such a segment may do so
by placing its chunks there and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from packer.index import (
    HEADER_BYTES,
    PackError,
    PackHeader,
    PackIndex,
    StoredChunk,
    StoredFile,
    StoredPlane,
    encode_index,
    up_to_page,
)
from packer.layout import ChunkSpan
from packer.mapping import LargePages
from packer.pack_file import NO_TAG, ZEROS, write_all, write_end
from packer.seal import SALT_BYTES
from packer.types import HostForm, HostSizes


def host_index(index: PackIndex, form: HostForm) -> PackIndex:
    """The index of the segment that a pack with this index gives. Raises ``PackError`` (corrupt)."""
    chunks: list[StoredChunk] = []
    at = HEADER_BYTES
    for span, chunk in zip(index.layout.chunks, index.chunks, strict=True):
        if chunk.same_as is not None and form is not HostForm.RAW:
            chunks.append(replace(chunks[chunk.same_as], same_as=chunk.same_as))
            continue
        codec_id, sizes = _planes(span, chunk, form)
        chunks.append(StoredChunk(codec_id, at, tuple(StoredPlane(size, NO_TAG) for size in sizes)))
        at += chunks[-1].extent_bytes
    files: list[StoredFile] = []
    for stored in index.side_files:
        files.append(StoredFile(stored.path, stored.nbytes, at, NO_TAG))
        at += stored.extent_bytes
    return replace(index, side_files=tuple(files), chunks=tuple(chunks), bases=(), fingerprint_key=b"")


def _planes(span: ChunkSpan, chunk: StoredChunk, form: HostForm) -> tuple[int, Sequence[int]]:
    from packer.codec import BadPlanes, CodecId, has_wire_form, wire_sizes

    if form is HostForm.STORED:
        return chunk.codec_id, [plane.nbytes for plane in chunk.planes]
    # Eight bytes that repeat stay that on the wire: nothing is smaller, or faster to decode.
    keeps = chunk.codec_id == CodecId.FILL or has_wire_form(chunk.codec_id)
    if form is HostForm.RAW or not keeps:
        return CodecId.RAW, [span.nbytes]
    try:
        sizes = wire_sizes(chunk.codec_id, [plane.nbytes for plane in chunk.planes], span.nbytes)
    except BadPlanes as error:
        raise PackError(f"chunk at {chunk.offset}: {error}", corrupt=True) from None
    if sum(sizes) > span.nbytes:
        raise PackError(f"chunk at {chunk.offset}: wire form is larger than the chunk", corrupt=True)
    return chunk.codec_id, sizes


def image_start(index: PackIndex) -> int | None:
    """Where in a file with this index the whole image lies as it is; None if it does not."""
    from packer.codec import CodecId

    for span, chunk in zip(index.layout.chunks, index.chunks, strict=True):
        as_it_is = chunk.codec_id == CodecId.RAW and chunk.same_as is None
        if not as_it_is or chunk.offset != HEADER_BYTES + span.image_offset:
            return None
    return HEADER_BYTES if index.chunks else None


def _index_offset(index: PackIndex) -> int:
    """Where the parts of a segment end; they lie without holes."""
    own = (chunk.extent_bytes for chunk in index.chunks if chunk.same_as is None)
    return HEADER_BYTES + sum(own) + sum(stored.extent_bytes for stored in index.side_files)


def _file_bytes(index: PackIndex) -> int:
    return _index_offset(index) + up_to_page(len(encode_index(index)))


def host_sizes(index: PackIndex) -> HostSizes:
    """Exact size of the segment in each form. Raises ``PackError`` (corrupt)."""
    stored, wire, raw = (
        _file_bytes(host_index(index, form)) for form in (HostForm.STORED, HostForm.WIRE, HostForm.RAW)
    )
    return HostSizes(stored, wire, raw)


class HostWriter:
    """Fills one segment from any number of threads, chunk by chunk in any order. The descriptor stays the
    caller's; it must be empty, or hold an attempt with the same pack and form."""

    def __init__(self, fd: int, index: PackIndex, side_files: Mapping[str, bytes], form: HostForm) -> None:
        """``index`` is that of the pack. Raises ``PackError`` when the side files are not its own."""
        if {path: len(data) for path, data in side_files.items()} != dict(index.files):
            raise PackError("the side files are not those of the pack")
        self.form = form
        self.fd = fd
        self._index = host_index(index, form)
        self._side_files = side_files
        self._lock = threading.Lock()
        self._missing = {number for number, chunk in enumerate(self._index.chunks) if chunk.same_as is None}
        size = os.fstat(fd).st_size
        self._has_room = size >= _file_bytes(self._index)
        self._pages = LargePages(fd, size)

    def missing(self) -> frozenset[int]:
        """Chunks that must still be added: all with an extent of their own."""
        with self._lock:
            return frozenset(self._missing)

    def codec_id(self, i: int) -> int:
        """In which form chunk ``i`` is kept: the pack's own, or raw."""
        return self._index.chunks[i].codec_id

    @property
    def image_start(self) -> int | None:
        """Where the image can be filled in place; None if it can not be."""
        return image_start(self._index) if self._has_room else None

    def prepare(self, i: int) -> None:
        """Before chunk ``i`` is placed where it lies in the segment."""
        chunk = self._index.chunks[i]
        self._pages.prepare(chunk.offset, chunk.extent_bytes)

    def note_placed(self, i: int) -> None:
        """Chunk ``i`` lies in the segment: it was placed there."""
        with self._lock:
            self._missing.discard(i)

    def add_chunk(self, i: int, codec_id: int, planes: Sequence[memoryview | bytes]) -> None:
        """Store an opened chunk that is in the form of this segment. Raises ``PackError``."""
        chunk = self._index.chunks[i]
        if chunk.same_as is not None:
            return
        if codec_id != chunk.codec_id or [len(plane) for plane in planes] != [p.nbytes for p in chunk.planes]:
            raise PackError(f"chunk {i} is not in the form {self.form} of this segment")
        self.prepare(i)
        self._write(planes, chunk.offset, chunk.stored_bytes, chunk.extent_bytes)
        self.note_placed(i)

    def _write(
        self, parts: Sequence[memoryview | bytes], offset: int, nbytes: int, extent_bytes: int
    ) -> None:
        """One call for all planes and the padding; what it leaves over is written piece by piece."""
        pieces = [memoryview(part) for part in (*parts, ZEROS[: extent_bytes - nbytes]) if len(part)]
        try:
            done = os.pwritev(self.fd, pieces, offset) if pieces else 0
        except OSError as error:
            raise PackError(f"writing {extent_bytes} bytes at {offset} failed: {error.strerror}") from error
        at = 0
        for piece in pieces:
            skip = min(max(done - at, 0), len(piece))
            write_all(self.fd, piece[skip:], offset + at + skip)
            at += len(piece)

    def finish(self) -> None:
        """Write side files, index and header. Raises ``PackError`` unless every chunk was added."""
        missing = self.missing()
        if missing:
            raise PackError(f"{len(missing)} chunks were not added, the first is {min(missing)}")
        for stored in self._index.side_files:
            data = self._side_files[stored.path]
            self._write([data], stored.offset, stored.nbytes, stored.extent_bytes)
        body = encode_index(self._index)
        offset = _index_offset(self._index)
        header = PackHeader(
            sealed=False,
            salt=bytes(SALT_BYTES),
            index_offset=offset,
            index_bytes=len(body),
            file_bytes=offset + up_to_page(len(body)),
            index_tag=NO_TAG,
            index_sha256=hashlib.sha256(body).digest(),
        )
        write_end(self.fd, header, body, sync=False)
        self.close()

    def close(self) -> None:
        """Let go of the memory file; the descriptor stays the caller's. Harmless when called twice."""
        self._pages.close()
