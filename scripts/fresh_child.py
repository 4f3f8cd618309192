"""Runs each measured load in a fresh process that has already imported everything.

Covers: a server that imports once and forks a child per job, the clock of the measured part, the memory of
the child seen from outside, and the comparison of every loaded tensor with the bytes it should have. Does
not cover: what is loaded, or by what (``peer_loaders``, ``restore_jobs``), or which venv the server runs in.

A load in a process that has loaded before finds memory faulted in, threads started and caches filled. A
fresh child finds none of that, and imports do not count: the same start for everybody. Standard library
only, because it also runs in the peers' virtualenv.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Importing torch from a cold disk takes half a minute; a load of some GB at 100 MB/s a few more.
READY_TIMEOUT_S = 180.0
JOB_TIMEOUT_S = 180.0
# A restore of 2 GB takes some 300 ms: this is often enough to see its peak, and costs no core.
SAMPLE_INTERVAL_MS = 2
COMPARE_THREADS = 2
_MADV_POPULATE_WRITE = 23
ERROR_CHARS_MAX = 4000

Settings = Mapping[str, Any]
_STARTED, _ENDED, _GO = b"s", b"e", b"g"
_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class LoadFailed(RuntimeError):
    """A job raised, or its process ended without a word. The text is what it said."""


class WrongBytes(RuntimeError):
    """What was loaded is not what is in the file."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Peaks of a child during the measured part, above what it had before. ``anonymous`` is its own
    memory, the image included; ``shared`` are pages of files and of shared memory that it looked at."""

    anonymous_bytes: int
    shared_bytes: int
    samples: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One load: the time and the processor time of the measured part, and what the job tells."""

    taken_ms: float
    cpu_ms: float
    facts: Mapping[str, Any]
    memory: Memory | None


class Stopwatch:
    """Marks the measured part of a job; the process outside takes its memory meanwhile, when asked to."""

    def __init__(self, pipe: int = -1, go: int = -1) -> None:
        self._pipe, self._go = pipe, go
        self.taken_ms = self.cpu_ms = 0.0
        self._started_s = self._cpu_s = 0.0

    def __enter__(self) -> Stopwatch:
        self._tell(_STARTED)
        self._cpu_s, self._started_s = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.taken_ms = (time.perf_counter() - self._started_s) * 1000
        self.cpu_ms = (time.process_time() - self._cpu_s) * 1000
        self._tell(_ENDED)

    def _tell(self, mark: bytes) -> None:
        if self._pipe >= 0:
            os.write(self._pipe, mark)
            os.read(self._go, 1)


Job = Callable[[Settings, Stopwatch], Mapping[str, Any]]


# --- inside: the server and its children -----------------------------------------------------------


def serve(jobs: Mapping[str, Job]) -> None:
    """Answer one JSON line per job until standard input ends. Call it after every import."""
    # Not standard output: libraries print there as they like.
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_fork(jobs, json.loads(line))), file=answers, flush=True)


def own_memory(nbytes: int) -> None:
    """Touch and free so many bytes, so that the next process finds pages that this machine has.

    A virtual machine may hand free pages back to its host within seconds; getting them again makes a first
    touch ten times as dear as it is on other machines, by chance of what ran before.
    """
    if nbytes:
        with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(_MADV_POPULATE_WRITE)


def _fork(jobs: Mapping[str, Job], order: Mapping[str, Any]) -> dict[str, Any]:
    own_memory(order.get("touch_bytes", 0))
    result_end, child_end = os.pipe()
    go_end, tell_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(result_end)
        os.close(tell_end)
        _child(jobs, order, child_end, go_end)
    os.close(child_end)
    os.close(go_end)
    watch = _Watch(pid)
    try:
        text = _follow(watch, result_end, tell_end)
    finally:
        os.close(result_end)
        os.close(tell_end)
        _, status = os.waitpid(pid, 0)
    if not text:
        code = os.waitstatus_to_exitcode(status)
        return {"error": f"the child ended without a result, status {code}"}
    answer: dict[str, Any] = json.loads(text)
    if order.get("watch"):
        answer["memory"] = [watch.anonymous, watch.shared, watch.samples]
    return answer


def _child(jobs: Mapping[str, Job], order: Mapping[str, Any], pipe: int, go: int) -> None:
    answer: dict[str, Any]
    try:
        os.environ.update(order.get("environment", {}))
        clock = Stopwatch(pipe, go) if order.get("watch") else Stopwatch()
        facts = jobs[order["job"]](order["settings"], clock)
        answer = {"taken_ms": clock.taken_ms, "cpu_ms": clock.cpu_ms, "facts": dict(facts)}
    except BaseException:
        answer = {"error": traceback.format_exc()[-ERROR_CHARS_MAX:]}
    with os.fdopen(pipe, "wb") as file:
        file.write(json.dumps(answer).encode())
    # Nothing is cleaned up: the kernel takes everything back faster than interpreters do.
    os._exit(0)


class _Watch:
    """The greatest memory of a child so far, above what it had at the start."""

    def __init__(self, pid: int) -> None:
        self._path = f"/proc/{pid}/status"
        self._before = (0, 0)
        self.anonymous = self.shared = self.samples = 0

    def start(self) -> None:
        self._before = self._look()

    def sample(self) -> None:
        anonymous, shared = self._look()
        self.anonymous = max(self.anonymous, anonymous - self._before[0])
        self.shared = max(self.shared, shared - self._before[1])
        self.samples += 1

    def _look(self) -> tuple[int, int]:
        with open(self._path, encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file if line.startswith("Rss"))
        kib = {name: int(text.split()[0]) for name, text in lines.items()}
        return 1024 * kib["RssAnon"], 1024 * (kib["RssFile"] + kib["RssShmem"])


def _follow(watch: _Watch, result_end: int, tell_end: int) -> bytes:
    """Wait for the child's result, and look at it while it says that it is measured."""
    poll = select.poll()
    poll.register(result_end, select.POLLIN | select.POLLHUP)
    measured = False
    text = bytearray()
    while True:
        if not poll.poll(SAMPLE_INTERVAL_MS if measured else None):
            watch.sample()
            continue
        piece = os.read(result_end, 65536)
        if not piece:
            return bytes(text)
        if not text and piece in (_STARTED, _ENDED):
            measured = piece == _STARTED
            watch.start() if measured else watch.sample()
            os.write(tell_end, _GO)
            continue
        text += piece


def read_every_byte(spans: Iterable[tuple[int, int]]) -> None:
    """Read (address, bytes) once through, as the first use of weights does: memory that was mapped and not
    copied is paid for here, if it was not before. Comparing with itself reads and writes nothing."""
    piece = 4 * 1024 * 1024
    pieces = [(at + skip, min(piece, size - skip)) for at, size in spans for skip in range(0, size, piece)]

    def read(mine: list[tuple[int, int]]) -> None:
        for address, nbytes in mine:
            if _libc.memcmp(address, address, nbytes):
                raise WrongBytes("memory changed while it was read")

    threads = [
        threading.Thread(target=read, args=(pieces[at::COMPARE_THREADS],)) for at in range(COMPARE_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- inside: are they the right bytes? -------------------------------------------------------------


class Reference:
    """The bytes that a model's tensors must have: a safetensors file held in memory."""

    def __init__(self, fd: int) -> None:
        # Private and writable only because ctypes tells no address of what is read-only.
        self._map = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        length = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + length])
        header.pop("__metadata__", None)
        base = 8 + length
        self._spans = {
            name: (base + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def check(self, tensors: Iterable[tuple[str, int, int]], whole: bool = True) -> int:
        """Compare (name, address, bytes) with the file; returns how many bytes were compared.
        ``whole``: every tensor of the file must be there. Raises ``WrongBytes``."""
        loaded = list(tensors)
        names = {name for name, _, _ in loaded}
        if len(names) != len(loaded) or not names <= self._spans.keys():
            raise WrongBytes(f"{len(loaded)} tensors with names that are not those of the file")
        if whole and names != self._spans.keys():
            raise WrongBytes(f"{len(self._spans) - len(names)} tensors are missing")
        wrong: list[str] = []
        threads = [
            threading.Thread(target=self._compare, args=(loaded[at::COMPARE_THREADS], wrong))
            for at in range(COMPARE_THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise WrongBytes(f"{len(wrong)} tensors differ from the file, one is {wrong[0]}")
        return sum(nbytes for _, _, nbytes in loaded)

    def check_file(self, address: int) -> int:
        """Compare the whole file, as it lies at ``address``. Raises ``WrongBytes``."""
        nbytes = len(self._map)
        if _libc.memcmp(address, self._address, nbytes):
            raise WrongBytes("the file's bytes differ")
        return nbytes

    def _compare(self, tensors: list[tuple[str, int, int]], wrong: list[str]) -> None:
        for name, address, nbytes in tensors:
            start, expected = self._spans[name]
            if nbytes != expected or (nbytes and _libc.memcmp(address, self._address + start, nbytes)):
                wrong.append(name)


# --- outside ---------------------------------------------------------------------------------------


class FreshChildren:
    """The bench's side: a server process in some virtualenv, and jobs in fresh children of it."""

    def __init__(
        self, python: Path, script: Path, fds: Iterable[int], environment: Mapping[str, str]
    ) -> None:
        """``fds`` stay the caller's; jobs know them by the same numbers."""
        # Appended to by all, so that reading it moves nobody's place.
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed by close()
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading, "rb")
        try:
            self._process = subprocess.Popen(
                [str(python), str(script), str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(*fds, writing),
                env={**os.environ, **environment},
            )
        finally:
            os.close(writing)
        try:
            self._answer(READY_TIMEOUT_S)
        except LoadFailed:
            self.close()
            raise

    def run(
        self,
        job: str,
        settings: Settings,
        environment: Settings | None = None,
        watch: bool = False,
        touch_bytes: int = 0,
    ) -> Outcome:
        """Run one job in a fresh child. ``touch_bytes``: see ``own_memory``. Raises ``LoadFailed``."""
        assert self._process.stdin is not None
        order = {
            "job": job,
            "settings": settings,
            "environment": environment or {},
            "watch": watch,
            "touch_bytes": touch_bytes,
        }
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(JOB_TIMEOUT_S)
        if "error" in answer:
            raise LoadFailed(f"{job} {dict(settings)}: {answer['error']}")
        memory = Memory(*answer["memory"]) if watch else None
        return Outcome(answer["taken_ms"], answer["cpu_ms"], answer["facts"], memory)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        ready, _, _ = select.select([self._answers], [], [], timeout_s)
        line = self._answers.readline() if ready else b""
        if not line:
            self._process.kill()
            self._process.wait()
            why = "ended" if ready else f"did not answer in {timeout_s:.0f} s"
            raise LoadFailed(f"{self._process.args!r} {why}\n{self.log()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def log(self) -> str:
        """The end of what the server and its children printed."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - ERROR_CHARS_MAX))
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """End the server; its children are gone already."""
        assert self._process.stdin is not None
        with self._log, self._answers:
            self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> FreshChildren:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
