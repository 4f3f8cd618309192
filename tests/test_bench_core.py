"""The core's bench runs, counts what it says it counts, and misses its goal by name when it can not judge.

Covers: scripts/bench_core.py with few models and requests. Does not cover: any figure.
"""

from __future__ import annotations

import json
from pathlib import Path

import bench_core
import pytest


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_core, "REQUESTS_QUICK", 60)
    monkeypatch.setattr(bench_core, "REPLAY_REQUESTS_QUICK", 400)
    monkeypatch.setattr(bench_core, "GOAL_MODELS", 40)


def test_every_kind_of_decision_is_timed_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "core.json"
    assert bench_core.main(["--quick", "--rounds", "2", "--json", str(file)], (40, 60)) == 0
    out = capsys.readouterr().out
    assert "Step and check, 60 models, 57 resident, microseconds" in out
    report = json.loads(file.read_text())
    *cores, simulator = report["sections"]
    for section in cores:
        assert set(section["runs"]) == {bench_core.HIT, bench_core.EVICTION, bench_core.RESTORED}
        assert all(took_us > 0 for times in section["runs"].values() for took_us in times)
    rows = simulator["tables"][0]["rows"]
    assert [row[0] for row in rows] == [name for name, _, _ in bench_core.REPLAY_FLEETS]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)
    verdict, replayed = report["verdicts"]
    assert replayed["value"] > 0
    assert verdict["goal"] == "decision to evict, 40 models, p99"
    assert verdict["value"] * 1000 <= max(report["sections"][0]["runs"][bench_core.EVICTION])


def test_a_missed_goal_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_core, "GOAL_MS", 0.0)
    assert bench_core.main(["--quick", "--rounds", "1", "--check"], (40,)) == 1
    assert "missed goal: decision to evict, 40 models, p99" in capsys.readouterr().err


def test_the_least_of_each_decision_counts_and_plays_that_differ_are_refused() -> None:
    plays = [{"hit": [1.0, 5.0]}, {"hit": [3.0, 2.0]}]
    assert bench_core.least(plays) == {"hit": [1.0, 2.0]}
    with pytest.raises(ValueError, match=r"shorter|longer"):
        bench_core.least([{"hit": [1.0]}, {"hit": [1.0, 2.0]}])
