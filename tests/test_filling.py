"""Host segments that are filled ahead of need, on real workers, files and a real journal.

Covers: that the copy is all that a restore needs, and what is left of a fill that is told to stop, also
before it began, or that can not be done. Does not cover: when a copy is filled (``test_prefetch``).
"""

from __future__ import annotations

import asyncio

import pytest
from running_hands import Hands, flip, hands, minilm, nursery, plan
from running_workers import Known

from agent.devices import DeviceConfig
from agent.spawning import Nursery
from agent.workers import WorkerHandle
from packer.events import Drop, Fill, Filled, FillFailed, Restored, StopFill
from packer.types import Tier

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]
__all__ = ["hands", "minilm", "nursery"]  # fixtures


async def test_a_copy_is_filled_ahead_of_need_in_a_process_that_is_gone_afterwards(
    hands: Hands, minilm: Known
) -> None:
    plan(hands, minilm)
    packed = await hands.load(minilm)
    wanted = await hands.answer(minilm)
    await hands.evict(minilm)
    before = hands.pids()
    order = Fill(minilm.ref, packed.host_bytes, 5)
    assert await hands.orders.fill(order) == Filled(minilm.ref, 5)
    assert hands.pids() == before
    assert hands.segments.allocated_bytes() == packed.host_bytes
    # Nobody can change it any more, and all that a restore needs is in it.
    await hands.orders.drop(Drop(minilm.ref, Tier.DISK, 4))
    assert isinstance(await hands.restore(minilm, Tier.HOST), Restored)
    assert await hands.answer(minilm) == wanted


async def test_what_is_told_to_stop_or_can_not_be_filled_leaves_no_segment(
    hands: Hands, minilm: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(hands, minilm)
    packed = await hands.load(minilm)
    await hands.evict(minilm)
    order = Fill(minilm.ref, packed.host_bytes, 5)
    fork = Nursery.fork

    async def stopped_meanwhile(self: Nursery, tenant: str, device: DeviceConfig) -> WorkerHandle:
        worker = await fork(self, tenant, device)
        hands.orders.stop_fill(StopFill(minilm.ref, 5))
        return worker

    with monkeypatch.context() as patch:
        patch.setattr(Nursery, "fork", stopped_meanwhile)
        answer = await hands.orders.fill(order)
    assert isinstance(answer, FillFailed)
    assert answer.stopped
    hands.orders.stop_fill(StopFill(minilm.ref, 5))  # it has ended: nothing happens
    order = Fill(minilm.ref, packed.host_bytes, 6)
    filling = asyncio.create_task(hands.orders.fill(order))
    hands.orders.stop_fill(StopFill(minilm.ref, 6))  # in the very moment: its task has not begun to run
    answer = await filling
    assert isinstance(answer, FillFailed)
    assert answer.stopped
    order = Fill(minilm.ref, packed.host_bytes, 7)
    whole = flip(hands, minilm, 0.5)
    answer = await hands.orders.fill(order)
    assert isinstance(answer, FillFailed)
    assert not answer.stopped
    assert hands.segments.allocated_bytes() == 0
    # The pack stays as it is, for the next restore to mend.
    assert hands.packs.path(minilm.ref).read_bytes() != whole
    assert isinstance(await hands.restore(minilm, Tier.DISK), Restored)
    hands.orders._unproven.add(minilm.ref)
    answer = await hands.orders.fill(order)
    assert isinstance(answer, FillFailed)
    hands.orders._unproven.discard(minilm.ref)
    hands.packs.path(minilm.ref).unlink()
    answer = await hands.orders.fill(order)
    assert isinstance(answer, FillFailed)
    assert answer.message == "No such file or directory", "tenants read it: it names no directory of the node"
