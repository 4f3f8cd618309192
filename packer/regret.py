"""How much colder a node was than it had to be: its own log of uses against the clairvoyant optimum.

Covers: the fractional optimum (Belady on bytes: what is needed last goes first, and only as much of it as
is needed), on the device tier and on device and host together; LRU on whole models beside it; and the
cold time of each by a node's own measured costs. Does not cover: keeping the log, or when to replay it
(the agent's ``use_log`` and ``regret``).

Why this is a bound: when models can be held in part and a restore costs in proportion to the bytes that are
missing, Belady on bytes is the optimum of the linear program that relaxes every cache (Berger et al. 2018;
measured against the LP in ``research/packing.md``), for one pool of memory of any size at once: it holds
more with more memory, so the device tier is the front of one ordered list and the host tier the rest. A
use then costs each byte that is not on the device what it takes from host, and each that is not in host
either what it takes from disk. ``bound_ms`` counts those bytes alone: no schedule whatever is cheaper.
``optimum_ms`` adds the fixed part of each restore of that schedule, which is what a clairvoyant node would
have paid; another schedule with fewer, larger restores may be a little cheaper than it, never than the
bound.

The first use of each model in the log counts for nobody: what was held before the log began is not known.
So do uses of models that are larger than all devices together. Devices count as one pool, copies as
divisible, leases as momentary, workspaces not at all: all of that can only lower the bound.

Standard library only, no clock: the same log gives the same figures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True, slots=True)
class UseLog:
    """Uses in the order of time, column by column: when, of which model, and what restoring it took then
    (0: it was there). ``size_bytes`` is by model number."""

    at_ms: Sequence[int]
    models: Sequence[int]
    cold_ms: Sequence[int]
    size_bytes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a node may hold. ``host_bytes`` is of raw weights: what its host copies stand for."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Costs:
    """What a restore takes on this node: a fixed part, and per raw byte from host and from disk."""

    fixed_ms: float
    host_ms_per_byte: float
    disk_ms_per_byte: float


@dataclass(frozen=True, slots=True)
class Regret:
    """Cold time in ms over the ``counted`` of ``uses`` uses within ``window_ms``."""

    uses: int
    counted: int
    window_ms: int
    actual_ms: float
    lru_ms: float
    optimum_ms: float
    bound_ms: float

    @property
    def ratio(self) -> float | None:
        """How many times the optimum the node paid; None when a clairvoyant node would have paid nothing."""
        return self.actual_ms / self.optimum_ms if self.optimum_ms > 0 else None


def replay(log: UseLog, memory: Memory, costs: Costs) -> Regret:
    """The whole judgement, in about ten microseconds per use."""
    counted = _counted(log, memory.device_bytes)
    both_bytes = memory.device_bytes + max(memory.host_bytes, 0)
    off_device = missing_bytes(log, memory.device_bytes)
    off_host = missing_bytes(log, both_bytes)
    bound_ms = optimum_ms = actual_ms = 0.0
    host_ms, disk_ms = costs.host_ms_per_byte, max(costs.disk_ms_per_byte, costs.host_ms_per_byte)
    for counts, cold_ms, missing, below in zip(counted, log.cold_ms, off_device, off_host, strict=True):
        if counts:
            actual_ms += cold_ms
            if missing:
                moving_ms = (missing - below) * host_ms + below * disk_ms
                bound_ms += moving_ms
                optimum_ms += costs.fixed_ms + moving_ms
    return Regret(
        uses=len(log.models),
        counted=sum(counted),
        window_ms=log.at_ms[-1] - log.at_ms[0] if log.at_ms else 0,
        actual_ms=actual_ms,
        lru_ms=_lru_ms(log, counted, memory, costs),
        optimum_ms=optimum_ms,
        bound_ms=bound_ms,
    )


def _counted(log: UseLog, device_bytes: int) -> list[bool]:
    seen = [False] * len(log.size_bytes)
    counted = []
    for model in log.models:
        counted.append(seen[model] and log.size_bytes[model] <= device_bytes)
        seen[model] = True
    return counted


def missing_bytes(log: UseLog, capacity_bytes: int) -> list[int]:
    """Of each use the bytes that a clairvoyant pool must bring in; it starts empty.

    At most ``capacity_bytes`` are held, all of the model that is used among them; what goes is what is
    needed last, in part if a part is enough. A model that is larger than the pool passes it by.
    """
    sizes = log.size_bytes
    never = len(log.models)
    following = [never] * len(sizes)
    next_use = [0] * never
    for at in range(never - 1, -1, -1):
        next_use[at] = following[log.models[at]]
        following[log.models[at]] = at
    held = [0] * len(sizes)
    wanted_at = [never] * len(sizes)
    # (when it is needed next, from the end; the model): the top goes first. Old entries are passed over.
    heap: list[tuple[int, int]] = []
    free = capacity_bytes
    missing: list[int] = []
    for at, model in enumerate(log.models):
        size = sizes[model]
        if size > capacity_bytes:
            missing.append(size)
            continue
        lacks = size - held[model]
        missing.append(lacks)
        held[model] = size
        wanted_at[model] = -1  # not while it is used
        free -= lacks
        while free < 0:
            key, other = heappop(heap)
            has = held[other]
            if -key != wanted_at[other] or not has:
                continue
            taken = min(has, -free)
            held[other] = has - taken
            free += taken
            if taken < has:
                heappush(heap, (key, other))
        wanted_at[model] = next_use[at]
        heappush(heap, (-next_use[at], model))
    return missing


def _lru_ms(log: UseLog, counted: Sequence[bool], memory: Memory, costs: Costs) -> float:
    """What whole models under LRU would have cost: on the devices, and below them in as much more as the
    host tier holds."""
    on_device = lru_hits(log, memory.device_bytes)
    in_memory = lru_hits(log, memory.device_bytes + max(memory.host_bytes, 0))
    cold_ms = 0.0
    for counts, model, there, near in zip(counted, log.models, on_device, in_memory, strict=True):
        if counts and not there:
            per_byte = costs.host_ms_per_byte if near else costs.disk_ms_per_byte
            cold_ms += costs.fixed_ms + log.size_bytes[model] * per_byte
    return cold_ms


def lru_hits(log: UseLog, capacity_bytes: int) -> list[bool]:
    """Which uses find the whole model in a pool that throws out the longest unused one."""
    held: OrderedDict[int, int] = OrderedDict()
    free = capacity_bytes
    hits = []
    for model in log.models:
        size = log.size_bytes[model]
        if model in held:
            held.move_to_end(model)
            hits.append(True)
            continue
        hits.append(False)
        if size > capacity_bytes:
            continue
        while free < size:
            free += held.popitem(last=False)[1]
        held[model] = size
        free -= size
    return hits
