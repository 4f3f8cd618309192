"""What tenants used, in control's database: adding up what nodes deliver, reading it, and growing old.

Covers: the tables and every statement on them. Does not cover: which transaction they run in
(``control.store``), or who may read what (``control.routes.usage``).

A node's rows come in batches under a number; a batch is added if its number is above the last one of the
same spool, and the two are written in one transaction, so that what is delivered twice counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from packer.database import Database
from packer.usage import AMOUNT_MAX, AMOUNTS, DAY_MS, HOUR_MS, KEY_MARK, UsageRow, Used, counted_hour, day_of

# Told by the hour for so long, then by the day (UTC).
HOURS_KEPT_MS = 8 * DAY_MS
# And forgotten after it: with 10,000 tenants of one busy model each, 6 million rows of 100 bytes.
DAYS_KEPT_MS = 400 * DAY_MS
# Spools whose last number is known: of each node the newest, and of all, of which the oldest go first.
SPOOLS_PER_NODE_MAX = 8
SPOOLS_MAX = 50_000
# Longest texts of one row that are kept.
WORD_CHARS_MAX = 200

_NAMES = ", ".join(AMOUNTS)
# A sum of integers that no integer holds is an error; as a number of the other kind it is exact so far.
_SUMS = ", ".join(f"cast(min(total({name}), {AMOUNT_MAX}.0) as integer)" for name in AMOUNTS)
_MARKS = ", ".join("?" for _ in range(3 + len(AMOUNTS)))
_ADDED = "on conflict (tenant, model, hour_ms) do update set " + ", ".join(
    f"{name} = min({name} + excluded.{name}, {AMOUNT_MAX})" for name in AMOUNTS
)


class Span(StrEnum):
    """What one row of an answer is of."""

    HOUR = "hour"
    DAY = "day"
    TOTAL = "total"
    KEY = "key"  # a total for each key, of all models


# Where a row's time begins, as SQL.
_BEGINS = {
    Span.HOUR: "hour_ms",
    Span.DAY: f"hour_ms - hour_ms % {DAY_MS}",
    Span.TOTAL: "0",
    Span.KEY: "0",
}


@dataclass(frozen=True, slots=True)
class UsageAsk:
    """Which rows: of one tenant if named, of hours from ``since_ms`` on and before ``until_ms``, after a
    position (tenant, model, begin)."""

    span: Span
    since_ms: int
    until_ms: int
    tenant: str | None
    after: tuple[str, str, int] | None
    limit: int


def create_tables(db: Database) -> None:
    numbers = ", ".join(f"{name} integer not null" for name in AMOUNTS)
    db.execute(
        "create table usage (tenant text not null, model text not null, hour_ms integer not null, "
        f"{numbers}, primary key (tenant, model, hour_ms)) strict, without rowid"
    )
    db.execute(
        "create table usage_heard (counted_by text primary key, node text not null, seq integer not null, "
        "at_ms integer not null) strict"
    )


def add_batch(
    db: Database, node: str, counted_by: str, seq: int, rows: Sequence[UsageRow], now_ms: int
) -> int:
    """Add a batch unless it is known; the highest number that was added. In the caller's transaction."""
    found = db.execute("select seq from usage_heard where counted_by = ?", (counted_by,)).fetchone()
    known = int(found[0]) if found else 0
    if seq <= known:
        return known
    for row in rows:
        _add(db, row, now_ms)
    db.execute(
        "insert into usage_heard (counted_by, node, seq, at_ms) values (?, ?, ?, ?) "
        "on conflict (counted_by) do update set seq = excluded.seq, at_ms = excluded.at_ms",
        (counted_by, node, seq, now_ms),
    )
    if found is None:
        _forget_spools(db, node)
    return seq


def _add(db: Database, row: UsageRow, now_ms: int) -> None:
    """Unless its tenant is no more, or is another one of that name: whose time had ended before, by more than
    what a clock may be off."""
    hour_ms = counted_hour(row.hour_ms, now_ms, DAYS_KEPT_MS)
    db.execute(
        f"insert into usage (tenant, model, hour_ms, {_NAMES}) select {_MARKS} "
        f"where exists (select 1 from tenants where tenant = ? and created_ms < ?) {_ADDED}",
        (
            _storable(row.tenant),
            _storable(row.model),
            hour_ms,
            *(min(getattr(row.used, name), AMOUNT_MAX) for name in AMOUNTS),
            _storable(row.tenant),
            hour_ms + 2 * HOUR_MS,
        ),
    )


def _forget_spools(db: Database, node: str) -> None:
    """A node that makes up spools must not fill the table."""
    for where, values, most in (
        ("where node = ?", (node,), SPOOLS_PER_NODE_MAX),
        ("", (), SPOOLS_MAX),
    ):
        db.execute(
            "delete from usage_heard where counted_by in (select counted_by from usage_heard "
            f"{where} order by at_ms desc, rowid desc limit -1 offset ?)",
            (*values, most),
        )


def read(db: Database, ask: UsageAsk) -> list[UsageRow]:
    """Sums by model and span, in the order of tenant, model and time."""
    begins = _BEGINS[ask.span]
    of_keys = f"substr(model, 1, {len(KEY_MARK)}) = ?"
    where = ["hour_ms >= ?", "hour_ms < ?", of_keys if ask.span is Span.KEY else f"not {of_keys}"]
    parameters: list[int | str] = [ask.since_ms, ask.until_ms, KEY_MARK]
    if ask.tenant is not None:
        where.append("tenant = ?")
        parameters.append(ask.tenant)
    if ask.after is not None:
        tenant, model, begin_ms = ask.after
        where.append(f"(tenant, model, {begins}) > (?, ?, ?)")
        parameters += [tenant, model, begin_ms]
        # What the primary key can be searched by.
        where.append("tenant >= ?")
        parameters.append(tenant)
    found = db.execute(
        f"select {begins} as begin_ms, tenant, model, {_SUMS} from usage where {' and '.join(where)} "
        "group by tenant, model, begin_ms order by tenant, model, begin_ms limit ?",
        (*parameters, ask.limit),
    ).fetchall()
    return [UsageRow(row[0], row[1], row[2], Used(*row[3:])) for row in found]


def grow_old(db: Database, now_ms: int) -> None:
    """Hours that are old become days, and days that are older are forgotten. Done twice, it changes
    nothing."""
    before_ms = day_of(now_ms - HOURS_KEPT_MS)
    old = f"hour_ms < ? and hour_ms % {DAY_MS} <> 0"
    db.execute(
        f"insert into usage (tenant, model, hour_ms, {_NAMES}) "
        f"select tenant, model, hour_ms - hour_ms % {DAY_MS}, {_SUMS} from usage where {old} "
        f"group by 1, 2, 3 {_ADDED}",
        (before_ms,),
    )
    db.execute(f"delete from usage where {old}", (before_ms,))
    db.execute("delete from usage where hour_ms < ?", (day_of(now_ms - DAYS_KEPT_MS),))


def _storable(text: str) -> str:
    # A lone surrogate is valid JSON but no valid UTF-8, which is what SQLite stores.
    return text[:WORD_CHARS_MAX].encode("utf-8", "replace").decode()
