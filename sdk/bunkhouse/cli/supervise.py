"""Child processes of ``bunk up``: start, watch, stop, and the lock on the data directory.

Covers: everything about processes and signals. Does not cover: what is started and in which order
(``up``). Linux only, like the agent. Signals are taken with ``sigtimedwait`` instead of handlers, so
that there is one place where this process waits and nothing runs in between.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bunkhouse._request import KEY_ENV

# A child that was told to stop gets this long to finish its answers (5 s), an agent also the packs of models
# that it has just loaded (20 s), and to close its workers and files. Who is in a hurry asks twice.
STOP_WAIT_S = 40.0
# How often a file is looked for while a child starts; a signal or a death is noticed at once.
LOOK_S = 0.05
# A log above this is set aside at start; the one before that is overwritten.
LOG_BYTES_MAX = 16 * 1024 * 1024
# What of a log is shown when a child dies.
TAIL_LINES = 20
TAIL_BYTES = 16 * 1024
_PR_SET_PDEATHSIG = 1

# For these the stack stops. One that the parent process set to be ignored (nohup) stays ignored.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class UpFailed(Exception):
    """The stack cannot start or go on; the text says why, with the end of a log where there is one."""


class StopAsked(Exception):
    """A signal asked the stack to stop."""


class DataDirLock:
    """Held as long as any process of a stack lives: the children inherit its descriptor."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(self._fd, 4096, 0))
            os.close(self._fd)
            raise UpFailed(
                f"{path.parent} is in use by another `bunk up` ({holder}): stop that one, "
                "or choose another --data-dir"
            ) from None
        self.note({"up": os.getpid()})

    @property
    def fd(self) -> int:
        return self._fd

    def note(self, pids: dict[str, int]) -> None:
        """Leave the process ids for the message of whoever finds the lock held."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(pids).encode(), 0)

    def close(self) -> None:
        os.close(self._fd)


def _holder(data: bytes) -> str:
    with suppress(ValueError, AttributeError):
        return ", ".join(f"{name} has process id {int(pid)}" for name, pid in json.loads(data).items())
    return "process ids unknown"


def find_executable(name: str) -> str:
    """``name`` beside this Python, else on PATH: an installed pair is never mixed with another one."""
    beside = Path(sys.executable).parent / name
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise UpFailed(f"{name} is neither beside {sys.executable} nor on PATH: install the server")
    return found


@dataclass(slots=True)
class Child:
    """A started process in its own group, writing to a log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def exited(self) -> bool:
        """Whether it has ended. Does not reap it, so that its group's number stays taken."""
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def reap(self) -> int:
        """End what is left of its group, then collect its status. Only after ``exited``."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        return self.process.returncode

    def death(self) -> str:
        """How it ended, and the end of its log."""
        code = self.reap()
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with status {code}"
        tail = self.tail()
        said = f"; the end of {self.log}:\n{tail}" if tail else f" and wrote nothing to {self.log}"
        # Nothing that was acknowledged is lost when a process is killed.
        again = "\nstart `bunk up` again: it goes on with what it had" if code < 0 else ""
        return f"{self.name} {how}{said}{again}"

    def tail(self) -> str:
        """The last lines that this process wrote."""
        try:
            with open(self.log, "rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self.log_start, end - TAIL_BYTES))
                text = file.read(TAIL_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(f"  {line}" for line in text.splitlines()[-TAIL_LINES:])


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


@dataclass(slots=True)
class Supervisor:
    """Starts children, waits for them and for signals, and stops them in reverse order."""

    logs: Path
    lock: DataDirLock
    children: list[Child] = field(default_factory=list)
    _stop_signals: frozenset[signal.Signals] = frozenset()
    _mask: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # A script's `bunk up &` starts with SIGINT ignored; asking it to stop must work all the same.
        # An ignored SIGHUP is somebody's nohup and stays ignored.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._stop_signals = frozenset(
            each for each in _STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN
        )
        # Blocked signals wait until they are asked for; nothing interrupts a half-done step.
        self._mask = {int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, self._waited())}

    def _waited(self) -> set[signal.Signals]:
        return {*self._stop_signals, signal.SIGCHLD}

    def close(self) -> None:
        """Give the process its own signals back; those that came while it stopped are done with."""
        while self._stop_signals and signal.sigtimedwait(self._stop_signals, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start a child with its log in ``logs``."""
        log = self.logs / f"{name}.log"
        with suppress(FileNotFoundError):
            if log.stat().st_size > LOG_BYTES_MAX:
                os.replace(log, log.with_suffix(".log.1"))
        # Children serve many tenants; the caller's own key is none of their business.
        environment = {key: value for key, value in os.environ.items() if key != KEY_ENV}
        try:
            with open(log, "ab") as out:
                start = out.tell()
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    # A group of its own: Ctrl-C reaches only this process, which then stops them in order.
                    start_new_session=True,
                    pass_fds=(self.lock.fd,),
                    preexec_fn=_in_child(self._mask),
                )
        except OSError as error:
            raise UpFailed(f"cannot start {arguments[0]}: {error.strerror}") from None
        child = Child(name, process, log, start)
        self.children.append(child)
        self.lock.note({"up": os.getpid(), **{each.name: each.pid for each in self.children}})
        return child

    def wait(self, done: Callable[[], bool], limit_s: float, what: str) -> None:
        """Wait until ``done``. Raises ``UpFailed`` when a child dies or it takes too long, ``StopAsked``."""
        deadline_s = time.monotonic() + limit_s
        while not done():
            if time.monotonic() >= deadline_s:
                tails = "\n".join(f"the end of {each.log}:\n{each.tail()}" for each in self.children)
                raise UpFailed(f"{what} took more than {limit_s:.0f} s\n{tails}")
            self._look(LOOK_S)

    def watch(self) -> None:
        """Wait for ever. Raises ``UpFailed`` when a child dies, ``StopAsked`` on a signal."""
        while True:
            self._look(None)

    def _look(self, limit_s: float | None) -> None:
        for child in self.children:
            if child.exited():
                raise UpFailed(child.death())
        taken = self._next_signal(limit_s)
        if taken in self._stop_signals:
            raise StopAsked

    def _next_signal(self, limit_s: float | None) -> int | None:
        waited = self._waited()
        if limit_s is None:
            return signal.sigwaitinfo(waited).si_signo
        info = signal.sigtimedwait(waited, limit_s)
        return info.si_signo if info is not None else None

    def stop(self) -> list[str]:
        """Stop all children, last started first. Returns what did not go well.

        A second signal meanwhile means that the user does not want to wait.
        """
        complaints: list[str] = []
        hurry = False
        for child in reversed(self.children):
            if not child.exited():
                with suppress(ProcessLookupError):
                    child.process.terminate()
                hurry = self._wait_exit(child, hurry)
            if not child.exited():
                complaints.append(f"{child.name} did not stop in time and was killed")
                with suppress(ProcessLookupError):
                    child.process.kill()
                # The kernel ends it soon; its status is there when this returns.
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            child.reap()
        return complaints

    def _wait_exit(self, child: Child, hurry: bool) -> bool:
        deadline_s = time.monotonic() + STOP_WAIT_S
        while not hurry and not child.exited() and time.monotonic() < deadline_s:
            hurry = self._next_signal(LOOK_S) in self._stop_signals
        return hurry


def _in_child(mask: set[int]) -> Callable[[], None]:
    """What runs in a child between fork and exec: its own signals, and it ends when ``bunk up`` is killed."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
