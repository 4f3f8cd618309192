"""Control's own key for tickets, and giving them.

Covers: making and keeping the key, and signing. Does not cover: who is given a ticket for which node
(``control/routes/direct.py``), or what it looks like (``packer/tickets.py``).
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from packer.durable import write_private
from packer.tickets import Ticket, public_text, sign

KEY_BYTES = 32


class TicketOffice:
    """The key lies beside the CA's. A new one, when it is lost, ends the tickets that are out."""

    def __init__(self, folder: Path, cluster: str) -> None:
        path = folder / "ticket.key"
        raw = path.read_bytes() if path.exists() else b""
        if len(raw) != KEY_BYTES:
            raw = Ed25519PrivateKey.generate().private_bytes_raw()
            write_private(path, raw)
        self._key = Ed25519PrivateKey.from_private_bytes(raw)
        self._cluster = cluster
        self.public_keys = (public_text(self._key),)

    def give(self, node: str, tenant: str, key_id: str, expires_ms: int) -> str:
        return sign(self._key, Ticket(self._cluster, node, tenant, key_id, expires_ms))
