"""What the cluster core takes in, past facts, and what it gives out, orders. Values only.

Covers: their shapes. Does not cover: what follows from them (``control.cluster``, which names them too).
"""

from __future__ import annotations

from dataclasses import dataclass

from packer.types import ModelRef
from packer.wire import Report

# --- events: past facts ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node exists (it joined now, or control started and remembers it)."""

    node: str
    gateway_url: str


@dataclass(frozen=True, slots=True)
class NodeRemoved:
    node: str


@dataclass(frozen=True, slots=True)
class Cloned:
    """Two boxes use the node's identity (``control.lives``), or one is left. Two are sent nothing."""

    node: str
    two: bool


@dataclass(frozen=True, slots=True)
class NodeBeat:
    """A node reported; ``waits`` says that it holds the line for a plan newer than it has."""

    node: str
    report: Report
    have_epoch: int
    have_seq: int
    waits: bool
    life: str = ""  # of the node's process; empty: not stated
    number: int = 0  # of the beats of one life, rising


@dataclass(frozen=True, slots=True)
class NodeTold:
    """What control says of a node, to a router that hears no node itself. ``report`` None: control has not
    heard it since it started. ``load``: requests in flight there, which the report does not say."""

    node: str
    report: Report | None
    have_epoch: int
    have_seq: int
    load: int
    silent: bool = False
    cloned: bool = False


@dataclass(frozen=True, slots=True)
class PollEnded:
    """The node's long poll ended without a plan (time is up, or the line broke)."""

    node: str


@dataclass(frozen=True, slots=True)
class Changed:
    """There is a newer plan."""

    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Routed:
    """A request for ``ref``, of ``share_bytes`` on each of ``devices``, was sent to ``node``. ``wait_ms``: it
    waits there so long for others of a version that may have copies; None: of one that may have none."""

    node: str
    ref: ModelRef
    share_bytes: int = 0
    devices: int = 1
    wait_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Pointed:
    """Somebody was told to call ``node`` for ``ref`` itself; nobody tells when, or how that ends."""

    node: str
    ref: ModelRef
    share_bytes: int = 0
    devices: int = 1


@dataclass(frozen=True, slots=True)
class OthersSeen:
    """``node`` has just reported of a version that may have copies. ``together``: so many requests for it are
    worked on at one time; ``grows``: one more copy may come, and none is on its way."""

    node: str
    ref: ModelRef
    together: int
    grows: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """A routed request ended, however; ``reached`` is False when the node could not be talked to. ``status``
    of its answer, if there was one."""

    node: str
    reached: bool
    ref: ModelRef | None = None
    status: int = 200


@dataclass(frozen=True, slots=True)
class SourceAsked:
    """A node needs a pack of ``ref``; ``failed`` are peers that could not give it. ``ended``: it is done
    with the origin and has no pack, or only asks for peers."""

    node: str
    ref: ModelRef
    failed: tuple[str, ...] = ()
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed."""


Event = (
    NodeJoined
    | NodeRemoved
    | Cloned
    | NodeBeat
    | NodeTold
    | PollEnded
    | Changed
    | Routed
    | Pointed
    | OthersSeen
    | Answered
    | SourceAsked
    | Ticked
)


# --- actions: orders ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendPlan:
    """Answer the node's beat with the plan of this number."""

    node: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class EndPoll:
    """Answer the node's long poll without a plan: it was removed, or there are two of it."""

    node: str


@dataclass(frozen=True, slots=True)
class NoteSilent:
    """The node has not been heard of for too long."""

    node: str
    silent_ms: int


@dataclass(frozen=True, slots=True)
class NoteBack:
    """A silent node is heard again."""

    node: str


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """Answers a ``SourceAsked``: these peers have it, the best first; ``granted``: read the origin.
    ``wait_ms``: ask again within this time (see ``wire.SourcesAnswer``)."""

    node: str
    peers: tuple[str, ...] = ()
    granted: bool = False
    wait_ms: int = 0


@dataclass(frozen=True, slots=True)
class WakeSources:
    """Nodes that wait for a pack of ``ref`` must ask again: there is one, or a turn is free."""

    ref: ModelRef


Action = SendPlan | EndPoll | NoteSilent | NoteBack | AnswerSource | WakeSources
