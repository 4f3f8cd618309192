"""Keys and seals: only the right key, owner and place open what was sealed, and nonces never repeat.

Does not cover whole files (test_pack) or keys at rest (the agent's journal).
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer.seal import (
    KEY_BYTES,
    TAG_BYTES,
    WRAPPED_KEY_BYTES,
    BadSeal,
    ChunkSeal,
    Part,
    PartKind,
    derive_pack_key,
    new_key,
    new_salt,
    seal_context,
    unwrap_key,
    wrap_key,
)
from packer.types import ModelRef

PART = Part(PartKind.CHUNK, 3, 1, 4, 100, 4096)


def seal(part: Part, plain: bytes, key: bytes = bytes(32), context: bytes = b"c") -> bytearray:
    out = bytearray(len(plain) + TAG_BYTES)
    ChunkSeal(key, context).seal_into(part, memoryview(plain), memoryview(out))
    return out


def open_(part: Part, sealed: bytes, key: bytes = bytes(32), context: bytes = b"c") -> bytes:
    out = bytearray(len(sealed) - TAG_BYTES)
    ChunkSeal(key, context).open_into(part, memoryview(sealed), memoryview(out))
    return bytes(out)


def test_a_wrapped_key_opens_with_its_parent_and_owner_only() -> None:
    parent, key = new_key(), new_key()
    wrapped = wrap_key(parent, key, b"acme")
    assert len(wrapped) == WRAPPED_KEY_BYTES
    assert key not in wrapped
    assert unwrap_key(parent, wrapped, b"acme") == key
    for bad_parent, bad_owner in ((new_key(), b"acme"), (parent, b"evil")):
        with pytest.raises(BadSeal):
            unwrap_key(bad_parent, wrapped, bad_owner)
    with pytest.raises(BadSeal):
        unwrap_key(parent, wrapped[:-1], b"acme")


def test_every_bit_of_a_wrapped_key_counts() -> None:
    parent = new_key()
    wrapped = bytearray(wrap_key(parent, new_key(), b""))
    for bit in range(8 * len(wrapped)):
        wrapped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadSeal):
            unwrap_key(parent, bytes(wrapped), b"")
        wrapped[bit // 8] ^= 1 << bit % 8


def test_wrapping_twice_gives_different_bytes() -> None:
    parent, key = new_key(), new_key()
    assert wrap_key(parent, key, b"") != wrap_key(parent, key, b"")


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_keys_of_other_sizes_are_refused(size: int) -> None:
    for call in (
        lambda: wrap_key(bytes(size), bytes(32), b""),
        lambda: wrap_key(bytes(32), bytes(size), b""),
        lambda: unwrap_key(bytes(size), bytes(WRAPPED_KEY_BYTES), b""),
        lambda: derive_pack_key(bytes(size), new_salt()),
        lambda: derive_pack_key(bytes(32), bytes(size)),
        lambda: ChunkSeal(bytes(size), b""),
    ):
        with pytest.raises(ValueError, match=str(KEY_BYTES)):
            call()


def test_each_pack_file_has_its_own_key() -> None:
    data_key, salt = new_key(), new_salt()
    assert derive_pack_key(data_key, salt) == derive_pack_key(data_key, salt) != data_key
    assert derive_pack_key(data_key, salt) != derive_pack_key(data_key, new_salt())
    assert derive_pack_key(new_key(), salt) != derive_pack_key(data_key, salt)


@given(st.binary(max_size=300))
def test_sealing_and_opening_give_the_bytes_back(plain: bytes) -> None:
    sealed = seal(PART, plain)
    assert open_(PART, bytes(sealed)) == plain


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 100_003, 4 * 1024 * 1024])
def test_in_place_is_the_same_as_beside(size: int) -> None:
    plain = os.urandom(size)
    memory = bytearray(plain + bytes(TAG_BYTES))
    view = memoryview(memory)
    ChunkSeal(bytes(32), b"c").seal_into(PART, view[:size], view)
    assert memory == seal(PART, plain)
    ChunkSeal(bytes(32), b"c").open_into(PART, view, view[:size])
    assert memory[:size] == plain


def test_every_bit_of_a_sealed_part_counts() -> None:
    sealed = seal(PART, b"sixteen bytes or so")
    for bit in range(8 * len(sealed)):
        sealed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadSeal):
            open_(PART, bytes(sealed))
        sealed[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    "moved",
    [
        replace(PART, kind=PartKind.FILE),
        replace(PART, index=4),
        replace(PART, plane=0),
        replace(PART, codec_id=5),
        replace(PART, stored_bytes=101),
        replace(PART, raw_bytes=8192),
    ],
)
def test_a_part_opens_in_its_own_place_only(moved: Part) -> None:
    sealed = bytes(seal(PART, b"weights"))
    with pytest.raises(BadSeal):
        open_(moved, sealed)


def test_a_part_of_another_model_or_key_does_not_open() -> None:
    ref = ModelRef("acme", "m", "0" * 16)
    sealed = bytes(seal(PART, b"weights", context=seal_context(ref)))
    assert open_(PART, sealed, context=seal_context(ref)) == b"weights"
    for other in (replace(ref, tenant="evil"), replace(ref, name="n"), replace(ref, version="1" * 16)):
        with pytest.raises(BadSeal):
            open_(PART, sealed, context=seal_context(other))
    with pytest.raises(BadSeal):
        open_(PART, sealed, key=new_key(), context=seal_context(ref))


def test_refs_that_read_the_same_have_different_contexts() -> None:
    assert seal_context(ModelRef("a", "bc", "d")) != seal_context(ModelRef("ab", "c", "d"))


def test_no_two_parts_of_a_pack_share_a_nonce() -> None:
    parts = [Part(kind, index, plane) for kind in PartKind for index in range(300) for plane in range(4)]
    parts.append(Part(PartKind.CHUNK, 2**40, 3))
    assert len({part.nonce() for part in parts}) == len(parts)


def test_a_nonce_is_never_used_twice_even_by_racing_threads() -> None:
    """The same place with other bytes would give its plain text away."""
    sealer, outcomes, start = ChunkSeal(bytes(32), b""), [], threading.Barrier(4)

    def work() -> None:
        out = bytearray(16 + TAG_BYTES)
        start.wait()
        try:
            sealer.seal_into(PART, memoryview(bytes(16)), memoryview(out))
            outcomes.append(True)
        except ValueError:
            outcomes.append(False)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False, False, False, True]


def test_wrong_buffer_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="more"):
        ChunkSeal(bytes(32), b"").seal_into(PART, memoryview(bytes(4)), memoryview(bytearray(4)))
    with pytest.raises(BadSeal):
        ChunkSeal(bytes(32), b"").open_into(PART, memoryview(bytes(4)), memoryview(bytearray(4)))
