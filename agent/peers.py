"""Giving packs to the other nodes of the cluster: the agent's second listener.

Covers: who may ask (a certificate of the cluster's CA, of a node that the plan names, with the key it
names), what for (complete packs of versions in the plan, and their data keys), and how much of this node
that may take. Does not cover: fetching (``agent/peer_fetch.py``), which node should ask whom (control), or
what is in a pack: it leaves as it lies on disk, sealed.

Every connection has a thread of its own, because TLS is computing: blocking sockets do it outside the GIL
and away from the agent's loop. Their number is bounded, before and after the handshake.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from agent.peer_http import PIECE_BYTES, BadHead, Connection, Gone, Head, parse_range, parse_request
from agent.peer_identity import Cluster, NotAPeer, PeerIdentity, read_peer
from packer.identity import Identity
from packer.index import BASES_MAX, PackError
from packer.pack import read_header
from packer.types import GIB, MIB, BadValue, ModelRef, parse_ref

log = logging.getLogger("bunk.peers")

# Connections whose handshake is not done: strangers can have these and no more, one address half of them.
HANDSHAKES_MAX = 64
ADDRESS_HANDSHAKES_MAX = 32
# A handshake is two small messages; who needs longer is gone or hostile.
HANDSHAKE_S = 5.0
# Connections of nodes, in all and of one. A fetch uses four, and a node may have two fetches at one time.
CONNECTIONS_MAX = 64
NODE_CONNECTIONS_MAX = 12
# Answers with weights at one time; more would only share the same disk and link.
TRANSFERS_MAX = 16
# A connection that asks nothing for this long is closed; the next range is asked for at once.
IDLE_S = 15.0
# One answer carries at most this much, so that a pack that is dropped is not held for long.
RANGE_BYTES_MAX = 64 * MIB
# A reader slower than this is cut off; it costs a thread and a transfer, and others wait for them.
READ_BYTES_S_LEAST = 1 * MIB
ANSWER_S = 10.0
# What all transfers together take of disk and link: a node's own tenants come first, and 1 GiB/s is most of
# a 10 Gbit/s link and the half of what a fast disk gives.
RATE_BYTES_S_DEFAULT = 1 * GIB
# When a transfer is refused because others run: a range takes some ten milliseconds.
RETRY_MS = 100

PREFIX = "/peer/v1/packs/"


class PackStore(Protocol):
    """What the server asks of the node; called on its threads."""

    def open(self, ref: ModelRef, base: int | None = None) -> int:
        """A descriptor of a complete pack, or of the file that it keeps for this base. Raises ``OSError``."""

    def data_key(self, ref: ModelRef) -> bytes | None:
        """The key of a complete pack; None when there is none, or when it can not be read now."""

    def gave_key(self, ref: ModelRef, node: str) -> None:
        """For the record: this node has the key of this pack from now on."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """From the plan in force: other nodes with the sha256 of their keys, and the versions of this node."""

    nodes: Mapping[str, str]
    versions: frozenset[ModelRef]


@dataclass(frozen=True, slots=True)
class Route:
    """``suffix`` follows tenant, name and version in the path."""

    method: str
    suffix: str
    handle: Callable[[PeerServer, Connection, PeerIdentity, ModelRef, Head], None]


class Refusal(Exception):
    """An answer without a body; ``last``: the connection is closed behind it."""

    def __init__(self, status: int, *, last: bool = False, **headers: str | int) -> None:
        super().__init__(str(status))
        self.status = status
        self.last = last
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Pacer:
    """Spaces bytes out so that all transfers together keep to a rate."""

    def __init__(self, bytes_s: int) -> None:
        self._bytes_s = bytes_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def wait_s(self, nbytes: int, now_s: float) -> float:
        """How long to wait before these bytes may go; they are counted now."""
        with self._lock:
            begins_s = max(self._free_at_s, now_s)
            self._free_at_s = begins_s + nbytes / self._bytes_s
            return begins_s - now_s


class PeerServer:
    """``start`` binds; nobody is let in before ``certify`` and ``allow``; ``close`` ends every transfer."""

    def __init__(
        self, host: str, port: int, store: PackStore, rate_bytes_s: int = RATE_BYTES_S_DEFAULT
    ) -> None:
        self._host = host
        self._port = port
        self._store = store
        self._pacer = Pacer(rate_bytes_s)
        self._tls: ssl.SSLContext | None = None
        self._cluster: Cluster | None = None
        self._allowed = Allowed({}, frozenset())
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._transfers = threading.BoundedSemaphore(TRANSFERS_MAX)
        self._lock = threading.Lock()
        self._handshakes: dict[str, int] = {}  # by address
        self._connected: dict[str, int] = {}  # by node
        self._sockets: dict[int, socket.socket] = {}
        self._serving: dict[int, tuple[ssl.SSLSocket, PeerIdentity]] = {}  # by the id of the connection
        self._threads: dict[int, threading.Thread] = {}
        self.served_bytes = 0
        self.refused = 0

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> int:
        """Listen; returns the port. Raises ``OSError``."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, self._port), family=family, backlog=HANDSHAKES_MAX)
        self._listener = listener
        self._run(self._accept, listener)
        return int(listener.getsockname()[1])

    def certify(self, identity: Identity) -> None:
        """Take up a new certificate; connections that are open go on with the old one."""
        if identity.answer is None:
            self._tls = None
            return
        self._cluster = Cluster(identity.answer.cluster, identity.answer.ca_pem)
        self._tls = identity.peer_context(server=True)

    def allow(self, allowed: Allowed) -> None:
        """A newer plan: in force with the next request on every connection; a node that is no more of the
        cluster is hung up on, in the middle of an answer too."""
        self._allowed = allowed
        with self._lock:
            gone = [tls for tls, peer in self._serving.values() if not _is_allowed(allowed, peer)]
        for tls in gone:
            with suppress(OSError):
                socket.socket.shutdown(tls, socket.SHUT_RDWR)

    def close(self) -> None:
        self._stopping.set()
        if self._listener is not None:
            # Closing alone would leave the thread in accept().
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            sockets, threads = list(self._sockets.values()), list(self._threads.values())
        for open_socket in sockets:
            # Of the socket below TLS: an ``SSLSocket`` that is shut down goes on in the clear.
            with suppress(OSError):
                socket.socket.shutdown(open_socket, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(HANDSHAKE_S)

    def _run(self, work: Callable[[socket.socket], None], over: socket.socket) -> None:
        def run() -> None:
            try:
                work(over)
            finally:
                over.close()
                with self._lock:
                    self._sockets.pop(id(over), None)
                    self._threads.pop(id(over), None)

        thread = threading.Thread(target=run, name="peer", daemon=True)
        with self._lock:
            self._sockets[id(over)], self._threads[id(over)] = over, thread
        thread.start()

    # --- connections ------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                arrived, address = listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                log.warning("peer listener: %s", error)  # out of descriptors, most likely
                self._stopping.wait(1.0)
                continue
            host = str(address[0])
            if not self._count(self._handshakes, host, ADDRESS_HANDSHAKES_MAX, HANDSHAKES_MAX):
                self.refused += 1
                arrived.close()
                continue
            self._run(lambda over, host=host: self._greet(over, host), arrived)  # type: ignore[misc]

    def _count(self, counts: dict[str, int], name: str, own_max: int, all_max: int) -> bool:
        with self._lock:
            if counts.get(name, 0) >= own_max or sum(counts.values()) >= all_max:
                return False
            counts[name] = counts.get(name, 0) + 1
            return True

    def _uncount(self, counts: dict[str, int], name: str) -> None:
        with self._lock:
            counts[name] -= 1
            if not counts[name]:
                del counts[name]

    def _greet(self, arrived: socket.socket, host: str) -> None:
        """The handshake, then whatever the node asks."""
        waits = True
        try:
            context, cluster = self._tls, self._cluster
            if context is None or cluster is None:
                return
            arrived.settimeout(HANDSHAKE_S)
            arrived.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The timeout is for the handshake as a whole, not for each of its messages.
            with context.wrap_socket(arrived, server_side=True, do_handshake_on_connect=False) as tls:
                # ``arrived`` gave its descriptor away; this is what ``close`` must shut down.
                with self._lock:
                    self._sockets[id(arrived)] = tls
                tls.do_handshake()
                peer = read_peer(tls.getpeercert(binary_form=True), cluster)
                self._uncount(self._handshakes, host)
                waits = False
                self._serve(Connection(tls), peer)
        except NotAPeer as error:
            self.refused += 1
            log.warning("refused %s: %s", host, error)
        except (ssl.SSLError, TimeoutError, OSError) as error:
            if waits:
                self.refused += 1
            log.debug("peer at %s: %s", host, error)
        except Exception:
            log.exception("a peer's connection failed in an unforeseen way")
        finally:
            if waits:
                self._uncount(self._handshakes, host)

    def _serve(self, connection: Connection, peer: PeerIdentity) -> None:
        if not self._count(self._connected, peer.node, NODE_CONNECTIONS_MAX, CONNECTIONS_MAX):
            refuse(connection, Refusal(429, last=True, Retry_After_Ms=RETRY_MS))
            return
        with self._lock:
            self._serving[id(connection)] = (connection.tls, peer)
        try:
            while not self._stopping.is_set():
                try:
                    head = connection.read_head(time.monotonic() + IDLE_S)
                    if connection.has_more:
                        raise BadHead("the next request before the answer")
                    self._answer(connection, peer, head)
                except (Gone, TimeoutError):
                    return
                except BadHead as error:
                    refuse(connection, Refusal(error.status, last=True))
                    return
                except Refusal as refusal:
                    refuse(connection, refusal)
                    if refusal.last:
                        return
        finally:
            with self._lock:
                self._serving.pop(id(connection), None)
            self._uncount(self._connected, peer.node)

    # --- requests ---------------------------------------------------------------------------------

    def _answer(self, connection: Connection, peer: PeerIdentity, head: Head) -> None:
        method, path = parse_request(head)
        allowed = self._allowed
        # Asked each time: a node that was deleted a moment ago has its connection still.
        if not _is_allowed(allowed, peer) or time.time() >= peer.ends_s:
            log.warning("refused %s, which is no node of this cluster now", peer.node)
            raise Refusal(403, last=True)
        for route in ROUTES:
            ref = route_ref(path, route.suffix)
            if ref is None:
                continue
            if method != route.method:
                raise Refusal(405, Allow=route.method)
            if ref not in allowed.versions:
                break
            route.handle(self, connection, peer, ref, head)
            return
        # Absent and not this node's answer alike.
        raise Refusal(404)

    def _open(self, ref: ModelRef, head: Head, base: int | None = None) -> tuple[int, str, int]:
        """Descriptor, entity tag and size of a file of a complete pack that is the one asked for."""
        try:
            descriptor = self._store.open(ref, base)
        except OSError:
            raise Refusal(404) from None
        try:
            salt, size = read_header(descriptor).salt, os.fstat(descriptor).st_size
        except (PackError, OSError):
            os.close(descriptor)
            raise Refusal(404) from None
        tag = f'"{salt.hex()}"'
        if head.headers.get("if-match", tag) != tag:
            os.close(descriptor)
            raise Refusal(412, ETag=tag)
        return descriptor, tag, size

    def give_range(
        self,
        connection: Connection,
        peer: PeerIdentity,
        ref: ModelRef,
        head: Head,
        base: int | None = None,
    ) -> None:
        descriptor, tag, size = self._open(ref, head, base)
        try:
            asked = parse_range(head.headers.get("range"))
            if asked is None or not asked[0] < asked[1] <= size or asked[1] - asked[0] > RANGE_BYTES_MAX:
                raise Refusal(416, Content_Range=f"bytes */{size}", X_Range_Max=RANGE_BYTES_MAX)
            if not self._transfers.acquire(blocking=False):
                raise Refusal(429, Retry_After_Ms=RETRY_MS)
            try:
                self._send_range(connection, descriptor, asked, tag, size)
            finally:
                self._transfers.release()
        finally:
            os.close(descriptor)

    def _send_range(
        self, connection: Connection, descriptor: int, asked: tuple[int, int], tag: str, size: int
    ) -> None:
        start, end = asked
        until_s = time.monotonic() + ANSWER_S + (end - start) / READ_BYTES_S_LEAST
        headers: dict[str, str | int] = {
            "Content-Length": end - start,
            "Content-Range": f"bytes {start}-{end - 1}/{size}",
            "Content-Type": "application/octet-stream",
            "ETag": tag,
        }
        connection.send_head("HTTP/1.1 206 Partial Content", headers, until_s)
        piece = memoryview(bytearray(min(PIECE_BYTES, end - start)))
        while start < end:
            wait_s = self._pacer.wait_s(min(len(piece), end - start), time.monotonic())
            if wait_s and self._stopping.wait(wait_s):
                raise ConnectionAbortedError("the agent stops")
            # The time that this node makes the reader wait is not the reader's.
            until_s += wait_s
            count = os.preadv(descriptor, [piece[: end - start]], start)
            if not count:
                raise ConnectionAbortedError("the pack ends early")
            # Counted before they leave: whoever has read them finds them counted.
            self.served_bytes += count
            connection.send(piece[:count], until_s)
            start += count

    def give_key(self, connection: Connection, peer: PeerIdentity, ref: ModelRef, head: Head) -> None:
        descriptor, tag, size = self._open(ref, head)
        os.close(descriptor)
        key = self._store.data_key(ref)
        if key is None:
            raise Refusal(404)
        # On record before it leaves, whatever becomes of the answer.
        self._store.gave_key(ref, peer.node)
        headers: dict[str, str | int] = {
            "Content-Length": len(key),
            "Content-Type": "application/octet-stream",
            "Cache-Control": "no-store",
            "ETag": tag,
            "X-Pack-Bytes": size,
        }
        until_s = time.monotonic() + ANSWER_S
        connection.send_head("HTTP/1.1 200 OK", headers, until_s)
        connection.send(key, until_s)


def _is_allowed(allowed: Allowed, peer: PeerIdentity) -> bool:
    return allowed.nodes.get(peer.node) == peer.key_sha256


def _give_base(number: int) -> Callable[[PeerServer, Connection, PeerIdentity, ModelRef, Head], None]:
    def give(
        server: PeerServer, connection: Connection, peer: PeerIdentity, ref: ModelRef, head: Head
    ) -> None:
        server.give_range(connection, peer, ref, head, number)

    return give


ROUTES = (
    Route("GET", "", PeerServer.give_range),
    Route("GET", "/key", PeerServer.give_key),
    # The files that extents of the pack lie in beside its own; of each only those extents are there for sure.
    *(Route("GET", f"/base-{number}", _give_base(number)) for number in range(BASES_MAX)),
)


def route_ref(path: str, suffix: str) -> ModelRef | None:
    """The version that a path names, if it is exactly this route's; nothing is decoded or resolved."""
    if not path.startswith(PREFIX):
        return None
    tenant, *rest = path.removeprefix(PREFIX).split("/")
    if len(rest) != 2 + suffix.count("/") or "/".join(["", *rest[2:]]) != (suffix or ""):
        return None
    try:
        return parse_ref(f"{tenant}/{rest[0]}@{rest[1]}")
    except BadValue:
        return None


def refuse(connection: Connection, refusal: Refusal) -> None:
    """Say no, if the other side still listens."""
    headers = {**refusal.headers, "Content-Length": 0}
    if refusal.last:
        headers["Connection"] = "close"
    with suppress(TimeoutError, OSError):
        connection.send_head(f"HTTP/1.1 {refusal.status} Refused", headers, time.monotonic() + ANSWER_S)
