"""Threat: a tenant uploads a safetensors file whose header lies, or is built to exhaust the parser.

Every case is refused with ``BadHeader``, in bounded time and memory. One that safetensors itself
accepts (duplicate keys, path-like names, a million tensors) is marked so.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_samples import safetensors_bytes, split_safetensors

from packer.layout import (
    HEADER_BYTES_MAX,
    TENSORS_MAX,
    BadHeader,
    header_bytes,
    lay_out,
    parse_header,
)


def entry(
    dtype: object = "F32", shape: object = None, begin: object = 0, end: object = 8
) -> dict[str, object]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [begin, end]}


def refuse(header: bytes, data_bytes: int = 8) -> str:
    with pytest.raises(BadHeader) as caught:
        parse_header(header, "evil.safetensors", 8 + len(header) + data_bytes)
    assert "evil.safetensors" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "file_size"),
    [
        (b"", 0),
        (b"\x01\x00\x00", 3),
        ((2**64 - 1).to_bytes(8, "little"), 100),
        ((HEADER_BYTES_MAX + 1).to_bytes(8, "little"), 2**40),
        ((93).to_bytes(8, "little"), 100),
        ((0).to_bytes(8, "little"), 100),
        ((2**63).to_bytes(8, "little"), 2**63 + 8),
    ],
)
def test_impossible_header_sizes_are_refused_before_anything_is_read(prefix: bytes, file_size: int) -> None:
    with pytest.raises(BadHeader):
        header_bytes(prefix, file_size)


CASES: dict[str, dict[str, object]] = {
    "unknown dtype": {"a": entry("F12")},
    "dtype of another type": {"a": entry(["F32"])},
    "sub-byte dtype": {"a": entry("F4", [4], 0, 2)},
    "shape does not multiply to the bytes": {"a": entry(shape=[3])},
    "product overflows 64 bits": {"a": entry(shape=[2**32, 2**32, 0, 1], end=0)},
    "huge product": {"a": entry(shape=[2**39] * 8)},
    "negative size": {"a": entry(shape=[-2])},
    "two negative sizes": {"a": entry(shape=[-1, -2])},
    "size is true": {"a": entry(shape=[True, 2])},
    "size is a float": {"a": entry(shape=[2.0])},
    "size is text": {"a": entry(shape=["2"])},
    "nine dimensions": {"a": entry(shape=[1] * 8 + [2])},
    "shape is an object": {"a": entry(shape={})},
    "offsets run backwards": {"a": entry(begin=8, end=0)},
    "offsets are negative": {"a": entry(begin=-8, end=0)},
    "offset above 64 bits": {"a": entry(begin=0, end=2**70)},
    "three offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
    "a field is missing": {"a": {"dtype": "F32", "shape": [2]}},
    "a field too many": {"a": {**entry(), "file": "/etc/passwd"}},
    "tensor is a list": {"a": [1, 2]},
    "tensors overlap": {"a": entry(), "b": entry(begin=4, end=12)},
    "same bytes twice": {"a": entry(), "b": entry()},
    "a hole": {"a": entry(), "b": entry(begin=12, end=20)},
    "starts late": {"a": entry(begin=4, end=12)},
    "trailing bytes": {"a": entry(shape=[1], end=4)},
    "beyond the file": {"a": entry(shape=[4], end=16)},
    "no tensors but bytes": {},
    "name climbs (safetensors accepts)": {"../../etc/x": entry()},
    "absolute name": {"/etc/x": entry()},
    "dots in the name": {"a..b": entry()},
    "empty name": {"": entry()},
    "control characters": {"a\n\x00b": entry()},
    "look-alike letters": {"wеight": entry()},
    "long name": {"a" * 257: entry()},
    "metadata is a list": {"__metadata__": ["x"], "a": entry()},
    "metadata holds objects": {"__metadata__": {"a": {"b": "c"}}, "a": entry()},
}


@pytest.mark.parametrize("case", list(CASES))
def test_lying_headers_are_refused(case: str) -> None:
    refuse(json.dumps(CASES[case]).encode())


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"  ",
        b"[]",
        b"null",
        b"{" * 50_000,
        b'{"a":' * 20_000,
        b"[" * 90_000,
        b'{"a": NaN}',
        b'{"a": 1' + b"0" * 100_000 + b"}",
        b'\xff\xfe{"a": 1}',
        b'{"a": 1} {"b": 2}',
        b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
    ],
)
def test_broken_json_is_refused(header: bytes) -> None:
    refuse(header)


def test_duplicate_keys_are_refused() -> None:
    """safetensors keeps the last one; two readers could then see two models."""
    one = json.dumps(entry())
    assert "twice" in refuse(f'{{"a": {one}, "a": {one}}}'.encode())
    assert "twice" in refuse(b'{"a": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}')


def test_one_tensor_too_many_is_refused_and_the_limit_itself_is_not() -> None:
    rows = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(TENSORS_MAX)}
    header = json.dumps(rows).encode()
    assert len(parse_header(header, "m", 8 + len(header))) == TENSORS_MAX
    rows["one_more"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    assert str(TENSORS_MAX) in refuse(json.dumps(rows).encode(), 0)


# Each makes a header close to the size limit out of the JSON that costs a parser the most memory.
BOMBS = {
    "a million tensors": "b'{' + b','.join(b'\"t%d\":{}' % i for i in range(1_000_000)) + b'}'",
    "empty lists": "b'{\"a\":[' + b'[],' * 5_000_000 + b'[]]}'",
    "small numbers": "b'{\"a\":[' + b'7,' * 8_000_000 + b'7]}'",
    "empty objects": "b'{\"a\":[' + b'{},' * 5_000_000 + b'{}]}'",
    "metadata": "b'{\"__metadata__\":{' + b','.join(b'\"%d\":\"\"' % i for i in range(1_400_000)) + b'}}'",
    "one long text": "b'{\"__metadata__\":{\"a\":\"' + b'x' * 16_000_000 + b'\"}}'",
}
BOMB_SCRIPT = """
import resource, sys, time
from packer.layout import BadHeader, parse_header
header = {expression}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, started = peak(), time.monotonic()
try:
    parse_header(header, "evil.safetensors", 2**40)
except BadHeader:
    print(peak() - before, time.monotonic() - started)
"""


@pytest.mark.parametrize("bomb", list(BOMBS))
def test_header_bombs_are_refused_in_bounded_memory_and_time(bomb: str) -> None:
    """At most four times the header's own limit on top, whatever the header says."""
    script = BOMB_SCRIPT.replace("{expression}", BOMBS[bomb])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    grown_kib, seconds = done.stdout.split()
    assert int(grown_kib) * 1024 <= 4 * HEADER_BYTES_MAX
    assert float(seconds) < 5


@given(st.binary(max_size=400))
def test_random_bytes_never_raise_anything_else(header: bytes) -> None:
    try:
        parse_header(header, "m", 8 + len(header))
    except BadHeader:
        return
    assert json.loads(header) in ({}, {"__metadata__": {}})


@given(st.data())
def test_mutated_headers_parse_to_a_valid_layout_or_are_refused(data: st.DataObject) -> None:
    file = safetensors_bytes([("a.weight", "F32", [2, 3], bytes(24)), ("b.1.x", "BF16", [5], bytes(10))])
    header, size = split_safetensors(file)
    changed = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.sampled_from(b'0123456789-{}[]":,.aF\x00\xff'))
    try:
        tensors = parse_header(bytes(changed), "m", size)
    except BadHeader:
        return
    assert sum(tensor.nbytes for tensor in tensors) == size - 8 - len(header)
    lay_out(tensors)
