"""Which history caught which planted bug when they were last looked at: it is tried before all others.

Covers: the order of seeds, and learning it anew. A bug that its seed shows no longer, because the core or
its world has changed, is looked for among all seeds as if it had never been named here: that costs time and
nothing else. ``python tests/catching_seeds.py`` writes the seeds of today, which makes the tests of planted
bugs several times as fast. Does not cover: the bugs (``mutants`` and its like) or what catches them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mutants import Mutant

FILE = Path(__file__).with_suffix(".json")
# Where the tests note what they found, for who writes the file.
NOTES = "BUNK_CATCHING_SEEDS"
# A bug that the first histories catch needs no entry.
WORTH_A_NOTE = 2


def seeds(mutant: Mutant, among: Sequence[int]) -> list[int]:
    """All of these, the one that caught it last first."""
    known = json.loads(FILE.read_text()).get(mutant.what)
    return [*among] if known is None else [known, *(seed for seed in among if seed != known)]


def is_caught(mutant: Mutant, among: Sequence[int], catches: Callable[[int], bool]) -> bool:
    """Whether any of these histories tells the bug from the real core."""
    seed = next((seed for seed in seeds(mutant, among) if catches(seed)), None)
    if seed is not None and NOTES in os.environ:
        with open(os.environ[NOTES], "a") as notes:
            notes.write(json.dumps([mutant.what, seed]) + "\n")
    return seed is not None


def learn() -> int:
    """Run all tests of planted bugs, and keep which seeds caught them; returns pytest's exit status."""
    with tempfile.NamedTemporaryFile("r") as notes:
        words = ["-q", "-n", "auto", "--dist", "worksteal", "-k", "planted_bug and caught", "tests"]
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=FILE.parent.parent,
            env={**os.environ, NOTES: notes.name},
            check=False,
        )
        found = dict(sorted(map(json.loads, notes)))
    kept = {what: seed for what, seed in found.items() if seed >= WORTH_A_NOTE}
    FILE.write_text(json.dumps(kept, indent=1) + "\n")
    return ended.returncode


if __name__ == "__main__":
    raise SystemExit(learn())
