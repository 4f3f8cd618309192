"""Cursors that a caller makes up, cuts, or takes from another list or another tenant.

Covers: that none shows a row that the caller may not see, none is an internal error, and one of another
list is refused. Does not cover: honest pages (``test_pages``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import pytest_asyncio
from running_control import Running, model_files, running

from control.pages import CURSOR_CHARS_MAX


@dataclass(slots=True)
class Site:
    control: Running
    acme: str
    globex: str
    cursor: str  # of acme's models, after its first


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        acme, globex = await control.tenant("acme"), await control.tenant("globex")
        for seed in (1, 2):
            await control.push("acme", "secret", model_files(seed))
        await control.push("globex", "m", model_files(3))
        page = (await control.call("GET", "/api/v1/models?limit=1", key=acme)).json()
        yield Site(control, acme, globex, page["next_cursor"])


def made(scope: bytes, position: object) -> str:
    return base64.urlsafe_b64encode(scope + json.dumps(position).encode()).decode().rstrip("=")


async def refused(site: Site, cursor: str, path: str = "/api/v1/models", key: str | None = None) -> None:
    query = f"{path}{'&' if '?' in path else '?'}cursor={quote(cursor)}"
    answer = await site.control.call("GET", query, key=key or site.acme)
    assert (answer.status, answer.error["field"]) == (400, "cursor"), cursor


async def test_a_cursor_is_good_for_its_own_list_and_view_only(site: Site) -> None:
    again = await site.control.call("GET", f"/api/v1/models?cursor={site.cursor}", key=site.acme)
    assert len(again.json()["items"]) == 1
    await refused(site, site.cursor, key=site.globex)
    await refused(site, site.cursor, key=site.control.operator_key)
    for path in ("/api/v1/ps", "/api/v1/events", "/api/v1/models?tenant=acme"):
        await refused(site, site.cursor, path)


async def test_a_forged_cursor_shows_nothing_of_others(site: Site) -> None:
    """Who knows how a cursor is made goes on somewhere else in a list of their own, and that is all."""
    own = (await site.control.call("GET", "/api/v1/models?limit=1", key=site.globex)).json()
    assert own["next_cursor"] is None
    scope = base64.urlsafe_b64decode(site.cursor + "===")[:8]
    for position in (["", "", "", ""], ["acme", "secret", "0", "0"], ["\x00", "\u0000", "", ""]):
        for key in (site.acme, site.globex):
            path = f"/api/v1/models?cursor={made(scope, position)}"
            answer = await site.control.call("GET", path, key=key)
            assert answer.status == (200 if key == site.acme else 400)
            assert b"globex" not in answer.body
            assert key == site.acme or b"acme" not in answer.body


async def test_nonsense_is_refused_and_never_an_internal_error(site: Site) -> None:
    scope = base64.urlsafe_b64decode(site.cursor + "===")[:8]
    positions: list[object] = [[], ["a"], [1, 2, 3, 4], {"a": 1}, "abcd", None, [["a"]] * 4, ["a"] * 5]
    cursors = [made(scope, position) for position in positions]
    cursors += [
        "",
        "=",
        "====",
        "a",
        "\u00e9",
        site.cursor[:-3],
        site.cursor + "AAAA",
        "A" * (CURSOR_CHARS_MAX + 1),
    ]
    cursors += [made(scope, ["[" * 500] * 4), made(b"", []), "%00", "../..", "A\nB"]
    cursors.append(base64.urlsafe_b64encode(scope + b"[" * 700).decode())
    for cursor in cursors:
        await refused(site, cursor)


@pytest.mark.parametrize("position", [["-1"], ["x"], ["9" * 30], [""], ["١"], ["1", "2"], [1]])
async def test_a_forged_cursor_of_events_is_refused(site: Site, position: list[object]) -> None:
    await site.control.recorded("model_pushed")
    page = await site.control.call("GET", "/api/v1/events?after=0&limit=1", key=site.acme)
    scope = base64.urlsafe_b64decode(page.json()["next_cursor"] + "===")[:8]
    await refused(site, made(scope, position), "/api/v1/events")
