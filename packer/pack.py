"""The pack file: write it, open it, read chunks out of it, verify it.

Covers: ``PackWriter``, ``PackReader`` (for a sealed pack on disk and for an opened image in memory),
filling an opened image while reading (tee), and ``python -m packer.pack inspect|verify``. Does not
cover: naming, renaming and removing files, keys at rest (the agent), how several chunks are in flight
(``tiers``). The format is FORMAT.md.

Every byte of a sealed pack is covered by a tag, a digest or a check for zero, so a flip anywhere is
found before the byte is used. Importing this needs no numpy: codecs load with the first chunk.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

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
    decode_header,
    decode_index,
    encode_header,
    encode_index,
    up_to_page,
)
from packer.layout import CHUNK_BYTES, PAGE_BYTES, ImageLayout, check_layout
from packer.seal import (
    KEY_BYTES,
    TAG_BYTES,
    BadSeal,
    ChunkSeal,
    Part,
    PartKind,
    derive_pack_key,
    new_salt,
    seal_context,
)
from packer.types import ModelRef, Task

if TYPE_CHECKING:
    from packer.codec import Workspace

__all__ = [
    "PackError",
    "PackIndex",
    "PackReader",
    "PackSummary",
    "PackWriter",
    "Scratch",
    "StoredChunk",
    "verify",
]

_ZEROS = bytes(PAGE_BYTES)
_NO_TAG = bytes(TAG_BYTES)
# The largest extent is a raw chunk; one page more has room for the tag behind the last plane.
_SCRATCH_BYTES = CHUNK_BYTES + PAGE_BYTES


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What a finished pack takes: on disk, and as an opened image in memory."""

    disk_bytes: int
    host_bytes: int


class Scratch:
    """The buffers one thread needs to read or write chunks, kept for as long as the thread.

    The stored bytes lie in page-aligned memory of its own mapping, ready for direct I/O; together with
    the codec's workspace this is at most about four chunks, whatever the model's size.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SCRATCH_BYTES)
        self.stored = memoryview(self._memory)
        self._workspace: Workspace | None = None

    @property
    def workspace(self) -> Workspace:
        if self._workspace is None:
            from packer.codec import Workspace  # loads numpy, which a reader of the index can do without

            self._workspace = Workspace()
        return self._workspace


def _chunk_part(index: int, plane: int, chunk_bytes: int, codec_id: int, nbytes: int) -> Part:
    return Part(PartKind.CHUNK, index, plane, codec_id, nbytes, chunk_bytes)


def _file_part(number: int, nbytes: int) -> Part:
    return Part(PartKind.FILE, number, 0, 0, nbytes, nbytes)


def _index_part(nbytes: int) -> Part:
    return Part(PartKind.INDEX, 0, 0, 0, nbytes, nbytes)


def _write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise PackError(f"writing {len(view)} bytes at {offset} failed: {error.strerror}") from error


def _read_all(fd: int, out: memoryview, offset: int) -> None:
    try:
        while out:
            got = os.preadv(fd, [out], offset)
            if got == 0:
                raise PackError(f"file ends at {offset}; it was cut short", corrupt=True)
            out, offset = out[got:], offset + got
    except OSError as error:
        # The medium lost these bytes: another copy has to be found. Anything else is not its fault.
        raise PackError(
            f"reading {len(out)} bytes at {offset} failed: {error.strerror}", corrupt=error.errno == errno.EIO
        ) from error


def _check_zero(padding: memoryview, offset: int) -> None:
    if padding != _ZEROS[: len(padding)]:
        raise PackError(f"padding after {offset} is not zero", corrupt=True)


# --- write ----------------------------------------------------------------------------------------


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
                _file_part(number, len(data)), memoryview(data), memoryview(sealed)[: len(data) + TAG_BYTES]
            )
            tag = bytes(sealed[len(data) : len(data) + TAG_BYTES])
            sealed[len(data) :] = bytes(len(sealed) - len(data))
            self._files.append(StoredFile(path, len(data), offset, tag))
        _write_all(self._fd, memoryview(sealed)[: up_to_page(len(data))], offset)

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
            part = _chunk_part(i, plane, len(raw), encoded.codec_id, len(data))
            self._seal.seal_into(part, stored[at:end], stored[at : end + TAG_BYTES])
            # The next plane overwrites the tag; tags live in the index, so that planes stay aligned.
            planes.append(StoredPlane(len(data), bytes(stored[end : end + TAG_BYTES])))
            at = end
        stored[at : up_to_page(at)] = _ZEROS[: up_to_page(at) - at]
        _write_all(self._fd, stored[: up_to_page(at)], offset)
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
        header = PackHeader(True, self._salt, offset, len(data), self._next_offset, _NO_TAG, b"")
        sealed = bytearray(len(data) + TAG_BYTES)
        ChunkSeal(self._pack_key, header.binding()).seal_into(
            _index_part(len(data)), memoryview(data), memoryview(sealed)
        )
        tag, body = bytes(sealed[len(data) :]), bytes(sealed[: len(data)])
        header = replace(header, index_tag=tag, index_sha256=hashlib.sha256(body).digest())
        os.ftruncate(self._fd, header.file_bytes)
        _write_end(self._fd, header, body, sync=True)
        return PackSummary(header.file_bytes, header.file_bytes)


def _write_end(fd: int, header: PackHeader, index: bytes, sync: bool) -> None:
    """Index, then header: a file that was cut off in between has no header and is no pack."""
    _write_all(fd, index.ljust(up_to_page(len(index)), b"\0"), header.index_offset)
    if sync:
        os.fsync(fd)
    _write_all(fd, encode_header(header), 0)
    if sync:
        os.fsync(fd)


# --- read -----------------------------------------------------------------------------------------


class PackReader:
    """Reads a sealed pack (with its version's data key) or an opened image (``key`` None).

    Opening checks header and index completely; then ``file`` and ``read_chunk`` may be called from any
    number of threads, each with its own ``Scratch``. The descriptor stays the caller's.
    Raises ``PackError``; ``corrupt`` says that this copy must be dropped.
    """

    def __init__(self, fd: int, key: bytes | None, expect: ModelRef | None = None) -> None:
        self._fd = fd
        self._header = read_header(fd)
        # An opened image in the place of a sealed pack would be bytes that nobody authenticated.
        if key is not None and not self._header.sealed:
            raise PackError("file is not sealed although it should be", corrupt=True)
        if key is None and self._header.sealed:
            raise PackError("pack is sealed: its version's data key is needed")
        self._pack_key = derive_pack_key(key, self._header.salt) if key is not None else None
        self.index = self._read_index()
        if expect is not None and self.index.ref != expect:
            raise PackError(f"holds {self.index.ref} instead of {expect}", corrupt=True)
        self._seal: ChunkSeal | None = None
        if self._pack_key is not None:
            self._seal = ChunkSeal(self._pack_key, seal_context(self.index.ref))
        self._lock = threading.Lock()
        self._teed: set[tuple[int, int]] = set()

    @property
    def host_bytes(self) -> int:
        """Size of the opened image; the same as the sealed file's, offset by offset."""
        return self._header.file_bytes

    def _read_extent(self, nbytes: int, offset: int) -> bytearray:
        data = bytearray(up_to_page(nbytes))
        _read_all(self._fd, memoryview(data), offset)
        _check_zero(memoryview(data)[nbytes:], offset + nbytes)
        del data[nbytes:]
        return data

    def _read_index(self) -> PackIndex:
        header = self._header
        data = self._read_extent(header.index_bytes, header.index_offset)
        if hashlib.sha256(data).digest() != header.index_sha256:
            raise PackError("index digest does not match", corrupt=True)
        if self._pack_key is not None:
            seal = ChunkSeal(self._pack_key, header.binding())
            _open_in_place(seal, _index_part(header.index_bytes), data, header.index_tag)
        self._index_data = bytes(data)
        return decode_index(self._index_data, header)

    def file(self, path: str) -> bytes:
        """The contents of a side file."""
        for number, stored in enumerate(self.index.side_files):
            if stored.path == path:
                return bytes(self._read_file(number, stored))
        raise PackError(f"pack has no side file {path[:80]!r}")

    def _read_file(self, number: int, stored: StoredFile) -> bytearray:
        data = self._read_extent(stored.nbytes, stored.offset)
        if self._seal is not None:
            _open_in_place(self._seal, _file_part(number, stored.nbytes), data, stored.tag)
        return data

    def read_chunk(self, i: int, out: memoryview, scratch: Scratch, tee_fd: int | None = None) -> None:
        """Read chunk ``i``, authenticate and open all its planes, decode them into ``out``.

        With ``tee_fd`` the opened planes are also written there, at the same offsets.
        """
        from packer.codec import BadPlanes, decode_into

        if not 0 <= i < len(self.index.chunks):
            raise PackError(f"chunk {i} is not one of {len(self.index.chunks)}")
        chunk, span = self.index.chunks[i], self.index.layout.chunks[i]
        if len(out) != span.nbytes:
            raise PackError(f"chunk {i} has {span.nbytes} bytes, its destination {len(out)}")
        stored = scratch.stored[: chunk.extent_bytes]
        _read_all(self._fd, stored, chunk.offset)
        _check_zero(stored[chunk.stored_bytes :], chunk.offset + chunk.stored_bytes)
        if self._seal is not None:
            self._open_planes(self._seal, i, chunk, scratch.stored)
        planes: list[memoryview] = []
        at = 0
        for plane in chunk.planes:
            planes.append(stored[at : at + plane.nbytes])
            at += plane.nbytes
        try:
            decode_into(chunk.codec_id, planes, out, scratch.workspace)
        except BadPlanes as error:
            raise PackError(f"chunk {i}: {error}", corrupt=True) from None
        if tee_fd is not None:
            _write_all(tee_fd, stored, chunk.offset)
            with self._lock:
                self._teed.add((tee_fd, i))

    def _open_planes(self, seal: ChunkSeal, i: int, chunk: StoredChunk, stored: memoryview) -> None:
        """Open every plane where it lies. From the last to the first, because the tag is put behind the
        plane, over the first bytes of the next one, which are kept aside meanwhile."""
        end = chunk.stored_bytes
        raw_bytes = self.index.layout.chunks[i].nbytes
        for number in reversed(range(len(chunk.planes))):
            plane = chunk.planes[number]
            start = end - plane.nbytes
            kept = bytes(stored[end : end + TAG_BYTES])
            stored[end : end + TAG_BYTES] = plane.tag
            part = _chunk_part(i, number, raw_bytes, chunk.codec_id, plane.nbytes)
            try:
                seal.open_into(part, stored[start : end + TAG_BYTES], stored[start:end])
            except BadSeal as error:
                raise PackError(str(error), corrupt=True) from None
            stored[end : end + TAG_BYTES] = kept
            end = start

    def finish_tee(self, tee_fd: int) -> None:
        """Complete an opened image: side files, index, and the header last. Raises ``PackError`` unless
        every chunk went to ``tee_fd`` before."""
        with self._lock:
            missing = [i for i in range(len(self.index.chunks)) if (tee_fd, i) not in self._teed]
        if missing:
            raise PackError(f"{len(missing)} chunks were not read into the image, the first is {missing[0]}")
        for number, stored in enumerate(self.index.side_files):
            data = bytes(self._read_file(number, stored))
            _write_all(tee_fd, data.ljust(stored.extent_bytes, b"\0"), stored.offset)
        body = self._index_data
        header = replace(
            self._header, sealed=False, index_tag=_NO_TAG, index_sha256=hashlib.sha256(body).digest()
        )
        _write_end(tee_fd, header, body, sync=False)


def _open_in_place(seal: ChunkSeal, part: Part, data: bytearray, tag: bytes) -> None:
    size = len(data)
    data += tag
    view = memoryview(data)
    try:
        seal.open_into(part, view, view[:size])
    except BadSeal as error:
        raise PackError(str(error), corrupt=True) from None
    finally:
        view.release()
    del data[size:]


def read_header(fd: int) -> PackHeader:
    """The checked header of the file behind ``fd``; needs no key. Raises ``PackError``."""
    size = os.fstat(fd).st_size
    page = bytearray(min(HEADER_BYTES, size))
    _read_all(fd, memoryview(page), 0)
    return decode_header(bytes(page), size)


def verify(reader: PackReader) -> int:
    """Read, authenticate and decode everything. Returns the raw bytes. Raises ``PackError``."""
    scratch = Scratch()
    out = memoryview(bytearray(CHUNK_BYTES))
    total = 0
    for i, span in enumerate(reader.index.layout.chunks):
        reader.read_chunk(i, out[: span.nbytes], scratch)
        total += span.nbytes
    for path, _ in reader.index.files:
        reader.file(path)
    return total


# --- python -m packer.pack ------------------------------------------------------------------------


def _read_key(path: Path) -> bytes:
    """A data key: 32 bytes, or 64 hex digits."""
    with path.open("rb") as file:
        data = file.read(4 * KEY_BYTES)
    if len(data) == KEY_BYTES:
        return data
    try:
        key = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise PackError(f"{path} holds neither {KEY_BYTES} bytes nor {2 * KEY_BYTES} hex digits")
    return key


def _describe(reader: PackReader, header: PackHeader) -> dict[str, object]:
    from packer.codec import CodecId

    index = reader.index
    by_codec: dict[str, list[int]] = {}
    for span, chunk in zip(index.layout.chunks, index.chunks, strict=True):
        known = chunk.codec_id in CodecId.__members__.values()
        name = CodecId(chunk.codec_id).name.lower() if known else f"unknown {chunk.codec_id}"
        row = by_codec.setdefault(f"{span.dtype} {name}", [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + span.nbytes, row[2] + chunk.stored_bytes
    return {
        "model": str(index.ref),
        "engine": index.engine,
        "task": str(index.task),
        "sealed": header.sealed,
        "file_bytes": header.file_bytes,
        "image_bytes": index.layout.image_bytes,
        "tensors": len(index.layout.tensors),
        "chunks": len(index.chunks),
        "side_files": len(index.side_files),
        "codecs": {
            name: {"chunks": row[0], "raw_bytes": row[1], "stored_bytes": row[2]}
            for name, row in sorted(by_codec.items())
        },
    }


def _print_human(rows: Iterable[tuple[str, object]], indent: str = "") -> None:
    for name, value in rows:
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_human(value.items(), indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


def _run(arguments: argparse.Namespace) -> dict[str, object]:
    path = Path(arguments.file)
    with path.open("rb") as file:
        header = read_header(file.fileno())
        if header.sealed and arguments.key_file is None:
            if arguments.command == "verify":
                raise PackError("pack is sealed: give --key-file to verify it")
            return {"sealed": True, "file_bytes": header.file_bytes, "index_bytes": header.index_bytes}
        key = _read_key(Path(arguments.key_file)) if header.sealed else None
        reader = PackReader(file.fileno(), key)
        facts = _describe(reader, header)
        if arguments.command == "verify":
            facts["verified_bytes"] = verify(reader)
        return facts


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0 when fine, 1 when the pack is not, 2 when the command line is wrong."""
    parser = argparse.ArgumentParser(prog="python -m packer.pack", description="Look into a pack file")
    parser.add_argument("command", choices=["inspect", "verify"])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--key-file", metavar="F", help="the version's data key: 32 bytes or 64 hex digits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        facts = _run(arguments)
    except (PackError, OSError) as error:
        print(f"{arguments.file}: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(facts))
    else:
        _print_human(facts.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
