"""How much of a fleet could be filled at all: fixed lists of models, packed by policies and by CP-SAT.

Covers: lists that are somewhat larger than the fleet, the online policies on them in the order of the list,
best fit by falling size, and OR-tools CP-SAT with a limit of time, which runs in a virtualenv of its own.
Does not cover: models that leave again (``packing_fleet``). Run as a program it is the solver: it reads one
problem per line from standard input and imports nothing of this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOLVE_S = 5
# OR-tools takes sizes in megabytes, so that sums stay small numbers.
MEGABYTE = 1_000_000


class SolverFailed(RuntimeError):
    """The solver's process did not answer; the text is what it said."""


def solve_all(python: Path, problems: Sequence[tuple[int, int, Sequence[int]]]) -> list[tuple[float, float]]:
    """Of each (devices, bytes of each, sizes): the share of the fleet filled, and proven to be the most.

    Raises ``SolverFailed``.
    """
    lines = [
        json.dumps([devices, nbytes // MEGABYTE, [size // MEGABYTE for size in sizes]])
        for devices, nbytes, sizes in problems
    ]
    try:
        done = subprocess.run(
            [str(python), __file__],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=60 + 2 * SOLVE_S * len(lines),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SolverFailed(str(error)) from None
    if done.returncode != 0:
        raise SolverFailed(done.stderr.strip()[-1000:])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        (filled / (devices * (nbytes // MEGABYTE)), bound / (devices * (nbytes // MEGABYTE)))
        for (filled, bound), (devices, nbytes, _) in zip(found, problems, strict=True)
    ]


def _solve(devices: int, room: int, sizes: Sequence[int]) -> tuple[int, float]:
    from ortools.sat.python import cp_model  # type: ignore[import-not-found]

    model = cp_model.CpModel()
    lies = [[model.new_bool_var(f"x{i}.{d}") for d in range(devices)] for i in range(len(sizes))]
    for row in lies:
        model.add_at_most_one(row)
    for device in range(devices):
        model.add(sum(size * row[device] for size, row in zip(sizes, lies, strict=True)) <= room)
    model.maximize(sum(size * each for size, row in zip(sizes, lies, strict=True) for each in row))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = SOLVE_S
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.solve(model)
    return int(solver.objective_value), solver.best_objective_bound


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_solve(*json.loads(line))), flush=True)
