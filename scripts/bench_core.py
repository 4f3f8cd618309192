"""How long the residency core thinks: step and proof together, by kind of decision and number of models.

Covers: a seeded history of requests on one device that holds 95 of 100 models, with a full host tier; every
step with its check is timed by the thread's own clock; and how many requests per second the simulator
replays through the same core. Does not cover: carrying anything out, or whether the decisions are good
(``replay.py``, ``bench_policies.py``).

The same history is played several times. It takes the same decisions each time, so the least time of each
is what the core needs for it; the rest is what other programs did to the machine meanwhile. Percentiles are
over the decisions.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import bench_harness
from bench_suite import Judgement, Section, SuiteReport, Table, add_markdown, deliver, report_of
from request_traces import CATALOGUE_BYTES

from packer import residency, traces
from packer.events import (
    Action,
    DeviceSeen,
    Drop,
    Dropped,
    Event,
    Evict,
    Evicted,
    Finished,
    Grant,
    PackFound,
    Planned,
    Requested,
    Restore,
    Restored,
    TierBudgetSeen,
)
from packer.fleet import parse_fleet
from packer.simulate import Simulation
from packer.types import MIB, ModelRef, ModelSpec, Task, TenantSpec, Tier

NODES = (1_000, 2_000, 5_000, 10_000)
RESIDENT_PARTS = 20  # one of so many models is not resident
TENANTS = 8
CHUNKS = 64
IMAGE_BYTES = 100 * MIB
PACK_BYTES = 67 * MIB
REQUESTS = 3_000
REQUESTS_QUICK = 600
PAUSE_MS = 50
DEADLINE_MS = 1_000_000
SEED = 1
# A decision to evict among this many models must not hold up the requests that need none.
GOAL_MODELS = 1_000
GOAL_MS = 1.0

# The simulator: models, requests, and how much of the models the devices hold.
REPLAY_MODELS = 300
REPLAY_REQUESTS = 200_000
REPLAY_REQUESTS_QUICK = 60_000
# One of so many requests is replayed on each fleet: cold ones take a thousand times as long.
REPLAY_FLEETS = (
    ("all models fit", "64x141GB", 1),
    ("8 devices, 2 of 10 requests cold", "8x360GB,ram=2TB", 10),
    ("8 devices, 4 of 10 requests cold", "8x141GB,ram=2TB", 20),
)
REPLAY_GAP_MS = 20_000
REPLAY_GOAL = 100_000

HIT, EVICTION, RESTORED = "hit", "decision to evict", "restored"


@dataclass(slots=True)
class History:
    """One node in the middle of its life; what every step took, by kind, in microseconds."""

    models: int
    node: residency.Node = field(default_factory=residency.Node)
    now_ms: int = 0
    requests: int = 0
    took_us: dict[str, list[float]] = field(default_factory=dict)
    specs: list[ModelSpec] = field(default_factory=list)

    def begin(self) -> None:
        """A plan, its packs, and one request for each model."""
        chunks = (IMAGE_BYTES // CHUNKS,) * CHUNKS
        self.specs = [
            ModelSpec(
                ModelRef(f"t{i % TENANTS}", f"m{i}", f"{i:016x}"),
                "control:",
                (),
                "transformers",
                Task.EMBEDDING,
                sum(chunks),
                chunks,
                0,
                0,
            )
            for i in range(self.models)
        ]
        resident = self.models - self.models // RESIDENT_PARTS
        self.step(TierBudgetSeen(Tier.HOST, resident * (PACK_BYTES + 3 * MIB)))
        self.step(TierBudgetSeen(Tier.DISK, self.models * 2 * IMAGE_BYTES))
        self.step(DeviceSeen("cpu:0", resident * IMAGE_BYTES))
        tenants = tuple(TenantSpec(f"t{i}") for i in range(TENANTS))
        self.step(Planned(tenants, tuple(self.specs)))
        for spec in self.specs:
            self.step(PackFound(spec.ref, PACK_BYTES, PACK_BYTES))
        for number in range(self.models):
            self.ask(number)
        self.took_us.clear()

    def ask(self, number: int) -> None:
        """The next request, and everything that follows from it."""
        self.now_ms += PAUSE_MS
        self.requests += 1
        request = f"r{self.requests}"
        todo = self.step(Requested(request, self.specs[number].ref, self.now_ms + DEADLINE_MS))
        while todo:
            answer = _answer(todo.pop(0))
            if answer is not None:
                todo += self.step(answer)

    def step(self, event: Event) -> list[Action]:
        started = time.thread_time_ns()
        actions = residency.step(self.node, event, self.now_ms)
        residency.check(self.node)
        took_us = (time.thread_time_ns() - started) / 1000
        kind = _kind(event, actions)
        if kind is not None:
            self.took_us.setdefault(kind, []).append(took_us)
        return actions


def _kind(event: Event, actions: list[Action]) -> str | None:
    if any(isinstance(action, Evict) for action in actions):
        return EVICTION
    if isinstance(event, Requested):
        return HIT if any(isinstance(action, Grant) for action in actions) else None
    return RESTORED if isinstance(event, Restored) else None


def _answer(action: Action) -> Event | None:
    """All goes well, and at once."""
    match action:
        case Restore():
            filled = action.host_bytes > 0
            return Restored(action.ref, action.device, action.from_tier, 100, filled, action.order)
        case Evict():
            return Evicted(action.ref, action.device, action.order)
        case Drop():
            return Dropped(action.ref, action.tier, action.order)
        case Grant():
            return Finished(action.request, 5)
        case _:
            return None


def play(models: int, requests: int) -> dict[str, list[float]]:
    history, rng = History(models), random.Random(SEED)
    history.begin()
    gc.collect()
    for _ in range(requests):
        history.ask(rng.randrange(models))
    return history.took_us


def least(plays: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Of each decision the least that any play took. Raises ``ValueError`` when the plays differ."""
    found: dict[str, list[float]] = {}
    for kind in plays[0]:
        runs = [play[kind] for play in plays]
        found[kind] = [min(times) for times in zip(*runs, strict=True)]
    return found


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def section(models: int, requests: int, rounds: int, log: Callable[[str], None]) -> Section:
    plays = []
    for number in range(rounds):
        log(f"{models} models: play {number + 1}/{rounds}")
        plays.append(play(models, requests))
    took_us = least(plays)
    rows = tuple(
        (kind, str(len(times)), *(f"{quantile(times, share):.0f}" for share in (0.5, 0.99, 1.0)))
        for kind in (HIT, EVICTION, RESTORED)
        for times in [took_us.get(kind, [])]
        if times
    )
    title = f"Step and check, {models:,} models, {models - models // RESIDENT_PARTS:,} resident, microseconds"
    table = Table(title, ("decision", "how many", "median", "p99", "most"), rows)
    judgements: tuple[Judgement, ...] = ()
    if models == GOAL_MODELS:
        times = took_us.get(EVICTION)
        found_ms = quantile(times, 0.99) / 1000 if times else None
        goal = f"decision to evict, {models:,} models, p99"
        judgements = (Judgement(goal, found_ms, GOAL_MS, False, " ms", "" if times else "there was none"),)
    return Section(f"{models} models", (table,), judgements, runs=took_us)


# --- the simulator --------------------------------------------------------------------------------


def replayed_trace(requests: int) -> traces.Trace:
    """Zipf's law over the models, at random times."""
    rng = random.Random(SEED)
    weights = [1 / (rank + 1) for rank in range(REPLAY_MODELS)]
    at_ms, now_ms = [], 0
    for _ in range(requests):
        now_ms += int(rng.expovariate(1 / REPLAY_GAP_MS))
        at_ms.append(now_ms)
    catalog = tuple(
        traces.Sized(f"t{number % TENANTS}", f"m{number}", rng.choice(CATALOGUE_BYTES))
        for number in range(REPLAY_MODELS)
    )
    models = tuple(rng.choices(range(REPLAY_MODELS), weights, k=requests))
    return traces.Trace(tuple(at_ms), models, (-1,) * requests, catalog)


def replay_section(requests: int, rounds: int, log: Callable[[str], None]) -> Section:
    """Requests per second of one core's time, the best of the rounds, and where the rest goes."""
    rows: list[tuple[str, ...]] = []
    rates: dict[str, float] = {}
    for name, spec, part in REPLAY_FLEETS:
        trace = replayed_trace(requests // part)
        took_s = []
        for number in range(rounds):
            log(f"simulator, {name}: play {number + 1}/{rounds}")
            simulation = Simulation(trace, parse_fleet(spec))
            gc.collect()
            gc.disable()
            started = time.thread_time()
            outcome = simulation.run()
            took_s.append(time.thread_time() - started)
            gc.enable()
        rates[name] = len(trace.at_ms) / min(took_s)
        at_once = outcome.all.hit_shares["device"]
        steps = outcome.steps / len(trace.at_ms)
        rows.append((name, f"{rates[name]:,.0f}", f"{at_once:.2%}", f"{steps:.2f}"))
    title = f"Simulator, {REPLAY_MODELS} models, {requests:,} requests"
    columns = ("fleet", "requests per second", "found on a device", "whole steps per request")
    first = REPLAY_FLEETS[0][0]
    goal = f"simulated requests per second of a core, {REPLAY_MODELS} models, {first}"
    judged = Judgement(goal, rates[first], REPLAY_GOAL)
    return Section("simulator", (Table(title, columns, tuple(rows)),), (judged,))


def run(
    requests: int, replayed: int, rounds: int, nodes: Sequence[int], log: Callable[[str], None]
) -> SuiteReport:
    sections = [section(models, requests, rounds, log) for models in nodes]
    sections.append(replay_section(replayed, min(rounds, bench_harness.ROUNDS_QUICK), log))
    facts: dict[str, str | int | float] = {
        "history": f"{requests} requests, uniform over the models, seed {SEED}",
        "times": f"thread time, of each decision the least of {rounds} plays",
        "python": sys.version.split()[0],
    }
    return report_of("core", facts, sections)


def main(arguments: Sequence[str] | None = None, nodes: Sequence[int] = NODES) -> int:
    parser = bench_harness.parser(__doc__)
    add_markdown(parser)
    options = parser.parse_args(arguments)
    rounds = options.rounds or (bench_harness.ROUNDS_QUICK if options.quick else bench_harness.ROUNDS)
    if options.rounds is not None and not 1 <= options.rounds <= bench_harness.ROUNDS_MAX:
        parser.error(f"--rounds {options.rounds}: use 1 to {bench_harness.ROUNDS_MAX}")
    requests = REQUESTS_QUICK if options.quick else REQUESTS
    replayed = REPLAY_REQUESTS_QUICK if options.quick else REPLAY_REQUESTS
    report = run(requests, replayed, rounds, nodes, lambda line: print(line, file=sys.stderr, flush=True))
    return deliver(report, options, "scripts/bench_core.py")


if __name__ == "__main__":
    sys.exit(main())
