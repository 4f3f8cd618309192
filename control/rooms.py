"""Which nodes take requests, how busy they are, and how much room they have. Pure.

Covers: what follows from a node's report and from what was sent there since, and keeping all nodes in that
order (``control.vacancy``): steps of the core only note whose is out of date. Does not cover: which node is
asked (``control.choosing``).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from control.cluster import Cluster, FleetBroken, NodeView
from packer.placement import Bin, Wanted, place

# Nodes that are put in order between requests, a second: 5,000 that all speak at a start of control took the
# first cold request 72 ms. One takes some 14 us.
SETTLED_MAX = 1_000
# Nodes whose requests in flight differ by less are as busy as each other when a cold model is placed.
LOAD_BAND = 8


def is_able(view: NodeView) -> bool:
    """Whether a node takes requests at all."""
    report = view.report
    if view.silent or view.cloned or report is None or report.draining or not view.gateway_url:
        return False
    return not report.devices or any(device.healthy for device in report.devices)


def load_of(view: NodeView) -> int:
    """Requests in flight: what the node said, and what this router has sent to it and seen end since."""
    return max(view.in_flight, view.load_said + view.in_flight - view.in_flight_then)


def bins_of(cluster: Cluster, view: NodeView, now_ms: int | None) -> list[Bin]:
    """A node's devices. What was sent there a moment ago and is in no report yet counts as there, where it
    fits best; what is no longer expected at ``now_ms`` does not."""
    devices = view.report.devices if view.report is not None else ()
    bins = {
        device.device: Bin(device.device, device.budget_bytes - device.used_bytes, (), view.node)
        for device in devices
        if device.healthy
    }
    for ref in cluster.expected_at.get(view.node, ()):
        expected, known = cluster.expected[ref], view.by_ref.get(str(ref))
        ended = now_ms is not None and expected.until_ms <= now_ms
        if ended or not expected.nbytes or (known is not None and known.device_bytes):
            continue
        placing = place(list(bins.values()), Wanted(str(ref), expected.nbytes, expected.devices))
        for at in placing.bins if placing is not None else ():
            bins[at] = replace(bins[at], reserved_bytes=bins[at].reserved_bytes + expected.nbytes)
    return list(bins.values())


def _room(cluster: Cluster, view: NodeView) -> tuple[int, tuple[int, ...]]:
    rooms = tuple(each.usable_bytes for each in bins_of(cluster, view, None))
    return load_of(view) // LOAD_BAND, rooms


def settle(cluster: Cluster, most: int | None = None) -> None:
    """Bring the order up to date, of so many nodes at the most. It costs as much as changed since."""
    for node in list(islice(cluster.stale, most)):
        del cluster.stale[node]
        view = cluster.nodes.get(node)
        if view is not None and is_able(view):
            cluster.vacancy.note(node, *_room(cluster, view))
        else:
            cluster.vacancy.drop(node)


def check(cluster: Cluster) -> None:
    """That what is not noted as out of date is not."""
    able = {node: view for node, view in cluster.nodes.items() if is_able(view)}
    for node in dict.fromkeys([*able, *cluster.vacancy.at]):
        noted = cluster.vacancy.at.get(node)
        now = _room(cluster, able[node]) if node in able else None
        if node not in cluster.stale and now != (noted and (noted.band, noted.rooms)):
            raise FleetBroken(f"{node} is thought to have {noted}, and has {now}")
