"""A stream that says when it is silent, on a clock that jumps: one timer for all of it.

Covers: ``with_silences``, and a caller that takes nothing. Does not cover: the events themselves, or callers
over sockets (``test_gateway_streams``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, closing
from typing import Any, cast
from unittest import mock

import pytest
from virtual_clock import VirtualLoop
from virtual_clock import run_virtual as run

from agent.event_stream import EventStream, with_silences

SILENCE_S = 5.0


async def spoken(*pauses_s: float) -> AsyncGenerator[float, None]:
    for pause_s in pauses_s:
        await asyncio.sleep(pause_s)
        yield pause_s


async def heard(source: AsyncGenerator[float, None]) -> list[tuple[float, float | None]]:
    loop, found = asyncio.get_running_loop(), []
    async with aclosing(with_silences(source, SILENCE_S)) as items:
        async for item in items:
            found.append((loop.time(), item))
    return found


def test_whoever_is_silent_is_heard_so_every_few_seconds() -> None:
    assert run(heard(spoken(1, 12, 4, 4, 6))) == [
        (1, 1),
        (6, None),
        (11, None),
        (13, 12),
        (17, 4),
        (21, 4),
        (26, None),
        (27, 6),
    ]


def test_a_silence_is_told_once_to_whoever_is_slow_to_listen() -> None:
    """Who is busy with an item for long finds the next one first, and one silence at the most."""

    async def slow() -> list[float | None]:
        found: list[float | None] = []
        async with aclosing(with_silences(spoken(1, 22), SILENCE_S)) as items:
            async for item in items:
                found.append(item)
                await asyncio.sleep(20 if len(found) == 1 else 0)
        return found

    assert run(slow()) == [1, None, 22]


def test_a_stream_of_many_frames_sets_no_timer_for_each() -> None:
    timers = 0

    async def counted() -> int:
        loop = asyncio.get_running_loop()
        real: Callable[..., asyncio.TimerHandle] = loop.call_at

        def call_at(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            nonlocal timers
            timers += 1
            return real(*args, **kwargs)

        async def frames() -> AsyncGenerator[float, None]:
            for number in range(1000):
                await asyncio.sleep(0)
                yield number

        with mock.patch.object(loop, "call_at", call_at):
            return len(await heard(frames()))

    assert run(counted()) == 1000
    assert timers <= 2


def test_the_timer_ends_with_the_stream_however_it_ends() -> None:
    async def broken() -> AsyncGenerator[float, None]:
        yield 1.0
        raise OSError("lost")

    async def left(loop: VirtualLoop) -> float:
        with pytest.raises(OSError, match="lost"):
            await heard(broken())
        async with aclosing(with_silences(spoken(1, 1), SILENCE_S)) as items:
            await anext(items)
        await asyncio.sleep(0)
        return loop.time()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        assert await left(loop) == 1
        assert not [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]

    run(main())


class Caller:
    """Takes lines, until it does not; then it is hung up on, or there is nothing to take."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.takes = asyncio.Event()
        self.takes.set()
        self.transport = mock.Mock(abort=mock.Mock(side_effect=self.takes.set))

    async def write(self, line: bytes) -> None:
        self.lines.append(line)
        await self.takes.wait()

    async def write_eof(self) -> None:
        await self.write(b"")


def streamed(work: Callable[[EventStream, Caller], Coroutine[Any, Any, None]]) -> Caller:
    async def main() -> Caller:
        caller = Caller()
        with closing(EventStream(cast(Any, caller), SILENCE_S)) as stream:
            stream._response = cast(Any, caller)
            await work(stream, caller)
        loop = cast(Any, asyncio.get_running_loop())
        assert not [timer for timer in loop._scheduled if not timer.cancelled()]
        return caller

    return run(main())


def test_a_caller_that_takes_nothing_is_hung_up_on_and_one_that_waits_is_not() -> None:
    async def work(stream: EventStream, caller: Caller) -> None:
        for _ in range(3):
            await stream.data(b"x")
            await asyncio.sleep(10 * SILENCE_S)
        caller.transport.abort.assert_not_called()
        began_s = asyncio.get_running_loop().time()
        caller.takes.clear()
        with pytest.raises(ConnectionResetError, match="took nothing for 5 s"):
            await stream.data(b"y")
        assert SILENCE_S <= asyncio.get_running_loop().time() - began_s <= 2 * SILENCE_S
        caller.transport.abort.assert_called_once()

    assert len(streamed(work).lines) == 4


def test_a_caller_that_does_not_take_the_end_is_hung_up_on() -> None:
    """Lines up to 64 KiB are only put into the buffer; the end waits until all of it is taken."""

    async def work(stream: EventStream, caller: Caller) -> None:
        await stream.data(b"x")
        await asyncio.sleep(10 * SILENCE_S)
        caller.takes.clear()
        with pytest.raises(ConnectionResetError, match="took nothing for 5 s"):
            await stream.end()
        caller.transport.abort.assert_called_once()

    streamed(work)


def test_many_lines_set_no_timer_each() -> None:
    async def work(stream: EventStream, caller: Caller) -> None:
        loop = asyncio.get_running_loop()
        with mock.patch.object(loop, "call_at", wraps=loop.call_at) as timers:
            for _ in range(1000):
                await stream.data(b"x")
        assert timers.call_count == 1

    streamed(work)
