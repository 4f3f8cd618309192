"""Decoding on a device, here the cpu: the same bytes as the codec, for every pattern; bad planes refused.

The operations are the same on every device; a test with the mark ``gpu`` runs them there where one is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack_samples import weights

from packer.codec import BadPlanes, CodecId, Encoded, Workspace, encode, has_wire_form, to_wire
from packer.device_decode import decode_on_device

PAGE = 4096


def tensor(data: bytes, device: str = "cpu") -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else empty(device)


def empty(device: str = "cpu") -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)


def wire_of(encoded: Encoded, raw_bytes: int) -> list[bytes]:
    out = bytearray(raw_bytes + 64)
    planes, at = [], 0
    for size in to_wire(encoded.codec_id, encoded.planes, raw_bytes, memoryview(out)):
        planes.append(bytes(out[at : at + size]))
        at += size
    return planes


def decoded(codec_id: int, planes: Sequence[bytes], raw_bytes: int, device: str = "cpu") -> bytes:
    """What comes out between guards; small planes stay on the host, as they do in use."""
    held = torch.full((raw_bytes + 16,), 0xA5, dtype=torch.uint8, device=device)
    tensors = [tensor(plane, device) for plane in planes[:-1]] + [tensor(planes[-1])]
    if codec_id == CodecId.RAW:
        tensors = [tensors[0].to(device)]
    decode_on_device(codec_id, tensors, held[8 : 8 + raw_bytes])
    result = bytes(held.cpu().numpy())
    assert result[:8] == b"\xa5" * 8
    assert result[-8:] == b"\xa5" * 8
    return result[8:-8]


def gaussian_bf16(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    values = (np.random.default_rng(0).standard_normal(count) * 0.02).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def with_all_patterns(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    words = gaussian_bf16(count)
    words[np.random.default_rng(1).permutation(count)[:65536]] = np.arange(65536, dtype=np.uint16)
    return words


def check(dtype: str, raw: bytes, codec: CodecId, device: str = "cpu") -> None:
    encoded = encode(dtype, memoryview(raw))
    assert encoded.codec_id == codec
    assert decoded(codec, wire_of(encoded, len(raw)), len(raw), device) == raw


def check_everything(device: str) -> None:
    check("BF16", with_all_patterns(2**21).tobytes(), CodecId.N12, device)
    check("BF16", with_all_patterns(2**21)[:-1].tobytes(), CodecId.N12, device)
    top = with_all_patterns(2**20).astype(np.uint32) << 16
    low = np.random.default_rng(2).integers(0, 65536, 2**20, dtype=np.uint32)
    check("F32", (top | low).tobytes(), CodecId.N12_TOP, device)
    check("F32", top.tobytes(), CodecId.N12_TOP, device)
    check("F32", (top | low)[:-1].tobytes(), CodecId.N12_TOP, device)
    check("U8", random.Random(1).randbytes(PAGE), CodecId.RAW, device)
    for pattern in (bytes(8), b"\xff" * 8, bytes(range(0x80, 0x88))):
        check("U8", pattern * 512, CodecId.FILL, device)


def test_every_pattern_on_the_cpu() -> None:
    check_everything("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_pattern_on_a_gpu() -> None:
    check_everything("cuda")


@pytest.mark.parametrize("base", [0, 1, 100, 127, 128, 239, 240])
def test_every_window_and_sign(base: int) -> None:
    """All that N12 can say without escapes: 16 exponents, two signs, 128 mantissas."""
    words = [s << 15 | (base + e) << 7 | m for e in range(16) for s in (0, 1) for m in range(128)]
    signs = bytes((word >> 8 & 0x80) | (word & 0x7F) for word in words)
    codes = [(word >> 7 & 255) - base for word in words]
    nibbles = bytes(codes[j] | codes[2048 + j] << 4 for j in range(2048))
    header = bytes([base, 0, 0, 0, 0, 0, 0, 0])
    raw = b"".join(word.to_bytes(2, "little") for word in words)
    assert decoded(CodecId.N12, [signs, nibbles, header], len(raw)) == raw


@pytest.mark.parametrize("planes", ["signs", "nibbles", "both"])
def test_planes_of_zeros_may_be_empty(planes: str) -> None:
    signs = b"" if planes in ("signs", "both") else bytes(range(256)) * 8
    nibbles = b"" if planes in ("nibbles", "both") else bytes(range(256)) * 4
    header = bytes([120, 0, 0, 0, 0, 0, 0, 0])
    full = [signs or bytes(2048), nibbles or bytes(1024), header]
    assert decoded(CodecId.N12, [signs, nibbles, header], PAGE) == decoded(CodecId.N12, full, PAGE)


@given(st.sampled_from(["BF16", "F32", "U8"]), st.integers(0, 700), st.integers(0, 2**16))
def test_any_length(dtype: str, count: int, seed: int) -> None:
    size = count * {"BF16": 2, "F32": 4, "U8": 1}[dtype]
    raw = weights(dtype, count, seed)
    encoded = encode(dtype, memoryview(raw))
    if has_wire_form(encoded.codec_id):
        assert decoded(encoded.codec_id, wire_of(encoded, size), size) == raw


def test_planes_that_are_not_in_wire_form_are_refused() -> None:
    raw = gaussian_bf16(2**18).tobytes()
    encoded = encode("BF16", memoryview(raw))
    out = torch.empty(len(raw), dtype=torch.uint8)
    with pytest.raises(BadPlanes, match="not in wire form"):
        decode_on_device(encoded.codec_id, [tensor(plane) for plane in encoded.planes], out)


@pytest.mark.parametrize(
    ("codec", "sizes", "last"),
    [
        (CodecId.N12, (2048, 1024), b""),
        (CodecId.N12, (2048, 1024), bytes([241, 0, 0, 0, 0, 0, 0, 0])),
        (CodecId.N12, (2048, 1024), bytes([0, 0, 0, 0, 1, 0, 0, 0]) + (2048).to_bytes(4, "little") + b"ab"),
        (CodecId.N12, (2048, 1023), bytes(8)),
        (CodecId.N12, (2048,), bytes(8)),
        (CodecId.N12_TOP, (2048, 1024, 513), bytes(8)),
        (CodecId.N12_TOP, (2048, 1024, 512), bytes([241, 0, 0, 0, 0, 0, 0, 0])),
        (CodecId.FILL, (), bytes(7)),
        (CodecId.FILL, (), b""),
        (CodecId.RAW, (), bytes(PAGE - 1)),
        (CodecId.RAW, (), b""),
        (CodecId.ZSTD, (), bytes(PAGE)),
        (CodecId.PLANES2, (2048,), bytes(2048)),
        (CodecId.NIBBLES8, (2048,), bytes(2048)),
        (99, (), bytes(PAGE)),
    ],
)
def test_bad_planes_are_refused_before_anything_is_written(
    codec: int, sizes: tuple[int, ...], last: bytes
) -> None:
    out = torch.full((PAGE,), 7, dtype=torch.uint8)
    with pytest.raises(BadPlanes):
        decode_on_device(codec, [*(tensor(bytes(size)) for size in sizes), tensor(last)], out)
    assert bool((out == 7).all())


def test_other_tensors_than_bytes_are_refused() -> None:
    out = torch.zeros(16, dtype=torch.uint8)
    for plane in (torch.zeros(16, dtype=torch.int8), out.view(4, 4), torch.zeros(32, dtype=torch.uint8)[::2]):
        with pytest.raises(BadPlanes, match="contiguous"):
            decode_on_device(CodecId.RAW, [plane], out)


def test_workspace_is_used_again() -> None:
    """Escapes may be one zstd frame also in wire form."""
    space, words = Workspace(), with_all_patterns(2**21)
    encoded = encode("BF16", memoryview(words.tobytes()))
    assert encoded.planes[2][1] == 1
    planes = [tensor(plane) for plane in wire_of(encoded, 2**22)]
    for _ in range(2):
        out = torch.zeros(2**22, dtype=torch.uint8)
        decode_on_device(encoded.codec_id, planes, out, space)
        assert bytes(out.numpy()) == words.tobytes()
