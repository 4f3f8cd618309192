"""The public values: what calls return and what some of them take.

Covers: frozen dataclasses only. Does not cover: how they are read from the wire (``_decode``), or
errors (``_errors``). Sizes are bytes and times are milliseconds, as their names say; ``_ms`` values
that are points in time count from the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Served:
    """How one answer came to be: from the ``x-request-id`` and ``x-bunkhouse-*`` response headers.

    ``tier`` is where the weights were when the request arrived (``device`` means warm) and
    ``restore_ms`` how long it took to bring them to the device. None when the header is absent.
    """

    request_id: str | None = None
    node: str | None = None
    tier: str | None = None
    restore_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector per input, in the order of the inputs."""

    model: str
    vectors: list[list[float]]
    prompt_tokens: int
    served: Served


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated text, from ``chat`` or ``complete``."""

    model: str
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    served: Served


@dataclass(frozen=True, slots=True)
class Label:
    """The class of one input: its name, and the probability of every class by position."""

    label: str
    probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Classification:
    """One label per input, in the order of the inputs."""

    model: str
    labels: tuple[Label, ...]
    prompt_tokens: int
    served: Served


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a version: relative path, exact size, sha256 in hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Model:
    """One immutable version of a model. ``ref`` is ``tenant/name@version``.

    ``batch_max`` inputs share a forward pass; the first of them waits ``batch_delay_ms`` for company.
    ``devices`` of one node hold it together; ``replicas`` nodes may hold a copy each. ``warnings``: about a
    change that was made, in what ``set_model`` returns alone.
    """

    ref: str
    tenant: str
    name: str
    version: str
    latest: bool
    task: str
    engine: str
    image_bytes: int
    workspace_bytes: int
    origin: str
    created_ms: int
    files: tuple[ModelFile, ...] = ()
    batch_max: int = 1
    batch_delay_ms: int = 0
    devices: int = 1
    replicas: int = 1
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tenant:
    """An account, and how many keys and models (by name) it has."""

    tenant: str
    created_ms: int | None = None
    keys: int | None = None
    models: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as it may be listed: never its secret."""

    key_id: str
    tenant: str | None  # None: an operator's key
    label: str | None = None
    created_ms: int | None = None
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just created. ``key`` is the only copy of its text there will ever be; ``repr`` hides it."""

    key_id: str
    tenant: str | None
    key: str = field(repr=False)
    label: str | None = None
    created_ms: int | None = None
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class ByteQuota:
    """Bytes of one tier on one node: ``reserved`` is guaranteed, ``max`` is hard (None: no cap)."""

    reserved: int = 0
    max: int | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """Everything a tenant is promised and limited to on one node. None means not limited."""

    device: ByteQuota = ByteQuota()
    host: ByteQuota = ByteQuota()
    disk: ByteQuota = ByteQuota()
    requests_per_minute: int | None = None
    concurrency: int | None = None
    weight: int = 1
    priority: int = 0
    tokens_per_minute: int | None = None
    restores_per_minute: int | None = None
    device_seconds_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class RateUse:
    """A limited rate on one node: ``name`` as in ``Quota``, ``burst`` may come at once after a silence,
    ``remaining`` of it now, all of it in ``reset_ms``."""

    name: str
    limit: int
    burst: int
    remaining: int
    reset_ms: int


@dataclass(frozen=True, slots=True)
class Lending:
    """How a tenant stands with its reserved device bytes on one node.

    ``debt_ms``: what its restores took beyond what they would have taken alone on its reserve; negative is
    credit, for which ``lent_bytes`` of it are in others' hands; None: only the operator's key is told.
    ``protected``: nothing may be lent now.
    """

    debt_ms: int = 0
    lent_bytes: int | None = None
    borrowed_bytes: int = 0  # held beyond the reserve
    excused_ms: int = 0  # lost to faults and to what can not be divided, and not counted as debt
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """A tenant's use of one node, counted since that node's agent started."""

    node: str | None
    tenant: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    in_flight: int
    requests: int
    answers: int
    refusals: int
    tokens: int
    device_ms: int
    rates: tuple[RateUse, ...] = ()
    lending: Lending = field(default_factory=Lending)


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """A tenant's quota and its use on each node. ``warnings``: promises that can not all be kept.

    ``etag``: what ``set_quota(if_match=…)`` takes, to change what you saw and nothing newer.
    """

    tenant: str
    quota: Quota
    usage: tuple[Usage, ...]
    warnings: tuple[str, ...] = ()
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a node. ``foreign_bytes`` is what processes that are not ours hold there."""

    node: str | None
    device: str
    kind: str
    name: str
    budget_bytes: int
    used_bytes: int
    foreign_bytes: int
    healthy: bool


@dataclass(frozen=True, slots=True)
class EstimateErrors:
    """How far a node's estimates of restores from one tier were off lately, in percent of the real time."""

    from_tier: str
    count: int
    error_percent_p50: int
    error_percent_p95: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a node measured of itself: bytes per second by name, and the host form that follows."""

    measured_ms: int
    host_form: str
    kernels: bool
    huge_pages: bool
    others_percent: int
    rates: dict[str, int]
    accuracy: tuple[EstimateErrors, ...]


@dataclass(frozen=True, slots=True)
class Regret:
    """What a node's restores took within a window, and what they would have taken: under LRU on whole
    models, by the clairvoyant optimum, and by the least that any schedule could take."""

    at_ms: int
    window_ms: int
    uses: int
    counted: int  # of the uses: the first of each model is nobody's merit
    actual_ms: int
    lru_ms: int
    optimum_ms: int
    bound_ms: int

    @property
    def ratio(self) -> float | None:
        """Actual over optimum; None when a clairvoyant node would have paid nothing."""
        return self.actual_ms / self.optimum_ms if self.optimum_ms else None


@dataclass(frozen=True, slots=True)
class About:
    """Which server answered, its clock, and the key that asked. ``tenant`` None: an operator's."""

    version: str
    now_ms: int
    key_id: str
    tenant: str | None
    expires_ms: int | None


@dataclass(frozen=True, slots=True)
class Node:
    """A box that joined. ``state``: up, draining, drained (nothing runs there any more), silent, unheard (not
    since control started), or cloned (two boxes use its identity). ``route_url``: where the router calls it
    over mutual TLS; None: nowhere."""

    node: str
    state: str
    gateway_url: str | None
    joined_ms: int | None
    heard_ago_ms: int | None
    devices: tuple[Device, ...]
    host_budget_bytes: int
    host_used_bytes: int
    disk_budget_bytes: int
    disk_used_bytes: int
    calibration: Calibration | None = None
    regret: Regret | None = None
    pool: str = "default"
    route_url: str | None = None
    clock_skew_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Router:
    """A router that is a process of its own. ``state``: up, silent, unheard (not since control started), or
    cloned (two boxes use its identity). ``behind``: changes that it has not taken up yet; None: not known."""

    router: str
    state: str
    url: str | None
    peer: str | None
    joined_ms: int | None
    heard_ago_ms: int | None
    behind: int | None = None
    in_flight: int = 0
    calls: int = 0
    release: str | None = None
    clock_skew_ms: int | None = None


@dataclass(frozen=True, slots=True)
class NodeToken:
    """A join token: single use, short-lived. ``repr`` hides its text."""

    token_id: str
    token: str = field(repr=False)
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Restores:
    """Restores of one model from one tier since the node's agent started."""

    from_tier: str
    count: int
    restore_ms_p50: int
    restore_ms_max: int


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What of a model on several devices is on one of them."""

    device: str
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a version's bytes are on one node, and what it has done there."""

    node: str
    ref: str
    state: str
    device: str | None
    leases: int
    waiting: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    requests: int
    answers: int
    restores: tuple[Restores, ...]
    last_used_ms: int  # 0 when never
    restore_ms_estimate: int = 0  # expected time until it could answer; 0 when it is on a device
    workspace_bytes: int = 0  # what requests need beside the weights
    workspace_measured: bool = False  # as requests were seen to need it; False: the first estimate
    # Bytes of the weights that its pack does not store again: equal ones are stored for this tenant.
    deduplicated_bytes: int = 0
    shares: tuple[DeviceShare, ...] = ()  # of a model on several devices, in their order


@dataclass(frozen=True, slots=True)
class Placements:
    """What ``ps`` returns: a row per model and node, and the devices (an operator sees all)."""

    items: tuple[Placement, ...]
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One fact that a node or control recorded."""

    id: int
    node: str | None
    at_ms: int
    kind: str
    tenant: str
    model: str
    detail: str


@dataclass(frozen=True, slots=True)
class Events:
    """A page of events, oldest first. Pass ``next`` as ``after`` to continue."""

    items: tuple[Event, ...]
    next: int


@dataclass(frozen=True, slots=True)
class UsageItem:
    """What was used of one model in an hour, a day (UTC) or in all, beginning at ``begin_ms`` (0: in all). By
    key it is of all models in all, and ``key_id`` says of which key, revoked ones included.

    ``requests`` were let in, and ``answers`` of them went well to their end. ``model`` is empty for device
    time of answers whose callers had left. ``restored_*_bytes`` were moved to a device from that tier.
    """

    tenant: str
    model: str
    begin_ms: int
    requests: int
    answers: int
    prompt_tokens: int
    completion_tokens: int
    device_ms: int
    restored_host_bytes: int
    restored_disk_bytes: int
    restored_origin_bytes: int
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that goes from its device, wholly or down to its first ``kept_chunks`` chunks.

    ``keep_index``: the milliseconds of restoring that keeping one GiB of it saves per second.
    """

    ref: str
    device: str
    freed_bytes: int
    kept_chunks: int
    keep_index: float | None
    in_use: bool
    moves_to: str | None  # the device that it moves to; None: it is evicted


@dataclass(frozen=True, slots=True)
class Others:
    """Models of other tenants among the victims: how many, and how many bytes they give."""

    count: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """A device in a forecast and why it is, or is not, the one. Operators only."""

    device: str
    budget_bytes: int
    used_bytes: int
    needed_bytes: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a request for a model would meet on one node at this moment.

    ``outcome``: resident, restoring, fits, evicts, waits, refused, or None when the node did not answer
    (``reason`` says so). The node goes on living: the next request meets this unless something else
    happens first.
    """

    node: str
    outcome: str | None
    reason: str
    device: str | None
    from_tier: str | None
    restore_bytes: int
    restore_ms: int
    victims: tuple[Victim, ...]
    victims_left_out: int  # more than are named
    others: Others
    devices: tuple[DeviceRoom, ...]
    by: str | None  # the model that it waits for
    waiting_before: int
    refusal: str | None
    at_ms: int


@dataclass(frozen=True, slots=True)
class Copies:
    """Of a model with replicas: the nodes that hold a copy, the one that would get the next and what its
    restore takes there. That is when callers have waited so long for each other in all; ``waited_ms`` of it
    have passed. ``declined``: nodes that would not take a copy lately."""

    replicas: int
    holders: tuple[str, ...]
    next_node: str | None
    restore_ms: int
    waited_ms: int
    declined: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecasts:
    """What ``plan`` returns: a forecast per node, in the order in which the router would try them."""

    model: str
    items: tuple[Forecast, ...]
    copies: Copies | None = None  # of a model with more than one replica


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of a node. ``ref`` None: about another tenant's model, shown for what it did to yours."""

    node: str
    at_ms: int
    kind: str
    ref: str | None
    reason: str
    device: str | None
    by: str | None
    left_bytes: int | None
    request: str | None
    from_tier: str | None
    nbytes: int
    expected_ms: int
    took_ms: int
    victims: tuple[Victim, ...]
    victims_left_out: int
    others: Others


@dataclass(frozen=True, slots=True)
class RequestStory:
    """What became of one request: waiting, granted, refused or left."""

    node: str
    request: str
    ref: str
    asked_ms: int
    outcome: str
    device: str | None
    from_tier: str | None
    waited_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``explain`` returns, oldest first. ``silent``: nodes that did not answer. ``copies``: of a model
    with more than one replica, how it stands with them now."""

    requests: tuple[RequestStory, ...]
    items: tuple[Decision, ...]
    silent: tuple[str, ...]
    copies: Copies | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a push is.

    ``hash`` and ``upload`` count bytes of all files together. ``skip`` names a file that is left out
    because no engine reads it; its ``message`` says so.
    """

    step: Literal["hash", "upload", "skip"]
    path: str
    done_bytes: int
    total_bytes: int
    message: str = ""


# Called while a push runs; ``AsyncClient`` calls it from a worker thread.
ProgressCallback = Callable[[Progress], None]
