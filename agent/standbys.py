"""Workers kept ready per device, for whichever tenant comes next.

Covers: how many there are, replacing one that was taken or died, and waiting longer before each next try
while they die at once. Does not cover: forking a process (``spawning``), or what a worker does.

A standby is bound once and for life, and holds nothing of anybody before. One that dies idle is replaced at
once; where standbys die again and again (a device that is broken, memory that is short) the pauses double,
so that a loop of crashes costs a fork every few minutes and no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from agent.asking import WorkerDead
from agent.devices import DeviceConfig

log = logging.getLogger("bunk.workers")

# Who lived so long did not die of its start.
STEADY_S = 60.0
# The pause after the second early death in a row; it doubles with each further one.
PAUSE_S = 1.0
PAUSE_MAX_S = 300.0


class Standby(Protocol):
    died: asyncio.Event
    on_death: Callable[[], None]

    @property
    def pid(self) -> int: ...
    async def close(self) -> None: ...


S = TypeVar("S", bound=Standby)


@dataclass(slots=True)
class _Ready(Generic[S]):
    """The standbys of one device. ``ends``: how many in a row died early or could not be forked."""

    workers: list[S] = field(default_factory=list)
    refilling: asyncio.Task[None] | None = None
    pausing: asyncio.TimerHandle | None = None
    ends: int = 0


class Standbys(Generic[S]):
    """``fork`` makes one and raises ``WorkerDead``; ``count``: how many are kept ready per device."""

    def __init__(
        self,
        fork: Callable[[DeviceConfig], Awaitable[S]],
        count: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fork = fork
        self._count = count
        self._now_s = now_s
        self._by_device: dict[str, _Ready[S]] = {}
        self._stopped = False

    def keep(self, device: DeviceConfig) -> None:
        """See to it that the standbys of a device are there, soon. None are for places of several: nobody
        knows which devices the next gang gets."""
        if device.count > 1 or self._stopped:
            return
        ready = self._by_device.setdefault(device.device, _Ready())
        if len(ready.workers) < self._count and ready.refilling is None and ready.pausing is None:
            ready.refilling = asyncio.create_task(self._refill(device, ready))

    def take(self, device: str) -> S | None:
        """The next one, which is whoever takes it from now on."""
        ready = self._by_device.get(device)
        if ready is None or not ready.workers:
            return None
        worker = ready.workers.pop()
        worker.on_death = _nothing
        return worker

    def pids(self, device: str) -> list[int]:
        ready = self._by_device.get(device)
        return [worker.pid for worker in ready.workers] if ready is not None else []

    def taken(self, device: str) -> None:
        """A standby became a worker: whatever ended those before it is over."""
        if (ready := self._by_device.get(device)) is not None:
            ready.ends = 0

    async def refilled(self, device: str) -> None:
        """Returns when the standbys of a device are there, or could not be forked."""
        ready = self._by_device.get(device)
        while ready is not None and ready.refilling is not None:
            await asyncio.wait([ready.refilling])

    def stop(self) -> None:
        """None is made any more: there is nothing that could fork."""
        self._stopped = True
        for ready in self._by_device.values():
            if ready.pausing is not None:
                ready.pausing.cancel()

    async def close(self) -> None:
        self.stop()
        refills = [ready.refilling for ready in self._by_device.values() if ready.refilling is not None]
        for refill in refills:
            refill.cancel()
        await asyncio.gather(*refills, return_exceptions=True)
        for ready in self._by_device.values():
            for worker in list(ready.workers):
                await worker.close()
        self._by_device.clear()

    async def _refill(self, device: DeviceConfig, ready: _Ready[S]) -> None:
        failed = False
        try:
            while len(ready.workers) < self._count and not failed:
                failed = not await self._add(device, ready)
        finally:
            ready.refilling = None
        if failed:
            self._ended(device, ready)

    async def _add(self, device: DeviceConfig, ready: _Ready[S]) -> bool:
        try:
            worker = await self._fork(device)
        except WorkerDead as error:
            log.warning("%s", error)  # the next tenant's worker is forked when it is needed
            return False
        born_s = self._now_s()
        if worker.died.is_set():
            return False
        ready.workers.append(worker)
        worker.on_death = lambda: self._died(device, ready, worker, born_s)
        return True

    def _died(self, device: DeviceConfig, ready: _Ready[S], worker: S, born_s: float) -> None:
        if worker not in ready.workers:
            return
        ready.workers.remove(worker)
        if self._now_s() - born_s >= STEADY_S:
            ready.ends = 0
        self._ended(device, ready)

    def _ended(self, device: DeviceConfig, ready: _Ready[S]) -> None:
        """One died early, or could not be forked: another at once, and after a pause from the second on."""
        if self._stopped:
            return
        ready.ends += 1
        if ready.ends == 1:
            self.keep(device)
        elif ready.pausing is None:
            pause_s = min(PAUSE_S * 2 ** min(ready.ends - 2, 16), PAUSE_MAX_S)
            log.warning("standbys of %s die; the next one in %g s", device.device, pause_s)
            ready.pausing = asyncio.get_running_loop().call_later(pause_s, self._again, device, ready)

    def _again(self, device: DeviceConfig, ready: _Ready[S]) -> None:
        ready.pausing = None
        self.keep(device)


def _nothing() -> None:
    """Whoever has taken a standby looks after its death."""
