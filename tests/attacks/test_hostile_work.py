"""Threat: a model or request that never ends or takes all memory, in a real worker.

Covers: a tokenizer that looks for a word for ever after its caller has left, one whose expression gives up,
and a normaliser that makes a terabyte of four letters: only that tenant's process ends, if any. Does not
cover: chat templates (``test_model_programs``) or when a worker counts as stuck (``test_due``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from running_workers import DEVICE, PATIENCE_S
from tiny_models import describe, opened, tiny_gpt2

import agent.due
import agent.spawning
import agent.workers
from agent.facade import EngineError, EngineRequest
from agent.spawning import Nursery
from agent.workers import WorkerDead, WorkerFailure, WorkerHandle
from packer.types import MIB, ModelRef, ModelSpec, Task

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    started = Nursery(threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.spawning, "HEAP_BYTES_MAX", 256 * MIB)
        await started.start()
        yield started
        await started.close()


def tokenizer_with(directory: Path, **parts: Any) -> Path:
    tiny_gpt2(directory)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return directory


async def loaded(nursery: Nursery, tenant: str, directory: Path) -> tuple[WorkerHandle, ModelSpec]:
    spec = describe(directory, ModelRef(tenant, "m", "0" * 16), Task.GENERATION)
    worker = await nursery.spawn(tenant, DEVICE)
    with opened(directory, spec) as descriptors:
        await worker.load_origin(spec, descriptors)
    return worker, spec


async def generate(worker: WorkerHandle, spec: ModelSpec, prompt: str) -> int:
    request = EngineRequest("generate", {"prompt": prompt, "max_tokens": 2})
    return len([frame async for frame in worker.run(spec.ref, request)])


async def test_a_worker_that_computes_for_nobody_is_ended(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.due, "LEFT_SECONDS_MAX", 0.5)
    monkeypatch.setattr(agent.workers, "PULSE_S", 1.0)
    words = {"type": "WordPiece", "unk_token": "u", "continuing_subword_prefix": "##"}
    words |= {"max_input_chars_per_word": 1_000_000, "vocab": {"u": 0, "x": 1, "##x": 2}}
    parts = {"model": words, "pre_tokenizer": None, "normalizer": None, "added_tokens": []}
    evil, spec = await loaded(nursery, "evil", tokenizer_with(tmp_path / "evil", **parts))
    good, plain = await loaded(nursery, "acme", tiny_gpt2(tmp_path / "good"))
    # Each letter is looked for behind every longer piece: the cube of their number.
    asked = asyncio.create_task(generate(evil, spec, "x" * 20_000))
    await asyncio.wait({asked}, timeout=0.5)
    assert not asked.done()
    asked.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await evil.died.wait()
    assert await generate(good, plain, "hello") >= 1
    await good.close()


async def test_a_tokenizer_that_panics_fails_its_request_alone(nursery: Nursery, tmp_path: Path) -> None:
    """An expression that backtracks too long is given up with a panic, which no ``except Exception`` sees."""
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    worker, spec = await loaded(nursery, "evil", tokenizer_with(tmp_path / "evil", pre_tokenizer=split))
    for _ in range(2):
        with pytest.raises(WorkerFailure):
            async with asyncio.timeout(PATIENCE_S):
                await generate(worker, spec, "x" * 60)
    assert await generate(worker, spec, "hello") >= 1
    await worker.close()


async def test_a_worker_has_no_more_memory_than_its_heap(nursery: Nursery, tmp_path: Path) -> None:
    tenfold = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    bomb = {"type": "Sequence", "normalizers": [tenfold] * 12}
    evil, spec = await loaded(nursery, "evil", tokenizer_with(tmp_path / "evil", normalizer=bomb))
    with pytest.raises((WorkerDead, WorkerFailure, EngineError)):
        async with asyncio.timeout(PATIENCE_S):
            await generate(evil, spec, "aaaa")
    await evil.close()
