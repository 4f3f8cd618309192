"""Watches the memory of an agent's workers from outside, through /proc, while something else runs.

Covers: finding the nursery and its workers below an agent's process id, reading how much of each worker
is weights (arenas, and host segments that images lie in) and how much is not, and keeping the greatest values
seen; also a process's processor time. Does not cover: what the agent's own ledger says, or memory on a GPU.

The kernel's own books are the point: they count what is there, not what somebody meant to hold.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
ARENA = "/dev/zero"  # the file behind an arena; shared anonymous memory has " (deleted)" behind it
SEGMENT = "/memfd:bunk-host (deleted)"  # a host segment, in which an image may lie; else it is only read
WORKER = "bunk@"  # a worker's name in /proc/PID/comm, before its device
NURSERY = b"agent.nursery"
# Reading smaps makes the kernel walk the page tables, so samples may take this share of one core at most.
SAMPLING_SHARE_MAX = 0.1
SAMPLE_INTERVAL_S_MIN = 0.05


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """One worker at one moment. ``device`` is "" when the process is not named after one."""

    pid: int
    device: str
    rss_bytes: int
    arena_bytes: int
    # Memory beside the arena that this process alone has written: a second copy of weights would be here.
    private_bytes: int


@dataclass(frozen=True, slots=True)
class Peaks:
    """The greatest values of all samples. ``nursery_bytes`` is what a worker has before any weights."""

    samples: int
    workers: int
    nursery_bytes: int
    arena_bytes: int
    arena_bytes_by_device: dict[str, int]
    worker_arena_bytes: int
    worker_private_bytes: int
    workers_rss_bytes: int
    # The greatest of (all workers' RSS less what as many bare copies of the nursery would have).
    above_baseline_bytes: int


def children(pid: int) -> list[int]:
    """The direct children of a process, [] if it is gone."""
    found: list[int] = []
    for task in _listed(PROC / str(pid) / "task"):
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            continue  # the thread ended between the listing and the read
    return found


def find_nurseries(agent_pid: int) -> list[int]:
    """Descendants of the agent that run the nursery's module and are not forks of one."""
    found: list[int] = []
    waiting = children(agent_pid)
    while waiting:
        pid = waiting.pop()
        if NURSERY in _command(pid):
            found.append(pid)
        else:
            waiting += children(pid)
    return found


def read_worker(pid: int) -> WorkerMemory | None:
    """One worker's memory, None if it is gone or still being born."""
    try:
        text = (PROC / str(pid) / "smaps").read_text(errors="replace")
        name = (PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return None
    return parse_smaps(pid, name, text)


def parse_smaps(pid: int, name: str, text: str) -> WorkerMemory | None:
    """Sum RSS over all mappings and over those of the arena, and what only this one wrote beside them."""
    rss = arena = private = 0
    device = name.removeprefix(WORKER) if name.startswith(WORKER) else ""
    in_arena = False
    for line in text.splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            # "7f00-7f10 rw-p 00000000 00:06 5   /dev/zero": permissions first, p for private.
            of_segment = rest.endswith(SEGMENT) and (rest[3:4] == "p" or rest[1:2] == "w")
            in_arena = of_segment or (rest[3:4] == "p" and rest.endswith(ARENA))
        elif head == "Rss:":
            size = int(rest.split()[0]) * 1024
            rss += size
            arena += size if in_arena else 0
        elif head == "Private_Dirty:" and not in_arena:
            private += int(rest.split()[0]) * 1024
    return WorkerMemory(pid, device, rss, arena, private) if rss else None


def read_rss(pid: int) -> int:
    """A process's resident bytes, 0 if it is gone."""
    try:
        text = (PROC / str(pid) / "status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS:")), 0)


def _command(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def _listed(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError:
        return []


@dataclass(slots=True)
class MemoryWatch:
    """Samples in a thread of its own from ``start`` until ``stop``, which returns the peaks."""

    agent_pid: int
    samples: int = 0
    nursery_bytes: int = 0
    arena_bytes: int = 0
    by_device: dict[str, int] = field(default_factory=dict)
    worker_arena_bytes: int = 0
    worker_private_bytes: int = 0
    workers_rss_bytes: int = 0
    above_baseline_bytes: int = 0
    seen: set[int] = field(default_factory=set)
    error: Exception | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> Peaks:
        """The peaks so far. Raises what a sample raised: a watch that did not watch proves nothing."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error
        return Peaks(
            samples=self.samples,
            workers=len(self.seen),
            nursery_bytes=self.nursery_bytes,
            arena_bytes=self.arena_bytes,
            arena_bytes_by_device=dict(sorted(self.by_device.items())),
            worker_arena_bytes=self.worker_arena_bytes,
            worker_private_bytes=self.worker_private_bytes,
            workers_rss_bytes=self.workers_rss_bytes,
            above_baseline_bytes=self.above_baseline_bytes,
        )

    def _run(self) -> None:
        try:
            took_s = 0.0
            while not self._stopped.wait(max(SAMPLE_INTERVAL_S_MIN, took_s / SAMPLING_SHARE_MAX)):
                started_s = time.monotonic()
                self.sample()
                took_s = time.monotonic() - started_s
        except Exception as error:  # kept for stop(), which raises it in the caller's thread
            self.error = error

    def sample(self) -> None:
        """Look once, and a second time if the first look would raise a peak.

        Workers are read one after another, so a model that leaves one worker and another that enters the
        next could both be counted though they never were there together. What both looks saw was there
        in the moment between them; what one worker held, it held whatever the others did.
        """
        nurseries = find_nurseries(self.agent_pid)
        self.samples += 1
        self.nursery_bytes = max([self.nursery_bytes, *(read_rss(pid) for pid in nurseries)])
        memories = _look(nurseries)
        self.seen |= memories.keys()
        for memory in memories.values():
            self._raise_peaks([memory], trial=False)
        if self._raise_peaks(list(memories.values()), trial=True):
            again = _look(nurseries)
            both = [_lesser(memories[pid], again[pid]) for pid in memories.keys() & again.keys()]
            self._raise_peaks(both, trial=False)

    def _raise_peaks(self, memories: list[WorkerMemory], trial: bool) -> bool:
        """True if these memories raise a peak; ``trial`` only asks."""
        if not memories:
            return False
        by_device: dict[str, int] = {}
        for memory in memories:
            by_device[memory.device] = by_device.get(memory.device, 0) + memory.arena_bytes
        rss = sum(memory.rss_bytes for memory in memories)
        new = {
            "arena_bytes": sum(by_device.values()),
            "workers_rss_bytes": rss,
            "above_baseline_bytes": rss - self.nursery_bytes * len(memories),
            "worker_arena_bytes": max(memory.arena_bytes for memory in memories),
            "worker_private_bytes": max(memory.private_bytes for memory in memories),
        }
        raised = {name: value for name, value in new.items() if value > getattr(self, name)}
        devices = {name: used for name, used in by_device.items() if used > self.by_device.get(name, -1)}
        if not trial:
            for name, value in raised.items():
                setattr(self, name, value)
            self.by_device |= devices
        return bool(raised or devices)


def _look(nurseries: list[int]) -> dict[int, WorkerMemory]:
    workers = (child for pid in nurseries for child in children(pid))
    return {pid: memory for pid in workers if (memory := read_worker(pid)) is not None}


def _lesser(one: WorkerMemory, other: WorkerMemory) -> WorkerMemory:
    return WorkerMemory(
        pid=one.pid,
        device=one.device or other.device,
        rss_bytes=min(one.rss_bytes, other.rss_bytes),
        arena_bytes=min(one.arena_bytes, other.arena_bytes),
        private_bytes=min(one.private_bytes, other.private_bytes),
    )


def processor_s(pid: int) -> float:
    """Processor time that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
