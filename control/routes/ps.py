"""What the fleet does now (``bunk ps``) and did (``bunk events``).

``ps`` reads the reports that nodes sent last, in memory; nothing is asked of a node or of the
database. Events are records that nodes delivered, and control's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from control.routes.access import Access, Caller, Route, own_tenant_filter, whole_number
from control.state import Control
from control.store import EVENTS_PAGE_MAX, Event
from packer.http import json_response
from packer.types import BadValue, parse_ref
from packer.wire import DeviceReport, ModelReport, RestoreReport

EVENTS_PAGE_DEFAULT = 100
EVENT_ID_MAX = 2**53


@dataclass(frozen=True, slots=True)
class PsItem:
    """One version on one node."""

    node: str
    tenant: str
    name: str
    ref: str
    state: str
    device: str | None
    leases: int
    waiting: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    requests: int
    answers: int
    restores: Sequence[RestoreReport]
    last_used_ms: int
    restore_ms_estimate: int
    workspace_bytes: int  # what requests need beside the weights
    workspace_measured: bool  # False: the first estimate
    deduplicated_bytes: int  # of the image, not in the pack's file because an equal chunk is stored


@dataclass(frozen=True, slots=True)
class PsDevice:
    """One device of one node."""

    node: str
    device: str
    kind: str
    name: str
    budget_bytes: int
    used_bytes: int
    foreign_bytes: int
    healthy: bool


@dataclass(frozen=True, slots=True)
class PsAnswer:
    items: Sequence[PsItem]
    devices: Sequence[PsDevice]


@dataclass(frozen=True, slots=True)
class EventsAnswer:
    """``next`` is what to give as ``after`` to read on."""

    items: Sequence[Event]
    next: int


async def ps(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = own_tenant_filter(control, request, caller)
    items: list[PsItem] = []
    devices: list[PsDevice] = []
    for view in sorted(control.cluster.nodes.values(), key=lambda view: view.node):
        if view.report is None:
            continue
        found = (_item(view.node, report) for report in view.report.models)
        items += [item for item in found if item is not None and tenant in (None, item.tenant)]
        if tenant is None:
            # How full a device is tells a tenant about others.
            devices += [_device(view.node, report) for report in view.report.devices]
    return json_response(PsAnswer(sorted(items, key=lambda item: (item.ref, item.node)), devices))


def _item(node: str, report: ModelReport) -> PsItem | None:
    try:
        ref = parse_ref(report.ref)
    except BadValue:
        return None  # a node that reports nonsense must not break the list
    return PsItem(
        node,
        ref.tenant,
        ref.name,
        report.ref,
        report.state,
        report.device,
        report.leases,
        report.waiting,
        report.device_bytes,
        report.host_bytes,
        report.disk_bytes,
        report.requests,
        report.answers,
        report.restores,
        report.last_used_ms,
        report.restore_ms_estimate,
        report.workspace_bytes,
        report.workspace_measured,
        report.deduplicated_bytes,
    )


def _device(node: str, report: DeviceReport) -> PsDevice:
    return PsDevice(
        node,
        report.device,
        report.kind,
        report.name,
        report.budget_bytes,
        report.used_bytes,
        report.foreign_bytes,
        report.healthy,
    )


async def events(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """Records after an id, oldest first; without ``after`` the newest page."""
    tenant = own_tenant_filter(control, request, caller)
    limit = whole_number(request, "limit", EVENTS_PAGE_DEFAULT, EVENTS_PAGE_MAX)
    newest = "after" not in request.query
    after = whole_number(request, "after", 0, EVENT_ID_MAX)
    # A tenant of this name may have existed before; what happened then is not this one's business.
    since_ms = control.catalog.tenants[tenant].created_ms if tenant is not None else 0
    found = await control.read(lambda store: store.events(after, limit, tenant, since_ms, newest))
    return json_response(EventsAnswer(found, found[-1].id if found else after))


ROUTES = (
    Route("GET", "/api/v1/ps", Access.CALLER, ps, stays=False),
    Route("GET", "/api/v1/events", Access.CALLER, events, stays=False),
)
