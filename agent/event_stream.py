"""Server-sent events: writing them to one caller, and knowing when there is nothing to write.

Covers: the answer's head, data and comment lines, a caller that stops reading, and running a slow source
beside the wait for it. Does not cover: what the events say (``openai_shapes``) or leases (``gateway``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web

T = TypeVar("T")

# Frames waiting for a slow caller; above it the engine waits, so that a stalled caller costs no memory.
FRAMES_PENDING_MAX = 64
# A caller that takes no bytes for this long is gone or hostile; it must not hold a lease.
STALL_SECONDS = 60.0


class _Silence:
    """One timer for all of a stream: a frame only writes down when it came. ``wake`` is called whenever
    nothing came for so long."""

    __slots__ = ("_handle", "_heard_s", "_loop", "_seconds", "_wake")

    def __init__(self, seconds: float, wake: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._wake = wake
        self._heard_s = self._loop.time()
        self._handle = self._loop.call_later(seconds, self._look)

    def heard(self) -> None:
        self._heard_s = self._loop.time()

    def end(self) -> None:
        self._handle.cancel()

    def _look(self) -> None:
        left_s = self._heard_s + self._seconds - self._loop.time()
        if left_s <= 0:
            self._wake()
            self._heard_s, left_s = self._loop.time(), self._seconds
        self._handle = self._loop.call_later(left_s, self._look)


class EventStream:
    """One answer of server-sent events. Its head is sent with the first event, not before, so that an
    error that comes first is still a plain error with its own status. ``close`` it, however it ends."""

    def __init__(self, request: web.Request, stall_seconds: float = STALL_SECONDS) -> None:
        self._request = request
        self._stall_seconds = stall_seconds
        self._response: web.StreamResponse | None = None
        self._writing = self._stalled = False
        self._watch: _Silence | None = None

    @property
    def begun(self) -> bool:
        return self._response is not None

    async def data(self, payload: bytes) -> None:
        await self._write(b"data: " + payload + b"\n\n")

    async def comment(self, text: str) -> None:
        """A line that clients ignore and that keeps proxies from giving up."""
        await self._write(b": " + text.encode() + b"\n\n")

    async def end(self) -> web.StreamResponse:
        response = await self._begin()
        self._sending()
        try:
            await response.write_eof()  # once everything before it is taken
        finally:
            self._sent()
        return response

    def close(self) -> None:
        if self._watch is not None:
            self._watch.end()

    async def _begin(self) -> web.StreamResponse:
        if self._response is None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            self._response = web.StreamResponse(headers=headers)
            self._response.content_type = "text/event-stream"
            self._response.charset = "utf-8"
            await self._response.prepare(self._request)
        return self._response

    async def _write(self, line: bytes) -> None:
        response = await self._begin()
        self._sending()
        try:
            await response.write(line)
        finally:
            self._sent()

    def _sending(self) -> None:
        if self._watch is None:
            self._watch = _Silence(self._stall_seconds, self._look)
        self._watch.heard()
        self._writing = True

    def _sent(self) -> None:
        self._writing = False
        if self._stalled:
            raise ConnectionResetError(f"the caller took nothing for {self._stall_seconds:g} s") from None

    def _look(self) -> None:
        """No line was begun for so long: the caller is gone or hostile if one is on its way since then."""
        if self._writing:
            self._stalled = True
            if self._request.transport is not None:
                self._request.transport.abort()


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None


async def with_silences(
    source: AsyncGenerator[T, None], silence_seconds: float
) -> AsyncGenerator[T | None, None]:
    """The source's items, and None whenever it has said nothing for ``silence_seconds``.

    The source runs in one task from its first line to its last, so that what it holds (a lease) is
    entered and left in the same task; leaving this iterator cancels it and waits for its end.
    """
    queue: asyncio.Queue[T | _End | None] = asyncio.Queue(FRAMES_PENDING_MAX)

    async def fill() -> None:
        error: Exception | None = None
        try:
            async with aclosing(source):
                async for item in source:
                    await queue.put(item)
        except Exception as caught:
            error = caught
        await queue.put(_End(error))

    def wake() -> None:
        if queue.empty():  # else there is something to say
            queue.put_nowait(None)

    task = asyncio.create_task(fill())
    silence = _Silence(silence_seconds, wake)
    try:
        while True:
            item = await queue.get()
            silence.heard()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        silence.end()
        task.cancel()
        await asyncio.wait([task])
