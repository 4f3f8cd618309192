"""What the router's routes act on: control itself, or a router that is a process of its own.

Covers: the catalog and the cluster core as whoever routes knows them, the ways to nodes, waiting for news of
nodes, tasks that outlive their callers, and saying faults. Does not cover: where the news comes from
(``control.state`` hears the nodes themselves, ``control.router_process`` is told by control).
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence

import aiohttp
from aiohttp import web

from control import cluster as fleet
from control.catalog import Catalog
from control.node_tls import NodeLines
from control.router_counters import RouterCounters
from control.store import StoreUnavailable
from packer.body_budget import BodyBudget
from packer.known_keys import KnownKeys

log = logging.getLogger("bunk.control")

TICK_S = 1.0
# The same fault again within this time is counted, not said: requests to a dead node come by the thousand.
FAULT_SAID_EVERY_S = 10.0
# Places are routes and nodes; beyond this all are said anew.
FAULTS_KEPT_MAX = 1_000


class Routing(ABC):
    """Of one process. ``session`` and ``lines`` are there once it has started."""

    session: aiohttp.ClientSession
    lines: NodeLines

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.cluster = fleet.Cluster()
        self.bodies = BodyBudget()
        self.known_keys = KnownKeys()
        self.routed = RouterCounters()
        self.stopping = False
        self._heard = asyncio.Event()
        self._kept: set[asyncio.Task[object]] = set()
        # By place: the fault that was said last, when, and how often it came since.
        self._faults: dict[str, tuple[str, float, int]] = {}

    @abstractmethod
    def act(self, actions: Sequence[fleet.Action]) -> None:
        """Carry out what the cluster core ordered."""

    @abstractmethod
    def check_ready(self) -> None:
        """Raises ``ApiError`` while it is not known who may call."""

    def now_ms(self) -> int:
        """The clock of the cluster core: steady, so that a clock that is set can not silence nodes."""
        return time.monotonic_ns() // 1_000_000

    def wall_ms(self) -> int:
        """For what people read, and for the life of keys and tickets."""
        return wall_ms()

    # --- news of nodes ---

    def wake_waiting(self) -> None:
        """Something was heard of a node."""
        self._heard.set()
        self._heard = asyncio.Event()

    async def until_heard(self, true: Callable[[], bool], wait_s: float) -> bool:
        """Wait until ``true`` holds; it is asked again whenever something is heard of a node."""
        if true():
            return True  # as nearly always: no timer is set
        try:
            async with asyncio.timeout(wait_s):
                while not true():
                    await self._heard.wait()
        except TimeoutError:
            return true()
        return True

    # --- tasks ---

    def keep(self, task: asyncio.Future[web.StreamResponse]) -> None:
        """Let a handler's task run to its end although its caller may leave."""
        if isinstance(task, asyncio.Task):
            self._kept.add(task)
            task.add_done_callback(self._ended)

    async def each_second(self, parts: Mapping[str, Callable[[], Awaitable[None] | None]]) -> None:
        """Do these, in their order, until cancelled. One that fails, even by a mistake of ours, keeps neither
        the others nor its own next time from happening: nobody would notice that time stands still."""
        while True:
            await asyncio.sleep(TICK_S)
            for name, part in parts.items():
                try:
                    if (doing := part()) is not None:
                        await doing
                except (StoreUnavailable, OSError) as error:
                    self.log_fault(name, error)
                except Exception as error:
                    self.log_fault(name, error, unforeseen=True)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._kept.discard(task)
        if not task.cancelled():
            task.exception()  # the caller got it, or has left; it must not be reported as lost

    # --- faults ---

    def log_fault(self, where: str, error: Exception, unforeseen: bool = False) -> None:
        """Say it, but a fault that many requests meet (a node that is gone) only once in a while.
        ``unforeseen``: it is a mistake of ours, whose place in the code is said as well."""
        text, now_s = f"{where}: {error}", time.monotonic()
        said, said_s, more = self._faults.pop(where, ("", 0.0, 0))
        if text == said and now_s - said_s < FAULT_SAID_EVERY_S:
            self._faults[where] = (said, said_s, more + 1)
            return
        before = f" (before that {more} more times: {said})" if more else ""
        log.error("%s%s", text, before, exc_info=error if unforeseen else None)
        if len(self._faults) >= FAULTS_KEPT_MAX:
            self._faults.clear()
        self._faults[where] = (text, now_s, 0)


def wall_ms() -> int:
    """Wall clock, for what people read and for the life of keys and tokens."""
    return time.time_ns() // 1_000_000
