"""A node's state as it goes to control with every beat, and as ``/metrics`` shows it.

Covers: reading the core's views and the counters into ``wire.Report``. Does not cover: sending it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent.accuracy import Accuracy
from agent.counters import Counters
from agent.devices import DeviceConfig
from agent.loop import Loop
from packer import residency
from packer.estimate import Rates, named_rates
from packer.lending import LendingView
from packer.types import HostForm, ModelRef, ModelSpec, Tier
from packer.wire import (
    AccuracyReport,
    CalibrationReport,
    DeviceReport,
    DeviceShare,
    ModelReport,
    RegretReport,
    Report,
    TenantReport,
    encode,
)


class ReportSource(Protocol):
    """What a report is made from."""

    counters: Counters
    loop: Loop
    started_ms: int
    gateway_url: str
    accuracy: Accuracy
    host_form: HostForm

    @property
    def rates(self) -> Rates | None: ...
    @property
    def regret(self) -> RegretReport | None: ...
    @property
    def peer_url(self) -> str: ...
    @property
    def route_url(self) -> str: ...
    @property
    def device_configs(self) -> tuple[DeviceConfig, ...]: ...
    @property
    def draining(self) -> bool: ...
    @property
    def specs(self) -> Sequence[ModelSpec]: ...
    @property
    def tenants(self) -> Sequence[str]: ...
    def foreign_bytes(self, device: str) -> int: ...
    def contexts_bytes(self, device: str) -> int: ...
    def budget_bytes(self, tier: Tier) -> int: ...
    def now_ms(self) -> int: ...
    def deduplicated_bytes(self, ref: ModelRef) -> int: ...


def build_report(node: ReportSource) -> Report:
    core = node.loop.core
    return Report(
        gateway_url=node.gateway_url,
        started_ms=node.started_ms,
        draining=node.draining,
        devices=tuple(_device(node, device) for device in node.device_configs),
        host_budget_bytes=node.budget_bytes(Tier.HOST),
        host_used_bytes=residency.tier_bytes_used(core, Tier.HOST),
        disk_budget_bytes=node.budget_bytes(Tier.DISK),
        disk_used_bytes=residency.tier_bytes_used(core, Tier.DISK),
        models=tuple(_model(node, spec) for spec in node.specs),
        tenants=tuple(_tenant(node, tenant) for tenant in node.tenants),
        peer_url=node.peer_url,
        calibration=_calibration(node),
        regret=encode(node.regret).decode() if node.regret is not None else "",
        route_url=node.route_url,
    )


def _calibration(node: ReportSource) -> str:
    """A ``CalibrationReport`` as JSON; empty before the node was measured."""
    rates = node.rates
    if rates is None:
        return ""
    report = CalibrationReport(
        measured_ms=rates.measured_ms,
        fingerprint=rates.fingerprint,
        host_form=node.host_form.value,
        kernels=rates.kernels,
        huge_pages=rates.huge_pages,
        others_percent=rates.others_percent,
        rates=named_rates(rates),
        accuracy=tuple(
            AccuracyReport(
                tier.value, seen.count, round(100 * seen.quantile(0.5)), round(100 * seen.quantile(0.95))
            )
            for tier, seen in sorted(node.accuracy.tiers.items())
        ),
    )
    return encode(report).decode()


def _device(node: ReportSource, device: DeviceConfig) -> DeviceReport:
    foreign_bytes = node.foreign_bytes(device.device)
    known = node.loop.core.devices.get(device.device)
    return DeviceReport(
        device=device.device,
        kind=device.kind,
        name=device.name,
        budget_bytes=max(0, device.budget_bytes - foreign_bytes - node.contexts_bytes(device.device)),
        used_bytes=residency.device_bytes_used(node.loop.core, device.device),
        foreign_bytes=foreign_bytes,
        healthy=known is None or known.healthy,
    )


def _model(node: ReportSource, spec: ModelSpec) -> ModelReport:
    count = node.counters.model(spec.ref)
    view = residency.model_view(node.loop.core, spec.ref)
    return ModelReport(
        ref=str(spec.ref),
        state=view.state if view else "absent",
        device=view.device if view else None,
        leases=view.leases if view else 0,
        waiting=view.waiting if view else 0,
        device_bytes=view.device_bytes if view else 0,
        host_bytes=view.host_bytes if view else 0,
        disk_bytes=view.disk_bytes if view else 0,
        requests=count.requests,
        answers=count.answers,
        restores=count.restore_reports(),
        last_used_ms=count.last_used_ms,
        restore_ms_estimate=residency.restore_ms_estimate(node.loop.core, spec.ref) if view else 0,
        packed=view.packed if view else False,
        deduplicated_bytes=node.deduplicated_bytes(spec.ref) if view is not None and view.packed else 0,
        workspace_bytes=view.workspace_bytes if view else 0,
        workspace_measured=view.workspace_measured if view else False,
        shares=tuple(DeviceShare(*share) for share in view.shares) if view else (),
    )


def _tenant(node: ReportSource, tenant: str) -> TenantReport:
    count = node.counters.tenant(tenant)
    view = residency.tenant_view(node.loop.core, tenant, node.now_ms())
    return TenantReport(
        tenant=tenant,
        device_bytes=view.device_bytes if view else 0,
        host_bytes=view.host_bytes if view else 0,
        disk_bytes=view.disk_bytes if view else 0,
        in_flight=view.in_flight if view else 0,
        requests=count.requests,
        answers=count.answers,
        refusals=count.refusals,
        tokens=count.tokens,
        device_ms=count.device_ms,
        rates=view.rates if view else (),
        lending=view.lending if view else LendingView(),
    )
