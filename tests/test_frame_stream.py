"""A worker's data socket on the agent's side: frames however they arrive, back-pressure, mistakes, and
answers that end while their caller is busy.

Does not cover: what real workers say (``test_worker``) or limits of what they may (``attacks``).
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent import answers
from agent.devices import DeviceConfig
from agent.facade import EngineRequest
from agent.frame_stream import FrameStream
from agent.frames import (
    JOINED_BYTES_MAX,
    LENGTHS_BYTES,
    BadFrame,
    Cancel,
    End,
    FromWorker,
    Piece,
    Run,
    decode,
    decode_lengths,
    encode_frame,
    encode_value,
    to_worker_decoder,
)
from agent.workers import WorkerHandle
from packer.types import MIB, ModelRef

SOON_S = 20.0
REF = ModelRef("acme", "talk", "0123456789abcdef")


def frame_bytes(frame: FromWorker, body: bytes = b"") -> bytes:
    return b"".join(encode_frame(frame, body))


class Heard:
    """What a stream gave, and how it ended."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[tuple[FromWorker, bytes]] = asyncio.Queue()
        self.ended: asyncio.Future[BadFrame | None] = asyncio.get_running_loop().create_future()


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[FrameStream, Heard, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    heard = Heard()
    _, stream = await asyncio.get_running_loop().create_unix_connection(
        lambda: FrameStream(lambda *frame: heard.frames.put_nowait(frame), heard.ended.set_result), sock=ours
    )
    with theirs:
        yield stream, heard, theirs
        stream.close()


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def test_frames_are_the_same_however_they_arrive() -> None:
    """Byte by byte, and all in one piece."""
    sent: list[tuple[FromWorker, bytes]] = [
        (Piece(1, encode_value({"count": 1})), b"body"),
        (End(1, 7), b""),
        (Piece(2, encode_value({})), bytes(3 * JOINED_BYTES_MAX)),
    ]
    async with asyncio.timeout(SOON_S), opened() as (_, heard, theirs):
        for frame, body in sent[:2]:
            for byte in frame_bytes(frame, body):
                await send(theirs, bytes([byte]))
        await send(theirs, b"".join(frame_bytes(frame, body) for frame, body in sent))
        got = [await heard.frames.get() for _ in range(5)]
    assert got == sent[:2] + sent


async def test_nothing_is_given_while_it_is_held() -> None:
    async with asyncio.timeout(SOON_S), opened() as (stream, heard, theirs):
        stream.hold()
        await send(theirs, frame_bytes(End(1)) + frame_bytes(End(2)))
        stream.go_on()
        assert (await heard.frames.get())[0] == End(1)
        assert (await heard.frames.get())[0] == End(2)
        # A hold from within a frame holds the next one, which has arrived already.
        original = heard.frames.put_nowait

        def put_and_hold(item: tuple[FromWorker, bytes]) -> None:
            original(item)
            stream.hold()

        heard.frames.put_nowait = put_and_hold  # type: ignore[method-assign]
        await send(theirs, frame_bytes(End(3)) + frame_bytes(End(4)))
        assert (await heard.frames.get())[0] == End(3)
        assert heard.frames.empty()
        stream.go_on()
        assert (await heard.frames.get())[0] == End(4)


async def test_the_end_is_told_once_and_with_its_reason() -> None:
    async with asyncio.timeout(SOON_S), opened() as (_, heard, theirs):
        await send(theirs, (2**31).to_bytes(4, "little") * 2)
        assert isinstance(await heard.ended, BadFrame)
    async with asyncio.timeout(SOON_S), opened() as (stream, heard, theirs):
        await send(theirs, frame_bytes(End(1))[:-1])
        theirs.close()
        assert await heard.ended is None
        assert heard.frames.empty()
        try:
            stream.write(Cancel(1))
        except ConnectionResetError:
            return
        raise AssertionError("it wrote to a socket that has ended")


async def test_small_bodies_and_large_ones_are_written_whole() -> None:
    async with asyncio.timeout(SOON_S), opened() as (stream, _, theirs):
        loop = asyncio.get_running_loop()
        for size in (0, JOINED_BYTES_MAX, 4 * MIB):
            stream.write(Run(size, str(REF), "infer", encode_value({})), bytes(size))
            draining = asyncio.create_task(stream.drained())
            got = b""
            while len(got) < LENGTHS_BYTES or len(got) < LENGTHS_BYTES + sum(decode_lengths(got[:8])):
                got += await loop.sock_recv(theirs, MIB)
            header, body = decode_lengths(got[:LENGTHS_BYTES])
            frame = decode(to_worker_decoder, got[LENGTHS_BYTES : LENGTHS_BYTES + header])
            assert (frame.id, body) == (size, size)
            await draining


# --- answers ----------------------------------------------------------------------------------------


@asynccontextmanager
async def spoken_for() -> AsyncIterator[tuple[WorkerHandle, socket.socket]]:
    """A worker whose words this test writes; the process only lives and dies."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=subprocess.PIPE)
    orders, their_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    data, theirs = socket.socketpair()
    for sock in (orders, data, theirs):
        sock.setblocking(False)
    worker = WorkerHandle("acme", DeviceConfig("cpu:0", "cpu", "cpu", 1024), orders, data)
    await worker.start(process.pid, os.pidfd_open(process.pid))
    try:
        yield worker, theirs
    finally:
        worker.kill()
        await worker.close()
        await process.communicate()
        their_orders.close()
        theirs.close()


async def test_an_answer_that_ends_while_its_caller_is_busy_is_over() -> None:
    """What arrives between two frames that are taken was slept over, and the caller waited for ever."""
    async with asyncio.timeout(SOON_S), spoken_for() as (worker, theirs):
        frames = worker.run(REF, EngineRequest("generate"))
        taking = asyncio.ensure_future(anext(frames))
        await asyncio.get_running_loop().sock_recv(theirs, MIB)  # the request is on its way: number 1
        number = next(iter(worker._answers._open))
        await send(theirs, frame_bytes(Piece(number, encode_value({"delta": "a"}))))
        assert (await taking).header == {"delta": "a"}
        rest = frame_bytes(Piece(number, encode_value({"delta": "b"}))) + frame_bytes(End(number))
        await send(theirs, rest)
        await worker._answers._open[number].arrived.wait()
        assert [frame.header async for frame in frames] == [{"delta": "b"}]


async def test_a_full_buffer_holds_the_socket_until_a_caller_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "BUFFERED_BYTES_MAX", 4)
    async with asyncio.timeout(SOON_S), spoken_for() as (worker, theirs):
        frames = worker.run(REF, EngineRequest("generate"))
        taking = asyncio.ensure_future(anext(frames))
        await asyncio.get_running_loop().sock_recv(theirs, MIB)
        number = next(iter(worker._answers._open))
        for text in ("a", "b", "c"):
            await send(theirs, frame_bytes(Piece(number, encode_value({"delta": text})), b"full"))
        await send(theirs, frame_bytes(End(number)))
        got = [(await taking).header] + [frame.header async for frame in frames]
    assert got == [{"delta": "a"}, {"delta": "b"}, {"delta": "c"}]
