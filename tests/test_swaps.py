"""Very many swaps on real workers, files and a real journal: what is left of them.

Covers: memory, descriptors and threads after swaps through host and disk with bad chunks and killed workers
among them. Does not cover: one swap (``test_orders_tiers``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from running_hands import FORMS, Hands, flip, hands, llama, nursery, plan, replace_ref
from running_workers import Known

from packer.events import Drop, Packed, Restored, WorkerDied
from packer.types import MIB, HostForm, ModelRef, Tier

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]
__all__ = ["hands", "llama", "nursery"]  # fixtures


@FORMS
async def test_many_swaps_with_failures_leave_everything_as_it_was(
    hands: Hands, llama: Known, form: HostForm
) -> None:
    """Swaps through host and disk, bad chunks and killed workers among them: memory, descriptors and threads
    are back to where they were, here and in the worker."""
    hands.orders.host_form = form
    other = replace_ref(hands, llama)
    plan(hands, llama)
    packed = {model.ref: await hands.load(model) for model in (llama, other)}
    wanted = await hands.answer(llama)
    before = await rounds(hands, (llama, other), packed, wanted, 15)
    after = await rounds(hands, (llama, other), packed, wanted, 45)
    assert after.agent_fds == before.agent_fds
    assert after.worker_fds == before.worker_fds
    assert after.worker_threads <= before.worker_threads
    assert after.worker_rss_bytes <= before.worker_rss_bytes + 8 * MIB
    assert after.segment_bytes == before.segment_bytes == 0


@dataclass(frozen=True)
class Sizes:
    agent_fds: int
    worker_fds: int
    worker_threads: int
    worker_rss_bytes: int
    segment_bytes: int


async def rounds(
    hands: Hands, models: tuple[Known, ...], packed: dict[ModelRef, Packed], wanted: bytes, count: int
) -> Sizes:
    for turn in range(count):
        model = models[turn % len(models)]
        await hands.evict(model)
        if turn % 40 == 30:
            for other in models:
                await hands.evict(other)
            os.kill(hands.pids()[0], 9)
            await hands.next(WorkerDied)
            for other in models:
                if other is not model:
                    assert isinstance(await hands.restore(other, Tier.DISK), Restored)
        if turn % 10 == 5:
            flip(hands, model, 0.5)
        host_bytes = packed[model.ref].host_bytes
        assert isinstance(await hands.restore(model, Tier.DISK, host_bytes=host_bytes), Restored)
        await hands.evict(model, 1)
        assert isinstance(await hands.restore(model, Tier.HOST, first_chunk=1), Restored)
        assert await hands.answer(model) == wanted
        await hands.orders.drop(Drop(model.ref, Tier.HOST, 3))
    for model in models:
        await hands.evict(model)
    (pid,) = hands.pids()
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return Sizes(
        len(os.listdir("/proc/self/fd")),
        len(os.listdir(f"/proc/{pid}/fd")),
        int(status["Threads"]),
        int(status["VmRSS"].split()[0]) * 1024,
        hands.segments.allocated_bytes() + hands.segments.lent_bytes(),
    )
