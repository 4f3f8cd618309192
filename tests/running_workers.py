"""What tests of workers share: models, real workers, their memory, and waiting for what is not our child.

Covers: values, real processes and what they are asked. Does not cover: any test.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from process_memory import WorkerMemory, read_worker
from tiny_models import describe, opened

from agent.config import AgentConfig
from agent.devices import DeviceConfig
from agent.facade import JSON, EngineFrame, EngineRequest
from agent.spawning import Nursery
from agent.workers import PackFiles, WorkerHandle
from packer.sources import ASK
from packer.types import GIB, MIB, ModelRef, ModelSpec, Task

DEVICE = DeviceConfig("cpu:0", "cpu", "cpu", GIB)
# Long enough for a loaded machine; every wait ends as soon as the event is there.
PATIENCE_S = 60
TEXT = "Hello, what is the weather on the range today?"
KEY = bytes(range(32))


def config_in(folder: Path) -> AgentConfig:
    """A node by itself, without control, with its state in ``folder`` and little of everything."""
    return AgentConfig(
        data_dir=folder,
        control_url=None,
        join_token_file=None,
        control_store=None,
        name="box",
        listen_host="127.0.0.1",
        listen_port=0,
        advertise_url=None,
        devices=(DEVICE,),
        host_budget_bytes=MIB,
        disk_budget_bytes=MIB,
        request_timeout_ms=1000,
        threads=1,
        ready_file=None,
        log_level="info",
    )


async def until_gone(pid: int) -> None:
    """Wait until a process that may not be our child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert await asyncio.to_thread(poll.poll, PATIENCE_S * 1000), f"process {pid} is still there"
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Known:
    """A model directory and its version."""

    directory: Path
    spec: ModelSpec

    @property
    def ref(self) -> ModelRef:
        return self.spec.ref


def known(directory: Path, name: str, task: Task, tenant: str = "acme") -> Known:
    return Known(directory, describe(directory, ModelRef(tenant, name, "0" * 16), task))


@asynccontextmanager
async def spawned(nursery: Nursery, tenant: str = "acme") -> AsyncIterator[WorkerHandle]:
    worker = await nursery.spawn(tenant, DEVICE)
    try:
        await worker.ping()  # answered once it is all that it will be, its name included
        yield worker
    finally:
        await worker.close()


async def load(worker: WorkerHandle, model: Known) -> int:
    with opened(model.directory, model.spec) as fds:
        return (await worker.load_origin(model.spec, fds)).restore_ms


async def ask(worker: WorkerHandle, model: Known, op: str, **fields: JSON) -> list[EngineFrame]:
    return [frame async for frame in worker.run(model.ref, EngineRequest(op, fields))]


async def embed(worker: WorkerHandle, model: Known, text: str = TEXT) -> bytes:
    (frame,) = await ask(worker, model, "embed", inputs=[text])
    return frame.body


async def tell(worker: WorkerHandle, model: Known, **fields: JSON) -> str:
    frames = await ask(worker, model, "generate", **{"prompt": "Hello", "temperature": 0, **fields})
    return "".join(str(frame.header.get("delta", "")) for frame in frames)


def memory_of(worker: WorkerHandle) -> WorkerMemory:
    memory = read_worker(worker.pid)
    assert memory is not None
    return memory


def arena_bytes(worker: WorkerHandle) -> int:
    """What the kernel says of the memory that images lie in."""
    memory = memory_of(worker)
    assert memory.device == "cpu:0"
    return memory.arena_bytes


def private_bytes(worker: WorkerHandle) -> int:
    """Memory of the process's own that is not an image."""
    return memory_of(worker).private_bytes


def memory_file(data: bytes = b"", size: int = 0) -> int:
    descriptor = os.memfd_create("bunk-host", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    os.ftruncate(descriptor, max(size, len(data)))
    return descriptor


def pack_files(pack: int, limit_bytes: int = GIB, part: int = -1, resume: bool = False) -> PackFiles:
    return PackFiles(pack, part, KEY, limit_bytes, resume=resume)


@contextmanager
def fed(
    model: Known, limits: Mapping[str, int] | None = None, asked: list[int] | None = None
) -> Iterator[dict[str, int]]:
    """Feeds of every file that answer as ``packer/sources.py`` says; a limited one breaks off there.
    ``asked``: takes the bytes that were asked for."""
    with ExitStack() as stack:
        fds: dict[str, int] = {}
        for file in model.spec.files:
            theirs, ours = socket.socketpair()
            stack.callback(theirs.close)
            fds[file.path] = theirs.fileno()
            data = (model.directory / file.path).read_bytes()[: (limits or {}).get(file.path)]

            def feed(data: bytes = data, ours: socket.socket = ours) -> None:
                with ours, suppress(OSError):
                    while len(ask := ours.recv(ASK.size, socket.MSG_WAITALL)) == ASK.size:
                        offset, nbytes = ASK.unpack(ask)
                        (asked if asked is not None else []).append(nbytes)
                        ours.sendall(data[offset : offset + nbytes])
                        if offset + nbytes > len(data):
                            return

            feeder = threading.Thread(target=feed)
            feeder.start()
            stack.callback(feeder.join)
            stack.callback(theirs.shutdown, socket.SHUT_RDWR)
        yield fds


@asynccontextmanager
async def packed(worker: WorkerHandle, model: Known) -> AsyncIterator[int]:
    """A resident model's pack."""
    pack = memory_file()
    try:
        await load(worker, model)
        await worker.pack(model.ref, pack_files(pack))
        yield pack
    finally:
        os.close(pack)
