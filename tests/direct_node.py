"""A node that tenants' programs may call directly: a real gateway that goes by a real control's plans.

Covers: joining, taking plans and control's clock as an agent does, and reporting the model as resident.
Does not cover: the agent itself (``agent/node.py``); the engine is ``fake_node``'s.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fake_node import FakeNode, served
from running_control import FakeNode as Wire
from running_control import Running, empty_report, model_report

from agent.credentials import Credentials


@dataclass(slots=True)
class Clocks:
    """A node's wall clock and its steady one, moved by the test."""

    wall: int = 1_700_000_000_000
    steady: int = 5_000

    def wall_ms(self) -> int:
        return self.wall

    def steady_ms(self) -> int:
        return self.steady


@dataclass(slots=True)
class DirectNode:
    gateway: FakeNode
    wire: Wire
    url: str
    folder: Path
    clocks: Clocks = field(default_factory=Clocks)

    async def learn(self) -> None:
        """Beat until control knows that this node has the newest plan."""
        credentials = self.gateway.credentials
        assert credentials is not None
        for _ in range(2):
            refs = [str(ref) for ref in self.gateway.models]
            report = empty_report(self.url, tuple(model_report(ref, "resident") for ref in refs))
            answer = await self.wire.beat(self.folder, report=report)
            credentials.heard(answer.now_ms)
            if (plan := answer.plan) is not None:
                credentials.planned(plan.cluster, plan.node, plan.keys, plan.ticket_keys)
                self.gateway.models = {spec.ref: spec for spec in plan.models}
        report = empty_report(
            self.url, tuple(model_report(str(ref), "resident") for ref in self.gateway.models)
        )
        await self.wire.beat(self.folder, report=report)


@asynccontextmanager
async def direct_node(control: Running, folder: Path, name: str) -> AsyncIterator[DirectNode]:
    clocks = Clocks()
    gateway = FakeNode(credentials=Credentials(clocks.wall_ms, clocks.steady_ms))
    gateway.models.clear()
    async with served(gateway) as url:
        wire = await control.join(name, url)
        made = DirectNode(gateway, wire, url, folder, clocks)
        await made.learn()
        yield made
