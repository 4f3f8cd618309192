"""A network between simulated nodes and a simulated control server, and the processes at its ends.

Covers: carrying encoded messages with delays, losses, repeats and partitions, cutting them short, and
passing off messages of another release; and processes, which can be killed at any moment with all that
runs in them. Does not cover: what the messages mean (the real uplink and the real routes decide that).

A request and its answer are lost on their own: an answer that is lost leaves a request that was served.
A caller that has given up does not end what it asked for, as with the real server.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp
from simulated_hands import GRID_MS

from packer.wire import Beat, BeatAnswer, decode, encode

# What another release might send: numbers that mean something else there.
FOREIGN_VERSION = 2
FOREIGN_NUMBER = 1 << 50

Answered = tuple[int, bytes]


class Process:
    """One life of a process: its tasks end with it, and nothing that it had begun goes on."""

    current: ContextVar[Process | None] = ContextVar("process", default=None)

    def __init__(self, name: str, broken: Callable[[BaseException], None]) -> None:
        self.name = name
        self.dead = False
        self._broken = broken
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run in this process; what fails in an unforeseen way breaks the simulation."""
        context = copy_context()
        context.run(Process.current.set, self)
        task = asyncio.get_running_loop().create_task(self._watched(work), context=context)
        task.add_done_callback(lambda _: work.close())  # it may be killed before it has begun
        return task

    async def _watched(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except Exception as error:
            self._broken(error)

    def took(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(lambda ended: self._tasks.pop(ended, None))

    def kill(self) -> None:
        self.dead = True
        for task in list(self._tasks):
            task.cancel()


def task_factory(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **more: Any
) -> asyncio.Task[Any]:
    """Tasks belong to the process in whose context they were made."""
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **more)
    context = more.get("context")
    process = context.get(Process.current) if context is not None else Process.current.get()
    if process is not None:
        process.took(task)
    return task


def of_the_living() -> None:
    """What a killed process still does while its tasks unwind must not be seen by anybody."""
    process = Process.current.get()
    if process is not None and process.dead:
        raise asyncio.CancelledError


@dataclass(slots=True)
class NetworkFaults:
    """Chances per message or per look, drawn per seed."""

    delay_steps: int
    lose: float
    repeat: float
    cut_short: float
    foreign: float
    part: float


class Network:
    """``serve`` is the control server's: (node, path, body, how to answer)."""

    def __init__(self, rng: Random, faults: NetworkFaults, note: Callable[[str], None]) -> None:
        self._rng = rng
        self.faults = faults
        self._note = note
        self.calm = False
        self.parted: dict[str, bool] = {}  # nodes that control can not reach, nor they control
        self.peers_parted: dict[tuple[str, str], bool] = {}
        self.serve: Callable[[str, str, bytes, Callable[[Answered | None], None]], bool] | None = None
        self.reached: dict[str, int] = {}

    def chance(self, share: float) -> bool:
        return not self.calm and self._rng.random() < share

    def delay_s(self) -> float:
        steps = 1 if self.calm else self.faults.delay_steps
        return self._rng.randrange(steps + 1) * GRID_MS / 1000

    def count(self, what: str) -> None:
        self.reached[what] = self.reached.get(what, 0) + 1

    async def to_control(self, node: str, path: str, message: object, timeout_s: float) -> Answered:
        """As ``aiohttp`` would: the answer, ``ClientError`` or ``TimeoutError``."""
        of_the_living()
        loop = asyncio.get_running_loop()
        data = self._request(message)
        answer: asyncio.Future[Answered] = loop.create_future()
        copies = 2 if self.chance(self.faults.repeat) else 1
        if copies == 2:
            self.count("a request came twice")
        for _ in range(copies):
            if self.chance(self.faults.lose):
                self.count("a request was lost")
                continue
            loop.call_later(self.delay_s(), self._arrive, node, path, data, answer)
        async with asyncio.timeout(timeout_s):
            return await answer

    def _request(self, message: object) -> bytes:
        data = encode(message)
        if isinstance(message, Beat) and self.chance(self.faults.foreign):
            self.count("a beat of another release")
            ahead = Beat(FOREIGN_VERSION, message.node, FOREIGN_NUMBER, 0, 0, message.report)
            return encode(ahead)
        return data

    def _arrive(self, node: str, path: str, data: bytes, answer: asyncio.Future[Answered]) -> None:
        self._note(f"{node} {path} {hashlib.sha256(data).hexdigest()}")
        if self.parted.get(node, False):
            self.count("a request met a partition")
            if self.chance(0.5):
                self._refuse(answer)
            return
        assert self.serve is not None
        if not self.serve(node, path, data, lambda said: self._answer(node, path, said, answer)):
            self.count("nobody listens")
            self._refuse(answer)

    def _answer(self, node: str, path: str, said: Answered | None, answer: asyncio.Future[Answered]) -> None:
        """``said`` None: the server broke off."""
        if self.parted.get(node, False) or self.chance(self.faults.lose):
            self.count("an answer was lost")
            return
        if said is None:
            self._refuse(answer)
            return
        status, body = said
        if self.chance(self.faults.cut_short):
            self.count("an answer was cut short")
            body = body[: len(body) // 2]
        elif path.endswith("/beat") and status == 200 and self.chance(self.faults.foreign):
            self.count("an answer of another release")
            decode(body, BeatAnswer)
            body = encode(BeatAnswer(FOREIGN_VERSION, None, FOREIGN_NUMBER))
        self._note(f"{node} <- {path} {status} {hashlib.sha256(body).hexdigest()}")
        asyncio.get_running_loop().call_later(self.delay_s(), _settle, answer, (status, body))

    def _refuse(self, answer: asyncio.Future[Answered]) -> None:
        asyncio.get_running_loop().call_later(self.delay_s(), _break_off, answer)

    # --- other roads ------------------------------------------------------------------------------

    async def to_node(self, node: str) -> bool:
        """A router's call on its way; false when the node can not be reached."""
        await asyncio.sleep(self.delay_s())
        return not self.parted.get(node, False) and not self.chance(self.faults.lose)

    def peers_apart(self, one: str, other: str) -> bool:
        return self.peers_parted.get((min(one, other), max(one, other)), False)

    # --- partitions -------------------------------------------------------------------------------

    def look(self, nodes: list[str]) -> None:
        """Now and then a road opens or closes."""
        for node in nodes:
            if self.chance(self.faults.part):
                self.parted[node] = not self.parted.get(node, False)
                self.count("parted" if self.parted[node] else "met again")
        for one in nodes:
            for other in nodes:
                if one < other and self.chance(self.faults.part):
                    self.peers_parted[(one, other)] = not self.peers_parted.get((one, other), False)

    def heal(self) -> None:
        self.calm = True
        self.parted.clear()
        self.peers_parted.clear()


def _settle(answer: asyncio.Future[Answered], said: Answered) -> None:
    if not answer.done():
        answer.set_result(said)


def _break_off(answer: asyncio.Future[Answered]) -> None:
    if not answer.done():
        answer.set_exception(aiohttp.ServerDisconnectedError())
