"""First-request time of a model in each tier, against a fresh process that loads it and answers once.

The model is all-MiniLM-L6-v2 (87 MiB of fp32) on one cpu device that holds one copy of it. Two copies of
it are called in turn, so that every call evicts one and restores the other. Three stacks run at once, one
for each tier that can be forced: with host RAM (restores come from the host), without host RAM (from the
disk), and without a disk tier either (from the origin); the header of each answer proves where its weights
came from.

The peer is ``plain_transformers``: a new Python that imports transformers, loads the directory with
``from_pretrained`` and answers once. The limit is reading the raw weights, warm, into memory that is there
already: no restore on a cpu device can be faster than moving its bytes once.

Covers: what one caller waits for, through the node's gateway. Does not cover: many callers, GPUs, cold disks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import bench_harness
import make_models
import plain_transformers
from bench_harness import Bench, Case, Goal
from stack import Stack, StackOptions, start_stack
from tour_calls import make_client, vector_bytes, wait_for_models

TENANT = "default"
NAMES = ("first", "second")
TEXT = "A bunkhouse is a plain building where many workers sleep."
DEVICE = "cpu:112MiB"
MIB = 1024 * 1024
MODELS_TIMEOUT_S = 60.0
SETTLE_CALLS_MAX = 20  # a pack and a host copy take one restore each

FRESH = "fresh process"
LIMIT = "moving the bytes once"
# One tenth of what a user waits for today, from every tier that a node keeps itself.
GOALS = (
    Goal("from host", FRESH, 0.1),
    Goal("from disk", FRESH, 0.1),
    Goal("from origin", FRESH, 0.2),
    Goal("on the device", FRESH, 0.01),
)


class WrongTier(RuntimeError):
    """A restore came from another tier than the one that is measured."""


@dataclass(slots=True)
class Caller:
    """Calls the two copies in turn and checks where the weights came from."""

    stack: Stack
    tier: str
    expected: bytes
    turn: int = 0

    def cold(self) -> float:
        """Call the copy that is not on the device."""
        self.turn += 1
        return self._call(NAMES[self.turn % 2], self.tier)

    def warm(self) -> float:
        """Call the copy that is."""
        return self._call(NAMES[self.turn % 2], "device")

    def _call(self, name: str, tier: str) -> float:
        key = _tenant_key(self.stack)
        with make_client(self.stack.agent_url, key) as client:
            client.models.list()  # the connection is there already, as it is for any caller but the first
            started_s = time.perf_counter()
            raw = client.embeddings.with_raw_response.create(model=f"{TENANT}/{name}", input=TEXT)
            took_ms = (time.perf_counter() - started_s) * 1000
            vector = vector_bytes(raw.parse().data[0].embedding)
        came_from = raw.headers.get("x-bunkhouse-tier", "")
        if tier and came_from != tier:
            raise WrongTier(f"{name} came from {came_from!r}, this case measures {tier!r}")
        if vector != self.expected:
            raise RuntimeError(f"{name} from {came_from}: not the answer of plain transformers")
        return took_ms

    def settle(self) -> None:
        """Call until restores come from the measured tier: packs and host copies are made on the way."""
        for _ in range(SETTLE_CALLS_MAX):
            self.turn += 1
            try:
                self._call(NAMES[self.turn % 2], self.tier)
            except WrongTier:
                continue
            self.turn += 1
            self._call(NAMES[self.turn % 2], self.tier)
            return
        raise WrongTier(
            f"after {SETTLE_CALLS_MAX} calls restores still do not come from {self.tier}\n{self.stack.logs()}"
        )


def _tenant_key(stack: Stack) -> str:
    return (stack.options.data_dir / "tenant.key").read_text().strip()


@contextmanager
def running(root: Path, tier: str, directories: tuple[Path, Path], expected: bytes) -> Iterator[Caller]:
    """A stack whose restores come from ``tier``, with both copies pushed and settled."""
    host, disk = {"host": ("1GiB", "4GiB"), "disk": ("0", "4GiB"), "origin": ("0", "0")}[tier]
    stack = start_stack(StackOptions(root / tier, (DEVICE,), host, disk))
    try:
        for name, directory in zip(NAMES, directories, strict=True):
            stack.bunk("model", "push", f"{TENANT}/{name}", str(directory))
        caller = Caller(stack, tier, expected)
        names = [f"{TENANT}/{name}" for name in NAMES]
        wait_for_models(stack.agent_url, _tenant_key(stack), names, MODELS_TIMEOUT_S)
        caller.settle()
        yield caller
    finally:
        stack.stop()


def fresh_process(directory: Path, expected: bytes) -> float:
    """What a user waits for without us; raises if it is not the same answer."""
    answer = plain_transformers.ask_fresh_process(directory, "--embed", TEXT)
    if answer.vectors[0] != expected:
        raise RuntimeError("two fresh processes gave different answers")
    return answer.process_ms


def move_bytes(path: Path, target: bytearray) -> float:
    """Read a file that the page cache holds into memory that is already faulted in."""
    view = memoryview(target)
    started_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        done = 0
        while read := os.readv(file.fileno(), [view[done:]]):
            done += read
            if done == len(view):
                break
    return (time.perf_counter() - started_s) * 1000


def main() -> int:
    parser = bench_harness.parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where models and stacks live (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bunkhouse-bench-", dir=options.data_dir) as temporary:
        return run(Path(temporary), options)


def run(root: Path, options: argparse.Namespace) -> int:
    directories = (make_models.copy_minilm(root / "first"), make_models.copy_minilm(root / "second"))
    weights = directories[0] / "model.safetensors"
    size = weights.stat().st_size
    reference = plain_transformers.ask_fresh_process(directories[0], "--embed", TEXT)
    expected = reference.vectors[0]
    target = bytearray(size)
    with ExitStack() as stacks:
        callers = {
            tier: stacks.enter_context(running(root, tier, directories, expected))
            for tier in ("host", "disk", "origin")
        }
        cases = (
            Case(FRESH, lambda: fresh_process(directories[0], expected)),
            *(Case(f"from {tier}", caller.cold) for tier, caller in callers.items()),
            Case("on the device", callers["host"].warm),
            Case(LIMIT, lambda: move_bytes(weights, target)),
        )
        facts = {
            "model": "all-MiniLM-L6-v2, fp32",
            "weights": f"{size / MIB:.1f} MiB",
            "of the fresh process, loading": f"{reference.load_ms:.0f} ms",
            "of the fresh process, answering": f"{reference.answer_ms:.0f} ms",
        }
        bench = Bench("cold", cases, peer=FRESH, limit=LIMIT, goals=GOALS, facts=facts)
        return bench_harness.run_bench(bench, options)


if __name__ == "__main__":
    sys.exit(main())
