"""A busy model with replicas through the real router: who serves it, and what callers see of it.

Covers: one node and two, the end of a holder, a node that refuses a copy, what is left when all have ended.
Does not cover: the rule itself (``test_copies``), or a node's side: nodes are gateways that say what they are
told to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from routed_fleet import Fleet, routed_fleet
from running_control import Answer, empty_report, model_report, until

from control.state import Control
from packer.types import parse_ref

SERVICE_MS = 100
CALLERS = 4


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with routed_fleet(tmp_path) as made:
        yield made


def control_of(fleet: Fleet) -> Control:
    return fleet.control.server.control


@dataclass(slots=True)
class Callers:
    """Who come again once they are answered. Every node answers one request after the other, each of which
    takes the clock on."""

    fleet: Fleet
    monkeypatch: pytest.MonkeyPatch
    past_ms: int = 0
    waiting: dict[str, list[asyncio.Event]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        control = control_of(self.fleet)
        begun_ms = control.now_ms()
        self.monkeypatch.setattr(control, "now_ms", lambda: begun_ms + self.past_ms)
        for gateway in self.fleet.gateways:
            gateway.respond = partial(self._respond, gateway.name)

    async def _respond(self, name: str, request: web.Request, body: bytes) -> web.StreamResponse:
        answer = asyncio.Event()
        self.waiting.setdefault(name, []).append(answer)
        await answer.wait()
        return web.json_response({"node": name})

    async def run(self, calls: int, callers: int = CALLERS) -> list[str]:
        """Who answered them."""
        asked: list[asyncio.Task[Answer]] = []
        ended = 0
        while ended < calls:
            while len(asked) < min(ended + callers, calls):
                asked.append(asyncio.ensure_future(self.fleet.embed()))
                await self._arrived(len(asked) - ended)
            self.past_ms += SERVICE_MS
            for queue in [queue for queue in self.waiting.values() if queue]:
                queue.pop(0).set()
                ended += 1
                await self._left(len(asked) - ended)
        answers = await asyncio.gather(*asked)
        assert [answer.status for answer in answers] == [200] * calls
        return [answer.json()["node"] for answer in answers]

    async def _left(self, calls: int) -> None:
        await until(lambda: control_of(self.fleet).cluster.in_flight == calls)

    async def _arrived(self, calls: int) -> None:
        await until(lambda: sum(map(len, self.waiting.values())) == calls)


async def order(fleet: Fleet, replicas: int) -> None:
    changed = await fleet.control.call("PATCH", "/api/v1/models/acme/m", {"replicas": replicas})
    assert changed.status == 200
    await fleet.beat(0, "resident")
    await fleet.beat(1)


async def test_a_busy_model_is_served_from_both_nodes_with_two_replicas_and_from_one_with_one(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = Callers(fleet, monkeypatch)
    assert set(await callers.run(24)) == {"n0"}
    await order(fleet, 2)
    assert (await callers.run(24)).count("n1") == 1, "one call brings the copy there"
    await fleet.beat(1, "resident")
    shared = await callers.run(24)
    assert abs(shared.count("n0") - shared.count("n1")) <= 2
    # One by one nobody waits: one of the two is enough.
    assert len(set(await callers.run(6, callers=1))) == 1

    async def die(request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    fleet.gateways[0].respond = die
    fleet.gateways[1].respond = None
    assert {(await fleet.embed()).json()["node"] for _ in range(6)} == {"n1"}
    cluster = control_of(fleet).cluster
    flows = [flow for view in cluster.nodes.values() for flow in view.flows.values()]
    assert len(flows) == 2
    await until(lambda: not any(flow.in_flight for flow in flows))


@pytest.mark.parametrize("status", [429, 502, 503, 507])
async def test_a_node_that_refuses_a_copy_is_made_up_for_by_the_holder(fleet: Fleet, status: int) -> None:
    asked = asyncio.Event()
    free = asyncio.Event()

    async def refuse(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"code": "x"}}, status=status)

    async def hold(request: web.Request, body: bytes) -> web.StreamResponse:
        asked.set()
        await free.wait()
        return web.json_response({"node": "n0"})

    await order(fleet, 2)
    fleet.gateways[1].respond = refuse
    fleet.gateways[0].respond = hold
    control = control_of(fleet)
    first = asyncio.ensure_future(fleet.embed())
    await asked.wait()
    ref = parse_ref(fleet.ref)
    control.cluster.waits.add(ref, 60_000, control.now_ms())
    second = asyncio.ensure_future(fleet.embed())
    await until(lambda: len(fleet.gateways[0].seen) == 2)
    assert len(fleet.gateways[1].seen) == 1
    free.set()
    assert [(await each).json() for each in (first, second)] == [{"node": "n0"}] * 2
    assert list(control.cluster.waits.owed[ref].declined) == ["n1"]
    control.cluster.waits.add(ref, 60_000, control.now_ms())
    assert (await fleet.embed()).status == 200
    assert len(fleet.gateways[1].seen) == 1, "it is not asked again for a while"


async def test_a_refusal_of_the_only_holder_is_the_callers_answer(fleet: Fleet) -> None:
    async def refuse(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"code": "x"}}, status=429)

    await order(fleet, 2)
    fleet.gateways[0].respond = refuse
    assert (await fleet.embed()).status == 429
    assert fleet.gateways[1].seen == []


async def test_who_calls_nodes_himself_is_told_of_the_next_copys_node_when_enough_has_waited(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request comes through the router at all: four callers are at the node whenever it reports."""
    await order(fleet, 2)
    control, past_ms = control_of(fleet), 0
    begun_ms = control.now_ms()
    monkeypatch.setattr(control, "now_ms", lambda: begun_ms + past_ms)

    async def named() -> list[str]:
        got = await fleet.control.call("GET", "/api/v1/route?model=acme/m", key=fleet.key)
        return [item["node"] for item in got.json()["items"]]

    busy = (model_report(fleet.ref, "resident", leases=4),)
    for _ in range(2):
        assert await named() == ["n0"]
        past_ms += 1_000
        await fleet.nodes[0].beat(fleet.folder, report=empty_report(fleet.gateways[0].url, busy))
    assert await named() == ["n1"]
    assert await named() == ["n0"]
    await fleet.beat(1, "resident")
    assert set(await named()) == {"n0", "n1"}
