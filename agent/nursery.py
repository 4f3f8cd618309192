"""The nursery: a process that has imported everything and forks a worker in milliseconds.

Covers: getting warm without ever running a tensor operation, a thread or a CUDA context (so that fork
is safe), forking, what a worker inherits (nothing but its own two sockets), noticing deaths, and the
private memory directories of workers. Does not cover: what a worker does (``worker``) or who asks
(``workers``).

``python -m agent.nursery FD`` is started by the agent with one end of a SOCK_SEQPACKET pair. It lives
as long as that pair, and no worker outlives it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import logging
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from agent.frames import (
    BadFrame,
    Exited,
    MoreFds,
    NurseryReply,
    Ready,
    Receiver,
    Spawn,
    Spawned,
    SpawnFailed,
    close_fds,
    cut,
    nursery_orders_decoder,
    send_message,
)

log = logging.getLogger("bunk.nursery")

# One worker per tenant and device; past this something asks for workers in a loop.
WORKERS_MAX = 4096
# Memory-backed on every Linux with /dev/shm; else the usual temporary directory.
_MEMORY_DIRECTORY = Path("/dev/shm")
_PRIVATE_PREFIX = "bunkhouse-nursery-"
# The kernel keeps 15 characters: enough for every cpu device, and for the start of a GPU's id.
WORKER_NAME_PREFIX = "bunk@"
_STDIO = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_NO_NEW_PRIVS = 38
# The kernel's out-of-memory killer then takes a worker before the agent, which can get over it.
_OOM_SCORE = "500"


class Nursery:
    """Serves the agent's orders until its socket ends."""

    def __init__(self, sock: socket.socket, private: Path) -> None:
        self._sock = sock
        self._receiver = Receiver(sock)
        self._private = private
        self._pidfds: dict[int, int] = {}  # descriptor -> pid

    def serve(self) -> None:
        self._send(Ready())
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor != self._sock.fileno():
                    poll.unregister(descriptor)
                    self._reap(descriptor)
                    continue
                received = self._receiver.receive(nursery_orders_decoder)
                if received is None:
                    return
                order, fds = received
                assert not isinstance(order, MoreFds)
                pidfd = self._spawn(order, fds)
                if pidfd is not None:
                    poll.register(pidfd, select.POLLIN)

    def _send(self, reply: NurseryReply, fds: tuple[int, ...] = ()) -> None:
        send_message(self._sock, reply, fds)

    def _spawn(self, order: Spawn, fds: list[int]) -> int | None:
        try:
            if len(fds) != 2:
                raise BadFrame(f"a worker needs 2 sockets, not {len(fds)}")
            if len(self._pidfds) >= WORKERS_MAX:
                raise BadFrame(f"there are {WORKERS_MAX} workers already, the limit")
            pid = os.fork()
            if pid == 0:
                self._become_worker(order, fds)
            # Taken before anybody reaps the process, so the number can not mean another one.
            pidfd = os.pidfd_open(pid)
        except (OSError, BadFrame) as error:
            self._send(SpawnFailed(order.id, cut(str(error))))
            return None
        finally:
            close_fds(fds)
        self._pidfds[pidfd] = pid
        self._send(Spawned(order.id, pid), (pidfd,))
        return pidfd

    def _reap(self, pidfd: int) -> None:
        pid = self._pidfds.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        shutil.rmtree(self._private / str(pid), ignore_errors=True)
        self._send(Exited(pid, os.waitstatus_to_exitcode(status)))

    def _become_worker(self, order: Spawn, fds: list[int]) -> NoReturn:
        """In the child: let go of everything that is not this worker's, then serve."""
        status = 1
        try:
            self._sock.detach()
            orders, data = fds
            _close_all_but({0, 1, _STDIO, orders, data})
            _confine(order.heap_bytes)
            _name_after(order.device)
            private = self._private / str(os.getpid())
            private.mkdir(mode=0o700)
            from agent import worker

            worker.main(order, socket.socket(fileno=orders), socket.socket(fileno=data), private)
            status = 0
        except BaseException:
            log.exception("worker of %s on %s", order.tenant, order.device)
        finally:
            # Never unwind into the nursery's own frames.
            os._exit(status)


def _close_all_but(kept: set[int]) -> None:
    start = 0
    for descriptor in sorted(kept):
        # An empty range from 0 closes everything: CPython 3.11 passes -1 on as the greatest number.
        if descriptor > start:
            os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def _confine(heap_bytes: int) -> None:
    """What holds for every worker whatever it runs later. ``heap_bytes`` 0: no limit of its own."""
    import resource

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(0)  # the nursery died between the fork and the line above
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # A core file would hold a tenant's weights, prompts and keys.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if heap_bytes:
        # Private writable memory: the device's budget for weights and workspace, and what a worker needs
        # beside it. Without this a hostile configuration, tokenizer or chat template takes the machine's.
        limit = _data_bytes() + heap_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def _name_after(device: str) -> None:
    """Say in ``/proc/PID/comm`` whose weights this process holds: nothing else in /proc tells."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"{WORKER_NAME_PREFIX}{device}".encode(), 0, 0, 0)


def _data_bytes() -> int:
    """What this process already has of the memory that RLIMIT_DATA limits."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


# --- private memory directories --------------------------------------------------------------------


def make_private_directory() -> tuple[Path, int]:
    """A directory only for this nursery, and the lock that says it lives. Sweeps those of dead ones."""
    root = _MEMORY_DIRECTORY if os.access(_MEMORY_DIRECTORY, os.W_OK) else Path(tempfile.gettempdir())
    for path in root.glob(f"{_PRIVATE_PREFIX}*"):
        _sweep(path)
    directory = Path(tempfile.mkdtemp(prefix=_PRIVATE_PREFIX, dir=root))
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return directory, lock


def _sweep(path: Path) -> None:
    """Remove a directory that a killed nursery of this user left behind."""
    with suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


# --- start ------------------------------------------------------------------------------------------


def _get_warm() -> None:
    """Import all that a worker needs. Afterwards there is one thread and no CUDA context."""
    # What is imported stays: looking for garbage in it again and again takes a fifth of the start.
    gc.disable()
    import torch
    import transformers

    from agent import worker
    from agent.engines import export
    from agent.engines.transformers import warm_imports
    from packer import kernels

    assert worker.main is not None
    assert export.build is not None
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warm_imports()
    # Compiled once, so that no restore waits for it; workers are born with the machine code.
    compiled = kernels.warm()
    log.info("compiled kernels: %s", compiled.text)
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        # Fork copies only the calling thread; a lock that another one holds would stay locked for ever.
        log.warning("the nursery has %d threads; forking from it may hang a worker", threads)
    # Keeps the collector from touching, and so from copying, every page that workers share with us.
    gc.collect()
    gc.freeze()
    gc.enable()


def main() -> None:
    # The agent decides when its children stop: a Ctrl-C or a service manager's SIGTERM reaches the whole
    # group, and workers must still answer what the agent drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sock = socket.socket(fileno=int(sys.argv[1]))
    private, lock = make_private_directory()
    try:
        _get_warm()
        Nursery(sock, private).serve()
    except BrokenPipeError:
        pass  # the agent is gone
    finally:
        shutil.rmtree(private, ignore_errors=True)
        os.close(lock)


if __name__ == "__main__":
    main()
