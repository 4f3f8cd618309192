"""The agent's side of its nursery: asyncio, no torch.

Covers: starting the nursery in an environment without secrets, having it fork workers, and noticing its
death. Does not cover: a worker once it lives (``workers``), or what happens on the other side (``nursery``).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress

from agent.child import kept_environment
from agent.devices import DeviceConfig
from agent.frames import BadFrame, Exited, Ready, Receiver, Spawn, Spawned, close_fds, nursery_replies_decoder
from agent.sending import send
from agent.standbys import Standbys
from agent.workers import WorkerDead, WorkerHandle
from packer.types import GIB

log = logging.getLogger("bunk.workers")

# Importing torch from a cold disk takes half a minute; past this something is wrong with the machine.
NURSERY_READY_TIMEOUT_S = 180.0
# A fork takes milliseconds; a machine that is swapping may need seconds.
SPAWN_TIMEOUT_S = 30.0
# The nursery leaves at the end of its socket, at once; one that does not is killed.
CLOSE_TIMEOUT_S = 5.0
# Private memory of a worker on a cpu device beside the device's budget, which its workspace is counted in:
# parked skeletons (16 of 100 MiB at most), the stacks of its threads and the scratch of restores.
HEAP_BYTES_MAX = 4 * GIB
# The operator may choose otherwise.
_ENVIRONMENT_DEFAULTS: Mapping[str, str] = {
    # Several workers share the cores. Threads that spin while they wait for their siblings steal the
    # time that those need: measured 30 times slower for a short input on two busy cores.
    "OMP_WAIT_POLICY": "passive",
}
_ENVIRONMENT_SET: Mapping[str, str] = {
    # Nothing may ever be fetched because a model directory names it.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # No threads before the fork.
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Asking whether there is a GPU must not start CUDA in the nursery.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # One more arena of the C allocator per thread would keep freed workspace in the process.
    "MALLOC_ARENA_MAX": "2",
    "PYTHONUNBUFFERED": "1",
}


def _environment() -> dict[str, str]:
    return {**_ENVIRONMENT_DEFAULTS, **kept_environment(), **_ENVIRONMENT_SET}


def _heap_bytes(device: DeviceConfig) -> int:
    """How much private memory a worker may take. On a GPU the driver maps what no limit foresees."""
    return device.budget_bytes + HEAP_BYTES_MAX if device.kind == "cpu" else 0


class Nursery:
    """The process that forks workers. ``threads``: compute threads of each worker (0: all cores).

    ``standbys``: workers kept ready per device that was once asked for, for whichever tenant comes next:
    forked, with the device's libraries loaded and its context made.
    """

    def __init__(self, threads: int = 0, standbys: int = 0) -> None:
        self._threads = threads or len(os.sched_getaffinity(0))
        self.died = asyncio.Event()
        self.pid = 0
        self._process: asyncio.subprocess.Process | None = None
        self._sock: socket.socket | None = None
        self._receiver: Receiver | None = None
        self._lock = asyncio.Lock()
        self._ready = asyncio.Event()
        self._ids = itertools.count(1)
        self._spawning: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._standbys: Standbys[WorkerHandle] = Standbys(lambda device: self.fork("", device), standbys)

    async def start(self) -> None:
        """Returns when workers can be forked. Raises ``WorkerDead`` when the process does not come up."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._sock, self._receiver = ours, Receiver(ours)
        try:
            # -P: a file in the current directory must not be taken for a module.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "agent.nursery",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        asyncio.get_running_loop().add_reader(ours, self._on_reply)
        self._watching = asyncio.create_task(self._watch(self._process))
        try:
            async with asyncio.timeout(NURSERY_READY_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            await self.close()
            raise WorkerDead(f"the nursery was not ready after {NURSERY_READY_TIMEOUT_S:g} s") from None
        if self.died.is_set():
            raise WorkerDead("the nursery ended while it started; its messages are in the agent's log")

    def keep_standbys(self, device: DeviceConfig) -> None:
        """See to it that the workers kept ready for a device are there, soon, and stay."""
        self._standbys.keep(device)

    async def refilled(self, device: str) -> None:
        """Returns when the standbys of a device are there, or could not be forked."""
        await self._standbys.refilled(device)

    def standby_pids(self, device: str) -> list[int]:
        return self._standbys.pids(device)

    async def spawn(self, tenant: str, device: DeviceConfig) -> WorkerHandle:
        """A worker for a tenant on a device: the standby, or a fork of its own. Raises ``WorkerDead``."""
        while (worker := self._standbys.take(device.device)) is not None:
            try:
                await worker.bind(tenant)
            except WorkerDead:
                continue
            self._standbys.taken(device.device)
            break
        else:
            worker = await self.fork(tenant, device)
        self.keep_standbys(device)
        return worker

    async def fork(self, tenant: str, device: DeviceConfig) -> WorkerHandle:
        """A new process, whatever is kept ready. Raises ``WorkerDead``."""
        if self._sock is None or self.died.is_set():
            raise WorkerDead("there is no nursery")
        orders, their_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        data, their_data = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        orders.setblocking(False)
        data.setblocking(False)
        number = next(self._ids)
        spawned: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self._spawning[number] = spawned
        handle = WorkerHandle(tenant, device, orders, data)
        try:
            order = Spawn(
                number, tenant, device.device, device.kind, device.uuid, self._threads, _heap_bytes(device)
            )
            await send(self._sock, order, [their_orders.fileno(), their_data.fileno()], self._lock)
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                pid, pidfd = await spawned
        except (OSError, TimeoutError, WorkerDead) as error:
            orders.close()
            data.close()
            raise WorkerDead(f"no worker for {tenant or 'nobody yet'} on {device.device}: {error}") from None
        finally:
            del self._spawning[number]
            their_orders.close()
            their_data.close()
        await handle.start(pid, pidfd)
        return handle

    def _on_reply(self) -> None:
        assert self._receiver is not None
        try:
            while (received := self._receiver.receive(nursery_replies_decoder)) is not None:
                reply, fds = received
                self._take(reply, fds)
        except BlockingIOError:
            return
        except (BadFrame, OSError) as error:
            log.error("nursery: %s", error)
        self._let_go()

    def _take(self, reply: object, fds: list[int]) -> None:
        if isinstance(reply, Ready):
            self._ready.set()
        elif isinstance(reply, Exited):
            how = f"killed by signal {-reply.status}" if reply.status < 0 else f"exit status {reply.status}"
            log.log(logging.WARNING if reply.status else logging.INFO, "worker %d ended: %s", reply.pid, how)
        else:
            assert hasattr(reply, "id")
            spawned = self._spawning.get(reply.id)
            if isinstance(reply, Spawned) and len(fds) == 1 and spawned is not None and not spawned.done():
                spawned.set_result((reply.pid, fds.pop()))
            elif spawned is not None and not spawned.done():
                spawned.set_exception(WorkerDead(getattr(reply, "message", "the nursery sent no process")))
        close_fds(fds)

    def _let_go(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock = None

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._let_go()
        self.died.set()
        self._standbys.stop()
        self._ready.set()
        for spawned in self._spawning.values():
            if not spawned.done():
                spawned.set_exception(WorkerDead("the nursery is gone"))

    async def close(self) -> None:
        """End the nursery, and every worker that is left with it."""
        await self._standbys.close()
        self._let_go()
        if self._process is None or self._watching is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.died.wait()
        if not self.died.is_set():
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._watching
