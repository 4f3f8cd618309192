"""Memory of three levels under one policy: the model in which the steps of the full stack are compared.

Covers: a pool of device bytes above a pool of RAM above a disk that holds everything; what leaves the devices
goes to RAM if it is worth more than what it would push out there. Does not cover: several devices, restores
that share a disk, tenants (``packer/simulate.py`` replays those through the production cores).

A request for a model that is not wholly on the devices is cold: it waits the fixed time and the missing bytes
over the rate of the level where they are. Both memories hold a model once, not twice. Ours ranks by what a
use would cost more without the bytes; the others by their own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from pool_model import LOOK_MS, PoolResult, Replayed, replayed
from request_traces import GB, Trace

from packer.policies import Item

RAM_BYTES_PER_MS = 45_000_000.0
DISK_BYTES_PER_MS = 7_000_000.0


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the stack: what it runs on and what its restores cost. Ratios are stored over raw bytes."""

    name: str
    policy: str
    ram: bool = True
    partial: bool = False
    ram_ratio: float = 1.0
    disk_ratio: float = 1.0
    fixed_ms: float = 400.0
    disk_bytes_per_ms: float = DISK_BYTES_PER_MS


PARKED_MS = 100.0
WIRE, STORED = 0.75, 0.667


def _boot(name: str, policy: str) -> Step:
    """An engine's cold start: 25 s until it can load, then 2 GB/s from its loader."""
    return Step(name, policy, ram=False, fixed_ms=25_000.0, disk_bytes_per_ms=2_000_000.0)


STEPS = (
    _boot("cold boot, unloaded after five minutes (TTL)", "ttl"),
    _boot("cold boot, LRU, no timer", "lru"),
    Step("snapshot restored from NVMe, LRU", "lru", ram=False),
    Step("+ RAM tier", "lru"),
    Step("+ keep-index", "keep"),
    Step("+ partial residency", "keep", True, partial=True),
    Step("+ compression", "keep", True, True, WIRE, STORED),
    Step("+ parked workers", "keep", True, True, WIRE, STORED, PARKED_MS),
    Step("clairvoyant, whole models, raw, 0.4 s", "belady"),
    Step("clairvoyant, full stack", "belady", True, True, WIRE, STORED, PARKED_MS),
)
OURS = STEPS[7]


class Stack:
    """One replay of one step."""

    def __init__(self, step: Step, trace: Trace, device_bytes: int, ram_bytes: int) -> None:
        self.step = step
        self._sizes = trace.size_bytes
        self._policy: Replayed = replayed(step.policy, trace)
        self._items = [Item(name) for name in trace.names]
        self._number = {item.name: at for at, item in enumerate(self._items)}
        self._on_device: dict[int, int] = {}
        self._in_ram: dict[int, int] = {}
        self._free = device_bytes
        # In raw bytes: what fits into RAM in its stored form.
        self._ram_free = int(ram_bytes / step.ram_ratio) if step.ram else 0
        self._ram_ms = step.ram_ratio / RAM_BYTES_PER_MS
        self._disk_ms = step.disk_ratio / step.disk_bytes_per_ms
        self.moved_bytes = 0
        self._look_ms = 0

    def use(self, model: int, now_ms: int) -> float:
        """One request; what it waited, in ms."""
        policy, size, item = self._policy, self._sizes[model], self._items[model]
        looks = policy.timed and now_ms >= self._look_ms
        if looks:
            self._look_ms = now_ms + LOOK_MS
        for gone in policy.expired(self._items, now_ms) if looks else ():
            self._free += self._on_device.pop(self._number[gone.name], 0)
            policy.note_gone(gone)
        held = self._on_device.get(model, 0)
        missing = size - held
        cold_ms = 0.0
        if missing:
            near = min(self._in_ram.pop(model, 0), missing)
            self._ram_free += near
            self.moved_bytes += missing
            cold_ms = self.step.fixed_ms + near * self._ram_ms + (missing - near) * self._disk_ms
            self._on_device[model] = size
            self._free -= missing
            if self._free < 0:
                self._evict(model, now_ms)
        policy.note_use(item, now_ms, self.step.fixed_ms + size * self._disk_ms, size)
        return cold_ms

    def _evict(self, wanted: int, now_ms: int) -> None:
        """Take from the devices what is worth least there, and offer it to RAM."""
        value = self._policy.at(now_ms)
        ranked = []
        for model, held in self._on_device.items():
            if model != wanted:
                whole = held == self._sizes[model]
                per_byte = self._ram_ms if self.step.ram else self._disk_ms
                gain_ms = (self.step.fixed_ms if whole else 0.0) + held * per_byte
                ranked.append((value(self._items[model], gain_ms, held), model))
        ranked.sort()
        for _, model in ranked:
            if self._free >= 0:
                break
            held = self._on_device[model]
            taken = min(held, -self._free) if self.step.partial else held
            self._free += taken
            if taken < held:
                self._on_device[model] = held - taken
            else:
                del self._on_device[model]
            if self.step.ram:
                self._in_ram[model] = self._in_ram.get(model, 0) + taken
                self._ram_free -= taken
            elif taken == held:
                self._policy.note_gone(self._items[model])
        if self._ram_free < 0:
            self._shrink_ram(now_ms)

    def _shrink_ram(self, now_ms: int) -> None:
        value = self._policy.at(now_ms)
        ranked: list[tuple[float, int]] = []
        for model, held in self._in_ram.items():
            heappush(ranked, (value(self._items[model], held * (self._disk_ms - self._ram_ms), held), model))
        while self._ram_free < 0:
            _, model = heappop(ranked)
            held = self._in_ram[model]
            taken = min(held, -self._ram_free) if self.step.partial else held
            self._ram_free += taken
            if taken < held:
                self._in_ram[model] = held - taken
            else:
                del self._in_ram[model]
                if model not in self._on_device:
                    self._policy.note_gone(self._items[model])


def replay_stack(trace: Trace, step: Step, device_gb: int, ram_gb: int) -> PoolResult:
    stack = Stack(step, trace, device_gb * GB, ram_gb * GB)
    cold_ms = [stack.use(model, at_ms) for model, at_ms in zip(trace.models, trace.at_ms, strict=True)]
    return result_of(cold_ms, stack.moved_bytes)


def result_of(cold_ms: Sequence[float], moved_bytes: int) -> PoolResult:
    ordered = sorted(cold_ms)
    cold = sum(1 for each in ordered if each)
    p99_ms = ordered[-len(ordered) // 100 - 1] if len(ordered) > 100 else ordered[-1]
    return PoolResult(sum(ordered) / len(ordered) / 1000, p99_ms / 1000, 1 - cold / len(ordered), moved_bytes)
