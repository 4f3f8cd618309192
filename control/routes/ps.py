"""What the fleet does now (``bunk ps``) and did (``bunk events``).

``ps`` reads the reports that nodes sent last, in memory; nothing is asked of a node or of the
database. Events are records that nodes delivered, and control's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import msgspec
from aiohttp import web

from control.operations import Given, Operation, Result
from control.pages import PAGED, Position, asked_page, page_of
from control.routes.access import Access, Caller, Route, own_tenant_filter, whole_number
from control.routes.models import OF_TENANT
from control.state import Control
from control.store import Event
from packer.http import json_response
from packer.types import BadValue, parse_ref
from packer.wire import DeviceReport, DeviceShare, ModelReport, RestoreReport

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
    shares: Sequence[DeviceShare]  # of a model on several devices, what is on each


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
    """A page of both: first all versions by name, then all devices by node."""

    items: Sequence[PsItem]
    devices: Sequence[PsDevice]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class EventsAnswer:
    """`next` is what to give as `after` to read on, now or when more has happened; `next_cursor` is null when
    there is no more now."""

    items: Sequence[Event]
    next: int
    next_cursor: str | None


async def ps(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = own_tenant_filter(control, request, caller)
    asked = asked_page(request, tenant, parts=3)
    rows = list(islice(_rows(control, tenant, asked.after or ("", "", "")), asked.limit + 1))
    page = page_of(asked, rows, _position, lambda row: row)
    return json_response(
        PsAnswer(
            [row for row in page.items if isinstance(row, PsItem)],
            [row for row in page.items if isinstance(row, PsDevice)],
            page.next_cursor,
        )
    )


def _rows(control: Control, tenant: str | None, after: Position) -> Iterator[PsItem | PsDevice]:
    """What follows on a position, in order. A fleet has a row for each version and node: no more is looked at
    than is read, and for a tenant nothing of others but the names of what nodes have."""
    views = [view for _, view in sorted(control.cluster.nodes.items()) if view.report is not None]
    for text in _versions(control, tenant):
        if text < after[1] or after[0] > "0":
            continue
        for view in views:
            known = view.by_ref.get(text)
            if known is not None and ("0", text, view.node) > after:
                item = _item(view.node, known)
                if item is not None:
                    yield item
    if tenant is not None:
        return  # how full a device is tells a tenant about others
    for view in views:
        for report in sorted(view.report.devices if view.report else (), key=lambda report: report.device):
            if ("1", view.node, report.device) > after:
                yield _device(view.node, report)


def _versions(control: Control, tenant: str | None) -> Sequence[str]:
    """What there is, and what nodes still have of what was deleted."""
    catalog, own = control.catalog, f"{tenant}/" if tenant is not None else ""
    there = catalog.models if tenant is None else catalog.of_tenant.get(tenant, ())
    texts = dict.fromkeys(map(str, there))
    for where in (control.cluster.near, control.cluster.kept):
        texts |= dict.fromkeys(text for text in where if text.startswith(own))
    return sorted(texts)


def _position(row: PsItem | PsDevice) -> Position:
    if isinstance(row, PsItem):
        return "0", row.ref, row.node
    return "1", row.node, row.device


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
        report.shares,
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
    asked = asked_page(request, tenant, parts=1)
    newest = "after" not in request.query and asked.after is None
    after = whole_number(request, "after", 0, EVENT_ID_MAX)
    if asked.after is not None:
        after = _event_id(asked.after[0])
    # A tenant of this name may have existed before; what happened then is not this one's business.
    since_ms = control.catalog.tenants[tenant].created_ms if tenant is not None else 0
    found = await control.read(lambda store: store.events(after, asked.limit, tenant, since_ms, newest))
    last = found[-1].id if found else after
    more = not newest and len(found) == asked.limit
    return json_response(EventsAnswer(found, last, asked.cursor((str(last),)) if more else None))


def _event_id(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 16:
        raise BadValue("cursor", "is not one that this list gave; leave it out to start at the first page")
    return int(text)


ROUTES = (
    Route(
        "GET",
        "/api/v1/ps",
        Access.CALLER,
        ps,
        stays=False,
        operation=Operation(
            "listPlacements",
            "Where every version is now, and for operators how full devices are.",
            [Result(200, "A page.", PsAnswer)],
            takes=(*PAGED, OF_TENANT),
            refusals={404: "There is no such tenant, or it is not yours."},
        ),
    ),
    Route(
        "GET",
        "/api/v1/events",
        Access.CALLER,
        events,
        stays=False,
        operation=Operation(
            "listEvents",
            "What happened, oldest first; the newest page without `after` and `cursor`.",
            [Result(200, "A page.", EventsAnswer)],
            takes=(
                *PAGED,
                Given(
                    "after",
                    Annotated[int, msgspec.Meta(ge=0, le=EVENT_ID_MAX)],
                    "Only what came after the event of this id.",
                ),
                OF_TENANT,
            ),
            refusals={404: "There is no such tenant, or it is not yours."},
        ),
    ),
)
