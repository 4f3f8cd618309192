"""A router that is a process of its own: tenants' listener, and a line to control instead of control's state.

Covers: building its application out of the routes that control's own router has, its health, start and
orderly stop, and what stops it. Does not cover: the routes (``control.routes``), the line
(``control.router_line``), or the command line (``control.router_command``).

On disk it keeps its identity, and what control last told it (``control.kept_view``). Any number of them may
stand behind a TCP load balancer: none counts anything that another would have to know, since nodes enforce
the limits.
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
from control.kept_view import KeptView, ViewKeeper
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
from packer.identity import BadIdentity, Identity, box_facts
from packer.joining import Removed
from packer.wire import BadMessage

log = logging.getLogger("bunk.router")

# Requests that are being answered may take this long to end at an orderly stop.
STOP_S = 10.0
RETRY_VIEW_MS = 1_000
# A control that has not answered by then is away: what was kept is used.
KEPT_AFTER_S = 2.0


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
    the router routes on. ``kept``: it was started meanwhile, and knows what it kept before."""

    status: str
    view_age_ms: int
    connected: bool
    kept: bool


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
        self.identity.box = box_facts(())
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
        self.keeper = ViewKeeper(
            config.data_dir, self.identity, self.view, self.view_age_ms, lambda: self.line.control_at
        )
        self.settled = asyncio.Event()  # whether to go by what was kept
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
            asyncio.create_task(self.each_second({"keep": self.keeper.look})),  # a disk may be slow
            asyncio.create_task(self._fall_back()),
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
            if isinstance(error, Removed):
                await self.keeper.forget()
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
        await self.keeper.close()
        await self.session.close()

    def view_age_ms(self) -> int:
        """How old what this router knows is; 0 while control would tell it."""
        return 0 if self.line.connected else self.now_ms() - (self.view.whole_ms or 0)

    async def _fall_back(self) -> None:
        """When control does not answer now, route by what it said before this router was stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(KEPT_AFTER_S):
                await self.line.tried.wait()
        try:
            kept = None if self.view.is_ready else await self.keeper.load()
            if kept is not None and not self.view.is_ready:
                self._go_by(kept)
        except Exception as error:
            self.log_fault("what was kept", error, unforeseen=True)
        self.settled.set()

    def _go_by(self, kept: KeptView) -> None:
        age_ms = max(0, round(self.identity.now_s() * 1000) - kept.heard_ms)
        self.line.was_at(kept.control_at)
        try:
            self.view.take_kept(kept.words, kept.epoch, kept.seq, age_ms)
        except BadMessage as error:
            log.warning("what is kept in %s is not used: %s", self.keeper.path, error)
            return
        log.warning("control does not answer: routing as it said %d s ago", age_ms / 1000)
        self.wake_waiting()

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
    health = RouterHealth("ok", routing.view_age_ms(), routing.line.connected, routing.view.is_kept)
    return json_response(health)


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
