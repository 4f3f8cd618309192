"""What a worker computes next: the one thread that runs models, one pass at a time.

Covers: requests that arrive, models' turns, cancelling between passes, and waiting. Does not cover: sockets
(``worker``), or what a turn computes (``vector_turns``, ``text_turns``).

Models take turns, a pass each, so none is passed over however much there is to do for another. Within a model
the request that has waited longest is always part of the next pass, or has a turn before long.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from agent.engines.decoding import Text
from agent.frames import BadFrame, End, FromWorker, parse_wire_ref
from agent.lanes import AgentGone, Desk, Lane, Request, charged, fault
from agent.peak import PeakMeter
from agent.shelf import Shelf
from agent.text_turns import TextTurns
from agent.vector_turns import VectorTurns
from packer.types import Batching, ModelRef

# Quiet time after which freed heap goes back to the system; between requests it is reused instead.
TRIM_IDLE_S = 1.0


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
        self._desk = Desk(shelf, peak, send, ended)
        self._vectors = VectorTurns(self._desk, now_ms)
        self._texts = TextTurns(self._desk)
        self._whole = WholeTurns(self._desk)
        self._trim = trim
        self._now_ms = now_ms
        self._arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        # In the order of their turns.
        self._lanes: dict[ModelRef, Lane] = {}

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
        except AgentGone:
            return  # the main thread sees it too

    def _take(self, request: Request) -> None:
        try:
            ref = parse_wire_ref(request.run.ref)
        except BadFrame as error:
            self._desk.end(request, fault(request.run.id, error))
            return
        lane = self._lanes.setdefault(ref, Lane(ref))
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

    def _in_turn(self) -> list[Lane]:
        """Models of which some weights are still on their way come last: a pass of one waits for them, and
        holds up the others."""
        lanes = list(self._lanes.values())
        return lanes if len(lanes) == 1 else sorted(lanes, key=lambda lane: self._shelf.awaits(lane.ref))

    def _let_go(self, lane: Lane) -> None:
        """Whoever has left, in the middle of its inputs as well: what it holds may be evicted."""
        for begun in [begun for begun in lane.begun if begun.request.cancelled.is_set()]:
            self._desk.end_begun(lane, begun)
        for request in [request for request in lane.waiting if request.cancelled.is_set()]:
            lane.waiting.remove(request)
            self._desk.end(request, End(request.run.id))

    def _pass(self, lane: Lane) -> float | None:
        """Compute something for a model; a time in milliseconds: nothing is due before."""
        while lane.waiting and self._turns(lane).wants_more(lane):
            self._desk.begin(lane, lane.waiting.popleft())
        return self._turns(lane).turn(lane) if lane.begun else None  # else all that came was at fault

    def _turns(self, lane: Lane) -> VectorTurns | TextTurns | WholeTurns:
        if not lane.begun:
            return self._vectors
        match lane.begun[0].answer:
            case Text():
                return self._texts
            case None:
                return self._whole
        return self._vectors


class WholeTurns:
    """A turn of a model whose requests share nothing: one of them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def wants_more(self, lane: Lane) -> bool:
        return False

    def turn(self, lane: Lane) -> None:
        begun = lane.begun[0]
        request = begun.request
        self._desk.watch(lane.ref, len(request.run.fields) + len(request.body))
        wrong: BaseException | None = None
        try:
            with charged(request):
                emit = partial(self._desk.emit, request)
                begun.held.model.run(begun.ask, emit, request.cancelled.is_set)
        except BaseException as error:
            wrong = error
        self._desk.end_begun(lane, begun, wrong)
        self._desk.measure(request.run, lane.ref)
