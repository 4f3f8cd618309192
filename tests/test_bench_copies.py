"""The bench of copies keeps its books, and its rules do what they are called.

Covers: ``scripts/bench_copies.py`` for half a minute of virtual time. Does not cover: any figure.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_copies import RULES, SERVICE_MS, Run, main, measure


def test_every_call_is_answered_once_by_a_node_that_had_the_model() -> None:
    run = Run(500, "ours")
    for number in range(200):
        run.call(number * 40, SERVICE_MS)
    run.until(10**9)
    assert len(run.waits_ms) == 200
    assert min(run.waits_ms) >= 0
    assert sum(run.asked.values()) == 200
    assert {node for node, state in run.states.items() if state == "resident"} == set(run.asked)
    assert not any(run.queues.values())
    assert run.cluster.in_flight == 0


def test_more_copies_wait_less_and_one_stays_one() -> None:
    found = {rule: measure(1.8, 0.5, rule, part_ms=30_000) for rule in RULES}
    assert found["one"].copies == 1
    assert found["ours"].copies > 1
    assert found["ours"].wait_s_mean < found["one"].wait_s_mean


def test_the_table_and_the_file_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    assert main(["--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    shown = [line for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert len(rows) == len(shown) == 4 * 3 * len(RULES)
    assert all(f"{row['wait_s_mean']:.3f} s" in line for row, line in zip(rows, shown, strict=True))
