"""What opens a node's gateway: the API keys of the plan, and tickets that control signed for this node.

Covers: checking both, and control's clock as this node knows it. Does not cover: where a credential is
read from a request (``guard``), or what a ticket looks like (``packer/tickets.py``).

A node's own clock may be off by minutes. Tickets are measured with control's, which every answer to a beat
tells; only a node that has not heard of control since its start goes by its own. While control is away nobody
can be given another: for so long a ticket that was good when control was last heard stays good, as does the
key that it was given for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from packer.known_keys import KnownKeys
from packer.tickets import TICKET_LIFE_MS, Ticket, is_ticket, proves, read
from packer.types import KeySpec

# Tickets whose signature was checked; the oldest go first. One is about 1 KB, a check about 0.1 ms.
PROVEN_MAX = 4_096
# For no longer than this, which is the life of a node's certificate: then a person has looked after control.
AWAY_MS_MAX = 24 * 3_600_000


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Credentials:
    """Who may call. ``planned`` replaces everything that is known. ``away`` says whether the line to control
    is cut."""

    def __init__(
        self,
        wall_ms: Callable[[], int],
        monotonic_ms: Callable[[], int] = _monotonic_ms,
        away: Callable[[], bool] = lambda: False,
    ) -> None:
        self._wall_ms = wall_ms
        self._monotonic_ms = monotonic_ms
        self._away = away
        self._heard_ms: int | None = None  # control's clock when it was last heard
        self._ahead_ms: int | None = None  # control's clock, less this node's steady one
        self._cluster = self._node = ""
        self._keys: Mapping[str, KeySpec] = {}
        self._ticket_keys: Sequence[str] = ()
        self._proven: dict[str, Ticket] = {}
        self._known = KnownKeys()

    def planned(self, cluster: str, node: str, keys: Sequence[KeySpec], ticket_keys: Sequence[str]) -> None:
        self._cluster, self._node = cluster, node
        self._keys = {key.key_id: key for key in keys}
        self._ticket_keys = tuple(ticket_keys)
        self._proven.clear()

    def heard(self, control_ms: int) -> None:
        """Control's wall clock, as it was a moment ago. What the way took makes tickets last that longer."""
        self._ahead_ms = control_ms - self._monotonic_ms()
        self._heard_ms = control_ms

    def control_ms(self) -> int:
        """Control's wall clock now."""
        return self._wall_ms() if self._ahead_ms is None else self._monotonic_ms() + self._ahead_ms

    def find(self, text: str) -> KeySpec | None:
        """The key that the text proves or was given for; None for everything else."""
        if not is_ticket(text):
            return self._known.check(self._keys, text, self.control_ms())
        ticket = self._proven.get(text) or self._prove(text)
        if ticket is None:
            return None
        now_ms = self.control_ms()
        key = self._keys.get(ticket.key_id)
        if key is None or key.tenant != ticket.tenant:
            return None
        if key.expires_ms is not None and now_ms >= key.expires_ms:
            return None
        heard_ms = self._heard_ms
        if heard_ms is not None and self._away() and now_ms - heard_ms < AWAY_MS_MAX:
            now_ms = heard_ms
        # A ticket of control's never says more than its life from now on.
        return key if now_ms < ticket.expires_ms <= now_ms + 2 * TICKET_LIFE_MS else None

    def _prove(self, text: str) -> Ticket | None:
        """What costs least is asked first: the signature last."""
        claimed = read(text)
        if claimed is None:
            return None
        ticket, said, signature = claimed
        if (ticket.cluster, ticket.node) != (self._cluster, self._node) or ticket.key_id not in self._keys:
            return None
        if not self._cluster or not proves(self._ticket_keys, said, signature):
            return None
        while len(self._proven) >= PROVEN_MAX:
            del self._proven[next(iter(self._proven))]
        self._proven[text] = ticket
        return ticket
