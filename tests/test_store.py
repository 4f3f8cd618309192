"""Control's store: what was written is there after reopening, all of it or nothing.

Covers: every kind of row, transactions, the epoch and the plan's number, records. Does not cover: a
process that is killed (``test_control_crash``).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from control import catalog as rows
from control.catalog import Catalog, model_arrival, model_removal, tenant_removal
from control.store import RECORDS_MAX, SpooledRecords, Store, StoreUnavailable
from packer.types import ByteQuota, ModelName, ModelRef, ModelSpec, OriginFile, Task, TenantQuota
from packer.wire import Record

FILES = (OriginFile("config.json", 2, "a" * 64), OriginFile("model.safetensors", 9, "b" * 64))


def spec(version: str = "0" * 16, name: str = "m", tenant: str = "acme", created_ms: int = 1) -> ModelSpec:
    ref = ModelRef(tenant, name, version)
    return ModelSpec(ref, "control:", FILES, "transformers", Task.EMBEDDING, 4096, (4096,), 8192, created_ms)


EVERY_KIND: tuple[rows.Change, ...] = (
    rows.PutTenant(rows.TenantRow("acme", 5)),
    rows.PutQuota("acme", TenantQuota(device=ByteQuota(1, 2), requests_per_minute=60)),
    rows.PutKey(rows.KeyRow("k1", "c" * 64, "acme", "laptop", 5, 99)),
    rows.PutKey(rows.KeyRow("op", "d" * 64, None, "", 5, None)),
    rows.PutModel(spec()),
    rows.PutUpload(rows.UploadRow("u1", "acme", "m", "1" * 16, FILES, 6)),
    rows.PutNode(rows.NodeRow("n1", "inc1", "e" * 64, "http://h:1", 7)),
    rows.PutToken(rows.TokenRow("t1", "f" * 64, "n1", 8, 9, "e" * 64, "n1")),
)


def spooled(*seqs: int, after: int = 0, incarnation: str = "inc1", spool: str = "") -> SpooledRecords:
    records = tuple(Record(seq, 100 + seq, "restored", "acme", "acme/m@x", f"#{seq}") for seq in seqs)
    return SpooledRecords("n1", incarnation, after, records, spool)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store(path)
    yield opened
    opened.close()


def reloaded(path: Path) -> Catalog:
    again = Store(path)
    try:
        return again.load()
    finally:
        again.close()


def without_seqs(catalog: Catalog) -> Catalog:
    # At which plan a row came is not stored: every node of a new epoch gets everything anyway.
    return replace(catalog, key_seq={}, model_seq={})


def test_every_kind_of_row_is_loaded_as_it_was_written(store: Store, path: Path) -> None:
    expected = Catalog()
    store.write(EVERY_KIND, 7)
    for change in EVERY_KIND:
        expected.apply(change, 7)
    assert without_seqs(reloaded(path)) == without_seqs(expected)


def test_every_kind_of_row_can_be_put_again_and_dropped(store: Store, path: Path) -> None:
    store.write(EVERY_KIND, 7)
    store.write(EVERY_KIND, 8)
    assert len(reloaded(path).models) == 1
    store.write([*tenant_removal(reloaded(path), "acme"), rows.DropNode("n1"), rows.DropToken("t1")], 9)
    left = reloaded(path)
    assert (left.tenants, left.quotas, left.models, left.uploads, left.nodes, left.tokens) == (({},) * 6)
    assert list(left.keys) == ["op"]


def test_a_list_of_changes_is_written_whole_or_not_at_all(store: Store, path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        # The last change refers to a tenant that does not exist.
        store.write([rows.PutTenant(rows.TenantRow("acme", 5)), rows.PutModel(spec(tenant="ghost"))], 3)
    assert reloaded(path).tenants == {}
    assert store.start("x").seq == 1


def test_a_newer_version_becomes_latest_and_the_older_one_returns(store: Store, path: Path) -> None:
    old, new = spec("a" * 16, created_ms=1), spec("b" * 16, created_ms=2)
    store.write(EVERY_KIND[:1], 1)
    for added in (old, new):
        store.write(model_arrival(reloaded(path), added), 2)
    name = ModelName("acme", "m")
    assert reloaded(path).latest == {name: new.ref}
    assert [item.latest for item in reloaded(path).versions_of(name)] == [True, False]
    store.write(model_removal(reloaded(path), name, new.ref.version), 3)
    assert reloaded(path).latest == {name: old.ref}
    assert reloaded(path).models[old.ref].latest


def test_epoch_rises_with_every_start_and_the_cluster_stays(path: Path) -> None:
    seen = []
    for name in ("first", "second", "third"):
        opened = Store(path)
        seen.append(opened.start(name))
        opened.write([], seen[-1].seq + 10)
        opened.close()
    assert [meta.epoch for meta in seen] == [1, 2, 3]
    assert [meta.seq for meta in seen] == [1, 11, 21]
    assert {meta.cluster for meta in seen} == {"first"}


def test_epoch_can_leap_over_what_a_node_has_seen(store: Store) -> None:
    store.start("c")
    assert store.start("c", 40).epoch == 40
    assert store.start("c").epoch == 41


def test_records_delivered_twice_are_stored_once(store: Store) -> None:
    store.write(EVERY_KIND, 1)
    assert store.write_records([spooled(1, 2, 3)]).records == {"inc1": 3}
    assert store.write_records([spooled(2, 3, 4, after=1)]).records == {"inc1": 4}
    assert store.write_records([spooled(4, 5, after=4), spooled(5, 6, after=4)]).records == {"inc1": 6}
    assert [event.detail for event in store.events(0, 100)] == [f"#{n}" for n in (1, 2, 3, 4, 5, 6)]
    assert store.load().nodes["n1"].acked_seq == 6


def test_records_of_a_node_that_was_removed_and_joined_again_are_stored_once(store: Store) -> None:
    """Control had stored them and its answer was lost; found by ``cluster_simulation`` (seed 1)."""
    store.write(EVERY_KIND, 1)
    assert store.write_records([spooled(1, 2, spool="s")]).records == {"n1/s": 2}
    assert store.load().nodes["n1"].spool == "s"
    store.write([rows.DropNode("n1"), rows.PutNode(rows.NodeRow("n1", "inc2", "e" * 64, "http://h:1", 9))], 2)
    assert store.write_records([spooled(1, 2, 3, incarnation="inc2", spool="s")]).records == {"n1/s": 3}
    assert [event.detail for event in store.events(0, 100)] == ["#1", "#2", "#3"]


def test_a_spool_that_was_lost_does_not_hide_the_next(store: Store) -> None:
    """Another journal counts from 1 again; what it says is new."""
    store.write(EVERY_KIND, 1)
    store.write_records([spooled(1, 2, 3, spool="s")])
    assert store.write_records([spooled(1, spool="t")]).records == {"n1/t": 1}
    row = store.load().nodes["n1"]
    assert (row.acked_seq, row.spool) == (1, "t")
    assert len(store.events(0, 100)) == 4


def test_a_node_that_joined_afresh_starts_counting_again(store: Store) -> None:
    store.write_records([spooled(1, 2)])
    assert store.write_records([spooled(1, incarnation="inc2")]).records == {"inc2": 1}
    assert len(store.events(0, 100)) == 3


def test_events_are_read_page_by_page_and_by_tenant(store: Store) -> None:
    other = Record(0, 300, "node_joined", "", "", "n1")
    store.write_records([spooled(1, 2, 3)], [other])
    first = store.events(0, 2)
    assert [event.detail for event in first] == ["#1", "#2"]
    assert [event.detail for event in store.events(first[-1].id, 2)] == ["#3", "n1"]
    assert [event.detail for event in store.events(0, 2, newest=True)] == ["#3", "n1"]
    assert len(store.events(0, 100, "acme")) == 3
    assert [event.detail for event in store.events(0, 100, "acme", since_ms=103)] == ["#3"]


def test_events_go_with_their_tenant(store: Store, path: Path) -> None:
    store.write(EVERY_KIND, 1)
    store.write_records([spooled(1)])
    store.write(tenant_removal(reloaded(path), "acme"), 2)
    assert store.events(0, 100) == []


def test_text_that_no_database_can_hold_is_made_storable(store: Store) -> None:
    store.write_records([], [Record(0, 1, "k\ud800", "", "", "x" * 10_000)])
    (event,) = store.events(0, 1)
    assert event.kind == "k?"
    assert len(event.detail) == 2_000


def test_old_records_are_pruned(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.store.RECORDS_MAX", 10)
    monkeypatch.setattr("control.store.PRUNE_EVERY_RECORDS", 5)
    for first in range(1, 41, 5):
        store.write_records([spooled(*range(first, first + 5), after=first - 1)])
    assert len(store.events(0, 1000)) <= 15
    assert store.events(0, 1000)[-1].detail == "#40"
    assert RECORDS_MAX > 1000


def test_a_database_that_is_damaged_is_an_error_with_its_name(tmp_path: Path) -> None:
    bad = tmp_path / "control.db"
    bad.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        Store(bad)


def test_writes_survive_a_power_cut(store: Store, path: Path) -> None:
    """WAL with synchronous=FULL: the file is synced before a commit returns."""
    assert store.pragma("journal_mode") == "wal"
    assert store.pragma("synchronous") == "2"
    assert sqlite3.connect(path).execute("pragma journal_mode").fetchone() == ("wal",)
