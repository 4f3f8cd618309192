"""Planes of a chunk from outside that lie: refused in every codec and every way to decode, in bounded memory.

Covers: frames that lie about their size, in each plane of each codec; any bytes as planes; decoding with
numpy and with kernels, into wire form and on a device. A sealed pack shows planes to a codec only after they
were authenticated, a host segment only when its agent wrote it: this is the line behind those. Does not
cover: the file around the planes (test_hostile_packs).
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack_samples import frame, lying_frame

from packer import kernels
from packer.codec import (
    BadPlanes,
    CodecId,
    Workspace,
    decode_into,
    has_wire_form,
    plane_bytes,
    to_wire,
    wire_planes,
)
from packer.device_decode import decode_on_device
from packer.transforms import Transforms

RAW_BYTES = 65536
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def warmed(compiled_kernels: None) -> Iterator[None]:
    facts = kernels.warm()
    assert facts.ready, facts.text
    yield
    kernels.forget()


LIES: dict[str, Callable[[int], bytes]] = {
    "garbage": lambda size: b"garbage" * 9,
    "magic only": lambda size: b"\x28\xb5\x2f\xfd",
    "declares one less": lambda size: frame(bytes(size - 1)),
    "declares one more": lambda size: frame(bytes(size + 1)),
    "declares nothing": lambda size: frame(bytes(size), declare=False),
    "holds more": lambda size: lying_frame(size, os.urandom(64) * (size // 32 + 1)),
    "holds less": lambda size: lying_frame(size, bytes(size // 2)),
    "a bomb that declares the right size": lambda size: lying_frame(size, bytes(16 * MIB)),
    "a bomb that declares its own size": lambda size: frame(bytes(16 * MIB)),
    "declares 4 GiB": lambda size: lying_frame(2**32 - 1, bytes(size)),
    "two frames": lambda size: frame(bytes(size // 2)) * 2,
    "a frame and garbage": lambda size: frame(bytes(size)) + b"x",
    "cut short": lambda size: frame(os.urandom(size // 2) + bytes(size - size // 2))[:-20],
    "2 GiB window": lambda size: b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00",
    "needs a dictionary": lambda size: b"\x28\xb5\x2f\xfd\x61\x07\x00\x1f\x01\x00\x00",
    "skippable": lambda size: b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + bytes(8),
    "one byte": lambda size: b"\0",
    "longer than plain": lambda size: bytes(size + 1),
}


def good_planes(codec: CodecId) -> list[bytes]:
    return [bytes(8) if plain is None else bytes(plain) for plain in plane_bytes(codec, RAW_BYTES)]


PLACES = [
    (codec, at)
    for codec in CodecId
    for at, plain in enumerate(plane_bytes(codec, RAW_BYTES))
    if plain is not None
]


def refused_by_all(codec: int, planes: Sequence[bytes]) -> None:
    """Every way to decode says ``BadPlanes``, and nobody takes memory for what a plane claims."""
    compiled, plain = Workspace(), Workspace()
    assert compiled.transforms.name == "kernels"
    plain.transforms = Transforms()
    tracemalloc.start()
    try:
        for space in (compiled, plain):
            with pytest.raises(BadPlanes):
                decode_into(codec, planes, memoryview(bytearray(RAW_BYTES)), space)
        if has_wire_form(codec):
            room = memoryview(bytearray(2 * RAW_BYTES))
            with pytest.raises(BadPlanes):
                decode_into(codec, _wire(codec, planes, room, plain), room[:RAW_BYTES], plain)
            views = [memoryview(plane) for plane in planes]
            with pytest.raises(BadPlanes):
                decode_into(codec, wire_planes(codec, views, RAW_BYTES, room, plain), room[:RAW_BYTES], plain)
        tensors = [torch.from_numpy(np.frombuffer(plane, np.uint8).copy()) for plane in planes]
        with pytest.raises(BadPlanes):
            decode_on_device(codec, tensors, torch.zeros(RAW_BYTES, dtype=torch.uint8))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * MIB + 3 * sum(len(plane) for plane in planes)


def _wire(codec: int, planes: Sequence[bytes], room: memoryview, space: Workspace) -> list[memoryview]:
    sizes = to_wire(codec, planes, RAW_BYTES, room, space)
    ends = np.cumsum(sizes).tolist()
    return [room[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("lie", list(LIES))
@pytest.mark.parametrize(("codec", "at"), PLACES)
def test_a_lying_plane_is_refused(codec: CodecId, at: int, lie: str) -> None:
    size = plane_bytes(codec, RAW_BYTES)[at]
    assert size is not None
    planes = good_planes(codec)
    planes[at] = LIES[lie](size)
    refused_by_all(codec, planes)


@pytest.mark.parametrize("codec", list(CodecId))
def test_honest_planes_of_zeros_decode(codec: CodecId) -> None:
    """What the tests above start from is good, so each refusal is about its lie."""
    out = bytearray(b"\xa5" * RAW_BYTES)
    decode_into(codec, good_planes(codec), memoryview(out))
    assert bytes(out) == bytes(RAW_BYTES)


@given(
    st.integers(-2, 12),
    st.integers(0, 70),
    st.lists(st.one_of(st.binary(max_size=80), st.just(frame(bytes(32)))), max_size=5),
)
def test_any_bytes_as_planes_decode_or_are_refused(codec: int, raw_bytes: int, planes: list[bytes]) -> None:
    guarded = bytearray(b"\xa5" * (raw_bytes + 128))
    spaces = [Workspace(), Workspace()]
    spaces[1].transforms = Transforms()
    outcomes = []
    for space in spaces:
        try:
            decode_into(codec, planes, memoryview(guarded)[64 : 64 + raw_bytes], space)
        except BadPlanes:
            outcomes.append(b"refused")
        else:
            outcomes.append(bytes(guarded[64 : 64 + raw_bytes]))
        assert guarded[:64] == guarded[-64:] == b"\xa5" * 64
    assert outcomes[0] == outcomes[1]
