"""Records and what tenants used, on their way from nodes and from control itself into the database.

Covers: gathering what beats bring while a transaction is written, the bound on what waits, and telling each
beat what is stored of its node. Does not cover: the tables (``control.store``) or what a beat is
(``control.routes.nodes``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from control.catalog import Catalog, NodeRow
from control.store import Acked, SpooledRecords, StoreUnavailable
from packer.usage import UsageBatch
from packer.wire import Beat, Record

log = logging.getLogger("bunk.control")

# Records waiting to be stored; beats that bring more are asked to come back.
RECORDS_PENDING_MAX = 100_000


class TooManyRecords(Exception):
    """More records wait to be stored than control holds in memory."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The highest numbers of a node's that control has: of records, and of batches of usage."""

    acked_seq: int = 0
    usage_acked: int = 0


@dataclass(slots=True)
class PendingRecords:
    """Records of one beat that wait for the next transaction."""

    spooled: SpooledRecords
    stored: asyncio.Future[Stored]


class RecordDesk:
    """``write`` is one transaction. ``catalog`` is asked anew each time: control replaces it at its start."""

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        write: Callable[[Sequence[SpooledRecords], Sequence[Record]], Awaitable[Acked]],
        wall_ms: Callable[[], int],
        log_fault: Callable[[str, Exception], None],
    ) -> None:
        self._catalog = catalog
        self._write = write
        self._wall_ms = wall_ms
        self._log_fault = log_fault
        self._pending: list[PendingRecords] = []
        self._own: list[Record] = []
        self._due = asyncio.Event()
        self._writing = asyncio.Lock()
        self._failed = False

    def note(self, kind: str, tenant: str, model: str, detail: str) -> None:
        """Note a fact of control's own for ``bunk events``; stored with the next batch."""
        if len(self._own) < RECORDS_PENDING_MAX:
            self._own.append(Record(0, self._wall_ms(), kind, tenant, model, detail))
            self._due.set()

    async def store(self, row: NodeRow, beat: Beat) -> Stored:
        """Store what a beat brought with whatever else is waiting."""
        waiting = sum(len(item.spooled.records) + len(item.spooled.usage.rows) for item in self._pending)
        if waiting + len(beat.records) + len(beat.usage) > RECORDS_PENDING_MAX:
            raise TooManyRecords
        stored: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        after_seq = row.acked_seq if row.spool in ("", beat.spool) else 0
        usage = UsageBatch(beat.usage_seq, beat.usage)
        spooled = SpooledRecords(
            row.node, row.incarnation, after_seq, beat.records, beat.spool, usage, self._wall_ms()
        )
        self._pending.append(PendingRecords(spooled, stored))
        self._due.set()
        return await stored

    async def run(self) -> None:
        """Until cancelled: one transaction for all records that gathered while the one before was written."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                # A stop does not cut off what waits for the writer's thread; whoever stops flushes after it.
                await asyncio.shield(self.flush())
            except StoreUnavailable as error:
                self._log_fault("records", error)

    async def flush(self) -> None:
        """Store what waits, after what is being stored. Raises ``StoreUnavailable``: nodes bring theirs again
        then, and control's own wait."""
        async with self._writing:
            batch, self._pending = self._pending, []
            own, self._own = self._own, []
            if not batch and not own:
                return
            try:
                await self._store(batch, own)
            except StoreUnavailable as error:
                self._own = [*own, *self._own][:RECORDS_PENDING_MAX]
                _refuse(batch, error)
                raise
            except Exception as error:
                # Our mistake: said once. Nobody may wait for ever because of it, and what follows is stored.
                if not self._failed:
                    log.exception("storing records failed in an unforeseen way")
                self._failed = True
                unforeseen = StoreUnavailable(f"{type(error).__name__}: {error}")
                _refuse(batch, unforeseen)
                raise unforeseen from error

    async def _store(self, batch: Sequence[PendingRecords], own: Sequence[Record]) -> None:
        acked = await self._write([item.spooled for item in batch], own)
        for item in batch:
            spooled, high = item.spooled, acked.records[item.spooled.counted_by]
            nodes = self._catalog().nodes
            row = nodes.get(spooled.node)
            if row is not None and row.incarnation == spooled.incarnation:
                before = row.acked_seq if row.spool in ("", spooled.spool) else 0
                row = replace(row, acked_seq=max(before, high), spool=spooled.spool)
                nodes[spooled.node] = row
            if not item.stored.done():
                item.stored.set_result(Stored(high, acked.usage[spooled.counted_by]))


def _refuse(batch: Sequence[PendingRecords], error: StoreUnavailable) -> None:
    for item in batch:
        if not item.stored.done():
            item.stored.set_exception(error)
            item.stored.exception()  # its beat may have left
