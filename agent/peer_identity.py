"""Whom another node's certificate speaks for.

Covers: reading the certificate that TLS has verified, and checking what TLS does not know: the cluster's
present CAs, exactly one name of a node of this cluster, its key, its life at this moment. Does not cover:
which nodes exist (the plan says so) or making TLS contexts (``packer/identity.py``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from packer.certificates import WrongSpeaker, parse_cas, read_speaker


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
    """The cluster that this node has joined, and the certificates of its CAs."""

    name: str
    ca_pem: str


def read_peer(certificate_der: bytes | None, cluster: Cluster) -> PeerIdentity:
    """The node that a certificate speaks for. Raises ``NotAPeer``.

    TLS has checked the chain already, against every CA that its context was ever given; here it must be
    one that the node trusts now.
    """
    try:
        speaker = read_speaker(certificate_der, cluster.name, parse_cas(cluster.ca_pem), time.time())
    except (WrongSpeaker, ValueError) as error:
        raise NotAPeer(str(error)) from None
    if not speaker.node:
        raise NotAPeer("the certificate is not of a node of this cluster")
    return PeerIdentity(speaker.node, speaker.key_sha256, speaker.ends_s)
