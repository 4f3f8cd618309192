"""The two listeners of the control server, its start and its orderly stop.

Covers: building the public application (management API, router, health) and the nodes' application,
listening, the ready file, signals. Does not cover: state (``control.state``) or what routes do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from control.config import Address, Config
from control.openapi import document_route
from control.operations import Operation, Result
from control.routes import (
    about,
    commits,
    direct,
    draining,
    figures,
    joining,
    keys,
    models,
    nodes,
    oip,
    plans,
    ps,
    quotas,
    router,
    routers,
    shares,
    tenants,
    uploads,
    usage,
)
from control.routes.access import Access, Caller, Route, add_routes, render_error
from control.state import STOP_S, Control
from packer.doors import STRANGERS_MAX, Doors
from packer.durable import write_private
from packer.http import ApiError, json_response, protect, runner
from packer.tls_buffers import shrink_tls_buffers

log = logging.getLogger("bunk.control")


@dataclass(frozen=True, slots=True)
class Health:
    status: str = "ok"


async def healthz(control: Control, request: web.Request, caller: Caller) -> web.Response:
    if control.stopping:
        raise ApiError(503, "stopping", "This control server is stopping.", kind="server_error")
    return json_response(Health())


_ROUTES: tuple[Route[Control], ...] = (
    Route(
        "GET",
        "/healthz",
        Access.OPEN,
        healthz,
        stays=False,
        operation=Operation("showHealth", "Does it serve?", [Result(200, "It does.", Health)]),
    ),
    *about.ROUTES,
    *tenants.ROUTES,
    *keys.ROUTES,
    *quotas.ROUTES,
    *uploads.ROUTES,
    *commits.ROUTES,
    *models.ROUTES,
    *nodes.ROUTES,
    *draining.ROUTES,
    *routers.ROUTES,
    *ps.ROUTES,
    *usage.ROUTES,
    *plans.ROUTES,
    *direct.ROUTES,
    *figures.ROUTES,
    *router.ROUTES,
    *oip.ROUTES,
)
PUBLIC_ROUTES: tuple[Route[Control], ...] = (document_route(_ROUTES), *_ROUTES)


def build_public_app(control: Control) -> web.Application:
    """Management API, router and health: what operators, tenants and load balancers call."""
    app = web.Application()
    add_routes(app, control, PUBLIC_ROUTES, heads=True)
    protect(app, render_error)
    return app


def build_node_app(control: Control) -> web.Application:
    """What nodes call; served with TLS only (``control.shown``)."""
    app = web.Application()
    add_routes(
        app, control, (*joining.NODE_ROUTES, *nodes.NODE_ROUTES, *shares.NODE_ROUTES, *routers.NODE_ROUTES)
    )
    # Nodes are known by their certificates; many may share an address, and come back all at once.
    protect(app, render_error, doors=Doors(address_strangers=STRANGERS_MAX))
    app.on_shutdown.append(lambda _: control.end_polls())
    return app


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a running server listens."""

    url: str
    node_url: str


class Server:
    """A control server inside this event loop; tests use it as ``serve`` does."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.control = Control(config)
        self._runners: list[web.AppRunner] = []

    async def start(self) -> Bound:
        await self.control.start()
        try:
            public = await self._listen(build_public_app(self.control), self.config.listen, tls=False)
            node = await self._listen(build_node_app(self.control), self.config.node_listen, tls=True)
        except BaseException:
            await self.stop()
            raise
        bound = Bound(f"http://{public}", f"https://{node}")
        if self.config.ready_file is not None:
            text = json.dumps({"url": bound.url, "node_url": bound.node_url})
            write_private(self.config.ready_file, text.encode())
        log.info("serving %s, nodes at %s", bound.url, bound.node_url)
        return bound

    async def _listen(self, app: web.Application, address: Address, *, tls: bool) -> Address:
        app_runner = runner(app, STOP_S)
        self._runners.append(app_runner)
        await app_runner.setup()
        context = self.control.shown.listener_context() if tls else None
        await web.TCPSite(app_runner, address.host, address.port, ssl_context=context).start()
        host, port = app_runner.addresses[0][:2]
        return Address(host, port)

    async def stop(self) -> None:
        """Stop taking requests, let those under way end within ``STOP_S``, make records durable."""
        self.control.stopping = True
        if self.config.ready_file is not None:
            with suppress(FileNotFoundError):
                self.config.ready_file.unlink()
        for app_runner in reversed(self._runners):
            await app_runner.cleanup()
        await self.control.close()


async def serve(config: Config) -> None:
    """Run until SIGTERM or SIGINT."""
    shrink_tls_buffers()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(config)
    await server.start()
    await stop.wait()
    log.info("stopping")
    await server.stop()
