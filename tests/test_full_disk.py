"""A node whose disk is full serves on: plans are obeyed, records wait, and no half pack is ever used.

Covers: a journal that can not be written (its database may not grow any more) under a node, under a pack
and under a drop. Does not cover: packs that fail while a worker writes them (``test_worker``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from running_workers import DEVICE, config_in

from agent.counters import PENDING_RECORDS_MAX, Counters, PendingRecord
from agent.devices import DeviceConfig
from agent.journal import Journal, JournalFailed, PackRow, load_node_key
from agent.journal_thread import JournalThread
from agent.node import RunningNode
from agent.orders import Orders
from agent.origin import OriginUnavailable
from agent.packs import PackDirectory
from agent.segments import HostSegments
from agent.spawning import Nursery
from agent.workers import PackDone, PackFiles, WorkerHandle
from packer.events import Drop, Dropped, Event, Pack, Packed, PackFailed
from packer.types import MIB, HostSizes, ModelRef, ModelSpec, Task, TenantSpec, Tier
from packer.wire import WIRE_VERSION, Plan, PlanNumber

REF = ModelRef("acme", "minilm", "0" * 16)
SPEC = ModelSpec(REF, "control:", (), "transformers", Task.EMBEDDING, 4096, (4096,), 0, 1)


class SmallJournal(Journal):
    """A journal on a disk that can be filled."""

    def fill(self) -> None:
        (pages,) = self._connection.execute("pragma page_count").fetchone()
        self._connection.execute(f"pragma max_page_count={pages}")

    def empty(self) -> None:
        self._connection.execute("pragma max_page_count=100000")


def open_journal(directory: Path) -> SmallJournal:
    return SmallJournal(directory / "journal.db", load_node_key(directory / "seal.key"))


def plan(seq: int, tenants: int) -> Plan:
    specs = tuple(TenantSpec(f"tenant-{number:04}") for number in range(tenants))
    return Plan(WIRE_VERSION, "c", "n", 1, seq, (TenantSpec("acme"), *specs), (), (SPEC,))


def record(number: int) -> PendingRecord:
    return PendingRecord(number, "restored", "acme", str(REF), "x" * 400)


@pytest.mark.asyncio
async def test_a_plan_is_in_force_on_a_full_disk_and_kept_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing ends the node; what it can not keep is said once, and is kept as soon as that works."""
    monkeypatch.setattr("agent.journal.Journal", SmallJournal)
    caplog.set_level(logging.INFO)
    node = RunningNode(config_in(tmp_path))
    journal = node._journal.journal
    assert isinstance(journal, SmallJournal)
    await node.accept_plan(plan(1, 0))
    await node._journal.call(journal.fill)
    await node.accept_plan(plan(2, 2000))
    assert node.have_plan() == PlanNumber(1, 2)
    assert len(node.tenants) == 2001
    for number in range(100):
        node.counters.put_back([record(number)])
        await node.flushing.once()
    assert caplog.text.count("serving on") == 1
    kept = await node._journal.call(journal.plan)
    assert kept is not None
    assert kept.seq == 1
    await node._journal.call(journal.empty)
    await node.flushing.once()
    assert await node._journal.call(journal.plan) == plan(2, 2000)
    times = [row.at_ms for row in await node.spooled(1000)]
    assert sorted(times) == list(range(100)), "no record was lost"
    assert caplog.text.count("the journal works again") == 1
    await node.loop.close()
    node._journal.close()


def test_records_that_the_journal_did_not_take_stay_bounded() -> None:
    """The newest are kept, in their order; those that are lost are counted."""
    counters = Counters()
    counters.put_back([record(number) for number in range(PENDING_RECORDS_MAX)])
    later = counters.take_records(0)
    counters.put_back([record(-1), *later])
    assert counters.records_lost == 1
    assert [row.at_ms for row in counters.take_records(0)] == list(range(PENDING_RECORDS_MAX))


# --- packs ----------------------------------------------------------------------------------------


class Hand(WorkerHandle):
    """A worker that writes any pack at once; ``meanwhile`` fills the disk."""

    def __init__(self, journal: SmallJournal | None) -> None:
        self.meanwhile = journal

    async def pack(self, ref: ModelRef, files: PackFiles) -> PackDone:
        os.write(files.fd, b"pack")
        if self.meanwhile is not None:
            self.meanwhile.fill()
        return PackDone(4, HostSizes(4, 4, 4))


class FullPacks(PackDirectory):
    def free_bytes(self) -> int:
        return 100 * MIB


def make_orders(folder: Path, journal: Journal, worker: WorkerHandle) -> Orders:
    async def fetch(spec: ModelSpec, path: str) -> None:
        raise OriginUnavailable(path)

    devices: dict[str, DeviceConfig] = {DEVICE.device: DEVICE}
    orders = Orders(
        Nursery(1),
        devices,
        FullPacks(folder / "packs"),
        HostSegments(),
        JournalThread(journal),
        fetch,  # type: ignore[arg-type]  # is never called
        lambda ref: replace(SPEC, ref=ref),
        lambda: int(time.time()),
    )
    orders.roster.workers[(REF.tenant, DEVICE.device)] = worker
    return orders


def big_ref(number: int) -> ModelRef:
    return ModelRef("acme", f"{'m' * 40}{number}", "0" * 16)


@pytest.mark.asyncio
async def test_a_pack_that_the_journal_does_not_take_leaves_no_file(tmp_path: Path) -> None:
    """Its key would be unknown, and nobody would count its bytes."""
    journal = open_journal(tmp_path)
    journal.seal_new_key(REF)  # the tenant's own key is there already
    orders = make_orders(tmp_path, journal, Hand(journal))
    answers: list[Event | None] = []
    # Pages have some room left at first, so the first rows may still be taken.
    while not isinstance(answers[-1] if answers else None, PackFailed):
        answers.append(await orders.pack(Pack(big_ref(len(answers)), DEVICE.device, MIB, 1)))
        assert len(answers) < 1000
    failed = answers[-1]
    assert isinstance(failed, PackFailed)
    assert "full" in failed.message
    assert all(isinstance(answer, Packed) for answer in answers[:-1])
    files = [path for path in (tmp_path / "packs").glob("*/*") if path.is_file()]
    assert len(files) == len(journal.packs()) == len(answers) - 1
    orders._journal.close()


class BrokenJournal(SmallJournal):
    """Not even a row can be removed from it."""

    def remove_pack(self, ref: ModelRef) -> None:
        self._connection.execute("pragma query_only=on")
        super().remove_pack(ref)


@pytest.mark.asyncio
async def test_a_dropped_pack_goes_even_if_the_journal_can_not_be_written(tmp_path: Path) -> None:
    """On a full disk the file is what makes room; the next start sweeps its row."""
    journal = BrokenJournal(tmp_path / "journal.db", load_node_key(tmp_path / "seal.key"))
    orders = make_orders(tmp_path, journal, Hand(None))
    assert isinstance(await orders.pack(Pack(REF, DEVICE.device, MIB, 1)), Packed)
    packs = PackDirectory(tmp_path / "packs")
    assert packs.path(REF).exists()
    assert await orders.drop(Drop(REF, Tier.DISK, 2)) == Dropped(REF, Tier.DISK, 2)
    assert not packs.path(REF).exists()
    assert packs.sweep([row.ref for row in journal.packs()]) == [REF]
    orders._journal.close()


@pytest.mark.asyncio
async def test_a_replaced_node_key_does_not_stop_packing(tmp_path: Path) -> None:
    """Packs under the old key are lost, but their tenant's models can be packed again."""
    first = open_journal(tmp_path)
    key, wrapped = first.seal_new_key(REF)
    first.add_pack(PackRow(REF, 1, 1), wrapped, 0)
    first.close()
    (tmp_path / "seal.key").unlink()
    second = open_journal(tmp_path)
    key, wrapped = second.seal_new_key(REF)
    second.add_pack(PackRow(REF, 1, 1), wrapped, 0)
    assert second.data_key(REF) == key
    second.close()


@pytest.mark.asyncio
async def test_an_error_of_sqlite_is_an_error_of_the_journal(tmp_path: Path) -> None:
    thread = JournalThread(open_journal(tmp_path))
    with pytest.raises(JournalFailed, match="no such table"):
        await thread.call(lambda: thread.journal._db.execute("select 1 from absent"))
    await asyncio.to_thread(thread.close)
