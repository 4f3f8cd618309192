"""Events into and actions out of the residency core of one node.

Events are past facts, actions are orders. Covers: their shapes and what each field means. Does not
cover: what the core does with them (``residency``) or how they are carried out (``agent/loop.py``).
Every value here is plain data, so that a ring of (now, event, actions) can be dumped and replayed.

Slow orders carry a number, ``order``, and an answer may repeat it. The core then ignores an answer to an
order that it has given up (its worker died) even when an equal order is under way; 0 means not stated,
and the answer is taken for the order that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from packer.decisions import Forecast
from packer.estimate import Rates
from packer.shares import Share, TenantShare
from packer.types import HostForm, ModelRef, ModelSpec, TenantSpec, Tier


class RefusalReason(StrEnum):
    """Why a request was refused; the gateway maps each to one HTTP status and error code."""

    UNKNOWN_MODEL = "unknown_model"  # 404; also what a foreign model looks like
    RATE = "rate"  # 429: requests per minute
    TOKENS = "tokens"  # 429: tokens per minute
    DEVICE_TIME = "device_time"  # 429: device seconds per day
    RESTORE_RATE = "restore_rate"  # 429: restores per minute, and its turn would come too late
    CONCURRENCY = "concurrency"  # 429: requests in flight
    QUEUE_FULL = "queue_full"  # 429: too many are waiting already
    NEVER_FITS = "never_fits"  # 507: no waiting can help; detail has the arithmetic
    QUOTA_BYTES = "quota_bytes"  # 507: above the tenant's max bytes; detail has the arithmetic
    RESTORE_FAILED = "restore_failed"  # 503 (retryable) after every tier was tried
    MODEL_BROKEN = "model_broken"  # 422: the model itself can not be built; retrying can not help
    TIMEOUT = "timeout"  # 503: the request's deadline passed while it waited
    WORKER_DIED = "worker_died"  # 503, retryable
    DRAINING = "draining"  # 503, retryable: the node is leaving


# --- events: past facts ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """Control's newest plan was accepted: these are now all tenants and all model versions."""

    tenants: tuple[TenantSpec, ...]
    models: tuple[ModelSpec, ...]


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    """A device exists or changed. ``budget_bytes`` already excludes what foreign processes use."""

    device: str
    budget_bytes: int
    healthy: bool = True
    # Can memory be given back chunk by chunk? False: a model leaves it whole.
    partial: bool = True


@dataclass(frozen=True, slots=True)
class TierBudgetSeen:
    """The host or disk tier may hold this many bytes from now on."""

    tier: Tier
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class RatesSeen:
    """What the node measured of itself, and the form in which its host tier keeps weights from now on."""

    rates: Rates
    host_form: HostForm = HostForm.STORED
    on_cuda: bool = False


@dataclass(frozen=True, slots=True)
class SharesSeen:
    """This node's part of every tenant's limits from now on: ``shares`` of those named, ``rest`` of all
    others. What a tenant's share grows by comes with its lags. At ``halve_at_ms`` all of it halves, unless
    another one comes before; None: it stays. ``used_up``: after a restart; what of it is left nobody knows.
    """

    rest: Share
    shares: tuple[TenantShare, ...] = ()
    halve_at_ms: int | None = None
    used_up: bool = False


@dataclass(frozen=True, slots=True)
class PolicyChosen:
    """The eviction policy of all tiers from now on, by its name in ``policies``; ``keep`` until said."""

    policy: str


@dataclass(frozen=True, slots=True)
class PackFound:
    """At start-up: a complete pack of this version is on disk. ``host_bytes``: its size when opened.
    ``disk_bytes`` and ``read_bytes`` as in ``Packed``."""

    ref: ModelRef
    disk_bytes: int
    host_bytes: int
    read_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PackBegun:
    """A pack that an interrupted load left takes this much on disk: at start-up, or 0 when its file was
    removed without an order. A pack that is there or being written knows better."""

    ref: ModelRef
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Requested:
    """A caller wants to use a model; ``request`` is unique for the life of the process.

    ``tokens`` is an estimate of what it will read and write; it counts as used until ``Finished``.
    """

    request: str
    ref: ModelRef
    deadline_ms: int
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The caller left before it was answered (granted or not; the core copes with both)."""

    request: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A granted request is over, well or badly. ``tokens`` were read and written."""

    request: str
    device_ms: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TookLate:
    """A tenant's worker computed on for a request after its caller had left, and is done with it now."""

    tenant: str
    device_ms: int


@dataclass(frozen=True, slots=True)
class PrefetchChosen:
    """May host copies be filled ahead of need? Not, until said."""

    on: bool


@dataclass(frozen=True, slots=True)
class LendingChosen:
    """The share of what takings may cost its owner that credit must cover, in percent; see ``lending``."""

    margin_percent: int


@dataclass(frozen=True, slots=True)
class DebtFound:
    """At start-up: what a tenant owed in cold milliseconds before the restart (negative: its credit).
    After the first ``Planned``, which says what it has reserved."""

    tenant: str
    debt_ms: int


@dataclass(frozen=True, slots=True)
class SpentFound:
    """At start-up: what a tenant owed ``ago_ms`` ago, before the restart. After the first ``Planned``,
    which says its limits; a tenant that is not planned owes nothing."""

    tenant: str
    tokens: int
    device_ms: int
    ago_ms: int


@dataclass(frozen=True, slots=True)
class UsesRemembered:
    """At start-up: what was known of a model's uses and restores ``ago_ms`` ago, before the restart; see
    ``remember``. After the first ``Planned``, before its ``PackFound``."""

    ref: ModelRef
    uses: tuple[float, ...]
    restores: str
    ago_ms: int


@dataclass(frozen=True, slots=True)
class NodeRemembered:
    """At start-up: what all models had in common ``ago_ms`` ago. Before the first ``UsesRemembered``."""

    shared: tuple[float, ...]
    restores: str
    ago_ms: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The bytes ordered by ``Restore`` are on the device and the model can answer.

    ``restored_bytes`` is how many raw bytes were moved; 0: not stated, all that the order named.
    """

    ref: ModelRef
    device: str
    from_tier: Tier
    restore_ms: int
    host_filled: bool = False  # the host segment that the order reserved now holds a full copy
    order: int = 0
    restored_bytes: int = 0
    cached: bool | None = None  # the file was in the page cache; None: nobody looked


@dataclass(frozen=True, slots=True)
class ServingBegun:
    """The model of a running ``Restore`` takes requests from now on: its worker computes on the layers that
    are there while the others come. ``Restored`` or ``RestoreFailed`` still follows; ``restored_bytes`` are
    what it will have moved."""

    ref: ModelRef
    device: str
    order: int = 0
    restored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ServingEnded:
    """The model of a running ``Restore`` takes requests no more until it is all there: bytes that it was to
    compute on turned out bad. ``Restored`` or ``RestoreFailed`` still follows; who was let in ends with the
    worker's error. Of a model that takes none it says nothing."""

    ref: ModelRef
    device: str
    order: int = 0


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """``corrupt``: the copy in ``from_tier`` is bad and must be dropped. ``broken``: the model itself
    can not be built whatever tier it comes from. Neither: a passing fault, another try may help.

    ``kept_chunks``: how many of its first chunks the worker still holds, at most the order's
    ``first_chunk``; whatever else it held of the model is free when this is said.
    """

    ref: ModelRef
    device: str
    from_tier: Tier
    message: str
    corrupt: bool = False
    broken: bool = False
    order: int = 0
    kept_chunks: int = 0


@dataclass(frozen=True, slots=True)
class Evicted:
    """The device bytes ordered away by ``Evict`` are free again."""

    ref: ModelRef
    device: str
    order: int = 0


@dataclass(frozen=True, slots=True)
class Packed:
    """A complete, fsynced, renamed pack is on disk. ``order`` is that of the ``Pack``, or the
    ``pack_order`` of the ``Restore`` beside which it was written: then it may come before, after or
    without a ``Restored``.

    ``disk_bytes``: what its own file takes. ``read_bytes``: what a restore reads, which is more when parts of
    it lie in files that other versions are charged for; 0: the same."""

    ref: ModelRef
    device: str
    disk_bytes: int
    host_bytes: int
    order: int = 0
    read_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PackFailed:
    """No pack was written (full disk, worker gone, load failed). Of its file ``kept_bytes`` lie there, for a
    later load to go on with; 0: no file of it takes room. The model goes on serving from the device, if it
    is there."""

    ref: ModelRef
    device: str
    message: str
    order: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Dropped:
    """The copy in a tier ordered away by ``Drop`` is gone for good.

    ``charged``: packs of the same tenant that have parts in its file, and what each of them is charged on
    disk from now on: what was kept of that file for their sake is on one of them."""

    ref: ModelRef
    tier: Tier
    order: int = 0
    charged: tuple[tuple[ModelRef, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Filled:
    """The host segment ordered by ``Fill`` holds a full copy."""

    ref: ModelRef
    order: int = 0


@dataclass(frozen=True, slots=True)
class FillFailed:
    """There is no such host segment. ``stopped``: because it was told to stop."""

    ref: ModelRef
    message: str
    order: int = 0
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The process that held a tenant's weights on a device is gone, and all it held with it."""

    tenant: str
    device: str


@dataclass(frozen=True, slots=True)
class FootprintSeen:
    """What requests of a model need beside its weights, as measured; it replaces the first estimate."""

    ref: ModelRef
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The node leaves: refuse new requests, let granted ones finish. ``drain`` False: it stays after all."""

    drain: bool = True


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody wants to know what a request for this model would meet now; answered by ``Answer``. It goes
    through the core like a fact, so that the answer is of one moment, and changes nothing."""

    question: str
    ref: ModelRef


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed; asked for by ``Wake``."""


Event = (
    Planned
    | DeviceSeen
    | TierBudgetSeen
    | RatesSeen
    | SharesSeen
    | PolicyChosen
    | PrefetchChosen
    | LendingChosen
    | PackFound
    | PackBegun
    | Requested
    | Cancelled
    | Finished
    | TookLate
    | SpentFound
    | DebtFound
    | UsesRemembered
    | NodeRemembered
    | Restored
    | ServingBegun
    | ServingEnded
    | RestoreFailed
    | Evicted
    | Packed
    | PackFailed
    | Dropped
    | Filled
    | FillFailed
    | WorkerDied
    | FootprintSeen
    | DrainAsked
    | Asked
    | Ticked
)


# --- actions: orders ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Restore:
    """Bring the chunks from ``first_chunk`` to the end onto the device from ``from_tier``.

    ``first_chunk`` > 0 (never from the origin): the chunks before it are there, left by an ``Evict`` that
    kept them. 0: all chunks are brought; if some are there, they are given up first.
    ``host_bytes`` > 0: also fill a host segment of at most that size on the way (disk only). It gets all
    chunks: those before ``first_chunk`` are read for it alone.
    ``disk_bytes`` > 0: also write a pack of at most that size beside the load (origin only).
    Answered by ``Restored``, ``RestoreFailed`` or ``WorkerDied``; with ``disk_bytes`` also, before or
    after it, by exactly one ``Packed`` or ``PackFailed`` that carries ``pack_order``, even when the load
    failed or the worker died: only this answer says that no file is left behind unaccounted.
    """

    ref: ModelRef
    device: str
    from_tier: Tier
    first_chunk: int = 0
    host_bytes: int = 0
    order: int = 0
    disk_bytes: int = 0
    pack_order: int = 0


@dataclass(frozen=True, slots=True)
class Evict:
    """Free the device bytes of the chunks from ``keep_chunks`` to the end, and the workspace. Answered by
    ``Evicted`` once they are free. ``keep_chunks`` > 0: the chunks before it stay where they are, for a
    ``Restore`` from there on; the model can not run meanwhile."""

    ref: ModelRef
    device: str
    keep_chunks: int = 0
    order: int = 0


@dataclass(frozen=True, slots=True)
class Pack:
    """Write the pack from the device copy, at most ``disk_bytes``. Answered by ``Packed``/``PackFailed``,
    also when the worker dies: only this answer says that no file is left behind unaccounted."""

    ref: ModelRef
    device: str
    disk_bytes: int
    order: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove the copy in the host or disk tier. Answered by ``Dropped``."""

    ref: ModelRef
    tier: Tier
    order: int = 0


@dataclass(frozen=True, slots=True)
class Fill:
    """Fill a host segment of at most ``host_bytes`` from the pack, ahead of need and on no device. Answered
    by ``Filled`` or ``FillFailed``. One at a time."""

    ref: ModelRef
    host_bytes: int
    order: int = 0


@dataclass(frozen=True, slots=True)
class StopFill:
    """Somebody needs the disk: end the ``Fill`` of this number. Its own answer says that it has ended."""

    ref: ModelRef
    order: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """The request may run now on this device. ``tier`` is where the weights were when it arrived;
    ``restore_ms`` is the time from its arrival to this grant if it had to wait for a restore, else 0."""

    request: str
    ref: ModelRef
    device: str
    tier: Tier
    restore_ms: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request will not run. ``retry_ms``: when to come back, None when waiting can not help."""

    request: str
    reason: RefusalReason
    detail: str
    retry_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Wake:
    """Send ``Ticked`` at or soon after this time."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Answer:
    """To ``Asked``: what a request would meet."""

    question: str
    forecast: Forecast


Action = Restore | Evict | Pack | Drop | Fill | StopFill | Grant | Refuse | Wake | Answer
