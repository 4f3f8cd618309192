"""How much of one listener a single caller may occupy: requests, unread answers, and time without reading.

Covers: counting requests and bytes of answers by owner (a tenant), and giving up on callers that do not
take what they asked for. Does not cover: bytes of request bodies (``packer/http.py``), or rates and
quotas, which are promises to tenants (``packer/quota.py``): these limits protect the process.

aiohttp has none of them: an answer that its caller does not read lies in memory for ever, and whoever
opens most connections has most of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager

from packer.types import GIB, KIB, MIB

# Requests of one owner that are being read, answered or taken at one time. Each costs a connection.
OWNER_REQUESTS_MAX = 1_024
# Answers that are written and not yet taken: the largest single one has some 300 MB.
ANSWERS_BYTES_MAX = 2 * GIB
OWNER_ANSWERS_BYTES_MAX = 512 * MIB
# Smaller answers are not counted: the limit of requests bounds them to 64 MiB of one owner.
SMALL_BYTES_MAX = 64 * KIB
# A caller that takes no byte of its answer for this long is gone or hostile.
STALL_SECONDS = 60.0


class Crowded(Exception):
    """One owner, or all together, hold what they may hold. ``code`` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Crowd:
    """What the callers of one listener hold right now."""

    def __init__(
        self,
        owner_requests: int = OWNER_REQUESTS_MAX,
        total_bytes: int = ANSWERS_BYTES_MAX,
        owner_bytes: int = OWNER_ANSWERS_BYTES_MAX,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.owner_requests = owner_requests
        self.total_bytes = total_bytes
        self.owner_bytes = owner_bytes
        self.stall_seconds = stall_seconds
        self.requests: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def enter(self, owner: str) -> None:
        """Count a request in; ``leave`` counts it out. Raises ``Crowded``."""
        count = self.requests.get(owner, 0)
        if count >= self.owner_requests:
            raise Crowded(
                "too_many_requests_in_flight",
                f"{count} requests of yours are being answered, the limit; send fewer at one time.",
            )
        self.requests[owner] = count + 1

    def leave(self, owner: str) -> None:
        _subtract(self.requests, owner, 1)

    @contextmanager
    def holding(self, owner: str, nbytes: int) -> Iterator[None]:
        """Count an answer while it is being taken; a first one always passes. Raises ``Crowded``."""
        held = self.bytes.get(owner, 0)
        if held and (
            held + nbytes > self.owner_bytes or sum(self.bytes.values()) + nbytes > self.total_bytes
        ):
            raise Crowded(
                "too_many_bytes_in_flight",
                f"{held} bytes of answers wait for you to read them (limit {self.owner_bytes} bytes for a "
                f"tenant, {self.total_bytes} in all); read them, or ask for less at one time.",
            )
        self.bytes[owner] = held + nbytes
        try:
            yield
        finally:
            _subtract(self.bytes, owner, nbytes)


def _subtract(counts: dict[str, int], owner: str, count: int) -> None:
    left = counts.get(owner, 0) - count
    if left > 0:
        counts[owner] = left
    else:
        counts.pop(owner, None)


async def in_time(
    transport: asyncio.WriteTransport, sending: Coroutine[None, None, None], stall_seconds: float
) -> None:
    """Send as long as the caller takes something in every ``stall_seconds``; else hang up.

    Raises ``ConnectionResetError``.
    """
    task = asyncio.ensure_future(sending)
    left: int | None = None
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=stall_seconds)
            waiting = transport.get_write_buffer_size()
            if not task.done() and left is not None and waiting >= left:
                transport.abort()
                raise ConnectionResetError(f"the caller took nothing for {stall_seconds:g} s")
            left = waiting
        await task
    finally:
        task.cancel()
