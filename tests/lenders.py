"""Tenants that share one node, and what each would pay alone on its reserved bytes: two books to compare.

Covers: drawing tenants, models and requests from a seed, playing them through a core whose orders are
carried out at once or some requests later, and a private slice per tenant that shares no code with the core.
Does not cover: faults, budgets that change and plans (``simulation``), or what must hold (``test_lending``).
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from types import ModuleType

from packer import residency
from packer.events import (
    Action,
    DeviceSeen,
    Drop,
    Dropped,
    Event,
    Evict,
    Evicted,
    Finished,
    Grant,
    Pack,
    Packed,
    PackFound,
    Planned,
    Refuse,
    Requested,
    Restore,
    Restored,
    TierBudgetSeen,
)
from packer.types import MIB, ByteQuota, ModelRef, ModelSpec, Task, TenantQuota, TenantSpec, Tier

FIXED_MS = 40
BYTES_PER_MS = MIB // 10
REQUESTS = 250
WORKSPACE_BYTES = MIB // 2


def restore_ms(missing_bytes: int) -> int:
    """What both books charge: something for every restore, and the rest by its bytes."""
    return FIXED_MS + missing_bytes // BYTES_PER_MS if missing_bytes > 0 else 0


@dataclass(slots=True)
class Alone:
    """A tenant's reserved bytes as a cache of its own: whole chunks, the longest unused tail goes first."""

    reserved_bytes: int
    chunks: OrderedDict[ModelRef, list[int]] = field(default_factory=OrderedDict)
    paid_ms: int = 0

    def use(self, spec: ModelSpec) -> None:
        """One request. The workspace takes room beside the last chunk and costs nothing."""
        whole = [*spec.chunk_bytes[:-1], spec.chunk_bytes[-1] + spec.workspace_bytes]
        held = self.chunks.pop(spec.ref, [])
        if len(held) < len(whole):
            self.paid_ms += restore_ms(spec.image_bytes - sum(spec.chunk_bytes[: len(held)]))
        self.chunks[spec.ref] = whole
        while sum(map(sum, self.chunks.values())) > self.reserved_bytes:
            oldest = next(iter(self.chunks))
            left = list(self.chunks[oldest])
            left.pop()
            if left:
                self.chunks[oldest] = left
            else:
                del self.chunks[oldest]


class Lenders:
    """One node with one device, no faults, every model packed on disk, and a fixed price per restore.

    ``in_flight`` requests run at a time: with 1, each ends before the next comes.
    """

    def __init__(
        self, seed: int, core: ModuleType = residency, in_flight: int = 1, margin_percent: int = 100
    ) -> None:
        self.rng = random.Random(seed)
        self.core = core
        price = vars(vars(core)["room"])["Price"]
        self.price = lambda node, model: price(FIXED_MS, restore_ms(model.spec.image_bytes))
        self.node = core.Node()
        self.node.terms = type(self.node.terms)(margin_percent)
        self.in_flight = in_flight
        self.now_ms = 0
        self.number = 0
        self.running: deque[str] = deque()
        self.orders: deque[Action] = deque()
        self.paid_ms: dict[str, int] = {}
        self.worst_ms: dict[str, int] = {}
        self.refused: list[Refuse] = []
        self.robbed = 0  # requests that alone would have been served
        self._draw()

    def _draw(self) -> None:
        rng = self.rng
        self.specs: list[ModelSpec] = []
        names = [f"t{i}" for i in range(rng.randrange(2, 5))]
        self.alone = {name: Alone(rng.choice((0, 8, 20, 35, 60)) * MIB) for name in names}
        for i in range(rng.randrange(4, 14)):
            count = rng.choice((1, 3, 8))
            chunks = tuple(rng.randrange(1, 60) * BYTES_PER_MS for _ in range(count))
            ref = ModelRef(rng.choice(names), f"m{i}", f"{i:016x}")
            self.specs.append(
                ModelSpec(ref, "file:///m", (), "e", Task.EMBEDDING, sum(chunks), chunks, WORKSPACE_BYTES, 0)
            )
        largest = max(spec.image_bytes + spec.workspace_bytes for spec in self.specs)
        promised = sum(alone.reserved_bytes for alone in self.alone.values())
        self.capacity_bytes = max(promised, largest) + rng.choice((0, 0, 10, 40)) * MIB
        # A favourite changes now and then, so that credit is earned in one phase and used in another.
        self.favourites = [rng.choice(self.specs) for _ in range(6)]

    # --- playing ----------------------------------------------------------------------------------

    def play(self) -> Lenders:
        self.feed(TierBudgetSeen(Tier.HOST, 0))
        self.feed(TierBudgetSeen(Tier.DISK, 100_000 * MIB))
        self.feed(DeviceSeen("cpu:0", self.capacity_bytes))
        tenants = tuple(
            TenantSpec(name, TenantQuota(device=ByteQuota(alone.reserved_bytes)))
            for name, alone in self.alone.items()
        )
        self.feed(Planned(tenants, tuple(self.specs)))
        for spec in self.specs:
            self.feed(PackFound(spec.ref, spec.image_bytes, spec.image_bytes))
        for step in range(REQUESTS):
            self.now_ms += self.rng.choice((1, 100, 5_000))
            self.ask(self._wanted(step))
        while self.running or self.orders:
            self._go_on()
        self.compare()
        return self

    def _wanted(self, step: int) -> ModelSpec:
        phase = self.favourites[step * len(self.favourites) // REQUESTS]
        if self.rng.random() < 0.5:
            mates = [spec for spec in self.specs if spec.ref.tenant == phase.ref.tenant]
            return self.rng.choice(mates)
        return self.rng.choice(self.specs)

    def ask(self, spec: ModelSpec) -> None:
        self.number += 1
        request = f"r{self.number}"
        refused = len(self.refused)
        self.feed(Requested(request, spec.ref, self.now_ms + 10**9))
        if len(self.refused) == refused:
            self.alone[spec.ref.tenant].use(spec)
        elif spec.image_bytes + spec.workspace_bytes <= self.alone[spec.ref.tenant].reserved_bytes:
            self.robbed += 1
        if self.in_flight == 1:
            while self.running or self.orders:
                self._go_on()
        else:
            for _ in range(self.rng.randrange(4)):
                self._go_on()
        while len(self.running) >= self.in_flight > 1:
            self._go_on()
        self.compare()

    def _go_on(self) -> None:
        """Carry out an order, or end a request."""
        if self.orders:
            self._carry_out(self.orders.popleft())
        elif self.running:
            self.feed(Finished(self.running.popleft()))

    def feed(self, event: Event) -> None:
        room = vars(self.core)["room"]
        before = room.price
        room.price = self.price
        try:
            actions = self.core.step(self.node, event, self.now_ms)
        finally:
            room.price = before
        self.core.check(self.node)
        for action in actions:
            if isinstance(action, Grant):
                self.running.append(action.request)
            elif isinstance(action, Refuse):
                self.refused.append(action)
            elif isinstance(action, Restore | Evict | Pack | Drop):
                self.orders.append(action)

    def _carry_out(self, order: Action) -> None:
        match order:
            case Restore():
                spec = next(spec for spec in self.specs if spec.ref == order.ref)
                cost_ms = restore_ms(spec.image_bytes - sum(spec.chunk_bytes[: order.first_chunk]))
                name = order.ref.tenant
                self.paid_ms[name] = self.paid_ms.get(name, 0) + cost_ms
                self.feed(Restored(order.ref, order.device, order.from_tier, cost_ms, False, order.order))
            case Evict():
                self.feed(Evicted(order.ref, order.device, order.order))
            case Pack():
                self.feed(Packed(order.ref, order.device, MIB, MIB, order.order))
            case Drop():
                self.feed(Dropped(order.ref, order.tier, order.order))

    # --- comparing --------------------------------------------------------------------------------

    def compare(self) -> None:
        """How much worse off every tenant that waits for nothing is now than alone."""
        for name, alone in self.alone.items():
            if not self.node.tenants[name].waiting:
                worse_ms = self.paid_ms.get(name, 0) - alone.paid_ms
                self.worst_ms[name] = max(self.worst_ms.get(name, 0), worse_ms)

    def excused_ms(self, name: str) -> int:
        return int(self.node.tenants[name].slice.excused_ms)
