"""The node's journal: what must survive a kill of the agent at any moment.

Covers: the last plan, the packs on disk with their wrapped data keys, the tenants' wrapped keys, and
the spool of records on their way to control. Does not cover: the pack files themselves
(``agent/packs.py``) or the node's certificate (``agent/uplink.py``).

SQLite in WAL mode with synchronous=FULL: what a call has returned from is on disk. Every method
blocks; the loop calls them on one writer thread, so they need no lock.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.counters import PendingRecord
from packer import seal
from packer.database import Database, Migrations
from packer.durable import write_private
from packer.types import ModelRef, parse_ref
from packer.wire import BadMessage, Plan, Record, decode, encode

# Records wait here while control is away: at 1 KiB each this bounds the journal to about 100 MiB.
# Beyond it the oldest go, and the gap in their sequence tells control how many.
SPOOL_RECORDS_MAX = 100_000
# A writer waits this long for another process that has the file open, such as a backup.
BUSY_TIMEOUT_MS = 5_000

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


class JournalFailed(OSError):
    """The journal can not be read or written now: most likely its disk is full."""


@dataclass(frozen=True, slots=True)
class PackRow:
    """A complete pack on disk."""

    ref: ModelRef
    disk_bytes: int
    host_bytes: int


def load_node_key(path: Path) -> bytes:
    """The 32-byte key that wraps every tenant's key; made once, readable by this user alone."""
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        key = os.urandom(32)
        write_private(path, key)
    if len(key) != 32:
        raise ValueError(
            f"{path}: a node key has 32 bytes, this file has {len(key)}; restore it from a backup"
        )
    return key


class Journal:
    """Open with the journal's path and the node key; close when the agent stops."""

    def __init__(self, path: Path, node_key: bytes) -> None:
        self._node_key = node_key
        self._connection = sqlite3.connect(path, check_same_thread=False)
        path.chmod(0o600)
        self._connection.execute("pragma journal_mode=wal")
        self._connection.execute("pragma synchronous=full")
        # Wrapped keys of a deleted tenant must not linger in free pages: that is the crypto-shred.
        self._connection.execute("pragma secure_delete=on")
        self._connection.execute(f"pragma busy_timeout={BUSY_TIMEOUT_MS}")
        self._db = Database(self._connection)
        migrations.apply(self._db)

    def close(self) -> None:
        self._connection.close()

    # --- the last plan ----------------------------------------------------------------------------

    def save_plan(self, plan: Plan) -> None:
        self._db.table("meta").upsert({"key": "plan", "value": encode(plan).decode()}, pk="key")

    def plan(self) -> Plan | None:
        """The last accepted plan; None on a new node or when an upgrade changed its shape."""
        rows = list(self._db.table("meta").rows_where("key = ?", ["plan"]))
        if not rows:
            return None
        try:
            return decode(str(rows[0]["value"]).encode(), Plan)
        except BadMessage:
            return None

    # --- packs and their keys ---------------------------------------------------------------------

    def packs(self) -> list[PackRow]:
        return [
            PackRow(parse_ref(row["ref"]), row["disk_bytes"], row["host_bytes"])
            for row in self._db.table("packs").rows_where(order_by="ref")
        ]

    def seal_new_key(self, ref: ModelRef) -> tuple[bytes, bytes]:
        """A fresh data key for a pack about to be written: (the key, the key wrapped by its tenant's)."""
        key = os.urandom(32)
        try:
            tenant_key = self._tenant_key(ref.tenant)
        except seal.BadSeal:
            # The node key was replaced. What this tenant's key protected is lost already; a new one
            # lets its models be packed again.
            self._db.table("tenant_keys").delete_where("tenant = ?", [ref.tenant])
            tenant_key = self._tenant_key(ref.tenant)
        return key, seal.wrap_key(tenant_key, key, str(ref).encode())

    def add_pack(self, row: PackRow, wrapped_key: bytes, now_ms: int) -> None:
        self._db.table("packs").upsert(
            {
                "ref": str(row.ref),
                "tenant": row.ref.tenant,
                "disk_bytes": row.disk_bytes,
                "host_bytes": row.host_bytes,
                "wrapped_key": wrapped_key,
                "created_ms": now_ms,
            },
            pk="ref",
        )

    def data_key(self, ref: ModelRef) -> bytes | None:
        """The key that opens a pack, or None when the journal knows no such pack."""
        rows = list(self._db.table("packs").rows_where("ref = ?", [str(ref)]))
        if not rows:
            return None
        return seal.unwrap_key(self._tenant_key(ref.tenant), rows[0]["wrapped_key"], str(ref).encode())

    def remove_pack(self, ref: ModelRef) -> None:
        self._db.table("packs").delete_where("ref = ?", [str(ref)])

    def _tenant_key(self, tenant: str) -> bytes:
        rows = list(self._db.table("tenant_keys").rows_where("tenant = ?", [tenant]))
        if rows:
            return seal.unwrap_key(self._node_key, rows[0]["wrapped_key"], tenant.encode())
        key = os.urandom(32)
        wrapped = seal.wrap_key(self._node_key, key, tenant.encode())
        self._db.table("tenant_keys").insert({"tenant": tenant, "wrapped_key": wrapped}, pk="tenant")
        return key

    def shred_tenants(self, kept: Sequence[str]) -> list[str]:
        """Destroy the key of every tenant not in ``kept``: what its packs held is unreadable from now on."""
        known = [str(row["tenant"]) for row in self._db.table("tenant_keys").rows]
        gone = [tenant for tenant in known if tenant not in kept]
        for tenant in gone:
            with self._db.atomic():
                self._db.table("packs").delete_where("tenant = ?", [tenant])
                self._db.table("tenant_keys").delete_where("tenant = ?", [tenant])
        if gone:
            # The write-ahead log still holds the old pages until it is truncated.
            self._connection.execute("pragma wal_checkpoint(truncate)")
        return gone

    # --- records on their way to control ----------------------------------------------------------

    def spool(self, records: Sequence[PendingRecord]) -> None:
        """Append records in one transaction; the oldest beyond the limit go."""
        with self._db.atomic():
            for record in records:
                row = {
                    "at_ms": record.at_ms,
                    "kind": record.kind,
                    "tenant": record.tenant,
                    "model": record.model,
                    "detail": record.detail,
                }
                last = self._db.table("spool").insert(row).last_pk
            if records and isinstance(last, int):
                self._db.table("spool").delete_where("seq <= ?", [last - SPOOL_RECORDS_MAX])

    def spooled(self, limit: int) -> tuple[Record, ...]:
        return tuple(
            Record(row["seq"], row["at_ms"], row["kind"], row["tenant"], row["model"], row["detail"])
            for row in self._db.table("spool").rows_where(order_by="seq", limit=limit)
        )

    def acknowledge(self, acked_seq: int) -> None:
        self._db.table("spool").delete_where("seq <= ?", [acked_seq])
