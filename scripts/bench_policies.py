"""Eviction policies on real traffic, and what each step of the stack brings: mean cold seconds per request.

Covers: ServeGen-derived traces at three sizes of memory over several seeds, every policy on the very same
requests (``pool_model``); the steps from a cold boot to the full stack (``stack_pool``), and the production
cores on the same traffic (``packer.simulate``); with ``--stress`` synthetic traffic of other shapes. Does not
cover: how fast the cores are (``bench_core``), packing (``bench_packing``).

The optimum is the fractional one (``packer.regret``) with the fixed time of each of its restores. Columns are
means over the seeds; a goal is judged in every column. Traces are made anew in every process from their seed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import bench_harness
from bench_suite import Judgement, Section, SuiteReport, Table, add_markdown, deliver, report_of
from pool_model import BYTES_PER_MS, FIXED_MS, replay
from request_traces import GB, TRACES, NoTrace, Trace, servegen
from stack_pool import OURS, STEPS, replay_stack
from stress_traces import SHAPES, stress

from control.simulated_router import Router
from packer import traces
from packer.fleet import parse_fleet
from packer.regret import UseLog, missing_bytes
from packer.simulate import simulate

THINNINGS = (1e-5, 1e-4)
MEMORY_GB = (282, 564, 1128)
SEEDS = (1, 2, 3)
KEEP, OPTIMUM, BELADY = "keep", "optimum", "belady"
PEERS = ("lru", "gdsf", "s3fifo", "sieve", "lfu", "hybrid", "ttl")
CLAIRVOYANT = (BELADY, OPTIMUM)
# (thinning, GB on devices, GB of RAM, the same as a fleet of the simulator, goal in s)
STACKS = (
    (1e-5, 282, 512, "2x141GB,ram=512GB", 0.2),
    (1e-4, 1128, 2048, "8x141GB,ram=2048GB", 0.02),
)
CORES = "the production cores, device by device"
CORES_SETTINGS = ",ratio=0.667,ram_ratio=0.75,fixed_ms=100,host_gbps=45,disk_gbps=7"
# A quick run looks at the first days of the dense trace only.
QUICK_DAYS = {1e-5: 14.0, 1e-4: 1.5}
GAIN_MIN = 1 / 0.93  # at least 7% below
TTL_RATIO_MIN = 2.5
# What a stress trace may cost more than the best peer for it, picked in hindsight.
STRESS_RATIO_MAX = 1.05


@dataclass(frozen=True, slots=True)
class Job:
    """One replay. ``what`` is a policy, a step of the stack, or the production cores."""

    kind: str  # "policy", "stack", "cores" or "stress"
    what: str
    source: str  # the trace: a thinning, or the name of a shape
    memory_gb: int
    seed: int
    days: float
    folder: str


@dataclass(frozen=True, slots=True)
class Found:
    job: Job
    cold_s: float
    p99_s: float


def _cut(trace: Trace, days: float) -> Trace:
    end_ms = trace.at_ms[0] + int(days * 86_400_000)
    count = sum(1 for at_ms in trace.at_ms if at_ms < end_ms)
    return Trace(trace.name, trace.at_ms[:count], trace.models[:count], trace.names, trace.size_bytes)


@lru_cache(maxsize=2)
def _trace(source: str, seed: int, days: float, folder: str) -> Trace:
    if source in SHAPES:
        return stress(source, seed)
    return _cut(servegen(float(source), seed, Path(folder)), days)


def run_job(job: Job) -> Found:
    trace = _trace(job.source, job.seed, job.days, job.folder)
    if job.kind == "stack":
        (ram_gb,) = (ram for thinning, _, ram, _, _ in STACKS if f"{thinning:g}" == job.source)
        (step,) = (step for step in STEPS if step.name == job.what)
        result = replay_stack(trace, step, job.memory_gb, ram_gb)
        return Found(job, result.cold_s_mean, result.cold_s_p99)
    if job.kind == "cores":
        return _run_cores(job, trace)
    if job.what == OPTIMUM:
        return Found(job, optimum_s(trace, job.memory_gb * GB), math.nan)
    result = replay(trace, job.what, job.memory_gb * GB)
    return Found(job, result.cold_s_mean, result.cold_s_p99)


def optimum_s(trace: Trace, capacity_bytes: int) -> float:
    missing = missing_bytes(UseLog(trace.at_ms, trace.models, (), trace.size_bytes), capacity_bytes)
    restores = sum(1 for nbytes in missing if nbytes)
    return (sum(missing) / BYTES_PER_MS + restores * FIXED_MS) / 1000 / len(missing)


def _run_cores(job: Job, trace: Trace) -> Found:
    catalog = tuple(
        traces.Sized(f"t{number % 8}", name, size)
        for number, (name, size) in enumerate(zip(trace.names, trace.size_bytes, strict=True))
    )
    (spec,) = (spec for thinning, _, _, spec, _ in STACKS if f"{thinning:g}" == job.source)
    asked = traces.Trace(trace.at_ms, trace.models, (-1,) * len(trace.at_ms), catalog)
    outcome = simulate(asked, parse_fleet(spec + CORES_SETTINGS), Router().choose)
    return Found(job, outcome.all.cold_s_mean, outcome.all.cold_s_p99)


# --- what is run ----------------------------------------------------------------------------------


def jobs_of(quick: bool, stressed: bool, folder: Path) -> list[Job]:
    """The slowest first, so that no process is left alone at the end."""
    seeds = SEEDS[:1] if quick else SEEDS
    days = QUICK_DAYS if quick else dict.fromkeys(THINNINGS, 14.0)
    found: list[Job] = []
    for thinning in sorted(THINNINGS, reverse=True):

        def job(
            kind: str,
            what: str,
            memory_gb: int,
            seed: int,
            source: str = f"{thinning:g}",
            t: float = thinning,
        ) -> Job:
            return Job(kind, what, source, memory_gb, seed, days[t], str(folder))

        for seed in seeds:
            for stack_thinning, device_gb, _, _, _ in STACKS:
                if stack_thinning == thinning:
                    found.append(job("cores", CORES, device_gb, seed))
                    found += [job("stack", step.name, device_gb, seed) for step in STEPS]
            for memory_gb in MEMORY_GB:
                found += [job("policy", name, memory_gb, seed) for name in (KEEP, *PEERS, *CLAIRVOYANT)]
    for shape in SHAPES if stressed else ():
        for seed in seeds:
            for share in (4, 2):
                gb = stress_gb(shape, seed, share)
                names = (KEEP, *PEERS, *CLAIRVOYANT)
                found += [Job("stress", name, shape, gb, seed, 0.0, str(folder)) for name in names]
    return found


def stress_gb(shape: str, seed: int, share: int) -> int:
    """A quarter or a half of what all models of the trace take."""
    return sum(_trace(shape, seed, 0.0, "").size_bytes) // share // GB


def run_all(jobs: Sequence[Job], processes: int, log: Callable[[str], None]) -> list[Found]:
    found: list[Found] = []
    with ProcessPoolExecutor(processes) as pool:
        running = [pool.submit(run_job, job) for job in jobs]
        for number, done in enumerate(as_completed(running), 1):
            result = done.result()
            found.append(result)
            job = result.job
            log(
                f"{number}/{len(jobs)} {job.source} seed {job.seed} {job.memory_gb} GB {job.what}: "
                f"{result.cold_s:.4f} s"
            )
    return found


# --- what is judged -------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(mean(math.log(value) for value in values))


def column_of(found: Sequence[Found], kind: str, source: str, memory_gb: int) -> dict[str, float]:
    """Policy: cold seconds, the mean over the seeds."""
    values: dict[str, list[float]] = {}
    for each in found:
        if (each.job.kind, each.job.source, each.job.memory_gb) == (kind, source, memory_gb):
            values.setdefault(each.job.what, []).append(each.cold_s)
    return {name: mean(each) for name, each in values.items()}


def policies_section(found: Sequence[Found]) -> Section:
    columns = {
        (f"{thinning:g}", memory_gb): column_of(found, "policy", f"{thinning:g}", memory_gb)
        for thinning in THINNINGS
        for memory_gb in MEMORY_GB
    }
    best = {at: min(PEERS, key=lambda name: column[name]) for at, column in columns.items()}
    rows: list[tuple[str, ...]] = [
        (name, *(f"{column[name]:.4f}" for column in columns.values()))
        for name in (*PEERS, KEEP, BELADY, OPTIMUM)
    ]
    gains = {at: 1 - column[KEEP] / column[best[at]] for at, column in columns.items()}
    rows.append(("keep below the best peer", *(f"{gain:.1%} ({best[at]})" for at, gain in gains.items())))
    rows.append(("keep over the optimum", *(f"{c[KEEP] / c[OPTIMUM]:.2f}" for c in columns.values())))
    head = ("mean cold seconds", *(f"{source} / {gb} GB" for source, gb in columns))
    judged = tuple(
        Judgement(
            f"best peer over keep, {source} / {gb} GB",
            columns[source, gb][best[source, gb]] / c[KEEP],
            GAIN_MIN,
        )
        for (source, gb), c in columns.items()
    )
    against_ttl = geometric_mean([column["ttl"] / column[KEEP] for column in columns.values()])
    ttl = Judgement("TTL of five minutes over keep, geometric mean", against_ttl, TTL_RATIO_MIN)
    over = geometric_mean([column[KEEP] / column[OPTIMUM] for column in columns.values()])
    title = "Mean cold seconds per request, one pool, 0.4 s and 7 GB/s per restore"
    notes = (
        "keep evicts in part, the others whole models, as they are defined; optimum: Belady on fractions.",
        f"keep over the optimum, geometric mean: {over:.2f}.",
    )
    runs = {f"{at[0]}/{at[1]}/{name}": [cold] for at, c in columns.items() for name, cold in c.items()}
    return Section("policies", (Table(title, head, tuple(rows), notes),), (*judged, ttl), runs=runs)


def stack_section(found: Sequence[Found], quick: bool) -> Section:
    names = [step.name for step in STEPS]
    names.insert(names.index(OURS.name) + 1, CORES)
    cells: dict[tuple[str, str], tuple[float, float]] = {}
    for name in names:
        for thinning, *_ in STACKS:
            source = f"{thinning:g}"
            mine = [
                each
                for each in found
                if each.job.kind in ("stack", "cores") and (each.job.what, each.job.source) == (name, source)
            ]
            cells[name, source] = (mean(f.cold_s for f in mine), mean(f.p99_s for f in mine))
    sources = [f"{thinning:g}" for thinning, *_ in STACKS]
    rows = tuple(
        (name, *(f"{cells[name, s][0]:.4f} / {cells[name, s][1]:.2f}" for s in sources)) for name in names
    )
    head = ("mean / p99 cold seconds", *(f"{t:g} on {d} + {r} GB" for t, d, r, _, _ in STACKS))
    notes = (
        "Assumed: NVMe 7 GB/s, RAM to device 45 GB/s, 0.4 s per restore, 0.1 s with a parked worker, engine "
        "boot 25 s + 2 GB/s. Measured here (bench_codec): bf16 takes 0.667 of its size on disk, 0.75 in RAM.",
        f"{CORES}: disk and links are shared by what runs at once, no model lies in two pieces; the rows "
        "above are one pool.",
    )
    judged = []
    for thinning, device_gb, ram_gb, _, goal_s in STACKS:
        if quick and QUICK_DAYS[thinning] < 14.0:
            continue  # the first days are first uses for the most part, which no policy can spare
        for name, what in ((OURS.name, "full stack"), (CORES, "production cores")):
            text = f"{what}, {thinning:g} on {device_gb} + {ram_gb} GB, mean added cold time"
            judged.append(Judgement(text, cells[name, f"{thinning:g}"][0], goal_s, False, " s"))
    title = "Each step of the stack"
    return Section("stack", (Table(title, head, rows, notes),), tuple(judged))


def stress_section(found: Sequence[Found]) -> Section:
    at = sorted({(f.job.source, f.job.memory_gb) for f in found if f.job.kind == "stress"})
    if not at:
        return Section("stress", skipped=("give --stress",))
    rows = []
    ratios = []
    for shape in SHAPES:
        for small in (True, False):
            columns = []
            for source, gb in at:
                column = column_of(found, "stress", source, gb)
                half = gb * 3 > sum(_trace(source, 1, 0.0, "").size_bytes) // GB
                if source == shape and half is not small:
                    columns.append(column)
            sums = {name: mean(column[name] for column in columns) for name in columns[0]}
            best = min(PEERS, key=lambda name: sums[name])
            ratios.append(sums[KEEP] / sums[best])
            words = (f"{sums[name]:.4f}" for name in (KEEP, *PEERS, BELADY, OPTIMUM))
            rows.append(
                (f"{shape}, {'a quarter' if small else 'half'}", *words, f"{ratios[-1]:.3f} ({best})")
            )
    head = ("shape, memory over all models", KEEP, *PEERS, BELADY, OPTIMUM, "keep over best")
    judged = Judgement("keep over the best peer, worst shape", max(ratios), STRESS_RATIO_MAX, False)
    return Section("stress", (Table("Synthetic shapes", head, tuple(rows)),), (judged,))


def run(quick: bool, stressed: bool, folder: Path, processes: int, log: Callable[[str], None]) -> SuiteReport:
    found = run_all(jobs_of(quick, stressed, folder), processes, log)
    sections = [policies_section(found), stack_section(found, quick)]
    if stressed:
        sections.append(stress_section(found))
    facts: dict[str, str | int | float] = {
        "traces": "ServeGen clients as models, thinned" + (", first days only" if quick else ""),
        "seeds": len(SEEDS[:1] if quick else SEEDS),
        "python": sys.version.split()[0],
    }
    return report_of("policies", facts, sections)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = bench_harness.parser(__doc__)
    parser.add_argument("--stress", action="store_true", help="synthetic traffic of other shapes as well")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the public traces")
    parser.add_argument("--processes", type=int, default=2, help="replays at once (default %(default)s)")
    add_markdown(parser)
    options = parser.parse_args(arguments)
    if not 1 <= options.processes <= 256:
        parser.error(f"--processes {options.processes}: use 1 to 256")
    try:
        report = run(
            options.quick,
            options.stress,
            options.traces,
            options.processes,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
    except NoTrace as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return deliver(report, options, "scripts/bench_policies.py")


if __name__ == "__main__":
    sys.exit(main())
