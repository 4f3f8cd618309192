"""Orders on real workers, real files and a real journal: through every tier, and through every accident.

Covers: a load with its pack beside, interrupted loads that go on, chunks that go bad, parts that leave and
come back, and what stays behind. Does not cover: which orders are given (``test_residency``) or a worker by
itself (``test_worker_moves``).
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from process_memory import read_worker
from running_hands import (
    FORMS,
    Hands,
    close_hands,
    flip,
    hands,
    llama,
    minilm,
    nursery,
    open_hands,
    plan,
    replace_ref,
)
from running_workers import DEVICE, Known

from agent.spawning import Nursery
from packer.events import (
    Drop,
    Dropped,
    Event,
    PackFailed,
    Restored,
    RestoreFailed,
    ServingEnded,
    WorkerDied,
)
from packer.index import HEADER_BYTES
from packer.types import GIB, MIB, HostForm, ModelRef, Tier

pytestmark = [pytest.mark.processes, pytest.mark.asyncio(loop_scope="module")]
__all__ = ["hands", "llama", "minilm", "nursery"]  # fixtures


@FORMS
async def test_a_model_lives_through_every_tier(hands: Hands, minilm: Known, form: HostForm) -> None:
    hands.orders.host_form = form
    plan(hands, minilm)
    packed = await hands.load(minilm)
    wanted = await hands.answer(minilm)
    assert hands.packs.path(minilm.ref).stat().st_size == packed.disk_bytes
    await hands.evict(minilm)
    restored = await hands.restore(minilm, Tier.DISK, host_bytes=packed.host_bytes)
    assert isinstance(restored, Restored)
    assert restored.host_filled, "the form's size is exact, so the segment could be filled"
    assert hands.segments.allocated_bytes() == packed.host_bytes
    assert await hands.answer(minilm) == wanted
    await hands.evict(minilm, 3)
    restored = await hands.restore(minilm, Tier.HOST, first_chunk=3)
    assert isinstance(restored, Restored)
    assert restored.restored_bytes == sum(minilm.spec.chunk_bytes[3:])
    assert await hands.answer(minilm) == wanted
    await hands.orders.drop(Drop(minilm.ref, Tier.HOST, 3))
    assert hands.segments.allocated_bytes() == 0
    assert await hands.answer(minilm) == wanted
    await hands.orders.drop(Drop(minilm.ref, Tier.DISK, 4))
    assert not list(hands.packs.path(minilm.ref).parent.iterdir())


async def test_a_cached_pack_is_read_past_the_cache_where_the_box_is_faster_so(
    hands: Hands, minilm: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(hands, minilm)
    await hands.load(minilm)
    direct = hands.packs.open_direct(minilm.ref)
    if direct is None:
        pytest.skip("this file system has no direct reads")
    os.close(direct)
    for past in (False, True):
        monkeypatch.setattr(hands.packs, "reads_past_cache", lambda past=past: past)
        await hands.evict(minilm)
        # Just written, all of it is in the page cache.
        restored = await hands.restore(minilm, Tier.DISK)
        assert isinstance(restored, Restored)
        assert restored.cached is not past


async def test_an_image_in_a_segment_is_free_when_nobody_is_charged_for_it(
    hands: Hands, minilm: Known
) -> None:
    """The segment is dropped under the image; every way in which the image then goes frees the memory."""
    hands.orders.host_form = HostForm.RAW
    plan(hands, minilm)
    host_bytes = (await hands.load(minilm)).host_bytes
    wanted = await hands.answer(minilm)
    await hands.evict(minilm)
    image_bytes, kept = minilm.spec.image_bytes, sum(minilm.spec.chunk_bytes[:3])

    async def drop_under_it() -> None:
        restored = await hands.restore(minilm, Tier.DISK, host_bytes=host_bytes)
        assert isinstance(restored, Restored)
        assert restored.host_filled
        assert (hands.segments.allocated_bytes(), hands.segments.lent_bytes()) == (host_bytes, 0)
        await hands.orders.drop(Drop(minilm.ref, Tier.HOST, 3))
        assert hands.segments.allocated_bytes() == 0
        assert hands.segments.lent_bytes() == HEADER_BYTES + image_bytes
        assert await hands.answer(minilm) == wanted

    await drop_under_it()
    await hands.evict(minilm, 3)
    assert hands.segments.lent_bytes() == HEADER_BYTES + kept
    # The rest comes from disk into memory of its own; the first part is where it was.
    assert isinstance(await hands.restore(minilm, Tier.DISK, first_chunk=3), Restored)
    assert hands.segments.lent_bytes() == HEADER_BYTES + kept
    assert await hands.answer(minilm) == wanted
    await hands.evict(minilm)
    assert hands.segments.lent_bytes() == 0
    await drop_under_it()
    os.kill(hands.pids()[0], 9)
    await hands.next(WorkerDied)
    assert hands.segments.lent_bytes() == 0
    await drop_under_it()
    # The whole model comes again, from its origin: nothing of the old image stays.
    await hands.evict(minilm, 3)
    assert isinstance(await hands.restore(minilm, Tier.ORIGIN), Restored)
    assert hands.segments.lent_bytes() == 0
    assert await hands.answer(minilm) == wanted


async def test_a_node_without_room_for_a_segment_restores_without_it(
    hands: Hands, minilm: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(hands, minilm)
    packed = await hands.load(minilm)
    answer = await hands.answer(minilm)
    await hands.evict(minilm)

    def full(name: str, flags: int) -> int:
        raise OSError(errno.ENFILE, "too many open files in system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", full)
        restored = await hands.restore(minilm, Tier.DISK, host_bytes=packed.host_bytes)
    assert isinstance(restored, Restored), restored
    assert not restored.host_filled
    assert hands.segments.get(minilm.ref) is None
    assert await hands.answer(minilm) == answer


async def test_a_segment_that_its_worker_cut_short_costs_only_itself(hands: Hands, minilm: Known) -> None:
    hands.orders.host_form = HostForm.RAW
    plan(hands, minilm)
    host_bytes = (await hands.load(minilm)).host_bytes
    wanted = await hands.answer(minilm)
    await hands.evict(minilm)
    assert isinstance(await hands.restore(minilm, Tier.DISK, host_bytes=host_bytes), Restored)
    await hands.evict(minilm)
    segment = hands.segments.get(minilm.ref)
    assert segment is not None
    os.ftruncate(segment, host_bytes // 2)
    failed = await hands.restore(minilm, Tier.HOST)
    assert isinstance(failed, RestoreFailed)
    assert (failed.corrupt, failed.kept_chunks) == (True, 0)
    await hands.orders.drop(Drop(minilm.ref, Tier.HOST, 3))
    assert isinstance(await hands.restore(minilm, Tier.DISK), Restored)
    assert await hands.answer(minilm) == wanted


@pytest.mark.parametrize("source", ["origin", "peer", "lying peer"])
async def test_bad_chunks_are_mended_and_never_served(hands: Hands, minilm: Known, source: str) -> None:
    """From the origin, or from a peer when there is no origin; a peer's lie costs another try."""
    plan(hands, minilm)
    await hands.load(minilm)
    wanted = await hands.answer(minilm)
    await hands.evict(minilm)
    whole = flip(hands, minilm, 0.4, 0.6)
    asked: list[int] = []

    async def fetch_extent(ref: ModelRef, salt: bytes, offset: int, nbytes: int) -> bytes | None:
        assert (ref, len(salt) > 0) == (minilm.ref, True)
        asked.append(offset)
        return bytes(nbytes) if source == "lying peer" else whole[offset : offset + nbytes]

    def post(event: Event) -> None:
        assert event == ServingEnded(minilm.ref, DEVICE.device, 1)
        hands.notes.append(("serving ended", 2))

    hands.orders.post = post
    if source != "origin":
        hands.orders.repairs.fetch_extent = fetch_extent
    if source == "peer":
        shutil.rmtree(minilm.directory)
    assert isinstance(await hands.restore(minilm, Tier.DISK), Restored)
    assert await hands.answer(minilm) == wanted
    assert hands.packs.path(minilm.ref).read_bytes() == whole
    # The end of early answers is said before the mending begins, which may take long.
    once = [("serving ended", 2), ("chunk_corrupt", 2), ("chunk_repaired", 2)]
    assert hands.notes == (once * 2 if source == "lying peer" else once)
    assert len(asked) == (0 if source == "origin" else 2)


async def test_what_can_not_be_mended_is_corrupt(hands: Hands, minilm: Known) -> None:
    """The origin is gone and nobody else has it: the copy must go, and nothing of it is served."""
    plan(hands, minilm)
    await hands.load(minilm)
    await hands.evict(minilm)
    flip(hands, minilm, 0.5)
    shutil.rmtree(minilm.directory)
    failed = await hands.restore(minilm, Tier.DISK)
    assert isinstance(failed, RestoreFailed)
    assert failed.corrupt
    assert hands.notes == [("chunk_corrupt", 1)]


async def test_a_mended_part_comes_back_to_the_part_that_stayed(hands: Hands, minilm: Known) -> None:
    plan(hands, minilm)
    await hands.load(minilm)
    wanted = await hands.answer(minilm)
    await hands.evict(minilm, 4)
    flip(hands, minilm, 0.7)
    restored = await hands.restore(minilm, Tier.DISK, first_chunk=4)
    assert isinstance(restored, Restored)
    assert restored.restored_bytes == sum(minilm.spec.chunk_bytes[4:])
    assert await hands.answer(minilm) == wanted


async def test_a_part_that_comes_from_disk_leaves_all_of_it_in_the_host_tier(
    hands: Hands, minilm: Known
) -> None:
    """The pack is read through once; from then on even the whole model comes from memory alone."""
    plan(hands, minilm)
    packed = await hands.load(minilm)
    wanted = await hands.answer(minilm)
    await hands.evict(minilm, 4)
    # A bad chunk of those that stayed is found and mended on the way.
    whole = flip(hands, minilm, 0.1)
    restored = await hands.restore(minilm, Tier.DISK, first_chunk=4, host_bytes=packed.host_bytes)
    assert isinstance(restored, Restored)
    assert restored.host_filled
    assert hands.notes == [("chunk_corrupt", 1), ("chunk_repaired", 1)]
    assert hands.packs.path(minilm.ref).read_bytes() == whole
    assert hands.segments.allocated_bytes() == packed.host_bytes
    assert await hands.answer(minilm) == wanted
    await hands.evict(minilm)
    await hands.orders.drop(Drop(minilm.ref, Tier.DISK, 4))
    assert isinstance(await hands.restore(minilm, Tier.HOST), Restored)
    assert await hands.answer(minilm) == wanted


async def test_a_failed_load_leaves_no_part_behind(hands: Hands, minilm: Known) -> None:
    """A part was there and the whole was to come from an origin that is gone: then nothing is there."""
    plan(hands, minilm)
    await hands.load(minilm)
    await hands.evict(minilm, 4)
    shutil.rmtree(minilm.directory)
    failed = await hands.restore(minilm, Tier.ORIGIN)
    assert isinstance(failed, RestoreFailed)
    assert failed.kept_chunks == 0
    memory = read_worker(hands.pids()[0])
    assert memory is not None
    assert memory.arena_bytes == 0
    assert isinstance(await hands.restore(minilm, Tier.DISK), Restored)


async def test_an_interrupted_load_goes_on_after_a_restart(
    nursery: Nursery, tmp_path: Path, minilm: Known
) -> None:
    """The origin lost half of a file: what was packed stays, counted against the tier, for the next load."""
    weights = minilm.directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    hands = await open_hands(nursery, tmp_path)
    plan(hands, minilm)
    failed = await hands.restore(minilm, Tier.ORIGIN, disk_bytes=GIB // 2, pack_order=7)
    assert isinstance(failed, RestoreFailed)
    assert not failed.corrupt
    kept_bytes = hands.packs.partial_bytes(minilm.ref)
    assert kept_bytes
    no_pack = await hands.next(PackFailed)
    assert isinstance(no_pack, PackFailed)
    assert no_pack.kept_bytes == kept_bytes
    await close_hands(hands)

    weights.write_bytes(whole)
    hands = await open_hands(nursery, tmp_path)
    plan(hands, minilm)
    unfinished = await hands.orders.start([])
    assert unfinished == {minilm.ref: kept_bytes}
    assert hands.packs.sweep([], unfinished) == []
    await hands.load(minilm)
    wanted = await hands.answer(minilm)
    assert hands.packs.partial_bytes(minilm.ref) is None
    await hands.evict(minilm)
    assert isinstance(await hands.restore(minilm, Tier.DISK), Restored)
    assert await hands.answer(minilm) == wanted
    await close_hands(hands)


async def test_a_version_that_left_the_plan_leaves_no_partial_pack(hands: Hands, minilm: Known) -> None:
    weights = minilm.directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    plan(hands, minilm)
    await hands.restore(minilm, Tier.ORIGIN, disk_bytes=GIB // 2, pack_order=7)
    assert hands.packs.partial_bytes(minilm.ref)
    hands.orders.keep_only(frozenset())
    assert await hands.orders.drop(Drop(minilm.ref, Tier.DISK, 4)) == Dropped(minilm.ref, Tier.DISK, 4)
    assert not list(hands.packs.path(minilm.ref).parent.iterdir())
    assert hands.orders._journal.journal.partial_packs() == []


async def test_a_disk_without_room_costs_the_pack_and_not_the_load(hands: Hands, minilm: Known) -> None:
    """Said with a reason, in an event that is recorded; the model serves."""
    plan(hands, minilm)
    restored = await hands.restore(minilm, Tier.ORIGIN, disk_bytes=16 * MIB, pack_order=7)
    assert isinstance(restored, Restored)
    failed = await hands.next(PackFailed)
    assert isinstance(failed, PackFailed)
    assert "16777216 bytes" in failed.message
    assert await hands.answer(minilm)
    assert not list(hands.packs.path(minilm.ref).parent.iterdir())
    free_bytes = hands.packs.free_bytes()
    restored = await hands.restore(
        replace_ref(hands, minilm), Tier.ORIGIN, disk_bytes=2 * free_bytes, pack_order=8
    )
    assert isinstance(restored, Restored)
    failed = await hands.next(PackFailed)
    assert isinstance(failed, PackFailed)
    assert "free above its floor" in failed.message
