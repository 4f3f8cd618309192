"""Shares of a tenant's limits: which part of every limit one node may grant, so that all nodes together
grant the limit and no more.

Covers: the value (``Share``), how finely a tenant's limits can be divided, what a node holds and how that
changes, and how much of a limit a node wants. Pure. Does not cover: who is given how much
(``control/shares.py``), the arithmetic of a rate under a share (``rates``), the line to control
(``agent/shares.py``), or bytes: byte quotas hold on each node.

A share is a part of all of a tenant's limits at once: of the rates, their bursts and the concurrency. It
is divided in **grains**, each of which lets at least one unit of every limit through, so a small limit
divides into few: a tenant that may have one request at once is served by one node at a time.

A node keeps its share while control is away. After ``TERM_MS`` without a word from control, measured from
when the last exchange that was answered was *sent*, the share halves, once, and stays. Control counts the
same from when it took that exchange in, which is later, and adds ``MARGIN_MS`` for clocks that do not run
equally fast; so it never gives away what a node still has, whatever the clocks show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

# A tenant's limits are divided into this many grains at most. More would change little and make more turns.
GRAINS_MAX = 64
# How long a node that hears nothing keeps all it had: a restart of control, or a few minutes of its
# absence, change nothing; what a dead node held is free by half after it.
TERM_MS = 300_000
# Two steady clocks that drift apart by a percent, and a second.
MARGIN_MS = TERM_MS // 100 + 1_000
# Who may have nothing now asks control at once and can come back this soon.
NOTHING_RETRY_MS = 1_000


@lru_cache(maxsize=GRAINS_MAX * GRAINS_MAX)
def _part(parts: int, of: int) -> Fraction:
    """Making one costs more than all that is asked of it."""
    return Fraction(parts, of)


@dataclass(frozen=True, slots=True)
class Share:
    """``parts`` of ``of`` equal parts."""

    parts: int
    of: int = 1

    @property
    def value(self) -> Fraction:
        return _part(self.parts, self.of)

    @property
    def is_whole(self) -> bool:
        return self.parts >= self.of

    def halved(self) -> Share:
        """What is left of it after the term; an odd part goes."""
        return Share(self.parts // 2, self.of)

    def of_count(self, whole: int) -> int:
        """So many of ``whole`` units, rounded down: all shares together are never more than the whole."""
        return whole * self.parts // self.of


WHOLE, NOTHING = Share(GRAINS_MAX, GRAINS_MAX), Share(0)


@dataclass(frozen=True, slots=True)
class Lags:
    """How long each rate of a part needs to pay for what was taken of it. It goes with the part to
    whoever has it next."""

    requests_ms: int = 0
    tokens_ms: int = 0
    restores_ms: int = 0
    device_ms: int = 0

    def each(self) -> tuple[int, int, int, int]:
        return self.requests_ms, self.tokens_ms, self.restores_ms, self.device_ms


NO_LAGS = Lags()


@dataclass(frozen=True, slots=True)
class TenantShare:
    """A tenant's share on one node; ``lags`` are those of what it grows by, or what is owed of it."""

    tenant: str
    share: Share
    lags: Lags = NO_LAGS
    want: Share = NOTHING  # what the node could use; said by nodes only
    ahead: bool = False  # it could serve the tenant although it wants nothing; said by nodes only


@dataclass(slots=True)
class NodeShares:
    """What a node holds: of the tenants named, and of all others (``rest``). Until control says something
    a node serves alone and has the whole of everything."""

    rest: Share = WHOLE
    by_tenant: dict[str, Share] = field(default_factory=dict)
    halve_at_ms: int | None = None  # None: what it holds stays
    used_up: bool = False  # what of it is left is not known

    def share_of(self, tenant: str) -> Share:
        return self.by_tenant.get(tenant, self.rest)

    def are_due(self, now_ms: int) -> bool:
        return self.halve_at_ms is not None and now_ms >= self.halve_at_ms

    def halve(self) -> None:
        self.halve_at_ms = None
        self.rest = self.rest.halved()
        self.by_tenant = {name: share.halved() for name, share in self.by_tenant.items()}


def part_needed(count: int, whole: int | None, of: int) -> int:
    """How many of ``of`` parts let ``count`` of ``whole`` units be there; 0 when they are not limited."""
    return 0 if not whole or count <= 0 else min(-(-count * of // whole), of)
