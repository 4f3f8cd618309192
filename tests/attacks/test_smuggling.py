"""Threat: bytes that are one request to the router and two to a node, or the other way round.

Covers: contradicting, doubled and misspelt lengths, chunks that lie, folded and broken header lines, requests
hidden in bodies, on both apps directly and through the router to a node; what the router writes to the node,
byte for byte; more headers than may be. Does not cover: sizes (``test_gateway_bodies``), slowness
(``test_held_connections``), or peers (``test_peer_listener``, which has a parser of its own).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from fake_node import FakeNode, served
from routed_fleet import Fleet, routed_fleet
from running_control import PATIENCE_S, until

import packer.body_budget

HIDDEN = b"POST /v1/hidden HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


def variants(body: bytes) -> dict[str, bytes]:
    """Everything behind the request line and ``Authorization``, of one request with this body.

    None has one meaning alone; what follows the shorter meaning is a request of its own.
    """
    size = b"Content-Length: %d\r\n" % len(body)
    chunked = b"Transfer-Encoding: chunked\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    empty = b"0\r\n\r\n" + HIDDEN
    shorter = b"Content-Length: %d\r\n" % (len(body) - 1)
    return {
        "length and chunked": size + chunked + b"\r\n" + empty,
        "chunked and length": chunked + size + b"\r\n" + empty,
        "two lengths": size + shorter + b"\r\n" + body + HIDDEN,
        "the same length twice": size + size + b"\r\n" + body + HIDDEN,
        "a list of lengths": b"Content-Length: %d, %d\r\n\r\n" % (len(body), len(body)) + body + HIDDEN,
        "length with a sign": b"Content-Length: +%d\r\n\r\n" % len(body) + body + HIDDEN,
        "negative length": b"Content-Length: -1\r\n\r\n" + body + HIDDEN,
        "length in hexadecimal": b"Content-Length: 0x%x\r\n\r\n" % len(body) + body + HIDDEN,
        "length with an underscore": b"Content-Length: 1_0\r\n\r\n" + body + HIDDEN,
        "length of other digits": "Content-Length: \u0661\u0660\r\n\r\n".encode() + body + HIDDEN,
        "length with words": b"Content-Length: 10 20\r\n\r\n" + body + HIDDEN,
        "empty length": b"Content-Length:\r\n\r\n" + body + HIDDEN,
        "length beyond 64 bits": b"Content-Length: 18446744073709551617\r\n\r\n" + body + HIDDEN,
        "space before the colon": b"Content-Length : %d\r\n\r\n" % len(body) + body + HIDDEN,
        "chunked with space before the colon": b"Transfer-Encoding : chunked\r\n" + size + b"\r\n" + empty,
        "unknown encoding": b"Transfer-Encoding: xchunked\r\n" + size + b"\r\n" + body + HIDDEN,
        "chunked is not the last": b"Transfer-Encoding: chunked, identity\r\n\r\n" + chunks + HIDDEN,
        "chunked twice": chunked + chunked + b"\r\n" + chunks + HIDDEN,
        "chunked in a list twice": b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunks + HIDDEN,
        "gzip and chunked": b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunks + HIDDEN,
        "quoted chunked": b'Transfer-Encoding: "chunked"\r\n' + size + b"\r\n" + body + HIDDEN,
        "chunked behind a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n" + size + b"\r\n" + empty,
        "folded chunked": b"Transfer-Encoding:\r\n chunked\r\n" + size + b"\r\n" + empty,
        "folded header": b"X-Folded: a\r\n " + chunked + size + b"\r\n" + empty,
        "lonely line feed": b"X-A: a\n" + chunked + size + b"\r\n" + empty,
        "lonely carriage return": b"X-A: a\r" + chunked + size + b"\r\n" + empty,
        "NUL in a header": b"X-A: a\x00\r\n" + size + b"\r\n" + body + HIDDEN,
        "header without a colon": b"nonsense\r\n" + size + b"\r\n" + body + HIDDEN,
        "header without a name": b": x\r\n" + size + b"\r\n" + body + HIDDEN,
        "name with a space": b"X Y: x\r\n" + size + b"\r\n" + body + HIDDEN,
        "chunk size with a sign": chunked + b"\r\n+%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) + HIDDEN,
        "negative chunk": chunked + b"\r\n-1\r\n%s\r\n0\r\n\r\n" % body + HIDDEN,
        "chunk with 0x": chunked + b"\r\n0x%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) + HIDDEN,
        "chunk beyond 64 bits": chunked + b"\r\n1%016x\r\n%s\r\n0\r\n\r\n" % (len(body), body) + HIDDEN,
        "chunk that is longer": chunked + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body) - 1, body) + HIDDEN,
        "line feed alone in chunks": chunked + b"\r\n%x\n%s\n0\n\n" % (len(body), body) + HIDDEN,
        "extension with a line feed": chunked + b"\r\n%x;\n%s\r\n0\r\n\r\n" % (len(body), body) + HIDDEN,
        "lengths in the trailer": chunked
        + b"\r\n%x\r\n%s\r\n0\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n" % (len(body), body)
        + HIDDEN,
        "an upgrade": b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + size + b"\r\n" + body + HIDDEN,
        "a length that Connection names": b"Connection: Content-Length\r\n" + size + b"\r\n" + body + HIDDEN,
        "an encoding that Connection names": b"Connection: Transfer-Encoding\r\n"
        + chunked
        + b"\r\n"
        + chunks
        + HIDDEN,
        "a body that holds a request": size + b"\r\n" + body + HIDDEN,
    }


def sent(key: str, rest: bytes, path: str = "/v1/embeddings") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n".encode() + rest


async def statuses(url: str, data: bytes) -> list[int]:
    """Of all answers on a connection that sent this and then a request that is the last."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    got = b""
    try:
        async with asyncio.timeout(PATIENCE_S):
            writer.write(data + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            # A server that refuses a request's framing hangs up, or would wait for a body that never comes.
            while not re.search(rb"^HTTP/1\.[01] 4", got, re.MULTILINE) and (
                piece := await reader.read(65536)
            ):
                got += piece
    except ConnectionResetError:
        pass
    finally:
        writer.transport.abort()
    return [int(status) for status in re.findall(rb"^HTTP/1\.[01] (\d\d\d)", got, re.MULTILINE)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is not all there is given up at once."""
    monkeypatch.setattr(packer.body_budget, "BODY_READ_SECONDS", 0.05)


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Answers say what the request's input was."""

    async def respond(request: web.Request, body: bytes) -> web.Response:
        return web.json_response({"input": json.loads(body)["input"]})

    async with routed_fleet(tmp_path) as fleet:
        for gateway in fleet.gateways:
            gateway.respond = respond
        yield fleet


async def test_a_request_to_the_router_is_one_request_to_a_node_or_none(fleet: Fleet) -> None:
    """Never more reaches a node than was answered, nothing hidden does, and the next caller gets its own."""
    body = b'{"model": "acme/m", "input": "from the attacker"}'
    first = fleet.gateways[0]
    reached = 0
    for name, rest in variants(body).items():
        first.seen.clear()
        got = await statuses(fleet.control.url, sent(fleet.key, rest))
        seen = [one for gateway in fleet.gateways for one in gateway.seen]
        assert len(seen) <= 1, (name, seen)
        assert [one.body for one in seen] == [body] * len(seen), name
        assert {one.path for one in seen} <= {"/v1/embeddings"}, name
        assert got.count(200) >= len(seen), name
        assert [one.headers.get("Transfer-Encoding") for one in seen] == [None] * len(seen), name
        reached += len(seen)
        own = await fleet.control.call(
            "POST", "/v1/embeddings", {"model": "acme/m", "input": name}, key=fleet.key
        )
        assert own.json() == {"input": name}
    assert reached >= 2  # the plain ones: otherwise nothing was tried


async def test_a_request_to_a_node_is_one_request_or_none() -> None:
    node = FakeNode()
    body = b'{"model": "acme/embed", "input": "a"}'
    ran = 0
    async with served(node) as url:
        for name, rest in variants(body).items():
            node.orders.clear()
            got = await statuses(url, sent(node.acme, rest))
            assert len(node.orders) <= 1, name
            assert got.count(200) >= len(node.orders), name
            ran += len(node.orders)
    assert ran >= 2


@pytest.mark.parametrize("sized", [True, False])
async def test_a_body_that_passes_through_stays_within_its_request(
    fleet: Fleet, tmp_path: Path, sized: bool
) -> None:
    """The way of large tensors, byte for byte: what looks like an end or a new request in it is neither."""
    written = asyncio.Event()
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.readuntil(b"\r\n\r\n"))
        while not heard.endswith(b"0\r\n\r\n" if b"chunked" in heard else b"THE END"):
            heard.extend(await reader.read(65536))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        written.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    fleet.gateways[0].url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await fleet.beat(0, "resident")
    body = (b"0\r\n\r\n" + HIDDEN) * 20_000 + b"THE END"
    head = b"Inference-Header-Content-Length: 2\r\nContent-Type: application/octet-stream\r\n"
    if sized:
        rest = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    else:
        rest = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    try:
        got = await statuses(fleet.control.url, sent(fleet.key, rest, "/v2/models/acme/m/infer"))
    finally:
        server.close()
    assert got[0] == 200
    assert written.is_set()
    node_head, _, carried = bytes(heard).partition(b"\r\n\r\n")
    lengths = re.findall(rb"(?im)^content-length:\s*(\d+)\r?$", node_head)
    encodings = re.findall(rb"(?im)^transfer-encoding:\s*(\w+)\r?$", node_head)
    if sized:
        assert (lengths, encodings) == ([b"%d" % len(body)], [])
        assert carried == body
    else:
        assert (lengths, encodings) == ([], [b"chunked"])
        assert unchunked(carried) == body


def unchunked(data: bytes) -> bytes:
    """Strictly: hexadecimal sizes, nothing else, nothing behind the last chunk."""
    out = b""
    while True:
        size, data = data.split(b"\r\n", 1)
        count = int(size.decode("ascii"), 16)
        assert re.fullmatch(rb"[0-9a-fA-F]+", size)
        assert data[count : count + 2] == b"\r\n"
        out, data = out + data[:count], data[count + 2 :]
        if not count:
            assert data == b""
            return out


async def test_no_header_of_a_caller_makes_a_line_of_its_own_at_the_node(fleet: Fleet) -> None:
    """What passes to the node can not hold the end of a line, and what is framing is the router's own."""
    body = b'{"model": "acme/m", "input": "a"}'
    plain = b"Content-Length: %d\r\n\r\n" % len(body) + body
    for value in (
        b"a\nX-Evil: 1",
        b"a\r X-Evil: 1",
        b"a\x00X-Evil: 1",
        b"a\x85X-Evil: 1",
        "a\u2028b".encode(),
    ):
        fleet.gateways[0].seen.clear()
        await statuses(fleet.control.url, sent(fleet.key, b"x-bunkhouse-a: " + value + b"\r\n" + plain))
        for one in fleet.gateways[0].seen:
            assert "x-evil" not in {name.lower() for name in one.headers}, value
    forged = (
        b"Host: evil\r\nX-Forwarded-For: 127.0.0.1\r\nForwarded: for=::1\r\nTE: trailers\r\nTrailer: X\r\n"
    )
    fleet.gateways[0].seen.clear()
    await statuses(fleet.control.url, sent(fleet.key, forged + plain))
    for one in fleet.gateways[0].seen:
        assert not {"x-forwarded-for", "forwarded", "te", "trailer"} & {name.lower() for name in one.headers}
        assert one.headers["Host"] == fleet.gateways[0].url.removeprefix("http://")


@pytest.mark.parametrize(
    ("head", "count"),
    [("X-%d: a\r\n", 200), ("X-%d: a\r\n", 20_000), ("X-%d: " + "a" * 8_000 + "\r\n", 200)],
)
async def test_more_headers_than_may_be_are_refused_on_both(fleet: Fleet, head: str, count: int) -> None:
    many = "".join(head % number for number in range(count)).encode()
    body = b'{"model": "acme/m", "input": "a"}'
    rest = many + b"Content-Length: %d\r\n\r\n" % len(body) + body
    node = FakeNode()
    async with served(node) as url:
        for where, key in ((url, node.acme), (fleet.control.url, fleet.key)):
            got = await statuses(where, sent(key, rest))
            assert set(got) <= {400, 431}, got
    assert node.orders == []
    assert fleet.gateways[0].seen == []
    await until(lambda: not fleet.control.server.control.cluster.in_flight)
