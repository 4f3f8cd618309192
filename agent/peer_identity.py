"""Whom another node's certificate speaks for.

Covers: reading the certificate that TLS has verified, and checking what TLS does not know: the cluster's
present CA, exactly one name of a node of this cluster, its key, its life at this moment. Does not cover:
which nodes exist (the plan says so) or making TLS contexts (``agent/identity.py``).
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization


class NotAPeer(Exception):
    """The certificate does not speak for the node it should; the text says why, without secrets."""


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A node of this cluster, proven by its certificate until ``ends_s`` (Unix time)."""

    node: str
    key_sha256: str
    ends_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster that this node has joined."""

    name: str
    ca_pem: str


def read_peer(certificate_der: bytes | None, cluster: Cluster) -> PeerIdentity:
    """The node that a certificate speaks for. Raises ``NotAPeer``.

    TLS has checked the chain already, against every CA that its context was ever given; here it must be
    the one that the node trusts now.
    """
    if not certificate_der:
        raise NotAPeer("no certificate was shown")
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        ca = x509.load_pem_x509_certificate(cluster.ca_pem.encode())
        certificate.verify_directly_issued_by(ca)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key_der = certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except (InvalidSignature, TypeError):
        raise NotAPeer("the certificate is of another CA") from None
    except (ValueError, x509.ExtensionNotFound):
        raise NotAPeer("the certificate names nobody") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    prefix = f"spiffe://{cluster.name}/node/"
    if len(uris) != 1 or len(list(names)) != 1 or not uris[0].startswith(prefix):
        raise NotAPeer("the certificate is not of a node of this cluster")
    ends_s = certificate.not_valid_after_utc.timestamp()
    if not certificate.not_valid_before_utc.timestamp() <= time.time() < ends_s:
        raise NotAPeer("the certificate is not valid now")
    return PeerIdentity(uris[0].removeprefix(prefix), hashlib.sha256(key_der).hexdigest(), ends_s)
