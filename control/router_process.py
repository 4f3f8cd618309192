"""A router that is a process of its own: tenants' listener, and a line to control instead of control's state.

Covers: building its application out of the routes that control's own router has, its health, start and
orderly stop, and what stops it. Does not cover: the routes (``control.routes``), the line
(``control.router_line``), or the command line (``control.router_command``).

It keeps nothing but its identity on disk. Any number of them may stand behind a TCP load balancer: none
counts anything that another would have to know, since nodes enforce the limits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from cryptography import x509

from control import cluster as fleet
from control import rooms
from control.config import Address
from control.node_session import open_session
from control.node_tls import NodeLines, NoLine
from control.operations import Operation, Result
from control.router_line import Figures, RouterLine
from control.router_view import RouterView
from control.routes import direct, figures, oip, router
from control.routes.access import Access, Caller, Route, add_passing_routes, render_error
from control.routing import Routing
from packer.certificates import parse_cas
from packer.durable import write_private
from packer.http import ApiError, json_response, protect, runner
from packer.identity import BadIdentity, Identity

log = logging.getLogger("bunk.router")

# Requests that are being answered may take this long to end at an orderly stop.
STOP_S = 10.0
RETRY_VIEW_MS = 1_000


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Everything that an operator chooses."""

    data_dir: Path
    control_url: str
    name: str
    listen: Address
    token_file: Path | None = None
    ready_file: Path | None = None
    plain_routes: bool = False
    url: str = ""  # where load balancers or tenants reach --listen, for people; empty: as it listens


@dataclass(frozen=True, slots=True)
class RouterHealth:
    """``view_age_ms``: since this router last knew all that control knew. It grows while control is away, and
    the router routes on."""

    status: str
    view_age_ms: int
    connected: bool


class RouterPapers:
    """The router shows the certificate that control gave it."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    @property
    def cluster(self) -> str:
        return self._identity.cluster

    @property
    def cas(self) -> Sequence[x509.Certificate]:
        answer = self._identity.answer
        return parse_cas(answer.ca_pem) if answer is not None else ()

    def now_s(self) -> float:
        return self._identity.now_s()

    def load(self, context: ssl.SSLContext) -> None:
        if self._identity.answer is None:
            raise NoLine("this router has not joined")
        self._identity.certify(context)

    def renew(self) -> None:
        """The identity has the new one already."""


class Router(Routing):
    """Made by ``start``, given back by ``stop``; ``run`` until it may route no more."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.identity = Identity(config.data_dir / "identity")
        self.url = config.url
        self.view = RouterView(self.catalog, self.cluster, self.now_ms, lambda url: self.line.dialled(url))
        self.line = RouterLine(
            self.identity,
            config.control_url,
            config.name,
            config.token_file,
            self.view,
            lambda: Figures(self.url, self.cluster.in_flight, self.routed.calls),
            self.wake_waiting,
        )
        self._app_runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Listen; routes answer once control has said what there is. Returns the URL."""
        papers = RouterPapers(self.identity)
        self.lines = NodeLines(papers, lambda: self.catalog, self.cluster, plain=self.config.plain_routes)
        self.identity.watch(self.lines.renew)
        self.session = open_session()
        self._app_runner = runner(build_router_app(self), STOP_S)
        await self._app_runner.setup()
        listen = self.config.listen
        try:
            await web.TCPSite(self._app_runner, listen.host, listen.port).start()
        except BaseException:
            await self.stop()
            raise
        host, port = self._app_runner.addresses[0][:2]
        url = f"http://{Address(host, port)}"
        self.url = self.url or url
        self._tasks = [
            asyncio.create_task(self.line.run()),
            asyncio.create_task(self.each_second({"tick": self._tick})),
        ]
        if self.config.ready_file is not None:
            write_private(self.config.ready_file, json.dumps({"url": url}).encode())
        log.info("routing at %s", url)
        return url

    async def failed(self) -> BadIdentity:
        """Returns why this router may route no more, once it may not."""
        try:
            await asyncio.shield(self._tasks[0])
        except BadIdentity as error:
            return error
        raise RuntimeError("the line to control ended")

    async def stop(self) -> None:
        """Take no more requests, let those under way end within ``STOP_S``."""
        self.stopping = True
        if self.config.ready_file is not None:
            with suppress(FileNotFoundError):
                self.config.ready_file.unlink()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._app_runner is not None:
            await self._app_runner.cleanup()
        await self.session.close()

    def check_ready(self) -> None:
        """Raises ``ApiError`` 503 until control has said what there is: no key is known before."""
        if not self.view.is_ready:
            raise ApiError(
                503,
                "router_not_ready",
                "This router has not heard yet what there is: it has just started, or control is away.",
                kind="server_error",
                retry_ms=RETRY_VIEW_MS,
                should_retry=True,
            )

    def act(self, actions: Sequence[fleet.Action]) -> None:
        """Nothing to carry out: nodes get their plans from control, which says what of them is to be said."""

    def _tick(self) -> None:
        self.act(fleet.step(self.cluster, fleet.Ticked(), self.now_ms()))
        rooms.settle(self.cluster, rooms.SETTLED_MAX)


# --- routes ---------------------------------------------------------------------------------------


async def healthz(routing: Router, request: web.Request, caller: Caller) -> web.Response:
    if routing.stopping:
        raise ApiError(503, "stopping", "This router is stopping.", kind="server_error")
    routing.check_ready()
    age_ms = 0 if routing.line.connected else routing.now_ms() - (routing.view.whole_ms or 0)
    return json_response(RouterHealth("ok", age_ms, routing.line.connected))


async def pass_route(routing: Router, request: web.Request, caller: Caller) -> web.Response:
    """Control's answer, since it alone signs tickets; while it is away the one without nodes, by which the
    caller goes on calling here."""
    spec = direct.asked_model(routing, request, caller)
    query = request.raw_path.partition("?")[2].partition("#")[0]
    answer = await routing.line.route(query, request.headers["Authorization"])
    if answer is None:
        return json_response(direct.DirectAnswer(str(spec.ref), (), direct.REFRESH_MS, direct.REFRESH_MS))
    return web.Response(status=answer.status, body=answer.body, content_type="application/json")


ROUTES: tuple[Route[Router], ...] = (
    Route(
        "GET",
        "/healthz",
        Access.OPEN,
        healthz,
        stays=False,
        operation=Operation("showHealth", "Does it serve?", [Result(200, "It does.", RouterHealth)]),
    ),
    *direct.routes(pass_route),
    *figures.ROUTES,
    *router.ROUTES,
    *oip.ROUTES,
)


def build_router_app(routing: Router) -> web.Application:
    """What tenants and load balancers call."""
    app = web.Application()
    add_passing_routes(app, routing, ROUTES, heads=True)
    protect(app, render_error)
    return app
