"""Several tenants in one pool of memory, one of them noisy: what schemes of isolation cost whom.

Covers: the noisy-tenant trace, what every tenant would pay alone on its share of the memory, and replaying
the trace under a scheme: no quota, reserved bytes that may be borrowed, or lending by ``packer/lending.py``;
ranked by least recent use or by the production keep-index. Does not cover: the table (``bench_isolation``),
several devices, leases, or policies for a single tenant (``pool_model``).

The cache model is ``pool_model``'s: a fixed time and the missing bytes over the bandwidth, whole-pool
capacity, evicted to the byte. The private slices are worked out here on their own, not by the ghosts that
lending keeps, so they also judge those.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pool_model import BYTES_PER_MS, FIXED_MS
from request_traces import CATALOGUE_BYTES, Trace

from packer.intensity import Intensity, Ranking, Shared, note_use
from packer.lending import Price, Shade, Slice, Terms

DAY_MS = 86_400_000
TENANTS = 8  # and the noisy one
SCAN_MODELS = 80
SCAN_PAUSE_MS = 20_000


@dataclass(frozen=True, slots=True)
class Town:
    """The requests of all tenants. ``owners[m]`` is the tenant of model ``m``; the last one is noisy and
    asks for its models one after the other between ``scan_ms``."""

    at_ms: tuple[int, ...]
    models: tuple[int, ...]
    owners: tuple[int, ...]
    size_bytes: tuple[int, ...]
    scan_ms: tuple[int, int]

    @property
    def tenants(self) -> int:
        return TENANTS + 1


def town(trace: Trace, days: float, seed: int) -> Town:
    """The first days of a trace, its models dealt out to the tenants, with the scan in the third to the
    fifth of seven days (in proportion for fewer)."""
    rng = random.Random(seed)
    start_ms = trace.at_ms[0]
    order = list(range(len(trace.names)))
    rng.shuffle(order)
    owners = [0] * len(order)
    for place, model in enumerate(order):
        owners[model] = place % TENANTS
    sizes = list(trace.size_bytes) + [rng.choice(CATALOGUE_BYTES) for _ in range(SCAN_MODELS)]
    owners += [TENANTS] * SCAN_MODELS
    end_ms = int(days * DAY_MS)
    scan_ms = (end_ms * 2 // 7, end_ms * 5 // 7)
    asked = [(at - start_ms, model) for at, model in zip(trace.at_ms, trace.models, strict=True)]
    asked = [each for each in asked if each[0] < end_ms]
    for number, at_ms in enumerate(range(*scan_ms, SCAN_PAUSE_MS)):
        asked.append((at_ms, len(order) + number % SCAN_MODELS))
    asked.sort()
    return Town(
        tuple(at for at, _ in asked),
        tuple(model for _, model in asked),
        tuple(owners),
        tuple(sizes),
        scan_ms,
    )


def price(size_bytes: int) -> Price:
    """What restoring a model of this size costs, in whole milliseconds, all or part of it."""
    fixed_ms = int(FIXED_MS)
    return Price(fixed_ms, fixed_ms + round(size_bytes / BYTES_PER_MS))


def alone(town: Town, share_bytes: int) -> list[int]:
    """What each request would cost if its tenant had its share of the memory to itself: least recently
    used out first, to the byte."""
    held: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(town.tenants)]
    used = [0] * town.tenants
    cost_ms: list[int] = []
    for model in town.models:
        tenant, size = town.owners[model], town.size_bytes[model]
        mine = held[tenant]
        missing = size - mine.pop(model, 0)
        cost_ms.append(price(size).of(missing, size))
        mine[model] = size
        used[tenant] += missing
        while used[tenant] > share_bytes:
            oldest, nbytes = next(iter(mine.items()))
            taken = min(nbytes, used[tenant] - share_bytes)
            used[tenant] -= taken
            if taken == nbytes:
                del mine[oldest]
            else:
                mine[oldest] = nbytes - taken
    return cost_ms


@dataclass(slots=True, eq=False)
class _Model:
    number: int
    owner: int
    shade: Shade
    known: Intensity = field(default_factory=Intensity)
    last: int = -1


class Crowd:
    """The pool under one scheme. ``terms`` None: no lending; ``guarded``: reserved bytes stay with their
    tenant as long as it holds no more than them. ``ranked`` by ``keep`` or ``lru``."""

    def __init__(
        self, town: Town, capacity_bytes: int, ranked: str, guarded: bool = False, terms: Terms | None = None
    ) -> None:
        self._free_bytes = capacity_bytes
        self._share_bytes = capacity_bytes // town.tenants
        self._keep = ranked == "keep"
        self._guarded, self._terms = guarded, terms
        self._shared = Shared()
        self._models = []
        for number, (owner, size) in enumerate(zip(town.owners, town.size_bytes, strict=True)):
            self._models.append(_Model(number, owner, Shade(size, size, price=price(size))))
        self._held: dict[int, _Model] = {}
        self._used = [0] * town.tenants
        self.slices = [Slice() for _ in range(town.tenants)]
        for slice_ in self.slices if terms is not None else ():
            slice_.reserve(self._share_bytes, [])
        self._uses = 0

    def use(self, number: int, now_ms: int) -> int:
        """One request; returns what it cost."""
        model = self._models[number]
        shade, slice_ = model.shade, self.slices[model.owner]
        self._uses += 1
        model.last = self._uses
        if self._keep:
            note_use(model.known, self._shared, now_ms)
        if self._terms is not None:
            slice_.use(shade, self._terms)
        missing = shade.missing_bytes(shade.real_bytes)
        if not missing:
            return 0
        if missing > self._free_bytes:
            self._evict(missing - self._free_bytes, model, now_ms)
        cost_ms = shade.price.of(missing, shade.image_bytes)
        self._held[number] = model
        self._used[model.owner] += missing
        self._free_bytes -= missing
        if self._terms is not None:
            slice_.pay(shade, self._terms)
        else:
            shade.real_bytes = shade.size_bytes
        return cost_ms

    def _evict(self, need_bytes: int, wanted: _Model, now_ms: int) -> None:
        for victim in self._ranked(wanted, now_ms):
            if need_bytes <= 0:
                return
            taken = self._may_give(victim, need_bytes, wanted)
            if taken <= 0:
                continue
            left = victim.shade.real_bytes - taken
            if self._terms is not None:
                self.slices[victim.owner].keep(victim.shade, left)
            else:
                victim.shade.real_bytes = left
            self._used[victim.owner] -= taken
            self._free_bytes += taken
            need_bytes -= taken
            if not left:
                del self._held[victim.number]
        if need_bytes > 0:
            raise AssertionError(f"{need_bytes} bytes are nobody's to give: the scheme starves its tenants")

    def _ranked(self, wanted: _Model, now_ms: int) -> list[_Model]:
        others = [model for model in self._held.values() if model is not wanted]
        if not self._keep:
            return sorted(others, key=lambda model: model.last)
        rates = Ranking(self._shared, now_ms).rates([model.known for model in others])
        valued = []
        for model, rate in zip(others, rates, strict=True):
            held = model.shade.real_bytes
            # Of a model that is held in part the fixed cost is lost already.
            gain_ms = (FIXED_MS if held == model.shade.size_bytes else 0.0) + held / BYTES_PER_MS
            valued.append((rate * gain_ms / held * self.slices[model.owner].weight, model.number, model))
        valued.sort()
        return [model for _, _, model in valued]

    def _may_give(self, victim: _Model, need_bytes: int, wanted: _Model) -> int:
        """How many of its bytes the scheme allows to take."""
        shade = victim.shade
        most = min(shade.real_bytes, need_bytes)
        if self._terms is not None:
            slice_ = self.slices[victim.owner]
            spared = slice_.spared_bytes(shade, need_bytes, slice_.may_open_ms(self._terms))
            return min(most, shade.real_bytes - spared)
        if self._guarded and victim.owner != wanted.owner:
            return min(most, self._used[victim.owner] - self._share_bytes)
        return most


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a scheme cost: mean seconds per request of all, of the tenants beside the noisy one during the
    scan and outside of it; the dearest tenant's cost over its private slice's; the most that any tenant was
    ever behind its private slice, in seconds."""

    all_s: float
    scan_s: float
    calm_s: float
    worst_ratio: float
    debt_s_max: float


def judge(town: Town, costs_ms: Sequence[int], alone_ms: Sequence[int]) -> Outcome:
    """Compare what each request cost with what it would have cost its tenant alone."""
    real, private = [0] * town.tenants, [0] * town.tenants
    sums = {True: [0, 0], False: [0, 0]}
    debt_ms_max = 0
    requests = zip(town.at_ms, town.models, costs_ms, alone_ms, strict=True)
    for at_ms, model, cost_ms, private_ms in requests:
        tenant = town.owners[model]
        real[tenant] += cost_ms
        private[tenant] += private_ms
        debt_ms_max = max(debt_ms_max, real[tenant] - private[tenant])
        if tenant != TENANTS:
            part = sums[town.scan_ms[0] <= at_ms < town.scan_ms[1]]
            part[0] += cost_ms
            part[1] += 1
    ratios = [mine / theirs for mine, theirs in zip(real, private, strict=True) if theirs]
    means = {scanning: total / max(count, 1) / 1000 for scanning, (total, count) in sums.items()}
    all_s = sum(costs_ms) / max(len(costs_ms), 1) / 1000
    return Outcome(all_s, means[True], means[False], max(ratios, default=0.0), debt_ms_max / 1000)
