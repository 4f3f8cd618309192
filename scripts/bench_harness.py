"""One small harness for every bench: interleaved runs, medians, ratios to a named peer and limit, goals.

Covers: running the cases of a bench round by round, in another order each round, so that a slow moment of
the machine hits all of them; the table; the JSON file; the goals and the exit code of ``--check``.
Does not cover: what is measured. A case returns its own time in milliseconds, so that what it does before
and after the clock (evicting a model, starting a server) is not counted.

A figure alone says more about the machine than about the code. So every bench names a *peer* (what a user
would do without us) and a *limit* (what physics allows), and goals are ratios to those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROUNDS = 9  # an odd number, so that the median is a run that happened
ROUNDS_QUICK = 3
ROUNDS_MAX = 1000  # more is a typing mistake: the slowest case takes seconds
ORDER_SEED = 1  # the orders of the rounds are the same in every run of the bench


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure. ``run`` does it once and returns the milliseconds that count."""

    name: str
    run: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Goal:
    """``case`` takes at most ``ratio_max`` times as long as ``against``, by their medians."""

    case: str
    against: str
    ratio_max: float

    @property
    def text(self) -> str:
        return f"{self.case} takes at most {self.ratio_max:g} of {self.against}"


@dataclass(frozen=True, slots=True)
class Bench:
    """A bench: its cases, which of them is the peer and which the limit, and what it must reach."""

    name: str
    cases: tuple[Case, ...]
    peer: str
    limit: str
    goals: tuple[Goal, ...] = ()
    facts: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if len(set(names)) != len(names):
            raise ValueError(f"bench {self.name}: two cases share a name in {names}")
        wanted = [self.peer, self.limit, *(name for g in self.goals for name in (g.case, g.against))]
        for name in wanted:
            if name not in names:
                raise ValueError(f"bench {self.name}: there is no case {name!r}, only {names}")


@dataclass(frozen=True, slots=True)
class Row:
    """What the runs of one case gave."""

    case: str
    runs_ms: tuple[float, ...]
    median_ms: float
    least_ms: float
    greatest_ms: float
    to_peer: float
    to_limit: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what this run gave."""

    goal: str
    ratio: float
    ratio_max: float
    reached: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run of a bench found; the JSON file is this."""

    bench: str
    peer: str
    limit: str
    rounds: int
    machine: str
    cores: int
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    facts: Mapping[str, str | int | float]


def measure(
    bench: Bench, rounds: int, progress: Callable[[str], None] = lambda line: None, warm_up: bool = True
) -> Report:
    """Run every case once unmeasured (unless not to ``warm_up``: each run starts in a fresh process, say)
    and then ``rounds`` times, interleaved; a case's error is not caught."""
    runs: dict[str, list[float]] = {case.name: [] for case in bench.cases}
    order = random.Random(ORDER_SEED)
    for case in bench.cases if warm_up else ():
        progress(f"warming up: {case.name}")
        case.run()
    for number in range(rounds):
        cases = list(bench.cases)
        order.shuffle(cases)
        for case in cases:
            took_ms = case.run()
            if not took_ms > 0:
                raise ValueError(f"case {case.name!r} returned {took_ms!r} ms: a time is above zero")
            runs[case.name].append(took_ms)
            progress(f"round {number + 1}/{rounds}: {case.name}: {took_ms:.1f} ms")
    return weigh(bench, runs)


def weigh(bench: Bench, runs: Mapping[str, Sequence[float]]) -> Report:
    """Medians, ratios and verdicts of runs already made."""
    medians = {name: statistics.median(values) for name, values in runs.items()}
    rows = tuple(
        Row(
            case=name,
            runs_ms=tuple(values),
            median_ms=medians[name],
            least_ms=min(values),
            greatest_ms=max(values),
            to_peer=medians[name] / medians[bench.peer],
            to_limit=medians[name] / medians[bench.limit],
        )
        for name, values in runs.items()
    )
    verdicts = tuple(
        Verdict(goal.text, ratio, goal.ratio_max, ratio <= goal.ratio_max)
        for goal in bench.goals
        for ratio in [medians[goal.case] / medians[goal.against]]
    )
    return Report(
        bench=bench.name,
        peer=bench.peer,
        limit=bench.limit,
        rounds=min(len(values) for values in runs.values()),
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=len(os.sched_getaffinity(0)),
        rows=rows,
        verdicts=verdicts,
        facts=dict(bench.facts),
    )


def print_report(report: Report, out: TextIO) -> None:
    """The table and the goals, for people."""
    print(
        f"\n{report.bench}: {report.rounds} interleaved rounds, {report.machine}, {report.cores} cores",
        file=out,
    )
    print(f"peer: {report.peer}; limit: {report.limit}", file=out)
    for name, value in report.facts.items():
        print(f"{name}: {value}", file=out)
    wide = max(len(row.case) for row in report.rows)
    header = (
        f"{'case':<{wide}}  {'median':>10}  {'least':>10}  {'greatest':>10}  {'to peer':>8}  {'to limit':>8}"
    )
    print(f"\n{header}\n{'-' * len(header)}", file=out)
    for row in report.rows:
        times = "".join(f"  {ms:>7.1f} ms" for ms in (row.median_ms, row.least_ms, row.greatest_ms))
        print(f"{row.case:<{wide}}{times}  {row.to_peer:>8.3f}  {row.to_limit:>8.2f}", file=out)
    print(file=out)
    for verdict in report.verdicts:
        word = "reached" if verdict.reached else "MISSED "
        print(f"{word}  {verdict.goal}: {verdict.ratio:.3f}", file=out)


def write_json(report: Report, path: Path) -> None:
    """The whole report, replacing the file at once so that a reader never sees half of it."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(asdict(report), indent=2) + "\n")
    beside.replace(path)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every bench has; a bench may add its own."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{ROUNDS_QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--rounds", type=int, help=f"how many rounds, 1 to {ROUNDS_MAX}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 and name every goal that was missed")
    return parser


def run_bench(
    bench: Bench, options: argparse.Namespace, out: TextIO = sys.stdout, log: TextIO = sys.stderr
) -> int:
    """Measure, print, write; returns the exit code. ``options`` come from ``parser()``."""
    rounds = options.rounds if options.rounds is not None else ROUNDS_QUICK if options.quick else ROUNDS
    if not 1 <= rounds <= ROUNDS_MAX:
        print(f"error: --rounds {rounds}: use 1 to {ROUNDS_MAX}", file=log)
        return 2
    report = measure(bench, rounds, lambda line: print(line, file=log, flush=True))
    print_report(report, out)
    if options.json is not None:
        write_json(report, options.json)
    missed = [verdict for verdict in report.verdicts if not verdict.reached]
    if not options.check or not missed:
        return 0
    for verdict in missed:
        print(f"missed goal: {verdict.goal}, this run took {verdict.ratio:.3f}", file=log)
    return 1
