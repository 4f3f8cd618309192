"""The fuzz of operations finds what it is there to find: a short run, with the checks and without.

Does not cover: the operations (``scripts/fuzz_operators.py`` itself does, for longer), or the checks
(``attacks/test_hostile_programs``).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from real_box import PATIENCE_S

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# In a process of its own: it forks, and sets the heap up before anything is loaded.
RUN = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import fuzz_operators
from agent.engines import operations
sys.argv += ["--calls", "100", "--only", "_weight_norm", "aten.add.Tensor"]
print("with:", fuzz_operators.main(), flush=True)
operations._CHECKS = {}
print("without:", fuzz_operators.main())
"""


def test_reading_beyond_a_tensor_is_found_and_what_is_checked_is_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(SCRIPTS)],
        env={"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert "with: 0" in lines
    assert lines[-1] == "without: 1"
    (finding,) = [line for line in lines if line.startswith("aten._weight_norm.default")]
    assert "ends the process" in finding or "did not fill" in finding
    assert [" 0 that never ran, " in line for line in lines if "operations with" in line] == [True, True]
