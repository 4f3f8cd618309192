"""The bench harness: order of runs, medians, ratios, goals, JSON and exit codes, on made-up figures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_harness
import pytest
from bench_harness import Bench, Case, Goal


def figures(*values: float) -> Callable[[], float]:
    """A case that returns the next of ``values`` each time, the last one for ever."""

    def values_for_ever() -> Iterator[float]:
        yield from values
        while True:
            yield values[-1]

    remaining = values_for_ever()
    return lambda: next(remaining)


def make_bench(ours: Callable[[], float] | None = None, ratio_max: float = 0.5) -> Bench:
    return Bench(
        name="example",
        cases=(
            Case("ours", ours or figures(20)),
            Case("theirs", figures(100)),
            Case("physics", figures(10)),
        ),
        peer="theirs",
        limit="physics",
        goals=(Goal("ours", "theirs", ratio_max), Goal("ours", "physics", 3)),
        facts={"weights": "7 bytes"},
    )


def test_rounds_are_interleaved_and_each_has_every_case_once() -> None:
    seen: list[str] = []

    def case(name: str) -> Case:
        def run() -> float:
            seen.append(name)
            return 1.0

        return Case(name, run)

    bench_harness.measure(Bench("x", (case("a"), case("b"), case("c")), peer="a", limit="b"), rounds=8)
    rounds = [tuple(seen[start : start + 3]) for start in range(0, len(seen), 3)]
    assert len(rounds) == 9  # one unmeasured
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1  # nobody always runs after the same neighbour


def test_medians_and_ratios_leave_the_warm_up_out() -> None:
    report = bench_harness.measure(make_bench(figures(999, 30, 10, 20)), rounds=3)
    row = report.rows[0]
    assert (row.median_ms, row.least_ms, row.greatest_ms) == (20, 10, 30)
    assert (row.to_peer, row.to_limit) == (0.2, 2)
    assert all(verdict.reached for verdict in report.verdicts)


def test_check_names_every_missed_goal_and_exits_1(tmp_path: Path) -> None:
    options = bench_harness.parser("A bench.").parse_args(
        ["--quick", "--check", "--json", str(tmp_path / "r.json")]
    )
    out, log = io.StringIO(), io.StringIO()
    assert bench_harness.run_bench(make_bench(figures(90)), options, out, log) == 1
    assert "missed goal: ours takes at most 0.5 of theirs, this run took 0.900" in log.getvalue()
    assert "missed goal: ours takes at most 3 of physics, this run took 9.000" in log.getvalue()
    assert out.getvalue().count("MISSED") == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rounds"] == bench_harness.ROUNDS_QUICK
    assert [verdict["reached"] for verdict in report["verdicts"]] == [False, False]
    assert report["rows"][0]["runs_ms"] == [90, 90, 90]
    assert report["facts"] == {"weights": "7 bytes"}


def test_missed_goals_do_not_fail_a_run_without_check() -> None:
    options = bench_harness.parser(None).parse_args(["--rounds", "1"])
    assert bench_harness.run_bench(make_bench(figures(90)), options, io.StringIO(), io.StringIO()) == 0


def test_check_exits_0_when_all_goals_are_reached() -> None:
    options = bench_harness.parser(None).parse_args(["--rounds", "1", "--check"])
    out = io.StringIO()
    assert bench_harness.run_bench(make_bench(), options, out, io.StringIO()) == 0
    assert "reached  ours takes at most 0.5 of theirs: 0.200" in out.getvalue()


@pytest.mark.parametrize("rounds", ["0", "-1", "1001"])
def test_rounds_out_of_range_are_refused_with_the_limit(rounds: str) -> None:
    options = bench_harness.parser(None).parse_args(["--rounds", rounds])
    log = io.StringIO()
    assert bench_harness.run_bench(make_bench(), options, io.StringIO(), log) == 2
    assert "use 1 to 1000" in log.getvalue()


def test_time_that_is_not_above_zero_is_a_broken_case() -> None:
    with pytest.raises(ValueError, match="above zero"):
        bench_harness.measure(make_bench(figures(0)), rounds=1)


def test_peer_limit_and_goals_must_name_a_case() -> None:
    case = Case("a", figures(1))
    with pytest.raises(ValueError, match="no case 'b'"):
        Bench("x", (case,), peer="b", limit="a")
    with pytest.raises(ValueError, match="no case 'c'"):
        Bench("x", (case,), peer="a", limit="a", goals=(Goal("c", "a", 1),))
    with pytest.raises(ValueError, match="share a name"):
        Bench("x", (case, case), peer="a", limit="a")
