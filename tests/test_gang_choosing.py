"""Which nodes control asks for a model that needs several devices.

Covers: only nodes with enough of them, room on all, and what was sent there a moment ago. Does not cover:
other orders of nodes (``test_cluster``), or the devices within a node (``test_gangs``).
"""

from __future__ import annotations

from dataclasses import replace

from test_cluster import OTHER, REF, beat, cluster_of, step

from control.choosing import choose_near, choose_node
from control.cluster import Cluster, NodeBeat, Routed
from packer.types import MIB
from packer.wire import DeviceReport, ModelReport


def has(
    node: str, *devices: tuple[int, int], healthy: int = 99, models: tuple[ModelReport, ...] = ()
) -> NodeBeat:
    """A beat of a node with devices of (budget, used) MiB, of which the first few are healthy."""
    reports = tuple(
        DeviceReport(f"cpu:{at}", "cpu", "cpu", budget * MIB, used * MIB, 0, at < healthy)
        for at, (budget, used) in enumerate(devices)
    )
    said = beat(node, *models)
    return replace(said, report=replace(said.report, devices=reports))


def order(cluster: Cluster, share_mib: int = 60, devices: int = 2) -> list[str]:
    return list(choose_node(cluster, REF, share_mib * MIB, 0, devices))


def test_only_nodes_with_enough_devices_of_the_size_are_asked() -> None:
    cluster = cluster_of(
        has("a", (100, 0)), has("b", (100, 0), (50, 0)), has("c", (100, 90), (70, 0), (10, 0))
    )
    assert order(cluster) == ["c"]


def test_a_device_that_is_unhealthy_is_none() -> None:
    cluster = cluster_of(has("a", (100, 0), (100, 0), healthy=1), has("b", (100, 99), (100, 99)), has("c"))
    assert order(cluster) == ["b"]


def test_where_none_has_enough_somebody_is_asked_who_can_say_why() -> None:
    cluster = cluster_of(has("a", (100, 0)), has("b", (100, 0)), has("c", (100, 0)))
    assert sorted(order(cluster)) == ["a", "b", "c"]


def test_a_node_with_room_on_all_devices_goes_first_and_what_was_sent_there_takes_it() -> None:
    cluster = cluster_of(
        has("a", (100, 50), (100, 50)), has("b", (100, 0), (100, 0)), has("c", (100, 0), (100, 70))
    )
    assert order(cluster)[0] == "b"
    step(cluster, Routed("b", OTHER, 60 * MIB, 2), 0)
    assert order(cluster, 50)[0] == "a"


def test_a_gang_on_a_broken_device_is_not_there() -> None:
    gang = ModelReport(str(REF), "resident", "cpu:0+cpu:1", 0, 0, 90 * MIB, 0, 0, 0, 0, (), 0)
    whole = has("a", (100, 45), (100, 45), models=(gang,))
    cluster = cluster_of(whole, has("b", (100, 0), (100, 0)), has("c", (100, 0), (100, 0)))
    assert list(choose_near(cluster, REF, 0)) == ["a"]
    step(cluster, has("a", (100, 45), (100, 45), healthy=1, models=(gang,)), 0)
    assert list(choose_near(cluster, REF, 0)) == []
