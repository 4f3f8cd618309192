"""Durable state of control: SQLite through sqlite-utils, with migrations.

Covers: the tables, writing a list of changes in one transaction, loading everything at the start,
the plan's epoch and number, the cluster's id, and the records behind ``bunk events``. Does not cover:
which changes are allowed (``control.catalog``, ``control.routes``), or which thread calls
(``control.server`` runs every write on one thread and event reads on another).

Durable means: when ``write`` has returned, the changes survive ``kill -9`` and a power cut (WAL with
``synchronous=FULL``). A ``Store`` belongs to the thread that opened it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import msgspec

from control import catalog as rows
from control import usage_tables
from control.catalog import Catalog, Change
from packer.database import Database, Migrations
from packer.types import ModelRef, ModelSpec, OriginFile, TenantQuota
from packer.usage import NO_USAGE, UsageBatch, UsageRow
from packer.wire import Record

# Kept for ``bunk events``; the oldest go first. About 40 MB of disk.
RECORDS_MAX = 200_000
# The oldest are removed after this many insertions, so that pruning costs nothing per beat.
PRUNE_EVERY_RECORDS = 2_000
# Longest texts of one record that are kept.
DETAIL_CHARS_MAX = 2_000
WORD_CHARS_MAX = 200
# How long a statement waits for another process that holds the file, for example a backup.
BUSY_TIMEOUT_MS = 5_000
# Events read by one call.
EVENTS_PAGE_MAX = 1_000

migrations = Migrations("control")

Row = (
    rows.TenantRow
    | rows.KeyRow
    | rows.UploadRow
    | rows.NodeRow
    | rows.RouterRow
    | rows.TokenRow
    | rows.ReplayRow
)


@migrations()
def m001_first(db: Database) -> None:
    """The tables of the first release."""
    for statement in (
        "create table meta (name text primary key, value text not null) strict",
        "create table tenants (tenant text primary key, created_ms integer not null) strict",
        "create table quotas (tenant text primary key references tenants, quota text not null) strict",
        "create table keys (key_id text primary key, secret_sha256 text not null, tenant text, "
        "label text not null, created_ms integer not null, expires_ms integer) strict",
        "create table models (tenant text not null references tenants, name text not null, "
        "version text not null, latest integer not null, created_ms integer not null, "
        "spec text not null, primary key (tenant, name, version)) strict",
        "create unique index models_latest on models (tenant, name) where latest = 1",
        "create table uploads (upload_id text primary key, tenant text not null references tenants, "
        "name text not null, version text not null, created_ms integer not null, "
        "committed integer not null, files text not null) strict",
        "create table nodes (node text primary key, incarnation text not null unique, "
        "key_sha256 text not null, gateway_url text not null, joined_ms integer not null, "
        "acked_seq integer not null) strict",
        "create table tokens (token_id text primary key, secret_sha256 text not null, node text, "
        "created_ms integer not null, expires_ms integer not null, used_key_sha256 text, "
        "used_node text) strict",
        "create table records (id integer primary key autoincrement, node text not null, "
        "incarnation text not null, seq integer not null, at_ms integer not null, kind text not null, "
        "tenant text not null, model text not null, detail text not null) strict",
        "create unique index records_once on records (incarnation, seq) where incarnation <> ''",
        "create index records_tenant on records (tenant, id)",
    ):
        db.execute(statement)


@migrations()
def m002_spools(db: Database) -> None:
    """Records are told apart by the spool that counts them, not by when their node joined."""
    db.execute("alter table nodes add column spool text not null default ''")


@migrations()
def m003_replays(db: Database) -> None:
    """Answers that are given again when their request is sent again."""
    db.execute(
        "create table replays (slot text primary key, owner text not null, fingerprint text not null, "
        "made_ms integer not null, sealed blob not null) strict"
    )
    db.execute("create index replays_owner on replays (owner, made_ms)")


@migrations()
def m004_pools(db: Database) -> None:
    """Nodes and join tokens are of a pool."""
    for table in ("nodes", "tokens"):
        db.execute(f"alter table {table} add column pool text not null default 'default'")


@migrations()
def m005_usage(db: Database) -> None:
    """What tenants used, and which of nodes' batches of it are counted."""
    usage_tables.create_tables(db)


@migrations()
def m006_routers(db: Database) -> None:
    """Routers that are processes of their own, and tokens for them."""
    db.execute(
        "create table routers (router text primary key, incarnation text not null unique, "
        "key_sha256 text not null, joined_ms integer not null) strict"
    )
    db.execute("alter table tokens add column joiner text not null default 'node'")


@migrations()
def m007_draining(db: Database) -> None:
    """Nodes that are told to take no more requests."""
    db.execute("alter table nodes add column draining integer not null default 0")


class StoreUnavailable(Exception):
    """The database could not be read or written (disk full, I/O error, held by another process)."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What identifies this control: the cluster, and the number that its next plans carry."""

    cluster: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Event:
    """One stored record with the node that sent it ("control" for control's own)."""

    id: int
    node: str
    at_ms: int
    kind: str
    tenant: str
    model: str
    detail: str


@dataclass(frozen=True, slots=True)
class SpooledRecords:
    """Records of one beat; those at or below ``after_seq`` are known and skipped. And what tenants used,
    under a number of its own: known and skipped when it was counted before."""

    node: str
    incarnation: str
    after_seq: int
    records: tuple[Record, ...]
    spool: str = ""
    usage: UsageBatch = NO_USAGE
    now_ms: int = 0  # control's wall clock when they came

    @property
    def counted_by(self) -> str:
        """What tells these sequences from others: the node's own spool, which a node that was removed and
        joins again goes on with. Under the node's name, so that no node can speak for another's."""
        return f"{self.node}/{self.spool}" if self.spool else self.incarnation


@dataclass(frozen=True, slots=True)
class Acked:
    """The highest numbers that are stored now, by what counts them: of records, and of batches of usage."""

    records: dict[str, int]
    usage: dict[str, int]


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreUnavailable(f"control's database: {error}") from error


class Store:
    """One connection to the database file. Open, use and close it on one thread."""

    def __init__(self, path: Path) -> None:
        with _mapped():
            # No plugins: code of other packages has no business in control's database.
            self._db = Database(sqlite3.connect(path), execute_plugins=False)
            for pragma in (
                "journal_mode = wal",
                "synchronous = full",
                "foreign_keys = on",
                f"busy_timeout = {BUSY_TIMEOUT_MS}",
            ):
                self._db.execute(f"pragma {pragma}").fetchall()
            migrations.apply(self._db)
        self._until_prune = 0

    def close(self) -> None:
        self._db.close()

    def pragma(self, name: str) -> str:
        """A setting of the connection, as text."""
        with _mapped():
            return str(self._db.execute(f"pragma {name}").fetchone()[0])

    # --- start ---

    def start(self, new_cluster: str, epoch_least: int = 1) -> Meta:
        """Raise the epoch and return what this control is. ``new_cluster`` is used on the first start."""
        with _mapped(), self._db.atomic():
            known = dict(self._db.execute("select name, value from meta").fetchall())
            cluster = known.get("cluster", new_cluster)
            epoch = max(int(known.get("epoch", "0")) + 1, epoch_least)
            seq = int(known.get("seq", "1"))
            for name, value in (("cluster", cluster), ("epoch", epoch), ("seq", seq)):
                self._put_meta(name, str(value))
        return Meta(cluster, epoch, seq)

    def _put_meta(self, name: str, value: str) -> None:
        self._db.execute("insert or replace into meta (name, value) values (?, ?)", (name, value))

    def load(self) -> Catalog:
        """Read every row into a fresh catalog."""
        loaded = Catalog()
        with _mapped():
            for change in self._all_rows():
                loaded.apply(change, 0)
        return loaded

    def _all_rows(self) -> Iterator[Change]:
        query = self._db.execute
        for row in query("select tenant, created_ms from tenants"):
            yield rows.PutTenant(rows.TenantRow(*row))
        for tenant, quota in query("select tenant, quota from quotas"):
            yield rows.PutQuota(tenant, msgspec.json.decode(quota, type=TenantQuota))
        for row in query("select key_id, secret_sha256, tenant, label, created_ms, expires_ms from keys"):
            yield rows.PutKey(rows.KeyRow(*row))
        for (spec,) in query("select spec from models"):
            yield rows.PutModel(msgspec.json.decode(spec, type=ModelSpec))
        for upload_id, tenant, name, version, files, created_ms, committed in query(
            "select upload_id, tenant, name, version, files, created_ms, committed from uploads"
        ):
            declared = msgspec.json.decode(files, type=tuple[OriginFile, ...])
            yield rows.PutUpload(
                rows.UploadRow(upload_id, tenant, name, version, declared, created_ms, bool(committed))
            )
        for *row, draining in query(
            "select node, incarnation, key_sha256, gateway_url, joined_ms, acked_seq, spool, pool, draining "
            "from nodes"
        ):
            yield rows.PutNode(replace(rows.NodeRow(*row), draining=bool(draining)))
        for *row, joiner in query(
            "select token_id, secret_sha256, node, created_ms, expires_ms, used_key_sha256, used_node, "
            "pool, joiner from tokens"
        ):
            yield rows.PutToken(replace(rows.TokenRow(*row), joiner=rows.Joiner(joiner)))
        for row in query("select router, incarnation, key_sha256, joined_ms from routers"):
            yield rows.PutRouter(rows.RouterRow(*row))

    # --- writes ---

    def write(self, changes: Sequence[Change], seq: int) -> None:
        """Make ``changes`` and the plan's number durable in one transaction. All or nothing."""
        with _mapped(), self._db.atomic():
            for change in changes:
                self._write_one(change)
            self._put_meta("seq", str(seq))

    def _write_one(self, change: Change) -> None:
        put = self._put
        match change:
            case rows.PutTenant(row):
                put("tenants", row)
            case rows.DropTenant(tenant):
                self._db.execute("delete from replays where owner = ?", (tenant,))
                for table in ("quotas", "records", "usage", "tenants"):
                    self._db.execute(f"delete from {table} where tenant = ?", (tenant,))
            case rows.PutQuota(tenant, quota):
                put("quotas", tenant=tenant, quota=msgspec.json.encode(quota).decode())
            case rows.PutKey(row):
                put("keys", row)
            case rows.DropKey(key_id):
                self._db.execute("delete from keys where key_id = ?", (key_id,))
            case rows.PutModel(spec):
                self._put_model(spec)
            case rows.DropModel(ref):
                self._drop_model(ref)
            case rows.PutUpload(row):
                put("uploads", row, files=msgspec.json.encode(row.files).decode())
            case rows.DropUpload(upload_id):
                self._db.execute("delete from uploads where upload_id = ?", (upload_id,))
            case _:
                self._write_fleet(change)

    def _write_fleet(self, change: Change) -> None:
        match change:
            case rows.PutNode(row):
                self._put("nodes", row)
            case rows.DropNode(node):
                self._db.execute("delete from nodes where node = ?", (node,))
            case rows.DrainNode(node, draining):
                self._db.execute("update nodes set draining = ? where node = ?", (int(draining), node))
            case rows.PutRouter(row):
                self._put("routers", row)
            case rows.DropRouter(router):
                self._db.execute("delete from routers where router = ?", (router,))
            case rows.PutToken(row):
                self._put("tokens", row)
            case rows.DropToken(token_id):
                self._db.execute("delete from tokens where token_id = ?", (token_id,))
            case rows.PutReplay(row):
                self._put_replay(row)
            case rows.DropReplays(before_ms):
                self._db.execute("delete from replays where made_ms < ?", (before_ms,))
            case rows.AgeUsage(now_ms):
                usage_tables.grow_old(self._db, now_ms)
            case _:
                raise AssertionError(f"no table for {change!r}")

    def _put_replay(self, row: rows.ReplayRow) -> None:
        self._put("replays", row)
        most = rows.REPLAYS_PER_TENANT_MAX if row.owner else rows.REPLAYS_OF_OPERATORS_MAX
        self._db.execute(
            "delete from replays where slot in (select slot from replays where owner = ? "
            "order by made_ms desc, rowid desc limit -1 offset ?)",
            (row.owner, most),
        )

    def replay(self, slot: str) -> rows.ReplayRow | None:
        """A kept answer."""
        with _mapped():
            found = self._db.execute(
                "select slot, owner, fingerprint, made_ms, sealed from replays where slot = ?", (slot,)
            ).fetchone()
        return rows.ReplayRow(*found) if found else None

    def _put(self, table: str, row: Row | None = None, **values: str | int | bytes | None) -> None:
        """``row``: its fields are the table's columns; ``values`` come instead of its own."""
        if row is not None:
            values = {name: getattr(row, name) for name in (field.name for field in fields(row))} | values
        # The first column is the key. An upsert, not a replace: a replace deletes first, which would
        # trip over the rows of other tables that refer to this one.
        names = list(values)
        marks = ", ".join("?" for _ in names)
        sets = ", ".join(f"{name} = excluded.{name}" for name in names[1:])
        self._db.execute(
            f"insert into {table} ({', '.join(names)}) values ({marks}) "
            f"on conflict ({names[0]}) do update set {sets}",
            tuple(values.values()),
        )

    def _put_model(self, spec: ModelSpec) -> None:
        ref = spec.ref
        if spec.latest:
            # The unique index allows one latest version at a time; the other's spec is put as well.
            self._db.execute(
                "update models set latest = 0 where tenant = ? and name = ?", (ref.tenant, ref.name)
            )
        self._db.execute(
            "insert or replace into models (tenant, name, version, latest, created_ms, spec) "
            "values (?, ?, ?, ?, ?, ?)",
            (
                ref.tenant,
                ref.name,
                ref.version,
                int(spec.latest),
                spec.created_ms,
                msgspec.json.encode(spec).decode(),
            ),
        )

    def _drop_model(self, ref: ModelRef) -> None:
        self._db.execute(
            "delete from models where tenant = ? and name = ? and version = ?",
            (ref.tenant, ref.name, ref.version),
        )

    # --- records ---

    def write_records(self, batch: Sequence[SpooledRecords], own: Sequence[Record] = ()) -> Acked:
        """Store what many beats brought, and control's own records, in one transaction.

        Delivered twice, a record is stored once: its sequence is not above the one acknowledged, or is there
        already. The same holds for a batch of usage.
        """
        acked: dict[str, int] = {}
        used: dict[str, int] = {}
        with _mapped(), self._db.atomic():
            for spooled in batch:
                high = acked.get(spooled.counted_by, spooled.after_seq)
                fresh = sorted((r for r in spooled.records if r.seq > high), key=lambda r: r.seq)
                for record in fresh:
                    self._insert_record(spooled.node, spooled.counted_by, record)
                    high = record.seq
                acked[spooled.counted_by] = high
                self._db.execute(
                    "update nodes set acked_seq = iif(spool in ('', ?), max(acked_seq, ?), ?), spool = ? "
                    "where incarnation = ?",
                    (spooled.spool, high, high, spooled.spool, spooled.incarnation),
                )
                used[spooled.counted_by] = max(used.get(spooled.counted_by, 0), self._add_usage(spooled))
            for record in own:
                self._insert_record("control", "", record)
            self._prune()
        return Acked(acked, used)

    def _add_usage(self, spooled: SpooledRecords) -> int:
        batch = spooled.usage
        if not batch.rows:
            return 0
        counted_by = spooled.counted_by
        return usage_tables.add_batch(
            self._db, spooled.node, counted_by, batch.seq, batch.rows, spooled.now_ms
        )

    def usage(self, ask: usage_tables.UsageAsk) -> list[UsageRow]:
        with _mapped():
            return usage_tables.read(self._db, ask)

    def _insert_record(self, node: str, counted_by: str, record: Record) -> None:
        self._until_prune -= 1
        self._db.execute(
            "insert or ignore into records (node, incarnation, seq, at_ms, kind, tenant, model, detail) "
            "values (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                node,
                counted_by,
                record.seq,
                record.at_ms,
                _storable(record.kind, WORD_CHARS_MAX),
                _storable(record.tenant, WORD_CHARS_MAX),
                _storable(record.model, WORD_CHARS_MAX),
                _storable(record.detail, DETAIL_CHARS_MAX),
            ),
        )

    def _prune(self) -> None:
        if self._until_prune > 0:
            return
        self._until_prune = PRUNE_EVERY_RECORDS
        self._db.execute(
            "delete from records where id <= (select coalesce(max(id), 0) from records) - ?", (RECORDS_MAX,)
        )

    def events(
        self, after: int, limit: int, tenant: str | None = None, since_ms: int = 0, newest: bool = False
    ) -> list[Event]:
        """Records with an id above ``after`` in order; of one tenant if named; ``newest``: the last ones."""
        where, values = "id > ? and at_ms >= ?", [after, since_ms]
        parameters: list[int | str] = list(values)
        if tenant is not None:
            where += " and tenant = ?"
            parameters.append(tenant)
        parameters.append(min(limit, EVENTS_PAGE_MAX))
        order = "desc" if newest else "asc"
        with _mapped():
            found = self._db.execute(
                f"select id, node, at_ms, kind, tenant, model, detail from records where {where} "
                f"order by id {order} limit ?",
                parameters,
            ).fetchall()
        events = [Event(*row) for row in found]
        return events[::-1] if newest else events


def _storable(text: str, chars_max: int) -> str:
    # A lone surrogate is valid JSON but no valid UTF-8, which is what SQLite stores.
    return text[:chars_max].encode("utf-8", "replace").decode()
