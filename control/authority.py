"""Who is certified in a cluster, and its join tokens.

Covers: the certificates of nodes and of control, reading who a client certificate speaks for, the text of a
join token, and the pure decision whether a token may be redeemed. Does not cover: the CAs' keys and their
rotation (``control.ca``), storing tokens and nodes (``control.catalog``), the routes
(``control.routes.certifying``), or the node's side (it checks the pin before it sends the secret).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
import secrets
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from control.ca import NODE_CERTIFICATE_LIFE, Cas, enter_stage, load_cas, next_stage, private_pem
from control.catalog import Joiner, NodeRow, RouterRow, TokenRow
from packer.certificates import (
    CONTROL,
    NODE_PREFIX,
    ROUTER_PREFIX,
    Speaker,
    WrongSpeaker,
    pem_of,
    read_speaker,
    speaker_uri,
    spki_digest,
)
from packer.durable import write_private
from packer.types import BadValue

# Made anew at each start and at two thirds of its life while the process runs.
SERVER_CERTIFICATE_LIFE = timedelta(days=30)
RENEW_AT_SHARE = 2 / 3
# How long after its certificate's end a node may have another one without a new token: control's outage over
# a long weekend. After that a copy of its key, on a disk that was thrown away say, is worth nothing.
LATE_RENEWAL_MAX = timedelta(days=7)
# A request for an EC key is about 500 bytes; RSA 4096 about 1,700.
CSR_CHARS_MAX = 8_192
# Client certificates that were verified and are remembered, two per node; one is about 1 KB.
SPEAKERS_MAX = 2_048
# X.520's bound; the name in full is in the URI.
COMMON_NAME_CHARS_MAX = 64
# A node's name is one path segment of a URI, a file name and a label.
NODE_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
# What stands in the place of a node's name in the management API's paths.
NODE_NAMES_TAKEN = frozenset({"tokens"})
# 80 and 256 random bits.
TOKEN_ID_BYTES = 10
TOKEN_SECRET_BYTES = 32
TOKEN_TTL_S_DEFAULT = 3_600
TOKEN_TTL_S_MAX = 7 * 24 * 3_600


class BadCertificateRequest(ValueError):
    """A certificate request that is not one, or asks for a kind of key that is not issued for."""


class NotANode(Exception):
    """The client's certificate does not speak for a node of this cluster (or there is none)."""


class JoinRefused(Exception):
    """A join token may not be redeemed. ``conflict``: somebody else redeemed it or holds the name."""

    def __init__(self, message: str, *, conflict: bool = False) -> None:
        super().__init__(message)
        self.conflict = conflict


def parse_node(text: str, field: str = "name") -> str:
    """Return ``text`` if it is a node name, else raise ``BadValue``."""
    if not NODE_PATTERN.fullmatch(text) or ".." in text or text in NODE_NAMES_TAKEN:
        raise BadValue(
            field,
            f"{text[:80]!r} is not a node name: use 1 to 63 of letters, digits, '.', '_' and '-', "
            "starting and ending with a letter or digit, and not a word of the API's paths",
        )
    return text


# --- join tokens ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A token's text taken apart. Holds the secret: never log or store it."""

    pin: str
    token_id: str
    secret: str = field(repr=False)

    @property
    def text(self) -> str:
        return f"{self.pin}.{self.token_id}.{self.secret}"


def make_token(pin: str) -> JoinToken:
    return JoinToken(
        pin,
        secrets.token_hex(TOKEN_ID_BYTES),
        base64.urlsafe_b64encode(secrets.token_bytes(TOKEN_SECRET_BYTES)).rstrip(b"=").decode(),
    )


def hash_secret(secret: str) -> str:
    """What is stored of a token's secret: it has 256 random bits, so a fast hash is right."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check_redemption(
    token: TokenRow | None,
    secret: str,
    node: str,
    key_sha256: str,
    known: NodeRow | RouterRow | None,
    now_ms: int,
    joiner: Joiner = Joiner.NODE,
) -> None:
    """Decide whether ``token`` may make ``node``, a ``joiner``, with this public key join. Raises
    ``JoinRefused``.

    A token is good once, but for the key that redeemed it again: an answer can be lost on its way.
    """
    stored = token.secret_sha256 if token else "0" * 64
    right = hmac.compare_digest(hash_secret(secret), stored)
    if token is None or not right or now_ms >= token.expires_ms:
        raise JoinRefused(
            f"the join token is unknown, expired or revoked; make a new one with `bunk {joiner} token create`"
        )
    if token.joiner is not joiner:
        raise JoinRefused(
            f"the join token is for a {token.joiner}, not for a {joiner}; make one with "
            f"`bunk {joiner} token create`"
        )
    if token.used_key_sha256 is not None:
        if token.used_key_sha256 != key_sha256:
            raise JoinRefused(
                "the join token was already redeemed by another key. If that was not you, remove the node "
                "that used it (`bunk events` names it); a token is good for one node, make a new one",
                conflict=True,
            )
        if token.used_node != node:
            raise JoinRefused(
                f"the join token was already redeemed, for the name {token.used_node!r}; make a new one",
                conflict=True,
            )
        if known is None:
            raise JoinRefused("the node that redeemed this token was removed; make a new token")
    if token.node is not None and token.node != node:
        raise JoinRefused(
            f"the join token is for a {joiner} named {token.node!r}, not {node!r}: start it with --name "
            f"{token.node}, or make a token without --name"
        )
    if known is not None and known.key_sha256 != key_sha256:
        raise JoinRefused(
            f"a {joiner} named {node!r} exists with another key; remove it first with "
            f"`bunk {joiner} rm {node}`, or choose another --name",
            conflict=True,
        )


# --- certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Whom a client certificate speaks for: a node, or a router."""

    node: str
    key_sha256: str
    router: str = ""


class Authority:
    """Who is certified in one cluster, by the CAs in control's directory (``control.ca``)."""

    def __init__(
        self, directory: Path, cluster: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.cluster = cluster
        self.now = now
        self._directory = directory
        self._speakers: dict[bytes, Speaker] = {}  # by certificate: what was read and verified of it
        self._take_up(load_cas(directory, f"Bunkhouse cluster {cluster}", now()))
        self.found = self._cas.found  # wrong with the CAs' files at the start, for people; empty: nothing

    def _take_up(self, cas: Cas) -> None:
        self._cas = cas
        trusted = [cas.present] + ([cas.next] if cas.next is not None else [])
        self.cas = tuple(ca.certificate for ca in trusted)
        self.ca_pem = "".join(ca.pem for ca in trusted)
        self.ca_sha256 = hashlib.sha256(self.ca_pem.encode()).hexdigest()
        self.pin = trusted[-1].pin
        self._speakers.clear()

    def advance(self, all_trust: bool) -> str | None:
        """Go on with a rotation when it is time; what happened, for people. ``all_trust``: every node that
        can be asked has said that it trusts both CAs. Whoever shows certificates takes them anew then."""
        rotation = next_stage(self._cas, all_trust, self.now())
        if rotation is None:
            return None
        self._take_up(enter_stage(self._directory, self._cas, rotation))
        if rotation.ended:
            return "the former CA is no longer trusted and its key is destroyed"
        return "the next CA signs nodes' certificates; the former is trusted until the last of its own ended"

    def read_request(self, csr_pem: str) -> x509.CertificateSigningRequest:
        """Check a certificate request; raises ``BadCertificateRequest``. Only its key is used."""
        if len(csr_pem) > CSR_CHARS_MAX:
            raise BadCertificateRequest(f"longer than the limit of {CSR_CHARS_MAX} characters")
        try:
            request = x509.load_pem_x509_csr(csr_pem.encode())
            key = request.public_key()
            genuine = request.is_signature_valid
        except Exception:  # cryptography raises many types on hostile DER; none of them is our fault
            raise BadCertificateRequest("is not a certificate request in PEM form") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise BadCertificateRequest("must be for a P-256 key")
        if not genuine:
            raise BadCertificateRequest("is not signed by the key that it names")
        return request

    def issue_node(self, request: x509.CertificateSigningRequest, node: str) -> str:
        """A certificate for ``node`` with the request's key: as a client here, and as a client and a
        server among nodes; PEM chain, leaf first.

        Only the URI names the node. The common name is none that a host can have: a TLS library that
        falls back to it must not take a node called like control for control.
        """
        san = x509.UniformResourceIdentifier(speaker_uri(self.cluster, NODE_PREFIX + node))
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        common_name = f"node {node}"[:COMMON_NAME_CHARS_MAX]
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)  # ``read_request`` takes no others
        issuer = self._cas.issuer
        leaf = issuer.sign(key, common_name, [san], usages, NODE_CERTIFICATE_LIFE, self.now())
        return pem_of(leaf) + issuer.pem

    def issue_router(self, request: x509.CertificateSigningRequest, router: str) -> str:
        """As ``issue_node``, for a router that is a process of its own: a client here and of nodes, no
        server to anybody who goes by this CA."""
        san = x509.UniformResourceIdentifier(speaker_uri(self.cluster, ROUTER_PREFIX + router))
        common_name = f"router {router}"[:COMMON_NAME_CHARS_MAX]
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)  # ``read_request`` takes no others
        issuer, usages = self._cas.issuer, [ExtendedKeyUsageOID.CLIENT_AUTH]
        leaf = issuer.sign(key, common_name, [san], usages, NODE_CERTIFICATE_LIFE, self.now())
        return pem_of(leaf) + issuer.pem

    def identify(self, certificate_der: bytes | None, now: datetime) -> NodeIdentity:
        """Whom a client certificate that TLS has verified speaks for; raises ``NotANode``.

        The life is checked again because a connection may outlive its certificate.
        """
        known = self._speakers.get(certificate_der or b"")
        try:
            if known is None or not known.begins_s <= now.timestamp() < known.ends_s:
                known = read_speaker(certificate_der, self.cluster, self.cas, now.timestamp())
        except WrongSpeaker as error:
            raise NotANode(str(error)) from None
        if not known.node and not known.router:
            raise NotANode("the certificate is not a node's")
        if len(self._speakers) >= SPEAKERS_MAX:
            self._speakers.clear()
        self._speakers[certificate_der or b""] = known
        return NodeIdentity(known.node, known.key_sha256, known.router)

    def server_context(self, hosts: Sequence[str]) -> ssl.SSLContext:
        """TLS 1.3 for the node listener; a client certificate is verified when one is sent."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        # A resumed session would bring yesterday's certificate in again without showing it.
        context.num_tickets = 0
        context.load_verify_locations(cadata=self.ca_pem)
        self.load_server_certificate(context, hosts)
        return context

    def load_server_certificate(self, context: ssl.SSLContext, hosts: Sequence[str]) -> None:
        """Make a certificate for ``hosts`` and give it to ``context``; connections made later use it."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [_host_name(host) for host in hosts]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH]
        leaf = self._own(key, "control", names, usages)
        # The ssl module reads key pairs from files only.
        path = self._directory / "server.pem"
        write_private(path, private_pem(key) + leaf.encode())
        context.load_verify_locations(cadata=self.ca_pem)
        context.load_cert_chain(path)

    def make_control_certificate(self) -> Path:
        """A file with a key and a certificate that names control: what it shows to nodes as a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(speaker_uri(self.cluster, CONTROL))]
        leaf = self._own(key, CONTROL, names, [ExtendedKeyUsageOID.CLIENT_AUTH])
        path = self._directory / "client.pem"
        write_private(path, private_pem(key) + leaf.encode())
        return path

    def _own(
        self,
        key: ec.EllipticCurvePrivateKey,
        common_name: str,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
    ) -> str:
        """A certificate of control's own, PEM chain: of the present CA until a rotation ends, and with what
        the next one says of it, so that it is accepted by who trusts the one or the other."""
        cas, now = self._cas, self.now()
        leaf = cas.present.sign(key.public_key(), common_name, names, usages, SERVER_CERTIFICATE_LIFE, now)
        between = pem_of(cas.next.vouch_for(cas.present, now)) if cas.next is not None else cas.present.pem
        return pem_of(leaf) + between


def key_sha256_of(holder: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """What a node's key is known by: sha256 of its SubjectPublicKeyInfo, in hex."""
    return spki_digest(holder).hex()


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
