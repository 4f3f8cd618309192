"""What nodes say of themselves with a beat, beside their reports: their clocks, their boxes, whom they trust.

Covers: keeping the newest of it per node and life, in memory, and saying it to people. Does not cover: the
fleet's state (``control.cluster``). None of it is believed: it is shown, and compared with itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from control.lives import LIVES_MAX, Lives, alone, hear
from packer.wire import Beat, BoxFacts


@dataclass(slots=True)
class _Node:
    clock_skew_ms: int | None = None
    ca_sha256: str = ""
    lives: Lives = field(default_factory=Lives)
    boxes: dict[str, tuple[BoxFacts, str]] = field(default_factory=dict)  # by life: and where it calls from


class Said:
    """By node; ``forget`` with the node."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}

    def note(self, node: str, beat: Beat, peer: str | None, now_ms: int) -> None:
        """``now_ms`` is control's wall clock when the beat came."""
        known = self._nodes.setdefault(node, _Node())
        if beat.sent_ms:
            known.clock_skew_ms = beat.sent_ms - now_ms
        known.ca_sha256 = beat.ca_sha256
        known.boxes.pop(beat.life, None)
        known.boxes[beat.life] = (beat.box, peer or "")
        if len(known.boxes) > LIVES_MAX:
            del known.boxes[next(iter(known.boxes))]

    def hear(self, node: str, life: str, told: int, now_ms: int) -> str | None:
        """Another life of the node that runs at the same time as this one, if there certainly is one."""
        return hear(self._nodes.setdefault(node, _Node()).lives, life, told, now_ms) if life else None

    def turn(self, node: str) -> int:
        """What the node's next beats repeat."""
        known = self._nodes.get(node)
        return known.lives.turn if known is not None else 0

    def is_alone(self, node: str, now_ms: int) -> bool:
        """Whether at most one box of that identity was heard lately; then the others are forgotten."""
        known = self._nodes.get(node)
        if known is None or not alone(known.lives, now_ms):
            return known is None
        known.lives.known.clear()
        return True

    def forget(self, node: str) -> None:
        self._nodes.pop(node, None)

    def clock_skew_ms(self, node: str) -> int | None:
        """The node's clock less control's, the way of the beat included."""
        known = self._nodes.get(node)
        return known.clock_skew_ms if known is not None else None

    def all_trust(self, nodes: Iterable[str], ca_sha256: str) -> bool:
        """Whether each of these nodes has said that it trusts just these CAs."""
        return all((known := self._nodes.get(node)) and known.ca_sha256 == ca_sha256 for node in nodes)

    def box_text(self, node: str, life: str) -> str:
        """The box that one life of a node runs on, for people."""
        known = self._nodes.get(node)
        facts, peer = known.boxes.get(life, (BoxFacts(), "")) if known is not None else (BoxFacts(), "")
        parts = [f"host {facts.host or 'unknown'}", f"at {peer}" if peer else "", *facts.devices]
        parts += [f"boot {facts.boot[:8]}"] if facts.boot else []
        return ", ".join(part for part in parts if part)
