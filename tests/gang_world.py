"""A world in which some models need several devices, and plans change how many.

Covers: drawing gangs and changing the number of their devices. Does not cover: what happens to them
(``simulation``, ``simulated_hands``) or judging it (``judges``).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from simulation import World

from packer.types import MIB, ModelRef


class GangWorld(World):
    """Several devices of which most models need more than one."""

    prefetch_each = 4

    def _draw(self) -> None:
        self.gangs = Random(self.seed)
        super()._draw()
        self.budgets = {
            f"cpu:{i}": self.gangs.randrange(40, 140) * MIB for i in range(self.gangs.choice((2, 3, 4)))
        }
        self.seen_budgets = dict(self.budgets)
        self.healthy = dict.fromkeys(self.budgets, True)

    def _add_spec(self, tenant: str, i: int) -> None:
        super()._add_spec(tenant, i)
        ref = list(self.models)[-1]
        spec = self.models[ref]
        chunks = len(spec.chunk_bytes)
        cuts = (
            tuple(sorted(self.gangs.sample(range(1, chunks), self.gangs.randrange(chunks))))
            if chunks > 1
            else ()
        )
        self.models[ref] = spec = replace(spec, cuts=cuts)
        self.models[ref] = replace(spec, devices=self._devices(ref))

    def _devices(self, ref: ModelRef) -> int:
        """A number that it can be cut into."""
        wanted = self.gangs.choice((1, 2, 2, 3, 4))
        return next(count for count in range(wanted, 0, -1) if count == 1 or self._can_be(ref, count))

    def _can_be(self, ref: ModelRef, devices: int) -> bool:
        return bool(self.models[ref].cuts) and min(self.runs_of(ref, devices)) > 0

    def _change_plan(self) -> None:
        ref = self.gangs.choice(list(self.models))
        devices = self._devices(ref)
        if ref in self.planned and devices != self.models[ref].devices:
            stay = self.stays.get(ref)
            self.reached["regrouped while on a device"] += stay is not None
            self.reached["a part was to become a gang"] += stay is not None and stay.state == "partial"
            self.models[ref] = self.planned[ref] = replace(self.models[ref], devices=devices)
        super()._change_plan()
