"""The node's key and certificate on disk, and the TLS contexts made from them.

Covers: making the key, the certificate request, checking a join token's pin against a CA, storing what
control answered. Does not cover: talking to control (``agent/uplink.py``) or issuing certificates
(``control/authority.py``).

The key never leaves this directory (0700, files 0600); losing it costs one new join token.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from packer.certificates import (
    CONTROL,
    CheckedContext,
    CheckedObject,
    WrongSpeaker,
    checked_context,
    is_issued_by,
    parse_cas,
    pem_of,
    read_speaker,
    spki_digest,
)
from packer.durable import write_private
from packer.wire import BoxFacts, JoinAnswer, decode, encode

# A token is about 110 characters; a file much larger than that is not a token file.
TOKEN_CHARS_MAX = 512
# Renew after this share of a certificate's life, so that control may be away for the rest of it.
RENEW_AT_SHARE = 2 / 3
# Spread over this share of the life, so that nodes that joined together do not renew together.
RENEW_JITTER_SHARE = 0.1
# Identities of nodes that were removed, kept beside the present one for a person to look at.
FORMER_MAX = 3


class BadIdentity(Exception):
    """The token, the CA or the stored identity can not be used; the text says what to do."""


@dataclass(frozen=True, slots=True)
class JoinToken:
    pin: str  # base64url sha256 of the CA's SubjectPublicKeyInfo, unpadded
    token_id: str
    secret: str


def read_token(path: Path, what: str = "node") -> JoinToken:
    """Parse ``<pin>.<id>.<secret>`` from a file; raises ``BadIdentity``."""
    try:
        with path.open("rb") as file:
            text = file.read(TOKEN_CHARS_MAX + 1).decode(errors="replace").strip()
    except OSError as error:
        raise BadIdentity(f"--join-token-file: {error}") from None
    parts = text.split(".")
    if len(parts) != 3 or not all(parts) or len(text) > TOKEN_CHARS_MAX or not text.isascii():
        raise BadIdentity(f"{path} holds no join token; make one with: bunk {what} token create")
    return JoinToken(*parts)


def check_pin(token: JoinToken, ca_pem: bytes) -> str:
    """The certificate, as PEM, of the CA that the token was made by: the only one that may speak for this
    control server. Others beside it say nothing: whoever answers could have put them there. Nothing secret
    has been sent before this returns; raises ``BadIdentity``."""
    try:
        certificates = parse_cas(ca_pem.decode())
    except ValueError:
        raise BadIdentity("control answered something that is not a CA certificate") from None
    for certificate in certificates:
        pin = base64.urlsafe_b64encode(spki_digest(certificate)).rstrip(b"=").decode()
        if hmac.compare_digest(pin, token.pin.rstrip("=")):
            return pem_of(certificate)
    raise BadIdentity(
        "this control server's CA does not match the join token's pin: it is not the server that made the "
        "token (or somebody sits in between). The token's secret was not sent."
    )


@dataclass(frozen=True, slots=True)
class _Under:
    """What a caller was checked under."""

    answer: JoinAnswer | None
    routers: Mapping[str, str]


class Identity:
    """Files of one node: ``node.key``, ``identity.json`` (the last ``JoinAnswer``)."""

    def __init__(self, directory: Path, now_s: Callable[[], float] = time.time) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.now_s = now_s
        self.box = BoxFacts()  # told to control
        self._directory = directory
        self._key_path = directory / "node.key"
        self._answer_path = directory / "identity.json"
        self.answer: JoinAnswer | None = None
        self._routers: Mapping[str, str] = {}  # by name, the keys of those that may call here
        self._watchers: list[Callable[[], None]] = []
        self._file_lock = threading.Lock()
        self._saved_now = False  # a certificate came since this process started
        if self._answer_path.exists():
            self.answer = decode(self._answer_path.read_bytes(), JoinAnswer)

    def csr_pem(self, name: str) -> str:
        """A certificate request for this node's key, which is made on first use."""
        if not self._key_path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            pem = made.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            write_private(self._key_path, pem)
        key = serialization.load_pem_private_key(self._key_path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise BadIdentity(f"{self._key_path} is not an EC key; remove it and join with a new token")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.PEM).decode()

    def secret_for(self, purpose: str) -> bytes:
        """32 bytes that only this box's key leads to. Raises ``OSError`` and ``ValueError``."""
        key = serialization.load_pem_private_key(self._key_path.read_bytes(), None)
        der = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return HKDF(hashes.SHA256(), 32, None, f"bunkhouse {purpose}".encode()).derive(der)

    def save(self, answer: JoinAnswer) -> None:
        write_private(self._answer_path, encode(answer))
        self.answer = answer
        self._saved_now = True
        for watcher in list(self._watchers):
            watcher()

    def watch(self, certified: Callable[[], None]) -> None:
        """Tell of every new certificate: whoever serves with it must take it up."""
        self._watchers.append(certified)

    def unwatch(self, certified: Callable[[], None]) -> None:
        if certified in self._watchers:
            self._watchers.remove(certified)

    def adopt_cas(self, ca_pem: str) -> bool:
        """Trust these CAs from now on, as control says; False when the node would lock itself out."""
        assert self.answer is not None
        try:
            issued = any(is_issued_by(self._leaf(), ca) for ca in parse_cas(ca_pem))
        except ValueError:
            issued = False
        if issued:
            self.save(replace(self.answer, ca_pem=ca_pem))
        return issued

    @property
    def cluster(self) -> str:
        """Empty before the node has joined one."""
        return self.answer.cluster if self.answer is not None else ""

    @property
    def ca_sha256(self) -> str:
        """Of the CAs that are trusted; empty without any."""
        return hashlib.sha256(self.answer.ca_pem.encode()).hexdigest() if self.answer is not None else ""

    def forget(self) -> Path | None:
        """Control removed this node: what it was is put aside, and the next join starts afresh with a new
        key. Returns where it lies now."""
        self.answer = None
        try:
            aside = self._place_for_former()
            aside.mkdir(mode=0o700)
            for path in (self._answer_path, self._key_path, self._directory / "node.crt"):
                if path.exists():
                    path.rename(aside / path.name)
        except OSError:
            # A full disk must not keep a removed node in its old identity; the key may serve again.
            self._answer_path.unlink(missing_ok=True)
            return None
        return aside

    def _place_for_former(self) -> Path:
        """A name that is free; the oldest of too many goes. Raises ``OSError``."""
        former = [self._directory / f"former-{number}" for number in range(1, FORMER_MAX + 1)]
        free = next((place for place in former if not place.exists()), None)
        if free is not None:
            return free
        shutil.rmtree(former[0])
        for older, newer in pairwise(former):
            newer.rename(older)
        return former[-1]

    def expires_s(self) -> float:
        """Unix time at which the certificate ends; 0 without one."""
        return self._times()[1]

    def renew_due(self) -> bool:
        """At two thirds of its life, a little earlier or later; at once, but once, when it was issued by an
        earlier release and can not be shown to other nodes as a server."""
        if self.answer is not None and not self._saved_now and not may_serve(self._leaf()):
            return True
        return self.now_s() >= self.renew_at_s()

    def renew_at_s(self) -> float:
        """Unix time; the certificate's number says how far from two thirds, so that it is one time."""
        if self.answer is None:
            return 0.0
        begins, ends = self._times()
        spread = (self._leaf().serial_number % 1024 / 1024 - 0.5) * RENEW_JITTER_SHARE
        return begins + (ends - begins) * (RENEW_AT_SHARE + spread)

    def expired(self, margin_s: float = 0.0) -> bool:
        """Whether the certificate has ended, or ends within ``margin_s``."""
        return self.now_s() >= self.expires_s() - margin_s

    def _times(self) -> tuple[float, float]:
        if self.answer is None:
            return (0.0, 0.0)
        leaf = self._leaf()
        return (leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp())

    def _leaf(self) -> x509.Certificate:
        assert self.answer is not None
        return x509.load_pem_x509_certificates(self.answer.certificate_pem.encode())[0]

    def context(self) -> ssl.SSLContext:
        """TLS 1.3 to control with this node's certificate, trusting only the cluster's CA."""
        assert self.answer is not None
        return self._certified(verified_context(self.answer.ca_pem))

    def peer_context(self, *, server: bool) -> ssl.SSLContext:
        """TLS 1.3 with another node: both show a certificate of the cluster's CA.

        Nodes have no host names: whoever uses this compares the other's name in the certificate
        (``agent/peer_identity.py``) before a byte is said.
        """
        assert self.answer is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.answer.ca_pem)
        if server:
            # A resumed session would bring yesterday's certificate in again without showing it.
            context.num_tickets = 0
        return self._certified(context)

    def control_context(self) -> CheckedContext:
        """TLS 1.3 for a listener that only control and routers may call: it has no certificate yet
        (``certify``)."""
        return checked_context(self._check_caller, server=True)

    def let_in(self, routers: Mapping[str, str]) -> None:
        """These routers, by name and with these keys, may call beside control from now on; no others may."""
        if routers != self._routers:
            self._routers = dict(routers)

    def certify(self, context: ssl.SSLContext) -> None:
        """Take up the present certificate and CAs; connections that are open go on with the old ones."""
        assert self.answer is not None
        context.load_verify_locations(cadata=self.answer.ca_pem)
        self._certified(context)

    def _check_caller(self, certificate_der: bytes | None) -> float:
        if self.answer is None:
            raise WrongSpeaker("this node has not joined")
        cas = parse_cas(self.answer.ca_pem)
        speaker = read_speaker(certificate_der, self.answer.cluster, cas, self.now_s())
        known = self._routers.get(speaker.router) if speaker.router else None
        if speaker.name != CONTROL and known != speaker.key_sha256:
            raise WrongSpeaker("only control and the cluster's routers may call here")
        return speaker.ends_s

    def check_still(self, tls: CheckedObject) -> None:
        """Ask again on an open connection of control or a router, which may be removed, or whose CA may be
        trusted no more. Raises ``WrongSpeaker``. Signatures are verified anew only when this node's papers or
        the routers changed since: each request asks."""
        under = tls.checked_under
        if (
            not isinstance(under, _Under)
            or under.answer is not self.answer
            or under.routers is not self._routers
        ):
            tls.ends_s = self._check_caller(tls.getpeercert(binary_form=True))
            tls.checked_under = _Under(self.answer, self._routers)
        if self.now_s() >= tls.ends_s:
            raise WrongSpeaker("the certificate has expired")

    def _certified(self, context: ssl.SSLContext) -> ssl.SSLContext:
        assert self.answer is not None
        chain = self._directory / "node.crt"
        pem = self.answer.certificate_pem.encode()
        # The ssl module reads certificates from files only; threads that fetch packs ask for contexts too.
        with self._file_lock:
            if not chain.exists() or chain.read_bytes() != pem:
                write_private(chain, pem)
            context.load_cert_chain(chain, self._key_path)
        return context


def box_facts(devices: Sequence[str]) -> BoxFacts:
    """This machine, as people tell it from another that was made from the same image."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return BoxFacts(socket.gethostname()[:64], boot[:64], tuple(devices))


def may_serve(certificate: x509.Certificate) -> bool:
    """Whether other nodes accept it from a server."""
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.SERVER_AUTH in usages


def verified_context(ca_pem: str) -> ssl.SSLContext:
    """TLS 1.3 to control, trusting only this CA."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca_pem)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A node's certificate is of the same CA and names no host; its common name must not count as one.
    context.hostname_checks_common_name = False
    return context


def unverified_context() -> ssl.SSLContext:
    """For the one request that fetches the CA to compare with the pin; carries nothing secret."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
