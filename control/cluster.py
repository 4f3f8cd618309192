"""The fleet as control sees it: which nodes live, what they hold, where a request should go. Pure.

``step(cluster, event, now_ms)`` changes the state and returns orders; it has no clock, no I/O and no
chance. Covers: liveness, who waits for a plan, what was sent where, and where a node gets a pack from (a peer
that has one, or its turn at the origin). Does not cover: which node is asked for a model
(``control.choosing``, ``control.copies``), what goes into a plan (every node is told everything), delivery
(``control.server``), or what a node decides by itself.

Nothing here is written to disk: after a restart of control the nodes report again within seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from control.events import (
    Action,
    Answered,
    AnswerSource,
    Changed,
    Cloned,
    EndPoll,
    Event,
    NodeBeat,
    NodeJoined,
    NodeRemoved,
    NodeTold,
    NoteBack,
    NoteSilent,
    OthersSeen,
    Pointed,
    PollEnded,
    Routed,
    SendPlan,
    SourceAsked,
    Ticked,
    WakeSources,
)
from control.vacancy import Vacancy
from control.waits import OWED_MAX, REFUSED_STATUSES, Flow, Others, Waits, count, end, others_waited_ms
from packer.types import ModelRef
from packer.wire import PEERS_TRIED_MAX, ModelReport, Report

__all__ = [
    "Action",
    "AnswerSource",
    "Answered",
    "Changed",
    "Cloned",
    "EndPoll",
    "Event",
    "NodeBeat",
    "NodeJoined",
    "NodeRemoved",
    "NodeTold",
    "NoteBack",
    "NoteSilent",
    "OthersSeen",
    "Pointed",
    "PollEnded",
    "Routed",
    "SendPlan",
    "SourceAsked",
    "Ticked",
    "WakeSources",
]

# A node that holds a long poll open is heard every 20 s at the latest; two missed and a bit is silence.
SILENT_AFTER_MS = 45_000
# How long a routed request makes its node the likely place of the model, until a report tells.
EXPECTED_MS = 30_000
# Expectations remembered; the oldest go first. One is about 200 bytes.
EXPECTED_MAX = 10_000
# States of a model that will answer without a restore that has not begun yet.
NEAR_STATES = ("resident", "restoring")
# A node that could not be reached is asked last for this long.
AVOID_MS = 5_000
# A node's turn at the origin of one version, unless it asks again: three lost words before another may.
TURN_MS = 30_000
# Turns at one time; beyond this nodes read without one. One is about 300 bytes.
TURNS_MAX = 10_000


# --- state ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class NodeView:
    """One node: what it last said, and what control knows that it can not have said yet."""

    node: str
    gateway_url: str
    peer_url: str = ""
    route_url: str = ""  # where this router calls it over mutual TLS
    report: Report | None = None
    by_ref: dict[str, ModelReport] = field(default_factory=dict)
    heard_ms: int | None = None  # None until the first beat since control started
    silent: bool = False
    waits: bool = False
    have: tuple[int, int] = (0, 0)
    life: str = ""  # of the process whose report this is
    number: int = 0
    cloned: bool = False
    told: bool = False  # control says how it is, and that it is silent: time alone says nothing
    in_flight: int = 0  # requests that this router has sent and not seen end
    near: tuple[str, ...] = ()  # versions that it has on a device or is bringing there
    kept: tuple[str, ...] = ()  # versions that it has in host memory or on disk
    flows: dict[str, Flow] = field(default_factory=dict)  # requests for versions that may have copies
    others: dict[str, Others] = field(default_factory=dict)  # of these, who came by other ways; none is 0
    # Requests in flight when it reported: what it said itself, and what this router had sent to it.
    load_said: int = 0
    in_flight_then: int = 0
    # Set while it could not be reached: it is asked last until then. Zero: it can be reached.
    avoid_until_ms: int = 0


@dataclass(frozen=True, slots=True)
class Expected:
    """A model was sent for at this node, which most likely holds ``nbytes`` of it soon, on each of so many
    devices."""

    node: str
    until_ms: int
    nbytes: int
    devices: int = 1


@dataclass(slots=True)
class Cluster:
    """All nodes by name, the number of the newest plan, and where requests were sent a moment ago."""

    nodes: dict[str, NodeView] = field(default_factory=dict)
    newest: tuple[int, int] = (0, 0)
    in_flight: int = 0  # of all nodes
    # Nodes that have a version on a device or are bringing it there, as they said, by its text.
    near: dict[str, dict[str, None]] = field(default_factory=dict)
    # Nodes that have some of a version's bytes below the device, likewise.
    kept: dict[str, dict[str, None]] = field(default_factory=dict)
    expected: dict[ModelRef, Expected] = field(default_factory=dict)
    expected_at: dict[str, dict[ModelRef, None]] = field(default_factory=dict)  # of these, by node
    # Of nodes that take requests, as ``control.rooms`` keeps it; and of which nodes it is out of date.
    vacancy: Vacancy = field(default_factory=Vacancy)
    stale: dict[str, None] = field(default_factory=dict)
    turns: dict[ModelRef, tuple[str, int]] = field(default_factory=dict)  # at the origin: (node, until ms)
    waits: Waits = field(default_factory=Waits)  # of versions that may have copies


def step(cluster: Cluster, event: Event, now_ms: int) -> list[Action]:
    """Take one fact in, return what is to be done about it."""
    match event:
        case NodeJoined(node, gateway_url):
            cluster.nodes.setdefault(node, NodeView(node, gateway_url)).gateway_url = gateway_url
        case NodeRemoved(node):
            removed = cluster.nodes.pop(node, None)
            if removed is not None:
                cluster.in_flight -= removed.in_flight
                removed.near = _note_where(cluster.near, node, removed.near, ())
                removed.kept = _note_where(cluster.kept, node, removed.kept, ())
                cluster.stale[node] = None
            ended: list[Action] = [EndPoll(node)] if removed is not None and removed.waits else []
            return ended + _end_turns(cluster, node)
        case Cloned(node, two):
            return _cloned(cluster, node, two)
        case NodeBeat():
            return _beat(cluster, event, now_ms)
        case NodeTold():
            _told(cluster, event)
        case PollEnded(node):
            if (view := cluster.nodes.get(node)) is not None:
                view.waits = False
                view.heard_ms = now_ms
        case Changed(epoch, seq):
            cluster.newest = (epoch, seq)
            return _answer_polls(cluster)
        case Routed(node, ref, nbytes, devices, wait_ms):
            _routed(cluster, node, now_ms)
            if wait_ms is None or not _has_copy(cluster, event, wait_ms, now_ms):
                _expect(cluster, ref, Expected(node, now_ms + EXPECTED_MS, nbytes, devices))
        case Pointed(node, ref, nbytes, devices):
            _expect(cluster, ref, Expected(node, now_ms + EXPECTED_MS, nbytes, devices))
            if node not in cluster.near.get(str(ref), {node: None}):
                cluster.waits.paid(ref)  # a further copy
        case OthersSeen():
            _see_others(cluster, event, now_ms)
        case Answered():
            _answered(cluster, event, now_ms)
        case SourceAsked():
            return _answer_source(cluster, event, now_ms)
        case Ticked():
            return _tick(cluster, now_ms)
    return []


def _beat(cluster: Cluster, event: NodeBeat, now_ms: int) -> list[Action]:
    """A ``SendPlan`` returned here answers this very beat, be it short or a long poll."""
    view = cluster.nodes.get(event.node)
    if view is None:
        return []
    actions: list[Action] = [NoteBack(event.node)] if view.silent else []
    view.silent = False
    view.heard_ms = now_ms
    if not _is_late(view, event):
        actions += _take_report(cluster, view, event)
    cluster.stale[view.node] = None
    if (event.have_epoch, event.have_seq) < cluster.newest:
        actions.append(SendPlan(view.node, *cluster.newest))
    elif event.waits:
        view.waits = True
    return actions


def _told(cluster: Cluster, event: NodeTold) -> None:
    """A control that was started again knows nothing of a node until it beats: what it said before counts
    until then, and the plan that it has is one of the new control's, which counts on."""
    view = cluster.nodes.get(event.node)
    if view is None:
        return
    view.told, view.silent, view.cloned = True, event.silent, event.cloned
    cluster.stale[view.node] = None
    if event.report is None:
        view.have = (cluster.newest[0], min(view.have[1], cluster.newest[1])) if view.report else (0, 0)
        return
    _take_places(cluster, view, event.report)
    view.have = (event.have_epoch, event.have_seq)
    view.load_said = event.load


def _cloned(cluster: Cluster, node: str, two: bool) -> list[Action]:
    view = cluster.nodes[node]
    view.cloned = two
    cluster.stale[view.node] = None
    if not two:
        return []
    view.waits = False  # whoever is thought to wait is never silent, and both boxes may go without a word
    return [EndPoll(node), *_end_turns(cluster, node)]


def _is_late(view: NodeView, event: NodeBeat) -> bool:
    """A node says several things at a time, and what it said earlier may come later. Of two processes nobody
    can say which is the newer: then the later word counts, and the next one mends it."""
    return bool(event.life) and event.life == view.life and event.number <= view.number


def _take_report(cluster: Cluster, view: NodeView, event: NodeBeat) -> list[Action]:
    view.life, view.number = event.life, event.number
    view.have = (event.have_epoch, event.have_seq)
    _take_places(cluster, view, event.report)
    view.load_said = sum(model.leases + model.waiting for model in event.report.models)
    view.avoid_until_ms = 0
    return _note_packs(cluster, view)


def _take_places(cluster: Cluster, view: NodeView, report: Report) -> None:
    view.gateway_url = report.gateway_url
    view.peer_url = report.peer_url
    view.route_url = report.route_url
    view.report = report
    models = report.models
    near = [model.ref for model in models if model.state in NEAR_STATES]
    kept = [model.ref for model in models if model.host_bytes or model.disk_bytes]
    view.near = _note_where(cluster.near, view.node, view.near, near)
    view.kept = _note_where(cluster.kept, view.node, view.kept, kept)
    view.by_ref = {model.ref: model for model in models}
    view.in_flight_then = view.in_flight


def _note_where(
    where: dict[str, dict[str, None]], node: str, before: Sequence[str], refs: Sequence[str]
) -> tuple[str, ...]:
    """Note which versions a node has; what it says is most often what it said before."""
    now = dict.fromkeys(refs)
    for ref in before:
        if ref not in now:
            nodes = where[ref]
            del nodes[node]
            if not nodes:
                del where[ref]
    for ref in now:
        where.setdefault(ref, {})[node] = None
    return tuple(now)


def _answer_polls(cluster: Cluster) -> list[Action]:
    actions: list[Action] = []
    for view in cluster.nodes.values():
        if view.waits:
            view.waits = False
            actions.append(SendPlan(view.node, *cluster.newest))
    return actions


def _routed(cluster: Cluster, node: str, now_ms: int) -> None:
    if (view := cluster.nodes.get(node)) is not None:
        view.in_flight += 1
        cluster.in_flight += 1
        if view.avoid_until_ms:
            # It could not be reached last time: this request finds out for all others.
            view.avoid_until_ms = now_ms + AVOID_MS
        cluster.stale[view.node] = None


def _expect(cluster: Cluster, ref: ModelRef, expected: Expected) -> None:
    before = cluster.expected.get(ref)
    if before is not None and replace(before, until_ms=expected.until_ms) == expected:
        del cluster.expected[ref]  # it goes to the end: the oldest are first
        cluster.expected[ref] = expected
        return
    _expect_no_more(cluster, ref)
    cluster.expected[ref] = expected
    cluster.expected_at.setdefault(expected.node, {})[ref] = None
    cluster.stale[expected.node] = None
    while len(cluster.expected) > EXPECTED_MAX:
        _expect_no_more(cluster, next(iter(cluster.expected)))


def _expect_no_more(cluster: Cluster, ref: ModelRef) -> None:
    if (gone := cluster.expected.pop(ref, None)) is None:
        return
    there = cluster.expected_at[gone.node]
    del there[ref]
    if not there:
        del cluster.expected_at[gone.node]
    cluster.stale[gone.node] = None


def _has_copy(cluster: Cluster, event: Routed, wait_ms: int, now_ms: int) -> bool:
    """Count a request for a version that may have copies. Whether the node had one by its own word: then
    another node's, which may be on its way, stays expected."""
    ref, text = event.ref, str(event.ref)
    if (view := cluster.nodes.get(event.node)) is None:
        return False
    count(view.flows, text)
    if event.node in cluster.near.get(text, ()):
        cluster.waits.add(ref, wait_ms, now_ms)
        sent = cluster.expected.get(ref)
        return sent is not None and sent.node != event.node and sent.until_ms > now_ms
    cluster.waits.paid(ref)
    return False


def _see_others(cluster: Cluster, event: OthersSeen, now_ms: int) -> None:
    """Of those who wait until the model is there nobody would be spared by another copy."""
    if (view := cluster.nodes.get(event.node)) is None:
        return
    text = str(event.ref)
    known, flow, before = view.by_ref.get(text), view.flows.get(text), view.others.pop(text, None)
    own = flow.in_flight if flow is not None else 0
    if known is None or known.state != "resident" or known.leases <= own:
        return
    now = view.others[text] = Others(known.leases - own, now_ms)
    if event.grows:
        cluster.waits.add(event.ref, others_waited_ms(before, now, own, event.together), now_ms)


def _flow_ended(cluster: Cluster, view: NodeView, event: Answered, now_ms: int) -> None:
    """A request for a version that may have copies ended. A node that refused to have one is asked for none
    for a while, and is not expected to have one."""
    ref, text, served = event.ref, str(event.ref), event.reached and event.status < 400
    if ref is None or not end(view.flows, text, served, now_ms):
        return
    refused = not event.reached or event.status in REFUSED_STATUSES
    if refused and view.node not in cluster.near.get(text, ()) and cluster.near.get(text):
        cluster.waits.decline(ref, view.node, now_ms)
        if ref in cluster.expected_at.get(view.node, ()):
            _expect_no_more(cluster, ref)


def _answered(cluster: Cluster, event: Answered, now_ms: int) -> None:
    if (view := cluster.nodes.get(event.node)) is None:
        return
    if view.flows:
        _flow_ended(cluster, view, event, now_ms)
    if view.in_flight:  # a node that was removed and joined again does not know of earlier requests
        view.in_flight -= 1
        cluster.in_flight -= 1
        cluster.stale[view.node] = None
    view.avoid_until_ms = 0 if event.reached else now_ms + AVOID_MS


def _tick(cluster: Cluster, now_ms: int) -> list[Action]:
    actions: list[Action] = []
    for view in cluster.nodes.values():
        if view.heard_ms is None:
            # Silence is counted from control's start for nodes that it only remembers.
            view.heard_ms = now_ms
        elif view.waits:
            continue  # its connection is open: it is there
        elif not (view.silent or view.told) and now_ms - view.heard_ms > SILENT_AFTER_MS:
            view.silent = True
            cluster.stale[view.node] = None
            actions.append(NoteSilent(view.node, now_ms - view.heard_ms))
            actions += _end_turns(cluster, view.node)
    for ref in [ref for ref, (_, until_ms) in cluster.turns.items() if until_ms <= now_ms]:
        del cluster.turns[ref]
        actions.append(WakeSources(ref))
    while cluster.expected:
        ref, oldest = next(iter(cluster.expected.items()))
        if oldest.until_ms > now_ms:
            break
        _expect_no_more(cluster, ref)
    cluster.waits.forget(now_ms)
    return actions


class FleetBroken(AssertionError):
    """The books of the cluster core do not agree: a bug."""


def check(cluster: Cluster) -> None:
    """The invariants, after a step: bounds hold, and nothing is remembered of nodes that are no more."""
    sizes = len(cluster.expected), len(cluster.turns), len(cluster.waits.owed)
    if any(size > most for size, most in zip(sizes, (EXPECTED_MAX, TURNS_MAX, OWED_MAX), strict=True)):
        raise FleetBroken("{} expectations, {} turns, {} versions that waited".format(*sizes))
    if cluster.in_flight != (total := sum(view.in_flight for view in cluster.nodes.values())):
        raise FleetBroken(f"{cluster.in_flight} requests in flight in all, {total} by node")
    _check_places(cluster)
    for ref, (holder, _) in cluster.turns.items():
        view = cluster.nodes.get(holder)
        if view is None or view.silent:
            raise FleetBroken(f"the turn at the origin of {ref} is {holder}'s, which is not there")
        if not view.peer_url:
            raise FleetBroken(f"nodes wait for {ref} from {holder}, which gives nothing")
    for view in cluster.nodes.values():
        counted = [flow.in_flight for flow in view.flows.values()]
        if not sum(counted) <= view.in_flight >= 0 or min(counted, default=0) < 0:
            raise FleetBroken(f"{view.in_flight} requests in flight to {view.node}, of these {counted}")
        if any(others.count <= 0 for others in view.others.values()):
            raise FleetBroken(f"{view.node} is remembered for requests of others that it has none of")
        if view.load_said < 0 or view.in_flight_then < 0:
            raise FleetBroken(f"{view.node} said {view.load_said} of {view.in_flight_then} requests")
        if view.have > cluster.newest:
            raise FleetBroken(f"{view.node} has plan {view.have}, the newest is {cluster.newest}")
        if view.waits and view.cloned:
            raise FleetBroken(f"{view.node} waits for a plan, and is two boxes")
        if view.waits and view.have == cluster.newest and view.report is None:
            raise FleetBroken(f"{view.node} waits and was never heard")


def _check_places(cluster: Cluster) -> None:
    views = cluster.nodes.values()
    for where, counted in (
        (cluster.near, sum(len(view.near) for view in views)),
        (cluster.kept, sum(len(view.kept) for view in views)),
        (cluster.expected_at, len(cluster.expected)),
    ):
        if sum(map(len, where.values())) != counted:
            raise FleetBroken("nodes that have a model, or soon will, are counted otherwise than the models")


# --- sources of packs -----------------------------------------------------------------------------


def _answer_source(cluster: Cluster, event: SourceAsked, now_ms: int) -> list[Action]:
    """A peer that has the pack, before the asker's turn at the origin, before waiting for another's."""
    ref, node = event.ref, event.node
    holder, until_ms = cluster.turns.get(ref, ("", 0))
    peers = _peers_with(cluster, event)
    if event.ended and holder == node:
        del cluster.turns[ref]
        return [AnswerSource(node, peers), WakeSources(ref)]
    if event.ended or peers:
        return [AnswerSource(node, peers)]
    if holder not in ("", node) and until_ms > now_ms:
        return [AnswerSource(node, wait_ms=until_ms - now_ms)]
    view = cluster.nodes.get(node)
    # Nobody waits for a node that could not hand the pack on.
    if view is not None and view.peer_url and (holder or len(cluster.turns) < TURNS_MAX):
        cluster.turns[ref] = (node, now_ms + TURN_MS)
    else:
        cluster.turns.pop(ref, None)
    return [AnswerSource(node, granted=True, wait_ms=TURN_MS // 3)]


def _peers_with(cluster: Cluster, event: SourceAsked) -> tuple[str, ...]:
    """Nodes that said they have the whole pack and can be asked for it; each asker gets its own order, so
    that many who want the same spread over those who have it. A draining node is the last resort."""
    text = str(event.ref)
    ranked = []
    for view in cluster.nodes.values():
        if view.node == event.node or view.node in event.failed:
            continue
        if view.silent or view.cloned or view.report is None or not view.peer_url:
            continue
        known = view.by_ref.get(text)
        if known is not None and known.packed:
            spread = hashlib.sha256(f"{text}|{event.node}|{view.node}".encode()).hexdigest()
            ranked.append((view.report.draining, spread, view.node))
    return tuple(entry[-1] for entry in sorted(ranked)[:PEERS_TRIED_MAX])


def _note_packs(cluster: Cluster, view: NodeView) -> list[Action]:
    """After a beat: who waits for a pack that this node has now need not wait any longer."""
    actions: list[Action] = []
    for ref, (holder, _) in list(cluster.turns.items()):
        known = view.by_ref.get(str(ref))
        if known is None or not known.packed:
            continue
        if holder == view.node:
            del cluster.turns[ref]
        if holder == view.node or view.peer_url:
            actions.append(WakeSources(ref))
    return actions


def _end_turns(cluster: Cluster, node: str) -> list[Action]:
    ended = [ref for ref, (holder, _) in cluster.turns.items() if holder == node]
    for ref in ended:
        del cluster.turns[ref]
    return [WakeSources(ref) for ref in ended]


# --- questions ------------------------------------------------------------------------------------


def knows(cluster: Cluster, node: str, seq: int) -> bool:
    """Whether the node has confirmed a plan of the present epoch that is not older than ``seq``."""
    view = cluster.nodes.get(node)
    return view is not None and view.have >= (cluster.newest[0], seq)
