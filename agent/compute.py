"""What a worker computes next: the one thread that runs models, one pass at a time.

Covers: requests that wait, by model; models' turns; joining inputs of several requests in one pass;
cancelling between passes; whose time a pass was. Does not cover: sockets (``worker``), which inputs fit
together (``batching``), or the passes themselves (``engines``).

Models take turns, a pass each, so none is passed over however much there is to do for another. Within a model
the request that has waited longest is always part of the next pass. What one request does wrong ends that one
alone: a pass over several that fails is done again for each input by itself.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import msgspec
import torch

from agent.batching import Item, choose, due_ms, window
from agent.early import GateFailed
from agent.engines.vectors import VectorAnswer
from agent.facade import EngineError, EngineFrame, EngineRequest
from agent.frames import (
    BadFrame,
    Broke,
    End,
    Fault,
    FromWorker,
    Measured,
    Piece,
    Run,
    cut,
    encode_value,
    parse_wire_ref,
)
from agent.moves import where
from agent.peak import PeakMeter
from agent.shelf import Held, NotResident, Shelf
from packer.types import ALONE, Batching, ModelRef

log = logging.getLogger("bunk.worker")

# Quiet time after which freed heap goes back to the system; between requests it is reused instead.
TRIM_IDLE_S = 1.0


@dataclass(slots=True, eq=False)
class Request:
    """One that waits for the thread, or of which something is computed already."""

    run: Run
    body: bytes
    arrived_ms: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    busy_s: float = 0.0  # its share of the passes that it was part of


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A request whose inputs are read. ``hold`` keeps its model where it is."""

    request: Request
    held: Held
    answer: VectorAnswer
    hold: ExitStack


_Part = tuple[_Begun, int]  # an input of a request, by its place


@dataclass(slots=True)
class _Lane:
    """What is to be done for one model, oldest first."""

    ref: ModelRef
    batching: Batching = ALONE  # as the newest request has it
    waiting: deque[Request] = field(default_factory=deque)
    begun: list[_Begun] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.begun


class Compute:
    """``send`` takes frames for the agent; it raises ``OSError`` when there is nobody to take them."""

    def __init__(
        self,
        shelf: Shelf,
        peak: PeakMeter,
        send: Callable[[FromWorker, bytes], None],
        ended: Callable[[int], None],
        trim: Callable[[], None],
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._shelf = shelf
        self._peak = peak
        self._send = send
        self._ended = ended
        self._trim = trim
        self._now_ms = now_ms
        self._arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        # In the order of their turns.
        self._lanes: dict[ModelRef, _Lane] = {}

    def put(self, request: Request) -> None:
        """From any thread."""
        self._arrived.put(request)

    def serve(self) -> None:
        """Until the agent is gone."""
        used = True
        try:
            while True:
                wait_s = self.turn()
                if wait_s == 0:
                    used = True
                    continue
                idle_s = TRIM_IDLE_S if used else None
                try:
                    self._take(self._arrived.get(timeout=idle_s if wait_s is None else wait_s))
                except queue.Empty:
                    if wait_s is None:
                        self._trim()
                        used = False
        except OSError:
            return  # the main thread sees it too

    # --- turns ------------------------------------------------------------------------------------

    def _take(self, request: Request) -> None:
        try:
            ref = parse_wire_ref(request.run.ref)
        except BadFrame as error:
            self._end(request, Fault(request.run.id, "invalid_request", cut(str(error))))
            return
        lane = self._lanes.setdefault(ref, _Lane(ref))
        lane.batching = Batching(request.run.batch_max, request.run.batch_delay_ms)
        lane.waiting.append(request)

    def turn(self) -> float | None:
        """One pass of the next model that has something to compute. Gives how many seconds from now to go on
        at the latest: 0 when there was one; None: nothing waits."""
        with suppress(queue.Empty):
            while True:
                self._take(self._arrived.get_nowait())
        due_s: list[float] = []
        for lane in self._in_turn():
            self._let_go(lane)
            if lane.is_empty:
                del self._lanes[lane.ref]
                continue
            later_ms = self._pass(lane)
            if later_ms is None:
                del self._lanes[lane.ref]
                if not lane.is_empty:
                    self._lanes[lane.ref] = lane  # behind the others
                return 0.0
            due_s.append(max(later_ms - self._now_ms(), 0.0) / 1000)
        return min(due_s, default=None)

    def _in_turn(self) -> list[_Lane]:
        """Models of which some weights are still on their way come last: a pass of one waits for them, and
        holds up the others."""
        lanes = list(self._lanes.values())
        return lanes if len(lanes) == 1 else sorted(lanes, key=lambda lane: self._shelf.awaits(lane.ref))

    def _let_go(self, lane: _Lane) -> None:
        """Whoever has left, in the middle of its inputs as well: what it holds may be evicted."""
        for begun in [begun for begun in lane.begun if begun.request.cancelled.is_set()]:
            self._end_begun(lane, begun, End(begun.request.run.id))
        for request in [request for request in lane.waiting if request.cancelled.is_set()]:
            lane.waiting.remove(request)
            self._end(request, End(request.run.id))

    def _pass(self, lane: _Lane) -> float | None:
        """Compute something for a model; a time in milliseconds: nothing is due before."""
        started_s = time.perf_counter()
        offered = window(lane.batching)
        while lane.waiting and sum(len(begun.answer.missing) for begun in lane.begun) < offered:
            request = lane.waiting.popleft()
            if self._begin(lane, request):
                return None  # it was computed whole
            now_s = time.perf_counter()
            request.busy_s += now_s - started_s
            started_s = now_s
        parts = [(begun, place) for begun in lane.begun for place in begun.answer.missing][:offered]
        if not parts:
            return None  # all that came was at fault
        items = [Item(len(begun.answer.inputs[at]), begun.request.arrived_ms) for begun, at in parts]
        tokens_max = parts[0][0].held.model.tokens_max
        chosen = choose(items, lane.batching, tokens_max, self._now_ms())
        if not chosen:
            return due_ms(items[0], lane.batching)
        self._compute(lane, [parts[place] for place in chosen], started_s)
        return None

    # --- inputs of several requests ---------------------------------------------------------------

    def _begin(self, lane: _Lane, request: Request) -> bool:
        """Read a request. Returns whether that was all there is to do."""
        with ExitStack() as hold:
            try:
                held, _ = hold.enter_context(self._shelf.using(lane.ref))
                ask = EngineRequest(request.run.op, msgspec.json.decode(request.run.fields), request.body)
                answer = held.model.begin(ask)
            except Exception as error:
                self._end(request, _fault(request.run.id, error))
                return False
            if answer is None:
                self._run_whole(lane, request, held, ask)
                return True
            lane.begun.append(_Begun(request, held, answer, hold.pop_all()))
        return False

    def _compute(self, lane: _Lane, parts: Sequence[_Part], started_s: float) -> None:
        tokens = [len(begun.answer.inputs[place]) for begun, place in parts]
        self._peak.begin(lane.ref, max(tokens) * len(tokens))
        model = parts[0][0].held.model
        try:
            model.compute([(begun.answer, place) for begun, place in parts])
        except Exception as error:
            if len(parts) == 1:
                self._end_begun(lane, parts[0][0], _fault(parts[0][0].request.run.id, error))
            else:
                self._compute_alone(lane, parts)
        spent_s = time.perf_counter() - started_s
        for (begun, _), count in zip(parts, tokens, strict=True):
            begun.request.busy_s += spent_s * count / sum(tokens)
        for begun in dict.fromkeys(begun for begun, _ in parts):
            if begun in lane.begun and not begun.answer.missing:
                self._answered(lane, begun)
        self._measure(parts[0][0].request.run)

    def _compute_alone(self, lane: _Lane, parts: Sequence[_Part]) -> None:
        """After a pass that failed: one of its inputs may be the reason, and no other request is at fault."""
        for begun, place in parts:
            if begun not in lane.begun or place not in begun.answer.missing:
                continue
            try:
                begun.held.model.compute([(begun.answer, place)])
            except Exception as error:
                self._end_begun(lane, begun, _fault(begun.request.run.id, error))

    def _answered(self, lane: _Lane, begun: _Begun) -> None:
        number = begun.request.run.id
        end: FromWorker = End(number)
        try:
            self._emit(begun.request, begun.held.model.frame(begun.answer))
        except BadFrame as error:
            end = _fault(number, error)
        self._end_begun(lane, begun, end)

    # --- requests that are computed whole ---------------------------------------------------------

    def _run_whole(self, lane: _Lane, request: Request, held: Held, ask: EngineRequest) -> None:
        run = request.run
        started_s = time.perf_counter()
        self._peak.begin(lane.ref, len(run.fields) + len(request.body))
        end: FromWorker = End(run.id)
        try:
            held.model.run(ask, lambda frame: self._emit(request, frame), request.cancelled.is_set)
        except Exception as error:
            end = _fault(run.id, error)
        request.busy_s += time.perf_counter() - started_s
        self._end(request, end)
        self._measure(run)

    # --- ends -------------------------------------------------------------------------------------

    def _emit(self, request: Request, frame: EngineFrame) -> None:
        if not request.cancelled.is_set():
            self._send(Piece(request.run.id, encode_value(frame.header)), frame.body)

    def _end_begun(self, lane: _Lane, begun: _Begun, end: FromWorker) -> None:
        lane.begun.remove(begun)
        begun.hold.close()
        self._end(begun.request, end)

    def _end(self, request: Request, end: FromWorker) -> None:
        self._ended(request.run.id)
        self._send(msgspec.structs.replace(end, busy_us=round(request.busy_s * 1e6)), b"")

    def _measure(self, run: Run) -> None:
        """Nobody waits for this any more, but the next pass does."""
        workspace_bytes = self._peak.end()
        if workspace_bytes:
            self._send(Measured(run.id, run.ref, workspace_bytes), b"")


def _fault(number: int, error: Exception) -> FromWorker:
    """How a request ends of which something went wrong."""
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
