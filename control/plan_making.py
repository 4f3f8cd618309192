"""Making plans: what is the same for every node is worked out once per change, not once per node.

Covers: the parts that all plans share, and what of the list of peers a node still has to be told. Does not
cover: when a plan is due (``control/cluster.py``) or its way to the node (``control/routes/nodes.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from control.catalog import Catalog
from packer.peer_lists import PeerLists
from packer.wire import WIRE_VERSION, Plan

# A plan is on its way for seconds; one that comes later than this is no wish of control's any more.
PLAN_LIFE_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What a plan says of control itself."""

    cluster: str
    epoch: int
    seq: int
    start: str
    ticket_keys: tuple[str, ...]


class PlanMaker:
    """Plans out of the catalog. Every change of what plans say has a new number, so the number is what the
    shared parts are kept under."""

    def __init__(self, catalog: Callable[[], Catalog]) -> None:
        self._catalog = catalog
        self._peers = PeerLists()
        self._shared: Plan | None = None

    def make(self, facts: PlanFacts, node: str, have_peers: str, now_ms: int) -> Plan:
        """The newest plan for a node that has the list of peers known by ``have_peers``, if any."""
        shared = self._shared
        if shared is None or (shared.epoch, shared.seq) != (facts.epoch, facts.seq):
            shared = self._shared = self._make_shared(facts)
        change = self._peers.change_from(have_peers)
        return replace(
            shared,
            node=node,
            peers=change.peers,
            peers_base=change.base,
            peers_gone=change.gone,
            peers_sha256=change.result,
            ticket_keys=facts.ticket_keys,
            expires_ms=now_ms + PLAN_LIFE_MS,
        )

    def _make_shared(self, facts: PlanFacts) -> Plan:
        catalog = self._catalog()
        self._peers.take(catalog.plan_peers())
        parts = catalog.plan_parts()
        return Plan(WIRE_VERSION, facts.cluster, "", facts.epoch, facts.seq, *parts, start=facts.start)
