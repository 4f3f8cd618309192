"""Bodies of requests in memory: how many bytes of them, of whom, and for how long they may arrive.

Covers: reading a body within its limit, counting it until it is answered, and who gives way when there is no
room. Does not cover: what is in a body (``packer/http.py`` decodes JSON), or answers (``packer/crowd.py``).

Of the whole what is in memory counts, not what was announced: who announces much and sends it slowly keeps
nobody from sending. Of one owner's share what was announced counts, so that what it sends at one time can all
arrive. When the whole is full, a body that still arrives, and slowly, is given up for one that comes, the
slowest first. Nobody waits for room, so there is nothing to wait for in a circle.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

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
# When the whole is full, one that comes slower than this gives way. A line of 32 Mbit/s is faster; a slower
# one is cut only while others fill the memory, and may come again.
PRESSED_BYTES_PER_SECOND_MIN = 4 * MIB
# Nobody's pace is known before.
PACE_KNOWN_SECONDS = 1.0


@dataclass(slots=True)
class _Body:
    """One body. ``most_bytes``: of the whole that it may be part of; ``given_up``: for others."""

    owner: str
    most_bytes: int
    limit: asyncio.Timeout | None  # None: nothing of it is waited for
    begun_s: float
    promised_bytes: int = 0
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    given_up: bool = False

    def is_slow(self, now_s: float) -> bool:
        taken_s = now_s - self.begun_s
        return taken_s >= PACE_KNOWN_SECONDS and self.size < taken_s * PRESSED_BYTES_PER_SECOND_MIN


class BodyBudget:
    """Bytes of request bodies held at one time, in all and by one owner (a tenant).

    Without it a thousand connections of one key, each sending one large body slowly, fill the memory.
    """

    def __init__(
        self, total_bytes: int = BODIES_BYTES_MAX, owner_bytes: int = OWNER_BODIES_BYTES_MAX
    ) -> None:
        self.total_bytes = total_bytes
        self.owner_bytes = owner_bytes
        self.held_bytes = 0  # in memory, of all
        self._promised: dict[str, int] = {}  # by owner: announced, or arrived where that is more
        self._arriving: dict[int, _Body] = {}  # by identity, in the order in which they began

    def body(self, request: web.Request, owner: str, limit_bytes: int = JSON_BYTES_MAX) -> HeldBody:
        """The request's whole body, given by ``async with``; its bytes stay counted until the block is left.
        Entering raises ``ApiError``."""
        return HeldBody(self, request, owner, limit_bytes)

    async def take(self, request: web.Request, owner: str, limit_bytes: int) -> tuple[_Body, bytes]:
        """Read and count a body. ``give`` must follow. Raises ``ApiError``."""
        declared = request.content_length
        if declared is not None and declared > limit_bytes:
            raise too_large(limit_bytes)
        large = (limit_bytes if declared is None else declared) > JSON_BYTES_MAX
        most_bytes = self.total_bytes * LARGE_PERCENT // 100 if large else self.total_bytes
        # All of it came with the head, as most do: nothing is waited for.
        whole = request.content.is_eof()
        seconds = BODY_READ_SECONDS + (declared or limit_bytes) / BODY_BYTES_PER_SECOND_MIN
        now_s = asyncio.get_running_loop().time()
        body = _Body(owner, most_bytes, None if whole else asyncio.timeout(seconds), now_s)
        try:
            self._promise(body, declared or 0)
            over = self.held_bytes + (declared or 0) - most_bytes
            if over > 0 and sum(each.size for each in self._slow(now_s)) < over:
                raise self._full(body)
            if body.limit is None:
                whole_body = request.content.read_nowait()
                self._count(body, len(whole_body), limit_bytes)
                return body, whole_body
            await self._arrive(request, body, body.limit, limit_bytes, seconds)
            # What is held here would be in memory until the answer, wanted or not.
            parts, body.parts = body.parts, []
            return body, parts[0] if len(parts) == 1 else b"".join(parts)
        except BaseException:
            self.give(body)
            raise

    async def _arrive(
        self, request: web.Request, body: _Body, limit: asyncio.Timeout, limit_bytes: int, seconds: float
    ) -> None:
        self._arriving[id(body)] = body
        try:
            async with limit:
                await self._read(request, body, limit_bytes)
        except TimeoutError:
            if body.given_up:
                raise self._full(body) from None
            raise ApiError(
                408, "body_timeout", f"The request's body was not complete after {seconds:.0f} s."
            ) from None
        finally:
            del self._arriving[id(body)]

    async def _read(self, request: web.Request, body: _Body, limit_bytes: int) -> None:
        """Raises ``TimeoutError`` also when the body was given up."""
        while part := await request.content.readany():
            if body.given_up:
                break
            self._count(body, len(part), limit_bytes)
            body.parts.append(part)
        if body.given_up:
            raise TimeoutError

    def _count(self, body: _Body, count: int, limit_bytes: int) -> None:
        """So many more bytes of it are here. Raises ``ApiError``."""
        size = body.size + count
        if size > limit_bytes:
            raise too_large(limit_bytes)
        self._promise(body, size)
        self._make_room(body, count)
        body.size = size
        self.held_bytes += count

    def _slow(self, now_s: float) -> list[_Body]:
        return [body for body in self._arriving.values() if body.is_slow(now_s)]

    def _make_room(self, body: _Body, count: int) -> None:
        """Give up slow bodies until ``count`` bytes of ``body`` have room, those that hold most first. When
        it is one of them, or there is none, it is itself refused."""
        while self.held_bytes + count > body.most_bytes:
            now_s = asyncio.get_running_loop().time()
            slow = max(self._slow(now_s), key=lambda each: each.size, default=body)
            if slow is body or not slow.size:
                raise self._full(body)
            slow.given_up = True
            slow.parts.clear()
            self.held_bytes -= slow.size
            slow.size = 0
            if slow.limit is not None:
                slow.limit.reschedule(now_s)

    def _promise(self, body: _Body, count: int) -> None:
        """Count what a body will have at least as its owner's. Raises ``ApiError`` 429."""
        more = count - body.promised_bytes
        promised = self._promised.get(body.owner, 0)
        if more <= 0:
            return
        if promised + more > self.owner_bytes:
            raise self._full(body)
        self._promised[body.owner] = promised + more
        body.promised_bytes = count

    def give(self, body: _Body) -> None:
        """It is of no use any more."""
        self.held_bytes -= body.size
        left = self._promised.get(body.owner, 0) - body.promised_bytes
        if left:
            self._promised[body.owner] = left
        else:
            self._promised.pop(body.owner, None)

    def _full(self, body: _Body) -> ApiError:
        return ApiError(
            429,
            "too_many_bytes_in_flight",
            f"Requests that are being answered hold too many bytes already (limit {self.owner_bytes} "
            f"bytes for a tenant, {body.most_bytes} in all); send fewer at one time.",
            kind="requests",
            retry_ms=RETRY_MS_DEFAULT,
            should_retry=True,
        )


class HeldBody:
    """A request's body for the length of a block. A class and no generator: every request comes by here."""

    __slots__ = ("_asked", "_body", "_budget")

    def __init__(self, budget: BodyBudget, request: web.Request, owner: str, limit_bytes: int) -> None:
        self._budget = budget
        self._asked = (request, owner, limit_bytes)

    async def __aenter__(self) -> bytes:
        self._body, held = await self._budget.take(*self._asked)
        return held

    async def __aexit__(self, *raised: object) -> None:
        self._budget.give(self._body)
