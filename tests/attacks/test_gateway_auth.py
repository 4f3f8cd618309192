"""Threat: a caller without a right to ask reaches a route of the node's gateway.

Covers: every route of the app, found by asking the app, so that a route added later is covered on the day
it is added; keys that are absent, malformed, unknown, wrong, expired or doubled; another tenant's valid key;
metrics from beyond this machine. Does not cover: the router's and the management API's routes.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request
from fake_node import FakeNode, served

from agent.gateway import GatewayConfig, build_app
from agent.guard import LOCAL_PATHS, OPEN_PATHS
from agent.scrape_key import ScrapeKey
from packer.http import make_key, parse_key
from packer.local_caller import is_local

# The written list. Adding a route that answers without a key means adding it here, in a review.
OPEN = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
LOCAL = {"/metrics"}

BODIES: dict[str, dict[str, object]] = {
    "/v1/embeddings": {"model": "acme/embed", "input": "a"},
    "/v1/classify": {"model": "acme/moods", "input": "a"},
    "/v1/completions": {"model": "acme/chat", "prompt": "a"},
    "/v1/chat/completions": {"model": "acme/chat", "messages": [{"role": "user", "content": "a"}]},
}
TEXT = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}
# What to call for a route with a variable part, and what to send, by method and route.
PATHS = {
    ("GET", "/v1/models/{ref}"): "/v1/models/acme/embed",
    ("GET", "/v2/models/{path}"): "/v2/models/acme/embed",
    ("POST", "/v2/models/{path}"): "/v2/models/acme/embed/infer",
    ("POST", "/v2/repository/models/{path}"): "/v2/repository/models/acme/embed/load",
}
BODIES["/v2/models/acme/embed/infer"] = {"inputs": [TEXT]}
# Refused to everybody, but not in the words that a stranger gets.
REFUSED = {"/v2/repository/models/acme/embed/load": 400}


def routes(node: FakeNode) -> Iterator[tuple[str, str, str]]:
    """Method, canonical path and a path to call, of every route that the app has."""
    for route in build_app(node, GatewayConfig("box-1")).router.routes():
        assert route.resource is not None
        canonical = route.resource.canonical
        method = "GET" if route.method == "HEAD" else route.method
        yield route.method, canonical, PATHS[method, canonical] if "{" in canonical else canonical


def wrong_credentials(node: FakeNode) -> dict[str, list[tuple[str, str]]]:
    right = parse_key(node.acme)
    assert right is not None
    stranger = make_key()
    revoked = node.add_key("acme")
    del node.keys[revoked.split("_")[1]]
    mixed = f"bk_{right.key_id}_{stranger.secret}"
    return {
        "none": [],
        "empty": [("Authorization", "")],
        "no credential": [("Authorization", "Bearer")],
        "basic": [("Authorization", f"Basic {node.acme}")],
        "no scheme": [("Authorization", node.acme)],
        "malformed": [("Authorization", "Bearer bk_x_y")],
        "unknown": [("Authorization", f"Bearer {stranger.text}")],
        "known id, another's secret": [("Authorization", f"Bearer {mixed}")],
        "cut": [("Authorization", f"Bearer {node.acme[:-1]}")],
        "grown": [("Authorization", f"Bearer {node.acme}A")],
        "upper case": [("Authorization", f"Bearer {node.acme.upper()}")],
        "trailing word": [("Authorization", f"Bearer {node.acme} x")],
        "expired": [("Authorization", f"Bearer {node.expired}")],
        "revoked": [("Authorization", f"Bearer {revoked}")],
        "doubled": [("Authorization", f"Bearer {node.acme}"), ("Authorization", f"Bearer {node.acme}")],
        "latin": [("Authorization", "Bearer bk_\u00e9")],
        "in another header": [("X-Api-Key", node.acme)],
    }


def test_the_written_list_is_the_code_list() -> None:
    assert (set(OPEN_PATHS), set(LOCAL_PATHS)) == (OPEN, LOCAL)


async def test_every_route_refuses_every_wrong_key_in_the_same_words() -> None:
    node = FakeNode()
    checked = 0
    async with served(node) as url, aiohttp.ClientSession() as session:
        for method, canonical, path in routes(node):
            if canonical in OPEN | LOCAL:
                continue
            bodies = set()
            for headers in wrong_credentials(node).values():
                async with session.request(
                    method, url + path, headers=headers, json=BODIES.get(path)
                ) as answer:
                    assert answer.status == 401, (method, path, headers)
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    bodies.add(await answer.read())
                    checked += 1
            assert len(bodies) == 1
    assert checked >= 8 * len(wrong_credentials(node))
    assert node.events == []


async def test_every_route_answers_the_right_key() -> None:
    """Otherwise the test above would pass on an app that refuses everybody."""
    node = FakeNode()
    headers = {"Authorization": f"bearer {node.acme}"}
    async with served(node) as url, aiohttp.ClientSession() as session:
        for method, _, path in routes(node):
            async with session.request(method, url + path, headers=headers, json=BODIES.get(path)) as answer:
                assert answer.status == REFUSED.get(path, 200), (method, path)


async def test_another_tenants_key_sees_nothing_there() -> None:
    """A foreign model and a model that never was give the same answer but for the name asked for."""
    node = FakeNode()
    headers = {"Authorization": f"Bearer {node.globex}"}
    async with served(node) as url, aiohttp.ClientSession() as session:
        for path, body in BODIES.items():
            answers = []
            named = str(body.get("model", "acme/embed"))
            for model in (named, named[:-1] + "_"):
                asked = {**body, "model": model} if "model" in body else body
                where = url + path.replace(named, model)
                async with session.post(where, headers=headers, json=asked) as answer:
                    assert answer.status == 404
                    answers.append((await answer.text()).replace(str(model), "MODEL"))
                    names = set(answer.headers)
                    assert not any(name.lower().startswith("x-bunkhouse-tier") for name in names)
            assert answers[0] == answers[1]
    assert node.events == []


async def test_an_unknown_path_tells_nothing_without_a_key() -> None:
    node = FakeNode()
    async with served(node) as url, aiohttp.ClientSession() as session:
        for path in (
            "/",
            "/v1",
            "/v1/nothing",
            "/v2/nothing",
            "/admin",
            "/healthz/",
            "/metrics/x",
            "//healthz",
        ):
            async with session.get(url + path) as answer:
                assert answer.status == 401, path
            async with session.get(url + path, headers={"Authorization": f"Bearer {node.acme}"}) as answer:
                assert answer.status == 404, path
                error = (await answer.json())["error"]
                assert error.startswith("There is no") if "/v2/" in path else error["code"] == "unknown_route"


async def test_another_method_is_refused_with_the_possible_ones() -> None:
    node = FakeNode()
    headers = {"Authorization": f"Bearer {node.acme}"}
    async with served(node) as url, aiohttp.ClientSession() as session:
        async with session.delete(f"{url}/v1/models", headers=headers) as answer:
            assert answer.status == 405
            assert set(answer.headers["Allow"].split(",")) == {"GET", "HEAD"}


async def test_figures_of_tenants_need_the_scrapers_key() -> None:
    """Also of a local caller: behind a proxy that ends TLS and adds nothing, everybody is one."""
    node, key = FakeNode(), "bm_" + "s" * 43
    tenants = 'bunkhouse_tokens{tenant="acme"}'
    async with served(node, scraper=ScrapeKey(key)) as url, aiohttp.ClientSession() as session:
        for wrong in ("", key[:-1], key + "s", key.upper(), "bm_\u00e9", node.acme):
            headers = {"Authorization": f"Bearer {wrong}"} if wrong else {}
            async with session.get(f"{url}/metrics", headers=headers) as answer:
                text = await answer.text()
            assert (answer.status, "bunkhouse_up" in text, tenants in text) == (200, True, False)
            async with session.get(f"{url}/metrics", headers={"Via": "x", **headers}) as answer:
                assert answer.status == 403
        for from_afar in ({}, {"X-Forwarded-For": "10.0.0.1"}):
            right = {"Authorization": f"Bearer {key}", **from_afar}
            async with session.get(f"{url}/metrics", headers=right) as answer:
                assert (answer.status, tenants in await answer.text()) == (200, True)
        # It is good for nothing else.
        async with session.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 401


async def test_without_a_scrapers_key_nobody_sees_figures_of_tenants() -> None:
    async with served(FakeNode()) as url, aiohttp.ClientSession() as session:
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
            async with session.get(f"{url}/metrics", headers=headers) as answer:
                assert "tenant=" not in await answer.text()


async def test_metrics_behind_a_proxy_are_refused() -> None:
    node = FakeNode()
    async with served(node) as url, aiohttp.ClientSession() as session:
        for name in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
            async with session.get(f"{url}/metrics", headers={name: "127.0.0.1"}) as answer:
                assert answer.status == 403


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        (("127.0.0.1", 5), True),
        (("127.9.9.9", 5), True),
        (("::1", 5, 0, 0), True),
        (("::ffff:127.0.0.1", 5, 0, 0), True),
        ("", True),
        (("10.0.0.1", 5), False),
        (("::ffff:10.0.0.1", 5, 0, 0), False),
        (("fe80::1%eth0", 5, 0, 0), False),
        (("0.0.0.0", 5), False),
        (("nonsense", 5), False),
    ],
)
def test_only_loopback_and_unix_peers_are_local(peer: object, local: bool) -> None:
    transport = Mock()
    transport.get_extra_info = lambda name, default=None: peer if name == "peername" else default
    assert is_local(make_mocked_request("GET", "/metrics", transport=transport)) is local
