"""ETags: changes of what is no longer as it was seen, and answers that need not be sent.

Covers: every single thing that the running app answers with an ETag, and every change of it; the SDK and
``bunk`` on top. Does not cover: lists, which have none.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from click.testing import CliRunner
from running_control import (
    FakeNode,
    Running,
    declare,
    empty_report,
    model_files,
    running,
    tenant_report,
)
from running_routers import fake_router

import bunkhouse
from bunkhouse.cli.main import bunk
from control.server import PUBLIC_ROUTES

QUOTA = "/api/v1/tenants/acme/quota"


@dataclass(slots=True)
class Site:
    control: Running
    node: FakeNode
    folder: Path
    values: dict[str, str]

    def fill(self, path: str) -> str:
        return re.sub(r"\{(\w+)(?::[^{}]*)?\}", lambda match: self.values[match[1]], path)

    async def etag(self, path: str) -> str:
        return (await self.control.call("GET", path)).headers["ETag"]


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        key = await control.tenant("acme")
        model = await control.push("acme", "m", model_files())
        made = await control.call("POST", "/api/v1/tenants/acme/uploads", declare("n", model_files(1)))
        values = {
            "tenant": "acme",
            "key_id": key.split("_")[1],
            "ref": model["ref"],
            "node": "n1",
            "router": "r1",
            "upload_id": made.json()["upload_id"],
        }
        await fake_router(control, "r1")
        yield Site(control, await control.join("n1"), tmp_path, values)


def taking(header: str) -> list[tuple[str, str]]:
    """Routes that the document says take this header, deletions last, of tenants after all others."""
    found = [
        (route.method, route.path)
        for route in PUBLIC_ROUTES
        if route.operation is not None and any(given.name == header for given in route.operation.takes)
    ]
    last = "/api/v1/tenants/{tenant}"
    return sorted(found, key=lambda each: (each[1] == last, each[0] == "DELETE", each))


async def test_every_single_thing_has_an_etag_and_is_not_sent_twice(site: Site) -> None:
    assert len(taking("If-None-Match")) >= 6
    for method, path in taking("If-None-Match"):
        where = site.fill(path)
        first = await site.control.call(method, where)
        etag = first.headers["ETag"]
        assert re.fullmatch(r'"[0-9a-f]{16}\.[0-9a-f]{16}"', etag), path
        for given in (etag, f"W/{etag}", f'"x", {etag}', "*"):
            same = await site.control.call(method, where, headers={"If-None-Match": given})
            assert (same.status, same.body, same.headers["ETag"]) == (304, b"", etag), (path, given)
        other = await site.control.call(method, where, headers={"If-None-Match": '"x"'})
        assert (other.status, other.body) == (200, first.body)


async def test_every_change_can_be_made_to_depend_on_what_was_seen(site: Site) -> None:
    """Each with a tag that is old, then with the right one; a refused change changes nothing."""
    gets = dict.fromkeys(path for _, path in taking("If-None-Match"))
    changes = taking("If-Match")
    assert {path for _, path in changes} == set(gets)
    for method, path in changes:
        where = site.fill(path)
        etag = await site.etag(where)
        body = {"PATCH": {"weight": 3}, "PUT": {"weight": 4}}.get(method)
        if (method, path) == ("PATCH", "/api/v1/models/{ref:.+}"):
            body = {"batch_max": 3}
        if method == "PATCH" and path.startswith("/api/v1/nodes/"):
            body = {"draining": True}
        stale = ['"0000000000000000.0000000000000000"', f"W/{etag}", '""']
        for given in stale:
            refused = await site.control.call(method, where, body, headers={"If-Match": given})
            assert (refused.status, refused.error["code"]) == (412, "changed_meanwhile"), (path, given)
            assert refused.headers["ETag"] == etag
            assert await site.etag(where) == etag
        done = await site.control.call(method, where, body, headers={"If-Match": f'"x" , {etag}'})
        assert done.status in (200, 204), (path, done.body)
        if done.status == 200:
            assert done.headers["ETag"] == await site.etag(where) != etag
        assert (await site.control.call("GET", where)).status == (404 if method == "DELETE" else 200)


async def test_what_nodes_report_changes_what_is_read_and_stands_in_nobodys_way(site: Site) -> None:
    """A tenant that works must not keep its operator from changing its quota."""
    before = await site.etag(QUOTA)
    report = empty_report(site.node.gateway_url, tenants=(tenant_report("acme", requests=7),))
    await site.node.beat(site.folder, report=report)
    after = await site.etag(QUOTA)
    assert before != after
    assert before.split(".")[0] == after.split(".")[0]
    fresh = await site.control.call("GET", QUOTA, headers={"If-None-Match": before})
    assert fresh.json()["usage"][0]["requests"] == 7
    changed = await site.control.call("PATCH", QUOTA, {"weight": 2}, headers={"If-Match": before})
    assert changed.status == 200


async def test_the_same_name_again_is_another_thing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = [await site.etag(QUOTA), await site.etag("/api/v1/tenants/acme")]
    await site.control.call("DELETE", "/api/v1/tenants/acme")
    # When it was made is what tells it from the first.
    monkeypatch.setattr("control.routes.tenants.wall_ms", lambda: 5)
    await site.control.tenant("acme")
    for path, etag in zip((QUOTA, "/api/v1/tenants/acme"), tags, strict=True):
        method = "PUT" if path == QUOTA else "DELETE"
        refused = await site.control.call(method, path, {}, headers={"If-Match": etag})
        assert refused.status == 412


async def test_deleting_all_versions_minds_a_new_one(site: Site) -> None:
    path = "/api/v1/models/acme/m"
    one, whole = await site.etag(f"/api/v1/models/{site.values['ref']}"), await site.etag(path)
    await site.control.push("acme", "m", model_files(7))
    assert (await site.control.call("DELETE", path, headers={"If-Match": whole})).status == 412
    # It was the latest and is not any more.
    refused = await site.control.call(
        "DELETE", f"/api/v1/models/{site.values['ref']}", headers={"If-Match": one}
    )
    assert refused.status == 412


@pytest.mark.parametrize("text", ["x", '"a', "W/", '"a" "b"', '"a",', "*, *", '"\t"'])
async def test_what_is_no_etag_is_refused_by_name(site: Site, text: str) -> None:
    for method, header in (("GET", "If-None-Match"), ("PATCH", "If-Match")):
        refused = await site.control.call(method, QUOTA, {"weight": 2}, headers={header: text})
        assert (refused.status, refused.error["field"]) == (400, header)


async def test_of_two_that_saw_the_same_one_wins(site: Site) -> None:
    etag = await site.etag(QUOTA)
    answers = await asyncio.gather(
        *(
            site.control.call("PATCH", QUOTA, {"weight": weight}, headers={"If-Match": etag})
            for weight in range(2, 8)
        )
    )
    assert sorted(answer.status for answer in answers) == [200] + [412] * 5


async def test_the_sdk_and_the_command_change_what_they_saw(site: Site) -> None:
    async with bunkhouse.AsyncClient(site.control.url, site.control.operator_key) as client:
        seen = await client.quota("acme")
        changed = await client.set_quota("acme", weight=5, if_match=seen.etag)
        assert changed.etag != seen.etag
        with pytest.raises(bunkhouse.ChangedMeanwhile) as caught:
            await client.set_quota("acme", weight=6, if_match=seen.etag)
        assert isinstance(caught.value, bunkhouse.Conflict)
        assert (await client.set_quota("acme", weight=7)).quota.weight == 7

    def run(*words: str) -> Any:
        environment = {"BUNKHOUSE_URL": site.control.url, "BUNKHOUSE_API_KEY": site.control.operator_key}
        return CliRunner().invoke(bunk, words, env=environment)

    shown = await asyncio.to_thread(run, "quota", "show", "acme", "-o", "json")
    etag = json.loads(shown.stdout)["etag"]
    words = ("quota", "set", "acme", "--weight", "9", "--if-match", etag)
    assert (await asyncio.to_thread(run, *words)).exit_code == 0
    refused = await asyncio.to_thread(run, *words)
    assert refused.exit_code != 0
    assert "changed it" in refused.stderr
