"""What the gateway asks of the node, and the values that travel between gateway and engine.

Covers: the node as the gateway sees it (``NodeFacade``, ``Lease``), a refusal, an engine's request,
frames and error. Does not cover: who implements them (``agent/node.py``), how they cross to a worker
(``agent/frames.py``), or HTTP (``agent/gateway.py``).

Imported by the agent process and by workers, so it imports nothing but the shared values.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from packer.events import RefusalReason
from packer.rates import RateView
from packer.types import KeySpec, ModelSpec, Tier

# What an engine may find wrong with a request. Routers decide by codes, so no other comes from a worker.
ENGINE_CODES = frozenset({"invalid_request", "context_length_exceeded"})

# A value that JSON can carry. Sequence and Mapping, not list and dict, so that a ``list[str]`` is one.
JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One order to an engine. ``op`` is ``embed``, ``classify``, ``generate`` or ``infer``.

    ``fields`` is what the order needs, already checked for types and limits by the gateway:
    ``embed`` and ``classify`` take ``inputs`` (texts, or lists of token numbers), ``embed`` also
    ``dimensions`` (absent: all that the model gives); ``generate`` takes one of ``prompt``, ``messages`` or
    ``tokens``, ``stop`` (texts), and when the caller gave them
    ``max_tokens`` (absent: as many as the model's context allows), ``temperature``, ``top_p``, ``top_k``,
    ``repetition_penalty`` (absent: what the model's directory says), ``presence_penalty``,
    ``frequency_penalty``, ``logit_bias``, ``seed`` (absent: not seeded), ``n`` (choices, of which each is
    what a request of its own with the next seed would be) and ``logprobs`` (how many of the likeliest tokens
    to tell beside each token; absent: tell nothing); ``infer`` takes
    ``inputs`` (maps of ``name``, ``datatype`` and ``shape``) and ``outputs`` (names; empty: all), and in
    ``body`` the raw little-endian tensors, one after the other in the order of ``inputs``.
    """

    op: str
    fields: Mapping[str, JSON] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class EngineFrame:
    """One piece of an engine's answer.

    ``embed``: one frame, header ``count``, ``dimensions``, ``prompt_tokens``; body float32 little-endian.
    ``classify``: one frame, header ``labels``, ``prompt_tokens``; body float32 [inputs, labels].
    ``generate``: frames with ``delta`` (text), then for each choice one with ``finish_reason`` (``stop`` or
    ``length``); every one with ``choice`` (absent: 0), and ``prompt_tokens`` and ``completion_tokens`` as
    counted so far over all choices. ``logprobs``, where they were asked for, tell of the tokens that lie
    wholly in the text so far: ``bytes`` (hexadecimal), ``logprob``, ``at`` (where in the choice's text the
    token begins, in characters) and ``top`` (pairs of bytes and log probability, the likeliest first).
    ``infer``: one frame, header ``outputs`` (maps of ``name``, ``datatype`` and ``shape``); body the raw
    tensors in that order.

    ``last``: it is known that no other follows. One that is not may be the last all the same.
    """

    header: Mapping[str, JSON] = field(default_factory=dict)
    body: bytes = b""
    last: bool = False


class EngineError(Exception):
    """An engine can not do what this request asks; the request is at fault, not the node.

    ``code`` is one of ``ENGINE_CODES``; ``field`` is the request's field that must change, when there is one.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field


class EngineFault(Exception):
    """A worker answered what no engine may answer, or its engine failed. The text holds sizes, names and
    kinds of errors, never contents."""


class Refused(Exception):
    """The node will not run the request. ``retry_ms``: when to come back, None when it can not help."""

    def __init__(self, reason: RefusalReason, detail: str, retry_ms: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry_ms = retry_ms


class Lease(Protocol):
    """The right to use a resident model; held while the context manager that gave it is open."""

    @property
    def tier(self) -> Tier:
        """Where the weights were when the request arrived."""

    @property
    def restore_ms(self) -> int:
        """How long the request waited for its weights; 0 when they were on the device."""

    @property
    def restored_bytes(self) -> int:
        """How many bytes of weights were brought in while it waited; the rest was on the device."""

    @property
    def device(self) -> str:
        """Which device answers."""

    def run(self, request: EngineRequest) -> AsyncIterator[EngineFrame]:
        """The engine's answer, frame by frame.

        Raises ``EngineError`` when the request is at fault, ``Refused`` (``WORKER_DIED``) when the process
        that held the weights is gone and ``EngineFault`` when the engine failed. Closing the iterator
        (``aclose``) cancels in the worker.
        """


class NodeFacade(Protocol):
    """A node as its gateway sees it. Every call but ``lease`` answers at once, from memory."""

    def find_key(self, key_text: str) -> KeySpec | None:
        """The key if its secret is right and it has not expired, else None. Constant time."""

    def models_of(self, tenant: str) -> Sequence[ModelSpec]:
        """Every version of the tenant's models, latest and older."""

    def resolve(self, tenant: str, text: str) -> ModelSpec | None:
        """The version that ``text`` (decoded) names. None when it is malformed, unknown or foreign."""

    def lease(
        self, spec: ModelSpec, request_id: str, timeout_ms: int, tokens: int, key_id: str = ""
    ) -> AbstractAsyncContextManager[Lease]:
        """Wait until the model is resident and hold it there. Raises ``Refused``. ``tokens`` are expected
        to be read and written under it; ``key_id``: of whose key it is told what was used.

        Cancelling while it waits withdraws the request; leaving the context ends it.
        """

    def rate_views(self, tenant: str) -> Sequence[RateView]:
        """The tenant's limited rates, for the ``x-ratelimit-*`` headers."""

    def ready(self) -> bool:
        """Whether the node can accept requests: it has a plan and is not draining."""

    def metrics_text(self, tenants: bool) -> str:
        """Prometheus text format; holds no prompts and no secrets. ``tenants``: also figures of tenants,
        which name them."""
