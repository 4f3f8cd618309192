"""Programs in a real worker process: bodies there and back, every tier, part of the weights gone.

Covers: a request's tensors through the agent's frames, the same bits after each way back, partial eviction,
and limits of a body. Does not cover: answers in detail (``test_export_engine``) or HTTP (``test_oip``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from export_model import write_model
from export_samples import SAMPLES, describe_program, infer_request, program_of, tensors_of, write_sample
from running_workers import KEY, Known, arena_bytes, load, packed, spawned
from torch import nn

from agent.facade import EngineError, EngineRequest
from agent.spawning import Nursery
from agent.workers import PackCopy, WorkerFailure, WorkerHandle
from packer.types import MIB, ModelRef

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]

WIDTH = 768


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[WorkerHandle]:
    nursery = Nursery(threads=1)
    await nursery.start()
    try:
        async with spawned(nursery) as worker:
            yield worker
    finally:
        await nursery.close()


def known_program(directory: Path, name: str) -> Known:
    return Known(directory, describe_program(directory, ModelRef("acme", name, "0" * 16)))


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return known_program(write_sample("cell", tmp_path_factory.mktemp("cell")), "cell")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Several chunks: eight square layers of 2.25 MiB."""
    torch.manual_seed(4)
    layers = [part for _ in range(8) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        nn.Sequential(*layers).eval(), (torch.randn(2, WIDTH),), dynamic_shapes=({0: batch},)
    )
    return known_program(write_model(program, tmp_path_factory.mktemp("deep"), ["x"], ["y"]), "deep")


async def ask(worker: WorkerHandle, model: Known, request: EngineRequest) -> dict[str, torch.Tensor]:
    (frame,) = [frame async for frame in worker.run(model.ref, request)]
    return tensors_of(frame)


async def test_tensors_cross_to_the_worker_and_back_with_the_same_bits(
    worker: WorkerHandle, cell: Known
) -> None:
    await load(worker, cell)
    inputs = SAMPLES["cell"].inputs(5)
    answer = await ask(worker, cell, infer_request(["x", "state"], inputs))
    with torch.inference_mode():
        for ours, theirs in zip(answer.values(), program_of("cell").module()(*inputs), strict=True):
            assert torch.equal(ours, theirs)
    request = infer_request(["x", "state"], inputs)
    with pytest.raises(EngineError, match="bytes, 239 were sent"):
        await ask(worker, cell, replace(request, body=request.body[:-1]))


async def test_a_program_lives_through_its_pack_and_without_some_of_its_weights(
    worker: WorkerHandle, deep: Known
) -> None:
    request = infer_request(["x"], [torch.randn(3, WIDTH)])
    async with packed(worker, deep) as pack:
        held_bytes = arena_bytes(worker)
        wanted = (await ask(worker, deep, request))["y"]
        chunks = len(deep.spec.chunk_bytes)
        assert chunks > 4
        for kept in (0, 1, chunks // 2, chunks - 1):
            await worker.evict(deep.ref, kept)
            gone_bytes = sum(deep.spec.chunk_bytes[kept:])
            assert held_bytes - arena_bytes(worker) > gone_bytes - 2 * MIB
            with pytest.raises(WorkerFailure, match="not resident"):
                await ask(worker, deep, request)
            done = await worker.restore(deep.spec, PackCopy(pack, KEY), kept)
            assert done.restored_bytes == gone_bytes
            assert torch.equal((await ask(worker, deep, request))["y"], wanted)


async def test_a_large_body_crosses_and_one_above_the_limit_is_refused(
    worker: WorkerHandle, deep: Known
) -> None:
    await worker.evict(deep.ref)
    await load(worker, deep)
    rows = 4 * MIB // (4 * WIDTH)
    inputs = torch.randn(rows, WIDTH)
    answer = await ask(worker, deep, infer_request(["x"], [inputs]))
    assert answer["y"].shape == (rows, WIDTH)
    body = os.urandom(16) + bytes(64 * MIB)
    with pytest.raises(EngineError, match="the limits are"):
        await ask(worker, deep, EngineRequest("infer", {"inputs": []}, body))
    assert (await ask(worker, deep, infer_request(["x"], [inputs[:1]])))["y"].shape == (1, WIDTH)
