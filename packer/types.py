"""Values shared by the cores, the node and control: names, sizes, quotas, model specs.

Covers: parsing and limits of every name that a user can type, and the immutable descriptions of
tenants, keys and models. Does not cover: events and actions of the residency core (``events``),
their encoding on the wire (``wire``), or the layout of a model's bytes (``layout``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# A tenant is a DNS-label-like word, so that it can later be a host name or a Kubernetes namespace.
TENANT_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,37}[a-z0-9])?")
TENANT_CHARS_MAX = 39
# A model's name may look like a Hugging Face repository name; 64 characters keep log lines readable.
MODEL_NAME_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
MODEL_NAME_CHARS_MAX = 64
# Texts of right model references that are parsed already: some 300 bytes each.
MODEL_TEXTS_MAX = 4_096
# A version is the first 16 hex digits of the sha256 of the model's manifest.
VERSION_PATTERN = re.compile(r"[0-9a-f]{16}")
VERSION_CHARS = 16
# "@latest" is an alias that control resolves; it never names a pack.
LATEST = "latest"


class BadValue(ValueError):
    """A value from outside breaks a limit. Names the field, the limit and the way out."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class Tier(StrEnum):
    """Where bytes are, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    ORIGIN = "origin"


class HostForm(StrEnum):
    """How the host tier keeps a model's chunks; the smaller, the more work a restore is."""

    STORED = "stored"  # opened planes, as they are on disk
    WIRE = "wire"  # what a GPU decodes itself: N12 without zstd, everything else raw
    RAW = "raw"  # the weights as they are on the device


@dataclass(frozen=True, slots=True)
class HostSizes:
    """Exact bytes of a model's host segment in each form."""

    stored_bytes: int
    wire_bytes: int
    raw_bytes: int

    def of(self, form: HostForm) -> int:
        match form:
            case HostForm.STORED:
                return self.stored_bytes
            case HostForm.WIRE:
                return self.wire_bytes
            case HostForm.RAW:
                return self.raw_bytes


class Task(StrEnum):
    """What an engine does with a model."""

    EMBEDDING = "embedding"
    CLASSIFICATION = "classification"
    GENERATION = "generation"
    TENSORS = "tensors"  # named tensors in, named tensors out: see ``TensorSignature``


# Bytes of one element, by the names of the Open Inference Protocol; a BOOL is one byte on the wire.
DATATYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}
# Tensors on one side of a model. Key-value caches of deep models have about 100, and they stay in the worker.
PORTS_MAX = 64
PORT_NAME_PATTERN = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.:\-]{0,62}[A-Za-z0-9_])?")
PORT_DIMS_MAX = 8
# A dimension's size; more elements than this do not fit a request anyway.
PORT_SIZE_MAX = 2**31 - 1
FREE_DIMENSION = -1


@dataclass(frozen=True, slots=True)
class TensorPort:
    """One tensor that a model takes or gives. ``datatype``: a key of ``DATATYPE_BYTES``; a size of -1 is
    whatever a request brings."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """What a model for ``Task.TENSORS`` takes and gives, in its own order."""

    inputs: tuple[TensorPort, ...]
    outputs: tuple[TensorPort, ...]


def check_signature(signature: TensorSignature, field: str = "signature") -> None:
    """Raise ``BadValue`` unless every name, datatype and shape is within the limits."""
    for side, ports in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        if not 0 < len(ports) <= PORTS_MAX:
            raise BadValue(f"{field}.{side}", f"must hold 1 to {PORTS_MAX} tensors, not {len(ports)}")
        if len({port.name for port in ports}) != len(ports):
            raise BadValue(f"{field}.{side}", "two tensors have the same name; rename one")
        for number, port in enumerate(ports):
            _check_port(port, f"{field}.{side}[{number}]")


def _check_port(port: TensorPort, field: str) -> None:
    if not PORT_NAME_PATTERN.fullmatch(port.name):
        raise BadValue(
            f"{field}.name",
            f"{port.name[:80]!r} is not a tensor's name: use 1 to 64 of letters, digits, '_', '-', '.', ':'",
        )
    if port.datatype not in DATATYPE_BYTES:
        raise BadValue(
            f"{field}.datatype", f"{port.datatype[:20]!r} is not one of {', '.join(DATATYPE_BYTES)}"
        )
    if len(port.shape) > PORT_DIMS_MAX or not all(
        size == FREE_DIMENSION or 0 <= size <= PORT_SIZE_MAX for size in port.shape
    ):
        raise BadValue(
            f"{field}.shape", f"must be at most {PORT_DIMS_MAX} sizes from 0 to {PORT_SIZE_MAX}, or -1"
        )


def parse_tenant(text: str, field: str = "tenant") -> str:
    """Return ``text`` if it is a tenant name, else raise ``BadValue``."""
    if not TENANT_PATTERN.fullmatch(text):
        raise BadValue(
            field,
            f"{text[:80]!r} is not a tenant name: use 1 to {TENANT_CHARS_MAX} of a-z, 0-9 and '-', "
            "starting and ending with a letter or digit",
        )
    return text


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    """``tenant/name``: what a tenant calls, whatever version is latest."""

    tenant: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class ModelRef:
    """``tenant/name@version``: one immutable version of a model."""

    tenant: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"

    @property
    def model(self) -> ModelName:
        return ModelName(self.tenant, self.name)


@lru_cache(MODEL_TEXTS_MAX)
def parse_model(text: str, field: str = "model") -> tuple[ModelName, str | None]:
    """Parse ``tenant/name`` or ``tenant/name@version`` (already percent-decoded).

    Returns the name and the version (None when absent or ``latest``). The one parser for model
    references: every surface calls it after decoding and before any look-up, so that an encoded
    slash or dot can not mean different things to a check and to a look-up.
    Raises ``BadValue``.
    """
    head, at, version = text.partition("@")
    tenant, slash, name = head.partition("/")
    if (
        not slash
        or not TENANT_PATTERN.fullmatch(tenant)
        or not MODEL_NAME_PATTERN.fullmatch(name)
        or ".." in name
        or (at and version != LATEST and not VERSION_PATTERN.fullmatch(version))
    ):
        raise BadValue(
            field,
            f"{text[:120]!r} is not a model reference: write tenant/name or tenant/name@version, the name "
            f"being 1 to {MODEL_NAME_CHARS_MAX} of letters, digits, '.', '_' and '-'",
        )
    return ModelName(tenant, name), (version if at and version != LATEST else None)


def parse_ref(text: str, field: str = "model") -> ModelRef:
    """Parse ``tenant/name@version``; the version is required. Raises ``BadValue``."""
    model, version = parse_model(text, field)
    if version is None:
        raise BadValue(field, f"{text[:120]!r} must name a version: tenant/name@version")
    return ModelRef(model.tenant, model.name, version)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}


def parse_bytes(text: str, field: str = "bytes") -> int:
    """Parse ``96MiB``, ``2GB``, ``1048576``. Decimal units are powers of 1000. Raises ``BadValue``."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise BadValue(field, f"{text[:40]!r} is not a size: write for example 96MiB, 2GB or 1048576")
    number, unit = float(match[1]), (match[2] or "").upper()
    scale = _BINARY[unit[0]] if "I" in unit else _UNITS[unit.rstrip("B")]
    return int(number * scale)


def parse_budget(text: str, field: str) -> int:
    """As ``parse_bytes``, of what a person gives a tier. Raises ``BadValue`` also for a small number
    without a unit, which was most likely to have one."""
    nbytes = parse_bytes(text, field)
    if 0 < nbytes < MIB and text.strip().replace(".", "").isdecimal():
        plain = text.strip()[:40]
        raise BadValue(
            field,
            f"{plain!r} has no unit, and so few bytes hold nothing: write {plain}MiB or {plain}GiB, "
            f"or {plain}B if it is meant so",
        )
    return nbytes


@dataclass(frozen=True, slots=True)
class ByteQuota:
    """Bytes a tenant may hold in one tier: ``reserved`` is guaranteed, ``max`` is hard (None: no cap)."""

    reserved: int = 0
    max: int | None = None


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """Everything a tenant is promised and limited to. Bytes are of each node; rates, concurrency and device
    time are of all nodes together, which divide them (``shares``). None means not limited."""

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
class TenantSpec:
    """A tenant as a node sees it."""

    tenant: str
    quota: TenantQuota = TenantQuota()


@dataclass(frozen=True, slots=True)
class KeySpec:
    """An API key as a node sees it: the sha256 of its secret half, never the secret.

    A plain fast hash is right because the secret is 256 random bits; a slow hash on the request
    path would only be a way to exhaust the node.
    """

    key_id: str
    secret_sha256: str
    tenant: str
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class OriginFile:
    """One file of a model directory: relative path, exact size, sha256 in hex."""

    path: str
    size_bytes: int
    sha256: str


# One forward pass over more inputs than this gains nothing on any device, and holds everybody else up.
BATCH_INPUTS_MAX = 256
# A person notices a tenth of a second, and requests that come further apart gain nothing by waiting.
BATCH_DELAY_MS_MAX = 100


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests for one model share forward passes.

    ``inputs_max``: inputs, or texts in the making, of one pass. With 1 every answer is what the model gives
    alone, to the last bit; with more its last bits may depend on its company. ``delay_ms``: how long the
    first input of a pass waits for company; with 0 only what waits already is joined.
    """

    inputs_max: int = 1
    delay_ms: int = 0


ALONE = Batching()


def check_batching(batching: Batching) -> Batching:
    """Returns it. Raises ``BadValue`` with the names of the management API."""
    if not 1 <= batching.inputs_max <= BATCH_INPUTS_MAX:
        raise BadValue(
            "batch_max", f"must be from 1 (each input alone) to {BATCH_INPUTS_MAX}, not {batching.inputs_max}"
        )
    if not 0 <= batching.delay_ms <= BATCH_DELAY_MS_MAX:
        raise BadValue(
            "batch_delay_ms", f"must be from 0 to {BATCH_DELAY_MS_MAX} ms, not {batching.delay_ms}"
        )
    if batching.delay_ms and batching.inputs_max == 1:
        raise BadValue(
            "batch_delay_ms",
            "has no use with batch_max 1, where no input has company: raise batch_max, or set 0",
        )
    return batching


# Boxes have 8 GPUs, the largest 16. A model that needs more needs several nodes, which nothing here does.
DEVICES_PER_MODEL_MAX = 16
# A router looks at every holder for each call. A model that is busy on more nodes than this is a service of
# its own, and wants nodes of its own.
REPLICAS_PER_MODEL_MAX = 16


def check_replicas(replicas: int) -> int:
    """Returns it. Raises ``BadValue`` with the name of the management API."""
    if not 1 <= replicas <= REPLICAS_PER_MODEL_MAX:
        raise BadValue(
            "replicas",
            f"must be from 1 to {REPLICAS_PER_MODEL_MAX} nodes that may hold a copy each, not {replicas}; "
            "delete the model to have no copy",
        )
    return replicas


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One immutable version, everything a node needs before it has seen a byte of it.

    ``image_bytes`` is the exact size of the raw weights laid out on a device (``layout.lay_out``);
    ``chunk_bytes`` are the sizes of its chunks in execution order and add up to it.
    ``workspace_bytes`` is what requests need beside the weights: until it is measured it is the named
    first-load estimate of ``layout.first_workspace_estimate``.
    ``origin`` is a URL (``file://``, ``s3://`` …) of the directory that holds ``files``, or
    ``control:`` when control's own store holds them and the node fetches them over its uplink.
    """

    ref: ModelRef
    origin: str
    files: tuple[OriginFile, ...]
    engine: str
    task: Task
    image_bytes: int
    chunk_bytes: tuple[int, ...]
    workspace_bytes: int
    created_ms: int
    latest: bool = True
    signature: TensorSignature | None = None  # of a model for ``Task.TENSORS``; None of every other
    batching: Batching = ALONE
    # Devices of one node that it needs together, and the chunks before which it may be cut for that; empty:
    # nowhere. See ``gangs``.
    devices: int = 1
    cuts: tuple[int, ...] = ()
    # Nodes that control brings it to at one time, when one is too busy with it; see ``control.copies``. Nodes
    # themselves have no use for it.
    replicas: int = 1
