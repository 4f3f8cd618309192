"""Replacing the cluster's CA while its nodes go on: stages, files, and all with all over real TLS.

Covers: ``bunk-control rotate-ca`` and what follows, with nodes that have certificates of the former CA and of
the next one at one time. Does not cover: certificates as such (``test_authority``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from real_box import free_port
from running_control import FakeNode, Running, model_files, running, until
from running_peers import PATH, Store, dial, exchange, get
from running_uplinks import Agent, joined_agent, resident

from agent.packs import PackDirectory
from agent.peer_identity import Cluster, read_peer
from agent.peers import Allowed, PeerServer
from control import rotate_command
from control.ca import (
    CLOCK_SKEW,
    NODE_CERTIFICATE_LIFE,
    PRESENT,
    BrokenCa,
    Cas,
    NoRotation,
    Rotation,
    begin_rotation,
    enter_stage,
    load_ca,
    load_cas,
    make_ca,
    next_stage,
    private_pem,
)
from control.config import Address
from packer.certificates import is_issued_by

NOW = datetime(2027, 1, 1, tzinfo=UTC)
DAY = NODE_CERTIFICATE_LIFE


# --- stages ---------------------------------------------------------------------------------------


def begun(folder: Path) -> Cas:
    load_cas(folder, "Bunkhouse cluster c1", NOW)
    return begin_rotation(folder, NOW)


def test_the_next_ca_signs_when_all_nodes_know_it_or_after_a_day(tmp_path: Path) -> None:
    cas = begun(tmp_path)
    assert cas.issuer is cas.present
    assert next_stage(cas, False, NOW + DAY - timedelta(seconds=1)) is None
    late, early = next_stage(cas, False, NOW + DAY), next_stage(cas, True, NOW)
    assert late == Rotation(NOW.timestamp(), (NOW + DAY).timestamp())
    assert early == Rotation(NOW.timestamp(), NOW.timestamp())
    cas = enter_stage(tmp_path, cas, early)
    assert cas.issuer is cas.next
    assert load_cas(tmp_path, "x", NOW).rotation == early


def test_the_former_ca_ends_with_its_last_certificate(tmp_path: Path) -> None:
    """And its key is not on disk any more."""
    cas = begun(tmp_path)
    former, following = cas.present.pem, cas.next
    assert following is not None
    key = (tmp_path / "ca.key").read_bytes()
    cas = enter_stage(tmp_path, cas, Rotation(NOW.timestamp(), NOW.timestamp()))
    ends = NOW + DAY + 2 * CLOCK_SKEW
    assert next_stage(cas, True, ends - timedelta(seconds=1)) is None
    ended = next_stage(cas, True, ends)
    assert ended is not None
    cas = enter_stage(tmp_path, cas, ended)
    assert (cas.present.pem, cas.next, cas.rotation) == (following.pem, None, None)
    again = load_cas(tmp_path, "x", NOW)
    assert (again.present.pem, again.next) == (following.pem, None)
    assert former not in again.present.pem
    assert not any(path.read_bytes() == key for path in tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.key", "ca.pem"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_end_that_a_crash_cut_short_is_ended_at_the_next_start(tmp_path: Path, moved: int) -> None:
    cas = begun(tmp_path)
    assert cas.next is not None
    with mock.patch("control.ca._move_next"):
        enter_stage(tmp_path, cas, Rotation(0.0, 0.0, ended=True))
    for name in ("key", "pem")[:moved]:
        os.replace(tmp_path / f"next-ca.{name}", tmp_path / f"ca.{name}")
    found = load_cas(tmp_path, "x", NOW)
    assert (found.present.pem, found.next) == (cas.next.pem, None)
    present = load_ca(tmp_path, PRESENT)
    assert present is not None
    assert present.key.public_key() == present.certificate.public_key()


def test_a_beginning_that_a_crash_cut_short_is_none(tmp_path: Path) -> None:
    before = load_cas(tmp_path, "x", NOW)
    with (
        mock.patch("control.ca._keep_rotation", side_effect=OSError("full")),
        pytest.raises(OSError, match="full"),
    ):
        begin_rotation(tmp_path, NOW)
    assert load_cas(tmp_path, "x", NOW).present.pem == before.present.pem
    assert load_cas(tmp_path, "x", NOW).next is None
    assert begin_rotation(tmp_path, NOW).next is not None


DAMAGE = {"gone": None, "half-written": b"-----BEGIN CERTIFICATE-----\nMIIB", "another's": b""}


def damage(path: Path, how: str) -> None:
    content = DAMAGE[how]
    if content is None:
        path.unlink()
    elif content:
        path.write_bytes(content)
    else:  # a whole file that does not belong here
        stranger = make_ca("x", NOW)
        path.write_bytes(private_pem(stranger.key) if path.suffix == ".key" else stranger.pem.encode())


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["next-ca.key", "next-ca.pem"])
@pytest.mark.parametrize(
    "stage", [Rotation(0.0), Rotation(0.0, 0.0), Rotation(0.0, 0.0, ended=True)], ids=["1", "2", "3"]
)
def test_a_next_ca_that_is_broken_costs_the_rotation_and_never_the_present_ca(
    tmp_path: Path, stage: Rotation, name: str, how: str
) -> None:
    """Control starts, says what it found, keeps what was there, and can rotate again."""
    cas = begun(tmp_path)
    with mock.patch("control.ca._move_next"):
        enter_stage(tmp_path, cas, stage)
    damage(tmp_path / name, how)
    found = load_cas(tmp_path, "x", NOW)
    assert (found.present.pem, found.next, found.rotation) == (cas.present.pem, None, None)
    assert "rotation is given up" in found.found
    left = {path.name for path in tmp_path.iterdir()}
    assert {"ca.key", "ca.pem", "rotation.json.broken"} <= left
    assert not {"next-ca.key", "next-ca.pem", "rotation.json"} & left
    assert load_cas(tmp_path, "x", NOW).found == ""
    assert begin_rotation(tmp_path, NOW).present.pem == cas.present.pem


@pytest.mark.parametrize("issuing", [None, 5.0])
def test_a_stage_that_can_not_be_read_is_taken_for_the_first(tmp_path: Path, issuing: float | None) -> None:
    """Both CAs are trusted then, so no node is cut off whatever the stage was."""
    cas = begun(tmp_path)
    enter_stage(tmp_path, cas, Rotation(0.0, issuing))
    (tmp_path / "rotation.json").write_bytes(b'{"announced')
    found = load_cas(tmp_path, "x", NOW)
    assert cas.next is not None
    assert found.next is not None
    assert (found.present.pem, found.next.pem) == (cas.present.pem, cas.next.pem)
    assert found.issuer is found.present
    assert "begins anew" in found.found
    again = load_cas(tmp_path, "x", NOW)
    assert (again.rotation, again.found) == (found.rotation, "")


def test_a_stage_that_can_not_be_read_between_two_moves_ends_them(tmp_path: Path) -> None:
    cas = begun(tmp_path)
    assert cas.next is not None
    os.replace(tmp_path / "next-ca.key", tmp_path / "ca.key")
    (tmp_path / "rotation.json").write_bytes(b"")
    assert load_cas(tmp_path, "x", NOW).present.pem == cas.next.pem


@pytest.mark.parametrize("name", ["ca.key", "ca.pem"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_present_ca_that_is_broken_is_never_replaced(tmp_path: Path, name: str, how: str) -> None:
    """A new one would cut off every node; an operator restores the files."""
    load_cas(tmp_path, "x", NOW)
    damage(tmp_path / name, how)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BrokenCa, match=r"restore both from a backup.*every node must join again"):
        load_cas(tmp_path, "x", NOW)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("left", [(), ("ca.pem",), ("ca.pem", "ca.key")])
def test_a_first_ca_whose_making_a_crash_cut_short_is_made_again(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    """Nobody has used it: control does not listen before its making is over."""
    with (
        mock.patch("pathlib.Path.unlink", side_effect=OSError("crashed")),
        mock.patch("control.ca.keep_ca"),
        pytest.raises(OSError, match="crashed"),
    ):
        load_cas(tmp_path, "x", NOW)
    ca = make_ca("x", NOW)
    for name in left:
        (tmp_path / name).write_bytes(private_pem(ca.key) if name == "ca.key" else ca.pem.encode())
    found = load_cas(tmp_path, "x", NOW).present
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.key", "ca.pem"]
    assert load_cas(tmp_path, "x", NOW).present.pem == found.pem
    (tmp_path / "ca.key").unlink()
    with pytest.raises(BrokenCa, match=r"ca\.key is missing"):
        load_cas(tmp_path, "x", NOW)


async def test_control_starts_without_its_next_ca_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "control"
    async with running(folder):
        pass
    begin_rotation(folder, datetime.now(UTC))
    (folder / "next-ca.key").unlink()
    async with running(folder) as control:
        assert "rotate-ca" in (await control.recorded("ca_broken"))["detail"]


def test_one_rotation_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(NoRotation, match="no CA yet"):
        begin_rotation(tmp_path, NOW)
    begun(tmp_path)
    with pytest.raises(NoRotation, match="under way"):
        begin_rotation(tmp_path, NOW)


def test_only_a_ca_vouches_and_only_for_one(tmp_path: Path) -> None:
    """What the next CA says of the former is a CA's certificate with the former's key, and ends there."""
    former, following = make_ca("former", NOW), make_ca("next", NOW)
    between = following.vouch_for(former, NOW)
    assert is_issued_by(between, following.certificate)
    assert not is_issued_by(between, former.certificate)
    assert between.public_key() == former.certificate.public_key()
    bounds = between.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (bounds.ca, bounds.path_length) == (True, 0)


async def test_the_command_says_what_happens_or_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data-dir", str(tmp_path / "control")]
    assert rotate_command.main(arguments) == 2
    assert "name the --data-dir of a control server" in capsys.readouterr().err
    async with running(tmp_path / "control"):
        assert rotate_command.main(arguments) == 1
        assert "another control server uses" in capsys.readouterr().err
    assert rotate_command.main(arguments) == 0
    assert "next CA: " in capsys.readouterr().out
    assert rotate_command.main(arguments) == 1
    assert "under way" in capsys.readouterr().err


# --- everybody with everybody ---------------------------------------------------------------------


@dataclass(slots=True)
class Scene:
    """A control server that is stopped and started on one port, and nodes that stay."""

    folder: Path
    stack: AsyncExitStack
    port: int
    control: Running
    agents: dict[str, Agent]
    key: str = ""
    ref: str = ""

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Running]:
        address = Address("127.0.0.1", self.port)
        async with running(self.folder / "control", plain_routes=False, node_listen=address) as control:
            self.control = control
            yield control

    async def join(self, name: str) -> Agent:
        async def answer(request: web.Request) -> web.Response:
            return web.json_response({"by": name})

        made = joined_agent(self.control, self.folder / name, answer, name)
        self.agents[name] = agent = await self.stack.enter_async_context(made)
        if self.ref:
            agent.owner.models = (resident(self.ref),)
            agent.uplink.changed()
        return agent

    def issuer_is(self, name: str, ca: x509.Certificate) -> bool:
        return is_issued_by(self.agents[name].identity._leaf(), ca)

    async def renew(self, name: str) -> None:
        """As if two thirds of its certificate's life were over."""
        identity = self.agents[name].identity
        before, at_s = identity.expires_s(), identity.renew_at_s()
        real = identity.now_s
        identity.now_s = lambda: at_s
        serial = identity._leaf().serial_number
        self.agents[name].uplink.changed()
        self.control.server.control._end_poll(name)
        await until(lambda: identity._leaf().serial_number != serial)
        identity.now_s = real
        assert identity.expires_s() >= before - 1

    async def check_all(self) -> None:
        """Every node beats, is called by the router over mutual TLS, and knows every other node."""
        nodes = self.control.server.control.cluster.nodes
        for name, agent in self.agents.items():
            number = nodes[name].number
            agent.uplink.changed()
            await until(lambda name=name, number=number: nodes[name].number > number)  # type: ignore[misc]
            assert await self.called(name) == name
            for other, peer in self.agents.items():
                if other != name:
                    assert self.asks(agent, peer) == 404

    async def called(self, name: str) -> str:
        """Who answers the router at a node's place."""
        control = self.control.server.control
        line = control.lines.to(name)
        async with control.session.post(f"{line.url}/v1/x", ssl=line.tls) as answer:
            return str((await answer.json())["by"])

    def asks(self, asker: Agent, giver: Agent) -> int:
        """One node asks another for a pack that is not there; the status."""
        given = giver.identity.answer
        assert given is not None
        store = Store(PackDirectory(self.folder / "packs"))
        server = PeerServer("127.0.0.1", 0, store)
        port = server.start()
        try:
            server.certify(giver.identity)
            rows = self.control.server.control.catalog.nodes
            server.allow(Allowed({name: row.key_sha256 for name, row in rows.items()}, frozenset()))
            with dial(port, asker.identity.peer_context(server=False)) as tls:
                mine = asker.identity.answer
                assert mine is not None
                cluster = Cluster(mine.cluster, mine.ca_pem)
                assert read_peer(tls.getpeercert(binary_form=True), cluster).node == giver.name
                answer = exchange(tls, get(PATH))
        finally:
            server.close()
        assert answer is not None
        return answer.status


async def test_nodes_of_both_cas_work_with_everybody_until_the_former_ends(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(tmp_path, stack, free_port(), None, {})  # type: ignore[arg-type]
        async with scene.started() as control:
            former = load_ca(tmp_path / "control", PRESENT)
            assert former is not None
            await control.tenant("acme")
            scene.ref = (await control.push("acme", "m", model_files()))["ref"]
            for name in ("old", "renewed"):
                await scene.join(name)
            early_token = (await control.call("POST", "/api/v1/nodes/tokens", {"name": "early"})).json()[
                "token"
            ]
        assert rotate_command.main(["--data-dir", str(tmp_path / "control")]) == 0
        async with scene.started() as control:
            authority = control.server.control.authority
            both = authority.cas
            assert len(both) == 2
            # All nodes trust both before anything is signed by the next; then it signs.
            for agent in scene.agents.values():
                await until(lambda agent=agent: agent.identity.ca_sha256 == authority.ca_sha256)  # type: ignore[misc]
            control.server.control.advance_rotation()
            await until(lambda: authority._cas.issuer is authority._cas.next)
            await scene.renew("renewed")
            await scene.join("young")  # with a token that pins the next
            assert authority.pin != early_token.partition(".")[0]
            early = FakeNode(control.bound.node_url, "early", "http://127.0.0.1:9")
            assert (await early.join(early_token)).status == 200
            await control.call("DELETE", "/api/v1/nodes/early")
            assert scene.issuer_is("old", both[0])
            assert scene.issuer_is("renewed", both[1])
            assert scene.issuer_is("young", both[1])
            await scene.check_all()
            # The last certificate of the former CA is replaced in time; then the CA ends.
            await scene.renew("old")
            with (
                mock.patch("control.ca.NODE_CERTIFICATE_LIFE", timedelta(0)),
                mock.patch("control.ca.CLOCK_SKEW", timedelta(0)),
            ):
                control.server.control.advance_rotation()
            assert authority.cas == (both[1],)
            for agent in scene.agents.values():
                await until(lambda agent=agent: agent.identity.ca_sha256 == authority.ca_sha256)  # type: ignore[misc]
            await scene.check_all()
            await scene.join("last")
            await scene.check_all()
            # Who kept the former CA's key, or a token of it, has nothing any more.
            forged = FakeNode(control.bound.node_url, "old", "", ca_pem=authority.ca_pem)
            names = [x509.UniformResourceIdentifier(f"spiffe://{authority.cluster}/node/old")]
            usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
            leaf = former.sign(forged.key.public_key(), "node old", names, usages, DAY, datetime.now(UTC))
            forged.chain_pem = leaf.public_bytes(serialization.Encoding.PEM).decode()
            assert (await forged.raw_beat(tmp_path)).status == 401
            late = FakeNode(control.bound.node_url, "late", "http://127.0.0.1:9")
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await replace(late, ca_pem=former.pem).call("GET", "/node/v1/ca")
        assert rotate_command.main(["--data-dir", str(tmp_path / "control")]) == 0
