"""Messages between a router that is a process of its own and control: no more than routing needs.

Covers: their shapes, and what of a model, a key and a node a router is told. Does not cover: joining, which
has the nodes' messages (``packer.wire``), or how words are numbered (``control.feed``).

A router is not told: operators' keys, quotas, where weights lie (origins, files), what a tenant used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec

from control.catalog import KeyRow
from control.cluster import NEAR_STATES, NodeView
from packer.types import ModelSpec
from packer.wire import BoxFacts, DeviceReport, ModelReport, encode

# What stands before a name in the feed.
KEY, MODEL, NODE, PLACES = "key", "model", "node", "places"


@dataclass(frozen=True, slots=True)
class RouterAsk:
    """``have``: the number that it has heard up to, of ``start`` and ``epoch``; 0: nothing. ``number`` counts
    what this process asks."""

    version: int
    life: str
    number: int
    have: int
    wait_ms: int
    epoch: int = 0
    start: str = ""
    url: str = ""  # where it serves tenants, for people
    in_flight: int = 0
    calls: int = 0
    ca_sha256: str = ""  # of the text of the CA certificates that it trusts
    sent_ms: int = 0  # its wall clock
    release: str = ""
    told: str = ""  # by control's newest answer
    box: BoxFacts = field(default_factory=BoxFacts)


class Told(msgspec.Struct, frozen=True):
    """One word: ``text`` is what is so, null that it is no more."""

    name: str
    text: msgspec.Raw


@dataclass(frozen=True, slots=True)
class RouterAnswer:
    """``epoch`` and ``seq`` are of the newest plan. ``life`` and ``asked``: which question this answers."""

    version: int
    cluster: str
    start: str
    epoch: int
    seq: int
    life: str
    asked: int
    base: int
    number: int
    more: bool
    words: tuple[Told, ...]
    now_ms: int = 0  # control's wall clock
    ca_pem: str = ""  # the CAs to trust from now on; empty: those that it has
    told: str = ""  # to be repeated with the next question


NO_MORE = msgspec.Raw(b"null")


# --- what is told ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyTold:
    """``seq``: of the first plan that has it."""

    secret_sha256: str
    tenant: str
    expires_ms: int | None
    seq: int


@dataclass(frozen=True, slots=True)
class ModelTold:
    """Without its origin and its files."""

    spec: ModelSpec
    seq: int


@dataclass(frozen=True, slots=True)
class NodeTold:
    """``heard`` False: not since control started, so nothing is said of what it has and does."""

    key_sha256: str
    gateway_url: str
    route_url: str
    heard: bool
    silent: bool
    cloned: bool
    draining: bool
    have_epoch: int
    have_seq: int
    load: int
    devices: tuple[DeviceReport, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a version's bytes are on a node. Bytes are 1 where there are any: nobody asks for more. Numbers
    that change with each request are rounded up to a power of two, so that they are told seldom."""

    ref: str
    state: str
    device: str | None
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    restore_ms: int
    requests: int


@dataclass(frozen=True, slots=True)
class PlacesTold:
    models: tuple[Place, ...]


def key_told(row: KeyRow, seq: int) -> bytes:
    return encode(KeyTold(row.secret_sha256, row.tenant or "", row.expires_ms, seq))


def model_told(spec: ModelSpec, seq: int) -> bytes:
    told = replace(spec, origin="", files=())
    if spec.devices == 1:
        told = replace(told, chunk_bytes=(), cuts=())  # they say what each device of a gang holds
    return encode(ModelTold(told, seq))


def node_told(view: NodeView, key_sha256: str) -> bytes:
    report = view.report
    return encode(
        NodeTold(
            key_sha256,
            view.gateway_url,
            view.route_url,
            report is not None,
            view.silent,
            view.cloned,
            report is not None and report.draining,
            *view.have,
            view.load_said,
            report.devices if report is not None else (),
        )
    )


def places_told(models: Iterable[ModelReport]) -> bytes:
    return encode(PlacesTold(tuple(place for model in models if (place := _place(model)) is not None)))


def _place(model: ModelReport) -> Place | None:
    if model.state not in NEAR_STATES and not model.device_bytes + model.host_bytes + model.disk_bytes:
        return None
    return Place(
        model.ref,
        model.state,
        model.device,
        min(model.device_bytes, 1),
        min(model.host_bytes, 1),
        min(model.disk_bytes, 1),
        _rounded(model.restore_ms_estimate),
        _rounded(model.requests),
    )


def _rounded(number: int) -> int:
    """Of as many binary digits, all of them ones."""
    return (1 << number.bit_length()) - 1
