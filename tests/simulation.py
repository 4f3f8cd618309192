"""A seeded world around the residency core: callers, workers, disks and operators that misbehave.

Covers: drawing a node, its models, quotas and faults from a seed; callers, plans and budgets; and judging
every step against the world's own bookkeeping, which shares no code with the core. Does not cover: how
orders are carried out (``simulated_hands``), which properties are asserted over many seeds
(``test_simulation``), or real bytes.

Two phases: in the first everything fails now and then; in the second nothing does, and every request
must be answered well. Times lie on a coarse grid, so that things coincide; a world on a continuous clock
never sees a grant and a cancellation in the same millisecond.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import judges
from rate_judge import RateJudge
from simulated_files import File
from simulated_hands import GRID_MS, Faults, Hands, Stay, Violated

from packer import residency
from packer.events import (
    Action,
    Cancelled,
    DeviceSeen,
    Drop,
    Event,
    Evict,
    Fill,
    Finished,
    FootprintSeen,
    Grant,
    Pack,
    PackFound,
    Planned,
    PolicyChosen,
    PrefetchChosen,
    RefusalReason,
    Refuse,
    Requested,
    Restore,
    StopFill,
    Ticked,
    TierBudgetSeen,
    Wake,
)
from packer.types import MIB, ByteQuota, ModelRef, ModelSpec, Task, TenantQuota, TenantSpec, Tier

FAULTS_MS = 40_000
# Long enough for every restore, eviction and lease of the second phase, one after the other.
CALM_DEADLINE_MS = 2_000_000
STEPS_MAX = 20_000
FULL_CHECK_STEPS = 8
WORKSPACE_BYTES = MIB


@dataclass(slots=True)
class Call:
    """A request as its caller sees it."""

    ref: ModelRef
    asked_ms: int
    deadline_ms: int
    answer: Grant | Refuse | None = None
    left: bool = False
    over: bool = False
    # What it was granted, and how often that had ended before.
    stay: Stay | None = None
    ended: int = 0


class World(Hands):
    """One run. ``core`` is the residency module under test: the real one or a mutant.

    ``full`` keeps every step's text for reading; the digest of all of them is kept anyway.
    """

    prefetch_each = 2  # of so many worlds one fills host memory ahead of need

    def __init__(
        self, seed: int, core: ModuleType = residency, full: bool = False, policy: str = "keep"
    ) -> None:
        super().__init__(seed)
        self.core = core
        self.full = full
        self.policy = policy
        self.rates = RateJudge()
        self.steps = 0
        self.trace: list[str] = []
        self.node = self.core.Node()
        self.digest = hashlib.sha256()
        self.calls: dict[str, Call] = {}
        self.excused: dict[str, int] = {}
        self.wake_ms: int | None = None
        self.claim_ms_max = judges.CLAIM_MS_MAX
        self._draw()

    # --- drawing a world --------------------------------------------------------------------------

    def _draw(self) -> None:
        rng = self.rng
        self.faults = Faults(
            fail=rng.choice((0.0, 0.1, 0.5)),
            corrupt=rng.choice((0.0, 0.1, 0.3)),
            broken=rng.choice((0.0, 0.05)),
            pack_fail=rng.choice((0.0, 0.2)),
            leave=rng.choice((0.0, 0.1, 0.4)),
            die=rng.choice((0.0, 0.05, 0.2)),
            late=rng.choice((0.0, 0.5)),
            shrink=rng.choice((0.0, 0.1)),
            replan=rng.choice((0.0, 0.1)),
            measure=rng.choice((0.0, 0.1)),
        )
        self.lease_steps = rng.choice((2, 30))
        self.budgets = {f"cpu:{i}": rng.randrange(40, 140) * MIB for i in range(rng.choice((1, 1, 2, 3)))}
        self.limits = {Tier.HOST: rng.choice((0, 40, 120)) * MIB, Tier.DISK: rng.choice((60, 300)) * MIB}
        self.seen_budgets = dict(self.budgets)
        self.seen_limits = dict(self.limits)
        self.healthy = dict.fromkeys(self.budgets, True)
        names = [f"t{i}" for i in range(rng.randrange(1, 5))]
        self.tenants = {name: TenantSpec(name, self._quota()) for name in names}
        for i in range(rng.randrange(2, 12)):
            self._add_spec(rng.choice(names), i)
        self.planned = dict(self.models)

    def _quota(self) -> TenantQuota:
        rng = self.rng
        most = rng.choice((None, None, 60, 90))
        return TenantQuota(
            device=ByteQuota(rng.choice((0, 0, 30, 60)) * MIB, None if most is None else most * MIB),
            host=ByteQuota(rng.choice((0, 20)) * MIB, rng.choice((None, 60 * MIB))),
            disk=ByteQuota(0, rng.choice((None, 150 * MIB))),
            requests_per_minute=rng.choice((None, None, 60, 300)),
            concurrency=rng.choice((None, None, 4)),
            weight=rng.choice((1, 3)),
            priority=rng.choice((0, 0, 1)),
            tokens_per_minute=self.apart.choice((None, None, None, 600)),
            restores_per_minute=self.apart.choice((None, None, None, 4, 20)),
            device_seconds_per_day=self.apart.choice((None, None, None, None, 1)),
        )

    def _add_spec(self, tenant: str, i: int) -> None:
        nbytes = self.rng.choice((4, 10, 16, 24, 30, 40, 60, 150)) * MIB
        ref = ModelRef(tenant, f"m{i}", f"{i:016x}")
        count = self.rng.choice((1, 2, 5, 20))
        ends = [*sorted(self.rng.randrange(1, nbytes) for _ in range(count - 1)), nbytes]
        chunks = tuple(end - start for start, end in zip([0, *ends], ends, strict=False) if end > start)
        self.models[ref] = ModelSpec(
            ref, "file:///m", (), "transformers", Task.EMBEDDING, nbytes, chunks, WORKSPACE_BYTES, 0
        )

    # --- running ----------------------------------------------------------------------------------

    def run(self) -> World:
        """Both phases, then the final judgement."""
        self._start()
        self._drain(FAULTS_MS)
        self._heal()
        self._drain(None)
        judges.judge_end(self)
        return self

    def _drain(self, until_ms: int | None) -> None:
        while self.heap and (until_ms is None or self.heap[0][0] < until_ms):
            at_ms, _, make = heapq.heappop(self.heap)
            self.now_ms = max(self.now_ms, at_ms)
            event = make()
            if event is not None:
                self.feed(event)
        self.now_ms = max(self.now_ms, until_ms or 0)

    def feed(self, event: Event) -> None:
        """One step of the core, checked, judged and carried out."""
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise Violated("the world does not come to rest: a livelock")
        if isinstance(event, Requested):
            self.calls[event.request] = Call(event.ref, self.now_ms, event.deadline_ms)
        kept_before = {d.name: d.account.kept_bytes for d in self.node.devices.values()}
        claims_before = {d.name: d.claim for d in self.node.devices.values()}
        tenants_before = {n: t.device.kept_bytes for n, t in self.node.tenants.items()}
        excused_before = {n: t.slice.excused_ms for n, t in self.node.tenants.items()}
        actions: list[Action] = self.core.step(self.node, event, self.now_ms)
        line = f"{self.now_ms} {event} {actions}"
        self.digest.update(line.encode())
        if self.full:
            self.trace.append(line)
        # The cheap check of every step in production, and now and then the one that believes nothing.
        self.core.check(self.node)
        if self.steps % FULL_CHECK_STEPS == 0:
            self.core.check(self.node, full=True)
        self.observe(event, actions)
        for action in actions:
            self._carry_out(action)
        self.reached["condemned"] += bool(self.node.condemned)
        self.rates.judge(self, event, actions)
        judges.judge_passing(self, event, kept_before, claims_before)
        judges.judge_fills(self)
        judges.judge_evictions(self, event, actions, kept_before)
        judges.judge_excuses(self, event, actions, kept_before, tenants_before, excused_before)
        judges.judge_shedding(self, event, actions, kept_before)
        judges.judge_bytes(self)
        judges.judge_chunks(self)
        judges.judge_patience(self)
        judges.judge_gangs(self)

    def observe(self, event: Event, actions: list[Action]) -> None:
        """Every step, before its orders are carried out."""

    # --- phases -----------------------------------------------------------------------------------

    def _start(self) -> None:
        found_first = self.rng.random() < 0.3
        if self.policy != "keep":
            self.feed(PolicyChosen(self.policy))
        for tier in (Tier.HOST, Tier.DISK):
            self.feed(TierBudgetSeen(tier, self.limits[tier]))
        if self.seed % self.prefetch_each == 1:
            self.feed(PrefetchChosen(True))
        for device, budget in self.budgets.items():
            self.feed(DeviceSeen(device, budget))
        if not found_first:
            self._plan()
        for ref, spec in self.models.items():
            if (
                self.rng.random() < 0.3
                and sum(self.disk.values()) + spec.image_bytes <= self.limits[Tier.DISK]
            ):
                self.disk[ref] = spec.image_bytes
                self.files.files.append(File(spec.image_bytes, ref))
                self.feed(PackFound(ref, spec.image_bytes, spec.image_bytes))
        if found_first:
            self._plan()
        for _ in range(self.rng.choice((20, 100, 400))):
            self.at(self.rng.randrange(0, FAULTS_MS, GRID_MS), self._ask)
        for at_ms in range(0, FAULTS_MS, 5 * GRID_MS):
            self.at(at_ms, self._mishap)

    def _plan(self) -> None:
        for name, tenant in self.tenants.items():
            most = tenant.quota.device.max
            held = sum(s.nbytes for s in self.stays.values() if s.ref.tenant == name)
            self.excused[name] = held if most is not None and held > most else 0
        self.feed(Planned(tuple(self.tenants.values()), tuple(self.planned.values())))
        # The core knows nothing any more of what had left the plan; the agent remembers.
        for ref, workspace_bytes in self.workspaces.items():
            if ref in self.node.models:
                self.feed(self._measure(ref, workspace_bytes))

    def _ask(self) -> Event | None:
        refs = list(self.models)
        # Skewed, so that some models are hot and stay leased while others need their room.
        ref = refs[min(int(self.rng.expovariate(1.0) * 2), len(refs) - 1)]
        request = f"r{len(self.calls)}"
        if self.chance(self.faults.leave):
            self.later(lambda: self._leave(request), 8)
        deadline_ms = self.now_ms + self.rng.choice((1, 20, 60, 200)) * GRID_MS
        return Requested(request, ref, deadline_ms, self.apart.choice((0, 10, 100)))

    def _leave(self, request: str) -> Event | None:
        call = self.calls.get(request)
        if call is None or call.left or call.over or isinstance(call.answer, Refuse):
            return None
        if isinstance(call.answer, Grant):
            self.reached["cancelled after grant"] += 1
            self._end_call(call)
        else:
            self.reached["cancelled while waiting"] += 1
        call.left = True
        return Cancelled(request)

    def _end_call(self, call: Call) -> None:
        call.over = True
        if call.stay is not None and call.stay.ended == call.ended:
            call.stay.leases -= 1

    def _finish(self, request: str) -> Event | None:
        call = self.calls[request]
        if call.over:
            # The loop never says this twice; the core must not mind.
            return Finished(request) if self.chance(0.2) else None
        self._end_call(call)
        return Finished(request, self.rng.randrange(0, 50), self.apart.choice((0, 5, 40, 150)))

    def _mishap(self) -> Event | None:
        rng = self.rng
        if self.chance(self.faults.die) and self.stays:
            stay = rng.choice(list(self.stays.values()))
            return self._kill(stay.ref.tenant, stay.device)
        if self.chance(self.faults.shrink):
            device = rng.choice(list(self.budgets))
            self.healthy[device] = rng.random() > 0.2
            budget = int(self.budgets[device] * rng.choice((0.3, 0.7, 1.0)))
            return self._see_device(device, budget)
        if self.chance(self.faults.shrink):
            tier = rng.choice((Tier.HOST, Tier.DISK))
            return self._see_tier(tier, int(self.limits[tier] * rng.choice((0.2, 1.0))))
        if self.chance(self.faults.replan):
            self._change_plan()
        if self.chance(self.faults.measure) and self.node.models:
            ref = rng.choice(list(self.node.models))
            return self._measure(ref, int(self.models[ref].image_bytes * rng.choice((0, 0.1, 0.5))))
        return None

    def _measure(self, ref: ModelRef, workspace_bytes: int) -> Event:
        """What does not fit is held from the next stay on."""
        self.workspaces[ref] = workspace_bytes
        stay = self.stays.get(ref)
        if stay is not None and stay.state in ("restoring", "resident"):
            names = stay.devices
            more = self.need_bytes(ref, len(names)) - stay.nbytes
            self.reached["measured more where it is held"] += more > 0
            self.reached["measured less where it is held"] += more < 0
            self.reached["a gang was measured where it is held"] += bool(more) and len(names) > 1
            held = sum(s.nbytes for s in self.stays.values() if s.ref.tenant == ref.tenant)
            most = self.tenants[ref.tenant].quota.device.max
            fits = all(
                self.used_on(name) + more // len(names) <= self.seen_budgets[name] for name in names
            ) and (most is None or held + more <= most)
            if more <= 0 or fits:
                stay.nbytes += more
        return FootprintSeen(ref, workspace_bytes)

    def used_on(self, device: str) -> int:
        return sum(self.held_on(stay, device) for stay in self.stays.values())

    def _see_device(self, device: str, budget: int) -> Event:
        held = [s for s in self.stays.values() if device in s.devices]
        if any(s.state == "restoring" for s in held) and budget < self.seen_budgets[device]:
            self.reached["budget sank while restoring"] += 1
        if sum(self.held_on(s, device) for s in held if s.leases) > budget:
            self.reached["budget sank below what is leased"] += 1
        if not self.healthy[device] and held:
            self.reached["device became unhealthy"] += 1
            self.reached["a device of a gang became unhealthy"] += any(len(s.devices) > 1 for s in held)
        self.excused[device] = self.used_on(device)
        self.seen_budgets[device] = budget
        return DeviceSeen(device, budget, self.healthy[device])

    def _see_tier(self, tier: Tier, budget: int) -> Event:
        self.excused[tier] = self.tier_bytes(tier)
        self.seen_limits[tier] = budget
        return TierBudgetSeen(tier, budget)

    def _change_plan(self) -> None:
        rng = self.rng
        ref = rng.choice(list(self.models))
        if ref in self.planned:
            del self.planned[ref]
            stay = self.stays.get(ref)
            if stay is not None:
                use = "packing" if stay.packing else ("leased" if stay.leases else stay.state)
                self.reached[f"removed while {use}"] += 1
        else:
            self.planned[ref] = self.models[ref]
            self.reached["planned again"] += 1
        name = rng.choice(list(self.tenants))
        self.tenants[name] = TenantSpec(name, self._quota())
        self._plan()

    def _heal(self) -> None:
        """The second phase: full budgets, the full plan, no limits on rates, and everybody asks once."""
        self.calm = True
        self.planned = dict(self.models)
        for name, tenant in self.tenants.items():
            quota = tenant.quota
            calm = TenantQuota(quota.device, quota.host, quota.disk, weight=quota.weight)
            self.tenants[name] = TenantSpec(name, calm)
        for tier in (Tier.HOST, Tier.DISK):
            self.feed(self._see_tier(tier, self.limits[tier]))
        for device, budget in self.budgets.items():
            self.healthy[device] = True
            self.feed(self._see_device(device, budget))
        self._plan()
        for ref, spec in self.models.items():
            self.feed(self._measure(ref, spec.workspace_bytes))
        # After the last memory of a failure has passed.
        start_ms = self.now_ms + 70_000
        for i, ref in enumerate(self.models):
            request = f"calm{i}"
            # In waves that no queue's bound can refuse.
            at_ms = start_ms + i // 4 * 100_000
            self.at(at_ms, partial(self._ask_calm, request, ref))
        # One model of each tenant is in use all the time, while others need its room.
        hot = {ref.tenant: ref for ref in self.models}
        for ref in hot.values():
            for at_ms in range(start_ms + GRID_MS, start_ms + 60_000, 5 * GRID_MS):
                self.at(at_ms, partial(self._ask_hot, ref))

    def _ask_calm(self, request: str, ref: ModelRef) -> Event:
        return Requested(request, ref, self.now_ms + CALM_DEADLINE_MS)

    def _ask_hot(self, ref: ModelRef) -> Event:
        return Requested(f"hot{len(self.calls)}", ref, self.now_ms + 200 * GRID_MS)

    # --- carrying out orders ----------------------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grant() | Refuse():
                self._answer(action)
            case Restore():
                self._restore(action)
            case Evict():
                self._evict(action)
            case Pack():
                self._pack(action)
            case Fill():
                self._fill(action)
            case StopFill():
                self._stop_fill(action)
            case Drop():
                self._drop(action)
            case Wake():
                # As the loop does it: one timer, and an earlier one is not put off.
                if self.wake_ms is None or action.at_ms < self.wake_ms:
                    self.wake_ms = action.at_ms
                    self.at(action.at_ms, partial(self._tick, action.at_ms))

    def _tick(self, at_ms: int) -> Event | None:
        if self.wake_ms != at_ms:
            return None
        self.wake_ms = None
        return Ticked()

    def _answer(self, action: Grant | Refuse) -> None:
        call = self.calls[action.request]
        self.require(call.answer is None and not call.left, f"{action.request} is answered twice or gone")
        call.answer = action
        if isinstance(action, Refuse):
            self._refused(call, action)
            return
        stay = self.stays.get(action.ref)
        self.require(
            stay is not None and (stay.state == "resident" or stay.serving),
            f"granted {action.ref}, not there",
        )
        assert stay is not None
        self.require(stay.device == action.device and call.ref == action.ref, "granted something else")
        self.require(action.ref in self.planned, f"granted {action.ref}, which left the plan")
        self.require(all(self.healthy[name] for name in stay.devices), "granted on an unhealthy device")
        self.require(
            0 <= action.restore_ms <= self.now_ms - call.asked_ms, "waited longer than since it asked"
        )
        stay.leases += 1
        call.stay, call.ended = stay, stay.ended
        if action.tier is not Tier.DEVICE:
            self.reached[f"restored from {action.tier}"] += 1
            if stay.leases > 1:
                self.reached["joined a restore"] += 1
        if action.request.startswith("hot"):
            self.at(self.now_ms + 15 * GRID_MS, lambda: self._finish(action.request))
        else:
            self.later(lambda: self._finish(action.request), self.rng.choice((0, 2, self.lease_steps)))

    def _refused(self, call: Call, action: Refuse) -> None:
        self.reached[f"refused: {action.reason}"] += 1
        self.reached["a gang was refused for want of devices"] += (
            action.reason is RefusalReason.NEVER_FITS and self.models[call.ref].devices > 1
        )
        lasting = (
            RefusalReason.UNKNOWN_MODEL,
            RefusalReason.NEVER_FITS,
            RefusalReason.QUOTA_BYTES,
            RefusalReason.MODEL_BROKEN,
        )
        self.require((action.retry_ms is None) == (action.reason in lasting), f"odd retry hint: {action}")
        if action.reason is RefusalReason.TIMEOUT:
            due_ms = max(call.deadline_ms, call.asked_ms)
            self.require(self.now_ms == due_ms, f"timed out {self.now_ms - due_ms} ms after its deadline")
        if action.request.startswith("calm"):
            self.require(self._may_refuse(action), f"refused without need: {action}")

    def _may_refuse(self, action: Refuse) -> bool:
        """When nothing fails, only what can not fit is refused; the world does the sum itself."""
        spec = self.models[self.calls[action.request].ref]
        need = self.need_bytes(spec.ref)
        most = self.tenants[spec.ref.tenant].quota.device.max
        if action.reason is RefusalReason.QUOTA_BYTES:
            return most is not None and need > most
        reserved = any(t.quota.device.reserved for t in self.tenants.values() if t.tenant != spec.ref.tenant)
        large = sum(budget >= self.share_bytes(spec.ref) for budget in self.budgets.values())
        return action.reason is RefusalReason.NEVER_FITS and (large < spec.devices or reserved)
