"""Lossless codecs for chunks of weights: encode to planes, decode straight into the destination.

Covers: the codecs of FORMAT.md (raw, fill, zstd, byte planes, N12 for bf16, N12 over the top half of
fp32, nibbles for 8-bit weights), their choice per chunk by measured gain, the wire form, and the checks
that make decoding safe on planes from outside: exact sizes before any work, no allocation above a small
multiple of the chunk. Does not cover: the arithmetic on words and planes (``transforms``, ``kernels``),
sealing and where planes lie in a file (``seal``, ``pack``) or decoding on a GPU (``device_decode``).

Every call that takes long releases the GIL, so that restore threads share the cores.
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

from packer import kernels
from packer.layout import CHUNK_BYTES, DTYPE_BITS
from packer.transforms import U8, U16, U32, WINDOW
from packer.types import MIB

# A plane or chunk that zstd shrinks by less than 3 % is stored raw: decoding it would cost more time
# than reading the bytes.
GAIN_MIN = 0.97
ZSTD_LEVEL = 1  # no matches are found in weights, so higher levels only cost time
# A frame of the whole chunk must be 4 % smaller than planes are: it decodes at a third of their rate.
WHOLE_SHARE = 0.96
# Frames are at most a chunk; a frame that asks for a larger window was not made here.
ZSTD_WINDOW_BYTES_MAX = 8 * MIB
# Above one escape in 16 weights the sparse list outweighs what N12 saves.
ESCAPE_SHARE = 16
# The base of an exponent window is chosen from this many weights, spread over the chunk.
SAMPLE_WEIGHTS = 32 * 1024
# What a frame of the whole chunk or of a plane would take is judged from this much of it, in pieces.
SAMPLE_BYTES = 64 * 1024
SAMPLE_PIECES = 4
FILL_BYTES = 8
PLANES_MAX = 4

_ESCAPES = struct.Struct("<BBHI")
# Zstd that only packs symbols. Level 1 finds short accidental matches in some exponent planes, which take
# more room than the symbols they replace and decode slower.
_SYMBOLS_ONLY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    write_content_size=True,
    write_checksum=False,
    write_dict_id=False,
)


class CodecId(IntEnum):
    """Numbers in the file format: never reused, only added to."""

    RAW = 0  # the chunk as it is
    FILL = 1  # eight bytes, repeated
    ZSTD = 2  # the chunk as one plane
    PLANES2 = 3  # low bytes, high bytes of 16-bit words
    N12 = 4  # bf16: sign and mantissa bytes, exponent nibbles, escapes
    N12_TOP = 5  # fp32: low halves, then N12 of the high halves
    NIBBLES8 = 6  # low nibbles, high nibbles of bytes
    NIBBLES8_TURNED = 7  # the same of bytes rotated left by one bit: exponents of fp8 are high nibbles


_NIBBLE_CODECS = {
    "F8_E4M3": CodecId.NIBBLES8_TURNED,
    "F8_E5M2": CodecId.NIBBLES8_TURNED,
    "I8": CodecId.NIBBLES8,
    "U8": CodecId.NIBBLES8,
}


# Window base, and the weights that do not fit the window: where they are, all their bits.
Escapes: TypeAlias = tuple[int, NDArray[np.uint64], U16]


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
        self.transforms = kernels.transforms()
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
        self.compressor = zstandard.ZstdCompressor(
            level=ZSTD_LEVEL, write_content_size=True, write_checksum=False, write_dict_id=False
        )
        self.symbol_compressor = zstandard.ZstdCompressor(compression_params=_SYMBOLS_ONLY)

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
        CodecId.NIBBLES8: ((raw_bytes + 1) // 2,) * 2,
        CodecId.NIBBLES8_TURNED: ((raw_bytes + 1) // 2,) * 2,
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
    _check_room(sum(sizes), out)
    room: U8 = np.frombuffer(out, dtype=np.uint8)
    at = 0
    for plane, size in zip(planes, sizes, strict=True):
        _load_into(plane, room[at : at + size], space)
        at += size
    return sizes


def wire_planes(
    codec_id: int,
    planes: Sequence[memoryview],
    raw_bytes: int,
    out: memoryview,
    workspace: Workspace | None = None,
) -> tuple[memoryview, ...]:
    """The planes in wire form where they are: those stored plain stay in place, uncopied, only zstd frames
    are decoded, into ``out``. Raises ``BadPlanes``."""
    space = workspace or Workspace()
    sizes = wire_sizes(codec_id, [len(plane) for plane in planes], raw_bytes)
    packed = [len(plane) != size for plane, size in zip(planes, sizes, strict=True)]
    _check_room(sum(size for size, frame in zip(sizes, packed, strict=True) if frame), out)
    found: list[memoryview] = []
    at = 0
    for plane, size, frame in zip(planes, sizes, packed, strict=True):
        if frame:
            _unzstd_into(plane, np.frombuffer(out[at : at + size], dtype=np.uint8), space)
            found.append(out[at : at + size])
            at += size
        else:
            found.append(plane)
    return tuple(found)


def _check_room(needed_bytes: int, out: memoryview) -> None:
    if needed_bytes > len(out):
        raise BadPlanes(f"the wire form takes {needed_bytes} bytes, there is room for {len(out)}")


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two chunks of one size are equal. Comparing views would keep all other threads waiting."""
    words = [np.frombuffer(view, dtype=np.uint64) for view in (one, other)]
    return bool(np.array_equal(words[0], words[1]))


# --- encode ---------------------------------------------------------------------------------------


def encode(dtype: str, raw: memoryview, workspace: Workspace | None = None) -> Encoded:
    """The smallest stored form of a chunk that is worth decoding; raw when none is."""
    space = workspace or Workspace()
    data: U8 = np.frombuffer(raw, dtype=np.uint8)
    if _is_fill(data):
        return Encoded(CodecId.FILL, (data[:FILL_BYTES].tobytes(),))
    best = _encode_words(dtype, data, space)
    limit = int(len(data) * GAIN_MIN)
    most = limit if best is None else min(limit, int(best.stored_bytes * WHOLE_SHARE))
    if _sample_size(data, space) <= most:
        # Tables of ids, masks, pruned or already coarse weights: plain zstd finds what planes hide.
        whole = space.compressor.compress(data.data)
        if len(whole) <= most:
            return Encoded(CodecId.ZSTD, (whole,))
    if best is None or best.stored_bytes > limit:
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
        low = space.words("low", len(data) // 4)
        planes = _n12_planes(data.view(np.uint32), space, low)
        return Encoded(CodecId.N12_TOP, (_store(low.view(np.uint8), space), *planes)) if planes else None
    if dtype in _NIBBLE_CODECS:
        return _nibbles(data, _NIBBLE_CODECS[dtype], space)
    return None


def _is_fill(data: U8) -> bool:
    if len(data) < FILL_BYTES or len(data) % FILL_BYTES:
        return False
    words = data.view(np.uint64)
    # The first comparison alone settles it for almost every chunk.
    return bool(words[-1] == words[0]) and bool((words == words[0]).all())


def _sample(data: U8) -> U8:
    """A few pieces from all over, or the whole when it is small."""
    piece = SAMPLE_BYTES // SAMPLE_PIECES
    if len(data) <= SAMPLE_BYTES:
        return data
    step = (len(data) - piece) // (SAMPLE_PIECES - 1) // 8 * 8
    return np.concatenate([data[i * step : i * step + piece] for i in range(SAMPLE_PIECES)])


def _sample_size(data: U8, space: Workspace) -> int:
    """Size of the whole as one frame, as a sample predicts."""
    sample = _sample(data)
    return len(space.compressor.compress(sample.data)) * len(data) // max(1, len(sample))


def _store(plane: U8, space: Workspace) -> bytes:
    """One plane in stored form, by whichever way of zstd packs a sample of it better."""
    if not plane.any():
        return b""
    sample = _sample(plane)
    matching, symbols = (
        len(compressor.compress(sample.data)) for compressor in (space.compressor, space.symbol_compressor)
    )
    if min(matching, symbols) <= int(len(sample) * GAIN_MIN):
        better = space.compressor if matching < symbols else space.symbol_compressor
        packed: bytes = better.compress(plane.data)
        if len(packed) <= int(len(plane) * GAIN_MIN):
            return packed
    return plane.tobytes()


def _planes2(words: U16, space: Workspace) -> Encoded:
    low, high = space.bytes("low", len(words)), space.bytes("high", len(words))
    space.transforms.split_bytes(words, low, high)
    return Encoded(CodecId.PLANES2, (_store(low, space), _store(high, space)))


def _nibbles(octets: U8, codec_id: CodecId, space: Workspace) -> Encoded:
    half = (len(octets) + 1) // 2
    low, high = space.bytes("low", half), space.bytes("high", half)
    space.transforms.split_nibbles(octets, codec_id == CodecId.NIBBLES8_TURNED, low, high)
    return Encoded(codec_id, (_store(low, space), _store(high, space)))


def _window_base(words: U16 | U32) -> int:
    """The first exponent of the 16 that cover most of a sample."""
    sample = words[:: max(1, len(words) // SAMPLE_WEIGHTS)]
    exponents = (sample >> (7 if words.dtype == np.uint16 else 23)).astype(np.uint8)
    counts = np.bincount(exponents, minlength=256)
    covered = np.convolve(counts, np.ones(WINDOW, dtype=np.int64), mode="valid")
    return int(covered.argmax())


def _n12_planes(
    words: U16 | U32, space: Workspace, low: U16 | None = None
) -> tuple[bytes, bytes, bytes] | None:
    """Sign and mantissa, exponent nibbles, escapes; None when too many exponents lie outside of a window.
    With ``low`` those of the top halves of 32-bit words, whose low halves are put there."""
    count = len(words)
    signs, nibbles = space.bytes("signs", count), space.bytes("nibbles", (count + 1) // 2)
    outside = space.bytes("outside", 4 * (count // ESCAPE_SHARE)).view(np.uint32)
    base = _window_base(words)
    if low is None:
        found = space.transforms.split_n12(words.view(np.uint16), base, signs, nibbles, outside)
    else:
        found = space.transforms.split_n12_top(words.view(np.uint32), base, low, signs, nibbles, outside)
    if found > len(outside):
        return None
    bits = words[outside[:found]]
    if low is not None:
        bits = bits >> np.uint32(16)
    escapes = _store_escapes(base, outside[:found], bits, space)
    return _store(signs, space), _store(nibbles, space), escapes


def _store_escapes(base: int, positions: U32, bits: U16 | U32, space: Workspace) -> bytes:
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
        high = _load(planes[1], "high", half, space)
        space.transforms.join_bytes(low, high, out.view(np.uint16))
    elif codec_id == CodecId.N12:
        _decode_n12(planes, out.view(np.uint16), None, space)
    elif codec_id == CodecId.N12_TOP:
        low = _load(planes[0], "low", len(out) // 2, space)
        _decode_n12(planes[1:], out.view(np.uint32), low.view(np.uint16), space)
    else:
        half = (len(out) + 1) // 2
        low = _load(planes[0], "low", half, space)
        high = _load(planes[1], "high", half, space)
        space.transforms.join_nibbles(low, high, codec_id == CodecId.NIBBLES8_TURNED, out)


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


def _decode_n12(
    planes: Sequence[memoryview | bytes], out: U16 | U32, low: U16 | None, space: Workspace
) -> None:
    """Decode into 16-bit words, or with ``low`` into 32-bit words whose low halves it holds."""
    count = len(out)
    base, positions, bits = load_escapes(planes[2], count, space)
    signs = _load(planes[0], "signs", count, space)
    nibbles = _load(planes[1], "nibbles", (count + 1) // 2, space)
    if low is None:
        space.transforms.join_n12(signs, nibbles, base, out.view(np.uint16))
    else:
        space.transforms.join_n12_top(signs, nibbles, base, low, out.view(np.uint32))
    if len(positions):
        top = out if low is None else out.view(np.uint16)[1::2]
        top[positions] = bits


def load_escapes(plane: memoryview | bytes, count: int, space: Workspace) -> Escapes:
    """The checked escapes of a chunk of N12. Raises ``BadPlanes``."""
    if len(plane) < _ESCAPES.size:
        raise BadPlanes(f"escape plane of {len(plane)} bytes has no header")
    base, form, reserved, escapes = _ESCAPES.unpack_from(plane)
    if base + WINDOW > 256 or form > 1 or reserved or escapes > count // ESCAPE_SHARE:
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
    return base, positions, bits


# The workspace is sized by chunks; a larger chunk would silently undo the bound on memory.
assert CHUNK_BYTES <= ZSTD_WINDOW_BYTES_MAX
