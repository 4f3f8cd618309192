"""What a node does before it stops, on real workers, real files and a real journal.

Covers: packs of models that serve already. Does not cover: answers that are being written
(``test_failures``), the journal's parts (``test_flushing``) or a kill (``test_crash``).
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from running_hands import close_hands, nursery, open_hands, plan
from running_workers import DEVICE, PATIENCE_S, known
from tiny_models import copy_minilm

from agent.spawning import Nursery
from packer.events import Pack, Packed, Restored
from packer.types import GIB, Task, Tier

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]
__all__ = ["nursery"]  # a fixture


@pytest.mark.parametrize("when", ["beside the load", "of what lies on the device"])
async def test_a_pack_of_a_model_that_serves_is_finished(nursery: Nursery, tmp_path: Path, when: str) -> None:
    """Its origin may be away when the node starts again. A stop waits for it, and only for so long."""
    minilm = known(copy_minilm(tmp_path / "minilm"), "minilm", Task.EMBEDDING)
    hands = await open_hands(nursery, tmp_path)
    plan(hands, minilm)
    journal = hands.orders._journal
    busy = threading.Event()
    making = hands.orders._making
    publish = making.publish

    async def slowly(*args: object) -> int:
        # A disk that is slow to take the pack's row.
        journal._thread.submit(busy.wait)
        return await publish(*args)  # type: ignore[arg-type]

    making.publish = slowly  # type: ignore[method-assign, assignment]
    if when == "beside the load":
        restored = await hands.restore(minilm, Tier.ORIGIN, disk_bytes=GIB // 2, pack_order=7)
        assert isinstance(restored, Restored)
    else:
        assert isinstance(await hands.restore(minilm, Tier.ORIGIN), Restored)
        packing = asyncio.create_task(hands.orders.pack(Pack(minilm.ref, DEVICE.device, GIB // 2, 7)))
        packing.add_done_callback(lambda done: hands.posted.put_nowait(done.result()))
        await asyncio.sleep(0)
    await hands.orders.finish_packs(0)
    assert hands.posted.empty(), "not longer than it was told to"
    stopping = asyncio.create_task(hands.orders.finish_packs(PATIENCE_S))
    asyncio.get_running_loop().call_soon(busy.set)
    await stopping
    assert [row.ref for row in await journal.call(journal.journal.packs)] == [minilm.ref]
    assert isinstance(await hands.next(Packed), Packed)
    await close_hands(hands)
