"""Calling other nodes: who can be called now, a connection to exactly that node, and one question over it.

Covers: proving by its certificate who answers, the heads of answers, and remembering who could not be talked
to or gave something bad. Does not cover: what is asked for and what comes of it (``agent/peer_fetch.py``) or
how heads are written (``agent/peer_http.py``).
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from agent.peer_http import BadHead, Connection, Gone, Head, parse_status
from agent.peer_identity import Cluster, NotAPeer, read_peer
from packer.identity import Identity
from packer.types import ModelRef
from packer.wire import JoinAnswer, PeerSpec

log = logging.getLogger("bunk.peers")

CONNECT_S = 5.0
# A range that takes longer, or an answer's head: the node is as good as dead.
ANSWER_S = 10.0
# A node that could not be talked to is not asked again for this long; so many are remembered.
DEAD_S = 60.0
DEAD_MAX = 1_000
RETRY_S_MAX = 1.0
# A node whose copy turned out corrupt is not asked for that version again for this long; so many are
# remembered.
REFUSED_S = 600.0
REFUSED_MAX = 256


class PeerFailed(Exception):
    """This peer can not give it. ``dead``: it can not be talked to at all. ``broke``: a connection did,
    which happens to the best."""

    def __init__(self, message: str, *, dead: bool = False, broke: bool = False) -> None:
        super().__init__(message)
        self.dead = dead
        self.broke = broke


class Later(Exception):
    """This peer is busy. ``closed``: it takes no more connections either."""

    def __init__(self, wait_s: float, closed: bool) -> None:
        super().__init__(f"busy, asks to wait {wait_s:g} s")
        self.wait_s = wait_s
        self.closed = closed


class PeerCalls:
    """From threads: each call blocks."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._context: tuple[JoinAnswer, ssl.SSLContext] | None = None
        self._dead: dict[str, float] = {}  # node: until (monotonic)
        self._refused: dict[tuple[ModelRef, str], float] = {}
        self._lock = threading.Lock()

    def usable(self, ref: ModelRef, peers: Sequence[PeerSpec]) -> list[PeerSpec]:
        """Without those that could not be talked to or gave a bad copy a while ago."""
        now_s = time.monotonic()
        with self._lock:
            return [
                peer
                for peer in peers
                if self._dead.get(peer.node, 0.0) <= now_s
                and self._refused.get((ref, peer.node), 0.0) <= now_s
            ]

    def bury(self, peer: PeerSpec, why: Exception) -> None:
        log.warning("node %s gives no packs now: %s", peer.node, why)
        with self._lock:
            self._dead.pop(peer.node, None)
            while len(self._dead) >= DEAD_MAX:
                del self._dead[next(iter(self._dead))]
            self._dead[peer.node] = time.monotonic() + DEAD_S

    def refuse(self, ref: ModelRef, peers: Sequence[str]) -> None:
        """What these nodes gave turned out corrupt: do not fetch this version from them for a while."""
        with self._lock:
            for node in peers:
                while len(self._refused) >= REFUSED_MAX:
                    del self._refused[next(iter(self._refused))]
                self._refused[(ref, node)] = time.monotonic() + REFUSED_S

    def _tls(self, answer: JoinAnswer) -> ssl.SSLContext:
        with self._lock:
            if self._context is None or self._context[0] is not answer:
                self._context = (answer, self._identity.peer_context(server=False))
            return self._context[1]

    def connect(self, peer: PeerSpec, cancel: Callable[[], bool]) -> Connection:
        """A connection to exactly this node. Raises ``PeerFailed``."""
        answer = self._identity.answer
        parts = urlsplit(peer.peer_url)
        if answer is None or parts.scheme != "https" or parts.hostname is None or parts.port is None:
            raise PeerFailed("its address is none", dead=True)
        try:
            context = self._tls(answer)
            raw = socket.create_connection((parts.hostname, parts.port), CONNECT_S)
            try:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                tls = context.wrap_socket(raw)
            except BaseException:
                raw.close()
                raise
            try:
                shown = read_peer(tls.getpeercert(binary_form=True), Cluster(answer.cluster, answer.ca_pem))
                if (shown.node, shown.key_sha256) != (peer.node, peer.key_sha256):
                    raise NotAPeer(f"node {shown.node!r} answers there, or one with another key")
            except BaseException:
                tls.close()
                raise
            return Connection(tls, cancel)
        except (OSError, ValueError, NotAPeer) as error:
            raise PeerFailed(str(error), dead=True) from None

    def ask(self, connection: Connection, path: str, headers: dict[str, str]) -> tuple[Head, int]:
        """Send a request; the head of a good answer, and the length of its body. Raises ``PeerFailed`` and
        ``Later``."""
        until_s = time.monotonic() + ANSWER_S
        try:
            connection.send_head(f"GET {path} HTTP/1.1", {"Host": "peer", **headers}, until_s)
            head = connection.read_head(until_s)
            status, length = parse_status(head)
        except (OSError, BadHead, Gone) as error:
            raise PeerFailed(f"{type(error).__name__}: {error}", broke=True) from None
        if status == 429:
            wait = head.headers.get("retry-after-ms", "")
            wait_ms = int(wait) if wait.isdecimal() and len(wait) < 7 else 100
            raise Later(min(RETRY_S_MAX, wait_ms / 1000), head.headers.get("connection") == "close")
        if status not in (200, 206):
            raise PeerFailed(f"answered {status}")
        return head, length

    def read_body(self, connection: Connection, out: memoryview, until_s: float) -> None:
        try:
            while out:
                out = out[connection.read_into(out, until_s) :]
        except (OSError, BadHead) as error:
            raise PeerFailed(f"{type(error).__name__}: {error}", broke=True) from None
