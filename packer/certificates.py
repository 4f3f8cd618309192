"""Whom a certificate of the cluster speaks for, and TLS that asks so before a handshake is done.

Covers: the cluster's CA certificates as text, reading the one name in a certificate under the CAs that are
trusted now, and TLS contexts that end the handshake with whoever is not the right one, before a byte is
said. Does not cover: issuing (``control.authority``), keys and files of a node (``packer.identity``), or who
exists (the catalog, the plan).
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

# Two while they overlap; a certificate of ours has about 700 characters.
CAS_MAX = 4
CA_CHARS_MAX = 16 * 1024
# What follows the cluster in the one URI of a certificate: a name behind one of these, or control itself.
NODE_PREFIX = "node/"
ROUTER_PREFIX = "router/"
CONTROL = "control"


class WrongSpeaker(Exception):
    """The certificate does not speak for whom it should; the text says why, without secrets."""


@dataclass(frozen=True, slots=True)
class Speaker:
    """Who shows a certificate: ``name`` is ``node/n1``, ``router/r1`` or ``control``. Times are Unix
    seconds."""

    name: str
    key_sha256: str
    begins_s: float
    ends_s: float

    @property
    def node(self) -> str:
        """The node's name; empty when it is no node."""
        return self.name.removeprefix(NODE_PREFIX) if self.name.startswith(NODE_PREFIX) else ""

    @property
    def router(self) -> str:
        """The name of a router that is a process of its own; empty when it is none."""
        return self.name.removeprefix(ROUTER_PREFIX) if self.name.startswith(ROUTER_PREFIX) else ""


def speaker_uri(cluster: str, name: str) -> str:
    """The URI that names a speaker in its certificate."""
    return f"spiffe://{cluster}/{name}"


@lru_cache(maxsize=8)
def parse_cas(ca_pem: str) -> tuple[x509.Certificate, ...]:
    """The CA certificates in a text; raises ``ValueError``."""
    if len(ca_pem) > CA_CHARS_MAX:
        raise ValueError(f"CA certificates are longer than the limit of {CA_CHARS_MAX} characters")
    found = tuple(x509.load_pem_x509_certificates(ca_pem.encode()))
    if len(found) > CAS_MAX:
        raise ValueError(f"{len(found)} CA certificates, the limit is {CAS_MAX}")
    return found


def pem_of(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def spki_digest(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """sha256 of the public key as certificates carry it: what nodes and CAs are known by."""
    der = holder.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).digest()


def read_speaker(
    certificate_der: bytes | None, cluster: str, cas: Sequence[x509.Certificate], now_s: float
) -> Speaker:
    """Whom a certificate speaks for at this moment. Raises ``WrongSpeaker``.

    TLS has checked the chain already, against every CA that its context was ever given and at the time of
    the handshake; here it must be a CA that is trusted now, and the certificate must be valid still.
    """
    speaker = read_late_speaker(certificate_der, cluster, cas)
    if now_s >= speaker.ends_s:
        raise WrongSpeaker("the certificate has expired")
    if now_s < speaker.begins_s:
        raise WrongSpeaker("the certificate is not valid yet; are the clocks right?")
    return speaker


def read_late_speaker(
    certificate_der: bytes | None, cluster: str, cas: Sequence[x509.Certificate]
) -> Speaker:
    """As ``read_speaker``, of a certificate that may have expired. Raises ``WrongSpeaker``."""
    if not certificate_der:
        raise WrongSpeaker("no certificate was shown")
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key_sha256 = spki_digest(certificate).hex()
    except (ValueError, TypeError, x509.ExtensionNotFound):
        raise WrongSpeaker("the certificate names nobody") from None
    if not any(is_issued_by(certificate, ca) for ca in cas):
        raise WrongSpeaker("the certificate is of another CA")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    prefix = speaker_uri(cluster, "")
    if len(uris) != 1 or len(list(names)) != 1 or not uris[0].startswith(prefix):
        raise WrongSpeaker("the certificate is not of this cluster (not of a node, a router or control)")
    return Speaker(
        uris[0].removeprefix(prefix),
        key_sha256,
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether this CA signed it; says nothing of its life."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


# --- TLS that asks --------------------------------------------------------------------------------

# Raises ``WrongSpeaker``; returns until when the certificate is valid, in Unix seconds.
Check = Callable[[bytes | None], float]


class CheckedContext(ssl.SSLContext):
    """TLS 1.3 with certificates on both sides; ``check`` is given the other side's when TLS has verified it,
    and raises ``WrongSpeaker`` to end the handshake. For asyncio: plain sockets do not ask it."""

    check: Check


class CheckedObject(ssl.SSLObject):
    """One connection of a ``CheckedContext``; whoever answers on it looks at ``ends_s`` again, and at whether
    what it was ``checked_under`` still holds."""

    ends_s: float = 0.0
    checked_under: object = None  # as whoever checks again noted it; None: at the handshake alone

    def do_handshake(self) -> None:
        super().do_handshake()
        context = self.context
        assert isinstance(context, CheckedContext)
        try:
            self.ends_s = context.check(self.getpeercert(binary_form=True))
        except WrongSpeaker as error:
            # What the event loop takes for a handshake that failed.
            raise ssl.SSLCertVerificationError(f"{error}") from None


def checked_context(check: Check, *, server: bool) -> CheckedContext:
    """Without CAs and a certificate of its own yet; whoever made it loads them."""
    context = CheckedContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # nodes have no host names; ``check`` asks for more than that
    context.verify_mode = ssl.CERT_REQUIRED
    context.sslobject_class = CheckedObject
    context.check = check
    if server:
        # A resumed session would bring yesterday's certificate in again without showing it.
        context.num_tickets = 0
    return context
