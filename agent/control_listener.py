"""The listener for routers, control's own among them: the gateway behind mutual TLS.

Covers: listening, taking up new certificates, letting in control and the routers that the plan names. Does
not cover: what is answered (``agent/gateway.py``: keys are checked here as anywhere) or making contexts
(``packer/identity.py``).

Tenants call ``--listen``; what the router brings, their keys and prompts, crosses the network through here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

from aiohttp import web
from aiohttp.typedefs import Handler

from agent.config import AgentConfig
from packer.certificates import CheckedObject, WrongSpeaker
from packer.http import CONNECT_ANEW
from packer.identity import Identity

log = logging.getLogger("bunk.control_listener")

# A handshake is two small messages; who needs longer is gone or hostile.
HANDSHAKE_S = 5.0
BACKLOG = 128


def control_listener(config: AgentConfig, identity: Identity) -> ControlListener | None:
    """None for a node that has no control, or that only tenants call."""
    if config.route_listen is None or config.control_url is None:
        return None
    return ControlListener(identity, config.route_listen, config.route_url)


class ControlListener:
    """``guard`` an application, then ``start`` binds; nobody is let in before the node has a certificate;
    ``close`` stops listening."""

    def __init__(self, identity: Identity, listen: tuple[str, int], url: str | None) -> None:
        self._identity = identity
        self._listen = listen
        self._said_url = url
        self._context = identity.control_context()
        self._server: asyncio.Server | None = None
        self.url = ""  # where control's router reaches this node; empty: nowhere

    def guard(self, app: web.Application) -> None:
        """Answer on no connection longer than the certificate lives that it was opened with, nor longer than
        its CA is trusted."""
        app.middlewares.append(self._still_control)

    @web.middleware
    async def _still_control(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        tls = request.get_extra_info("ssl_object")
        if isinstance(tls, CheckedObject):
            try:
                self._identity.check_still(tls)
            except WrongSpeaker as error:
                answer = web.Response(status=CONNECT_ANEW, text=f"{error}; connect anew")
                answer.force_close()
                return answer
        return await handler(request)

    async def start(self, runner: web.AppRunner) -> None:
        """Serve the runner's application here as well. Raises ``OSError``."""
        host, port = self._listen
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family, backlog=BACKLOG)
        assert runner.server is not None  # the runner is set up
        try:
            self._server = await asyncio.get_running_loop().create_server(
                runner.server, sock=bound, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_S
            )
        except BaseException:
            bound.close()
            raise
        name = f"[{host}]" if ":" in host else host
        self.url = self._said_url or f"https://{name}:{bound.getsockname()[1]}"
        self._identity.watch(self._certified)
        self._certified()
        log.info("control's router is served at %s", self.url)

    def _certified(self) -> None:
        if self._identity.answer is not None:
            self._identity.certify(self._context)

    def close(self) -> None:
        """Take no more connections; the runner ends those that are open."""
        self._identity.unwatch(self._certified)
        if self._server is not None:
            with suppress(RuntimeError):
                self._server.close()
