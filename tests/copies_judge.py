"""What control must never do with copies of a version, looked at from what nodes said.

Covers: every choice for a version with replicas in a simulated cluster: who is a holder, how many further
copies are sent for, where to, and what is left in the end. Does not cover: when exactly a copy is due
(``test_copies``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from control import cluster as fleet_core
from control import copies
from packer.types import ModelSpec

if TYPE_CHECKING:
    from cluster_simulation import Fleet


@contextmanager
def copies_watched(fleet: Fleet) -> Iterator[None]:
    """Every answer of ``copies.choose`` is judged."""
    real = copies.choose

    def choose(cluster: fleet_core.Cluster, spec: ModelSpec, now_ms: int) -> Sequence[str]:
        nodes = real(cluster, spec, now_ms)
        try:
            judge_choice(fleet, cluster, spec, nodes, now_ms)
        except Exception as error:
            fleet.broke(error)
            raise
        return nodes

    copies.choose = choose
    try:
        yield
    finally:
        copies.choose = real


def _may_have(cluster: fleet_core.Cluster, spec: ModelSpec, now_ms: int) -> dict[str, str]:
    """Nodes that said that they hold the version, or were sent for it a moment ago, and can be asked."""
    found: dict[str, str] = {}
    sent = cluster.expected.get(spec.ref)
    for name, view in cluster.nodes.items():
        report = view.report
        if report is None or view.silent or report.draining or view.avoid_until_ms > now_ms:
            continue
        said = [model for model in report.models if model.ref == str(spec.ref)]
        broken = [each.device for each in report.devices if not each.healthy]
        if len(broken) == len(report.devices) > 0:
            continue
        if said and said[0].state == "resident" and said[0].device not in broken:
            found[name] = "resident"
        elif said and said[0].state == "restoring":
            found[name] = "restoring"
        elif sent is not None and sent.node == name and sent.until_ms > now_ms:
            found[name] = "sent for"
    return found


def judge_choice(
    fleet: Fleet, cluster: fleet_core.Cluster, spec: ModelSpec, nodes: Sequence[str], now_ms: int
) -> None:
    held = _may_have(cluster, spec, now_ms)
    further = [node for node in nodes if node not in held]
    fleet.require(len(dict.fromkeys(nodes)) == len(nodes), f"{spec.ref}: {nodes} names a node twice")
    fleet.require(
        all(node in nodes for node in held), f"{spec.ref}: of {list(held)} only {nodes} may be asked"
    )
    fleet.reached["several holders"] += len(held) > 1
    if not further:
        return
    where = f"{spec.ref}: {further} beside {held}"
    fleet.require(further == [nodes[0]], f"{where}: more than one copy at a time")
    fleet.require(len(held) < spec.replicas, f"{where}: {spec.replicas} may have it")
    fleet.require(all(how == "resident" for how in held.values()), f"{where}: one is on its way")
    view, owed = cluster.nodes[further[0]], cluster.waits.owed.get(spec.ref)
    fleet.require(owed is not None and owed.waited(now_ms) > 0, f"{where}: nobody has waited")
    assert owed is not None
    fleet.require(owed.declined.get(view.node, 0) <= now_ms, f"{where}: it declined")
    fleet.require(view.report is not None and not view.report.draining, f"{where}: it takes no requests")
    fleet.reached["a further copy was due"] += 1
    fleet.reached["a third copy was due"] += len(held) == 2
    fleet.reached["a further copy was due after one was declined"] += bool(owed.declined)


def judge_copies_end(fleet: Fleet) -> None:
    for view in fleet.control.cluster.nodes.values():
        left = [ref for ref, flow in view.flows.items() if flow.in_flight]
        fleet.require(not left, f"requests for {left} of nobody on {view.node}")
