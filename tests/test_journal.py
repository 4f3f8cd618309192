"""The journal keeps what it has acknowledged, and forgets a tenant for good."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from agent.counters import PendingRecord
from agent.journal import SPOOL_RECORDS_MAX, Journal, PackRow, load_node_key
from packer.types import ModelRef, Task, TenantSpec
from packer.types import ModelSpec as Spec
from packer.wire import WIRE_VERSION, Plan

REF = ModelRef("acme", "minilm", "0" * 16)
OTHER = ModelRef("globex", "tiny", "1" * 16)


def open_journal(directory: Path) -> Journal:
    return Journal(directory / "journal.db", load_node_key(directory / "seal.key"))


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
