"""Making plans: what is the same for every node is worked out once per change, not once per node.

Covers: the parts that all plans share, and what of the list of peers a node still has to be told. Does not
cover: when a plan is due (``control/cluster.py``) or its way to the node (``control/routes/nodes.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from control.catalog import Catalog
from packer.peer_lists import PeerLists
from packer.wire import WIRE_VERSION, BeatAnswer, Plan, encode

# The shared parts where there are none. No text inside a message looks so: its quotes are escaped.
_NOTHING_SHARED = b'"tenants":[],"keys":[],"models":[]'
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
        self._shared_text: bytes | None = None

    def make(self, facts: PlanFacts, node: str, have_peers: str, now_ms: int) -> Plan:
        """The newest plan for a node that has the list of peers known by ``have_peers``, if any."""
        shared = self._shared
        if shared is None or (shared.epoch, shared.seq) != (facts.epoch, facts.seq):
            shared = self._shared = self._make_shared(facts)
            self._shared_text = None
        change = self._peers.change_from(have_peers)
        row = self._catalog().nodes.get(node)
        return replace(
            shared,
            node=node,
            draining=row is not None and row.draining,
            peers=change.peers,
            peers_base=change.base,
            peers_gone=change.gone,
            peers_sha256=change.result,
            ticket_keys=facts.ticket_keys,
            expires_ms=now_ms + PLAN_LIFE_MS,
        )

    def encode(self, answer: BeatAnswer) -> bytes:
        """An answer as bytes. What is the same for every node is written once per change: of 10,000 tenants
        with keys that is 4 MB, and 15 ms for each node."""
        plan, shared = answer.plan, self._shared
        if plan is None or shared is None:
            return encode(answer)
        if plan.tenants is not shared.tenants or plan.keys is not shared.keys:
            return encode(answer)  # there was a change since it was made
        if self._shared_text is None:
            parts = {"tenants": shared.tenants, "keys": shared.keys, "models": shared.models}
            self._shared_text = encode(parts)[1:-1]
        own = replace(plan, tenants=(), keys=(), models=())
        before, _, after = encode(replace(answer, plan=own)).partition(_NOTHING_SHARED)
        return b"".join((before, self._shared_text, after))

    def _make_shared(self, facts: PlanFacts) -> Plan:
        catalog = self._catalog()
        self._peers.take(catalog.plan_peers())
        parts = catalog.plan_parts()
        routers = catalog.plan_routers()
        return Plan(
            WIRE_VERSION,
            facts.cluster,
            "",
            facts.epoch,
            facts.seq,
            *parts,
            start=facts.start,
            routers=routers,
        )
