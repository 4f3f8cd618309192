#!/usr/bin/env python3
"""Plant one bug after the other and see whether the tests notice.

Covers: every mutant of ``tests/mutants.py`` and the lists like it, gathered in ``tests/planted.py``, each
planted alone as its module is imported (nothing on disk changes), first under the simulations, then under
the tests of its module, in processes of their own with a limit of time. Does not cover: finding new mutants.

A mutant whose text is not in the source exactly once is stale: an error. One that nothing notices is a
survivor; those that are known, with the reason, are in SURVIVORS. Exit status: 0 all as it should be, 1 a
survivor that is not known or a stale mutant, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(TESTS)]

from mutants import Mutant  # noqa: E402
from planted import EVERY_MUTANT, anchors, module_of  # noqa: E402

# A mutant may make its tests hang; that is noticed as well. Without one they take half a minute at most.
LIMIT_S_DEFAULT = 120
# Waiting is not working: tests that wait for ever are ended after this many times the limit.
WALL_PARTS = 10
# A process that somebody else ended says nothing of its mutant, and is run again.
ENDED_BY_OTHERS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGKILL)
TRIES_MAX = 5
# Seeds of a simulation under each mutant: some bugs need a rare coincidence.
NODE_SEEDS = 200
CLUSTER_SEEDS = 100

SIMULATE_NODE = """
import sys
from gang_world import GangWorld
from mutants import load
from planted import find
from test_simulation import world
core = load(find(sys.argv[1]))
for seed in range(int(sys.argv[2])):
    world(seed, core)
    world(seed, core, kind=GangWorld)
"""
SIMULATE_CLUSTER = """
import sys
import planted
if sys.argv[1]:
    planted.install(planted.find(sys.argv[1]))
from cluster_simulation import Fleet
for seed in range(int(sys.argv[2])):
    Fleet(seed).run()
"""
# Enough to see that the simulation of a cluster is whole: without a bug it must not break.
BASELINE_SEEDS = CLUSTER_SEEDS

# The tests of a module, quick ones first. The core's mutants without an entry get those of the core.
CORE_TESTS = ("test_residency", "test_quota", "test_turns", "test_lending", "test_hits", "test_chosen")
MODULE_TESTS = {
    "packer.rates": ("test_rates", "test_shares", "test_node_rates", "test_residency"),
    "packer.shares": ("test_shares", "test_node_shares"),
    "control.shares": ("test_shares", "test_node_shares"),
    "control.share_book": ("test_shares", "test_node_shares"),
    "control.share_desk": ("test_node_shares",),
    "agent.shares": ("test_node_shares",),
    "packer.placement": ("test_placement", "test_residency"),
    "packer.intensity": ("test_intensity", "test_keep", "test_policies"),
    "packer.keep": ("test_keep", "test_policies", "test_residency"),
    "packer.forecast": ("test_forecast", "test_residency"),
    "packer.wire": ("test_push", "test_cluster", "test_uplink", "test_control", "attacks/test_control_auth"),
    "control.choosing": ("test_cluster", "test_choosing", "test_copies", "test_router", "test_forwarding"),
    "control.copies": ("test_copies", "test_copies_running"),
    "control.routes.direct": ("test_copies_running",),
    "control.waits": ("test_copies", "test_copies_running"),
    "control.rooms": ("test_cluster", "test_choosing", "test_router"),
    "control.cluster": ("test_cluster", "test_copies", "test_sources_route", "test_router", "test_feed"),
    "control.feed": ("test_feed",),
    "control.feed_desk": ("test_feed", "test_router_process"),
    "control.kept_view": ("test_kept_view", "attacks/test_kept_views"),
    "control.router_process": ("test_router_process",),
    "control.router_view": ("test_feed",),
    "control.router_wire": ("test_feed", "attacks/test_routers"),
    "control.routes.access": ("attacks/test_routers", "attacks/test_control_auth"),
    "control.routes.routers": ("attacks/test_routers",),
    "control.state": ("test_control", "test_control_recovers", "test_control_crash"),
    "control.routes.nodes": ("test_control", "test_control_recovers", "attacks/test_control_auth"),
    "control.routes.forwarding": ("test_router", "test_forwarding", "test_copies_running"),
    "control.store": ("test_store", "test_control"),
    "agent.uplink": (
        "test_push",
        "test_uplink",
        "attacks/test_join",
        "attacks/test_foreign_plans",
        "test_identity",
    ),
    "packer.control_line": ("test_push", "test_uplink", "test_router_process"),
    "packer.joining": ("test_uplink", "test_identity", "attacks/test_join"),
    "packer.identity": ("attacks/test_join", "attacks/test_posing", "test_identity", "test_router_process"),
    "control.boxes": ("test_identity", "attacks/test_routers", "test_router_process"),
    "control.routers_said": ("attacks/test_routers", "test_router_process"),
    "control.lives": ("test_lives", "test_identity"),
    "control.ca": ("test_ca",),
    "control.authority": ("test_authority", "test_ca", "attacks/test_routers"),
    "control.routes.certifying": ("attacks/test_routers", "attacks/test_late_renewals", "test_identity"),
    "control.node_tls": ("attacks/test_posing",),
    "packer.certificates": ("test_authority", "attacks/test_posing", "test_ca"),
    "agent.keeper": ("test_full_disk", "test_uplink"),
    "agent.sources": ("test_sources",),
    "agent.journal": ("test_journal",),
    "agent.usage_meter": ("test_usage",),
    "agent.usage_spool": ("test_usage",),
    "control.usage_tables": ("test_usage", "attacks/test_usage_claims"),
    "agent.reports": ("test_node_rates", "test_footprints"),
}
# Mutants that change nothing that anybody could notice, or that only a measurement would show, and why.
SURVIVORS: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``state``: killed, survived or stale. ``by``: what noticed it, in one line."""

    what: str
    module: str
    state: str
    by: str = ""
    took_s: float = 0.0
    known: str = ""  # why it may survive


def judge(mutant: Mutant, limit_s: int) -> Verdict:
    """Plant it and look for whoever notices."""
    started_s = time.monotonic()
    verdict = partial(Verdict, mutant.what, module_of(mutant), known=SURVIVORS.get(mutant.what, ""))
    if (count := anchors(mutant)) != 1:
        return verdict("stale", f"its text is {count} times in the source")
    of_core = "." not in mutant.module
    by = ""
    if of_core:
        by = _simulated("node", SIMULATE_NODE, mutant.what, NODE_SEEDS, limit_s)
    if not by:
        by = _simulated("cluster", SIMULATE_CLUSTER, mutant.what, CLUSTER_SEEDS, limit_s)
    if not by:
        by = _tested(mutant, limit_s)
    return verdict("killed" if by else "survived", by, round(time.monotonic() - started_s, 1))


def _simulated(world: str, program: str, what: str, seeds: int, limit_s: int) -> str:
    ended = _run([sys.executable, "-c", program, what, str(seeds)], {}, limit_s)
    if ended is None:
        return f"simulation of the {world}: it hangs"
    if not ended.returncode:
        return ""
    if ended.returncode == -signal.SIGXCPU:
        return f"simulation of the {world}: it needs more than {limit_s} s of processor time"
    lines = ended.stderr.strip().splitlines()
    return f"simulation of the {world}: {lines[-1][:150] if lines else 'it died'}"


def _tested(mutant: Mutant, limit_s: int) -> str:
    names = MODULE_TESTS.get(module_of(mutant), CORE_TESTS)
    files = [str(TESTS / f"{name}.py") for name in names]
    # What plants bugs itself is no judge of this one.
    options = ["-x", "-q", "-p", "planted", "-p", "no:cacheprovider", "-k", "not planted"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    ended = _run(command, {"BUNK_PLANTED": mutant.what}, limit_s)
    if ended is None:
        return "tests: they hang"
    if not ended.returncode:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.MULTILINE)
    return failed[1] if failed else f"tests: {(ended.stdout + ended.stderr).strip()[-150:]}"


def _run(command: list[str], more: dict[str, str], limit_s: int) -> subprocess.CompletedProcess[str] | None:
    for _ in range(TRIES_MAX):
        ended = _run_once(command, more, limit_s)
        if ended is None or ended.returncode not in ENDED_BY_OTHERS:
            return ended
    raise RuntimeError(f"{command[-2:]} was ended from outside {TRIES_MAX} times: no verdict")


def _run_once(
    command: list[str], more: dict[str, str], limit_s: int
) -> subprocess.CompletedProcess[str] | None:
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "BUNK_CPU_LIMIT_S": str(limit_s), **more}
    try:
        return subprocess.run(
            command,
            env={**os.environ, **more},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit_s * WALL_PARTS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def chosen(only: str | None) -> list[Mutant]:
    return [m for m in EVERY_MUTANT if only is None or only in f"{module_of(m)}: {m.what}"]


def is_wrong(verdict: Verdict) -> bool:
    return verdict.state == "stale" or (verdict.state == "survived" and not verdict.known)


def show(verdict: Verdict) -> None:
    text = f"{verdict.state:>8}  {verdict.module}: {verdict.what}"
    if verdict.by:
        text += f"\n{'':>10}by {verdict.by}"
    if verdict.known:
        text += f"\n{'':>10}{'known' if verdict.state == 'survived' else 'no longer'}: {verdict.known}"
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--list", action="store_true", help="print the mutants and end")
    made.add_argument("--only", metavar="TEXT", help="those whose module or name has this text")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts here")
    made.add_argument("--limit-s", type=int, default=LIMIT_S_DEFAULT, help="processor seconds of each run")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    return made


def main() -> int:
    options = parser().parse_args()
    mutants = chosen(options.only)
    if not mutants or options.limit_s < 1 or options.workers < 1:
        print("mutation: no such mutant, or a limit below 1; see --list", file=sys.stderr)
        return 2
    if options.list:
        for mutant in mutants:
            print(f"{module_of(mutant)}: {mutant.what}")
        return 0
    if broken := _simulated("cluster", SIMULATE_CLUSTER, "", BASELINE_SEEDS, options.limit_s):
        print(f"mutation: without any bug: {broken}; mend that first", file=sys.stderr)
        return 2
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(options.workers) as pool:
        for verdict in pool.map(partial(judge, limit_s=options.limit_s), mutants):
            verdicts.append(verdict)
            show(verdict)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    counts = {state: sum(v.state == state for v in verdicts) for state in ("killed", "survived", "stale")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    wrong = [verdict for verdict in verdicts if is_wrong(verdict)]
    for verdict in wrong:
        print(f"not as it should be: {verdict.state}: {verdict.what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
