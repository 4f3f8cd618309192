"""Sending an order with its descriptors on a socket that does not block.

Covers: messages that the kernel takes in parts, and waiting for room. Does not cover: what is sent
(``frames``) or who reads it (``workers``, ``nursery``).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from agent.frames import Message, encode_message, send_datagram


async def send(sock: socket.socket, message: Message, fds: Sequence[int], lock: asyncio.Lock) -> None:
    """Send on a non-blocking SOCK_SEQPACKET socket. The descriptors stay open here."""
    loop = asyncio.get_running_loop()
    async with lock:
        for text, part in encode_message(message, fds):
            while True:
                try:
                    send_datagram(sock, text, part)
                    break
                except BlockingIOError:
                    await _writable(loop, sock)


async def _writable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(sock, wake)
    try:
        await ready
    finally:
        loop.remove_writer(sock)
