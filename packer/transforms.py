"""The byte work of the codecs in numpy: words split into planes, planes joined into words.

Covers: N12 for 16-bit words and for the top halves of 32-bit words, low and high bytes, nibbles of bytes.
Does not cover: zstd, escapes, the choice of a codec (``codec``), or the compiled form of the same work
(``kernels``), which must give the same bytes.

Only whole-array calls that release the GIL, block by block, so that the temporaries stay in the second
level cache. Two things cost more than they look: numpy shifts bytes to the left ten times slower than it
multiplies them, and a mixed-width operation goes through a slow buffer, so words are widened and narrowed
with ``copyto`` alone.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

U8: TypeAlias = NDArray[np.uint8]
U16: TypeAlias = NDArray[np.uint16]
U32: TypeAlias = NDArray[np.uint32]
I64: TypeAlias = NDArray[np.int64]

# Weights per step: the temporaries of a step, about 8 bytes a weight, stay close to the second level cache,
# and a call is long beside what numpy takes to begin it.
BLOCK_WEIGHTS = 192 * 1024
WINDOW = 16  # exponents in one 4-bit window

_SIGN_MANTISSA = np.int16(-32641)  # 0x807F: what is left of a sign-extended sign-and-mantissa byte
_LOW4, _HIGH4 = np.uint8(0x0F), np.uint8(0xF0)
_SIGN8, _MANTISSA8 = np.uint8(0x80), np.uint8(0x7F)
_ONE, _FOUR, _SIXTEEN = np.uint8(1), np.uint8(4), np.uint8(16)
# Factors that move a value to the left by 7, 8 and 16 bits.
_EXPONENT, _BYTE, _WORD = np.uint16(1 << 7), np.uint16(1 << 8), np.uint32(1 << 16)


class Transforms:
    """The numpy form. Holds the temporaries of one block, so one thread uses it at a time."""

    name = "numpy"

    def __init__(self) -> None:
        self._arrays: dict[str, U8] = {}

    def _bytes(self, name: str, nbytes: int) -> U8:
        found = self._arrays.get(name)
        if found is None or len(found) < nbytes:
            found = self._arrays[name] = np.empty(nbytes, dtype=np.uint8)
        return found[:nbytes]

    def _words(self, name: str, count: int) -> U16:
        return self._bytes(name, 2 * count).view(np.uint16)

    def _wides(self, name: str, count: int) -> U32:
        return self._bytes(name, 4 * count).view(np.uint32)

    # --- N12 ---

    def split_n12(self, words: U16, base: int, signs: U8, nibbles: U8, outside: U32) -> int:
        """Sign-and-mantissa bytes and exponent nibbles of bf16 words. Returns how many weights lie outside
        of the window, with their rising positions in ``outside``; when there are more than fit there, the
        planes are not finished."""
        return self._split(words, None, base, signs, nibbles, outside)

    def split_n12_top(self, words: U32, base: int, low: U16, signs: U8, nibbles: U8, outside: U32) -> int:
        """The same of the top halves of 32-bit words, whose low halves go to ``low``."""
        return self._split(words, low, base, signs, nibbles, outside)

    def _split(
        self, words: U16 | U32, low: U16 | None, base: int, signs: U8, nibbles: U8, outside: U32
    ) -> int:
        half = len(nibbles)
        count, found = len(words), 0
        places: tuple[list[I64], list[I64]] = ([], [])
        for start in range(0, half, BLOCK_WEIGHTS):
            stop = min(start + BLOCK_WEIGHTS, half)
            for second in (0, 1):
                first, last = second * half + start, min(second * half + stop, count)
                block = self._top(words[first:last], None if low is None else low[first:last])
                codes = self._bytes("codes", last - first)
                for place in self._split_block(block, base, codes, signs[first:last]):
                    places[second].append(place + first)
                    found += len(place)
                if second:
                    np.multiply(codes, np.uint8(16), out=codes)
                    part = nibbles[start : start + len(codes)]
                    np.bitwise_or(part, codes, out=part)
                else:
                    np.copyto(nibbles[start:stop], codes)
            if found > len(outside):
                return found
        if found:
            outside[:found] = np.concatenate([*places[0], *places[1]])
        return found

    def _top(self, words: U16 | U32, low: U16 | None) -> U16:
        """The 16-bit words that N12 is about."""
        if low is None:
            return words.view(np.uint16)
        np.copyto(low, words, casting="unsafe")
        wide, top = self._wides("wide32", len(words)), self._words("top", len(words))
        np.right_shift(words, np.uint32(16), out=wide)
        np.copyto(top, wide, casting="unsafe")
        return top

    def _split_block(self, words: U16, base: int, codes: U8, signs: U8) -> list[I64]:
        size = len(words)
        wide, other = self._words("wide", size), self._bytes("other", size)
        np.right_shift(words, np.uint16(7), out=wide)
        np.copyto(codes, wide, casting="unsafe")  # the sign, bit 8, falls off
        np.subtract(codes, np.uint8(base), out=codes)  # wraps below the window, which also lands above 15
        np.greater(codes, _LOW4, out=other.view(np.bool_))
        places = np.flatnonzero(other.view(np.bool_))
        if len(places):
            codes[places] = 0
        np.right_shift(words, np.uint16(8), out=wide)
        np.copyto(other, wide, casting="unsafe")
        np.bitwise_and(other, _SIGN8, out=other)
        np.copyto(signs, words, casting="unsafe")
        np.bitwise_and(signs, _MANTISSA8, out=signs)
        np.bitwise_or(signs, other, out=signs)
        return [places] if len(places) else []

    def join_n12(self, signs: U8, nibbles: U8, base: int, out: U16) -> None:
        """The words of these planes; those of escaped weights are still to be put right."""
        half = len(nibbles)
        codes, wide = self._bytes("codes", BLOCK_WEIGHTS), self._words("wide", BLOCK_WEIGHTS)
        for first, last in _blocks(half, len(out)):
            size = last - first
            _codes_of(nibbles, first, half, codes[:size])
            _join_block(signs[first:last], codes[:size], base, wide[:size], out[first:last])

    def join_n12_top(self, signs: U8, nibbles: U8, base: int, low: U16, out: U32) -> None:
        """32-bit words, their top halves from the N12 planes and their low halves from ``low``."""
        half = len(nibbles)
        codes, wide = self._bytes("codes", BLOCK_WEIGHTS), self._words("wide", BLOCK_WEIGHTS)
        top, wider = self._words("top", BLOCK_WEIGHTS), self._wides("wide32", BLOCK_WEIGHTS)
        for first, last in _blocks(half, len(out)):
            size = last - first
            _codes_of(nibbles, first, half, codes[:size])
            _join_block(signs[first:last], codes[:size], base, wide[:size], top[:size])
            block, other = out[first:last], wider[:size]
            np.copyto(block, top[:size])
            np.multiply(block, _WORD, block)
            np.copyto(other, low[first:last])
            np.bitwise_or(block, other, block)

    # --- low and high bytes ---

    def split_bytes(self, words: U16, low: U8, high: U8) -> None:
        for start in range(0, len(words), BLOCK_WEIGHTS):
            block = words[start : start + BLOCK_WEIGHTS]
            wide = self._words("wide", len(block))
            np.copyto(low[start : start + len(block)], block, casting="unsafe")
            np.right_shift(block, np.uint16(8), out=wide)
            np.copyto(high[start : start + len(block)], wide, casting="unsafe")

    def join_bytes(self, low: U8, high: U8, out: U16) -> None:
        whole = self._words("wide", BLOCK_WEIGHTS)
        for start in range(0, len(out), BLOCK_WEIGHTS):
            block = out[start : start + BLOCK_WEIGHTS]
            stop = start + len(block)
            wide = whole[: len(block)]
            np.copyto(block, high[start:stop])
            np.multiply(block, _BYTE, block)
            np.copyto(wide, low[start:stop])
            np.bitwise_or(block, wide, block)

    # --- nibbles ---

    def split_nibbles(self, octets: U8, turned: bool, low: U8, high: U8) -> None:
        """High and low nibbles, two to a byte; ``turned`` rotates each byte left by one bit first."""
        half = len(high)
        for start in range(0, half, BLOCK_WEIGHTS):
            size = min(BLOCK_WEIGHTS, half - start)
            other = self._bytes("other", size)
            part_low, part_high = low[start : start + size], high[start : start + size]
            block = self._turned_left(octets[start : start + size], turned)
            np.bitwise_and(block, _LOW4, out=part_low)
            np.right_shift(block, np.uint8(4), out=part_high)
            block = self._turned_left(octets[half + start : half + start + size], turned)
            size = len(block)  # one less at the end of an odd number of bytes
            np.multiply(block, np.uint8(16), out=other[:size])
            np.bitwise_or(part_low[:size], other[:size], out=part_low[:size])
            np.bitwise_and(block, _HIGH4, out=other[:size])
            np.bitwise_or(part_high[:size], other[:size], out=part_high[:size])

    def _turned_left(self, octets: U8, turned: bool) -> U8:
        if not turned:
            return octets
        size = len(octets)
        block, bit = self._bytes("codes", size), self._bytes("bit", size)
        np.right_shift(octets, np.uint8(7), out=bit)
        np.multiply(octets, np.uint8(2), out=block)
        np.bitwise_or(block, bit, out=block)
        return block

    def join_nibbles(self, low: U8, high: U8, turned: bool, out: U8) -> None:
        half = len(high)
        whole = self._bytes("other", BLOCK_WEIGHTS)
        for first, last in _blocks(half, len(out)):
            block, other = out[first:last], whole[: last - first]
            start = first if first < half else first - half
            part_low, part_high = low[start : start + len(block)], high[start : start + len(block)]
            if first < half:
                np.multiply(part_high, _SIXTEEN, block)
                np.bitwise_and(part_low, _LOW4, other)
            else:
                np.bitwise_and(part_high, _HIGH4, block)
                np.right_shift(part_low, _FOUR, other)
            np.bitwise_or(block, other, block)
            if turned:
                np.multiply(block, _SIGN8, other)  # the lowest bit to the highest place
                np.right_shift(block, _ONE, block)
                np.bitwise_or(block, other, block)


def _codes_of(nibbles: U8, first: int, half: int, codes: U8) -> None:
    """The codes of a run of weights that starts at ``first``."""
    if first < half:
        np.bitwise_and(nibbles[first : first + len(codes)], _LOW4, codes)
    else:
        np.right_shift(nibbles[first - half : first - half + len(codes)], _FOUR, codes)


def _join_block(signs: U8, codes: U8, base: int, wide: U16, out: U16) -> None:
    np.add(codes, np.uint8(base), codes)
    np.copyto(wide, codes)
    np.multiply(wide, _EXPONENT, wide)
    signed = out.view(np.int16)
    np.copyto(signed, signs.view(np.int8))
    np.bitwise_and(signed, _SIGN_MANTISSA, signed)
    np.bitwise_or(out, wide, out)


def _blocks(half: int, count: int) -> list[tuple[int, int]]:
    """Runs of weights that do not reach over the half: nibbles of the two halves lie in the same bytes."""
    return [
        (start, min(start + BLOCK_WEIGHTS, stop))
        for first, stop in ((0, half), (half, count))
        for start in range(first, stop, BLOCK_WEIGHTS)
    ]
