"""Finding chunks of a new pack in packs that its tenant has on this node already.

Covers: opening those packs, looking chunks up by fingerprint, and comparing byte by byte before one is
shared. Does not cover: which packs are offered (``agent/holdings.py``), the table of bases in the new pack
(``pack_writer``), or keeping the files for as long as somebody refers to them (the agent).

A fingerprint only says where to look. What is shared was read, authenticated, decoded and found equal to the
new chunk, so a base that is damaged, or lies, costs time and disk bytes and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from packer.index import BaseFile, PackError, StoredChunk
from packer.layout import ChunkSpan
from packer.pack import PackReader, read_header
from packer.pack_file import FileFds, Scratch
from packer.seal import Fingerprints, new_key
from packer.types import MIB, ModelRef

# Packs in which chunks of one new pack are looked for. The first is nearly always the version before.
PACKS_MAX = 4
# Their indexes together, which take some eight times that in memory: those of models of 200 GiB.
INDEXES_BYTES_MAX = 6 * MIB


@dataclass(frozen=True, slots=True)
class BasePack:
    """A pack to look in: its files and the data key of its version. The descriptors stay the caller's."""

    ref: ModelRef
    data_key: bytes = field(repr=False)
    file: FileFds
    bases: tuple[FileFds, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """An extent that holds the wanted bytes. ``chunk`` lies in ``file``, wherever it was found."""

    file: BaseFile
    chunk: StoredChunk


class Bases:
    """Looks chunks up in the packs offered; may be used from several threads. Packs of another tenant and
    packs that can not be read are left out."""

    def __init__(self, packs: Sequence[BasePack], ref: ModelRef) -> None:
        self._readers: list[PackReader] = []
        # By fingerprint key: packs that came from another node, or from before all others, have their own.
        self._tables: dict[bytes, dict[tuple[str, int, bytes], tuple[PackReader, int]]] = {}
        self._by_place: dict[tuple[bytes, int], tuple[PackReader, int]] = {}
        left_bytes = INDEXES_BYTES_MAX
        for pack in packs[:PACKS_MAX]:
            if pack.ref.tenant != ref.tenant:
                continue
            try:
                left_bytes -= read_header(pack.file.fd).index_bytes
                if left_bytes < 0:
                    break
                self._add(PackReader(pack.file.fd, pack.data_key, pack.ref, bases=pack.bases))
            except PackError:
                continue
        # A new pack goes on with the key of the likeliest base, so that one look-up is enough.
        first = self._readers[0].index.fingerprint_key if self._readers else new_key()
        self.own = Fingerprints(first)
        self._others = [Fingerprints(key) for key in self._tables if key != first]

    def __len__(self) -> int:
        return len(self._by_place)

    def _add(self, reader: PackReader) -> None:
        self._readers.append(reader)
        index = reader.index
        table = self._tables.setdefault(index.fingerprint_key, {})
        for number, (span, chunk) in enumerate(zip(index.layout.chunks, index.chunks, strict=True)):
            if chunk.same_as is None:
                table.setdefault((span.dtype, span.nbytes, chunk.fingerprint), (reader, number))
                salt = _file(reader, chunk).salt
                self._by_place.setdefault((salt, index.part_number(number)), (reader, number))

    def find(self, span: ChunkSpan, fingerprint: bytes, raw: memoryview, scratch: Scratch) -> Found | None:
        """An extent with exactly these bytes; ``fingerprint`` is that of ``own``."""
        place = self._look_up(self.own.key, span, fingerprint)
        for other in self._others:
            if place is None:
                place = self._look_up(other.key, span, other.of(raw))
        if place is None:
            return None
        from packer.codec import same_bytes

        reader, number = place
        held = scratch.wire[: span.nbytes]
        try:
            reader.read_chunk(number, held, scratch)
        except PackError:
            return None  # whoever restores that pack finds it out
        return _found(reader, number) if same_bytes(held, raw) else None

    def _look_up(self, key: bytes, span: ChunkSpan, fingerprint: bytes) -> tuple[PackReader, int] | None:
        return self._tables.get(key, {}).get((span.dtype, span.nbytes, fingerprint))

    def read(self, salt: bytes, part_number: int, out: memoryview, scratch: Scratch) -> Found | None:
        """Read the extent that is sealed under this number in the file with this salt, if it is here."""
        place = self._by_place.get((salt, part_number))
        if place is None or place[0].index.layout.chunks[place[1]].nbytes != len(out):
            return None
        try:
            place[0].read_chunk(place[1], out, scratch)
        except PackError:
            return None
        return _found(*place)


def _file(reader: PackReader, chunk: StoredChunk) -> BaseFile:
    """The file that this chunk's extent really lies in, so that references never form a chain."""
    if chunk.base is not None:
        return reader.index.bases[chunk.base]
    return BaseFile(reader.index.ref, reader.salt, reader.pack_key(None))


def _found(reader: PackReader, number: int) -> Found:
    chunk = reader.index.chunks[number]
    held = StoredChunk(
        chunk.codec_id, chunk.offset, chunk.planes, base_chunk=reader.index.part_number(number)
    )
    return Found(_file(reader, chunk), held)
