"""What the gateway is compared with: a worker that is asked over its own socket, and a bare HTTP handler.

Covers: starting and asking both. Does not cover: the stack (``stack``) or what is measured
(``bench_gateway``).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from restore_data import describe

from agent.devices import DeviceConfig
from agent.facade import JSON, EngineFrame, EngineRequest
from agent.spawning import Nursery
from agent.workers import WorkerHandle
from packer.types import GIB, ModelRef, ModelSpec, Task

DEVICE = DeviceConfig("cpu:0", "cpu", "cpu", GIB)
PEER_START_S = 30.0


@dataclass(frozen=True, slots=True)
class AskedWorker:
    """A worker of its own with some models, asked the way the agent asks."""

    worker: WorkerHandle
    specs: Mapping[str, ModelSpec]

    async def ask(self, name: str, op: str, **fields: JSON) -> list[EngineFrame]:
        request = EngineRequest(op, fields)
        return [frame async for frame in self.worker.run(self.specs[name].ref, request)]


@asynccontextmanager
async def asked_worker(
    directories: Mapping[str, Path], tasks: Mapping[str, Task]
) -> AsyncIterator[AskedWorker]:
    specs = {
        name: describe(directory, ModelRef("bench", name, "0" * 16), tasks[name])
        for name, directory in directories.items()
    }
    nursery = Nursery(threads=1)
    await nursery.start()
    try:
        worker = await nursery.spawn("bench", DEVICE)
        for name, spec in specs.items():
            fds = {file.path: os.open(directories[name] / file.path, os.O_RDONLY) for file in spec.files}
            try:
                await worker.load_origin(spec, fds)
            finally:
                for fd in fds.values():
                    os.close(fd)
        yield AskedWorker(worker, specs)
        await worker.close()
    finally:
        await nursery.close()


# --- a bare handler ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BareHandler:
    url: str
    pid: int


@contextmanager
def bare_handler(answer_bytes: int) -> Iterator[BareHandler]:
    """aiohttp with one handler that parses a JSON body and answers with as many bytes of JSON."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(answer_bytes)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield BareHandler(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait(PEER_START_S)


async def _serve(answer_bytes: int) -> None:
    answer = json.dumps({"data": "x" * max(answer_bytes - 12, 0)}).encode()

    async def handle(request: web.Request) -> web.Response:
        json.loads(await request.read())
        return web.Response(body=answer, content_type="application/json")

    app = web.Application()
    app.add_routes([web.post("/v1/embeddings", handle)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    # Whoever started this closes the pipe when it goes, however it goes.
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
