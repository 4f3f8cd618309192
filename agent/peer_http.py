"""The little HTTP that nodes speak to each other: heads of requests and answers, read within limits.

Covers: a strict subset of HTTP/1.1: GET without a body, exact framing by Content-Length, one range.
Does not cover: TLS (``packer/identity.py``), who may ask (``agent/peers.py``), or what is asked for
(``agent/peer_fetch.py``).

It is not aiohttp because gigabytes pass here: blocking sockets on threads release the GIL while they
encrypt, so a transfer neither holds up the agent's loop nor is held up by it.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from packer.types import KIB

# Ours have some 300 bytes.
HEAD_BYTES_MAX = 8 * KIB
HEADERS_MAX = 32
# One piece of a body between two looks at the clock.
PIECE_BYTES = 256 * KIB
# How soon a receiver that waits finds out that it is not wanted any more.
CANCEL_S = 0.5

_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_REQUEST = re.compile(r"([A-Z]{1,16}) (/[!-~]{0,1024}) HTTP/1\.1")
_STATUS = re.compile(r"HTTP/1\.1 ([2-5][0-9]{2})(?: [ -~]{0,64})?")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class BadHead(Exception):
    """The other side says something that is not our HTTP. ``status`` is what a server answers."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Gone(Exception):
    """The other side closed the connection between two messages."""


@dataclass(frozen=True, slots=True)
class Head:
    """``first`` is the request line or the status line; header names are in lower case, each once."""

    first: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class Connection:
    """A TLS connection on which heads are read with what was received beyond them kept."""

    tls: ssl.SSLSocket
    cancelled: Callable[[], bool] = lambda: False
    _ahead: bytearray = field(default_factory=bytearray)

    def send_head(self, first: str, headers: Mapping[str, str | int], until_s: float) -> None:
        lines = [first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.send("\r\n".join(lines).encode("ascii"), until_s)

    def send(self, data: bytes | memoryview, until_s: float) -> None:
        """Send all of it until ``until_s`` (monotonic). Raises ``TimeoutError`` and ``OSError``."""
        view = memoryview(data)
        while view:
            self.tls.settimeout(_left_s(until_s))
            view = view[self.tls.send(view) :]

    def read_head(self, until_s: float) -> Head:
        """The next head. Raises ``Gone``, ``BadHead``, ``TimeoutError`` and ``OSError``."""
        while (end := self._ahead.find(b"\r\n\r\n")) < 0:
            if len(self._ahead) > HEAD_BYTES_MAX:
                raise BadHead(f"a head of more than {HEAD_BYTES_MAX} bytes", 431)
            more = bytearray(HEAD_BYTES_MAX)
            count = self._receive(memoryview(more), until_s)
            if not count:
                raise Gone if not self._ahead else BadHead("a head that breaks off")
            self._ahead += more[:count]
        if end > HEAD_BYTES_MAX:
            raise BadHead(f"a head of more than {HEAD_BYTES_MAX} bytes", 431)
        text = bytes(self._ahead[:end])
        del self._ahead[: end + 4]
        return _parse_head(text)

    @property
    def has_more(self) -> bool:
        """Whether the other side sent something behind the last head."""
        return bool(self._ahead)

    def read_into(self, out: memoryview, until_s: float) -> int:
        """Some bytes of a body, at least one. Raises ``BadHead`` when the other side stops early."""
        if self._ahead:
            count = min(len(self._ahead), len(out))
            out[:count] = self._ahead[:count]
            del self._ahead[:count]
            return count
        count = self._receive(out, until_s)
        if not count:
            raise BadHead("a body that breaks off")
        return count

    def _receive(self, out: memoryview, until_s: float) -> int:
        while True:
            left_s = _left_s(until_s)
            self.tls.settimeout(min(left_s, CANCEL_S))
            try:
                return self.tls.recv_into(out)
            except TimeoutError:
                if self.cancelled():
                    raise ConnectionAbortedError("nobody wants it any more") from None


def _left_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the other node is too slow")
    return left_s


def _parse_head(data: bytes) -> Head:
    try:
        first, *lines = data.decode("ascii").split("\r\n")
    except UnicodeDecodeError:
        raise BadHead("a head that is not ASCII") from None
    if len(lines) > HEADERS_MAX:
        raise BadHead(f"more than {HEADERS_MAX} headers", 431)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        value = value.strip(" ")
        if not colon or not _NAME.fullmatch(name) or not value.isprintable():
            raise BadHead("a header that is none")
        if name.lower() in headers:
            raise BadHead("a header that is there twice")
        headers[name.lower()] = value
    return Head(first, headers)


def parse_request(head: Head) -> tuple[str, str]:
    """Method and path of a request without a body. Raises ``BadHead``."""
    match = _REQUEST.fullmatch(head.first)
    if not match:
        raise BadHead("a request line that is none")
    if "transfer-encoding" in head.headers or head.headers.get("content-length", "0") != "0":
        raise BadHead("requests between nodes have no body")
    return match[1], match[2]


def parse_status(head: Head) -> tuple[int, int]:
    """Status and length of an answer. Raises ``BadHead``."""
    match = _STATUS.fullmatch(head.first)
    length = head.headers.get("content-length", "")
    if not match or not length.isdecimal() or len(length) > 18 or "transfer-encoding" in head.headers:
        raise BadHead("an answer that is none")
    return int(match[1]), int(length)


def parse_range(text: str | None) -> tuple[int, int] | None:
    """First byte and end (exclusive) of ``bytes=a-b``; None for anything else."""
    match = _RANGE.fullmatch(text or "")
    if not match or int(match[2]) < int(match[1]):
        return None
    return int(match[1]), int(match[2]) + 1


def parse_content_range(text: str | None) -> tuple[int, int, int] | None:
    """First byte, end (exclusive) and size of the whole, of an answer; None for anything else."""
    match = _CONTENT_RANGE.fullmatch(text or "")
    if not match or not int(match[1]) <= int(match[2]) < int(match[3]):
        return None
    return int(match[1]), int(match[2]) + 1, int(match[3])
