"""Connections of the router to nodes: what the kernel is asked to watch on them.

Covers: the settings of a real connection, kept over its later use, and whether a request made it. Does not
cover: what the router makes of a connection that ends (``test_forwarding``), or where it may connect
(``attacks/test_request_forgery``).
"""

from __future__ import annotations

import asyncio
import socket

from aiohttp import web
from aiohttp.test_utils import TestServer

from control.node_session import (
    GONE_SECONDS,
    PROBE_SECONDS,
    SILENT_SECONDS,
    ask_for_connection,
    open_session,
)


async def test_a_box_that_is_gone_without_a_word_is_noticed_by_the_kernel() -> None:
    """A request waits ten minutes for a node that works, and one for a box that lost its power."""

    async def begin(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await over.wait()
        return answer

    over = asyncio.Event()
    app = web.Application()
    app.router.add_get("/", begin)
    async with TestServer(app) as server, open_session() as session:
        response = await session.get(server.make_url("/"))
        assert response.connection is not None
        assert response.connection.transport is not None
        used = response.connection.transport.get_extra_info("socket")
        asked = [
            used.getsockopt(level, option)
            for level, option in (
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            )
        ]
        response.close()
        over.set()
    assert asked == [1, PROBE_SECONDS, PROBE_SECONDS, GONE_SECONDS * 1000]
    assert PROBE_SECONDS < GONE_SECONDS < SILENT_SECONDS


async def test_a_request_knows_whether_its_connection_was_made_for_it() -> None:
    """One that was used before may be dropped by the node at any time, which is no answer of the node's."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.Response()
        if "last" in request.query:
            response.force_close()
        return response

    app = web.Application()
    app.router.add_get("/", answer)
    made = []
    async with TestServer(app) as server, open_session() as session:
        for query in ("", "", "last=1", "", ""):
            connection = ask_for_connection()
            async with session.get(server.make_url(f"/?{query}")) as response:
                await response.read()
            made.append(connection.made)
    assert made == [True, False, False, True, False]
