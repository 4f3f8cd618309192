"""The tables of the node's journal, as each release added to them.

Covers: the migrations, in order; one that was released is never changed. Does not cover: what is written
(``agent/journal.py``, ``agent/usage_spool.py``).
"""

from __future__ import annotations

from agent.usage_spool import create_tables
from packer.database import Database, Migrations

migrations = Migrations("journal")


@migrations()
def m001_first_tables(db: Database) -> None:
    db.table("meta").create({"key": str, "value": str}, pk="key")
    db.table("packs").create(
        {
            "ref": str,
            "tenant": str,
            "disk_bytes": int,
            "host_bytes": int,
            "wrapped_key": bytes,
            "created_ms": int,
        },
        pk="ref",
    )
    db.table("tenant_keys").create({"tenant": str, "wrapped_key": bytes}, pk="tenant")
    db.execute(
        "create table spool (seq integer primary key autoincrement, at_ms integer not null, "
        "kind text not null, tenant text not null, model text not null, detail text not null)"
    )


@migrations()
def m002_partial_packs_and_measurements(db: Database) -> None:
    for form in ("stored", "wire", "raw"):
        db.table("packs").add_column(f"host_{form}_bytes", int)
    db.table("partial_packs").create(
        {"ref": str, "tenant": str, "wrapped_key": bytes, "created_ms": int}, pk="ref"
    )


@migrations()
def m003_footprints(db: Database) -> None:
    columns = {"ref": str, "kind": str, "engine": str, "peak_bytes": int, "samples": int}
    db.table("footprints").create(columns, pk=("ref", "kind"))


@migrations()
def m004_spent(db: Database) -> None:
    columns = {"tenant": str, "tokens": int, "device_ms": int, "at_ms": int}
    db.table("spent").create(columns, pk="tenant")


@migrations()
def m005_deduplicated_bytes(db: Database) -> None:
    db.table("packs").add_column("deduplicated_bytes", int)


@migrations()
def m006_debts(db: Database) -> None:
    db.table("debts").create({"tenant": str, "debt_ms": int}, pk="tenant")


@migrations()
def m007_remembered(db: Database) -> None:
    columns = {"ref": str, "tenant": str, "uses": str, "restores": str, "at_ms": int, "used_ms": int}
    db.table("remembered").create(columns, pk="ref")


@migrations()
def m008_unproven_packs(db: Database) -> None:
    db.table("packs").add_column("unproven", int)


@migrations()
def m009_usage(db: Database) -> None:
    create_tables(db)
