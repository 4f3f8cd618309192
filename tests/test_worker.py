"""Workers as real processes: forked by a real nursery, on real models, with their memory looked at.

Covers: every order and its failures, requests and cancelling, exact memory in ``/proc/PID/smaps``,
what a worker can see, and the death of one. Does not cover: the engine's answers in detail
(``test_engines``), the deaths of agent and nursery and broken protocols (``test_worker_ends``), or who
gives the orders (``test_loop``).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from make_models import make_gpt2
from process_memory import WorkerMemory, read_worker
from running_workers import DEVICE, PATIENCE_S, until_gone
from tiny_models import describe, find_minilm, opened, tiny_classifier, tiny_llama

from agent.facade import JSON, EngineError, EngineFrame, EngineRequest
from agent.spawning import Nursery
from agent.workers import PackCopy, Segment, WorkerDead, WorkerFailure, WorkerHandle
from packer.types import GIB, MIB, HostForm, ModelRef, ModelSpec, Task

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]

TEXT = "Hello, what is the weather on the range today?"
KEY = bytes(range(32))


@dataclass(frozen=True)
class Known:
    """A model directory and its version."""

    directory: Path
    spec: ModelSpec

    @property
    def ref(self) -> ModelRef:
        return self.spec.ref


def known(directory: Path, name: str, task: Task, tenant: str = "acme") -> Known:
    return Known(directory, describe(directory, ModelRef(tenant, name, "0" * 16), task))


@pytest.fixture(scope="module")
def minilm() -> Known:
    return known(find_minilm(), "minilm", Task.EMBEDDING)


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


@asynccontextmanager
async def spawned(nursery: Nursery, tenant: str = "acme") -> AsyncIterator[WorkerHandle]:
    worker = await nursery.spawn(tenant, DEVICE)
    try:
        await worker.ping()  # answered once it is all that it will be, its name included
        yield worker
    finally:
        await worker.close()


@pytest_asyncio.fixture(loop_scope="module")
async def worker(nursery: Nursery) -> AsyncIterator[WorkerHandle]:
    async with spawned(nursery) as worker:
        yield worker


async def load(worker: WorkerHandle, model: Known) -> int:
    with opened(model.directory, model.spec) as fds:
        return (await worker.load_origin(model.spec, fds)).restore_ms


async def ask(worker: WorkerHandle, model: Known, op: str, **fields: JSON) -> list[EngineFrame]:
    return [frame async for frame in worker.run(model.ref, EngineRequest(op, fields))]


async def embed(worker: WorkerHandle, model: Known, text: str = TEXT) -> bytes:
    (frame,) = await ask(worker, model, "embed", inputs=[text])
    return frame.body


async def tell(worker: WorkerHandle, model: Known, **fields: JSON) -> str:
    frames = await ask(worker, model, "generate", **{"prompt": "Hello", "temperature": 0, **fields})
    return "".join(str(frame.header.get("delta", "")) for frame in frames)


def memory_of(worker: WorkerHandle) -> WorkerMemory:
    memory = read_worker(worker.pid)
    assert memory is not None
    return memory


def arena_bytes(worker: WorkerHandle) -> int:
    """What the kernel says of the memory that images lie in."""
    memory = memory_of(worker)
    assert memory.device == "cpu:0"
    return memory.arena_bytes


def private_bytes(worker: WorkerHandle) -> int:
    """Memory of the process's own that is not an image."""
    return memory_of(worker).private_bytes


def memory_file(data: bytes = b"", size: int = 0) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    os.ftruncate(descriptor, max(size, len(data)))
    return descriptor


# --- the whole life of a model --------------------------------------------------------------------


@pytest.mark.parametrize("form", HostForm)
async def test_a_model_lives_through_every_tier_with_the_same_bits(
    worker: WorkerHandle, minilm: Known, form: HostForm
) -> None:
    """Origin, pack, host: the answer is bit-identical, the memory exact, and freed by each eviction."""
    image_bytes = minilm.spec.image_bytes
    assert arena_bytes(worker) == 0
    private_before = private_bytes(worker)
    assert await load(worker, minilm) > 0
    wanted = await embed(worker, minilm)
    # What is not touched is not there: the last page of padding at most.
    assert image_bytes - 2 * MIB <= arena_bytes(worker) <= image_bytes
    # No second copy: what the process grew by beside the image is far below the image.
    assert private_bytes(worker) - private_before < image_bytes // 2

    with ExitStack() as files:
        pack = memory_file()
        files.callback(os.close, pack)
        packed = await worker.pack(minilm.ref, pack, KEY, 2 * image_bytes)
        assert 0 < packed.disk_bytes == os.fstat(pack).st_size < image_bytes
        assert await embed(worker, minilm) == wanted
        await worker.evict(minilm.ref)
        assert arena_bytes(worker) == 0
        with pytest.raises(WorkerFailure, match="not resident"):
            await embed(worker, minilm)

        segment = memory_file()
        files.callback(os.close, segment)
        done = await worker.restore(minilm.spec, PackCopy(pack, KEY), host=Segment(segment, form))
        assert done.host_filled
        fcntl.fcntl(segment, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        assert await embed(worker, minilm) == wanted
        await worker.evict(minilm.ref)
        assert arena_bytes(worker) == 0

        for _ in range(3):
            done = await worker.restore(minilm.spec, Segment(segment, form))
            assert not done.host_filled
            assert await embed(worker, minilm) == wanted
            assert image_bytes - 2 * MIB <= arena_bytes(worker) <= image_bytes
            await worker.evict(minilm.ref)
            assert arena_bytes(worker) == 0
        assert private_bytes(worker) - private_before < image_bytes // 2


async def test_another_worker_restores_what_the_first_packed(
    nursery: Nursery, worker: WorkerHandle, llama: Known
) -> None:
    """Nothing that a worker knows beside the pack is needed: the side files travel inside."""
    await load(worker, llama)
    wanted = await tell(worker, llama, max_tokens=20)
    pack = memory_file()
    try:
        await worker.pack(llama.ref, pack, KEY, GIB)
        async with spawned(nursery) as other:
            await other.restore(llama.spec, PackCopy(pack, KEY))
            assert await tell(other, llama, max_tokens=20) == wanted
            # And it can pack again what it never saw as an origin.
            again = memory_file()
            try:
                assert (await other.pack(llama.ref, again, KEY, GIB)).disk_bytes > 0
            finally:
                os.close(again)
    finally:
        os.close(pack)


async def test_an_origin_may_come_through_pipes(worker: WorkerHandle, llama: Known) -> None:
    with ExitStack() as stack:
        fds: dict[str, int] = {}
        for file in llama.spec.files:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            fds[file.path] = reader

            def feed(data: bytes = (llama.directory / file.path).read_bytes(), to: int = writer) -> None:
                with os.fdopen(to, "wb") as pipe:
                    pipe.write(data)

            feeder = threading.Thread(target=feed)
            feeder.start()
            stack.callback(feeder.join)
        await worker.load_origin(llama.spec, fds)
    assert await tell(worker, llama, max_tokens=5)


@asynccontextmanager
async def packed(worker: WorkerHandle, model: Known) -> AsyncIterator[int]:
    """A resident model's pack."""
    pack = memory_file()
    try:
        await load(worker, model)
        await worker.pack(model.ref, pack, KEY, GIB)
        yield pack
    finally:
        os.close(pack)


async def test_a_part_of_a_model_leaves_and_only_that_comes_back(worker: WorkerHandle, minilm: Known) -> None:
    """Evictions to the byte, from the tail; answers are the same once the missing chunks are back."""
    sizes = minilm.spec.chunk_bytes
    async with packed(worker, minilm) as pack:
        wanted = await embed(worker, minilm)
        whole = arena_bytes(worker)
        for keep in (len(sizes) - 1, 9, 3, 1):
            await worker.evict(minilm.ref, keep)
            assert arena_bytes(worker) == sum(sizes[:keep])
            with pytest.raises(WorkerFailure, match="not resident"):
                await embed(worker, minilm)
        with pytest.raises(WorkerFailure, match="1 chunks here"):
            await worker.restore(minilm.spec, PackCopy(pack, KEY), 2)
        assert arena_bytes(worker) == sizes[0]
        done = await worker.restore(minilm.spec, PackCopy(pack, KEY), 1)
        assert done.restored_bytes == sum(sizes[1:])
        assert await embed(worker, minilm) == wanted
        assert arena_bytes(worker) <= whole
        # Nothing kept any more, and a whole restore over what was kept.
        await worker.evict(minilm.ref, 5)
        await worker.evict(minilm.ref)
        assert arena_bytes(worker) == 0
        await worker.restore(minilm.spec, PackCopy(pack, KEY))
        await worker.evict(minilm.ref, 5)
        done = await worker.restore(minilm.spec, PackCopy(pack, KEY))
        assert done.restored_bytes == sum(sizes)
        assert await embed(worker, minilm) == wanted
        assert arena_bytes(worker) <= whole


async def test_a_failed_partial_restore_leaves_what_was_there(worker: WorkerHandle, minilm: Known) -> None:
    sizes = minilm.spec.chunk_bytes
    async with packed(worker, minilm) as pack:
        wanted = await embed(worker, minilm)
        await worker.evict(minilm.ref, 4)
        good = os.pread(pack, 1, os.fstat(pack).st_size // 2)
        os.pwrite(pack, bytes([good[0] ^ 1]), os.fstat(pack).st_size // 2)
        with pytest.raises(WorkerFailure) as failure:
            await worker.restore(minilm.spec, PackCopy(pack, KEY), 4)
        assert failure.value.corrupt
        assert len(failure.value.chunks) == 1
        assert arena_bytes(worker) == sum(sizes[:4])
        os.pwrite(pack, good, os.fstat(pack).st_size // 2)
        done = await worker.restore(minilm.spec, PackCopy(pack, KEY), 4)
        assert done.restored_bytes == sum(sizes[4:])
        assert await embed(worker, minilm) == wanted


async def test_a_restore_that_nobody_wants_any_more_is_stopped(worker: WorkerHandle, minilm: Known) -> None:
    """A cancel that comes in time ends it and leaves nothing; one for nothing is harmless."""
    await worker.cancel(minilm.ref)
    async with packed(worker, minilm) as pack:
        await worker.evict(minilm.ref)
        restoring = asyncio.create_task(worker.restore(minilm.spec, PackCopy(pack, KEY)))
        while not restoring.done():
            await worker.cancel(minilm.ref)
        with pytest.raises(WorkerFailure, match="cancelled") as failure:
            await restoring
        assert (failure.value.cancelled, failure.value.corrupt) == (True, False)
        assert arena_bytes(worker) == 0
        await worker.restore(minilm.spec, PackCopy(pack, KEY))
        assert await embed(worker, minilm)


async def test_several_models_of_a_tenant_live_side_by_side(
    worker: WorkerHandle, llama: Known, minilm: Known, tmp_path: Path
) -> None:
    critic = known(tiny_classifier(tmp_path), "critic", Task.CLASSIFICATION)
    await asyncio.gather(load(worker, llama), load(worker, minilm), load(worker, critic))
    wanted = await tell(worker, llama, max_tokens=9)
    await worker.evict(minilm.ref)
    await worker.evict(critic.ref)
    assert await tell(worker, llama, max_tokens=9) == wanted
    assert arena_bytes(worker) <= llama.spec.image_bytes


# --- copies that are not what they should be ------------------------------------------------------


def with_file(spec: ModelSpec, path: str, **changes: object) -> ModelSpec:
    files = tuple(
        replace(file, **changes) if file.path == path else file  # type: ignore[arg-type]
        for file in spec.files
    )
    return replace(spec, files=files)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
async def test_a_changed_origin_is_corrupt(worker: WorkerHandle, llama: Known, path: str) -> None:
    changed = Known(llama.directory, with_file(llama.spec, path, sha256="0" * 64))
    with pytest.raises(WorkerFailure, match=f"{path}.*sha256 differs") as failure:
        await load(worker, changed)
    assert (failure.value.corrupt, failure.value.broken) == (True, False)
    assert arena_bytes(worker) == 0
    await load(worker, llama)
    assert await tell(worker, llama, max_tokens=3)


async def test_an_origin_that_breaks_off_may_be_tried_again(worker: WorkerHandle, llama: Known) -> None:
    data = (llama.directory / "model.safetensors").read_bytes()
    with opened(llama.directory, llama.spec) as fds:
        os.close(fds["model.safetensors"])
        fds["model.safetensors"] = memory_file(data[:-1000])
        os.lseek(fds["model.safetensors"], 0, os.SEEK_SET)
        with pytest.raises(WorkerFailure, match="ends after") as failure:
            await worker.load_origin(llama.spec, fds)
    assert (failure.value.corrupt, failure.value.broken) == (False, False)
    assert arena_bytes(worker) == 0


async def test_a_plan_with_other_sizes_is_broken_before_memory_is_taken(
    worker: WorkerHandle, llama: Known
) -> None:
    wrong = Known(llama.directory, replace(llama.spec, image_bytes=llama.spec.image_bytes + 4096))
    with pytest.raises(WorkerFailure, match="the plan says") as failure:
        await load(worker, wrong)
    assert failure.value.broken


async def test_a_model_that_can_not_be_built_is_broken(
    worker: WorkerHandle, llama: Known, tmp_path: Path
) -> None:
    directory = tiny_llama(tmp_path)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": 32'))
    with pytest.raises(WorkerFailure, match="shape") as failure:
        await load(worker, known(directory, "bad", Task.GENERATION))
    assert (failure.value.corrupt, failure.value.broken) == (False, True)
    assert arena_bytes(worker) == 0
    await load(worker, llama)


async def test_a_flipped_bit_in_a_pack_is_corrupt_and_leaves_nothing(
    worker: WorkerHandle, llama: Known
) -> None:
    await load(worker, llama)
    pack = memory_file()
    try:
        size = (await worker.pack(llama.ref, pack, KEY, GIB)).disk_bytes
        await worker.evict(llama.ref)
        middle = size // 2
        (byte,) = os.pread(pack, 1, middle)
        os.pwrite(pack, bytes([byte ^ 1]), middle)
        with pytest.raises(WorkerFailure) as failure:
            await worker.restore(llama.spec, PackCopy(pack, KEY))
        assert failure.value.corrupt
        assert arena_bytes(worker) == 0
        os.pwrite(pack, bytes([byte]), middle)
        with pytest.raises(WorkerFailure) as failure:
            await worker.restore(llama.spec, PackCopy(pack, bytes(32)))
        await worker.restore(llama.spec, PackCopy(pack, KEY))
        assert await tell(worker, llama, max_tokens=3)
    finally:
        os.close(pack)


async def test_a_host_segment_that_can_not_be_written_costs_only_itself(
    worker: WorkerHandle, llama: Known, tmp_path: Path
) -> None:
    await load(worker, llama)
    pack = memory_file()
    (tmp_path / "full").touch()
    read_only = os.open(tmp_path / "full", os.O_RDONLY)
    try:
        await worker.pack(llama.ref, pack, KEY, GIB)
        await worker.evict(llama.ref)
        host = Segment(read_only, HostForm.STORED)
        done = await worker.restore(llama.spec, PackCopy(pack, KEY), host=host)
        assert not done.host_filled
        assert await tell(worker, llama, max_tokens=3)
    finally:
        os.close(pack)
        os.close(read_only)


async def test_a_pack_above_its_limit_fails_and_the_model_serves_on(
    worker: WorkerHandle, llama: Known
) -> None:
    await load(worker, llama)
    pack = memory_file()
    try:
        with pytest.raises(WorkerFailure, match="limit of 65536"):
            await worker.pack(llama.ref, pack, KEY, 65536)
    finally:
        os.close(pack)
    assert await tell(worker, llama, max_tokens=3)


async def test_a_model_is_not_brought_in_twice(worker: WorkerHandle, llama: Known) -> None:
    await load(worker, llama)
    with pytest.raises(WorkerFailure, match="here already"):
        await load(worker, llama)
    assert await tell(worker, llama, max_tokens=3)


# --- requests -------------------------------------------------------------------------------------


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
        assert frame.header.keys() == {"delta"}
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
    assert first.header.keys() == {"delta"}
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
        never_fed, writer = os.pipe()
        fds = {file.path: never_fed for file in llama.spec.files}
        order = asyncio.create_task(victim.load_origin(llama.spec, fds))
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(WorkerDead):
            [frame async for frame in frames]
        with pytest.raises(WorkerDead):
            await order
        await asyncio.wait_for(victim.died.wait(), PATIENCE_S)
        with pytest.raises(WorkerDead):
            await tell(victim, storyteller)
        with pytest.raises(WorkerDead):
            await victim.evict(storyteller.ref)
        os.close(never_fed)
        os.close(writer)
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
    never_fed, writer = os.pipe()
    slow = [
        asyncio.create_task(
            worker.load_origin(
                replace(llama.spec, ref=ModelRef("acme", f"slow{number}", "0" * 16)),
                {file.path: never_fed for file in llama.spec.files},
            )
        )
        for number in range(12)
    ]
    await asyncio.wait_for(worker.evict(llama.ref), PATIENCE_S)
    os.close(writer)
    os.close(never_fed)
    for failure in await asyncio.gather(*slow, return_exceptions=True):
        assert isinstance(failure, WorkerFailure)
        assert "ends after" in failure.message
