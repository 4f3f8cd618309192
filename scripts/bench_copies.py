#!/usr/bin/env python3
"""What further copies of a busy model are worth: waiting and copies, by the rule that sends for copies.

Covers: control's own core and choice of nodes on a virtual clock, callers who come at random in a calm, a
busy and a calm part, and nodes that answer one request after the other. Does not cover: other models on these
nodes (here every copy has room and stays), batches, or real nodes.

Rules: one copy; control's own (what was waited has paid for the restore); and a copy for whoever would wait.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from heapq import heappop, heappush
from random import Random

from control import copies
from control.cluster import Answered, Cluster, NodeBeat, NodeJoined, Routed, step
from packer.types import MIB, ModelRef, ModelSpec, Task
from packer.wire import DeviceReport, ModelReport, Report

NODES = 6
REPLICAS = 4
SERVICE_MS = 100
# How long a node takes to tell control that something has changed.
REPORT_MS = 200
PART_MS = 600_000
CALM = 0.3
# More than any restore costs: with this much waited a copy is due as soon as somebody would wait.
AT_ONCE_MS = 10**9
SPEC = ModelSpec(
    ModelRef("t", "m", "0" * 16), "control:", (), "e", Task.EMBEDDING, MIB, (MIB,), 0, 1, replicas=REPLICAS
)
RULES = ("one", "ours", "at once")


@dataclass(frozen=True, slots=True)
class Found:
    """One run. Waiting is without the service itself; of the calls of the last part, when it is calm again,
    ``first_percent`` went to one node."""

    load: float
    restore_s: float
    rule: str
    wait_s_mean: float
    wait_s_p99: float
    copies: int
    first_percent: int


@dataclass(slots=True)
class Run:
    """One load, one restore, one rule."""

    restore_ms: int
    rule: str
    cluster: Cluster = field(default_factory=Cluster)
    states: dict[str, str] = field(default_factory=dict)
    queues: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # (came, service) in ms
    due: list[tuple[int, int, str, str]] = field(default_factory=list)  # (at, number, what, node)
    waits_ms: list[int] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    number: int = 0

    def __post_init__(self) -> None:
        for at in range(NODES):
            name = f"n{at}"
            self.states[name], self.queues[name] = "absent", []
            step(self.cluster, NodeJoined(name, f"http://{name}"), 0)
            self._report(name, 0)

    def _report(self, name: str, now_ms: int) -> None:
        state = self.states[name]
        there = MIB if state == "resident" else 0
        estimate = 0 if there else self.restore_ms
        known = ModelReport(str(SPEC.ref), state, None, 0, 0, there, 0, 0, 0, 0, (), 0, estimate)
        device = DeviceReport("d", "cpu", "cpu", 10 * MIB, there, 0, True)
        report = Report(f"http://{name}", 0, False, (device,), 0, 0, 0, 0, (known,), ())
        step(self.cluster, NodeBeat(name, report, 0, 0, False), now_ms)

    def _later(self, at_ms: int, what: str, node: str) -> None:
        self.number += 1
        heappush(self.due, (at_ms, self.number, what, node))

    def call(self, now_ms: int, service_ms: int) -> None:
        self.until(now_ms)
        spec = replace(SPEC, replicas=1) if self.rule == "one" else SPEC
        if self.rule == "at once":
            self.cluster.waits.add(spec.ref, AT_ONCE_MS, now_ms)
        node = copies.choose_all(self.cluster, spec, now_ms)[0]
        wait_ms = copies.wait_ms(self.cluster, spec, node, now_ms) if spec.replicas > 1 else None
        step(self.cluster, Routed(node, spec.ref, MIB, 1, wait_ms), now_ms)
        self.asked[node] += 1
        self.queues[node].append((now_ms, service_ms))
        if self.states[node] == "absent":
            self.states[node] = "restoring"
            self._later(now_ms + REPORT_MS, "report", node)
            self._later(now_ms + self.restore_ms, "restored", node)
        elif self.states[node] == "resident" and len(self.queues[node]) == 1:
            self._serve(node, now_ms)

    def _serve(self, node: str, now_ms: int) -> None:
        came_ms, service_ms = self.queues[node][0]
        self.waits_ms.append(now_ms - came_ms)
        self._later(now_ms + service_ms, "answered", node)

    def until(self, now_ms: int) -> None:
        while self.due and self.due[0][0] <= now_ms:
            at_ms, _, what, node = heappop(self.due)
            if what == "report":
                self._report(node, at_ms)
                continue
            if what == "restored":
                self.states[node] = "resident"
                self._later(at_ms + REPORT_MS, "report", node)
            else:
                self.queues[node].pop(0)
                step(self.cluster, Answered(node, True, SPEC.ref), at_ms)
            if self.queues[node]:
                self._serve(node, at_ms)


def measure(load: float, restore_s: float, rule: str, seed: int = 0, part_ms: int = PART_MS) -> Found:
    """``load``: of the busy part, in what one node can do."""
    chance = Random(f"copies {seed}")
    run = Run(round(restore_s * 1000), rule)
    at_ms, last = 0.0, False
    for part, rate in enumerate((CALM, load, CALM)):
        while (at_ms := at_ms + chance.expovariate(rate / SERVICE_MS)) < (part + 1) * part_ms:
            # The queue of the busy part is over by the middle of the last one, where it can be.
            if part == 2 and not last and at_ms > 2.5 * part_ms:
                run.asked.clear()
                last = True
            run.call(round(at_ms), SERVICE_MS)
        at_ms = float((part + 1) * part_ms)
    run.until(10**12)
    waits_s = sorted(wait_ms / 1000 for wait_ms in run.waits_ms)
    held = sum(state == "resident" for state in run.states.values())
    return Found(
        load,
        restore_s,
        rule,
        round(sum(waits_s) / len(waits_s), 3),
        round(waits_s[len(waits_s) * 99 // 100], 3),
        held,
        round(100 * max(run.asked.values()) / sum(run.asked.values())),
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Waiting and copies, by the rule that sends for copies.")
    parser.add_argument("--quick", action="store_true", help="a sixtieth of the time")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args(words)
    part_ms = PART_MS // 60 if given.quick else PART_MS
    print(f"{NODES} nodes, up to {REPLICAS} replicas, requests of {SERVICE_MS} ms; load of the busy part")
    print(
        f"{'load':>5} {'restore':>8}  {'rule':8} {'wait':>9} {'p99':>9}  copies  at one node when calm again"
    )
    found = []
    for load in (0.6, 0.9, 1.8, 3.2):
        for restore_s in (0.5, 5.0, 30.0):
            for rule in RULES:
                one = measure(load, restore_s, rule, part_ms=part_ms)
                found.append(one)
                waits = f"{one.wait_s_mean:>7.3f} s {one.wait_s_p99:>7.3f} s"
                print(
                    f"{load:>5} {restore_s:>6} s  {rule:8} {waits} {one.copies:>7}  {one.first_percent:>3} %"
                )
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump([asdict(each) for each in found], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
