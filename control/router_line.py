"""A router's line to control: its certificate, and what is new, by long polls. The router always dials.

Covers: asking for the feed, handing answers to the view, being removed. Does not cover: the session and its
pauses (``packer.control_line``), what answers mean (``control.router_view``) or serving tenants
(``control.router_process``). While control is away nothing here fails a request: this keeps trying, with
growing pauses.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import aiohttp

from control.places import dialled_url
from control.router_view import RouterView, StaleAnswer
from control.router_wire import RouterAnswer, RouterAsk
from packer.control_answers import Answer, read_answer, refusal_of
from packer.control_line import CONNECT_TIMEOUT_S, POLL_WAIT_MS, ControlLine
from packer.identity import Identity
from packer.joining import ANSWER_TIMEOUT_S, Forgotten, Joiner, Refused, Renewed
from packer.release import server_version
from packer.wire import WIRE_VERSION, BadMessage, decode

log = logging.getLogger("bunk.router")

ROUTER = Joiner("router", "/router/v1", "bunk-control router")
# Between two questions when there is always something new, so that a busy fleet's news come in bundles.
REST_S = 0.02
# Control's answer to a tenant who asks where to call nodes. Without it the tenant calls through here.
ROUTE_TIMEOUT_S = 5.0
# So many of these at one time, of milliseconds each; who comes beside them calls through here. Control lets a
# router have a thousand requests, and the one for news must not be refused because tenants ask.
ROUTES_MAX = 64


@dataclass(frozen=True, slots=True)
class Figures:
    """What a router says of itself, for people."""

    url: str
    in_flight: int
    calls: int


class RouterLine(ControlLine):
    """Runs until cancelled. ``news`` is called when there was some."""

    def __init__(
        self,
        identity: Identity,
        control_url: str,
        name: str,
        token_file: Path | None,
        view: RouterView,
        figures: Callable[[], Figures],
        news: Callable[[], None],
    ) -> None:
        super().__init__(ROUTER, identity, control_url, name, token_file)
        self._view = view
        self._figures = figures
        self._news = news
        self._life = secrets.token_hex(8)
        self._asked = 0
        self._told = ""  # by control's newest answer
        self._routes = 0  # tenants' questions that wait for control's answer
        self._more = False  # control had more to say than one answer holds
        self.connected = False
        self.tried = asyncio.Event()  # control has said all that there is, or could not be asked

    async def run(self) -> None:
        """Join if need be, then ask for ever. See ``Joining.run``."""
        await self.joining.run(self._talk)

    async def _talk(self) -> None:
        async with self._connected():
            try:
                await self._ask_for_ever(self._hear, self._lost)
            finally:
                self.connected = False

    async def _hear(self) -> None:
        answer = await self._ask(POLL_WAIT_MS if self.connected and not self._more else 0)
        self._more = answer.more
        if not self.connected:
            log.info("connected to control at %s", self._url)
            self.connected = True
        if not self._more:
            self.tried.set()
            self._news()
            await asyncio.sleep(REST_S)

    def _lost(self, error: Exception) -> None:
        if self.connected:
            log.warning("control is away, routing on as it said last: %s", error)
        self.connected = self._more = False
        self.tried.set()
        if isinstance(error, StaleAnswer):
            self._view.lose_place()
        self._view.lose_pieces()

    async def _ask(self, wait_ms: int) -> RouterAnswer:
        self._asked += 1
        view, figures = self._view, self._figures()
        ask = RouterAsk(
            WIRE_VERSION,
            self._life,
            self._asked,
            view.have,
            wait_ms,
            view.epoch,
            view.start,
            figures.url,
            figures.in_flight,
            figures.calls,
            self._identity.ca_sha256,
            round(self._identity.now_s() * 1000),
            server_version(),
            self._told,
            self._identity.box,
        )
        answer = await self._post(
            "/router/v1/view", ask, wait_ms / 1000 + ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
        )
        if answer.status != 200:
            self._complain(answer)
        got = decode(answer.body, RouterAnswer)
        mine = self._identity.answer
        if mine is None or got.cluster != mine.cluster or (got.life, got.asked) != (ask.life, ask.number):
            raise BadMessage("control's answer is to another question")
        self._told, self._complaint = got.told, ""
        view.take(got)
        if got.ca_pem and self._identity.adopt_cas(got.ca_pem):
            raise Renewed
        return got

    def _complain(self, answer: Answer) -> NoReturn:
        code, text = refusal_of(answer.body)
        if code == "router_removed":
            raise Forgotten(text)
        if answer.status in (401, 403):
            raise Refused(text)
        self._say_cloned(code, text)
        raise aiohttp.ClientError(f"control answered {answer.status}: {text}")

    # --- tenants' questions that control answers --------------------------------------------------

    async def route(self, query: str, authorization: str) -> Answer | None:
        """What control answers to a tenant who asks where to call nodes; None while it is away, or while too
        many ask."""
        session = self._session
        if session is None or not self.connected or self._routes >= ROUTES_MAX:
            return None
        timeout = aiohttp.ClientTimeout(total=ROUTE_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        headers = {"Authorization": authorization}
        self._routes += 1
        try:
            url = f"{self._url}/router/v1/route?{query}"
            async with session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as answer:
                return await read_answer(answer)
        except (aiohttp.ClientError, TimeoutError, OSError, BadMessage, RuntimeError) as error:
            # RuntimeError: the session is just being made anew.
            log.debug("control does not say where nodes are called: %s", error)
            return None
        finally:
            self._routes -= 1

    # --- where control is -------------------------------------------------------------------------

    @property
    def control_at(self) -> str:
        """Control's address, as this box last connected to it; empty before."""
        return self._control_at

    def was_at(self, address: str) -> None:
        """Where control was before this process was started; what it connects to counts more."""
        self._control_at = self._control_at or address

    def dialled(self, url: str) -> str:
        """A node's URL as this box reaches it: one that means control's own machine has its address here."""
        return dialled_url(url, self._control_at or None, own_address_to(self._control_at))


def own_address_to(host: str) -> str | None:
    """This box's address as ``host`` sees it; nothing is sent."""
    if not host:
        return None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
