"""What measuring consists of: a piece of work with its bytes, and taking turns at timing many of them.

Covers: probes, their threads, and the statistics of their rounds. Does not cover: what is measured
(``agent/calibrate.py``, ``agent/codec_probes.py``).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from packer.layout import CHUNK_BYTES

# Work is dealt out in the pieces that a restore moves.
PIECE_BYTES = CHUNK_BYTES

Work: TypeAlias = Callable[[int], None]


class CanNotMeasure(Exception):
    """The box does not let itself be measured; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate: ``work(0)`` … ``work(threads - 1)`` together move ``nbytes``. ``before`` runs untimed.

    ``fresh``: it takes new pages from the kernel. Those that the machine has never used are far slower
    once, in a virtual machine above all, and then as fast as the fastest round: that one counts.
    """

    name: str
    nbytes: int
    work: Work
    threads: int = 1
    before: Callable[[], None] | None = None
    fresh: bool = False


def measure_probes(probes: Sequence[Probe], passes: int) -> dict[str, int]:
    """Bytes per second of each. All of them take turns, pass after pass, so that a burst of other work
    falls on one round of many probes and not on all rounds of one; the median forgets it.

    The first pass warms caches and buffers and does not count.
    """
    taken_s: dict[str, list[float]] = {probe.name: [] for probe in probes}
    for number in range(passes + 1):
        for probe in probes:
            if probe.before is not None:
                probe.before()
            seconds = _together(probe.work, probe.threads)
            if number:
                taken_s[probe.name].append(seconds)
    found = {}
    for probe in probes:
        rounds_s = taken_s[probe.name]
        seconds = min(rounds_s) if probe.fresh else statistics.median(rounds_s)
        found[probe.name] = max(1, round(probe.nbytes / max(seconds, 1e-9)))
    return found


def _together(work: Work, threads: int) -> float:
    """Seconds from the common start to the last one's end; the first error is raised here."""
    if threads == 1:
        started = time.perf_counter()
        work(0)
        return time.perf_counter() - started
    gate = threading.Barrier(threads + 1)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        gate.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in running:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return seconds


def pieces(nbytes: int, number: int, threads: int) -> Iterator[tuple[int, int]]:
    """This thread's pieces: (offset, length), dealt out one after another."""
    for start in range(number * PIECE_BYTES, nbytes, threads * PIECE_BYTES):
        yield start, min(PIECE_BYTES, nbytes - start)
