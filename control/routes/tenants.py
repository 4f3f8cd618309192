"""Tenants: create, list, delete.

Deleting one removes its keys, versions and uploads in the same transaction, so the next plan has none
of them; its files go right after, and if control dies in between, at its next start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from control import etags
from control.catalog import TENANTS_MAX, PutQuota, PutTenant, TenantRow, tenant_removal
from control.etags import CHANGED, IF_MATCH, IF_NONE_MATCH, SAME_TEXT, TAGGED
from control.operations import Operation, Result, TenantText
from control.pages import PAGED, Page, asked_page, page_of
from control.routes.access import Access, Caller, Route, read_json, tenant_of
from control.routing import wall_ms
from control.state import Control
from packer.http import ApiError, json_response
from packer.types import ModelSpec, TenantQuota, parse_tenant


class TenantAsk(msgspec.Struct, forbid_unknown_fields=True):
    name: TenantText


@dataclass(frozen=True, slots=True)
class TenantAnswer:
    tenant: str
    created_ms: int
    keys: int
    models: int


def tenant_answer(control: Control, row: TenantRow) -> TenantAnswer:
    return TenantAnswer(
        row.tenant,
        row.created_ms,
        len(control.catalog.keys_of(row.tenant)),
        len({spec.ref.name for spec in control.catalog.models_of(row.tenant)}),
    )


async def create(control: Control, request: web.Request, caller: Caller) -> web.Response:
    ask = await read_json(control, request, caller, TenantAsk)
    name = parse_tenant(ask.name, "name")
    async with control.writing:
        if name in control.catalog.tenants:
            raise ApiError(409, "tenant_exists", f"The tenant {name!r} exists already.", field="name")
        if len(control.catalog.tenants) >= TENANTS_MAX:
            raise ApiError(
                507, "too_many_tenants", f"There are {TENANTS_MAX} tenants, the limit; delete one first."
            )
        row = TenantRow(name, wall_ms())
        answer = json_response(tenant_answer(control, row), 201)
        await control.write([PutTenant(row), PutQuota(name, TenantQuota()), *caller.remembering(answer)])
    control.record("tenant_created", tenant=name, detail=f"by key {caller.key_id}")
    return answer


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = tenant_of(control, caller, request.match_info["tenant"])
    return etags.read(request, row, tenant_answer(control, row))


async def list_all(control: Control, request: web.Request, caller: Caller) -> web.Response:
    asked = asked_page(request, None, parts=1)
    rows = sorted(control.catalog.tenants.values(), key=lambda row: row.tenant)
    return json_response(
        page_of(asked, rows, lambda row: (row.tenant,), lambda row: tenant_answer(control, row))
    )


async def delete(control: Control, request: web.Request, caller: Caller) -> web.Response:
    async with control.writing:
        row = tenant_of(control, caller, request.match_info["tenant"])
        etags.check_match(request, row, lambda: tenant_answer(control, row))
        name = row.tenant
        specs = control.catalog.models_of(name)
        open_uploads = [row.upload_id for row in control.catalog.uploads_of(name)]
        await control.write(tenant_removal(control.catalog, name))
    control.record("tenant_deleted", detail=f"{name}, by key {caller.key_id}")
    for upload_id in open_uploads:
        control.forget_upload(upload_id)
    await drop_files(control, specs)
    return web.Response(status=204)


async def drop_files(control: Control, specs: Sequence[ModelSpec]) -> None:
    """Remove the files of versions that are no longer in the catalog."""
    for spec in specs:
        async with control.ref_lock(spec.ref):
            # It may have been pushed again meanwhile; then its files are wanted.
            if spec.ref not in control.catalog.models:
                await asyncio.to_thread(control.models.drop, spec.ref)


ROUTES = (
    Route(
        "POST",
        "/api/v1/tenants",
        Access.OPERATOR,
        create,
        operation=Operation(
            "createTenant",
            "Create a tenant with the quota that every new one has.",
            [Result(201, "It exists now.", TenantAnswer)],
            TenantAsk,
            refusals={409: "It exists already.", 507: "There are as many tenants as there may be."},
        ),
    ),
    Route(
        "GET",
        "/api/v1/tenants",
        Access.OPERATOR,
        list_all,
        operation=Operation(
            "listTenants", "All tenants by name.", [Result(200, "A page.", Page[TenantAnswer])], takes=PAGED
        ),
    ),
    Route(
        "GET",
        "/api/v1/tenants/{tenant}",
        Access.CALLER,
        show,
        operation=Operation(
            "showTenant",
            "One tenant.",
            [Result(200, "The tenant.", TenantAnswer, headers=TAGGED), Result(304, SAME_TEXT)],
            takes=[IF_NONE_MATCH],
        ),
    ),
    Route(
        "DELETE",
        "/api/v1/tenants/{tenant}",
        Access.OPERATOR,
        delete,
        operation=Operation(
            "deleteTenant",
            "Delete a tenant with its keys, models and uploads.",
            [Result(204, "It is gone.")],
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
)
