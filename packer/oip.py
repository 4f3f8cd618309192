"""The Open Inference Protocol v2, as far as router and node must do it alike.

Covers: which model and which question a path means, the error shape, limits of bodies, what a model takes and
gives, its metadata and configuration, the server's own, and sums of statistics. Does not cover: routes and
who may call them (``agent/oip.py``, ``control/routes/oip.py``), or tensors in bodies
(``agent/oip_tensors.py``).

Like ``packer/http.py`` it lives in the leaf so that a tenant can not tell a router from a node by an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import msgspec
from aiohttp import web

from packer.http import ApiError, decode_json, openai_response, retry_headers
from packer.types import KIB, MIB, ModelRef, ModelSpec, Task, TensorPort, TensorSignature

# Where the JSON of a request ends and raw tensors begin.
HEADER_LENGTH = "Inference-Header-Content-Length"
# The code that an error's body has no place for; a router decides by it, and programs may.
ERROR_CODE_HEADER = "x-bunkhouse-error-code"
# A whole request. 64 MiB are a batch of 111 images of 3 x 224 x 224 in FP32 or one volume of 256^3 in FP32;
# a worker takes no larger frame either, and more per request only makes others wait longer.
TENSOR_BODY_BYTES_MAX = 64 * MIB
# The JSON of a request, tensors written as numbers included. Decoded numbers take up to 16 times their text,
# and nothing else of a listener runs meanwhile; an image of 3 x 224 x 224 in FP32 has up to 3 MB of text.
TENSOR_JSON_BYTES_MAX = 4 * MIB
# The longest question to the repository's index, or the longest parameters of a load that is refused anyway.
QUESTION_BYTES_MAX = 64 * KIB

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
TEXT_INPUT = TensorPort("text", "BYTES", (-1,))
_TEXT_SIGNATURES: Mapping[Task, TensorSignature] = {
    Task.EMBEDDING: TensorSignature((TEXT_INPUT,), (TensorPort("embedding", "FP32", (-1, -1)),)),
    Task.CLASSIFICATION: TensorSignature(
        (TEXT_INPUT,), (TensorPort("scores", "FP32", (-1, -1)), TensorPort("label", "BYTES", (-1,)))
    ),
}


# --- paths --------------------------------------------------------------------------------------------


class Asks(StrEnum):
    """What a path below ``/v2/models/{model}`` asks of the model; the last word of the path."""

    METADATA = ""
    READY = "ready"
    CONFIG = "config"
    STATS = "stats"
    INFER = "infer"

    @property
    def method(self) -> str:
        return "POST" if self is Asks.INFER else "GET"


@dataclass(frozen=True, slots=True)
class ModelPath:
    """``model`` is the text of a reference (``packer.types.parse_model``), not yet looked at."""

    model: str
    asks: Asks


def parse_model_path(path: str) -> ModelPath | None:
    """What follows ``/v2/models/``, percent-decoded once: ``tenant/name[/versions/version][/word]``.

    The one parser of these paths. A model's name is always two parts, so ``tenant/name`` and
    ``tenant%2Fname`` are the same here. None when the path is no route, whatever models there are.
    """
    parts = path.split("/")
    if len(parts) < 2:
        return None
    model, rest = "/".join(parts[:2]), parts[2:]
    if len(rest) >= 2 and rest[0] == "versions":
        # A second "@" makes it no reference at all.
        model, rest = f"{model}@{rest[1]}", rest[2:]
    word = rest[0] if rest else ""
    if len(rest) > 1 or (rest and not word) or word not in _WORDS:
        return None
    return ModelPath(model, Asks(word))


_WORDS = frozenset(asks.value for asks in Asks)


@dataclass(frozen=True, slots=True)
class LoadPath:
    model: str
    word: str  # "load" or "unload"


def parse_load_path(path: str) -> LoadPath | None:
    """What follows ``/v2/repository/models/``, decoded once: ``tenant/name/load`` or ``…/unload``."""
    parts = path.split("/")
    if len(parts) != 3 or parts[2] not in ("load", "unload"):
        return None
    return LoadPath("/".join(parts[:2]), parts[2])


def model_path(ref: ModelRef, asks: Asks) -> str:
    """A version's path from ``v2/`` on, as a router sends it to a node: nothing in it needs encoding."""
    word = f"/{asks.value}" if asks.value else ""
    return f"v2/models/{ref.model}/versions/{ref.version}{word}"


def is_oip(path: str) -> bool:
    """Whether a (decoded) path is answered in this protocol's shapes."""
    return path == "/v2" or path.startswith("/v2/")


def asked_path(request: web.Request) -> ModelPath:
    """What a request below ``/v2/models/`` asks, and of what. Raises ``ApiError``."""
    path = parse_model_path(request.match_info["path"])
    if path is None:
        raise unknown_route(request.method, request.path)
    _check_method(request.method, path.asks)
    return path


def _check_method(method: str, asks: Asks) -> None:
    """Raises ``ApiError`` 405. Says nothing of the model, so it comes before the look-up."""
    possible = ("POST",) if asks is Asks.INFER else ("GET", "HEAD")
    if method not in possible:
        allow = ",".join(possible)
        raise ApiError(
            405,
            "method_not_allowed",
            f"{method[:16]} is not possible here; possible: {allow}.",
            headers={"Allow": allow},
        )


def unknown_route(method: str, path: str) -> ApiError:
    return ApiError(404, "unknown_route", f"There is no {method[:16]} {path[:120]!r} here.")


# --- requests ------------------------------------------------------------------------------------------


def body_limit(raw: bool, declared_bytes: int) -> int:
    """How large the whole body may be, from its headers alone; ``raw``: with raw tensors. Raises
    ``ApiError``."""
    if raw:
        return TENSOR_BODY_BYTES_MAX
    if declared_bytes > TENSOR_JSON_BYTES_MAX:
        raise json_too_large()
    return TENSOR_JSON_BYTES_MAX


def json_too_large() -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"The request's JSON is larger than the limit of {TENSOR_JSON_BYTES_MAX} bytes; send tensors as raw "
        f"bytes after the JSON (binary_data_size), up to {TENSOR_BODY_BYTES_MAX} bytes in all.",
    )


class IndexAsk(msgspec.Struct, frozen=True):
    """Every version is ready: ``ready`` leaves none out."""

    ready: bool = False


def check_index_ask(body: bytes) -> None:
    """Raises ``ApiError``. Clients send nothing, or an object."""
    if body.strip():
        decode_json(body, IndexAsk)


# --- errors -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OipError:
    """The protocol knows one field, a text."""

    error: str


def oip_response(error: ApiError) -> web.Response:
    """An error as this protocol writes it, with the headers that every surface has."""
    said = f"{error.message} {error.hint}" if error.hint else error.message
    # A caller's words that an error repeats may hold what is no valid text.
    text = said.encode("utf-8", "replace").decode()
    return web.Response(
        status=error.status,
        body=msgspec.json.encode(OipError(text)),
        content_type="application/json",
        headers={**error.headers, **retry_headers(error), ERROR_CODE_HEADER: error.code},
    )


def tenants_response(request: web.Request, error: ApiError) -> web.Response:
    """Render for a tenant's surface: this protocol's shape below ``/v2``, else OpenAI's."""
    return oip_response(error) if is_oip(request.path) else openai_response(request, error)


# --- what a model takes and gives -----------------------------------------------------------------------


def signature_of(spec: ModelSpec) -> TensorSignature | None:
    """The model's tensors in this protocol; None when it has none (a generating model)."""
    return spec.signature if spec.task is Task.TENSORS else _TEXT_SIGNATURES.get(spec.task)


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    version: str
    name: str = "bunkhouse"
    extensions: tuple[str, ...] = EXTENSIONS


@dataclass(frozen=True, slots=True)
class ServerLive:
    live: bool = True


@dataclass(frozen=True, slots=True)
class ServerReady:
    ready: bool


@dataclass(frozen=True, slots=True)
class ModelReady:
    name: str
    ready: bool = True


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    name: str
    versions: tuple[str, ...]  # the newest first
    platform: str
    inputs: tuple[TensorPort, ...]
    outputs: tuple[TensorPort, ...]


@dataclass(frozen=True, slots=True)
class PortConfig:
    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The part of Triton's model configuration that means something here.

    ``max_batch_size`` 0: a shape has all dimensions, the first one included.
    """

    name: str
    platform: str
    backend: str
    input: tuple[PortConfig, ...]
    output: tuple[PortConfig, ...]
    max_batch_size: int = 0


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """``state`` is always READY: a model that is not on a device answers as well, after its restore."""

    name: str
    version: str
    state: str = "READY"
    reason: str = ""


def _ports(spec: ModelSpec) -> TensorSignature:
    return signature_of(spec) or TensorSignature((), ())


def model_metadata(spec: ModelSpec, own: Iterable[ModelSpec]) -> ModelMetadata:
    """``own``: every version of the tenant's models."""
    versions = sorted(
        (one for one in own if one.ref.model == spec.ref.model),
        key=lambda one: (not one.latest, -one.created_ms, one.ref.version),
    )
    ports = _ports(spec)
    digests = tuple(one.ref.version for one in versions)
    return ModelMetadata(
        str(spec.ref.model), digests, f"bunkhouse_{spec.engine}", ports.inputs, ports.outputs
    )


def model_config(spec: ModelSpec) -> ModelConfig:
    ports = _ports(spec)
    return ModelConfig(
        str(spec.ref.model),
        f"bunkhouse_{spec.engine}",
        spec.engine,
        tuple(_port_config(port) for port in ports.inputs),
        tuple(_port_config(port) for port in ports.outputs),
    )


def _port_config(port: TensorPort) -> PortConfig:
    named = "STRING" if port.datatype == "BYTES" else port.datatype
    return PortConfig(port.name, f"TYPE_{named}", port.shape)


def index(specs: Iterable[ModelSpec]) -> tuple[IndexEntry, ...]:
    """A tenant's versions by name, the latest of each first."""
    ordered = sorted(specs, key=lambda spec: (spec.ref.model, not spec.latest, -spec.created_ms))
    return tuple(IndexEntry(str(spec.ref.model), spec.ref.version) for spec in ordered)


def no_loading(model: str, word: str) -> ApiError:
    """The answer to a load or unload of one's own model."""
    return ApiError(
        400,
        "not_supported",
        f"{model[:120]!r} can not be {word}ed by hand: Bunkhouse brings a model in when it is called and "
        "decides what makes room. Just call it.",
    )


# --- statistics -----------------------------------------------------------------------------------------


# Of what a node says that it counted: 292 years.
COUNTED_MAX = 2**63 - 1
Counted = Annotated[int, msgspec.Meta(ge=0, le=COUNTED_MAX)]


class Duration(msgspec.Struct):
    """How often, and for how long in all."""

    count: Counted = 0
    ns: Counted = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


class InferenceStats(msgspec.Struct):
    """Triton's names. ``queue``: the wait for a turn and for the weights; ``compute_infer``: in the worker,
    moving tensors to and from it included."""

    success: Duration = msgspec.field(default_factory=Duration)
    fail: Duration = msgspec.field(default_factory=Duration)
    queue: Duration = msgspec.field(default_factory=Duration)
    compute_input: Duration = msgspec.field(default_factory=Duration)
    compute_infer: Duration = msgspec.field(default_factory=Duration)
    compute_output: Duration = msgspec.field(default_factory=Duration)
    cache_hit: Duration = msgspec.field(default_factory=Duration)
    cache_miss: Duration = msgspec.field(default_factory=Duration)


class ModelStats(msgspec.Struct):
    """One version's counts since the agent started. ``last_inference``: milliseconds of the wall clock.

    ``batch_stats`` is always empty: how requests were put together is not told apart by size."""

    name: str
    version: str
    last_inference: Counted = 0
    inference_count: Counted = 0
    execution_count: Counted = 0
    inference_stats: InferenceStats = msgspec.field(default_factory=InferenceStats)
    batch_stats: tuple[()] = ()


class StatsAnswer(msgspec.Struct):
    model_stats: list[ModelStats]


def add_stats(total: ModelStats, more: ModelStats) -> None:
    """Count ``more``, of another node, into ``total``."""
    total.last_inference = max(total.last_inference, more.last_inference)
    total.inference_count += more.inference_count
    total.execution_count += more.execution_count
    for name in InferenceStats.__struct_fields__:
        duration: Duration = getattr(more.inference_stats, name)
        getattr(total.inference_stats, name).add(duration.ns, duration.count)


def empty_stats(specs: Sequence[ModelSpec]) -> dict[tuple[str, str], ModelStats]:
    """A row for each version, by name and version, in the order of the index."""
    return {(one.name, one.version): ModelStats(one.name, one.version) for one in index(specs)}
