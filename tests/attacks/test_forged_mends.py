"""Threat: a node of the cluster that gives other bytes for a bad chunk, with the tags of the right ones.

A tag of AES-GCM binds bytes only for those who do not have the key, and every node that has a pack has its
key. Covers: a forged chunk in a mended pack, before and after, and in a file that other packs need. Does not
cover: whole packs (``test_forged_packs``), lies without the key (``test_orders_tiers``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from itertools import accumulate
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from running_hands import Hands, close_hands, flip, nursery, open_hands, plan
from running_workers import Known
from test_orders_sharing import first, second

from agent.spawning import Nursery
from packer.codec import wire_sizes
from packer.events import Restored, RestoreFailed
from packer.index import StoredChunk
from packer.layout import ChunkSpan
from packer.pack import PackReader
from packer.types import ModelRef, Tier

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]
__all__ = ["first", "nursery", "second"]  # fixtures
BLOCK_BYTES = 16


@pytest_asyncio.fixture(loop_scope="module")
async def hands(nursery: Nursery, tmp_path: Path) -> AsyncIterator[Hands]:
    hands = await open_hands(nursery, tmp_path)
    yield hands
    await close_hands(hands)


def times(left: bytes, right: bytes) -> bytes:
    """The product in the field of GCM, whose lowest coefficient is the first bit."""
    product, factor, each = 0, int.from_bytes(right), int.from_bytes(left)
    for bit in range(127, -1, -1):
        product ^= factor if each >> bit & 1 else 0
        factor = factor >> 1 ^ (0xE1 << 120 if factor & 1 else 0)
    return product.to_bytes(BLOCK_BYTES)


def plain_plane(span: ChunkSpan, chunk: StoredChunk) -> int:
    """Where in the extent the largest plane starts that is stored as it is: all bytes of it are weights."""
    sizes = [plane.nbytes for plane in chunk.planes]
    starts = list(accumulate(sizes, initial=0))
    wire = wire_sizes(chunk.codec_id, sizes, span.nbytes)
    return max(
        (size, start) for size, start, plain in zip(sizes, starts, wire, strict=False) if size == plain
    )[1]


def forged(pack_key: bytes, extent: bytes, at: int) -> bytes:
    """Other bytes with the same tag: what changes in one block is made up for in the next."""
    cipher = Cipher(algorithms.AES(pack_key), modes.ECB()).encryptor()
    change = bytes([1]) + bytes(BLOCK_BYTES - 1)
    change += times(change, cipher.update(bytes(BLOCK_BYTES)))
    end = at + len(change)
    return extent[:at] + bytes(a ^ b for a, b in zip(extent[at:end], change, strict=True)) + extent[end:]


async def lie(hands: Hands, model: Known, whole: bytes) -> list[int]:
    """From now on another node gives forged chunks of this pack; returns what it will have been asked for."""
    asked: list[int] = []
    journal = hands.orders._journal
    key = await journal.call(journal.journal.data_key, model.ref)
    descriptor = hands.packs.open(model.ref)
    reader = PackReader(descriptor, key, model.ref, bases=None)
    os.close(descriptor)
    chunks = dict(enumerate(reader.index.chunks))
    numbers = {chunk.offset: number for number, chunk in chunks.items() if chunk.same_as is None}

    async def fetch_extent(ref: ModelRef, salt: bytes, offset: int, nbytes: int) -> bytes | None:
        asked.append(offset)
        number = numbers[offset]
        at = plain_plane(reader.index.layout.chunks[number], chunks[number])
        return forged(reader.pack_key(None), whole[offset : offset + nbytes], at)

    hands.orders.repairs.fetch_extent = fetch_extent
    return asked


async def test_a_forged_chunk_has_the_tags_and_never_serves(hands: Hands, first: Known) -> None:
    plan(hands, first)
    await hands.load(first)
    await hands.evict(first)
    asked = await lie(hands, first, flip(hands, first, 0.5))
    failed = await hands.restore(first, Tier.DISK)
    assert isinstance(failed, RestoreFailed)
    assert failed.corrupt
    assert len(asked) == 1
    # Its tags were right, so nothing was mended a second time; and the next start gives the pack up.
    assert hands.notes == [("chunk_corrupt", 1), ("chunk_repaired", 1)]
    journal = hands.orders._journal
    assert await journal.call(journal.journal.remove_unproven) == [first.ref]


async def test_nothing_of_others_comes_into_a_file_that_other_packs_need(
    hands: Hands, first: Known, second: Known
) -> None:
    """They would not be proven."""
    for model in (first, second):
        plan(hands, model)
        await hands.load(model)
    wanted = await hands.answer(first)
    await hands.evict(first)
    asked = await lie(hands, first, whole := flip(hands, first, 0.5))
    assert isinstance(await hands.restore(first, Tier.DISK), Restored)
    assert await hands.answer(first) == wanted
    assert asked == []
    assert hands.packs.path(first.ref).read_bytes() == whole
