"""The headers of the origin's weight files, kept with a pack, and the origin's digests made from them.

Covers: packing and unpacking the headers, and computing from a restored image the sha256 that each weight
file of the origin has. Does not cover: the image (``tiers``), what the digests should be (the plan says so),
or where the headers lie (a side file of the pack, so that whatever moves those moves them too).

The image has the tensors in another order than the files, and not their headers. With the headers the files
can be made again byte by byte: a header, then its tensors in the order of their offsets, without holes. A
pack whose digests are right this way holds the registered weights, whoever made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Protocol

import msgspec
import zstandard

from packer.index import FILES_MAX, PATH_CHARS_MAX, PackError
from packer.layout import HEADER_BYTES_MAX, BadHeader, ImageLayout, PlacedTensor, parse_header
from packer.pieces import cut
from packer.types import KIB, MIB

# The path of the side file. No model directory can have it: a colon is not in the grammar of its paths.
ORIGIN_HEADERS = "origin:headers"
# All of a model together, as they are: those of 50,000 tensors with long names stay below it.
HEADERS_BYTES_MAX = 12 * MIB
# What they may take in the pack, which the room reserved for it leaves beside the weights: a thousandth of
# that is usual. Headers full of noise are left out.
HEADERS_IMAGE_PARTS = 128
HEADERS_FREE_BYTES = 256 * KIB
_LEVEL = 3
_WINDOW_BYTES_MAX = 8 * MIB


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    path: Annotated[str, msgspec.Meta(max_length=PATH_CHARS_MAX)]
    data: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8 + HEADER_BYTES_MAX)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Annotated[list[_Header], msgspec.Meta(max_length=FILES_MAX)])


class ReadableImage(Protocol):
    """A model's weights where they can be read; ``packer.tiers.Image`` is one."""

    def reading(self, offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Memory that holds these bytes of one chunk as long as the context lasts."""


class Headers:
    """The headers of a model's weight files as they are read; ``data`` is the side file of them.

    Nothing is kept of headers that are too large together: a pack without them can be used all the same, only
    nobody can tell from it what the origin's digests are.
    """

    def __init__(self) -> None:
        self._headers: dict[str, bytes] | None = {}
        self._nbytes = 0

    def add(self, path: str, header: bytes) -> None:
        """``header``: the first 8 bytes of the file, which are the length of the rest, and that JSON."""
        self._nbytes += len(header)
        if self._nbytes > HEADERS_BYTES_MAX:
            self._headers = None
        if self._headers is not None:
            self._headers[path] = header

    def data(self, image_bytes: int) -> bytes | None:
        return None if self._headers is None else pack_headers(self._headers, image_bytes)


def pack_headers(headers: Mapping[str, bytes], image_bytes: int) -> bytes | None:
    """The side file for headers (8 bytes of length, then JSON) by path; None when they are too large."""
    rows = [_Header(path, bytes(headers[path])) for path in sorted(headers)]
    data = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(_encoder.encode(rows))
    return data if len(data) <= image_bytes // HEADERS_IMAGE_PARTS + HEADERS_FREE_BYTES else None


def unpack_headers(data: bytes) -> dict[str, bytes]:
    """The inverse of ``pack_headers``. Raises ``PackError`` (corrupt)."""
    try:
        size = zstandard.frame_content_size(data)
        # A frame may say nothing of its size, or lie about it: only what was declared is ever decoded.
        if not 0 < size <= 2 * HEADERS_BYTES_MAX:
            raise PackError(f"headers of the origin declare {size} bytes", corrupt=True)
        plain = bytearray(size)
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX).stream_reader(data)
        if reader.readinto(plain) != size or reader.read(1):
            raise PackError("headers of the origin are not of the size declared", corrupt=True)
        rows = _decoder.decode(plain)
    except (zstandard.ZstdError, msgspec.MsgspecError, RecursionError) as error:
        raise PackError(f"headers of the origin do not decode: {str(error)[:200]}", corrupt=True) from None
    headers = {row.path: row.data for row in rows}
    if len(headers) != len(rows):
        raise PackError("headers of the origin name a file twice", corrupt=True)
    return headers


def origin_digests(layout: ImageLayout, headers: Mapping[str, bytes], image: ReadableImage) -> dict[str, str]:
    """sha256 (hex) of each weight file of the origin, by path, made from an image of this layout.

    Also proves that the layout has exactly the tensors that the headers have: name, type, shape, file and
    place, so that right digests mean right weights under the right names. Takes no memory beside the headers'
    own and what they parse to, whatever the model's size. Raises ``PackError`` (corrupt).
    """
    by_file: dict[str, list[PlacedTensor]] = {path: [] for path in headers}
    for tensor in layout.tensors:
        if tensor.info.file not in by_file:
            raise PackError(f"no header of {tensor.info.file[:80]!r} is here", corrupt=True)
        by_file[tensor.info.file].append(tensor)
    return {path: _digest(path, header, by_file[path], layout, image) for path, header in headers.items()}


def _digest(
    path: str, header: bytes, tensors: Sequence[PlacedTensor], layout: ImageLayout, image: ReadableImage
) -> str:
    placed = sorted(tensors, key=_in_file)
    size = len(header) + sum(tensor.info.nbytes for tensor in placed)
    if int.from_bytes(header[:8], "little") != len(header) - 8:
        raise PackError(f"the header of {path[:80]!r} has another length than it says", corrupt=True)
    try:
        named = parse_header(header[8:], path, size)
    except BadHeader as error:
        raise PackError(str(error)[:300], corrupt=True) from None
    if named != tuple(tensor.info for tensor in placed):
        raise PackError(f"the tensors are not those of the header of {path[:80]!r}", corrupt=True)
    digest = hashlib.sha256(header)
    for tensor in placed:
        for part in cut(tensor, layout):
            with image.reading(part.image_offset, part.nbytes) as view:
                digest.update(view)
    return digest.hexdigest()


def _in_file(tensor: PlacedTensor) -> tuple[int, int, str]:
    """The order of ``parse_header``."""
    return (tensor.info.file_offset, tensor.info.nbytes, tensor.info.name)
