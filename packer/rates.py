"""Rates of a tenant on one node: requests, tokens and restores per minute, device time per day. Exact.

Covers: GCRA in whole numbers for things that count one and for amounts that are known afterwards only,
the four rates of a tenant, what is left of each, and taking up what was owed before a restart. Does not
cover: who is refused with which words (``admission``), bytes and turns (``quota``), or the share of a
rate that a node has of the fleet's (``control/cluster.py``).

One rule for all four: an amount may come in while the bucket holds at least one unit; what it really
took is charged when it is known, and may put the bucket into **debt**, which delays whoever comes next.
So nothing is ever lost or rounded, a large request is not starved by small ones that fit sooner, and in
the long run exactly the limit passes. What is known before (an estimate) is **reserved** until then: it
counts as used and does not drain, so that many large requests at once can not all pass a small limit.
In any window of T ms at most ``burst + limit * T / period`` units are let in, and what the requests in
flight took beyond their estimates.

Device time is a bucket of a whole day that drains all the time, not a calendar day: there is no midnight
at which everybody may start at once, no time zone, and its whole state is one number. A tenant that was
idle may use a day's worth at once and gets a 24th of it back every hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from packer.types import TenantQuota

SECOND_MS = 1_000
MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS
# A tenant may send this part of its minute at once (ten seconds' worth): bursts of a web page pass,
# and a whole minute's quota can not arrive in one instant.
BURST_PARTS = 6
# Above what one request can take: 1 Mi tokens in a body of 1 MiB and 32 answers of 1,000,000 tokens. A
# worker that says more lies; its tenant pays this much at the most.
REQUEST_TOKENS_MAX = 2**25
# No request or restore takes longer than a day of one device.
REQUEST_DEVICE_MS_MAX = DAY_MS


def bounded(amount: int, most: int) -> int:
    """A count from outside, within what is possible."""
    return min(max(amount, 0), most)


@dataclass(slots=True, eq=False)
class Rate:
    """At most ``limit`` units per ``period_ms`` by GCRA, in whole numbers. ``limit`` None: not limited.

    ``due`` is the theoretical arrival time in units of 1/limit milliseconds, so that one unit is exactly
    ``period_ms`` of them and nothing is ever rounded while counting. ``reserved`` units are those of
    requests that are under way, by their estimates.
    """

    limit: int | None = None
    period_ms: int = MINUTE_MS
    burst_parts: int = BURST_PARTS
    due: int = 0
    reserved: int = 0

    @property
    def burst(self) -> int:
        """How many units may come at once after a long silence."""
        return max(1, (self.limit or 0) // self.burst_parts)

    def set_limit(self, limit: int | None, now_ms: int) -> None:
        """Change the limit and keep what is owed, in units."""
        if limit == self.limit:
            return
        owed = 0 if self.limit is None else max(self.due - now_ms * self.limit, 0)
        self.limit = limit
        self.due = 0 if limit is None else now_ms * limit + owed

    def _used(self, now_ms: int) -> int:
        """What is used of the burst, in units times ``period_ms``."""
        return max(self.due - now_ms * (self.limit or 0), 0) + self.reserved * self.period_ms

    def wait_ms(self, now_ms: int, units: int = 1) -> int:
        """0 if this many units may come now, else how long until the last of them may (rounded up, so
        that it then passes)."""
        rate = self.limit
        if rate is None:
            return 0
        if rate <= 0:
            return self.period_ms
        over = self._used(now_ms) - (self.burst - units) * self.period_ms
        return 0 if over <= 0 else -(-over // rate)

    def take(self, now_ms: int, amount: int = 1) -> None:
        """Count what was let in, or what it took when that is known; into debt if need be."""
        if self.limit and amount > 0:
            self.due = max(self.due, now_ms * self.limit) + amount * self.period_ms

    def remaining(self, now_ms: int) -> int:
        """How many units would be let in if they all came now."""
        if not self.limit:
            return 0
        return max((self.burst * self.period_ms - self._used(now_ms)) // self.period_ms, 0)

    def reset_ms(self, now_ms: int) -> int:
        """How long until the whole burst is available again, if all estimates are right."""
        if not self.limit:
            return 0
        return -(-self._used(now_ms) // self.limit)

    def owed(self, now_ms: int) -> int:
        """Units taken that time has not paid for yet, rounded up; what a restart must not forget."""
        if not self.limit:
            return 0
        return -(-max(self.due - now_ms * self.limit, 0) // self.period_ms)

    def take_up(self, owed: int, ago_ms: int, now_ms: int) -> None:
        """``owed`` units were owed ``ago_ms`` ago, before a restart. They come on top of what is."""
        if not self.limit:
            return
        left = owed * self.period_ms - max(ago_ms, 0) * self.limit
        if left > 0:
            self.due = max(self.due, now_ms * self.limit) + left


@dataclass(frozen=True, slots=True)
class RateView:
    """A rate as it stands: ``name`` is the quota's field and its unit, ``burst`` what fits at once."""

    name: str
    limit: int
    burst: int
    remaining: int
    reset_ms: int


def _device() -> Rate:
    return Rate(period_ms=DAY_MS, burst_parts=1)


def _whole_minute() -> Rate:
    return Rate(burst_parts=1)


@dataclass(slots=True, eq=False)
class TenantRates:
    """The rates of one tenant. ``device`` counts milliseconds.

    Tokens and restores may come a whole minute's worth at once: one prompt may be as large as that, and
    a tenant that wakes up wants all its models; what is bounded is how long it can go on.
    """

    requests: Rate = field(default_factory=Rate)
    tokens: Rate = field(default_factory=_whole_minute)
    restores: Rate = field(default_factory=_whole_minute)
    device: Rate = field(default_factory=_device)
    limited: bool = False  # is any of requests, tokens and device time?

    def set_limits(self, quota: TenantQuota, now_ms: int) -> None:
        seconds = quota.device_seconds_per_day
        self.requests.set_limit(quota.requests_per_minute, now_ms)
        self.tokens.set_limit(quota.tokens_per_minute, now_ms)
        self.restores.set_limit(quota.restores_per_minute, now_ms)
        self.device.set_limit(None if seconds is None else seconds * SECOND_MS, now_ms)
        at_the_door = (self.requests, self.tokens, self.device)
        self.limited = any(rate.limit is not None for rate in at_the_door)

    def blocked(self, now_ms: int, expected_ms: int) -> bool:
        """May no request come in now? ``expected_ms`` of device time are expected of those in flight."""
        return bool(
            self.requests.wait_ms(now_ms)
            or self.tokens.wait_ms(now_ms)
            or self.device.wait_ms(now_ms, 1 + expected_ms)
        )

    def admit(self, tokens: int, now_ms: int) -> int:
        """Count a request that comes in; returns how many tokens are reserved for it."""
        self.requests.take(now_ms)
        if self.tokens.limit is None:
            return 0
        reserved = bounded(tokens, REQUEST_TOKENS_MAX)
        self.tokens.reserved += reserved
        return reserved

    def spent(self, now_ms: int) -> tuple[int, int]:
        """Tokens and device milliseconds that are owed. The other two forget within a minute anyway."""
        return self.tokens.owed(now_ms), self.device.owed(now_ms)

    def views(self, now_ms: int) -> Iterator[RateView]:
        """Those that are limited, by the names and in the units of ``TenantQuota``."""
        for name, rate, unit in (
            ("requests_per_minute", self.requests, 1),
            ("tokens_per_minute", self.tokens, 1),
            ("restores_per_minute", self.restores, 1),
            ("device_seconds_per_day", self.device, SECOND_MS),
        ):
            if rate.limit is not None:
                yield RateView(
                    name,
                    rate.limit // unit,
                    rate.burst // unit,
                    rate.remaining(now_ms) // unit,
                    rate.reset_ms(now_ms),
                )


def span_text(span_ms: int) -> str:
    """A span as people read it, rounded up: ``8 s``, ``2 min 5 s``, ``3 h 12 min``."""
    seconds = -(-max(span_ms, 0) // SECOND_MS)
    minutes, seconds = divmod(seconds, 60)
    if not minutes:
        return f"{seconds} s"
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes + bool(seconds), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
