"""Quotas: read with the use that the nodes last reported, and change some fields.

Control stores and shows quotas; nodes enforce them (``packer/quota.py``). A quota holds on each node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from control.catalog import PutQuota
from control.routes.access import Access, Caller, Route, read_json, tenant_of
from control.state import Control
from packer.http import json_response
from packer.types import BadValue, ByteQuota, TenantQuota
from packer.wire import TenantReport

# 1 PiB: above any tier of any node, and far below what a 64-bit sum could overflow with.
QUOTA_BYTES_MAX = 2**50
RATE_MAX = 1_000_000
CONCURRENCY_MAX = 10_000
WEIGHT_MAX = 1_000
PRIORITY_MAX = 100

Bytes = Annotated[int, msgspec.Meta(ge=0, le=QUOTA_BYTES_MAX)]


class BytesAsk(msgspec.Struct, forbid_unknown_fields=True):
    reserved: Bytes | UnsetType = UNSET
    max: Bytes | UnsetType | None = UNSET


class QuotaAsk(msgspec.Struct, forbid_unknown_fields=True):
    """The fields to change; null takes a limit away."""

    device: BytesAsk | UnsetType = UNSET
    host: BytesAsk | UnsetType = UNSET
    disk: BytesAsk | UnsetType = UNSET
    requests_per_minute: Annotated[int, msgspec.Meta(ge=1, le=RATE_MAX)] | UnsetType | None = UNSET
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=CONCURRENCY_MAX)] | UnsetType | None = UNSET
    weight: Annotated[int, msgspec.Meta(ge=1, le=WEIGHT_MAX)] | UnsetType = UNSET
    priority: Annotated[int, msgspec.Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] | UnsetType = UNSET


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


@dataclass(frozen=True, slots=True)
class QuotaAnswer:
    tenant: str
    quota: TenantQuota
    usage: Sequence[Usage]


def merge(quota: TenantQuota, ask: QuotaAsk) -> TenantQuota:
    """The quota with the given fields changed. Raises ``BadValue``."""

    def kept(new: int | UnsetType | None, old: int | None) -> int | None:
        return old if isinstance(new, UnsetType) else new

    return TenantQuota(
        device=_merge_bytes("device", quota.device, ask.device),
        host=_merge_bytes("host", quota.host, ask.host),
        disk=_merge_bytes("disk", quota.disk, ask.disk),
        requests_per_minute=kept(ask.requests_per_minute, quota.requests_per_minute),
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


def _answer(control: Control, tenant: str) -> QuotaAnswer:
    usage = [
        _usage(view.node, report)
        for view in control.cluster.nodes.values()
        if view.report is not None
        for report in view.report.tenants
        if report.tenant == tenant
    ]
    return QuotaAnswer(tenant, control.catalog.quotas[tenant], usage)


def _usage(node: str, report: TenantReport) -> Usage:
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
    )


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
    return json_response(_answer(control, tenant))


async def change(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant_of(control, caller, request.match_info["tenant"])
    ask = await read_json(control, request, caller, QuotaAsk)
    async with control.writing:
        tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
        quota = merge(control.catalog.quotas[tenant], ask)
        await control.write([PutQuota(tenant, quota)])
    control.record("quota_set", tenant=tenant, detail=f"by key {caller.key_id}")
    return json_response(_answer(control, tenant))


ROUTES = (
    Route("GET", "/api/v1/tenants/{tenant}/quota", Access.CALLER, show),
    Route("PATCH", "/api/v1/tenants/{tenant}/quota", Access.OPERATOR, change),
)
