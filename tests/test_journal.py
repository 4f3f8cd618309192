"""The journal keeps what it has acknowledged, and forgets a tenant for good."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from agent.counters import PendingRecord
from agent.journal import (
    CALIBRATION_CHARS_MAX,
    SPOOL_RECORDS_MAX,
    Journal,
    PackRow,
    load_node_key,
    open_journal,
)
from packer import seal
from packer.types import HostSizes, ModelRef, Task, TenantSpec
from packer.types import ModelSpec as Spec
from packer.wire import WIRE_VERSION, Plan

REF = ModelRef("acme", "minilm", "0" * 16)
OTHER = ModelRef("globex", "tiny", "1" * 16)


def plan(seq: int) -> Plan:
    spec = Spec(REF, "control:", (), "transformers", Task.EMBEDDING, 4096, (4096,), 0, 1)
    return Plan(WIRE_VERSION, "c", "n", 1, seq, (TenantSpec("acme"),), (), (spec,))


def test_what_was_written_is_there_after_a_crash(tmp_path: Path) -> None:
    """A second journal on the same files, opened without closing the first, sees every write."""
    first = open_journal(tmp_path)
    first.save_plan(plan(1))
    first.save_plan(plan(2))
    key, wrapped = first.seal_new_key(REF)
    first.add_pack(PackRow(REF, 10, 12), wrapped, 5)
    first.spool([PendingRecord(1, "restored", "acme", str(REF), "x")])
    second = open_journal(tmp_path)
    assert second.plan() == plan(2)
    assert second.packs() == [PackRow(REF, 10, 12)]
    assert second.data_key(REF) == key
    assert [record.kind for record in second.spooled(10)] == ["restored"]


def test_acknowledged_records_leave_and_sequence_goes_on(tmp_path: Path) -> None:
    """A sequence number is never used twice, so that control can tell a repeat from a new record."""
    journal = open_journal(tmp_path)
    journal.spool([PendingRecord(1, "a", "acme", "", ""), PendingRecord(2, "b", "acme", "", "")])
    last = journal.spooled(10)[-1].seq
    journal.acknowledge(last)
    assert journal.spooled(10) == ()
    journal.spool([PendingRecord(3, "c", "acme", "", "")])
    assert [record.seq for record in journal.spooled(10)] == [last + 1]


def test_spool_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest records go when control stays away."""
    monkeypatch.setattr("agent.journal.SPOOL_RECORDS_MAX", 5)
    journal = open_journal(tmp_path)
    for at_ms in range(12):
        journal.spool([PendingRecord(at_ms, "a", "acme", "", "")])
    assert [record.at_ms for record in journal.spooled(100)] == [7, 8, 9, 10, 11]
    assert SPOOL_RECORDS_MAX > 5


def test_shredding_a_tenant_destroys_its_keys_and_nobody_elses(tmp_path: Path) -> None:
    """After the shred no byte of the wrapped keys is left in the journal's files."""
    journal = open_journal(tmp_path)
    for ref in (REF, OTHER):
        _, wrapped = journal.seal_new_key(ref)
        journal.add_pack(PackRow(ref, 1, 1), wrapped, 0)
    raw = sqlite3.connect(tmp_path / "journal.db")
    gone = raw.execute("select wrapped_key from tenant_keys where tenant = 'acme'").fetchone()[0]
    gone_pack = raw.execute("select wrapped_key from packs where tenant = 'acme'").fetchone()[0]
    raw.close()
    assert journal.shred_tenants(["globex"]) == ["acme"]
    assert journal.data_key(REF) is None
    assert journal.data_key(OTHER) is not None
    left = b"".join(path.read_bytes() for path in tmp_path.glob("journal.db*"))
    assert bytes(gone) not in left
    assert bytes(gone_pack) not in left


def test_a_pack_in_the_making_keeps_its_key_until_it_is_complete_or_given_up(tmp_path: Path) -> None:
    """Also across a crash, so that an interrupted ingest goes on; afterwards the key is another one."""
    journal = open_journal(tmp_path)
    key, wrapped = journal.seal_partial_key(REF, 7)
    journal = open_journal(tmp_path)
    assert journal.seal_partial_key(REF) == (key, wrapped)
    assert journal.partial_packs() == [REF]
    assert journal.data_key(REF) is None, "it is no pack yet"
    journal.add_pack(PackRow(REF, 1, 2, HostSizes(2, 3, 4)), wrapped, 0)
    assert journal.partial_packs() == []
    assert journal.data_key(REF) == key
    other, _ = journal.seal_partial_key(OTHER)
    journal.forget_partial(OTHER)
    assert journal.seal_partial_key(OTHER)[0] != other


def test_a_pack_in_the_making_under_a_lost_node_key_starts_afresh(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    key, _ = journal.seal_partial_key(REF)
    after = Journal(tmp_path / "journal.db", b"\x01" * 32)
    fresh, wrapped = after.seal_partial_key(REF)
    assert fresh != key
    assert after.seal_partial_key(REF) == (fresh, wrapped)


def test_sizes_of_every_host_form_are_kept(tmp_path: Path) -> None:
    """A row of an earlier release has none; its one figure stays readable."""
    journal = open_journal(tmp_path)
    _, wrapped = journal.seal_new_key(REF)
    row = PackRow(REF, 10, 12, HostSizes(12, 14, 20))
    journal.add_pack(row, wrapped, 0)
    old = PackRow(OTHER, 3, 4)
    journal.add_pack(old, wrapped, 0)
    assert open_journal(tmp_path).packs() == [row, old]


def test_a_journal_of_the_first_release_is_taken_over(tmp_path: Path) -> None:
    """Its tables get the new columns; its packs and keys stay."""
    key = load_node_key(tmp_path / "seal.key")
    raw = sqlite3.connect(tmp_path / "journal.db")
    for statement in FIRST_RELEASE:
        raw.execute(statement)
    tenant_key = os.urandom(32)
    wrapped = seal.wrap_key(key, tenant_key, b"acme")
    raw.execute("insert into tenant_keys values ('acme', ?)", [wrapped])
    pack_key = os.urandom(32)
    pack = (str(REF), "acme", 10, 12, seal.wrap_key(tenant_key, pack_key, str(REF).encode()), 1)
    raw.execute("insert into packs values (?, ?, ?, ?, ?, ?)", pack)
    raw.commit()
    raw.close()
    journal = open_journal(tmp_path)
    assert journal.packs() == [PackRow(REF, 10, 12)]
    assert journal.data_key(REF) == pack_key
    assert journal.seal_partial_key(OTHER)[0] != pack_key


FIRST_RELEASE = (
    "create table _sqlite_migrations "
    "(id integer primary key, migration_set text, name text, applied_at text)",
    "insert into _sqlite_migrations (migration_set, name, applied_at) "
    "values ('journal', 'm001_first_tables', '2026-01-01')",
    "create table meta (key text primary key, value text)",
    "create table packs (ref text primary key, tenant text, disk_bytes integer, host_bytes integer, "
    "wrapped_key blob, created_ms integer)",
    "create table tenant_keys (tenant text primary key, wrapped_key blob)",
    "create table spool (seq integer primary key autoincrement, at_ms integer not null, "
    "kind text not null, tenant text not null, model text not null, detail text not null)",
)


def test_a_calibration_is_kept_as_it_is_and_bounded(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    assert journal.calibration() is None
    journal.save_calibration('{"disk": 1}')
    journal.save_calibration('{"disk": 2}')
    assert open_journal(tmp_path).calibration() == '{"disk": 2}'
    with pytest.raises(ValueError, match="above"):
        journal.save_calibration("x" * (CALIBRATION_CHARS_MAX + 1))


def test_another_node_key_opens_nothing(tmp_path: Path) -> None:
    """A stolen journal is useless without the node key."""
    journal = open_journal(tmp_path)
    _, wrapped = journal.seal_new_key(REF)
    journal.add_pack(PackRow(REF, 1, 1), wrapped, 0)
    thief = Journal(tmp_path / "journal.db", b"\x00" * 32)
    with pytest.raises(ValueError, match="key"):
        thief.data_key(REF)


def test_node_key_is_private_and_checked(tmp_path: Path) -> None:
    """The key file is readable by its owner alone, and a cut one is refused with its path."""
    load_node_key(tmp_path / "seal.key")
    assert (tmp_path / "seal.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "seal.key").write_bytes(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        load_node_key(tmp_path / "seal.key")


def test_a_pack_whose_proof_was_cut_short_is_forgotten_at_the_next_start(tmp_path: Path) -> None:
    first = open_journal(tmp_path)
    for ref, proven in ((REF, False), (OTHER, True)):
        _, wrapped = first.seal_new_key(ref)
        first.add_pack(PackRow(ref, 10, 12), wrapped, 5, proven)
    second = open_journal(tmp_path)
    assert second.remove_unproven() == [REF]
    assert [row.ref for row in second.packs()] == [OTHER]
    # The same pack, proven in time.
    _, wrapped = second.seal_new_key(REF)
    second.add_pack(PackRow(REF, 10, 12), wrapped, 5, proven=False)
    second.note_proven(REF)
    assert open_journal(tmp_path).remove_unproven() == []
