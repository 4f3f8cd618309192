"""What tenants used, from a request's end to control's answer about it: nothing twice, nothing lost.

Covers: the amounts, the node's meter and its spool in the journal, control's tables and the route, and that
the two ends agree over one real uplink. Does not cover: histories of crashes and lost messages
(``test_cluster_simulation`` judges them), what a tenant may see (``attacks/test_usage_claims``), or processes
that are killed (``test_failures``).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from running_control import PATIENCE_S, Running, running
from running_uplinks import Owner, OwnersUsage, beating, make_uplink, token_file

from agent import usage_meter, usage_spool
from agent.journal import Journal, JournalFailed, open_journal
from agent.journal_thread import JournalThread
from agent.usage_meter import RUNNING_S, TELL_S, UsageMeter
from agent.usage_spool import UsageSpool
from control import catalog as rows
from control import usage_tables
from control.store import SpooledRecords, Store, StoreUnavailable
from control.usage_tables import DAYS_KEPT_MS, HOURS_KEPT_MS, SPOOLS_PER_NODE_MAX, Span, UsageAsk
from packer.database import Database
from packer.events import Restored, TookLate
from packer.types import ModelRef, Tier
from packer.usage import (
    AMOUNT_MAX,
    DAY_MS,
    HOUR_MS,
    KEY_MARK,
    NO_USAGE,
    NOTHING,
    USAGE_ROWS_PER_BEAT_MAX,
    UsageBatch,
    UsageRow,
    Used,
    counted_hour,
    hour_of,
)

REF = ModelRef("acme", "m", "0" * 16)
NOON_MS = 20_000 * DAY_MS + 12 * HOUR_MS


def row(requests: int = 1, hour_ms: int = NOON_MS, tenant: str = "acme", model: str = "acme/m") -> UsageRow:
    return UsageRow(hour_ms, tenant, model, Used(requests, prompt_tokens=10 * requests))


def total(found: Sequence[UsageRow]) -> Used:
    return sum((each.used for each in found), NOTHING)


# --- amounts --------------------------------------------------------------------------------------------


def test_amounts_add_up_are_bounded_and_never_go_back() -> None:
    assert Used(1, 1, 2, 3) + Used(1, 0, 5) == Used(2, 1, 7, 3)
    assert (Used(AMOUNT_MAX) + Used(AMOUNT_MAX)).requests == AMOUNT_MAX
    assert Used(3, 1).beyond(Used(1, 2)) == Used(2, 0)


@pytest.mark.parametrize(
    ("said_ms", "hour_ms"),
    [
        (NOON_MS + 5, NOON_MS),
        (NOON_MS - 30 * DAY_MS, NOON_MS - 30 * DAY_MS),
        (NOON_MS + HOUR_MS, NOON_MS),
        (NOON_MS - 40 * DAY_MS, NOON_MS),
        (0, NOON_MS),
    ],
)
def test_an_hour_that_no_right_clock_says_is_now(said_ms: int, hour_ms: int) -> None:
    assert counted_hour(said_ms, NOON_MS + 10, 31 * DAY_MS) == hour_ms


# --- the node's spool -----------------------------------------------------------------------------------


def test_rows_of_an_hour_are_one_and_a_batch_stays_as_it_is_until_it_is_confirmed(tmp_path: Path) -> None:
    """Also over a crash between telling control and hearing from it."""
    spool = open_journal(tmp_path).usage
    spool.add([row(1), row(2), row(4, model="acme/n")])
    batch = spool.batch()
    assert (batch.seq, batch.rows) == (1, (row(3), row(4, model="acme/n")))
    spool.add([row(8)])
    again = open_journal(tmp_path).usage
    assert again.batch() == batch
    again.acknowledge(1)
    assert again.batch() == UsageBatch(2, (row(8),))
    again.acknowledge(1)
    assert again.batch().rows == (row(8),), "an answer to an earlier batch confirms no other"
    again.acknowledge(2)
    assert again.batch() == NO_USAGE


def test_a_journal_that_was_put_back_counts_on_above_what_control_has(tmp_path: Path) -> None:
    spool = open_journal(tmp_path).usage
    spool.add([row()])
    assert spool.batch().seq == 1
    spool.acknowledge(7)
    spool.add([row(2)])
    assert spool.batch() == UsageBatch(8, (row(2),))


def test_days_without_control_cost_exactness_of_time_and_no_amount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_spool, "SPOOL_ROWS_MAX", 6)
    spool = open_journal(tmp_path).usage
    for hour in range(50):
        spool.add([row(1, NOON_MS + hour * HOUR_MS, model=f"acme/{name}") for name in "mn"])
    found = spool.batch().rows
    assert len(found) == 6
    assert total(found) == total([row(100)])
    assert {each.hour_ms for each in found} == {NOON_MS + hour * HOUR_MS for hour in (47, 48, 49)}


def test_more_models_than_rows_are_kept_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_spool, "SPOOL_ROWS_MAX", 2)
    spool = open_journal(tmp_path).usage
    spool.add([row(1, NOON_MS + i % 3 * HOUR_MS, model=f"acme/{i}") for i in range(9)])
    assert total(spool.batch().rows) == total([row(9)])


def test_a_batch_is_what_one_beat_carries(tmp_path: Path) -> None:
    spool = open_journal(tmp_path).usage
    spool.add([row(model=f"acme/{i}") for i in range(USAGE_ROWS_PER_BEAT_MAX + 1)])
    assert len(spool.batch().rows) == USAGE_ROWS_PER_BEAT_MAX
    spool.acknowledge(1)
    assert len(spool.batch().rows) == 1


# --- the node's meter -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Took:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    device_ms: int = 0


class FullDisk(UsageSpool):
    full = False

    def add(self, rows: Sequence[UsageRow]) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        super().add(rows)


@dataclass(slots=True)
class Metered:
    """A meter on clocks that the test moves, and its journal."""

    meter: UsageMeter
    journal: Journal
    disk: FullDisk
    told: asyncio.Event
    wall_ms: int = NOON_MS
    steady_s: float = 1_000.0

    def kept(self) -> Used:
        """All that is in the journal."""
        return total(self.disk._rows("usage_open")) + total(self.disk._rows("usage_told"))


@pytest.fixture
async def metered(tmp_path: Path) -> AsyncIterator[Metered]:
    journal = open_journal(tmp_path)
    journal.usage = disk = FullDisk(journal._db)
    thread = JournalThread(journal)

    @contextmanager
    def may_fail() -> Iterator[None]:
        with suppress(JournalFailed):
            yield

    told = asyncio.Event()
    made: Metered
    meter = UsageMeter(thread, lambda: made.wall_ms, may_fail, told.set, lambda: made.steady_s)
    made = Metered(meter, journal, disk, told)
    yield made
    thread.close()


async def test_a_request_counts_when_it_ends_and_as_an_answer_when_it_ends_well(metered: Metered) -> None:
    meter, took = metered.meter, Took(90, 3, 40)
    with meter.counting(REF, took):
        took.completion_tokens = 5
    with pytest.raises(RuntimeError), meter.counting(REF, Took(1)):
        raise RuntimeError
    meter.observe(Restored(REF, "cpu:0", Tier.DISK, 5, restored_bytes=77))
    meter.observe(Restored(REF, "cpu:0", Tier.HOST, 5, restored_bytes=7))
    meter.observe(Restored(REF, "cpu:0", Tier.ORIGIN, 5, restored_bytes=1))
    meter.observe(TookLate("acme", 9))
    await meter.flush()
    assert metered.kept() == Used(2, 1, 91, 5, 49, 7, 77, 1)
    assert {each.model for each in metered.disk.batch().rows} == {"acme/m", ""}


async def test_what_a_key_used_is_counted_beside_its_models_and_never_names_its_text(
    metered: Metered,
) -> None:
    meter, other = metered.meter, ModelRef("acme", "n", "0" * 16)
    long = Took(10)
    with meter.counting(REF, long, "k1"):
        with meter.counting(other, Took(5, 1, 2), "k1"):
            pass
        with meter.counting(REF, Took(7), "k2"):
            pass
        await meter.flush(at_once=True)
        long.completion_tokens = 4
    await meter.flush()
    found = {each.model: each.used for each in metered.disk.batch().rows}
    assert found == {
        "acme/m": Used(2, 2, 17, 4),
        "acme/n": Used(1, 1, 5, 1, 2),
        KEY_MARK + "k1": Used(2, 2, 15, 5, 2),
        KEY_MARK + "k2": Used(1, 1, 7),
    }


async def test_what_a_long_request_has_used_so_far_is_kept_every_second(metered: Metered) -> None:
    """So that a kill loses a second of it. Nothing counts twice, and a worker that counts back takes nothing
    back."""
    meter, took = metered.meter, Took(100)
    with meter.counting(REF, took):
        await meter.flush()
        took.completion_tokens = 10
        await meter.flush()
        assert metered.kept() == Used(prompt_tokens=100)
        metered.steady_s += RUNNING_S
        metered.wall_ms += HOUR_MS
        await meter.flush()
        assert metered.kept() == Used(prompt_tokens=100, completion_tokens=10)
        took.completion_tokens = 4
        await meter.flush(at_once=True)
        took.completion_tokens = 12
    await meter.flush()
    assert metered.kept() == Used(1, 1, 100, 12)
    assert [each.hour_ms for each in metered.disk.batch().rows] == [NOON_MS, NOON_MS + HOUR_MS]


async def test_a_stop_keeps_what_running_requests_have_used(metered: Metered) -> None:
    took = Took(100)
    with metered.meter.counting(REF, took):
        await metered.meter.flush()
        took.completion_tokens = 10
        await metered.meter.flush(at_once=True)
        assert metered.kept().completion_tokens == 10


async def test_a_full_disk_loses_nothing_and_fills_no_memory(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_meter, "PENDING_ROWS_MAX", 20)
    meter = metered.meter
    metered.disk.full = True
    for hour in range(3):
        metered.wall_ms = NOON_MS + hour * HOUR_MS
        for i in range(10):
            meter._note("acme", f"acme/{i}", Used(1))
        await meter.flush()
    assert len(meter._pending) == 10
    metered.disk.full = False
    await meter.flush()
    assert metered.kept() == Used(30)


async def test_control_is_told_every_few_seconds_and_again_until_it_confirms(metered: Metered) -> None:
    meter = metered.meter
    assert meter.due(), "of an earlier life there may be something left"
    assert await meter.batch() == NO_USAGE
    assert not meter.due()
    assert not meter.waits()
    metered.steady_s += TELL_S
    assert not meter.due(), "nothing new"
    with meter.counting(REF, Took(1)):
        pass
    assert meter.waits()
    await meter.flush()
    assert meter.due()
    assert meter.waits()
    looking = asyncio.create_task(meter.batch())
    await asyncio.sleep(0)
    assert meter.waits(), "while the journal is read"
    first = await looking
    assert first.seq == 1
    assert await meter.batch() == NO_USAGE, "not again at once"
    metered.steady_s += TELL_S
    assert await meter.batch() == first
    await meter.acknowledge(first.seq)
    metered.steady_s += TELL_S
    assert meter.waits(), "until it has looked"
    assert await meter.batch() == NO_USAGE
    assert not meter.due()
    assert not meter.waits()


async def test_a_full_batch_is_followed_at_once(metered: Metered) -> None:
    metered.disk.add([row(model=f"acme/{i}") for i in range(USAGE_ROWS_PER_BEAT_MAX + 1)])
    first = await metered.meter.batch()
    await metered.meter.acknowledge(first.seq)
    assert len((await metered.meter.batch()).rows) == 1


async def test_the_meter_wakes_for_use_and_tells(metered: Metered) -> None:
    running = asyncio.create_task(metered.meter.run())
    with metered.meter.counting(REF, Took(1)):
        pass
    async with asyncio.timeout(PATIENCE_S):
        await metered.told.wait()
    assert metered.kept().requests == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# --- control's tables -----------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "control.db")) as opened:
        tenants = [rows.PutTenant(rows.TenantRow(name, 5)) for name in ("acme", "bolt")]
        opened.write([*tenants, rows.PutNode(rows.NodeRow("n1", "inc1", "e" * 64, "http://h:1", 7))], 1)
        yield opened


def deliver(store: Store, seq: int, *used: UsageRow, spool: str = "s", now_ms: int = NOON_MS) -> int:
    batch = SpooledRecords("n1", "inc1", 0, (), spool, UsageBatch(seq, used), now_ms)
    return store.write_records([batch]).usage[f"n1/{spool}"]


def ask(
    store: Store,
    span: Span = Span.TOTAL,
    tenant: str | None = None,
    after: tuple[str, str, int] | None = None,
    limit: int = 100,
) -> list[UsageRow]:
    return store.usage(UsageAsk(span, 0, AMOUNT_MAX, tenant, after, limit))


def test_what_is_delivered_twice_counts_once(store: Store) -> None:
    assert deliver(store, 1, row(3)) == 1
    assert deliver(store, 1, row(3)) == 1, "confirmed again"
    assert deliver(store, 3, row(4)) == 3, "a number that is left out is no loss: its batch was another's"
    assert deliver(store, 2, row(9)) == 3, "late, and of a journal that was put back"
    assert deliver(store, 1, row(1), spool="t") == 1, "another journal counts by itself"
    assert total(ask(store)) == total([row(8)])


def test_two_beats_of_one_node_in_one_transaction_count_once(store: Store) -> None:
    beats = [
        SpooledRecords("n1", "inc1", 0, (), "s", UsageBatch(1, (row(3),)), NOON_MS),
        SpooledRecords("n1", "inc1", 0, (), "s", UsageBatch(1, (row(3),)), NOON_MS),
        SpooledRecords("n1", "inc1", 0, (), "s", NO_USAGE, NOON_MS),
    ]
    assert store.write_records(beats).usage == {"n1/s": 1}
    assert total(ask(store)) == total([row(3)])


def test_a_node_that_joins_again_goes_on_with_its_numbers(store: Store) -> None:
    deliver(store, 1, row(3))
    store.write([rows.DropNode("n1")], 2)
    store.write([rows.PutNode(rows.NodeRow("n1", "inc2", "f" * 64, "http://h:1", 8))], 3)
    again = SpooledRecords("n1", "inc2", 0, (), "s", UsageBatch(1, (row(3),)), NOON_MS)
    assert store.write_records([again]).usage == {"n1/s": 1}
    assert total(ask(store)) == total([row(3)])


def test_a_number_and_its_amounts_are_written_together_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(db: Database, node: str) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as during:
        during.setattr(usage_tables, "_forget_spools", full)
        with pytest.raises(StoreUnavailable):
            deliver(store, 1, row(3))
    assert ask(store) == []
    assert deliver(store, 1, row(3)) == 1
    assert total(ask(store)) == total([row(3)])


def test_use_of_nobody_is_dropped_and_goes_with_its_tenant(store: Store) -> None:
    """A tenant that is made anew under the same name has used nothing."""
    deliver(store, 1, row(3), row(5, tenant="nobody"))
    assert {each.tenant for each in ask(store)} == {"acme"}
    store.write([rows.DropTenant("acme")], 2)
    assert ask(store) == []
    store.write([rows.PutTenant(rows.TenantRow("acme", NOON_MS + 5 * HOUR_MS))], 3)
    deliver(store, 2, row(7), row(1, NOON_MS + 5 * HOUR_MS), now_ms=NOON_MS + 6 * HOUR_MS)
    assert total(ask(store)) == total([row(1)])


def test_rows_are_told_by_the_hour_the_day_or_in_all_in_pages_without_a_gap(store: Store) -> None:
    hours = [NOON_MS + hour * HOUR_MS for hour in (-40, -1, 0)]
    used = [
        row(1, hour, tenant, f"{tenant}/{m}") for hour in hours for tenant in ("acme", "bolt") for m in "mn"
    ]
    deliver(store, 1, *used)
    for span, count in ((Span.HOUR, 12), (Span.DAY, 8), (Span.TOTAL, 4)):
        whole = ask(store, span)
        assert len(whole) == count
        assert total(whole) == total([row(12)])
        paged: list[UsageRow] = []
        while len(paged) < count:
            last = paged[-1] if paged else None
            after = (last.tenant, last.model, last.hour_ms) if last else None
            paged += ask(store, span, after=after, limit=3)
        assert paged == whole
    assert {each.tenant for each in ask(store, Span.HOUR, "bolt")} == {"bolt"}
    since = UsageAsk(Span.TOTAL, hours[1], hours[2], None, None, 100)
    assert total(store.usage(since)) == total([row(4)])


def test_old_hours_become_days_and_old_days_go(store: Store) -> None:
    now_ms = NOON_MS + DAYS_KEPT_MS
    old = NOON_MS + HOURS_KEPT_MS
    used = [row(1, NOON_MS - 2 * DAY_MS), row(2, old), row(4, old + HOUR_MS), row(8, now_ms)]
    deliver(store, 1, *used, now_ms=old + DAY_MS)
    deliver(store, 2, row(8, now_ms), now_ms=now_ms)
    for _ in range(2):
        store.write([rows.AgeUsage(now_ms)], 2)
        assert total(ask(store)) == total([row(22)])
        assert [each.hour_ms % DAY_MS for each in ask(store, Span.HOUR)] == [0, 0, 12 * HOUR_MS]


def test_sums_that_no_column_holds_stop_at_the_largest(store: Store) -> None:
    deliver(store, 1, *(row(AMOUNT_MAX // 10, NOON_MS - i * HOUR_MS) for i in range(2_000)))
    deliver(store, 2, *(row(AMOUNT_MAX // 10, NOON_MS) for _ in range(20)))
    (found,) = ask(store)
    assert found.used.requests == AMOUNT_MAX


def test_a_node_that_makes_up_spools_fills_no_table(store: Store) -> None:
    for number in range(3 * SPOOLS_PER_NODE_MAX):
        deliver(store, 1, row(1), spool=f"s{number}", now_ms=NOON_MS + number)
    kept = store._db.execute("select counted_by from usage_heard order by at_ms").fetchall()
    assert len(kept) == SPOOLS_PER_NODE_MAX
    assert kept[-1] == (f"n1/s{3 * SPOOLS_PER_NODE_MAX - 1}",)


# --- both ends ------------------------------------------------------------------------------------------


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as served:
        yield served


async def test_a_batch_goes_with_a_beat_and_is_confirmed_when_it_is_counted(
    control: Running, tmp_path: Path
) -> None:
    await control.call("POST", "/api/v1/tenants", {"name": "acme"})
    now = hour_of(control.server.control.wall_ms())
    owner = Owner(usage=OwnersUsage())
    owner.usage.unconfirmed = UsageBatch(4, (row(3, now),))
    uplink = make_uplink(control, tmp_path / "node", owner, await token_file(control, tmp_path))
    async with beating(uplink), asyncio.timeout(PATIENCE_S):
        uplink.changed()
        await owner.usage.confirmed.wait()
        answer = await control.call("GET", "/api/v1/usage?by=hour")
        items = answer.json()["items"]
        assert [(each["begin_ms"], each["model"], each["requests"]) for each in items] == [(now, "acme/m", 3)]
        assert items[0]["prompt_tokens"] == 30
