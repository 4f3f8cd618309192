"""A worker's data socket on the agent's side: frames out of what arrives, and writing with back-pressure.

Covers: cutting the stream into frames as it arrives, and reading no further while somebody says so. Does not
cover: what frames mean or who waits for them (``answers``, ``workers``), or their encoding (``frames``).

A protocol of its own and not asyncio's streams: three reads per frame, each of them handed to a task, cost
more than everything else that is done for a short answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from agent.frames import (
    JOINED_BYTES_MAX,
    LENGTHS_BYTES,
    BadFrame,
    FromWorker,
    ToWorker,
    decode,
    decode_lengths,
    encode_frame,
    from_worker_decoder,
)


class FrameStream(asyncio.Protocol):
    """``heard`` is given each frame with its body and may raise ``BadFrame``; ``ended`` is told once that no
    more will come, with the mistake that the other side made if it made one."""

    def __init__(
        self, heard: Callable[[FromWorker, bytes], None], ended: Callable[[BadFrame | None], None]
    ) -> None:
        self._heard, self._ended = heard, ended
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._held = False
        self._writable = asyncio.Event()
        self._writable.set()

    # --- reading ----------------------------------------------------------------------------------

    def hold(self) -> None:
        """Give no more frames, and read no more, until ``go_on``."""
        if not self._held and self._transport is not None:
            self._held = True
            self._transport.pause_reading()

    def go_on(self) -> None:
        """Soon, and not from within this call. Harmless when nothing is held."""
        if self._held:
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        if not self._held or self._transport is None:
            return
        self._held = False
        self._transport.resume_reading()
        self._cut()

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._cut()

    def _cut(self) -> None:
        try:
            while not self._held and self._transport is not None:
                received = self._received
                if len(received) < LENGTHS_BYTES:
                    return
                header, body = decode_lengths(received[:LENGTHS_BYTES])
                begins, ends = LENGTHS_BYTES + header, LENGTHS_BYTES + header + body
                if len(received) < ends:
                    return
                with memoryview(received) as view:
                    frame = decode(from_worker_decoder, bytes(view[LENGTHS_BYTES:begins]))
                    carried = bytes(view[begins:ends])
                del received[:ends]
                self._heard(frame, carried)
        except BadFrame as error:
            self._end(error)

    # --- writing ----------------------------------------------------------------------------------

    def write(self, frame: ToWorker, body: bytes = b"") -> None:
        """Raises ``BadFrame`` above a limit; ``ConnectionResetError`` when the socket has ended."""
        header, body = encode_frame(frame, body)
        if self._transport is None:
            raise ConnectionResetError("the worker's socket has ended")
        if len(body) <= JOINED_BYTES_MAX:
            self._transport.write(header + body)
        else:
            self._transport.write(header)
            self._transport.write(body)

    @property
    def stalled(self) -> bool:
        """Whether ``drained`` has something to wait for, or to raise."""
        return self._transport is None or not self._writable.is_set()

    async def drained(self) -> None:
        """Returns when more may be written. Raises ``ConnectionResetError`` when nothing can be."""
        await self._writable.wait()
        if self._transport is None:
            raise ConnectionResetError("the worker's socket has ended")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # --- the end ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A socket's transport both reads and writes; uvloop's is of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(None)

    def close(self) -> None:
        """What is still in the buffer is not waited for."""
        if self._transport is not None:
            self._transport.abort()

    def _end(self, mistake: BadFrame | None) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return  # told already
        transport.abort()
        self._received.clear()
        self._writable.set()
        self._ended(mistake)
