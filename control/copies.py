"""Versions that several nodes may hold a copy of: which holder is asked, and when one more is. Pure.

Covers: the order of nodes for a version with ``replicas``, who would take its next copy, and what that has to
be worth. Does not cover: versions with one replica (``control.choosing``), what is measured for it
(``control.waits``), or when copies go: nodes evict what is worth least to them, as everything else.

A node is what fails as one, and holds a version once at most, so copies are always apart. With so many
replicas ordered, control sends for one more copy when what requests have waited for each other at the present
holders would have paid for its restore (whoever goes on renting until the rent has reached the price pays at
most twice what the best would have). That request pays for the restore by its own wait; if the node refuses,
a holder answers it. One copy comes at a time. Among holders the one is asked where the fewest wait; where
nobody waits, always the same one: so copies that are no longer needed are hardly used, and are the first that
a node gives up. A router goes by its own requests; of several, two may send for a copy at one moment. Control
knows from nodes' reports what waits there besides, such as callers who go to nodes themselves: the first of
them that asks where to call once the copy is due is told its node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from control.choosing import (
    COMING,
    choose_near,
    choose_node,
    has_devices,
    holders,
    looked_at,
    rank,
    spread_of,
)
from control.cluster import Cluster, NodeView
from control.events import OthersSeen
from control.rooms import LOAD_BAND, load_of
from control.waits import Owed
from packer.gangs import share_bytes
from packer.types import ModelSpec

# A copy is not sent for before so much was waited in all, however cheap it is: two requests of one moment
# are no load.
WAITED_MS_MIN = 100
# What a restore is taken to be where no node has said.
RESTORE_MS = 2_000


@dataclass(frozen=True, slots=True)
class Stand:
    """The copies of a version: who holds one, who would get the next and what its restore takes there, and
    what requests have waited for each other, as far as it counts, of which this router knows."""

    replicas: int
    holders: Sequence[str]
    next_node: str | None
    restore_ms: int
    waited_ms: int
    declined: Sequence[str]


def choose(cluster: Cluster, spec: ModelSpec, now_ms: int) -> Sequence[str]:
    """The nodes that have the version on a device or coming there, the best first; before them the one to
    bring a further copy to, if it is time. Empty: it is cold."""
    if spec.replicas == 1:
        return choose_near(cluster, spec.ref, now_ms)
    text, ranked = str(spec.ref), []
    for view, distance in holders(cluster, spec.ref, text, now_ms):
        waiting = _waiting(view, text, spec.batching.inputs_max)
        ranked.append((distance, waiting, load_of(view) // LOAD_BAND, spread_of(text, view.node), view.node))
    ranked.sort()
    nodes = [entry[-1] for entry in ranked]
    # Nobody would wait at the first, or a copy is on its way (those come last).
    if not ranked or ranked[0][1] == 0 or ranked[-1][0] == COMING:
        return nodes
    further = _further(cluster, spec, nodes, now_ms)
    return nodes if further is None else [further, *nodes]


def choose_all(cluster: Cluster, spec: ModelSpec, now_ms: int) -> Sequence[str]:
    """All nodes that may answer for a version, or of a large fleet the first, best first."""
    share = share_bytes(spec)
    every = choose_node(cluster, spec.ref, share, now_ms, spec.devices, spec.replicas)
    if spec.replicas == 1:
        return every
    first = choose(cluster, spec, now_ms)
    return [*first, *(node for node in every if node not in first)]


def _further(cluster: Cluster, spec: ModelSpec, held: Sequence[str], now_ms: int) -> str | None:
    """The node to bring one more copy to now."""
    owed = cluster.waits.owed.get(spec.ref)
    if len(held) >= spec.replicas or owed is None or owed.waited(now_ms) < WAITED_MS_MIN:
        return None
    node, price_ms = _next(cluster, spec, held, owed, now_ms)
    return node if owed.waited(now_ms) >= price_ms else None


def _next(
    cluster: Cluster, spec: ModelSpec, held: Sequence[str], owed: Owed, now_ms: int
) -> tuple[str | None, int]:
    """Who would take one more copy, and what its restore takes there."""
    share = share_bytes(spec)
    free = [
        view
        for view in looked_at(cluster, spec.ref, share, now_ms, spec.devices)
        if view.node not in held
        and view.avoid_until_ms <= now_ms
        and owed.declined.get(view.node, 0) <= now_ms
        and has_devices(view, share, spec.devices)
    ]
    for node in rank(cluster, free, spec.ref, share, now_ms, spec.devices, spec.replicas)[:1]:
        known = cluster.nodes[node].by_ref.get(str(spec.ref))
        price_ms = known.restore_ms_estimate if known is not None else 0
        return node, price_ms or RESTORE_MS
    return None, 0


def stand(cluster: Cluster, spec: ModelSpec, now_ms: int) -> Stand:
    """For people: how it stands with the copies of a version."""
    held = tuple(sorted(view.node for view, _ in holders(cluster, spec.ref, str(spec.ref), now_ms)))
    owed = cluster.waits.owed.get(spec.ref, Owed())
    node, price_ms = (None, 0)
    if len(held) < spec.replicas:
        node, price_ms = _next(cluster, spec, held, owed, now_ms)
    declined = tuple(node for node, until_ms in owed.declined.items() if until_ms > now_ms)
    return Stand(spec.replicas, held, node, price_ms, round(owed.waited(now_ms)), declined)


def wait_ms(cluster: Cluster, spec: ModelSpec, node: str, now_ms: int) -> int:
    """How long a request that is sent to a node now waits there for others of the same version, as far as a
    further copy would have spared it: nothing where there are as many as may be, or one is on its way."""
    text = str(spec.ref)
    view = cluster.nodes.get(node)
    flow = view.flows.get(text) if view is not None else None
    if flow is None or not flow.answers:
        return 0
    return flow.wait_ms(spec.batching.inputs_max) if _grows(cluster, spec, now_ms) else 0


def _grows(cluster: Cluster, spec: ModelSpec, now_ms: int) -> bool:
    """Whether one more copy may come, and none is on its way."""
    held = holders(cluster, spec.ref, str(spec.ref), now_ms)
    return len(held) < spec.replicas and all(distance != COMING for _, distance in held)


def _waiting(view: NodeView, text: str, together: int) -> int:
    """Requests at a node that must end before one more is answered, whoever sent them."""
    flow, others = view.flows.get(text), view.others.get(text)
    there = (flow.in_flight if flow is not None else 0) + (others.count if others is not None else 0)
    return max(0, there + 1 - together)


def seen(cluster: Cluster, specs: Iterable[ModelSpec], node: str, now_ms: int) -> list[OthersSeen]:
    """What a node's report of just now says of these versions, which may have copies."""
    view = cluster.nodes.get(node)
    if view is None:
        return []
    told = [spec for spec in specs if (text := str(spec.ref)) in view.others or text in view.by_ref]
    together = [(spec, spec.batching.inputs_max) for spec in told]
    return [OthersSeen(node, spec.ref, most, _grows(cluster, spec, now_ms)) for spec, most in together]


def is_further(cluster: Cluster, spec: ModelSpec, node: str) -> bool:
    """Whether a node would have been another holder beside one that there is."""
    there = cluster.near.get(str(spec.ref), ())
    return spec.replicas > 1 and bool(there) and node not in there
