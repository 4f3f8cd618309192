"""How long requests wait at the nodes that hold a version of which there may be several copies. Pure values.

Covers: what is measured of such a version at a node (how many requests of this router are there, and how far
apart their answers come), and the waiting of a version that another copy has to pay for. Does not cover: what
follows from it (``control.copies``), or when it is told (``control.cluster``).

Of its own requests a router knows each end at once. Of several routers each sees its part of the requests and
its part of the answers: the product, which is the wait, is the same. What others sent, callers who go to
nodes themselves among them, control alone knows, from how many requests nodes report: how many waited, times
how long, is the same sum of waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp2

from packer.types import ModelRef

# What was waited counts half after this long: a copy takes room from others, so its restore must be made up
# for within half a minute or so. With three times this much `scripts/bench_copies.py` finds a copy more at
# small loads, which spares hundredths of a second.
WAITED_HALF_MS = 20_000
# Versions whose waiting is remembered; the oldest go first. One is about 300 bytes.
OWED_MAX = 1_000
# A node that would not take a copy is not asked for one again for this long.
DECLINED_MS = 60_000
# Nodes that declined a version, the oldest go first.
DECLINED_MAX = 64
# Versions of one node whose pace is remembered while none of their requests is in flight, 200 bytes each.
FLOWS_IDLE_MAX = 64
# Answers by which the pace is measured; older ones count half, quarter and so on.
PACED_ANSWERS_MAX = 64
# Who is at a node in two reports waited from the one to the other; of reports further apart nobody knows. A
# node reports every 20 s at the latest.
REPORTS_APART_MS_MAX = 30_000
# Answers of a node that has no room, no right or no time for a version.
REFUSED_STATUSES = frozenset({429, 502, 503, 507})


@dataclass(slots=True)
class Flow:
    """Requests for one version at one node. Between two waves of them the pace is remembered."""

    in_flight: int = 0
    answered_ms: int | None = None  # when one ended and others were still in flight
    busy_ms: int = 0  # between such ends
    answers: int = 0

    def end(self, served: bool, now_ms: int) -> None:
        """One ended. A refusal says nothing about how fast answers come."""
        self.in_flight -= 1
        if served and self.answered_ms is not None:
            self.busy_ms += now_ms - self.answered_ms
            self.answers += 1
        if not self.in_flight:
            self.answered_ms = None
        elif served:
            self.answered_ms = now_ms
        if self.answers >= PACED_ANSWERS_MAX:
            self.busy_ms //= 2
            self.answers //= 2

    def waiting(self, together: int) -> int:
        """Requests that must end before one more is answered, where so many are worked on together."""
        return max(0, self.in_flight + 1 - together)

    def wait_ms(self, together: int) -> int:
        """How long one more waits for others of the same version. Nothing is known before the second end."""
        return self.waiting(together) * self.busy_ms // self.answers if self.answers else 0


@dataclass(frozen=True, slots=True)
class Others:
    """Requests for a version at a node that this router did not send, as of the node's report."""

    count: int
    at_ms: int


def others_waited_ms(before: Others | None, now: Others, own: int, together: int) -> int:
    """What others waited for each other and for this router's ``own`` requests, since the report before."""
    staying = min(before.count, now.count) if before is not None else 0
    if before is None or not staying:
        return 0
    waiting = max(0, staying + own - together)
    passed_ms = min(now.at_ms - before.at_ms, REPORTS_APART_MS_MAX)
    return waiting * passed_ms * staying // (staying + own)


def count(flows: dict[str, Flow], text: str) -> None:
    flow = flows[text] = flows.pop(text) if text in flows else Flow()  # the oldest are first
    flow.in_flight += 1
    if len(flows) > FLOWS_IDLE_MAX:
        idle = [known for known, each in flows.items() if not each.in_flight]
        for known in idle[: len(flows) - FLOWS_IDLE_MAX]:
            del flows[known]


def end(flows: dict[str, Flow], text: str, served: bool, now_ms: int) -> bool:
    """Whether the request was counted: a version may have got its replicas while it was in flight."""
    flow = flows.get(text)
    if flow is None or not flow.in_flight:
        return False
    flow.end(served, now_ms)
    return True


@dataclass(slots=True)
class Owed:
    """What requests for a version have waited since its last copy was sent for, and who declined one."""

    waited_ms: float = 0.0
    at_ms: int = 0
    declined: dict[str, int] = field(default_factory=dict)  # until when, the oldest first

    def waited(self, now_ms: int) -> float:
        """As it counts now."""
        return self.waited_ms * exp2(-max(now_ms - self.at_ms, 0) / WAITED_HALF_MS)

    def add(self, wait_ms: int, now_ms: int) -> None:
        self.waited_ms, self.at_ms = self.waited(now_ms) + wait_ms, now_ms

    def decline(self, node: str, now_ms: int) -> None:
        self.declined.pop(node, None)
        self.declined[node] = now_ms + DECLINED_MS
        while len(self.declined) > DECLINED_MAX:
            del self.declined[next(iter(self.declined))]

    def is_over(self, now_ms: int) -> bool:
        """Whether nothing would change if it were forgotten."""
        return self.waited(now_ms) < 1 and all(until_ms <= now_ms for until_ms in self.declined.values())


@dataclass(slots=True)
class Waits:
    """What every version has waited that may have copies."""

    owed: dict[ModelRef, Owed] = field(default_factory=dict)

    def _of(self, ref: ModelRef, now_ms: int) -> Owed:
        owed = self.owed.setdefault(ref, Owed(at_ms=now_ms))
        while len(self.owed) > OWED_MAX:
            del self.owed[next(iter(self.owed))]
        return owed

    def add(self, ref: ModelRef, wait_ms: int, now_ms: int) -> None:
        if wait_ms > 0:
            self._of(ref, now_ms).add(wait_ms, now_ms)

    def paid(self, ref: ModelRef) -> None:
        """A copy was sent for."""
        if (owed := self.owed.get(ref)) is not None:
            owed.waited_ms = 0.0

    def decline(self, ref: ModelRef, node: str, now_ms: int) -> None:
        self._of(ref, now_ms).decline(node, now_ms)

    def forget(self, now_ms: int) -> None:
        for ref in [ref for ref, owed in self.owed.items() if owed.is_over(now_ms)]:
            del self.owed[ref]
