"""Mending single chunks of a pack from the origin.

Covers: reading a chunk's bytes anew, packing them as they were, and writing them in place once the tags in
the authenticated index say that they are the very same. Does not cover: finding bad chunks (``tiers``),
extents from another node (``agent/peer_fetch.py``), or what to do about chunks that can not be mended: the
pack is dropped and rebuilt.

A chunk is sealed again with the key and the nonce that it had. That is safe because nothing is written, and
no tag shown, unless every byte of the outcome is what it was: other bytes have other tags.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from packer.index import PackError
from packer.layout import CHUNK_BYTES, ChunkSpan, ImageLayout, PlacedTensor
from packer.pack import PackReader
from packer.pack_file import ZEROS, FileFds, Scratch, write_all
from packer.seal import ChunkSeal, seal_context
from packer.sealed_extent import seal_planes
from packer.sources import Source, SourceFailed
from packer.types import ModelRef


def repair_chunks(
    fd: int,
    key: bytes,
    ref: ModelRef,
    chunks: Sequence[int],
    sources: Mapping[str, Source],
    bases: Sequence[FileFds] = (),
) -> tuple[int, ...]:
    """Mend these chunks of the pack behind ``fd``, which is open for reading and writing, as are its
    ``bases``: an extent is mended where it lies. Returns those that are still bad. ``sources`` are the
    weight files by path.

    A chunk stays bad when the origin does not give its bytes now, when it gives others than were packed, or
    when this version of the codec packs them in another way. Raises ``PackError`` when the pack itself can
    not be read or written.
    """
    reader = PackReader(fd, key, ref, bases=bases)
    scratch = Scratch()
    raw = memoryview(bytearray(CHUNK_BYTES))
    mended: set[int] = set()
    written: set[int] = set()
    wanted = [number for number in chunks if 0 <= number < len(reader.index.chunks)]
    owners = sorted({reader.index.owner(number) for number in wanted})
    for owner in owners:
        span = reader.index.layout.chunks[owner]
        try:
            _read_raw(reader.index.layout, span, sources, raw[: span.nbytes])
        except SourceFailed:
            continue
        if _pack_again(reader, owner, raw[: span.nbytes], scratch):
            mended.add(owner)
            written.add(reader.fds(reader.index.chunks[owner].base).fd)
    for descriptor in sorted(written):
        _sync(descriptor)
    return tuple(
        number for number in chunks if number not in wanted or reader.index.owner(number) not in mended
    )


def _read_raw(layout: ImageLayout, span: ChunkSpan, sources: Mapping[str, Source], raw: memoryview) -> None:
    """The chunk as it is in the image. Raises ``SourceFailed``."""
    raw[:] = bytes(len(raw))
    for tensor in layout.tensors:
        _read_tensor(tensor, span, sources, raw)


def _read_tensor(
    tensor: PlacedTensor, span: ChunkSpan, sources: Mapping[str, Source], raw: memoryview
) -> None:
    info = tensor.info
    start = max(tensor.image_offset, span.image_offset)
    end = min(tensor.image_offset + info.nbytes, span.image_offset + span.nbytes)
    if start >= end:
        return
    source = sources.get(info.file)
    if source is None:
        raise SourceFailed(f"{info.file} is not at hand")
    part = raw[start - span.image_offset : end - span.image_offset]
    source.read_into(info.file_offset + start - tensor.image_offset, part)


def _pack_again(reader: PackReader, owner: int, raw: memoryview, scratch: Scratch) -> bool:
    """Write the chunk in its place if it comes out exactly as it was. Raises ``PackError``."""
    from packer.codec import BadPlanes, encode_as

    index = reader.index
    span, chunk = index.layout.chunks[owner], index.chunks[owner]
    try:
        encoded = encode_as(chunk.codec_id, span.dtype, raw, scratch.workspace)
    except BadPlanes:
        return False
    if [len(plane) for plane in encoded.planes] != [plane.nbytes for plane in chunk.planes]:
        return False
    # A new seal each time: it refuses to use a nonce twice, and this is the one place that must.
    written_for = index.ref if chunk.base is None else index.bases[chunk.base].ref
    seal = ChunkSeal(reader.pack_key(chunk.base), seal_context(written_for))
    stored = scratch.stored
    sealed = seal_planes(seal, index.part_number(owner), span.nbytes, chunk.codec_id, encoded.planes, stored)
    if sealed != chunk.planes:
        return False
    stored[chunk.stored_bytes : chunk.extent_bytes] = ZEROS[: chunk.extent_bytes - chunk.stored_bytes]
    write_all(reader.fds(chunk.base).fd, stored[: chunk.extent_bytes], chunk.offset)
    return True


def _sync(fd: int) -> None:
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise PackError(f"writing the mended chunks failed: {error.strerror}") from error
