"""A control server with two nodes whose gateways answer as a test says.

Covers: recording what reaches a node, scripted answers, a tenant with one model that both nodes know.
Does not cover: the real gateway (``fake_node``) or a node's side of the wire (``running_control``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web
from running_control import Answer, FakeNode, Running, empty_report, model_files, model_report, running

Respond = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Gateway:
    """A node's gateway that records what reaches it and answers as the test says."""

    name: str
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    respond: Respond | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request.method, request.path_qs, dict(request.headers), body))
        try:
            if self.respond is not None:
                return await self.respond(request, body)
            headers = {"x-bunkhouse-node": self.name, "x-bunkhouse-tier": "disk", "x-request-id": "req_n"}
            return web.json_response({"node": self.name}, headers=headers | {"x-secret": "s"})
        except asyncio.CancelledError:
            self.left.set()
            raise


@asynccontextmanager
async def gateway(name: str) -> AsyncIterator[Gateway]:
    made = Gateway(name)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()


@dataclass(slots=True)
class Fleet:
    """A control server, one tenant with one model, and two joined nodes that know it."""

    control: Running
    key: str
    ref: str
    gateways: tuple[Gateway, Gateway]
    nodes: tuple[FakeNode, FakeNode]
    folder: Path

    async def beat(self, position: int, state: str = "absent", **changes: int) -> None:
        """Let a node take the newest plan and report the model."""
        node, at = self.nodes[position], self.gateways[position].url
        await node.beat(self.folder)
        await node.beat(self.folder, report=empty_report(at, (model_report(self.ref, state, **changes),)))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    async def embed(self, model: str = "acme/m", path: str = "/v1/embeddings") -> Answer:
        return await self.control.call("POST", path, {"model": model, "input": "x"}, key=self.key)


@asynccontextmanager
async def routed_fleet(folder: Path) -> AsyncIterator[Fleet]:
    """The model is resident on the first node and nowhere on the second."""
    async with running(folder / "control") as control, gateway("n0") as first, gateway("n1") as second:
        key = await control.tenant("acme")
        model = await control.push("acme", "m", model_files())
        nodes = (await control.join("n0", first.url), await control.join("n1", second.url))
        made = Fleet(control, key, model["ref"], (first, second), nodes, folder)
        await made.beat(0, "resident")
        await made.beat(1)
        yield made
