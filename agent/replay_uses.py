"""The child of the regret meter: reads a log of uses, replays it, prints what it would have cost.

Covers: its own priority and its bound on processor time, one question on standard input and one answer on
standard output. Does not cover: the arithmetic (``packer/regret.py``) or asking (``agent/regret.py``).
"""

from __future__ import annotations

import os
import resource
import sys

import msgspec

from agent.regret import read_question
from packer import regret
from packer.wire import RegretReport


def main() -> None:
    os.nice(19)
    cpu_s = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    header, at_ms, models, cold_ms = read_question(sys.stdin.buffer.read())
    found = regret.replay(regret.UseLog(at_ms, models, cold_ms, header.sizes), header.memory, header.costs)
    report = RegretReport(
        uses=found.uses,
        counted=found.counted,
        window_ms=found.window_ms,
        actual_ms=round(found.actual_ms),
        lru_ms=round(found.lru_ms),
        optimum_ms=round(found.optimum_ms),
        bound_ms=round(found.bound_ms),
    )
    sys.stdout.buffer.write(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
