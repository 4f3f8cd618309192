"""The SDK calls nodes itself when it can, and through the router when not.

Covers: both clients against a real control server with scripted gateways and with real ones, over real
sockets; which URLs are called at all; what is remembered, on a clock that the test moves. Does not cover:
what a node takes for a ticket (``attacks/test_tickets``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio
from aiohttp import web
from direct_node import direct_node
from routed_fleet import Fleet, Respond, routed_fleet
from running_control import empty_report, model_files, model_report, running

import bunkhouse
from bunkhouse._direct import (
    ASK_AGAIN_S,
    ASK_AGAIN_SOON_S,
    AVOID_S,
    MODELS_MAX,
    NOT_KNOWN_S,
    Ask,
    DirectWays,
    Way,
    allowed,
)
from bunkhouse._errors import Unreachable
from bunkhouse._request import Address, Answer, Request, resolve_address

T = TypeVar("T")
KINDS = ("blocking", "async")


class Caller:
    """Either client, awaited."""

    def __init__(self, kind: str, url: str, key: str, direct: bool | None) -> None:
        retry = bunkhouse.RetryPolicy(tries_max=1)
        self.blocking = bunkhouse.Client(url, key, direct=direct, retry=retry) if kind == "blocking" else None
        self.other = bunkhouse.AsyncClient(url, key, direct=direct, retry=retry)

    async def embed(self, model: str = "acme/m") -> bunkhouse.Embeddings:
        if self.blocking is not None:
            return await asyncio.to_thread(self.blocking.embed, model, "x")
        return await self.other.embed(model, "x")

    async def stream(self) -> str:
        if self.blocking is not None:
            client = self.blocking
            return await asyncio.to_thread(lambda: client.complete("acme/m", "x", stream=True).text())
        stream = await self.other.complete("acme/m", "x", stream=True)
        return await stream.text()

    async def close(self) -> None:
        await self.other.close()
        if self.blocking is not None:
            await asyncio.to_thread(self.blocking.close)


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with routed_fleet(tmp_path) as made:
        made.gateways[0].respond = embedding("n0")
        made.gateways[1].respond = embedding("n1")
        yield made


def embedding(name: str) -> Respond:
    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        if json.loads(body).get("stream"):
            return web.Response(
                text='data: {"choices":[{"text":"hi"}]}\n\ndata: [DONE]\n\n', content_type="text/event-stream"
            )
        data = [{"index": 0, "embedding": [0.5]}]
        return web.json_response({"model": "acme/m", "data": data}, headers={"x-bunkhouse-node": name})

    return respond


def refusing(status: int) -> Respond:
    """As a node answers a ticket; the router's calls, with the key, are answered."""
    well = embedding("n0")

    async def respond(request: web.Request, body: bytes) -> web.StreamResponse:
        if request.headers["Authorization"].startswith("Bearer bt_"):
            return web.json_response({"error": {"code": "x"}}, status=status)
        return await well(request, body)

    return respond


async def with_caller(
    kind: str, fleet: Fleet, direct: bool | None, calls: Callable[[Caller], Awaitable[T]]
) -> T:
    caller = Caller(kind, fleet.control.url, fleet.key, direct)
    try:
        return await calls(caller)
    finally:
        await caller.close()


def credentials_seen(fleet: Fleet, position: int = 0) -> list[str]:
    """How each call that reached a gateway proved itself: the key, a ticket, or else."""
    values = [seen.headers["Authorization"] for seen in fleet.gateways[position].seen]
    kinds = {f"Bearer {fleet.key}": "key"}
    return [kinds.get(value, "ticket" if value.startswith("Bearer bt_") else "else") for value in values]


# --- over real sockets ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_and_streams_go_to_the_node_with_a_ticket(fleet: Fleet, kind: str) -> None:
    async def calls(caller: Caller) -> None:
        assert (await caller.embed()).served.node == "n0"
        assert await caller.stream() == "hi"

    await with_caller(kind, fleet, True, calls)
    # The key reached no node, and nothing passed the router.
    assert credentials_seen(fleet) == ["ticket", "ticket"]
    assert fleet.control.server.control.routed.calls == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_by_default_the_second_call_of_a_model_goes_directly(fleet: Fleet, kind: str) -> None:
    async def calls(caller: Caller) -> None:
        for _ in range(3):
            await caller.embed()

    await with_caller(kind, fleet, None, calls)
    assert credentials_seen(fleet) == ["key", "ticket", "ticket"]
    fleet.gateways[0].seen.clear()
    await with_caller(kind, fleet, False, calls)
    assert credentials_seen(fleet) == ["key", "key", "key"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 403, 404, 502, 503, 504])
async def test_what_a_node_does_not_take_goes_through_the_router(
    fleet: Fleet, kind: str, status: int
) -> None:
    fleet.gateways[0].respond = refusing(status)

    async def calls(caller: Caller) -> None:
        for _ in range(2):
            assert (await caller.embed()).served.node == "n0"

    await with_caller(kind, fleet, True, calls)
    # The node is not asked again with every call.
    assert credentials_seen(fleet) == ["ticket", "key", "key"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_verdict_of_the_node_is_final(fleet: Fleet, kind: str) -> None:
    fleet.gateways[0].respond = refusing(429)
    with pytest.raises(bunkhouse.RateLimited):
        await with_caller(kind, fleet, True, lambda caller: caller.embed())
    assert credentials_seen(fleet) == ["ticket"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_node_that_can_not_be_reached_is_tried_once(fleet: Fleet, kind: str) -> None:
    connections: list[int] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    model = model_report(fleet.ref, "resident")
    await fleet.nodes[0].beat(fleet.folder, report=empty_report(url, (model,)))

    async def calls(caller: Caller) -> None:
        for _ in range(3):
            assert (await caller.embed()).served.node == "n1"

    await with_caller(kind, fleet, True, calls)
    # Once by the SDK, once by the router, and then by neither.
    assert len(connections) == 2
    server.close()


async def test_those_that_have_the_model_share_its_calls(fleet: Fleet) -> None:
    await fleet.beat(1, "resident")

    async def calls(caller: Caller) -> set[str | None]:
        return {(await caller.embed()).served.node for _ in range(40)}

    assert await with_caller("async", fleet, True, calls) == {"n0", "n1"}
    answer = await fleet.control.call("GET", f"/api/v1/route?model={fleet.ref}", key=fleet.key)
    assert answer.json()["model"] == fleet.ref
    assert len(answer.json()["items"]) == 2


async def test_a_node_that_has_not_heard_of_the_key_is_not_named(fleet: Fleet) -> None:
    ask = "/api/v1/route?model=acme/m"
    fleet.key = await fleet.control.key("acme")
    await fleet.beat(1)
    (item,) = (await fleet.control.call("GET", ask, key=fleet.key)).json()["items"]
    assert item["node"] == "n1"
    # Where somebody was sent a moment ago the model is most likely soon: the router goes there, too.
    assert (await fleet.embed()).json()["model"] == "acme/m"
    assert (len(fleet.gateways[0].seen), len(fleet.gateways[1].seen)) == (0, 1)


async def test_an_operator_can_turn_it_off(tmp_path: Path) -> None:
    async with running(tmp_path / "control", direct=False) as control:
        key = await control.tenant("acme")
        await control.push("acme", "m", model_files())
        async with direct_node(control, tmp_path, "n0"):
            answer = await control.call("GET", "/api/v1/route?model=acme/m", key=key)
            assert (answer.status, answer.json()["items"]) == (200, [])
            caller = Caller("async", control.url, key, True)
            await caller.embed()
            await caller.close()
            assert control.server.control.routed.calls == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_the_real_gateway_takes_the_ticket_until_the_key_is_revoked(tmp_path: Path, kind: str) -> None:
    async with running(tmp_path / "control") as control:
        key = await control.tenant("acme")
        await control.push("acme", "m", model_files())
        async with direct_node(control, tmp_path, "n0") as node:
            caller = Caller(kind, control.url, key, True)
            assert (await caller.embed()).served.node == "box-1"
            assert control.server.control.routed.calls == 0
            await control.call("DELETE", f"/api/v1/keys/{key.split('_')[1]}")
            await node.learn()
            with pytest.raises(bunkhouse.AuthenticationFailed):
                await caller.embed()
            await caller.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_knows_no_routes_is_asked_once(tmp_path: Path, kind: str) -> None:
    """A node's own gateway as ``base_url``, as before there were tickets."""
    async with running(tmp_path / "control") as control:
        key = await control.tenant("acme")
        await control.push("acme", "m", model_files())
        async with direct_node(control, tmp_path, "n0") as node:
            caller = Caller(kind, node.url, key, True)
            for _ in range(3):
                assert (await caller.embed()).served.node == "box-1"
            await caller.close()
            assert len(node.gateway.orders) == 3


# --- which URLs -----------------------------------------------------------------------------------

HERE, NEAR, SECURE = (
    resolve_address(url, "k") for url in ("http://127.0.0.1:1", "http://control:1", "https://control")
)


@pytest.mark.parametrize(
    ("url", "address", "may"),
    [
        ("http://127.0.0.1:2", HERE, True),
        ("http://[::1]:2/", HERE, True),
        ("http://gpu-7:2", HERE, True),
        ("http://gpu-7:2", NEAR, True),
        ("https://gpu-7:2", NEAR, True),
        ("https://gpu-7:2", SECURE, True),
        # In the clear, where the server is not called in the clear.
        ("http://gpu-7:2", SECURE, False),
        # The node's own loopback is not ours.
        ("http://127.0.0.1:2", NEAR, False),
        ("http://127.9.9.9:2", NEAR, False),
        ("http://localhost:2", SECURE, False),
        ("https://localhost:2", SECURE, False),
        ("http://x.localhost:2", NEAR, False),
        ("http://[::1]:2", NEAR, False),
        ("http://[::ffff:127.0.0.1]:2", NEAR, False),
        ("http://0.0.0.0:2", NEAR, False),
        # The server itself, and what is no plain URL of a host.
        ("http://control:1", NEAR, False),
        ("http://gpu-7:2/v1", NEAR, False),
        ("http://gpu-7:2?x", NEAR, False),
        ("http://u:p@gpu-7:2", NEAR, False),
        ("http://gpu-7:99999", NEAR, False),
        ("file:///etc/passwd", NEAR, False),
        ("http://", NEAR, False),
        ("http://gpu\n-7:2", NEAR, False),
        ("http://gpü:2", NEAR, False),
        ("", NEAR, False),
    ],
)
def test_which_urls_are_called(url: str, address: Address, may: bool) -> None:
    assert allowed(url, address) == may


# --- what is remembered ---------------------------------------------------------------------------


def request(model: str = "acme/m") -> Request:
    return Request("POST", "/v1/embeddings", repeatable=True, model=model)


def first(ways: Sequence[Way]) -> Way:
    return ways[0]


def told(*urls: str, refresh_ms: object = 60_000, expires_ms: object = 300_000) -> Answer:
    items = [{"node": "n", "url": url, "ticket": f"bt_{url[-1]}"} for url in urls]
    body = {"items": items, "refresh_ms": refresh_ms, "expires_ms": expires_ms}
    return Answer(200, {}, json.dumps(body).encode())


A, B = Way("http://a:1", "bt_1"), Way("http://b:2", "bt_2")
LOST = Unreachable("gone", sent=True)


def test_an_answer_is_gone_by_until_it_is_old_and_its_tickets_while_control_is_away() -> None:
    """When control does not answer at the refresh, calls go on directly for as long as it does not, and the
    nodes take them; when it names no node any more, they do not."""
    ways = DirectWays(NEAR, True, first)
    asked = ways.way(request(), 0.0)
    assert isinstance(asked, Ask)
    assert asked.request.path == "/api/v1/route?model=acme%2Fm"
    # While one asks, the others do not wait, and do not ask as well.
    assert ways.way(request(), 0.0) is None
    assert ways.told("acme/m", told(A.url, B.url), 0.0) == A
    assert ways.way(request(), 59.9) == A
    assert isinstance(ways.way(request(), 60.0), Ask)
    assert ways.way(request(), 60.0) == A
    assert ways.told("acme/m", None, 60.0) == A
    assert ways.way(request(), 60.0 + ASK_AGAIN_S - 0.1) == A
    assert isinstance(ways.way(request(), 60.0 + ASK_AGAIN_S), Ask)
    assert ways.told("acme/m", None, 60.0 + ASK_AGAIN_S) == A
    for minute in range(3, 15):
        at_s = 60.0 * minute
        assert isinstance(ways.way(request(), at_s), Ask)
        assert ways.told("acme/m", (None, Answer(503, {}, b""))[minute % 2], at_s) == A
        assert ways.way(request(), at_s + ASK_AGAIN_S - 0.1) == A
    assert isinstance(ways.way(request(), 900.0), Ask)
    assert ways.told("acme/m", Answer(401, {}, b""), 900.0) is None


def test_tickets_end_when_nobody_was_asked() -> None:
    ways = DirectWays(NEAR, True, first)
    ways.way(request(), 0.0)
    assert ways.told("acme/m", told(A.url, refresh_ms=600_000), 0.0) == A
    assert ways.way(request(), 299.9) == A
    assert ways.way(request(), 300.0) is None


def test_only_calls_of_models_with_a_key_are_asked_for() -> None:
    assert DirectWays(NEAR, True).way(request(""), 0.0) is None
    assert DirectWays(NEAR, False).way(request(), 0.0) is None
    assert DirectWays(replace(NEAR, api_key=None), True).way(request(), 0.0) is None


@pytest.mark.parametrize(
    ("answer", "pause_s"),
    [
        (None, ASK_AGAIN_S),
        (Answer(503, {}), ASK_AGAIN_S),
        (Answer(429, {}), ASK_AGAIN_S),
        (Answer(404, {}), NOT_KNOWN_S),
        (Answer(404, {}, b'{"error":{"code":"model_not_found"}}'), ASK_AGAIN_S),
        (Answer(200, {}, b"{}"), ASK_AGAIN_S),
        (Answer(200, {}, b'{"items":[{"url":1}],"refresh_ms":1,"expires_ms":1}'), ASK_AGAIN_S),
        (Answer(200, {}, b"[" * 100_000), ASK_AGAIN_S),
        (told(refresh_ms=60_000), ASK_AGAIN_S),
        (told("http://127.0.0.1:1"), ASK_AGAIN_S),
        (told(A.url, refresh_ms=True), ASK_AGAIN_S),
    ],
)
def test_without_a_node_the_server_is_not_asked_with_every_call(
    answer: Answer | None, pause_s: float
) -> None:
    ways = DirectWays(NEAR, True, first)
    assert isinstance(ways.way(request(), 0.0), Ask)
    assert ways.told("acme/m", answer, 0.0) is None
    assert ways.way(request(), pause_s - 0.1) is None
    assert isinstance(ways.way(request(), pause_s + 60.0), Ask)


def test_a_node_that_failed_is_left_to_others_for_a_while() -> None:
    ways = DirectWays(NEAR, True, first)
    ways.way(request(), 0.0)
    ways.told("acme/m", told(A.url, B.url), 0.0)
    assert ways.falls_back(request(), A, LOST, 1.0)
    assert ways.way(request(), 2.0) == B
    # For other models as well: it is the node that can not be reached.
    ways.way(request("acme/n"), 2.0)
    assert ways.told("acme/n", told(A.url), 2.0) is None
    assert ways.way(request(), AVOID_S - 0.1) == B
    # One that refuses is no way for this model any more; without any, the server is asked soon.
    assert ways.falls_back(request(), B, Answer(401, {}), 3.0)
    assert ways.falls_back(request(), A, Answer(503, {}), 3.0)
    assert ways.way(request(), 3.0 + ASK_AGAIN_SOON_S - 0.1) is None
    assert isinstance(ways.way(request(), 3.0 + ASK_AGAIN_SOON_S), Ask)


def test_what_may_have_been_done_is_not_done_again_unless_it_may_be() -> None:
    ways = DirectWays(NEAR, True, first)
    once = replace(request(), repeatable=False)
    assert not ways.falls_back(once, A, LOST, 0.0)
    assert ways.falls_back(once, A, Unreachable("gone", sent=False), 0.0)
    for status in (200, 400, 413, 429, 500, 507):
        assert not ways.falls_back(request(), A, Answer(status, {}), 0.0)


def test_what_is_remembered_is_bounded() -> None:
    ways = DirectWays(NEAR, None, first)
    for number in range(MODELS_MAX + 10):
        ways.way(request(f"acme/m{number}"), 0.0)
        ways.falls_back(request(), Way(f"http://n{number}:1", "bt_"), LOST, 0.0)
    assert len(ways._models) == len(ways._avoided) == MODELS_MAX
