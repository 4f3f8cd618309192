"""The packing bench keeps its own books right and judges what it says it judges.

Covers: scripts/bench_packing.py and packing_fleet.py on small fleets, and a solver that is not there. Does
not cover: any figure.
"""

from __future__ import annotations

import json
from pathlib import Path

import bench_packing
import packing_optimum
import pytest
from packing_fleet import BOUND, POLICIES, Fleet, Turnaways, arrivals, run

from packer.placement import Bin, Piece, Wanted

SMALL = Fleet(4, 80, 1.1)


def test_every_policy_packs_the_same_arrivals_and_none_is_above_the_bound_of_its_bytes() -> None:
    coming = arrivals(SMALL, 600, 1)
    assert coming == arrivals(SMALL, 600, 1)
    books = {name: run(SMALL, coming, policy) for name, policy in POLICIES.items()}
    bound = run(SMALL, coming, None)
    assert all(0 < each.used <= 100 for each in (*books.values(), bound))
    assert all(books[name].moves == 0 for name in POLICIES if not name.startswith("ours"))
    assert 0 < books["ours, one move"].moves < 1
    assert books["worst fit"].used < books["best fit"].used < books["ours"].used < bound.used
    assert bound.refused_bytes < books["ours"].refused_bytes < books["best fit"].refused_bytes


def test_the_rule_of_worth_moves_nothing_for_what_is_larger_than_the_usual() -> None:
    bins = [Bin("a", 30, (Piece("x", 20, 20.0),)), Bin("b", 25)]
    rule = Turnaways()
    assert rule(bins, Wanted("w", 50)) is None, "nothing was turned away before: there is no usual yet"
    assert rule(bins, Wanted("v", 45)) is not None
    assert rule(bins, Wanted("u", 60)) is None
    assert rule(bins, Wanted("t", 30)) is not None


def test_the_report_has_every_policy_and_its_goals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "packing.json"
    words = ["--quick", "--no-solver", "--json", str(file)]
    bench_packing.ARRIVALS_QUICK, before = 200, bench_packing.ARRIVALS_QUICK
    try:
        assert bench_packing.main(words, (SMALL, Fleet(8, 80, 0.9))) == 0
    finally:
        bench_packing.ARRIVALS_QUICK = before
    out = capsys.readouterr().out
    assert all(name in out for name in (*POLICIES, BOUND, "best fit by falling size"))
    report = json.loads(file.read_text())
    assert [verdict["goal"] for verdict in report["verdicts"]] == [
        "8 x 80 GB, load 0.9: below the volume bound",
        "8 x 80 GB, load 0.9: moves per arrival",
    ]
    assert report["sections"][-1]["skipped"] == ["CP-SAT: --no-solver"]


def test_a_solver_that_does_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(packing_optimum.SolverFailed, match="No such file"):
        packing_optimum.solve_all(tmp_path / "python", [(1, 10**9, [10**8])])
