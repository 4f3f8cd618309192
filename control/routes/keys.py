"""API keys: create (the text is shown once), list without secrets, revoke.

A revoked key is refused here at once and by each node from its next plan on, which a connected node
gets at once; a node that is cut off keeps accepting it until it is back (static stability).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from aiohttp import web

from control import etags
from control.catalog import KEYS_MAX, KEYS_PER_TENANT_MAX, DropKey, KeyRow, PutKey
from control.etags import CHANGED, IF_MATCH, IF_NONE_MATCH, SAME_TEXT, TAGGED
from control.operations import Operation, Result
from control.pages import PAGED, Page, asked_page, page_of
from control.routes.access import Access, Caller, Route, not_found, read_json, tenant_of
from control.routing import wall_ms
from control.state import Control
from packer.http import ApiError, json_response, make_key
from packer.types import BadValue

LABEL_CHARS_MAX = 100
# Ten years; a key that shall live longer has no ttl_s at all.
TTL_S_MAX = 10 * 366 * 24 * 3600


class KeyAsk(msgspec.Struct, forbid_unknown_fields=True):
    label: Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": LABEL_CHARS_MAX})] = ""
    ttl_s: Annotated[int, msgspec.Meta(ge=1, le=TTL_S_MAX)] | None = None


@dataclass(frozen=True, slots=True)
class KeyAnswer:
    key_id: str
    tenant: str | None
    label: str
    created_ms: int
    expires_ms: int | None


@dataclass(frozen=True, slots=True)
class NewKeyAnswer:
    key_id: str
    key: str
    tenant: str | None
    label: str
    created_ms: int
    expires_ms: int | None


async def create(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant_of(control, caller, request.match_info["tenant"])
    ask = await read_json(control, request, caller, KeyAsk)
    if len(ask.label) > LABEL_CHARS_MAX or not (ask.label.isprintable() or not ask.label):
        raise BadValue("label", f"must be at most {LABEL_CHARS_MAX} printable characters")
    async with control.writing:
        tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
        if len(control.catalog.keys_of(tenant)) >= KEYS_PER_TENANT_MAX:
            raise ApiError(
                507,
                "too_many_keys",
                f"The tenant {tenant!r} has {KEYS_PER_TENANT_MAX} keys, the limit; revoke one first.",
            )
        if len(control.catalog.keys) >= KEYS_MAX:
            raise ApiError(507, "too_many_keys", f"There are {KEYS_MAX} keys, the limit; revoke some first.")
        key = make_key()
        now_ms = wall_ms()
        expires_ms = now_ms + ask.ttl_s * 1000 if ask.ttl_s is not None else None
        row = KeyRow(key.key_id, key.secret_sha256, tenant, ask.label, now_ms, expires_ms)
        answer = json_response(
            NewKeyAnswer(row.key_id, key.text, row.tenant, row.label, row.created_ms, row.expires_ms), 201
        )
        await control.write([PutKey(row), *caller.remembering(answer)])
    control.record("key_created", tenant=tenant, detail=f"{key.key_id}, by key {caller.key_id}")
    return answer


async def list_of(control: Control, request: web.Request, caller: Caller) -> web.Response:
    tenant = tenant_of(control, caller, request.match_info["tenant"]).tenant
    asked = asked_page(request, tenant, parts=2)
    rows = control.catalog.keys_of(tenant)
    return json_response(page_of(asked, rows, lambda row: (f"{row.created_ms:020d}", row.key_id), key_answer))


def key_answer(row: KeyRow) -> KeyAnswer:
    return KeyAnswer(row.key_id, row.tenant, row.label, row.created_ms, row.expires_ms)


async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = _key(control, request)
    return etags.read(request, key_answer(row), key_answer(row))


def _key(control: Control, request: web.Request) -> KeyRow:
    key_id = request.match_info["key_id"]
    row = control.catalog.keys.get(key_id)
    if row is None:
        raise not_found("key", key_id)
    return row


async def revoke(control: Control, request: web.Request, caller: Caller) -> web.Response:
    key_id = request.match_info["key_id"]
    async with control.writing:
        row = _key(control, request)
        etags.check_match(request, key_answer(row), lambda: key_answer(row))
        operators = sum(other.tenant is None for other in control.catalog.keys.values())
        if row.tenant is None and operators == 1:
            raise ApiError(
                409, "last_operator_key", "This is the last operator key; without it nobody could come in."
            )
        await control.write([DropKey(key_id)])
    control.record("key_revoked", tenant=row.tenant or "", detail=f"{key_id}, by key {caller.key_id}")
    return web.Response(status=204)


ROUTES = (
    Route(
        "POST",
        "/api/v1/tenants/{tenant}/keys",
        Access.OPERATOR,
        create,
        operation=Operation(
            "createKey",
            "Create an API key of a tenant. The answer has the only copy of its text.",
            [Result(201, "The key.", NewKeyAnswer)],
            KeyAsk,
            refusals={507: "There are as many keys as there may be."},
        ),
    ),
    Route(
        "GET",
        "/api/v1/tenants/{tenant}/keys",
        Access.OPERATOR,
        list_of,
        operation=Operation(
            "listKeys",
            "A tenant's keys, oldest first, without secrets.",
            [Result(200, "A page.", Page[KeyAnswer])],
            takes=PAGED,
        ),
    ),
    Route(
        "GET",
        "/api/v1/keys/{key_id}",
        Access.OPERATOR,
        show,
        operation=Operation(
            "showKey",
            "One key, without its secret.",
            [Result(200, "The key.", KeyAnswer, headers=TAGGED), Result(304, SAME_TEXT)],
            takes=[IF_NONE_MATCH],
        ),
    ),
    Route(
        "DELETE",
        "/api/v1/keys/{key_id}",
        Access.OPERATOR,
        revoke,
        operation=Operation(
            "revokeKey",
            "Revoke a key: it is refused from now on.",
            [Result(204, "It is revoked.")],
            takes=[IF_MATCH],
            refusals={409: "It is the last operator key.", **CHANGED},
        ),
    ),
)
