"""One pool of memory under an eviction policy: the cache model in which policies are compared.

Covers: replaying a trace against a pool of bytes with the production policies (``packer/policies.py``),
with peers that only exist for comparison (LFU, hybrid histogram) and with clairvoyant ones (whole-model
Belady, Belady on fractions). Does not cover: several devices, tiers and quotas (``packer/simulate.py``
replays those through the production cores).

A request for a model that is not wholly held is cold: it waits a fixed time and the missing bytes over the
bandwidth. Whole-pool capacity, no fragmentation, loads are not serialised: the same for all policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from request_traces import Trace

from packer.policies import Item, Policy, make_policy

# What a restore costs beside the bytes, and the bytes: an NVMe drive of 7 GB/s, parked skeletons.
FIXED_MS = 400.0
BYTES_PER_MS = 7_000_000.0
# Timers are looked at this often: looking at each request would take most of the replay's time.
LOOK_MS = 10_000


@dataclass(frozen=True, slots=True)
class PoolResult:
    """What a replay cost. ``cold_s_mean`` is over all requests, warm ones counting 0."""

    cold_s_mean: float
    cold_s_p99: float
    hit_share: float
    moved_bytes: int


class Replayed(Protocol):
    """What the pool asks of a policy; ``packer.policies.Policy`` and the peers below."""

    partial: bool
    timed: bool

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None: ...
    def note_gone(self, item: Item) -> None: ...
    def at(self, now_ms: int) -> Callable[[Item, float, int], float]: ...
    def expired(self, items: Iterable[Item], now_ms: int) -> list[Item]: ...


def restore_ms(missing_bytes: int) -> float:
    return FIXED_MS + missing_bytes / BYTES_PER_MS


class Lfu:
    """Least often used since the beginning of time goes first ("perfect" LFU)."""

    name, partial, timed = "lfu", False, False

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        item.value += 1.0

    def note_gone(self, item: Item) -> None:
        return

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        return lambda item, gain_ms, nbytes: item.value

    def expired(self, items: Iterable[Item], now_ms: int) -> list[Item]:
        return []


class HybridHistogram:
    """Keep-alive from each model's own histogram of idle times (Shahrad et al., ATC 2020), LRU under
    pressure. Idle minutes up to four hours; kept alive to the 99th percentile and a tenth; four hours
    while the histogram has too little in it or too much beyond its end. Without the paper's pre-warming,
    which here would only unload earlier."""

    name, partial, timed = "hybrid", False, True
    _MINUTES, _USES_MIN = 240, 5

    def __init__(self) -> None:
        self._idle: dict[str, list[int]] = {}
        self._beyond: dict[str, int] = {}
        self._keep_ms: dict[str, int] = {}

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        if item.last_ms >= 0:
            minutes = (now_ms - item.last_ms) // 60_000
            bins = self._idle.setdefault(item.name, [0] * self._MINUTES)
            if minutes < self._MINUTES:
                bins[minutes] += 1
            else:
                self._beyond[item.name] = self._beyond.get(item.name, 0) + 1
            self._keep_ms[item.name] = self._window_ms(bins, self._beyond.get(item.name, 0))
        item.last_ms = now_ms
        item.is_held = True

    def _window_ms(self, bins: Sequence[int], beyond: int) -> int:
        inside = sum(bins)
        if inside < self._USES_MIN or beyond > inside:
            return self._MINUTES * 60_000
        wanted, seen = 0.99 * inside, 0
        for minute, count in enumerate(bins):
            seen += count
            if seen >= wanted:
                return int((minute + 1) * 60_000 * 1.1)
        return self._MINUTES * 60_000

    def note_gone(self, item: Item) -> None:
        item.is_held = False

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        return lambda item, gain_ms, nbytes: float(item.last_ms)

    def expired(self, items: Iterable[Item], now_ms: int) -> list[Item]:
        default = self._MINUTES * 60_000
        return [i for i in items if i.is_held and now_ms - i.last_ms >= self._keep_ms.get(i.name, default)]


class Belady:
    """Clairvoyant: what is needed last goes first. On fractions and costs in proportion to bytes this is
    the optimum; on whole models of many sizes it is a strong heuristic (with cost over size and distance)."""

    def __init__(self, trace: Trace, partial: bool) -> None:
        self.partial, self.timed = partial, False
        self.name = "belady fractions" if partial else "belady"
        following: dict[int, int] = {}
        self._next_ms = [0] * len(trace.at_ms)
        for at in range(len(trace.at_ms) - 1, -1, -1):
            self._next_ms[at] = following.get(trace.models[at], 1 << 60)
            following[trace.models[at]] = trace.at_ms[at]
        self._request = -1

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        self._request += 1
        item.value = float(self._next_ms[self._request])

    def note_gone(self, item: Item) -> None:
        return

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        return lambda item, gain_ms, nbytes: gain_ms / nbytes / max(item.value - now_ms, 1.0)

    def expired(self, items: Iterable[Item], now_ms: int) -> list[Item]:
        return []


def replayed(name: str, trace: Trace) -> Replayed:
    """A fresh policy by name: a production one, or one of this file's."""
    match name:
        case "lfu":
            return Lfu()
        case "hybrid":
            return HybridHistogram()
        case "belady":
            return Belady(trace, partial=False)
        case "belady fractions":
            return Belady(trace, partial=True)
        case _:
            policy: Policy = make_policy(name)
            return policy


class Pool:
    """Bytes of models under one policy."""

    def __init__(self, policy: Replayed, trace: Trace, capacity_bytes: int) -> None:
        self._policy = policy
        self._sizes = trace.size_bytes
        self._items = [Item(name) for name in trace.names]
        self._number = {name: at for at, name in enumerate(trace.names)}
        self._held: dict[int, int] = {}
        self._free_bytes = capacity_bytes
        self._look_ms = 0

    def use(self, model: int, now_ms: int) -> int:
        """One request; returns the bytes that had to be restored."""
        policy, size = self._policy, self._sizes[model]
        item = self._items[model]
        looks = policy.timed and now_ms >= self._look_ms
        if looks:
            self._look_ms = now_ms + LOOK_MS
        for gone in policy.expired(self._items, now_ms) if looks else ():
            number = self._number[gone.name]
            if number in self._held:
                self._free_bytes += self._held.pop(number)
                policy.note_gone(gone)
        missing = size - self._held.get(model, 0)
        if missing > self._free_bytes:
            self._evict(missing - self._free_bytes, model, now_ms)
        if missing:
            self._held[model] = size
            self._free_bytes -= missing
        policy.note_use(item, now_ms, restore_ms(size), size)
        return missing

    def _evict(self, need_bytes: int, wanted: int, now_ms: int) -> None:
        value = self._policy.at(now_ms)
        ranked = []
        for model, held in self._held.items():
            if model != wanted:
                # Of a model that is held in part the fixed cost is lost already.
                whole = held == self._sizes[model]
                gain_ms = (FIXED_MS if whole else 0.0) + held / BYTES_PER_MS
                ranked.append((value(self._items[model], gain_ms, held), model))
        ranked.sort()
        for _, model in ranked:
            if need_bytes <= 0:
                return
            held = self._held[model]
            taken = min(held, need_bytes) if self._policy.partial else held
            need_bytes -= taken
            self._free_bytes += taken
            if taken < held:
                self._held[model] = held - taken
            else:
                del self._held[model]
                self._policy.note_gone(self._items[model])


def replay(trace: Trace, policy_name: str, capacity_bytes: int) -> PoolResult:
    """Replay a whole trace. Models larger than the pool are not part of the comparison: none may be."""
    assert max(trace.size_bytes) <= capacity_bytes
    pool = Pool(replayed(policy_name, trace), trace, capacity_bytes)
    cold_ms: list[float] = []
    moved = 0
    for model, now_ms in zip(trace.models, trace.at_ms, strict=True):
        missing = pool.use(model, now_ms)
        if missing:
            moved += missing
            cold_ms.append(restore_ms(missing))
    requests = len(trace.at_ms)
    cold_ms.sort()
    # Warm requests are the lowest values, so the p99 of all lies this far from the top.
    above = requests // 100
    p99_ms = cold_ms[-above - 1] if above < len(cold_ms) else 0.0
    return PoolResult(sum(cold_ms) / requests / 1000, p99_ms / 1000, 1 - len(cold_ms) / requests, moved)
