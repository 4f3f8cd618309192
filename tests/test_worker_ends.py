"""Ends that nobody ordered: killed agents and nurseries, and sides that break the protocol.

Covers: that nothing outlives what it belongs to, that nothing stays behind, and the limits of messages
and frames. Does not cover: orders and requests (``test_worker``).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from running_workers import DEVICE, PATIENCE_S, until_gone

from agent.facade import EngineError, EngineRequest
from agent.frames import (
    FRAME_BODY_BYTES_MAX,
    STATED_MAX,
    BadFrame,
    Done,
    EvictModel,
    Fault,
    LoadOrigin,
    Measured,
    Receiver,
    RestorePack,
    Serving,
    Spawn,
    WireSpec,
    close_fds,
    decode_lengths,
    encode_frame,
    encode_message,
    orders_decoder,
    replies_decoder,
    send_message,
)
from agent.spawning import Nursery
from agent.worker import Worker
from agent.workers import PULSES_MISSED_MAX, Segment, WorkerDead, WorkerHandle
from packer.types import KIB, HostForm, ModelRef, ModelSpec, OriginFile, Task

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent

STAND_IN_AGENT = """
import asyncio
from agent.devices import DeviceConfig
from agent.spawning import Nursery
from packer.types import ModelRef

async def main():
    nursery = Nursery(threads=1)
    await nursery.start()
    workers = [await nursery.spawn(tenant, DeviceConfig("cpu:0", "cpu", "cpu", 1)) for tenant in ("a", "b")]
    for worker in workers:
        await worker.evict(ModelRef("a", "nothing", "0" * 16))  # answered once the worker is up
    print(nursery.pid, *(worker.pid for worker in workers), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("victim", ["agent", "nursery"])
async def test_nothing_outlives_a_killed_agent_or_nursery(victim: str) -> None:
    agent = subprocess.Popen(  # noqa: ASYNC220  # starts at once
        [sys.executable, "-c", STAND_IN_AGENT],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert agent.stdout is not None
        pids = [int(pid) for pid in (await asyncio.to_thread(agent.stdout.readline)).split()]
        assert len(pids) == 3
        private = {path for pid in pids[1:] for path in Path("/dev/shm").glob(f"bunkhouse-nursery-*/{pid}")}
        assert len(private) == 2
        os.kill(agent.pid if victim == "agent" else pids[0], signal.SIGKILL)
        for pid in pids:
            await until_gone(pid)
        if victim == "agent":
            assert not any(path.exists() for path in private)
    finally:
        agent.kill()
        agent.wait()
        assert agent.stdout is not None
        agent.stdout.close()


async def test_a_dead_nursery_is_reported_and_swept_by_the_next() -> None:
    first = Nursery(threads=1)
    await first.start()
    worker = await first.spawn("acme", DEVICE)
    await worker.evict(ModelRef("acme", "nothing", "0" * 16))  # answered once the worker is up
    (private,) = Path("/dev/shm").glob(f"bunkhouse-nursery-*/{worker.pid}")
    os.kill(first.pid, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        await first.died.wait()
    async with asyncio.timeout(PATIENCE_S):
        await worker.died.wait()
    with pytest.raises(WorkerDead):
        await first.spawn("acme", DEVICE)
    second = Nursery(threads=1)
    await second.start()
    try:
        assert not private.exists()
    finally:
        await worker.close()
        await first.close()
        await second.close()


# --- the protocol ---------------------------------------------------------------------------------


@asynccontextmanager
async def impostor() -> AsyncIterator[tuple[WorkerHandle, socket.socket, socket.socket]]:
    """A handle whose process is not a worker at all, and the other ends of its sockets."""
    process = subprocess.Popen(["sleep", "infinity"])  # noqa: ASYNC220  # starts at once
    orders, their_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    data, their_data = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    orders.setblocking(False)
    data.setblocking(False)
    handle = WorkerHandle("acme", DEVICE, orders, data)
    await handle.start(process.pid, os.pidfd_open(process.pid))
    try:
        yield handle, their_orders, their_data
    finally:
        handle.kill()
        await handle.close()
        process.wait()
        their_orders.close()
        their_data.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 8,
        (5).to_bytes(4, "little") + (0).to_bytes(4, "little") + b"junk!",
        (2).to_bytes(4, "little") + (FRAME_BODY_BYTES_MAX + 1).to_bytes(4, "little") + b"{}",
        encode_frame(Measured(1, f"globex/x@{'0' * 16}", 5))[0],
        encode_frame(Measured(1, "../x", 5))[0],
    ],
)
async def test_a_worker_that_sends_nonsense_frames_is_killed(garbage: bytes) -> None:
    async with impostor() as (handle, _, data):
        data.sendall(garbage)
        async with asyncio.timeout(PATIENCE_S):
            await handle.died.wait()


async def test_a_worker_that_answers_no_ping_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process keeps its sockets open, so only silence tells; whoever waits for it is told."""
    monkeypatch.setattr("agent.workers.PULSE_S", 0.01)
    async with impostor() as (handle, _, _):
        with pytest.raises(WorkerDead):
            async with asyncio.timeout(PATIENCE_S):
                await handle.evict(ModelRef("acme", "x", "0" * 16))
        assert handle.died.is_set()


async def test_a_worker_that_answers_pings_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """One missed ping is forgiven: the whole machine may have been paused."""
    monkeypatch.setattr("agent.workers.PULSE_S", 0.5)
    async with impostor() as (handle, orders, _):
        await asyncio.to_thread(orders.recv, 100)  # is left unanswered
        for _ in range(2 * PULSES_MISSED_MAX):
            ping = json.loads(await asyncio.to_thread(orders.recv, 100))
            assert ping["type"] == "Ping"
            for text, _ in encode_message(Done(ping["id"]), ()):
                orders.send(text)
        assert not handle.died.is_set()


async def test_a_worker_that_sends_nonsense_replies_is_killed() -> None:
    async with impostor() as (handle, orders, _):
        order = asyncio.create_task(handle.evict(ModelRef("acme", "x", "0" * 16)))
        await asyncio.to_thread(orders.recv, 100)
        orders.send(b"{}")
        with pytest.raises(WorkerDead):
            async with asyncio.timeout(PATIENCE_S):
                await order


@pytest.mark.parametrize("field", ["restore_ms", "restored_bytes", "disk_bytes", "deduplicated_bytes"])
@pytest.mark.parametrize("lie", ["-1", str(2**63), "1" + "0" * 400, "1e308"])
async def test_a_worker_that_states_impossible_figures_is_killed(field: str, lie: str) -> None:
    """Estimates count in floats and the journal in 64 bits: either would end the agent for all tenants."""
    async with impostor() as (handle, orders, _):
        order = asyncio.create_task(handle.evict(ModelRef("acme", "x", "0" * 16)))
        asked = json.loads(await asyncio.to_thread(orders.recv, 100))
        orders.send(f'{{"type": "Done", "id": {asked["id"]}, "{field}": {lie}}}'.encode())
        with pytest.raises(WorkerDead):
            async with asyncio.timeout(PATIENCE_S):
                await order


async def test_a_restore_took_no_longer_and_moved_no_more_than_it_can_have() -> None:
    ref = ModelRef("acme", "x", "0" * 16)
    spec = ModelSpec(ref, "", (), "e", Task.EMBEDDING, 4096, (4096,), 0, 0)
    served: list[int] = []
    async with impostor() as (handle, orders, _):
        segment = Segment(0, HostForm.RAW)
        order = asyncio.create_task(handle.restore(spec, segment, serving=served.append))
        received = await asyncio.to_thread(Receiver(orders).receive, orders_decoder)
        assert received is not None
        close_fds(received[1])
        assert isinstance(received[0], RestorePack)
        send_message(orders, Serving(received[0].id, STATED_MAX))
        send_message(orders, Done(received[0].id, STATED_MAX, restored_bytes=STATED_MAX))
        async with asyncio.timeout(PATIENCE_S):
            done = await order
    assert done.restore_ms <= PATIENCE_S * 1000 + 1
    assert (done.restored_bytes, served) == (4096, [4096])


@pytest.mark.parametrize(
    ("said", "believed"),
    [("context_length_exceeded", "context_length_exceeded"), ("draining", "invalid_request")],
)
async def test_a_worker_s_code_can_not_speak_for_the_node(said: str, believed: str) -> None:
    async with impostor() as (handle, _, data):
        frames = handle.run(ModelRef("acme", "x", "0" * 16), EngineRequest("embed"))
        asked = asyncio.ensure_future(anext(aiter(frames)))
        data.sendall(encode_frame(Fault(1, said, "no"))[0])
        with pytest.raises(EngineError) as error:
            async with asyncio.timeout(PATIENCE_S):
                await asked
        assert error.value.code == believed


async def test_a_worker_that_dies_computed_nothing_for_free() -> None:
    """Else a model that ends its process at the end of each request would."""
    now_s, took = [100.0], list[int]()
    async with impostor() as (handle, _, data):
        handle._answers._time = lambda: now_s[0]
        frames = handle.run(ModelRef("acme", "x", "0" * 16), EngineRequest("embed"), took.append)
        asked = asyncio.ensure_future(anext(aiter(frames)))
        await asyncio.to_thread(data.recv, 1)
        now_s[0] = 107.0
        handle.kill()
        with pytest.raises(WorkerDead):
            async with asyncio.timeout(PATIENCE_S):
                await asked
    assert took == [7000]


def test_a_worker_that_can_not_compute_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other threads would answer pings, and nobody else."""

    def broken() -> None:
        raise AssertionError("a mistake in deciding")

    def leave(status: int) -> None:
        raise SystemExit(status)

    with socket.socket() as orders, socket.socket() as data:
        worker = Worker(Spawn(1, "acme", "cpu:0", "cpu", "", 1), orders, data, tmp_path)
        monkeypatch.setattr(worker._compute, "serve", broken)
        monkeypatch.setattr("agent.worker.torch.set_num_threads", lambda threads: None)
        monkeypatch.setattr("agent.worker.os._exit", leave)
        with pytest.raises(SystemExit) as end:
            worker._serve_compute()
    assert end.value.code == 1


async def test_replies_nobody_waits_for_are_ignored() -> None:
    async with impostor() as (handle, orders, _):
        send_message(orders, Done(999))
        order = asyncio.create_task(handle.evict(ModelRef("acme", "x", "0" * 16)))
        received = await asyncio.to_thread(Receiver(orders).receive, orders_decoder)
        assert received is not None
        assert isinstance(received[0], EvictModel)
        send_message(orders, Done(received[0].id))
        async with asyncio.timeout(PATIENCE_S):
            await order


async def test_an_order_with_the_most_files_arrives_whole() -> None:
    """256 descriptors do not fit one message of the kernel; their order must survive the split."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = tuple(OriginFile(f"{number:03}".ljust(200, "x"), number, "0" * 64) for number in range(256))
    pipes = [os.pipe() for _ in files]
    order = LoadOrigin(1, WireSpec("a/b@" + "0" * 16, "engine", Task.EMBEDDING, 4096, "0" * 64), files)
    received: list[int] = []
    try:
        send_message(ours, order, [reader for reader, _ in pipes])
        result = Receiver(theirs).receive(orders_decoder)
        assert result is not None
        got, received = result
        assert got == order
        for (_, writer), reader, number in zip(pipes, received, range(256), strict=True):
            os.write(writer, bytes([number]))
            assert os.read(reader, 1) == bytes([number])
    finally:
        for descriptor in [*received, *(end for pipe in pipes for end in pipe)]:
            os.close(descriptor)
        ours.close()
        theirs.close()


async def test_limits_of_messages_and_frames() -> None:
    with pytest.raises(BadFrame, match="limit"):
        encode_message(EvictModel(1, "x" * (129 * KIB)))
    with pytest.raises(BadFrame, match="limit"):
        encode_message(EvictModel(1, "x"), [0] * 301)
    with pytest.raises(BadFrame, match="limits"):
        decode_lengths(b"\xff" * 8)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(b"not json")
        with pytest.raises(BadFrame):
            Receiver(theirs).receive(replies_decoder)
