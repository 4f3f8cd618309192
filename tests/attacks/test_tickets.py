"""Tickets at a node's gateway: nobody makes one, bends one, or uses one where it was not given for.

Covers: forged, tampered, expired and replayed tickets, other tenants' models, revoked keys, clocks that
are off, tickets where an API key belongs. Two real gateways behind a real control server; their engines
are fake. Does not cover: where the SDK sends tickets (``test_sdk_direct``).
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from direct_node import Clocks, DirectNode, direct_node
from running_control import Answer, Running, model_files, running

from agent.credentials import AWAY_MS_MAX, Credentials
from control.routes.forwarding import candidates
from packer.tickets import TICKET_CHARS_MAX, TICKET_LIFE_MS, Ticket, public_text, read, sign
from packer.types import KeySpec

OFF_MS = 600_000


@dataclass(slots=True)
class Site:
    control: Running
    acme: str
    globex: str
    nodes: tuple[DirectNode, DirectNode]

    async def tickets(self, key: str = "", model: str = "acme/m") -> dict[str, str]:
        """A ticket for each node that control names, by node."""
        answer = await self.control.call("GET", f"/api/v1/route?model={model}", key=key or self.acme)
        assert answer.status == 200, answer.body
        return {item["node"]: item["ticket"] for item in answer.json()["items"]}

    async def embed(self, ticket: str, position: int = 0, model: str = "acme/m") -> Answer:
        """A call at a node with this credential."""
        async with self.control.session.post(
            f"{self.nodes[position].url}/v1/embeddings",
            json={"model": model, "input": "x"},
            headers={"Authorization": f"Bearer {ticket}"},
        ) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def refused(self, ticket: str, position: int = 0) -> bool:
        answer = await self.embed(ticket, position)
        return (answer.status, answer.error["code"]) == (401, "invalid_api_key")


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        acme, globex = await control.tenant("acme"), await control.tenant("globex")
        await control.push("acme", "m", model_files())
        await control.push("globex", "secret", model_files(3))
        async with (
            direct_node(control, tmp_path, "n0") as first,
            direct_node(control, tmp_path, "n1") as second,
        ):
            await first.learn()
            yield Site(control, acme, globex, (first, second))


def bent(text: str, **changes: object) -> str:
    """The ticket with other claims and the signature that it had."""
    said, _, signature = text.removeprefix("bt_").partition(".")
    claims = json.loads(base64.urlsafe_b64decode(said + "=" * (-len(said) % 4)))
    forged = base64.urlsafe_b64encode(json.dumps(claims | changes, separators=(",", ":")).encode())
    return f"bt_{forged.decode().rstrip('=')}.{signature}"


async def test_a_ticket_opens_the_node_that_it_names_and_no_other(site: Site) -> None:
    tickets = await site.tickets()
    assert sorted(tickets) == ["n0", "n1"]
    assert (await site.embed(tickets["n0"], 0)).status == 200
    assert (await site.embed(tickets["n1"], 1)).status == 200
    assert await site.refused(tickets["n0"], 1)
    assert await site.refused(tickets["n1"], 0)


async def test_a_ticket_is_no_key(site: Site) -> None:
    """Neither for the router nor for anything of the management API."""
    ticket = (await site.tickets())["n0"]
    body = {"model": "acme/m", "input": "x"}
    for method, path in (
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/models"),
        ("GET", "/api/v1/route?model=acme/m"),
        ("GET", "/api/v1/models"),
        ("GET", "/api/v1/about"),
    ):
        answer = await site.control.call(method, path, body if method == "POST" else None, key=ticket)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path


async def test_a_ticket_shows_only_its_tenants_models(site: Site) -> None:
    ticket = (await site.tickets())["n0"]
    foreign = await site.embed(ticket, model="globex/secret")
    absent = await site.embed(ticket, model="globex/absent")
    assert foreign.status == absent.status == 404
    assert foreign.body.replace(b"secret", b"absent") == absent.body
    async with site.control.session.get(
        f"{site.nodes[0].url}/v1/models", headers={"Authorization": f"Bearer {ticket}"}
    ) as answer:
        assert [item["id"] for item in (await answer.json())["data"]] == ["acme/m"]


async def test_nobody_is_told_of_nodes_for_what_is_not_theirs(site: Site) -> None:
    ask = "/api/v1/route?model=globex/"
    foreign = await site.control.call("GET", f"{ask}secret", key=site.acme)
    absent = await site.control.call("GET", f"{ask}absent", key=site.acme)
    assert foreign.status == absent.status == 404
    assert foreign.body.replace(b"secret", b"absent") == absent.body
    assert (await site.control.call("GET", f"{ask}secret")).status == 403
    assert (await site.control.call("GET", f"{ask}secret", key=None)).status == 401


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "globex"},
        {"expires_ms": 2**62},
        {"node": "n1"},
        {"key_id": "a" * 12},
        {"cluster": "other"},
        {"extra": 1},
        {"expires_ms": "soon"},
        {"tenant": None},
    ],
)
async def test_bent_claims_are_refused(site: Site, changes: dict[str, object]) -> None:
    ticket = (await site.tickets())["n0"]
    for position in (0, 1):
        assert await site.refused(bent(ticket, **changes), position)


async def test_every_changed_character_is_refused(site: Site) -> None:
    """In the claims, in the signature, in what holds them together; and no second spelling of the same."""
    ticket = (await site.tickets())["n0"]
    credentials = site.nodes[0].gateway.credentials
    assert credentials is not None
    assert credentials.find(ticket) is not None
    for position in range(len(ticket)):
        for other in "A_.=":
            changed = ticket[:position] + other + ticket[position + 1 :]
            assert changed == ticket or credentials.find(changed) is None
    for changed in (ticket + "=", ticket + "A", ticket + "\n", " " + ticket, ticket.upper(), "bt_" + ticket):
        assert credentials.find(changed) is None
    for text in ("bt_", "bt_.", "bt_e30.", "bt_é.é", f"bt_{'A' * TICKET_CHARS_MAX}.A", "bt_" + "[" * 900):
        assert credentials.find(text) is None


async def test_forged_tickets_are_refused(site: Site) -> None:
    """Signed with a key of one's own, with another cluster's, or with none."""
    claims = read((await site.tickets())["n0"])
    assert claims is not None
    own = Ed25519PrivateKey.generate()
    assert await site.refused(sign(own, claims[0]))
    # The public key is no secret and signs nothing.
    public = site.control.server.control.ticket_keys[0]
    seed = base64.urlsafe_b64decode(public + "=")
    assert await site.refused(sign(Ed25519PrivateKey.from_private_bytes(seed), claims[0]))
    # A node without a plan, or with one of a control that signs no tickets, takes none.
    for keys in ((), ("",), ("A" * 43,), ("not base64",)):
        credentials = Credentials(lambda: 0, lambda: 0)
        assert credentials.find(sign(own, claims[0])) is None
        spec = KeySpec(claims[0].key_id, "0" * 64, "acme", None)
        credentials.planned(claims[0].cluster, "n0", (spec,), keys)
        assert credentials.find(sign(own, claims[0])) is None


async def test_a_ticket_ends_by_controls_clock_wherever_the_nodes_stands(site: Site) -> None:
    """The node's clock is years off, and jumps; what it heard from control counts on."""
    ticket = (await site.tickets())["n0"]
    clocks = site.nodes[0].clocks
    assert (await site.embed(ticket)).status == 200
    for wall in (0, clocks.wall + OFF_MS, clocks.wall - OFF_MS):
        clocks.wall = wall
        assert (await site.embed(ticket)).status == 200
    clocks.steady += TICKET_LIFE_MS - 60_000
    assert (await site.embed(ticket)).status == 200
    clocks.steady += 61_000
    assert await site.refused(ticket)


async def test_a_ticket_stays_good_only_while_control_is_away_and_if_it_was_good_before(site: Site) -> None:
    """Nobody can be given another then. It is worth no more than its key, and not for ever."""
    ticket = (await site.tickets())["n0"]
    claims = read(ticket)
    assert claims is not None
    now_ms, away = claims[0].expires_ms - TICKET_LIFE_MS, [True]
    clocks = Clocks(steady=0)
    credentials = Credentials(clocks.wall_ms, clocks.steady_ms, lambda: away[0])
    spec = KeySpec(claims[0].key_id, "0" * 64, "acme", now_ms + AWAY_MS_MAX // 2)
    keys = site.control.server.control.ticket_keys

    def taken() -> bool:
        credentials.planned(claims[0].cluster, "n0", (spec,), keys)
        return credentials.find(ticket) is not None

    credentials.heard(now_ms)
    clocks.steady += TICKET_LIFE_MS + 1
    assert taken()
    away[0] = False
    assert not taken(), "control is there: its clock has gone on"
    away[0] = True
    clocks.steady = AWAY_MS_MAX // 2 + 1
    assert not taken(), "its key has ended"
    spec = replace(spec, expires_ms=None)
    assert taken()
    clocks.steady = AWAY_MS_MAX
    assert not taken()
    credentials.heard(now_ms + TICKET_LIFE_MS)
    assert not taken(), "it had ended when control was last heard"


async def test_a_node_that_never_heard_control_goes_by_its_own_clock(site: Site) -> None:
    """Ten minutes off, it takes no ticket; then the router is asked, and nothing is given away."""
    ticket = (await site.tickets())["n0"]
    claims = read(ticket)
    assert claims is not None
    now_ms = claims[0].expires_ms - TICKET_LIFE_MS
    spec = KeySpec(claims[0].key_id, "0" * 64, "acme", None)
    for off_ms, taken in ((0, True), (OFF_MS, False), (-OFF_MS, False)):
        credentials = Credentials(Clocks(now_ms + off_ms).wall_ms)
        keys = site.control.server.control.ticket_keys
        credentials.planned(claims[0].cluster, "n0", (spec,), keys)
        assert (credentials.find(ticket) is not None) == taken


async def test_a_revoked_key_takes_its_tickets_with_it(site: Site) -> None:
    """With the node's next plan at the latest; no new one is given at once."""
    key = await site.control.key("acme")
    for node in site.nodes:
        await node.learn()
    other, kept = (await site.tickets(key))["n0"], (await site.tickets())["n0"]
    assert (await site.embed(other)).status == 200
    await site.control.call("DELETE", f"/api/v1/keys/{key.split('_')[1]}")
    assert (await site.control.call("GET", "/api/v1/route?model=acme/m", key=key)).status == 401
    await site.nodes[0].learn()
    assert await site.refused(other)
    assert (await site.embed(kept)).status == 200


async def test_a_key_that_is_revoked_while_it_waits_gets_no_ticket(site: Site) -> None:
    """The answer waits for nodes that have heard of the model, for seconds."""
    key = await site.control.key("acme")
    for node in site.nodes:
        await node.learn()

    async def revoked_meanwhile(*words: Any) -> list[str]:
        await site.control.call("DELETE", f"/api/v1/keys/{key.split('_')[1]}")
        return await candidates(*words)

    with mock.patch("control.routes.direct.candidates", revoked_meanwhile):
        answer = await site.control.call("GET", "/api/v1/route?model=acme/m", key=key)
    assert (answer.status, b"ticket" in answer.body) == (401, False)


async def test_a_ticket_ends_with_its_key(site: Site) -> None:
    """A key with a minute left is not made to last longer by a ticket."""
    key = await site.control.key("acme", ttl_s=60)
    for node in site.nodes:
        await node.learn()
    answer = (await site.control.call("GET", "/api/v1/route?model=acme/m", key=key)).json()
    assert answer["refresh_ms"] <= answer["expires_ms"] <= 60_000
    ticket = next(item["ticket"] for item in answer["items"] if item["node"] == "n0")
    assert (await site.embed(ticket)).status == 200
    site.nodes[0].clocks.steady += 61_000
    assert await site.refused(ticket)


async def test_nothing_grows_with_tickets_and_none_is_logged(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    tickets = await site.tickets()
    assert await site.refused(tickets["n1"])
    assert (await site.embed(tickets["n0"])).status == 200
    assert "bt_" not in caplog.text
    key = Ed25519PrivateKey.generate()
    credentials = Credentials(lambda: 0, lambda: 0)
    credentials.planned("c", "n", (KeySpec("k", "0" * 64, "acme", None),), (public_text(key),))
    ticket = Ticket("c", "n", "acme", "k", 1)
    monkeypatch.setattr("agent.credentials.PROVEN_MAX", 8)
    for number in range(1, 20):
        assert credentials.find(sign(key, replace(ticket, expires_ms=number))) is not None
    assert len(credentials._proven) == 8
    credentials.planned("c", "n", (), ())
    assert not credentials._proven
