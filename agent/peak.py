"""How much memory one request took beside the weights, measured inside a worker.

Covers: which requests are measured, and the measuring. Does not cover: what follows from it
(``agent/footprints.py``, ``packer/footprint.py``).

On a GPU the allocator counts by itself; of several the most that any of them needed counts, for each. On a
cpu device it is the process's greatest resident memory during the request (the kernel's high-water mark,
which ``/proc/self/clear_refs`` sets back) less what is resident after the freed heap was given back: then
weights that were touched for the first time, and whatever stays for good, are in both. Another model that
comes or goes meanwhile would be counted too, so such a request is not used. The cpu devices of a gang have
one memory, so that all of what was measured is held on each of them: more than enough.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packer.types import KIB, ModelRef

log = logging.getLogger("bunk.worker")

# Measuring costs a few milliseconds (giving back the heap), so most requests go unmeasured: the first ones of
# a model, those with a larger input than any before, and now and then another.
FIRST_MEASURED = 8
LARGER_PARTS = 8  # larger by an eighth
MEASURED_EVERY = 256
# Models that are remembered; a worker has at most these many in use, and a forgotten one is measured again.
MODELS_MAX = 64

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = "5"


@dataclass(slots=True)
class _Seen:
    requests: int = 0
    input_bytes: int = 0


class PeakMeter:
    """For the one thread that computes. ``moves_seen`` counts orders begun and ended: it must not change
    during a measured request, and none may be under way."""

    def __init__(
        self,
        on_cuda: bool,
        moves_seen: Callable[[], tuple[int, int]],
        trim: Callable[[], None],
        devices: int = 1,
    ):
        self._on_cuda = on_cuda
        self._devices = range(devices)
        self._moves_seen = moves_seen
        self._trim = trim
        self._seen: dict[ModelRef, _Seen] = {}
        self._able = on_cuda or _can_clear()
        self._before: tuple[int, int] | None = None
        self._of: ModelRef | None = None
        self._told = False  # once is enough: it may fail at each request

    def begin(self, ref: ModelRef, input_bytes: int) -> None:
        """Before a pass, or the passes of a text; decides whether they are measured. Ends what was measured
        of another model, whose figure would have this one's memory in it."""
        self._before, self._of = None, ref
        seen = self._seen.pop(ref, None) or _Seen()
        self._seen[ref] = seen
        if len(self._seen) > MODELS_MAX:
            del self._seen[next(iter(self._seen))]
        seen.requests += 1
        larger = input_bytes > seen.input_bytes + seen.input_bytes // LARGER_PARTS
        if not self._able or not (
            larger or seen.requests <= FIRST_MEASURED or seen.requests % MEASURED_EVERY == 0
        ):
            return
        moves = self._moves_seen()
        if moves[0] != moves[1]:
            seen.requests -= 1  # the next one instead
            return
        seen.input_bytes = max(seen.input_bytes, input_bytes)
        if self._on_cuda:
            import torch

            for device in self._devices:
                torch.cuda.reset_peak_memory_stats(device)
        elif not self._read(lambda: _CLEAR.write_text(_CLEAR_PEAK)):
            return
        self._before = moves

    def end(self, ref: ModelRef) -> int:
        """Afterwards: the bytes that were taken beside the weights; 0 when they were not measured."""
        before, self._before = self._before, None
        if before is None or ref != self._of:
            return 0
        if self._on_cuda:
            import torch

            peak_bytes = max(
                torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
                for device in self._devices
            )
        else:
            peak_bytes = self._read(lambda: _status_bytes("VmHWM"))
            self._trim()
            resident_bytes = self._read(lambda: _status_bytes("VmRSS"))
            if not peak_bytes or not resident_bytes:
                return 0
            peak_bytes -= resident_bytes
        return max(peak_bytes, 1) if self._moves_seen() == before else 0

    def _read(self, figure: Callable[[], int]) -> int:
        """0: the kernel does not say, for want of a descriptor perhaps. The request goes unmeasured then; it
        has nothing to do with what computing is for."""
        try:
            return figure()
        except (OSError, ValueError) as error:
            if not self._told:
                log.warning("what requests take beside the weights can not be measured: %s", error)
            self._told = True
            return 0


def _can_clear() -> bool:
    """Not every kernel lets a process set its high-water mark back."""
    try:
        _CLEAR.write_text(_CLEAR_PEAK)
        return _status_bytes("VmHWM") > 0
    except OSError:
        return False


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * KIB
    return 0
