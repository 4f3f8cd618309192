"""Whether and when to send a request again. Pure but for the jitter: no clock, no I/O.

Covers: which outcomes are worth another try, how long to wait, and the two bounds: per call (tries
and seconds waited) and per client (a budget, so that many callers do not multiply an outage).
Does not cover: waiting itself (``_transport``).
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from bunkhouse._errors import Unreachable
from bunkhouse._request import Answer, Request, retry_after_s

# Statuses that mean "not processed, come back": safe for any method when the server says when.
_REFUSED = frozenset({429, 503})
# Statuses that say nothing about whether the request was processed.
_UNCLEAR = frozenset({408, 502, 503, 504})
# With ``x-should-retry: true``: a try of this request is under way on the server.
_IN_PROGRESS = 409
# A longer wait is the caller's to decide; the exception tells how long it would be.
RETRY_AFTER_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds per call. ``tries_max=1`` never sends twice."""

    tries_max: int = 4
    wait_s_max: float = 60.0  # all waits of one call together
    backoff_s: float = 0.5  # greatest first wait where the server does not say; doubles
    backoff_s_max: float = 8.0


class RetryBudget:
    """Retries that one client may still make: each costs one token, each success returns a tenth.

    In calm weather a burst of ten may be retried; in an outage retries settle at a tenth of the
    traffic. Shared by all threads of a client.
    """

    TOKENS_MAX = 10.0
    TOKENS_PER_SUCCESS = 0.1

    def __init__(self) -> None:
        self._tokens = self.TOKENS_MAX
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Pay for one retry; False when the budget is spent."""
        with self._lock:
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True

    def earn(self) -> None:
        """A request succeeded."""
        with self._lock:
            self._tokens = min(self.TOKENS_MAX, self._tokens + self.TOKENS_PER_SUCCESS)


@dataclass(slots=True)
class Tries:
    """The tries of one call. ``unclear``: one of them may have been done although its answer did not come."""

    policy: RetryPolicy
    budget: RetryBudget
    made: int = 0
    waited_s: float = 0.0
    unclear: bool = False

    def wait_s(self, request: Request, outcome: Answer | Unreachable, now_s: float) -> float | None:
        """Seconds to wait before sending again; None when the outcome is final. Counts the try."""
        self.made += 1
        self.unclear |= isinstance(outcome, Unreachable) and outcome.sent
        if isinstance(outcome, Answer) and (outcome.status < 400 or outcome.status in request.accepts):
            self.budget.earn()
            return None
        floor_s = _floor_s(request, outcome, now_s)
        # The first try of this very request is still being answered: nothing failed, only its answer is
        # waited for, so neither the count of tries nor the budget is the bound, but the time alone.
        awaited = isinstance(outcome, Answer) and outcome.status == _IN_PROGRESS
        if awaited:
            self.made -= 1
        if floor_s is None or self.made >= self.policy.tries_max:
            return None
        if floor_s > 0:
            # Never earlier than the server said; a little later, so that callers do not return as one.
            delay_s = floor_s + random.uniform(0, min(1.0, floor_s / 4))
        else:
            ceiling_s = self.policy.backoff_s * 2 ** (self.made - 1)
            delay_s = random.uniform(0, min(self.policy.backoff_s_max, ceiling_s))
        if floor_s > RETRY_AFTER_S_MAX or self.waited_s + delay_s > self.policy.wait_s_max:
            return None
        if not awaited and not self.budget.take():
            return None
        self.waited_s += delay_s
        return delay_s


def _floor_s(request: Request, outcome: Answer | Unreachable, now_s: float) -> float | None:
    """Least wait before another try: 0 where the server does not say, None where there is no other try."""
    if isinstance(outcome, Unreachable):
        return 0.0 if request.repeatable or not outcome.sent else None
    said_s = retry_after_s(outcome.headers, now_s)
    # The server knows best: a quota that waiting cannot help says "false", a dying worker "true".
    should = outcome.headers.get("x-should-retry", "").lower()
    if should == "false":
        return None
    if should == "true" or (outcome.status in _REFUSED and said_s is not None):
        return said_s or 0.0
    if outcome.status == 429 or (outcome.status in _UNCLEAR and request.repeatable):
        return said_s or 0.0
    return None
