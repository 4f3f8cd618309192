"""Which node is asked for a model: questions about the cluster, and no change to it. Pure.

Covers: the order of nodes by residency, then by what a restore costs, then by room and load. Does not cover:
keeping what is asked here (``control.cluster``), which device of a node fits best (``packer.placement``), or
asking the nodes (``control.routes.forwarding``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice

from control.cluster import NEAR_STATES, Cluster, NodeView
from control.rooms import LOAD_BAND, bins_of, is_able, load_of, settle
from control.vacancy import ring_point
from packer.gangs import devices_in
from packer.placement import Wanted, left_over
from packer.types import ModelRef
from packer.wire import ModelReport

# Fleets up to this size are ranked whole, larger ones only for gangs. Else so many are looked at of those who
# have the model on a device or are bringing it there, and of those who have it below.
RANKED_MAX = 64
# And so many of those who are least busy and have room for it. Three are asked at most.
LOOKED_AT = 16
# How far a model's bytes are from answering; see ``distance_of``.
COMING, NOWHERE = 1, 4


def is_there(cluster: Cluster, node: str, ref: ModelRef) -> bool:
    """Whether the node has bytes of the model in any tier, as far as it said."""
    view = cluster.nodes.get(node)
    known = view.by_ref.get(str(ref)) if view is not None else None
    return known is not None and (known.state in NEAR_STATES or known.host_bytes + known.disk_bytes > 0)


def choose_near(cluster: Cluster, ref: ModelRef, now_ms: int) -> Sequence[str]:
    """The beginning of what ``choose_node`` answers, without a look at all other nodes: those that have the
    model on a device or coming there, and can be reached. Empty: it is cold."""
    text = str(ref)
    ranked = [
        (distance, load_of(view) // LOAD_BAND, load_of(view), spread_of(text, view.node), view.node)
        for view, distance in holders(cluster, ref, text, now_ms, RANKED_MAX)
    ]
    return [entry[-1] for entry in sorted(ranked)]


def holders(
    cluster: Cluster, ref: ModelRef, text: str, now_ms: int, most: int | None = None
) -> Sequence[tuple[NodeView, int]]:
    """Nodes that can be asked and have the version on a device, or coming there, and how far it is. No more
    than ``most`` of those that said so are looked at."""
    names = dict.fromkeys(islice(cluster.near.get(text, ()), most))
    if (sent := cluster.expected.get(ref)) is not None:
        names[sent.node] = None
    found = []
    for name in names:
        view = cluster.nodes.get(name)
        if view is None or not is_able(view) or view.avoid_until_ms > now_ms:
            continue
        if (distance := distance_of(cluster, view, ref, text, now_ms)) <= COMING:
            found.append((view, distance))
    return found


def choose_node(
    cluster: Cluster, ref: ModelRef, share_bytes: int, now_ms: int, devices: int = 1, replicas: int = 1
) -> Sequence[str]:
    """The nodes that may answer for ``ref``, which needs so many bytes on each of ``devices``, best first:
    all of a small fleet, the first of a large one."""
    few = looked_at(cluster, ref, share_bytes, now_ms, devices)
    return rank(cluster, few, ref, share_bytes, now_ms, devices, replicas)


def looked_at(
    cluster: Cluster, ref: ModelRef, share_bytes: int, now_ms: int, devices: int
) -> Sequence[NodeView]:
    """Who can be among the first, without a look at every node."""
    if len(cluster.nodes) <= RANKED_MAX or devices > 1:
        return list(cluster.nodes.values())
    text = str(ref)
    sent = cluster.expected.get(ref)
    names = dict.fromkeys([sent.node] if sent is not None else ())
    names |= dict.fromkeys(islice(cluster.near.get(text, ()), RANKED_MAX))
    names |= dict.fromkeys(islice(cluster.kept.get(text, ()), RANKED_MAX))

    def reached(node: str) -> bool:
        return cluster.nodes[node].avoid_until_ms <= now_ms

    settle(cluster)
    point = ring_point(text)
    free = cluster.vacancy.first(share_bytes, point, LOOKED_AT, reached)
    if len(free) < LOOKED_AT:  # the others could not be reached, and are asked last
        free += cluster.vacancy.first(share_bytes, point, LOOKED_AT, lambda _: True)
    names |= dict.fromkeys(free)
    return [cluster.nodes[name] for name in names if name in cluster.nodes]


def rank(
    cluster: Cluster,
    views: Iterable[NodeView],
    ref: ModelRef,
    share_bytes: int,
    now_ms: int,
    devices: int = 1,
    replicas: int = 1,
) -> Sequence[str]:
    """Of these nodes those that may answer, best first. Not among them: silent and draining nodes, those of
    which there are two, and those whose every device is broken. Nodes with too few devices for a gang are
    asked only if there are no others, and say so.

    Where the bytes are counts first (device, then on its way, then host or disk by what a restore takes),
    then whether a device has room, then load, roughly, then, of what may have replicas, how much else of its
    tenant is there (the bytes that two boxes would have left are hardly ever the same, so behind them it
    would never count), then the best fit, so that large holes stay whole.
    Ties are broken by a hash of model and node, so that cold models spread and each goes home.
    """
    text = str(ref)
    able = [view for view in views if is_able(view)]
    if devices > 1:
        able = [view for view in able if has_devices(view, share_bytes, devices)] or able
    distances = {view.node: distance_of(cluster, view, ref, text, now_ms) for view in able}
    # Where it is on a device already, or coming there, its room is there too.
    cold = min(distances.values(), default=0) > COMING
    left = _left_over(cluster, able, share_bytes, now_ms, devices) if cold else {}
    ranked = []
    for view in able:
        room = left.get(view.node)
        ranked.append(
            (
                view.avoid_until_ms > now_ms,
                _cost(view, text, distances[view.node]),
                room is None,
                load_of(view) // LOAD_BAND,
                held_of(cluster, view, ref) if replicas > 1 and cold else 0,
                room if room is not None and distances[view.node] == NOWHERE else 0,
                load_of(view),
                spread_of(text, view.node),
                view.node,
            )
        )
    return [entry[-1] for entry in sorted(ranked)]


def equally_good(cluster: Cluster, nodes: Sequence[str], ref: ModelRef, now_ms: int) -> Sequence[str]:
    """Of nodes in ``choose_node``'s order those that may share calls for ``ref``: all that have it on a
    device, or the first alone."""
    text = str(ref)
    views = [cluster.nodes[node] for node in nodes if node in cluster.nodes]
    good = [view for view in views if view.avoid_until_ms <= now_ms]
    there = [view.node for view in good if distance_of(cluster, view, ref, text, now_ms) == 0]
    return there or [view.node for view in good[:1]]


def held_of(cluster: Cluster, view: NodeView, ref: ModelRef) -> int:
    """Other versions of the tenant that a node has on its devices, or was sent a moment ago."""
    own, text = f"{ref.tenant}/", str(ref)
    there = dict.fromkeys(other for other in view.near if other != text and other.startswith(own))
    sent = cluster.expected_at.get(view.node, ())
    there |= dict.fromkeys(str(other) for other in sent if other.tenant == ref.tenant and other != ref)
    return len(there)


def spread_of(text: str, node: str) -> bytes:
    """A tie-break that is another for each model, and stays."""
    return hashlib.sha256(f"{text}|{node}".encode()).digest()


def has_devices(view: NodeView, share_bytes: int, devices: int) -> bool:
    found = view.report.devices if view.report is not None else ()
    return sum(device.healthy and device.budget_bytes >= share_bytes for device in found) >= devices


def _cost(view: NodeView, text: str, distance: int) -> tuple[int, int, int]:
    """What it takes until the model could answer here. Host memory or disk: by what the node expects, in
    powers of two, since finer differences are less than what estimates are off by; else by tier."""
    known = view.by_ref.get(text)
    if known is None or distance in (0, COMING, NOWHERE):
        return (distance, 0, 0)
    return (COMING + 1, known.restore_ms_estimate.bit_length(), distance)


def _left_over(
    cluster: Cluster, views: Sequence[NodeView], share_bytes: int, now_ms: int, devices: int
) -> dict[str, int]:
    """Of every node with room for the model, what its best device, or devices, would have left."""
    every = [each for view in views for each in bins_of(cluster, view, now_ms)]
    return left_over(every, Wanted(str(share_bytes), share_bytes, devices))


def distance_of(cluster: Cluster, view: NodeView, ref: ModelRef, text: str, now_ms: int) -> int:
    """0 on a device, 1 on its way there (``COMING``), 2 in host memory, 3 on disk, 4 ``NOWHERE``."""
    known = view.by_ref.get(text)
    if known is not None and known.state == "resident" and not _on_broken(view, known):
        return 0
    sent = cluster.expected.get(ref)
    there = sent is not None and sent.node == view.node and sent.until_ms > now_ms
    if there or (known is not None and known.state == "restoring"):
        return COMING
    if known is not None and known.host_bytes:
        return 2
    return 3 if known is not None and known.disk_bytes else NOWHERE


def _on_broken(view: NodeView, known: ModelReport) -> bool:
    """What lies on a device that the node has given up must be restored to another."""
    devices = view.report.devices if view.report is not None else ()
    names = devices_in(known.device or "")
    return any(device.device in names and not device.healthy for device in devices)
