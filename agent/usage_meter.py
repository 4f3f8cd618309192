"""What tenants use, from a request's end (and, of long ones, while they run) into the journal and to control.

Covers: adding up requests, tokens, device time and restored bytes by hour and model, bringing the sums into
the journal, and which batch of them control is told when. Does not cover: the journal's tables
(``agent/usage_spool.py``), counting one request's tokens (``agent/metering.py``), or limits.

An orderly stop loses nothing. ``kill -9`` loses what ended in the last ``FLUSH_S`` and the journal's write,
and of requests that were running the tokens of the last ``RUNNING_S``; their device time is known when an
engine call ends, and is lost with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

from agent.journal import JournalFailed
from agent.journal_thread import JournalThread
from packer.events import Event, Restored, TookLate
from packer.types import ModelRef, Tier
from packer.usage import (
    KEY_MARK,
    NO_USAGE,
    NOTHING,
    USAGE_ROWS_PER_BEAT_MAX,
    UsageBatch,
    UsageRow,
    Used,
    hour_of,
)

log = logging.getLogger("bunk.usage")

# Sums go to the journal this long after the first of them: one small transaction for all until then.
FLUSH_S = 0.1
# What running requests have used so far goes along this often.
RUNNING_S = 1.0
# Control is told this often at the most: it writes a row for each busy model then.
TELL_S = 5.0
# Sums that wait while the journal can not be written; beyond it all hours become one, a row per model.
PENDING_ROWS_MAX = 20_000

Key = tuple[int, str, str]


class Counted(Protocol):
    """What one request has used so far."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def device_ms(self) -> int: ...


@dataclass(slots=True, eq=False)
class Running:
    """A request that has its lease; ``noted`` of it is in the sums already."""

    ref: ModelRef
    counted: Counted
    meter: UsageMeter
    key_id: str = ""
    noted: Used = NOTHING

    def ended(self, well: bool) -> None:
        """It is over, and an answer if it went well to its end."""
        self.meter.ended(self, well)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self.ended(well=kind is None)

    def rest(self, requests: int = 0, answers: int = 0) -> Used:
        """What is not in the sums yet, which it is from now on."""
        counted = self.counted
        now = Used(requests, answers, counted.prompt_tokens, counted.completion_tokens, counted.device_ms)
        if self.noted is NOTHING:  # as most, which nobody has looked at while they ran
            self.noted = now
            return now
        rest = now.beyond(self.noted)
        self.noted += rest
        return rest


class UsageMeter:
    """``clock_ms`` is control's wall clock as far as the node knows it; ``journal_may_fail`` serves on
    without the journal; ``tell`` has the uplink send a beat."""

    def __init__(
        self,
        journal: JournalThread,
        clock_ms: Callable[[], int],
        journal_may_fail: Callable[[], AbstractContextManager[None]],
        tell: Callable[[], None],
        steady_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._clock_ms = clock_ms
        self._journal_may_fail = journal_may_fail
        self._tell = tell
        self._steady_s = steady_s
        self._pending: dict[Key, Used] = {}
        self._running: dict[Running, None] = {}
        self._taken_at_s = 0.0  # when running requests were last looked at
        self._due = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._flush_failed = False
        # What is in the journal and not with control, perhaps of an earlier life; and when it was last told.
        self._untold = True
        self._told_at_s: float | None = None
        self._reading = False  # the journal, for the next batch

    # --- counting ---------------------------------------------------------------------------------

    def counting(self, ref: ModelRef, counted: Counted, key_id: str = "") -> Running:
        """A request was let in; ``ended`` of what this gives must follow, as the end of a block does."""
        running = Running(ref, counted, self, key_id)
        self._running[running] = None
        self._due.set()
        return running

    def ended(self, running: Running, well: bool) -> None:
        del self._running[running]
        self._note_running(running, running.rest(requests=1, answers=int(well)))

    def observe(self, event: Event) -> None:
        """What the core's steps tell of use that is no request's own."""
        match event:
            case Restored(ref=ref, from_tier=tier, restored_bytes=nbytes):
                self._note(ref.tenant, str(ref.model), _moved(tier, nbytes))
            case TookLate(tenant=tenant, device_ms=device_ms):
                self._note(tenant, "", Used(device_ms=max(device_ms, 0)))
            case _:
                pass

    def _note_running(self, running: Running, used: Used) -> None:
        tenant = running.ref.tenant
        self._note(tenant, str(running.ref.model), used)
        if running.key_id:
            self._note(tenant, KEY_MARK + running.key_id, used)

    def _note(self, tenant: str, model: str, used: Used) -> None:
        if used == NOTHING:
            return
        key = (hour_of(self._clock_ms()), tenant, model)
        pending = self._pending.get(key)
        self._pending[key] = used if pending is None else pending + used
        self._due.set()

    # --- to the journal ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Bring sums into the journal, and have control told, until cancelled."""
        while True:
            idle = not (self._running or self._untold or self._pending)
            with suppress(TimeoutError):
                async with asyncio.timeout(None if idle else RUNNING_S):
                    await self._due.wait()
            await asyncio.sleep(FLUSH_S)
            # A stop does not cut off what waits for the journal's thread; ``flush`` follows it.
            try:
                await asyncio.shield(self.flush())
            except Exception:
                # A full or lost disk is no exception here, so this is our mistake; the sums wait.
                if not self._flush_failed:
                    log.exception("keeping what tenants used failed in an unforeseen way")
                self._flush_failed = True
            if self.due():
                self._tell()

    async def flush(self, at_once: bool = False) -> None:
        """``at_once``: also what running requests have used since they were last looked at."""
        async with self._flushing:
            self._due.clear()
            now_s = self._steady_s()
            if at_once or now_s - self._taken_at_s >= RUNNING_S:
                self._taken_at_s = now_s
                for running in self._running:
                    self._note_running(running, running.rest())
                self._due.clear()
            if not self._pending:
                return
            taken, self._pending = self._pending, {}
            rows = [UsageRow(*key, used) for key, used in taken.items()]
            added = False
            try:
                with self._journal_may_fail():
                    await self._journal.call(self._journal.journal.usage.add, rows)
                    added = self._untold = True
            finally:
                if not added:
                    self._put_back(taken)

    def _put_back(self, taken: dict[Key, Used]) -> None:
        one_hour = len(taken) + len(self._pending) > PENDING_ROWS_MAX
        latest = max(hour for hour, _, _ in (*taken, *self._pending))
        together: dict[Key, Used] = {}
        for pending in (taken, self._pending):
            for (hour, tenant, model), used in pending.items():
                key = (latest if one_hour else hour, tenant, model)
                together[key] = together.get(key, NOTHING) + used
        self._pending = together

    # --- to control -------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether a beat should go now for the sake of what was used."""
        lately = self._told_at_s is not None and self._steady_s() - self._told_at_s < TELL_S
        return self._untold and not lately

    def waits(self) -> bool:
        """Whether there may be something that control has not confirmed."""
        counted = bool(self._running or self._pending or self._untold)
        return counted or self._reading or self._flushing.locked()

    async def batch(self) -> UsageBatch:
        """What goes with the next beat."""
        if not self.due():
            return NO_USAGE
        with suppress(JournalFailed):
            self._untold = False  # what is added from here on makes it true again
            self._reading = True
            try:
                batch = await self._journal.call(self._journal.journal.usage.batch)
            finally:
                self._reading = False
            self._untold = self._untold or bool(batch.rows)
            # A full batch leaves more, which does not wait for its turn.
            full = len(batch.rows) == USAGE_ROWS_PER_BEAT_MAX
            self._told_at_s = None if full else self._steady_s()
            return batch
        self._untold = True
        return NO_USAGE

    async def acknowledge(self, seq: int) -> None:
        with self._journal_may_fail():
            await self._journal.call(self._journal.journal.usage.acknowledge, seq)


def _moved(tier: Tier, nbytes: int) -> Used:
    match tier:
        case Tier.HOST:
            return Used(restored_host_bytes=nbytes)
        case Tier.DISK:
            return Used(restored_disk_bytes=nbytes)
        case _:
            return Used(restored_origin_bytes=nbytes)
