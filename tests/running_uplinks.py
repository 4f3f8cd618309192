"""An agent reduced to its line to control and its listener for it, in the test's loop, over real TLS.

Covers: joining, beating with a report of the test's choice, plans and records as they arrive, and an
application that control's router reaches over mutual TLS. Does not cover: models, workers or a journal
(``real_box``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiohttp import web
from running_control import PATIENCE_S, Running, empty_report, model_report

from agent.control_listener import ControlListener
from agent.uplink import Uplink
from packer.identity import BadIdentity, Identity
from packer.questions import Question, Reply
from packer.usage import NO_USAGE, UsageBatch
from packer.wire import NO_PLAN, ModelReport, Plan, PlanNumber, Record, Report

GATEWAY = "http://127.0.0.1:9"


@dataclass(slots=True)
class OwnersUsage:
    """A journal's spool of usage, reduced to its batch."""

    unconfirmed: UsageBatch = NO_USAGE
    confirmed: asyncio.Event = field(default_factory=asyncio.Event)

    async def batch(self) -> UsageBatch:
        return self.unconfirmed

    async def acknowledge(self, seq: int) -> None:
        if seq >= self.unconfirmed.seq:
            self.unconfirmed = NO_USAGE
            self.confirmed.set()


@dataclass(slots=True)
class Owner:
    """A node reduced to what the uplink asks of it."""

    plan: Plan | None = None
    records: list[Record] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    models: tuple[ModelReport, ...] = ()
    route_url: str = ""
    control_ms: int = 0
    usage: OwnersUsage = field(default_factory=OwnersUsage)
    let_in: Callable[[Mapping[str, str]], None] = lambda routers: None

    def report(self) -> Report:
        return empty_report(GATEWAY, self.models, route_url=self.route_url)

    spool_id: str = "a spool"

    def have_plan(self) -> PlanNumber:
        return self.plan.number if self.plan else NO_PLAN

    async def accept_plan(self, plan: Plan) -> None:
        if plan.number <= self.have_plan():
            return  # two beats are under way at a time, and a change answers both
        self.plan = plan
        self.let_in({router.node: router.key_sha256 for router in plan.routers})
        self.news.set()

    async def spooled(self, limit: int) -> tuple[Record, ...]:
        return tuple(self.records[:limit])

    async def acknowledge(self, acked_seq: int) -> None:
        self.records = [record for record in self.records if record.seq > acked_seq]
        self.news.set()

    def heard_clock(self, control_ms: int) -> None:
        self.control_ms = control_ms

    async def reply(self, question: Question) -> Reply:
        return Reply(question.question)

    async def until_versions(self, count: int) -> Plan:
        async with asyncio.timeout(PATIENCE_S):
            while self.plan is None or len(self.plan.models) != count:
                self.news.clear()
                await self.news.wait()
        return self.plan


async def token_file(control: Running, folder: Path, name: str = "box") -> Path:
    answer = await control.call("POST", "/api/v1/nodes/tokens", {"name": name})
    path = folder / "join.token"
    path.write_text(answer.json()["token"])
    return path


def make_uplink(
    control: Running, folder: Path, owner: Owner, token: Path | None, name: str = "box"
) -> Uplink:
    return Uplink(owner, Identity(folder / "identity"), control.bound.node_url, name, token)


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end; what it died of before is raised, but for what needs a person."""
    task.cancel()
    with suppress(asyncio.CancelledError, BadIdentity):
        await task


@asynccontextmanager
async def beating(uplink: Uplink) -> AsyncIterator[asyncio.Task[None]]:
    """The uplink runs, until the block is left or it ends by itself."""
    task = asyncio.create_task(uplink.run(GATEWAY))
    try:
        yield task
    finally:
        await ended(task)


Handle = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


@dataclass(slots=True)
class Agent:
    """A joined node whose gateway is one handler."""

    name: str
    owner: Owner
    uplink: Uplink
    identity: Identity
    listener: ControlListener
    task: asyncio.Task[None]


@asynccontextmanager
async def joined_agent(
    control: Running, folder: Path, handle: Handle, name: str = "box"
) -> AsyncIterator[Agent]:
    """Join, report the control listener, serve ``handle`` there until the block is left."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = Owner()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    uplink = make_uplink(control, folder, owner, await token_file(control, folder, name), name)
    owner.let_in = uplink._identity.let_in
    listener = ControlListener(uplink._identity, ("127.0.0.1", 0), None)
    listener.guard(app)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await listener.start(runner)
    owner.route_url = listener.url
    try:
        async with beating(uplink) as task:
            async with asyncio.timeout(PATIENCE_S):
                while owner.plan is None:
                    owner.news.clear()
                    await owner.news.wait()
            yield Agent(name, owner, uplink, uplink._identity, listener, task)
    finally:
        listener.close()
        await runner.cleanup()


def resident(ref: str) -> ModelReport:
    """A model that answers at once."""
    return replace(model_report(ref, "resident"), device_bytes=1)
