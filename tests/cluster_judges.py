"""What a simulated cluster must never do, and what it must have done in the end.

Covers: plans that go back or differ under one number, the books of control's core, and after all faults
have ended: every plan arrived, everything asked answered, every turn over, every record delivered once.
Does not cover: one node's own promises (``judges``).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import judges
from copies_judge import judge_copies_end
from simulated_control import LOST
from simulated_member import NOTED
from simulated_usage import judge_usage

from control import cluster as fleet_core
from packer.residency import model_view
from packer.types import ModelRef
from packer.wire import Plan, PlanNumber, encode

if TYPE_CHECKING:
    from cluster_simulation import Fleet
    from simulated_member import Member


def judge_plan(fleet: Fleet, member: Member, plan: Plan) -> None:
    """A plan comes into force: newer than the one before it in this life, and the only one of its number."""
    number = plan.number
    fleet.require(plan.node == member.name, f"{member.name} took the plan of {plan.node}")
    fleet.require(
        number > member.number_before, f"{member.name} went from plan {member.number_before} to {number}"
    )
    member.number_before = number
    content = encode((plan.tenants, plan.keys, plan.models, plan.peers, plan.draining))
    known = fleet.issued.setdefault((plan.epoch, plan.seq, plan.start), content)
    fleet.require(known == content, f"there are two plans {number}")
    fleet.reached["a plan was skipped"] += (plan.epoch, plan.seq - 1, plan.start) not in fleet.issued


def judge_step(
    fleet: Fleet,
    cluster: fleet_core.Cluster,
    event: fleet_core.Event,
    actions: list[fleet_core.Action],
    now_ms: int,
) -> None:
    """One step of control's core."""
    fleet.require(not isinstance(event, fleet_core.Cloned), "a restart was taken for a copy")
    for action in actions:
        fleet.reached[type(action).__name__] += 1
        match action:
            case fleet_core.SendPlan(node, epoch, seq):
                fleet.require(
                    (epoch, seq) == cluster.newest, f"{node} is sent {epoch, seq}, not {cluster.newest}"
                )
            case fleet_core.AnswerSource(node, peers, granted, wait_ms):
                fleet.reached["a turn was granted"] += granted
                fleet.reached["waits for another's turn"] += not granted and wait_ms > 0
                fleet.require(not (granted and peers), "a turn beside peers that have the pack")
                fleet.require(node not in peers, f"{node} is sent to itself")
            case fleet_core.NoteSilent(node):
                faults = fleet.network.faults
                may = fleet.crash or faults.lose or faults.part or faults.cut_short or faults.foreign
                fleet.require(bool(may), f"{node} is taken for silent and can talk")
    if isinstance(event, fleet_core.NodeBeat):
        fleet.reached["a beat with a plan of an earlier epoch"] += event.have_epoch < cluster.newest[0]
        _judge_report(fleet, cluster, event)


def _judge_report(fleet: Fleet, cluster: fleet_core.Cluster, event: fleet_core.NodeBeat) -> None:
    """Reports carry a number of the simulation in ``started_ms``: the view never goes back in one life."""
    view = cluster.nodes.get(event.node)
    if view is None or view.report is None:
        return
    before = fleet.newest_report.get(event.node, 0)
    fleet.reached["a late beat"] += event.report.started_ms < before
    same_life = before // 1_000_000 == view.report.started_ms // 1_000_000
    forward = view.report.started_ms >= before or not same_life
    fleet.require(forward, f"an old report of {event.node} replaced a newer one")
    fleet.newest_report[event.node] = view.report.started_ms


def judge_reading(fleet: Fleet, member: Member, ref: ModelRef) -> None:
    """Without faults no two nodes read one origin at a time, if the first can hand the pack on."""
    fleet.reached["read an origin"] += 1
    if fleet.asking and member.peer_url:
        others = [name for known, name in fleet.reading if known == ref and fleet.members[name].peer_url]
        fleet.require(not others, f"{member.name} reads the origin of {ref} beside {others}")
        fleet.reading[(ref, member.name)] = None


def judge_arrival(fleet: Fleet) -> None:
    """Faults have ended a while ago: every node is in, with the newest plan and nothing else."""
    catalog, meta = fleet.control.catalog, fleet.control.meta
    for name, member in fleet.members.items():
        fleet.require(member.up and name in catalog.nodes, f"{name} is not back")
        fleet.require(
            member.have_plan() == PlanNumber(meta.epoch, meta.seq),
            f"{name} has plan {member.have_plan()}, control is at {meta}",
        )
        fleet.require(
            list(member.planned.values()) == [spec for _, spec in sorted(catalog.models.items())],
            f"{name} has other models than control",
        )
        for spec in member.planned.values():
            known = member.node.models.get(spec.ref)
            fleet.require(known is not None and known.planned, f"{name} does not serve {spec.ref}")
        fleet.require(not fleet.control.cluster.nodes[name].silent, f"control takes {name} for silent")


def judge_end(fleet: Fleet) -> None:
    for member in fleet.members.values():
        judges.judge_end(member)
        _judge_view(fleet, member)
    _judge_calls(fleet)
    _judge_records(fleet)
    judge_usage(fleet)
    judge_copies_end(fleet)
    cluster = fleet.control.cluster
    fleet.require(not cluster.turns, f"turns of nobody: {cluster.turns}")
    fleet.require(not cluster.expected, "expectations outlive their time")
    for view in cluster.nodes.values():
        fleet.require(view.in_flight == 0, f"{view.in_flight} calls of nobody on {view.node}")
    waiting = {name for name, poll in fleet.control._polls.items() if not poll.done()}
    fleet.require(waiting <= set(fleet.members), f"polls of {waiting}")


def _judge_view(fleet: Fleet, member: Member) -> None:
    """What control believes of a node is so."""
    view = fleet.control.cluster.nodes[member.name]
    fleet.require(
        PlanNumber(*view.have) == member.have_plan(), f"control takes {member.name} to be at {view.have}"
    )
    for ref in member.planned:
        known, core = view.by_ref.get(str(ref)), model_view(member.node, ref)
        assert core is not None
        fleet.require(known is not None and known.state == core.state, f"{ref} is {core.state}, not {known}")
        assert known is not None
        fleet.require(known.packed == core.packed, f"control takes {ref} for packed: {known.packed}")


def _judge_calls(fleet: Fleet) -> None:
    for i, spec in enumerate(fleet.control.catalog.models.values()):
        status = fleet.statuses.get(f"calm {i}")
        fleet.require(status is not None, f"a call for {spec.ref} was never answered")
        fleet.require(status in (200, 507), f"a call for {spec.ref} was answered {status}")
        fleet.require(status != LOST, "lost")


def _judge_records(fleet: Fleet) -> None:
    """Every record that a node has kept is with control, once."""
    delivered = Counter(
        row[0]
        for row in fleet.store._db.execute("select detail from records where kind = ?", (NOTED,)).fetchall()
    )
    for member in fleet.members.values():
        left = member.journal.spooled(10)
        fleet.require(not left, f"{member.name} still has records: {left}")
        for detail, tenant in (member.noted | member.told).items():
            count = delivered.pop(detail, 0)
            lost = fleet.restored or tenant in fleet.tenants_dropped
            fleet.require(count == 1 or (count == 0 and lost), f"{detail} is {count} times with control")
    fleet.require(not delivered, f"records of nobody: {delivered}")
