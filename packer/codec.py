"""Lossless codecs for chunks of weights: encode to planes, decode straight into the destination.

Covers: the codecs of FORMAT.md (raw, fill, zstd, byte planes, N12 for bf16, N12 over the top half of
fp32), their choice per chunk by measured gain, and the checks that make decoding safe on planes from
outside: exact sizes before any work, no allocation above a small multiple of the chunk. Does not
cover: sealing and where planes lie in a file (``seal``, ``pack``) or decoding on a GPU.

numpy only, and only whole-array calls that release the GIL: on the machines measured, widening with
``copyto`` and working in place on 16-bit words decodes bf16 faster than torch's own mixed-width calls
and needs no thread pool beside the restore threads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from packer.layout import CHUNK_BYTES, DTYPE_BITS
from packer.types import MIB

U8: TypeAlias = NDArray[np.uint8]
U16: TypeAlias = NDArray[np.uint16]
U32: TypeAlias = NDArray[np.uint32]

# A plane or chunk that zstd shrinks by less than 3 % is stored raw: decoding it would cost more time
# than reading the bytes.
GAIN_MIN = 0.97
ZSTD_LEVEL = 1  # no matches are found in weights, so higher levels only cost time
# Frames are at most a chunk; a frame that asks for a larger window was not made here.
ZSTD_WINDOW_BYTES_MAX = 8 * MIB
# Weights decoded per step: the 16-bit temporaries of a step stay in the second-level cache.
BLOCK_WEIGHTS = 128 * 1024
# Above one escape in 16 weights the sparse list outweighs what N12 saves.
ESCAPE_SHARE = 16
# The base of an exponent window is chosen from this many weights, spread over the chunk.
SAMPLE_WEIGHTS = 64 * 1024
SAMPLE_BYTES = 256 * 1024
FILL_BYTES = 8
PLANES_MAX = 4

_WINDOW = 16  # exponents in one 4-bit window
_ESCAPES = struct.Struct("<BBHI")
_SIGN_MANTISSA = np.int16(-32641)  # 0x807F: what is left of a sign-extended sign-and-mantissa byte
_LOW4, _FOUR = np.uint8(15), np.uint8(4)
_SEVEN, _EIGHT = np.uint16(7), np.uint16(8)


class CodecId(IntEnum):
    """Numbers in the file format: never reused, only added to."""

    RAW = 0  # the chunk as it is
    FILL = 1  # eight bytes, repeated
    ZSTD = 2  # the chunk as one plane
    PLANES2 = 3  # low bytes, high bytes of 16-bit words
    N12 = 4  # bf16: sign and mantissa bytes, exponent nibbles, escapes
    N12_TOP = 5  # fp32: low halves, then N12 of the high halves


class BadPlanes(ValueError):
    """Planes do not decode to a chunk of the expected size. Whatever was written is not to be used."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk in stored form. A plane is stored raw when it has its plain size, is all zero when it has
    no bytes, and is one zstd frame otherwise."""

    codec_id: int
    planes: tuple[bytes, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(len(plane) for plane in self.planes)


class Workspace:
    """Buffers that one thread reuses for every chunk; grows to about 2.5 chunks and stays."""

    def __init__(self) -> None:
        self._arrays: dict[str, U8] = {}
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
        self.compressor = zstandard.ZstdCompressor(
            level=ZSTD_LEVEL, write_content_size=True, write_checksum=False, write_dict_id=False
        )

    def bytes(self, name: str, nbytes: int) -> U8:
        """A buffer under this name, at least this long; its contents are whatever was there last."""
        found = self._arrays.get(name)
        if found is None or len(found) < nbytes:
            found = self._arrays[name] = np.empty(max(nbytes, 4096), dtype=np.uint8)
        return found[:nbytes]

    def words(self, name: str, count: int) -> U16:
        return self.bytes(name, 2 * count).view(np.uint16)


def plane_bytes(codec_id: int, raw_bytes: int) -> tuple[int | None, ...]:
    """Plain size of each plane of a chunk; None where the plane itself says. Raises ``BadPlanes``."""
    weights16, weights32 = raw_bytes // 2, raw_bytes // 4
    if codec_id in (CodecId.PLANES2, CodecId.N12) and raw_bytes % 2:
        raise BadPlanes(f"codec {codec_id} needs whole 16-bit words, not {raw_bytes} bytes")
    if codec_id == CodecId.N12_TOP and raw_bytes % 4:
        raise BadPlanes(f"codec {codec_id} needs whole 32-bit words, not {raw_bytes} bytes")
    sizes: dict[int, tuple[int | None, ...]] = {
        CodecId.RAW: (raw_bytes,),
        CodecId.FILL: (FILL_BYTES,),
        CodecId.ZSTD: (raw_bytes,),
        CodecId.PLANES2: (weights16, weights16),
        CodecId.N12: (weights16, (weights16 + 1) // 2, None),
        CodecId.N12_TOP: (2 * weights32, weights32, (weights32 + 1) // 2, None),
    }
    if codec_id not in sizes:
        raise BadPlanes(f"codec {codec_id} is not known to this version; rebuild the pack from its origin")
    return sizes[codec_id]


# --- wire form ------------------------------------------------------------------------------------


def has_wire_form(codec_id: int) -> bool:
    """Whether a chunk of this codec has a form without zstd that is smaller than the raw chunk."""
    return codec_id in (CodecId.RAW, CodecId.FILL, CodecId.N12, CodecId.N12_TOP)


def wire_sizes(codec_id: int, plane_sizes: Sequence[int], raw_bytes: int) -> tuple[int, ...]:
    """Sizes of a chunk's planes in wire form: each zstd frame has become its plain plane. Planes of zeros
    stay empty and escapes stay as they are, so the sizes follow from the index alone. Raises ``BadPlanes``.
    """
    if not has_wire_form(codec_id):
        raise BadPlanes(f"codec {codec_id} has no wire form; such a chunk is kept raw")
    plains = plane_bytes(codec_id, raw_bytes)
    if len(plane_sizes) != len(plains):
        raise BadPlanes(f"codec {codec_id} has {len(plains)} planes, not {len(plane_sizes)}")
    if codec_id in (CodecId.RAW, CodecId.FILL) and tuple(plane_sizes) != plains:
        raise BadPlanes(f"codec {codec_id} has a plane of {plane_sizes[0]} bytes, not {plains[0]}")
    return tuple(
        stored if plain is None or stored == 0 else plain
        for stored, plain in zip(plane_sizes, plains, strict=True)
    )


def to_wire(
    codec_id: int,
    planes: Sequence[memoryview | bytes],
    raw_bytes: int,
    out: memoryview,
    workspace: Workspace | None = None,
) -> tuple[int, ...]:
    """Write the planes in wire form one behind the other; returns their sizes. ``out`` may be longer than
    they are. Safe on planes from outside, as ``decode_into`` is. Raises ``BadPlanes``."""
    space = workspace or Workspace()
    sizes = wire_sizes(codec_id, [len(plane) for plane in planes], raw_bytes)
    if sum(sizes) > len(out):
        raise BadPlanes(f"wire form of codec {codec_id} takes {sum(sizes)} bytes, there are {len(out)}")
    room: U8 = np.frombuffer(out, dtype=np.uint8)
    at = 0
    for plane, size in zip(planes, sizes, strict=True):
        _load_into(plane, room[at : at + size], space)
        at += size
    return sizes


# --- encode ---------------------------------------------------------------------------------------


def encode(dtype: str, raw: memoryview, workspace: Workspace | None = None) -> Encoded:
    """The smallest stored form of a chunk that is worth decoding; raw when none is."""
    space = workspace or Workspace()
    data: U8 = np.frombuffer(raw, dtype=np.uint8)
    if _is_fill(data):
        return Encoded(CodecId.FILL, (data[:FILL_BYTES].tobytes(),))
    best = _encode_words(dtype, data, space)
    limit = int(len(data) * GAIN_MIN)
    if best is None or best.stored_bytes > limit or _sample_size(data, space) < best.stored_bytes:
        # Tables of ids, masks, pruned or already coarse weights: plain zstd may find what planes hide.
        whole = Encoded(CodecId.ZSTD, (space.compressor.compress(data.data),))
        if best is None or whole.stored_bytes < best.stored_bytes:
            best = whole
    if best.stored_bytes > limit or len(data) == 0:
        return Encoded(CodecId.RAW, (data.tobytes(),))
    return best


def encode_as(codec_id: int, dtype: str, raw: memoryview, workspace: Workspace | None = None) -> Encoded:
    """Encode a chunk with a codec that was chosen before. The same raw bytes give the same planes, as
    long as this code and libzstd are the same; a caller that needs that compares tags. Raises
    ``BadPlanes`` when the chunk can not be expressed by this codec."""
    space = workspace or Workspace()
    data: U8 = np.frombuffer(raw, dtype=np.uint8)
    plane_bytes(codec_id, len(data))
    encoded: Encoded | None = None
    if codec_id == CodecId.RAW:
        encoded = Encoded(CodecId.RAW, (data.tobytes(),))
    elif codec_id == CodecId.FILL and _is_fill(data):
        encoded = Encoded(CodecId.FILL, (data[:FILL_BYTES].tobytes(),))
    elif codec_id == CodecId.ZSTD:
        encoded = Encoded(CodecId.ZSTD, (space.compressor.compress(data.data),))
    elif codec_id != CodecId.FILL:
        words = _encode_words(dtype, data, space)
        if words is not None and words.codec_id != codec_id and codec_id == CodecId.PLANES2:
            words = _planes2(data.view(np.uint16), space)
        encoded = words
    if encoded is None or encoded.codec_id != codec_id:
        raise BadPlanes(f"a {dtype} chunk of {len(data)} bytes can not be encoded as codec {codec_id}")
    return encoded


def _encode_words(dtype: str, data: U8, space: Workspace) -> Encoded | None:
    if len(data) * 8 % DTYPE_BITS.get(dtype, 8) or len(data) == 0:
        return None
    if dtype == "BF16":
        planes = _n12_planes(data.view(np.uint16), space)
        return Encoded(CodecId.N12, planes) if planes else _planes2(data.view(np.uint16), space)
    if dtype == "F16":
        return _planes2(data.view(np.uint16), space)
    if dtype == "F32":
        halves = data.view(np.uint16)
        top = space.words("top", len(halves) // 2)
        np.copyto(top, halves[1::2])
        planes = _n12_planes(top, space)
        if planes is None:
            return None
        np.copyto(top, halves[0::2])
        return Encoded(CodecId.N12_TOP, (_store(top.view(np.uint8), space), *planes))
    return None


def _is_fill(data: U8) -> bool:
    if len(data) < FILL_BYTES or len(data) % FILL_BYTES:
        return False
    words = data.view(np.uint64)
    # The first comparison alone settles it for almost every chunk.
    return bool(words[-1] == words[0]) and bool((words == words[0]).all())


def _sample_size(data: U8, space: Workspace) -> int:
    """Size of the whole under plain zstd, as its middle predicts."""
    start = max(0, (len(data) - SAMPLE_BYTES) // 2) // 8 * 8
    sample = data[start : start + SAMPLE_BYTES]
    return len(space.compressor.compress(sample.data)) * len(data) // len(sample)


def _store(plane: U8, space: Workspace) -> bytes:
    """One plane in stored form."""
    if not plane.any():
        return b""
    limit = int(len(plane) * GAIN_MIN)
    sample = plane[len(plane) // 2 :][: SAMPLE_BYTES // 4]
    if (
        len(space.compressor.compress(sample.data)) <= int(len(sample) * GAIN_MIN)
        or len(plane) < SAMPLE_BYTES
    ):
        packed = space.compressor.compress(plane.data)
        if len(packed) <= limit:
            return packed
    return plane.tobytes()


def _planes2(words: U16, space: Workspace) -> Encoded:
    split = space.bytes("split", len(words))
    octets = words.view(np.uint8)
    np.copyto(split, octets[0::2])
    low = _store(split, space)
    np.copyto(split, octets[1::2])
    return Encoded(CodecId.PLANES2, (low, _store(split, space)))


def _window_base(exponents: U8) -> int:
    """The first exponent of the 16 that cover most of a sample."""
    step = max(1, len(exponents) // SAMPLE_WEIGHTS)
    counts = np.bincount(exponents[::step], minlength=256)
    covered = np.convolve(counts, np.ones(_WINDOW, dtype=np.int64), mode="valid")
    return int(covered.argmax())


def _n12_planes(words: U16, space: Workspace) -> tuple[bytes, bytes, bytes] | None:
    """Sign and mantissa, exponent nibbles, escapes; None when too many exponents lie outside a window."""
    count = len(words)
    temporary, exponents = space.words("encode16", count), space.bytes("encode8", count)
    np.right_shift(words, _SEVEN, out=temporary)
    np.copyto(exponents, temporary, casting="unsafe")  # the sign, bit 8, falls off
    base = _window_base(exponents)
    codes = exponents
    np.subtract(exponents, np.uint8(base), out=codes)  # wraps below the window, which also lands above 15
    outside = np.flatnonzero(codes > _LOW4)
    if len(outside) > count // ESCAPE_SHARE:
        return None
    codes[outside] = 0
    escapes = _store_escapes(base, outside.astype(np.uint32), words[outside], space)
    half = (count + 1) // 2
    nibbles = space.bytes("nibbles", half)
    np.copyto(nibbles, codes[:half])
    nibbles[: count - half] |= codes[half:] << _FOUR
    stored_nibbles = _store(nibbles, space)
    signs = space.words("signs", count)
    np.right_shift(words, _EIGHT, out=signs)
    np.bitwise_and(signs, np.uint16(0x80), out=signs)
    np.bitwise_and(words, np.uint16(0x7F), out=temporary)
    np.bitwise_or(signs, temporary, out=signs)
    np.copyto(codes, signs, casting="unsafe")
    return _store(codes, space), stored_nibbles, escapes


def _store_escapes(base: int, positions: U32, bits: U16, space: Workspace) -> bytes:
    steps = np.diff(positions, prepend=np.uint32(0)).astype("<u4")
    body = steps.tobytes() + bits.astype("<u2").tobytes()
    packed = space.compressor.compress(body) if body else body
    form = len(packed) < len(body)
    return _ESCAPES.pack(base, form, 0, len(positions)) + (packed if form else body)


# --- decode ---------------------------------------------------------------------------------------


def decode_into(
    codec_id: int,
    planes: Sequence[memoryview | bytes],
    raw_out: memoryview,
    workspace: Workspace | None = None,
) -> None:
    """Write the chunk that these planes stand for. Every byte of ``raw_out`` is written.

    Safe on planes from outside: sizes are checked before work is done, and nothing larger than the
    chunk is allocated. Raises ``BadPlanes``.
    """
    space = workspace or Workspace()
    sizes = plane_bytes(codec_id, len(raw_out))
    if len(planes) != len(sizes):
        raise BadPlanes(f"codec {codec_id} has {len(sizes)} planes, not {len(planes)}")
    out: U8 = np.frombuffer(raw_out, dtype=np.uint8)
    if codec_id == CodecId.RAW:
        if len(planes[0]) != len(out):
            raise BadPlanes(f"raw chunk has {len(planes[0])} bytes instead of {len(out)}")
        np.copyto(out, np.frombuffer(planes[0], dtype=np.uint8))
    elif codec_id == CodecId.FILL:
        _fill(planes[0], out)
    elif codec_id == CodecId.ZSTD:
        _load_into(planes[0], out, space)
    elif codec_id == CodecId.PLANES2:
        half = len(out) // 2
        low = _load(planes[0], "low", half, space)
        _join2(low, _load(planes[1], "high", half, space), out.view(np.uint16), space)
    elif codec_id == CodecId.N12:
        _decode_n12(planes, out.view(np.uint16), None, space)
    else:
        low = _load(planes[0], "low", len(out) // 2, space)
        _decode_n12(planes[1:], out.view(np.uint16), low, space)


def _fill(pattern: memoryview | bytes, out: U8) -> None:
    if len(pattern) != FILL_BYTES or len(out) % FILL_BYTES:
        raise BadPlanes(f"fill of {len(out)} bytes with a pattern of {len(pattern)}")
    out.view(np.uint64)[:] = np.frombuffer(pattern, dtype=np.uint64)[0]


def _load(stored: memoryview | bytes, name: str, plain_bytes: int, space: Workspace) -> U8:
    """The plain plane: the stored bytes themselves when raw, else decoded into the workspace."""
    if len(stored) == plain_bytes:
        return np.frombuffer(stored, dtype=np.uint8)
    out = space.bytes(name, plain_bytes)
    _load_into(stored, out, space)
    return out


def _load_into(stored: memoryview | bytes, out: U8, space: Workspace) -> None:
    if len(stored) == len(out):
        np.copyto(out, np.frombuffer(stored, dtype=np.uint8))
    elif len(stored) == 0:
        out[:] = 0
    else:
        _unzstd_into(stored, out, space)


def _unzstd_into(frame: memoryview | bytes, out: U8, space: Workspace) -> None:
    """Decode exactly one frame that declares exactly this size.

    zstandard trusts a declared size over any limit it is given, so the declaration is checked first,
    and the destination has no room for more than it. The decompressor itself refuses larger windows and
    frames that need a dictionary.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != len(out):
            raise BadPlanes(f"frame declares {parameters.content_size} bytes, {len(out)} are expected")
        with space.decompressor.stream_reader(frame, read_across_frames=True) as reader:
            got = reader.readinto(out.data)
            if got != len(out) or reader.read(1):
                raise BadPlanes(f"frame does not hold exactly {len(out)} bytes")
    except zstandard.ZstdError as error:
        raise BadPlanes(f"frame does not decode: {str(error)[:120]}") from None


def _join2(low: U8, high: U8, out: U16, space: Workspace) -> None:
    for start in range(0, len(out), BLOCK_WEIGHTS):
        block = out[start : start + BLOCK_WEIGHTS]
        wide = space.words("wide", len(block))
        np.copyto(block, high[start : start + BLOCK_WEIGHTS])
        np.left_shift(block, _EIGHT, out=block)
        np.copyto(wide, low[start : start + BLOCK_WEIGHTS])
        np.bitwise_or(block, wide, out=block)


def _decode_n12(planes: Sequence[memoryview | bytes], out: U16, low: U8 | None, space: Workspace) -> None:
    """Decode into 16-bit words, or with ``low`` into the top halves of 32-bit words beside it."""
    count = len(out) if low is None else len(out) // 2
    half = (count + 1) // 2
    signs = _load(planes[0], "signs", count, space).view(np.int8)
    nibbles = _load(planes[1], "nibbles", half, space)
    base, positions, bits = _load_escapes(planes[2], count, space)
    for first, length in ((0, half), (half, count - half)):
        for start in range(0, length, BLOCK_WEIGHTS):
            size = min(BLOCK_WEIGHTS, length - start)
            at = first + start
            block = out[at : at + size] if low is None else space.words("top", size)
            exponents, wide = space.bytes("exponents", size), space.words("wide", size)
            if first == 0:
                np.bitwise_and(nibbles[start : start + size], _LOW4, out=exponents)
            else:
                np.right_shift(nibbles[start : start + size], _FOUR, out=exponents)
            np.add(exponents, base, out=exponents)
            np.copyto(wide, exponents)
            np.left_shift(wide, _SEVEN, out=wide)
            signed = block.view(np.int16)
            np.copyto(signed, signs[at : at + size])
            np.bitwise_and(signed, _SIGN_MANTISSA, out=signed)
            np.bitwise_or(block, wide, out=block)
            if low is not None:
                np.copyto(out[2 * at + 1 : 2 * (at + size) : 2], block)
                np.copyto(out[2 * at : 2 * (at + size) : 2], low.view(np.uint16)[at : at + size])
    if len(positions):
        top = out if low is None else out[1::2]
        top[positions] = bits


def _load_escapes(
    plane: memoryview | bytes, count: int, space: Workspace
) -> tuple[np.uint8, NDArray[np.uint64], U16]:
    """Window base, and the weights that do not fit the window: where they are, all their bits."""
    if len(plane) < _ESCAPES.size:
        raise BadPlanes(f"escape plane of {len(plane)} bytes has no header")
    base, form, reserved, escapes = _ESCAPES.unpack_from(plane)
    if base + _WINDOW > 256 or form > 1 or reserved or escapes > count // ESCAPE_SHARE:
        raise BadPlanes(f"escape plane with base {base}, form {form}, {escapes} escapes of {count} weights")
    stored, plain_bytes = plane[_ESCAPES.size :], 6 * escapes
    if form:
        body = space.bytes("escapes", plain_bytes)
        _unzstd_into(stored, body, space)
    else:
        if len(stored) != plain_bytes:
            raise BadPlanes(f"escape plane has {len(stored)} bytes for {escapes} escapes")
        body = np.frombuffer(stored, dtype=np.uint8)
    steps = np.frombuffer(body[: 4 * escapes].tobytes(), dtype="<u4")
    bits: U16 = np.frombuffer(body[4 * escapes :].tobytes(), dtype="<u2")
    positions = np.cumsum(steps, dtype=np.uint64)
    if escapes and (int(positions[-1]) >= count or not bool((steps[1:] > 0).all())):
        raise BadPlanes(f"escapes are not at rising positions below {count}")
    return np.uint8(base), positions, bits


# The workspace is sized by chunks; a larger chunk would silently undo the bound on memory.
assert CHUNK_BYTES <= ZSTD_WINDOW_BYTES_MAX
