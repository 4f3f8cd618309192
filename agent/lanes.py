"""What is to be done for one model, and how a request of it ends.

Covers: requests that wait or are begun, by model; their frames, their ends, and what a pass took beside the
weights. Does not cover: whose turn it is (``compute``) or what a turn computes (``vector_turns``,
``text_turns``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import msgspec
import torch

from agent.early import GateFailed
from agent.engines.decoding import Text
from agent.engines.vectors import VectorAnswer
from agent.facade import EngineError, EngineFrame, EngineRequest
from agent.frames import (
    BadFrame,
    Broke,
    End,
    Fault,
    FromWorker,
    Last,
    Measured,
    Piece,
    Run,
    cut,
    encode_value,
)
from agent.moves import where
from agent.peak import PeakMeter
from agent.shelf import Held, NotResident, Shelf
from packer.types import ALONE, Batching, ModelRef

log = logging.getLogger("bunk.worker")


class AgentGone(Exception):
    """Nobody takes frames any more. Any other error of the system is none of this kind: it ends computing,
    and says so."""


@dataclass(slots=True, eq=False)
class Request:
    """One that waits for the thread, or of which something is computed already."""

    run: Run
    body: bytes
    arrived_ms: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    # What was computed for it, and its share of the passes that it was part of, also of those that failed.
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A request that is read. ``hold`` keeps its model where it is."""

    request: Request
    ask: EngineRequest
    held: Held
    answer: VectorAnswer | Text | None  # None: it is computed whole
    hold: ExitStack


@dataclass(slots=True, eq=False)
class Lane:
    """The requests for one model, oldest first. All that are begun are of the model's one kind."""

    ref: ModelRef
    batching: Batching = ALONE  # as the newest request has it
    waiting: deque[Request] = field(default_factory=deque)
    begun: list[Begun] = field(default_factory=list)
    passes: int = 0  # of texts, which take turns by it
    read_a_prompt: bool = False  # by the last of them

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.begun


class Desk:
    """Begins and ends requests. ``send`` takes frames for the agent; it raises ``OSError`` when there is
    nobody to take them. ``ended`` is told of each request that is over."""

    def __init__(
        self,
        shelf: Shelf,
        peak: PeakMeter,
        send: Callable[[FromWorker, bytes], None],
        ended: Callable[[int], None],
    ) -> None:
        self._shelf = shelf
        self._peak = peak
        self._take_frame = send
        self._ended = ended

    def begin(self, lane: Lane, request: Request) -> None:
        """Read a request: it is begun afterwards, or over."""
        with ExitStack() as hold:
            try:
                with charged(request):
                    held, _ = hold.enter_context(self._shelf.using(lane.ref))
                    ask = EngineRequest(request.run.op, msgspec.json.decode(request.run.fields), request.body)
                    answer = held.model.begin(ask, lambda frame: self.emit(request, frame))
            except BaseException as error:
                self.end(request, fault(request.run.id, error))
                return
            lane.begun.append(Begun(request, ask, held, answer, hold.pop_all()))

    def emit(self, request: Request, frame: EngineFrame) -> None:
        if not request.cancelled.is_set():
            self._send(Piece(request.run.id, encode_value(frame.header)), frame.body)

    def end_begun(
        self,
        lane: Lane,
        begun: Begun,
        error: BaseException | None = None,
        last: EngineFrame | None = None,
    ) -> None:
        """With what went wrong, or because all is said or nobody listens any more. ``last``: what is still to
        be said, which then comes in one frame with the end."""
        lane.begun.remove(begun)
        if isinstance(begun.answer, Text):
            for writing in begun.answer.open:
                begun.answer.decoder.forget(writing)
        begun.hold.close()
        number = begun.request.run.id
        if error is not None:
            self.end(begun.request, fault(number, error))
        elif last is None or begun.request.cancelled.is_set():
            self.end(begun.request, End(number))
        else:
            self.end(begun.request, Last(number, encode_value(last.header)), last.body)

    def end(self, request: Request, end: FromWorker, body: bytes = b"") -> None:
        self._ended(request.run.id)
        busy_us = round(request.busy_s * 1e6)
        try:
            self._send(msgspec.structs.replace(end, busy_us=busy_us), body)
        except BadFrame as large:  # its last piece is; nothing of it was sent
            self._send(msgspec.structs.replace(fault(request.run.id, large), busy_us=busy_us), b"")

    def _send(self, frame: FromWorker, body: bytes) -> None:
        try:
            self._take_frame(frame, body)
        except OSError as error:
            raise AgentGone(str(error)) from None

    def watch(self, ref: ModelRef, tokens: int) -> None:
        """Before passes: measure what they take, if that is worth it."""
        self._peak.begin(ref, tokens)

    def measure(self, run: Run, ref: ModelRef, held_bytes: int = 0) -> None:
        """After them: nobody waits for this any more, but the next pass does. ``held_bytes``: of what they
        took, those that are not given back yet."""
        workspace_bytes = self._peak.end(ref)
        if workspace_bytes:
            self._send(Measured(run.id, run.ref, workspace_bytes + held_bytes), b"")


def fault(number: int, error: BaseException) -> FromWorker:
    """How a request ends of which something went wrong.

    Every kind of exception: a panic in the tokenizers' Rust code is none of ``Exception``'s, and in the
    thread that computes nothing asks the interpreter to end.
    """
    match error:
        case EngineError():
            return Fault(number, error.code, cut(error.message), error.field)
        case NotResident():
            return Broke(number, cut(str(error)), gone=True)
        case BadFrame():
            return Fault(number, "invalid_request", cut(f"the answer is too large: {error}"))
        case GateFailed():
            return Broke(number, str(error), gone=True)
        case MemoryError() | torch.OutOfMemoryError():
            return Broke(number, "the device has no memory left for this request")
        case _:
            log.error("engine failed: %s", where(error))
            return Broke(number, cut(f"{type(error).__name__}: {error}"))


@contextmanager
def charged(request: Request) -> Iterator[None]:
    """Charge what is done within to one request, however it ends."""
    started_s = time.perf_counter()
    try:
        yield
    finally:
        request.busy_s += time.perf_counter() - started_s


def shares(requests: Sequence[Request], weights: Sequence[int], spent_s: float) -> None:
    """Charge what passed to those it passed for."""
    for request, weight in zip(requests, weights, strict=True):
        request.busy_s += spent_s * weight / sum(weights)
