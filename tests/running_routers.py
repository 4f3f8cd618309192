"""A router that is a process of its own, run inside the test's loop, with a line to a running control.

Covers: joining with a token, its listener, a client for it, and somebody who has a router's certificate. Does
not cover: a router as a real process (``test_routers_running``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from running_control import Answer, FakeNode, Running, until

from control.config import Address
from control.router_process import Router, RouterConfig
from control.router_wire import RouterAsk
from control.server import Bound
from packer.wire import WIRE_VERSION, JoinAnswer, JoinAsk, decode, encode


@dataclass(slots=True)
class RunningRouter:
    """``call`` sends to the router as ``Running.call`` does to control, without a key unless one is given."""

    router: Router
    url: str
    _running: Running
    _session: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: object = None, **options: Any) -> Answer:
        bound = Bound(self.url, self._running.bound.node_url)
        here = replace(self._running, bound=bound, session=self._session)
        return await here.call(method, path, body, **{"key": None, **options})

    async def until_heard(self) -> None:
        """It has taken up all that control can tell."""
        control = self._running.server.control

        def heard() -> bool:
            view, feed = self.router.view, control.feed
            feed.settle(1_000_000)
            return view.start == control.start_name and feed.behind(view.have) == 0 and view.is_whole

        await until(heard)


@dataclass(slots=True)
class FakeRouter(FakeNode):
    """Speaks the router's side of the wire with a key of its own."""

    async def join(self, token: str) -> Answer:
        _, token_id, secret = token.split(".")
        self.ca_pem = (await self.call("GET", "/node/v1/ca", verify=False)).body.decode()
        ask = JoinAsk(WIRE_VERSION, token_id, secret, self.csr_pem(), self.name, "")
        joined = await self.call("POST", "/router/v1/join", encode(ask))
        if joined.status == 200:
            self.chain_pem = decode(joined.body, JoinAnswer).certificate_pem
        return joined

    async def ask(self, folder: Path | None, **changes: Any) -> Answer:
        ask = replace(RouterAsk(WIRE_VERSION, "a life", 1, 0, 0), **changes)
        return await self.call("POST", "/router/v1/view", encode(ask), folder=folder)


async def fake_router(control: Running, name: str) -> FakeRouter:
    token = (await control.call("POST", "/api/v1/routers/tokens", {})).json()["token"]
    router = FakeRouter(control.bound.node_url, name, "")
    assert (await router.join(token)).status == 200
    return router


async def router_token(control: Running, folder: Path, **ask: object) -> Path:
    answer = await control.call("POST", "/api/v1/routers/tokens", ask)
    assert answer.status == 201, answer.body
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "router.token"
    path.write_text(answer.json()["token"])
    return path


def router_config(control: Running, folder: Path, name: str, token: Path | None) -> RouterConfig:
    return RouterConfig(folder, control.bound.node_url, name, Address("127.0.0.1", 0), token)


@asynccontextmanager
async def serving(router: Router, control: Running) -> AsyncIterator[RunningRouter]:
    url = await router.start()
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield RunningRouter(router, url, control, session)
    finally:
        await router.stop()


@asynccontextmanager
async def joined_router(control: Running, folder: Path, name: str = "r1") -> AsyncIterator[RunningRouter]:
    """Joined, and told all that control knows."""
    folder.mkdir(parents=True, exist_ok=True)
    token = await router_token(control, folder)
    async with serving(Router(router_config(control, folder, name, token)), control) as running:
        await running.until_heard()
        yield running
