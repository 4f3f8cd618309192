"""A running node: the loop, its hands, its journal and its line to control, put together.

Covers: start and stop in the right order, accepting plans, what the gateway asks (``NodeFacade``), what
the uplink asks (``UplinkOwner``). Does not cover: HTTP (``agent/gateway.py``), deciding
(``packer/residency.py``), carrying out (``agent/orders.py``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace

from agent import devices, metrics
from agent.accuracy import Accuracy
from agent.calibration import Calibrator, LinkMeter
from agent.config import AgentConfig
from agent.control_listener import control_listener
from agent.counters import Counters
from agent.credentials import Credentials
from agent.decisions import Decisions
from agent.device_watch import DeviceWatch
from agent.flushing import Flushing
from agent.footprints import Footprints
from agent.journal import JournalFailed, PackRow, open_journal
from agent.journal_thread import JournalThread
from agent.keeper import Keeper
from agent.loop import Loop
from agent.orders import Orders
from agent.origin import OriginUnavailable
from agent.packs import PackDirectory
from agent.recollection import Recollection
from agent.regret import RegretMeter
from agent.reports import build_report
from agent.segments import HostSegments
from agent.shares import Shares
from agent.sharing import Sharing
from agent.spawning import Nursery
from agent.stay import Stay
from agent.uplink import Uplink
from agent.usage_meter import UsageMeter
from agent.use_log import UseLog
from packer import residency
from packer.decisions import shortened
from packer.estimate import FIRST_RATES, Rates, choose_host_form, dump_rates
from packer.events import (
    Action,
    DrainAsked,
    Event,
    Finished,
    Grant,
    PackBegun,
    PackFound,
    Planned,
    RatesSeen,
    Requested,
    TierBudgetSeen,
)
from packer.identity import BadIdentity, Identity, box_facts
from packer.questions import Asks, Question, Reply
from packer.rates import RateView
from packer.types import (
    BadValue,
    HostForm,
    KeySpec,
    ModelName,
    ModelRef,
    ModelSpec,
    Tier,
    parse_model,
    parse_ref,
)
from packer.wire import Plan, PlanNumber, Record, RegretReport, Report

log = logging.getLogger("bunk.node")

# A stopped node goes on writing packs of models that it has loaded for this long, some 20 GB at a usual
# disk's speed. With what answers get before it, beneath the 30 s after which Kubernetes kills.
PACK_GRACE_S = 20.0

_NO_FETCH = "this version's files are in control's store, and this node was started without --control"


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


class RunningNode:
    """Everything a node is, but its HTTP surface. ``start`` before use, ``close`` after."""

    def __init__(self, config: AgentConfig) -> None:
        config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config = config
        self.name = config.name
        self.counters = Counters()
        self.accuracy = Accuracy()
        self.uses = UseLog()
        self.meter = RegretMeter(self.uses, lambda: self.loop.core, wall_ms, config.regret_every_s)
        self.decisions = Decisions(wall_ms)
        self.started_ms = wall_ms()
        self.gateway_url = ""
        self._devices = {device.device: device for device in config.devices}
        self._journal = JournalThread(open_journal(config.data_dir))
        self._link = LinkMeter()
        self.calibrator = Calibrator(
            config.data_dir,
            config.calibrate,
            self._on_cuda,
            self._calibrated,
            self._link,
        )
        self.calibrator.take_stored(self._journal.journal.calibration())
        self.host_form = self._choose_host_form(None)
        self._packs = PackDirectory(config.data_dir / "packs", self.calibrator.reads_past_cache)
        self._segments = HostSegments()
        self._find_identity(config)
        self._nursery = Nursery(config.threads, config.standbys)
        self.orders = Orders(
            self._nursery,
            self._devices,
            self._packs,
            self._segments,
            self._journal,
            self._fetch,
            lambda ref: self._specs[ref],
            wall_ms,
            config.control_store,
            self.host_form,
        )
        self.loop = Loop(residency.Node(), self.orders, monotonic_ms, self._observe, config.data_dir)
        self.orders.post = self.loop.post
        self.orders.repairs.note = self._note
        self.sharing = Sharing(
            config,
            self._identity,
            self.uplink.sources if self.uplink is not None else None,
            self._packs,
            self._journal,
            wall_ms,
            lambda kind, ref, detail: self.counters.note(wall_ms(), kind, ref, detail, 1),
        )
        self.sharing.sources.lender = self.orders.holdings
        self.orders.sources = self.sharing.sources
        self.orders.repairs.fetch_extent = self.sharing.sources.fetch_extent
        self.device_watch = DeviceWatch(self._devices, self.orders.roster, self.loop.post)
        self._keeper = Keeper(self._journal, self.counters, wall_ms, self._apply, self._settle)
        self._know_again()
        self.credentials = Credentials(wall_ms, away=lambda: bool(self.uplink and not self.uplink.connected))
        may_fail, control_ms = self._keeper.journal_may_fail, self.credentials.control_ms
        self.usage = UsageMeter(self._journal, control_ms, may_fail, self._tell)
        self.counters.usage_waits = self.usage.waits
        self._specs: dict[ModelRef, ModelSpec] = {}
        self._latest: dict[ModelName, ModelSpec] = {}
        self._packs_found: list[PackRow] = []
        self._packs_begun: dict[ModelRef, int] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def _find_identity(self, config: AgentConfig) -> None:
        """Who this node is, its line to control and the listener that control calls."""
        self._identity = Identity(config.data_dir / "identity")
        stored = self._journal.journal.shares()
        self.shares = Shares(lambda: self.loop.core, self._post, monotonic_ms, self._save_shares, stored)
        self._identity.box = box_facts([each.device for each in config.devices if each.kind == "cuda"])
        self.uplink: Uplink | None = (
            Uplink(self, self._identity, config.control_url, config.name, config.join_token_file, self.shares)
            if config.control_url
            else None
        )
        self.control_listener = control_listener(config, self._identity)

    def _know_again(self) -> None:
        """Take up what the journal has kept of earlier lives; the core hears of it with the first plan."""
        journal = self._journal.journal
        self.footprints = Footprints(self._devices, self.loop.post, self._held_workspace_bytes)
        self.footprints.take_stored(journal.footprints())
        self.orders.roster.on_workspace = self._on_workspace
        self._recollection = Recollection(
            self._journal,
            self._keeper,
            lambda: self.loop.core,
            self._owed_rates,
            self._owed_cold_ms,
            monotonic_ms,
            wall_ms,
        )
        self.flushing = Flushing(
            {
                "footprints": self._keep_footprints,
                "what was spent": self._recollection.keep_spent,
                "debts": self._recollection.keep_debts,
                "what was learned": self._recollection.keep_remembered,
                "records": self._spool,
            }
        )

    # --- start and stop ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the packs, start the nursery, take up the last plan. Serves without control from here."""
        journal = self._journal.journal
        for ref in await self._journal.call(journal.remove_unproven):
            log.warning("the pack of %s came from another node and was not proven; it is given up", ref)
        self._packs_found = await self._journal.call(journal.packs)
        self._packs_begun = unfinished = await self.orders.start(self._packs_found)
        for ref in self._packs.sweep([row.ref for row in self._packs_found], unfinished):
            log.warning("the pack of %s is missing on disk; it will be made again from its origin", ref)
            with suppress(JournalFailed):  # the next start tries again
                await self._journal.call(journal.remove_pack, ref)
            self._packs_found = [row for row in self._packs_found if row.ref != ref]
        await self._nursery.start()
        for device in self._devices.values():
            self._nursery.keep_standbys(device)
        self.sharing.start()
        for chosen in self.config.choices():
            self.loop.post(chosen)
        self.loop.post(RatesSeen(self.rates or FIRST_RATES, self.host_form, self._on_cuda))
        for tier in (Tier.HOST, Tier.DISK):
            self.loop.post(TierBudgetSeen(tier, self.budget_bytes(tier)))
        self.device_watch.look()
        if self.uplink is not None:
            self.shares.take_up()
        if self.uplink is None or self._identity.cluster:  # who was removed has no plan any more
            await self._keeper.take_up()
        if any(device.kind == "cuda" for device in self._devices.values()):
            self._tasks.append(asyncio.create_task(self.device_watch.run()))
        runs = (self.flushing.run(), self.calibrator.run(), self.meter.run(), self.usage.run())
        self._tasks += [asyncio.create_task(each) for each in runs]

    async def run_uplink(self, gateway_url: str) -> None:
        """Beat until cancelled; raises ``BadIdentity`` when the node can not go on without a person."""
        self.gateway_url = gateway_url
        if self.uplink is None:
            await asyncio.Event().wait()
            return
        try:
            await self.uplink.run(gateway_url)
        except BadIdentity as error:
            if type(error) is not BadIdentity or self._plan is None or not self._identity.cluster:
                raise
            log.error("%s", error)
            await asyncio.Event().wait()  # static stability: go on serving with the last plan

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Whoever told the node to stop may lose patience: then it costs packs, and nothing that is known.
        await self._keep()
        if not self.loop.broken.done():
            await self.orders.finish_packs(PACK_GRACE_S)
        await self.loop.close()
        await self.sharing.close()
        await self.orders.close()
        await self._nursery.close()
        await self._keep()
        self._segments.close()
        self._journal.close()
        devices.close()

    async def _keep(self) -> None:
        await self.flushing.once()
        await self.usage.flush(at_once=True)
        await self._recollection.keep()

    async def nursery_died(self) -> None:
        """Returns when no more workers can be forked."""
        await self._nursery.died.wait()

    # --- what this box can do ---------------------------------------------------------------------

    @property
    def rates(self) -> Rates | None:
        return self.calibrator.rates

    def _choose_host_form(self, plan: Plan | None) -> HostForm:
        """What the operator wants, else what was measured; an unmeasured cpu box keeps the smallest."""
        if self.config.host_form is not None:
            return self.config.host_form
        rates = self.rates
        if rates is None and not self._on_cuda:
            return HostForm.STORED
        raw_bytes = sum(spec.image_bytes for spec in plan.models) if plan is not None else 0
        host_share = self.config.host_budget_bytes / raw_bytes if raw_bytes else 1.0
        return choose_host_form(rates or FIRST_RATES, self._on_cuda, host_share=host_share)

    @property
    def _on_cuda(self) -> bool:
        return any(device.kind == "cuda" for device in self._devices.values())

    async def _calibrated(self, rates: Rates) -> None:
        """Estimates and the form of new segments follow at once."""
        self.accuracy.start_anew()
        await self._keeper.save(self._journal.journal.save_calibration, dump_rates(rates))
        await self._use_form(self._choose_host_form(self._plan))

    async def _use_form(self, form: HostForm) -> None:
        """Make new segments in this form; those that are there stay readable."""
        if form is not self.host_form:
            log.info("the host tier keeps weights in %s form from now on", form.value)
        self.host_form = self.orders.host_form = form
        self.loop.post(RatesSeen(self.rates or FIRST_RATES, form, self._on_cuda))
        with self._keeper.journal_may_fail():
            for row in await self._journal.call(self._journal.journal.packs):
                self._state_host_bytes(row)

    def _state_host_bytes(self, row: PackRow) -> None:
        """Tell the core what a segment of this pack takes now, unless the pack is gone meanwhile."""
        view = residency.model_view(self.loop.core, row.ref)
        charge = self.orders.holdings.charge(row.ref)
        if row.host is not None and view is not None and view.disk_bytes == charge:
            host_bytes = row.host.of(self.host_form)
            self.loop.post(PackFound(row.ref, charge, host_bytes, row.read_bytes))

    def _held_workspace_bytes(self, ref: ModelRef) -> int | None:
        view = residency.model_view(self.loop.core, ref)
        return None if view is None else view.workspace_bytes

    def _on_workspace(self, ref: ModelRef, device: str, pid: int, peak_bytes: int) -> None:
        spec = self._specs.get(ref)
        if spec is not None:
            self.footprints.seen(spec, device, pid, peak_bytes)

    # --- plans ------------------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan | None:
        return self._keeper.plan

    def have_plan(self) -> PlanNumber:
        return self._keeper.number_in(self._identity.cluster)

    async def accept_plan(self, plan: Plan) -> None:
        """Keep a newer plan and act on it."""
        await self._keeper.accept(plan)

    async def _settle(self, plan: Plan) -> None:
        if (form := self._choose_host_form(plan)) is not self.host_form:
            await self._use_form(form)
        self.orders.keep_only(frozenset(spec.ref for spec in plan.models))
        await self.orders.roster.close_tenants(frozenset(tenant.tenant for tenant in plan.tenants))

    async def _keep_footprints(self) -> None:
        rows = self.footprints.take_unsaved()
        save = self._journal.journal.save_footprints
        if rows and not await self._keeper.save(save, rows, list(self._specs)):
            self.footprints.put_back(rows)

    async def _save_shares(self, text: str) -> bool:
        return await self._keeper.save(self._journal.journal.save_shares, text)

    def _post(self, event: Event) -> None:
        self.loop.post(event)

    def _owed_rates(self) -> dict[str, tuple[int, int]]:
        return residency.spent(self.loop.core, monotonic_ms())

    def _owed_cold_ms(self) -> dict[str, int]:
        return residency.debts(self.loop.core)

    def _apply(self, plan: Plan) -> None:
        self.sharing.planned(plan)
        self._identity.let_in({router.node: router.key_sha256 for router in plan.routers})
        self.credentials.planned(plan.cluster, plan.node, plan.keys, plan.ticket_keys)
        # Versions that left the plan stay known until the core has let go of them.
        self._specs |= {spec.ref: spec for spec in plan.models}
        self._latest = {spec.ref.model: spec for spec in plan.models if spec.latest}
        self.loop.post(Planned(plan.tenants, plan.models))
        for known in self._recollection.planned():
            self.loop.post(known)
        self.footprints.planned(plan.models)
        for row in self._packs_found:
            host_bytes = row.host.of(self.host_form) if row.host else row.host_bytes
            charge = self.orders.holdings.charge(row.ref)
            self.loop.post(PackFound(row.ref, charge, host_bytes, row.read_bytes))
        self._packs_found = []
        for ref, disk_bytes in self._packs_begun.items():
            self.loop.post(PackBegun(ref, disk_bytes))
        self._packs_begun = {}
        planned = frozenset(spec.ref for spec in plan.models)
        core = self.loop.core
        self._specs = {
            ref: spec
            for ref, spec in self._specs.items()
            if ref in planned or residency.model_view(core, ref) is not None
        }
        self.counters.forget(frozenset(self._specs), frozenset(tenant.tenant for tenant in plan.tenants))
        self.accuracy.forget(frozenset(self._specs))
        if plan.draining != core.draining:
            self.loop.post(DrainAsked(plan.draining))
        log.info("plan %d.%d: %d tenants, %d versions", plan.epoch, plan.seq, len(plan.tenants), len(planned))

    # --- what the gateway asks --------------------------------------------------------------------

    def find_key(self, key_text: str) -> KeySpec | None:
        return self.credentials.find(key_text)

    def models_of(self, tenant: str) -> Sequence[ModelSpec]:
        return [spec for spec in (self._plan.models if self._plan else ()) if spec.ref.tenant == tenant]

    def resolve(self, tenant: str, text: str) -> ModelSpec | None:
        try:
            model, version = parse_model(text)
        except BadValue:
            return None
        if model.tenant != tenant:
            return None
        if version is None:
            return self._latest.get(model)
        return self._specs.get(ModelRef(model.tenant, model.name, version))

    def lease(self, spec: ModelSpec, request_id: str, timeout_ms: int, tokens: int, key_id: str = "") -> Stay:
        return Stay(self, spec, request_id, timeout_ms, tokens, key_id)

    def rate_views(self, tenant: str) -> Sequence[RateView]:
        return residency.rate_views(self.loop.core, tenant, monotonic_ms())

    def ready(self) -> bool:
        return self._plan is not None and not self._plan.draining

    def metrics_text(self, tenants: bool = True) -> str:
        return metrics.render(
            self.report(), self.counters, self.accuracy, self.rates, self.host_form, tenants
        )

    # --- what the uplink asks ---------------------------------------------------------------------

    def report(self) -> Report:
        return build_report(self)

    def deduplicated_bytes(self, ref: ModelRef) -> int:
        return self.orders.holdings.deduplicated_bytes(ref)

    @property
    def regret(self) -> RegretReport | None:
        return self.meter.last

    @property
    def peer_url(self) -> str:
        return self.sharing.peer_url

    @property
    def route_url(self) -> str:
        return self.control_listener.url if self.control_listener is not None else ""

    @property
    def device_configs(self) -> tuple[devices.DeviceConfig, ...]:
        return self.config.devices

    def foreign_bytes(self, device: str) -> int:
        return self.device_watch.foreign_bytes(device)

    def contexts_bytes(self, device: str) -> int:
        return self.device_watch.contexts_bytes(device)

    def budget_bytes(self, tier: Tier) -> int:
        return self.config.host_budget_bytes if tier is Tier.HOST else self.config.disk_budget_bytes

    def now_ms(self) -> int:
        return monotonic_ms()

    @property
    def draining(self) -> bool:
        return bool(self._plan and self._plan.draining)

    @property
    def specs(self) -> Sequence[ModelSpec]:
        return list(self._specs.values())

    @property
    def tenants(self) -> Sequence[str]:
        return [tenant.tenant for tenant in (self._plan.tenants if self._plan else ())]

    @property
    def spool_id(self) -> str:
        return self._keeper.spool_id

    async def spooled(self, limit: int) -> tuple[Record, ...]:
        return await self._keeper.spooled(limit)

    async def acknowledge(self, acked_seq: int) -> None:
        await self._keeper.acknowledge(acked_seq)

    def heard_clock(self, control_ms: int) -> None:
        self.credentials.heard(control_ms)

    async def reply(self, question: Question) -> Reply:
        if question.asks is not Asks.PLAN:
            return self.decisions.reply(question)
        try:
            ref = parse_ref(question.subject)
        except BadValue:
            return Reply(question.question)
        forecast = self.loop.forecast(question.question, ref)
        return Reply(question.question, forecast=shortened(replace(forecast, at_ms=wall_ms())))

    # --- records ----------------------------------------------------------------------------------

    def _observe(self, now_ms: int, event: Event, actions: list[Action]) -> None:
        if type(event) is Finished and not actions and not self.loop.core.why:
            self._tell()  # most steps: nothing else follows
            return
        if type(event) is Requested and len(actions) == 1 and not self.loop.core.why:
            grant = actions[0]
            if type(grant) is Grant and grant.tier is Tier.DEVICE:  # as most requests are
                self.counters.asked(wall_ms(), event.request, event.ref)
                self.decisions.granted_at_once(event.request, event.ref, grant)
                self.uses.used(now_ms, event.ref)
                self._tell()
                return
        self.counters.observe(wall_ms(), event, actions)
        self.decisions.observe(self.loop.core, event, actions)
        self.accuracy.observe(self.loop.core, event, actions)
        self.uses.observe(now_ms, event, actions)
        self.usage.observe(event)
        self._tell()

    def _tell(self) -> None:
        """There is something new for control."""
        if self.uplink is not None:
            self.uplink.changed()

    def _note(self, kind: str, ref: ModelRef, detail: str, count: int) -> None:
        self.counters.note(wall_ms(), kind, ref, detail, count)

    async def _spool(self) -> None:
        if await self._keeper.flush():
            self._tell()

    async def _fetch(self, spec: ModelSpec, path: str, start: int, nbytes: int) -> AsyncIterator[bytes]:
        if self.uplink is None:
            raise OriginUnavailable(f"{spec.ref}: {_NO_FETCH}")
        with self._link.fetching() as came:
            async for piece in self.uplink.fetch(spec, path, start, nbytes):
                came(len(piece))
                yield piece
