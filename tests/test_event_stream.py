"""A stream that says when it is silent, on a clock that jumps: one timer for all of it.

Covers: ``with_silences``. Does not cover: the events themselves or callers (``test_gateway_streams``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any
from unittest import mock

import pytest
from virtual_clock import VirtualLoop
from virtual_clock import run_virtual as run

from agent.event_stream import with_silences

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
