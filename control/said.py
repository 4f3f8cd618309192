"""What nodes say of themselves with a beat, beside their reports: their clocks and whom they trust.

Covers: keeping the newest of it per node, in memory. Does not cover: the fleet's state (``control.cluster``),
or the boxes that nodes run on (``control.boxes``). None of it is believed: it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from packer.wire import Beat


@dataclass(slots=True)
class _Node:
    clock_skew_ms: int | None = None
    ca_sha256: str = ""


class Said:
    """By node; ``forget`` with the node."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}

    def note(self, node: str, beat: Beat, now_ms: int) -> None:
        """``now_ms`` is control's wall clock when the beat came."""
        known = self._nodes.setdefault(node, _Node())
        if beat.sent_ms:
            known.clock_skew_ms = beat.sent_ms - now_ms
        known.ca_sha256 = beat.ca_sha256

    def forget(self, node: str) -> None:
        self._nodes.pop(node, None)

    def clock_skew_ms(self, node: str) -> int | None:
        """The node's clock less control's, the way of the beat included."""
        known = self._nodes.get(node)
        return known.clock_skew_ms if known is not None else None

    def all_trust(self, nodes: Iterable[str], ca_sha256: str) -> bool:
        """Whether each of these nodes has said that it trusts just these CAs."""
        return all((known := self._nodes.get(node)) and known.ca_sha256 == ca_sha256 for node in nodes)
