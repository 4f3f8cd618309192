"""Records on their way into control's database: a stop, a full disk and a mistake of ours meanwhile.

Covers: that what was taken in is written once, or waits, or its beat is told. Does not cover: the tables
(``test_store``) or beats (``test_control``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from running_control import empty_report

from control import record_desk
from control.catalog import Catalog, NodeRow
from control.record_desk import RecordDesk
from control.store import Acked, SpooledRecords, StoreUnavailable
from packer.wire import WIRE_VERSION, Beat, Record

ROW = NodeRow("n1", "first", "key", "http://n1:1", 0)


class Disk:
    """Takes a transaction when it is let, and fails those that it is told to."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.begun = asyncio.Event()
        self.fails: list[Exception] = []
        self.own: list[str] = []
        self.nodes: list[int] = []
        self.faults: list[str] = []
        self.desk = RecordDesk(Catalog, self.write, lambda: 5, lambda where, error: self.faults.append(where))

    async def write(self, spooled: Sequence[SpooledRecords], own: Sequence[Record]) -> Acked:
        self.begun.set()
        await self.may.wait()
        if self.fails:
            raise self.fails.pop(0)
        self.own += [record.kind for record in own]
        self.nodes += [record.seq for each in spooled for record in each.records]
        high = {each.counted_by: max(record.seq for record in each.records) for each in spooled}
        return Acked(high, dict.fromkeys(high, 0))

    def note(self, kind: str) -> None:
        self.desk.note(kind, "", "", "")


def beat(seq: int) -> Beat:
    records = (Record(seq, 1, "kind", "", "", ""),)
    return Beat(WIRE_VERSION, "n1", 0, 0, 0, empty_report("http://n1:1"), records, spool="s")


async def test_a_stop_in_the_middle_of_a_transaction_loses_nothing() -> None:
    """Who stops cancels what runs, and then stores what is left."""
    disk = Disk()
    running = asyncio.create_task(disk.desk.run())
    disk.note("before")
    await disk.begun.wait()
    disk.note("meanwhile")
    running.cancel()
    await asyncio.wait([running])
    last = asyncio.create_task(disk.desk.flush())
    await asyncio.sleep(0)
    disk.may.set()
    await last
    assert disk.own == ["before", "meanwhile"]


async def test_controls_own_records_wait_until_the_disk_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node brings its own again; nobody else knows those of control. As many as may wait, wait."""
    monkeypatch.setattr(record_desk, "RECORDS_PENDING_MAX", 3)
    disk = Disk()
    disk.fails = [StoreUnavailable("full"), StoreUnavailable("full")]
    disk.may.set()
    for kind in ("one", "two"):
        disk.note(kind)
        with pytest.raises(StoreUnavailable):
            await disk.desk.flush()
    disk.note("three")
    disk.note("one too many")
    await disk.desk.flush()
    assert disk.own == ["one", "two", "three"]


async def test_a_mistake_of_ours_costs_one_transaction_and_not_all_that_follow() -> None:
    """Else every beat with records would wait for ever, and nobody would hear why."""
    disk = Disk()
    disk.fails = [ValueError("nobody foresaw this")]
    disk.may.set()
    running = asyncio.create_task(disk.desk.run())
    with pytest.raises(StoreUnavailable):
        await disk.desk.store(ROW, beat(1))
    assert (await disk.desk.store(ROW, beat(2))).acked_seq == 2
    assert disk.faults == ["records"]
    running.cancel()
