"""What the simulated world forbids of rates: no tenant gets more of anything than its rate allows.

Covers: books of its own, in exact fractions, of requests, tokens, device time and restores of every tenant,
and judging every step of the core by them. Does not cover: bytes and turns (``judges``).

Where the world can not know whether the core counted (a request that was refused in the step in which it
came, after it was let in or before), two books are kept: what it counted at the least and at the most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from packer.events import (
    Action,
    Cancelled,
    Event,
    Finished,
    Grant,
    Planned,
    RefusalReason,
    Refuse,
    Requested,
    Restore,
    Restored,
    SharesSeen,
    SpentFound,
)
from packer.types import ModelRef, TenantQuota

if TYPE_CHECKING:
    from simulation import World

MINUTE_MS, DAY_MS = 60_000, 86_400_000
AT_THE_DOOR = {
    RefusalReason.RATE,
    RefusalReason.TOKENS,
    RefusalReason.DEVICE_TIME,
    RefusalReason.RESTORE_RATE,
    RefusalReason.CONCURRENCY,
    RefusalReason.QUEUE_FULL,
    RefusalReason.DRAINING,
    RefusalReason.UNKNOWN_MODEL,
}


@dataclass(slots=True)
class Bucket:
    """What was taken and has not dripped away; nothing is taken while there is no limit."""

    period_ms: int
    burst_parts: int
    limit: int | None = None
    level: Fraction = Fraction(0)
    at_ms: int = 0

    @property
    def burst(self) -> int:
        return max(1, (self.limit or 0) // self.burst_parts)

    def pass_to(self, now_ms: int) -> None:
        if self.limit is not None:
            drip = Fraction(self.limit * (now_ms - self.at_ms), self.period_ms)
            self.level = max(self.level - drip, Fraction(0))
        self.at_ms = now_ms

    def set_limit(self, limit: int | None) -> None:
        if limit is None or self.limit is None:
            self.level = Fraction(0)
        self.limit = limit

    def take(self, amount: int) -> None:
        if self.limit is not None:
            self.level += amount

    def owe(self, amount: int, ago_ms: int) -> None:
        """This was owed so long ago, before a restart."""
        if self.limit is not None:
            self.level += max(amount - Fraction(self.limit * ago_ms, self.period_ms), Fraction(0))

    def full(self, reserved: int = 0) -> bool:
        """Is there no room for one more?"""
        return self.limit is not None and self.level + reserved > self.burst - 1


@dataclass(slots=True)
class Books:
    """One tenant's."""

    least: Bucket = field(default_factory=lambda: Bucket(MINUTE_MS, 6))
    most: Bucket = field(default_factory=lambda: Bucket(MINUTE_MS, 6))
    tokens: Bucket = field(default_factory=lambda: Bucket(MINUTE_MS, 1))
    restores: Bucket = field(default_factory=lambda: Bucket(MINUTE_MS, 1))
    device: Bucket = field(default_factory=lambda: Bucket(DAY_MS, 1))
    reserved: int = 0

    def pass_to(self, now_ms: int) -> None:
        for bucket in (self.least, self.most, self.tokens, self.restores, self.device):
            bucket.pass_to(now_ms)

    def set_limits(self, quota: TenantQuota) -> None:
        seconds = quota.device_seconds_per_day
        self.least.set_limit(quota.requests_per_minute)
        self.most.set_limit(quota.requests_per_minute)
        self.tokens.set_limit(quota.tokens_per_minute)
        self.restores.set_limit(quota.restores_per_minute)
        self.device.set_limit(None if seconds is None else seconds * 1000)


class RateJudge:
    """Sees every step after the world has carried out its orders."""

    def __init__(self) -> None:
        self._books: dict[str, Books] = {}
        self._open: dict[str, tuple[str, int]] = {}  # requests let in: their tenant, what is reserved
        self._granted: set[str] = set()
        # Whoever had less than the whole of its limits in this life may be refused within them.
        self._divided: set[str] = set()
        self._orders: dict[ModelRef, int] = {}  # models whose restore was counted and has not ended well

    def judge(self, world: World, event: Event, actions: list[Action]) -> None:
        if isinstance(event, Planned):
            for tenant in event.tenants:
                books = self._of(tenant.tenant, world.now_ms)
                books.set_limits(tenant.quota)
        if isinstance(event, SpentFound):
            books = self._of(event.tenant, world.now_ms)
            books.tokens.owe(event.tokens, event.ago_ms)
            books.device.owe(event.device_ms, event.ago_ms)
        if isinstance(event, SharesSeen | Planned):
            self._divided |= {n for n, known in world.node.tenants.items() if not known.rates.share.is_whole}
        refused = {action.request: action.reason for action in actions if isinstance(action, Refuse)}
        if isinstance(event, Requested) and event.request not in self._open:
            self._requested(world, event, refused.get(event.request))
        for action in actions:
            if isinstance(action, Restore):
                self._restore(world, action)
            elif isinstance(action, Grant):
                self._granted.add(action.request)
            elif isinstance(action, Refuse):
                self._end(world, action.request)
        if isinstance(event, Cancelled):
            self._end(world, event.request)
        elif isinstance(event, Finished) and event.request in self._granted:
            if event.request in self._open:
                books = self._of(self._open[event.request][0], world.now_ms)
                books.tokens.take(event.tokens)
                books.device.take(event.device_ms)
            self._end(world, event.request)
        elif isinstance(event, Restored):
            stay = world.stays.get(event.ref)
            # A late answer, to an order whose worker has died, ends nothing.
            if stay is not None and stay.state == "resident":
                self._orders.pop(event.ref, None)

    def forget(self, tenant: str, now_ms: int) -> None:
        """The tenant is in no plan, until it is in one again: nothing is owed for the past."""
        self._of(tenant, now_ms).set_limits(TenantQuota())

    def _of(self, tenant: str, now_ms: int) -> Books:
        books = self._books.setdefault(tenant, Books())
        books.pass_to(now_ms)
        return books

    def _requested(self, world: World, event: Requested, reason: RefusalReason | None) -> None:
        tenant = event.ref.tenant
        books = self._of(tenant, world.now_ms)
        if reason is None:
            world.require(not books.least.full(), f"{event.request} of {tenant} is one request too many")
            world.require(not books.tokens.full(books.reserved), f"{tenant} uses more tokens than it may")
            world.require(not books.device.full(), f"{tenant} uses more device time than it may")
            books.least.take(1)
        elif tenant in self._divided:
            world.reached["refused for a share"] += reason in (RefusalReason.RATE, RefusalReason.CONCURRENCY)
        elif reason is RefusalReason.RATE:
            world.require(books.most.full(), f"{event.request} of {tenant} is within its rate")
        elif reason is RefusalReason.TOKENS:
            world.require(books.tokens.full(books.reserved), f"{tenant} is within its tokens")
        if reason not in AT_THE_DOOR:
            books.most.take(1)
        if reason is None:
            reserved = event.tokens if books.tokens.limit is not None else 0
            books.reserved += reserved
            self._open[event.request] = (tenant, reserved)

    def _restore(self, world: World, order: Restore) -> None:
        again = order.ref in self._orders
        self._orders[order.ref] = order.order
        if again:
            return
        books = self._of(order.ref.tenant, world.now_ms)
        world.require(not books.restores.full(), f"{order} is one restore too many")
        if books.restores.limit is not None:
            world.reached["restored under a rate"] += 1
        books.restores.take(1)

    def _end(self, world: World, request: str) -> None:
        tenant, reserved = self._open.pop(request, ("", 0))
        if tenant:
            self._of(tenant, world.now_ms).reserved -= reserved
        self._granted.discard(request)
