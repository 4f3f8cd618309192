"""What a node brings into its journal now and then: each kind by itself, and all of it at a stop.

Covers: a kind that fails in an unforeseen way beside the others, and a stop while the journal is busy. Does
not cover: a full disk (``test_full_disk``) or what is kept (``test_footprints``, ``test_remembering``).
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from running_workers import config_in

from agent.__main__ import STOP_GRACE_S
from agent.counters import PendingRecord
from agent.node import PACK_GRACE_S, RunningNode
from agent.workers import CLOSE_TIMEOUT_S
from bunkhouse.cli.supervise import STOP_WAIT_S
from packer.events import TookLate


def node_in(folder: Path) -> RunningNode:
    return RunningNode(config_in(folder))


def note(node: RunningNode, number: int) -> None:
    node.counters.put_back([PendingRecord(number, "restored", "acme", f"acme/m@{'0' * 16}", "x")])


async def spooled_times(node: RunningNode) -> list[int]:
    return [record.at_ms for record in await node.spooled(100)]


@pytest.mark.parametrize("broken", ["footprints", "what was spent", "debts", "what was learned"])
async def test_what_can_not_be_kept_holds_up_nothing_else(
    broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = node_in(tmp_path)

    async def fail() -> None:
        # As the journal's thread does when it is given a number that no column can hold.
        await node._journal.call(node._journal.journal._db.execute, "select ?", [2**64])

    assert broken in node.flushing.parts
    node.flushing.parts[broken] = fail
    for number in (1, 2):
        note(node, number)
        await node.flushing.once()
    assert await spooled_times(node) == [1, 2]
    assert caplog.text.count(f"keeping {broken} failed in an unforeseen way") == 1
    await node.loop.close()
    node._journal.close()


async def test_a_stop_loses_nothing_that_waits_for_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.flushing.FLUSH_S", 0)
    node = node_in(tmp_path)
    note(node, 1)
    taken, is_free = asyncio.Event(), threading.Event()
    take = node.counters.take_records

    def take_and_tell(now_ms: int) -> list[PendingRecord]:
        taken.set()
        return take(now_ms)

    monkeypatch.setattr(node.counters, "take_records", take_and_tell)
    busy = asyncio.create_task(node._journal.call(is_free.wait))
    flushing = asyncio.create_task(node.flushing.run())
    await taken.wait()
    await asyncio.sleep(0)
    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    is_free.set()
    await busy
    await node.flushing.once()
    assert await spooled_times(node) == [1]
    await node.loop.close()
    node._journal.close()


async def test_what_is_known_is_kept_before_a_stop_waits_for_packs(tmp_path: Path) -> None:
    """That wait is long, and whoever told the node to stop may lose patience and kill it."""
    node, kept = node_in(tmp_path), []

    async def finish_packs(within_s: float) -> None:
        batch = await node._journal.call(node._journal.journal.usage.batch)
        kept.append((await spooled_times(node), [row.used.device_ms for row in batch.rows]))

    node.orders.finish_packs = finish_packs  # type: ignore[method-assign]
    note(node, 1)
    node.usage.observe(TookLate("acme", 40))
    await node.close()
    assert kept == [([1], [40])]


def test_bunk_up_waits_for_all_that_its_agent_does_at_a_stop() -> None:
    """Its patience was shorter than the agent's own: it killed agents that were writing packs."""
    assert STOP_WAIT_S > STOP_GRACE_S + PACK_GRACE_S + 2 * CLOSE_TIMEOUT_S
