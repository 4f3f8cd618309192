"""``bunk-control simulate`` (and ``bunk simulate``): how many boxes, how much RAM, for this traffic?

Covers: options, reading files, one or many fleets, the goal that a fleet must meet, tables, JSON. Does not
cover: replaying (``packer.simulate``), the forms of traces and fleets (``packer.traces``,
``packer.fleet``), or drawing (``control.simulate_plot``).

Exit status: 0 done (with ``--solve``: a fleet meets the goal), 1 no fleet meets the goal or a file can not
be written, 2 wrong options, or a file or a fleet that can not be used: nothing was simulated then.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from control.simulate_plot import NoMatplotlib, draw_fleets, draw_outcome, need_matplotlib
from control.simulated_router import Router
from packer.fleet import (
    BOXES_MAX,
    Fleet,
    FleetFile,
    check_quotas,
    check_replicas,
    parse_fleet,
    parse_fleet_file,
)
from packer.outcome import Figures, Outcome
from packer.simulate import Simulation
from packer.traces import BadTrace, Sizes, Trace, parse_models, parse_trace
from packer.types import BadValue, parse_bytes

PROG = "bunk simulate"
EXIT_UNMET, EXIT_USAGE = 1, 2
# More fleets than this in one command are a typing mistake: each replays the whole trace.
FLEETS_MAX = 200
TENANTS_SHOWN = 20
FIGURES: dict[str, Callable[[Figures], float]] = {
    "mean": lambda found: found.cold_s_mean,
    "p50": lambda found: found.cold_s_p50,
    "p99": lambda found: found.cold_s_p99,
}


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of all requests that must not be above ``most_s``."""

    figure: str
    most_s: float

    def met(self, outcome: Outcome) -> bool:
        """Refused requests meet nothing: who is turned away waits for ever."""
        return not outcome.all.refused and FIGURES[self.figure](outcome.all) <= self.most_s


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Replay a trace through the production cores and say what callers would have waited.",
        epilog="Exit status: 0 done, 1 no fleet meets --solve, 2 wrong options or a bad trace, list of "
        "models or fleet (nothing is simulated then).",
    )
    parser.add_argument(
        "--trace", type=Path, required=True, metavar="FILE",
        help="CSV or JSON lines, .gz too: time_s or time_ms, model; also tenant, duration_s, tokens, size, "
        "devices",
    )  # fmt: skip
    parser.add_argument(
        "--fleet", required=True, metavar="SPEC",
        help="8x141GB,ram=2TB,disk=8TB (boxes first: 4x8x141GB,...), or a .toml file",
    )  # fmt: skip
    parser.add_argument("--models", type=Path, metavar="FILE", help="CSV or JSON lines: model, size, devices")
    parser.add_argument("--size", metavar="SIZE", help="of every model that no list names")
    parser.add_argument("--boxes", metavar="A..B", help="try this many boxes, one after the other")
    parser.add_argument("--ram", metavar="SIZE,SIZE", help="try each amount of RAM per box")
    parser.add_argument(
        "--solve", metavar="p99=2s", help="stop at the first fleet with mean, p50 or p99 within"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write everything to FILE (- for stdout)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw a .png or .svg (needs matplotlib)"
    )
    return parser


# --- reading --------------------------------------------------------------------------------------


@contextmanager
def _lines(path: Path) -> Iterator[io.TextIOBase]:
    """The file as text, gzip or not. Raises ``BadValue``."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if packed else raw as plain, io.TextIOWrapper(plain, "utf-8-sig") as text:
                yield text
    except UnicodeDecodeError:
        raise BadValue(str(path), "is not UTF-8 text") from None
    except (OSError, EOFError) as error:
        raise BadValue(str(path), f"can not be read: {getattr(error, 'strerror', None) or error}") from None


def _read_fleet(text: str) -> FleetFile:
    if not text.endswith(".toml"):
        return FleetFile(parse_fleet(text))
    with _lines(Path(text)) as lines:
        return parse_fleet_file(lines.read(), text)


def _read_sizes(options: argparse.Namespace, named: Sizes) -> Sizes:
    sizes = Sizes()
    if options.models is not None:
        with _lines(options.models) as lines:
            sizes = parse_models(lines, str(options.models))
    sizes.known.update(named.known)
    if options.size is not None:
        sizes.default_bytes = parse_bytes(options.size, "--size")
        if not sizes.default_bytes:
            raise BadValue("--size", "must be above 0")
    return sizes


def _fleets(options: argparse.Namespace, fleet: Fleet) -> list[Fleet]:
    """All that are to be tried, the cheapest first: fewer boxes, then less RAM."""
    counts = [fleet.boxes]
    if options.boxes is not None:
        match = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", options.boxes)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= BOXES_MAX:
            raise BadValue("--boxes", f"{options.boxes[:40]!r} is not 1..8 (at most {BOXES_MAX})")
        counts = list(range(first, last + 1))
    rams = [fleet.ram_bytes]
    if options.ram is not None:
        rams = sorted({parse_bytes(each, "--ram") for each in options.ram.split(",")})
    if len(counts) * len(rams) > FLEETS_MAX:
        raise BadValue("--boxes, --ram", f"{len(counts) * len(rams)} fleets, at most {FLEETS_MAX}")
    return [replace(fleet, boxes=count, ram_bytes=ram) for count in counts for ram in rams]


def _goal(text: str | None) -> Goal | None:
    if text is None:
        return None
    match = re.fullmatch(r"(mean|p50|p99)=(\d+(?:\.\d+)?)(ms|s)", text)
    if match is None:
        raise BadValue("--solve", f"{text[:40]!r} is not mean=0.2s, p50=100ms or p99=2s")
    return Goal(match[1], float(match[2]) / (1000 if match[3] == "ms" else 1))


# --- printing -------------------------------------------------------------------------------------


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e12:.2f} TB" if nbytes >= 1e12 else f"{nbytes / 1e9:.1f} GB"


def _row(name: str, found: Figures) -> tuple[str, ...]:
    times = (f"{each:.3f}" for each in (found.cold_s_mean, found.cold_s_p50, found.cold_s_p99))
    shares = (f"{share * 100:.2f}%" for share in found.hit_shares.values())
    return (name, str(found.requests), *times, *shares, str(found.refused), _size(found.rejected_bytes))


_HEADER = ("requests", "mean s", "p50 s", "p99 s", "device", "host", "disk", "origin", "refused", "rejected")


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _print_outcome(outcome: Outcome, took_s: float) -> None:
    fleet, rate = outcome.fleet, outcome.all.requests / max(took_s, 1e-9)
    print(f"\n{fleet}; policy {fleet.policy}")
    print(
        f"assumed: link {fleet.host_gbps:g}, disk {fleet.disk_gbps:g}, origin {fleet.origin_gbps:g} GB/s; "
        f"{fleet.fixed_ms} ms per restore; {fleet.ram_ratio:g} of raw size in RAM, {fleet.ratio:g} on disk; "
        f"{fleet.service_ms} ms of use where the trace has none"
    )
    rows = [("cold seconds of", *_HEADER), _row(f"all ({outcome.models} models)", outcome.all)]
    most = sorted(outcome.tenants.items(), key=lambda item: (-item[1].requests, item[0]))
    rows += [_row(name[:40], found) for name, found in most[:TENANTS_SHOWN]]
    print(_table(rows))
    if len(most) > TENANTS_SHOWN:
        print(f"... and {len(most) - TENANTS_SHOWN} tenants more (all are in the JSON)")
    moved = ", ".join(f"{_size(nbytes)} from {tier}" for tier, nbytes in outcome.moved_bytes.items())
    print(f"moved: {moved}")
    if (waited := outcome.waited) is not None:
        print(
            f"waited for others of the same model, {fleet.together} of which run at once on a box: mean "
            f"{waited.waited_s_mean:.3f} s, p99 {waited.waited_s_p99:.3f} s; {waited.copies} times a further "
            "box was sent for a copy"
        )
    if outcome.refusals:
        print("refused: " + ", ".join(f"{count} {reason}" for reason, count in outcome.refusals.items()))
    times = f"{outcome.regret:.2f} times" if outcome.regret else "beside"
    print(
        f"regret: {times} the least possible mean, {outcome.least_cold_s_mean:.4f} s (fractional optimum, "
        "all boxes as one)"
    )
    print(f"{outcome.steps} whole steps, {rate:,.0f} requests per second of wall time", file=sys.stderr)


def _print_summary(outcomes: Sequence[Outcome]) -> None:
    """All fleets that were tried, a line each."""
    rows: list[Sequence[str]] = [("boxes", "RAM each", "mean s", "p50 s", "p99 s", "refused", "moved")]
    for outcome in outcomes:
        fleet, found = outcome.fleet, outcome.all
        times = (f"{each:.3f}" for each in (found.cold_s_mean, found.cold_s_p50, found.cold_s_p99))
        moved = _size(sum(outcome.moved_bytes.values()))
        rows.append((str(fleet.boxes), _size(fleet.ram_bytes), *times, str(found.refused), moved))
    print(f"\nall fleets that were tried\n{_table(rows)}")


def _unmet(trace: Trace, last: Fleet) -> str:
    """What to try next. Where all models fit the devices at once, more of them does not help."""
    if last.memory_bytes < sum(sized.size_bytes for sized in trace.catalog):
        return "try more boxes or RAM"
    return (
        "all models fit the devices of the last one, so what is left are first uses: see disk_gbps, "
        "origin_gbps, fixed_ms"
    )


def _as_json(outcomes: Sequence[Outcome], goal: Goal | None, best: Outcome | None) -> str:
    items = []
    for outcome in outcomes:
        item = asdict(replace(outcome, cold=()))
        del item["cold"]
        items.append(item)
    solved = {
        "goal": None if goal is None else asdict(goal),
        "fleet": None if best is None else asdict(best.fleet),
    }
    return json.dumps({"fleets": items, "solve": solved}, indent=2) + "\n"


# --- running --------------------------------------------------------------------------------------


def run_fleet(trace: Trace, fleet: Fleet) -> tuple[Outcome, float]:
    """One fleet, and the seconds that it took."""
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # the replay makes no cycles, and much that a collection would look through
    try:
        router = Router()
        simulation = Simulation(trace, fleet, router.choose, ended=router.ended)
        outcome = simulation.run()
    finally:
        if collecting:
            gc.enable()
    return outcome, time.perf_counter() - started


def _note_absent(fleet: Fleet, trace: Trace) -> None:
    """A quota of a tenant that the trace never names may be meant, or a typing mistake."""
    calling = {sized.tenant for sized in trace.catalog}
    absent = [spec.tenant for spec in fleet.tenants if spec.tenant not in calling]
    if absent:
        more = f" and {len(absent) - TENANTS_SHOWN} more" if len(absent) > TENANTS_SHOWN else ""
        names = ", ".join(absent[:TENANTS_SHOWN])
        print(f"{PROG}: note: the trace has no request of {names}{more}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        goal = _goal(options.solve)
        given = _read_fleet(options.fleet)
        fleets = _fleets(options, given.fleet)
        where = options.fleet if options.fleet.endswith(".toml") else "--fleet"
        for fleet in fleets:
            check_quotas(fleet, where)
        if options.plot is not None:
            need_matplotlib(options.plot)
        sizes = _read_sizes(options, given.sizes)
        with _lines(options.trace) as lines:
            trace = parse_trace(lines, str(options.trace), sizes, given.fleet.token_ms)
        check_replicas(given.fleet, trace.catalog, where)
    except (BadTrace, BadValue, NoMatplotlib) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_USAGE
    _note_absent(given.fleet, trace)
    outcomes: list[Outcome] = []
    best: Outcome | None = None
    for fleet in fleets:
        outcome, took_s = run_fleet(trace, fleet)
        outcomes.append(outcome)
        if options.json != Path("-"):
            _print_outcome(outcome, took_s)
        if goal is not None and goal.met(outcome):
            best = outcome
            break
    if len(outcomes) > 1 and options.json != Path("-"):
        _print_summary(outcomes)
    return _finish(options, goal, outcomes, best, trace)


def _finish(
    options: argparse.Namespace,
    goal: Goal | None,
    outcomes: list[Outcome],
    best: Outcome | None,
    trace: Trace,
) -> int:
    text = _as_json(outcomes, goal, best)
    try:
        if options.json == Path("-"):
            print(text, end="")
        elif options.json is not None:
            options.json.write_text(text)
        if options.plot is not None:
            draw = draw_outcome if len(outcomes) == 1 else draw_fleets
            draw(outcomes, options.plot)
    except OSError as error:
        print(f"{PROG}: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_UNMET
    if goal is None:
        return 0
    words = f"{goal.figure} within {goal.most_s:g} s"
    if best is None:
        print(f"\nno fleet that was tried has {words}; {_unmet(trace, outcomes[-1].fleet)}", file=sys.stderr)
        return EXIT_UNMET
    print(f"\nthe smallest fleet that was tried with {words}: {best.fleet}", file=sys.stderr)
    return 0
