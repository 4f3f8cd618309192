"""Chunks in wire form decoded where the weights are used: torch operations on any device.

Covers: raw, fill, N12 and N12_TOP, exact for every bit pattern, with integer operations only. Does not
cover: moving planes to the device, streams, or forms with zstd, which the host turns into wire form first
(``codec.to_wire``).

The large planes are tensors on the device of the destination. The two small ones, a fill's pattern and the
escapes, are read on the host: they decide sizes and places, which the host checks before any operation, so
that no byte of a pack can make a kernel write outside of its chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from packer.codec import BadPlanes, CodecId, Escapes, Workspace, load_escapes, plane_bytes

_SIGN_MANTISSA = -32641  # 0x807F, sign-extended: what is left of a sign-extended sign-and-mantissa byte
_EXPONENT_ONE = 1 << 7  # the lowest bit of a bf16 exponent


def decode_on_device(
    codec_id: int, wire_planes: Sequence[torch.Tensor], out: torch.Tensor, workspace: Workspace | None = None
) -> None:
    """Write the chunk that these planes stand for to ``out``; all are contiguous, of one dimension and
    uint8, at even addresses (``out`` of a fill at a multiple of 8). Enqueues work on the current stream; as
    long as the last plane lies on the host, it waits for nothing but the copy of the few escapes. Every
    byte of ``out`` is written. Raises ``BadPlanes``, before anything is written.
    """
    for tensor in (*wire_planes, out):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise BadPlanes("planes and destination are contiguous uint8 tensors of one dimension")
    plains = plane_bytes(codec_id, len(out))
    if len(wire_planes) != len(plains):
        raise BadPlanes(f"codec {codec_id} has {len(plains)} planes, not {len(wire_planes)}")
    for plane, plain in zip(wire_planes, plains, strict=True):
        empty_is_zeros = codec_id in (CodecId.N12, CodecId.N12_TOP)
        if plain is not None and len(plane) != plain and (len(plane) or not empty_is_zeros):
            raise BadPlanes(f"a plane of {len(plane)} bytes is not in wire form: {plain} are expected")
    if codec_id == CodecId.RAW:
        out.copy_(wire_planes[0], non_blocking=True)
    elif codec_id == CodecId.FILL:
        if len(out) % len(wire_planes[0]):
            raise BadPlanes(f"fill of {len(out)} bytes with a pattern of {len(wire_planes[0])}")
        out.view(torch.int64).fill_(int.from_bytes(_on_host(wire_planes[0]), "little", signed=True))
    elif codec_id == CodecId.N12:
        escapes = load_escapes(_on_host(wire_planes[2]), len(out) // 2, workspace or Workspace())
        _join(wire_planes[0], wire_planes[1], escapes, out.view(torch.int16))
    elif codec_id == CodecId.N12_TOP:
        escapes = load_escapes(_on_host(wire_planes[3]), len(out) // 4, workspace or Workspace())
        halves, low = out.view(torch.int16).view(-1, 2), wire_planes[0]
        if len(low):
            halves[:, 0].copy_(low.view(torch.int16), non_blocking=True)
        else:
            halves[:, 0].zero_()
        _join(wire_planes[1], wire_planes[2], escapes, halves[:, 1])
    else:
        raise BadPlanes(f"codec {codec_id} has no wire form; decode such a chunk on the host")


def _on_host(plane: torch.Tensor) -> bytes:
    return bytes(plane.cpu().numpy())


def _join(signs: torch.Tensor, nibbles: torch.Tensor, escapes: Escapes, words: torch.Tensor) -> None:
    """Put N12 together in these 16-bit words, which may be every second one of a chunk."""
    base, positions, bits = escapes
    count = len(words)
    half = (count + 1) // 2
    if len(signs):
        # Sign-extended, so that one mask leaves the sign in bit 15 and the mantissa where it belongs.
        words.copy_(signs.view(torch.int8), non_blocking=True).bitwise_and_(_SIGN_MANTISSA)
    else:
        words.zero_()
    if len(nibbles):
        # Bits do not overlap, so adding is or; base + code is at most 255 and 255 << 7 still positive.
        words[:half].add_((nibbles & 15).add_(base), alpha=_EXPONENT_ONE)
        if count > half:
            words[half:].add_((nibbles[: count - half] >> 4).add_(base), alpha=_EXPONENT_ONE)
    else:
        words.add_(base * _EXPONENT_ONE)
    if len(positions):
        at = torch.from_numpy(positions.astype(np.int64)).to(words.device, non_blocking=True)
        values = torch.from_numpy(bits.astype(np.int16)).to(words.device, non_blocking=True)
        words.index_copy_(0, at, values)
