"""Threat: any bytes at all in the place of a pack's header, its index or a chunk's planes.

hypothesis draws them: plain noise, valid forms with some bytes changed, and well-formed MessagePack of the
wrong shape. The parsers must refuse with their own error or give a value that passes every check, and never
write outside of their destination. Cases made with care are in test_hostile_packs.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_samples import MemoryImage, every_codec_model, host_bytes, memory_file, pack_bytes, weights

from packer.codec import BadPlanes, CodecId, Workspace, decode_into, encode, has_wire_form, to_wire
from packer.host_segment import host_sizes
from packer.index import (
    HEADER_BYTES,
    PackError,
    PackHeader,
    decode_header,
    decode_index,
    encode_header,
    encode_index,
    up_to_page,
)
from packer.layout import check_layout
from packer.pack import PackReader
from packer.tiers import TierError, restore
from packer.types import HostForm

# Bounded, so that the suite's time is: more examples are a matter of running it longer.
EXAMPLES = 300
SEGMENT = host_bytes(HostForm.STORED, pack_bytes(model=every_codec_model()))
HEADER = decode_header(SEGMENT[:HEADER_BYTES], len(SEGMENT))
INDEX = SEGMENT[HEADER.index_offset :][: HEADER.index_bytes]
BODY = SEGMENT[HEADER_BYTES : HEADER.index_offset]

changes = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8)
msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=40)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=30,
)


def changed(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    body = bytearray(data)
    for at, value in edits:
        body[at % len(body)] = value
    return bytes(body)


# --- header ---------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=HEADER_BYTES + 1), st.integers(0, 2**40))
def test_noise_is_no_header(page: bytes, size_bytes: int) -> None:
    for candidate in (page, page.ljust(HEADER_BYTES, b"\0")[:HEADER_BYTES], b"BUNKPACK" + page):
        with pytest.raises(PackError) as caught:
            decode_header(candidate, size_bytes)
        assert caught.value.corrupt


@settings(max_examples=EXAMPLES, deadline=None)
@given(changes, st.integers(0, 2**40))
def test_changed_headers_with_a_right_digest_are_refused_or_in_bounds(
    edits: list[tuple[int, int]], size_bytes: int
) -> None:
    page = changed(SEGMENT[: HEADER_BYTES - 32], edits)
    page += hashlib.sha256(page).digest()
    for size in (size_bytes, len(SEGMENT)):
        try:
            header = decode_header(page, size)
        except PackError as error:
            if not error.corrupt:
                raise
            continue
        assert HEADER_BYTES <= header.index_offset < header.file_bytes <= size
        assert header.index_offset + up_to_page(header.index_bytes) == header.file_bytes
        assert decode_header(encode_header(header), size) == header


# --- index ----------------------------------------------------------------------------------------


def check_index(data: bytes) -> None:
    """Refused as corrupt, or an index that holds together and can be written again."""
    header = replace(HEADER, index_bytes=len(data), file_bytes=HEADER.index_offset + up_to_page(len(data)))
    try:
        index = decode_index(data, header)
    except PackError as error:
        if not error.corrupt:
            raise
        return
    check_layout(index.layout)
    assert decode_index(encode_index(index), header) == index
    try:
        sizes = host_sizes(index)
    except PackError as error:
        if not error.corrupt:
            raise
        return
    assert min(sizes.stored_bytes, sizes.wire_bytes, sizes.raw_bytes) > HEADER_BYTES


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=2000))
def test_noise_is_no_index(data: bytes) -> None:
    check_index(data)


@settings(max_examples=EXAMPLES, deadline=None)
@given(msgpack_values)
def test_messagepack_of_another_shape_is_no_index(value: object) -> None:
    check_index(msgspec.msgpack.encode(value))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 9), msgpack_values, st.data())
def test_an_index_with_any_field_replaced_is_refused_or_holds_together(
    field: int, value: object, data: st.DataObject
) -> None:
    index = msgspec.msgpack.decode(INDEX)
    if isinstance(index[field], list) and index[field] and data.draw(st.booleans()):
        row = index[field][data.draw(st.integers(0, len(index[field]) - 1))]
        if isinstance(row, list):
            row[data.draw(st.integers(0, len(row) - 1))] = value
    else:
        index[field] = value
    check_index(msgspec.msgpack.encode(index))


@settings(max_examples=EXAMPLES, deadline=None)
@given(changes)
def test_an_index_with_bytes_changed_is_refused_or_holds_together(edits: list[tuple[int, int]]) -> None:
    check_index(changed(INDEX, edits))


@settings(max_examples=100, deadline=None)
@given(changes)
def test_segments_with_changed_indexes_restore_or_are_refused(edits: list[tuple[int, int]]) -> None:
    """The whole way: whatever passes the checks is restored within the bounds of its image."""
    index = changed(INDEX, edits)
    header = PackHeader(
        False,
        HEADER.salt,
        HEADER.index_offset,
        len(index),
        HEADER.file_bytes,
        HEADER.index_tag,
        hashlib.sha256(index).digest(),
    )
    whole = encode_header(header) + BODY + index.ljust(up_to_page(len(index)), b"\0")
    with memory_file(whole) as fd:
        try:
            reader = PackReader(fd, None)
            image = MemoryImage(reader.index.layout.image_bytes)
            restore(reader, image)
        except (PackError, TierError) as error:
            if not error.corrupt:
                raise
            return
        assert len(image.bytes) == reader.index.layout.image_bytes


# --- planes ---------------------------------------------------------------------------------------

ENCODED = {
    dtype: encode(dtype, memoryview(weights(dtype, 8192 * 8 // bits, 3)))
    for dtype, bits in (("BF16", 16), ("F16", 16), ("F32", 32), ("F8_E4M3", 8), ("U8", 8))
}


def decode_guarded(codec_id: int, planes: list[bytes], raw_bytes: int) -> None:
    """Decodes to exactly its destination or raises ``BadPlanes``; what lies beside keeps its bytes."""
    memory = memoryview(bytearray(b"\x5a" * (raw_bytes + 128)))
    workspace = Workspace()
    with suppress(BadPlanes):
        decode_into(codec_id, planes, memory[64 : 64 + raw_bytes], workspace)
    assert memory[:64] == memory[64 + raw_bytes :] == b"\x5a" * 64
    if has_wire_form(codec_id):
        with suppress(BadPlanes):
            to_wire(codec_id, planes, raw_bytes, memory[64 : 64 + raw_bytes], workspace)
        assert memory[:64] == memory[64 + raw_bytes :] == b"\x5a" * 64


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.integers(0, 12),
    st.lists(st.binary(max_size=300) | st.sampled_from([b"", bytes(8), bytes(32), bytes(64)]), max_size=5),
    st.sampled_from([0, 1, 2, 6, 8, 64, 128, 4096]),
)
def test_noise_for_planes_decodes_nowhere_else(codec_id: int, planes: list[bytes], raw_bytes: int) -> None:
    decode_guarded(codec_id, planes, raw_bytes)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.sampled_from(sorted(ENCODED)),
    st.integers(0, 3),
    changes,
    st.integers(0, 40),
    st.sampled_from([8192, 8191, 8190, 8188, 4096, 16384]),
)
def test_changed_planes_decode_nowhere_else(
    dtype: str, which: int, edits: list[tuple[int, int]], cut: int, raw_bytes: int
) -> None:
    encoded = ENCODED[dtype]
    planes = list(encoded.planes)
    which %= len(planes)
    if planes[which]:
        planes[which] = changed(planes[which], edits)[: max(0, len(planes[which]) - cut)]
    decode_guarded(encoded.codec_id, planes, raw_bytes)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_changed_frames_and_escape_headers_decode_nowhere_else(data: st.DataObject) -> None:
    """The first bytes of a frame or of an escape plane hold its sizes: changing them is where lies are."""
    encoded = ENCODED[data.draw(st.sampled_from(sorted(ENCODED)))]
    planes = list(encoded.planes)
    which = data.draw(st.integers(0, len(planes) - 1))
    head = data.draw(st.binary(max_size=16))
    planes[which] = head + planes[which][len(head) :]
    decode_guarded(encoded.codec_id, planes, 8192)


def test_the_samples_of_this_file_are_of_several_codecs() -> None:
    assert {encoded.codec_id for encoded in ENCODED.values()} >= {CodecId.N12, CodecId.N12_TOP, CodecId.RAW}
