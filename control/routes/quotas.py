"""Quotas: read with the use that the nodes last reported, and change some fields.

Control stores and shows quotas; nodes enforce them (``packer/quota.py``). Bytes hold on each node; rates,
concurrency and device time hold over all nodes, among which control divides them (``control/shares.py``).

A promise that no node could keep is refused. One that some node can not keep beside all others is taken
(nodes come and go), and every answer about it warns of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from control import etags
from control.catalog import PutQuota
from control.etags import CHANGED, IF_MATCH, IF_NONE_MATCH, SAME_TEXT, TAGGED
from control.operations import Operation, Result
from control.routes.access import Access, Caller, Route, read_json, tenant_of
from control.state import Control
from packer.rates import RateView
from packer.types import BadValue, ByteQuota, TenantQuota
from packer.wire import TenantReport

# 1 PiB: above any tier of any node, and far below what a 64-bit sum could overflow with.
QUOTA_BYTES_MAX = 2**50
RATE_MAX = 1_000_000
TOKENS_PER_MINUTE_MAX = 1_000_000_000
RESTORES_PER_MINUTE_MAX = 100_000
# 1,024 devices that work for one tenant without a pause.
DEVICE_SECONDS_PER_DAY_MAX = 1_024 * 86_400
CONCURRENCY_MAX = 10_000
WEIGHT_MAX = 1_000
PRIORITY_MAX = 100

Bytes = Annotated[int, msgspec.Meta(ge=0, le=QUOTA_BYTES_MAX)]
Requests = Annotated[int, msgspec.Meta(ge=1, le=RATE_MAX)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=TOKENS_PER_MINUTE_MAX)]
Restores = Annotated[int, msgspec.Meta(ge=1, le=RESTORES_PER_MINUTE_MAX)]
DeviceSeconds = Annotated[int, msgspec.Meta(ge=1, le=DEVICE_SECONDS_PER_DAY_MAX)]
Concurrency = Annotated[int, msgspec.Meta(ge=1, le=CONCURRENCY_MAX)]
Weight = Annotated[int, msgspec.Meta(ge=1, le=WEIGHT_MAX)]
Priority = Annotated[int, msgspec.Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]


class BytesAsk(msgspec.Struct, forbid_unknown_fields=True):
    reserved: Bytes | UnsetType = UNSET
    max: Bytes | UnsetType | None = UNSET


class QuotaAsk(msgspec.Struct, forbid_unknown_fields=True):
    """The fields to change; null takes a limit away."""

    device: BytesAsk | UnsetType = UNSET
    host: BytesAsk | UnsetType = UNSET
    disk: BytesAsk | UnsetType = UNSET
    requests_per_minute: Requests | UnsetType | None = UNSET
    tokens_per_minute: Tokens | UnsetType | None = UNSET
    restores_per_minute: Restores | UnsetType | None = UNSET
    device_seconds_per_day: DeviceSeconds | UnsetType | None = UNSET
    concurrency: Concurrency | UnsetType | None = UNSET
    weight: Weight | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class Lending:
    """How a tenant stands with its reserved device bytes on one node.

    A node of which more is promised than it has keeps a scaled reserve for each tenant: what it lends and
    what is borrowed there follow from others' promises. So a tenant's key is not told what is lent (null),
    and as borrowed what is beyond the reserve that its quota says.
    """

    debt_ms: int
    lent_bytes: int | None
    borrowed_bytes: int
    excused_ms: int
    protected: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What one node last reported of one tenant."""

    node: str
    tenant: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    in_flight: int
    requests: int
    answers: int
    refusals: int
    tokens: int
    device_ms: int
    rates: Sequence[RateView]
    lending: Lending


@dataclass(frozen=True, slots=True)
class QuotaAnswer:
    tenant: str
    quota: TenantQuota
    usage: Sequence[Usage]
    warnings: Sequence[str] = ()


def merge(quota: TenantQuota, ask: QuotaAsk) -> TenantQuota:
    """The quota with the given fields changed. Raises ``BadValue``."""

    def kept(new: int | UnsetType | None, old: int | None) -> int | None:
        return old if isinstance(new, UnsetType) else new

    return TenantQuota(
        device=_merge_bytes("device", quota.device, ask.device),
        host=_merge_bytes("host", quota.host, ask.host),
        disk=_merge_bytes("disk", quota.disk, ask.disk),
        requests_per_minute=kept(ask.requests_per_minute, quota.requests_per_minute),
        tokens_per_minute=kept(ask.tokens_per_minute, quota.tokens_per_minute),
        restores_per_minute=kept(ask.restores_per_minute, quota.restores_per_minute),
        device_seconds_per_day=kept(ask.device_seconds_per_day, quota.device_seconds_per_day),
        concurrency=kept(ask.concurrency, quota.concurrency),
        weight=quota.weight if isinstance(ask.weight, UnsetType) else ask.weight,
        priority=quota.priority if isinstance(ask.priority, UnsetType) else ask.priority,
    )


def _merge_bytes(tier: str, old: ByteQuota, ask: BytesAsk | UnsetType) -> ByteQuota:
    if isinstance(ask, UnsetType):
        return old
    reserved = old.reserved if isinstance(ask.reserved, UnsetType) else ask.reserved
    most = old.max if isinstance(ask.max, UnsetType) else ask.max
    if most is not None and reserved > most:
        raise BadValue(
            f"{tier}.reserved", f"{reserved} bytes reserved are more than the max of {most}; raise max too"
        )
    return ByteQuota(reserved, most)


def _answer(control: Control, caller: Caller, tenant: str) -> QuotaAnswer:
    quota = control.catalog.quotas[tenant]
    usage = [
        _usage(view.node, report, _lending(report, caller, quota))
        for view in control.cluster.nodes.values()
        if view.report is not None
        for report in view.report.tenants
        if report.tenant == tenant
    ]
    return QuotaAnswer(tenant, quota, usage, overpromised(control, caller, tenant, quota))


def _lending(report: TenantReport, caller: Caller, quota: TenantQuota) -> Lending:
    said = report.lending
    lent_bytes: int | None = said.lent_bytes
    borrowed_bytes = said.borrowed_bytes
    if not caller.is_operator:
        lent_bytes, borrowed_bytes = None, max(report.device_bytes - quota.device.reserved, 0)
    return Lending(said.debt_ms, lent_bytes, borrowed_bytes, said.excused_ms, said.protected)


def _usage(node: str, report: TenantReport, lending: Lending) -> Usage:
    return Usage(
        node,
        report.tenant,
        report.device_bytes,
        report.host_bytes,
        report.disk_bytes,
        report.in_flight,
        report.requests,
        report.answers,
        report.refusals,
        report.tokens,
        report.device_ms,
        report.rates,
        lending,
    )


_TIERS = ("device", "host", "disk")


def _reserved(quota: TenantQuota, tier: str) -> int:
    bytes_quota: ByteQuota = getattr(quota, tier)
    return bytes_quota.reserved


def _capacities(control: Control, tier: str) -> dict[str, int]:
    """What each node that reported has in a tier."""
    reports = {view.node: view.report for view in control.cluster.nodes.values() if view.report is not None}
    if tier == "host":
        return {node: report.host_budget_bytes for node, report in reports.items()}
    if tier == "disk":
        return {node: report.disk_budget_bytes for node, report in reports.items()}
    return {
        node: sum(device.budget_bytes for device in report.devices if device.healthy)
        for node, report in reports.items()
    }


def check_promises(control: Control, quota: TenantQuota, before: TenantQuota) -> None:
    """Raises ``BadValue`` when a new promise is above what any node has, so that none could keep it."""
    for tier in _TIERS:
        reserved, capacities = _reserved(quota, tier), _capacities(control, tier)
        if not capacities or reserved <= _reserved(before, tier):
            continue
        node = max(capacities, key=lambda name: (capacities[name], name))
        if reserved > capacities[node]:
            raise BadValue(
                f"{tier}.reserved",
                f"{reserved} bytes are more than any node has; the greatest is {node} with "
                f"{capacities[node]} bytes: reserve less, or let a greater node join first",
            )


def overpromised(control: Control, caller: Caller, tenant: str, quota: TenantQuota) -> list[str]:
    """Where a tenant does not get what is reserved for it, because more is promised than exists.

    What others are promised, and what a node has, is the operator's to know. A tenant hears that its reserve
    is not sure and no figure: a share of its own would tell what all others have reserved.
    """
    warnings = []
    for tier in _TIERS:
        if not _reserved(quota, tier):
            continue
        total = sum(_reserved(each, tier) for each in control.catalog.quotas.values())
        short = [(each, name) for name, each in _capacities(control, tier).items() if each < total]
        if short:
            capacity, node = min(short)
            why = "not every node can keep it beside what others are promised; ask the operator"
            if caller.is_operator:
                share = _reserved(quota, tier) * capacity // total
                why = (
                    f"all tenants together are promised {total} bytes and node {node} has {capacity}, so "
                    f"{tenant} is sure of {share} bytes there; reserve less, or add memory"
                )
            warnings.append(f"{tier}.reserved: {why}")
    return warnings


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
    return etags.read(request, _state(control, tenant), _answer(control, caller, tenant))


def _state(control: Control, tenant: str) -> tuple[int, TenantQuota]:
    """What an ETag is made of: the quota of this tenant, not of an earlier one of its name."""
    return control.catalog.tenants[tenant].created_ms, control.catalog.quotas[tenant]


async def change(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """PATCH changes the fields that are given, PUT sets all others to what a new tenant has."""
    tenant_of(control, caller, request.match_info["tenant"])
    ask = await read_json(control, request, caller, QuotaAsk)
    async with control.writing:
        tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
        etags.check_match(request, _state(control, tenant), lambda: _answer(control, caller, tenant))
        before = control.catalog.quotas[tenant]
        quota = merge(TenantQuota() if request.method == "PUT" else before, ask)
        check_promises(control, quota, before)
        await control.write([PutQuota(tenant, quota)])
    control.record("quota_set", tenant=tenant, detail=f"by key {caller.key_id}")
    return etags.tagged(_state(control, tenant), _answer(control, caller, tenant))


PATH = "/api/v1/tenants/{tenant}/quota"
ROUTES = (
    Route(
        "GET",
        PATH,
        Access.CALLER,
        show,
        operation=Operation(
            "showQuota",
            "A tenant's quota, and its use as each node last said it.",
            [Result(200, "The quota.", QuotaAnswer, headers=TAGGED), Result(304, SAME_TEXT)],
            takes=[IF_NONE_MATCH],
        ),
    ),
    Route(
        "PATCH",
        PATH,
        Access.OPERATOR,
        change,
        operation=Operation(
            "changeQuota",
            "Change the fields that are given and keep the rest.",
            [Result(200, "The quota as it is now.", QuotaAnswer, headers=TAGGED)],
            QuotaAsk,
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
    Route(
        "PUT",
        PATH,
        Access.OPERATOR,
        change,
        operation=Operation(
            "replaceQuota",
            "Set the quota; what is not given is as for a new tenant.",
            [Result(200, "The quota as it is now.", QuotaAnswer, headers=TAGGED)],
            QuotaAsk,
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
)
