"""Workers kept ready: replaced when they are taken or die, at once first and after longer pauses then.

Covers: ``agent/standbys.py`` with workers that are no processes. Does not cover: real ones (``test_worker``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from agent.asking import WorkerDead
from agent.devices import DeviceConfig
from agent.standbys import PAUSE_MAX_S, PAUSE_S, STEADY_S, Standbys
from packer.types import GIB

DEVICE = DeviceConfig("cpu:0", "cpu", "cpu", GIB)


class Idle:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.died = asyncio.Event()
        self.on_death: Callable[[], None] = lambda: None

    def die(self) -> None:
        self.died.set()
        self.on_death()

    async def close(self) -> None:
        self.died.set()


class World:
    """Forks that are counted, a clock that is moved, and pauses that end when a test says so."""

    def __init__(self, count: int = 1) -> None:
        self.now_s = 0.0
        self.born: list[Idle] = []
        self.broken = False
        self.pauses: list[tuple[float, Callable[[], None], mock.Mock]] = []
        self.standbys: Standbys[Idle] = Standbys(self.fork, count, lambda: self.now_s)

    async def fork(self, device: DeviceConfig) -> Idle:
        if self.broken:
            raise WorkerDead("no fork today")
        self.born.append(Idle(len(self.born) + 1))
        return self.born[-1]

    async def ready(self) -> list[int]:
        await self.standbys.refilled(DEVICE.device)
        return self.standbys.pids(DEVICE.device)

    def call_later(self, delay_s: float, call: Callable[..., None], *args: Any) -> mock.Mock:
        handle = mock.Mock()
        self.pauses.append((delay_s, lambda: call(*args), handle))
        return handle

    def pausing(self) -> Any:
        return mock.patch.object(asyncio.get_running_loop(), "call_later", self.call_later)


async def test_one_that_dies_idle_is_replaced_at_once() -> None:
    world = World()
    world.standbys.keep(DEVICE)
    assert await world.ready() == [1]
    world.born[0].die()
    assert await world.ready() == [2], "nobody had to ask for a worker"
    for at in range(1, 5):
        world.now_s += STEADY_S
        world.born[at].die()
        assert await world.ready() == [at + 2], "who lived long died of something else"


async def test_those_that_die_at_once_are_replaced_more_and_more_seldom() -> None:
    world = World()
    with world.pausing():
        world.standbys.keep(DEVICE)
        await world.ready()
        world.born[0].die()
        for at in range(1, 14):
            await world.ready()
            world.born[at].die()
            assert await world.ready() == []
            world.standbys.keep(DEVICE)  # as every spawn does
            assert await world.ready() == [], "a pause is a pause"
            pause_s, end, _ = world.pauses[-1]
            assert pause_s == min(PAUSE_S * 2 ** (at - 1), PAUSE_MAX_S)
            end()
        assert len(world.pauses) == 13
        assert await world.ready() == [15]
        # One that became a worker ends the series.
        assert world.standbys.take(DEVICE.device) is world.born[14]
        world.standbys.taken(DEVICE.device)
        world.standbys.keep(DEVICE)
        await world.ready()
        world.born[15].die()
        assert await world.ready() == [17]


async def test_forks_that_fail_are_tried_again_after_pauses() -> None:
    world = World(count=2)
    world.broken = True
    with world.pausing():
        world.standbys.keep(DEVICE)
        assert await world.ready() == []
        world.broken = False
        (pause,) = world.pauses
        assert pause[0] == PAUSE_S
        pause[1]()
        assert await world.ready() == [1, 2]


async def test_who_was_taken_is_no_standby_and_its_death_is_not_theirs() -> None:
    world = World()
    world.standbys.keep(DEVICE)
    await world.ready()
    taken = world.standbys.take(DEVICE.device)
    assert taken is world.born[0]
    taken.die()
    assert await world.ready() == []
    assert len(world.born) == 1


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_after_the_end_none_is_made(how: str) -> None:
    world = World()
    with world.pausing():
        world.broken = True
        world.standbys.keep(DEVICE)
        await world.ready()
        if how == "stop":
            world.standbys.stop()
        else:
            await world.standbys.close()
        (pause,) = world.pauses
        pause[2].cancel.assert_called_once()
        world.broken = False
        world.standbys.keep(DEVICE)
        assert await world.ready() == []
