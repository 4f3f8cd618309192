"""Threat: connections that are opened and held: silent, with half a head, or idle after a request.

Covers: the time for a request's head, how many connections of one address or tenant wait and which of them
go, that who sends a request is answered meanwhile, on the gateway and on both of control's listeners. Does
not cover: requests in flight and answers that nobody reads (``test_crowds``), slow bodies
(``test_gateway_bodies``), or a thousand connections against processes (``test_a_thousand_connections``).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest
from aiohttp import web
from fake_node import FakeNode
from running_control import PATIENCE_S, running, until

from agent.gateway import GatewayConfig, build_app
from packer.doors import Doors, Handler, address_group
from packer.http import DOORS, runner


@asynccontextmanager
async def serving(node: FakeNode) -> AsyncIterator[tuple[int, Doors]]:
    """The gateway's port and its doors, whose limits a test may change."""
    app = build_app(node, GatewayConfig("box-1"))
    running_app = runner(app)
    await running_app.setup()
    try:
        await web.TCPSite(running_app, "127.0.0.1", 0).start()
        yield running_app.addresses[0][1], app[DOORS]
    finally:
        await running_app.cleanup()


class Line:
    """One connection that says what a test tells it to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, port: int, data: bytes = b"", tls: ssl.SSLContext | None = None) -> Line:
        name = "localhost" if tls is not None else None
        line = cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=name))
        line.writer.write(data)
        await line.writer.drain()
        return line

    async def ended(self) -> bool:
        """Wait for the server to hang up; whether it said nothing before."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True

    async def ask(self, key: str, path: str = "/v1/models") -> int:
        """The status of a whole request; the connection stays open."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")
            )
            await self.reader.readexactly(length)
        return int(head.split()[1])

    def close(self) -> None:
        self.writer.transport.abort()


def waiting(doors: Doors, count: int) -> bool:
    return doors.strangers_waiting == count


HALF = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: "


async def test_a_head_that_does_not_come_ends_its_connection() -> None:
    """Silent, half a line, half a head: all the same. One whose request is here is not held to it."""
    node = FakeNode(hold=True)
    body = b'{"model": "acme/embed", "input": "a"}'
    whole = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {node.acme}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
    async with serving(node) as (port, doors):
        doors.head_seconds = 0.3
        asked = await Line.to(port, whole)
        slow = [await Line.to(port, sent) for sent in (b"", b"G", HALF)]
        for line in slow:
            assert await line.ended()
        await node.happened("requested")
        node.go.set()
        async with asyncio.timeout(PATIENCE_S):
            assert (await asked.reader.readline()).split()[1] == b"200"
            await asked.reader.read()
        await until(lambda: doors.connections == 0)


async def test_a_head_that_comes_drop_by_drop_ends_with_its_time() -> None:
    """What counts is the whole head, not that something comes."""
    async with serving(FakeNode()) as (port, doors):
        doors.head_seconds = 0.3
        line = await Line.to(port, HALF)
        ended = asyncio.create_task(line.ended())
        while not ended.done():
            line.writer.write(b"x")
            await asyncio.wait({ended}, timeout=0.02)
        assert await ended


async def test_strangers_of_one_address_lose_their_oldest_connection() -> None:
    node = FakeNode()
    async with serving(node) as (port, doors):
        doors.address_strangers = 5
        held = []
        for number in range(8):
            held.append(await Line.to(port, HALF))
            await until(partial(waiting, doors, min(number + 1, 5)))
        for line in held[:3]:
            assert await line.ended()
        asked = await Line.to(port)
        assert await asked.ask(node.acme) == 200
        assert await held[3].ended()
        assert doors.strangers_waiting == 4
        assert doors.idle_of("acme") == 1
        # A wrong key makes nobody less of a stranger; what is not asked with a key counts by its address.
        assert await asked.ask(node.acme[:-1] + "x") == 401
        assert doors.strangers_waiting == 5
        for line in (asked, *held):
            line.close()
        await until(lambda: doors.connections == 0)
        assert doors.strangers_waiting == 0


async def test_a_tenant_loses_its_own_longest_idle_connections_and_nobody_elses() -> None:
    node = FakeNode()
    async with serving(node) as (port, doors):
        doors.owner_idle = 3
        other = await Line.to(port)
        assert await other.ask(node.globex) == 200
        kept = [await Line.to(port) for _ in range(3)]
        for line in kept:
            assert await line.ask(node.acme) == 200
        assert await kept[0].ask(node.acme) == 200  # which now is the one that was used last
        more = await Line.to(port)
        assert await more.ask(node.acme) == 200
        assert await kept[1].ended()
        assert (doors.idle_of("acme"), doors.idle_of("globex")) == (3, 1)
        for line in (kept[0], kept[2], more):
            assert await line.ask(node.acme) == 200
        assert await other.ask(node.globex) == 200


async def test_the_same_on_both_listeners_of_control(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        acme = await control.tenant("acme")
        await control.join("n1")
        public, nodes = (one.app[DOORS] for one in control.server._runners)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        for doors, url, context in (
            (public, control.url, None),
            (nodes, control.bound.node_url, tls),
        ):
            port = int(url.rpartition(":")[2])
            doors.address_strangers = doors.connections + 2
            held = [await Line.to(port, HALF, context) for _ in range(5)]
            assert await held[0].ended()
            doors.head_seconds = 0.1
            assert await (await Line.to(port, HALF, context)).ended()
            for line in held:
                line.close()
        assert (await control.call("GET", "/v1/models", key=acme)).status == 200
        assert await (await Line.to(int(control.url.rpartition(":")[2]))).ask(acme) == 200
        assert public.idle_of("acme") > 0


def opened(doors: Doors, address: str, count: int) -> list[tuple[Handler, Mock]]:
    made = []
    for _ in range(count):
        transport = Mock()
        transport.get_extra_info.return_value = (address, 1)
        transport.get_write_buffer_size.return_value = 0
        transport.is_closing.return_value = False
        handler = cast(Handler, object())
        doors.opened(handler, transport)
        made.append((handler, transport))
    return made


async def test_with_too_many_of_all_who_has_most_loses_one() -> None:
    doors = Doors(strangers=10)
    few, many = opened(doors, "10.0.0.1", 2), opened(doors, "10.0.0.2", 8)
    (late,) = opened(doors, "10.0.0.3", 1)
    assert [transport.close.called for _, transport in (*few, *many, late)] == [False] * 2 + [True] + [
        False
    ] * 8
    assert doors.strangers_waiting == 10
    # Owners are another pool: strangers never push them out, nor the other way round.
    doors.idle = 3
    for handler, _ in many[1:6]:
        doors.asked(handler)
        doors.answered(handler, "acme")
    doors.asked(late[0])
    doors.answered(late[0], "globex")
    assert (doors.idle_of("acme"), doors.idle_of("globex"), doors.strangers_waiting) == (2, 1, 4)
    assert not any(transport.close.called for _, transport in (*few, late))


async def test_an_answer_that_is_not_taken_does_not_keep_its_connection() -> None:
    doors = Doors(address_strangers=1)
    ((_, stuck),) = opened(doors, "10.0.0.1", 1)
    stuck.get_write_buffer_size.return_value = 9
    opened(doors, "10.0.0.1", 1)
    stuck.abort.assert_called_once()


@pytest.mark.parametrize(
    ("peer", "group"),
    [
        (("10.1.2.3", 5), "10.1.2.3"),
        (("::ffff:10.1.2.3", 5, 0, 0), "10.1.2.3"),
        (("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::9", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 0), "fe80::/64"),
        ("", "local"),
        (("nonsense", 5), "unknown"),
    ],
)
def test_one_machine_is_one_address(peer: object, group: str) -> None:
    assert address_group(peer) == group
