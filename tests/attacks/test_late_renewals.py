"""The one way to a certificate without a token and without TLS's word for the caller: renewal after the end.

Covers: everybody who may not have one there, and what is given to who may. Does not cover: when a node asks
for it (``test_identity``).
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from running_control import Answer, FakeNode, Running, running

from control.authority import LATE_RENEWAL_MAX, Authority
from control.ca import NODE_CERTIFICATE_LIFE
from packer.certificates import spki_digest
from packer.wire import WIRE_VERSION, JoinAnswer, LateRenewAsk, decode, encode


@dataclass(slots=True)
class Site:
    """A node whose certificate ended an hour ago, and one more."""

    control: Running
    node: FakeNode
    other: FakeNode
    folder: Path

    @property
    def authority(self) -> Authority:
        return self.control.server.control.authority

    def give(self, node: FakeNode, authority: Authority, ended: timedelta) -> None:
        then = datetime.now(UTC) - NODE_CERTIFICATE_LIFE - ended
        with mock.patch.object(authority, "now", return_value=then):
            node.chain_pem = authority.issue_node(authority.read_request(node.csr_pem()), node.name)

    async def ask(self, certificate_pem: str, csr_pem: str) -> Answer:
        ask = LateRenewAsk(WIRE_VERSION, csr_pem, certificate_pem)
        return await self.node.call("POST", "/node/v1/renew-late", encode(ask))


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        made = Site(control, await control.join("n1"), await control.join("n2"), tmp_path)
        made.give(made.node, made.authority, timedelta(hours=1))
        yield made


async def test_who_has_the_key_and_the_certificate_gets_another(site: Site) -> None:
    """For its own key, under its own name, and on record; at the door with it as without."""
    answer = await site.ask(site.node.chain_pem, site.node.csr_pem())
    assert answer.status == 200
    given = decode(answer.body, JoinAnswer)
    leaf = x509.load_pem_x509_certificates(given.certificate_pem.encode())[0]
    known = site.control.server.control.catalog.nodes["n1"]
    assert (given.node, spki_digest(leaf).hex()) == ("n1", known.key_sha256)
    assert leaf.not_valid_after_utc - datetime.now(UTC) <= NODE_CERTIFICATE_LIFE
    site.node.chain_pem = given.certificate_pem
    assert (await site.node.raw_beat(site.folder)).status == 200
    assert (await site.control.recorded("node_renewed_late"))["detail"].startswith("n1 from 127.0.0.1")


Change = Callable[[Site], tuple[str, str]]


def another_key(site: Site) -> tuple[str, str]:
    """The certificate is public; who found it has not its key."""
    return site.node.chain_pem, FakeNode("", "n1", "").csr_pem()


def another_name(site: Site) -> tuple[str, str]:
    """One node's key with another node's certificate."""
    return site.other.chain_pem, site.node.csr_pem()


def another_ca(site: Site) -> tuple[str, str]:
    (site.folder / "other").mkdir()
    forger = Authority(site.folder / "other", site.authority.cluster)
    site.give(site.node, forger, timedelta(hours=1))
    return site.node.chain_pem, site.node.csr_pem()


def another_cluster(site: Site) -> tuple[str, str]:
    same_ca = Authority(site.folder / "control", "another")
    site.give(site.node, same_ca, timedelta(hours=1))
    return site.node.chain_pem, site.node.csr_pem()


def too_late(site: Site) -> tuple[str, str]:
    site.give(site.node, site.authority, LATE_RENEWAL_MAX + timedelta(minutes=1))
    return site.node.chain_pem, site.node.csr_pem()


def controls_own(site: Site) -> tuple[str, str]:
    text = (site.folder / "control" / "client.pem").read_text()
    return text[text.index("-----BEGIN CERT") :], site.node.csr_pem()


def the_ca_itself(site: Site) -> tuple[str, str]:
    return site.authority.ca_pem, site.node.csr_pem()


def never_joined(site: Site) -> tuple[str, str]:
    stranger = FakeNode("", "n3", "")
    site.give(stranger, site.authority, timedelta(hours=1))
    return stranger.chain_pem, stranger.csr_pem()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (another_key, "node_removed"),
        (another_name, "node_removed"),
        (never_joined, "node_removed"),
        (another_ca, "renewal_refused"),
        (another_cluster, "renewal_refused"),
        (too_late, "renewal_refused"),
        (controls_own, "node_removed"),
        (the_ca_itself, "renewal_refused"),
    ],
)
async def test_nobody_else_gets_one(site: Site, change: Change, code: str) -> None:
    answer = await site.ask(*change(site))
    assert (answer.status, answer.error["code"]) == (403, code)
    assert b"BEGIN CERTIFICATE" not in answer.body


async def test_a_removed_node_gets_none(site: Site) -> None:
    """Nor does it when its name was taken by another box since."""
    await site.control.call("DELETE", "/api/v1/nodes/n1")
    for _ in range(2):
        answer = await site.ask(site.node.chain_pem, site.node.csr_pem())
        assert (answer.status, answer.error["code"]) == (403, "node_removed")
        if "n1" not in site.control.server.control.catalog.nodes:
            await site.control.join("n1")


async def test_a_node_of_two_boxes_gets_none(site: Site) -> None:
    site.control.server.control.cluster.nodes["n1"].cloned = True
    answer = await site.ask(site.node.chain_pem, site.node.csr_pem())
    assert (answer.status, answer.error["code"]) == (409, "node_cloned")
    site.control.server.control.cluster.nodes["n1"].cloned = False


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n", "x" * 20_000])
async def test_what_is_no_certificate_is_refused_by_field(site: Site, text: str) -> None:
    answer = await site.ask(text, site.node.csr_pem())
    assert (answer.status, answer.error["field"]) == (400, "certificate_pem")
    answer = await site.ask(site.node.chain_pem, text[:9_000])
    assert (answer.status, answer.error["field"]) == (400, "csr_pem")


async def test_a_request_that_its_key_did_not_sign_is_refused(site: Site) -> None:
    """The proof of the key is the signature under the request."""
    request = x509.load_pem_x509_csr(site.node.csr_pem().encode())
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    lines = base64.encodebytes(bytes(der)).decode()
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{lines}-----END CERTIFICATE REQUEST-----\n"
    answer = await site.ask(site.node.chain_pem, pem)
    assert (answer.status, answer.error["field"]) == (400, "csr_pem")
