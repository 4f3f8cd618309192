"""What a simulation found: the tally that it keeps, and the figures that follow from it.

Covers: cold seconds (mean, median, 99th percentile), hits by tier, bytes moved and rejected, refusals, and
all of it by tenant. Does not cover: printing (``control.simulate_command``).

A request is cold when it waited for anything but its own answer; all others count 0 seconds. Percentiles and
means are over the requests that were answered; the refused ones stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from packer.events import RefusalReason
from packer.fleet import Fleet
from packer.simulated_turns import Waited
from packer.traces import Sized
from packer.types import Tier

TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.ORIGIN)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all requests, or of one tenant's."""

    requests: int
    refused: int
    cold_s_mean: float
    cold_s_p50: float
    cold_s_p99: float
    cold_s_most: float
    # Shares of the answered requests by where the weights were when they came.
    hit_shares: dict[str, float]
    rejected_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole simulation. ``cold`` is (model, when asked in ms, cold ms) of every cold request, in the order
    of their grants. ``regret``: the mean over the least possible one; 0 when that is 0."""

    fleet: Fleet
    all: Figures
    tenants: dict[str, Figures]
    models: int
    moved_bytes: dict[str, int]
    refusals: dict[str, int]
    least_cold_s_mean: float
    regret: float
    steps: int
    # Where the fleet says how many requests for a model run at once; else nobody waits for others.
    waited: Waited | None = None
    cold: tuple[tuple[int, int, int], ...] = field(repr=False, default=())


def percentile(ordered: Sequence[int], zeros: int, share: float) -> int:
    """Of values in order, beside ``zeros`` that are 0 and left out: what ``share`` of all stay below."""
    total = zeros + len(ordered)
    if not total:
        return 0
    place = min(int(share * total), total - 1) - zeros
    return ordered[place] if place >= 0 else 0


class Tally:
    """Counts by model, kept while the trace runs."""

    def __init__(self, models: int) -> None:
        self.hits = [0] * models  # answered at once
        self.cold: list[tuple[int, int, int]] = []
        self.by_tier: dict[Tier, list[int]] = {tier: [0] * models for tier in TIERS}
        self.refused = [0] * models
        self.rejected_bytes = [0] * models
        self.refusals: dict[str, int] = {}
        self.moved_bytes: dict[Tier, int] = {}

    def note_grant(self, model: int, cold_ms: int, tier: Tier, at_ms: int) -> None:
        self.by_tier[tier][model] += 1
        if cold_ms or tier is not Tier.DEVICE:
            self.cold.append((model, at_ms, cold_ms))
        else:
            self.hits[model] += 1
            self.by_tier[tier][model] -= 1

    def note_refusal(self, model: int, reason: RefusalReason, size_bytes: int) -> None:
        self.refused[model] += 1
        self.rejected_bytes[model] += size_bytes
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def outcome(
        self,
        fleet: Fleet,
        catalog: Sequence[Sized],
        least_ms: float,
        steps: int,
        waited: Waited | None = None,
    ) -> Outcome:
        numbers: dict[str, list[int]] = {}
        for number, sized in enumerate(catalog):
            numbers.setdefault(sized.tenant, []).append(number)
        colds: list[list[int]] = [[] for _ in catalog]
        for model, _, cold_ms in self.cold:
            colds[model].append(cold_ms)
        whole = self._figures(range(len(catalog)), colds)
        least_s = least_ms / 1000 / max(whole.requests, 1)
        return Outcome(
            fleet=fleet,
            all=whole,
            tenants={name: self._figures(mine, colds) for name, mine in sorted(numbers.items())},
            models=len(catalog),
            moved_bytes={tier.value: self.moved_bytes.get(tier, 0) for tier in TIERS[1:]},
            refusals=dict(sorted(self.refusals.items())),
            least_cold_s_mean=least_s,
            regret=whole.cold_s_mean / least_s if least_s else 0.0,
            steps=steps,
            waited=waited,
            cold=tuple(self.cold),
        )

    def _figures(self, models: Sequence[int], colds: Sequence[list[int]]) -> Figures:
        cold = sorted(cold_ms for model in models for cold_ms in colds[model])
        warm = sum(self.hits[model] for model in models)
        refused = sum(self.refused[model] for model in models)
        answered = warm + len(cold)
        by_tier = {tier: sum(self.by_tier[tier][model] for model in models) for tier in TIERS}
        by_tier[Tier.DEVICE] += warm
        return Figures(
            requests=answered + refused,
            refused=refused,
            cold_s_mean=sum(cold) / 1000 / max(answered, 1),
            cold_s_p50=percentile(cold, warm, 0.5) / 1000,
            cold_s_p99=percentile(cold, warm, 0.99) / 1000,
            cold_s_most=(cold[-1] if cold else 0) / 1000,
            hit_shares={tier.value: count / max(answered, 1) for tier, count in by_tier.items()},
            rejected_bytes=sum(self.rejected_bytes[model] for model in models),
        )
