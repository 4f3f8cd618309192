"""The OpenAPI document: made of the routes, complete, valid, and what a strict reader makes of it.

Covers: every route of the public listener being in it, its validity, and that a route can not be added
without it. Does not cover: whether answers are as it says (``test_openapi_clients``, and every test that
calls a control server through ``running_control``), or the node listener, which is no public surface.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
import pytest_asyncio
from aiohttp import web
from running_control import Running, running

from control.openapi import describe, plain_path
from control.operations import Operation, Passed, Result
from control.routes.access import Access, Caller, Route
from control.server import PUBLIC_ROUTES, build_public_app
from control.state import Control


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def document(control: Running) -> Any:
    answer = await control.call("GET", "/api/v1/openapi.json")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    return answer.json()


def documented(found: Any) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, entry in found["paths"].items() for method in entry}


async def test_every_route_of_the_public_app_is_documented(control: Running) -> None:
    """As the running app lists them; a wildcard is documented by the operations behind it."""
    known = documented(await document(control))
    routes = {
        (route.method, plain_path(route.resource.canonical))
        for route in build_public_app(control.server.control).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    wild = {(route.method, plain_path(route.path)): route for route in PUBLIC_ROUTES if route.passes}
    assert routes - known == set(wild)
    assert known - routes == {
        (each.method, plain_path(each.path)) for route in wild.values() for each in route.passes
    }
    assert len(known) > 30


async def test_the_document_is_valid(control: Running) -> None:
    openapi_spec_validator.validate(await document(control))


async def test_every_operation_says_what_it_takes_and_answers(control: Running) -> None:
    """An id of its own, a summary, a success, the errors that every route has, and a schema for each body."""
    found = await document(control)
    names = []
    for path, entry in found["paths"].items():
        for method, operation in entry.items():
            names.append(operation["operationId"])
            assert operation["summary"].endswith((".", "?")), path
            statuses = set(operation["responses"])
            assert {"400", "429", "503"} <= statuses
            refused = path.endswith(("/load", "/unload"))  # always, and said so
            assert any(status.startswith("2") for status in statuses) is not refused, path
            is_open = path in ("/healthz", "/metrics", "/v2/health/live", "/v2/health/ready")
            assert (operation["security"] == []) is is_open
            assert ("401" in statuses) is not is_open
            in_path = [each["name"] for each in operation["parameters"] if each["in"] == "path"]
            assert in_path == re.findall(r"\{(\w+)\}", path), (method, path)
    assert len(set(names)) == len(names)
    assert "NewKeyAnswer" in found["components"]["schemas"]


async def test_the_document_needs_a_key_and_any_will_do(control: Running) -> None:
    tenant = await control.tenant("acme")
    path = "/api/v1/openapi.json"
    assert (await control.call("GET", path, key=None)).status == 401
    own, operators = await control.call("GET", path, key=tenant), await control.call("GET", path)
    assert own.body == operators.body


async def nothing(control: Control, request: web.Request, caller: Caller) -> web.Response:
    return web.Response()


def test_a_route_of_the_management_api_without_an_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="GET /api/v1/things needs an operation"):
        Route("GET", "/api/v1/things", Access.CALLER, nothing)


def test_a_name_twice_and_a_part_without_words_are_refused() -> None:
    operation = Operation("show", "Show.", [Result(200, "It.")])
    once = Route("GET", "/api/v1/things", Access.CALLER, nothing, operation=operation)
    with pytest.raises(ValueError, match=r"same name: \['show'\]"):
        describe([once, Route("PUT", "/api/v1/things", Access.CALLER, nothing, operation=operation)], "1")
    with pytest.raises(ValueError, match=r"no description of \['thing'\]"):
        describe([Route("GET", "/api/v1/{thing}", Access.CALLER, nothing, operation=operation)], "1")


def test_operations_behind_a_wildcard_are_described_and_not_the_wildcard() -> None:
    passed = Passed("POST", "/v1/sing", Operation("sing", "Sing.", [Result(200, "A song.", str)]))
    route = Route("*", "/v1/{path:.*}", Access.TENANT, nothing, passes=[passed])
    found = json.loads(describe([route], "1"))
    assert documented(found) == {("POST", "/v1/sing")}
    error = found["paths"]["/v1/sing"]["post"]["responses"]["403"]["$ref"].rpartition("/")[2]
    assert found["components"]["responses"][error]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/OpenAiErrorAnswer"
    }
