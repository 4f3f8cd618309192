"""Boxes that speak to control under the name of a node or a router: whether two share one, and where each is.

Covers: the lives of each name with the box that each runs on, and what answers tell so that later words
repeat it. Does not cover: the proof that two run at one time (``control.lives``), or what follows from it
(``control.state``). What a box says of itself is not believed: it is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from control.lives import LIVES_MAX, Lives, alone, hear
from packer.wire import BoxFacts


@dataclass(slots=True)
class _Known:
    lives: Lives = field(default_factory=Lives)
    boxes: dict[str, tuple[BoxFacts, str]] = field(default_factory=dict)  # by life: and where it calls from


class Boxes:
    """By name; ``forget`` with the name. ``start`` is what this start of control is called."""

    def __init__(self, start: Callable[[], str]) -> None:
        self._start = start
        self._known: dict[str, _Known] = {}

    def hear(self, name: str, life: str, told: str, box: BoxFacts, peer: str | None, now_ms: int) -> str:
        """A word of a life of that name, which repeats what it was told last. Says for people which two boxes
        certainly use the name at the same time; empty where none do."""
        if not life:
            return ""  # of an earlier release
        known = self._known.setdefault(name, _Known())
        known.boxes.pop(life, None)
        known.boxes[life] = (box, peer or "")
        if len(known.boxes) > LIVES_MAX:
            del known.boxes[next(iter(known.boxes))]
        other = hear(known.lives, life, self._turn_told(told), now_ms)
        return f"{_text(known, life)}; and {_text(known, other)}" if other is not None else ""

    def turn(self, name: str) -> int:
        """It rises whenever another life begins."""
        known = self._known.get(name)
        return known.lives.turn if known is not None else 0

    def told(self, name: str) -> str:
        """What an answer tells whoever has the name, to be repeated with its next words."""
        return f"{self._start()}.{self.turn(name)}"

    def _turn_told(self, told: str) -> int:
        """The turn that is repeated; 0 when another start of control gave it out."""
        start, _, turn = told.rpartition(".")
        return int(turn) if start == self._start() and turn.isdecimal() and len(turn) < 10 else 0

    def is_alone(self, name: str, now_ms: int) -> bool:
        """Whether at most one box of that name was heard lately; then the others are forgotten."""
        known = self._known.get(name)
        if known is None or not alone(known.lives, now_ms):
            return known is None
        known.lives.known.clear()
        return True

    def forget(self, name: str) -> None:
        self._known.pop(name, None)


def _text(known: _Known, life: str) -> str:
    """The box that a life runs on."""
    facts, peer = known.boxes.get(life, (BoxFacts(), ""))
    parts = [f"host {facts.host or 'unknown'}", f"at {peer}" if peer else "", *facts.devices]
    parts += [f"boot {facts.boot[:8]}"] if facts.boot else []
    return ", ".join(part for part in parts if part)
