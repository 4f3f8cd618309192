"""A whole node inside a bench: core, journal, nursery and workers as in production, without HTTP and control.

Covers: starting it in a folder with a plan of the bench's making, asking for models and for answers, timing
every step of the core, and counting what its processes hold. Does not cover: what is measured with it
(``restore_swaps``), or the gateway (``bench_cold``).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

from process_memory import children, read_worker

from agent import config
from agent.facade import JSON, EngineRequest
from agent.journal import open_journal
from agent.node import RunningNode
from packer import residency
from packer.estimate import Rates, dump_rates
from packer.events import Action, Event, Evict, Evicted, Restored
from packer.ledger import State
from packer.residency import ModelView
from packer.types import ModelSpec, TenantSpec, Tier
from packer.wire import WIRE_VERSION, Plan

NAME = "bench"
REQUEST_TIMEOUT_MS = 120_000
PATIENCE_S = 120.0
LOOK_S = 0.01


@dataclass(frozen=True, slots=True)
class Taken:
    """One request for a model: from where it came, and how long until it could run."""

    tier: Tier
    wait_ms: float


@dataclass(slots=True)
class StepTimes:
    """How long the core took to decide evictions, how long they took from the order to the end, and what
    workers say that restores took."""

    restore_ms: dict[Tier, list[float]] = field(default_factory=dict)
    decide_ms: list[float] = field(default_factory=list)
    evict_ms: list[float] = field(default_factory=list)
    _ordered_s: dict[int, float] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        real = residency.step

        def step(node: residency.Node, event: Event, now_ms: int) -> list[Action]:
            started_s = time.perf_counter()
            actions = real(node, event, now_ms)
            ended_s = time.perf_counter()
            orders = [action for action in actions if isinstance(action, Evict)]
            if orders:
                self.decide_ms.append((ended_s - started_s) * 1000)
            self._ordered_s |= {order.order: ended_s for order in orders}
            if isinstance(event, Restored):
                self.restore_ms.setdefault(event.from_tier, []).append(event.restore_ms)
            if isinstance(event, Evicted) and event.order in self._ordered_s:
                self.evict_ms.append((started_s - self._ordered_s.pop(event.order)) * 1000)
            return actions

        with patch.object(residency, "step", step):
            yield


@dataclass(frozen=True, slots=True)
class Census:
    """What the agent, its nursery and its workers hold. Of private memory without the images."""

    processes: int
    threads: int
    descriptors: int
    agent_private_bytes: int
    worker_private_bytes: int
    arena_bytes: int
    host_bytes: int
    files: int


class BenchNode:
    """A running node and its models."""

    def __init__(self, node: RunningNode, specs: tuple[ModelSpec, ...]) -> None:
        self.node = node
        self.specs = specs
        self._numbers = itertools.count(1)
        self._seq = itertools.count(1)

    async def plan(self, specs: tuple[ModelSpec, ...]) -> None:
        """These are now all models; tenants stay."""
        tenants = tuple(TenantSpec(name) for name in sorted({spec.ref.tenant for spec in self.specs}))
        plan = Plan(WIRE_VERSION, NAME, NAME, 1, next(self._seq), tenants, (), specs)
        await self.node.accept_plan(plan)

    @asynccontextmanager
    async def taken(self, spec: ModelSpec) -> AsyncIterator[Taken]:
        """Wait for a model and hold it. Raises ``Refused``."""
        started_s = time.perf_counter()
        number = f"bench-{next(self._numbers)}"
        async with self.node.lease(spec, number, REQUEST_TIMEOUT_MS, 0) as lease:
            yield Taken(lease.tier, (time.perf_counter() - started_s) * 1000)

    async def take(self, spec: ModelSpec) -> Taken:
        async with self.taken(spec) as taken:
            return taken

    async def answer(self, spec: ModelSpec, tokens: int = 2) -> str:
        """The model's first tokens: they depend on all of its weights. Raises ``Refused``."""
        number = f"bench-{next(self._numbers)}"
        fields: dict[str, JSON] = {"prompt": "Hello", "max_tokens": tokens, "temperature": 0}
        async with self.node.lease(spec, number, REQUEST_TIMEOUT_MS, 0) as lease:
            frames = [frame async for frame in lease.run(EngineRequest("generate", fields))]
        return "".join(str(frame.header.get("delta", "")) for frame in frames)

    def view(self, spec: ModelSpec) -> ModelView:
        view = residency.model_view(self.node.loop.core, spec.ref)
        assert view is not None, f"the node does not know {spec.ref}"
        return view

    def is_resident(self, spec: ModelSpec) -> bool:
        view = residency.model_view(self.node.loop.core, spec.ref)
        return view is not None and view.state is State.RESIDENT

    async def until_packed(self, spec: ModelSpec) -> None:
        """Wait for the pack that is written beside a load."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.view(spec).packed:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"no pack of {spec.ref} after {PATIENCE_S:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def until_empty(self) -> None:
        """Wait until no tier holds a byte of any model."""
        core = self.node.loop.core
        deadline_s = time.monotonic() + PATIENCE_S
        while held := {tier: residency.tier_bytes_used(core, tier) for tier in Tier}:
            if not any(held.values()):
                return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"after {PATIENCE_S:.0f} s the node still holds {held}")
            await asyncio.sleep(LOOK_S)

    # --- what it holds ---

    def worker_pids(self) -> list[int]:
        return [pid for pids in self.node.orders.roster.pids().values() for pid in pids]

    def written_bytes(self) -> int:
        """What the workers that live now have caused to be written to any disk."""
        total = 0
        for pid in self.worker_pids():
            with suppress(OSError):
                lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
                total += int(lines["write_bytes"])
        return total

    def census(self) -> Census:
        below = [pid for child in children(os.getpid()) for pid in (child, *children(child))]
        family = [os.getpid(), *(pid for pid in below if _is_ours(pid))]
        workers = [read_worker(pid) for pid in self.worker_pids()]
        present = [worker for worker in workers if worker is not None]
        folder = self.node.config.data_dir / "packs"
        return Census(
            processes=len(family),
            threads=sum(_count(f"/proc/{pid}/task") for pid in family),
            descriptors=sum(_count(f"/proc/{pid}/fd") for pid in family),
            agent_private_bytes=_private_bytes(os.getpid()),
            worker_private_bytes=max((worker.private_bytes for worker in present), default=0),
            arena_bytes=sum(worker.arena_bytes for worker in present),
            host_bytes=residency.tier_bytes_used(self.node.loop.core, Tier.HOST),
            files=sum(1 for path in folder.rglob("*") if path.is_file()),
        )


def _is_ours(pid: int) -> bool:
    """Nurseries and workers; not the servers of fresh children."""
    try:
        return b"restore_jobs" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _count(folder: str) -> int:
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@asynccontextmanager
async def running_node(
    folder: Path,
    rates: Rates,
    specs: tuple[ModelSpec, ...],
    device: str,
    host_bytes: int,
    disk_bytes: int,
) -> AsyncIterator[BenchNode]:
    """A node on one device (``cpu:SIZE``, ``cuda:0``) that knows ``rates`` and serves ``specs``."""
    words = ["run", "--data-dir", str(folder), "--name", NAME, "--device", device]
    words += ["--host-bytes", str(host_bytes), "--disk-bytes", str(disk_bytes)]
    # Nobody measures beside the bench, which has done so already, the same way, or fills what it emptied.
    loaded = replace(config.load(words), calibrate=False, prefetch=False)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    journal = open_journal(folder)
    journal.save_calibration(dump_rates(rates))
    journal.close()
    node = RunningNode(loaded)
    try:
        await node.start()
        bench = BenchNode(node, specs)
        await bench.plan(specs)
        yield bench
    finally:
        await node.close()
