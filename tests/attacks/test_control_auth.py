"""Every route of control's two apps refuses a caller without the right credential.

Covers: all routes as the running apps list them, so that a new route is tested by existing; keys that
are absent, malformed, unknown, expired, revoked, foreign, or of the wrong kind; node certificates that
are absent, of another cluster, self-made or of a removed node; join tokens. Does not cover: the node's
gateway (``test_gateway_auth``).
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from listed_routes import routes_of, sent_method
from running_control import FakeNode, Running, model_files, running, until

from control.authority import Authority
from control.catalog import KeyRow, PutKey
from control.server import build_node_app, build_public_app
from packer.http import make_key
from packer.wire import WIRE_VERSION, JoinAsk, encode

# The written list of what anybody may call. Adding to it is a decision, not a detail.
OPEN_PUBLIC = {("GET", "/healthz"), ("GET", "/v2/health/live"), ("GET", "/v2/health/ready")}
# What needs no key, but a caller on this machine: figures that name no tenant and no model.
LOCAL_PUBLIC = {("GET", "/metrics")}
OPEN_NODE = {
    ("GET", "/node/v1/ca"),
    ("POST", "/node/v1/join"),
    # TLS can not verify a certificate that has ended; what it demands instead is in ``test_late_renewals``.
    ("POST", "/node/v1/renew-late"),
    # The same for routers (``test_routers``).
    ("POST", "/router/v1/join"),
    ("POST", "/router/v1/renew-late"),
}
# What a tenant's key may call at all; everything else of the management API is the operator's.
TENANT_ROUTES = {
    ("GET", "/api/v1/tenants/{tenant}/quota"),
    ("POST", "/api/v1/tenants/{tenant}/uploads"),
    ("GET", "/api/v1/tenants/{tenant}/uploads"),
    ("GET", "/api/v1/uploads/{upload_id}"),
    ("PATCH", "/api/v1/uploads/{upload_id}/files/{path}"),
    ("POST", "/api/v1/uploads/{upload_id}/commit"),
    ("DELETE", "/api/v1/uploads/{upload_id}"),
    ("GET", "/api/v1/models"),
    ("GET", "/api/v1/models/{ref}"),
    ("PATCH", "/api/v1/models/{ref}"),
    ("DELETE", "/api/v1/models/{ref}"),
    ("GET", "/api/v1/about"),
    ("GET", "/api/v1/openapi.json"),
    ("GET", "/api/v1/tenants/{tenant}"),
    ("GET", "/api/v1/ps"),
    ("GET", "/api/v1/usage"),
    ("GET", "/api/v1/events"),
    ("GET", "/api/v1/plan"),
    ("GET", "/api/v1/explain"),
    ("GET", "/api/v1/route"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{ref}"),
    ("*", "/v1/{path}"),
    ("GET", "/v2"),
    ("GET", "/v2/"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/{path}"),
    ("POST", "/v2/models/{path}"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/{path}"),
}


@dataclass(slots=True)
class Site:
    """Two tenants with everything in place, so that no refusal is only an absence."""

    control: Running
    acme: str
    globex: str
    upload_id: str
    ref: str
    node: FakeNode
    folder: Path

    def fill(self, path: str, method: str = "GET") -> str:
        """A route's pattern with things in it that exist and are acme's."""
        version = self.ref.partition("@")[2]
        rests = {
            "/v1/{path}": "embeddings",
            "/v2/models/{path}": f"acme/m/versions/{version}" + ("/infer" if method == "POST" else ""),
            "/v2/repository/models/{path}": "acme/m/load",
        }
        values = {
            "tenant": "acme",
            "upload_id": self.upload_id,
            "key_id": self.acme.split("_")[1],
            "node": "n1",
            "router": "r1",
            "ref": self.ref,
            "name": "m",
            "version": version,
            "path": rests.get(path, "config.json"),
        }
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], path)


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        acme, globex = await control.tenant("acme"), await control.tenant("globex")
        model = await control.push("acme", "m", model_files())
        (row,) = control.server.control.catalog.uploads.values()
        yield Site(control, acme, globex, row.upload_id, model["ref"], await control.join("n1"), tmp_path)


def public_routes(site: Site) -> list[tuple[str, str]]:
    return sorted(routes_of(build_public_app(site.control.server.control)))


async def test_the_lists_name_routes_that_exist(site: Site) -> None:
    public = set(public_routes(site))
    assert public >= OPEN_PUBLIC | LOCAL_PUBLIC | TENANT_ROUTES
    assert routes_of(build_node_app(site.control.server.control)) > OPEN_NODE
    assert len(public) > 20


async def test_no_public_route_answers_without_a_valid_key(site: Site) -> None:
    """One answer for all: nothing tells an unknown key from a wrong, an expired or a revoked one."""
    expired = await site.control.key("acme", ttl_s=1)
    row = site.control.server.control.catalog.keys[expired.split("_")[1]]
    specs = site.control.server.control.catalog.key_specs
    specs[row.key_id] = replace(specs[row.key_id], expires_ms=1)
    revoked = await site.control.key("acme")
    await site.control.call("DELETE", f"/api/v1/keys/{revoked.split('_')[1]}")
    swapped = f"{site.acme.rsplit('_', 1)[0][:15]}_{site.globex.split('_', 2)[2]}"
    headers = [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer nonsense",
        f"Basic {site.acme}",
        f"Bearer {site.acme[:-1]}",
        f"Bearer {site.acme}x",
        f"Bearer {swapped}",
        f"Bearer bk_{'a' * 12}_{'A' * 43}",
        f"Bearer {expired}",
        f"Bearer {revoked}",
        "Bearer \xff\xfe",
    ]
    before = list(site.control.server.control.catalog.tenants)
    for method, path in public_routes(site):
        if (method, path) in OPEN_PUBLIC | LOCAL_PUBLIC:
            continue
        bodies = set()
        for header in headers:
            answer = await site.control.call(
                sent_method(method),
                site.fill(path, method),
                {"name": "x", "model": site.ref},
                key=None,
                headers={} if header is None else {"Authorization": header},
            )
            assert (answer.status, answer.headers.get("WWW-Authenticate")) == (401, "Bearer"), (path, header)
            bodies.add(answer.body)
        assert len(bodies) == 1, path
    assert list(site.control.server.control.catalog.tenants) == before


async def test_a_doubled_authorization_header_is_no_credential(site: Site) -> None:
    headers = [("Authorization", f"Bearer {site.acme}"), ("Authorization", "Bearer x")]
    async with site.control.session.get(f"{site.control.url}/v1/models", headers=headers) as answer:
        assert answer.status == 401


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "slow"}], ids=["plain", "kept"])
async def test_a_key_that_is_revoked_while_its_body_comes_in_does_nothing(
    site: Site, headers: dict[str, str]
) -> None:
    """Whoever holds requests open in time would make new keys with the old one."""
    control = site.control
    made = make_key()
    row = KeyRow(made.key_id, made.secret_sha256, None, "another operator", 0, None)
    async with control.server.control.writing:
        await control.server.control.write([PutKey(row)])
    known = set(control.server.control.catalog.keys)
    begun, rest = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"label": '
        begun.set()
        await rest.wait()
        yield b'"mine"}'

    path = "/api/v1/tenants/acme/keys"
    task = asyncio.create_task(control.call("POST", path, key=made.text, data=body(), headers=headers))
    await begun.wait()
    await until(lambda: control.server.control.bodies.held_bytes > 0)
    await control.call("DELETE", f"/api/v1/keys/{made.key_id}")
    rest.set()
    answer = await task
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert set(control.server.control.catalog.keys) == known - {made.key_id}


async def test_figures_are_for_this_machine_and_name_nobody(site: Site) -> None:
    """A proxy on this machine makes every caller local, but for what it says of them."""
    await site.control.call("POST", "/v1/embeddings", {"model": site.ref}, key=site.acme)
    for method, path in LOCAL_PUBLIC:
        answer = await site.control.call(method, path, key=None)
        assert answer.status == 200
        text = answer.body.decode()
        assert "bunkhouse_router_calls_total 1" in text
        assert "acme" not in text
        assert "n1" not in text
        for header in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
            told = await site.control.call(method, path, headers={header: "127.0.0.1"})
            assert (told.status, told.error["code"]) == (403, "local_only")


async def test_operator_routes_refuse_tenants(site: Site) -> None:
    for method, path in public_routes(site):
        if (method, path) in OPEN_PUBLIC | LOCAL_PUBLIC | TENANT_ROUTES:
            continue
        answer = await site.control.call(method, site.fill(path), {"name": "x"}, key=site.acme)
        assert (answer.status, answer.error["code"]) == (403, "operator_key_required"), (method, path)


async def test_a_foreign_thing_answers_as_one_that_does_not_exist(site: Site) -> None:
    """For every tenant route that names a thing: globex asking for acme's sees what nobody's gives."""
    absent = {"acme": "ghost", site.upload_id: "f" * 32, site.ref.partition("@")[2]: "0" * 16}

    def swapped(text: str) -> str:
        for there, not_there in absent.items():
            text = text.replace(there, not_there)
        return text

    for method, path in sorted(TENANT_ROUTES):
        if "{" not in path:
            continue
        asked = site.fill(path, method)
        foreign, gone = [
            await site.control.call(sent_method(method), where, {"model": ref}, key=site.globex)
            for where, ref in ((asked, site.ref), (swapped(asked), swapped(site.ref)))
        ]
        assert foreign.status == gone.status == 404, (method, path)
        assert swapped(foreign.body.decode()) == gone.body.decode(), (method, path)
    # Nothing of acme's was changed by the asking.
    assert (await site.control.call("GET", f"/api/v1/models/{site.ref}", key=site.acme)).status == 200


async def test_lists_show_a_tenant_only_its_own(site: Site) -> None:
    await site.control.recorded("node_joined")
    for method, path in (
        ("GET", "/api/v1/models"),
        ("GET", "/v1/models"),
        ("GET", "/api/v1/ps"),
        ("GET", "/api/v1/events?after=0"),
        ("GET", "/v2/models/stats"),
        ("POST", "/v2/repository/index"),
    ):
        answer = await site.control.call(method, path, key=site.globex)
        assert answer.status == 200
        assert b"acme" not in answer.body, path
    for path in ("/api/v1/models", "/api/v1/ps", "/api/v1/events", "/api/v1/usage"):
        answer = await site.control.call("GET", f"{path}?tenant=acme", key=site.globex)
        assert answer.status == 404, path


# --- nodes ----------------------------------------------------------------------------------------


async def node_statuses(site: Site, node: FakeNode, folder: Path | None) -> set[int]:
    statuses = set()
    for method, path in sorted(routes_of(build_node_app(site.control.server.control)) - OPEN_NODE):
        answer = await node.call(method, site.fill(path), b"{}", folder=folder)
        statuses.add(answer.status)
    return statuses


async def test_node_routes_refuse_callers_without_a_certificate(site: Site) -> None:
    assert await node_statuses(site, site.node, None) == {401}


async def test_keys_are_no_credential_on_the_node_listener(site: Site) -> None:
    for key in (site.acme, site.control.operator_key):
        answer = await site.node.call(
            "POST", "/node/v1/beat", b"{}", headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status == 401


async def test_the_certificate_of_a_removed_node_is_refused(site: Site) -> None:
    assert (await site.node.raw_beat(site.folder)).status == 200
    await site.control.call("DELETE", "/api/v1/nodes/n1")
    assert await node_statuses(site, site.node, site.folder) == {403}


async def test_a_certificate_of_another_key_of_that_name_is_refused(site: Site) -> None:
    """The node was removed and its name taken by another box: the first one's certificate is dead."""
    await site.control.call("DELETE", "/api/v1/nodes/n1")
    await site.control.join("n1")
    assert await node_statuses(site, site.node, site.folder) == {403}


async def test_certificates_of_another_authority_do_not_pass_tls(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    cluster = site.control.server.control.meta.cluster
    other = Authority(tmp_path / "other", cluster)  # the same cluster's name, another CA
    forged = FakeNode(site.control.bound.node_url, "n1", "http://127.0.0.1:9", ca_pem=site.node.ca_pem)
    forged.chain_pem = other.issue_node(other.read_request(forged.csr_pem()), "n1")
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await forged.raw_beat(tmp_path)


async def test_a_node_speaks_for_itself_only(site: Site) -> None:
    await site.control.join("n2")
    answer = await site.node.raw_beat(site.folder, node="n2")
    assert (answer.status, answer.error["field"]) == (400, "node")


async def test_plain_http_gets_nothing_from_the_node_listener(site: Site) -> None:
    url = site.control.bound.node_url.replace("https", "http")
    with pytest.raises(aiohttp.ClientError):
        async with site.control.session.get(f"{url}/node/v1/ca"):
            pass


async def test_node_routes_are_not_on_the_public_listener(site: Site) -> None:
    for method, path in sorted(routes_of(build_node_app(site.control.server.control))):
        answer = await site.control.call(method, site.fill(path))
        assert (answer.status, answer.error["code"]) == (404, "unknown_route")


# --- joining --------------------------------------------------------------------------------------


async def test_join_refuses_every_token_that_is_not_one(site: Site) -> None:
    made = (await site.control.call("POST", "/api/v1/nodes/tokens", {})).json()
    pin, token_id, secret = made["token"].split(".")
    bound = (await site.control.call("POST", "/api/v1/nodes/tokens", {"name": "n9"})).json()["token"]
    texts = [
        f"{pin}.{token_id}.{secret[:-1]}x",
        f"{pin}.{'0' * 20}.{secret}",
        f"{pin}.{token_id}.",
        bound,
    ]
    for text in texts:
        thief = FakeNode(site.control.bound.node_url, "n5", "http://127.0.0.1:9")
        assert (await thief.join(text)).status == 401, text
    state = site.control.server.control
    row = state.catalog.tokens[token_id]
    state.catalog.tokens[token_id] = replace(row, expires_ms=1)
    thief = FakeNode(site.control.bound.node_url, "n5", "http://127.0.0.1:9")
    assert (await thief.join(made["token"])).status == 401
    assert set(state.catalog.nodes) == {"n1"}


async def test_a_token_can_not_take_over_a_node(site: Site) -> None:
    token = (await site.control.call("POST", "/api/v1/nodes/tokens", {})).json()["token"]
    thief = FakeNode(site.control.bound.node_url, "n1", "http://evil:9")
    assert (await thief.join(token)).status == 409
    assert (await site.node.raw_beat(site.folder)).status == 200
    assert site.control.server.control.cluster.nodes["n1"].gateway_url == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "../n1"}, "name"),
        ({"name": "n\n1"}, "name"),
        ({"name": "tokens"}, "name"),
        ({"csr_pem": "nonsense"}, "csr_pem"),
        ({"gateway_url": "file:///etc/passwd"}, "gateway_url"),
        ({"gateway_url": "http://user:pw@h:1"}, "gateway_url"),
        ({"gateway_url": "http://h:1/path"}, "gateway_url"),
        ({"gateway_url": "http://h:99999"}, "gateway_url"),
        ({"gateway_url": "http://[::1"}, "gateway_url"),
        ({"gateway_url": "http://h:1\r\nX: y"}, "gateway_url"),
    ],
)
async def test_a_join_with_bad_words_is_refused_by_field(
    site: Site, change: dict[str, str], field: str
) -> None:
    token = (await site.control.call("POST", "/api/v1/nodes/tokens", {})).json()["token"]
    _, token_id, secret = token.split(".")
    ask = JoinAsk(WIRE_VERSION, token_id, secret, site.node.csr_pem(), "n6", "http://127.0.0.1:9")
    answer = await site.node.call("POST", "/node/v1/join", encode(replace(ask, **change)))
    assert (answer.status, answer.error["field"]) == (400, field)
    assert site.control.server.control.catalog.tokens[token_id].used_node is None


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\x00" * 100, b'{"version": 99}', b"[" * 20_000],
    ids=["empty", "cut", "list", "nul", "version", "deep"],
)
async def test_bad_messages_from_nodes_are_refused(site: Site, body: bytes) -> None:
    for method, path, folder in (
        ("POST", "/node/v1/join", None),
        ("POST", "/node/v1/renew", site.folder),
        ("POST", "/node/v1/beat", site.folder),
    ):
        answer = await site.node.call(method, path, body, folder=folder)
        assert answer.status in (400, 413), (path, answer.body)


async def test_secrets_are_not_in_logs_or_files(
    site: Site, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    made = (await site.control.call("POST", "/api/v1/nodes/tokens", {})).json()
    secret = made["token"].split(".")[2]
    thief = FakeNode(site.control.bound.node_url, "n1", "http://127.0.0.1:9")
    await thief.join(made["token"])
    await site.control.call("GET", "/v1/models", key=site.acme)
    await until(lambda: not site.control.server.control.records._own)
    secrets = [secret, site.acme.split("_", 2)[2], site.globex.split("_", 2)[2]]
    for path in (tmp_path / "control").rglob("*"):
        if path.is_file() and path.name != "operator.key":
            data = path.read_bytes()
            assert not [text for text in secrets if text.encode() in data], path
    assert not [text for text in secrets if text in caplog.text]
