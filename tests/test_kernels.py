"""Kernels: the same bytes as numpy for every function, dtype and length, and used only once warmed.

Covers: packer/kernels.py against packer/transforms.py, both against the definition in FORMAT.md, chunks
encoded and decoded with either, the switch, and a forked child. Does not cover: rates (bench_codec).
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_samples import weights

from packer import kernels
from packer.codec import CodecId, Workspace, decode_into, encode, encode_as
from packer.kernels import KernelTransforms
from packer.transforms import BLOCK_WEIGHTS, Transforms

ROOT = Path(__file__).resolve().parent.parent
COUNTS = [
    0,
    1,
    2,
    3,
    4,
    6,
    7,
    8,
    62,
    63,
    64,
    65,
    66,
    126,
    130,
    255,
    256,
    257,
    258,
    510,
    514,
    1000,
    4097,
    4098,
]
COUNTS += [2 * BLOCK_WEIGHTS - 2, 2 * BLOCK_WEIGHTS - 1, 2 * BLOCK_WEIGHTS, 2 * BLOCK_WEIGHTS + 6]
BASE = 110


@pytest.fixture(scope="module", autouse=True)
def warmed(compiled_kernels: None) -> Iterator[None]:
    """Kernels for this module only: other tests of this process see numpy, as without numba."""
    facts = kernels.warm()
    assert facts.ready, facts.text
    yield
    kernels.forget()


def both() -> tuple[Transforms, Transforms]:
    numpy, compiled = Transforms(), kernels.transforms()
    assert isinstance(compiled, KernelTransforms)
    return numpy, compiled


def near_window(
    count: int, seed: int, share_outside: float = 0.01
) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Words of which most have an exponent in the window, and some any exponent."""
    draw = np.random.default_rng(seed)
    words = draw.integers(0, 2, count) << 15 | draw.integers(BASE, BASE + 16, count) << 7
    words |= draw.integers(0, 128, count)
    any_words = draw.integers(0, 65536, count)
    return np.where(draw.random(count) < share_outside, any_words, words).astype(np.uint16)


def guarded(count: int, dtype: type) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.full(count + 8, 0x5A, dtype=dtype)


# --- N12 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_n12_split_is_what_the_format_says_and_joins_again(count: int) -> None:
    words = near_window(count, count)
    half = (count + 1) // 2
    exponents = (words >> 7).astype(np.uint8)
    escaped = np.flatnonzero((exponents < BASE) | (exponents >= BASE + 16))
    codes = np.where((exponents < BASE) | (exponents >= BASE + 16), 0, exponents - BASE).astype(np.uint8)
    expected_nibbles = codes[:half].copy()
    expected_nibbles[: count - half] |= codes[half:] << 4
    expected_signs = (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
    for transforms in both():
        signs, nibbles, outside = guarded(count, np.uint8), guarded(half, np.uint8), guarded(count, np.uint32)
        found = transforms.split_n12(words, BASE, signs[:count], nibbles[:half], outside[:count])
        assert outside[:found].tolist() == escaped.tolist()
        assert (signs[:count] == expected_signs).all()
        assert (nibbles[:half] == expected_nibbles).all()
        assert (signs[count:] == 0x5A).all()
        assert (nibbles[half:] == 0x5A).all()
        out = guarded(count, np.uint16)
        transforms.join_n12(signs[:count], nibbles[:half], BASE, out[:count])
        out[outside[:found]] = words[outside[:found]]
        assert (out[:count] == words).all()
        assert (out[count:] == 0x5A).all()


@pytest.mark.parametrize("count", COUNTS)
def test_n12_over_top_halves_is_n12_beside_the_low_halves(count: int) -> None:
    top = near_window(count, count + 1)
    low_halves = np.random.default_rng(count).integers(0, 65536, count, dtype=np.uint16)
    words = (top.astype(np.uint32) << 16) | low_halves
    half = (count + 1) // 2
    signs16, nibbles16, outside16 = (
        np.empty(count, np.uint8),
        np.empty(half, np.uint8),
        np.empty(count, np.uint32),
    )
    expected = Transforms().split_n12(top, BASE, signs16, nibbles16, outside16)
    for transforms in both():
        signs, nibbles, outside = guarded(count, np.uint8), guarded(half, np.uint8), guarded(count, np.uint32)
        low = guarded(count, np.uint16)
        found = transforms.split_n12_top(
            words, BASE, low[:count], signs[:count], nibbles[:half], outside[:count]
        )
        assert outside[:found].tolist() == outside16[:expected].tolist()
        assert (signs[:count] == signs16).all()
        assert (nibbles[:half] == nibbles16).all()
        assert (low[:count] == low_halves).all()
        out = guarded(count, np.uint32)
        transforms.join_n12_top(signs[:count], nibbles[:half], BASE, low[:count], out[:count])
        out[outside[:found]] = words[outside[:found]]
        assert (out[:count] == words).all()
        for array, size in ((signs, count), (nibbles, half), (low, count), (out, count)):
            assert (array[size:] == 0x5A).all()


def test_every_pattern_with_every_window() -> None:
    words = np.arange(65536, dtype=np.uint16)
    for base in (0, 1, 100, 127, 239, 240):
        planes = []
        for transforms in both():
            signs, nibbles = np.zeros(65536, np.uint8), np.zeros(32768, np.uint8)
            outside = np.zeros(65536, np.uint32)
            found = transforms.split_n12(words, base, signs, nibbles, outside)
            out = np.zeros(65536, np.uint16)
            transforms.join_n12(signs, nibbles, base, out)
            assert np.flatnonzero(out != words).tolist() == outside[:found].tolist()
            planes.append((found, signs.tobytes(), nibbles.tobytes(), outside.tobytes()))
        assert planes[0] == planes[1]
        assert planes[0][0] == 65536 - 16 * 256


def test_more_escapes_than_fit_are_counted_but_not_written() -> None:
    words = np.full(4096, 0x0001, dtype=np.uint16)
    for transforms in both():
        outside = guarded(100, np.uint32)
        signs, nibbles = np.zeros(4096, np.uint8), np.zeros(2048, np.uint8)
        assert transforms.split_n12(words, BASE, signs, nibbles, outside[:100]) > 100
        assert (outside[100:] == 0x5A).all()


def test_arrays_that_do_not_fit_are_refused_before_a_kernel_sees_them() -> None:
    """A kernel would read or write past their ends."""
    _, compiled = both()
    u8, u16, u32 = (partial(np.zeros, dtype=dtype) for dtype in (np.uint8, np.uint16, np.uint32))
    calls: list[Callable[[], object]] = [
        lambda: compiled.split_n12(u16(9), 1, u8(8), u8(5), u32(9)),
        lambda: compiled.split_n12(u16(9), 1, u8(9), u8(4), u32(9)),
        lambda: compiled.split_n12_top(u32(9), 1, u16(8), u8(9), u8(5), u32(9)),
        lambda: compiled.split_n12_top(u32(9), 1, u16(9), u8(9), u8(6), u32(9)),
        lambda: compiled.join_n12(u8(8), u8(5), 1, u16(9)),
        lambda: compiled.join_n12(u8(9), u8(6), 1, u16(9)),
        lambda: compiled.join_n12_top(u8(9), u8(5), 1, u16(8), u32(9)),
        lambda: compiled.split_bytes(u16(9), u8(9), u8(8)),
        lambda: compiled.join_bytes(u8(8), u8(9), u16(9)),
        lambda: compiled.split_nibbles(u8(9), True, u8(5), u8(4)),
        lambda: compiled.join_nibbles(u8(4), u8(5), False, u8(9)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="lengths that 9 words need"):
            call()


# --- bytes and nibbles ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_bytes_and_nibbles_split_and_join(count: int) -> None:
    words = np.random.default_rng(count).integers(0, 65536, count, dtype=np.uint16)
    octets, half = words.view(np.uint8)[:count], (count + 1) // 2
    for transforms in both():
        low, high, out = guarded(count, np.uint8), guarded(count, np.uint8), guarded(count, np.uint16)
        transforms.split_bytes(words, low[:count], high[:count])
        assert (low[:count] == (words & 255)).all()
        assert (high[:count] == (words >> 8)).all()
        transforms.join_bytes(low[:count], high[:count], out[:count])
        assert (out[:count] == words).all()
        assert (out[count:] == 0x5A).all()
        for turned in (False, True):
            seen = (octets << 1 | octets >> 7).astype(np.uint8) if turned else octets
            low, high, back = guarded(half, np.uint8), guarded(half, np.uint8), guarded(count, np.uint8)
            transforms.split_nibbles(octets, turned, low[:half], high[:half])
            assert (low[:half] & 15).tolist() == (seen[:half] & 15).tolist()
            assert (high[:half] & 15).tolist() == (seen[:half] >> 4).tolist()
            assert (low[: count - half] >> 4).tolist() == (seen[half:] & 15).tolist()
            assert (high[: count - half] >> 4).tolist() == (seen[half:] >> 4).tolist()
            assert ((low[count - half : half] | high[count - half : half]) >> 4 == 0).all()
            transforms.join_nibbles(low[:half], high[:half], turned, back[:count])
            assert (back[:count] == octets).all()
            assert (low[half:] == 0x5A).all()
            assert (back[count:] == 0x5A).all()


# --- whole chunks ---------------------------------------------------------------------------------

KINDS = ("BF16", "F32", "F16", "F8_E4M3", "F8_E5M2", "I8")


@given(st.sampled_from(KINDS), st.integers(0, 3000), st.integers(0, 2**16), st.booleans())
def test_chunks_are_the_same_whoever_encodes_and_decodes(dtype: str, size: int, seed: int, odd: bool) -> None:
    """A pack written with kernels is repaired without them, to the same tags, and the other way round."""
    raw = (weights("F32" if dtype == "F32" else "BF16", 800, seed) * 4)[:size]
    source = bytearray(b"\0" * odd + raw)
    view = memoryview(source)[odd:]  # at an odd address: kernels must not be handed such words
    compiled, plain = Workspace(), Workspace()
    plain.transforms = Transforms()
    assert compiled.transforms.name == "kernels"
    encoded = encode(dtype, view, compiled)
    assert encode(dtype, view, plain) == encoded
    assert encode_as(encoded.codec_id, dtype, view, plain) == encoded
    for space in (compiled, plain):
        out = bytearray(b"\xa5" * (size + odd))
        planes = [memoryview(b"\0" * odd + plane)[odd:] for plane in encoded.planes]
        decode_into(encoded.codec_id, planes, memoryview(out)[odd:], space)
        assert bytes(out[odd:]) == raw


def test_large_chunks_of_every_codec_are_the_same() -> None:
    values = (np.random.default_rng(0).standard_normal(2**19) * 0.02).astype(np.float32)
    top = (values.view(np.uint32) >> 16).astype(np.uint16)
    kinds = [
        ("BF16", top.tobytes(), CodecId.N12),
        ("F32", values.tobytes(), CodecId.N12_TOP),
        ("F16", values.astype(np.float16).tobytes(), CodecId.PLANES2),
        ("I8", (values * 1000).round().clip(-127, 127).astype(np.int8).tobytes(), CodecId.NIBBLES8),
        ("F8_E4M3", (top >> 4 & 0x78 | top >> 8 & 0x80).astype(np.uint8).tobytes(), None),
    ]
    compiled, plain = Workspace(), Workspace()
    plain.transforms = Transforms()
    for dtype, raw, codec in kinds:
        encoded = encode(dtype, memoryview(raw), compiled)
        assert codec is None or encoded.codec_id == codec
        assert encode(dtype, memoryview(raw), plain) == encoded
        out = bytearray(len(raw))
        decode_into(encoded.codec_id, encoded.planes, memoryview(out), compiled)
        assert bytes(out) == raw


# --- when they are used ---------------------------------------------------------------------------


def in_fresh_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_compiled_before_it_is_asked_for() -> None:
    code = (
        "import sys; from packer.codec import Workspace;"
        "print(Workspace().transforms.name, 'numba' in sys.modules)"
    )
    assert in_fresh_python(code) == "numpy False"


def test_the_switch_keeps_numpy() -> None:
    code = (
        "import sys; from packer import kernels; from packer.codec import Workspace;"
        "print(kernels.warm().ready, Workspace().transforms.name, 'numba' in sys.modules)"
    )
    assert in_fresh_python(code, BUNKHOUSE_KERNELS="off") == "False numpy False"


def test_a_node_without_numba_keeps_numpy_and_says_so() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from packer import kernels; from packer.codec import Workspace\n"
        "facts = kernels.warm(); print(facts.ready, Workspace().transforms.name, facts.text)"
    )
    assert in_fresh_python(code).startswith("False numpy numba is not installed")


def test_a_numba_that_fails_keeps_numpy_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(numba: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(kernels, "_compiled", None)
    monkeypatch.setattr(kernels, "_compile", fail)
    facts = kernels.warm()
    assert not facts.ready
    assert "no such instruction" in facts.text
    assert Workspace().transforms.name == "numpy"


def test_where_memory_may_not_become_code_numpy_stays() -> None:
    """A service manager can forbid that (systemd: MemoryDenyWriteExecute); the node must still start."""
    code = (
        "import ctypes; from packer import kernels; from packer.codec import Workspace\n"
        "refused = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, Linux 6.3\n"
        "print('old kernel' if refused else (kernels.warm().ready, Workspace().transforms.name))"
    )
    said = in_fresh_python(code)
    if said == "old kernel":
        pytest.skip("this kernel can not forbid it")
    assert said == "(False, 'numpy')"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(kernels._Compiled)])
def test_a_kernel_that_gives_other_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A compiler's fault must not become a fault of the weights."""
    good = kernels._compiled
    assert good is not None

    def last_bit_wrong(*arrays: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> object:
        result = getattr(good, name)(*arrays)
        arrays[-1][-1] ^= 1
        return result

    monkeypatch.setattr(
        kernels, "_compile", lambda numba: dataclasses.replace(good, **{name: last_bit_wrong})
    )
    monkeypatch.setattr(kernels, "_compiled", None)
    facts = kernels.warm()
    assert not facts.ready
    assert "WrongKernel" in facts.text
    assert Workspace().transforms.name == "numpy"


def test_a_forked_child_has_them_and_leaves_nothing_on_disk(tmp_path: Path) -> None:
    """Whoever can write to a cache of machine code owns who loads it, so there is none."""
    code = (
        "import os, numpy as np; from packer import kernels; from packer.codec import Workspace;"
        "kernels.warm(); child = os.fork();\n"
        "if child == 0:\n"
        "    space = Workspace(); out = np.zeros(9, np.uint16)\n"
        "    low, high = np.arange(9, dtype=np.uint8), np.full(9, 1, np.uint8)\n"
        "    space.transforms.join_bytes(low, high, out)\n"
        "    os._exit(0 if space.transforms.name == 'kernels' and out[8] == 264 else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path)}
    assert in_fresh_python(code, **home) == "0"
    assert list(tmp_path.iterdir()) == []
    assert not list((ROOT / "packer").rglob("*.nbi"))
