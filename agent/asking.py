"""One request at a worker: asked when the first frame is wanted, and its frames one by one.

Covers: what the frames of an answer say, its end, and leaving early. Does not cover: sockets and processes
(``workers``), or the answers that a worker owes (``answers``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from agent.answers import Answer
from agent.facade import ENGINE_CODES, EngineError, EngineFrame, EngineRequest
from agent.frames import Broke, End, Fault, FromWorker, Last, Piece
from packer.types import Batching, ModelRef


class WorkerFailure(Exception):
    """A worker could not do what it was asked and lives on. The flags mean what they mean in
    ``RestoreFailed``; ``chunks``: only these of a corrupt pack are bad; ``gone``: the model that was to
    answer is not in this process."""

    def __init__(
        self,
        message: str,
        corrupt: bool = False,
        broken: bool = False,
        gone: bool = False,
        chunks: tuple[int, ...] = (),
        cancelled: bool = False,
    ) -> None:
        super().__init__(message)
        self.gone = gone
        self.message = message
        self.corrupt = corrupt
        self.broken = broken
        self.chunks = chunks
        self.cancelled = cancelled
        # With ``chunks``: of which pack, and where in it.
        self.salt = b""
        self.extents: tuple[tuple[int, int], ...] = ()


class WorkerDead(Exception):
    """The process is gone, and all it held with it."""


class Asked(Protocol):
    """The worker, as one request sees it."""

    async def ask(self, ref: ModelRef, request: EngineRequest, batching: Batching) -> Answer: ...
    async def arrived(self, answer: Answer) -> deque[tuple[FromWorker, bytes]]: ...
    def hang_up(self, answer: Answer) -> None: ...


class Asking:
    """One request at a worker. An iterator of its own: every request comes by here, and a generator that must
    be closed costs as much as reading a frame."""

    __slots__ = ("_answer", "_order", "_over", "_taken", "_took", "_worker")

    def __init__(
        self,
        worker: Asked,
        ref: ModelRef,
        request: EngineRequest,
        took: Callable[[int], None],
        batching: Batching,
    ) -> None:
        self._worker = worker
        self._order = (ref, request, batching)
        self._took = took
        self._answer: Answer | None = None
        self._taken: deque[tuple[FromWorker, bytes]] = deque()
        self._over = False

    def __aiter__(self) -> Asking:
        return self

    async def __anext__(self) -> EngineFrame:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._answer is None:
                self._answer = await self._worker.ask(*self._order)
            if not self._taken:
                self._taken = await self._worker.arrived(self._answer)
            frame = self._read(*self._taken.popleft())
        except BaseException:
            self._end()
            raise
        if frame is None:
            self._end()
            raise StopAsyncIteration
        return frame

    def _read(self, frame: FromWorker, body: bytes) -> EngineFrame | None:
        """A piece of the answer, or None at its end."""
        match frame:
            case Last():
                self._end()
                return EngineFrame(msgspec.json.decode(frame.header), body, last=True)
            case Piece():
                return EngineFrame(msgspec.json.decode(frame.header), body)
            case End():
                return None
            case Fault():
                code = frame.code if frame.code in ENGINE_CODES else "invalid_request"
                raise EngineError(code, frame.message, frame.field)
            case Broke():
                raise WorkerFailure(frame.message, gone=frame.gone)
            case _:
                raise AssertionError("what was measured is nobody's answer")

    async def aclose(self) -> None:
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            if self._answer is not None:
                self._took(self._answer.busy_ms)
                self._worker.hang_up(self._answer)
