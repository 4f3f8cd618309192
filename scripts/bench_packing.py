"""How full placement packs a fleet: the production core against the usual policies and the volume bound.

Covers: models that come and go on fleets of devices (``packing_fleet``), the rule of worth, and fixed lists
against the optimum (``packing_optimum``); three seeds, all policies in one run on the same arrivals. Does
not cover: eviction, where what does not fit pushes out what is used least (``bench_policies``).

The volume bound takes the whole fleet for one device. It is greedy, so it is a bound on packing and not on
turning away more cleverly.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import bench_harness
import packing_optimum
import peers_venv
from bench_suite import Judgement, Section, SuiteReport, Table, add_markdown, deliver, report_of
from packing_fleet import BOUND, LIFETIME_CV, MEAN_BYTES, POLICIES, Books, Fleet, Turnaways, arrivals, run
from request_traces import CATALOGUE_BYTES

from packer.placement import Bin, Piece, Wanted

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bunkhouse-bench"
FLEETS = tuple(
    Fleet(n, size, load) for n, size in ((4, 80), (8, 80), (8, 141), (32, 141)) for load in (0.9, 1.1)
)
JUDGED = ((8, 80), (32, 141))
ARRIVALS, ARRIVALS_QUICK = 20_000, 3_000
SEEDS = (1, 2, 3)
GOAL_POINTS = 1.0
GOAL_MOVES = 0.15
# Static lists: bytes to pack over bytes there are, and how many lists per fleet.
LIST_SHARE = 1.3
LISTS, LISTS_QUICK = 10, 3
STATIC_FLEETS = ((8, 80), (8, 141))
RULED = "ours, with a rule of worth"


def _mean(books: Sequence[Books]) -> Books:
    return Books(
        statistics.fmean(each.used for each in books),
        statistics.fmean(each.refused_bytes for each in books),
        statistics.fmean(each.refused for each in books),
        statistics.fmean(each.moves for each in books),
        statistics.fmean(each.moved_bytes for each in books),
    )


def fleet_section(fleet: Fleet, count: int, seeds: Sequence[int], log: Callable[[str], None]) -> Section:
    coming = {seed: arrivals(fleet, count, seed) for seed in seeds}
    found: dict[str, list[Books]] = {}
    for name in (*POLICIES, RULED, BOUND):
        log(f"{fleet.name}: {name}")
        for seed in seeds:
            policy = Turnaways() if name == RULED else POLICIES.get(name)
            found.setdefault(name, []).append(run(fleet, coming[seed], policy))
    means = {name: _mean(books) for name, books in found.items()}
    bound = means[BOUND].used
    rows = tuple(
        (
            name,
            f"{mean.used:.1f}",
            f"{bound - mean.used:.2f}",
            f"{mean.refused_bytes:.1f}",
            f"{mean.refused:.1f}",
            f"{mean.moves:.3f}",
            f"{mean.moved_bytes:.1f}",
        )
        for name, mean in means.items()
    )
    columns = ("policy", "used %", "below bound", "bytes refused %", "models refused %", "moves", "moved %")
    ours = means["ours"]
    judged = (fleet.devices, fleet.gigabytes) in JUDGED
    judgements = (
        Judgement(f"{fleet.name}: below the volume bound", bound - ours.used, GOAL_POINTS, False, " points"),
        Judgement(f"{fleet.name}: moves per arrival", ours.moves, GOAL_MOVES, False),
    )
    runs = {
        f"{name}, {field}": [getattr(each, field) for each in books]
        for name, books in found.items()
        for field in ("used", "refused_bytes", "refused", "moves", "moved_bytes")
    }
    return Section(fleet.name, (Table(fleet.name, columns, rows),), judgements if judged else (), runs=runs)


# --- fixed lists ----------------------------------------------------------------------------------


def static_lists(devices: int, nbytes: int, count: int) -> list[list[int]]:
    chance = random.Random(devices * nbytes)
    lists = []
    for _ in range(count):
        sizes: list[int] = []
        while sum(sizes) < LIST_SHARE * devices * nbytes:
            sizes.append(chance.choice(CATALOGUE_BYTES))
        lists.append(sizes)
    return lists


def pack_list(policy: str, devices: int, nbytes: int, sizes: Sequence[int]) -> float:
    """The share of the fleet that is filled when a list comes one after the other and nothing leaves."""
    bins = {f"d{at:02}": Bin(f"d{at:02}", nbytes) for at in range(devices)}
    for number, size in enumerate(sizes):
        placing = POLICIES[policy](list(bins.values()), Wanted(f"m{number}", size))
        if placing is None:
            continue
        moving = [(move.target, Piece(move.piece, move.nbytes, float(move.nbytes))) for move in placing.moves]
        for move in placing.moves:
            left = bins[move.source]
            pieces = tuple(piece for piece in left.pieces if piece.name != move.piece)
            bins[move.source] = Bin(left.name, left.room_bytes + move.nbytes, pieces)
        for name, piece in (*moving, (placing.bins[0], Piece(f"m{number}", size, float(size)))):
            before = bins[name]
            bins[name] = Bin(name, before.room_bytes - piece.nbytes, (*before.pieces, piece))
    return 1 - sum(each.room_bytes for each in bins.values()) / (devices * nbytes)


def static_section(count: int, python: Path | None, why: str, log: Callable[[str], None]) -> Section:
    tables: list[Table] = []
    runs: dict[str, Sequence[float]] = {}
    for devices, gigabytes in STATIC_FLEETS:
        nbytes = gigabytes * 1_000_000_000
        lists = static_lists(devices, nbytes, count)
        name = f"{devices} x {gigabytes} GB, {count} lists of {LIST_SHARE:g} times its bytes"
        log(name)
        filled = {
            policy: [pack_list(policy, devices, nbytes, sizes) for sizes in lists] for policy in POLICIES
        }
        filled["best fit by falling size"] = [
            pack_list("best fit", devices, nbytes, sorted(sizes, reverse=True)) for sizes in lists
        ]
        if python is not None:
            solved = packing_optimum.solve_all(python, [(devices, nbytes, sizes) for sizes in lists])
            filled[f"CP-SAT, {packing_optimum.SOLVE_S} s"] = [share for share, _ in solved]
            filled["proven bound of CP-SAT"] = [most for _, most in solved]
        rows = tuple((policy, f"{100 * statistics.fmean(shares):.2f}") for policy, shares in filled.items())
        tables.append(Table(name, ("policy", "filled %"), rows))
        runs |= {f"{name}, {policy}": shares for policy, shares in filled.items()}
    skipped = () if python is not None else (f"CP-SAT: {why}",)
    return Section("fixed lists", tuple(tables), skipped=skipped, runs=runs)


def solver(directory: Path | None) -> tuple[Path | None, str]:
    """The Python that has OR-tools, or why there is none."""
    if directory is None:
        return None, "--no-solver"
    try:
        venv = peers_venv.ensure(directory, ("ortools",), tensors=False)
    except peers_venv.CanNotInstall as error:
        return None, str(error)
    return (None, venv.missing["ortools"]) if venv.missing else (venv.python, "")


def measure(
    fleets: Sequence[Fleet], count: int, lists: int, solver_dir: Path | None, log: Callable[[str], None]
) -> SuiteReport:
    python, why = solver(solver_dir)
    sections = [fleet_section(fleet, count, SEEDS, log) for fleet in fleets]
    sections.append(static_section(lists, python, why, log))
    facts: dict[str, str | int | float] = {
        "arrivals": f"{count} per run, seeds {', '.join(map(str, SEEDS))}, Poisson, nobody waits",
        "models": f"{len(CATALOGUE_BYTES)} sizes, 0.6 to 71.5 GB, mean {MEAN_BYTES / 1e9:.1f} GB; "
        f"lifetimes lognormal, CV {LIFETIME_CV:g}",
        "ours": "best fit, else at most two moves of at most twice the bytes of what comes, by bytes moved",
    }
    return report_of("packing", facts, sections)


def main(arguments: Sequence[str] | None = None, fleets: Sequence[Fleet] = FLEETS) -> int:
    parser = bench_harness.parser(__doc__)
    parser.add_argument("--no-solver", action="store_true", help="install no OR-tools")
    parser.add_argument("--solver-dir", type=Path, default=CACHE / "solver", help="default: %(default)s")
    add_markdown(parser)
    options = parser.parse_args(arguments)
    count = ARRIVALS_QUICK if options.quick else ARRIVALS
    report = measure(
        fleets,
        count,
        LISTS_QUICK if options.quick else LISTS,
        None if options.no_solver else options.solver_dir,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    return deliver(report, options, "scripts/bench_packing.py")


if __name__ == "__main__":
    sys.exit(main())
