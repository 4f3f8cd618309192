"""Models on their way through a worker: in from every tier, out again, whole and in parts.

Covers: loads, restores, packs and evictions and their failures, on real models in real processes, with exact
memory in ``/proc/PID/smaps``. Does not cover: requests and the lives of workers (``test_worker``) or who
gives the orders (``test_loop``).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from running_workers import (
    KEY,
    Known,
    arena_bytes,
    embed,
    fed,
    known,
    load,
    memory_file,
    pack_files,
    packed,
    private_bytes,
    spawned,
    tell,
)
from tiny_models import find_minilm, opened, tiny_classifier, tiny_llama

from agent.frames import Failed, Reply, RestorePack, Spawn, wire_spec
from agent.moves import Moves
from agent.shelf import Shelf
from agent.spawning import Nursery
from agent.workers import PackCopy, Segment, WorkerFailure, WorkerHandle
from packer.types import MIB, HostForm, ModelSpec, Task

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def minilm() -> Known:
    return known(find_minilm(), "minilm", Task.EMBEDDING)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return known(tiny_llama(tmp_path_factory.mktemp("llama")), "llama", Task.GENERATION)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery(compiled_kernels: None) -> AsyncIterator[Nursery]:
    nursery = Nursery(threads=1)
    await nursery.start()
    try:
        yield nursery
    finally:
        await nursery.close()


@pytest_asyncio.fixture(loop_scope="module")
async def worker(nursery: Nursery) -> AsyncIterator[WorkerHandle]:
    async with spawned(nursery) as worker:
        yield worker


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
        packed = await worker.pack(minilm.ref, pack_files(pack, 2 * image_bytes))
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
        await worker.pack(llama.ref, pack_files(pack))
        async with spawned(nursery) as other:
            await other.restore(llama.spec, PackCopy(pack, KEY))
            assert await tell(other, llama, max_tokens=20) == wanted
            # And it can pack again what it never saw as an origin.
            again = memory_file()
            try:
                assert (await other.pack(llama.ref, pack_files(again))).disk_bytes > 0
            finally:
                os.close(again)
    finally:
        os.close(pack)


async def test_an_origin_may_come_through_feeds(worker: WorkerHandle, llama: Known) -> None:
    with fed(llama) as fds:
        await worker.load_origin(llama.spec, fds)
    assert await tell(worker, llama, max_tokens=5)


async def test_a_load_leaves_a_pack_beside_it(worker: WorkerHandle, minilm: Known) -> None:
    """The model answers before its pack is finished, and what was packed is what was loaded."""
    pack, part = memory_file(), memory_file()
    try:
        with opened(minilm.directory, minilm.spec) as fds:
            loaded = await worker.load_origin(minilm.spec, fds, pack_files(pack, part=part))
        assert loaded.restored_bytes == minilm.spec.image_bytes
        wanted = await embed(worker, minilm)
        done = await worker.packed(loaded)
        assert 0 < done.disk_bytes == os.fstat(pack).st_size < minilm.spec.image_bytes
        assert done.host.raw_bytes > minilm.spec.image_bytes
        assert os.fstat(part).st_size == 0
        await worker.evict(minilm.ref)
        await worker.restore(minilm.spec, PackCopy(pack, KEY))
        assert await embed(worker, minilm) == wanted
    finally:
        os.close(pack)
        os.close(part)


async def test_a_full_disk_costs_the_pack_and_not_the_load(worker: WorkerHandle, minilm: Known) -> None:
    """Room for some chunks only: the model serves, nothing of the pack stays, and the next one succeeds."""
    pack, part = memory_file(), memory_file()
    try:
        with opened(minilm.directory, minilm.spec) as fds:
            loaded = await worker.load_origin(minilm.spec, fds, pack_files(pack, 20 * MIB, part))
        wanted = await embed(worker, minilm)
        with pytest.raises(WorkerFailure, match="more than its limit"):
            await worker.packed(loaded)
        assert (os.fstat(pack).st_blocks, os.fstat(part).st_size) == (0, 0)
        assert await embed(worker, minilm) == wanted
        assert (await worker.pack(minilm.ref, pack_files(pack))).disk_bytes > 0
    finally:
        os.close(pack)
        os.close(part)


async def test_an_interrupted_load_goes_on_where_it_stopped(
    nursery: Nursery, worker: WorkerHandle, minilm: Known
) -> None:
    """The chunks that were stored are not asked of the origin again, by another process."""
    weights = max(minilm.spec.files, key=lambda file: file.size_bytes)
    pack, part = memory_file(), memory_file()
    try:
        # How many chunks an ingest has stored when it breaks off is its own affair; one there must be.
        while os.fstat(part).st_size == 0:
            with fed(minilm, {weights.path: weights.size_bytes // 2}) as fds:
                with pytest.raises(WorkerFailure, match="ends after"):
                    await worker.load_origin(minilm.spec, fds, pack_files(pack, part=part))
        assert arena_bytes(worker) == 0
        await load(worker, minilm)
        wanted = await embed(worker, minilm)
        asked: list[int] = []
        async with spawned(nursery) as other:
            with fed(minilm, asked=asked) as fds:
                files = pack_files(pack, part=part, resume=True)
                loaded = await other.load_origin(minilm.spec, fds, files)
            assert await embed(other, minilm) == wanted
            assert (await other.packed(loaded)).disk_bytes == os.fstat(pack).st_size
            await other.evict(minilm.ref)
            await other.restore(minilm.spec, PackCopy(pack, KEY))
            assert await embed(other, minilm) == wanted
        assert 0 < sum(asked) < weights.size_bytes
    finally:
        os.close(pack)
        os.close(part)


async def test_an_answer_that_began_in_the_middle_of_a_restore_is_the_same(
    worker: WorkerHandle, minilm: Known
) -> None:
    """At the restore's own speed: whether anybody gets in before its end is the machine's business."""
    async with packed(worker, minilm) as pack:
        wanted = await embed(worker, minilm)
        for first_chunk in (0, 3):
            await worker.evict(minilm.ref, first_chunk)
            told: list[int] = []

            begun = asyncio.Event()

            async def answer(begun: asyncio.Event = begun) -> bytes:
                await begun.wait()
                return await embed(worker, minilm)

            def begin(nbytes: int, told: list[int] = told, begun: asyncio.Event = begun) -> None:
                told.append(nbytes)
                begun.set()

            early = asyncio.create_task(answer())
            copy = PackCopy(pack, KEY)
            done = await worker.restore(minilm.spec, copy, first_chunk, serving=begin)
            begun.set()
            assert told in ([], [done.restored_bytes])
            assert await early == wanted
            assert await embed(worker, minilm) == wanted


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


async def test_bad_chunks_are_made_again_from_the_origin(worker: WorkerHandle, minilm: Known) -> None:
    """Only they, in place; nothing of the pack is used before its tags are right."""
    async with packed(worker, minilm) as pack:
        wanted = await embed(worker, minilm)
        await worker.evict(minilm.ref)
        whole = os.pread(pack, os.fstat(pack).st_size, 0)
        for at in (len(whole) // 3, len(whole) // 2):
            os.pwrite(pack, bytes([whole[at] ^ 0x10]), at)
        with pytest.raises(WorkerFailure) as failure:
            await worker.restore(minilm.spec, PackCopy(pack, KEY))
        bad = failure.value
        assert len(bad.chunks) == len(bad.extents) == 2
        assert all(offset % 4096 == 0 and nbytes > 0 for offset, nbytes in bad.extents)
        with opened(minilm.directory, minilm.spec) as fds:
            assert await worker.repair(minilm.spec, [pack], KEY, bad.chunks, fds) == ()
        assert os.pread(pack, len(whole) + 1, 0) == whole
        await worker.restore(minilm.spec, PackCopy(pack, KEY))
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


async def test_an_order_that_waits_for_its_turn_is_cancelled_too(minilm: Known, tmp_path: Path) -> None:
    """Two restores run at a time; one behind them that nobody wants any more must not run at all. Another
    model's order is not touched, and a later order for the same model is a new one."""
    moves = Moves(Spawn(1, "acme", "cpu:0", "cpu", "", 1), Shelf(), tmp_path)
    other = replace(minilm.spec, ref=replace(minilm.ref, name="other"))
    replies: list[Reply] = []
    for number, spec in ((1, minilm.spec), (2, other)):
        moves.expect(RestorePack(number, wire_spec(spec), KEY))
    moves.cancel(minilm.ref)
    moves.expect(RestorePack(3, wire_spec(minilm.spec), KEY))
    for number, spec in ((1, minilm.spec), (2, other), (3, minilm.spec)):
        # An empty file is no pack: an order that is carried out finds that.
        descriptor = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
        moves.carry_out(RestorePack(number, wire_spec(spec), KEY), [descriptor], replies.append)
    assert [isinstance(reply, Failed) and reply.cancelled for reply in replies] == [True, False, False]
    assert all(isinstance(reply, Failed) and reply.corrupt for reply in replies[1:])


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
        size = (await worker.pack(llama.ref, pack_files(pack))).disk_bytes
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
        await worker.pack(llama.ref, pack_files(pack))
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
            await worker.pack(llama.ref, pack_files(pack, 65536))
    finally:
        os.close(pack)
    assert await tell(worker, llama, max_tokens=3)


async def test_a_model_is_not_brought_in_twice(worker: WorkerHandle, llama: Known) -> None:
    await load(worker, llama)
    with pytest.raises(WorkerFailure, match="here already"):
        await load(worker, llama)
    assert await tell(worker, llama, max_tokens=3)
