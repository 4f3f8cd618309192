"""Lists in pages: complete, in order, stable while rows come and go, the same through the SDK; HEAD and 405.

Covers: every list of the management API that the running app has, cutting by rows and by bytes. Does not
cover: forged and foreign cursors (``attacks/test_cursors``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import pytest_asyncio
from running_control import (
    Running,
    empty_report,
    model_files,
    model_report,
    running,
)
from running_routers import fake_router

import bunkhouse
from bunkhouse import _request
from control import cluster as fleet
from control.routes import ps
from control.server import PUBLIC_ROUTES
from packer.usage import UsageBatch, UsageRow, Used, hour_of


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    """Three of everything that is listed."""
    async with running(tmp_path / "control") as started:
        for name in ("acme", "beta", "core"):
            await started.tenant(name)
        for _ in range(2):
            await started.key("acme")
        model = await started.push("acme", "m", model_files(1))
        await started.push("acme", "m", model_files(2))
        await started.push("beta", "m", model_files(1))
        await started.push("acme", "other", model_files(3))
        for name, tenant in (("n1", "acme"), ("n2", "beta"), ("n3", "core")):
            node = await started.join(name)
            report = empty_report(node.gateway_url, (model_report(model["ref"]),))
            await node.beat(tmp_path, report=report)
            used = UsageRow(hour_of(started.server.control.wall_ms()), tenant, f"{tenant}/m", Used(1))
            told = await node.raw_beat(tmp_path, usage=UsageBatch(1, (used,)), spool="s")
            assert told.status == 200
            await fake_router(started, f"r-{name}")
        await started.recorded("node_joined")
        yield started


LISTS = {
    "/api/v1/tenants",
    "/api/v1/tenants/{tenant}/keys",
    "/api/v1/tenants/{tenant}/uploads",
    "/api/v1/models",
    "/api/v1/nodes",
    "/api/v1/routers",
    "/api/v1/ps",
    "/api/v1/events",
    "/api/v1/usage",
}


def filled(path: str) -> str:
    return path.replace("{tenant}", "acme")


async def pages(control: Running, path: str, limit: int, **query: str) -> list[Any]:
    """All pages of a list, each as it was answered."""
    found: list[Any] = []
    cursor: str | None = None
    while True:
        asked = {"limit": str(limit), **query, **({"cursor": cursor} if cursor else {})}
        answer = await control.call("GET", f"{path}?{urlencode(asked)}")
        assert answer.status == 200, answer.body
        found.append(answer.json())
        cursor = found[-1]["next_cursor"]
        if cursor is None:
            return found


def rows(answers: list[Any]) -> list[Any]:
    found = [row for part in ("items", "devices") for answer in answers for row in answer.get(part, [])]
    # How long ago a node was heard differs from one look to the next.
    return [{name: value for name, value in row.items() if name != "heard_ago_ms"} for row in found]


def test_every_route_that_takes_a_cursor_is_tested_here() -> None:
    paged = {
        route.path
        for route in PUBLIC_ROUTES
        if route.operation is not None and any(given.name == "cursor" for given in route.operation.takes)
    }
    assert paged == LISTS


async def test_pages_of_one_row_together_are_the_whole_list(control: Running) -> None:
    for path in sorted(LISTS):
        query = {"after": "0"} if path == "/api/v1/events" else {}
        small = await pages(control, filled(path), 1, **query)
        whole = await pages(control, filled(path), 1000, **query)
        assert len(whole) == 1, path
        assert len(rows(whole)) >= 3, path
        assert rows(small)[: len(rows(whole))] == rows(whole), path
        assert all(len(rows([page])) == 1 for page in small[:-1]), path


async def test_a_limit_out_of_bounds_is_refused_by_name(control: Running) -> None:
    for path in sorted(LISTS):
        for limit in ("0", "1001", "-1", "x", "", "9" * 30):
            refused = await control.call("GET", f"{filled(path)}?limit={limit}")
            assert (refused.status, refused.error["field"]) == (400, "limit"), (path, limit)


async def test_rows_that_come_and_go_between_two_pages_shift_nothing(control: Running) -> None:
    first = (await control.call("GET", "/api/v1/tenants?limit=2")).json()
    assert [row["tenant"] for row in first["items"]] == ["acme", "beta"]
    await control.tenant("abba")
    await control.tenant("bond")
    assert (await control.call("DELETE", "/api/v1/tenants/beta")).status == 204
    path = f"/api/v1/tenants?limit=9&cursor={first['next_cursor']}"
    assert [row["tenant"] for row in (await control.call("GET", path)).json()["items"]] == ["bond", "core"]


async def test_a_page_of_placements_costs_what_it_shows(
    control: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of thousands of nodes reports every version: no tenant has control go through all that."""
    state, made = control.server.control, 0
    reports = tuple(model_report(str(ref), "resident", disk_bytes=1) for ref in state.catalog.models)
    assert len(reports) >= 3
    for number in range(20):
        node = f"far{number:02}"
        fleet.step(state.cluster, fleet.NodeJoined(node, "http://127.0.0.1:9"), state.now_ms())
        beat = fleet.NodeBeat(node, empty_report("http://127.0.0.1:9", reports), 0, 0, False)
        fleet.step(state.cluster, beat, state.now_ms())
    whole = rows(await pages(control, "/api/v1/ps", 1000))
    assert len(whole) > 20 * len(reports)
    item = ps._item

    def counted(*words: Any) -> Any:
        nonlocal made
        made += 1
        return item(*words)

    monkeypatch.setattr(ps, "_item", counted)
    first = await control.call("GET", "/api/v1/ps?limit=10")
    assert rows([first.json()]) == whole[:10]
    assert made == 11, "one more says that there are more"


async def test_a_page_of_large_rows_ends_early(control: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await pages(control, "/api/v1/models", 1000)
    monkeypatch.setattr("control.pages.PAGE_BYTES_MAX", 10)
    cut = await pages(control, "/api/v1/models", 1000)
    assert [len(page["items"]) for page in cut] == [1, 1, 1, 1]
    assert rows(cut) == rows(whole)


async def test_the_sdk_reads_all_pages(control: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bunkhouse.AsyncClient(control.url, control.operator_key) as client:
        whole = [await client.tenants(), await client.keys("acme"), await client.models(), await client.ps()]
        nodes = [row.node for row in await client.nodes()]
        monkeypatch.setattr(_request, "PAGE_ROWS", 1)
        cut = [await client.tenants(), await client.keys("acme"), await client.models(), await client.ps()]
        assert cut == whole
        assert [row.node for row in await client.nodes()] == nodes == ["n1", "n2", "n3"]
        monkeypatch.setattr(_request, "PAGES_MAX", 2)
        with pytest.raises(bunkhouse.BadAnswer, match="more than 2 pages"):
            await client.tenants()


# --- methods --------------------------------------------------------------------------------------


async def test_every_get_may_be_asked_as_head(control: Running) -> None:
    """The same status, and headers of the same body, without it."""
    asked = [route.path for route in PUBLIC_ROUTES if route.method == "GET" and "{" not in route.path]
    for path in asked:
        query = "?model=acme/m&node=n9" if path in ("/api/v1/plan", "/api/v1/explain") else ""
        key = await control.key("acme") if path.startswith("/v1/") else ""
        got = await control.call("GET", path + query, key=key)
        head = await control.call("HEAD", path + query, key=key)
        assert (head.status, head.body) == (got.status, b""), path
        assert head.headers["Content-Type"] == got.headers["Content-Type"]


async def test_a_method_that_a_path_does_not_have_is_answered_with_those_it_has(control: Running) -> None:
    for method in ("OPTIONS", "PUT", "TRACE", "PATCH"):
        refused = await control.call(method, "/api/v1/tenants")
        assert (refused.status, refused.error["code"]) == (405, "method_not_allowed")
        assert set(refused.headers["Allow"].split(",")) == {"GET", "HEAD", "POST"}
    assert (await control.call("HEAD", "/api/v1/tenants", key=None)).status == 401
