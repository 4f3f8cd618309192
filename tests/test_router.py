"""The router: to the right node, streamed, and over to another before the first byte.

Covers: the router of a real control server in front of fake node gateways on loopback. Does not cover:
the order of nodes (``test_cluster``), the real gateway, or hostile paths (``attacks``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from routed_fleet import Fleet, gateway, routed_fleet
from running_control import empty_report, model_files, model_report, running, until


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with routed_fleet(tmp_path) as made:
        yield made


async def test_a_call_reaches_the_node_that_has_the_model(fleet: Fleet) -> None:
    answer = await fleet.embed()
    assert (answer.status, answer.json()) == (200, {"node": "n0"})
    (seen,) = fleet.gateways[0].seen
    assert (seen.method, seen.path) == ("POST", "/v1/embeddings")
    assert json.loads(seen.body) == {"model": "acme/m", "input": "x"}
    assert seen.headers["Authorization"] == f"Bearer {fleet.key}"
    await fleet.beat(0)
    await fleet.beat(1, "resident")
    assert (await fleet.embed(fleet.ref)).json() == {"node": "n1"}


async def test_headers_pass_by_list(fleet: Fleet) -> None:
    answer = await fleet.control.call(
        "POST",
        "/v1/embeddings?x=1",
        {"model": "acme/m"},
        key=fleet.key,
        headers={"x-stainless-lang": "python", "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4"},
    )
    assert answer.headers["x-bunkhouse-node"] == "n0"
    assert answer.headers["x-bunkhouse-tier"] == "disk"
    assert answer.headers["x-request-id"] == "req_n"
    assert "x-secret" not in answer.headers
    (seen,) = fleet.gateways[0].seen
    assert seen.path == "/v1/embeddings?x=1"
    assert seen.headers["x-stainless-lang"] == "python"
    assert not {"Cookie", "X-Forwarded-For"} & seen.headers.keys()


@pytest.mark.parametrize("path", ["moderations", "responses", "audio/speech", "embeddings/", "%65mbeddings"])
async def test_what_no_node_has_is_refused_before_a_model_is_looked_for(fleet: Fleet, path: str) -> None:
    answer = await fleet.control.call("POST", f"/v1/{path}", {"model": "acme/m"}, key=fleet.key)
    assert (answer.status, answer.json()["error"]["code"]) == (404, "unknown_route")
    assert "there are /v1/models, /v1/embeddings," in answer.json()["error"]["message"]
    assert fleet.gateways[0].seen == []


async def test_an_openai_client_without_v1_is_told_so(fleet: Fleet) -> None:
    answer = await fleet.control.call("POST", "/chat/completions", {"model": "acme/m"}, key=fleet.key)
    assert (answer.status, "base_url that ends with /v1" in answer.error["message"]) == (404, True)
    answer = await fleet.control.call("POST", "/chat", {"model": "acme/m"}, key=fleet.key)
    assert "base_url" not in answer.error["message"]


async def test_a_stream_is_passed_on_piece_by_piece(fleet: Fleet) -> None:
    """Each event arrives before the node has written the next: nothing is gathered on the way."""
    turns = [asyncio.Event() for _ in range(3)]

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for number, turn in enumerate(turns):
            await turn.wait()
            await answer.write(f"data: {number}\n\n".encode())
        return answer

    fleet.gateways[0].respond = respond
    url = f"{fleet.control.url}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {fleet.key}"}
    async with fleet.control.session.post(url, json={"model": "acme/m"}, headers=headers) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        for number, turn in enumerate(turns):
            turn.set()
            assert await answer.content.readuntil(b"\n\n") == f"data: {number}\n\n".encode()


async def test_an_unreachable_node_is_passed_over(fleet: Fleet) -> None:
    await fleet.nodes[0].beat(
        fleet.folder, report=empty_report("http://127.0.0.1:9", (model_report(fleet.ref, "resident"),))
    )
    assert (await fleet.embed()).json() == {"node": "n1"}
    # It is asked last for a while, so the next caller does not wait for it.
    assert (await fleet.embed()).json() == {"node": "n1"}


async def test_a_dead_node_does_not_fill_the_log(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Callers come by the thousand; one line in a while says what they all met."""
    for node in fleet.nodes:
        report = empty_report("http://127.0.0.1:9", (model_report(fleet.ref, "resident"),))
        await node.beat(fleet.folder, report=report)
    for _ in range(10):
        assert (await fleet.embed()).status == 503
    said = [record.getMessage() for record in caplog.records if record.name == "bunk.control"]
    assert sorted(line.split(":")[0] for line in said) == ["node n0", "node n1"], said


@pytest.mark.parametrize("status", [502, 503])
async def test_a_node_that_can_not_now_is_passed_over(fleet: Fleet, status: int) -> None:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": {}}, status=status)

    fleet.gateways[0].respond = respond
    await fleet.beat(1, disk_bytes=1)
    assert (await fleet.embed()).json() == {"node": "n1"}
    assert len(fleet.gateways[0].seen) == 1


async def test_a_node_that_dies_before_its_answer_is_passed_over(fleet: Fleet) -> None:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    fleet.gateways[0].respond = respond
    assert (await fleet.embed()).json() == {"node": "n1"}


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 507])
async def test_a_nodes_verdict_is_final(fleet: Fleet, status: int) -> None:
    """Only "not here, not now" is worth another node; a refusal is an answer."""

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        headers = {"Retry-After": "7", "retry-after-ms": "6500", "x-should-retry": "true"}
        return web.json_response({"error": {"code": "x"}}, status=status, headers=headers)

    fleet.gateways[0].respond = respond
    answer = await fleet.embed()
    assert (answer.status, answer.headers["Retry-After"]) == (status, "7")
    assert answer.headers["retry-after-ms"] == "6500"
    assert fleet.gateways[1].seen == []


async def test_the_last_nodes_503_is_passed_on(fleet: Fleet) -> None:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"code": "node_draining"}}, status=503)

    for each in fleet.gateways:
        each.respond = respond
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"]) == (503, "node_draining")


async def test_without_a_node_the_caller_is_told_when_to_come_back(fleet: Fleet) -> None:
    for name in ("n0", "n1"):
        await fleet.control.call("DELETE", f"/api/v1/nodes/{name}")
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"]) == (503, "no_node")
    assert int(answer.headers["Retry-After"]) >= 1


async def test_a_stream_that_breaks_says_so(fleet: Fleet) -> None:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.close()
        return answer

    fleet.gateways[0].respond = respond
    answer = await fleet.embed()
    first, second = answer.body.decode().strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == "node_lost"
    assert fleet.gateways[1].seen == []


async def test_an_answer_that_breaks_does_not_look_complete(fleet: Fleet) -> None:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        await answer.write(b'{"half":')
        assert request.transport is not None
        request.transport.close()
        return answer

    fleet.gateways[0].respond = respond
    with pytest.raises(aiohttp.ClientError):
        await fleet.embed()


async def test_a_caller_that_leaves_cancels_on_the_node(fleet: Fleet) -> None:
    asked = asyncio.Event()

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        asked.set()
        await asyncio.Event().wait()
        return web.Response()

    fleet.gateways[0].respond = respond
    call = asyncio.create_task(fleet.embed())
    await asked.wait()
    call.cancel()
    await asyncio.wait([call])
    await fleet.gateways[0].left.wait()
    await until(lambda: all(v.in_flight == 0 for v in fleet.control.server.control.cluster.nodes.values()))
    assert fleet.control.server.control.bodies.held_bytes == 0
    # That the caller left says nothing against the node.
    fleet.gateways[0].respond = None
    assert (await fleet.embed()).json() == {"node": "n0"}


async def test_a_model_pushed_a_moment_ago_is_waited_for(fleet: Fleet) -> None:
    """The call comes before the node has heard of the model: it waits for the node's next word."""
    await fleet.control.push("acme", "fresh", model_files(7))
    call = asyncio.create_task(fleet.embed("acme/fresh"))
    await until(lambda: fleet.control.server.control.bodies.held_bytes > 0)
    assert not call.done()
    await fleet.nodes[1].beat(fleet.folder, report=empty_report(fleet.gateways[1].url))
    await fleet.nodes[1].beat(fleet.folder, report=empty_report(fleet.gateways[1].url))
    assert (await call).json() == {"node": "n1"}


async def test_a_call_right_after_controls_start_waits_for_the_nodes_return(tmp_path: Path) -> None:
    async with gateway("n0") as only:
        async with running(tmp_path / "control") as before:
            key = await before.tenant("acme")
            model = await before.push("acme", "m", model_files())
            node = await before.join("n0", only.url)
            await node.beat(tmp_path)
        async with running(tmp_path / "control") as control:
            node.node_url = control.bound.node_url
            body = {"model": "acme/m"}
            call = asyncio.create_task(control.call("POST", "/v1/embeddings", body, key=key))
            await until(lambda: control.server.control.bodies.held_bytes > 0)
            await node.beat(tmp_path, report=empty_report(only.url))
            await node.beat(tmp_path, report=empty_report(only.url, (model_report(model["ref"]),)))
            assert (await call).json() == {"node": "n0"}


async def test_models_are_listed_without_a_node(fleet: Fleet) -> None:
    listed = (await fleet.control.call("GET", "/v1/models", key=fleet.key)).json()
    assert listed["object"] == "list"
    assert [(item["id"], item["object"], item["owned_by"]) for item in listed["data"]] == [
        ("acme/m", "model", "acme")
    ]
    for written in ("acme/m", "acme%2Fm", fleet.ref, fleet.ref.replace("/", "%2F").replace("@", "%40")):
        shown = await fleet.control.call("GET", f"/v1/models/{written}", key=fleet.key)
        assert (shown.status, shown.json()["id"]) == (200, "acme/m"), written
    assert all(not each.seen for each in fleet.gateways)


async def test_foreign_and_absent_models_answer_alike(fleet: Fleet) -> None:
    await fleet.control.tenant("globex")
    await fleet.control.push("globex", "secret", model_files(9))
    foreign, absent = await fleet.embed("globex/secret"), await fleet.embed("globex/absent")
    assert foreign.status == absent.status == 404
    assert foreign.body.replace(b"secret", b"absent") == absent.body
    assert foreign.error["code"] == "model_not_found"
    assert all(not each.seen for each in fleet.gateways)


async def test_an_operator_key_is_not_for_calling_models(fleet: Fleet) -> None:
    answer = await fleet.control.call("POST", "/v1/embeddings", {"model": "acme/m"})
    assert (answer.status, answer.error["code"]) == (403, "tenant_key_required")


@pytest.mark.parametrize(
    ("body", "field"), [({}, "model"), ({"model": 5}, "model"), ([], None), ({"model": None}, "model")]
)
async def test_a_call_without_a_model_names_the_field(fleet: Fleet, body: object, field: str | None) -> None:
    answer = await fleet.control.call("POST", "/v1/embeddings", body, key=fleet.key)
    assert (answer.status, answer.error["param"]) == (400, field)
