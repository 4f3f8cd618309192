"""Codecs: bit-exact for every bit pattern, worth their bytes, and harmless on bad planes.

Does not cover sealed or stored chunks (test_pack) or whole hostile packs (attacks/test_hostile_packs).
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pack_samples import weights

from packer.codec import (
    BadPlanes,
    CodecId,
    Encoded,
    Workspace,
    decode_into,
    encode,
    encode_as,
    has_wire_form,
    plane_bytes,
    to_wire,
    wire_planes,
    wire_sizes,
)
from packer.layout import CHUNK_BYTES, DTYPE_BITS

PAGE = 4096


def round_trip(dtype: str, raw: bytes, space: Workspace | None = None) -> Encoded:
    """Encode and decode into memory that holds something else; the bytes must be the same."""
    encoded = encode(dtype, memoryview(raw), space)
    out = bytearray(b"\xa5" * len(raw))
    decode_into(encoded.codec_id, encoded.planes, memoryview(out), space)
    assert bytes(out) == raw
    assert encoded.stored_bytes <= max(len(raw), 8)
    return encoded


def gaussian(count: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)


def bf16(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> bytes:
    return bytes((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def fp8(values: np.ndarray[tuple[int], np.dtype[np.float32]], mantissa_bits: int) -> bytes:
    """Sign, exponent and mantissa of an 8-bit float with this mantissa, cut off, the exponent clamped."""
    words = values.view(np.uint32)
    exponents = (words >> 23 & 255).astype(np.int64) - 127 + 12
    exponents = exponents.clip(0, 2 ** (7 - mantissa_bits) - 1).astype(np.uint32)
    mantissas = words >> (23 - mantissa_bits) & (2**mantissa_bits - 1)
    return bytes((words >> 31 << 7 | exponents << mantissa_bits | mantissas).astype(np.uint8).tobytes())


def int8(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> bytes:
    return bytes((values / np.abs(values).max() * 127).round().astype(np.int8).tobytes())


# --- exactness ------------------------------------------------------------------------------------


def test_all_65536_bf16_patterns_survive_among_weights() -> None:
    """NaN payloads, infinities, -0 and subnormals are escapes of N12 and come back bit by bit."""
    patterns = np.arange(65536, dtype="<u2")
    words = np.frombuffer(bf16(gaussian(2**21)), dtype="<u2").copy()
    places = np.random.default_rng(1).permutation(len(words))[: len(patterns)]
    words[places] = patterns
    assert round_trip("BF16", words.tobytes()).codec_id == CodecId.N12


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_16_bit_patterns_alone_survive(dtype: str) -> None:
    round_trip(dtype, np.arange(65536, dtype="<u2").tobytes())


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_all_8_bit_patterns_survive_among_weights(dtype: str) -> None:
    values = gaussian(2**20)
    raw = np.frombuffer(int8(values) if dtype in "I8U8" else fp8(values, 3), dtype=np.uint8).copy()
    places = np.random.default_rng(6).permutation(len(raw))[: 256 * 256]
    raw[places] = np.repeat(np.arange(256, dtype=np.uint8), 256)
    codec = CodecId.NIBBLES8 if dtype in "I8U8" else CodecId.NIBBLES8_TURNED
    assert round_trip(dtype, raw.tobytes()).codec_id == codec
    assert round_trip(dtype, raw[:-1].tobytes()).codec_id == codec
    round_trip(dtype, bytes(range(256)))


def test_all_upper_halves_of_fp32_survive_with_any_lower_half() -> None:
    random_low = np.random.default_rng(2).integers(0, 65536, 2**20, dtype=np.uint32)
    words = gaussian(2**20).view(np.uint32).copy()
    places = np.random.default_rng(3).permutation(len(words))[:65536]
    words[places] = (np.arange(65536, dtype=np.uint32) << 16) | random_low[:65536]
    assert round_trip("F32", words.astype("<u4").tobytes()).codec_id == CodecId.N12_TOP


@pytest.mark.parametrize("exponent", [0, 1, 15, 16, 127, 239, 240, 241, 254, 255])
def test_windows_at_both_ends_of_the_exponents(exponent: int) -> None:
    draw = random.Random(exponent)
    near = [max(0, min(255, exponent + draw.randint(-3, 3))) for _ in range(4096)]
    words = [(draw.getrandbits(1) << 15) | (e << 7) | draw.getrandbits(7) for e in near]
    raw = b"".join(word.to_bytes(2, "little") for word in words)
    assert round_trip("BF16", raw).codec_id == CodecId.N12


def test_escapes_at_the_first_and_last_weight() -> None:
    words = np.frombuffer(bf16(gaussian(8192)), dtype="<u2").copy()
    words[[0, 4095, 4096, 8191]] = [0x7FC1, 0xFF80, 0x0000, 0x8001]
    assert round_trip("BF16", words.tobytes()).codec_id == CodecId.N12


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 15, 17, 31, 4094, 4095, 4096, 4097, 4098, 300_001])
def test_odd_lengths_survive(dtype: str, size: int) -> None:
    round_trip(dtype, random.Random(size).randbytes(size))
    round_trip(dtype, (weights("BF16", 64, 1) * (size // 128 + 1))[:size])


@given(
    st.sampled_from(sorted(DTYPE_BITS)),
    st.one_of(
        st.binary(max_size=600),
        st.builds(
            lambda piece, times: piece * times, st.binary(min_size=1, max_size=40), st.integers(1, 400)
        ),
    ),
)
def test_any_bytes_survive_as_any_dtype(dtype: str, raw: bytes) -> None:
    round_trip(dtype, raw)


def test_one_workspace_serves_chunks_of_all_kinds_in_any_order() -> None:
    """Nothing of an earlier chunk may show through a buffer that is used again."""
    space, draw = Workspace(), random.Random(7)
    for step in range(60):
        dtype = draw.choice(["BF16", "F32", "F16", "I8", "I64", "F8_E4M3"])
        size = PAGE * draw.choice([1, 2, 7, 64])
        kinds = (weights("BF16", size // 2, step), weights("F32", size // 4, step), bytes(size))
        kinds += (fp8(gaussian(size, step), 3),)
        round_trip(dtype, draw.choice(kinds), space)


def test_threads_with_their_own_workspace_do_not_disturb_each_other() -> None:
    raws = [bf16(gaussian(2**18, seed)) for seed in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        space = Workspace()
        for _ in range(20):
            try:
                round_trip("BF16", raws[number], space)
            except AssertionError:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- wire form ------------------------------------------------------------------------------------


def wire_trip(dtype: str, raw: bytes) -> tuple[Encoded, tuple[int, ...]]:
    """Encode, bring into wire form between guards, decode that; the bytes must be the same."""
    space = Workspace()
    encoded = encode(dtype, memoryview(raw), space)
    sizes = wire_sizes(encoded.codec_id, [len(plane) for plane in encoded.planes], len(raw))
    total = sum(sizes)
    held = bytearray(b"\xa5" * (total + 64))
    assert to_wire(encoded.codec_id, encoded.planes, len(raw), memoryview(held), space) == sizes
    assert held[total:] == b"\xa5" * 64
    planes, at = [], 0
    for size in sizes:
        planes.append(memoryview(held)[at : at + size])
        at += size
    out = bytearray(b"\x5a" * len(raw))
    decode_into(encoded.codec_id, planes, memoryview(out), space)
    assert bytes(out) == raw
    assert wire_sizes(encoded.codec_id, sizes, len(raw)) == sizes
    views = [memoryview(plane) for plane in encoded.planes]
    room = memoryview(bytearray(total))
    found = wire_planes(encoded.codec_id, views, len(raw), room, space)
    assert [bytes(plane) for plane in found] == [bytes(plane) for plane in planes]
    for stored, plane in zip(views, found, strict=True):
        assert (plane is stored) == (len(plane) == len(stored))
    return encoded, sizes


def test_bf16_wire_form_takes_three_quarters_and_holds_every_pattern() -> None:
    words = np.frombuffer(bf16(gaussian(2**21)), dtype="<u2").copy()
    words[np.random.default_rng(4).permutation(2**21)[:65536]] = np.arange(65536, dtype="<u2")
    encoded, sizes = wire_trip("BF16", words.tobytes())
    assert encoded.codec_id == CodecId.N12
    assert sizes[:2] == (2**21, 2**20)
    _, sizes = wire_trip("BF16", bf16(gaussian(2**21)))
    assert sum(sizes) <= 0.7505 * 2**22


def test_fp32_wire_form_takes_seven_eighths_and_keeps_planes_of_zeros_empty() -> None:
    values = gaussian(2**20)
    encoded, sizes = wire_trip("F32", values.tobytes())
    assert encoded.codec_id == CodecId.N12_TOP
    assert sum(sizes) <= 0.876 * 2**22
    upcast = (values.view(np.uint32) & 0xFFFF0000).astype("<u4").tobytes()
    _, sizes = wire_trip("F32", upcast)
    assert sizes[:3] == (0, 2**20, 2**19)


@pytest.mark.parametrize("size", [0, 1, 2, 6, 8, 10, 4096, 4098, 300_002])
def test_odd_wire_forms(size: int) -> None:
    for dtype, raw in (("BF16", (weights("BF16", 64, 1) * (size // 128 + 1))[:size]), ("U8", bytes(size))):
        encoded = encode(dtype, memoryview(raw))
        if has_wire_form(encoded.codec_id):
            wire_trip(dtype, raw)
        else:
            with pytest.raises(BadPlanes, match="no wire form"):
                wire_sizes(encoded.codec_id, [len(plane) for plane in encoded.planes], size)


def test_chunks_without_a_smaller_form_are_told_apart() -> None:
    known = {codec for codec in CodecId if has_wire_form(codec)}
    assert known == {CodecId.RAW, CodecId.FILL, CodecId.N12, CodecId.N12_TOP}
    assert not has_wire_form(10**6)


def test_wire_form_of_bad_planes_is_refused() -> None:
    planes = encode("BF16", memoryview(bf16(gaussian(4096)))).planes
    sizes = [len(plane) for plane in planes]
    out = memoryview(bytearray(8192))
    for codec, given_planes, raw_bytes in (
        (CodecId.N12, planes[:2], 8192),
        (CodecId.N12, planes, 8191),
        (CodecId.N12, planes, 4096),
        (CodecId.N12, (planes[0], planes[1][:-3], planes[2]), 8192),
        (CodecId.N12, (planes[0], b"not a frame", planes[2]), 8192),
        (CodecId.RAW, (b"",), 8192),
        (CodecId.FILL, (bytes(9),), 8192),
        (CodecId.ZSTD, (b"",), 8192),
        (99, planes, 8192),
    ):
        with pytest.raises(BadPlanes):
            to_wire(codec, given_planes, raw_bytes, out)
        with pytest.raises(BadPlanes):
            wire_planes(codec, [memoryview(plane) for plane in given_planes], raw_bytes, out)
    with pytest.raises(BadPlanes, match="there is room for 2047"):
        wire_planes(CodecId.N12, [memoryview(plane) for plane in planes], 8192, out[:2047])
    needed = sum(wire_sizes(CodecId.N12, sizes, 8192))
    with pytest.raises(BadPlanes, match="there is room"):
        to_wire(CodecId.N12, planes, 8192, out[: needed - 1])
    assert to_wire(CodecId.N12, planes, 8192, out[:needed]) == (4096, 2048, sizes[2])


# --- encoded again --------------------------------------------------------------------------------


def kinds_of_chunks() -> list[tuple[str, bytes]]:
    """Chunks for which ``encode`` takes every codec there is."""
    values = gaussian(2**18)
    return [
        ("BF16", bf16(values)),
        ("BF16", bytes(8192)),
        ("BF16", (b"abcdefg" * 40_000)[: 2**18]),
        ("F32", values.tobytes()),
        ("F16", values.astype(np.float16).tobytes()),
        ("I64", b"".join(i.to_bytes(8, "little") for i in range(4096))),
        ("U8", random.Random(1).randbytes(2**16)),
        ("F8_E4M3", fp8(values, 3)),
        ("I8", int8(values)),
    ]


def test_encoding_again_with_the_chosen_codec_gives_the_same_bytes() -> None:
    """A chunk that is repaired from its origin must have the tags that the index holds."""
    used = set()
    for dtype, raw in kinds_of_chunks():
        first = encode(dtype, memoryview(raw), Workspace())
        busy = Workspace()
        encode(dtype, memoryview(random.Random(5).randbytes(2**16)), busy)
        assert encode_as(first.codec_id, dtype, memoryview(raw), busy) == first
        used.add(first.codec_id)
    assert used == set(CodecId)


def test_a_codec_that_can_not_express_a_chunk_is_refused() -> None:
    noise = random.Random(2).randbytes(8192)
    for codec, dtype, raw in (
        (CodecId.FILL, "U8", noise),
        (CodecId.N12, "BF16", noise),
        (CodecId.N12, "BF16", b"odd"),
        (CodecId.N12_TOP, "BF16", bf16(gaussian(64))),
        (CodecId.N12, "U8", noise),
        (77, "U8", noise),
    ):
        with pytest.raises(BadPlanes):
            encode_as(codec, dtype, memoryview(raw))


# --- gain -----------------------------------------------------------------------------------------


def test_bf16_weights_take_two_thirds() -> None:
    raw = bf16(gaussian(CHUNK_BYTES // 2))
    encoded = round_trip("BF16", raw)
    assert encoded.codec_id == CodecId.N12
    assert encoded.stored_bytes <= 0.667 * len(raw)


def test_fp32_weights_take_five_sixths_and_upcast_bf16_a_third() -> None:
    values = gaussian(CHUNK_BYTES // 4)
    assert round_trip("F32", values.tobytes()).stored_bytes <= 0.84 * CHUNK_BYTES
    upcast = (values.view(np.uint32) & 0xFFFF0000).astype("<u4").tobytes()
    encoded = round_trip("F32", upcast)
    assert encoded.planes[0] == b""
    assert encoded.stored_bytes <= 0.34 * CHUNK_BYTES


def test_fp16_weights_take_less_than_seven_eighths() -> None:
    raw = gaussian(CHUNK_BYTES // 2).astype(np.float16).tobytes()
    assert round_trip("F16", raw).stored_bytes <= 0.87 * len(raw)


def test_8_bit_weights_lose_what_their_exponents_do_not_say() -> None:
    values = gaussian(CHUNK_BYTES)
    for dtype, raw, share in (
        ("F8_E4M3", fp8(values, 3), 0.84),
        ("F8_E5M2", fp8(values, 2), 0.74),
        ("I8", int8(values), 0.91),
    ):
        assert round_trip(dtype, raw).stored_bytes <= share * len(raw)


def test_planes_are_packed_by_symbols_where_matches_cost_more() -> None:
    """Level 1 finds matches in the nibbles of this dtype; its frame is the larger one."""
    raw = fp8(gaussian(CHUNK_BYTES), 2)
    high = round_trip("F8_E5M2", raw).planes[1]
    plain = bytearray(CHUNK_BYTES // 2)
    assert zstandard.ZstdDecompressor().stream_reader(high).readinto(plain) == len(plain)
    assert len(high) < len(zstandard.ZstdCompressor(level=1).compress(bytes(plain)))


def test_what_repeats_is_left_to_plain_zstd() -> None:
    draw = random.Random(8)
    words = [draw.randbytes(draw.randint(3, 9)) for _ in range(200)]
    raw = b"".join(draw.choice(words) for _ in range(2**16))
    for dtype in ("F8_E4M3", "I8", "BF16", "F16", "F32", "I64"):
        encoded = round_trip(dtype, raw[: len(raw) // 8 * 8])
        assert encoded.codec_id == CodecId.ZSTD
        assert encoded.stored_bytes < 0.5 * len(raw)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_noise_is_stored_raw_and_constants_as_one_pattern(dtype: str) -> None:
    noise = random.Random(3).randbytes(64 * PAGE)
    assert round_trip(dtype, noise).codec_id == CodecId.RAW
    for pattern in (bytes(8), b"\x00\x00\x80\x3f" * 2, bytes(range(8))):
        assert round_trip(dtype, pattern * 512).stored_bytes == 8


def test_pruned_weights_fall_back_to_what_is_smaller() -> None:
    """Nine zeros in ten are no window of exponents; plain zstd finds them."""
    values = gaussian(2**20)
    values[np.random.default_rng(1).random(2**20) < 0.9] = 0
    assert round_trip("BF16", bf16(values)).stored_bytes < 0.3 * 2**21


# --- bad planes -----------------------------------------------------------------------------------


def refused(codec_id: int, planes: list[bytes], size: int) -> None:
    with pytest.raises(BadPlanes):
        decode_into(codec_id, planes, memoryview(bytearray(size)))


def test_wrong_counts_and_sizes_of_planes_are_refused() -> None:
    refused(CodecId.RAW, [], PAGE)
    refused(CodecId.RAW, [bytes(PAGE), b""], PAGE)
    refused(CodecId.RAW, [bytes(PAGE - 1)], PAGE)
    refused(CodecId.RAW, [b""], PAGE)
    refused(CodecId.FILL, [bytes(7)], PAGE)
    refused(CodecId.FILL, [bytes(8)], PAGE + 1)
    refused(CodecId.N12, [bytes(10)], PAGE)
    refused(CodecId.N12, [b"", b"", b""], PAGE)
    refused(CodecId.N12, [b"", b"", bytes(8)], PAGE + 1)
    refused(CodecId.N12_TOP, [b"", b"", b"", bytes(8)], PAGE + 2)
    refused(CodecId.NIBBLES8, [b""], PAGE)
    refused(CodecId.NIBBLES8, [b"", b"", b""], PAGE)
    refused(CodecId.NIBBLES8, [bytes(2049), b""], PAGE)
    refused(CodecId.NIBBLES8_TURNED, [b"", bytes(2047)], PAGE)
    refused(8, [b""], PAGE)
    refused(-1, [b""], PAGE)
    refused(10**9, [b""], PAGE)


def escapes(base: int, form: int, reserved: int, count: int, body: bytes) -> bytes:
    return bytes([base, form]) + reserved.to_bytes(2, "little") + count.to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "plane",
    [
        b"",
        bytes(7),
        escapes(241, 0, 0, 0, b""),
        escapes(0, 2, 0, 0, b""),
        escapes(0, 0, 1, 0, b""),
        escapes(0, 0, 0, 1, b""),
        escapes(0, 0, 0, 0, b"x"),
        escapes(0, 0, 0, 2**32 - 1, b""),
        escapes(0, 0, 0, 1, (2048).to_bytes(4, "little") + b"ab"),
        escapes(0, 0, 0, 1, b"\xff\xff\xff\xffab"),
        escapes(0, 0, 0, 2, (5).to_bytes(4, "little") + bytes(4) + b"abcd"),
        escapes(0, 0, 0, 2, b"\xff\xff\xff\xff\x02\x00\x00\x00abcd"),
        escapes(0, 1, 0, 1, zstandard.compress(bytes(7))),
        escapes(0, 1, 0, 1, b"not zstd"),
        escapes(0, 1, 0, 129, zstandard.compress(b"\1\0\0\0" * 129 + bytes(2 * 129))),
    ],
)
def test_lying_escapes_are_refused(plane: bytes) -> None:
    """Positions outside the chunk, falling positions, counts that would allocate, wrong sizes."""
    refused(CodecId.N12, [bytes(2048), bytes(1024), plane], PAGE)


def test_good_planes_next_to_the_lying_ones_decode() -> None:
    out = bytearray(PAGE)
    most = escapes(0, 1, 0, 128, zstandard.compress(b"\1\0\0\0" * 128 + bytes(2 * 128)))
    decode_into(CodecId.N12, [bytes(2048), bytes(1024), most], memoryview(out))
    good = escapes(240, 0, 0, 1, (2047).to_bytes(4, "little") + b"ab")
    decode_into(CodecId.N12, [bytes(2048), bytes(1024), good], memoryview(out))
    assert out[-2:] == b"ab"
    assert out[:2] == (240 << 7).to_bytes(2, "little")


@given(st.data())
def test_mutated_planes_decode_to_something_or_are_refused(data: st.DataObject) -> None:
    kinds = [("BF16", weights("BF16", 4096, 5)), ("F32", weights("F32", 2048, 5))]
    kinds += [("I8", (b"abcdefg" * 2000)[:8192]), ("F8_E4M3", fp8(gaussian(8192), 3))]
    dtype, raw = data.draw(st.sampled_from(kinds))
    encoded = encode(dtype, memoryview(raw))
    planes = [bytearray(plane) for plane in encoded.planes]
    for _ in range(data.draw(st.integers(1, 3))):
        plane = planes[data.draw(st.integers(0, len(planes) - 1))]
        action = data.draw(st.sampled_from(["flip", "cut", "grow"]))
        if action == "grow":
            plane += data.draw(st.binary(min_size=1, max_size=20))
        elif plane:
            at = data.draw(st.integers(0, len(plane) - 1))
            if action == "flip":
                plane[at] ^= 1 << data.draw(st.integers(0, 7))
            else:
                del plane[at:]
    out = bytearray(8192)
    try:
        decode_into(encoded.codec_id, [bytes(plane) for plane in planes], memoryview(out))
    except BadPlanes:
        return
    assert len(out) == 8192


def test_codec_numbers_are_pinned() -> None:
    """They are in files: a number is never reused."""
    numbers = {codec.name: codec.value for codec in CodecId}
    assert numbers == {"RAW": 0, "FILL": 1, "ZSTD": 2, "PLANES2": 3, "N12": 4, "N12_TOP": 5} | {
        "NIBBLES8": 6,
        "NIBBLES8_TURNED": 7,
    }
    for codec in CodecId:
        assert len(plane_bytes(codec, PAGE)) <= 4
