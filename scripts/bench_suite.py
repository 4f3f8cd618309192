"""A bench of several sections: their tables, their goals, one report.

Covers: goals that are judged by a figure (at least, at most, or could not be judged), tables for people and
for the documentation from the same rows, the JSON file, the exit code of ``--check``, and the ``main`` that
such benches share. Does not cover: interleaved rounds (``bench_harness``) or what is measured.

A goal that could not be judged is not reached: a peer that is not there has not been beaten.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import bench_harness

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Judgement:
    """A goal and what this run gave. ``value`` None: could not be judged, ``why`` says the reason; of a
    goal that was missed ``why`` tells what the time went into."""

    goal: str
    value: float | None
    bound: float
    at_least: bool = True
    unit: str = ""
    why: str = ""

    @property
    def reached(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def text(self) -> str:
        side = "at least" if self.at_least else "at most"
        found = "could not be judged" if self.value is None else f"{self.value:.4g}{self.unit}"
        reason = f" ({self.why})" if self.why and not self.reached else ""
        return f"{self.goal}: {side} {self.bound:g}{self.unit}, this run: {found}{reason}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words, the first column is the name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: {len(row)} words for {len(self.columns)} columns")


@dataclass(frozen=True, slots=True)
class Section:
    """What one part of a bench found. ``runs``: every single figure behind the tables."""

    name: str
    tables: tuple[Table, ...] = ()
    judgements: tuple[Judgement, ...] = ()
    skipped: tuple[str, ...] = ()
    runs: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """Everything one run found; the JSON file is this."""

    bench: str
    machine: str
    cores: int
    facts: Mapping[str, str | int | float]
    sections: tuple[Section, ...]

    @property
    def judgements(self) -> tuple[Judgement, ...]:
        return tuple(judgement for section in self.sections for judgement in section.judgements)


def report_of(bench: str, facts: Mapping[str, str | int | float], sections: Iterable[Section]) -> SuiteReport:
    # Without what a distributor or a host appends to the version.
    release = platform.release().partition("-")[0]
    machine = f"{platform.system()} {release} {platform.machine()}, {_processor()}"
    return SuiteReport(bench, machine, len(os.sched_getaffinity(0)), dict(facts), tuple(sections))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown processor")


def print_suite(report: SuiteReport, out: TextIO) -> None:
    """For people at a terminal."""
    print(f"\n{report.bench}: {report.machine}, {report.cores} cores", file=out)
    for name, value in report.facts.items():
        print(f"{name}: {value}", file=out)
    for section in report.sections:
        _print_tables(section, out)
    print(file=out)
    _print_judgements(report.judgements, out)


def print_section(section: Section, out: TextIO) -> None:
    """What one section found, at once: the whole report may be minutes away."""
    _print_tables(section, out)
    _print_judgements(section.judgements, out)
    out.flush()


def _print_tables(section: Section, out: TextIO) -> None:
    for table in section.tables:
        _print_table(table, out)
    for line in section.skipped:
        print(f"\nskipped  {section.name}: {line}", file=out)


def _print_judgements(judgements: Iterable[Judgement], out: TextIO) -> None:
    for judgement in judgements:
        print(f"{'reached' if judgement.reached else 'MISSED '}  {judgement.text}", file=out)


def _print_table(table: Table, out: TextIO) -> None:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(table.columns))]
    print(f"\n{table.title}", file=out)
    for number, line in enumerate(lines):
        words = [
            word.ljust(width) if at == 0 else word.rjust(width)
            for at, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(words).rstrip(), file=out)
        if number == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2), file=out)
    for note in table.notes:
        print(f"  {note}", file=out)


def write_suite_json(report: SuiteReport, path: Path) -> None:
    """Replaces the file at once, so that a reader never sees half of it."""
    content = asdict(report)
    content["verdicts"] = [asdict(each) | {"reached": each.reached} for each in report.judgements]
    _replace(path, json.dumps(content, indent=2) + "\n")


def write_markdown(report: SuiteReport, path: Path, date: str, command: str) -> None:
    """The same tables for the documentation, so that nobody types a figure.

    What stands between the two marks of this bench is replaced; a file without them gets both at its end.
    """
    lines = [f"{date}, {report.machine}, {report.cores} cores. `{command}`.", ""]
    lines += [f"* {name}: {value}" for name, value in report.facts.items()]
    for section in report.sections:
        for table in section.tables:
            lines += ["", f"### {table.title}", ""]
            lines.append("| " + " | ".join(table.columns) + " |")
            lines.append("|" + "---|" * len(table.columns))
            lines += ["| " + " | ".join(row) + " |" for row in table.rows]
            lines += ["", *(f"{note}  " for note in table.notes)] if table.notes else []
        lines += [f"\nNot run ({section.name}): {line}" for line in section.skipped]
    lines += ["", "### Goals", "", "| | goal | wanted | this run |", "|---|---|---|---|"]
    lines += [_goal_row(judgement) for judgement in report.judgements]
    text = "\n".join(lines) + "\n"
    begin, end = (f"<!-- {word} of bench {report.bench} -->\n" for word in ("begin", "end"))
    around = path.read_text() if path.exists() else ""
    before, after = around, ""
    if around.count(begin) == around.count(end) == 1:
        before, after = around.partition(begin)[0], around.partition(end)[2]
    _replace(path, f"{before}{begin}\n{text}\n{end}{after}")


def _goal_row(judgement: Judgement) -> str:
    side = "≥" if judgement.at_least else "≤"
    found = "not judged" if judgement.value is None else f"{judgement.value:.3g}{judgement.unit}"
    if judgement.why and not judgement.reached:
        found += f"; {judgement.why}"
    word = "reached" if judgement.reached else "**missed**"
    return f"| {word} | {judgement.goal} | {side} {judgement.bound:g}{judgement.unit} | {found} |"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def name_missed(report: SuiteReport, log: TextIO) -> int:
    """The exit code of ``--check``: 1 and every missed goal by name, or 0."""
    missed = [judgement for judgement in report.judgements if not judgement.reached]
    for judgement in missed:
        print(f"missed goal: {judgement.text}", file=log)
    return 1 if missed else 0


def add_markdown(parser: argparse.ArgumentParser) -> None:
    """The options of a bench whose tables are copied into the documentation."""
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    today = time.strftime("%Y-%m-%d")
    parser.add_argument("--date", default=today, help="the date that --markdown names")


def deliver(report: SuiteReport, options: argparse.Namespace, command: str) -> int:
    """Print the report and write the files that the options name; returns the exit code.

    ``options`` come from ``bench_harness.parser`` and ``add_markdown``.
    """
    print_suite(report, sys.stdout)
    if options.json is not None:
        write_suite_json(report, options.json)
    if options.markdown is not None:
        write_markdown(report, options.markdown, options.date, command)
    return name_missed(report, sys.stderr) if options.check else 0


def in_a_folder(measure: Callable[[Path, Log], SuiteReport]) -> SuiteReport:
    """Measure in a folder that is gone afterwards; what is being done is said on standard error."""
    with tempfile.TemporaryDirectory(prefix="bunkhouse-bench-") as folder:
        return measure(Path(folder), lambda line: print(line, file=sys.stderr, flush=True))


def run_suite(
    doc: str | None,
    measure: Callable[[Path, bool, int, Log], SuiteReport],
    command: str,
    arguments: Sequence[str] | None,
    rounds: int = bench_harness.ROUNDS,
) -> int:
    """The whole of a bench that has rounds and no options of its own; returns the exit code. ``rounds``: how
    many without ``--quick`` and ``--rounds``."""
    parser = bench_harness.parser(doc)
    add_markdown(parser)
    options = parser.parse_args(arguments)
    asked = options.rounds or (bench_harness.ROUNDS_QUICK if options.quick else rounds)
    if not 1 <= asked <= bench_harness.ROUNDS_MAX:
        parser.error(f"--rounds {options.rounds}: use 1 to {bench_harness.ROUNDS_MAX}")
    report = in_a_folder(lambda folder, log: measure(folder, options.quick, asked, log))
    return deliver(report, options, command)
