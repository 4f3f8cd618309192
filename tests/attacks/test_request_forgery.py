"""Threat: a URL that makes control connect to what only control can reach.

Covers: what a node that was taken over says of where it is: addresses in every notation, names that lead
elsewhere, names that change, redirects; that only operators name origins, and that no origin is fetched over
a network. Does not cover: paths of ``file://`` origins (``test_origins``), or who answers at a node's address
over TLS (``test_posing``).
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from routed_fleet import Fleet, routed_fleet
from running_control import empty_report, running

from control.node_session import open_session
from control.places import NodeResolver, check_gateway_url, check_url, dialled_url
from packer.types import BadValue

# Where clouds answer with a machine's credentials, and other places that no node is at.
NOBODYS = [
    "http://169.254.169.254",
    "http://169.254.169.254:80/",
    "http://[fe80::1]:80",
    "http://[fe80::1%25eth0]:80",
    "http://[::ffff:169.254.169.254]:80",
    "http://[::ffff:a9fe:a9fe]:80",
    "http://[2002:a9fe:a9fe::]:80",
    "http://224.0.0.1:80",
    "http://[ff02::1]:80",
    "http://255.255.255.255:80",
    "http://240.0.0.1:80",
]
# Not a place at all.
WRITTEN_WRONG = [
    "http://user:pw@box:80",
    "http://box@169.254.169.254:80",
    "http://box:80@169.254.169.254",
    "http://169.254.169.254\\@box:80",
    "http://box:80/latest/meta-data",
    "http://box:80?x",
    "http://box:80#x",
    "http://box:0",
    "http://box:99999",
    "http://",
    "http:///x",
    "//box:80",
    "box:80",
    "file:///etc/passwd",
    "ftp://box:80",
    "gopher://box:80",
    "unix:///run/x.sock",
    "http+unix://x",
    "javascript:1",
    "http://box\r\nX: y:80",
    "http://box :80",
    "http://bo\u2024x:80",
    "http://\u2460\u2461:80",
]


@pytest.mark.parametrize("url", [*NOBODYS, *WRITTEN_WRONG])
def test_no_node_is_at_such_a_place(url: str) -> None:
    with pytest.raises(BadValue, match="gateway_url"):
        check_gateway_url(url)
    with pytest.raises(BadValue, match="peer_url"):
        check_url(url.replace("http://", "https://"), "peer_url", ("https",))


@pytest.mark.parametrize("url", ["http://10.0.0.5:80", "https://box-1.lan:8443/", "http://[fd00::5]:80"])
def test_private_networks_are_where_nodes_are(url: str) -> None:
    check_gateway_url(url)


@pytest.mark.parametrize(
    ("url", "peer", "own", "called"),
    [
        ("http://127.0.0.1:80", "10.0.0.5", "10.0.0.1", "http://10.0.0.5:80"),
        ("http://127.9.9.9:80", "10.0.0.5", "10.0.0.1", "http://10.0.0.5:80"),
        ("http://localhost:80", "10.0.0.5", "10.0.0.1", "http://10.0.0.5:80"),
        ("http://LOCALHOST.:80", "10.0.0.5", "10.0.0.1", "http://10.0.0.5:80"),
        ("https://[::1]:80", "10.0.0.5", "10.0.0.1", "https://10.0.0.5:80"),
        ("http://[::ffff:127.0.0.1]:80", "fd00::5", "fd00::1", "http://[fd00::5]:80"),
        ("http://[::ffff:0.0.0.0]:80", "10.0.0.5", "10.0.0.1", "http://10.0.0.5:80"),
        ("http://0.0.0.0:80", "::ffff:10.0.0.5", "10.0.0.1", "http://10.0.0.5:80"),
        # On one machine that is what they mean.
        ("http://127.0.0.1:80", "127.0.0.1", "127.0.0.1", "http://127.0.0.1:80"),
        ("http://127.0.0.1:80", "::ffff:127.0.0.1", None, "http://127.0.0.1:80"),
        ("http://localhost:80", "10.0.0.1", "::ffff:10.0.0.1", "http://localhost:80"),
        ("http://10.0.0.9:80", "10.0.0.5", "10.0.0.1", "http://10.0.0.9:80"),
        ("http://box:80", "10.0.0.5", "10.0.0.1", "http://box:80"),
    ],
)
def test_a_nodes_own_machine_is_not_controls(url: str, peer: str, own: str | None, called: str) -> None:
    assert dialled_url(url, peer, own) == called


class Names(AbstractResolver):
    """Every name leads to the addresses that a test says; the next look finds the next."""

    def __init__(self, *looks: list[str]) -> None:
        self._looks = list(looks)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        return [
            ResolveResult(hostname=host, host=one, port=port, family=family, proto=0, flags=0)
            for one in found
        ]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "found",
    [
        "127.0.0.1",
        "127.0.1.1",
        "::1",
        "::ffff:127.0.0.1",
        "0.0.0.0",
        "::",
        "169.254.169.254",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
    ],
)
@pytest.mark.parametrize("name", ["box.evil.example", "127.1", "2130706433", "0x7f000001", "localhost.evil"])
async def test_no_name_leads_to_this_machine_or_to_its_credentials(name: str, found: str) -> None:
    with pytest.raises(OSError, match="leads to no address"):
        await NodeResolver(Names([found])).resolve(name, 80)
    kept = await NodeResolver(Names([found, "10.0.0.5"])).resolve(name, 80)
    assert [one["host"] for one in kept] == ["10.0.0.5"]


async def test_this_machines_own_names_lead_to_it() -> None:
    for name in ("localhost", socket.gethostname()):
        assert await NodeResolver(Names(["127.0.0.1"])).resolve(name, 80)


async def test_a_name_that_changes_after_it_was_looked_up_is_looked_at_again() -> None:
    resolver = NodeResolver(Names(["10.0.0.5"], ["127.0.0.1"]))
    assert await resolver.resolve("box.evil.example", 80)
    with pytest.raises(OSError, match="leads to no address"):
        await resolver.resolve("box.evil.example", 80)


async def test_the_routers_session_asks_that_resolver_for_numbers_too() -> None:
    """127.1 is a name to aiohttp and an address to the system: a service of this machine stays unreached."""
    reached: list[str] = []

    async def service(request: web.Request) -> web.Response:
        reached.append(request.path)
        return web.Response(text="secret")

    app = web.Application()
    app.router.add_get("/", service)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    session = open_session()
    try:
        for host in ("127.1", "2130706433", "0x7f000001", "017700000001"):
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http://{host}:{port}/")
        async with session.get(f"http://127.0.0.1:{port}/") as answer:
            assert answer.status == 200
    finally:
        await session.close()
        await runner.cleanup()
    assert reached == ["/"]


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with routed_fleet(tmp_path) as fleet:
        yield fleet


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_of_a_node_is_followed(fleet: Fleet, status: int) -> None:
    """Neither by the router's calls nor by its questions: the key goes nowhere else."""
    first, second = fleet.gateways

    async def elsewhere(request: web.Request, body: bytes) -> web.Response:
        return web.Response(status=status, headers={"Location": f"{second.url}/internal", "Refresh": "0"})

    first.respond = elsewhere
    answer = await fleet.embed()
    assert (answer.status, answer.error["code"]) == (502, "node_failed")
    assert "Location" not in answer.headers
    assert "Refresh" not in answer.headers
    stats = await fleet.control.call("GET", "/v2/models/acme/m/stats", key=fleet.key)
    assert stats.status == 200
    assert {one.path for one in second.seen} <= {"/v2/models/stats"}


async def test_a_beat_that_names_such_a_place_is_refused_whole(fleet: Fleet) -> None:
    before = fleet.control.server.control.cluster.nodes["n0"].gateway_url
    for url in ("http://169.254.169.254:80", "http://[::ffff:169.254.169.254]:80"):
        answer = await fleet.nodes[0].raw_beat(fleet.folder, report=empty_report(url))
        assert (answer.status, answer.error["field"]) == (400, "gateway_url")
        secure = url.replace("http:", "https:")
        good = empty_report(fleet.gateways[0].url)
        for field, report in (
            ("peer_url", replace(good, peer_url=secure)),
            ("route_url", replace(good, route_url=secure)),
        ):
            answer = await fleet.nodes[0].raw_beat(fleet.folder, report=report)
            assert (answer.status, answer.error["field"]) == (400, field)
    assert fleet.control.server.control.cluster.nodes["n0"].gateway_url == before


@pytest.mark.parametrize(
    "origin",
    [
        "http://{host}/model",
        "https://{host}/model",
        "http://127.0.0.1@{host}/model",
        "http://[::ffff:127.0.0.1]:{port}/model",
        "http://2130706433:{port}/model",
        "s3://{host}/model",
        "gs://{host}/model",
        "az://{host}/model",
        "ftp://{host}/model",
        "gopher://{host}/model",
        "hf://{host}/model",
        "dict://{host}/model",
        "file://{host}/etc",
        "file://localhost@{host}/etc",
        "jar:file:///x!/y",
        "//{host}/model",
        "data:,x",
    ],
)
async def test_no_origin_is_fetched_over_a_network(tmp_path: Path, origin: str) -> None:
    """Not for an operator either: nothing listens in vain, nobody is connected to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        url = origin.replace("{host}", f"127.0.0.1:{port}").replace("{port}", str(port))
        async with running(tmp_path / "control", origin_roots=(str(tmp_path),)) as control:
            key = await control.tenant("acme")
            for caller, statuses in ((key, {403}), ("", {400, 422})):
                answer = await control.call(
                    "POST", "/api/v1/tenants/acme/models", {"name": "m", "origin": url}, key=caller
                )
                assert answer.status in statuses, answer.body
            assert (await control.call("GET", "/api/v1/models")).json()["items"] == []
        with pytest.raises(BlockingIOError):
            listener.accept()
