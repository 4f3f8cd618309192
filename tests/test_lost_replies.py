"""Every POST of a node whose answer is lost: it is sent again, and there is one effect.

Covers: joining, renewing in time and late, beats with records and with usage, answers to questions, shares
and sources, by real uplinks at a real control server whose connections break when it answers; and keys while
a node's clock is off. Does not cover: management calls (``test_idempotency``), or histories of many losses
(``test_cluster_simulation``).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from direct_node import direct_node
from running_control import PATIENCE_S, Running, model_files, running, until
from running_uplinks import Owner, beating, make_uplink, token_file

from agent.sources import ControlAway
from control.routes import access
from control.routes.access import Route
from control.routing import wall_ms
from control.server import build_node_app
from control.state import Control
from packer.questions import Asks
from packer.shares import NOTHING
from packer.types import parse_ref
from packer.usage import UsageBatch, UsageRow, Used, hour_of
from packer.wire import WIRE_VERSION, OriginTurn, Record, SharesAnswer, SharesAsk, decode

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
EVENTS = tuple(Record(seq, seq, "restored", "acme", "acme/m@" + "0" * 16, f"#{seq}") for seq in (1, 2, 3))

USED = UsageBatch(1, (UsageRow(hour_of(wall_ms()), "acme", "acme/m", Used(3)),))


class Losses:
    """``next``: how many answers of each path are lost from now on; ``lost``: how many were."""

    def __init__(self) -> None:
        self.next: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    def guarded(
        self, real: Callable[[Control, Route[Control]], Handler]
    ) -> Callable[[Control, Route[Control]], Handler]:
        def guard(control: Control, route: Route[Control]) -> Handler:
            handler = real(control, route)

            async def losing(request: web.Request) -> web.StreamResponse:
                answer = await handler(request)
                if self.next[route.path] and answer.status < 300:
                    self.next[route.path] -= 1
                    self.lost[route.path] += 1
                    assert request.transport is not None
                    request.transport.abort()
                return answer

            return losing

        return guard


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    made = Losses()
    monkeypatch.setattr(access, "_guarded", made.guarded(access._guarded))
    monkeypatch.setattr("agent.uplink.RETRY_FIRST_S", 0.01)
    return made


@pytest_asyncio.fixture
async def control(tmp_path: Path, losses: Losses) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def test_a_lost_answer_to_any_post_of_a_node_leaves_one_effect(
    control: Running, losses: Losses, tmp_path: Path
) -> None:
    state = control.server.control
    join, renew, late, beat, shares, sources, replies = (
        f"/node/v1/{name}" for name in ("join", "renew", "renew-late", "beat", "shares", "sources", "replies")
    )
    posts = {
        route.resource.canonical
        for route in build_node_app(state).router.routes()
        if route.method == "POST" and route.resource is not None
        if route.resource.canonical.startswith("/node/")  # the other lines are no node's
    }
    assert posts == {join, renew, late, beat, shares, sources, replies}
    losses.next[join] = 2
    owner = Owner()
    uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
    async with beating(uplink):
        await until(lambda: uplink.connected)
        losses.next[beat] = 2
        owner.records = list(EVENTS)
        uplink.changed()
        await until(lambda: not owner.records)
        await control.tenant("acme")
        version = await control.push("acme", "m", model_files())
        await owner.until_versions(1)
        losses.next[beat] = 2
        owner.usage.unconfirmed = USED
        uplink.changed()
        await until(lambda: not owner.usage.unconfirmed.rows)
        losses.next.update((shares, sources, replies))
        ask = SharesAsk(WIRE_VERSION, "", 1, NOTHING, begun=True)
        with pytest.raises(aiohttp.ClientError):
            await uplink._post(shares, ask, PATIENCE_S, PATIENCE_S)
        again = decode((await uplink._post(shares, ask, PATIENCE_S, PATIENCE_S)).body, SharesAnswer)
        held = state.shares.book.holders
        assert {node: each.session for node, each in held.items()} == {"box": again.session}
        with pytest.raises(ControlAway):
            await uplink.sources(parse_ref(version["ref"]), 0)
        assert (await uplink.sources(parse_ref(version["ref"]), 0)).origin is OriginTurn.GRANTED
        assert await state.questions.ask("box", "acme", Asks.MODEL, version["ref"]) is not None
        await until(lambda: uplink.connected)
        identity = uplink._identity
        due_s, renewed = identity.renew_at_s(), asyncio.Event()
        identity.watch(renewed.set)
        losses.next[renew] = 1
        identity.now_s = lambda: due_s
        await control.tenant("globex")  # its plan ends the long poll
        async with asyncio.timeout(PATIENCE_S):
            await renewed.wait()
        identity.now_s = time.time
        losses.next[late] = 1
        with pytest.raises(aiohttp.ClientError):
            await uplink.joining._ask_late()
        assert (await uplink.joining._ask_late()).status == 200
    assert losses.lost == Counter({join: 2, beat: 4, shares: 1, sources: 1, replies: 1, renew: 1, late: 1})
    events = (await control.call("GET", "/api/v1/events?limit=1000")).json()["items"]
    assert [event["detail"] for event in events if event["kind"] == "restored"] == ["#1", "#2", "#3"]
    (used,) = (await control.call("GET", "/api/v1/usage")).json()["items"]
    assert used["requests"] == 3
    assert list(state.catalog.nodes) == ["box"]
    assert len(state.catalog.tokens) == 1


@pytest.mark.parametrize("off_ms", [-600_000, 600_000], ids=["behind", "ahead"])
async def test_a_key_ends_by_controls_clock_where_the_nodes_is_ten_minutes_off(
    control: Running, tmp_path: Path, off_ms: int
) -> None:
    await control.tenant("acme")
    await control.push("acme", "m", model_files())
    key = await control.key("acme", ttl_s=60)
    async with direct_node(control, tmp_path, "n0") as node:
        node.clocks.wall = wall_ms() + off_ms

        async def embed() -> int:
            async with control.session.post(
                f"{node.url}/v1/embeddings",
                json={"model": "acme/m", "input": "x"},
                headers={"Authorization": f"Bearer {key}"},
            ) as answer:
                return answer.status

        assert await embed() == 200
        node.clocks.steady += 61_000
        assert await embed() == 401
