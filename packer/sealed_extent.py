"""Sealing and opening the planes of one chunk where they lie, one behind the other.

Covers: the in-place work on an extent, whose tags lie elsewhere. Does not cover: choosing where an extent
goes (``pack_writer``) or what its planes mean (``codec``).
"""

from __future__ import annotations

from collections.abc import Sequence

from packer.index import PackError, StoredChunk, StoredPlane
from packer.pack_file import chunk_part
from packer.seal import TAG_BYTES, BadSeal, ChunkSeal


def seal_planes(
    seal: ChunkSeal,
    number: int,
    raw_bytes: int,
    codec_id: int,
    planes: Sequence[memoryview | bytes],
    stored: memoryview,
) -> tuple[StoredPlane, ...]:
    """Seal the planes of chunk ``number`` into ``stored``, one behind the other. They may lie there already;
    ``stored`` has room for a tag behind the last."""
    sealed: list[StoredPlane] = []
    at = 0
    for plane, data in enumerate(planes):
        end = at + len(data)
        # The tag comes out behind the plane, where the next one may wait; it belongs in the index.
        kept = bytes(stored[end : end + TAG_BYTES])
        part = chunk_part(number, plane, raw_bytes, codec_id, len(data))
        seal.seal_into(part, memoryview(data), stored[at : end + TAG_BYTES])
        sealed.append(StoredPlane(len(data), bytes(stored[end : end + TAG_BYTES])))
        stored[end : end + TAG_BYTES] = kept
        at = end
    return tuple(sealed)


def open_planes(
    seal: ChunkSeal, number: int, raw_bytes: int, chunk: StoredChunk, stored: memoryview
) -> list[memoryview]:
    """Open the planes of chunk ``number`` where they lie. Raises ``PackError`` (corrupt)."""
    planes: list[memoryview] = []
    at = 0
    for number_of_plane, plane in enumerate(chunk.planes):
        end = at + plane.nbytes
        kept = bytes(stored[end : end + TAG_BYTES])
        stored[end : end + TAG_BYTES] = plane.tag
        part = chunk_part(number, number_of_plane, raw_bytes, chunk.codec_id, plane.nbytes)
        try:
            seal.open_into(part, stored[at : end + TAG_BYTES], stored[at:end])
        except BadSeal as error:
            raise PackError(str(error), corrupt=True) from None
        stored[end : end + TAG_BYTES] = kept
        planes.append(stored[at:end])
        at = end
    return planes


def whole_planes(chunk: StoredChunk, stored: memoryview) -> list[memoryview]:
    """The planes of a chunk that is not sealed."""
    planes: list[memoryview] = []
    at = 0
    for plane in chunk.planes:
        planes.append(stored[at : at + plane.nbytes])
        at += plane.nbytes
    return planes
