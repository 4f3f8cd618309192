"""Orders on a real nursery's workers, real files and a real journal, for tests of one process.

Covers: opening and closing them, two small models, and damaging a pack. Does not cover: deciding which orders
are given (``test_residency``), or a whole node (``real_box``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import pytest_asyncio
from make_models import make_llama
from running_workers import DEVICE, PATIENCE_S, Known, known
from tiny_models import copy_minilm

from agent.facade import EngineRequest
from agent.journal import open_journal
from agent.journal_thread import JournalThread
from agent.orders import Orders
from agent.packs import PackDirectory
from agent.segments import HostSegments
from agent.spawning import Nursery
from packer.events import Event, Evict, Evicted, Packed, PackFailed, Restore, Restored
from packer.types import GIB, HostForm, ModelRef, ModelSpec, Task, Tier

FORMS = pytest.mark.parametrize("form", [HostForm.WIRE, HostForm.RAW])


@dataclass
class Hands:
    """Orders, what they posted and what they noted."""

    orders: Orders
    packs: PackDirectory
    segments: HostSegments
    specs: dict[ModelRef, ModelSpec]
    posted: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    notes: list[tuple[str, int]] = field(default_factory=list)

    async def next(self, kind: type[Event]) -> Event:
        """The next posted event of this kind."""
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(event := await self.posted.get(), kind):
                pass
        return event

    async def restore(self, model: Known, tier: Tier, **more: int) -> Event | None:
        return await self.orders.restore(Restore(model.ref, DEVICE.device, tier, order=1, **more))

    async def load(self, model: Known) -> Packed:
        """From the origin, with a pack beside it."""
        restored = await self.restore(model, Tier.ORIGIN, disk_bytes=GIB // 2, pack_order=7)
        assert isinstance(restored, Restored), restored
        packed = await self.next(Packed | PackFailed)  # type: ignore[arg-type]
        assert isinstance(packed, Packed), packed
        assert packed.order == 7
        return packed

    async def evict(self, model: Known, keep_chunks: int = 0) -> None:
        assert await self.orders.evict(Evict(model.ref, DEVICE.device, keep_chunks, 2)) == Evicted(
            model.ref, DEVICE.device, 2
        )

    async def answer(self, model: Known) -> bytes:
        op = "embed" if model.spec.task is Task.EMBEDDING else "generate"
        generate = {"prompt": "hello", "temperature": 0, "max_tokens": 8}
        fields = {"inputs": ["hello"]} if op == "embed" else generate
        request = EngineRequest(op, fields)  # type: ignore[arg-type]
        run = self.orders.run(model.ref, DEVICE.device, request, lambda nbytes: None)
        frames = [frame async for frame in run]
        return frames[0].body + "".join(str(frame.header.get("delta", "")) for frame in frames).encode()

    def pids(self) -> list[int]:
        return self.orders.roster.pids()[DEVICE.device]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    nursery = Nursery(threads=1)
    await nursery.start()
    try:
        yield nursery
    finally:
        await nursery.close()


async def open_hands(nursery: Nursery, folder: Path) -> Hands:
    async def fetch(spec: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        raise AssertionError("control must not be asked")
        yield b""  # type: ignore[unreachable]

    specs: dict[ModelRef, ModelSpec] = {}
    packs, segments = PackDirectory(folder / "packs"), HostSegments()
    journal = JournalThread(open_journal(folder))
    orders = Orders(
        nursery,
        {DEVICE.device: DEVICE},
        packs,
        segments,
        journal,
        fetch,
        lambda ref: specs[ref],
        lambda: 0,
        host_form=HostForm.WIRE,
    )
    hands = Hands(orders, packs, segments, specs)
    orders.post = hands.posted.put_nowait
    orders.repairs.note = lambda kind, ref, detail, count: hands.notes.append((kind, count))
    return hands


async def close_hands(hands: Hands) -> None:
    await hands.orders.close()
    hands.segments.close()
    hands.orders._journal.close()


@pytest_asyncio.fixture(loop_scope="module")
async def hands(nursery: Nursery, tmp_path: Path) -> AsyncIterator[Hands]:
    hands = await open_hands(nursery, tmp_path)
    yield hands
    await close_hands(hands)


@pytest.fixture
def minilm(tmp_path: Path) -> Known:
    return known(copy_minilm(tmp_path / "minilm"), "minilm", Task.EMBEDDING)


@pytest.fixture
def llama(tmp_path: Path) -> Known:
    """Several chunks in a few megabytes."""
    directory = make_llama(tmp_path / "llama", 2, hidden=256, layers=2, heads=4)
    return known(directory, "llama", Task.GENERATION)


def plan(hands: Hands, *models: Known) -> None:
    for model in models:
        hands.specs[model.ref] = model.spec


def flip(hands: Hands, model: Known, *shares: float) -> bytes:
    """Turn a bit at each share of the file that holds the pack's extents; returns the file as it was."""
    path = [*hands.packs.base_paths(model.ref), hands.packs.path(model.ref)][0]
    whole = path.read_bytes()
    with path.open("r+b") as file:
        for share in shares:
            at = int(len(whole) * share)
            file.seek(at)
            file.write(bytes([whole[at] ^ 1]))
    return whole


def replace_ref(hands: Hands, model: Known) -> Known:
    """Another model of the same bytes."""
    other = Known(model.directory, replace(model.spec, ref=replace(model.ref, name="other")))
    plan(hands, other)
    return other
