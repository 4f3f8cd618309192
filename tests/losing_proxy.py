"""A TCP proxy for tests that loses answers, or is a network that is cut.

Covers: bytes in both directions; closing a connection at the first byte of an answer that is to be lost: by
then the server has done what it was asked; and a line that swallows everything, carries one way alone or
resets every connection until it is whole again. Does not cover: HTTP; it knows no request from another, so
where answers are lost one connection should carry one request at a time.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

PIECE_BYTES = 65_536


# With this a closed socket sends a reset, not an orderly end.
_NO_LINGER = struct.pack("ii", 1, 0)


class Line(Enum):
    """What the network between the two sides does."""

    WHOLE = "whole"
    HOLE = "hole"  # nothing arrives anywhere, and nobody is told
    DEAF = "deaf"  # what is asked arrives, what is answered does not
    CUT = "cut"  # every connection is reset, new ones too


@dataclass(slots=True)
class LosingProxy:
    """``to_lose``: how many of the next answers are lost; ``lost``: how many were."""

    url: str
    to_lose: int = 0
    lost: int = 0
    line: Line = Line.WHOLE
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, line: Line) -> None:
        """What waited goes on when the line is whole, as packets that are sent again do."""
        self.line = line
        self._changed.set()
        self._changed = asyncio.Event()
        if line is Line.CUT:
            for writer in self._open:
                _reset(writer)

    async def _passable(self, *lines: Line) -> None:
        while self.line not in lines:
            await self._changed.wait()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: tuple[str, int]
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        up: asyncio.Task[None] | None = None
        server_writer: asyncio.StreamWriter | None = None
        try:
            await self._passable(Line.WHOLE, Line.DEAF, Line.CUT)
            if self.line is Line.CUT:
                return
            server_reader, server_writer = await asyncio.open_connection(*upstream)
            self._open.add(server_writer)
            up = asyncio.create_task(self._up(reader, server_writer))
            while piece := await server_reader.read(PIECE_BYTES):
                if self.to_lose:
                    self.to_lose -= 1
                    self.lost += 1
                    return
                await self._passable(Line.WHOLE)
                writer.write(piece)
                await writer.drain()
        except (OSError, asyncio.CancelledError):
            pass  # nobody listens there now, somebody hung up, or the test is over
        finally:
            if up is not None:
                up.cancel()
            if server_writer is not None:
                server_writer.close()
                self._open.discard(server_writer)
            if self.line is Line.CUT:
                _reset(writer)
            writer.close()
            self._open.discard(writer)
            self._tasks.discard(task)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                await self._passable(Line.WHOLE, Line.DEAF)
                writer.write(piece)
                await writer.drain()
            # Who called has left: so does the line, whatever the server still says.
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()


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


@dataclass(slots=True)
class Cable:
    """A proxy in a thread of its own, for tests that have no loop."""

    _loop: asyncio.AbstractEventLoop
    _proxy: LosingProxy

    @property
    def address(self) -> str:
        """host:port"""
        return self._proxy.url.removeprefix("http://")

    def become(self, line: Line) -> None:
        async def become() -> None:
            self._proxy.become(line)

        asyncio.run_coroutine_threadsafe(become(), self._loop).result()


@contextmanager
def cable(upstream_url: str) -> Iterator[Cable]:
    """A line to a server that may come later."""
    laid: list[Cable] = []
    ready = threading.Event()

    async def run() -> None:
        async with losing_proxy(upstream_url) as proxy:
            laid.append(Cable(asyncio.get_running_loop(), proxy))
            ready.set()
            await ended.wait()

    ended = asyncio.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield laid[0]
    finally:
        laid[0]._loop.call_soon_threadsafe(ended.set)
        thread.join()
