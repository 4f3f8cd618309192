"""What the agent may read of a node's core: views of models and tenants, bytes used, restore estimates.

Covers: read-only values made from the state. Does not cover: changing anything (``residency``).
"""

from __future__ import annotations

from dataclasses import dataclass

from packer import room
from packer.ledger import CopyState, Model, Node, State
from packer.lending import LendingView
from packer.quota import Tenant
from packer.rates import RateView
from packer.types import ModelRef, Tier


@dataclass(frozen=True, slots=True)
class ModelView:
    """Where a version stands on this node. ``device`` is its place: of a gang the names of its devices, and
    ``shares`` what it holds on each."""

    state: State
    device: str | None
    leases: int
    waiting: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    packed: bool = False  # the pack on disk is complete
    workspace_bytes: int = 0  # what requests need beside the weights, as measured or first estimated
    workspace_measured: bool = False
    resident_chunks: int = 0  # of those in its spec, from the first on; coming and going ones included
    shares: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TenantView:
    """What a tenant holds and may still do; ``rates`` has those that are limited."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    in_flight: int
    rates: tuple[RateView, ...]
    lending: LendingView


def device_bytes_used(node: Node, device: str) -> int:
    """Bytes held on a device: weights and workspace, those coming and going included."""
    known = node.devices.get(device)
    return known.account.used_bytes if known is not None else 0


def tier_bytes_used(node: Node, tier: Tier) -> int:
    """Bytes held in a tier, those coming and going included; of all devices for ``Tier.DEVICE``."""
    if tier is Tier.DEVICE:
        return sum(device.account.used_bytes for device in node.devices.values())
    return node.account(tier).used_bytes if tier is not Tier.ORIGIN else 0


def model_view(node: Node, ref: ModelRef) -> ModelView | None:
    """None when the node knows nothing of this version."""
    model = node.models.get(ref)
    if model is None:
        return None
    return ModelView(
        state=model.state,
        device=model.device.name if model.device is not None else None,
        leases=model.leases,
        waiting=len(model.waiters),
        device_bytes=model.device_bytes,
        host_bytes=model.host.held_bytes,
        disk_bytes=model.disk.held_bytes,
        packed=model.disk.state is CopyState.HELD,
        workspace_bytes=model.workspace_bytes,
        workspace_measured=model.measured_bytes is not None,
        resident_chunks=model.resident_chunks,
        shares=_shares(model),
    )


def _shares(model: Model) -> tuple[tuple[str, int], ...]:
    members = model.device.members if model.device is not None else ()
    return tuple((member.name, share) for member, share in zip(members, model.shares, strict=True))


def tenant_view(node: Node, tenant: str, now_ms: int) -> TenantView | None:
    """None when the node knows nothing of this tenant."""
    known = node.tenants.get(tenant)
    if known is None:
        return None
    return TenantView(
        device_bytes=known.device.used_bytes,
        host_bytes=known.host.used_bytes,
        disk_bytes=known.disk.used_bytes,
        in_flight=known.in_flight,
        rates=tuple(known.rates.views(now_ms)),
        lending=_lending_view(node, known),
    )


def rate_views(node: Node, tenant: str, now_ms: int) -> tuple[RateView, ...]:
    """The rates of a tenant that are limited; none of one that the node does not know."""
    known = node.tenants.get(tenant)
    return tuple(known.rates.views(now_ms)) if known is not None else ()


def _lending_view(node: Node, tenant: Tenant) -> LendingView:
    slice_, account = tenant.slice, tenant.device
    beyond = account.kept_bytes - account.reserved_bytes
    # What is free, or within another's own reserve, is not lent.
    free_bytes = others_bytes = 0
    if beyond < 0:
        for device in node.devices.values():
            free_bytes += max(-device.account.short_bytes(0), 0)
        for other in node.tenants.values():
            if other is not tenant:
                others_bytes += max(other.device.kept_bytes - other.device.reserved_bytes, 0)
    return LendingView(
        debt_ms=slice_.debt_ms,
        lent_bytes=min(max(-beyond - free_bytes, 0), others_bytes),
        borrowed_bytes=max(beyond, 0),
        excused_ms=slice_.excused_ms,
        protected=slice_.reserved_bytes > 0 and not slice_.may_open_ms(node.terms),
    )


def debts(node: Node) -> dict[str, int]:
    """By tenant, what it owes in cold milliseconds (negative: its credit), which must outlive a restart."""
    return {name: tenant.slice.debt_ms for name, tenant in node.tenants.items() if tenant.slice.debt_ms}


def spent(node: Node, now_ms: int) -> dict[str, tuple[int, int]]:
    """By tenant, tokens and device milliseconds that are owed and must outlive a restart."""
    owed = ((name, tenant.rates.spent(now_ms)) for name, tenant in node.tenants.items())
    return {name: each for name, each in owed if any(each)}


def restore_ms_estimate(node: Node, ref: ModelRef) -> int:
    """Expected time until this version could answer: 0 when resident or unknown."""
    model = node.models.get(ref)
    if model is None or model.state is State.RESIDENT:
        return 0
    return room.restore_ms(node, model)
