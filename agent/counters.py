"""What a node counts: requests, answers, refusals and restores, by model and by tenant.

Covers: counters since the agent started and the records for ``bunk events``, both taken from the
core's steps. Does not cover: bytes (the core's ledger has them) or their exposition
(``agent/metrics.py``, ``agent/node.py``).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from packer.events import (
    Action,
    Dropped,
    Event,
    Evicted,
    Filled,
    FillFailed,
    Packed,
    PackFailed,
    Refuse,
    Requested,
    Restored,
    RestoreFailed,
    TookLate,
    WorkerDied,
)
from packer.types import ModelRef, Tier
from packer.wire import RestoreReport

# Enough for a steady median; older restores say little about today's disk.
RESTORE_SAMPLES_MAX = 512
# Records that wait for the journal; a storm beyond this is counted, not kept.
PENDING_RECORDS_MAX = 10_000


@dataclass(slots=True)
class RestoreCount:
    count: int = 0
    max_ms: int = 0
    samples_ms: deque[int] = field(default_factory=lambda: deque(maxlen=RESTORE_SAMPLES_MAX))

    def add(self, restore_ms: int) -> None:
        self.count += 1
        self.max_ms = max(self.max_ms, restore_ms)
        self.samples_ms.append(restore_ms)


@dataclass(slots=True)
class ModelCount:
    requests: int = 0
    answers: int = 0
    last_used_ms: int = 0
    restores: dict[Tier, RestoreCount] = field(default_factory=dict)

    def restore_reports(self) -> tuple[RestoreReport, ...]:
        return tuple(
            RestoreReport(tier.value, count.count, round(statistics.median(count.samples_ms)), count.max_ms)
            for tier, count in sorted(self.restores.items())
        )


class Taken(Protocol):
    """What one request took."""

    @property
    def tokens(self) -> int: ...
    @property
    def device_ms(self) -> int: ...


@dataclass(slots=True)
class TenantCount:
    requests: int = 0
    answers: int = 0
    refusals: int = 0
    tokens: int = 0
    device_ms: int = 0


@dataclass(frozen=True, slots=True)
class PendingRecord:
    at_ms: int
    kind: str
    tenant: str
    model: str
    detail: str


class Counters:
    """Fed by ``Loop.observe``; ``forget`` keeps it no larger than the plan."""

    def __init__(self) -> None:
        self.models: dict[ModelRef, ModelCount] = {}
        self.tenants: dict[str, TenantCount] = {}
        self.refusals: dict[tuple[str, str], int] = {}  # (tenant, reason)
        self.evictions = 0
        self.workers_died = 0
        self.prefetched = 0
        self.prefetches_stopped = 0
        self.records_lost = 0
        # Whether control has not confirmed all that tenants used.
        self.usage_waits: Callable[[], bool] = lambda: False
        self.chunks_corrupt = 0
        self.chunks_repaired = 0
        self._pending: list[PendingRecord] = []
        # Refusals come in storms; one record per flush, tenant, model and reason says how many.
        self._refused: dict[tuple[str, str, str], tuple[int, str]] = {}
        self._request_ref: dict[str, ModelRef] = {}

    def model(self, ref: ModelRef) -> ModelCount:
        count = self.models.get(ref)
        if count is None:
            count = self.models[ref] = ModelCount()
        return count

    def tenant(self, tenant: str) -> TenantCount:
        count = self.tenants.get(tenant)
        if count is None:
            count = self.tenants[tenant] = TenantCount()
        return count

    def asked(self, wall_ms: int, request: str, ref: ModelRef) -> None:
        """A request that was not refused at once."""
        self.tenant(ref.tenant).requests += 1
        count = self.model(ref)
        count.requests += 1
        count.last_used_ms = wall_ms
        self._request_ref[request] = ref

    def observe(self, wall_ms: int, event: Event, actions: list[Action]) -> None:
        match event:
            case Requested(request=request, ref=ref):
                self.asked(wall_ms, request, ref)
                refused = [a for a in actions if isinstance(a, Refuse) and a.request == request]
                if refused:
                    del self._request_ref[request]
                    self._refuse(ref, refused[0])
            case Restored(ref=ref, from_tier=tier, restore_ms=restore_ms, device=device):
                self.model(ref).restores.setdefault(tier, RestoreCount()).add(restore_ms)
                self._record(wall_ms, "restored", ref, f"from {tier.value} to {device} in {restore_ms} ms")
            case RestoreFailed(ref=ref, from_tier=tier, message=message):
                self._record(wall_ms, "restore_failed", ref, f"from {tier.value}: {message}")
            case Evicted(ref=ref, device=device):
                self.evictions += 1
                self._record(wall_ms, "evicted", ref, f"from {device}")
            case Packed(ref=ref, disk_bytes=disk_bytes):
                self._record(wall_ms, "packed", ref, f"{disk_bytes} bytes on disk")
            case PackFailed(ref=ref, message=message):
                self._record(wall_ms, "pack_failed", ref, message)
            case Filled(ref=ref):
                self.prefetched += 1
                self._record(wall_ms, "prefetched", ref, "from disk into host memory")
            case FillFailed(ref=ref, message=message, stopped=stopped):
                self.prefetches_stopped += stopped
                if not stopped:
                    self._record(wall_ms, "prefetch_failed", ref, message)
            case Dropped(ref=ref, tier=tier):
                self._record(wall_ms, "dropped", ref, f"from {tier.value}")
            case WorkerDied(tenant=tenant, device=device):
                self.workers_died += 1
                self._keep(PendingRecord(wall_ms, "worker_died", tenant, "", f"on {device}"))
            case TookLate(tenant=tenant, device_ms=device_ms):
                self.tenant(tenant).device_ms += device_ms
            case _:
                pass
        for action in actions:
            if isinstance(action, Refuse):
                waited = self._request_ref.pop(action.request, None)
                if waited is not None:
                    self._refuse(waited, action)

    def note(self, wall_ms: int, kind: str, ref: ModelRef, detail: str, count: int) -> None:
        """What the core is not told: ``chunk_corrupt`` and ``chunk_repaired``, ``count`` at once."""
        if kind == "chunk_corrupt":
            self.chunks_corrupt += count
        elif kind == "chunk_repaired":
            self.chunks_repaired += count
        self._record(wall_ms, kind, ref, detail)

    def ended(self, ref: ModelRef, taken: Taken, well: bool) -> None:
        """A request that was let in is over: what it took counts, and only one that went well to its end is
        an answer."""
        count = self.tenant(ref.tenant)
        count.tokens += taken.tokens
        count.device_ms += taken.device_ms
        if well:
            count.answers += 1
            self.model(ref).answers += 1

    def done(self, request: str) -> None:
        """The request left the loop, whatever became of it."""
        self._request_ref.pop(request, None)

    def _refuse(self, ref: ModelRef, action: Refuse) -> None:
        self.tenant(ref.tenant).refusals += 1
        reason = action.reason.value
        by_reason = (ref.tenant, reason)
        self.refusals[by_reason] = self.refusals.get(by_reason, 0) + 1
        at = (ref.tenant, str(ref), reason)
        count, _ = self._refused.get(at, (0, ""))
        self._refused[at] = (count + 1, action.detail)

    def _record(self, wall_ms: int, kind: str, ref: ModelRef, detail: str) -> None:
        self._keep(PendingRecord(wall_ms, kind, ref.tenant, str(ref), detail[:500]))

    def _keep(self, record: PendingRecord) -> None:
        if len(self._pending) >= PENDING_RECORDS_MAX:
            self.records_lost += 1
        else:
            self._pending.append(record)

    def take_records(self, wall_ms: int) -> list[PendingRecord]:
        """Everything since the last call, for the journal."""
        taken, self._pending = self._pending, []
        for (tenant, model, reason), (count, detail) in self._refused.items():
            taken.append(
                PendingRecord(wall_ms, "refused", tenant, model, f"{reason} x{count}: {detail[:400]}")
            )
        self._refused = {}
        return taken

    def put_back(self, records: list[PendingRecord]) -> None:
        """The journal did not take these; the oldest of what is too much is lost and counted."""
        together = records + self._pending
        self.records_lost += max(0, len(together) - PENDING_RECORDS_MAX)
        self._pending = together[-PENDING_RECORDS_MAX:]

    def forget(self, kept: frozenset[ModelRef], tenants: frozenset[str]) -> None:
        """Drop the counts of models and tenants that are no more."""
        self.models = {ref: count for ref, count in self.models.items() if ref in kept}
        self.tenants = {tenant: count for tenant, count in self.tenants.items() if tenant in tenants}
        self.refusals = {at: count for at, count in self.refusals.items() if at[0] in tenants}
