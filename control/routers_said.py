"""What routers that are processes of their own say of themselves, for people.

Covers: keeping the newest of it per router, in memory, and which routers two boxes claim to be. Does not
cover: who exists (the catalog), or how two boxes are told from a restart (``control.boxes``). None of it is
believed: it is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from control.boxes import Boxes
from control.router_wire import RouterAsk

# A router asks every 20 s at the latest; two missed and a bit is silence, as it is of nodes.
SILENT_AFTER_MS = 45_000


@dataclass(frozen=True, slots=True)
class RouterSaid:
    """``peer``: the address that it calls from."""

    ask: RouterAsk
    peer: str
    heard_ms: int
    clock_skew_ms: int | None  # its clock less control's, the way of the question included


class RoutersSaid:
    """By router; ``forget`` with the router."""

    def __init__(self, start: Callable[[], str]) -> None:
        self._said: dict[str, RouterSaid] = {}
        self.boxes = Boxes(start)
        self._cloned: dict[str, None] = {}

    def note(self, router: str, ask: RouterAsk, peer: str | None, now_ms: int, wall_ms: int) -> str:
        """Says which two boxes are that router, if two certainly are (``Boxes.hear``)."""
        skew_ms = ask.sent_ms - wall_ms if ask.sent_ms else None
        self._said[router] = RouterSaid(ask, peer or "", now_ms, skew_ms)
        return self.boxes.hear(router, ask.life, ask.told, ask.box, peer, now_ms)

    def note_cloned(self, router: str) -> None:
        self._cloned[router] = None

    def is_cloned(self, router: str) -> bool:
        """Whether two boxes use its identity."""
        return router in self._cloned

    def released(self, now_ms: int) -> list[str]:
        """Those of which one box is left."""
        released = [router for router in self._cloned if self.boxes.is_alone(router, now_ms)]
        for router in released:
            del self._cloned[router]
        return released

    def of(self, router: str) -> RouterSaid | None:
        return self._said.get(router)

    def forget(self, router: str) -> None:
        self._said.pop(router, None)
        self._cloned.pop(router, None)
        self.boxes.forget(router)

    def all_trust(self, ca_sha256: str, now_ms: int) -> bool:
        """Whether each that was heard lately has said that it trusts just these CAs."""
        heard = [said for said in self._said.values() if now_ms - said.heard_ms < SILENT_AFTER_MS]
        return all(said.ask.ca_sha256 == ca_sha256 for said in heard)
