"""Which answers a worker owes, what each has cost, and whether the worker is stuck.

Covers: how long the worker was busy with each answer, and how long it may say nothing. Does not cover:
processes that do not run at all (``workers``'s pings), or ending a stuck one (``workers``).

A worker has one thread that computes, for several answers in turn or at a time, so only the worker knows
whose time it was. It states each answer's share, and is not believed more than that: all shares together are
the time that passed on this side while it owed anything. A worker that states too little of one answer has
another of the same tenant pay for it, since a worker is one tenant's.

A worker that dies owes the time until then for every answer that is open: else a model that ends its process
at the end of each request would compute for nothing.

A tokenizer's expression that backtracks for ever, or a matrix that takes an hour, keeps that one thread busy
while the process answers every ping.
"""

from __future__ import annotations

# As long as the router waits for a node that says nothing; openai's client waits no longer either.
SILENT_SECONDS_MAX = 600.0
# An answer that nobody waits for any more ends between two passes; a worker that does not get there keeps a
# core busy for nobody.
LEFT_SECONDS_MAX = 120.0


class Due:
    """Answers that a worker owes. Times are the event loop's, in seconds."""

    def __init__(self) -> None:
        # In the order of asking; the values are when each was asked, and when its caller left.
        self._asked_at: dict[int, float] = {}
        self._left_at: dict[int, float] = {}
        self._heard_at = 0.0
        # Since when nobody was charged, while anything is owed; else what is left over of a millisecond.
        self._uncharged_at = 0.0
        self._rest_s = 0.0

    def asked(self, number: int, now: float) -> None:
        if not self._asked_at:
            self._heard_at, self._uncharged_at = now, now - self._rest_s
        self._asked_at[number] = now

    def left(self, number: int, now: float) -> None:
        """The caller is gone. Harmless when the answer has ended."""
        if number in self._asked_at:
            self._left_at[number] = now

    def heard(self, number: int, ended: bool, now: float, stated_s: float = 0.0) -> int:
        """A frame came. Returns how many milliseconds the worker was busy with an answer that ends with it.

        What it states less than what passed stays to be charged to others, but never for longer than the
        oldest of these was asked ago: time from before all that is owed belongs to nobody else.
        """
        self._heard_at = now
        if not ended or number not in self._asked_at:
            return 0
        del self._asked_at[number]
        self._left_at.pop(number, None)
        uncharged_s = now - self._uncharged_at
        oldest_at = min(self._asked_at.values(), default=now)
        left_s = min(max(uncharged_s - stated_s, 0.0), now - oldest_at)
        # Whole milliseconds, and the rest of one is the next answer's: of many small ones none gets lost.
        charged_ms = int((uncharged_s - left_s) * 1000)
        self._uncharged_at += charged_ms / 1000
        if not self._asked_at:
            self._rest_s = now - self._uncharged_at
        return charged_ms

    def died(self, now: float) -> dict[int, int]:
        """The worker is gone. Returns how many milliseconds each answer that it owed is charged, by number.

        Nobody knows whose time it was: it is all theirs, in equal parts, and none's from before it was asked.
        Beyond the longest silence that is allowed nobody pays for what this side was too busy to end.
        """
        until = min(now, self._heard_at + SILENT_SECONDS_MAX)
        uncharged_ms = max(int((until - self._uncharged_at) * 1000), 0)
        charged_ms: dict[int, int] = {}
        # The youngest first: the oldest was asked before all that is uncharged, and takes the rest.
        asked = sorted(self._asked_at.items(), key=lambda item: item[1])
        while asked:
            number, asked_at = asked.pop()
            own_ms = max(int((until - asked_at) * 1000), 0)
            charged_ms[number] = min(uncharged_ms // (len(asked) + 1), own_ms) if asked else uncharged_ms
            uncharged_ms -= charged_ms[number]
        self._asked_at.clear()
        self._left_at.clear()
        return charged_ms

    def stuck_s(self, now: float) -> float:
        """How long the worker has been stuck beyond what is allowed; 0: it is not."""
        if not self._asked_at:
            return 0.0
        # Younger answers may wait behind the oldest. It does not wait for them: whoever has left is let go
        # between two passes.
        left_at = self._left_at.get(next(iter(self._asked_at)))
        if left_at is None:
            silent, limit = now - self._heard_at, SILENT_SECONDS_MAX
        else:
            silent, limit = now - max(self._heard_at, left_at), LEFT_SECONDS_MAX
        return silent if silent > limit else 0.0
