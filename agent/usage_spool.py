"""What tenants used, in the node's journal: counted up by hour, and in batches on their way to control.

Covers: adding amounts, merging the oldest hours when control is away for very long, numbering a batch and
keeping it as it is until control has it. Does not cover: who counts (``agent/usage_meter.py``).

A batch is sent again with the same number and the same rows until control has confirmed it, whatever is
killed meanwhile; control adds what has a number above the last one. So each use is added once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from packer.database import Database
from packer.usage import AMOUNT_MAX, AMOUNTS, NO_USAGE, USAGE_ROWS_PER_BEAT_MAX, UsageBatch, UsageRow, Used

# A row per hour and model: 100 busy models for 40 days without control, in some 15 MB. Beyond it the oldest
# hour is told as part of the one after: amounts stay right, and when it was becomes coarser.
SPOOL_ROWS_MAX = 100_000

_NAMES = ", ".join(AMOUNTS)
_MARKS = ", ".join("?" for _ in range(3 + len(AMOUNTS)))
_ADDED = "on conflict (hour_ms, tenant, model) do update set " + ", ".join(
    f"{name} = min({name} + excluded.{name}, {AMOUNT_MAX})" for name in AMOUNTS
)
_KEY = "hour_ms integer not null, tenant text not null, model text not null, "


def create_tables(db: Database) -> None:
    numbers = ", ".join(f"{name} integer not null" for name in AMOUNTS)
    db.execute(
        f"create table usage_open ({_KEY}{numbers}, primary key (hour_ms, tenant, model)) without rowid"
    )
    db.execute(f"create table usage_told (seq integer not null, {_KEY}{numbers})")
    db.execute("create table usage_count (seq integer not null)")
    db.execute("insert into usage_count values (0)")


class UsageSpool:
    """Blocks, like the rest of the journal; what a call has returned from is on disk."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, rows: Sequence[UsageRow]) -> None:
        """Count these as well; all of them or none."""
        with self._db.atomic():
            for row in rows:
                values = (row.hour_ms, row.tenant, row.model, *(getattr(row.used, name) for name in AMOUNTS))
                self._db.execute(
                    f"insert into usage_open (hour_ms, tenant, model, {_NAMES}) values ({_MARKS}) {_ADDED}",
                    values,
                )
            while self._number("select count(*) from usage_open") > SPOOL_ROWS_MAX and self._merge_oldest():
                pass

    def _merge_oldest(self) -> bool:
        """Two hours become one; False when there is one only, which has a row for each model."""
        found = self._db.execute(
            "select distinct hour_ms from usage_open order by hour_ms limit 2"
        ).fetchall()
        if len(found) < 2:
            return False
        (oldest,), (next_one,) = found
        self._db.execute(
            f"insert into usage_open (hour_ms, tenant, model, {_NAMES}) "
            f"select ?, tenant, model, {_NAMES} from usage_open where hour_ms = ? {_ADDED}",
            (next_one, oldest),
        )
        self._db.execute("delete from usage_open where hour_ms = ?", (oldest,))
        return True

    def batch(self) -> UsageBatch:
        """What control is to be told: the batch that it has not confirmed, else a new one."""
        with self._db.atomic():
            told = self._rows("usage_told order by hour_ms, tenant, model")
            if told:
                return UsageBatch(self._number("select max(seq) from usage_told"), told)
            rows = self._rows(f"usage_open order by hour_ms, tenant, model limit {USAGE_ROWS_PER_BEAT_MAX}")
            if not rows:
                return NO_USAGE
            self._db.execute("update usage_count set seq = seq + 1")
            seq = self._number("select seq from usage_count")
            for row in rows:
                key = (row.hour_ms, row.tenant, row.model)
                self._db.execute(
                    f"insert into usage_told (seq, hour_ms, tenant, model, {_NAMES}) "
                    f"select ?, hour_ms, tenant, model, {_NAMES} from usage_open "
                    "where (hour_ms, tenant, model) = (?, ?, ?)",
                    (seq, *key),
                )
                self._db.execute("delete from usage_open where (hour_ms, tenant, model) = (?, ?, ?)", key)
        return UsageBatch(seq, rows)

    def acknowledge(self, seq: int) -> None:
        """Control has everything up to this number. One above all of ours is of a journal that was put back
        from a copy: its numbers are taken, so counting goes on above them."""
        with self._db.atomic():
            self._db.execute("delete from usage_told where seq <= ?", (seq,))
            self._db.execute("update usage_count set seq = max(seq, ?)", (seq,))

    def forget_tenants(self, tenants: Iterable[str]) -> None:
        """They are no more; control has dropped what it knew of them as well."""
        for tenant in tenants:
            self._db.execute("delete from usage_open where tenant = ?", (tenant,))

    def _rows(self, source: str) -> tuple[UsageRow, ...]:
        found = self._db.execute(f"select hour_ms, tenant, model, {_NAMES} from {source}").fetchall()
        return tuple(UsageRow(row[0], row[1], row[2], Used(*row[3:])) for row in found)

    def _number(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])
