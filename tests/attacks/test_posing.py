"""Somebody between control's router and the nodes: who poses as the one to the other gets nothing.

Covers: callers of a node's listener for control that are not control, servers at a node's address that are
not that node, requests in plain HTTP. Does not cover: the node listener of control (``test_control_auth``)
or packs between nodes (``test_peer_listener``).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from running_control import PATIENCE_S, FakeNode, Running, empty_report, model_files, running, until
from running_uplinks import Agent, ended, joined_agent, resident

from control import authority as authority_module
from control.authority import Authority
from control.ca import make_ca


@dataclass(slots=True)
class Scene:
    """Control without ``--plain-routes``, a tenant, and a node that is reached over mutual TLS."""

    control: Running
    agent: Agent
    key: str
    ref: str
    folder: Path
    seen: list[str] = field(default_factory=list)

    @property
    def authority(self) -> Authority:
        return self.control.server.control.authority

    async def embed(self) -> int:
        answer = await self.control.call(
            "POST", "/v1/embeddings", {"model": "acme/m", "input": "x"}, key=self.key
        )
        return answer.status

    async def report(self, url: str) -> None:
        """The node says that it is called at another place."""
        self.agent.owner.route_url = url
        self.agent.uplink.changed()
        nodes = self.control.server.control.cluster.nodes
        await until(lambda: nodes[self.agent.name].route_url == url)


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response({"by": "box"})

    async with running(tmp_path / "control", plain_routes=False) as control:
        key = await control.tenant("acme")
        model = await control.push("acme", "m", model_files())
        async with joined_agent(control, tmp_path / "box", answer) as agent:
            agent.owner.models = (resident(model["ref"]),)
            made = Scene(control, agent, key, model["ref"], tmp_path, seen)
            await made.report(agent.listener.url)
            yield made


async def test_what_the_router_brings_crosses_mutual_tls(scene: Scene) -> None:
    """Both sides show a certificate of the cluster, and the tenant's key arrives."""
    assert await scene.embed() == 200
    assert scene.seen == [f"Bearer {scene.key}"]
    assert scene.agent.listener.url.startswith("https:")


# --- callers that are not control -----------------------------------------------------------------


def context_of(scene: Scene, chain: Path | None, key: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=scene.authority.ca_pem)
    if chain is not None:
        context.load_cert_chain(chain, key)
    return context


async def is_let_in(scene: Scene, context: ssl.SSLContext) -> bool:
    try:
        async with (
            asyncio.timeout(PATIENCE_S),
            aiohttp.ClientSession() as session,
            session.get(f"{scene.agent.listener.url}/metrics", ssl=context) as answer,
        ):
            return answer.status == 200
    except aiohttp.ClientError:
        return False


@contextmanager
def life_of(days: float) -> Iterator[None]:
    with mock.patch.object(authority_module, "SERVER_CERTIFICATE_LIFE", timedelta(days=days)):
        yield


async def test_only_control_is_let_in(scene: Scene, tmp_path: Path) -> None:
    """Nobody, a node of the same cluster, control's listener's own certificate, control of another CA with
    the same name, and control of yesterday are refused; control itself is not."""
    control = scene.folder / "control"
    assert await is_let_in(scene, context_of(scene, scene.authority.make_control_certificate()))
    assert not await is_let_in(scene, context_of(scene, None))
    identity = scene.folder / "box" / "identity"
    assert not await is_let_in(scene, context_of(scene, identity / "node.crt", identity / "node.key"))
    assert not await is_let_in(scene, context_of(scene, control / "server.pem"))
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", scene.authority.cluster)
    assert not await is_let_in(scene, context_of(scene, other.make_control_certificate()))
    with life_of(-0.001):
        assert not await is_let_in(scene, context_of(scene, scene.authority.make_control_certificate()))
    assert scene.seen == [""]


async def test_plain_http_is_not_answered(scene: Scene) -> None:
    with pytest.raises(aiohttp.ClientError):
        async with scene.control.session.get(scene.agent.listener.url.replace("https", "http")):
            pass


async def test_a_connection_does_not_outlive_controls_certificate(scene: Scene) -> None:
    """An open connection of a certificate that ended meanwhile is answered no more."""
    context = context_of(scene, scene.authority.make_control_certificate())
    url = f"{scene.agent.listener.url}/metrics"
    async with aiohttp.ClientSession() as session:
        async with session.get(url, ssl=context) as answer:
            assert answer.status == 200
        later = datetime.now(UTC) + timedelta(days=31)
        with mock.patch.object(scene.agent.identity, "now_s", later.timestamp):
            async with session.get(url, ssl=context) as answer:
                assert answer.status == 421
    assert scene.seen == [""]


async def test_a_connection_does_not_outlive_the_ca_it_was_opened_under(scene: Scene, tmp_path: Path) -> None:
    """When another CA has taken over, what was opened with a certificate of the former is answered no more,
    however long that certificate lives; while both are trusted it is."""
    context = context_of(scene, scene.authority.make_control_certificate())
    url = f"{scene.agent.listener.url}/metrics"
    identity = scene.agent.identity
    await ended(scene.agent.task)  # it would meet papers of the test's making
    papers = identity.answer
    assert papers is not None
    following = make_ca("another CA", datetime.now(UTC)).pem
    trusted = [papers.ca_pem + following, following, papers.ca_pem]
    statuses = []
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.get(url, ssl=context) as answer:
            assert answer.status == 200
        for ca_pem in trusted:
            identity.answer = replace(papers, ca_pem=ca_pem)
            async with session.get(url, ssl=context) as answer:
                statuses.append(answer.status)
        identity.answer = None  # removed, and not joined again
        async with session.get(url, ssl=context) as answer:
            statuses.append(answer.status)
        identity.answer = papers
    assert statuses == [200, 421, 200, 421]


# --- servers that are not the node ----------------------------------------------------------------


@asynccontextmanager
async def impostor(context: ssl.SSLContext | None) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that records what it is told."""
    told: list[str] = []

    async def take(request: web.Request) -> web.Response:
        told.append(str(request.headers))
        return web.json_response({"by": "impostor"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    scheme = "https" if context is not None else "http"
    try:
        yield f"{scheme}://127.0.0.1:{runner.addresses[0][1]}", told
    finally:
        await runner.cleanup()


async def served_as(scene: Scene, name: str, authority: Authority) -> ssl.SSLContext:
    """TLS as a server with a fresh key that ``authority`` certified as node ``name``."""
    node = FakeNode("", name, "")
    node.ca_pem = authority.ca_pem
    node.chain_pem = authority.issue_node(authority.read_request(node.csr_pem()), name)
    (scene.folder / "impostor").mkdir(exist_ok=True)
    node.context(scene.folder / "impostor")  # writes key and chain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(scene.folder / "impostor" / f"{name}.pem")
    return context


@pytest.mark.parametrize("who", ["another-node", "the-name-with-another-key", "another-ca", "control"])
async def test_the_router_says_nothing_to_who_is_not_the_node(scene: Scene, tmp_path: Path, who: str) -> None:
    """A server at the node's address must show that node's name with the key of the catalog."""
    if who == "another-ca":
        (tmp_path / "other").mkdir()
        context = await served_as(scene, "box", Authority(tmp_path / "other", scene.authority.cluster))
    elif who == "control":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(scene.folder / "control" / "server.pem")
    else:
        context = await served_as(scene, "other" if who == "another-node" else "box", scene.authority)
    async with impostor(context) as (url, told):
        await scene.report(url)
        assert await scene.embed() == 503
        assert told == []


async def test_the_router_sends_nothing_in_the_clear(scene: Scene) -> None:
    """A node that offers plain HTTP alone is sent no key and no prompt unless the operator says so."""
    async with impostor(None) as (url, told):
        node = await scene.control.join("plain", url)
        for _ in range(2):
            await node.beat(scene.folder, report=empty_report(url, (resident(scene.ref),)))
        await scene.control.call("DELETE", "/api/v1/nodes/box")
        assert await scene.embed() == 503
        # Neither does what is asked of nodes on the side.
        stats = await scene.control.call("GET", "/v2/models/stats", key=scene.key)
        assert stats.status == 200
        assert told == []
