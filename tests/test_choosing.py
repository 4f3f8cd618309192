"""Which node of a large fleet is asked for a model: a few are looked at, and the best is among them.

Covers: fleets above ``RANKED_MAX`` against a ranking of every node, through reports, requests, nodes that go
and that can not be reached, and how cold models spread. Does not cover: the order itself (``test_cluster``).
"""

from __future__ import annotations

from collections import Counter
from random import Random
from unittest import mock

import pytest
from running_control import empty_report, model_report

from control import rooms
from control.choosing import LOOKED_AT, RANKED_MAX, choose_near, choose_node, rank
from control.cluster import (
    EXPECTED_MS,
    SILENT_AFTER_MS,
    Answered,
    Cluster,
    NodeBeat,
    NodeJoined,
    NodeRemoved,
    Routed,
    Ticked,
    check,
    step,
)
from packer.types import MIB, ModelRef
from packer.wire import DeviceReport, ModelReport

NODES = 2 * RANKED_MAX
WARM = ModelRef("acme", "warm", "a" * 16)


def beat(node: str, used: tuple[int, ...], *models: ModelReport, draining: bool = False) -> NodeBeat:
    devices = tuple(
        DeviceReport(f"cuda:{number}", "cuda", "x", 96 * MIB, each, 0, each >= 0)
        for number, each in enumerate(used)
    )
    report = empty_report(f"http://{node}:1", models, devices=devices, draining=draining)
    return NodeBeat(node, report, 0, 0, False)


def fleet_of(count: int, used: tuple[int, ...] = (0, 0)) -> Cluster:
    cluster = Cluster()
    for number in range(count):
        step(cluster, NodeJoined(f"n{number}", f"http://n{number}:1"), 0)
        step(cluster, beat(f"n{number}", used), 0)
    return cluster


def everybody(cluster: Cluster, ref: ModelRef, nbytes: int, now_ms: int) -> list[str]:
    return list(rank(cluster, cluster.nodes.values(), ref, nbytes, now_ms))


def merit(cluster: Cluster, node: str, nbytes: int, now_ms: int) -> tuple[bool, int, int]:
    """What counts before ties: whether it has room, how busy it is, and what would be left."""
    view = cluster.nodes[node]
    left = [each.usable_bytes - nbytes for each in rooms.bins_of(cluster, view, now_ms)]
    fits = [each for each in left if each >= 0]
    return not fits, rooms.load_of(view) // rooms.LOAD_BAND, min(fits, default=0)


@pytest.mark.parametrize("seed", range(2))
def test_the_first_of_a_few_is_as_good_as_the_first_of_all(seed: int) -> None:
    chance, cluster, now_ms = Random(seed), fleet_of(NODES), 0
    for number in range(120):
        now_ms += chance.choice((0, 1, 50))
        node = f"n{chance.randrange(NODES)}"
        match chance.randrange(6):
            case 0 | 1 | 2:
                used = tuple(chance.choice((-1, 0, 40 * MIB, 96 * MIB, 95 * MIB)) for _ in range(2))
                near = [model_report(str(WARM), "absent", disk_bytes=1)] if chance.random() < 0.1 else []
                step(cluster, beat(node, used, *near, draining=chance.random() < 0.1), now_ms)
            case 3:
                step(cluster, Answered(node, chance.random() < 0.5), now_ms)
            case 4 if chance.random() < 0.2:
                step(cluster, NodeRemoved(node), now_ms)
                step(cluster, NodeJoined(node, f"http://{node}:1"), now_ms)
            case _:
                step(cluster, Ticked(), now_ms)
        ref, nbytes = ModelRef("t", f"m{number}", "0" * 16), chance.choice((1, 30, 50, 90, 200)) * MIB
        few, every = choose_node(cluster, ref, nbytes, now_ms), everybody(cluster, ref, nbytes, now_ms)
        assert set(few) <= set(every)
        assert len(few) >= min(LOOKED_AT, len(every))
        avoided = [cluster.nodes[one].avoid_until_ms > now_ms for one in (few[0], every[0])]
        assert avoided[0] == avoided[1]
        if not avoided[0]:
            assert merit(cluster, few[0], nbytes, now_ms) == merit(cluster, every[0], nbytes, now_ms)
        warm = choose_node(cluster, WARM, nbytes, now_ms)
        assert warm[:1] == everybody(cluster, WARM, nbytes, now_ms)[:1] or not cluster.kept
        step(cluster, Routed(few[0], ref, nbytes), now_ms)
        check(cluster)
        rooms.check(cluster)


def test_cold_models_spread_over_a_fleet_of_equals_and_each_goes_home() -> None:
    """Also when nodes come: few models get another home."""
    cluster = fleet_of(NODES)
    refs = [ModelRef("t", f"m{number}", "0" * 16) for number in range(8 * NODES)]
    homes = {ref: choose_node(cluster, ref, MIB, 0)[0] for ref in refs}
    assert {ref: choose_node(cluster, ref, MIB, 5)[0] for ref in refs} == homes
    counts = Counter(homes.values())
    assert max(counts.values()) <= 40, "8 each, where all were even"
    assert len(counts) > NODES // 2
    for number in range(NODES, NODES + 4):
        step(cluster, NodeJoined(f"n{number}", "http://x:1"), 0)
        step(cluster, beat(f"n{number}", (0, 0)), 0)
    moved = sum(choose_node(cluster, ref, MIB, 5)[0] != home for ref, home in homes.items())
    assert 0 < moved < len(refs) // 4


def test_who_is_silent_gone_or_not_reached_is_not_asked_before_others() -> None:
    cluster = fleet_of(NODES)
    ref = ModelRef("t", "m", "0" * 16)
    for _ in range(NODES - 1):
        best = choose_node(cluster, ref, MIB, 0)[0]
        step(cluster, Routed(best, ref, MIB), 0)
        step(cluster, Answered(best, reached=False), 0)
    left = [node for node, view in cluster.nodes.items() if not view.avoid_until_ms]
    assert choose_node(cluster, ref, MIB, 1)[0] == left[0]
    step(cluster, NodeRemoved(left[0]), 1)
    assert left[0] not in choose_node(cluster, ref, MIB, 1)
    assert len(choose_node(cluster, ref, MIB, 1)) >= LOOKED_AT, "all that are left can not be reached"
    step(cluster, Ticked(), SILENT_AFTER_MS + EXPECTED_MS)
    assert choose_node(cluster, ref, MIB, SILENT_AFTER_MS + EXPECTED_MS) == []


def test_a_model_with_very_many_copies_costs_no_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = fleet_of(4 * RANKED_MAX)
    for node in list(cluster.nodes):
        step(cluster, beat(node, (0, 0), model_report(str(WARM), "resident", device="cuda:0")), 0)
    seen = mock.Mock(side_effect=rooms.is_able)
    monkeypatch.setattr("control.choosing.is_able", seen)
    assert len(choose_near(cluster, WARM, 0)) == RANKED_MAX == seen.call_count


def test_nodes_are_put_in_order_before_anybody_asks_and_a_bounded_number_at_a_time() -> None:
    cluster = fleet_of(NODES)
    rooms.settle(cluster, NODES - 10)
    rooms.check(cluster)
    assert len(cluster.stale) == 10
    rooms.settle(cluster, NODES)
    assert not cluster.stale
    rooms.check(cluster)
