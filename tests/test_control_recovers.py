"""Control after its state was lost or while it can not be written: backups put back, a full disk.

Covers: plans of two starts that counted the same numbers, and nodes being heard although nothing can be
stored. Does not cover: kills of the process (``test_control_crash``), or histories of many faults
(``test_cluster_simulation``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from running_control import Running, running, until

from control.store import StoreUnavailable
from packer.wire import Record


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def test_control_restored_from_a_backup_overtakes_its_nodes(control: Running, tmp_path: Path) -> None:
    node = await control.join("n1")
    node.have = (9, 1_000)
    plan = (await node.beat(tmp_path)).plan
    assert plan is not None
    assert plan.epoch == 10
    node.have = (10**6, 0)
    refused = await node.raw_beat(tmp_path)
    assert (refused.status, refused.error["code"]) == (409, "epoch_ahead")


async def test_a_backup_that_counts_an_epoch_again_overtakes_the_plans_of_the_first(
    control: Running, tmp_path: Path
) -> None:
    """Control was lost after its last backup: the next start has the same epoch and counts its plans again,
    so a number says nothing. Found by ``cluster_simulation`` (seed 16)."""
    node = await control.join("n1")
    plan = (await node.beat(tmp_path)).plan
    assert plan is not None
    assert (await node.beat(tmp_path)).plan is None
    for more, start in ((5, ""), (0, "of another start")):
        node.have, node.have_start = (plan.epoch, plan.seq + more), start
        newer = (await node.beat(tmp_path)).plan
        assert newer is not None
        assert newer.epoch > plan.epoch
        assert newer.models == plan.models
        plan = newer


async def test_a_second_poll_of_a_node_is_answered_when_the_first_has_ended(
    control: Running, tmp_path: Path
) -> None:
    """The first one's connection is dead most likely; its end must not take the second one's place."""
    node = await control.join("n1")
    await node.beat(tmp_path)
    state = control.server.control
    first = asyncio.create_task(node.beat(tmp_path, wait_ms=20_000))
    await until(lambda: "n1" in state._polls)
    held = state._polls["n1"]
    second = asyncio.create_task(node.beat(tmp_path, wait_ms=20_000))
    assert (await first).plan is None
    await until(lambda: state._polls.get("n1") is not held)
    await control.tenant("acme")
    assert (await second).plan is not None


async def test_a_node_is_heard_although_control_can_not_store_its_records(
    control: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that came back while control's disk was full stayed away until it was not; found by
    ``cluster_simulation``."""
    node = await control.join("n1")
    store = control.server.control._store
    records = (Record(1, 1, "restored", "acme", "acme/m@x", "#1"),)

    def full(batch: object, own: object = ()) -> dict[str, int]:
        raise StoreUnavailable("no space")

    with monkeypatch.context() as broken:
        broken.setattr(store, "write_records", full)
        answer = await node.beat(tmp_path, records=records)
    assert answer.acked_seq == 0
    assert answer.plan is not None
    assert control.server.control.cluster.nodes["n1"].report is not None
    assert (await node.beat(tmp_path, records=records)).acked_seq == 1
