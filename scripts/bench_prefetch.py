#!/usr/bin/env python3
"""What prefetching from disk into RAM is worth: on the production core, and at the most.

Covers: the simulator's box, with the production core and its prefetch on and off, in normal running and
after a restart that empties both memories; and the last step of ``stack_pool`` with a prefetch that knows no
tenants and takes no time from anybody, which is the most that a real one could bring. Does not cover: real
disks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from request_traces import GB, NoTrace, Trace, servegen
from stack_pool import DISK_BYTES_PER_MS, OURS, Stack

from packer import remember
from packer.events import Event
from packer.fleet import Fleet, parse_fleet
from packer.simulate import Simulation
from packer.traces import Sized
from packer.traces import Trace as Columns

LOOK_MS = 60_000
# A prefetch replaces only what is worth less by a tenth, or two models would change places for ever.
MARGIN = 1.1
AFTER_MS = 6 * 3_600_000
SHARES = (0.0, 0.1, 1.0)  # of the disk's rate
SEEDS = 3
# Two devices of 141 GB, as in the model of the stack, and its compression.
FLEET = "2x141GB,ram=512GB,disk=64TB,ratio=0.67,ram_ratio=0.75"


class Prefetching(Stack):
    """The full stack, and a prefetch once a minute; ``restart_ms``: when both memories are emptied."""

    def __init__(
        self, trace: Trace, device_bytes: int, ram_bytes: int, share: float, restart_ms: int | None
    ) -> None:
        super().__init__(OURS, trace, device_bytes, ram_bytes)
        self.prefetched_bytes = 0
        self._share = share
        self._restart_ms = restart_ms
        self._looked_ms = 0

    def use(self, model: int, now_ms: int) -> float:
        if self._restart_ms is not None and now_ms >= self._restart_ms:
            self._restart_ms = None
            self._free += sum(self._on_device.values())
            self._ram_free += sum(self._in_ram.values())
            self._on_device.clear()
            self._in_ram.clear()
        passed_ms = now_ms - self._looked_ms
        if self._share and passed_ms >= LOOK_MS:
            self._looked_ms = now_ms
            self._prefetch(now_ms, int(min(passed_ms, 3_600_000) * self._share * DISK_BYTES_PER_MS))
        return super().use(model, now_ms)

    def _prefetch(self, now_ms: int, budget_bytes: int) -> None:
        value, gain_ms = self._policy.at(now_ms), self._disk_ms - self._ram_ms
        wanted: list[tuple[float, int, int]] = []
        for model, item in enumerate(self._items):
            missing = self._sizes[model] - self._on_device.get(model, 0) - self._in_ram.get(model, 0)
            if item.last_ms >= 0 and missing > 0:
                wanted.append((value(item, missing * gain_ms, missing), model, missing))
        least = sorted((value(self._items[m], held * gain_ms, held), m) for m, held in self._in_ram.items())
        least.reverse()
        for worth, model, missing in sorted(wanted, reverse=True):
            taken = min(missing, budget_bytes)
            while self._ram_free < taken and least and least[-1][0] * MARGIN < worth:
                self._ram_free += self._in_ram.pop(least.pop()[1], 0)
            taken = min(taken, self._ram_free)
            if taken <= 0:
                return
            self._in_ram[model] = self._in_ram.get(model, 0) + taken
            self._ram_free -= taken
            budget_bytes -= taken
            self.prefetched_bytes += taken


@dataclass(frozen=True, slots=True)
class Found:
    """Mean cold seconds of all requests, and of those within six hours after the restart; terabytes."""

    mean_s: float
    after_s: float
    prefetched_tb: float
    moved_tb: float


def replay(trace: Trace, device_gb: int, ram_gb: int, share: float, restarts: bool) -> Found:
    restart_ms = trace.at_ms[len(trace.at_ms) // 2] if restarts else None
    stack = Prefetching(trace, device_gb * GB, ram_gb * GB, share, restart_ms)
    cold_ms = [stack.use(model, at_ms) for model, at_ms in zip(trace.models, trace.at_ms, strict=True)]
    after = [
        cold
        for cold, at_ms in zip(cold_ms, trace.at_ms, strict=True)
        if restart_ms is not None and restart_ms <= at_ms < restart_ms + AFTER_MS
    ]
    return Found(
        sum(cold_ms) / len(cold_ms) / 1000,
        sum(after) / len(after) / 1000 if after else 0.0,
        stack.prefetched_bytes / 1e12,
        stack.moved_bytes / 1e12,
    )


def on_the_core(trace: Trace, fleet: Fleet) -> Found:
    """The whole trace on one box, and its second half on a box that has just been started again, with what it
    had learned by then; ``prefetched_tb`` are not told apart."""
    half = len(trace.at_ms) // 2
    first = Simulation(columns(trace, 0, half), fleet)
    first.run()
    node, now_ms = first.boxes[0].node, trace.at_ms[half] - trace.at_ms[0]
    used = [model for model in node.models.values() if model.reuse.uses]
    known: list[Event] = [
        remember.of_node(node, now_ms),
        *(remember.of_model(model, now_ms) for model in used),
    ]
    second = Simulation(columns(trace, half, len(trace.at_ms)), fleet, remembered=known).run()
    until_ms = trace.at_ms[half] + AFTER_MS
    asked = sum(at_ms < until_ms for at_ms in trace.at_ms[half:])
    cold_ms = sum(cold for _, at_ms, cold in second.cold if at_ms < AFTER_MS)
    whole = Simulation(columns(trace, 0, len(trace.at_ms)), fleet).run()
    moved_tb = sum(whole.moved_bytes.values()) / 1e12
    return Found(whole.all.cold_s_mean, cold_ms / asked / 1000, 0.0, moved_tb)


def columns(trace: Trace, start: int, end: int) -> Columns:
    """A part of the trace as the simulator takes it."""
    catalog = tuple(
        Sized(name.partition("/")[0].lower(), f"m{number}", size)
        for number, (name, size) in enumerate(zip(trace.names, trace.size_bytes, strict=True))
    )
    return Columns(trace.at_ms[start:end], trace.models[start:end], (-1,) * (end - start), catalog)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    options = parser.parse_args(arguments)
    try:
        traces = [servegen(1e-5, seed) for seed in range(1 if options.quick else SEEDS)]
    except NoTrace as error:
        print(f"bench_prefetch: {error}", file=sys.stderr)
        return 2
    print("the production core: seed  prefetch  mean s  6 h after a restart, s  moved TB")
    for seed, trace in enumerate(traces):
        for prefetch in (False, True):
            fleet = parse_fleet(f"{FLEET},prefetch={'yes' if prefetch else 'no'}")
            found = on_the_core(trace, fleet)
            print(
                f"{seed:26}  {'on' if prefetch else 'off':8}  {found.mean_s:.4f}  {found.after_s:22.3f}"
                f"  {found.moved_tb:8.1f}",
                flush=True,
            )
    print("the most: seed  restart  share  mean s  6 h after, s  prefetched TB  moved TB")
    for seed, trace in enumerate(traces):
        for restarts in (False, True):
            for share in SHARES:
                found = replay(trace, 282, 512, share, restarts)
                after = f"{found.after_s:.3f}" if restarts else "-"
                print(
                    f"{seed:4}  {'yes' if restarts else 'no':7}  {share:5.1f}  {found.mean_s:.4f}"
                    f"  {after:>12}  {found.prefetched_tb:13.1f}  {found.moved_tb:8.1f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
