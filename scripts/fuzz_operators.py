"""Every operation that a pushed program may use, with hostile arguments: what ends the process?

    python scripts/fuzz_operators.py [--seed N] [--calls N] [--seconds N] [--only NAME ...]

Each operation gets a process of its own and is called there as a worker calls it: the same preparation, the
same look at sizes beforehand. A finding is an operation that ends the process, reads beyond a tensor that it
was given (tensors end or begin at pages that nobody may touch), gives out memory that it did not fill (the
same call over a heap of two patterns gives two results), takes memory that the look beforehand did not see,
or takes longer than a call may. It prints one line per finding with the arguments, and exits with 1.

Covers: the operations one by one on the processor. Does not cover: graphs (``tests/attacks``), or a GPU's
kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from operator_arguments import PAGE_BYTES, Arguments, Fenced

from agent.engines import operations
from packer.operators import OPERATORS, Operator
from packer.program import Node
from packer.types import KIB, MIB

# What a request may hold here; the worker's limit would only make the calls longer.
RUN_BYTES_MAX = 64 * MIB
# Beside what the process has at its start: for a result and for what a kernel needs to compute it.
ADDRESS_BYTES = 10 * RUN_BYTES_MAX
# Of the processor's time; none of these small calls has so much to do.
CALL_SECONDS_MAX = 20
# Of the clock, for a call that only waits: a machine that is busy elsewhere makes no call slow.
STUCK_SECONDS_MAX = 300
REPORT_CHARS_MAX = 4000
SLOW = "takes very long"
# After a slow call others of the operation are tried, so often.
TRIES_MAX = 4
# glibc's mallopt: fill what is taken and given back, and take nothing from the kernel's zero pages.
M_PERTURB, M_MMAP_THRESHOLD = -6, -3
PATTERNS = (0x55, 0xAA)
TUNABLES = "GLIBC_TUNABLES"
NO_CACHE = "glibc.malloc.tcache_count=0"  # blocks of it are given out without a pattern

_libc = ctypes.CDLL(None, use_errno=True)


# --- one process per operation ------------------------------------------------------------------------


class Finding(Exception):
    """What a call did that it must not."""


def shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        few = value.flatten()[:12].tolist() if value.numel() else []
        return f"{str(value.dtype)[6:]}{list(value.shape)}/{list(value.stride())}={few}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def call(step: operations.Step, positional: list[Any], keywords: Mapping[str, Any]) -> list[torch.Tensor]:
    """As ``agent.engines.export`` does. Raises whatever a worker would turn into an answer."""
    if step.makes_tensors:
        positional = operations.prepared(step, positional, keywords)
        operations.check_size(step, positional, keywords, 0)
    return list(operations.tensors_in(step.call(*positional, **keywords)))


def check_call(step: operations.Step, positional: list[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether it ran at all. Raises ``Finding``."""
    results: list[bytes] = []
    for pattern in PATTERNS:
        _libc.mallopt(M_PERTURB, pattern)
        torch.manual_seed(0)  # what is random is random in the same way
        started_s = time.process_time()
        try:
            tensors = call(step, positional, keywords)
            results.append(b"".join(_bytes(tensor) for tensor in tensors))
        except MemoryError:
            raise Finding("takes memory that was not seen beforehand") from None
        except Exception as error:
            if "allocate memory" in str(error) and "would take" not in str(error):
                raise Finding("takes memory that was not seen beforehand") from None
            return False
        finally:
            if time.process_time() - started_s > CALL_SECONDS_MAX / 2:
                raise Finding(SLOW)
    if results[0] != results[1]:
        raise Finding("gives out memory that it did not fill")
    return True


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() * tensor.element_size() > 64 * KIB:
        tensor = tensor.flatten()[: 64 * KIB // tensor.element_size()]
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def try_operator(
    operator: Operator, seed: str, calls: int, seconds: float, tell: Callable[[str], None]
) -> None:
    """In the process of this operation: tells what it is about to do, and at last how many calls ran."""
    chance, fenced = random.Random(seed), Fenced()
    arguments, ran = Arguments(operator, chance, fenced), 0
    until_s = time.process_time() + seconds
    with torch.inference_mode():
        for _ in range(calls):
            torch.manual_seed(chance.getrandbits(60))
            step, positional, keywords = arguments.draw()
            given = [*map(shown, positional), *(f"{name}={shown(value)}" for name, value in keywords.items())]
            tell(f"call {operator.name}({', '.join(given)})"[:REPORT_CHARS_MAX])
            signal.setitimer(signal.ITIMER_PROF, CALL_SECONDS_MAX)
            signal.alarm(STUCK_SECONDS_MAX)
            try:
                ran += check_call(step, positional, keywords)
            except Finding as finding:
                tell(f"finding {finding}: {operator.name}({', '.join(given)})"[:REPORT_CHARS_MAX])
                return
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            del step, positional, keywords
            fenced.free()
            if time.process_time() > until_s:
                break
    tell(f"ran {ran}")


@contextmanager
def child(operator: Operator, seed: str, calls: int, seconds: float) -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_BYTES,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _libc.mallopt(M_MMAP_THRESHOLD, 2**30)
            try_operator(
                operator, seed, calls, seconds, lambda line: void(os.write(writing, line.encode() + b"\n"))
            )
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    try:
        yield pid, reading
    finally:
        os.close(reading)


def void(_: object) -> None:
    return None


def result_of(operator: Operator, seed: str, calls: int, seconds: float) -> tuple[str, int]:
    """What was found, empty for nothing, and how many calls ran."""
    with child(operator, seed, calls, seconds) as (pid, reading):
        told = b""
        while piece := os.read(reading, 64 * KIB):
            told = (told + piece)[-2 * REPORT_CHARS_MAX :]
        _, status = os.waitpid(pid, 0)
    last = told.decode(errors="replace").strip().rpartition("\n")[2]
    kind, _, rest = last.partition(" ")
    if kind == "ran" and status == 0:
        return "", int(rest)
    if kind == "finding":
        return rest, 0
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return f"{SLOW}: {rest}", 0
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    return f"ends the process ({how}): {rest}", 0


def warm_up() -> None:
    """What torch loads at its first look at sizes, once for all processes."""
    for name in ("aten.add.Tensor", "aten.matmul.default", "aten.addcdiv.default"):
        operator = OPERATORS[name]
        step = operations.step_of(Node(name, operator, (), (), ("a",)), ())
        with torch.inference_mode():
            call(step, [torch.ones(2, 2)] * sum(each.required for each in operator.parameters), {})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", default="0")
    parser.add_argument("--calls", type=int, default=400, help="of each operation")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each operation at most")
    parser.add_argument("--only", nargs="*", default=[], help="operations whose names hold one of these")
    asked = parser.parse_args()
    if os.environ.get(TUNABLES) != NO_CACHE:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, TUNABLES: NO_CACHE})
    torch.set_num_threads(1)
    operations.RUN_BYTES_MAX = RUN_BYTES_MAX
    warm_up()
    found = idle = slow = total = 0
    for name, operator in sorted(OPERATORS.items()):
        if asked.only and not any(part in name for part in asked.only):
            continue
        for number in range(TRIES_MAX):
            seed = f"{asked.seed} {name} {number}"
            what, ran = result_of(operator, seed, asked.calls, asked.seconds)
            is_slow = what.startswith(SLOW)
            if what:
                print(f"{name} {what}", flush=True)
            if not is_slow:
                break
        total += ran
        slow += is_slow
        found += bool(what) and not is_slow
        if not what and not ran:
            idle += 1
            print(f"{name} never ran", flush=True)
    print(
        f"{found} operations with findings, {idle} that never ran, {total} calls of the others; {slow} slow"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
