"""The real loop on the real core, on a virtual clock, with hands that take simulated time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from virtual_clock import VirtualLoop, run_virtual

from agent.facade import EngineFrame, EngineRequest, Refused
from agent.loop import Loop
from packer import residency
from packer.events import (
    Action,
    DeviceSeen,
    Drop,
    Dropped,
    Event,
    Evict,
    Evicted,
    Fill,
    Filled,
    FillFailed,
    Finished,
    Pack,
    Packed,
    Planned,
    PrefetchChosen,
    RefusalReason,
    Restore,
    Restored,
    RestoreFailed,
    StopFill,
    TierBudgetSeen,
)
from packer.types import MIB, ModelRef, ModelSpec, Task, TenantSpec, Tier

# Everything happens on this grid, so that things coincide: that is where loops break.
GRID_S = 0.1


def make_spec(name: str, size_bytes: int = 40 * MIB) -> ModelSpec:
    ref = ModelRef("acme", name, "0" * 16)
    return ModelSpec(ref, "control:", (), "transformers", Task.EMBEDDING, size_bytes, (size_bytes,), MIB, 0)


class SlowHands:
    """Carries out orders in simulated time; fails some restores on request."""

    def __init__(self, dice: random.Random, failing: float = 0.0) -> None:
        self.dice = dice
        self.failing = failing
        self.running: dict[tuple[ModelRef, str], int] = {}
        self.restores = 0
        self.post: Callable[[Event], None] = lambda event: None
        self.packs: set[asyncio.Task[None]] = set()
        self.fills: list[Fill] = []
        self.stopped = asyncio.Event()

    async def _work(self) -> None:
        await asyncio.sleep(self.dice.randrange(1, 8) * GRID_S)

    async def restore(self, order: Restore) -> Event | None:
        self.restores += 1
        if order.disk_bytes:
            task = asyncio.create_task(self._pack_beside(order))
            self.packs.add(task)
            task.add_done_callback(self.packs.discard)
        await self._work()
        if self.dice.random() < self.failing:
            return RestoreFailed(order.ref, order.device, order.from_tier, "a passing fault")
        filled = order.host_bytes > 0
        return Restored(order.ref, order.device, order.from_tier, 100, filled, restored_bytes=4096)

    async def _pack_beside(self, order: Restore) -> None:
        await self._work()
        self.post(Packed(order.ref, order.device, 30 * MIB, 30 * MIB, order.pack_order))

    async def evict(self, order: Evict) -> Event | None:
        assert not self.running.get((order.ref, order.device)), "evicted under a running request"
        await self._work()
        return Evicted(order.ref, order.device)

    async def pack(self, order: Pack) -> Event | None:
        await self._work()
        return Packed(order.ref, order.device, 30 * MIB, 30 * MIB)

    async def drop(self, order: Drop) -> Event | None:
        await self._work()
        return Dropped(order.ref, order.tier)

    async def fill(self, order: Fill) -> Event | None:
        """Takes an hour, unless it is told to stop."""
        self.fills.append(order)
        with suppress(TimeoutError):
            async with asyncio.timeout(3600):
                await self.stopped.wait()
            return FillFailed(order.ref, "stopped", order.order, stopped=True)
        return Filled(order.ref, order.order)

    def stop_fill(self, order: StopFill) -> None:
        assert order.order == self.fills[-1].order
        self.stopped.set()

    async def run(
        self, ref: ModelRef, device: str, request: EngineRequest, took: Callable[[int], None]
    ) -> AsyncIterator[EngineFrame]:
        at = (ref, device)
        self.running[at] = self.running.get(at, 0) + 1
        try:
            await self._work()
            yield EngineFrame({"n": 1})
        finally:
            self.running[at] -= 1


def make_loop(hands: SlowHands, directory: Path, seen: list[str]) -> Loop:
    clock = asyncio.get_running_loop()
    assert isinstance(clock, VirtualLoop)

    def observe(now_ms: int, event: Event, actions: list[Action]) -> None:
        seen.append(f"{now_ms} {event} {actions}")

    loop = Loop(residency.Node(), hands, clock.now_ms, observe, directory)
    hands.post = loop.post
    loop.post(TierBudgetSeen(Tier.HOST, 100 * MIB))
    loop.post(TierBudgetSeen(Tier.DISK, 1000 * MIB))
    loop.post(DeviceSeen("cpu:0", 96 * MIB))
    loop.post(DeviceSeen("cpu:1", 96 * MIB))
    return loop


async def simulate(seed: int, callers: int, directory: Path) -> tuple[list[str], list[str]]:
    """Callers come, wait, run and leave for a simulated while; returns (steps, one outcome each)."""
    dice = random.Random(seed)
    seen: list[str] = []
    hands = SlowHands(random.Random(seed + 1), failing=0.05)
    loop = make_loop(hands, directory, seen)
    specs = [make_spec(f"m{i}") for i in range(9)]
    loop.post(Planned((TenantSpec("acme"),), tuple(specs)))
    outcomes = ["nothing"] * callers

    async def call(number: int, spec: ModelSpec) -> None:
        try:
            async with loop.lease(spec, f"r{number}", 20_000) as lease:
                outcomes[number] = "granted"
                async for _ in lease.run(EngineRequest("embed")):
                    outcomes[number] = "answered"
        except Refused as refused:
            outcomes[number] = f"refused {refused.reason}"
        except asyncio.CancelledError:
            outcomes[number] = "cancelled"
            raise

    tasks: list[asyncio.Task[None]] = []
    for number in range(callers):
        spec = specs[min(int(dice.expovariate(0.5)), len(specs) - 1)]
        tasks.append(asyncio.create_task(call(number, spec)))
        if dice.random() < 0.2:
            asyncio.get_running_loop().call_later(dice.randrange(0, 12) * GRID_S, tasks[-1].cancel)
        await asyncio.sleep(dice.randrange(0, 6) * GRID_S)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not loop.broken.done()
    assert residency.model_view(loop.core, specs[0].ref) is not None
    await loop.close()
    return seen, outcomes


@pytest.mark.parametrize("seed", range(12))
def test_every_caller_gets_one_outcome(seed: int, tmp_path: Path) -> None:
    """Callers that leave in the very tick of their grant included: nobody hangs, nothing leaks."""
    steps, outcomes = run_virtual(simulate(seed, 300, tmp_path))
    assert "nothing" not in outcomes
    assert "granted" not in outcomes, "a grant without an answer"
    assert outcomes.count("answered") > 150
    assert outcomes.count("cancelled") > 0
    finished = sum(" Finished(" in step for step in steps)
    granted = sum(step.count("Grant(") for step in steps)
    crossed = sum(" Cancelled(" in step for step in steps)
    assert finished <= granted <= finished + crossed


def test_two_hash_seeds_give_one_history(tmp_path: Path) -> None:
    """Nothing in the loop or the core depends on the order of a set."""
    code = (
        "import hashlib, pathlib, sys; sys.path[:0] = ['tests', '.']\n"
        "from test_loop import simulate; from virtual_clock import run_virtual\n"
        f"steps, _ = run_virtual(simulate(3, 200, pathlib.Path({str(tmp_path)!r})))\n"
        "print(hashlib.sha256('\\n'.join(steps).encode()).hexdigest())\n"
    )
    root = Path(__file__).resolve().parent.parent
    digests = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert len(digests[0]) == 64
    assert digests[0] == digests[1]


async def _ahead(tmp_path: Path) -> None:
    hands = SlowHands(random.Random(1))
    loop = make_loop(hands, tmp_path, [])
    loop.post(PrefetchChosen(True))
    first, second = make_spec("one"), make_spec("two")
    loop.post(Planned((TenantSpec("acme"),), (first, second)))
    async with loop.lease(first, "r1", 20_000):
        pass
    await asyncio.sleep(5)
    for budget_bytes in (0, 96 * MIB):
        loop.post(DeviceSeen("cpu:0", budget_bytes))
        loop.post(DeviceSeen("cpu:1", budget_bytes))
        await asyncio.sleep(20)
    assert [order.ref for order in hands.fills] == [first.ref]
    async with loop.lease(second, "r2", 20_000):
        assert hands.stopped.is_set()
        hands.stopped.clear()
        await asyncio.sleep(3600 + 600)
    assert len(hands.fills) == 2
    async with loop.lease(first, "r3", 20_000) as lease:
        assert lease.tier is Tier.HOST
    await loop.close()


def test_a_copy_is_filled_while_nobody_waits_and_stops_when_somebody_does(tmp_path: Path) -> None:
    run_virtual(_ahead(tmp_path))


async def _join(tmp_path: Path) -> None:
    hands = SlowHands(random.Random(1))
    loop = make_loop(hands, tmp_path, [])
    spec = make_spec("one")
    loop.post(Planned((TenantSpec("acme"),), (spec,)))
    tiers: list[tuple[Tier, int]] = []
    moved: list[int] = []

    async def call(number: int) -> None:
        async with loop.lease(spec, f"r{number}", 20_000) as lease:
            tiers.append((lease.tier, lease.restore_ms))
            moved.append(lease.restored_bytes)

    await asyncio.gather(*(call(number) for number in range(20)))
    assert hands.restores == 1
    assert [tier for tier, _ in tiers] == [Tier.ORIGIN] * 20
    assert all(restore_ms > 0 for _, restore_ms in tiers)
    await call(99)
    assert tiers[-1] == (Tier.DEVICE, 0)
    assert moved == [4096] * 20 + [0]
    await loop.close()


def test_callers_that_arrive_meanwhile_join_the_same_restore(tmp_path: Path) -> None:
    run_virtual(_join(tmp_path))


async def _never_fits(tmp_path: Path) -> None:
    loop = make_loop(SlowHands(random.Random(1)), tmp_path, [])
    spec = make_spec("huge", 500 * MIB)
    loop.post(Planned((TenantSpec("acme"),), (spec,)))
    with pytest.raises(Refused) as refused:
        async with loop.lease(spec, "r", 20_000):
            raise AssertionError("granted")
    assert refused.value.reason is RefusalReason.NEVER_FITS
    assert refused.value.retry_ms is None
    assert any(character.isdigit() for character in refused.value.detail)
    await loop.close()


def test_what_can_never_fit_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    run_virtual(_never_fits(tmp_path))


async def _broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(SlowHands(random.Random(1)), tmp_path, [])

    def wrong(core: residency.Node, event: Event, actions: list[Action]) -> None:
        raise residency.InvariantBroken("planted")

    monkeypatch.setattr(residency, "check_after", wrong)
    with pytest.raises(residency.InvariantBroken):
        loop.post(Finished("nobody"))
    assert loop.broken.done()
    (dump,) = tmp_path.glob("ring-broken-*.jsonl")
    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["event"] == ["Finished", {"request": "nobody", "device_ms": 0, "tokens": 0}]


def test_a_broken_invariant_dumps_the_ring_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_virtual(_broken(tmp_path, monkeypatch))


async def _dump(tmp_path: Path) -> Path:
    await simulate_and_dump(tmp_path)
    (dump,) = tmp_path.glob("ring-asked-*.jsonl")
    return dump


async def simulate_and_dump(tmp_path: Path) -> None:
    loop = make_loop(SlowHands(random.Random(5)), tmp_path, [])
    specs = [make_spec(f"m{i}") for i in range(6)]
    loop.post(Planned((TenantSpec("acme"),), tuple(specs)))

    async def call(number: int) -> None:
        async with loop.lease(specs[number % 6], f"r{number}", 60_000):
            await asyncio.sleep(GRID_S)

    await asyncio.gather(*(call(number) for number in range(60)))
    loop.dump("asked")
    await loop.close()


def test_a_dump_replays_to_the_same_decisions(tmp_path: Path) -> None:
    """scripts/replay.py steps a ring again; a changed action is found and named."""
    dump = run_virtual(_dump(tmp_path))
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "scripts/replay.py", str(dump)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    good = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert "every action the same" in good.stderr
    changed = dump.read_text().replace('"Grant", {"request": "r3"', '"Grant", {"request": "r4"', 1)
    assert changed != dump.read_text()
    dump.write_text(changed)
    bad = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "differs" in bad.stderr


def test_virtual_time_is_what_a_grant_measures() -> None:
    """A guard on the test's own tool: the clock moves by exactly what was slept."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        before = loop.time()
        await asyncio.sleep(3600)
        return loop.time() - before

    passed_s = run_virtual(main())
    assert passed_s == pytest.approx(3600)
