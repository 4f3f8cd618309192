"""A router that is a process of its own, with real listeners and lines, in the test's loop.

Covers: joining, calls over mutual TLS to nodes, what it knows of keys, models and nodes as control's word
changes, control being away, also at its start, being removed, tickets. Does not cover: real processes
(``test_routers_running``), the numbers of the feed (``test_feed``), or strangers (``attacks/test_routers``).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from running_control import PATIENCE_S, Answer, FakeNode, Running, model_files, running, until
from running_routers import RunningRouter, joined_router, router_config, router_token, serving
from running_uplinks import Agent, ended, joined_agent, resident

from control.config import parse_address
from control.lives import CLONE_MEMORY_MS
from control.router_process import Router
from control.routes import forwarding
from packer.joining import Removed
from packer.wire import BoxFacts


@dataclass(slots=True)
class Scene:
    """Control without ``--plain-routes``, a node behind mutual TLS that has a model, and a router."""

    control: Running
    agent: Agent
    router: RunningRouter
    key: str
    ref: str
    folder: Path
    control_life: AsyncExitStack
    seen: list[str]

    async def embed(self, key: str | None = None) -> Answer:
        body = {"model": "acme/m", "input": "x"}
        return await self.router.call("POST", "/v1/embeddings", body, key=key or self.key)


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response({"by": "box"}, headers={"x-ratelimit-limit-requests": "7"})

    async with AsyncExitStack() as life:
        control = await life.enter_async_context(running(tmp_path / "control", plain_routes=False))
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
                yield Scene(control, agent, router, key, model["ref"], tmp_path, life, seen)


async def test_it_brings_calls_to_nodes_over_mutual_tls(scene: Scene) -> None:
    answer = await scene.embed()
    assert (answer.status, answer.json()) == (200, {"by": "box"})
    assert answer.headers["x-ratelimit-limit-requests"] == "7"
    assert scene.seen == [f"Bearer {scene.key}"]
    models = await scene.router.call("GET", "/v1/models", key=scene.key)
    assert [card["id"] for card in models.json()["data"]] == ["acme/m"]
    health = await scene.router.call("GET", "/healthz")
    assert (health.status, health.json()) == (
        200,
        {"status": "ok", "view_age_ms": 0, "connected": True, "kept": False},
    )


async def test_what_control_changes_counts_here_a_moment_later(scene: Scene) -> None:
    """A key that is revoked, one that is made, a model that is pushed, another version of it, and its end."""
    control, router = scene.control, scene.router
    other = await control.key("acme")
    await router.until_heard()
    assert (await scene.embed(other)).status == 200
    await control.call("DELETE", f"/api/v1/keys/{other.split('_')[1]}")
    await router.until_heard()
    assert (await scene.embed(other)).status == 401
    versions = [scene.ref, (await control.push("acme", "m", model_files(1)))["ref"]]
    await router.until_heard()

    async def listed() -> list[str]:
        cards = (await router.call("GET", "/v1/models", key=scene.key)).json()["data"]
        return [card["id"] for card in cards]

    assert await listed() == ["acme/m", versions[0]]
    assert (await router.call("GET", "/v1/models/acme/m", key=scene.key)).json()["version"] in versions[1]
    await control.call("DELETE", f"/api/v1/models/{versions[1]}")
    await router.until_heard()
    own = control.server.control.catalog
    assert set(router.router.catalog.models) == set(own.models)
    assert router.router.catalog.latest == own.latest
    await control.call("DELETE", "/api/v1/tenants/acme")
    await router.until_heard()
    assert (await scene.embed()).status == 401
    assert not router.router.catalog.models


async def test_a_node_that_goes_is_asked_no_more(scene: Scene) -> None:
    await scene.control.call("DELETE", "/api/v1/nodes/box")
    await scene.router.until_heard()
    assert not scene.router.router.cluster.nodes
    answer = await scene.embed()
    assert (answer.status, answer.error["code"]) == (503, "no_node")
    ready = await scene.router.call("GET", "/v2/health/ready")
    assert ready.status == 503


async def test_it_routes_on_while_control_is_away(scene: Scene, tmp_path: Path) -> None:
    """With what it heard last, and without a wait; its health says how old that is. When control is back it
    goes on, also while control has not heard a node yet."""
    router = scene.router.router
    before = (router.view.start, router.view.epoch)
    listen = parse_address(scene.control.bound.node_url.removeprefix("https://"), "node_url")
    await scene.control_life.aclose()
    await until(lambda: not router.line.connected)
    assert (await scene.embed()).status == 200
    health = (await scene.router.call("GET", "/healthz")).json()
    assert (health["status"], health["connected"]) == ("ok", False)
    direct = await scene.router.call("GET", "/api/v1/route?model=acme/m", key=scene.key)
    assert (direct.status, direct.json()["items"]) == (200, [])
    await ended(scene.agent.task)
    async with running(tmp_path / "control", plain_routes=False, node_listen=listen) as again:
        await until(lambda: router.line.connected and router.view.is_whole)
        assert (router.view.start, router.view.epoch) == (again.server.control.start_name, before[1] + 1)
        assert router.cluster.nodes["box"].report is not None  # as control said it before it went
        assert again.server.control.cluster.nodes["box"].report is None
        called = len(scene.seen)
        with mock.patch.object(forwarding, "PLAN_SECONDS", 3_600.0):
            assert (await scene.embed()).status == 200
        assert len(scene.seen) == called + 1


async def test_a_router_that_is_removed_stops_at_once(scene: Scene) -> None:
    """Its process ends, and nodes let it in no more, on connections that are open as well."""
    router = scene.router.router
    assert (await scene.embed()).status == 200
    assert (await scene.control.call("DELETE", "/api/v1/routers/r1")).status == 204
    async with asyncio.timeout(PATIENCE_S):
        error = await router.failed()
    assert isinstance(error, Removed)
    assert "bunk router token create" in str(error)
    agent = scene.agent
    await until(lambda: agent.owner.plan is not None and not agent.owner.plan.routers)
    served = len(scene.seen)
    assert (await scene.embed()).status == 503
    assert len(scene.seen) == served


async def test_nodes_let_in_no_router_of_another_key_or_name(scene: Scene) -> None:
    """A certificate of the cluster's CA is not enough: the plan names the router and its key."""
    authority = scene.control.server.control.authority
    folder = scene.folder / "stolen"
    folder.mkdir()
    for name in ("r1", "r2", "box"):
        stolen = FakeNode("", name, "", ca_pem=authority.ca_pem)
        stolen.chain_pem = authority.issue_router(authority.read_request(stolen.csr_pem()), name)
        context = stolen.context(folder)
        context.check_hostname = False
        with pytest.raises(aiohttp.ClientError):
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{scene.agent.listener.url}/x", ssl=context) as answer,
            ):
                await answer.read()
    assert scene.seen == []


async def test_tickets_are_controls(scene: Scene) -> None:
    """A router that is asked where to call nodes hands on what control answers."""
    direct = await scene.router.call("GET", "/api/v1/route?model=acme/m", key=scene.key)
    own = await scene.control.call("GET", "/api/v1/route?model=acme/m", key=scene.key)
    nodes = [[(item["node"], item["url"]) for item in answer.json()["items"]] for answer in (direct, own)]
    assert nodes[0] == nodes[1] != []
    assert direct.json()["items"][0]["ticket"]


async def test_it_renews_its_certificate_in_time(scene: Scene) -> None:
    router = scene.router.router
    identity = router.identity
    assert identity.answer is not None
    before, due_s = identity.answer.certificate_pem, identity.renew_at_s()
    identity.now_s = lambda: due_s
    scene.control.server.control.feed.wake()  # it looks after each answer
    await scene.control.key("acme")
    await until(lambda: identity.answer is not None and identity.answer.certificate_pem != before)
    await until(lambda: router.line.connected)
    assert (await scene.embed()).status == 200


async def test_it_starts_again_with_the_identity_that_it_has(scene: Scene) -> None:
    await scene.router.router.stop()
    again = Router(router_config(scene.control, scene.folder / "r1", "r1", None))
    async with serving(again, scene.control) as running_again:
        await running_again.until_heard()
        answer = await running_again.call(
            "POST", "/v1/embeddings", {"model": "acme/m", "input": "x"}, key=scene.key
        )
        assert answer.status == 200


async def test_a_router_that_starts_while_control_is_away_routes_as_before(scene: Scene) -> None:
    """By what it kept, and it says how old that is; when control is back, control has the word."""
    await scene.router.router.stop()
    listen = parse_address(scene.control.bound.node_url.removeprefix("https://"), "node_url")
    await scene.control_life.aclose()
    router = Router(router_config(scene.control, scene.folder / "r1", "r1", None))
    async with serving(router, scene.control) as again:
        await until(lambda: router.view.is_ready)
        health = (await again.call("GET", "/healthz")).json()
        assert (health["status"], health["connected"], health["kept"]) == ("ok", False, True)
        scene.router = again
        assert (await scene.embed()).status == 200
        assert (await scene.embed(scene.key + "x")).status == 401
        assert scene.seen == [f"Bearer {scene.key}"]
        await ended(scene.agent.task)
        async with running(scene.folder / "control", plain_routes=False, node_listen=listen):
            await until(lambda: router.line.connected and router.view.is_whole)
            health = (await again.call("GET", "/healthz")).json()
            assert (health["connected"], health["kept"], health["view_age_ms"]) == (True, False, 0)
            assert router.cluster.nodes["box"].near == (scene.ref,)


async def test_a_router_that_was_removed_while_it_was_stopped_is_let_in_by_nobody(scene: Scene) -> None:
    """As one whose line was cut: it goes by what it knew until it hears of it, and nodes have heard."""
    await scene.router.router.stop()
    kept = scene.folder / "r1" / "view.kept"
    assert kept.exists()
    assert (await scene.control.call("DELETE", "/api/v1/routers/r1")).status == 204
    agent = scene.agent
    await until(lambda: agent.owner.plan is not None and not agent.owner.plan.routers)
    listen = parse_address(scene.control.bound.node_url.removeprefix("https://"), "node_url")
    await scene.control_life.aclose()
    router = Router(router_config(scene.control, scene.folder / "r1", "r1", None))
    async with serving(router, scene.control) as again:
        await until(lambda: router.view.is_ready)
        scene.router = again
        assert (await scene.embed()).status == 503
        assert scene.seen == []
        async with running(scene.folder / "control", plain_routes=False, node_listen=listen):
            async with asyncio.timeout(PATIENCE_S):
                assert isinstance(await router.failed(), Removed)
    assert not kept.exists()


async def test_a_control_that_answers_is_believed_before_what_was_kept(scene: Scene) -> None:
    """A key that was revoked meanwhile is good for no moment."""
    await scene.router.router.stop()
    await scene.control.call("DELETE", f"/api/v1/keys/{scene.key.split('_')[1]}")
    router = Router(router_config(scene.control, scene.folder / "r1", "r1", None))
    async with serving(router, scene.control) as again:
        async with asyncio.timeout(PATIENCE_S):
            await router.settled.wait()
        scene.router = again
        assert (await scene.embed()).status == 401
        assert not router.view.is_kept


async def test_two_boxes_with_one_routers_identity_are_both_told_nothing(scene: Scene) -> None:
    """They are found out when the second has begun, and go on as routers that lost their line; when one of
    them is gone for long enough, the other hears again."""
    control, first = scene.control.server.control, scene.router.router
    shutil.copytree(scene.folder / "r1", scene.folder / "copy")
    copy = Router(router_config(scene.control, scene.folder / "copy", "r1", None))
    copy.identity.box = BoxFacts("copy", "another boot")
    async with serving(copy, scene.control):
        event = await scene.control.recorded("router_cloned")
        assert event["detail"].startswith("r1: two boxes use its identity: host ")
        assert "host copy, at 127.0.0.1, boot another" in event["detail"]
        await until(lambda: not first.line.connected and not copy.line.connected)
        await until(lambda: first.line._complaint == copy.line._complaint == "router_cloned")
        (row,) = (await scene.control.call("GET", "/api/v1/routers")).json()["items"]
        assert row["state"] == "cloned"
        assert (await scene.embed()).status == 200
        direct = await scene.router.call("GET", "/api/v1/route?model=acme/m", key=scene.key)
        assert direct.json()["items"] == []
    later_ms = control.now_ms() + CLONE_MEMORY_MS + 1
    with mock.patch.object(control, "now_ms", return_value=later_ms):
        await scene.control.recorded("router_alone")
        await until(lambda: first.line.connected)
        (row,) = (await scene.control.call("GET", "/api/v1/routers")).json()["items"]
        assert row["state"] == "up"
    assert first.line._complaint == ""


async def test_a_router_that_is_started_again_is_no_copy(scene: Scene) -> None:
    await scene.router.router.stop()
    for boot in range(10):
        again = Router(router_config(scene.control, scene.folder / "r1", "r1", None))
        again.identity.box = BoxFacts("r1", f"boot {boot}")
        async with serving(again, scene.control) as running_again:
            await running_again.until_heard()
            await scene.control.key("acme")
            await running_again.until_heard()
    (row,) = (await scene.control.call("GET", "/api/v1/routers")).json()["items"]
    assert row["state"] == "up"


async def test_before_the_first_word_it_says_that_it_is_not_ready(scene: Scene) -> None:
    """Not that a key is wrong: a load balancer and a client both come again."""
    token = await router_token(scene.control, scene.folder / "r2")
    config = replace(
        router_config(scene.control, scene.folder / "r2", "r2", token), control_url="https://127.0.0.1:9"
    )
    async with serving(Router(config), scene.control) as early:
        for method, path in (("GET", "/healthz"), ("GET", "/v1/models"), ("POST", "/v1/embeddings")):
            answer = await early.call(method, path, key=scene.key)
            assert (answer.status, answer.error["code"]) == (503, "router_not_ready")
            assert answer.headers["x-should-retry"] == "true"


async def test_operators_see_routers(scene: Scene) -> None:
    said = scene.control.server.control.routers
    start = scene.control.server.control.start_name
    feed = scene.control.server.control.feed
    await until(lambda: (known := said.of("r1")) is not None and known.ask.start == start)
    await until(lambda: (known := said.of("r1")) is not None and feed.behind(known.ask.have) == 0)
    rows = (await scene.control.call("GET", "/api/v1/routers")).json()["items"]
    assert [(row["router"], row["state"], row["url"], row["behind"]) for row in rows] == [
        ("r1", "up", scene.router.url, 0)
    ]


async def test_keys_and_tokens_are_not_in_its_log_or_files(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    await scene.embed()
    await scene.embed(scene.key[:-1] + "x")
    await ended(scene.agent.task)
    scene.agent.listener.close()
    await scene.control.call("DELETE", "/api/v1/nodes/box")
    await scene.embed()
    await scene.router.router.stop()
    secret = scene.key.split("_", 2)[2]
    files = [path for path in (scene.folder / "r1").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"node.key", "node.crt", "identity.json", "view.kept"}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
    assert secret not in caplog.text
