"""The Open Inference Protocol v2 through the router, in front of real gateways over nodes in memory.

Covers: answers that are the node's own to the byte, what control answers by itself, statistics of several
nodes, bodies that are held and bodies that pass through. Does not cover: the gateway's own rules
(``test_oip.py``), carrying calls in general (``test_forwarding.py``), or hostile bodies and paths
(``attacks/test_oip_bodies.py``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import fake_node
import pytest
import pytest_asyncio
from aiohttp import web
from fake_node import DIMENSIONS, served, spec_of
from oip_http import HEADER_LENGTH, call, declare, get, infer, packed, raw_input, texts
from routed_fleet import Fleet, routed_fleet
from running_control import FakeNode, Running, empty_report, model_files, model_report, running

from control.routes import oip
from packer.http import JSON_BYTES_MAX, parse_key
from packer.oip import TENSOR_BODY_BYTES_MAX, TENSOR_JSON_BYTES_MAX
from packer.types import KeySpec, Task

BINARY = {"parameters": {"binary_data_output": True}}


@dataclass(slots=True)
class Site:
    """A control server, one tenant with one embedding model, and two nodes with real gateways."""

    control: Running
    key: str
    ref: str
    nodes: tuple[FakeNode, FakeNode]
    gateways: tuple[str, str]
    engines: tuple[fake_node.FakeNode, fake_node.FakeNode]
    folder: Path

    @property
    def url(self) -> str:
        return self.control.url

    async def beat(self, position: int, state: str = "resident", **changes: int) -> None:
        node, at = self.nodes[position], self.gateways[position]
        await node.beat(self.folder)
        await node.beat(self.folder, report=empty_report(at, (model_report(self.ref, state, **changes),)))


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(running(tmp_path / "control"))
        key = await control.tenant("acme")
        ref = (await control.push("acme", "m", model_files()))["ref"]
        parsed = parse_key(key)
        assert parsed is not None
        engines, urls, nodes = [], [], []
        for name in ("n0", "n1"):
            engine = fake_node.FakeNode()
            engine.models.clear()
            engine.add(spec_of("acme", "m", Task.EMBEDDING, ref.partition("@")[2]))
            engine.keys[parsed.key_id] = KeySpec(parsed.key_id, parsed.secret_sha256, "acme")
            url = await stack.enter_async_context(served(engine))
            engines.append(engine)
            urls.append(url)
            nodes.append(await control.join(name, url))
        (e0, e1), (u0, u1), (n0, n1) = engines, urls, nodes
        made = Site(control, key, ref, (n0, n1), (u0, u1), (e0, e1), tmp_path)
        await made.beat(0)
        await made.beat(1, "absent")
        yield made


@pytest.mark.parametrize("model", ["acme/m", "acme%2Fm", "acme/m/versions/latest"])
async def test_an_inference_is_the_nodes_own_to_the_byte(site: Site, model: str) -> None:
    raw = packed(b"a", b"b")
    binary = {"inputs": [raw_input("text", "BYTES", [2], len(raw))], **BINARY}
    for ask, body in ((texts("a", "b", id="7"), None), (binary, raw)):
        routed = await infer(site.url, model, site.key, ask, body)
        direct = await infer(site.gateways[0], model, site.key, ask, body)
        assert (routed.status, routed.json, routed.raw) == (200, direct.json, direct.raw)
        for name in ("content-type", "inference-header-content-length", "x-bunkhouse-tier"):
            assert routed.headers.get(name) == direct.headers.get(name)
    assert len(routed.raw) == 2 * DIMENSIONS * 4
    assert len(site.engines[0].orders) == 4


async def test_what_control_answers_is_what_a_node_would(site: Site) -> None:
    version = site.ref.partition("@")[2]
    for path in (
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/acme%2Fm",
        f"/v2/models/acme/m/versions/{version}",
        "/v2/models/acme/m/ready",
        "/v2/models/acme/m/config",
        "/v2/models/acme/m/stats",
        "/v2/models/stats",
        "/v2/models/acme/none",
        "/v2/models/acme/m/nothing",
        "/v2/models/acme/m/infer",
        "/v2/nothing",
    ):
        routed, direct = [await get(url, path, site.key) for url in (site.url, site.gateways[0])]
        assert (routed.status, routed.json) == (direct.status, direct.json), path
        code = "x-bunkhouse-error-code"
        assert routed.headers.get(code) == direct.headers.get(code), path
    for path in ("/v2/repository/index", "/v2/repository/models/acme/m/load", "/v2/models/acme/m"):
        routed, direct = [await call(url, "POST", path, site.key) for url in (site.url, site.gateways[0])]
        assert (routed.status, routed.json) == (direct.status, direct.json), path


async def test_ready_means_that_some_node_takes_requests(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        async with aiohttp.ClientSession() as session:
            for path, status, body in (
                ("/v2/health/live", 200, {"live": True}),
                ("/v2/health/ready", 503, {"ready": False}),
            ):
                async with session.get(control.url + path) as answer:
                    assert (answer.status, await answer.json()) == (status, body)


async def test_statistics_are_those_of_all_nodes_together(site: Site) -> None:
    for url, inputs in zip(site.gateways, (("a",), ("b", "c")), strict=True):
        await infer(url, "acme/m", site.key, texts(*inputs))
    (row,) = (await get(site.url, "/v2/models/acme/m/stats", site.key)).json["model_stats"]
    assert (row["name"], row["inference_count"], row["execution_count"]) == ("acme/m", 3, 2)
    assert row["inference_stats"]["success"]["count"] == 2
    (of_all,) = (await get(site.url, "/v2/models/stats", site.key)).json["model_stats"]
    assert of_all == row
    stranger = await site.control.tenant("globex")
    assert (await get(site.url, "/v2/models/stats", stranger)).json == {"model_stats": []}


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with routed_fleet(tmp_path) as made:
        yield made


def statistics(count: int, name: str = "acme/m", version: str = "") -> dict[str, Any]:
    return {"model_stats": [{"name": name, "version": version, "inference_count": count}]}


async def test_a_node_that_lies_or_fails_spoils_no_statistics(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of models that were not asked for, too much, or nonsense, is left out."""
    version = fleet.ref.partition("@")[2]

    def says(position: int, answer: Any) -> None:
        async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
            return answer if isinstance(answer, web.Response) else web.json_response(answer)

        fleet.gateways[position].respond = respond

    says(0, statistics(5, version=version))
    monkeypatch.setattr(oip, "STATS_BYTES_MAX", 1000)
    for bad in (
        statistics(7, name="globex/secret", version=version),
        statistics(7, version="0" * 16),
        {"model_stats": "many"},
        ["x" * 2000],
        web.Response(body=b"{", status=200),
        web.json_response(statistics(7, version=version), status=500),
    ):
        says(1, bad)
        (row,) = (await get(fleet.control.url, "/v2/models/acme/m/stats", fleet.key)).json["model_stats"]
        assert (row["name"], row["version"], row["inference_count"]) == ("acme/m", version, 5)


async def test_a_large_body_passes_through_and_the_nodes_verdict_comes_back(site: Site) -> None:
    """Too large to be held, and for a node's texts: what the node says of it says that all of it came."""
    raw = packed(b"a" * (3 * JSON_BYTES_MAX))
    ask = {"inputs": [raw_input("text", "BYTES", [1], len(raw))]}
    routed, direct = [await infer(url, "acme/m", site.key, ask, raw) for url in (site.url, site.gateways[0])]
    assert (routed.status, routed.json) == (direct.status, direct.json)
    assert f"texts of {len(raw)} bytes" in routed.error


async def test_what_reaches_the_node_names_the_version_and_nothing_else(fleet: Fleet) -> None:
    version = fleet.ref.partition("@")[2]
    answer = await infer(fleet.control.url, "acme%2Fm", fleet.key, texts("a"), b"xyz")
    (seen,) = fleet.gateways[0].seen
    assert (answer.json, seen.method) == ({"node": "n0"}, "POST")
    assert seen.path == f"/v2/models/acme/m/versions/{version}/infer"
    assert seen.body.endswith(b"xyz")
    assert seen.headers[HEADER_LENGTH] == str(len(seen.body) - 3)


async def test_bodies_above_their_limit_are_refused_before_a_node_is_asked(fleet: Fleet) -> None:
    path = "/v2/models/acme/m/infer"
    for headers, size in (({}, TENSOR_JSON_BYTES_MAX), ({HEADER_LENGTH: "10"}, TENSOR_BODY_BYTES_MAX)):
        answer = await declare(fleet.control.url, path, fleet.key, size + 1, headers)
        assert answer.status == 413
        assert str(size) in answer.error
    assert fleet.gateways[0].seen == []


async def test_a_node_with_an_older_plan_has_no_say_in_this_protocol_either(fleet: Fleet) -> None:
    """It tells by a header why it refuses: the body's shape has no place for a code."""
    other = await fleet.control.push("acme", "newer", model_files(seed=9))
    await fleet.beat(1)

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        code = {"x-bunkhouse-error-code": "model_not_found"}
        return web.json_response({"error": "no such model"}, status=404, headers=code)

    fleet.gateways[0].respond = respond
    answer = await infer(fleet.control.url, other["ref"].partition("@")[0], fleet.key, texts("a"))
    assert (answer.status, answer.json) == (200, {"node": "n1"})
