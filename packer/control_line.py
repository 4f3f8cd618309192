"""A box's line to control: one session with its certificate, messages over it, and asking for ever.

Covers: what nodes and routers do alike: the session, one message and its answer, the pauses while control is
away, renewal in time. Does not cover: how a box gets its first certificate, or another after the end
(``packer.joining``), or what is said (``agent.uplink``, ``control.router_line``).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import aiohttp
from aiohttp import AddrInfoType

from packer.control_answers import Answer, read_answer
from packer.identity import Identity
from packer.joining import (
    ANSWER_TIMEOUT_S,
    EXPIRY_MARGIN_S,
    JSON,
    RETRY_FIRST_S,
    Joiner,
    Joining,
    Renewed,
    pause,
)
from packer.wire import BadMessage, encode

log = logging.getLogger("bunk.line")

# A long poll: short enough that middleboxes keep the connection, long enough to be nearly free.
POLL_WAIT_MS = 20_000
# A control that takes no connection by then is not there.
CONNECT_TIMEOUT_S = 5.0


class ControlLine:
    """Of one box. What derives from it says what is asked."""

    def __init__(
        self, joiner: Joiner, identity: Identity, control_url: str, name: str, token_file: Path | None
    ) -> None:
        self._identity = identity
        self._url = control_url.rstrip("/")
        self.joining = Joining(joiner, identity, control_url, name, token_file)
        self._session: aiohttp.ClientSession | None = None
        self._cloned_code = f"{joiner.what}_cloned"
        self._complaint = ""  # of control about this box, said once
        self._control_at = ""  # control's address, as this box last connected to it

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        """A session with the present certificate; tests put a simulated network in its place."""
        connector = aiohttp.TCPConnector(ssl=self._identity.context(), limit=0, socket_factory=self._socket)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            self._session = session
            try:
                yield
            finally:
                self._session = None

    def _socket(self, address: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, place = address
        self._control_at = str(place[0])
        return socket.socket(family, kind, protocol)

    async def _post(self, path: str, message: object, timeout_s: float, connect_s: float) -> Answer:
        """Send one message over the session that is open; raises ``aiohttp.ClientError`` or
        ``TimeoutError``, and ``RuntimeError`` when the session is just being made anew."""
        if self._session is None:
            raise RuntimeError("no session")
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_s)
        async with self._session.post(
            f"{self._url}{path}", data=encode(message), headers=JSON, timeout=timeout, allow_redirects=False
        ) as answer:
            return await read_answer(answer)

    async def _post_now(self, path: str, message: object) -> Answer:
        """What control answers at once."""
        return await self._post(path, message, ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S)

    def _say_cloned(self, code: str, text: str) -> None:
        """Control refuses with this; two boxes with one identity are what a person must hear of."""
        if code == self._cloned_code and code != self._complaint:
            log.error("%s", text)
            self._complaint = code

    async def _ask_for_ever(
        self, ask: Callable[[], Awaitable[object]], lost: Callable[[Exception], None]
    ) -> NoReturn:
        """Ask again whenever there was an answer. ``lost`` is told why there was none; then this asks after
        growing pauses. Raises ``Renewed`` when the session must be made anew."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                await ask()
            except (aiohttp.ClientError, TimeoutError, OSError, BadMessage) as error:
                lost(error)
                if self._identity.expired(EXPIRY_MARGIN_S):
                    raise Renewed from None  # leads to the check for expiry in ``Joining.run``
                pause_s = await pause(pause_s)
            else:
                pause_s = RETRY_FIRST_S
                if self._identity.renew_due() and await self.joining.renew(self._post_now):
                    raise Renewed
