"""Versions that share chunks, on real workers, real files and a real journal.

Covers: a second version stored beside the first, restores from both files, bad chunks in the other file, a
first version that goes, a restart, tenants with equal weights, and packs of resident models. Does not cover:
which files stay (``test_holdings``), the core's part (``test_residency``), a whole box
(``test_shared_versions``).
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import safetensors.numpy
from running_hands import Hands, close_hands, flip, nursery, open_hands, plan
from running_workers import DEVICE, Known, known
from tiny_models import copy_minilm

from agent.spawning import Nursery
from packer.events import Drop, Dropped, Pack, Packed, Restored
from packer.types import MIB, ModelRef, Task, Tier

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]
__all__ = ["nursery"]  # a fixture


@pytest_asyncio.fixture(loop_scope="module")
async def hands(nursery: Nursery, tmp_path: Path) -> AsyncIterator[Hands]:
    hands = await open_hands(nursery, tmp_path)
    yield hands
    await close_hands(hands)


def changed(directory: Path, into: Path, tensor: str, amount: float) -> Path:
    """A copy of a model directory of which one tensor is another one."""
    shutil.copytree(directory, into)
    path = into / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors[tensor] = (tensors[tensor] + np.float32(amount)).astype(tensors[tensor].dtype)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    return into


def version(model: Known, number: int, directory: Path | None = None, tenant: str = "acme") -> Known:
    made = known(directory or model.directory, model.ref.name, Task.EMBEDDING, tenant)
    ref = ModelRef(tenant, model.ref.name, f"{number:016x}")
    return Known(made.directory, replace(made.spec, ref=ref))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("minilm")
    return version(known(copy_minilm(folder / "a"), "minilm", Task.EMBEDDING), 1)


@pytest.fixture(scope="module")
def second(first: Known, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("changed") / "b"
    directory = changed(first.directory, folder, "encoder.layer.3.output.dense.weight", 0.01)
    return version(first, 2, directory)


async def drop(hands: Hands, model: Known) -> Dropped:
    answer = await hands.orders.drop(Drop(model.ref, Tier.DISK, 9))
    assert isinstance(answer, Dropped), answer
    return answer


async def test_versions_share_chunks_for_as_long_as_one_of_them_needs_them(
    nursery: Nursery, hands: Hands, first: Known, second: Known, tmp_path: Path
) -> None:
    for model in (first, second):
        plan(hands, model)
    packed = await hands.load(first)
    small = await hands.load(second)
    assert small.disk_bytes < packed.disk_bytes // 8
    # What a restore reads is all of it.
    assert abs(small.read_bytes - packed.read_bytes) < MIB
    wanted = {model.ref: await hands.answer(model) for model in (first, second)}
    assert wanted[first.ref] != wanted[second.ref]
    for model in (first, second):
        await hands.evict(model)
        assert isinstance(await hands.restore(model, Tier.DISK), Restored)
        assert await hands.answer(model) == wanted[model.ref]
        await hands.evict(model)

    gone = await drop(hands, first)
    [(payer, charged)] = gone.charged
    assert payer == second.ref
    assert small.disk_bytes < charged < packed.disk_bytes + small.disk_bytes
    assert not hands.packs.path(first.ref).exists()

    # The same as a new agent finds it.
    rows = await hands.orders._journal.call(hands.orders._journal.journal.packs)
    await close_hands(hands)
    again = await open_hands(nursery, tmp_path)
    try:
        plan(again, second)
        await again.orders.start(rows)
        assert again.orders.holdings.charge(second.ref) == charged
        assert isinstance(await again.restore(second, Tier.DISK), Restored)
        assert await again.answer(second) == wanted[second.ref]
        await again.evict(second)
        assert (await drop(again, second)).charged == ()
        assert not list((tmp_path / "packs").rglob("*.pack*"))
    finally:
        again.segments.close()
        await again.orders.close()


async def test_bad_chunks_are_mended_in_the_file_that_holds_them(
    hands: Hands, first: Known, second: Known
) -> None:
    """By whichever version finds them; for the other one they are mended too."""
    for model in (first, second):
        plan(hands, model)
    await hands.load(first)
    await hands.load(second)
    wanted = await hands.answer(second)
    await hands.evict(second)
    await hands.evict(first)
    whole = flip(hands, second, 0.4, 0.6)
    assert isinstance(await hands.restore(second, Tier.DISK), Restored)
    assert await hands.answer(second) == wanted
    assert hands.packs.path(first.ref).read_bytes() == whole
    assert [kind for kind, _ in hands.notes] == ["chunk_corrupt", "chunk_repaired"]


async def test_tenants_with_equal_weights_share_nothing(hands: Hands, first: Known) -> None:
    """No byte less is stored for one because the other has it, so neither can tell."""
    other = version(first, 1, tenant="bank")
    for model in (first, other):
        plan(hands, model)
    packed = await hands.load(first)
    copy = await hands.load(other)
    assert copy.disk_bytes == packed.disk_bytes
    assert hands.packs.base_paths(other.ref) == []
    assert hands.orders.holdings.deduplicated_bytes(other.ref) == 0
    assert (await drop(hands, first)).charged == ()


async def test_a_resident_model_is_packed_with_what_is_there(
    hands: Hands, first: Known, second: Known
) -> None:
    for model in (first, second):
        plan(hands, model)
    assert isinstance(await hands.restore(second, Tier.ORIGIN), Restored)
    packed = await hands.load(first)
    small = await hands.orders.pack(Pack(second.ref, DEVICE.device, 256 * MIB, 5))
    assert isinstance(small, Packed), small
    assert small.disk_bytes < packed.disk_bytes // 8
    wanted = await hands.answer(second)
    await hands.evict(second)
    assert isinstance(await hands.restore(second, Tier.DISK), Restored)
    assert await hands.answer(second) == wanted
