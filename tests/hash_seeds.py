"""Digests of simulated worlds under two hash seeds, each in a Python of its own.

Covers: running the digests. Does not cover: the worlds (``simulation``, ``cluster_simulation``) or the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def digests_under_two_hash_seeds(program: str) -> tuple[list[str], list[str]]:
    """The words that ``program`` prints under each; it may import whatever tests may."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for hash_seed in ("1", "2")
    )
    return first, second
