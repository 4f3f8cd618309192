"""A router that is a process of its own, with real listeners and lines, in the test's loop.

Covers: joining, calls over mutual TLS to nodes, what it knows of keys, models and nodes as control's word
changes, control being away, being removed, tickets. Does not cover: real processes
(``test_routers_running``), the numbers of the feed (``test_feed``), or strangers (``attacks/test_routers``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest_asyncio
from aiohttp import web
from running_control import Answer, Running, model_files, running, until
from running_routers import RunningRouter, joined_router
from running_uplinks import Agent, joined_agent, resident


@dataclass(slots=True)
class Scene:
    """Control without ``--plain-routes``, a node behind mutual TLS that has a model, and a router."""

    control: Running
    agent: Agent
    router: RunningRouter
    key: str
    ref: str
    folder: Path
    seen: list[str] = field(default_factory=list)

    async def embed(self, key: str | None = None) -> Answer:
        body = {"model": "acme/m", "input": "x"}
        return await self.router.call("POST", "/v1/embeddings", body, key=key or self.key)


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response({"by": "box"}, headers={"x-ratelimit-limit-requests": "7"})

    async with running(tmp_path / "control", plain_routes=False) as control:
        key = await control.tenant("acme")
        model = await control.push("acme", "m", model_files())
        async with joined_agent(control, tmp_path / "box", answer) as agent:
            agent.owner.models = (resident(model["ref"]),)
            async with joined_router(control, tmp_path / "r1") as router:
                agent.uplink.changed()
                nodes = control.server.control.cluster.nodes
                await until(lambda: nodes["box"].have == control.server.control.cluster.newest)
                await until(lambda: bool(nodes["box"].near))
                await router.until_heard()
                yield Scene(control, agent, router, key, model["ref"], tmp_path, seen)


async def test_it_brings_calls_to_nodes_over_mutual_tls(scene: Scene) -> None:
    answer = await scene.embed()
    assert (answer.status, answer.json()) == (200, {"by": "box"})
    assert answer.headers["x-ratelimit-limit-requests"] == "7"
    assert scene.seen == [f"Bearer {scene.key}"]
    models = await scene.router.call("GET", "/v1/models", key=scene.key)
    assert [card["id"] for card in models.json()["data"]] == ["acme/m"]
    health = await scene.router.call("GET", "/healthz")
    assert (health.status, health.json()) == (200, {"status": "ok", "view_age_ms": 0, "connected": True})
