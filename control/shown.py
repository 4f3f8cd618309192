"""The certificates that control shows: at the listener that nodes call, and when it calls nodes.

Covers: under which names the listener is certified, and taking new certificates in time and when the CA
changes. Does not cover: making them (``control.authority``).
"""

from __future__ import annotations

import socket
import ssl

from control.authority import RENEW_AT_SHARE, SERVER_CERTIFICATE_LIFE, Authority
from control.config import Config
from control.node_tls import NodeLines


class ShownCertificates:
    """``renew`` when the CA changes; ``tick`` now and then. Times are of a steady clock."""

    def __init__(self, authority: Authority, config: Config, lines: NodeLines, now_ms: int) -> None:
        self._authority = authority
        self._config = config
        self._lines = lines
        self._listener: ssl.SSLContext | None = None
        self._renew_at_ms = now_ms + _renew_after_ms()

    def listener_context(self) -> ssl.SSLContext:
        self._listener = self._authority.server_context(self._hosts())
        return self._listener

    def tick(self, now_ms: int) -> None:
        if now_ms >= self._renew_at_ms:
            self._renew_at_ms = now_ms + _renew_after_ms()
            self.renew()

    def renew(self) -> None:
        """Connections made later see the new ones."""
        if self._listener is not None:
            self._authority.load_server_certificate(self._listener, self._hosts())
        self._lines.renew()

    def _hosts(self) -> list[str]:
        host = self._config.node_listen.host
        names = ["127.0.0.1", "::1", "localhost", *self._config.node_hosts]
        # On all addresses the likeliest other name is this machine's own; --node-host says the rest.
        names.append(socket.gethostname() if host in ("0.0.0.0", "::") else host)
        return list(dict.fromkeys(names))


def _renew_after_ms() -> int:
    return int(SERVER_CERTIFICATE_LIFE.total_seconds() * RENEW_AT_SHARE * 1000)
