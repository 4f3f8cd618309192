"""One tenant that opens connections and holds them: idle ones, half of a request, answers that nobody reads.

Covers: opening and counting them, from one thread, with nothing but sockets. Does not cover: what others feel
of it (``bench_gateway``, ``tests/attacks/test_a_thousand_connections.py``).
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

# A server that does not take a connection or answer a listing by then is not there.
TIMEOUT_S = 30.0


class Held(StrEnum):
    IDLE = "idle after a request"
    HALF_HEAD = "half a request's head"
    HALF_BODY = "half a request's body"
    UNREAD = "an answer that is not read"


# What a thousand of them are, in tenths.
MIX = (Held.IDLE,) * 4 + (Held.HALF_HEAD,) * 2 + (Held.HALF_BODY,) * 2 + (Held.UNREAD,) * 2


@dataclass(slots=True)
class HeldCrowd:
    """``body``: a whole request to ``path`` whose answer is then left alone."""

    url: str
    key: str
    path: str
    body: bytes
    sockets: list[tuple[Held, socket.socket]] = field(default_factory=list)

    def hold(self, count: int) -> None:
        """Open so many more connections."""
        for number in range(count):
            kind = MIX[number % len(MIX)]
            self.sockets.append((kind, self._one(kind)))

    def _one(self, kind: Held) -> socket.socket:
        place = urlsplit(self.url)
        assert place.hostname is not None
        assert place.port is not None
        line = socket.create_connection((place.hostname, place.port), TIMEOUT_S)
        head = f"Host: x\r\nAuthorization: Bearer {self.key}\r\n"
        post = f"POST {self.path} HTTP/1.1\r\n{head}Content-Length: {len(self.body)}\r\n\r\n".encode()
        if kind is Held.IDLE:
            line.sendall(f"GET /v1/models HTTP/1.1\r\n{head}\r\n".encode())
            if not line.recv(65536).startswith(b"HTTP/1.1 200"):
                raise RuntimeError("a listing of models was not answered")
        elif kind is Held.HALF_HEAD:
            line.sendall(post[: len(post) // 2])
        elif kind is Held.HALF_BODY:
            line.sendall(post + self.body[: len(self.body) // 2])
        else:
            line.sendall(post + self.body)
        return line

    def open(self, kind: Held) -> int:
        """How many of them the server has not hung up on."""
        return sum(_is_open(line) for held, line in self.sockets if held is kind)

    def close(self) -> None:
        for _, line in self.sockets:
            line.close()
        self.sockets.clear()


def _is_open(line: socket.socket) -> bool:
    line.setblocking(False)
    try:
        while line.recv(65536):
            pass
        return False
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def stream_body(model: str, tokens: int) -> bytes:
    return json.dumps({"model": model, "prompt": "a b c", "max_tokens": tokens, "stream": True}).encode()
