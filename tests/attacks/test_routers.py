"""Routers that are processes of their own: what their certificate opens and what it does not, and who else
gets what is theirs.

Covers: every route of the router's application without the right key; the routes for routers at control
without, with a node's, with a removed and with another router's certificate; a router's certificate at
everything that is for nodes; tokens of the wrong kind; hostile questions. Does not cover: a router that does
its work (``test_router_process``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import pytest_asyncio
from aiohttp import web
from listed_routes import routes_of, sent_method
from running_control import FakeNode, Running, model_files, running, until
from running_routers import FakeRouter, fake_router, joined_router

from control import router_line
from control.catalog import DropNode, DropRouter
from control.router_process import build_router_app
from control.router_wire import RouterAnswer
from control.routes import certifying
from control.routes.access import Caller
from control.routes.direct import show_route
from control.server import build_node_app
from control.state import Control
from packer.wire import WIRE_VERSION, BoxFacts, LateRenewAsk, RenewAsk, decode, encode

# What anybody may call at a router, and what needs a caller on its machine.
OPEN = {("GET", "/healthz"), ("GET", "/v2/health/live"), ("GET", "/v2/health/ready")}
LOCAL = {("GET", "/metrics")}
JOINING = {("POST", "/router/v1/join"), ("POST", "/router/v1/renew-late")}


@dataclass(slots=True)
class Site:
    control: Running
    acme: str
    globex: str
    ref: str
    node: FakeNode
    thief: FakeRouter  # a router whose certificate somebody has
    folder: Path


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        acme, globex = await control.tenant("acme"), await control.tenant("globex")
        model = await control.push("acme", "m", model_files())
        node, thief = await control.join("n1"), await fake_router(control, "thief")
        yield Site(control, acme, globex, model["ref"], node, thief, tmp_path)


# --- tenants at a router --------------------------------------------------------------------------


def filled(path: str, ref: str, method: str) -> str:
    rests = {
        "/v1/{path}": "embeddings",
        "/v2/models/{path}": "acme/m" + ("/infer" if method == "POST" else ""),
        "/v2/repository/models/{path}": "acme/m/load",
    }
    return path.replace("{path}", rests.get(path, "")).replace("{ref}", ref)


async def test_no_route_of_a_router_answers_without_a_tenants_key(site: Site) -> None:
    """One answer for all: nothing tells an unknown key from a wrong, a revoked or an operator's one."""
    revoked = await site.control.key("acme")
    for _ in range(2):  # nobody waits for a node then
        await site.node.beat(site.folder)
    async with joined_router(site.control, site.folder / "r1") as router:
        await site.control.call("DELETE", f"/api/v1/keys/{revoked.split('_')[1]}")
        await router.until_heard()
        keys: list[Mapping[str, str]] = [
            {},
            {"Authorization": "Bearer nonsense"},
            {"Authorization": f"Bearer {site.acme[:-1]}"},
            {"Authorization": f"Bearer {revoked}"},
            {"Authorization": f"Bearer {site.control.operator_key}"},
        ]
        routes = routes_of(build_router_app(router.router))
        assert routes > OPEN | LOCAL
        for method, path in sorted(routes - OPEN - LOCAL):
            asked = filled(path, site.ref, method)
            answers = [
                await router.call(sent_method(method), asked, {"model": site.ref}, headers=headers)
                for headers in keys
            ]
            assert {answer.status for answer in answers} == {401}, path
            assert len({answer.body for answer in answers}) == 1, path
            right = await router.call(sent_method(method), asked, {"model": site.ref}, key=site.acme)
            assert right.status not in (401, 403), path


async def test_a_router_has_none_of_the_management_api(site: Site) -> None:
    async with joined_router(site.control, site.folder / "r1") as router:
        for path in ("/api/v1/tenants", "/api/v1/nodes", "/api/v1/routers", "/node/v1/ca", "/router/v1/view"):
            for key in (None, site.acme, site.control.operator_key):
                headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
                async with site.control.session.get(router.url + path, headers=headers) as answer:
                    assert answer.status == 404
                    assert (await answer.json())["error"]["code"] == "unknown_route"


async def test_a_foreign_model_answers_at_a_router_as_one_that_does_not_exist(site: Site) -> None:
    async with joined_router(site.control, site.folder / "r1") as router:
        for method, path in (
            ("GET", "/api/v1/route?model={}"),
            ("GET", "/v1/models/{}"),
            ("GET", "/v2/models/{}"),
            ("POST", "/v1/embeddings"),
        ):
            foreign, gone = [
                await router.call(method, path.format(ref), {"model": ref}, key=site.globex)
                for ref in ("acme/m", "acme/x")
            ]
            assert foreign.status == gone.status == 404, path
            assert foreign.body.replace(b"acme/m", b"acme/x") == gone.body, path


# --- at control -----------------------------------------------------------------------------------


async def statuses(site: Site, who: FakeNode, folder: Path | None, prefix: str) -> set[tuple[int, str]]:
    """What the routes below ``prefix`` answer to whoever shows that certificate."""
    found = set()
    routes = routes_of(build_node_app(site.control.server.control)) - JOINING
    opened = {("GET", "/node/v1/ca"), ("POST", "/node/v1/join"), ("POST", "/node/v1/renew-late")}
    for method, path in sorted(routes - opened):
        if path.startswith(prefix):
            answer = await who.call(method, path.replace("{", "").replace("}", ""), b"{}", folder=folder)
            found.add((answer.status, answer.error["code"]))
    assert found
    return found


async def test_certificates_open_what_is_their_own_alone(site: Site) -> None:
    """A router's nothing that is for nodes, a node's nothing that is for routers, none nothing."""
    assert await statuses(site, site.thief, site.folder, "/node/") == {(403, "not_a_node")}
    assert await statuses(site, site.node, site.folder, "/router/") == {(403, "not_a_router")}
    assert await statuses(site, site.thief, None, "/router/") == {(401, "node_certificate_required")}


async def test_the_certificate_of_a_removed_router_is_refused(site: Site) -> None:
    assert (await site.thief.ask(site.folder)).status == 200
    assert (await site.control.call("DELETE", "/api/v1/routers/thief")).status == 204
    assert await statuses(site, site.thief, site.folder, "/router/") == {(403, "router_removed")}
    await fake_router(site.control, "thief")  # the name is taken by another box: the first one's is dead
    assert await statuses(site, site.thief, site.folder, "/router/") == {(403, "router_removed")}


async def test_a_router_is_told_no_more_than_routing_needs(site: Site) -> None:
    """No operator's key, no secret, no quota, no place of weights, no digest of a file."""
    limit = {"tokens_per_minute": 87_654_321}  # no such digits are in a hash by chance
    assert (await site.control.call("PATCH", "/api/v1/tenants/acme/quota", limit)).status == 200
    await site.node.beat(site.folder)
    answer = await site.thief.ask(site.folder)
    told = decode(answer.body, RouterAnswer)
    kinds = {word.name.partition("/")[0] for word in told.words}
    assert kinds == {"key", "model", "node", "places"}
    text = answer.body.decode()
    state = site.control.server.control
    model = state.catalog.models[next(iter(state.catalog.models))]
    unwanted = [site.control.operator_key.split("_")[1], site.acme.split("_", 2)[2], "87654321", "control:"]
    unwanted += [file.sha256 for file in model.files] + [file.path for file in model.files]
    assert [word for word in unwanted if word in text] == []


async def test_a_router_gets_tickets_only_with_a_tenants_key(site: Site) -> None:
    path = f"/router/v1/route?model={site.ref}"
    for headers in ({}, {"Authorization": f"Bearer {site.acme[:-1]}x"}):
        answer = await site.thief.call("GET", path, folder=site.folder, headers=headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    operator = {"Authorization": f"Bearer {site.control.operator_key}"}
    answer = await site.thief.call("GET", path, folder=site.folder, headers=operator)
    assert (answer.status, answer.error["code"]) == (403, "tenant_key_required")
    foreign = {"Authorization": f"Bearer {site.globex}"}
    assert (await site.thief.call("GET", path, folder=site.folder, headers=foreign)).status == 404


async def test_a_tenant_that_asks_a_router_very_often_does_not_cut_its_line(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control counts what comes with a router's certificate as that router's, its poll for news with it, and
    refuses what is too much at one time: so a router asks control for a few tenants at a time."""
    monkeypatch.setattr(router_line, "ROUTES_MAX", 2)
    asked, go = 0, asyncio.Event()

    async def held(control: Control, request: web.Request, caller: Caller) -> web.Response:
        nonlocal asked
        asked += 1
        await go.wait()
        return await show_route(control, request, caller)

    path = "/api/v1/route?model=acme/m"
    with mock.patch("control.routes.routers.show_route", held):
        async with joined_router(site.control, site.folder / "r") as router:
            calls = [asyncio.create_task(router.call("GET", path, key=site.acme)) for _ in range(5)]
            await until(lambda: asked + sum(call.done() for call in calls) == 5)
            assert asked == 2
            told = [call.result() for call in calls if call.done()]
            assert [(answer.status, answer.json()["items"]) for answer in told] == 3 * [(200, [])]
            go.set()
            assert {(await call).status for call in calls} == {200}
            assert (await router.call("GET", path, key=site.acme)).status == 200
            assert asked == 3


async def test_tokens_and_keys_are_good_for_one_kind_alone(site: Site) -> None:
    """Whoever finds a node's token, or the copy of a node, makes no router of it, which would see every
    tenant's keys; and the other way round."""
    url, gateway = site.control.bound.node_url, "http://127.0.0.1:9"
    for kind, token_of, stolen in ((FakeRouter, "nodes", site.node), (FakeNode, "routers", site.thief)):
        token = (await site.control.call("POST", f"/api/v1/{token_of}/tokens", {})).json()["token"]
        answer = await kind(url, "other", gateway).join(token)
        assert (answer.status, answer.error["code"]) == (401, "join_refused")
        other = "routers" if token_of == "nodes" else "nodes"
        token = (await site.control.call("POST", f"/api/v1/{other}/tokens", {})).json()["token"]
        answer = await kind(url, "other", gateway, key=stolen.key).join(token)
        assert (answer.status, answer.error["code"]) == (409, "join_conflict")
    catalog = site.control.server.control.catalog
    assert set(catalog.nodes) | set(catalog.routers) == {"n1", "thief"}


async def test_a_token_can_not_take_over_a_router(site: Site) -> None:
    token = (await site.control.call("POST", "/api/v1/routers/tokens", {})).json()["token"]
    other = FakeRouter(site.control.bound.node_url, "thief", "")
    assert (await other.join(token)).status == 409
    assert (await site.thief.ask(site.folder)).status == 200
    assert (await site.control.recorded("join_refused"))["detail"].startswith("router thief from ")


async def test_a_renewal_is_for_the_routers_own_key(site: Site) -> None:
    other = FakeRouter(site.control.bound.node_url, "thief", "")
    ask = encode(RenewAsk(WIRE_VERSION, other.csr_pem()))
    answer = await site.thief.call("POST", "/router/v1/renew", ask, folder=site.folder)
    assert (answer.status, answer.error["code"]) == (409, "other_key")


async def test_a_certificate_that_ended_is_renewed_for_its_own_kind_alone(site: Site) -> None:
    """A router's last certificate makes no node, and a node's no router, though both are the same CA's."""
    for who, own, other in ((site.thief, "router", "node"), (site.node, "node", "router")):
        ask = encode(LateRenewAsk(WIRE_VERSION, who.csr_pem(), who.chain_pem))
        refused = await who.call("POST", f"/{other}/v1/renew-late", ask)
        assert (refused.status, refused.error["code"]) == (403, f"{other}_removed")
        assert (await who.call("POST", f"/{own}/v1/renew-late", ask)).status == 200


async def test_who_is_removed_while_its_renewal_comes_in_gets_no_certificate(site: Site) -> None:
    catalog = site.control.server.control.catalog
    for who, path, gone in (
        (site.thief, "/router/v1/renew", DropRouter("thief")),
        (site.node, "/node/v1/renew", DropNode("n1")),
    ):

        def remove(body: bytes, kind: type[RenewAsk], gone: DropRouter | DropNode = gone) -> RenewAsk:
            catalog.apply(gone, 0)
            return decode(body, kind)

        with mock.patch.object(certifying, "decode_message", remove):
            ask = encode(RenewAsk(WIRE_VERSION, who.csr_pem()))
            answer = await who.call("POST", path, ask, folder=site.folder)
        assert (answer.status, answer.error["code"]) == (403, f"{path.split('/')[1]}_removed")


async def test_a_copied_routers_identity_is_given_no_certificate_and_no_ticket(site: Site) -> None:
    """Who stole it and the router itself ask in turn: nobody knows which is which, and both are told so."""
    told = {"router": "", "thief": ""}
    answers: list[tuple[int, str]] = []
    for life in ("router", "thief", "router", "thief", "router", "thief"):
        answer = await site.thief.ask(site.folder, life=life, told=told[life])
        if answer.status == 200:
            told[life] = decode(answer.body, RouterAnswer).told
        answers.append((answer.status, "" if answer.status == 200 else answer.error["code"]))
    assert answers[-1] == (409, "router_cloned"), answers
    ask = encode(RenewAsk(WIRE_VERSION, site.thief.csr_pem()))
    late = encode(LateRenewAsk(WIRE_VERSION, site.thief.csr_pem(), site.thief.chain_pem))
    for method, path, body in (
        ("POST", "/router/v1/renew", ask),
        ("POST", "/router/v1/renew-late", late),
        ("GET", "/router/v1/route?model=acme/m", None),
    ):
        headers = {"Authorization": f"Bearer {site.acme}"}
        answer = await site.thief.call(method, path, body, folder=site.folder, headers=headers)
        assert (answer.status, answer.error["code"]) == (409, "router_cloned"), path
    assert (await site.control.call("DELETE", "/api/v1/routers/thief")).status == 204
    again = await fake_router(site.control, "thief")
    assert (await again.ask(site.folder)).status == 200


async def test_turns_that_this_control_did_not_give_out_make_no_copy(site: Site) -> None:
    """And one that is made up makes only who says it suspect."""
    start, other = site.control.server.control.start_name, await fake_router(site.control, "other")
    for life in ("one", "two"):
        assert (await site.thief.ask(site.folder, life=life)).status == 200
    for told in (
        "x",
        "7",
        f"{start}.",
        f"{start}.x",
        f"{start}.-1",
        "another.7",
        "." * 64,
        f"{start}.{7:040}",
    ):
        assert (await site.thief.ask(site.folder, life="one", told=told)).status == 200, told
    assert (await site.thief.ask(site.folder, life="one", told=f"{start}.7")).status == 409
    assert (await other.ask(site.folder, life="one")).status == 200


async def test_hostile_questions_are_refused_by_field(site: Site) -> None:
    names = "life, start, ca_sha256, release, told"
    for change, field in (
        ({"have": -1}, "ask"),
        ({"epoch": 2**60}, "ask"),
        ({"wait_ms": -1}, "ask"),
        ({"life": "x" * 65}, names),
        ({"release": "x" * 65}, names),
        ({"told": "x" * 65}, names),
        ({"url": "x" * 257}, "url"),
        ({"box": BoxFacts("x" * 65)}, "box"),
        ({"box": BoxFacts(devices=("x",) * 65)}, "box"),
    ):
        answer = await site.thief.ask(site.folder, **change)
        assert (answer.status, answer.error["field"]) == (400, field)
    large = json.dumps({"life": "x" * 9_000}).encode()
    for body in (b"", b"{", b"[]", b'{"version": 99}', b"[" * 2_000, large):
        for path in ("/router/v1/view", "/router/v1/renew", "/router/v1/join"):
            answer = await site.thief.call("POST", path, body, folder=site.folder)
            assert answer.status in (400, 413), (path, answer.body)


async def test_a_router_can_not_drive_controls_epoch_away(site: Site) -> None:
    """It may be ahead of a backup that was put back, by some starts and not by millions."""
    epoch = site.control.server.control.meta.epoch
    assert (await site.thief.ask(site.folder, epoch=epoch + 1_000_000)).status == 200
    assert site.control.server.control.meta.epoch == epoch
