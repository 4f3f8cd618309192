"""What tenants used, as nodes delivered it: the table that is charged by.

Covers: reading it in pages, an operator's view of all tenants and a tenant's of its own. Does not cover: the
tables (``control.usage_tables``), or what is used now against a limit (``control.routes.quotas``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from aiohttp import web

from control.operations import Given, Operation, Result
from control.pages import PAGED, Position, asked_page
from control.routes.access import Access, Caller, Route, own_tenant_filter, whole_number
from control.routes.models import OF_TENANT
from control.state import Control
from control.usage_tables import Span, UsageAsk
from packer.http import json_response
from packer.types import BadValue
from packer.usage import KEY_MARK, UsageRow, hour_of

# As a number in a browser.
TIME_MS_MAX = 2**53
TimeMs = Annotated[int, msgspec.Meta(ge=0, le=TIME_MS_MAX)]


@dataclass(frozen=True, slots=True)
class UsageItem:
    """What was used of one model, or with one key, in a span that begins at ``begin_ms`` (0: in all)."""

    tenant: str
    model: str  # its name; empty: device time of answers whose callers had left, and where it is by key
    key_id: str  # by key: the id of the key, of one that is revoked by now as well; else empty
    begin_ms: int
    requests: int  # that were let in
    answers: int  # of these, the ones that went well to their end
    prompt_tokens: int
    completion_tokens: int
    device_ms: int
    restored_host_bytes: int  # moved to a device from the host tier
    restored_disk_bytes: int
    restored_origin_bytes: int


@dataclass(frozen=True, slots=True)
class UsageAnswer:
    """A page of it by tenant, model and time."""

    items: Sequence[UsageItem]
    next_cursor: str | None


async def usage(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = own_tenant_filter(control, request, caller)
    asked = asked_page(request, tenant, parts=3)
    since_ms = hour_of(whole_number(request, "since_ms", 0, TIME_MS_MAX))
    until_ms = whole_number(request, "until_ms", TIME_MS_MAX, TIME_MS_MAX)
    after = _after(asked.after) if asked.after is not None else None
    wanted = UsageAsk(_span(request), since_ms, until_ms, tenant, after, asked.limit)
    found = await control.read(lambda store: store.usage(wanted))
    last = found[-1] if len(found) == asked.limit else None
    more = asked.cursor((last.tenant, last.model, str(last.hour_ms))) if last is not None else None
    return json_response(UsageAnswer([_item(row) for row in found], more))


def _span(request: web.Request) -> Span:
    text = request.query.get("by", Span.TOTAL.value)
    if text not in {span.value for span in Span}:
        raise BadValue("by", f"must be one of {', '.join(span.value for span in Span)}")
    return Span(text)


def _after(position: Position) -> tuple[str, str, int]:
    tenant, model, begin = position
    if not begin.isascii() or not begin.isdecimal() or len(begin) > 16:
        raise BadValue("cursor", "is not one that this list gave; leave it out to start at the first page")
    # A caller's cursor may hold what is no valid text for the database.
    tenant, model = (each.encode("utf-8", "replace").decode() for each in (tenant, model))
    return tenant, model, int(begin)


def _item(row: UsageRow) -> UsageItem:
    used = row.used
    of_key = row.model.startswith(KEY_MARK)
    return UsageItem(
        row.tenant,
        "" if of_key else row.model,
        row.model.removeprefix(KEY_MARK) if of_key else "",
        row.hour_ms,
        used.requests,
        used.answers,
        used.prompt_tokens,
        used.completion_tokens,
        used.device_ms,
        used.restored_host_bytes,
        used.restored_disk_bytes,
        used.restored_origin_bytes,
    )


ROUTES = (
    Route(
        "GET",
        "/api/v1/usage",
        Access.CALLER,
        usage,
        stays=False,
        operation=Operation(
            "listUsage",
            "What was used, by tenant, model and time. Nodes deliver it every few seconds; what is older "
            "than 8 days is kept by the day (UTC), and for 400 days. It is deleted with its tenant.",
            [Result(200, "A page.", UsageAnswer)],
            takes=(
                *PAGED,
                OF_TENANT,
                Given(
                    "by",
                    Span,
                    "What one row is of: `hour`, `day`, `key` (of all models) or, without it, `total`.",
                ),
                Given("since_ms", TimeMs, "Only from the hour on that this lies in (Unix time, UTC)."),
                Given("until_ms", TimeMs, "Only hours that began before."),
            ),
            refusals={404: "There is no such tenant, or it is not yours."},
        ),
    ),
)
