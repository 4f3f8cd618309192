"""A compute thread without its thread: a test puts requests in, gives it turns, and reads what was sent.

Covers: standing models, requests and their answers. Does not cover: any test, or what a model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from agent.compute import Compute
from agent.facade import JSON
from agent.frames import Broke, End, Fault, FromWorker, Last, Piece, Run, encode_value
from agent.lanes import Request
from agent.peak import PeakMeter
from agent.shelf import Held, Shelf
from packer.types import ModelRef

A, B = (ModelRef("acme", name, "0" * 16) for name in "ab")


@dataclass
class Resident:
    """What ``Shelf.using`` gives, for as long as it is used."""

    model: Any
    users: int = 0
    resident_image: object = object()


class Bench:
    """``models``: those that are here."""

    def __init__(self, models: Mapping[ModelRef, Any]) -> None:
        self.held = {ref: Resident(model) for ref, model in models.items()}
        shelf = Shelf()
        shelf._held = cast(dict[ModelRef, Held], self.held)
        peak = PeakMeter(False, lambda: (1, 0), lambda: None)  # an order is under way: nothing is measured
        self.clock_ms = 0.0
        self.sent: list[tuple[FromWorker, bytes]] = []
        self.open: dict[int, Request] = {}
        self.compute = Compute(shelf, peak, self._sent, self._ended, lambda: None, lambda: self.clock_ms)

    def _sent(self, frame: FromWorker, body: bytes) -> None:
        self.sent.append((frame, body))

    def _ended(self, number: int) -> None:
        del self.open[number]

    def put(
        self, number: int, ref: ModelRef, op: str, fields: Mapping[str, JSON], **settings: int
    ) -> Request:
        request = Request(Run(number, str(ref), op, encode_value(fields), **settings), b"", self.clock_ms)
        self.open[number] = request
        self.compute.put(request)
        return request

    def run(self) -> None:
        """Until nothing is left to do, whatever is waited for."""
        while (wait_s := self.compute.turn()) is not None:
            self.clock_ms += wait_s * 1000 + 0.001

    def pieces(self, number: int) -> list[tuple[Piece | Last, bytes]]:
        return [
            (frame, body)
            for frame, body in self.sent
            if isinstance(frame, Piece | Last) and frame.id == number
        ]

    def end(self, number: int) -> Any:
        (found,) = [
            frame
            for frame, _ in self.sent
            if isinstance(frame, Last | End | Fault | Broke) and frame.id == number
        ]
        return found
