"""The sections of the restore bench that need a whole node: swaps under eight tenants, and thousands of them.

Covers: how long a caller waits for a model that has to take another one's place, how far the node's own
prediction is off, what an evict costs, and whether anything is left behind after many swaps with failures
injected. Does not cover: the node itself (``restore_node``), or HTTP (``bench_cold``).
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import shutil
import signal
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import restore_data
from bench_suite import Judgement, Section, Table
from restore_node import BenchNode, Census, StepTimes, Taken, running_node
from restore_setup import Setup, rate

from agent.devices import DEVICE_BYTES_MIN
from agent.facade import EngineFault, Refused
from packer.events import TierBudgetSeen
from packer.types import GIB, MIB, ModelRef, ModelSpec, Task, Tier

TENANTS = 8
SWAPS_TIMED, SWAPS_TIMED_QUICK = 100, 40
DISK_SWAPS, DISK_SWAPS_QUICK = 16, 8
# Every so many swaps the model is made to answer, and its answer compared with the first one.
ANSWER_EVERY = 5
SETTLE_PASSES_MAX = 6
# A node knows a model's time by the median of five restores; before, by that of other models.
KNOWN_PASSES = 3
SEED = 5
# The model and its workspace, and less than a chunk to spare: every swap moves all of it.
SPARE_BYTES = MIB
DISK_BYTES = 32 * GIB


def tenants_of(spec: ModelSpec, count: int) -> tuple[ModelSpec, ...]:
    """The same directory as the model of several tenants."""
    return tuple(replace(spec, ref=ModelRef(f"tenant-{n}", "llama", "0" * 16)) for n in range(count))


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# --- swaps under eight tenants --------------------------------------------------------------------


@dataclass(slots=True)
class Swaps:
    """What the swaps of one tier took, and how far each prediction was off."""

    waits_ms: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    # Of the restores before: predictions of models that the node had hardly seen.
    early_errors: list[float] = field(default_factory=list)
    tiers: Counter[Tier] = field(default_factory=Counter)


def swap(setup: Setup) -> Section:
    """One device that holds one model, eight tenants with one each, all in the host tier."""
    setup.free_memory()
    folder = setup.cache / "bench-node"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return asyncio.run(_swap(setup, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _swap(setup: Setup, folder: Path) -> Section:
    specs = tenants_of(setup.spec, TENANTS)
    image = setup.spec.image_bytes
    device_bytes = image + setup.spec.workspace_bytes + SPARE_BYTES
    times = StepTimes()
    host, disk = Swaps(), Swaps()
    async with running_node(
        folder, setup.rates, specs, f"cpu:{device_bytes}", TENANTS * (image + 64 * MIB), DISK_BYTES
    ) as node:
        expected = await _settle(setup, node)
        await _know(node, Tier.HOST, host)
        before_bytes = node.written_bytes()
        with times.watching():
            count = SWAPS_TIMED_QUICK if setup.quick else SWAPS_TIMED
            await _swap_many(setup, node, count, Tier.HOST, host, expected)
        written = node.written_bytes() - before_bytes
        node.node.loop.post(TierBudgetSeen(Tier.HOST, 0))
        count = DISK_SWAPS_QUICK if setup.quick else DISK_SWAPS
        await _know(node, Tier.DISK, disk)
        with times.watching():
            await _swap_many(setup, node, count, Tier.DISK, disk, expected)
    return _judge_swaps(setup, host, disk, times, written)


async def _settle(setup: Setup, node: BenchNode) -> str:
    """Bring every model through origin and disk until all come from the host tier; the model's answer."""
    expected = ""
    for spec in node.specs:
        setup.log(f"swap: first use by {spec.ref.tenant}")
        expected = await node.answer(spec)
        await node.until_packed(spec)
    for number in range(SETTLE_PASSES_MAX):
        tiers = Counter([(await node.take(spec)).tier for spec in node.specs])
        setup.log(f"swap: pass {number + 1}: {dict(tiers)}")
        if tiers[Tier.HOST] + tiers[Tier.DEVICE] == len(node.specs):
            return expected
    raise RuntimeError(f"after {SETTLE_PASSES_MAX} passes models still come from {dict(tiers)}")


async def _know(node: BenchNode, tier: Tier, swaps: Swaps) -> None:
    """Let the node learn how long each model takes from ``tier``."""
    for _ in range(KNOWN_PASSES):
        for spec in node.specs:
            await node.take(spec)
    swaps.early_errors.extend(node.node.accuracy.tiers[tier].last)


async def _swap_many(
    setup: Setup, node: BenchNode, count: int, tier: Tier, swaps: Swaps, expected: str
) -> None:
    chance = random.Random(SEED)
    before = node.node.accuracy.tiers[tier].count
    for number in range(count):
        spec = chance.choice([spec for spec in node.specs if not node.is_resident(spec)])
        taken = await node.take(spec)
        swaps.tiers[taken.tier] += 1
        if taken.tier is tier:
            swaps.waits_ms.append(taken.wait_ms)
        if number % ANSWER_EVERY == 0:
            answer = await node.answer(spec)
            if answer != expected:
                raise RuntimeError(f"{spec.ref} answers {answer!r} instead of {expected!r}")
            setup.log(f"swap {number + 1}/{count} from {taken.tier}: {taken.wait_ms:.0f} ms")
    accuracy = node.node.accuracy.tiers[tier]
    swaps.errors.extend(list(accuracy.last)[-(accuracy.count - before) :])


def _judge_swaps(setup: Setup, host: Swaps, disk: Swaps, times: StepTimes, written: int) -> Section:
    rows = []
    for tier, name, swaps in ((Tier.HOST, "host tier", host), (Tier.DISK, "disk tier, sealed pack", disk)):
        median = statistics.median(swaps.waits_ms)
        rows.append(
            (
                name,
                str(len(swaps.waits_ms)),
                f"{median:.0f} ms",
                f"{percentile(swaps.waits_ms, 0.99):.0f} ms",
                f"{statistics.median(times.restore_ms[tier]):.0f} ms",
                rate(setup.nbytes, median),
                f"{statistics.median(swaps.errors):.1%}",
                f"{percentile(swaps.errors, 0.95):.1%}",
                f"{percentile(swaps.early_errors, 0.95):.1%}",
            )
        )
    errors = [*host.errors, *disk.errors]
    size = f"{setup.nbytes / 1e9:.1f} GB"
    from_host = host.tiers[Tier.HOST] / sum(host.tiers.values())
    judgements = (
        Judgement(
            f"a {size} model swapped from the host tier under {TENANTS} tenants, p99",
            percentile(host.waits_ms, 0.99) / 1000 if from_host > 0.99 else None,
            0.5,
            at_least=False,
            unit=" s",
            why=f"the worker's own part is {statistics.median(times.restore_ms[Tier.HOST]):.0f} ms"
            if from_host > 0.99
            else f"{from_host:.0%} of the models were in the host tier",
        ),
        Judgement(
            "predicted restore time off the real one once a model is known, p95 of host and disk",
            percentile(errors, 0.95),
            0.15,
            at_least=False,
            why=f"{len(host.errors)} from the host tier, {len(disk.errors)} from the disk",
        ),
        Judgement("bytes that workers wrote to a disk during all swaps", written, 0, at_least=False),
    )
    columns = (
        *("from", "swaps", "median wait", "p99", "of it restore", "GB/s of weights"),
        *("prediction off", "p95", "p95 of the first"),
    )
    notes = (
        "a swap is an evict and a restore, from the request to the grant",
        f"evict: decided in {statistics.median(times.decide_ms):.2f} ms, "
        f"done {statistics.median(times.evict_ms):.1f} ms later; {len(times.evict_ms)} evicts",
    )
    table = Table(f"Swaps of {TENANTS} tenants' models on one device", columns, tuple(rows), notes)
    runs = {"host": host.waits_ms, "disk": disk.waits_ms, "host errors": host.errors, "evict": times.evict_ms}
    return Section("swap", (table,), judgements, runs=runs)


# --- thousands of swaps ---------------------------------------------------------------------------

LEAK_TENANTS = 6
DEVICE_MODELS, HOST_MODELS = 2, 4
# One swap in so many meets an injected failure.
FAILURE_EVERY = 20
# Swaps before the first count, so that everything that is bounded is full: the core's ring of steps,
# parked skeletons, the allocator's free lists.
WARM_SWAPS_SHARE = 0.3
TRIES_MAX = 6
# What a heap may grow by without anything being kept: fragments, caches of code that ran later.
GROWTH_BYTES_MAX = 16 * MIB
# Pools start threads as orders overlap, up to a dozen in each process; a thread that is left behind by each
# failure would be a hundred times as many.
THREADS_MAX = 16


class LeakRun:
    """Swaps of small models with failures injected into some."""

    def __init__(self, node: BenchNode, expected: str) -> None:
        self._node = node
        self._expected = expected
        self._chance = random.Random(SEED)
        self.tiers: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._failures: dict[str, Callable[[ModelSpec], Awaitable[None]]] = {
            "worker killed during the restore": self._kill,
            "caller gone during the restore": self._leave,
            "host segment lost": self._lose_segment,
            "pack damaged": self._damage_pack,
            "pack removed": self._remove_pack,
        }

    async def swap(self, number: int) -> None:
        spec = self._chance.choice([spec for spec in self._node.specs if not self._node.is_resident(spec)])
        if number % FAILURE_EVERY == 0:
            name = self._chance.choice(sorted(self._failures))
            self.injected[name] += 1
            await self._failures[name](spec)
        taken = await self.take(spec)
        self.tiers[taken.tier.value] += 1
        if number % (10 * FAILURE_EVERY) == 1:
            await self._check(spec)

    async def take(self, spec: ModelSpec) -> Taken:
        """A caller that comes again as it is told to."""
        last = ""
        for _ in range(TRIES_MAX):
            try:
                return await self._node.take(spec)
            except Refused as refused:
                self.refused[refused.reason.value] += 1
                last = refused.detail
                await asyncio.sleep((refused.retry_ms or 0) / 1000)
        raise RuntimeError(f"{spec.ref} was refused {TRIES_MAX} times, the last: {last}")

    async def _check(self, spec: ModelSpec) -> None:
        try:
            answer = await self._node.answer(spec)
        except (Refused, EngineFault):
            return  # a worker that was killed just now; the next check finds another
        if answer != self._expected:
            raise RuntimeError(f"{spec.ref} answers {answer!r} instead of {self._expected!r}")

    # --- failures ---

    async def _kill(self, spec: ModelSpec) -> None:
        asking = asyncio.create_task(self.take(spec))
        await asyncio.sleep(self._chance.uniform(0, 0.01))
        pids = self._node.worker_pids()
        if pids:
            with suppress(ProcessLookupError):  # one that was killed before and is not missed yet
                os.kill(self._chance.choice(pids), signal.SIGKILL)
        await asking

    async def _leave(self, spec: ModelSpec) -> None:
        asking = asyncio.create_task(self._node.take(spec))
        await asyncio.sleep(self._chance.uniform(0, 0.01))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def _lose_segment(self, spec: ModelSpec) -> None:
        freeing = self._node.node._segments.drop(spec.ref)
        if freeing is not None:
            freeing.free()

    async def _damage_pack(self, spec: ModelSpec) -> None:
        path = self._node.node._packs.path(spec.ref)
        if not path.exists():
            return
        await self._lose_segment(spec)
        with path.open("r+b") as file:
            at = self._chance.randrange(path.stat().st_size)
            file.seek(at)
            octet = file.read(1)
            file.seek(at)
            file.write(bytes([octet[0] ^ 1 << self._chance.randrange(8)]))

    async def _remove_pack(self, spec: ModelSpec) -> None:
        await self._lose_segment(spec)
        self._node.node._packs.drop(spec.ref)


def leaks(setup: Setup) -> Section:
    """Thousands of swaps of a small model, some with failures; what is held is counted before and after."""
    folder = setup.cache / "bench-leaks"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return asyncio.run(_leaks(setup, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _leaks(setup: Setup, folder: Path) -> Section:
    directory = restore_data.model_directory(setup.cache, restore_data.SMALL)
    spec = restore_data.describe(directory, ModelRef("bench", "llama", "0" * 16), Task.GENERATION)
    # So that no more than these models fit, however small they are.
    room = max(spec.image_bytes + MIB, DEVICE_BYTES_MIN // DEVICE_MODELS)
    spec = replace(spec, workspace_bytes=room - spec.image_bytes)
    specs = tenants_of(spec, LEAK_TENANTS)
    async with running_node(
        folder,
        setup.rates,
        specs,
        f"cpu:{DEVICE_MODELS * room}",
        HOST_MODELS * (spec.image_bytes + MIB),
        DISK_BYTES,
    ) as node:
        run = LeakRun(node, await node.answer(specs[0]))
        warm = round(WARM_SWAPS_SHARE * setup.swaps)
        first: Census | None = None
        times = StepTimes()
        try:
            with times.watching():
                for number in range(setup.swaps):
                    if number == warm:
                        first = await _calm(run, node)
                    await run.swap(number)
                    if number % max(1, setup.swaps // 20) == 0:
                        setup.log(f"swap {number + 1}/{setup.swaps}: {node.census()}")
            last = await _calm(run, node)
        except RuntimeError as error:
            kept = shutil.copy(node.node.loop.dump("bench"), setup.cache / "leaks-ring.jsonl")
            raise RuntimeError(f"{error}; what the core saw and ordered is in {kept}") from error
    assert first is not None
    return _judge_leaks(setup, run, first, last, times)


async def _calm(run: LeakRun, node: BenchNode) -> Census:
    """Every tenant with a worker, no model anywhere: a state that does not depend on what was before."""
    for spec in node.specs:
        await run.take(spec)
    await node.plan(())
    await node.until_empty()
    census = node.census()
    await node.plan(node.specs)
    return census


def _judge_leaks(setup: Setup, run: LeakRun, first: Census, last: Census, times: StepTimes) -> Section:
    rows = tuple(
        (name.replace("_", " "), _words(name, getattr(first, name)), _words(name, getattr(last, name)))
        for name in Census.__dataclass_fields__
    )
    left = {
        name.replace("_", " "): max(0, getattr(last, name) - getattr(first, name))
        for name in ("processes", "descriptors", "files", "host_bytes", "arena_bytes")
    }
    growth = max(
        last.agent_private_bytes - first.agent_private_bytes,
        last.worker_private_bytes - first.worker_private_bytes,
    )
    swaps = f"{setup.swaps} swaps, {run.injected.total()} injected failures"
    judgements = (
        Judgement(
            f"{swaps}: processes, descriptors, files, host and arena bytes left behind",
            sum(left.values()),
            0,
            at_least=False,
            why=", ".join(f"{count} {name}" for name, count in left.items() if count),
        ),
        Judgement(
            f"decision of an evict, p99 of {len(times.decide_ms)}",
            percentile(times.decide_ms, 0.99),
            1,
            at_least=False,
            unit=" ms",
        ),
        Judgement(f"{swaps}: threads gained", last.threads - first.threads, THREADS_MAX, at_least=False),
        Judgement(
            f"{swaps}: private memory that agent or a worker gained",
            growth / MIB,
            GROWTH_BYTES_MAX / MIB,
            at_least=False,
            unit=" MiB",
        ),
    )
    notes = (
        f"{swaps}: {_listed(run.injected)}",
        f"models came from: {_listed(run.tiers)}; callers were told to come again: {_listed(run.refused)}",
        f"an evict is decided in {statistics.median(times.decide_ms):.2f} ms and done "
        f"{statistics.median(times.evict_ms):.2f} ms later",
        f"counted after {WARM_SWAPS_SHARE:.0%} of the swaps and at the end, with no model anywhere",
    )
    table = Table("Held by agent, nursery and workers", ("what", "before", "after"), rows, notes)
    return Section("leaks", (table,), judgements)


def _words(name: str, value: int) -> str:
    return f"{value / MIB:.1f} MiB" if name.endswith("_bytes") else str(value)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "nothing"
