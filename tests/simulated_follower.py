"""A router that is a process of its own, in a simulated cluster: it hears control over a line that loses.

Covers: asking for the feed through the real route, losing questions and answers, old answers that come again,
pieces that end half-way, control's crashes, backups that were put back, its own; and that what it knows
in the end is what control knows. Does not cover: carrying calls (they go through control's own router).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from simulated_control import SimulatedControl

from control import cluster as fleet_core
from control.catalog import Catalog, RouterRow
from control.router_view import RouterView, Snapshot
from control.router_wire import RouterAnswer, RouterAsk
from control.routes.routers import answer_view
from control.store import StoreUnavailable
from packer.http import ApiError
from packer.wire import WIRE_VERSION, BadMessage

if TYPE_CHECKING:
    from cluster_simulation import Fleet

ROW = RouterRow("r1", "r1", "key of r1", 0)
PAUSE_S = 2
# What takes control longer is over by then, or it has crashed.
PATIENCE_S = 30


async def _answer(
    control: SimulatedControl, ask: RouterAsk, answered: asyncio.Future[RouterAnswer | None]
) -> None:
    """In control's process, which may die meanwhile."""
    answer = None
    try:
        # Not through the disk: what chance decides there would be another history for everybody else.
        control.catalog.routers.setdefault(ROW.router, ROW)
        answer = await answer_view(control, ROW, ask, None)
    except (ApiError, StoreUnavailable):
        pass
    finally:
        if not answered.done():
            answered.set_result(answer)


class Follower:
    """``step`` is the core's own: what the fleet's judges know of steps is about control's."""

    def __init__(self, fleet: Fleet, step: Callable[..., Any]) -> None:
        self._fleet = fleet
        self._step = step
        self._chance = Random(f"follower {fleet.seed}")
        self._lose = self._chance.choice((0.0, 0.1, 0.5))
        self._earlier: list[RouterAnswer] = []
        self._restarts = Random(f"restarts of the follower {fleet.seed}")
        self._kept: Snapshot | None = None
        self._lives = 0
        self._new_view()

    async def run(self) -> None:
        """Beside everything else, until cancelled."""
        while True:
            await asyncio.sleep(self._chance.randrange(1, PAUSE_S * 10) / 10)
            await self.ask(self._lose)
            if self.view.is_ready and self._restarts.random() < 0.2:
                self._kept = self.view.snapshot()
            if self._kept is not None and self._restarts.random() < 0.05:
                self._start_again(self._kept)

    def _start_again(self, kept: Snapshot) -> None:
        """With what it kept a while ago; control may be away or not."""
        self._new_view()
        watched, fleet_core.step = fleet_core.step, self._step
        try:
            self.view.take_kept(tuple(kept.words()), kept.epoch, kept.seq, 0)
            fleet_core.check(self.cluster)
        finally:
            fleet_core.step = watched
        again = self.view.snapshot()
        self._fleet.require(again == kept, "a router was started again with something else")
        self._fleet.reached["a router was started again with what it kept"] += 1

    def _new_view(self) -> None:
        self._lives, self._told = self._lives + 1, ""
        self.catalog, self.cluster = Catalog(), fleet_core.Cluster()
        self.view = RouterView(self.catalog, self.cluster, lambda: 0)

    async def ask(self, lose: float) -> bool:
        """One question; whether all that there is was heard."""
        fleet, view = self._fleet, self.view
        process = fleet.control_process
        if not fleet.control.ready or process is None or self._chance.random() < lose:
            return False
        life = f"life {self._lives}"
        ask = RouterAsk(WIRE_VERSION, life, 1, view.have, 0, view.epoch, view.start, told=self._told)
        answered: asyncio.Future[RouterAnswer | None] = asyncio.get_running_loop().create_future()
        process.spawn(_answer(fleet.control, ask, answered))
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await answered
        except TimeoutError:
            return False
        if answer is None:
            return False
        if self._chance.random() < lose:
            fleet.reached["a router's answer was lost"] += 1
            view.lose_pieces()
            return False
        if lose and self._earlier and self._chance.random() < 0.2:
            self._take(replace(self._chance.choice(self._earlier)))
            fleet.reached["an old answer came to a router again"] += 1
        self._earlier = [*self._earlier[-3:], answer]
        self._told = answer.told
        require = fleet.require
        require(not fleet.control.routers.is_cloned(ROW.router), "a restart of a router is taken for a copy")
        return self._take(answer) and view.is_whole

    def _take(self, answer: RouterAnswer) -> bool:
        watched, fleet_core.step = fleet_core.step, self._step
        try:
            was = self.view.start
            self.view.take(answer)
            fleet_core.check(self.cluster)
            self._fleet.reached["a router heard a control that was started again"] += bool(
                was and was != answer.start
            )
        except BadMessage:
            self._fleet.reached["a router took no old answer"] += 1
            return False
        finally:
            fleet_core.step = watched
        return True

    async def judge(self) -> None:
        """After it has heard everything, it knows what control knows, and no more."""
        for _ in range(100):
            if await self.ask(0.0):
                break
        require, control = self._fleet.require, self._fleet.control
        require(self.view.start == control.start_name, "a router does not hear control any more")
        keys = {key: row.secret_sha256 for key, row in control.catalog.keys.items() if row.tenant}
        require({k: row.secret_sha256 for k, row in self.catalog.keys.items()} == keys, "a router's keys")
        require(set(self.catalog.models) == set(control.catalog.models), "a router's models")
        require(self.catalog.latest == control.catalog.latest, "a router's newest versions")
        require(set(self.cluster.nodes) == set(control.cluster.nodes), "a router's nodes")
        for name, theirs in control.cluster.nodes.items():
            mine = self.cluster.nodes[name]
            if theirs.report is None:
                continue
            said = (theirs.silent, theirs.cloned, theirs.have, theirs.near, theirs.kept)
            require((mine.silent, mine.cloned, mine.have, mine.near, mine.kept) == said, f"a router's {name}")
