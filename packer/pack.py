"""The pack file: open it, read chunks out of it, verify it.

Covers: ``PackReader`` (for a sealed pack on disk and for a host segment in memory) and
``python -m packer.pack inspect|verify``. Does not cover: writing (``pack_writer``, ``host_segment``), naming
and removing files, keys at rest (the agent), how several chunks are in flight (``tiers``). The format is
FORMAT.md.

Every byte of a sealed pack is covered by a tag, a digest or a check for zero, so a flip anywhere is
found before the byte is used. Importing this needs no numpy: codecs load with the first chunk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from packer.host_segment import host_sizes
from packer.index import (
    HEADER_BYTES,
    PackError,
    PackHeader,
    PackIndex,
    StoredFile,
    decode_header,
    decode_index,
    up_to_page,
)
from packer.layout import CHUNK_BYTES
from packer.pack_file import (
    FileFds,
    Scratch,
    base_name,
    check_zero,
    file_part,
    index_part,
    read_all,
)
from packer.seal import (
    KEY_BYTES,
    BadSeal,
    ChunkSeal,
    Part,
    derive_pack_key,
    seal_context,
)
from packer.sealed_extent import open_planes, whole_planes
from packer.types import HostForm, HostSizes, ModelRef


class PackReader:
    """Reads a sealed pack (with its version's data key) or a host segment (``key`` None).

    Opening checks header and index completely; then everything else may be called from any number of
    threads, each with its own buffers. The descriptors stay the caller's; ``direct_fd`` is the same file
    opened with ``O_DIRECT``, or None where the file system refuses that. ``bases``: the other files that
    extents lie in, in the order of the index; None: only ``index``, ``file`` and sizes are wanted.
    Raises ``PackError``; ``corrupt`` says that this copy must be dropped, or repaired.
    """

    def __init__(
        self,
        fd: int,
        key: bytes | None,
        expect: ModelRef | None = None,
        direct_fd: int | None = None,
        bases: Sequence[FileFds] | None = (),
    ) -> None:
        self.fd = fd
        self._own = FileFds(fd, direct_fd)
        self._header = read_header(fd)
        # A host segment in the place of a sealed pack would be bytes that nobody authenticated.
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
        self._bases: tuple[tuple[FileFds, ChunkSeal], ...] = ()
        if bases is not None:
            self._bases = self._open_bases(bases)

    def _open_bases(self, files: Sequence[FileFds]) -> tuple[tuple[FileFds, ChunkSeal], ...]:
        """Check that these are the files that the index names, as far as they go."""
        bases = self.index.bases
        if len(files) != len(bases):
            raise PackError(f"extents lie in {len(bases)} other files, {len(files)} are here", corrupt=True)
        ends: list[int] = []
        for number, (base, file) in enumerate(zip(bases, files, strict=True)):
            header = read_header(file.fd)
            if header.salt != base.salt or not header.sealed:
                raise PackError(f"base {number} is another file than it should be", corrupt=True)
            ends.append(header.index_offset)
        for i, chunk in enumerate(self.index.chunks):
            if chunk.base is not None and chunk.offset + chunk.extent_bytes > ends[chunk.base]:
                raise PackError(f"chunk {i} ends behind the parts of base {chunk.base}", corrupt=True)
        return tuple(
            (file, ChunkSeal(base.pack_key, seal_context(base.ref)))
            for base, file in zip(bases, files, strict=True)
        )

    def fds(self, base: int | None) -> FileFds:
        """The descriptors of this file, or of one of its bases."""
        return self._own if base is None else self._bases[base][0]

    def pack_key(self, base: int | None) -> bytes:
        """The key that extents in this file, or in one of its bases, are sealed with."""
        key = self._pack_key if base is None else self.index.bases[base].pack_key
        if key is None:
            raise PackError("a host segment is not sealed")
        return key

    @property
    def sealed(self) -> bool:
        return self._header.sealed

    @property
    def salt(self) -> bytes:
        """What makes this file's key its own: two packs with the same salt are the same bytes."""
        return self._header.salt

    @property
    def file_bytes(self) -> int:
        return self._header.file_bytes

    @property
    def host_sizes(self) -> HostSizes:
        """What a host segment of this model takes in each form. Loads numpy."""
        return host_sizes(self.index)

    def _read_extent(self, nbytes: int, offset: int) -> bytearray:
        data = bytearray(up_to_page(nbytes))
        read_all(self.fd, memoryview(data), offset)
        check_zero(memoryview(data)[nbytes:], offset + nbytes)
        del data[nbytes:]
        return data

    def _read_index(self) -> PackIndex:
        header = self._header
        data = self._read_extent(header.index_bytes, header.index_offset)
        if hashlib.sha256(data).digest() != header.index_sha256:
            raise PackError("index digest does not match", corrupt=True)
        if self._pack_key is not None:
            seal = ChunkSeal(self._pack_key, header.binding())
            _open_in_place(seal, index_part(header.index_bytes), data, header.index_tag)
        return decode_index(bytes(data), header)

    def file(self, path: str) -> bytes:
        """The contents of a side file."""
        for number, stored in enumerate(self.index.side_files):
            if stored.path == path:
                return bytes(self._read_file(number, stored))
        raise PackError(f"pack has no side file {path[:80]!r}")

    def _read_file(self, number: int, stored: StoredFile) -> bytearray:
        data = self._read_extent(stored.nbytes, stored.offset)
        if self._seal is not None:
            _open_in_place(self._seal, file_part(number, stored.nbytes), data, stored.tag)
        return data

    def read_chunk(self, i: int, out: memoryview, scratch: Scratch) -> None:
        """Read chunk ``i``, authenticate and open all its planes, decode them into ``out``."""
        from packer.codec import BadPlanes, decode_into

        if not 0 <= i < len(self.index.chunks):
            raise PackError(f"chunk {i} is not one of {len(self.index.chunks)}")
        chunk, span = self.index.chunks[i], self.index.layout.chunks[i]
        if len(out) != span.nbytes:
            raise PackError(f"chunk {i} has {span.nbytes} bytes, its destination {len(out)}")
        read_all(self.fds(chunk.base).fd, scratch.stored[: chunk.extent_bytes], chunk.offset)
        planes = self.open_chunk(i, scratch.stored)
        try:
            decode_into(chunk.codec_id, planes, out, scratch.workspace)
        except BadPlanes as error:
            raise PackError(f"chunk {i}: {error}", corrupt=True) from None

    def open_chunk(self, i: int, extent: memoryview) -> list[memoryview]:
        """Check and open the extent of chunk ``i`` where it lies; returns its planes. ``extent`` starts
        with the extent's bytes; for a sealed pack it is writable and has ``TAG_BYTES`` more."""
        chunk = self.index.chunks[i]
        stored, end = chunk.stored_bytes, chunk.extent_bytes
        check_zero(extent[stored:end], chunk.offset + stored)
        seal = self._seal if chunk.base is None else self._bases[chunk.base][1]
        if seal is None:
            return whole_planes(chunk, extent)
        raw_bytes = self.index.layout.chunks[i].nbytes
        return open_planes(seal, self.index.part_number(i), raw_bytes, chunk, extent)


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
    read_all(fd, memoryview(page), 0)
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


def _describe(reader: PackReader) -> dict[str, object]:
    from packer.codec import CodecId

    index, sizes = reader.index, reader.host_sizes
    by_codec: dict[str, list[int]] = {}
    duplicate_bytes = shared_bytes = 0
    for span, chunk in zip(index.layout.chunks, index.chunks, strict=True):
        if chunk.same_as is not None:
            duplicate_bytes += span.nbytes
            continue
        shared_bytes += chunk.stored_bytes if chunk.base is not None else 0
        known = chunk.codec_id in CodecId.__members__.values()
        name = CodecId(chunk.codec_id).name.lower() if known else f"unknown {chunk.codec_id}"
        row = by_codec.setdefault(f"{span.dtype} {name}", [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + span.nbytes, row[2] + chunk.stored_bytes
    return {
        "model": str(index.ref),
        "engine": index.engine,
        "task": str(index.task),
        "sealed": reader.sealed,
        "file_bytes": reader.file_bytes,
        "image_bytes": index.layout.image_bytes,
        "tensors": len(index.layout.tensors),
        "chunks": len(index.chunks),
        "duplicate_bytes": duplicate_bytes,
        "bases": [str(base.ref) for base in index.bases],
        "stored_in_bases_bytes": shared_bytes,
        "host_bytes": {form.value: sizes.of(form) for form in HostForm},
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
    with ExitStack() as files:
        file = files.enter_context(path.open("rb"))
        header = read_header(file.fileno())
        if header.sealed and arguments.key_file is None:
            if arguments.command == "verify":
                raise PackError("pack is sealed: give --key-file to verify it")
            return {"sealed": True, "file_bytes": header.file_bytes, "index_bytes": header.index_bytes}
        key = _read_key(Path(arguments.key_file)) if header.sealed else None
        count = len(PackReader(file.fileno(), key, bases=None).index.bases)
        paths = [path.with_name(base_name(path.name, number)) for number in range(count)]
        bases = [FileFds(files.enter_context(base.open("rb")).fileno()) for base in paths]
        reader = PackReader(file.fileno(), key, bases=bases)
        facts = _describe(reader)
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
