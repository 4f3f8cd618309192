"""Who answers and who asks: this server's version and clock, and what the caller's key is.

Covers: what ``bunk doctor`` needs before it can judge anything else. Does not cover: nodes
(``control.routes.nodes``). The version is told to callers with a key only: an open port need not say
which release's mistakes it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from control.operations import Operation, Result
from control.routes.access import Access, Caller, Route
from control.routing import wall_ms
from control.state import Control
from packer.http import json_response
from packer.release import server_version


@dataclass(frozen=True, slots=True)
class AboutAnswer:
    """``tenant`` None: the key is an operator's. ``expires_ms`` None: it is valid until revoked."""

    version: str
    now_ms: int
    key_id: str
    tenant: str | None
    expires_ms: int | None


async def about(control: Control, request: web.Request, caller: Caller) -> web.Response:
    key = control.catalog.key_specs.get(caller.key_id)
    expires_ms = key.expires_ms if key is not None else None
    return json_response(AboutAnswer(server_version(), wall_ms(), caller.key_id, caller.tenant, expires_ms))


ROUTES = (
    Route(
        "GET",
        "/api/v1/about",
        Access.CALLER,
        about,
        stays=False,
        operation=Operation(
            "showAbout", "This server, its clock and the caller's key.", [Result(200, "Them.", AboutAnswer)]
        ),
    ),
)
