"""One control process on one core: thousands of nodes that beat, and thousands of tenants with keys.

Nodes are simulated, their connections are not: each has joined with a token, has a certificate of its own and
one TLS connection on which it polls for plans, from this process on another core. A change of a plan is timed
from the operator's request to the moment when the last node has it.

Covers: joining, plans to all nodes, memory per node, checking keys among many tenants. Does not cover:
routing (``bench_gateway``) or the deciding core alone (``bench_core``).
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bench_harness
from bench_suite import Judgement, Section, SuiteReport, Table, add_markdown, deliver, in_a_folder, report_of
from process_memory import processor_s, read_rss
from simulated_nodes import Fleet, SimulatedNode, join_all, read_ca
from stack import find_command

import bunkhouse

NODES, NODES_QUICK = 5_000, 500
TENANTS, TENANTS_QUICK = 10_000, 1_000
CHANGES = 5
CHECKS = 300
GOAL_REACH_S = 2.0
START_TIMEOUT_S = 60.0
# All nodes must have a plan by then; far above the goal, so that a miss is a figure and not an error.
REACH_TIMEOUT_S = 120.0
NAME = "bench"
# Control is quiet when it used no more than this share of a core for so long: nodes renew polls now and then.
QUIET_S, QUIET_SHARE = 0.5, 0.1
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ControlProcess:
    """A control server of its own, on one core if there are two."""

    pid: int
    url: str
    node_host: str
    node_port: int
    operator_key: str

    @property
    def rss_bytes(self) -> int:
        return read_rss(self.pid)


@contextmanager
def control_process(root: Path) -> Iterator[ControlProcess]:
    ready, cores = root / "ready.json", sorted(os.sched_getaffinity(0))
    command = [find_command("bunk-control"), "serve", "--data-dir", str(root / "control")]
    command += ["--listen", "127.0.0.1:0", "--node-listen", "127.0.0.1:0", "--ready-file", str(ready)]
    with (root / "control.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"control did not start:\n{(root / 'control.log').read_text()[-2000:]}")
            time.sleep(0.02)
        if len(cores) > 1:
            os.sched_setaffinity(process.pid, cores[:1])
            os.sched_setaffinity(0, cores[1:])
        said = json.loads(ready.read_text())
        host, _, port = said["node_url"].removeprefix("https://").rpartition(":")
        key = (root / "control" / "operator.key").read_text().strip()
        yield ControlProcess(process.pid, said["url"], host, int(port), key)
    finally:
        os.sched_setaffinity(0, cores)
        process.terminate()
        process.wait(START_TIMEOUT_S)


# --- nodes ------------------------------------------------------------------------------------------


async def measure_nodes(control: ControlProcess, count: int, changes: int, log: Log) -> Section:
    client = bunkhouse.Client(control.url, control.operator_key)
    client.create_tenant(NAME)
    empty_bytes = control.rss_bytes
    ca_pem = read_ca(control.node_host, control.node_port)
    nodes = [
        SimulatedNode(control.node_host, control.node_port, f"node-{number:05}", ca_pem)
        for number in range(count)
    ]
    started_s = time.perf_counter()
    await join_all(nodes, lambda: client.create_node_token().token)
    join_s = time.perf_counter() - started_s
    log(f"{count} nodes joined in {join_s:.0f} s")
    fleet = Fleet(nodes)
    started_s = time.perf_counter()
    await fleet.start()
    await fleet.until(lambda node: node.plan_seq > 0, REACH_TIMEOUT_S)
    connect_s = time.perf_counter() - started_s
    log(f"all have a plan after {connect_s:.1f} s")
    beating_bytes = control.rss_bytes
    reached: dict[bool, list[float]] = {True: [], False: []}  # by whether all waited
    halves: list[float] = []
    for number in range(2 * changes + 1):  # the first one warms up
        waits = number <= changes
        if waits:
            await settled(control)
        before = max(node.plan_seq for node in nodes)
        asked_s = time.perf_counter()
        await asyncio.to_thread(client.set_quota, NAME, concurrency=number + 1)
        await fleet.until(lambda node, before=before: node.plan_seq > before, REACH_TIMEOUT_S)  # type: ignore[misc]
        took = sorted(node.seen_s - asked_s for node in nodes)
        log(f"change {number}: half of them after {took[len(took) // 2]:.2f} s, all after {took[-1]:.2f} s")
        if number:
            reached[waits].append(took[-1])
        if number and waits:
            halves.append(took[len(took) // 2])
    plan_bytes = max(node.plan_bytes for node in nodes)
    await fleet.stop()
    client.close()
    per_node_bytes = (beating_bytes - empty_bytes) / count
    rows = (
        ("joined", f"{count / join_s:,.0f} nodes per second"),
        ("connected and told, all", f"{connect_s:.2f} s"),
        ("a change reaches half of them", f"{statistics.median(halves):.2f} s"),
        ("a change reaches all of them", _reach_text(reached[True])),
        ("the same while they take up their polls again", _reach_text(reached[False])),
        ("a plan that says what changed", f"{plan_bytes:,} bytes"),
        ("control's memory per node", f"{per_node_bytes / 1024:.0f} KiB"),
    )
    notes = (
        f"{changes} changes of a quota, medians; every node has a long poll open on its own connection;",
        f"then {changes} changes, each as soon as all have the one before",
    )
    goal = Judgement(
        f"a change reaches all of {count:,} nodes",
        statistics.median(reached[True]),
        GOAL_REACH_S,
        False,
        " s",
    )
    table = Table(f"{count:,} nodes", ("what", "found"), rows, notes)
    runs = {
        "reached all, s": reached[True],
        "reached all back to back, s": reached[False],
        "reached half, s": halves,
    }
    return Section("nodes", (table,), (goal,), runs=runs)


def _reach_text(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s"


async def settled(control: ControlProcess) -> None:
    """Wait until control has nothing to do: all nodes wait for a change."""
    used_s = -1.0
    async with asyncio.timeout(REACH_TIMEOUT_S):
        while (now_s := processor_s(control.pid)) - used_s > QUIET_SHARE * QUIET_S:
            used_s = now_s
            await asyncio.sleep(QUIET_S)


# --- tenants ----------------------------------------------------------------------------------------


def measure_tenants(control: ControlProcess, count: int, checks: int, log: Log) -> Section:
    """Each with one key; then calls with keys of some of them."""
    before_bytes = control.rss_bytes
    keys: list[str] = []
    with bunkhouse.Client(control.url, control.operator_key) as client:
        started_s = time.perf_counter()
        for number in range(count):
            client.create_tenant(f"t{number:05}")
            keys.append(client.create_key(f"t{number:05}").key)
            if number % 1000 == 999:
                log(f"{number + 1} tenants")
        made_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        listed = len(client.tenants())
        list_s = time.perf_counter() - started_s
    if listed < count:
        raise RuntimeError(f"{listed} tenants are listed, {count} were made")
    step = max(1, count // checks)
    times: dict[str, list[float]] = {"first": [], "again": []}
    for key in keys[::step]:
        with bunkhouse.Client(control.url, key) as client:
            for case in ("first", "again"):
                started_s = time.perf_counter()
                client.models()
                times[case].append((time.perf_counter() - started_s) * 1000)
    grown_bytes = control.rss_bytes - before_bytes
    rows = (
        ("made, each with a key", f"{count / made_s:,.0f} per second, one client"),
        ("listed, all", f"{list_s:.2f} s"),
        ("a tenant lists its models, new connection", f"{statistics.median(times['first']):.2f} ms"),
        ("the same again", f"{statistics.median(times['again']):.2f} ms"),
        ("control's memory per tenant and key", f"{grown_bytes / count / 1024:.1f} KiB"),
    )
    notes = (f"medians over {len(keys[::step])} tenants; without nodes: a plan names every tenant",)
    return Section("tenants", (Table(f"{count:,} tenants", ("what", "found"), rows, notes),), runs=times)


# --- the run ----------------------------------------------------------------------------------------


def run(root: Path, nodes: int, tenants: int, changes: int, log: Log) -> SuiteReport:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection per node, here and there
    sections = []
    try:
        for name in ("nodes", "tenants"):
            folder = root / name
            folder.mkdir()
            with control_process(folder) as control:
                if name == "nodes":
                    sections.append(asyncio.run(measure_nodes(control, nodes, changes, log)))
                else:
                    sections.append(measure_tenants(control, tenants, CHECKS, log))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    facts: dict[str, str | int | float] = {
        "control": "one process on one core, SQLite; its clients on the other cores"
    }
    return report_of("control", facts, sections)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = bench_harness.parser(__doc__)
    add_markdown(parser)
    parser.add_argument("--nodes", type=int, help=f"how many nodes (default {NODES})")
    parser.add_argument("--tenants", type=int, help=f"how many tenants (default {TENANTS})")
    options = parser.parse_args(arguments)
    changes = options.rounds or CHANGES
    nodes = options.nodes or (NODES_QUICK if options.quick else NODES)
    tenants = options.tenants or (TENANTS_QUICK if options.quick else TENANTS)
    for name, value, most in (
        ("--nodes", nodes, NODES),
        ("--tenants", tenants, TENANTS),
        ("--rounds", changes, 100),
    ):
        if not 1 <= value <= most:
            parser.error(f"{name} {value}: use 1 to {most}")
    report = in_a_folder(lambda folder, log: run(folder, nodes, tenants, changes, log))
    return deliver(report, options, "scripts/bench_control.py")


if __name__ == "__main__":
    sys.exit(main())
