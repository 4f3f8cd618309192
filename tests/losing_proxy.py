"""A TCP proxy for tests that lets requests through and loses answers.

Covers: bytes in both directions, and closing a connection at the first byte of an answer that is to be lost:
by then the server has done what it was asked. Does not cover: HTTP; it knows no request from another, so
one connection should carry one request at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PIECE_BYTES = 65_536


@dataclass(slots=True)
class LosingProxy:
    """``to_lose``: how many of the next answers are lost; ``lost``: how many were."""

    url: str
    to_lose: int = 0
    lost: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: tuple[str, int]
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server_reader, server_writer = await asyncio.open_connection(*upstream)
        up = asyncio.create_task(self._up(reader, server_writer))
        try:
            while piece := await server_reader.read(PIECE_BYTES):
                if self.to_lose:
                    self.to_lose -= 1
                    self.lost += 1
                    return
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            up.cancel()
            writer.close()
            server_writer.close()
            self._tasks.discard(task)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(PIECE_BYTES):
                writer.write(piece)
                await writer.drain()


@asynccontextmanager
async def losing_proxy(upstream_url: str) -> AsyncIterator[LosingProxy]:
    """A proxy in front of a server; loses nothing until it is told to."""
    parts = urlsplit(upstream_url)
    assert parts.hostname is not None
    assert parts.port is not None
    upstream = parts.hostname, parts.port
    proxy = LosingProxy("")
    server = await asyncio.start_server(
        lambda reader, writer: proxy._carry(reader, writer, upstream), "127.0.0.1", 0
    )
    host, port = server.sockets[0].getsockname()[:2]
    proxy.url = f"http://{host}:{port}"
    try:
        yield proxy
    finally:
        server.close()
        for task in list(proxy._tasks):
            task.cancel()
        await asyncio.gather(*proxy._tasks, return_exceptions=True)
