"""Bodies of requests in memory: how many bytes of them, of whom, and for how long they may arrive.

Covers: reading a body within its limit and counting it until it is answered. Does not cover: what is in a
body (``packer/http.py`` decodes JSON), or answers (``packer/crowd.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from packer.http import JSON_BYTES_MAX, RETRY_MS_DEFAULT, ApiError, too_large
from packer.types import MIB

# Bodies held at one time, by all callers and by one tenant: the bound on what requests cost in memory.
# A tenant's share is the largest request with tensors (64 MiB) and 16 of the largest others.
BODIES_BYTES_MAX = 512 * MIB
OWNER_BODIES_BYTES_MAX = 80 * MIB
# Bodies that are larger than a JSON request leave the rest of the whole to those: a few tenants with tensors
# never keep the others from asking.
LARGE_PERCENT = 75
# A body that is not complete by then is a broken or hostile client: 30 s, and as long as it takes at 1 MiB/s.
BODY_READ_SECONDS = 30.0
BODY_BYTES_PER_SECOND_MIN = 1 * MIB


class BodyBudget:
    """Bytes of request bodies held at one time, in all and by one owner (a tenant).

    Without it a thousand connections of one key, each sending one large body slowly, fill the memory.
    """

    def __init__(
        self, total_bytes: int = BODIES_BYTES_MAX, owner_bytes: int = OWNER_BODIES_BYTES_MAX
    ) -> None:
        self.total_bytes = total_bytes
        self.owner_bytes = owner_bytes
        self._held: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        return sum(self._held.values())

    @asynccontextmanager
    async def body(
        self, request: web.Request, owner: str, limit_bytes: int = JSON_BYTES_MAX
    ) -> AsyncIterator[bytes]:
        """The request's whole body; its bytes stay counted until the block is left. Raises ``ApiError``."""
        declared = request.content_length
        if declared is not None and declared > limit_bytes:
            raise too_large(limit_bytes)
        taken = declared or 0
        large = (limit_bytes if declared is None else declared) > JSON_BYTES_MAX
        seconds = BODY_READ_SECONDS + (taken or limit_bytes) / BODY_BYTES_PER_SECOND_MIN
        self._take(owner, taken, large)
        try:
            parts: list[bytes] = []
            size = 0
            try:
                async with asyncio.timeout(seconds):
                    while part := await request.content.readany():
                        size += len(part)
                        if size > limit_bytes:
                            raise too_large(limit_bytes)
                        if size > taken:
                            self._take(owner, size - taken, large)
                            taken = size
                        parts.append(part)
            except TimeoutError:
                raise ApiError(
                    408, "body_timeout", f"The request's body was not complete after {seconds:.0f} s."
                ) from None
            parts[:] = [b"".join(parts)]
            yield parts.pop()  # what is held here would be in memory until the answer, wanted or not
        finally:
            self._give(owner, taken)

    def _take(self, owner: str, count: int, large: bool) -> None:
        total_bytes = self.total_bytes * LARGE_PERCENT // 100 if large else self.total_bytes
        if self._held.get(owner, 0) + count > self.owner_bytes or self.held_bytes + count > total_bytes:
            raise ApiError(
                429,
                "too_many_bytes_in_flight",
                f"Requests that are being answered hold too many bytes already (limit {self.owner_bytes} "
                f"bytes for a tenant, {total_bytes} in all); send fewer at one time.",
                kind="requests",
                retry_ms=RETRY_MS_DEFAULT,
                should_retry=True,
            )
        self._held[owner] = self._held.get(owner, 0) + count

    def _give(self, owner: str, count: int) -> None:
        left = self._held.get(owner, 0) - count
        if left > 0:
            self._held[owner] = left
        else:
            self._held.pop(owner, None)
