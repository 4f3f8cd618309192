"""The answers that a worker owes its callers, on their way through the agent.

Covers: frames that arrived and were not taken yet, with their limit; what each answer cost and whether the
worker is stuck (``due``); room for requests' bodies (``bodies``). Does not cover: sockets, or what a caller
makes of a frame (``workers``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from agent.bodies import Bodies
from agent.due import Due
from agent.frames import FromWorker, Last, Measured, Piece
from packer.types import MIB

# Answers that arrived and that callers have not taken yet, per worker; beyond this the worker waits.
BUFFERED_BYTES_MAX = 64 * MIB
# What a frame takes here beside its bytes, so that very many small ones are counted too.
FRAME_OVERHEAD_BYTES = 512


class Answer:
    """The frames of one request on their way to its caller."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.frames: deque[tuple[FromWorker, bytes]] = deque()
        self.arrived = asyncio.Event()
        self.ended = False
        self.busy_ms = 0


class Answers:
    """Those of one worker. ``on_late`` is told of device time that answers took whose callers had left,
    ``on_room`` when frames may be heard again after ``heard`` said that there is no room."""

    def __init__(self, on_late: Callable[[int], None], on_room: Callable[[], None] = lambda: None) -> None:
        self._on_late, self._on_room = on_late, on_room
        self._time = asyncio.get_running_loop().time
        self._open: dict[int, Answer] = {}
        self._due, self._bodies = Due(), Bodies()
        self._buffered_bytes = 0
        self._full = False
        self._ended = False

    def open(self, number: int) -> Answer:
        answer = self._open[number] = Answer(number)
        return answer

    async def may_send(self, answer: Answer, body_bytes: int) -> None:
        """Returns when the request may be sent, which is when its time begins."""
        if body_bytes:
            await self._bodies.take(answer.number, body_bytes)
        self._due.asked(answer.number, self._now())

    def not_sent(self, answer: Answer) -> None:
        self._bodies.give(answer.number)
        self._due.heard(answer.number, True, self._now())

    def close(self, answer: Answer) -> bool:
        """The caller takes nothing more. Returns whether the worker must be told."""
        del self._open[answer.number]
        self.taken(answer)  # hands their room back
        if answer.ended or self._ended:
            return False
        self._due.left(answer.number, self._now())
        return True

    def taken(self, answer: Answer) -> deque[tuple[FromWorker, bytes]]:
        """Everything that has arrived for a caller."""
        taken = answer.frames
        if not taken:
            return taken
        answer.frames = deque()
        self._buffered_bytes -= sum(_held_bytes(frame, body) for frame, body in taken)
        if self._full and self._buffered_bytes < BUFFERED_BYTES_MAX:
            self._full = False
            self._on_room()
        return taken

    def has_room(self) -> bool:
        """May another frame be heard?"""
        return not self._full

    def heard(self, frame: FromWorker, body: bytes) -> bool:
        """A frame came. Returns whether there is room for another."""
        assert not isinstance(frame, Measured)
        ended = type(frame) is not Piece
        stated_s = 0.0 if isinstance(frame, Piece) else frame.busy_us / 1e6
        busy_ms = self._due.heard(frame.id, ended, self._now(), stated_s)
        if ended:
            self._bodies.give(frame.id)
        answer = self._open.get(frame.id)
        if answer is None:  # its caller has left
            if busy_ms:
                self._on_late(busy_ms)
            return not self._full
        answer.ended, answer.busy_ms = ended, busy_ms
        answer.frames.append((frame, body))
        answer.arrived.set()
        self._buffered_bytes += _held_bytes(frame, body)
        self._full = self._buffered_bytes >= BUFFERED_BYTES_MAX
        return not self._full

    def stuck_s(self) -> float:
        """See ``Due.stuck_s``."""
        return self._due.stuck_s(self._now())

    def end(self) -> None:
        """The worker is gone: every caller is woken, finds out, and pays until now."""
        self._ended = True
        self._bodies.give_all()
        for number, busy_ms in self._due.died(self._now()).items():
            answer = self._open.get(number)
            if answer is not None:
                answer.busy_ms = busy_ms
            elif busy_ms:
                self._on_late(busy_ms)
        for answer in self._open.values():
            answer.arrived.set()

    def _now(self) -> float:
        return self._time()


def _held_bytes(frame: FromWorker, body: bytes) -> int:
    """Texts lie in headers, tensors in bodies."""
    header_bytes = len(frame.header) if isinstance(frame, Piece | Last) else 0
    return FRAME_OVERHEAD_BYTES + len(body) + header_bytes
