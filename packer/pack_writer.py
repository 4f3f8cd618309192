"""Writing a pack: encode, seal and store chunks and side files, then the index and the header.

Covers: ``PackWriter``, chunks that are equal and stored once, the table of other files that hold some of
them, taking over the chunks of an attempt that was interrupted, and the limits of size and free space. Does
not cover: reading (``pack``), finding chunks in other packs (``bases``), the records of an attempt
(``progress``), naming and renaming files and keeping keys (the agent), how several chunks are in flight
(``ingest``). The format is FORMAT.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from packer.bases import Bases, Found
from packer.host_segment import host_sizes
from packer.index import (
    BASES_MAX,
    FILES_MAX,
    HEADER_BYTES,
    INDEX_BYTES_MAX,
    PATH_CHARS_MAX,
    SIDE_BYTES_MAX,
    BaseFile,
    PackError,
    PackHeader,
    PackIndex,
    StoredChunk,
    StoredFile,
    encode_index,
    up_to_page,
)
from packer.layout import ImageLayout, check_layout
from packer.pack_file import (
    NO_TAG,
    ZEROS,
    Scratch,
    file_part,
    index_part,
    read_all,
    write_all,
    write_end,
)
from packer.progress import PartialChunk, ProgressLog
from packer.seal import (
    TAG_BYTES,
    ChunkSeal,
    derive_pack_key,
    new_salt,
    seal_context,
)
from packer.sealed_extent import open_planes, seal_planes
from packer.types import HostSizes, ModelRef, Task

_libc = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What a finished pack takes on disk and as a host segment, and how many bytes of the image are not
    stored because other chunks have them, here or in a base. ``bases``: the salts of those files."""

    disk_bytes: int
    host: HostSizes
    deduplicated_bytes: int
    bases: tuple[bytes, ...] = ()

    @property
    def host_bytes(self) -> int:
        return self.host.stored_bytes


class PackWriter:
    """Writes one pack. ``add_file`` and ``add_chunk`` may be called from several threads; nothing is valid
    before ``finish``. The caller syncs the directory and renames.

    ``floor_bytes``: what must stay free on the file system. ``log``: where stored chunks are recorded.
    ``bases``: where chunks are looked for before they are stored.
    """

    def __init__(
        self,
        fd: int,
        ref: ModelRef,
        engine: str,
        task: Task,
        layout: ImageLayout,
        key: bytes,
        limit_bytes: int,
        floor_bytes: int = 0,
        log: ProgressLog | None = None,
        bases: Bases | None = None,
    ) -> None:
        check_layout(layout)
        self._fd, self._ref, self._engine, self._task, self._layout = fd, ref, engine, task, layout
        self._key, self._limit_bytes, self._floor_bytes, self._log = key, limit_bytes, floor_bytes, log
        # A new salt for every attempt: what an interrupted one sealed and did not record must never share
        # a key with what this one seals in its place.
        self._salt = new_salt()
        self._pack_key = derive_pack_key(key, self._salt)
        self._seal = ChunkSeal(self._pack_key, seal_context(ref))
        self._changed = threading.Condition()
        self._local = threading.local()
        self._next_offset = HEADER_BYTES
        self._chunks: list[StoredChunk | None] = [None] * len(layout.chunks)
        self._started = [False] * len(layout.chunks)
        self._files: list[StoredFile] = []
        self._finished = False
        self._failed = False
        self._bases = bases or Bases((), ref)
        # Files that extents of this pack lie in, in the order of the index.
        self._base_files: list[BaseFile] = []
        # The chunk that holds, or is about to hold, the bytes with this fingerprint.
        self._owners: dict[tuple[str, int, bytes], int] = {}

    # --- side files -------------------------------------------------------------------------------

    def add_file(self, path: str, data: bytes) -> None:
        """Seal and store a side file. Raises ``PackError``."""
        with self._changed:
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

    # --- chunks -----------------------------------------------------------------------------------

    def add_chunk(self, i: int, raw: memoryview) -> None:
        """Encode, seal and store chunk ``i``, or note that an equal one is stored. Each chunk is added once.
        Raises ``PackError``."""
        from packer.codec import encode

        if not 0 <= i < len(self._chunks) or len(raw) != self._layout.chunks[i].nbytes:
            raise PackError(f"chunk {i} of {len(raw)} bytes is not in the layout")
        self._start(i)
        scratch = self._scratch()
        try:
            span = self._layout.chunks[i]
            fingerprint = self._bases.own.of(raw)
            if self._is_duplicate(i, fingerprint):
                return
            found = self._bases.find(span, fingerprint, raw, scratch)
            if found is not None and self._share(i, found, fingerprint):
                return
            encoded = encode(span.dtype, raw, scratch.workspace)
            self._store(i, encoded.codec_id, encoded.planes, fingerprint, scratch)
        except BaseException:
            self._fail()
            raise

    def take_over(self, partial: PartialChunk, out: memoryview) -> bool:
        """Decode a chunk that an interrupted attempt stored into ``out``, and make it a chunk of this pack.

        Only before the first ``add_chunk``, one after the other in the order of their offsets: extents move
        towards the start, over what is not needed any more. False: it is not whole. Raises ``PackError``.
        """
        from packer.codec import BadPlanes, decode_into

        i, chunk = partial.number, partial.chunk
        raw_bytes = self._layout.chunks[i].nbytes
        if partial.base_salt:
            return self._take_over_shared(partial, out)
        if chunk.same_as is not None or chunk.offset < self._next_offset or self._started[i]:
            return False
        scratch = self._scratch()
        try:
            read_all(self._fd, scratch.stored[: chunk.stored_bytes], chunk.offset)
            seal = ChunkSeal(derive_pack_key(self._key, partial.salt), seal_context(self._ref))
            planes = open_planes(seal, i, raw_bytes, chunk, scratch.stored)
            decode_into(chunk.codec_id, planes, out, scratch.workspace)
        except (PackError, BadPlanes):
            return False
        self._start(i)
        fingerprint = self._bases.own.of(out)
        self._claim(i, fingerprint)
        self._store(i, chunk.codec_id, planes, fingerprint, scratch)
        return True

    def _take_over_shared(self, partial: PartialChunk, out: memoryview) -> bool:
        """The same for a chunk in another file. That file may be gone since, or not be offered any more."""
        i = partial.number
        if self._started[i]:
            return False
        found = self._bases.read(partial.base_salt, partial.chunk.base_chunk, out, self._scratch())
        if found is None:
            return False
        fingerprint = self._bases.own.of(out)
        if not self._share(i, found, fingerprint):
            return False
        self._start(i)
        self._claim(i, fingerprint)
        return True

    def take_over_duplicate(self, partial: PartialChunk) -> bool:
        """The same for a chunk that was found to be equal to another one; after all of those."""
        i, same_as = partial.number, partial.chunk.same_as
        owner = self._chunks[same_as] if same_as is not None else None
        if owner is None or same_as is None or owner.same_as is not None or self._started[i]:
            return False
        one, other = self._layout.chunks[i], self._layout.chunks[same_as]
        if (one.nbytes, one.dtype) != (other.nbytes, other.dtype):
            return False
        self._start(i)
        with self._changed:
            self._put(i, replace(owner, same_as=same_as))
        return True

    def _start(self, i: int) -> None:
        with self._changed:
            if self._started[i] or self._finished:
                raise PackError(f"chunk {i} was added before, or the pack is finished")
            self._started[i] = True

    def _scratch(self) -> Scratch:
        scratch: Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = Scratch()
        return scratch

    def _store(
        self,
        i: int,
        codec_id: int,
        planes: Sequence[memoryview | bytes],
        fingerprint: bytes,
        scratch: Scratch,
    ) -> None:
        nbytes = sum(len(plane) for plane in planes)
        with self._changed:
            offset = self._take(up_to_page(nbytes))
        self._write_extent(i, codec_id, planes, StoredChunk(codec_id, offset, (), None, fingerprint), scratch)

    def _write_extent(
        self,
        i: int,
        codec_id: int,
        planes: Sequence[memoryview | bytes],
        place: StoredChunk,
        scratch: Scratch,
    ) -> None:
        raw_bytes, stored = self._layout.chunks[i].nbytes, scratch.stored
        sealed = seal_planes(self._seal, i, raw_bytes, codec_id, planes, stored)
        chunk = replace(place, planes=sealed)
        stored[chunk.stored_bytes : chunk.extent_bytes] = ZEROS[: chunk.extent_bytes - chunk.stored_bytes]
        write_all(self._fd, stored[: chunk.extent_bytes], chunk.offset)
        # The disk starts on it now, or the sync at the end would wait for the whole pack.
        _start_writing(self._fd, chunk.offset, chunk.extent_bytes)
        with self._changed:
            self._put(i, chunk)

    def _put(self, i: int, chunk: StoredChunk) -> None:
        """Called with the lock held."""
        self._chunks[i] = chunk
        if self._log is not None:
            base_salt = self._base_files[chunk.base].salt if chunk.base is not None else b""
            self._log.add(self._salt, i, chunk, base_salt)
        self._changed.notify_all()

    def _take(self, nbytes: int) -> int:
        """Reserve the next bytes of the file. Called with the lock held."""
        if self._next_offset + nbytes > self._limit_bytes:
            raise PackError(f"pack of {self._ref} needs more than its limit of {self._limit_bytes} bytes")
        if self._floor_bytes:
            space = os.fstatvfs(self._fd)
            if space.f_bavail * space.f_frsize < self._floor_bytes + nbytes:
                raise PackError(
                    f"pack of {self._ref}: less than {self._floor_bytes} bytes are free on the file system"
                )
        offset, self._next_offset = self._next_offset, self._next_offset + nbytes
        return offset

    def _fail(self) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    # --- equal chunks -----------------------------------------------------------------------------

    def _claim(self, i: int, fingerprint: bytes) -> int:
        """The chunk that holds these bytes: an earlier caller's, or from now on ``i``."""
        span = self._layout.chunks[i]
        with self._changed:
            return self._owners.setdefault((span.dtype, span.nbytes, fingerprint), i)

    def _is_duplicate(self, i: int, fingerprint: bytes) -> bool:
        """Whether chunk ``i`` needs no extent of its own, because an equal one has one."""
        owner = self._claim(i, fingerprint)
        if owner == i:
            return False
        with self._changed:
            # Another thread may be at it; it waits for nobody.
            self._changed.wait_for(lambda: self._chunks[owner] is not None or self._failed)
            chunk = self._chunks[owner]
            if chunk is None:
                raise PackError(f"chunk {owner}, which chunk {i} is equal to, was not stored")
            # A duplicate refers to a chunk before it. One that lies before its owner is put right at the
            # end: done here, equal chunks in falling order would each rewrite all others.
            self._put(i, replace(chunk, same_as=owner))
        return True

    def _share(self, i: int, found: Found, fingerprint: bytes) -> bool:
        """Refer to an extent in another file; False when there are too many such files."""
        with self._changed:
            if found.file not in self._base_files:
                if len(self._base_files) == BASES_MAX:
                    return False
                self._base_files.append(found.file)
            base = self._base_files.index(found.file)
            self._put(i, replace(found.chunk, fingerprint=fingerprint, base=base))
        return True

    def _hand_over(self) -> None:
        """Give each extent that chunks refer to to the first of them, if that is not its owner: once for each
        extent, however many there are. Called with the lock held."""
        first: dict[int, int] = {}
        for number, chunk in enumerate(self._chunks):
            if chunk is not None and chunk.same_as is not None:
                first.setdefault(chunk.same_as, number)
        scratch = self._scratch()
        for owner, number in first.items():
            held = self._chunks[owner]
            if held is None or number > owner:
                continue
            if held.base is not None:
                self._put(number, replace(held, same_as=None))
            else:
                read_all(self._fd, scratch.stored[: held.stored_bytes], held.offset)
                planes = open_planes(
                    self._seal, owner, self._layout.chunks[owner].nbytes, held, scratch.stored
                )
                self._write_extent(number, held.codec_id, planes, replace(held, same_as=None), scratch)
        for number, chunk in enumerate(self._chunks):
            owner = number if chunk is None or chunk.same_as is None else chunk.same_as
            heir = first.get(owner, owner)
            if heir < owner and number != heir:
                now = self._chunks[heir]
                assert now is not None
                self._put(number, replace(now, same_as=heir))

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> PackSummary:
        """Write the index, sync, write the header, sync. Raises ``PackError`` when a chunk is missing."""
        with self._changed:
            missing = self._chunks.count(None)
            if missing or self._finished:
                raise PackError(f"pack of {self._ref}: {missing} chunks missing, or finished before")
            self._finished = True
            self._hand_over()
            chunks = [chunk for chunk in self._chunks if chunk is not None]
            index = PackIndex(
                self._ref,
                self._engine,
                self._task,
                self._layout,
                tuple(self._files),
                tuple(chunks),
                tuple(self._base_files),
                self._bases.own.key,
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
        try:
            os.ftruncate(self._fd, header.file_bytes)
            write_end(self._fd, header, body, sync=True)
        except OSError as error:
            raise PackError(f"finishing the pack failed: {error.strerror}") from error
        salts = tuple(base.salt for base in index.bases)
        return PackSummary(header.file_bytes, host_sizes(index), index.deduplicated_bytes, salts)


def _start_writing(fd: int, offset: int, nbytes: int) -> None:
    """A hint: where it is not known or refused, the sync at the end does all the work."""
    start = getattr(_libc, "sync_file_range", None)
    if start is not None:
        start(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)
