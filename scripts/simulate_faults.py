#!/usr/bin/env python3
"""Run many seeds of the deterministic simulations: a cluster over a bad network, or one node's core alone.

Covers: a range of seeds over all cores of the machine, what broke with the seed that shows it, the trace of
one seed, and how often each rare branch was reached. Does not cover: what is simulated or judged
(``tests/cluster_simulation.py``, ``tests/simulation.py``), or planted bugs (``scripts/mutation.py``).

Exit status: 0 all seeds came through, 1 some did not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SEEDS_MAX = 1_000_000
WORKERS_MAX = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed. ``broke`` is empty when it came through."""

    seed: int
    broke: str
    reached: dict[str, int]


def run_seed(world: str, seed: int) -> Outcome:
    from cluster_simulation import Fleet
    from simulation import World

    run = Fleet(seed) if world == "cluster" else World(seed)
    try:
        run.run()
    except Exception as error:  # whatever it is, it is the finding
        return Outcome(seed, f"{type(error).__name__}: {error}"[:2_000], {})
    return Outcome(seed, "", dict(run.reached))


def show(world: str, seed: int) -> int:
    """Print every step of one seed."""
    from cluster_simulation import Fleet
    from simulation import World

    run = Fleet(seed, full=True) if world == "cluster" else World(seed, full=True)
    try:
        run.run()
    except Exception as error:
        print("\n".join(run.trace))
        print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print("\n".join(run.trace))
    return 0


def outcomes(world: str, seeds: range, workers: int) -> Iterator[Outcome]:
    work = partial(run_seed, world)
    if workers == 1:
        yield from map(work, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(work, seeds, chunksize=4)


def count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= SEEDS_MAX:
        raise argparse.ArgumentTypeError(f"must be from 1 to {SEEDS_MAX:,}")
    return number


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--world", choices=("cluster", "node"), default="cluster")
    made.add_argument("--seeds", type=count, default=1_000, help="how many (default 1,000)")
    made.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    made.add_argument("--show", type=int, metavar="SEED", help="run one seed and print its every step")
    made.add_argument("--json", type=Path, metavar="FILE", help="write outcomes and counts here")
    return made


def main() -> int:
    options = parser().parse_args()
    if not 1 <= options.workers <= WORKERS_MAX:
        print(f"simulate_faults: --workers must be from 1 to {WORKERS_MAX}", file=sys.stderr)
        return 2
    if options.show is not None:
        return show(options.world, options.show)
    started_s = time.monotonic()
    seeds = range(options.first, options.first + options.seeds)
    reached: Counter[str] = Counter()
    broken: list[Outcome] = []
    for outcome in outcomes(options.world, seeds, options.workers):
        reached.update(outcome.reached)
        if outcome.broke:
            broken.append(outcome)
            print(f"seed {outcome.seed}: {outcome.broke}", flush=True)
    for name, times in sorted(reached.items()):
        print(f"{times:>9}  {name}")
    took_s = time.monotonic() - started_s
    print(f"{options.seeds} seeds of the {options.world}, {len(broken)} broke, {took_s:.0f} s")
    if broken:
        seed = min(outcome.seed for outcome in broken)
        print(f"see one: scripts/simulate_faults.py --world {options.world} --show {seed}")
    if options.json is not None:
        found = [asdict(outcome) for outcome in sorted(broken, key=lambda outcome: outcome.seed)]
        report = {"world": options.world, "seeds": options.seeds, "first": options.first}
        options.json.write_text(json.dumps({**report, "broken": found, "reached": reached}, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
