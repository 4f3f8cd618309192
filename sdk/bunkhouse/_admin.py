"""What each operator's method sends and how its answer is read.

Covers: tenants, keys, quotas, nodes, ``ps``, usage and events under ``/api/v1``. Does not cover: tenants'
calls (``_calls``), or sending again (``_request.once``: a key or token whose answer was lost is not made
twice, its answer is asked for again).
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Final, Literal
from urllib.parse import urlencode

from bunkhouse import _decode
from bunkhouse._errors import BadValue
from bunkhouse._request import Call, Listing, json_request, segment
from bunkhouse._types import (
    About,
    Device,
    Events,
    Key,
    NewKey,
    Node,
    NodeToken,
    Placement,
    Placements,
    QuotaUse,
    Router,
    Tenant,
    UsageItem,
)


class Unset(Enum):
    """Marks an argument that was not given, where None means "not limited"."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
UsageSpan = Literal["hour", "day", "total", "key"]
MaybeInt = int | None | Literal[Unset.UNSET]
Int = int | Literal[Unset.UNSET]


def create_tenant(tenant: str) -> Call[Tenant]:
    return Call(json_request("POST", "/api/v1/tenants", {"name": tenant}), _decode.one(_decode.tenant))


def tenants() -> Listing[Tenant, tuple[Tenant, ...]]:
    return Listing("/api/v1/tenants", _decode.page(_decode.tenant), tuple)


def delete_tenant(tenant: str) -> Call[None]:
    path = f"/api/v1/tenants/{segment(tenant, 'tenant')}"
    return Call(json_request("DELETE", path, repeatable=True), _decode.nothing)


def _keys_path(tenant: str) -> str:
    return f"/api/v1/tenants/{segment(tenant, 'tenant')}/keys"


def create_key(tenant: str, label: str | None, ttl_s: int | None) -> Call[NewKey]:
    given: dict[str, object] = {"label": label, "ttl_s": ttl_s}
    body = {name: value for name, value in given.items() if value is not None}
    return Call(json_request("POST", _keys_path(tenant), body), _decode.one(_decode.new_key))


def keys(tenant: str) -> Listing[Key, tuple[Key, ...]]:
    return Listing(_keys_path(tenant), _decode.page(_decode.key), tuple)


def revoke_key(key_id: str) -> Call[None]:
    path = f"/api/v1/keys/{segment(key_id, 'key_id')}"
    return Call(json_request("DELETE", path, repeatable=True), _decode.nothing)


def _quota_path(tenant: str) -> str:
    return f"/api/v1/tenants/{segment(tenant, 'tenant')}/quota"


def quota(tenant: str) -> Call[QuotaUse]:
    return Call(json_request("GET", _quota_path(tenant), repeatable=True), _decode.quota_use)


def set_quota(tenant: str, if_match: str | None, **change: MaybeInt) -> Call[QuotaUse]:
    """``change`` is named as in ``Client.set_quota``; only what is given is sent, and changes."""
    body: dict[str, object] = {}
    for name, value in change.items():
        tier, _, part = name.partition("_")
        if value is UNSET:
            continue
        if tier in ("device", "host", "disk") and part in ("reserved", "max"):
            inner = body.setdefault(tier, {})
            assert isinstance(inner, dict)
            inner[part] = value
        else:
            body[name] = value
    if not body:
        raise BadValue("quota", "give at least one field to change, for example device_max")
    # With a tag it is not: the first try may have changed what the tag stands for.
    request = json_request("PATCH", _quota_path(tenant), body, repeatable=if_match is None)
    if if_match is not None:
        request = replace(request, headers={**request.headers, "if-match": if_match})
    return Call(request, _decode.quota_use)


def nodes(pool: str | None) -> Listing[Node, tuple[Node, ...]]:
    query = {} if pool is None else {"pool": pool}
    return Listing("/api/v1/nodes", _decode.page(_decode.node), tuple, query)


def create_node_token(name: str | None, ttl_s: int | None, pool: str | None) -> Call[NodeToken]:
    given: dict[str, object] = {"name": name, "ttl_s": ttl_s, "pool": pool}
    body = {field: value for field, value in given.items() if value is not None}
    return Call(json_request("POST", "/api/v1/nodes/tokens", body), _decode.one(_decode.node_token))


def delete_node(name: str) -> Call[None]:
    path = f"/api/v1/nodes/{segment(name, 'name')}"
    return Call(json_request("DELETE", path, repeatable=True), _decode.nothing)


def set_node(name: str, draining: bool) -> Call[Node]:
    path = f"/api/v1/nodes/{segment(name, 'name')}"
    request = json_request("PATCH", path, {"draining": draining}, repeatable=True)
    return Call(request, _decode.one(_decode.node))


def routers() -> Listing[Router, tuple[Router, ...]]:
    return Listing("/api/v1/routers", _decode.page(_decode.router), tuple)


def create_router_token(name: str | None, ttl_s: int | None) -> Call[NodeToken]:
    given: dict[str, object] = {"name": name, "ttl_s": ttl_s}
    body = {field: value for field, value in given.items() if value is not None}
    return Call(json_request("POST", "/api/v1/routers/tokens", body), _decode.one(_decode.node_token))


def delete_router(name: str) -> Call[None]:
    path = f"/api/v1/routers/{segment(name, 'name')}"
    return Call(json_request("DELETE", path, repeatable=True), _decode.nothing)


def about() -> Call[About]:
    return Call(json_request("GET", "/api/v1/about", repeatable=True), _decode.one(_decode.about))


def ps() -> Listing[Placement | Device, Placements]:
    return Listing("/api/v1/ps", _decode.placements, _decode.all_placements)


def usage(
    tenant: str | None, by: UsageSpan, since_ms: int | None, until_ms: int | None
) -> Listing[UsageItem, tuple[UsageItem, ...]]:
    given = {"tenant": tenant, "by": by, "since_ms": since_ms, "until_ms": until_ms}
    query = {name: str(value) for name, value in given.items() if value is not None}
    return Listing("/api/v1/usage", _decode.page(_decode.usage_item), tuple, query)


def events(after: int | None, limit: int, tenant: str | None) -> Call[Events]:
    given = {"after": after, "limit": limit, "tenant": tenant}
    query = urlencode({name: value for name, value in given.items() if value is not None})
    return Call(json_request("GET", f"/api/v1/events?{query}", repeatable=True), _decode.one(_decode.events))
