"""Where nodes come for shares of tenants' limits: the book, who is nudged, and who waits for an answer.

Covers: stepping the book (``control/shares.py``) with a clock, ending a node's long poll when others want
what it has, and holding an answer until more is free. Does not cover: HTTP (``control/routes/shares.py``).
Nothing of it is on disk: after a restart the nodes say what they hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

from control import shares
from control.share_book import ShareBook
from control.shares import AnswerShares, Event, NudgeHolder, SharesAsked, SharesAwaited, WakeAsks
from packer.wire import SharesAnswer


class ShareDesk:
    """``wake`` ends a node's long poll, so that it comes at once."""

    def __init__(self, now_ms: Callable[[], int], wake: Callable[[str], None]) -> None:
        self._now_ms = now_ms
        self._wake = wake
        self._nudged: dict[str, None] = {}
        self._freed = asyncio.Event()
        self._stopping = False
        self.book = ShareBook("", 0)

    def open(self, name: str, nodes: Iterable[str]) -> None:
        """``name`` is of this start of control; of the nodes nothing is known yet."""
        self.book = ShareBook(name, self._now_ms())
        for node in nodes:
            self.step(shares.HolderJoined(node, fresh=False))

    def close(self) -> None:
        """Answer whoever waits."""
        self._stopping = True
        self._freed.set()

    def step(self, event: Event) -> AnswerShares | None:
        answer = None
        for action in shares.step(self.book, event, self._now_ms()):
            match action:
                case AnswerShares():
                    answer = action
                case NudgeHolder(node):
                    self._nudged[node] = None
                    self._wake(node)
                    self._look_again()  # its own exchange may be one that waits
                case WakeAsks():
                    self._look_again()
        return answer

    def _look_again(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    def nudged(self, node: str) -> bool:
        return node in self._nudged

    def take_nudge(self, node: str) -> bool:
        """Whether the answer to this node's beat should bring it here: others want what it has, or nothing
        is known of it since control started."""
        return self._nudged.pop(node, "") is None or node in self.book.unbound

    async def ask(self, event: SharesAsked, wait_ms: int) -> SharesAnswer | None:
        """The answer to one exchange, held for as long as the node wants what others are asked for."""
        until_ms = self._now_ms() + wait_ms
        self._nudged.pop(event.node, None)
        answer = self.step(event)
        while answer is not None and answer.unmet and not answer.recalls and not self._stopping:
            left_ms = until_ms - self._now_ms()
            if left_ms <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(left_ms / 1000):
                    await self._freed.wait()
            current = self.book.holders.get(event.node)
            if current is None or (current.session, current.number) != (event.session, event.number):
                break  # another exchange has come: nobody waits for this one
            if left_ms := until_ms - self._now_ms():
                answer = self.step(SharesAwaited(event.node))
        return answer.said if answer is not None else None
