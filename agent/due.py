"""Which answers a worker owes, and whether it is stuck in one of them.

Covers: the order in which a worker runs its requests, how long each keeps it busy, and how long it may say
nothing. Does not cover:
processes that do not run at all (``workers``'s pings), or ending a stuck one (``workers``).

A worker computes one request after the other. A tokenizer's expression that backtracks for ever, or a
matrix that takes an hour, keeps that one thread busy while the process answers every ping.
"""

from __future__ import annotations

# As long as the router waits for a node that says nothing; openai's client waits no longer either.
SILENT_SECONDS_MAX = 600.0
# An answer that nobody waits for any more ends between two inputs or tokens; a worker that does not get
# there keeps a core busy for nobody.
LEFT_SECONDS_MAX = 120.0


class Due:
    """Answers that a worker owes. Times are the event loop's, in seconds."""

    def __init__(self) -> None:
        # In the order of asking, which is the order of computing; the value is when the caller left.
        self._left_at: dict[int, float | None] = {}
        self._heard_at = 0.0
        self._begun_at = 0.0  # when the oldest was begun

    def asked(self, number: int, now: float) -> None:
        if not self._left_at:
            self._heard_at = self._begun_at = now
        self._left_at[number] = None

    def left(self, number: int, now: float) -> None:
        """The caller is gone. Harmless when the answer has ended."""
        if number in self._left_at:
            self._left_at[number] = now

    def heard(self, number: int, ended: bool, now: float) -> float:
        """A frame came. Returns how long the worker was busy with an answer that ends with it.

        Waiting behind another answer is that one's time, so that the times of all add up to what passed,
        whatever the worker says. One that ends out of turn took nothing, and the oldest pays for it.
        """
        self._heard_at = now
        if not ended or number not in self._left_at:
            return 0.0
        oldest = next(iter(self._left_at)) == number
        del self._left_at[number]
        if not oldest:
            return 0.0
        busy_s, self._begun_at = now - self._begun_at, now
        return busy_s

    def stuck_s(self, now: float) -> float:
        """How long the worker has been stuck beyond what is allowed; 0: it is not."""
        if not self._left_at:
            return 0.0
        # Only the oldest is being computed; all others wait for that one.
        left_at = next(iter(self._left_at.values()))
        if left_at is None:
            silent, limit = now - self._heard_at, SILENT_SECONDS_MAX
        else:
            silent, limit = now - max(self._heard_at, left_at), LEFT_SECONDS_MAX
        return silent if silent > limit else 0.0
