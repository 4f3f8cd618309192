"""The control server of a simulated cluster: the real state, cluster core and routes over a store in memory.

Covers: starting and dying with a slow and failing database, what each path answers, what operators do,
and calls through the real router. Does not cover: HTTP, certificates, and tokens' secrets
(``test_control``, ``attacks/test_join``).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TypeVar, cast

from simulated_hands import GRID_MS
from simulated_network import Answered, Process, of_the_living

from control import cluster as fleet
from control.authority import Authority
from control.catalog import Change, NodeRow, model_arrival, model_removal
from control.choosing import choose_node, equally_good
from control.config import Config
from control.routes.access import Caller
from control.routes.forwarding import Call, NodeUnreachable, first_answer
from control.routes.joining import add_node
from control.routes.nodes import answer_beat, answer_sources, decode_message, remove_node
from control.routes.shares import answer_shares
from control.routing import Routing
from control.shown import ShownCertificates
from control.state import Control
from control.store import Store, StoreUnavailable
from packer.gangs import share_bytes
from packer.http import ApiError
from packer.types import BadValue, ModelName, ModelSpec
from packer.wire import WIRE_VERSION, Beat, JoinAnswer, JoinAsk, SharesAsk, SourcesAsk, encode

T = TypeVar("T")
CLUSTER = "c0ffee"
# What a caller sees when the node goes away in mid-answer.
LOST = 599


@dataclass(slots=True)
class DiskFaults:
    """How slow and how faulty a disk is: steps per call, and the chance that one fails."""

    steps: int
    fail: float
    calm: bool = False
    full: bool = False  # every call fails until it is not


@dataclass(slots=True)
class Reply:
    """A node's answer to a routed call: its head, and when it has ended or broken off."""

    status: int
    end: asyncio.Future[None]
    left: Callable[[], None]
    code: str = ""

    def close(self) -> None:
        self.left()


class Disk:
    """Calls one after the other, each of which takes a while and may fail, before or after a crash."""

    def __init__(self, rng: Random, faults: DiskFaults, failure: Callable[[], Exception]) -> None:
        self._rng = rng
        self._faults = faults
        self._failure = failure
        self._busy = asyncio.Lock()

    async def call(self, work: Callable[[], T]) -> T:
        async with self._busy:
            await self._wait()
            faults = self._faults
            if not faults.calm and (faults.full or self._rng.random() < faults.fail):
                raise self._failure()
            of_the_living()
            done = work()
            # A crash in here finds the work done and nobody told.
            await self._wait()
            return done

    async def _wait(self) -> None:
        steps = 0 if self._faults.calm else self._rng.randrange(self._faults.steps + 1)
        await asyncio.sleep(steps * GRID_MS / 1000)


class SimulatedControl(Control):
    """One life of the server. ``store`` outlives it."""

    def __init__(self, store: Store, disk: Disk, skew_ms: int, start_name: str) -> None:
        super().__init__(Config(Path("no-directory-is-touched")))
        self._store = store
        self._disk = disk
        self._skew_ms = skew_ms
        self.start_name = start_name
        # Certificates are not of this world.
        nothing = SimpleNamespace(ca_pem="", ca_sha256="", advance=lambda all_trust: None)
        self.authority = cast(Authority, nothing)
        self.shown = cast(ShownCertificates, SimpleNamespace(tick=lambda now_ms: None))
        self.ready = False
        self.ready_event = asyncio.Event()

    async def _on(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await self._disk.call(call)

    def now_ms(self) -> int:
        return round(asyncio.get_running_loop().time() * 1000) + self._skew_ms

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + self.now_ms()

    async def run(self) -> None:
        while not self.ready:
            try:
                self.meta = await self._on(self._writer, lambda: self._store.start(CLUSTER))
                self.catalog = await self._on(self._writer, self._store.load)
                self.ready = True
                self.ready_event.set()
            except StoreUnavailable:
                await asyncio.sleep(1)  # whoever supervises the process starts it again
        self.remember_nodes()
        self.run_background()

    # --- nodes ------------------------------------------------------------------------------------

    async def serve(self, node: str, path: str, data: bytes) -> Answered:
        try:
            return 200, await self._serve(node, path, data)
        except ApiError as error:
            return error.status, error.code.encode()
        except BadValue as error:
            return 400, str(error).encode()
        except StoreUnavailable as error:
            return 503, str(error).encode()

    async def _serve(self, node: str, path: str, data: bytes) -> bytes:
        if path == "/node/v1/join":
            return await self._join(decode_message(data, JoinAsk))
        row = self.catalog.nodes.get(node)
        if row is None:
            raise ApiError(403, "unknown_node", "removed")
        if path == "/node/v1/beat":
            return self.encode_answer(await answer_beat(self, row, decode_message(data, Beat), None))
        if path == "/node/v1/shares":
            return encode(await answer_shares(self, row, decode_message(data, SharesAsk)))
        assert path == "/node/v1/sources"
        return encode(await answer_sources(self, row, decode_message(data, SourcesAsk)))

    async def _join(self, ask: JoinAsk) -> bytes:
        """As ``routes.nodes.join``, with a token whose secret is the next incarnation's name."""
        async with self.writing:
            known = self.catalog.nodes.get(ask.name)
            row = known or NodeRow(ask.name, ask.token_secret, f"key of {ask.name}", ask.gateway_url, 0)
            await add_node(self, row, [])
        return encode(JoinAnswer(WIRE_VERSION, self.meta.cluster, ask.name, "", ""))

    # --- operators --------------------------------------------------------------------------------

    async def change(self, changes: Callable[[], Sequence[Change]]) -> None:
        async with self.writing:
            await self.write(changes())

    async def push(self, spec: ModelSpec) -> None:
        await self.change(lambda: model_arrival(self.catalog, spec))

    async def drop_model(self, model: ModelName, version: str | None) -> None:
        await self.change(lambda: model_removal(self.catalog, model, version))

    async def remove(self, node: str) -> None:
        await remove_node(self, node)

    # --- callers ----------------------------------------------------------------------------------

    def point(self, spec: ModelSpec) -> None:
        """Tell a tenant's program where to call the model itself, as ``routes.direct`` does."""
        nodes = choose_node(self.cluster, spec.ref, share_bytes(spec), self.now_ms(), spec.devices)
        for node in equally_good(self.cluster, nodes, spec.ref, self.now_ms())[:1]:
            pointed = fleet.Pointed(node, spec.ref, share_bytes(spec), spec.devices)
            self.act(fleet.step(self.cluster, pointed, self.now_ms()))

    async def route(self, spec: ModelSpec, send: Callable[[str], Awaitable[Reply]]) -> int:
        """A tenant's call through the router, to its end; the status that the tenant sees."""

        async def sent(control: Routing, node: str, call: Call) -> Reply:
            return await send(node)

        try:
            node, reply = await first_answer(self, Caller(), Call(spec, "POST", "", "", {}, b""), sent)
        except ApiError as error:
            return error.status
        reached = False
        try:
            await reply.end
            reached = True
            return reply.status
        except NodeUnreachable:
            return LOST
        finally:
            reply.close()
            self.act(
                fleet.step(self.cluster, fleet.Answered(node, reached, spec.ref, reply.status), self.now_ms())
            )


def copy_of(store: Store) -> Store:
    """A backup of the database as it is now."""
    backup = Store(Path(":memory:"))
    source: sqlite3.Connection = store._db.conn
    source.backup(backup._db.conn)
    return backup


def spawn_reply(
    process: Process,
    control: SimulatedControl,
    node: str,
    path: str,
    data: bytes,
    answer: Callable[[Answered | None], None],
) -> None:
    async def reply() -> None:
        try:
            said = await control.serve(node, path, data)
        except asyncio.CancelledError:
            answer(None)
            raise
        answer(said)

    process.spawn(reply())
