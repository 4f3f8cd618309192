"""The certificate authority and join tokens: what is issued, who is recognised, who may redeem.

Covers: certificates and the pure decision about tokens. Does not cover: the routes that use them
(``test_control``, ``attacks/test_control_auth``).
"""

from __future__ import annotations

import base64
import hashlib
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from control.authority import (
    NODE_CERTIFICATE_LIFE,
    Authority,
    BadCertificateRequest,
    JoinRefused,
    NotANode,
    check_redemption,
    hash_secret,
    key_sha256_of,
    make_token,
    parse_node,
)
from control.catalog import NodeRow, TokenRow
from packer.types import BadValue


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "whatever I say")])
    made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "c1")


def issued(authority: Authority, node: str = "n1") -> x509.Certificate:
    request = authority.read_request(csr(ec.generate_private_key(ec.SECP256R1())))
    return x509.load_pem_x509_certificates(authority.issue_node(request, node).encode())[0]


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def test_the_ca_is_made_once_and_its_key_is_private(tmp_path: Path) -> None:
    first, second = Authority(tmp_path, "c1"), Authority(tmp_path, "c1")
    assert first.ca_pem == second.ca_pem
    assert stat.S_IMODE((tmp_path / "ca.key").stat().st_mode) == 0o600


def test_the_pin_is_the_digest_of_the_ca_key(authority: Authority) -> None:
    spki = (
        x509.load_pem_x509_certificate(authority.ca_pem.encode())
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    assert authority.pin == base64.urlsafe_b64encode(hashlib.sha256(spki).digest()).decode().rstrip("=")


def test_a_node_certificate_is_short_lived_and_names_the_node_alone(authority: Authority) -> None:
    """Nodes are clients of control, and clients and servers of each other; no name of theirs is a host's."""
    leaf = issued(authority, "control.example.com")
    assert leaf.not_valid_after_utc - datetime.now(UTC) <= NODE_CERTIFICATE_LIFE
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier("spiffe://c1/node/control.example.com")]
    assert leaf.subject.rfc4514_string() == "CN=node control.example.com"
    longest = issued(authority, "n" * 63)
    assert authority.identify(der(longest), datetime.now(UTC)).node == "n" * 63
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_name_comes_from_control_not_from_the_request(authority: Authority) -> None:
    identity = authority.identify(der(issued(authority, "n7")), datetime.now(UTC))
    assert identity.node == "n7"


def test_identity_carries_the_key(authority: Authority) -> None:
    leaf = issued(authority)
    assert authority.identify(der(leaf), datetime.now(UTC)).key_sha256 == key_sha256_of(leaf)


def test_an_expired_certificate_is_refused_on_a_connection_that_lives_on(authority: Authority) -> None:
    leaf = der(issued(authority))
    authority.identify(leaf, datetime.now(UTC) + timedelta(hours=23))
    with pytest.raises(NotANode, match="expired"):
        authority.identify(leaf, datetime.now(UTC) + timedelta(hours=25))


@pytest.mark.parametrize("certificate", [None, b""])
def test_no_certificate_is_nobody(authority: Authority, certificate: bytes | None) -> None:
    with pytest.raises(NotANode, match="no certificate was shown"):
        authority.identify(certificate, datetime.now(UTC))


def test_a_certificate_of_another_cluster_is_nobody(authority: Authority, tmp_path: Path) -> None:
    """Neither one of another CA, nor one of this CA that speaks of another cluster."""
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "c1")
    with pytest.raises(NotANode, match="another CA"):
        authority.identify(der(issued(other)), datetime.now(UTC))
    with pytest.raises(NotANode, match="not of this cluster"):
        authority.identify(der(issued(Authority(tmp_path, "c2"))), datetime.now(UTC))


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "x" * 9000])
def test_what_is_no_request_is_refused(authority: Authority, text: str) -> None:
    with pytest.raises(BadCertificateRequest):
        authority.read_request(text)


def test_other_kinds_of_key_are_refused(authority: Authority) -> None:
    with pytest.raises(BadCertificateRequest, match="P-256"):
        authority.read_request(csr(rsa.generate_private_key(65537, 2048)))
    with pytest.raises(BadCertificateRequest, match="P-256"):
        authority.read_request(csr(ec.generate_private_key(ec.SECP384R1())))


def test_a_request_that_its_key_did_not_sign_is_refused(authority: Authority) -> None:
    good = x509.load_pem_x509_csr(csr(ec.generate_private_key(ec.SECP256R1())).encode())
    raw = bytearray(good.public_bytes(serialization.Encoding.DER))
    raw[-1] ^= 1
    pem = "\n".join(
        (
            "-----BEGIN CERTIFICATE REQUEST-----",
            base64.encodebytes(bytes(raw)).decode().strip(),
            "-----END CERTIFICATE REQUEST-----",
        )
    )
    with pytest.raises(BadCertificateRequest):
        authority.read_request(pem)


# --- tokens ---------------------------------------------------------------------------------------

TOKEN = make_token("pin")
ROW = TokenRow(TOKEN.token_id, hash_secret(TOKEN.secret), None, 0, 1_000)
USED = replace(ROW, used_key_sha256="key1", used_node="n1")
NODE = NodeRow("n1", "inc", "key1", "http://h:1", 0)


def redeem(
    token: TokenRow | None = ROW,
    secret: str = TOKEN.secret,
    node: str = "n1",
    key: str = "key1",
    known: NodeRow | None = None,
    now_ms: int = 999,
) -> None:
    check_redemption(token, secret, node, key, known, now_ms)


def test_a_fresh_token_is_good_once() -> None:
    redeem()
    redeem(USED, known=NODE)  # the same key again: its answer was lost


@pytest.mark.parametrize(
    ("change", "conflict"),
    [
        ({"token": None}, False),
        ({"secret": "guess"}, False),
        ({"secret": ""}, False),
        ({"now_ms": 1_000}, False),
        ({"token": replace(ROW, node="n2")}, False),
        ({"token": USED, "key": "key2"}, True),
        ({"token": USED, "key": "key2", "known": NODE}, True),
        ({"token": USED, "node": "n2"}, True),
        ({"token": USED, "known": None}, False),
        ({"known": replace(NODE, key_sha256="key2")}, True),
    ],
)
def test_other_redemptions_are_refused(change: dict[str, object], conflict: bool) -> None:
    with pytest.raises(JoinRefused) as caught:
        redeem(**change)  # type: ignore[arg-type]
    assert caught.value.conflict is conflict


def test_refusals_do_not_tell_whether_a_token_exists() -> None:
    texts = set()
    for token, secret, now_ms in ((None, "x", 0), (ROW, "x", 0), (ROW, TOKEN.secret, 5_000)):
        with pytest.raises(JoinRefused) as caught:
            redeem(token, secret, now_ms=now_ms)
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_a_token_does_not_show_its_secret_when_printed() -> None:
    assert TOKEN.secret not in repr(TOKEN)
    assert TOKEN.text.split(".") == ["pin", TOKEN.token_id, TOKEN.secret]


@pytest.mark.parametrize("name", ["n1", "gpu-box-7", "A.b_c", "x" * 63])
def test_node_names(name: str) -> None:
    assert parse_node(name) == name


@pytest.mark.parametrize("name", ["", "x" * 64, "a/b", "a b", "..", "a..b", "-a", "a.", "é", "a\n", "a%2fb"])
def test_names_that_are_no_node_names(name: str) -> None:
    with pytest.raises(BadValue, match="not a node name"):
        parse_node(name)
