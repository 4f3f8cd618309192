"""Rates of a tenant on one node: requests, tokens and restores per minute, device time per day. Exact.

Covers: GCRA in whole numbers for things that count one and for amounts that are known afterwards only,
the four rates of a tenant, what is left of each, the part that this node has of them (``shares``), and
taking up what was owed before a restart. Does not cover: who is refused with which words (``admission``),
bytes and turns (``quota``), or which node has which share (``control/shares.py``).

One rule for all four: an amount may come in while the bucket holds at least one unit; what it really
took is charged when it is known, and may put the bucket into **debt**, which delays whoever comes next.
So nothing is ever lost or rounded, a large request is not starved by small ones that fit sooner, and in
the long run exactly the limit passes. What is known before (an estimate) is **reserved** until then: it
counts as used and does not drain, so that many large requests at once can not all pass a small limit.
In any window of T ms at most ``burst + limit * T / period`` units are let in, and what the requests in
flight took beyond their estimates.

A share changes the speed and the burst of a bucket at any moment and lets nothing through that was not
there before: what is owed of a part goes with the part. So the sum of what all nodes may still let in never
grows but by the limit, however often it is divided anew.

Device time is a bucket of a whole day that drains all the time, not a calendar day: there is no midnight
at which everybody may start at once, no time zone, and its whole state is one number. A tenant that was
idle may use a day's worth at once and gets a 24th of it back every hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from packer.shares import GRAINS_MAX, NOTHING_RETRY_MS, WHOLE, Lags, Share, part_needed
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


# A rate that is not divided counts as if there were no shares.
_ONE = Share(1)


def bounded(amount: int, most: int) -> int:
    """A count from outside, within what is possible."""
    return min(max(amount, 0), most)


@dataclass(slots=True, eq=False)
class Rate:
    """At most ``limit`` units per ``period_ms`` by GCRA, in whole numbers. ``limit`` None: not limited.

    ``share`` is this node's part of it: ``speed`` units per ``span_ms``, ``burst`` at once. ``due`` is the
    theoretical arrival time in units of 1/speed milliseconds, so that one unit is exactly ``span_ms`` of
    them and nothing is ever rounded while counting. ``reserved`` units are those of requests that are under
    way, by their estimates. ``taken`` counts all that was ever taken.
    """

    limit: int | None = None
    period_ms: int = MINUTE_MS
    burst_parts: int = BURST_PARTS
    due: int = 0
    reserved: int = 0
    share: Share = _ONE
    speed: int = 0
    span_ms: int = 0
    burst: int = 1
    taken: int = 0
    gone_ms: int = 0  # until when what was taken of parts that were given up is paid for

    def __post_init__(self) -> None:
        self._cut()

    def _cut(self) -> None:
        self.speed = (self.limit or 0) * self.share.parts
        self.span_ms = self.period_ms * self.share.of
        self.burst = self.share.of_count(burst_of(self.limit or 0, self.burst_parts))

    def _owed(self, now_ms: int) -> int:
        """Units taken that time has not paid for yet, times ``span_ms``."""
        return max(self.due - now_ms * self.speed, 0)

    def set_limit(self, limit: int | None, now_ms: int) -> None:
        """Change the limit and keep what is owed, in units."""
        if limit == self.limit:
            return
        owed = 0 if self.limit is None else self._owed(now_ms)
        self.limit = limit
        self._cut()
        self.due = 0 if limit is None else now_ms * self.speed + owed

    def set_share(self, share: Share, lag_ms: int, now_ms: int) -> None:
        """Change the part that this node has. What is given up takes its part of what is owed along, what
        comes brings ``lag_ms`` of its own; it may be what this node gave up a moment ago, unheard by whoever
        gives it, so it brings what is still to be paid for that at least."""
        share = _ONE if share.is_whole else share
        before, owed = self.share, self._owed(now_ms)
        if self.limit is None or share.value == before.value:
            owed = -(-owed * share.of // before.of)
        elif share.value < before.value:
            self.gone_ms = max(self.gone_ms, now_ms + self.lag_ms(now_ms))
            owed = -(-owed * share.parts // before.parts)
        else:
            grown = share.parts * before.of - before.parts * share.of
            lag_ms = max(lag_ms, self.gone_ms - now_ms)
            owed = -(-owed * share.of // before.of) - (-lag_ms * self.limit * grown // before.of)
        self.share = share
        self._cut()
        self.due = 0 if self.limit is None else now_ms * self.speed + owed

    def lag_ms(self, now_ms: int) -> int:
        """How long time needs to pay for what was taken of the part that this node has, or had."""
        own_ms = -(-self._owed(now_ms) // self.speed) if self.speed else 0
        return max(own_ms, self.gone_ms - now_ms)

    def use_up(self, now_ms: int) -> None:
        """Nothing is left, as far as anybody knows."""
        if self.limit is not None:
            self.due = now_ms * self.speed + max(self._owed(now_ms), self.burst * self.span_ms)

    def _used(self, now_ms: int) -> int:
        """What is used of the burst, in units times ``span_ms``."""
        return max(self.due - now_ms * self.speed, 0) + self.reserved * self.span_ms

    def wait_ms(self, now_ms: int, units: int = 1) -> int:
        """0 if this many units may come now, else how long until the last of them may (rounded up, so
        that it then passes)."""
        if self.limit is None:
            return 0
        speed = self.speed
        if speed <= 0 or self.burst <= 0:
            return NOTHING_RETRY_MS
        over = self._used(now_ms) - (self.burst - units) * self.span_ms
        return 0 if over <= 0 else -(-over // speed)

    def take(self, now_ms: int, amount: int = 1) -> None:
        """Count what was let in, or what it took when that is known; into debt if need be."""
        if self.limit is not None and amount > 0:
            self.due = max(self.due, now_ms * self.speed) + amount * self.span_ms
            self.taken += amount

    def remaining(self, now_ms: int) -> int:
        """How many units would be let in if they all came now."""
        if not self.speed:
            return 0
        return max((self.burst * self.span_ms - self._used(now_ms)) // self.span_ms, 0)

    def reset_ms(self, now_ms: int) -> int:
        """How long until the whole burst is available again, if all estimates are right."""
        if not self.speed:
            return 0
        return -(-self._used(now_ms) // self.speed)

    def owed(self, now_ms: int) -> int:
        """Units taken that time has not paid for yet, rounded up; what a restart must not forget."""
        if self.limit is None:
            return 0
        return -(-self._owed(now_ms) // self.span_ms)

    def take_up(self, owed: int, ago_ms: int, now_ms: int) -> None:
        """``owed`` units were owed ``ago_ms`` ago, before a restart. They come on top of what is."""
        if self.limit is None:
            return
        left = owed * self.span_ms - max(ago_ms, 0) * self.speed
        if left > 0:
            self.due = max(self.due, now_ms * self.speed) + left


def _value(share: Share) -> Fraction:
    return share.value


def burst_of(limit: int, burst_parts: int) -> int:
    """How many units of a rate may come at once after a long silence."""
    return max(1, limit // burst_parts)


def grains(quota: TenantQuota) -> int:
    """Into how many shares that are each of use a tenant's limits divide; 0 when it has none."""
    requests = quota.requests_per_minute
    counts = (
        None if requests is None else burst_of(requests, BURST_PARTS),
        quota.tokens_per_minute,
        quota.restores_per_minute,
        quota.device_seconds_per_day,
        quota.concurrency,
    )
    known = [count for count in counts if count is not None]
    return max(1, min(*known, GRAINS_MAX)) if known else 0


def full_lags(quota: TenantQuota) -> Lags:
    """The lags of a part of which nothing is left; what a lost node took of its part is no more."""
    requests = quota.requests_per_minute or 1
    return Lags(-(-burst_of(requests, BURST_PARTS) * MINUTE_MS // requests), MINUTE_MS, MINUTE_MS, DAY_MS)


@dataclass(frozen=True, slots=True)
class RateView:
    """A rate as it stands on this node: ``name`` is the quota's field and its unit, ``limit`` the tenant's
    whole limit, ``burst`` what fits at once here, ``remaining`` what this node may still let in now."""

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
    share: Share = WHOLE
    concurrency: int | None = None  # the tenant's, on all nodes together
    slots: int | None = None  # this node's part of it

    def set_limits(self, quota: TenantQuota, now_ms: int) -> None:
        seconds = quota.device_seconds_per_day
        self.requests.set_limit(quota.requests_per_minute, now_ms)
        self.tokens.set_limit(quota.tokens_per_minute, now_ms)
        self.restores.set_limit(quota.restores_per_minute, now_ms)
        self.device.set_limit(None if seconds is None else seconds * SECOND_MS, now_ms)
        at_the_door = (self.requests, self.tokens, self.device)
        self.limited = any(rate.limit is not None for rate in at_the_door)
        self.concurrency = quota.concurrency
        self._cut_slots()

    def _each(self) -> tuple[Rate, Rate, Rate, Rate]:
        return self.requests, self.tokens, self.restores, self.device

    def _cut_slots(self) -> None:
        self.slots = None if self.concurrency is None else self.share.of_count(self.concurrency)

    def set_share(self, share: Share, lags: Lags, in_flight: int, now_ms: int) -> None:
        """Change this node's part of all limits. What requests in flight stand on stays until they end, and
        so does what a part that shrinks to nothing would owe of them."""
        share = self._at_least(share, in_flight)
        if share == self.share:
            return
        for rate, lag_ms in zip(self._each(), lags.each(), strict=True):
            rate.set_share(share, lag_ms, now_ms)
        self.share = share
        self._cut_slots()

    def _at_least(self, share: Share, in_flight: int) -> Share:
        if not in_flight or share.value >= self.share.value:
            return share
        of = min(self.concurrency or GRAINS_MAX, GRAINS_MAX) if self.share.is_whole else self.share.of
        floor = Share(min(max(part_needed(in_flight, self.concurrency, of), 1), of), of)
        return min(max(floor, share, key=_value), self.share, key=_value)

    def lags(self, now_ms: int) -> Lags:
        return Lags(*(max(rate.lag_ms(now_ms), 0) for rate in self._each()))

    def use_up(self, now_ms: int) -> None:
        """After a restart, of a part: what was taken before is known of tokens and device time only."""
        self.requests.use_up(now_ms)
        self.restores.use_up(now_ms)

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
