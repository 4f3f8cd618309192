"""What isolation costs: one noisy tenant among eight, under no quota, fixed shares, borrowing and lending.

Covers: ServeGen-derived requests of seven days on 1128 GB, equal quotas, and a tenant that asks for 80 models
one after the other, one every 20 s, for three days; three seeds; every tenant compared at every instant with
a private slice of its share. Lending is ``packer/lending.py``, ranking the production keep-index. Does not
cover: the core around them (``tests/test_lending.py`` plays whole histories through it), host and disk tier.

The traces are test data beside the checkout; ServeGen says nothing of tenants, so its clients are dealt out
to eight of them by the seed. The goals compare with the cheapest scheme that isolates nobody.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import bench_harness
from bench_suite import Judgement, Section, SuiteReport, Table, add_markdown, deliver, report_of
from isolation_model import Crowd, Outcome, Town, alone, judge, town
from request_traces import GB, TRACES, NoTrace, servegen

from packer.lending import CREDIT_MAX_MS, MARGIN_PERCENT, Terms

THINNING = 1e-4
CAPACITY_BYTES = 1128 * GB
DAYS, DAYS_QUICK = 7.0, 1.0
SEEDS, SEEDS_QUICK = (0, 1, 2), (0,)
FREE = "keep-index, no quota"
STATIC = "least recent use, fixed shares"
NO_MARGIN = "lending, margin 0"
OURS = "lending, margin 1 (default)"
GOAL_COST = 1.14
GOAL_COST_NO_MARGIN = 1.03


def schemes(capacity_bytes: int) -> dict[str, Callable[[Town], Crowd]]:
    def lending(margin_percent: int) -> Callable[[Town], Crowd]:
        terms = Terms(margin_percent, CREDIT_MAX_MS)
        return lambda town: Crowd(town, capacity_bytes, "keep", terms=terms)

    return {
        "least recent use, no quota": lambda town: Crowd(town, capacity_bytes, "lru"),
        "least recent use, borrowing": lambda town: Crowd(town, capacity_bytes, "lru", guarded=True),
        FREE: lambda town: Crowd(town, capacity_bytes, "keep"),
        "keep-index, borrowing": lambda town: Crowd(town, capacity_bytes, "keep", guarded=True),
        NO_MARGIN: lending(0),
        "lending, margin 0.5": lending(50),
        OURS: lending(MARGIN_PERCENT),
        "lending, margin 2": lending(200),
    }


def outcomes(seed: int, days: float, folder: Path, log: Callable[[str], None]) -> dict[str, Outcome]:
    """Every scheme on the same requests. Raises ``NoTrace``."""
    crowd = town(servegen(THINNING, seed, folder), days, seed)
    log(f"seed {seed}: {len(crowd.at_ms)} requests for {len(crowd.size_bytes)} models")
    alone_ms = alone(crowd, CAPACITY_BYTES // crowd.tenants)
    found = {STATIC: judge(crowd, alone_ms, alone_ms)}
    for name, make in schemes(CAPACITY_BYTES).items():
        log(f"seed {seed}: {name}")
        pool = make(crowd)
        costs = [pool.use(model, at) for model, at in zip(crowd.models, crowd.at_ms, strict=True)]
        found[name] = judge(crowd, costs, alone_ms)
    return found


def section(found: Sequence[dict[str, Outcome]]) -> Section:
    names = sorted(found[0], key=lambda name: list(schemes(0)).index(name) if name != STATIC else 0.5)
    rows = []
    ratios: dict[str, list[float]] = {}
    for name in names:
        each = [seed[name] for seed in found]
        ratios[name] = [seed[name].all_s / seed[FREE].all_s for seed in found]
        rows.append(
            (
                name,
                f"{statistics.fmean(o.all_s for o in each):.4f}",
                f"{statistics.fmean(ratios[name]):.3f}",
                f"{statistics.fmean(o.scan_s for o in each):.3f}",
                f"{statistics.fmean(o.calm_s for o in each):.3f}",
                f"{max(o.worst_ratio for o in each):.4f}",
                f"{max(o.debt_s_max for o in each):.1f}",
            )
        )
    columns = ("scheme", "all s", "to no quota", "scan s", "calm s", "worst to alone", "most debt s")
    notes = (
        "all: mean cold seconds of all requests; scan, calm: of the eight tenants in the scan and outside.",
        "worst to alone: the dearest tenant over its private slice; most debt: how far",
        "any tenant ever was behind its private slice. Means over the seeds, the last two the greatest.",
    )
    judgements = (
        Judgement(
            "margin 1: most debt of any tenant", max(o[OURS].debt_s_max for o in found), 0, False, " s"
        ),
        Judgement("margin 1: cost to no quota", statistics.fmean(ratios[OURS]), GOAL_COST, False),
        Judgement(
            "margin 0: cost to no quota", statistics.fmean(ratios[NO_MARGIN]), GOAL_COST_NO_MARGIN, False
        ),
    )
    runs = {f"{name}, to no quota": values for name, values in ratios.items()}
    runs |= {f"{name}, most debt s": [seed[name].debt_s_max for seed in found] for name in names}
    return Section(
        "noisy tenant", (Table("One noisy tenant", columns, tuple(rows), notes),), judgements, runs=runs
    )


def run(days: float, seeds: Sequence[int], folder: Path, log: Callable[[str], None]) -> SuiteReport:
    found = [outcomes(seed, days, folder, log) for seed in seeds]
    facts: dict[str, str | int | float] = {
        "trace": f"ServeGen thinned to {THINNING:g}, {days:g} days, seeds {', '.join(map(str, seeds))}",
        "memory": f"{CAPACITY_BYTES // GB} GB, a ninth reserved for each tenant",
    }
    return report_of("isolation", facts, [section(found)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = bench_harness.parser(__doc__)
    parser.add_argument("--traces", type=Path, default=TRACES, metavar="DIR", help="where the traces lie")
    add_markdown(parser)
    options = parser.parse_args(arguments)
    if options.rounds is not None:
        parser.error("--rounds: a replay gives the same each time; this bench has none")
    days, seeds = (DAYS_QUICK, SEEDS_QUICK) if options.quick else (DAYS, SEEDS)
    try:
        report = run(days, seeds, options.traces, lambda line: print(line, file=sys.stderr, flush=True))
    except NoTrace as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return deliver(report, options, "scripts/bench_isolation.py")


if __name__ == "__main__":
    sys.exit(main())
