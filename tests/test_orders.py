"""What a caller is told when the worker behind a granted request fails.

Covers: a worker that was replaced between the grant and the run, and an engine that broke. Does not cover:
workers themselves (``test_worker``) or the statuses (``test_gateway``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from running_workers import DEVICE

from agent.facade import EngineFault, EngineFrame, EngineRequest, Refused
from agent.journal import Journal, load_node_key
from agent.journal_thread import JournalThread
from agent.orders import Orders
from agent.packs import PackDirectory
from agent.segments import HostSegments
from agent.spawning import Nursery
from agent.workers import WorkerFailure, WorkerHandle
from packer.events import RefusalReason
from packer.types import ALONE, Batching, ModelRef, ModelSpec, Task

REF = ModelRef("acme", "minilm", "0" * 16)
SPEC = ModelSpec(REF, "control:", (), "transformers", Task.EMBEDDING, 4096, (4096,), 0, 1)


class Failing(WorkerHandle):
    """A worker whose every answer is one failure."""

    def __init__(self, failure: WorkerFailure) -> None:
        self.failure = failure

    async def run(
        self,
        ref: ModelRef,
        request: EngineRequest,
        took: Callable[[int], None] = lambda device_ms: None,
        batching: Batching = ALONE,
    ) -> AsyncIterator[EngineFrame]:
        raise self.failure
        yield  # type: ignore[unreachable]  # makes this a generator


async def run(folder: Path, failure: WorkerFailure) -> None:
    async def fetch(spec: ModelSpec, path: str) -> AsyncIterator[bytes]:
        yield b""

    journal = Journal(folder / "journal.db", load_node_key(folder / "seal.key"))
    thread = JournalThread(journal)
    packs = PackDirectory(folder / "packs")
    devices = {DEVICE.device: DEVICE}
    orders = Orders(Nursery(1), devices, packs, HostSegments(), thread, fetch, lambda ref: SPEC, lambda: 0)
    orders.roster.workers[(REF.tenant, DEVICE.device)] = Failing(failure)
    try:
        async for _ in orders.run(REF, DEVICE.device, EngineRequest("embed"), lambda ms: None):
            raise AssertionError("nothing can be answered")
    finally:
        thread.close()


@pytest.mark.asyncio
async def test_a_replaced_worker_is_a_dead_one(tmp_path: Path) -> None:
    """The new process does not have the model; the caller is told to come again, not that we broke."""
    with pytest.raises(Refused) as refused:
        await run(tmp_path, WorkerFailure("acme/minilm is not resident in this worker", gone=True))
    assert refused.value.reason is RefusalReason.WORKER_DIED
    assert refused.value.retry_ms


@pytest.mark.asyncio
async def test_a_broken_engine_is_named_without_quoting_the_caller(tmp_path: Path) -> None:
    """The text of its error may hold the input; its kind does not."""
    with pytest.raises(EngineFault, match="RuntimeError") as fault:
        await run(tmp_path, WorkerFailure("RuntimeError: canary"))
    assert "canary" not in str(fault.value)
