"""What the router does with a call on its way: other nodes, broken answers, streams, slow ends, headers.

Covers: the router of a real control server in front of node gateways on loopback, scripted ones and the
real one. Does not cover: which routes there are (``test_router``) or the order of nodes (``test_cluster``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import fake_node
import pytest
import pytest_asyncio
from aiohttp import web
from fake_node import FakeNode
from routed_fleet import Fleet, Gateway, Respond, routed_fleet
from running_control import PATIENCE_S, Answer, empty_report, model_report, until

from agent.facade import EngineFrame, EngineRequest
from control.routes import answers, forwarding
from control.routes.access import Access, Caller, Route, add_routes, render_error
from control.routes.forwarding import Call, Once, Stopwatch, ask_nodes, call_query, hand_on, request_headers
from control.routes.router import resolve
from control.state import Control
from packer.crowd import Crowd
from packer.http import CROWD, protect, runner
from packer.types import MIB, Task


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with routed_fleet(tmp_path) as made:
        yield made


def refusing(status: int, code: str) -> Respond:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"code": code}}, status=status)

    return respond


async def raw_node(fleet: Fleet, answer: bytes) -> asyncio.Server:
    """Put in n0's place a server that writes ``answer``, byte by byte as it is, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    report = empty_report(url, (model_report(fleet.ref, "resident"),))
    await fleet.nodes[0].beat(fleet.folder, report=report)
    return server


# --- another node, or not -------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["worker_died", "restore_timeout", ""])
async def test_a_refusal_goes_on_only_to_a_node_that_has_the_model(fleet: Fleet, code: str) -> None:
    """To load it a second time costs more than to come back, and a model that kills its workers must not
    go round."""
    fleet.gateways[0].respond = refusing(503, code)
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"], fleet.gateways[1].seen) == (503, code, [])
    await fleet.beat(1, host_bytes=1)
    assert (await fleet.embed()).json() == {"node": "n1"}


@pytest.mark.parametrize("code", ["node_draining", "restore_failed"])
async def test_a_node_that_is_no_place_for_the_model_is_passed_over(fleet: Fleet, code: str) -> None:
    fleet.gateways[0].respond = refusing(503, code)
    assert (await fleet.embed()).json() == {"node": "n1"}


async def test_the_first_nodes_refusal_is_passed_on_when_no_other_is_there(fleet: Fleet) -> None:
    """It says when to come back; that the second node could not be reached says nothing."""
    fleet.gateways[0].respond = refusing(503, "restore_failed")
    await fleet.nodes[1].beat(fleet.folder, report=empty_report("http://127.0.0.1:9"))
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"]) == (503, "restore_failed")


@pytest.mark.parametrize(("status", "code"), [(401, "invalid_api_key"), (404, "model_not_found")])
async def test_a_node_with_an_older_plan_has_no_say(
    fleet: Fleet, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control knows key and model; a node that has not heard of them yet is not the one to ask."""
    monkeypatch.setattr(forwarding, "PLAN_SECONDS", 0.01)
    fleet.key = await fleet.control.key("acme")
    for gateway in fleet.gateways:
        gateway.respond = refusing(status, code)
    # The caller is told to come back, not that it has no key.
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"]) == (503, "no_node")
    assert all(gateway.seen for gateway in fleet.gateways)
    # One that has confirmed the plan is believed.
    await fleet.beat(0, "resident")
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"]) == (status, code)


async def test_a_dropped_idle_connection_is_not_a_dead_node(fleet: Fleet) -> None:
    """A node drops connections that nothing came over, or was started anew: the call is sent again."""
    used: set[int] = set()
    dropped: list[int] = []

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        if id(request.transport) in used:
            dropped.append(1)
            request.transport.abort()
        used.add(id(request.transport))
        return web.json_response({"node": "n0"})

    fleet.gateways[0].respond = respond
    for _ in range(2):
        assert (await fleet.embed()).json() == {"node": "n0"}
    assert dropped
    assert fleet.gateways[1].seen == []
    assert fleet.control.server.control.routed.unreachable == 0


async def test_a_node_that_dies_on_a_new_connection_is_asked_once(fleet: Fleet) -> None:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    fleet.gateways[0].respond = respond
    assert (await fleet.embed()).json() == {"node": "n1"}
    assert len(fleet.gateways[0].seen) == 1


# --- answers that break ---------------------------------------------------------------------------


async def test_a_small_answer_that_breaks_is_an_error_with_a_status(fleet: Fleet) -> None:
    """The node may have done the work: nobody else is asked, and the caller may try again."""
    server = await raw_node(fleet, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"], answer.error["type"]) == (502, "node_lost", "server_error")
    assert (answer.headers["x-should-retry"], int(answer.headers["Retry-After"])) == ("true", 1)
    assert fleet.gateways[1].seen == []
    server.close()


async def test_a_stream_that_breaks_within_an_event_ends_with_one_whole_error(fleet: Fleet) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = b'data: {"a":1}\n\ndata: {"half'
    server = await raw_node(fleet, head + f"{len(data):x}\r\n".encode() + data + b"\r\n")
    answer = await fleet.embed()
    events = answer.body.decode().split("\n\n")
    assert (events[0], len(events), events[2]) == ('data: {"a":1}', 3, "")
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "node_lost"
    assert fleet.control.server.control.cluster.nodes["n0"].avoid_until_ms > 0
    server.close()


async def test_trailers_end_at_the_router(fleet: Fleet) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    server = await raw_node(fleet, head + b"Trailer: x-t\r\n\r\n2\r\n{}\r\n0\r\nx-t: 1\r\n\r\n")
    answer = await fleet.embed()
    assert (answer.status, answer.body) == (200, b"{}")
    assert not {"Trailer", "x-t"} & set(answer.headers)
    server.close()


# --- streams and slow ends ------------------------------------------------------------------------


@pytest.mark.parametrize("comment", [b": restoring\n\n", b":\n\n", b"\n\n", b":\r\n\r\n"])
async def test_comments_pass_at_once_and_events_when_they_are_whole(fleet: Fleet, comment: bytes) -> None:
    more = asyncio.Event()

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(comment + b"data: [")
        await more.wait()
        await answer.write(b"1]\n\n")
        return answer

    fleet.gateways[0].respond = respond
    url = f"{fleet.control.url}/v1/chat/completions"
    async with fleet.control.session.post(url, json={"model": "acme/m"}, headers=fleet.headers) as answer:
        async with asyncio.timeout(PATIENCE_S):
            assert await answer.content.readany() == comment
        more.set()
        assert await answer.content.readuntil(b"\n\n") == b"data: [1]\n\n"


async def test_a_reader_that_does_not_read_stops_the_node(fleet: Fleet) -> None:
    """What lies between them is what sockets hold; then the node waits, and then the reader is given up."""
    fleet.control.server._runners[0].app[CROWD].stall_seconds = 0.3
    written = 0

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        nonlocal written
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        while written < 1024 * MIB:
            await answer.write(b"data: " + bytes(60_000) + b"\n\n")
            written += 60_000
        return answer

    fleet.gateways[0].respond = respond
    _, port = fleet.control.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port), limit=1024)
    body = b'{"model":"acme/m"}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {fleet.key}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await fleet.gateways[0].left.wait()
    assert written < 64 * MIB
    control = fleet.control.server.control
    await until(lambda: control.cluster.in_flight == 0)
    # It says nothing about the node.
    assert (control.routed.left, control.cluster.nodes["n0"].avoid_until_ms) == (1, 0)
    writer.close()
    del reader


async def test_a_reader_that_does_not_take_the_end_is_given_up_on() -> None:
    """Pieces up to 64 KiB are only put into the buffer; the end waits until all of it is taken."""
    request, response = mock.Mock(app={CROWD: Crowd(stall_seconds=0.01)}), mock.Mock()
    request.transport.get_write_buffer_size.return_value = 70_000
    response.write_eof = asyncio.Event().wait
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionResetError, match="took nothing"):
            await answers.end(request, response)
    request.transport.abort.assert_called_once()


async def test_a_caller_that_leaves_cancels_in_the_engine(fleet: Fleet) -> None:
    """Through the real gateway: the engine's generator is closed, the lease is given back."""
    begun = asyncio.Event()

    async def endless(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        yield EngineFrame({"delta": "a"})
        begun.set()
        await asyncio.Event().wait()

    node = FakeNode(script=endless)
    control = fleet.control.server.control
    for row in control.catalog.key_specs.values():
        node.keys[row.key_id] = row
    for model in control.catalog.models.values():
        node.models.clear()
        node.add(fake_node.spec_of("acme", "m", Task.GENERATION, model.ref.version))
    async with fake_node.served(node) as url:
        report = empty_report(url, (model_report(fleet.ref, "resident"),))
        await fleet.nodes[0].beat(fleet.folder, report=report)
        ask = {"model": "acme/m", "prompt": "x", "stream": True}
        async with fleet.control.session.post(
            f"{fleet.control.url}/v1/completions", json=ask, headers=fleet.headers
        ) as answer:
            assert b'"a"' in await answer.content.readuntil(b"\n\n")
            await begun.wait()
            answer.close()
        await node.happened("stopped")
        await node.happened("finished")
    await until(lambda: control.cluster.in_flight == 0)
    assert control.routed.left == 1


# --- bodies that can be sent only once ------------------------------------------------------------


@pytest_asyncio.fixture
async def passing(fleet: Fleet) -> AsyncIterator[str]:
    async with passing_route(fleet, MIB // 2, 0.3, []) as url:
        yield url


@asynccontextmanager
async def passing_route(
    fleet: Fleet, limit_bytes: int, stall_seconds: float, transports: list[asyncio.Transport]
) -> AsyncIterator[str]:
    """A route whose call names its model in the path and whose body is passed through; its URL."""

    async def handle(control: Control, request: web.Request, caller: Caller) -> web.StreamResponse:
        spec = resolve(control, caller, request.match_info["ref"])
        assert isinstance(request.transport, asyncio.Transport)
        transports.append(request.transport)
        body = Once(request, limit_bytes, stall_seconds)
        call = Call(spec, "POST", "/v1/embeddings", call_query(request), request_headers(request), body)
        begun = await ask_nodes(control, caller, call, Stopwatch())
        return await hand_on(control, request, begun)

    app = web.Application()
    add_routes(
        app,
        fleet.control.server.control,
        [Route("POST", "/pass/{ref:.+}", Access.TENANT, handle, stays=False)],
    )
    protect(app, render_error)
    running = runner(app, 1.0)
    await running.setup()
    await web.TCPSite(running, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{running.addresses[0][1]}/pass/acme/m"
    await running.cleanup()


def counting(gateway: Gateway) -> Respond:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"node": gateway.name, "bytes": len(body)})

    return respond


async def pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(65_536)


async def post(fleet: Fleet, url: str, data: object) -> Answer:
    async with fleet.control.session.post(url, data=data, headers=fleet.headers) as answer:
        return Answer(answer.status, answer.headers, await answer.read())


@pytest.mark.parametrize("sized", [True, False])
async def test_a_large_body_passes_through(fleet: Fleet, passing: str, sized: bool) -> None:
    fleet.gateways[0].respond = counting(fleet.gateways[0])
    data = bytes(3 * 65_536) if sized else pieces(3)
    assert (await post(fleet, passing, data)).json() == {"node": "n0", "bytes": 3 * 65_536}
    assert ("Content-Length" in fleet.gateways[0].seen[0].headers) == sized


async def test_a_node_that_does_not_read_stops_the_sender(fleet: Fleet) -> None:
    """What lies between the two is what sockets hold; nothing is gathered here."""
    may_read, sent = asyncio.Event(), 0
    transports: list[asyncio.Transport] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"chunked" in head
        await may_read.wait()
        while not (await reader.read(1 << 20)).endswith(b"0\r\n\r\n"):
            pass
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async def until_it_is_stopped() -> AsyncIterator[bytes]:
        nonlocal sent
        while not may_read.is_set():
            sent += 65_536
            assert sent < 256 * MIB, "nobody stops the sender"
            yield bytes(65_536)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=65_536)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await fleet.nodes[0].beat(fleet.folder, report=empty_report(url, (model_report(fleet.ref, "resident"),)))
    seen = turns = 0

    def stopped() -> bool:
        """The router has stopped reading from the caller, and not only for a moment."""
        nonlocal seen, turns
        moves = not transports or transports[0].is_reading() or sent != seen
        seen, turns = sent, 0 if moves else turns + 1
        return turns > 2_000

    async with passing_route(fleet, 1024 * MIB, 30.0, transports) as to:
        call = asyncio.create_task(post(fleet, to, until_it_is_stopped()))
        await until(stopped)
        held = sent
        may_read.set()
        assert (await call).status == 200
    assert held < 64 * MIB
    server.close()


async def test_a_body_that_was_begun_is_not_sent_to_another(fleet: Fleet, passing: str) -> None:
    fleet.gateways[1].respond = counting(fleet.gateways[1])
    fleet.gateways[0].respond = refusing(503, "node_draining")
    answer = await post(fleet, passing, bytes(65_536))
    assert (answer.status, answer.error["code"], fleet.gateways[1].seen) == (503, "node_draining", [])
    # Of a node that takes no connection it has seen nothing.
    report = empty_report("http://127.0.0.1:9", (model_report(fleet.ref, "resident"),))
    await fleet.nodes[0].beat(fleet.folder, report=report)
    assert (await post(fleet, passing, bytes(65_536))).json() == {"node": "n1", "bytes": 65_536}


async def test_a_body_above_its_limit_ends_the_call(fleet: Fleet, passing: str) -> None:
    fleet.gateways[0].respond = counting(fleet.gateways[0])
    for data in (bytes(MIB), pieces(9)):
        answer = await post(fleet, passing, data)
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert fleet.gateways[0].seen == fleet.gateways[1].seen == []


async def test_a_caller_that_stops_sending_is_given_up(fleet: Fleet, passing: str) -> None:
    async def stops() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.Event().wait()

    answer = await post(fleet, passing, stops())
    assert (answer.status, answer.error["code"]) == (408, "body_timeout")
    # That says nothing about the node.
    assert fleet.control.server.control.cluster.nodes["n0"].avoid_until_ms == 0


# --- headers and figures --------------------------------------------------------------------------


async def test_hop_by_hop_headers_end_here(fleet: Fleet) -> None:
    sent = {
        "Connection": "close, x-stainless-lang",
        "x-stainless-lang": "python",
        "TE": "trailers",
        "Proxy-Authorization": "Basic eDp5",
        "Upgrade": "h2c",
        "X-Forwarded-Host": "evil",
        "Forwarded": "for=1.2.3.4",
        "Via": "1.1 x",
        "Expect": "100-continue",
        "x-bunkhouse-trace": "kept",
    }
    ask = {"model": "acme/m"}
    answer = await fleet.control.call("POST", "/v1/embeddings", ask, key=fleet.key, headers=sent)
    assert answer.status == 200
    (seen,) = fleet.gateways[0].seen
    assert seen.headers["x-bunkhouse-trace"] == "kept"
    assert seen.headers["Host"] == fleet.gateways[0].url.removeprefix("http://")
    reached = {name.lower() for name in seen.headers}
    assert not reached & {name.lower() for name in sent} - {"x-bunkhouse-trace"}


async def test_the_router_counts_its_own_work(fleet: Fleet) -> None:
    counted = fleet.control.server.control.routed
    fleet.gateways[0].respond = refusing(503, "node_draining")
    await fleet.embed()
    assert (counted.calls, counted.tries, counted.elsewhere) == (1, 2, 1)
    assert sum(counted.added_counts) == 1
    text = counted.text(0)
    assert "bunkhouse_router_tries_total 2" in text
    assert 'bunkhouse_router_added_seconds_bucket{le="+Inf"} 1' in text
    assert "acme" not in text
