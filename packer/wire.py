"""Messages between a node and control: their shapes and the one encode/decode.

Covers: join, beat, plan, report, where packs are to be had, and the version check. Does not cover: how
they travel (the node dials, HTTPS with mutual TLS: ``agent/uplink.py`` and ``control/routes/nodes.py``).

Decoding is strict (msgspec): a missing, unknown-typed or oversized field is an error that names its
path; unknown fields are ignored, so that a newer peer may add some.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from packer.lending import LendingView
from packer.questions import Question
from packer.rates import RateView
from packer.shares import Share, TenantShare
from packer.types import KeySpec, ModelSpec, TenantSpec
from packer.usage import UsageRow

# Raised by one when a message changes so that an older peer would misread it.
WIRE_VERSION = 1
# A plan of 10,000 versions with 1,000 chunks each stays below this; more is a mistake or an attack.
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
# One beat carries at most this many spooled records; the rest waits for the next beat.
SPOOL_RECORDS_MAX = 1000
# Nodes that one ask names as failed, and one answer as peers: more than that are not tried.
PEERS_TRIED_MAX = 8

# What a report says ends up in sums, in 64-bit columns and in JSON that browsers read.
NUMBER_MAX = 2**53
# Names in a report; the longest is that of a place of many GPUs.
TEXT_CHARS_MAX = 4_096
# Of one version or tenant in a report: tiers that it was restored from, devices of its place, rates.
PARTS_MAX = 64

T = TypeVar("T")
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=-NUMBER_MAX, le=NUMBER_MAX)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=TEXT_CHARS_MAX)]


class BadMessage(ValueError):
    """A message does not decode; the text names the path and what was expected."""


@dataclass(frozen=True, slots=True)
class JoinAsk:
    """First contact: a join token's id and secret, and a certificate request for the node's own key."""

    version: int
    token_id: str
    token_secret: str
    csr_pem: str
    name: str  # the node's name, kept across restarts
    gateway_url: str  # where routers and tenants reach this node's gateway


@dataclass(frozen=True, slots=True)
class JoinAnswer:
    version: int
    cluster: str
    node: str
    certificate_pem: str  # chain, leaf first
    ca_pem: str


@dataclass(frozen=True, slots=True)
class RenewAsk:
    version: int
    csr_pem: str


@dataclass(frozen=True, slots=True)
class LateRenewAsk:
    """Renewal by a node whose certificate expired while control was away: the last certificate that it had,
    and a request signed by the same key."""

    version: int
    csr_pem: str
    certificate_pem: str  # chain, leaf first


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """Another node of the cluster: who may ask for packs, and where they are asked for.

    ``key_sha256`` is of the SubjectPublicKeyInfo in its certificates, so that a node that was removed and
    joined anew is another one. In a plan ``peer_url`` is empty: addresses change more often than nodes do.
    """

    node: str
    key_sha256: str
    peer_url: str = ""


@dataclass(frozen=True, slots=True, order=True)
class PlanNumber:
    """Which plan is newer: a higher epoch, then a higher sequence. ``start`` is a name that control gives
    itself at every start: a backup that was put back counts epochs again that others have counted."""

    epoch: int
    seq: int
    start: str = field(default="", compare=False)


NO_PLAN = PlanNumber(0, 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """Control's numbered wish. A node ignores a plan of another cluster or node, of a lower epoch, of a
    sequence that is not higher than what it has, or one that comes after ``expires_ms``. A plan in force
    stays in force while control is away, however old it is."""

    version: int
    cluster: str
    node: str
    epoch: int
    seq: int
    tenants: tuple[TenantSpec, ...]
    keys: tuple[KeySpec, ...]
    models: tuple[ModelSpec, ...]
    draining: bool = False
    # All nodes of the cluster: whom this node may give packs to. With ``peers_base`` only what is new since
    # the list known by it, without ``peers_gone``; see ``packer.peer_lists``.
    peers: tuple[PeerSpec, ...] = ()
    start: str = ""  # of the control that made it; see ``PlanNumber``
    ticket_keys: tuple[str, ...] = ()  # public keys of who signs tickets; see ``packer.tickets``
    expires_ms: int = 0  # control's wall clock: taken up before, or not at all; 0: made by an earlier release
    peers_base: str = ""
    peers_gone: tuple[str, ...] = ()
    peers_sha256: str = ""  # what the whole list is known by; empty: made by an earlier release
    routers: tuple[
        PeerSpec, ...
    ] = ()  # processes of their own that may call this node as control's router does

    @property
    def number(self) -> PlanNumber:
        return PlanNumber(self.epoch, self.seq, self.start)


@dataclass(frozen=True, slots=True)
class DeviceReport:
    device: Text  # "cpu:0", "cuda:GPU-<uuid>"
    kind: Text  # "cpu" or "cuda"
    name: Text  # "cpu" or the product name of the GPU
    budget_bytes: Number
    used_bytes: Number  # held in the ledger: weights and workspace, in flight counted
    foreign_bytes: Number
    healthy: bool


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """Restores of one model from one tier since the agent started."""

    from_tier: Text
    count: Number
    restore_ms_p50: Number
    restore_ms_max: Number


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What of a gang is on one of its devices."""

    device: Text
    held_bytes: Number


@dataclass(frozen=True, slots=True)
class ModelReport:
    """Where a version's bytes are on this node and what it has done since the agent started. ``device`` is
    its place; see ``gangs.place_name``."""

    ref: Text
    state: Text  # "resident", "restoring", "evicting", "absent"
    device: Text | None
    leases: Number
    waiting: Number
    device_bytes: Number
    host_bytes: Number
    disk_bytes: Number
    requests: Number
    answers: Number
    restores: Annotated[tuple[RestoreReport, ...], msgspec.Meta(max_length=PARTS_MAX)]
    last_used_ms: Number  # wall clock, 0 when never
    restore_ms_estimate: Number = 0  # expected time until it could answer; 0 when it is resident
    packed: bool = False  # a complete pack is on disk; ``disk_bytes`` counts one in the making as well
    deduplicated_bytes: Number = 0  # of the image, not in its pack's file because an equal chunk is stored
    workspace_bytes: Number = 0  # what requests need beside the weights
    workspace_measured: bool = False  # as requests were seen to need it; False: the first estimate
    shares: Annotated[
        tuple[DeviceShare, ...], msgspec.Meta(max_length=PARTS_MAX)
    ] = ()  # of a gang, in the order of its devices


@dataclass(frozen=True, slots=True)
class TenantReport:
    """A tenant's use of this node against its quota."""

    tenant: Text
    device_bytes: Number
    host_bytes: Number
    disk_bytes: Number
    in_flight: Number
    requests: Number
    answers: Number
    refusals: Number
    tokens: Number
    device_ms: Number
    rates: Annotated[tuple[RateView, ...], msgspec.Meta(max_length=PARTS_MAX)] = ()  # those that are limited
    lending: LendingView = field(default_factory=LendingView)


@dataclass(frozen=True, slots=True)
class AccuracyReport:
    """How far the estimates of restores from one tier were off, of the real time, lately."""

    from_tier: Text
    count: Number
    error_percent_p50: Number
    error_percent_p95: Number


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a node measured of itself. ``rates`` are bytes per second by name."""

    measured_ms: Number  # wall clock
    fingerprint: Text
    host_form: Text
    kernels: bool
    huge_pages: bool
    others_percent: Number  # of the cores' time, used by others meanwhile
    rates: dict[str, Number]
    accuracy: tuple[AccuracyReport, ...] = ()


@dataclass(frozen=True, slots=True)
class RegretReport:
    """What a node's restores took, and what they would have taken by other choices; see ``regret``."""

    uses: Number
    counted: Number
    window_ms: Number
    actual_ms: Number
    lru_ms: Number
    optimum_ms: Number
    bound_ms: Number
    at_ms: Number = 0  # wall clock of the replay


@dataclass(frozen=True, slots=True)
class Report:
    """A node's state, sent with every beat."""

    gateway_url: Text
    started_ms: Number
    draining: bool
    devices: tuple[DeviceReport, ...]
    host_budget_bytes: Number
    host_used_bytes: Number
    disk_budget_bytes: Number
    disk_used_bytes: Number
    models: tuple[ModelReport, ...]
    tenants: tuple[TenantReport, ...]
    peer_url: Text = ""  # where other nodes fetch packs from; empty when this node shares none
    calibration: str = ""  # what the node measured of itself, as JSON; empty before
    regret: str = ""  # a ``RegretReport`` as JSON; empty before the first replay
    route_url: Text = ""  # where control's router calls this node, over mutual TLS; empty: nowhere


@dataclass(frozen=True, slots=True)
class Record:
    """One spooled fact (an event for ``bunk events``). ``seq`` makes delivery idempotent."""

    seq: int
    at_ms: int  # wall clock
    kind: str  # "restored", "evicted", "refused", "worker_died", "packed", "pack_failed", "dropped" …
    tenant: str
    model: str
    detail: str


@dataclass(frozen=True, slots=True)
class BoxFacts:
    """What tells a machine from another with the same identity; shown to people, trusted by nobody."""

    host: str = ""
    boot: str = ""  # changes at every start of the machine
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Beat:
    """Node to control. ``wait_ms`` > 0 makes it a long poll: control answers when it has a plan newer
    than ``have_epoch``/``have_seq``, or when the time is up."""

    version: int
    node: str
    have_epoch: int
    have_seq: int
    wait_ms: int
    report: Report
    records: tuple[Record, ...] = ()
    have_start: str = ""  # of the plan that it has; empty: made by a control of an earlier release
    spool: str = ""  # what counts the records; a node that joins again goes on with the same one
    life: str = ""  # of the node's process: its beats count from 1
    number: int = 0
    told: str = ""  # the newest ``told`` of control's answers that this process has had
    sent_ms: int = 0  # the node's wall clock; 0: a node of an earlier release
    ca_sha256: str = ""  # of the text of the CA certificates that the node trusts
    box: BoxFacts = field(default_factory=BoxFacts)
    have_peers: str = ""  # what the list of peers is known by that the sender has; empty: none
    usage: tuple[UsageRow, ...] = ()  # what tenants used, under a number that only these rows have
    usage_seq: int = 0  # 0: none; counted with ``spool``

    @property
    def have(self) -> PlanNumber:
        return PlanNumber(self.have_epoch, self.have_seq, self.have_start)


@dataclass(frozen=True, slots=True)
class BeatAnswer:
    version: int
    plan: Plan | None
    acked_seq: int  # highest record sequence that control has stored
    questions: tuple[Question, ...] = ()  # answered by ``Replies`` at once
    now_ms: int = 0  # control's wall clock; 0: of an earlier release, which does not say
    shares: bool = False  # come for an exchange of shares at once: others want what this node has
    life: str = ""  # which beat this answers; empty: a control of an earlier release
    number: int = 0
    told: str = ""  # repeated by the node's next beats: proof that it was alive after this
    ca_pem: str = ""  # the CAs to trust from now on; empty: those that the node has
    usage_acked: int = 0  # highest ``usage_seq`` that control has added up; 0: not said


@dataclass(frozen=True, slots=True)
class SourcesAsk:
    """Where should this node get a pack from? Control answers at once, or within ``wait_ms`` when
    somebody else reads the origin for all. Asked again it renews the asker's turn at the origin."""

    version: int
    ref: str
    wait_ms: int = 0
    failed: tuple[str, ...] = ()  # nodes that could not give it
    ended: bool = False  # the asker reads no origin (any more) and only wants to know of peers


class OriginTurn(StrEnum):
    """Whether the asker may read the origin now."""

    GRANTED = "granted"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class SourcesAnswer:
    """``peers`` have the pack, the best first. ``wait_ms``: ask again within this time, to renew a turn
    that was granted, or because the one whose turn it is may be done by then."""

    version: int
    origin: OriginTurn
    peers: tuple[PeerSpec, ...] = ()
    wait_ms: int = 0


@dataclass(frozen=True, slots=True)
class SharesAsk:
    """What a node holds of the limits of its tenants, and what it wants; see ``control/shares.py``.
    ``rest``: of tenants that are not named."""

    version: int
    session: str  # as control named it; empty at first
    number: int  # of the exchange
    rest: Share
    shares: tuple[TenantShare, ...] = ()
    wait_ms: int = 0  # answer within this time, as soon as there is more
    lasting: bool = False  # what it holds does not halve (any more)
    divided: bool = False  # as it was told last
    begun: bool = False  # nothing was answered to this process yet


@dataclass(frozen=True, slots=True)
class SharesAnswer:
    """All that the node may have from now on. ``known`` False: the session is new, nothing else is said but
    to a node that is alone."""

    version: int
    session: str
    number: int
    rest: Share
    shares: tuple[TenantShare, ...] = ()
    lasting: bool = False
    divided: bool = False
    known: bool = True


def encode(message: object) -> bytes:
    """JSON bytes of a message dataclass."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """Decode and check one message; raises ``BadMessage``."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadMessage(f"message of {len(data)} bytes is above the limit of {MESSAGE_BYTES_MAX} bytes")
    try:
        message = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise BadMessage(f"{kind.__name__}: {error}") from None
    version = getattr(message, "version", WIRE_VERSION)
    if version != WIRE_VERSION:
        raise BadMessage(
            f"{kind.__name__}: wire version {version}, this side speaks {WIRE_VERSION}: upgrade the older"
        )
    return message
