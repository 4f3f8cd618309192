"""Threat: a tenant that holds a listener's connections and memory: many requests, answers nobody reads.

Covers: the share of one owner in requests, bytes of unread answers, callers that stop reading, on the
gateway and the router; others are served meanwhile. Does not cover: bodies that come slowly
(``test_gateway_bodies``), streams (``test_gateway_streams``), or rates and quotas (``test_quota``).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web
from fake_node import FakeNode
from running_control import PATIENCE_S, running, until

from agent.facade import EngineFrame, EngineRequest
from agent.gateway import GatewayConfig, build_app
from packer.crowd import SMALL_BYTES_MAX, Crowd
from packer.http import CROWD, runner

# More than the sockets of both sides can hold, so that the rest lies in the server.
WIDE = 1_000_000


async def wide(request: EngineRequest) -> AsyncIterator[EngineFrame]:
    yield EngineFrame({"count": 1, "dimensions": WIDE, "prompt_tokens": 1}, bytes(4 * WIDE))


@asynccontextmanager
async def serving(node: FakeNode) -> AsyncIterator[tuple[str, int, Crowd]]:
    app = build_app(node, GatewayConfig("box-1"))
    running_app = runner(app)
    await running_app.setup()
    try:
        await web.TCPSite(running_app, "127.0.0.1", 0).start()
        port = running_app.addresses[0][1]
        yield f"http://127.0.0.1:{port}", port, app[CROWD]
    finally:
        await running_app.cleanup()


def request_bytes(key: str, inputs: str = "a") -> bytes:
    body = json.dumps({"model": "acme/embed", "input": inputs, "encoding_format": "base64"}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def silent_caller(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that sends and never reads; the smallest buffer that the kernel gives."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def test_unread_answers_are_limited_and_given_up() -> None:
    """Without it every answer that is not read stays in memory until the machine has none left."""
    node = FakeNode()
    node.script = wide
    async with serving(node) as (url, port, crowd):
        crowd.owner_bytes = 8 * WIDE
        crowd.stall_seconds = 0.3
        first = await silent_caller(port, request_bytes(node.acme))
        await until(lambda: bool(crowd.bytes))
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {node.acme}"}) as session:
            ask = {"model": "acme/embed", "input": "a", "encoding_format": "base64"}
            async with session.post(f"{url}/v1/embeddings", json=ask) as answer:
                assert answer.status == 429
                assert (await answer.json())["error"]["code"] == "too_many_bytes_in_flight"
                assert answer.headers["Retry-After"]
            async with session.get(f"{url}/v1/models") as answer:
                assert answer.status == 200
            # The silent caller is hung up on, and its bytes are free again.
            await until(lambda: not crowd.bytes)
            async with session.post(f"{url}/v1/embeddings", json=ask) as answer:
                assert answer.status == 200
                assert len(await answer.read()) > 4 * WIDE > SMALL_BYTES_MAX
        assert crowd.bytes == {}
        assert crowd.requests == {}
        first[1].close()


async def test_a_slow_reader_that_reads_is_not_hung_up_on() -> None:
    node = FakeNode()
    node.script = wide
    async with serving(node) as (_, port, crowd):
        # Of the reader alone: a machine that gives this process no time for as long would count against it.
        crowd.stall_seconds = 2.0
        reader, writer = await silent_caller(port, request_bytes(node.acme))
        await until(lambda: bool(crowd.bytes))
        size = 0
        async with asyncio.timeout(PATIENCE_S):
            while size < 5 * WIDE:
                piece = await reader.read(64 * 1024)
                assert piece
                size += len(piece)
        writer.close()


async def test_one_tenant_can_not_take_every_place_of_a_node() -> None:
    node = FakeNode()
    async with serving(node) as (url, port, crowd):
        crowd.owner_requests = 3
        whole = request_bytes(node.acme)
        held = [await silent_caller(port, whole[:-1]) for _ in range(3)]  # the last byte never comes
        await until(lambda: crowd.requests == {"acme": 3})
        async with aiohttp.ClientSession() as session:
            for key, status in ((node.acme, 429), (node.globex, 200)):
                async with session.get(
                    f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}
                ) as answer:
                    assert answer.status == status
            for _, writer in held:
                writer.close()
            await until(lambda: not crowd.requests)


async def test_one_tenant_can_not_take_every_place_of_the_router(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        acme, globex = await control.tenant("acme"), await control.tenant("globex")
        crowd = control.server._runners[0].app[CROWD]
        crowd.owner_requests = 3
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {acme}\r\n"
            "Content-Length: 100\r\n\r\n"
        ).encode()
        port = int(control.url.rpartition(":")[2])
        held = [await silent_caller(port, head) for _ in range(3)]
        await until(lambda: crowd.requests.get("acme") == 3)
        assert (await control.call("GET", "/v1/models", key=acme)).status == 429
        assert (await control.call("GET", "/v1/models", key=globex)).status == 200
        for _, writer in held:
            writer.close()
        await until(lambda: not crowd.requests)
