"""How long a change takes from control to its nodes: a key is made, and every node has the plan with it.

Covers: a control server and agents' real lines to it in one process, over TLS on loopback; the time from the
operator's request, which control makes durable first, until each node has the new plan in hand. Does not
cover: what a node does with it, and nodes by the thousand (``bench_control.py``).

``python scripts/plan_delay.py [--nodes N] [--changes N]`` prints percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from agent.uplink import Uplink
from control.config import Config
from control.server import Server
from packer.identity import Identity
from packer.questions import Question, Reply
from packer.usage import NO_USAGE, UsageBatch
from packer.wire import NO_PLAN, Plan, PlanNumber, Record, Report

# Nothing here takes longer unless something hangs.
PATIENCE_S = 60.0
# Control and its nodes share one process and its descriptors; more changes than that are a soak.
NODES_MAX, CHANGES_MAX = 256, 10_000


@dataclass(slots=True)
class Delays:
    """Milliseconds from the request for a change to its plan: at each node, and at the last, per change."""

    nodes: int
    each_ms: list[float] = field(default_factory=list)
    last_ms: list[float] = field(default_factory=list)


class _NoUsage:
    """Nobody asks these nodes for anything."""

    async def batch(self) -> UsageBatch:
        return NO_USAGE

    async def acknowledge(self, seq: int) -> None:
        pass


@dataclass(slots=True)
class _Node:
    """What the uplink asks of a node, and when it had which plan."""

    plan: Plan | None = None
    taken_s: dict[int, float] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    spool_id: str = "none"
    usage: _NoUsage = field(default_factory=_NoUsage)

    def report(self) -> Report:
        return Report("http://127.0.0.1:9", 0, False, (), 0, 0, 0, 0, (), ())

    def have_plan(self) -> PlanNumber:
        return self.plan.number if self.plan else NO_PLAN

    async def accept_plan(self, plan: Plan) -> None:
        self.plan = plan
        self.taken_s[plan.seq] = time.perf_counter()
        self.news.set()

    async def spooled(self, limit: int) -> tuple[Record, ...]:
        return ()

    async def acknowledge(self, acked_seq: int) -> None:
        pass

    def heard_clock(self, control_ms: int) -> None:
        pass

    async def reply(self, question: Question) -> Reply:
        return Reply(question.question)

    async def until(self, seq: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.plan is None or self.plan.seq < seq:
                self.news.clear()
                await self.news.wait()


async def measure(nodes: int, changes: int) -> Delays:
    """Make changes one after another, each when all nodes wait for the next plan."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Config(Path(folder) / "control"))
        bound = await server.start()
        key = (Path(folder) / "control" / "operator.key").read_text().strip()
        session = aiohttp.ClientSession(bound.url, headers={"Authorization": f"Bearer {key}"})
        made, tasks = [], []
        try:
            for number in range(nodes):
                node = _Node()
                uplink = await _uplink(session, bound.node_url, folder, number, node)
                tasks.append(asyncio.create_task(uplink.run("http://127.0.0.1:9")))
                made.append(node)
            await session.post("/api/v1/tenants", json={"name": "t"})
            return await _changes(server, session, made, changes)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await session.close()
            await server.stop()


async def _uplink(session: aiohttp.ClientSession, url: str, folder: str, number: int, node: _Node) -> Uplink:
    name = f"n{number}"
    async with session.post("/api/v1/nodes/tokens", json={"name": name}) as answer:
        token = (await answer.json())["token"]
    path = Path(folder) / f"{name}.token"
    path.write_text(token)
    return Uplink(node, Identity(Path(folder) / name), url, name, path)


async def _changes(
    server: Server, session: aiohttp.ClientSession, nodes: list[_Node], changes: int
) -> Delays:
    delays = Delays(len(nodes))
    for _ in range(changes):
        seq = server.control.meta.seq
        for node in nodes:
            await node.until(seq)
        async with asyncio.timeout(PATIENCE_S):
            # Nothing says that a poll is held open; a moment more or less is not measured.
            while not all(view.waits for view in server.control.cluster.nodes.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        begun_s = time.perf_counter()
        async with session.post("/api/v1/tenants/t/keys", json={}) as answer:
            answer.raise_for_status()
        seq = server.control.meta.seq
        for node in nodes:
            await node.until(seq)
        taken_s = [node.taken_s[seq] for node in nodes]
        delays.each_ms += [(at_s - begun_s) * 1000 for at_s in taken_s]
        delays.last_ms.append((max(taken_s) - begun_s) * 1000)
    return delays


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4, metavar="N")
    parser.add_argument("--changes", type=int, default=50, metavar="N")
    given = parser.parse_args()
    nodes, changes = given.nodes, given.changes
    for name, value, bound in (("--nodes", nodes, NODES_MAX), ("--changes", changes, CHANGES_MAX)):
        if not 1 <= value <= bound:
            parser.error(f"{name} {value}: use 1 to {bound}")
    logging.disable(logging.WARNING)
    with suppress(KeyboardInterrupt):
        delays = asyncio.run(measure(nodes, changes))
        for what, values in (("at each", delays.each_ms), ("at the last", delays.last_ms)):
            p50, p99, most = (percentile(values, share) for share in (0.5, 0.99, 1.0))
            print(f"{nodes} nodes, {changes} changes, {what}: p50 {p50:.1f} p99 {p99:.1f} max {most:.1f} ms")


if __name__ == "__main__":
    main()
