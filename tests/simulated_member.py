"""A node of a simulated cluster: the world of one node (``simulation``), with a real line to control.

Covers: a node's lives, each begun from its journal and its disk; the real uplink, keeper, counters, report
and search for packs over a simulated network; plans that come from control; and calls that a router sends.
Does not cover: what the world does with the core's orders (``simulated_hands``), or the network.

The node's clock has an offset of its own. What is in memory ends with a life; what is on disk, and in the
journal (the real one, in memory), is there in the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from rate_judge import RateJudge
from simulated_control import DiskFaults, Reply
from simulated_edges import MemoryPath, Papers, SimulatedJournal, SimulatedSources, SimulatedUplink
from simulated_files import File
from simulated_hands import GRID_MS, Stay
from simulated_network import Network, Process, of_the_living
from simulated_usage import CountedSpool, keep_use, meter_of, note_use
from simulation import Call, World

from agent.accuracy import Accuracy
from agent.counters import Counters
from agent.devices import DeviceConfig
from agent.journal import Journal, JournalFailed, PackRow
from agent.keeper import Keeper
from agent.peer_fetch import FetchedPack
from agent.recollection import Recollection
from agent.reports import build_report
from agent.shares import Shares
from agent.sources import Obtained
from control.routes.forwarding import NodeUnreachable
from packer.events import (
    Action,
    DeviceSeen,
    Drop,
    Event,
    Grant,
    Packed,
    PackFailed,
    PackFound,
    Planned,
    RefusalReason,
    Refuse,
    Requested,
    Restore,
    RestoreFailed,
    TierBudgetSeen,
)
from packer.identity import BadIdentity
from packer.types import HostForm, HostSizes, ModelRef, ModelSpec, TenantSpec, Tier
from packer.wire import (
    NO_PLAN,
    Plan,
    PlanNumber,
    Record,
    Report,
)

if TYPE_CHECKING:
    from cluster_simulation import Fleet

FLUSH_S = 1.0
# A pack beside a load may wait for another node that reads the origin, one after another.
OBTAIN_MS_MAX = 300_000
# What a record of ours is told apart by.
NOTED = "simulated"


@dataclass(slots=True)
class Ticket:
    """A routed call on this node."""

    head: asyncio.Future[int]
    end: asyncio.Future[None]


class Member(World):
    """``start`` begins a life, ``crash`` ends it."""

    def __init__(self, fleet: Fleet, name: str, seed: int) -> None:
        self.fleet = fleet
        self.name = name
        self.network: Network = fleet.network
        self.skew_ms = 0
        self.life = 0
        self.process: Process | None = None
        self.slowness = 1
        self.steps_past = self.reports = 0
        self.number_before = NO_PLAN
        super().__init__(seed, fleet.core, fleet.full)
        self.claim_ms_max += OBTAIN_MS_MAX
        self.faults.replan = 0.0
        self.journal_faults = DiskFaults(self.rng.choice((0, 3)), self.rng.choice((0.0, 0.1)))
        self.corrupt_from_peers = self.rng.choice((0.0, 0.1, 0.5))
        self.papers = Papers()
        self.journal = Journal(MemoryPath(":memory:"), bytes(32))
        self.journal.spool_id = f"spool of {name}"
        self.journal.usage = self.spool_of_usage = CountedSpool(self.journal._db)
        self.noted: dict[str, str] = {}  # records that are in the journal for good: detail to tenant
        self.told: dict[str, str] = {}  # records of this life, which may be lost with it
        self.tickets: dict[str, Ticket] = {}
        self._found: list[tuple[ModelRef, int]] = []
        self.gateway_url = f"http://{name}:1"
        self.peer_url = f"https://{name}:2" if self.rng.random() < 0.8 else ""

    # --- what replaces a world of its own ---------------------------------------------------------

    def _draw(self) -> None:
        super()._draw()
        self.models = self.fleet.specs
        self.planned = {}
        self.tenants = {}

    def _change_plan(self) -> None:
        """Plans come from control."""

    def at(self, at_ms: int, make: Callable[[], Event | None]) -> None:
        loop = asyncio.get_running_loop()
        loop.call_at((at_ms - self.skew_ms) / 1000, self._fire, self.life, make)

    def later(self, make: Callable[[], Event | None], steps_most: int = 10) -> None:
        super().later(make, steps_most * self.slowness)

    def _fire(self, life: int, make: Callable[[], Event | None]) -> None:
        if life == self.life and self.up:
            self.act(make)

    def act(self, make: Callable[[], Event | None]) -> None:
        """Something happens on this node, if it is up."""
        if not self.up:
            return
        self.now_ms = self.clock_ms()
        try:
            event = make()
            if event is not None:
                self.feed(event)
        except Exception as error:
            self.fleet.broke(error)

    def post(self, event: Event, life: int | None = None) -> None:
        if life is None or life == self.life:
            self.act(lambda: event)

    def feed(self, event: Event) -> None:
        if isinstance(event, Requested):
            self.shares.note(event.ref.tenant)
        super().feed(event)
        if self.up:
            self.fleet.shares.judge(self, event)
        if self.up:
            self.uplink.changed()

    def observe(self, event: Event, actions: list[Action]) -> None:
        wall_ms = self.clock_of_the_wall_ms()
        self.counters.observe(wall_ms, event, actions)
        note_use(self.usage, event, actions, {request: call.ref for request, call in self.calls.items()})
        for action in actions:
            if isinstance(action, Restore | Refuse):
                self.fleet.notes += 1
                ref = action.ref if isinstance(action, Restore) else self.calls[action.request].ref
                detail = f"{self.name}#{self.fleet.notes}"
                self.counters.note(wall_ms, NOTED, ref, detail, 1)
                self.told[detail] = ref.tenant

    def clock_ms(self) -> int:
        return round(asyncio.get_running_loop().time() * 1000) + self.skew_ms

    @property
    def up(self) -> bool:
        return self.process is not None

    # --- lives ------------------------------------------------------------------------------------

    def start(self) -> None:
        self.life += 1
        self.skew_ms = self.rng.randrange(0, 3_600_000, GRID_MS)
        self.now_ms = self.clock_ms()
        self.steps_past, self.steps = self.steps_past + self.steps, 0
        self.node = self.core.Node()
        self.rates = RateJudge()
        self.counters = Counters()
        self.accuracy = Accuracy()
        self.number_before = NO_PLAN
        self.process = Process(self.name, self.fleet.broke)
        self._thread = SimulatedJournal(self.journal, self.rng, self.journal_faults)
        self.keeper = Keeper(
            cast(Any, self._thread), self.counters, self.clock_of_the_wall_ms, self._apply, self._settle
        )
        self._know_again()
        self.shares = Shares(
            lambda: self.node, self.post, self.clock_ms, self._save_shares, self.journal.shares()
        )
        self.uplink = SimulatedUplink(self)
        self.usage = meter_of(self)
        self.sources = SimulatedSources(self)
        self._begin_from_disk()
        self.process.spawn(self._run())

    def _know_again(self) -> None:
        """What the journal has kept of earlier lives, on a wall clock that may have jumped meanwhile."""
        journal = self.journal
        self.recollection = Recollection(
            cast(Any, self._thread),
            self.keeper,
            lambda: self.node,
            lambda: self.core.spent(self.node, self.clock_ms()),
            lambda: self.core.debts(self.node),
            self.clock_ms,
            self.clock_of_the_wall_ms,
        )
        self.reached["knew again what was learned"] += bool(journal.remembered())
        self.reached["knew again what was spent"] += bool(journal.spent())
        self.reached["knew again what was owed"] += bool(journal.debts())

    def clock_of_the_wall_ms(self) -> int:
        return self.fleet.wall_ms + self.skew_ms

    def _begin_from_disk(self) -> None:
        rows = {row.ref: row for row in self.journal.packs()}
        # The core hears of them with its plan; until then nobody uses them.
        for ref in [file.owner for file in self.files.files if file.owner is not None]:
            if ref not in rows:
                self.files.drop(ref)
        self._found = [(ref, self.files.charge(ref)) for ref in self.disk if ref in rows]
        self.disk = {}
        self.excused = {}
        for tier in (Tier.HOST, Tier.DISK):
            self.seen_limits[tier] = self.limits[tier]
            self.post(TierBudgetSeen(tier, self.limits[tier]))
        for device, budget in self.budgets.items():
            self.healthy[device], self.seen_budgets[device] = True, budget
            self.post(DeviceSeen(device, budget))

    async def _run(self) -> None:
        self.shares.take_up()
        while True:
            try:
                await self.keeper.take_up()
                break
            except JournalFailed:
                await asyncio.sleep(1)  # the agent exits and is started again
        assert self.process is not None
        self.process.spawn(self._flush())
        try:
            await self.uplink.run(self.gateway_url)
        except BadIdentity:
            self.reached["was deleted and stopped"] += 1
            asyncio.get_running_loop().call_soon(self.crash)

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.recollection.keep_spent()
            await self.recollection.keep_debts()
            await self.recollection.keep_remembered()
            if await self.keeper.flush():
                self.uplink.changed()
            await keep_use(self.usage)

    async def _save_shares(self, text: str) -> bool:
        return await self.keeper.save(self.journal.save_shares, text)

    def crash(self) -> None:
        """The process is gone, and the machine with it: memory is lost, files that were not complete too."""
        if self.process is None:
            return
        self.process.kill()
        self.process = None
        self.disk |= dict(self._found)
        self.told.clear()
        self.reached["crashed with a lease"] += any(stay.leases for stay in self.stays.values())
        self.reached["crashed while packing"] += bool(self.packing)
        for call in self.calls.values():
            call.left = call.over = True
        for ticket in self.tickets.values():
            _break(ticket.head)
            _break(ticket.end)
        for ref in self.packing:
            self.disk.pop(ref, None)
        for (ref, tier), _ in self.dropping.items():
            if tier is Tier.DISK and self.rng.random() < 0.5:
                self._forget_pack(ref)
                self.files.drop(ref)
                self.disk.pop(ref, None)
        for held in (self.stays, self.host, self.packing, self.dropping, self.workspaces, self.tickets):
            cast("dict[Any, Any]", held).clear()
        self.wake_ms = None

    # --- plans, as ``agent.node`` takes them ------------------------------------------------------

    def _apply(self, plan: Plan) -> None:
        self.fleet.judge_plan(self, plan)
        self.act(partial(self._take_plan, plan))

    def _take_plan(self, plan: Plan) -> None:
        self.tenants = {name: TenantSpec(name) for name in self.tenants}
        planned = {tenant.tenant for tenant in plan.tenants}
        for name in self.tenants:
            if name not in planned:
                self.rates.forget(name, self.now_ms)
        self.tenants |= {tenant.tenant: tenant for tenant in plan.tenants}
        self.planned = {spec.ref: spec for spec in plan.models}
        self._plan()
        for known in self.recollection.planned():
            self.feed(known)
        for ref, nbytes in self._found:
            self.disk[ref] = nbytes
            self.excused[Tier.DISK] = self.tier_bytes(Tier.DISK)
            image_bytes = self.models[ref].image_bytes
            self.feed(PackFound(ref, nbytes, image_bytes, image_bytes))
        self._found = []
        self.counters.forget(
            frozenset(self.planned) | frozenset(self.node.models),
            frozenset(spec.tenant for spec in plan.tenants),
        )

    def _planned_tenants(self) -> tuple[TenantSpec, ...]:
        assert self.keeper.plan is not None
        return self.keeper.plan.tenants

    def _plan(self) -> None:
        for name, tenant in self.tenants.items():
            most = tenant.quota.device.max
            held = sum(s.nbytes for s in self.stays.values() if s.ref.tenant == name)
            self.excused[name] = held if most is not None and held > most else 0
        self.feed(Planned(self._planned_tenants(), tuple(self.planned.values())))
        for ref, workspace_bytes in self.workspaces.items():
            if ref in self.node.models:
                self.feed(self._measure(ref, workspace_bytes))

    async def _settle(self, plan: Plan) -> None:
        pass

    # --- what the uplink asks ---------------------------------------------------------------------

    def report(self) -> Report:
        self.reports += 1
        devices = tuple(DeviceConfig(name, "cpu", "cpu", nbytes) for name, nbytes in self.budgets.items())
        view = SimpleNamespace(
            gateway_url=self.gateway_url,
            peer_url=self.peer_url,
            route_url="",
            started_ms=self.life * 1_000_000 + self.reports,  # tells reports apart
            counters=self.counters,
            accuracy=self.accuracy,
            loop=SimpleNamespace(core=self.node),
            rates=None,
            host_form=HostForm.STORED,
            draining=False,
            device_configs=devices,
            specs=[spec for ref, spec in self.models.items() if ref in self.node.models],
            tenants=[t.tenant for t in (self.keeper.plan.tenants if self.keeper.plan else ())],
            foreign_bytes=lambda device: 0,
            contexts_bytes=lambda device: 0,
            deduplicated_bytes=lambda ref: 0,
            regret=None,
            budget_bytes=lambda tier: self.seen_limits[tier],
            now_ms=self.clock_ms,
        )
        report = build_report(cast(Any, view))
        for device in report.devices:
            self.require(device.healthy == self.healthy[device.device], f"{device} is said to be healthy")
        return report

    def have_plan(self) -> PlanNumber:
        return self.keeper.number

    async def accept_plan(self, plan: Plan) -> None:
        await self.keeper.accept(plan)

    @property
    def spool_id(self) -> str:
        return self.keeper.spool_id

    async def spooled(self, limit: int) -> tuple[Record, ...]:
        records = await self.keeper.spooled(limit)
        self.noted.update({r.detail: r.tenant for r in records if r.kind == NOTED})
        return records

    def heard_clock(self, control_ms: int) -> None:
        self.reached["control's clock was heard"] += 1

    async def acknowledge(self, acked_seq: int) -> None:
        await self.keeper.acknowledge(acked_seq)

    # --- loads and packs --------------------------------------------------------------------------

    def _await_restore(self, stay: Stay, order: Restore) -> None:
        if order.disk_bytes and self.process is not None:
            self.process.spawn(self._load(stay, order, self.life))
        else:
            super()._await_restore(stay, order)

    def _await_pack(self, stay: Stay, order: int) -> None:
        if stay.state != "restoring":
            super()._await_pack(stay, order)

    async def _load(self, stay: Stay, order: Restore, life: int) -> None:
        """As ``agent.orders``: from a peer's pack, or from the origin with a pack beside it."""
        obtained = await self.sources.obtain(order.ref, order.disk_bytes)
        if obtained.pack is not None and self.rng.random() < (0 if self.calm else self.corrupt_from_peers):
            self.reached["a peer's pack was corrupt"] += 1
            self.sources.refuse(order.ref, obtained.pack)
            obtained = Obtained(None)
        if obtained.pack is not None:
            self.reached["loaded from a peer's pack"] += 1
            self._later_if_alive(life, partial(self._end_restore, stay), 10)
            self._later_if_alive(life, partial(self._adopted, stay, order), 10)
            return
        self.fleet.judge_reading(self, order.ref)
        self._later_if_alive(life, partial(self._end_load, stay, obtained), 10)
        self._later_if_alive(life, partial(self._end_load_pack, stay, order.pack_order, obtained), 20)

    def _later_if_alive(self, life: int, make: Callable[[], Event | None], steps: int) -> None:
        if life == self.life and self.up:
            self.now_ms = self.clock_ms()
            self.later(make, steps)

    def _end_load(self, stay: Stay, obtained: Obtained) -> Event | None:
        event = self._end_restore(stay)
        if event is None or isinstance(event, RestoreFailed):
            obtained.end(False)
        return event

    def _end_load_pack(self, stay: Stay, order: int, obtained: Obtained) -> Event:
        event = self._end_pack(stay, order)
        self.fleet.reading.pop((stay.ref, self.name), None)
        obtained.end(not isinstance(event, PackFailed))
        return event

    def _adopted(self, stay: Stay, order: Restore) -> Event:
        """The pack that a peer gave is there, whatever became of the load."""
        stay.packing = False
        del self.packing[order.ref]
        nbytes = self.disk[order.ref] = self.models[order.ref].image_bytes
        self.files.files.append(File(nbytes, order.ref))
        self._keep_pack(order.ref, nbytes)
        return Packed(order.ref, order.device, nbytes, nbytes, order.pack_order)

    def _end_pack(self, stay: Stay, order: int) -> Event:
        event = super()._end_pack(stay, order)
        if isinstance(event, Packed):
            self._keep_pack(event.ref, event.disk_bytes)
        return event

    def _keep_pack(self, ref: ModelRef, nbytes: int) -> None:
        self.journal.add_pack(PackRow(ref, nbytes, nbytes), b"", 0)

    def _forget_pack(self, ref: ModelRef) -> None:
        self.journal.remove_pack(ref)

    def _end_drop(self, order: Drop) -> Event:
        if order.tier is Tier.DISK:
            self._forget_pack(order.ref)
        return super()._end_drop(order)

    def readable_pack(self, ref: ModelRef) -> bool:
        return ref in self.disk and self.readable(ref, Tier.DISK)

    async def fetch(self, ref: ModelRef, peers: list[str], limit_bytes: int) -> FetchedPack | None:
        """From the first peer that gives it; each takes a while to say no."""
        for name in peers:
            await asyncio.sleep(self.network.delay_s())
            of_the_living()
            peer = self.fleet.members[name]
            if self.fleet.gives(peer, self, ref):
                nbytes = self.models[ref].image_bytes
                if nbytes <= limit_bytes and ref in self.planned:
                    return FetchedPack(bytes(32), nbytes, b"", HostSizes(nbytes, nbytes, nbytes), (name,), 1)
            self.reached["a peer gave nothing"] += 1
        return None

    # --- routed calls -----------------------------------------------------------------------------

    async def routed(self, ref: ModelRef, patience_ms: int) -> Reply:
        """A router's call; raises ``NodeUnreachable``."""
        if not await self.network.to_node(self.name) or not self.up:
            raise NodeUnreachable(self.name)
        loop = asyncio.get_running_loop()
        self.fleet.routed += 1
        request = f"routed{self.fleet.routed}"
        ticket = self.tickets[request] = Ticket(loop.create_future(), loop.create_future())
        self.act(lambda: Requested(request, ref, self.now_ms + patience_ms))
        try:
            status = await asyncio.shield(ticket.head)
        except asyncio.CancelledError:
            self._leave_call(request)
            raise
        if status != 200:
            _settle(ticket.end)
        return Reply(status, ticket.end, partial(self._leave_call, request))

    def _leave_call(self, request: str) -> None:
        if self.tickets.pop(request, None) is not None:
            self.act(partial(self._leave, request))

    def _answer(self, action: Grant | Refuse) -> None:
        super()._answer(action)
        ticket = self.tickets.get(action.request)
        if ticket is not None and not ticket.head.done():
            ticket.head.set_result(_status(action))

    def _end_call(self, call: Call) -> None:
        super()._end_call(call)
        for request, known in self.calls.items():
            if known is call and request in self.tickets:
                _settle(self.tickets[request].end)

    def _may_refuse(self, action: Refuse) -> bool:
        if self.calls[action.request].ref not in self.planned:
            return True
        return super()._may_refuse(action)

    # --- the second phase -------------------------------------------------------------------------

    def heal(self) -> None:
        self.calm = self.journal_faults.calm = True
        self.slowness = 1
        if not self.up:
            return
        for tier in (Tier.HOST, Tier.DISK):
            self.post(self._see_tier(tier, self.limits[tier]))
        for device, budget in self.budgets.items():
            self.healthy[device] = True
            self.post(self._see_device(device, budget))
        for ref in list(self.node.models):
            self.post(self._measure(ref, self.models[ref].workspace_bytes))

    def ask_calm(self, request: str, spec: ModelSpec) -> None:
        self.act(lambda: self._ask_calm(request, spec.ref))

    @property
    def idle(self) -> bool:
        return self.up and not self.node.requests and not self.packing and not self.dropping


def _status(action: Grant | Refuse) -> int:
    if isinstance(action, Grant):
        return 200
    match action.reason:
        case RefusalReason.NEVER_FITS | RefusalReason.QUOTA_BYTES:
            return 507
        case RefusalReason.UNKNOWN_MODEL:
            return 404
        case RefusalReason.MODEL_BROKEN:
            return 422
        case RefusalReason.RESTORE_FAILED | RefusalReason.WORKER_DIED | RefusalReason.TIMEOUT:
            return 503
        case _:
            return 429


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _break(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(NodeUnreachable("it died"))
        future.exception()
