"""The listener that gives packs to other nodes, against everybody who is none of them.

Covers: every route without a certificate, with one of another cluster, self-made, expired, of a deleted node,
of a node whose key changed, of control; a tenant's API key; paths and ranges out of bounds; heads that are
too large, doubled or smuggled; floods of connections and slow readers. Does not cover: what a fetching node
makes of a hostile giver (``test_peers``).
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pack_samples import KEY, REF
from running_peers import PATH, SAMPLE, Node, PeerAnswer, Site, ask, dial, exchange, get

from agent import peer_http, peers
from agent.peer_identity import Cluster, NotAPeer, read_peer
from agent.peers import ROUTES, route_ref
from packer.identity import Identity, verified_context
from packer.types import ModelRef

RANGE = "bytes=0-99"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def giver(site: Site) -> Node:
    node = site.join("giver")
    node.store.put(SAMPLE)
    return node


def paths() -> list[str]:
    """One good path for every route there is."""
    return [PATH + route.suffix for route in ROUTES]


def nothing_given(giver: Node) -> bool:
    return not giver.store.given and giver.server.served_bytes == 0


def test_every_route_is_known_here_and_answers_a_node(site: Site, giver: Node) -> None:
    """The list is written down: adding a route is a decision. And what follows does not refuse everybody."""
    bases = [("GET", f"/base-{number}") for number in range(8)]
    assert [(route.method, route.suffix) for route in ROUTES] == [("GET", ""), ("GET", "/key"), *bases]
    asker = site.join("asker")
    for path in paths():
        answer = ask(giver, asker, get(path, Range=RANGE))
        assert answer is not None
        assert answer.status in (200, 206)


# --- certificates ---------------------------------------------------------------------------------


def try_with(giver: Node, context: ssl.SSLContext) -> list[PeerAnswer | None]:
    """What every route says; None where TLS or the listener hangs up without a word."""
    answers: list[PeerAnswer | None] = []
    for path in paths():
        try:
            with dial(giver.port, context) as tls:
                answers.append(exchange(tls, get(path, Range=RANGE, Authorization="Bearer bk_x_y")))
        except (ssl.SSLError, ConnectionError):
            answers.append(None)
    return answers


def bare_context(ca_pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=ca_pem)
    return context


def test_nobody_without_a_certificate(giver: Node) -> None:
    """Also not with a tenant's API key, which every attempt here sends along."""
    assert try_with(giver, bare_context(giver.cluster.ca_pem)) == [None] * len(ROUTES)
    assert nothing_given(giver)


def test_nobody_of_another_cluster(tmp_path: Path, giver: Node) -> None:
    """Not even when its node and its cluster have the same names."""
    for name in ("c2", "other/c1"):
        other = Site(tmp_path / "others", name)
        stranger = other.join("giver", listens=False)
        context = stranger.identity.peer_context(server=False)
        context.load_verify_locations(cadata=giver.cluster.ca_pem)
        assert try_with(giver, context) == [None] * len(ROUTES)
    assert nothing_given(giver)


def self_made(folder: Path, name: str, *, issuer: str) -> tuple[Path, bytes]:
    """A key with a certificate that it signed itself and that says what a node's says."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"node {name}")]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://c1/node/{name}")]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "self.pem"
    path.write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    return path, made.public_bytes(serialization.Encoding.DER)


def test_nobody_with_a_certificate_of_their_own_making(tmp_path: Path, site: Site, giver: Node) -> None:
    site.join("asker")
    path, der = self_made(tmp_path, "asker", issuer="Bunkhouse cluster c1")
    context = bare_context(giver.cluster.ca_pem)
    context.load_cert_chain(path)
    assert try_with(giver, context) == [None] * len(ROUTES)
    assert nothing_given(giver)
    with pytest.raises(NotAPeer, match="another CA"):
        read_peer(der, giver.cluster)


def test_nobody_with_an_expired_certificate(site: Site, giver: Node) -> None:
    """Neither at the handshake, nor on a connection that outlives its certificate."""
    asker = site.join("asker")
    context = asker.identity.peer_context(server=False)
    with dial(giver.port, context) as tls:
        assert exchange(tls, get(PATH, Range=RANGE)) is not None
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(time, "time", lambda: 4e9)
            answer = exchange(tls, get(PATH, Range=RANGE))
        assert answer is not None
        assert answer.status == 403
        assert exchange(tls, get(PATH, Range=RANGE)) is None
    served = giver.server.served_bytes
    site.certify(asker.identity, "asker", life=timedelta(seconds=-1))
    assert try_with(giver, asker.identity.peer_context(server=False)) == [None] * len(ROUTES)
    assert giver.server.served_bytes == served


def test_a_deleted_node_is_refused_at_once(site: Site, giver: Node) -> None:
    """Its open connection ends, and new ones are refused; its certificate is still good."""
    asker = site.join("asker")
    with dial(giver.port, asker.identity.peer_context(server=False)) as tls:
        assert exchange(tls, get(PATH, Range=RANGE)) is not None
        site.plan(without="asker")
        assert exchange(tls, get(f"{PATH}/key")) is None
    for answer in try_with(giver, asker.identity.peer_context(server=False)):
        assert answer is not None
        assert answer.status == 403
    assert giver.store.given == []


def test_a_node_that_joined_anew_is_not_the_one_of_its_old_key(site: Site, giver: Node) -> None:
    old = site.join("asker")
    context = old.identity.peer_context(server=False)
    (old.folder / "identity" / "node.key").unlink()
    site.certify(Identity(old.folder / "identity"), "asker")
    site.plan()
    for answer in try_with(giver, context):
        assert answer is not None
        assert answer.status == 403


def test_a_node_of_whom_no_plan_speaks_is_refused(site: Site, giver: Node) -> None:
    """Before the first plan nobody is known."""
    asker = site.join("asker")
    giver.server.allow(peers.Allowed({}, frozenset({REF})))
    for answer in try_with(giver, asker.identity.peer_context(server=False)):
        assert answer is not None
        assert answer.status == 403


def test_control_itself_is_no_node(site: Site, giver: Node) -> None:
    """The certificate of control's node listener is of the same CA, and for servers."""
    site.authority.server_context(["127.0.0.1"])
    context = bare_context(giver.cluster.ca_pem)
    context.load_cert_chain(site.folder / "server.pem")
    assert try_with(giver, context) == [None] * len(ROUTES)
    der = x509.load_pem_x509_certificates((site.folder / "server.pem").read_bytes())[0]
    with pytest.raises(NotAPeer, match="not of a node"):
        read_peer(der.public_bytes(serialization.Encoding.DER), giver.cluster)


def test_a_node_can_not_pose_as_control(site: Site) -> None:
    """A node called like control's host, with a certificate that is good for servers: the uplink's TLS
    does not take the one for the other."""
    node = site.join("localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        with socket.create_connection(("127.0.0.1", node.port), 30) as raw:
            verified_context(node.cluster.ca_pem).wrap_socket(raw, server_hostname="localhost")


def test_names_are_whole_and_alone(site: Site) -> None:
    """A certificate speaks for one node of exactly this cluster."""
    node = site.join("a")
    assert node.identity.answer is not None
    leaf = x509.load_pem_x509_certificates(node.identity.answer.certificate_pem.encode())[0]
    der = leaf.public_bytes(serialization.Encoding.DER)
    assert read_peer(der, node.cluster).node == "a"
    for cluster in ("c", "c1/node", "C1", ""):
        with pytest.raises(NotAPeer, match="not of a node"):
            read_peer(der, Cluster(cluster, node.cluster.ca_pem))
    for nothing in (None, b"", b"0", der[:-1]):
        with pytest.raises(NotAPeer):
            read_peer(nothing, node.cluster)


# --- what may be asked for ------------------------------------------------------------------------

TRICKS = [
    "/",
    "/peer/v1/packs",
    "/peer/v1/packs/",
    f"/peer/v1/packs/{REF.tenant}/{REF.name}",
    PATH + "/",
    PATH + "//key",
    PATH + "/key/",
    PATH + "/KEY",
    PATH + "?x=1",
    PATH + "#x",
    PATH.replace("/peer/v1/packs/", "/peer/v1/packs/../packs/"),
    PATH.replace("/peer/v1/packs/", "/peer/v1/packs//"),
    PATH.replace("/", "%2F"),
    PATH.replace("acme", "%61cme"),
    PATH.replace("acme", ".."),
    PATH.replace("acme", "ACME"),
    PATH.replace("tiny", "..%2F..%2Fjournal.db"),
    "/peer/v1/packs/acme/tiny@0123456789abcdef/0123456789abcdef",
    "/peer/v1/packs/../../seal.key",
    "/peer/v1/packs/a/../../../seal.key",
    "/metrics",
    "/v1/models",
    "/node/v1/ca",
    "http://peer" + PATH,
]


@pytest.mark.parametrize("path", TRICKS)
def test_only_the_exact_path_is_a_pack(site: Site, giver: Node, path: str) -> None:
    asker = site.join("asker")
    answer = ask(giver, asker, get(path, Range=RANGE))
    assert answer is not None
    assert answer.status == (400 if path.startswith("http") or "%2Fpeer" in path else 404)
    assert answer.body == b""
    assert nothing_given(giver)


def test_a_path_is_read_one_way_only() -> None:
    assert route_ref(PATH, "") == route_ref(PATH + "/key", "/key") == REF
    for path in TRICKS:
        assert route_ref(path, "") is None
        assert route_ref(path, "/key") is None


def test_versions_outside_the_plan_are_absent(site: Site, giver: Node) -> None:
    """Also those whose pack is still on disk: a deleted tenant's, most of all."""
    asker = site.join("asker")
    site.plan(versions=frozenset({ModelRef("acme", "other", "b" * 16)}))
    for path in paths():
        answer = ask(giver, asker, get(path, Range=RANGE))
        assert answer is not None
        assert answer.status == 404
    assert nothing_given(giver)


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_change_nothing(site: Site, giver: Node, method: str) -> None:
    asker = site.join("asker")
    answer = ask(giver, asker, get(PATH, Range=RANGE).replace(b"GET", method.encode(), 1))
    assert answer is not None
    assert (answer.status, answer.headers["allow"]) == (405, "GET")


BAD_RANGES = [
    "",
    "bytes=0-",
    "bytes=-1",
    "bytes=5-4",
    "bytes=0-1,3-4",
    "bytes=0x0-0x10",
    "bytes=+1-2",
    "bytes= 1-2",
    "items=0-1",
    f"bytes=0-{len(SAMPLE)}",
    f"bytes={len(SAMPLE)}-{len(SAMPLE)}",
    "bytes=0-99999999999999999999999999",
    f"bytes={2**63}-{2**63 + 1}",
    "bytes=0-\u0661",
]


@pytest.mark.parametrize("text", BAD_RANGES)
def test_ranges_out_of_bounds_read_nothing(site: Site, giver: Node, text: str) -> None:
    asker = site.join("asker")
    answer = ask(giver, asker, get(PATH, Range=text).decode().encode("utf-8"))
    assert answer is not None
    assert answer.status == (416 if text.isascii() else 400)
    assert nothing_given(giver)


def test_no_range_is_larger_than_the_limit(site: Site, giver: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RANGE_BYTES_MAX", 1000)
    asker = site.join("asker")
    for end, status in ((999, 206), (1000, 416)):
        answer = ask(giver, asker, get(PATH, Range=f"bytes=0-{end}"))
        assert answer is not None
        assert answer.status == status


# --- heads ----------------------------------------------------------------------------------------

LINE = f"GET {PATH} HTTP/1.1\r\n".encode()
BAD_HEADS = {
    "no-http": (b"hello\r\n\r\n", 400),
    "http-1.0": (LINE.replace(b"1.1", b"1.0") + b"\r\n", 400),
    "http-2": (b"PRI * HTTP/2.0\r\n\r\n", 400),
    "long-line": (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\n\r\n", 400),
    "long-header": (LINE + b"A: " + b"x" * peer_http.HEAD_BYTES_MAX + b"\r\n\r\n", 431),
    "endless-header": (LINE + b"A: " + b"x" * 50_000, 431),
    "many-headers": (LINE + b"".join(b"a%d: 1\r\n" % n for n in range(100)) + b"\r\n", 431),
    "twice": (LINE + b"Range: bytes=0-1\r\nrange: bytes=2-3\r\n\r\n", 400),
    "folded": (LINE + b"Range: bytes=0-1\r\n x\r\n\r\n", 400),
    "bare-newline": (LINE + b"Range: bytes=0-1\nX: y\r\n\r\n", 400),
    "space-before-colon": (LINE + b"Range : bytes=0-1\r\n\r\n", 400),
    "no-colon": (LINE + b"Range\r\n\r\n", 400),
    "nul": (LINE + b"Range: bytes=0-1\0\r\n\r\n", 400),
    "latin-1": (LINE + b"Range: bytes=0-1\xe9\r\n\r\n", 400),
    "body": (LINE + b"Content-Length: 5\r\n\r\nhello", 400),
    "length-that-is-none": (LINE + b"Content-Length: +0\r\n\r\n", 400),
    "chunked": (LINE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "pipelined": (2 * get(PATH, Range=RANGE), 400),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_head_that_is_not_ours_ends_the_connection(site: Site, giver: Node, name: str) -> None:
    asker = site.join("asker")
    data, status = BAD_HEADS[name]
    with dial(giver.port, asker.identity.peer_context(server=False)) as tls:
        answer = exchange(tls, data)
        # A reset may overtake the answer when much was sent that nobody read.
        if answer is not None:
            assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert exchange(tls, get(PATH, Range=RANGE)) is None
    assert nothing_given(giver)


# --- floods ---------------------------------------------------------------------------------------


def wait_until(true: Callable[[], bool]) -> None:
    """For what another thread does at once; nothing here has an event of its own."""
    tick = threading.Event()
    for _ in range(3000):
        if true():
            return
        tick.wait(0.01)
    raise AssertionError("never came true")


def test_a_thousand_connections_of_strangers_are_bounded(site: Site, giver: Node) -> None:
    """They hold some threads for some seconds; nodes of the cluster are served meanwhile from elsewhere, and
    here again as soon as those are cut off."""
    asker = site.join("asker")
    before = threading.active_count()
    with ExitStack() as open_sockets:
        for _ in range(1000):
            raw = socket.create_connection(("127.0.0.1", giver.port), 30)
            open_sockets.enter_context(raw)
            assert threading.active_count() <= before + peers.HANDSHAKES_MAX
        wait_until(lambda: giver.server.refused >= 1000 - peers.ADDRESS_HANDSHAKES_MAX)
        assert sum(giver.server._handshakes.values()) <= peers.ADDRESS_HANDSHAKES_MAX
    wait_until(lambda: not giver.server._handshakes)
    answer = ask(giver, asker, get(PATH, Range=RANGE))
    assert answer is not None
    assert answer.status == 206


def test_a_handshake_that_never_ends_is_cut_off(giver: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HANDSHAKE_S", 0.2)
    with socket.create_connection(("127.0.0.1", giver.port), 30) as raw:
        raw.sendall(b"\x16\x03\x01")
        assert raw.recv(10) == b""
    wait_until(lambda: not giver.server._handshakes)


def test_one_node_has_its_share_of_connections(site: Site, giver: Node) -> None:
    greedy, modest = site.join("greedy"), site.join("modest")
    with ExitStack() as held:
        for _ in range(peers.NODE_CONNECTIONS_MAX):
            tls = held.enter_context(dial(giver.port, greedy.identity.peer_context(server=False)))
            assert exchange(tls, get(PATH, Range=RANGE)) is not None
        with dial(giver.port, greedy.identity.peer_context(server=False)) as tls:
            # Said without having been asked: no request of a connection too many is read.
            answer = exchange(tls, b"")
        assert answer is not None
        assert (answer.status, answer.headers["connection"]) == (429, "close")
        answer = ask(giver, modest, get(PATH, Range=RANGE))
        assert answer is not None
        assert answer.status == 206


def test_transfers_at_one_time_are_bounded(site: Site, giver: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = site.join("asker")
    for _ in range(peers.TRANSFERS_MAX):
        assert giver.server._transfers.acquire(blocking=False)
    answer = ask(giver, asker, get(PATH, Range=RANGE))
    assert answer is not None
    assert answer.status == 429
    assert int(answer.headers["retry-after-ms"]) > 0
    assert nothing_given(giver)


def test_a_reader_that_does_not_read_is_cut_off(
    site: Site, giver: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives its transfer back."""
    monkeypatch.setattr(peers, "ANSWER_S", 0.2)
    monkeypatch.setattr(peers, "READ_BYTES_S_LEAST", 1 << 40)
    asker = site.join("asker")
    giver.store.put(SAMPLE + bytes(32 << 20))
    monkeypatch.setattr(peers, "read_header", lambda fd: peers_header())
    with dial(giver.port, asker.identity.peer_context(server=False)) as tls:
        tls.sendall(get(PATH, Range=f"bytes=0-{(32 << 20) - 1}"))
        wait_until(lambda: giver.server.served_bytes > 0)
        wait_until(lambda: not giver.server._connected)
    assert giver.server.served_bytes < 32 << 20
    assert giver.server._transfers.acquire(blocking=False)


def peers_header() -> object:
    class Salted:
        salt = KEY

    return Salted()


def test_an_idle_connection_is_closed(site: Site, giver: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "IDLE_S", 0.2)
    asker = site.join("asker")
    with dial(giver.port, asker.identity.peer_context(server=False)) as tls:
        assert tls.recv(10) == b""
