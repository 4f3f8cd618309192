"""Nodes of a cluster that share packs, for tests: certificates of a real authority, real sockets, no control.

Covers: joining nodes by hand, packs on their disks, calling a peer listener byte by byte. Does not cover:
control's part (``test_sources_route``) or whole agents (``test_peer_boxes``).
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from unittest import mock

from pack_samples import KEY, REF, pack_bytes

from agent.packs import PackDirectory
from agent.peer_identity import Cluster
from agent.peers import Allowed, PeerServer
from control.authority import Authority, key_sha256_of
from control.ca import NODE_CERTIFICATE_LIFE
from packer.identity import Identity
from packer.types import ModelRef
from packer.wire import WIRE_VERSION, JoinAnswer, PeerSpec

PATIENCE_S = 30.0


@dataclass(slots=True)
class Store:
    """What a listener asks of its node: a folder of packs and a dictionary of keys."""

    packs: PackDirectory
    keys: dict[ModelRef, bytes] = field(default_factory=dict)
    given: list[tuple[ModelRef, str]] = field(default_factory=list)

    def open(self, ref: ModelRef, base: int | None = None) -> int:
        # Where parts in other files are asked for, the pack's own does as well: a file is given like another.
        return self.packs.open(ref)

    def data_key(self, ref: ModelRef) -> bytes | None:
        return self.keys.get(ref)

    def gave_key(self, ref: ModelRef, node: str) -> None:
        self.given.append((ref, node))

    def put(self, data: bytes, ref: ModelRef = REF, key: bytes = KEY) -> None:
        path = self.packs.path(ref)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        self.keys[ref] = key


@dataclass(slots=True)
class Node:
    name: str
    folder: Path
    identity: Identity
    store: Store
    server: PeerServer
    port: int = 0

    @property
    def cluster(self) -> Cluster:
        assert self.identity.answer is not None
        return Cluster(self.identity.answer.cluster, self.identity.answer.ca_pem)

    def spec(self) -> PeerSpec:
        return PeerSpec(self.name, self.key_sha256(), f"https://127.0.0.1:{self.port}")

    def key_sha256(self) -> str:
        from cryptography import x509

        return key_sha256_of(x509.load_pem_x509_csr(self.identity.csr_pem(self.name).encode()))


class Site:
    """A cluster: its authority, and nodes that know each other."""

    def __init__(self, folder: Path, cluster: str = "c1") -> None:
        self.folder = folder / cluster
        self.folder.mkdir(parents=True)
        self.authority = Authority(self.folder, cluster)
        self.nodes: dict[str, Node] = {}

    def certify(self, identity: Identity, name: str, life: timedelta | None = None) -> None:
        request = self.authority.read_request(identity.csr_pem(name))
        with mock.patch("control.authority.NODE_CERTIFICATE_LIFE", life or NODE_CERTIFICATE_LIFE):
            chain = self.authority.issue_node(request, name)
        identity.save(JoinAnswer(WIRE_VERSION, self.authority.cluster, name, chain, self.authority.ca_pem))

    def join(self, name: str, *, listens: bool = True, server: PeerServer | None = None) -> Node:
        """A node with a certificate; it and the others know each other from now on."""
        folder = self.folder / f"node-{name}"
        identity = Identity(folder / "identity")
        self.certify(identity, name)
        store = Store(PackDirectory(folder / "packs"))
        node = Node(name, folder, identity, store, server or PeerServer("127.0.0.1", 0, store))
        self.nodes[name] = node
        if listens:
            node.port = node.server.start()
            node.server.certify(identity)
        self.plan()
        return node

    def plan(self, *, without: str = "", versions: frozenset[ModelRef] = frozenset({REF})) -> None:
        """Tell all nodes who is in the cluster."""
        keys = {name: node.key_sha256() for name, node in self.nodes.items() if name != without}
        for node in self.nodes.values():
            node.server.allow(Allowed(keys, versions))

    def close(self) -> None:
        for node in self.nodes.values():
            node.server.close()


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def dial(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    try:
        return context.wrap_socket(raw)
    except BaseException:
        raw.close()
        raise


def exchange(tls: ssl.SSLSocket, request: bytes) -> PeerAnswer | None:
    """Send a request as it is written and read its answer; None when the other side hangs up."""
    try:
        tls.sendall(request)
        data = b""
        while b"\r\n\r\n" not in data:
            more = tls.recv(65536)
            if not more:
                return None
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        while len(body) < int(headers["content-length"]):
            more = tls.recv(65536)
            if not more:
                return None
            body += more
    except (ssl.SSLError, ConnectionError):
        return None
    return PeerAnswer(int(first.split()[1]), headers, body)


def get(path: str, **headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: peer"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def ask(node: Node, asker: Node, request: bytes) -> PeerAnswer | None:
    """One request with the asker's certificate on a connection of its own."""
    with dial(node.port, asker.identity.peer_context(server=False)) as tls:
        return exchange(tls, request)


PATH = f"/peer/v1/packs/{REF.tenant}/{REF.name}/{REF.version}"
SAMPLE = pack_bytes()
