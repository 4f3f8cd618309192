"""A node that exists only in memory: what the gateway's tests drive instead of the loop and workers.

Covers: ``NodeFacade`` with scripted refusals, restores that wait until a test lets them go, an engine that
answers deterministically, and a log of what happened. Does not cover: budgets, tiers or real weights.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from aiohttp import web

from agent.credentials import Credentials
from agent.facade import JSON, EngineError, EngineFrame, EngineRequest, Lease, Refused
from agent.gateway import GatewayConfig, build_app
from agent.scrape_key import ScrapeKey
from packer.http import KeyText, check_key, make_key, runner
from packer.rates import RateView
from packer.types import (
    DATATYPE_BYTES,
    BadValue,
    KeySpec,
    ModelRef,
    ModelSpec,
    Task,
    TensorPort,
    TensorSignature,
    Tier,
    parse_model,
)

NOW_MS = 1_700_000_000_000
DIMENSIONS = 8
LABELS = ("negative", "positive")
VERSION = "0123456789abcdef"
OLDER = "fedcba9876543210"
# A deadline for what must happen at once; reaching it fails the test.
SOON_SECONDS = 10.0

Script = Callable[[EngineRequest], AsyncIterator[EngineFrame]]


def spec_of(tenant: str, name: str, task: Task, version: str = VERSION, latest: bool = True) -> ModelSpec:
    return ModelSpec(
        ref=ModelRef(tenant, name, version),
        origin="control:",
        files=(),
        engine="transformers",
        task=task,
        image_bytes=4096,
        chunk_bytes=(4096,),
        workspace_bytes=4096,
        created_ms=NOW_MS if latest else NOW_MS - 1000,
        latest=latest,
    )


def echo_spec(tenant: str, name: str, *datatypes: str) -> ModelSpec:
    """A model of tensors that gives what it takes: ``x0``, ``x1`` … of these datatypes, any rows of two."""
    ports = tuple(TensorPort(f"x{i}", datatype, (-1, 2)) for i, datatype in enumerate(datatypes))
    return replace(
        spec_of(tenant, name, Task.TENSORS), engine="export", signature=TensorSignature(ports, ports)
    )


def vector_of(text: object) -> list[float]:
    """Eight float32 numbers that depend on the text."""
    digest = hashlib.sha256(repr(text).encode()).digest()
    return [struct.unpack("<f", struct.pack("<f", byte / 255))[0] for byte in digest[:DIMENSIONS]]


def _listed(request: EngineRequest, name: str) -> Sequence[object]:
    value = request.fields[name]
    assert isinstance(value, list)
    return value


async def answer(request: EngineRequest) -> AsyncIterator[EngineFrame]:
    """The engine: vectors from hashes, labels by length, and a generator that repeats the prompt's words."""
    if request.op == "embed":
        inputs = _listed(request, "inputs")
        if request.fields.get("dimensions", DIMENSIONS) != DIMENSIONS:
            raise EngineError("invalid_request", "gives 8 and can not be shortened", "dimensions")
        body = b"".join(struct.pack(f"<{DIMENSIONS}f", *vector_of(one)) for one in inputs)
        header = {"count": len(inputs), "dimensions": DIMENSIONS, "prompt_tokens": 3 * len(inputs)}
        yield EngineFrame(header, body)
    elif request.op == "classify":
        inputs = _listed(request, "inputs")
        body = b"".join(struct.pack("<2f", 0.25, 0.75) for _ in inputs)
        yield EngineFrame({"labels": list(LABELS), "prompt_tokens": len(inputs)}, body)
    elif request.op == "infer":
        yield echo(request)
    else:
        fields = request.fields
        if "messages" in fields:
            prompt = " ".join(
                str(one["content"]) for one in _listed(request, "messages") if isinstance(one, dict)
            )
        else:
            prompt = str(fields.get("prompt", fields.get("tokens")))
        limit, choices = fields.get("max_tokens", 1000), fields.get("n", 1)
        assert isinstance(limit, int)
        assert isinstance(choices, int)
        words = prompt.split()
        said = words[:limit]
        for choice in range(choices):
            for i, word in enumerate(said):
                at = sum(len(each) + 1 for each in said[:i])
                figures = _figures(word + " ", at, fields.get("logprobs"))
                yield EngineFrame({"delta": word + " ", "choice": choice, **figures})
            reason = "stop" if len(words) <= limit else "length"
            counts = {"prompt_tokens": len(words), "completion_tokens": len(said) * (choice + 1)}
            yield EngineFrame({"finish_reason": reason, "choice": choice, **counts})


def _figures(token: str, at: int, top: JSON) -> dict[str, JSON]:
    """Log probabilities in which the likeliest token is ``0``, the next ``1``."""
    if not isinstance(top, int):
        return {}
    others: list[JSON] = [[str(i).encode().hex(), -0.25 * (i + 1)] for i in range(top)]
    return {"logprobs": [{"bytes": token.encode().hex(), "logprob": -0.5, "at": at, "top": others}]}


def echo(request: EngineRequest) -> EngineFrame:
    """The inputs that were asked for as outputs, in the order of the inputs."""
    described, body, at = [], b"", 0
    for one in _listed(request, "inputs"):
        assert isinstance(one, dict)
        size = math.prod(one["shape"]) * DATATYPE_BYTES[one["datatype"]]
        if one["name"] in _listed(request, "outputs"):
            described.append(one)
            body += request.body[at : at + size]
        at += size
    assert at == len(request.body)
    return EngineFrame({"outputs": described}, body)


@dataclass
class FakeLease:
    node: FakeNode
    request_id: str
    tier: Tier
    restore_ms: int
    device: str = "cpu:0"
    restored_bytes: int = 4096

    async def run(self, request: EngineRequest) -> AsyncIterator[EngineFrame]:
        if self.node.keeps_orders:
            self.node.orders.append(request)
        done = False
        try:
            async for frame in self.node.script(request):
                yield frame
            done = True
        finally:
            self.node.log(self.request_id, "ran" if done else "stopped")


@dataclass
class FakeNode:
    """``hold``: leases wait for ``go``. ``refused``: what ``lease`` raises, by model name."""

    hold: bool = False
    tier: Tier = Tier.DISK
    restore_ms: int = 37
    script: Script = answer
    rates: tuple[RateView, ...] = ()
    refused: dict[str, Refused] = field(default_factory=dict)
    models: dict[ModelRef, ModelSpec] = field(default_factory=dict)
    keys: dict[str, KeySpec] = field(default_factory=dict)
    orders: list[EngineRequest] = field(default_factory=list)
    expected_tokens: list[int] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)
    is_ready: bool = True
    credentials: Credentials | None = None  # instead of ``keys``: those of a plan, and tickets
    keeps_orders: bool = True  # with the bodies in them

    def __post_init__(self) -> None:
        self.go = asyncio.Event()
        self._changed = asyncio.Condition()
        self._pending: set[asyncio.Task[None]] = set()
        for tenant in ("acme", "globex"):
            for name, task in (
                ("embed", Task.EMBEDDING),
                ("moods", Task.CLASSIFICATION),
                ("chat", Task.GENERATION),
            ):
                self.add(spec_of(tenant, name, task))
        self.add(spec_of("acme", "embed", Task.EMBEDDING, OLDER, latest=False))
        self.add(spec_of("globex", "secret", Task.EMBEDDING))
        self.acme = self.add_key("acme")
        self.globex = self.add_key("globex")
        self.expired = self.add_key("acme", expires_ms=NOW_MS)

    def add(self, spec: ModelSpec) -> None:
        self.models[spec.ref] = spec

    def add_key(self, tenant: str, expires_ms: int | None = None) -> str:
        key: KeyText = make_key()
        self.keys[key.key_id] = KeySpec(key.key_id, key.secret_sha256, tenant, expires_ms)
        return key.text

    def log(self, request_id: str, what: str) -> None:
        self.events.append((request_id, what))
        task = asyncio.get_running_loop().create_task(self._notify())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def happened(self, what: str, times: int = 1) -> None:
        """Wait until ``what`` is in the log ``times`` times."""
        async with asyncio.timeout(SOON_SECONDS), self._changed:
            await self._changed.wait_for(lambda: sum(one == what for _, one in self.events) >= times)

    # --- NodeFacade -----------------------------------------------------------------------------------

    def find_key(self, key_text: str) -> KeySpec | None:
        if self.credentials is not None:
            return self.credentials.find(key_text)
        return check_key(self.keys, key_text, NOW_MS)

    def models_of(self, tenant: str) -> Sequence[ModelSpec]:
        return [spec for spec in self.models.values() if spec.ref.tenant == tenant]

    def resolve(self, tenant: str, text: str) -> ModelSpec | None:
        try:
            model, version = parse_model(text)
        except BadValue:
            return None
        for spec in self.models_of(tenant):
            if spec.ref.model == model and (spec.latest if version is None else spec.ref.version == version):
                return spec
        return None

    @asynccontextmanager
    async def lease(
        self, spec: ModelSpec, request_id: str, timeout_ms: int, tokens: int, key_id: str = ""
    ) -> AsyncIterator[Lease]:
        assert timeout_ms > 0
        self.expected_tokens.append(tokens)
        self.log(request_id, "requested")
        if self.hold:
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.log(request_id, "withdrawn")
                raise
        if spec.ref.name in self.refused:
            raise self.refused[spec.ref.name]
        self.log(request_id, "granted")
        try:
            yield FakeLease(self, request_id, self.tier, self.restore_ms)
        finally:
            self.log(request_id, "finished")

    def rate_views(self, tenant: str) -> Sequence[RateView]:
        return self.rates

    def ready(self) -> bool:
        return self.is_ready

    def metrics_text(self, tenants: bool) -> str:
        of_tenants = '# TYPE bunkhouse_tokens gauge\nbunkhouse_tokens{tenant="acme"} 1\n'
        return "# TYPE bunkhouse_up gauge\nbunkhouse_up 1\n" + of_tenants * tenants


def too_long(field_name: str) -> Script:
    """An engine that finds every input too long."""

    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        if request.op:
            raise EngineError("context_length_exceeded", "9 tokens; the model reads at most 8", field_name)
        yield EngineFrame()

    return script


@asynccontextmanager
async def served(
    node: FakeNode,
    *,
    keep_alive_ms: int = 3000,
    stall_seconds: float = 60.0,
    scraper: ScrapeKey | None = None,
) -> AsyncIterator[str]:
    """The gateway over ``node`` on a real socket; gives its base URL."""
    config = GatewayConfig("box-1", keep_alive_ms=keep_alive_ms, stall_seconds=stall_seconds, scraper=scraper)
    app = build_app(node, config)
    running = runner(app)
    await running.setup()
    try:
        site = web.TCPSite(running, "127.0.0.1", 0)
        await site.start()
        port = running.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
    finally:
        await running.cleanup()


async def _main() -> None:
    """Serve in a process of its own, for tests that measure memory: prints URL and keys, ends with stdin."""
    node = FakeNode(keeps_orders=False)
    node.add(echo_spec("acme", "echo", "FP32"))
    async with served(node) as url:
        print(url, node.acme, node.globex, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())
