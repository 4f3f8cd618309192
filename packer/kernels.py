"""The byte work of the codecs as compiled kernels, where numba is installed (the extra ``fast``).

Covers: the same transforms as ``transforms``, byte for byte, in one pass over the words instead of a dozen,
and when they may be used. Does not cover: anything that numpy does well enough; without numba, or with
``BUNKHOUSE_KERNELS=off``, everything works as before.

Kernels are compiled by ``warm()`` and used only in the process that called it and in those forked from it:
a restore must never wait for a compiler. So the nursery calls it before its first fork, and a worker is
born with the machine code in memory that it shares with its siblings. For the same reason nothing is
cached on disk: numba's cache is a pickle with machine code, loading it is running it, and whoever could
write there would own every tenant's worker. Compiling takes about two seconds, once in a node's life.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packer.transforms import U8, U16, U32, Transforms

# Weights looked at together for escapes; a block without any, the most common kind, is passed in one step.
ESCAPE_BLOCK_WEIGHTS = 256
SWITCH = "BUNKHOUSE_KERNELS"

u8, u16, u32, i64 = np.uint8, np.uint16, np.uint32, np.int64


@dataclass(frozen=True, slots=True)
class WarmFacts:
    """What ``warm`` did. ``text`` says with what, or why numpy stays."""

    ready: bool
    text: str
    took_ms: float = 0.0


# --- kernels --------------------------------------------------------------------------------------
# Plain loops that LLVM turns into vector code. Every step is brought back to its narrow type, because numba
# widens integer arithmetic to 64 bits; both halves are sliced first, because LLVM does not vectorise an
# index with an offset. Both halves are of one length: an odd number of words takes the numpy way, and is no
# chunk of a pack.


def _split_n12(words: Any, base: Any, signs: Any, nibbles: Any) -> Any:
    half = nibbles.size
    first, second = words[:half], words[half:]
    signs1, signs2 = signs[:half], signs[half:]
    outside = u32(0)
    for j in range(second.size):
        a, b = first[j], second[j]
        code1, code2 = u8(u8(a >> u16(7)) - base), u8(u8(b >> u16(7)) - base)
        out1, out2 = code1 > u8(15), code2 > u8(15)
        outside += u32(out1) + u32(out2)
        code1 = u8(0) if out1 else code1
        code2 = u8(0) if out2 else code2
        nibbles[j] = u8(code1 | u8(code2 << u8(4)))
        signs1[j] = u8(u16(a >> u16(8)) & u16(0x80)) | u8(a & u16(0x7F))
        signs2[j] = u8(u16(b >> u16(8)) & u16(0x80)) | u8(b & u16(0x7F))
    return outside


def _split_n12_top(words: Any, base: Any, low: Any, signs: Any, nibbles: Any) -> Any:
    half = nibbles.size
    first, second = words[:half], words[half:]
    signs1, signs2, low1, low2 = signs[:half], signs[half:], low[:half], low[half:]
    outside = u32(0)
    for j in range(second.size):
        a, b = first[j], second[j]
        low1[j], low2[j] = u16(a), u16(b)
        code1, code2 = u8(u8(a >> u32(23)) - base), u8(u8(b >> u32(23)) - base)
        out1, out2 = code1 > u8(15), code2 > u8(15)
        outside += u32(out1) + u32(out2)
        code1 = u8(0) if out1 else code1
        code2 = u8(0) if out2 else code2
        nibbles[j] = u8(code1 | u8(code2 << u8(4)))
        signs1[j] = u8(u32(a >> u32(24)) & u32(0x80)) | u8(u32(a >> u32(16)) & u32(0x7F))
        signs2[j] = u8(u32(b >> u32(24)) & u32(0x80)) | u8(u32(b >> u32(16)) & u32(0x7F))
    return outside


def _find_outside(words: Any, base: Any, outside: Any) -> Any:
    """Rising positions of the words whose exponent lies outside of the window."""
    found = i64(0)
    for start in range(0, words.size, ESCAPE_BLOCK_WEIGHTS):
        block = words[start : start + ESCAPE_BLOCK_WEIGHTS]
        some = u8(0)
        for j in range(block.size):
            some |= u8(u8(block[j] >> u16(7)) - base)
        if some > u8(15):
            for j in range(block.size):
                if u8(u8(block[j] >> u16(7)) - base) > u8(15) and found < outside.size:
                    outside[found] = u32(start + j)
                    found += i64(1)
    return found


def _find_outside_top(words: Any, base: Any, outside: Any) -> Any:
    found = i64(0)
    for start in range(0, words.size, ESCAPE_BLOCK_WEIGHTS):
        block = words[start : start + ESCAPE_BLOCK_WEIGHTS]
        some = u8(0)
        for j in range(block.size):
            some |= u8(u8(block[j] >> u32(23)) - base)
        if some > u8(15):
            for j in range(block.size):
                if u8(u8(block[j] >> u32(23)) - base) > u8(15) and found < outside.size:
                    outside[found] = u32(start + j)
                    found += i64(1)
    return found


def _join_n12(signs: Any, nibbles: Any, base: Any, out: Any) -> Any:
    half = nibbles.size
    signs1, signs2, out1, out2 = signs[:half], signs[half:], out[:half], out[half:]
    for j in range(out2.size):
        n, a, b = u16(nibbles[j]), u16(signs1[j]), u16(signs2[j])
        top1, top2 = u16((a & u16(0x80)) << u16(8)), u16((b & u16(0x80)) << u16(8))
        exp1, exp2 = u16((base + (n & u16(15))) << u16(7)), u16((base + (n >> u16(4))) << u16(7))
        out1[j] = top1 | u16(a & u16(0x7F)) | exp1
        out2[j] = top2 | u16(b & u16(0x7F)) | exp2


def _join_n12_top(signs: Any, nibbles: Any, base: Any, low: Any, out: Any) -> Any:
    half = nibbles.size
    signs1, signs2, out1, out2 = signs[:half], signs[half:], out[:half], out[half:]
    low1, low2 = low[:half], low[half:]
    for j in range(out2.size):
        n, a, b = u32(nibbles[j]), u32(signs1[j]), u32(signs2[j])
        top1 = u32((a & u32(0x80)) << u32(24)) | u32((a & u32(0x7F)) << u32(16))
        top2 = u32((b & u32(0x80)) << u32(24)) | u32((b & u32(0x7F)) << u32(16))
        exp1, exp2 = u32((base + (n & u32(15))) << u32(23)), u32((base + (n >> u32(4))) << u32(23))
        out1[j] = top1 | exp1 | u32(low1[j])
        out2[j] = top2 | exp2 | u32(low2[j])


def _split_bytes(words: Any, low: Any, high: Any) -> Any:
    for j in range(words.size):
        low[j], high[j] = u8(words[j]), u8(words[j] >> u16(8))


def _join_bytes(low: Any, high: Any, out: Any) -> Any:
    for j in range(out.size):
        out[j] = u16(low[j]) | u16(u16(high[j]) << u16(8))


def _split_nibbles(octets: Any, low: Any, high: Any) -> Any:
    half = high.size
    first, second = octets[:half], octets[half:]
    for j in range(second.size):
        a, b = first[j], second[j]
        low[j] = u8(a & u8(15)) | u8(b << u8(4))
        high[j] = u8(a >> u8(4)) | u8(b & u8(0xF0))


def _split_turned_nibbles(octets: Any, low: Any, high: Any) -> Any:
    """Each byte is rotated left by one bit first. Not an argument of the kernel above: a shift by a
    variable is not vectorised."""
    half = high.size
    first, second = octets[:half], octets[half:]
    for j in range(second.size):
        a, b = first[j], second[j]
        a, b = u8(u8(a << u8(1)) | u8(a >> u8(7))), u8(u8(b << u8(1)) | u8(b >> u8(7)))
        low[j] = u8(a & u8(15)) | u8(b << u8(4))
        high[j] = u8(a >> u8(4)) | u8(b & u8(0xF0))


def _join_nibbles(low: Any, high: Any, out: Any) -> Any:
    half = high.size
    first, second = out[:half], out[half:]
    for j in range(second.size):
        n, m = low[j], high[j]
        first[j] = u8(m << u8(4)) | u8(n & u8(15))
        second[j] = u8(m & u8(0xF0)) | u8(n >> u8(4))


def _join_turned_nibbles(low: Any, high: Any, out: Any) -> Any:
    half = high.size
    first, second = out[:half], out[half:]
    for j in range(second.size):
        n, m = low[j], high[j]
        a, b = u8(u8(m << u8(4)) | u8(n & u8(15))), u8(u8(m & u8(0xF0)) | u8(n >> u8(4)))
        first[j] = u8(a >> u8(1)) | u8(a << u8(7))
        second[j] = u8(b >> u8(1)) | u8(b << u8(7))


# --- compiled and at hand -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The kernels as machine code. Calling one releases the GIL."""

    split_n12: Callable[..., Any]
    split_n12_top: Callable[..., Any]
    find_outside: Callable[..., Any]
    find_outside_top: Callable[..., Any]
    join_n12: Callable[..., Any]
    join_n12_top: Callable[..., Any]
    split_bytes: Callable[..., Any]
    join_bytes: Callable[..., Any]
    split_nibbles: Callable[..., Any]
    split_turned_nibbles: Callable[..., Any]
    join_nibbles: Callable[..., Any]
    join_turned_nibbles: Callable[..., Any]


def _fits(words: NDArray[Any], as_long: Sequence[NDArray[Any]], half_as_long: Sequence[NDArray[Any]]) -> bool:
    """Whether kernels may have these arrays. They index without looking: the codec gives arrays of the right
    lengths, and this is where that is seen. Raises ``ValueError``."""
    half = (len(words) + 1) // 2
    fits = all(len(array) == len(words) for array in as_long)
    if not fits or not all(len(array) == half for array in half_as_long):
        raise ValueError(f"planes do not have the lengths that {len(words)} words need")
    return len(words) % 2 == 0 and all(array.flags.aligned for array in (words, *as_long, *half_as_long))


class KernelTransforms(Transforms):
    """Compiled. An odd number of words, and words at odd addresses, take the numpy way."""

    name = "kernels"

    def __init__(self, compiled: _Compiled) -> None:
        super().__init__()
        self._compiled = compiled

    def split_n12(self, words: U16, base: int, signs: U8, nibbles: U8, outside: U32) -> int:
        if not _fits(words, (signs,), (nibbles,)):
            return super().split_n12(words, base, signs, nibbles, outside)
        found = int(self._compiled.split_n12(words, u8(base), signs, nibbles))
        if 0 < found <= len(outside):
            self._compiled.find_outside(words, u8(base), outside)
        return found

    def split_n12_top(self, words: U32, base: int, low: U16, signs: U8, nibbles: U8, outside: U32) -> int:
        if not _fits(words, (low, signs), (nibbles,)):
            return super().split_n12_top(words, base, low, signs, nibbles, outside)
        found = int(self._compiled.split_n12_top(words, u8(base), low, signs, nibbles))
        if 0 < found <= len(outside):
            self._compiled.find_outside_top(words, u8(base), outside)
        return found

    def join_n12(self, signs: U8, nibbles: U8, base: int, out: U16) -> None:
        if not _fits(out, (signs,), (nibbles,)):
            return super().join_n12(signs, nibbles, base, out)
        self._compiled.join_n12(signs, nibbles, u16(base), out)
        return None

    def join_n12_top(self, signs: U8, nibbles: U8, base: int, low: U16, out: U32) -> None:
        if not _fits(out, (signs, low), (nibbles,)):
            return super().join_n12_top(signs, nibbles, base, low, out)
        self._compiled.join_n12_top(signs, nibbles, u32(base), low, out)
        return None

    def split_bytes(self, words: U16, low: U8, high: U8) -> None:
        if not _fits(words, (low, high), ()):
            return super().split_bytes(words, low, high)
        self._compiled.split_bytes(words, low, high)
        return None

    def join_bytes(self, low: U8, high: U8, out: U16) -> None:
        if not _fits(out, (low, high), ()):
            return super().join_bytes(low, high, out)
        self._compiled.join_bytes(low, high, out)
        return None

    def split_nibbles(self, octets: U8, turned: bool, low: U8, high: U8) -> None:
        if not _fits(octets, (), (low, high)):
            return super().split_nibbles(octets, turned, low, high)
        split = self._compiled.split_turned_nibbles if turned else self._compiled.split_nibbles
        split(octets, low, high)
        return None

    def join_nibbles(self, low: U8, high: U8, turned: bool, out: U8) -> None:
        if not _fits(out, (), (low, high)):
            return super().join_nibbles(low, high, turned, out)
        join = self._compiled.join_turned_nibbles if turned else self._compiled.join_nibbles
        join(low, high, out)
        return None


_lock = threading.Lock()
_compiled: _Compiled | None = None


def warm() -> WarmFacts:
    """Compile all kernels for this process and those forked from it later, and compare what they do with
    numpy. Call it before the first fork. Never raises: a node without kernels is slower, not broken."""
    global _compiled
    if os.environ.get(SWITCH, "").lower() == "off":
        return WarmFacts(False, f"kernels are switched off by {SWITCH}")
    started_s = time.perf_counter()
    try:
        import numba

        with _lock:
            if _compiled is None:
                compiled = _compile(numba)
                _compare(compiled)
                _compiled = compiled
    except ModuleNotFoundError:
        return WarmFacts(False, "numba is not installed (the extra `fast` brings it)")
    except Exception as error:  # whatever a compiler may meet on a machine that nobody has seen
        return WarmFacts(False, f"kernels do not work here: {type(error).__name__}: {str(error)[:200]}")
    return WarmFacts(True, f"numba {numba.__version__}", (time.perf_counter() - started_s) * 1000)


class WrongKernel(RuntimeError):
    """A kernel and numpy gave different bytes."""


def _compare(compiled: _Compiled) -> None:
    """Run every kernel over every 16-bit pattern and a few more words, so that a vector is not full at the
    end. Raises ``WrongKernel``."""
    words = np.append(np.arange(65536, dtype=np.uint16), np.full(14, 0x3F80, dtype=np.uint16))
    wides = words.astype(np.uint32) * u32(0x1_0001)
    count, half = len(words), (len(words) + 1) // 2
    results: list[list[bytes]] = []
    for transforms in (Transforms(), KernelTransforms(compiled)):
        low, high = np.zeros(count, np.uint8), np.zeros(count, np.uint8)
        signs, nibbles = np.zeros(count, np.uint8), np.zeros(half, np.uint8)
        outside, low16 = np.zeros(count, np.uint32), np.zeros(count, np.uint16)
        out16, out32, out8 = np.zeros(count, np.uint16), np.zeros(count, np.uint32), np.zeros(count, np.uint8)
        seen: list[bytes] = []
        for base in (0, 120, 240):
            transforms.split_n12(words, base, signs, nibbles, outside)
            transforms.join_n12(signs, nibbles, base, out16)
            seen += [array.tobytes() for array in (signs, nibbles, outside, out16)]
            transforms.split_n12_top(wides, base, low16, signs, nibbles, outside)
            transforms.join_n12_top(signs, nibbles, base, low16, out32)
            seen += [array.tobytes() for array in (low16, signs, nibbles, outside, out32)]
        transforms.split_bytes(words, low, high)
        transforms.join_bytes(low, high, out16)
        seen += [array.tobytes() for array in (low, high, out16)]
        for turned in (False, True):
            transforms.split_nibbles(words.view(np.uint8)[:count], turned, low[:half], high[:half])
            transforms.join_nibbles(low[:half], high[:half], turned, out8)
            seen += [array.tobytes() for array in (low, high, out8)]
        results.append(seen)
    if results[0] != results[1]:
        raise WrongKernel("compiled and plain transforms gave different bytes")


def forget() -> None:
    """Go back to numpy for every ``transforms()`` from here on."""
    global _compiled
    with _lock:
        _compiled = None


def transforms() -> Transforms:
    """The fastest transforms that are ready. One thread uses them at a time."""
    return Transforms() if _compiled is None else KernelTransforms(_compiled)


def _compile(numba: Any) -> _Compiled:
    types = numba.types

    def array(of: Any, readonly: bool = False) -> Any:
        return types.Array(of, 1, "C", readonly=readonly)

    byte, word, wide = types.uint8, types.uint16, types.uint32
    bytes_in, words_in = array(byte, readonly=True), array(word, readonly=True)
    wides_in = array(wide, readonly=True)
    bytes_out, words_out, wides_out = array(byte), array(word), array(wide)

    def kernel(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        compiler = numba.njit(arguments, nogil=True, error_model="numpy")
        compiled: Callable[..., Any] = compiler(function)
        return compiled

    return _Compiled(
        split_n12=kernel(_split_n12, words_in, byte, bytes_out, bytes_out),
        split_n12_top=kernel(_split_n12_top, wides_in, byte, words_out, bytes_out, bytes_out),
        find_outside=kernel(_find_outside, words_in, byte, wides_out),
        find_outside_top=kernel(_find_outside_top, wides_in, byte, wides_out),
        join_n12=kernel(_join_n12, bytes_in, bytes_in, word, words_out),
        join_n12_top=kernel(_join_n12_top, bytes_in, bytes_in, wide, words_in, wides_out),
        split_bytes=kernel(_split_bytes, words_in, bytes_out, bytes_out),
        join_bytes=kernel(_join_bytes, bytes_in, bytes_in, words_out),
        split_nibbles=kernel(_split_nibbles, bytes_in, bytes_out, bytes_out),
        split_turned_nibbles=kernel(_split_turned_nibbles, bytes_in, bytes_out, bytes_out),
        join_nibbles=kernel(_join_nibbles, bytes_in, bytes_in, bytes_out),
        join_turned_nibbles=kernel(_join_turned_nibbles, bytes_in, bytes_in, bytes_out),
    )
