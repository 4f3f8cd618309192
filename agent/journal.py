"""The node's journal: what must survive a kill of the agent at any moment.

Covers: the last plan, the packs on disk and in the making with their wrapped data keys, the tenants'
wrapped keys and their rotation, what this machine measured of itself, and the spool of records on their
way to control. Does not cover: its tables (``agent/journal_tables.py``), what tenants used
(``agent/usage_spool.py``), the pack files themselves (``agent/packs.py``), the node's certificate
(``agent/uplink.py``), or the command that rotates keys (``agent/rotate.py``).

SQLite in WAL mode with synchronous=FULL: what a call has returned from is on disk. Every method
blocks; the loop calls them on one writer thread, so they need no lock.

Keys: the node key lies in a file, ``seal.key``, and wraps the tenants' keys in the journal, which wrap
the packs' data keys. While the node key is rotated the next one lies beside it, and the journal's own
word (``node_key_id``) says which of the two is in force: it changes in the transaction that wraps the
tenants' keys anew, so a kill at any moment leaves exactly one of them that opens everything.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.counters import PendingRecord
from agent.footprints import FootprintRow
from agent.journal_tables import migrations
from agent.remembering import REMEMBERED_MAX, Changed, RememberedNode, RememberedRow
from agent.spending import SpentRow
from agent.usage_spool import UsageSpool
from packer import remember, seal
from packer.database import Database
from packer.durable import sync_folder, write_private
from packer.events import NodeRemembered, UsesRemembered
from packer.footprint import Footprint
from packer.types import HostSizes, ModelRef, parse_ref
from packer.wire import BadMessage, Plan, Record, decode, encode

# Records wait here while control is away: at 1 KiB each this bounds the journal to about 100 MiB.
# Beyond it the oldest go, and the gap in their sequence tells control how many.
SPOOL_RECORDS_MAX = 100_000
# What a 64-bit column holds.
SPENT_MAX = 2**63 - 1
# A writer waits this long for another process that has the file open, such as a backup.
BUSY_TIMEOUT_MS = 5_000
# What a node measures of itself is a few KiB; more than this is not ours.
CALIBRATION_CHARS_MAX = 256 * 1024

# What is remembered of one model takes some 1.5 KB, at the most 6.
REMEMBERED_CHARS_MAX = 24 * 1024

NODE_KEY = "seal.key"
NEXT_NODE_KEY = "seal.key.next"
JOURNAL = "journal.db"


class JournalFailed(OSError):
    """The journal can not be read or written now: most likely its disk is full."""


@dataclass(frozen=True, slots=True)
class PackRow:
    """A complete pack on disk. ``host`` None: written by an earlier release, which knew ``host_bytes``
    alone, the size of the stored form. ``disk_bytes``: of its own file."""

    ref: ModelRef
    disk_bytes: int
    host_bytes: int
    host: HostSizes | None = None
    deduplicated_bytes: int = 0
    created_ms: int = field(default=0, compare=False)

    @property
    def read_bytes(self) -> int:
        """What a restore reads: the size of a segment in stored form, wherever its extents lie on disk."""
        return self.host.stored_bytes if self.host is not None else self.host_bytes


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What a rotation did: tenants whose key is under the new one now, and those whose key the old one
    could not open either (``seal.key`` was replaced once); theirs stay as they were."""

    tenants: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


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


def node_key_id(node_key: bytes) -> str:
    """Tells node keys apart and says nothing of them."""
    return hmac.new(node_key, b"bunkhouse node key id", hashlib.sha256).hexdigest()[:32]


def open_journal(data_dir: Path) -> Journal:
    """The journal of a data directory with the node key that is in force, also after a rotation was
    killed half way: then this ends it, or takes its unused key away."""
    key_path, next_path = data_dir / NODE_KEY, data_dir / NEXT_NODE_KEY
    node_key = load_node_key(key_path)
    if next_path.exists():
        next_key = load_node_key(next_path)
        if stated_node_key_id(data_dir / JOURNAL) == node_key_id(next_key):
            put_in_force(data_dir)
            node_key = next_key
        else:
            next_path.unlink()
    return Journal(data_dir / JOURNAL, node_key)


def put_in_force(data_dir: Path) -> None:
    """The journal is under the next node key: let it take the place of the old one, for good."""
    os.replace(data_dir / NEXT_NODE_KEY, data_dir / NODE_KEY)
    sync_folder(data_dir)


def stated_node_key_id(path: Path) -> str | None:
    """Which node key the journal says it is under; None for a new journal or an old release's."""
    if not path.exists():
        return None
    connection = sqlite3.connect(path)
    try:
        connection.execute(f"pragma busy_timeout={BUSY_TIMEOUT_MS}")
        row = connection.execute("select value from meta where key = 'node_key_id'").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
    finally:
        connection.close()
    return None if row is None else str(row[0])


def _host_sizes(row: Mapping[str, Any]) -> HostSizes | None:
    if row["host_stored_bytes"] is None:
        return None
    return HostSizes(row["host_stored_bytes"], row["host_wire_bytes"], row["host_raw_bytes"])


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
        self.usage = UsageSpool(self._db)
        if self._meta("node_key_id") != node_key_id(node_key):
            self._set_meta("node_key_id", node_key_id(node_key))
        # Tells this spool's numbers from those of another journal, such as the one before it was lost.
        self.spool_id = self._meta("spool_id") or os.urandom(8).hex()
        self._set_meta("spool_id", self.spool_id)
        with suppress(JournalFailed):  # it stays due
            self.scrub()

    def close(self) -> None:
        self._connection.close()

    def _meta(self, key: str) -> str | None:
        rows = list(self._db.table("meta").rows_where("key = ?", [key]))
        return str(rows[0]["value"]) if rows else None

    def _set_meta(self, key: str, value: str) -> None:
        self._db.table("meta").upsert({"key": key, "value": value}, pk="key")

    # --- the last plan, the last measurements -----------------------------------------------------

    def save_plan(self, plan: Plan) -> None:
        self._set_meta("plan", encode(plan).decode())

    def plan(self) -> Plan | None:
        """The last accepted plan; None on a new node or when an upgrade changed its shape."""
        text = self._meta("plan")
        try:
            return None if text is None else decode(text.encode(), Plan)
        except BadMessage:
            return None

    def save_calibration(self, text: str) -> None:
        """Keep what this machine measured of itself; raises ``ValueError`` when it is too long."""
        if len(text) > CALIBRATION_CHARS_MAX:
            raise ValueError(f"a calibration of {len(text)} characters is above {CALIBRATION_CHARS_MAX}")
        self._set_meta("calibration", text)

    def calibration(self) -> str | None:
        """As it was saved; None when this machine never measured itself."""
        return self._meta("calibration")

    def save_shares(self, text: str) -> None:
        """This node's part of its tenants' limits, as it will be in force."""
        self._set_meta("shares", text)

    def shares(self) -> str | None:
        return self._meta("shares")

    def save_spent(self, rows: Sequence[SpentRow]) -> None:
        """What tenants owe of their rates, in place of what was written before; no more rows than tenants."""
        with self._db.atomic():
            table = self._db.table("spent")
            table.delete_where()
            for row in rows:
                # A debt that no column holds is one that nobody lives to pay.
                owed = [min(amount, SPENT_MAX) for amount in (row.tokens, row.device_ms)]
                table.insert(
                    {"tenant": row.tenant, "tokens": owed[0], "device_ms": owed[1], "at_ms": row.at_ms}
                )

    def spent(self) -> list[SpentRow]:
        rows = self._db.table("spent").rows_where(order_by="tenant")
        return [SpentRow(row["tenant"], row["tokens"], row["device_ms"], row["at_ms"]) for row in rows]

    def save_debts(self, debts: Mapping[str, int]) -> None:
        """What tenants owe in cold milliseconds, in place of what was written before; a row per tenant."""
        with self._db.atomic():
            table = self._db.table("debts")
            table.delete_where()
            for tenant, debt_ms in debts.items():
                table.insert({"tenant": tenant, "debt_ms": min(max(debt_ms, -SPENT_MAX), SPENT_MAX)})

    def debts(self) -> dict[str, int]:
        rows = self._db.table("debts").rows_where(order_by="tenant")
        return {row["tenant"]: row["debt_ms"] for row in rows}

    def save_remembered(self, changed: Changed) -> None:
        """Keep what was learned of uses; models that the node knows no more, or too many, are forgotten,
        the longest unused first."""
        with self._db.atomic():
            table = self._db.table("remembered")
            for row in changed.rows:
                text = encode(row.uses.uses).decode()
                if len(text) + len(row.uses.restores) > REMEMBERED_CHARS_MAX:
                    continue
                table.upsert(
                    {
                        "ref": str(row.uses.ref),
                        "tenant": row.uses.ref.tenant,
                        "uses": text,
                        "restores": row.uses.restores,
                        "at_ms": row.at_ms,
                        "used_ms": row.used_ms,
                    },
                    pk="ref",
                )
            kept = {str(ref) for ref in changed.known}
            for text in sorted({str(row["ref"]) for row in table.rows_where(select="ref")} - kept):
                table.delete_where("ref = ?", [text])
            self._db.execute(
                "delete from remembered where ref in "
                "(select ref from remembered order by used_ms desc, ref limit -1 offset ?)",
                [REMEMBERED_MAX],
            )
            node = changed.node
            self._set_meta("remembered", encode([node.at_ms, node.node.shared, node.node.restores]).decode())

    def remembered(self) -> list[RememberedRow]:
        """What can be read of it; a row of another version, or of nobody, is left out."""
        found: list[RememberedRow] = []
        for row in self._db.table("remembered").rows_where(order_by="ref", limit=REMEMBERED_MAX):
            with suppress(ValueError, TypeError):
                uses = decode(str(row["uses"]).encode(), tuple[float, ...])
                event = UsesRemembered(parse_ref(row["ref"]), uses, str(row["restores"]), 0)
                if remember.readable(event):
                    found.append(RememberedRow(event, int(row["at_ms"]), int(row["used_ms"])))
        return found

    def remembered_node(self) -> RememberedNode | None:
        text = self._meta("remembered")
        with suppress(ValueError):
            if text is not None:
                at_ms, shared, restores = decode(text.encode(), tuple[int, tuple[float, ...], str])
                event = NodeRemembered(shared, restores, 0)
                return RememberedNode(event, at_ms) if remember.readable(event) else None
        return None

    def save_footprints(self, rows: Sequence[FootprintRow], planned: Collection[ModelRef]) -> None:
        """Keep what was measured; what is not planned any more is forgotten."""
        with self._db.atomic():
            table = self._db.table("footprints")
            for row in rows:
                known = row.footprint
                table.upsert(
                    {
                        "ref": str(row.ref),
                        "kind": row.kind,
                        "engine": row.engine,
                        "peak_bytes": known.peak_bytes,
                        "samples": known.samples,
                    },
                    pk=("ref", "kind"),
                )
            kept = {str(ref) for ref in planned}
            for text in {str(row["ref"]) for row in table.rows} - kept:
                table.delete_where("ref = ?", [text])

    def footprints(self) -> list[FootprintRow]:
        return [
            FootprintRow(
                parse_ref(row["ref"]),
                row["engine"],
                row["kind"],
                Footprint(row["peak_bytes"], row["samples"]),
            )
            for row in self._db.table("footprints").rows_where(order_by="ref, kind")
        ]

    # --- packs and their keys ---------------------------------------------------------------------

    def packs(self) -> list[PackRow]:
        return [
            PackRow(
                parse_ref(row["ref"]),
                row["disk_bytes"],
                row["host_bytes"],
                _host_sizes(row),
                row["deduplicated_bytes"] or 0,
                row["created_ms"],
            )
            for row in self._db.table("packs").rows_where(order_by="ref")
        ]

    def seal_new_key(self, ref: ModelRef) -> tuple[bytes, bytes]:
        """A fresh data key for a pack about to be written: (the key, the key wrapped by its tenant's)."""
        return self.wrap_data_key(ref, os.urandom(32))

    def wrap_data_key(self, ref: ModelRef, key: bytes) -> tuple[bytes, bytes]:
        """A data key that came from elsewhere, such as a peer's: (the key, wrapped by our tenant's)."""
        try:
            tenant_key = self._tenant_key(ref.tenant)
        except seal.BadSeal:
            # The node key was replaced. What this tenant's key protected is lost already; a new one
            # lets its models be packed again.
            self._db.table("tenant_keys").delete_where("tenant = ?", [ref.tenant])
            tenant_key = self._tenant_key(ref.tenant)
        return key, seal.wrap_key(tenant_key, key, str(ref).encode())

    def seal_partial_key(self, ref: ModelRef, now_ms: int = 0) -> tuple[bytes, bytes]:
        """The data key of a pack in the making: the same one until ``add_pack`` or ``forget_partial``,
        so that an interrupted ingest goes on after a restart. (The key, the key wrapped by its tenant's.)
        """
        rows = list(self._db.table("partial_packs").rows_where("ref = ?", [str(ref)]))
        if rows:
            wrapped = bytes(rows[0]["wrapped_key"])
            try:
                return seal.unwrap_key(self._tenant_key(ref.tenant), wrapped, str(ref).encode()), wrapped
            except seal.BadSeal:
                pass  # the node key was replaced: what lies on disk is lost, a new key starts afresh
        key, wrapped = self.seal_new_key(ref)
        row = {"ref": str(ref), "tenant": ref.tenant, "wrapped_key": wrapped, "created_ms": now_ms}
        self._db.table("partial_packs").upsert(row, pk="ref")
        return key, wrapped

    def partial_packs(self) -> list[ModelRef]:
        """Packs in the making that have a key here, oldest first."""
        rows = self._db.table("partial_packs").rows_where(order_by="created_ms, ref")
        return [parse_ref(row["ref"]) for row in rows]

    def forget_partial(self, ref: ModelRef) -> None:
        """The pack in the making is given up; what lies on disk of it can not be opened from now on."""
        self._db.table("partial_packs").delete_where("ref = ?", [str(ref)])

    def add_pack(self, row: PackRow, wrapped_key: bytes, now_ms: int, proven: bool = True) -> None:
        """The pack is complete; it is no longer in the making. Not ``proven``: another node made it, and
        nobody has seen yet that it holds the registered weights."""
        host = row.host
        with self._db.atomic():
            self._db.table("packs").upsert(
                {
                    "ref": str(row.ref),
                    "tenant": row.ref.tenant,
                    "disk_bytes": row.disk_bytes,
                    "host_bytes": row.host_bytes,
                    "host_stored_bytes": None if host is None else host.stored_bytes,
                    "host_wire_bytes": None if host is None else host.wire_bytes,
                    "host_raw_bytes": None if host is None else host.raw_bytes,
                    "wrapped_key": wrapped_key,
                    "created_ms": now_ms,
                    "deduplicated_bytes": row.deduplicated_bytes,
                    "unproven": int(not proven),
                },
                pk="ref",
            )
            self.forget_partial(row.ref)

    def note_proven(self, ref: ModelRef, proven: bool = True) -> None:
        """The pack was seen to hold the registered weights; or foreign bytes are to come into it."""
        self._db.table("packs").update(str(ref), {"unproven": int(not proven)})

    def remove_unproven(self) -> list[ModelRef]:
        """Forget the packs whose proof was cut short by a crash; returns them. Their files may go."""
        refs = [parse_ref(row["ref"]) for row in self._db.table("packs").rows_where("unproven = 1")]
        for ref in refs:
            self.remove_pack(ref)
        return refs

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
                self._db.table("partial_packs").delete_where("tenant = ?", [tenant])
                self._db.table("tenant_keys").delete_where("tenant = ?", [tenant])
                self._db.table("remembered").delete_where("tenant = ?", [tenant])
                self.usage.forget_tenants([tenant])
                self._set_meta("scrub", "due")
        self.scrub()
        return gone

    def scrub(self) -> None:
        """Take keys that are no more out of the write-ahead log, which holds old pages until it is
        truncated. Raises ``JournalFailed`` while somebody else reads the file; it stays due until done.
        """
        if self._meta("scrub") is None:
            return
        busy, _, _ = self._connection.execute("pragma wal_checkpoint(truncate)").fetchone()
        if busy:
            raise JournalFailed(
                "the journal: another process is reading it, so destroyed keys can not be removed from its "
                "write-ahead log yet; end that process (a backup?)"
            )
        self._db.table("meta").delete_where("key = ?", ["scrub"])

    # --- rotation ---------------------------------------------------------------------------------

    def rotate_node_key(self, new_key: bytes) -> Rewrapped:
        """Wrap every tenant's key under ``new_key``, in one transaction; no pack is touched.

        The caller has the new key in ``NEXT_NODE_KEY`` before, and puts it in force and scrubs afterwards.
        """
        done: list[str] = []
        unreadable: list[str] = []
        with self._db.atomic():
            for row in list(self._db.table("tenant_keys").rows):
                tenant = str(row["tenant"])
                try:
                    key = seal.unwrap_key(self._node_key, row["wrapped_key"], tenant.encode())
                except seal.BadSeal:
                    unreadable.append(tenant)
                    continue
                wrapped = seal.wrap_key(new_key, key, tenant.encode())
                self._db.table("tenant_keys").update(tenant, {"wrapped_key": wrapped})
                done.append(tenant)
            self._set_meta("node_key_id", node_key_id(new_key))
            self._set_meta("scrub", "due")
        self._node_key = new_key
        return Rewrapped(tuple(done), tuple(unreadable))

    def rotate_tenant_key(self, tenant: str) -> int:
        """Give a tenant a new key and wrap its data keys under it, in one transaction; no pack is touched.
        The caller scrubs afterwards.

        Returns how many data keys there were. Raises ``seal.BadSeal`` when one of them does not open
        (nothing has changed then), ``LookupError`` when the tenant has no key here.
        """
        if not list(self._db.table("tenant_keys").rows_where("tenant = ?", [tenant])):
            raise LookupError(f"tenant {tenant} has no key on this node")
        old_key, new_key = self._tenant_key(tenant), os.urandom(32)
        count = 0
        with self._db.atomic():
            for table in ("packs", "partial_packs"):
                for row in list(self._db.table(table).rows_where("tenant = ?", [tenant])):
                    ref = str(row["ref"])
                    key = seal.unwrap_key(old_key, row["wrapped_key"], ref.encode())
                    wrapped = seal.wrap_key(new_key, key, ref.encode())
                    self._db.table(table).update(ref, {"wrapped_key": wrapped})
                    count += 1
            wrapped = seal.wrap_key(self._node_key, new_key, tenant.encode())
            self._db.table("tenant_keys").update(tenant, {"wrapped_key": wrapped})
            self._set_meta("scrub", "due")
        return count

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
