"""Workers as real processes: forked by a real nursery, asked for answers, looked at, and killed.

Covers: requests and cancelling, what a worker can see, and the death of one. Does not cover: how models get
there (``test_worker_moves``), the engine's answers in detail (``test_engines``), the deaths of agent and
nursery and broken protocols (``test_worker_ends``), or who gives the orders (``test_loop``).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from make_models import make_gpt2
from running_workers import (
    DEVICE,
    PATIENCE_S,
    Known,
    arena_bytes,
    ask,
    known,
    load,
    spawned,
    tell,
    until_gone,
)
from tiny_models import tiny_classifier, tiny_llama

from agent.facade import JSON, EngineError, EngineRequest
from agent.spawning import Nursery
from agent.workers import WorkerDead, WorkerFailure, WorkerHandle
from packer.types import ALONE, MIB, Batching, ModelRef, Task

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return known(tiny_llama(tmp_path_factory.mktemp("llama")), "llama", Task.GENERATION)


@pytest.fixture(scope="module")
def storyteller(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Slow enough that an answer is still being made when its first piece arrives."""
    directory = tmp_path_factory.mktemp("storyteller")
    make_gpt2(directory, 5, hidden=128, layers=4, heads=4, positions=2048)
    return known(directory, "storyteller", Task.GENERATION)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    os.environ["BUNK_TEST_SECRET"] = "do not inherit"
    nursery = Nursery(threads=1)
    await nursery.start()
    try:
        yield nursery
    finally:
        del os.environ["BUNK_TEST_SECRET"]
        await nursery.close()


@pytest_asyncio.fixture(loop_scope="module")
async def worker(nursery: Nursery) -> AsyncIterator[WorkerHandle]:
    async with spawned(nursery) as worker:
        yield worker


# --- standbys -------------------------------------------------------------------------------------


async def test_a_standby_becomes_the_worker_of_the_next_tenant_and_is_replaced(llama: Known) -> None:
    nursery = Nursery(threads=1, standbys=1)
    await nursery.start()
    try:
        nursery.keep_standbys(DEVICE)
        await nursery.refilled(DEVICE.device)
        (ready,) = nursery.standby_pids(DEVICE.device)
        first = await nursery.spawn("acme", DEVICE)
        assert (first.pid, first.tenant) == (ready, "acme")
        await load(first, llama)
        assert await tell(first, llama, max_tokens=3)
        await nursery.refilled(DEVICE.device)
        (after,) = nursery.standby_pids(DEVICE.device)
        # One process per tenant, as ever.
        second = await nursery.spawn("globex", DEVICE)
        assert second.pid == after != ready
        # A standby that died meanwhile is nobody's trouble.
        await nursery.refilled(DEVICE.device)
        (third,) = nursery.standby_pids(DEVICE.device)
        os.kill(third, signal.SIGKILL)
        await until_gone(third)
        fresh = await nursery.spawn("initech", DEVICE)
        async with asyncio.timeout(PATIENCE_S):
            await fresh.ping()
        assert fresh.pid != third
        for worker in (first, second, fresh):
            await worker.close()
    finally:
        await nursery.close()
    assert nursery.standby_pids(DEVICE.device) == []


async def test_a_worker_that_has_a_tenant_takes_no_other(nursery: Nursery) -> None:
    async with spawned(nursery) as worker:
        worker.tenant = ""  # as an agent that lost its mind would have it
        with pytest.raises(WorkerDead):
            async with asyncio.timeout(PATIENCE_S):
                await worker.bind("globex")


# --- footprints -----------------------------------------------------------------------------------


async def test_a_worker_measures_what_requests_take_beside_the_weights(
    worker: WorkerHandle, storyteller: Known
) -> None:
    """A long input takes more than a short one, and neither is blamed for the weights."""
    await load(worker, storyteller)
    seen: list[tuple[ModelRef, int]] = []
    worker.on_workspace = lambda ref, nbytes: seen.append((ref, nbytes))
    # The first request also brings in code and threads for good, and is not measured while the load ends.
    # What a request took is told before the next one's answer.
    for words in (1, 1, 1, 900, 1):
        await tell(worker, storyteller, prompt="word " * words, max_tokens=1)
    assert {ref for ref, _ in seen} == {storyteller.ref}
    peaks = [peak_bytes for _, peak_bytes in seen]
    large = peaks.index(max(peaks))
    assert large >= 2
    # Attention and activations of 1,800 tokens in four layers of width 128 are some megabytes.
    assert peaks[large] > peaks[large - 1] + 2 * MIB
    assert peaks[large] < 512 * MIB


# --- requests -------------------------------------------------------------------------------------


async def test_requests_that_share_passes_keep_their_own_answers(
    worker: WorkerHandle, tmp_path: Path
) -> None:
    """And with the settings that a model is pushed with, each has its bits however many ask at once."""
    model = known(tiny_classifier(tmp_path), "classifier", Task.CLASSIFICATION)
    await load(worker, model)
    texts = [("hello " * (1 + place % 7)).strip() for place in range(24)]

    async def scores(text: str, batching: Batching = ALONE) -> tuple[bytes, JSON]:
        request, took = EngineRequest("classify", {"inputs": [text]}), list[int]()
        (frame,) = [frame async for frame in worker.run(model.ref, request, took.append, batching)]
        assert took != []
        return frame.body, frame.header["prompt_tokens"]

    alone = [await scores(text) for text in texts]
    assert await asyncio.gather(*map(scores, texts)) == alone
    joined = await asyncio.gather(*(scores(text, Batching(8, delay_ms=2)) for text in texts))
    for (body, tokens), (wanted, wanted_tokens) in zip(joined, alone, strict=True):
        assert tokens == wanted_tokens
        assert np.allclose(np.frombuffer(body, "<f4"), np.frombuffer(wanted, "<f4"), atol=2e-6, rtol=0)


async def test_bad_requests_are_answered_and_the_worker_lives(worker: WorkerHandle, llama: Known) -> None:
    await load(worker, llama)
    wanted = await tell(worker, llama, max_tokens=9)
    bad: list[tuple[str, dict[str, JSON], str]] = [
        ("explode", {}, "invalid_request"),
        ("embed", {"inputs": ["x"]}, "invalid_request"),
        ("generate", {"prompt": "word " * 99}, "context_length_exceeded"),
        ("generate", {"tokens": [10**9]}, "invalid_request"),
        ("generate", {"tokens": "no"}, "invalid_request"),
        ("generate", {"prompt": "x" * (9 * MIB)}, "invalid_request"),
        ("generate", {"messages": [{"role": "user"}]}, "invalid_request"),
    ]
    for op, fields, code in bad:
        with pytest.raises(EngineError) as error:
            await ask(worker, llama, op, **fields)
        assert error.value.code == code
    stranger = replace(llama.spec, ref=ModelRef("acme", "stranger", "1" * 16))
    with pytest.raises(WorkerFailure, match="not resident"):
        await tell(worker, Known(llama.directory, stranger))
    assert await tell(worker, llama, max_tokens=9) == wanted


async def test_concurrent_requests_do_not_mix(worker: WorkerHandle, llama: Known) -> None:
    await load(worker, llama)
    prompts = [f"Number {number}" for number in range(12)]
    alone = [await tell(worker, llama, prompt=prompt, max_tokens=12) for prompt in prompts]
    together = await asyncio.gather(*(tell(worker, llama, prompt=p, max_tokens=12) for p in prompts))
    assert together == alone


async def test_leaving_a_stream_stops_its_work(worker: WorkerHandle, storyteller: Known) -> None:
    def cpu_ticks() -> int:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    await load(worker, storyteller)
    await tell(worker, storyteller, max_tokens=2)
    start = cpu_ticks()
    await tell(worker, storyteller, max_tokens=1500)
    whole = cpu_ticks() - start

    frames = worker.run(storyteller.ref, EngineRequest("generate", {"prompt": "Hello", "temperature": 0}))
    start = cpu_ticks()
    async for frame in frames:
        assert frame.header.keys() == {"delta", "prompt_tokens", "completion_tokens"}
        break
    await frames.aclose()  # type: ignore[attr-defined]
    # Answered after the cancelled one has made room; its own work is next to nothing.
    await tell(worker, storyteller, max_tokens=2)
    assert cpu_ticks() - start < whole / 2


async def test_evicting_waits_for_the_answer_in_progress(worker: WorkerHandle, storyteller: Known) -> None:
    await load(worker, storyteller)
    frames = worker.run(
        storyteller.ref, EngineRequest("generate", {"prompt": "Hello", "temperature": 0, "max_tokens": 200})
    )
    first = await anext(frames)
    eviction = asyncio.create_task(worker.evict(storyteller.ref))
    rest = [frame async for frame in frames]
    await eviction
    assert first.header.keys() == {"delta", "prompt_tokens", "completion_tokens"}
    assert rest[-1].header["finish_reason"] in ("length", "stop")
    assert arena_bytes(worker) == 0


# --- what a worker can see ------------------------------------------------------------------------


def open_files(pid: int) -> dict[int, str]:
    root = Path(f"/proc/{pid}/fd")
    return {int(entry.name): os.readlink(entry) for entry in root.iterdir()}


async def test_a_worker_holds_no_descriptor_of_anybody_else(
    nursery: Nursery, worker: WorkerHandle, llama: Known
) -> None:
    async with spawned(nursery, "umbrella") as other:
        await load(worker, llama)
        sockets = [
            {name for name in open_files(pid).values() if name.startswith("socket:")}
            for pid in (worker.pid, other.pid, nursery.pid)
        ]
        assert [len(names) for names in sockets] == [2, 2, 1]
        assert len(set.union(*sockets)) == 5
        # Beyond the standard three and its sockets only its selector and image: nothing of the origin.
        extra = {name for fd, name in open_files(worker.pid).items() if fd > 2} - sockets[0]
        assert extra == {"anon_inode:[eventpoll]", "/dev/zero"}


async def test_a_worker_does_not_inherit_the_agent_s_secrets(worker: WorkerHandle) -> None:
    environment = Path(f"/proc/{worker.pid}/environ").read_bytes()
    assert b"do not inherit" not in environment
    assert b"HF_HUB_OFFLINE=1" in environment


async def test_side_files_are_gone_after_the_load(worker: WorkerHandle, llama: Known) -> None:
    await load(worker, llama)
    (private,) = Path("/dev/shm").glob(f"bunkhouse-nursery-*/{worker.pid}")
    assert list(private.iterdir()) == []


# --- deaths ---------------------------------------------------------------------------------------


async def test_a_killed_worker_is_noticed_by_all_who_wait_and_nobody_else(
    nursery: Nursery, storyteller: Known, llama: Known
) -> None:
    async with spawned(nursery) as victim, spawned(nursery, "umbrella") as bystander:
        await load(victim, storyteller)
        frames = victim.run(storyteller.ref, EngineRequest("generate", {"prompt": "Hello", "temperature": 0}))
        await anext(frames)
        never_fed, silent = socket.socketpair()
        fds = {file.path: never_fed.fileno() for file in llama.spec.files}
        order = asyncio.create_task(victim.load_origin(llama.spec, fds))
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(WorkerDead):
            [frame async for frame in frames]
        with pytest.raises(WorkerDead):
            await order
        async with asyncio.timeout(PATIENCE_S):
            await victim.died.wait()
        with pytest.raises(WorkerDead):
            await tell(victim, storyteller)
        with pytest.raises(WorkerDead):
            await victim.evict(storyteller.ref)
        never_fed.close()
        silent.close()
        other = Known(llama.directory, replace(llama.spec, ref=ModelRef("umbrella", "llama", "0" * 16)))
        await load(bystander, other)
        assert await tell(bystander, other, max_tokens=3)


async def test_closing_a_worker_ends_its_process_even_in_the_middle_of_work(
    nursery: Nursery, storyteller: Known
) -> None:
    async with spawned(nursery) as worker:
        await load(worker, storyteller)
        frames = worker.run(storyteller.ref, EngineRequest("generate", {"prompt": "Hello", "temperature": 0}))
        await anext(frames)
        await worker.close()
        await until_gone(worker.pid)
        with pytest.raises(WorkerDead):
            [frame async for frame in frames]


async def test_terminal_signals_are_left_to_the_agent(
    nursery: Nursery, worker: WorkerHandle, llama: Known
) -> None:
    for pid in (nursery.pid, worker.pid):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    await load(worker, llama)
    assert await tell(worker, llama, max_tokens=3)


async def test_slow_origins_do_not_hold_up_evictions(worker: WorkerHandle, llama: Known) -> None:
    await load(worker, llama)
    never_fed, silent = socket.socketpair()
    slow = [
        asyncio.create_task(
            worker.load_origin(
                replace(llama.spec, ref=ModelRef("acme", f"slow{number}", "0" * 16)),
                {file.path: never_fed.fileno() for file in llama.spec.files},
            )
        )
        for number in range(12)
    ]
    async with asyncio.timeout(PATIENCE_S):
        await worker.evict(llama.ref)
    silent.close()
    never_fed.close()
    for failure in await asyncio.gather(*slow, return_exceptions=True):
        assert isinstance(failure, WorkerFailure)
        assert "broke off" in failure.message or "ends after" in failure.message
