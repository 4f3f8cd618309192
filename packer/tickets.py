"""Tickets: what lets a tenant's program call one node itself, for a few minutes, without its key.

Covers: the text of a ticket, signing one (control) and reading one (a node), and their limits. Does not
cover: who is given one (``control/routes/direct.py``) or what else opens a gateway
(``agent/credentials.py``).

A ticket is signed by control's own key (Ed25519), of which nodes know only the public half: a node can
not make tickets, for itself or for others. It names one cluster, one node, one tenant and the API key on
whose behalf it was given, and is worth no more than that key: when the key leaves the node's plan, so do
all its tickets. Times are control's; the node compares with what control's clock shows, not its own.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# How long a ticket is good for. A program asks for a new one long before that; the rest is for when control
# can not be reached.
TICKET_LIFE_MS = 300_000
# Longer than any ticket of ours: three names of at most 63 characters each, in base64, with a signature.
TICKET_CHARS_MAX = 1_024
# Public keys that a plan may carry: of each control server, and of the time before it made itself a new one.
TICKET_KEYS_MAX = 16

_PREFIX = "bt_"
# Nothing else that is signed with this key begins like this.
_DOMAIN = b"bunkhouse ticket 1\n"


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a ticket says. ``expires_ms`` is of control's wall clock."""

    cluster: str
    node: str
    tenant: str
    key_id: str
    expires_ms: int


def public_text(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """A public key as plans carry it."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return _text(public.public_bytes_raw())


def sign(key: Ed25519PrivateKey, ticket: Ticket) -> str:
    """The ticket's text, printable and without spaces."""
    said = msgspec.json.encode(ticket)
    return f"{_PREFIX}{_text(said)}.{_text(key.sign(_DOMAIN + said))}"


def is_ticket(text: str) -> bool:
    """Whether it is written like a ticket and not like a key."""
    return text.startswith(_PREFIX)


def read(text: str) -> tuple[Ticket, bytes, bytes] | None:
    """What a ticket claims, with the bytes that ``proves`` needs. Nothing of it is true yet."""
    if not is_ticket(text) or len(text) > TICKET_CHARS_MAX:
        return None
    said_text, dot, signature_text = text.removeprefix(_PREFIX).partition(".")
    said, signature = _bytes(said_text), _bytes(signature_text)
    if not dot or said is None or signature is None:
        return None
    try:
        return msgspec.json.decode(said, type=Ticket), said, signature
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None


def proves(keys: Sequence[str], said: bytes, signature: bytes) -> bool:
    """Whether one of ``keys`` signed it."""
    for text in keys[:TICKET_KEYS_MAX]:
        raw = _bytes(text)
        if raw is None or len(raw) != 32:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(raw).verify(signature, _DOMAIN + said)
        except InvalidSignature:
            continue
        return True
    return False


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _bytes(text: str) -> bytes | None:
    """Only what ``_text`` writes: of several spellings of the same bytes one is right."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except ValueError:
        return None
    return data if _text(data) == text else None
