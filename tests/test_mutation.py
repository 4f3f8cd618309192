"""The planted bugs: every one can still be planted, and a handful of them is noticed.

Covers: that no mutant is stale, planting at import, and the runner's three verdicts. Does not cover: all
mutants, which take long (``scripts/mutation.py``); the node's core under its own (``test_simulation``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mutation
import planted
import pytest
from mutants import Mutant

LIMIT_S = 120


def test_every_mutant_can_be_planted() -> None:
    stale = [
        f"{mutant.module}: {mutant.what}" for mutant in planted.EVERY_MUTANT if planted.anchors(mutant) != 1
    ]
    assert not stale, f"their text is not in the source exactly once: {stale}"
    names = [mutant.what for mutant in planted.EVERY_MUTANT]
    assert len(set(names)) == len(names) >= 100
    assert all(mutant.old != mutant.new for mutant in planted.EVERY_MUTANT)
    assert set(mutation.SURVIVORS) <= set(names)
    assert {planted.module_of(m) for m in planted.EVERY_MUTANT if "." in m.module} == set(
        mutation.MODULE_TESTS
    ) - {"packer.forecast"}
    for tests in mutation.MODULE_TESTS.values():
        assert all((planted.ROOT / "tests" / f"{name}.py").exists() for name in tests)


def test_every_planted_bug_is_one(tmp_path: Path) -> None:
    """A module that can not be read, or has a name that is nowhere defined, fails under any test."""
    bugs = {f"{number:03}.py": mutant for number, mutant in enumerate(planted.EVERY_MUTANT)}
    for name, mutant in bugs.items():
        (tmp_path / name).write_text(planted.source_with(mutant))
    (tmp_path / "control.py").write_text("print(nowhere)\n")
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--target-version=py311"]
    told = subprocess.run(
        [*ruff, "--select=E9,F82", "--output-format=concise", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert "control.py" in told, "the check itself works"
    assert [mutant.what for name, mutant in bugs.items() if name in told] == []


@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("a poll that waits is not answered when the plan changes", "simulation of the cluster"),
        ("records are never given up", "simulation of the cluster"),
        ("records count anew when a node joins again", "simulation of the cluster"),
        ("a plan in an answer is dropped", "simulation of the cluster"),
        ("leased models are evicted", "simulation of the node"),
        ("worst fit instead of best fit", "test_placement"),
    ],
)
def test_a_planted_bug_is_noticed(what: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "test_placement":
        # No history notices this one: few are enough to come to the tests.
        monkeypatch.setattr(mutation, "NODE_SEEDS", 1)
        monkeypatch.setattr(mutation, "CLUSTER_SEEDS", 1)
    verdict = mutation.judge(planted.find(what), LIMIT_S)
    assert verdict.state == "killed"
    assert by in verdict.by


def test_a_mutant_that_changes_nothing_survives_and_one_without_its_text_is_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = planted.find("every device is reported as healthy")
    monkeypatch.setattr(mutation, "_simulated", lambda *_: "")
    monkeypatch.setattr(mutation, "_tested", lambda *_: "")
    survived = mutation.judge(nothing, LIMIT_S)
    assert (survived.state, mutation.is_wrong(survived)) == ("survived", True)
    monkeypatch.setitem(mutation.SURVIVORS, nothing.what, "a reason")
    assert not mutation.is_wrong(mutation.judge(nothing, LIMIT_S))
    stale = mutation.judge(Mutant("stale", "packer.wire", "no such text", ""), LIMIT_S)
    assert (stale.state, mutation.is_wrong(stale)) == ("stale", True)


def test_a_bug_is_planted_in_the_one_module_and_nowhere_else(tmp_path: Path) -> None:
    program = "import packer.wire, packer.types; print(packer.wire.Plan.number.fget(P()).seq)"
    shape = "class P: epoch, seq, start = 1, 7, ''\n"
    seen = []
    for what in ("", "plans of one epoch are all equal"):
        path = os.pathsep.join([str(planted.ROOT), str(planted.ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": path, "BUNK_PLANTED": what}
        ended = subprocess.run(
            [sys.executable, "-c", f"import planted\n{shape}{program}"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        seen.append(ended.stdout.strip())
    assert seen == ["7", "1"]


def test_the_list_can_be_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mutation.py", "--list", "--only", "packer.wire"])
    assert mutation.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "packer.wire: messages of another release are believed" in lines
    monkeypatch.setattr(sys, "argv", ["mutation.py", "--only", "no such mutant"])
    assert mutation.main() == 2
