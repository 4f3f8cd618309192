"""The prefetch bench keeps its books, and finds what can be counted by hand.

Covers: ``scripts/bench_prefetch.py`` on traces made here. Does not cover: any figure.
"""

from __future__ import annotations

from bench_prefetch import Prefetching, replay
from request_traces import GB, Trace
from stack_pool import OURS


def rounds(order: str, gap_ms: int = 120_000) -> Trace:
    names = tuple(sorted(set(order)))
    return Trace(
        "made up",
        tuple(at * gap_ms for at in range(len(order))),
        tuple(names.index(name) for name in order),
        names,
        (10 * GB,) * len(names),
    )


def test_without_a_share_nothing_is_prefetched_and_after_a_restart_it_helps() -> None:
    trace = rounds("abcd" * 10)
    without = replay(trace, 10, 100, 0.0, restarts=True)
    helped = replay(trace, 10, 100, 1.0, restarts=True)
    assert without.prefetched_tb == 0.0
    assert helped.prefetched_tb > 0.0
    assert helped.after_s < without.after_s
    # Everything fits into both memories: as long as nothing restarts there is nothing to bring.
    assert replay(trace, 10, 100, 1.0, restarts=False).prefetched_tb == 0.0


def test_neither_memory_ever_holds_more_than_it_has() -> None:
    trace = rounds("abcdefgabacadaeafagggfedcba" * 4)
    stack = Prefetching(trace, 30 * GB, 20 * GB, 1.0, restart_ms=trace.at_ms[50])
    for model, at_ms in zip(trace.models, trace.at_ms, strict=True):
        stack.use(model, at_ms)
        assert sum(stack._on_device.values()) <= 30 * GB
        assert sum(stack._in_ram.values()) * OURS.ram_ratio <= 20 * GB + 1
    assert stack.prefetched_bytes > 0
