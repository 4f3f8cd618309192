"""A seeded cluster: nodes, control, operators and callers, over a network and disks that misbehave.

Covers: drawing a cluster and its faults from a seed; the phase in which everything fails now and then, and
the phase in which nothing does; operators' changes, crashes, backups that are put back; calls straight to
nodes and through the router. Does not cover: one node's own world (``simulation``), what is asserted at the
end (``cluster_judges``) or over many seeds (``test_cluster_simulation``).

Everything runs on a clock that jumps (``virtual_clock``), mostly on a coarse grid, so that things coincide.
What is simulated are the network, the disks, the workers and the people; the rest is what runs in
production: both cores, the uplink, the keeper, the search for packs, control's state, routes and router.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import cluster_judges
from copies_judge import copies_watched
from share_judge import ShareJudge
from simulated_control import Disk, DiskFaults, SimulatedControl, copy_of, spawn_reply
from simulated_follower import Follower
from simulated_hands import GRID_MS, Violated
from simulated_member import Member
from simulated_network import Answered, Network, NetworkFaults, Process, task_factory
from virtual_clock import VirtualLoop, run_virtual

from agent import shares as agent_shares
from control import cluster as fleet_core
from control import shares as share_core
from control.catalog import Change, PutQuota, PutTenant, TenantRow, tenant_removal
from control.share_book import ShareBook
from control.share_book import check as check_shares
from control.store import Store, StoreUnavailable
from packer import joining, residency
from packer.http import ApiError
from packer.shares import MARGIN_MS, TERM_MS
from packer.types import MIB, ByteQuota, ModelRef, ModelSpec, Task, TenantQuota
from packer.wire import Plan

FAULTS_S = 100
# Faults have ended: every node is back, and has the newest plan, within this time.
ARRIVE_S = 70
# Without faults a change reaches every node by the poll that it holds open.
NEWS_S = 2
# Calls of the second phase come in waves that no queue's bound can refuse.
WAVE_S = 30
WAVE_CALLS = 4
# All of a rush have called by then.
RUSH_S = 20
# Everything is answered within this time after the last wave.
REST_S = 600
# A turn at the origin that nobody renews is over by then.
TURNS_S = 40
WORKSPACE_BYTES = MIB


class Fleet:
    """One run; ``seed`` decides everything that happens in it."""

    def __init__(self, seed: int, core: ModuleType = residency, full: bool = False) -> None:
        self.seed = seed
        self.core = core
        self.full = full
        self.rng = rng = Random(f"fleet {seed}")
        self.rushing = Random(f"rushes {seed}")  # of its own: other histories stay what they were
        self.grouping = Random(f"gangs {seed}")
        self.reached: Counter[str] = Counter()
        self.trace: list[str] = []
        self.digest = hashlib.sha256()
        self.notes = self.routed = self.joins = self.versions = self.starts = 0
        self.calm = self.asking = self.over = False
        self.wall_ms = 1_700_000_000_000
        self.specs: dict[ModelRef, ModelSpec] = {}
        self.issued: dict[tuple[int, int, str], bytes] = {}
        self.statuses: dict[str, int] = {}
        self.shares = ShareJudge(self)
        self.term_ms = rng.choice((5_000, 20_000, TERM_MS))
        self.backup: Store | None = None
        self.restored = False
        self.reading: dict[tuple[ModelRef, str], None] = {}
        self.newest_report: dict[str, int] = {}
        self.tenants_dropped: dict[str, None] = {}
        faults = NetworkFaults(
            delay_steps=rng.choice((1, 5, 20)),
            lose=rng.choice((0.0, 0.05, 0.3)),
            repeat=rng.choice((0.0, 0.1)),
            cut_short=rng.choice((0.0, 0.05)),
            foreign=rng.choice((0.0, 0.05)),
            part=rng.choice((0.0, 0.05)),
        )
        self.network = Network(Random(f"network {seed}"), faults, self.note)
        self.network.serve = self._serve
        self.disk_faults = DiskFaults(rng.choice((0, 1, 5)), rng.choice((0.0, 0.0, 0.1)))
        self.crash = rng.choice((0.0, 0.02, 0.1))
        self.control_crash = rng.choice((0.0, 0.01, 0.05))
        self.fill = rng.choice((0.0, 0.05))
        self.put_back = rng.choice((0.0, 0.02, 0.05))
        self.operate = rng.choice((0.05, 0.3))
        self.members: dict[str, Member] = {}
        self.control: SimulatedControl
        self.control_process: Process | None = None
        self.follows = False  # a router beside control's own; other histories stay what they were
        self.follower = Follower(self, fleet_core.step)

    # --- running ----------------------------------------------------------------------------------

    def run(self) -> Fleet:
        """Both phases and the judgement; raises what is wrong."""
        with _quiet(), self._watched(), copies_watched(self):
            run_virtual(self._main())
        for member in self.members.values():
            self.reached += member.reached
            self.digest.update(member.digest.digest())
        self.reached.update(self.network.reached)
        return self

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.set_task_factory(task_factory)  # type: ignore[arg-type]  # a loop gives coroutines only
        loop.set_exception_handler(self._unforeseen)
        self.broken: asyncio.Future[None] = loop.create_future()
        self.store = Store(Path(":memory:"))
        life = asyncio.ensure_future(self._live())
        await asyncio.wait([life, self.broken], return_when=asyncio.FIRST_COMPLETED)
        if self.broken.done():
            life.cancel()
            self.broken.result()
        life.result()
        self.over = True  # what unwinds from here on does so in no order
        for process in [self.control_process, *(member.process for member in self.members.values())]:
            if process is not None:
                process.kill()
        for member in self.members.values():
            member.journal.close()

    def broke(self, error: BaseException) -> None:
        if not self.broken.done():
            self.broken.set_exception(error)
            self.broken.exception()

    def _unforeseen(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not isinstance(error, StoreUnavailable):
            self.broke(error)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            now_ms = round(asyncio.get_running_loop().time() * 1000)
            raise Violated(f"seed {self.seed}, {now_ms} ms: {what}")

    def note(self, line: str) -> None:
        """The trace: every message and every step of control's core (nodes keep their own)."""
        if self.over:
            return
        line = f"{round(asyncio.get_running_loop().time() * 1000)} {line}"
        self.digest.update(line.encode())
        if self.full:
            self.trace.append(line)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Control's core tells every step, and is checked after each; pauses are the same every time."""
        real = fleet_core.step
        chances = Random(f"jitter {self.seed}")
        real_jitter = joining.jitter

        def step(
            cluster: fleet_core.Cluster, event: fleet_core.Event, now_ms: int
        ) -> list[fleet_core.Action]:
            actions = real(cluster, event, now_ms)
            self.note(f"{type(event).__name__} {_short(event)} {actions}")
            try:
                fleet_core.check(cluster)
                cluster_judges.judge_step(self, cluster, event, actions, now_ms)
            except Exception as error:
                self.broke(error)
                raise
            return actions

        real_divide = share_core.step

        def divide(book: ShareBook, event: share_core.Event, now_ms: int) -> list[share_core.Action]:
            actions = real_divide(book, event, now_ms)
            self.note(f"{type(event).__name__} {event} {actions}")
            try:
                check_shares(book)
            except Exception as error:
                self.broke(error)
                raise
            self.reached.update(type(action).__name__ for action in actions)
            return actions

        fleet_core.step, joining.jitter = step, lambda: chances.choice((0.5, 1.0, 1.5))
        share_core.step = divide
        agent_shares.TERM_MS = self.term_ms  # type: ignore[attr-defined]
        share_core.FREE_AFTER_MS = self.term_ms + MARGIN_MS
        try:
            yield
        finally:
            fleet_core.step, joining.jitter = real, real_jitter
            share_core.step = real_divide
            agent_shares.TERM_MS = TERM_MS  # type: ignore[attr-defined]
            share_core.FREE_AFTER_MS = TERM_MS + MARGIN_MS

    # --- life -------------------------------------------------------------------------------------

    async def _live(self) -> None:
        self.start_control()
        following = asyncio.ensure_future(self.follower.run()) if self.follows else None
        for i in range(self.rng.choice((1, 2, 3, 3))):
            name = f"n{i}"
            self.members[name] = member = Member(self, name, self.rng.randrange(1 << 30))
            self._give_token(member)
            member.start()
        for i in range(self.rng.randrange(1, 4)):
            self._operate(partial(self._put_tenant, f"t{i}"))
        for _ in range(self.rng.randrange(2, 8)):
            self._operate(self._push)
        for _ in range(self.rng.choice((20, 100, 300))):
            self._at(self.rng.randrange(0, FAULTS_S * 1000, GRID_MS), self._ask)
        for at_ms in range(0, FAULTS_S * 1000, 500):
            self._at(at_ms, self._mishap)
        for _ in range(self.rushing.choice((0, 2, 6))):
            self._at(self.rushing.randrange(0, FAULTS_S * 1000, GRID_MS), self._rush)
        await asyncio.sleep(FAULTS_S)
        await self._heal()
        cluster_judges.judge_arrival(self)
        await self._try(self._push())
        await asyncio.sleep(NEWS_S)
        cluster_judges.judge_arrival(self)
        if following is not None:
            following.cancel()
            await self.follower.judge()
        self._rush()
        await asyncio.sleep(RUSH_S)
        await self._ask_everything()

    def _at(self, at_ms: int, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_at(at_ms / 1000, self._safely, call)

    def _safely(self, call: Callable[[], None]) -> None:
        try:
            if not self.broken.done():
                call()
        except Exception as error:
            self.broke(error)

    async def _heal(self) -> None:
        self.calm = self.disk_faults.calm = True
        self.network.heal()
        self.start_control()
        for member in self.members.values():
            member.heal()
        for _ in range(ARRIVE_S):
            for name, member in self.members.items():
                if not member.up:
                    if self.control.ready and name not in self.control.catalog.nodes:
                        self._give_token(member)
                    member.start()
            await asyncio.sleep(1)
            if self.control.ready and not self.statuses.get("quotas"):
                self.statuses["quotas"] = 1
                await self._try(self.control.change(self._calm_quotas))

    async def _ask_everything(self) -> None:
        specs = list(self.control.catalog.models.values())
        self.asking = True
        for i, spec in enumerate(specs):
            at_s = i // WAVE_CALLS * WAVE_S
            for member in self.members.values():
                self._later(at_s, partial(member.ask_calm, f"calm{i}", spec))
            self._later(at_s + WAVE_S // 2, partial(self._route, spec, f"calm {i}"))
        await asyncio.sleep(len(specs) // WAVE_CALLS * WAVE_S + WAVE_S)
        for _ in range(REST_S):
            if all(member.idle for member in self.members.values()):
                break
            await asyncio.sleep(1)
        await asyncio.sleep(TURNS_S)
        cluster_judges.judge_end(self)

    def _later(self, after_s: float, call: Callable[[], None]) -> None:
        self._at(round((asyncio.get_running_loop().time() + after_s) * 1000), call)

    # --- control ----------------------------------------------------------------------------------

    def start_control(self) -> None:
        if self.control_process is not None:
            return
        disk = Disk(self.rng, self.disk_faults, lambda: StoreUnavailable("no space"))
        self.starts += 1
        self.newest_report.clear()
        skew_ms = self.rng.randrange(0, 3_600_000, GRID_MS)
        self.control = SimulatedControl(self.store, disk, skew_ms, f"start{self.starts}")
        self.control_process = Process("control", self.broke)
        self.control_process.spawn(self.control.run())

    def _crash_control(self) -> None:
        if self.control_process is not None:
            self.reached["control crashed"] += 1
            self.reached["control crashed during a turn"] += bool(self.control.cluster.turns)
            self.control_process.kill()
            self.control_process = None

    def _serve(self, node: str, path: str, data: bytes, answer: Callable[[Answered | None], None]) -> bool:
        if self.control_process is None or not self.control.ready:
            return False
        spawn_reply(self.control_process, self.control, node, path, data, answer)
        return True

    def _give_token(self, member: Member) -> None:
        """An operator makes a join token and puts it on the box."""
        self.joins += 1
        member.papers.answer = None
        member.papers.token = f"{member.name}-{self.joins}"

    async def _try(self, work: Coroutine[Any, Any, None]) -> None:
        """An operator's command, which may be refused."""
        with suppress(StoreUnavailable, ApiError):
            await work

    def _operate(self, command: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self.control_process is not None:
            self.control_process.spawn(self._when_ready(command))

    async def _when_ready(self, command: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self.control.ready_event.wait()
        await self._try(command())

    # --- operators --------------------------------------------------------------------------------

    async def _put_tenant(self, name: str) -> None:
        changes = (PutTenant(TenantRow(name, 0)), PutQuota(name, self._quota()))
        await self.control.change(lambda: changes)

    def _quota(self) -> TenantQuota:
        rng = self.rng
        return TenantQuota(
            device=ByteQuota(rng.choice((0, 0, 30)) * MIB, rng.choice((None, None, 90 * MIB))),
            host=ByteQuota(0, rng.choice((None, 60 * MIB))),
            requests_per_minute=rng.choice((None, None, 60)),
            concurrency=rng.choice((None, 4)),
            tokens_per_minute=rng.choice((None, 600)),
            device_seconds_per_day=rng.choice((None, None, 60)),
            weight=rng.choice((1, 3)),
        )

    def _calm_quotas(self) -> list[Change]:
        quotas = self.control.catalog.quotas
        return [
            PutQuota(name, TenantQuota(device=ByteQuota(0, quota.device.max), weight=quota.weight))
            for name, quota in quotas.items()
        ]

    async def _push(self) -> None:
        tenants = list(self.control.catalog.tenants)
        if not tenants:
            return
        rng = self.rng
        self.versions += 1
        nbytes = rng.choice((4, 10, 24, 40, 60, 150)) * MIB
        ref = ModelRef(rng.choice(tenants), f"m{rng.randrange(6)}", f"{self.versions:016x}")
        count = rng.choice((1, 2, 5))
        ends = [*sorted(rng.randrange(1, nbytes) for _ in range(count - 1)), nbytes]
        chunks = tuple(end - start for start, end in zip([0, *ends], ends, strict=False) if end > start)
        spec = ModelSpec(
            ref,
            "file:///m",
            (),
            "transformers",
            Task.EMBEDDING,
            nbytes,
            chunks,
            WORKSPACE_BYTES,
            self.versions,
            replicas=self.rushing.choice((1, 2, 3)),
            cuts=tuple(range(1, len(chunks))),
        )
        if len(chunks) > 1 and not self.grouping.randrange(3):
            spec = replace(spec, devices=2)
        self.specs[ref] = spec
        await self.control.push(spec)

    async def _drop_model(self) -> None:
        refs = list(self.control.catalog.models)
        if len(refs) > 1:
            ref = self.rng.choice(refs)
            await self.control.drop_model(ref.model, self.rng.choice((None, ref.version)))

    async def _change_quota(self) -> None:
        tenants = list(self.control.catalog.tenants)
        if tenants:
            change = PutQuota(self.rng.choice(tenants), self._quota())
            await self.control.change(
                lambda: [change] if change.tenant in self.control.catalog.tenants else []
            )

    async def _drop_tenant(self) -> None:
        tenants = list(self.control.catalog.tenants)
        if len(tenants) > 1:
            tenant = self.rng.choice(tenants)
            self.tenants_dropped[tenant] = None
            self.reached["a tenant was removed"] += 1
            await self.control.change(lambda: tenant_removal(self.control.catalog, tenant))

    async def _remove_node(self) -> None:
        nodes = list(self.control.catalog.nodes)
        if nodes:
            self.reached["a node was removed"] += 1
            await self.control.remove(self.rng.choice(nodes))

    # --- mishaps ----------------------------------------------------------------------------------

    def _chance(self, share: float) -> bool:
        return self.rng.random() < share

    def _mishap(self) -> None:
        rng = self.rng
        self.wall_ms += 500
        if self._chance(0.1):
            self.wall_ms += rng.choice((-60_000, 60_000))
        self.network.look(list(self.members))
        for disk in (self.disk_faults, *(member.journal_faults for member in self.members.values())):
            if self._chance(self.fill / 4 if not disk.full else 0.05):
                disk.full = not disk.full
                self.reached["a disk was full"] += disk.full
        for member in self.members.values():
            if not member.up:
                if self._chance(0.1):
                    if member.papers.answer is None:
                        self._give_token(member)
                        self.reached["a removed node joined again"] += 1
                    member.start()
            elif self._chance(self.crash / 4):
                self.reached["a node crashed"] += 1
                member.crash()
            else:
                member.act(member._mishap)
                member.slowness = rng.choice((1, 1, 1, 5)) if self._chance(0.05) else member.slowness
        self._mishap_of_control()
        if self._chance(self.operate):
            command = rng.choice(
                (self._push, self._push, self._change_quota, self._change_quota, self._drop_model)
            )
            self._operate(command)
        if self._chance(self.operate / 20):
            self._operate(rng.choice((self._remove_node, self._drop_tenant)))
        if self._chance(self.operate / 20):
            self._operate(partial(self._put_tenant, f"t{rng.randrange(4)}"))

    def _mishap_of_control(self) -> None:
        if self.control_process is None:
            if self._chance(0.2):
                self.start_control()
            return
        if self._chance(self.put_back):
            if self.backup is None:
                self.backup = copy_of(self.store)
            else:
                self._crash_control()
                self.reached["a backup was put back"] += 1
                self.store, self.backup, self.restored = self.backup, None, True
        elif self._chance(self.control_crash):
            self._crash_control()

    # --- callers ----------------------------------------------------------------------------------

    def _ask(self) -> None:
        if not self.specs:
            return
        if self._chance(0.5):
            member = self.rng.choice(list(self.members.values()))
            member.act(member._ask)
        elif self.control_process is not None and self.control.ready and self.control.catalog.models:
            spec = self.rng.choice(list(self.control.catalog.models.values()))
            if self._chance(0.1):
                self.control.point(spec)
                self.reached["a caller was told of a node"] += 1
            self._route(spec, "")

    def _rush(self) -> None:
        """Many call one model for a while."""
        if self.control_process is None or not self.control.ready:
            return
        specs = [spec for spec in self.control.catalog.models.values() if spec.replicas > 1]
        near = [spec for spec in specs if str(spec.ref) in self.control.cluster.near]
        if specs := near or specs:
            spec, now_ms = self.rushing.choice(specs), round(asyncio.get_running_loop().time() * 1000)
            for number in range(self.rushing.choice((20, 90))):
                self._at(now_ms + number // 6 * 5 * GRID_MS, partial(self._route, spec, ""))

    def _route(self, spec: ModelSpec, name: str) -> None:
        if self.control_process is not None:
            self.control_process.spawn(self._routed(spec, name))

    async def _routed(self, spec: ModelSpec, name: str) -> None:
        patience_ms = 400_000 if self.calm else self.rng.choice((1, 20, 200)) * GRID_MS

        async def send(node: str) -> Any:
            return await self.members[node].routed(spec.ref, patience_ms)

        call = asyncio.ensure_future(self.control.route(spec, send))
        if not self.calm and self._chance(0.2):
            asyncio.get_running_loop().call_later(self.rng.randrange(1, 40) * GRID_MS / 1000, call.cancel)
        try:
            status = await call
        except asyncio.CancelledError:
            self.reached["a routed caller left"] += 1
            if not call.cancelled():
                raise
            return
        self.reached[f"routed: {status}"] += 1
        if name:
            self.statuses[name] = status

    def gives(self, peer: Member, asker: Member, ref: ModelRef) -> bool:
        """Would this peer give the pack, as ``agent.peers`` decides it?"""
        plan: Plan | None = peer.keeper.plan if peer.up else None
        if plan is None or not peer.peer_url or self.network.peers_apart(peer.name, asker.name):
            return False
        known = any(known.node == asker.name for known in plan.peers)
        wanted = any(spec.ref == ref for spec in plan.models)
        return known and wanted and peer.readable_pack(ref)

    def judge_reading(self, member: Member, ref: ModelRef) -> None:
        cluster_judges.judge_reading(self, member, ref)

    def judge_plan(self, member: Member, plan: Plan) -> None:
        cluster_judges.judge_plan(self, member, plan)


def _short(event: fleet_core.Event) -> object:
    return replace(event, report=None) if isinstance(event, fleet_core.NodeBeat) else event  # type: ignore[arg-type]


@contextmanager
def _quiet() -> Iterator[None]:
    """What nodes and control log about faults is of no interest here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
