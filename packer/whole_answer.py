"""A small whole answer, written with its head in one piece.

Covers: writing a 200 to a caller who keeps the connection and has taken everything before. Does not cover:
any other case: aiohttp's own way is taken then, with the same headers (``packer/http.py`` says which).

Every small request comes by here, and aiohttp's own way from a response to its bytes costs half as much as a
bare handler in all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from packer.crowd import SMALL_BYTES_MAX
from packer.http import HEAD_SENT, own_headers


class WholeAnswer(web.Response):
    """``app``: whose answer it is. The status is 200 unless it is told otherwise."""

    def __init__(
        self,
        app: web.Application,
        body: bytes,
        content_type: str | None = None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(body=body, status=status, headers=headers, content_type=content_type)
        self._whole = body
        self._app = app
        self._written = False

    @property
    def prepared(self) -> bool:
        return self._written or super().prepared

    @property
    def keep_alive(self) -> bool | None:
        return True if self._written else super().keep_alive

    def send_now(self, request: web.BaseRequest) -> WholeAnswer:
        """Write it if nothing is out of the ordinary, so that its caller does not wait for what follows; else
        it goes out when the handler has returned."""
        transport = request.transport
        if (
            self.status != 200
            or self.prepared
            or self.keep_alive is not None  # told to hang up
            or transport is None
            or transport.is_closing()
            or transport.get_write_buffer_size()  # aiohttp waits until what came before is taken
            or len(self._whole) > SMALL_BYTES_MAX
            or "Content-Type" not in self.headers
            or not isinstance(request, web.Request)
            or request.version != HttpVersion11
            or not request.keep_alive
            or request.method == "HEAD"
            or "Upgrade" in request.headers
        ):
            return self
        headers = [*self.headers.items(), *own_headers(self._app, request, self.headers).items()]
        lines = [f"{name}: {value}\r\n" for name, value in headers]
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(self._whole)}\r\n"
            f"Date: {_date(int(time.time()))}\r\n{''.join(lines)}\r\n"
        )
        ends = len(lines) + 4
        if head.count("\r") != ends or head.count("\n") != ends or "\0" in head:
            request[HEAD_SENT] = False
            raise ValueError("a header of an answer has a line of its own")
        transport.write(head.encode("utf-8") + self._whole)
        self._written = True
        return self

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None if self._written else await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        if not self._written:
            await super().write_eof(data)


_dated: tuple[int, str] = (0, "")


def _date(now_s: int) -> str:
    """The time as HTTP writes it; the same text for a whole second."""
    global _dated
    if _dated[0] != now_s:
        _dated = (now_s, formatdate(now_s, usegmt=True))
    return _dated[1]
