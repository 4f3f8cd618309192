"""How many bytes of requests' bodies a worker may hold at once.

Covers: who waits until there is room, in the order of asking, and when room is given back. Does not cover:
how bodies travel (``frames``) or how many requests wait (the core).

A worker computes one request after the other and must keep the bodies of all that wait behind it. Without a
limit a tenant could fill its worker's memory with inputs that nobody has looked at.
"""

from __future__ import annotations

import asyncio

from agent.frames import BODIES_BYTES_MAX


class Bodies:
    """The bodies that one worker holds, by the number of their request."""

    def __init__(self, bytes_max: int = BODIES_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._held: dict[int, int] = {}
        self._held_bytes = 0
        self._turn = asyncio.Lock()  # hands itself on in the order of asking
        self._freed = asyncio.Event()
        self._ended = False

    async def take(self, number: int, nbytes: int) -> None:
        """Wait until the body of a request may be sent. A request without one never waits."""
        if not nbytes:
            return
        async with self._turn:
            while not self._ended and self._held and self._held_bytes + nbytes > self._bytes_max:
                self._freed.clear()
                await self._freed.wait()
            self._held[number] = nbytes
            self._held_bytes += nbytes

    def give(self, number: int) -> None:
        """The worker has done with a request. Harmless when it had no body."""
        self._held_bytes -= self._held.pop(number, 0)
        self._freed.set()

    def give_all(self) -> None:
        """The worker is gone; whoever waits, now or later, finds out."""
        self._ended = True
        self._held.clear()
        self._held_bytes = 0
        self._freed.set()
