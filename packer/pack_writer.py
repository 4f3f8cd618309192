"""Writing a pack: encode, seal and store chunks and side files, then the index and the header.

Covers: ``PackWriter``. Does not cover: reading (``pack``), naming and renaming files and keeping keys (the
agent), how several chunks are in flight (``tiers``). The format is FORMAT.md.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, replace

from packer.index import (
    FILES_MAX,
    HEADER_BYTES,
    INDEX_BYTES_MAX,
    PATH_CHARS_MAX,
    SIDE_BYTES_MAX,
    PackError,
    PackHeader,
    PackIndex,
    StoredChunk,
    StoredFile,
    StoredPlane,
    encode_index,
    up_to_page,
)
from packer.layout import ImageLayout, check_layout
from packer.pack_file import (
    NO_TAG,
    ZEROS,
    Scratch,
    chunk_part,
    file_part,
    index_part,
    write_all,
    write_end,
)
from packer.seal import (
    TAG_BYTES,
    ChunkSeal,
    derive_pack_key,
    new_salt,
    seal_context,
)
from packer.types import ModelRef, Task


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What a finished pack takes: on disk, and as an opened image in memory."""

    disk_bytes: int
    host_bytes: int


class PackWriter:
    """Writes one pack into an empty file. ``add_file`` and ``add_chunk`` may be called from several
    threads; nothing is valid before ``finish``. The caller syncs the directory and renames."""

    def __init__(
        self,
        fd: int,
        ref: ModelRef,
        engine: str,
        task: Task,
        layout: ImageLayout,
        key: bytes,
        limit_bytes: int,
    ) -> None:
        check_layout(layout)
        self._fd, self._ref, self._engine, self._task, self._layout = fd, ref, engine, task, layout
        self._limit_bytes = limit_bytes
        self._salt = new_salt()
        self._pack_key = derive_pack_key(key, self._salt)
        self._seal = ChunkSeal(self._pack_key, seal_context(ref))
        self._lock = threading.Lock()
        self._local = threading.local()
        self._next_offset = HEADER_BYTES
        self._chunks: list[StoredChunk | None] = [None] * len(layout.chunks)
        self._started = [False] * len(layout.chunks)
        self._files: list[StoredFile] = []
        self._finished = False

    def add_file(self, path: str, data: bytes) -> None:
        """Seal and store a side file. Raises ``PackError``."""
        with self._lock:
            total = sum(stored.nbytes for stored in self._files) + len(data)
            if any(stored.path == path for stored in self._files):
                raise PackError(f"side file {path!r} was added before")
            if len(path) > PATH_CHARS_MAX or len(self._files) == FILES_MAX or total > SIDE_BYTES_MAX:
                raise PackError(
                    f"side file {path[:80]!r} breaks a limit: {FILES_MAX} files, {SIDE_BYTES_MAX} bytes "
                    f"in all, {PATH_CHARS_MAX} characters in a path"
                )
            number = len(self._files)
            offset = self._take(up_to_page(len(data)))
            sealed = bytearray(up_to_page(len(data)) + TAG_BYTES)
            self._seal.seal_into(
                file_part(number, len(data)), memoryview(data), memoryview(sealed)[: len(data) + TAG_BYTES]
            )
            tag = bytes(sealed[len(data) : len(data) + TAG_BYTES])
            sealed[len(data) :] = bytes(len(sealed) - len(data))
            self._files.append(StoredFile(path, len(data), offset, tag))
        write_all(self._fd, memoryview(sealed)[: up_to_page(len(data))], offset)

    def add_chunk(self, i: int, raw: memoryview) -> None:
        """Encode, seal and store chunk ``i``. Each chunk is added once. Raises ``PackError``."""
        from packer.codec import encode

        if not 0 <= i < len(self._chunks) or len(raw) != self._layout.chunks[i].nbytes:
            raise PackError(f"chunk {i} of {len(raw)} bytes is not in the layout")
        with self._lock:
            if self._started[i] or self._finished:
                raise PackError(f"chunk {i} was added before, or the pack is finished")
            self._started[i] = True
        scratch: Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = Scratch()
        encoded = encode(self._layout.chunks[i].dtype, raw, scratch.workspace)
        with self._lock:
            offset = self._take(up_to_page(encoded.stored_bytes))
        planes: list[StoredPlane] = []
        at, stored = 0, scratch.stored
        for plane, data in enumerate(encoded.planes):
            end = at + len(data)
            stored[at:end] = data
            part = chunk_part(i, plane, len(raw), encoded.codec_id, len(data))
            self._seal.seal_into(part, stored[at:end], stored[at : end + TAG_BYTES])
            # The next plane overwrites the tag; tags live in the index, so that planes stay aligned.
            planes.append(StoredPlane(len(data), bytes(stored[end : end + TAG_BYTES])))
            at = end
        stored[at : up_to_page(at)] = ZEROS[: up_to_page(at) - at]
        write_all(self._fd, stored[: up_to_page(at)], offset)
        with self._lock:
            self._chunks[i] = StoredChunk(encoded.codec_id, offset, tuple(planes))

    def _take(self, nbytes: int) -> int:
        """Reserve the next bytes of the file. Called with the lock held."""
        if self._next_offset + nbytes > self._limit_bytes:
            raise PackError(f"pack of {self._ref} needs more than its limit of {self._limit_bytes} bytes")
        offset, self._next_offset = self._next_offset, self._next_offset + nbytes
        return offset

    def finish(self) -> PackSummary:
        """Write the index, sync, write the header, sync. Raises ``PackError`` when a chunk is missing."""
        with self._lock:
            chunks = [chunk for chunk in self._chunks if chunk is not None]
            if len(chunks) != len(self._chunks) or self._finished:
                missing = len(self._chunks) - len(chunks)
                raise PackError(f"pack of {self._ref}: {missing} chunks missing, or finished before")
            self._finished = True
            index = PackIndex(
                self._ref, self._engine, self._task, self._layout, tuple(self._files), tuple(chunks)
            )
            data = encode_index(index)
            if len(data) > INDEX_BYTES_MAX:
                raise PackError(f"index of {len(data)} bytes, the limit is {INDEX_BYTES_MAX}")
            offset = self._take(up_to_page(len(data)))
        header = PackHeader(True, self._salt, offset, len(data), self._next_offset, NO_TAG, b"")
        sealed = bytearray(len(data) + TAG_BYTES)
        ChunkSeal(self._pack_key, header.binding()).seal_into(
            index_part(len(data)), memoryview(data), memoryview(sealed)
        )
        tag, body = bytes(sealed[len(data) :]), bytes(sealed[: len(data)])
        header = replace(header, index_tag=tag, index_sha256=hashlib.sha256(body).digest())
        os.ftruncate(self._fd, header.file_bytes)
        write_end(self._fd, header, body, sync=True)
        return PackSummary(header.file_bytes, header.file_bytes)
