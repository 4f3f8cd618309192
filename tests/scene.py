"""A scene for the residency core: one node, a clock, and short ways to say what happens.

Covers: building specs and plans, feeding events with the full check after each, and answering orders.
Does not cover: judging; the tests say what must follow.
"""

from __future__ import annotations

from typing import TypeVar

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
    Pack,
    Packed,
    Planned,
    Requested,
    Restore,
    Restored,
    TierBudgetSeen,
)
from packer.types import MIB, ByteQuota, ModelRef, ModelSpec, Task, TenantQuota, TenantSpec, Tier

Kind = TypeVar("Kind", bound=Action)
DEADLINE_MS = 60_000


def model(text: str, image_mib: int = 10, workspace_bytes: int = 0) -> ModelSpec:
    """A version of ``tenant/name`` whose weights take exactly ``image_mib``."""
    tenant, _, name = text.partition("/")
    nbytes = image_mib * MIB
    return ModelSpec(
        ModelRef(tenant, name, "0" * 16),
        "file:///models",
        (),
        "transformers",
        Task.EMBEDDING,
        nbytes,
        (nbytes,),
        workspace_bytes,
        0,
    )


def device_quota(reserved_mib: int = 0, max_mib: int | None = None) -> TenantQuota:
    return TenantQuota(device=ByteQuota(reserved_mib * MIB, None if max_mib is None else max_mib * MIB))


class Scene:
    """A node with devices of ``devices_mib`` and plenty of disk, and every model planned."""

    def __init__(
        self,
        *specs: ModelSpec,
        devices_mib: tuple[int, ...] = (100,),
        host_mib: int = 0,
        disk_mib: int = 10_000,
        quotas: dict[str, TenantQuota] | None = None,
    ) -> None:
        self.node = residency.Node()
        self.now_ms = 0
        self.requests = 0
        self.specs = specs
        self.quotas = quotas or {}
        self.feed(TierBudgetSeen(Tier.HOST, host_mib * MIB))
        self.feed(TierBudgetSeen(Tier.DISK, disk_mib * MIB))
        for i, mib in enumerate(devices_mib):
            self.feed(DeviceSeen(f"cpu:{i}", mib * MIB))
        self.plan(*specs)

    def feed(self, event: Event) -> list[Action]:
        actions = residency.step(self.node, event, self.now_ms)
        residency.check(self.node)
        residency.check(self.node, full=True)
        return actions

    def later(self, ms: int) -> Scene:
        self.now_ms += ms
        return self

    def plan(self, *specs: ModelSpec) -> list[Action]:
        names = sorted({spec.ref.tenant for spec in self.specs} | set(self.quotas))
        tenants = tuple(TenantSpec(name, self.quotas.get(name, TenantQuota())) for name in names)
        return self.feed(Planned(tenants, specs))

    def ask(self, spec: ModelSpec, deadline_ms: int = DEADLINE_MS, tokens: int = 0) -> list[Action]:
        """The next request, named r1, r2 and so on."""
        self.requests += 1
        return self.feed(Requested(f"r{self.requests}", spec.ref, self.now_ms + deadline_ms, tokens))

    def finish(self, number: int, device_ms: int = 0, tokens: int = 0) -> list[Action]:
        return self.feed(Finished(f"r{number}", device_ms, tokens))

    def restored(self, order: Restore, restore_ms: int = 100, filled: bool = False) -> list[Action]:
        return self.feed(Restored(order.ref, order.device, order.from_tier, restore_ms, filled, order.order))

    def evicted(self, order: Evict) -> list[Action]:
        return self.feed(Evicted(order.ref, order.device, order.order))

    def packed(self, order: Pack, mib: int = 5) -> list[Action]:
        return self.feed(Packed(order.ref, order.device, mib * MIB, mib * MIB, order.order))

    def packed_beside(self, order: Restore, mib: int = 5) -> list[Action]:
        """The pack that a load from the origin was to write is there."""
        assert order.disk_bytes
        return self.feed(Packed(order.ref, order.device, mib * MIB, mib * MIB, order.pack_order))

    def settle(self, actions: list[Action]) -> list[Action]:
        """Answer every restore, eviction, pack and drop well until nothing more follows."""
        seen = list(actions)
        todo = list(actions)
        while todo:
            action = todo.pop(0)
            match action:
                case Restore():
                    new = self.restored(action, filled=action.host_bytes > 0)
                    if action.disk_bytes:
                        new += self.packed_beside(action)
                case Evict():
                    new = self.evicted(action)
                case Pack():
                    new = self.packed(action)
                case Drop():
                    new = self.feed(Dropped(action.ref, action.tier, action.order))
                case _:
                    new = []
            todo += new
            seen += new
        return seen

    def warm(self, spec: ModelSpec) -> None:
        """Bring a model to its device and leave it there idle, packed."""
        self.settle(self.ask(spec))
        self.settle(self.finish(self.requests))
        assert self.state(spec) == "resident"

    def state(self, spec: ModelSpec) -> str | None:
        view = residency.model_view(self.node, spec.ref)
        return str(view.state) if view is not None else None

    def device(self, spec: ModelSpec) -> str | None:
        view = residency.model_view(self.node, spec.ref)
        return view.device if view is not None else None


def the(actions: list[Action], kind: type[Kind]) -> Kind:
    """The one action of this kind."""
    found = of(actions, kind)
    assert len(found) == 1, f"expected one {kind.__name__}: {actions}"
    return found[0]


def of(actions: list[Action], kind: type[Kind]) -> list[Kind]:
    return [action for action in actions if isinstance(action, kind)]
