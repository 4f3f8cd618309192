"""Messages between a node and control: their shapes and the one encode/decode.

Covers: join, beat, plan and report, and the version check. Does not cover: how they travel (the
node dials, HTTPS with mutual TLS: ``agent/uplink.py`` and ``control/routes/nodes.py``).

Decoding is strict (msgspec): a missing, unknown-typed or oversized field is an error that names its
path; unknown fields are ignored, so that a newer peer may add some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from packer.types import KeySpec, ModelSpec, TenantSpec

# Raised by one when a message changes so that an older peer would misread it.
WIRE_VERSION = 1
# A plan of 10,000 versions with 1,000 chunks each stays below this; more is a mistake or an attack.
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
# One beat carries at most this many spooled records; the rest waits for the next beat.
SPOOL_RECORDS_MAX = 1000

T = TypeVar("T")


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
class Plan:
    """Control's numbered wish. A node ignores a plan of another cluster or node, of a lower epoch, or
    of a sequence that is not higher than what it has."""

    version: int
    cluster: str
    node: str
    epoch: int
    seq: int
    tenants: tuple[TenantSpec, ...]
    keys: tuple[KeySpec, ...]
    models: tuple[ModelSpec, ...]
    draining: bool = False


@dataclass(frozen=True, slots=True)
class DeviceReport:
    device: str  # "cpu:0", "cuda:GPU-<uuid>"
    kind: str  # "cpu" or "cuda"
    name: str  # "cpu" or the product name of the GPU
    budget_bytes: int
    used_bytes: int  # held in the ledger: weights and workspace, in flight counted
    foreign_bytes: int
    healthy: bool


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """Restores of one model from one tier since the agent started."""

    from_tier: str
    count: int
    restore_ms_p50: int
    restore_ms_max: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """Where a version's bytes are on this node and what it has done since the agent started."""

    ref: str
    state: str  # "resident", "restoring", "evicting", "absent"
    device: str | None
    leases: int
    waiting: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    requests: int
    answers: int
    restores: tuple[RestoreReport, ...]
    last_used_ms: int  # wall clock, 0 when never


@dataclass(frozen=True, slots=True)
class TenantReport:
    """A tenant's use of this node against its quota."""

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


@dataclass(frozen=True, slots=True)
class Report:
    """A node's state, sent with every beat."""

    gateway_url: str
    started_ms: int
    draining: bool
    devices: tuple[DeviceReport, ...]
    host_budget_bytes: int
    host_used_bytes: int
    disk_budget_bytes: int
    disk_used_bytes: int
    models: tuple[ModelReport, ...]
    tenants: tuple[TenantReport, ...]


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


@dataclass(frozen=True, slots=True)
class BeatAnswer:
    version: int
    plan: Plan | None
    acked_seq: int  # highest record sequence that control has stored


def encode(message: object) -> bytes:
    """JSON bytes of a message dataclass."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """Decode and check one message; raises ``BadMessage``."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadMessage(f"message of {len(data)} bytes is above the limit of {MESSAGE_BYTES_MAX} bytes")
    try:
        message = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise BadMessage(f"{kind.__name__}: {error}") from None
    version = getattr(message, "version", WIRE_VERSION)
    if version != WIRE_VERSION:
        raise BadMessage(
            f"{kind.__name__}: wire version {version}, this side speaks {WIRE_VERSION}: upgrade the older"
        )
    return message
