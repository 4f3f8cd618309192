"""The isolation bench runs, judges lending against private slices of its own, and names what was missed.

Covers: scripts/bench_isolation.py and scripts/isolation_model.py on a small drawn trace. Does not cover: the
figures of the full run, or the public traces.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bench_isolation
import pytest
from isolation_model import Crowd, Town, alone, judge, town
from request_traces import GB, NoTrace, Trace

from packer.lending import Terms

HOURS_MS = 3_600_000


def small_trace(seed: int = 1) -> Trace:
    """Thirty models, some much hotter than others, for a day."""
    rng = random.Random(seed)
    at_ms = sorted(rng.randrange(24 * HOURS_MS) for _ in range(3_000))
    models = tuple(min(int(rng.expovariate(0.15)), 29) for _ in at_ms)
    names = tuple(f"m{i}" for i in range(30))
    return Trace("small", tuple(at_ms), models, names, tuple(rng.choice((20, 40, 64)) * GB for _ in names))


@pytest.fixture
def crowd() -> Town:
    return town(small_trace(), 1.0, 3)


def costs(crowd: Town, pool: Crowd) -> list[int]:
    return [pool.use(model, at) for model, at in zip(crowd.models, crowd.at_ms, strict=True)]


def test_the_noisy_tenant_scans_in_the_middle_days_only(crowd: Town) -> None:
    noisy = [at for at, model in zip(crowd.at_ms, crowd.models, strict=True) if crowd.owners[model] == 8]
    assert len(noisy) == (crowd.scan_ms[1] - crowd.scan_ms[0] - 1) // 20_000 + 1
    assert crowd.scan_ms[0] <= noisy[0] < noisy[-1] < crowd.scan_ms[1]


def test_lending_keeps_everybody_as_well_off_as_alone_and_lends_all_the_same(crowd: Town) -> None:
    capacity = 648 * GB
    alone_ms = alone(crowd, capacity // crowd.tenants)
    pool = Crowd(crowd, capacity, "keep", terms=Terms(100))
    ours = judge(crowd, costs(crowd, pool), alone_ms)
    shares = judge(crowd, alone_ms, alone_ms)
    free = judge(crowd, costs(crowd, Crowd(crowd, capacity, "keep")), alone_ms)
    assert ours.debt_s_max == 0
    assert ours.worst_ratio <= 1
    assert free.debt_s_max > 0, "without quotas somebody is harmed, or there was nothing to show"
    assert ours.all_s < shares.all_s
    assert any(slice_.gap_ms for slice_ in pool.slices)


def test_borrowing_never_takes_below_a_share_that_is_held(crowd: Town) -> None:
    capacity = 648 * GB
    outcome = judge(
        crowd,
        costs(crowd, Crowd(crowd, capacity, "lru", guarded=True)),
        alone(crowd, capacity // crowd.tenants),
    )
    assert outcome.all_s > 0


def test_the_bench_prints_judges_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_isolation, "servegen", lambda thinning, seed, folder: small_trace(seed))
    monkeypatch.setattr(bench_isolation, "CAPACITY_BYTES", 648 * GB)
    report_file, text_file = tmp_path / "report.json", tmp_path / "report.md"
    words = ["--quick", "--json", str(report_file), "--markdown", str(text_file), "--date", "today"]
    assert bench_isolation.main(words) == 0
    verdicts = {each["goal"]: each for each in json.loads(report_file.read_text())["verdicts"]}
    assert verdicts["margin 1: most debt of any tenant"]["reached"]
    assert "lending, margin 1 (default)" in text_file.read_text()
    monkeypatch.setattr(bench_isolation, "GOAL_COST", 0.5)
    assert bench_isolation.main(["--quick", "--check"]) == 1
    assert "missed goal: margin 1: cost to no quota" in capsys.readouterr().err


def test_a_missing_trace_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_isolation.main(["--quick", "--traces", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(NoTrace):
        bench_isolation.outcomes(0, 1.0, tmp_path, print)


def test_rounds_make_no_sense_here() -> None:
    with pytest.raises(SystemExit):
        bench_isolation.main(["--rounds", "3"])
