"""Thousands of nodes in one process: each with a key, a certificate and a connection of its own to control.

Covers: joining as real nodes do, over TLS, and beating with long polls on a connection that stays. Does not
cover: what a node does with a plan, or what is measured (``bench_control``).
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from packer.wire import (
    WIRE_VERSION,
    Beat,
    BeatAnswer,
    DeviceReport,
    JoinAnswer,
    JoinAsk,
    Report,
    decode,
    encode,
)

# Joins at one time: control answers so many handshakes at once and more would only wait.
JOINS_AT_ONCE = 16
POLL_MS = 25_000
HEAD_BYTES_MAX = 64 * 1024
# Every node says this of itself: one device, nothing on it.
_REPORT = Report(
    "http://127.0.0.1:9",
    1,
    False,
    (DeviceReport("cpu:0", "cpu", "cpu", 96 << 20, 0, 0, True),),
    0,
    0,
    0,
    0,
    (),
    (),
)


class BadAnswer(Exception):
    """Control answered with another status than 200."""


@dataclass(slots=True)
class SimulatedNode:
    """One node. ``seen_s``: when it got its newest plan, by the clock of ``time.perf_counter``."""

    host: str
    port: int
    name: str
    ca_pem: str
    context: ssl.SSLContext | None = None
    plan_epoch: int = 0
    plan_seq: int = 0
    plan_start: str = ""
    peers: str = ""
    number: int = 0
    plan_bytes: int = 0
    seen_s: float = 0.0
    on_plan: Callable[[SimulatedNode], None] = lambda node: None
    _reader: asyncio.StreamReader | None = None
    _writer: asyncio.StreamWriter | None = None

    async def join(self, token: str) -> None:
        """A key, a certificate for it, and a TLS context that has both."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)])
        asked = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        csr_pem = asked.public_bytes(serialization.Encoding.PEM).decode()
        _, token_id, secret = token.split(".")
        self.context = client_context(self.ca_pem)
        ask = JoinAsk(WIRE_VERSION, token_id, secret, csr_pem, self.name, _REPORT.gateway_url)
        answer = decode(await self.post("/node/v1/join", encode(ask)), JoinAnswer)
        await self.close()
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with tempfile.NamedTemporaryFile() as file:
            file.write(key_pem + answer.certificate_pem.encode())
            file.flush()
            self.context.load_cert_chain(file.name)

    async def beat(self, wait_ms: int) -> BeatAnswer:
        self.number += 1
        message = Beat(
            WIRE_VERSION,
            self.name,
            self.plan_epoch,
            self.plan_seq,
            wait_ms,
            _REPORT,
            have_start=self.plan_start,
            life="1",
            number=self.number,
            have_peers=self.peers,
        )
        body = await self.post("/node/v1/beat", encode(message))
        answer = decode(body, BeatAnswer)
        if answer.plan is not None:
            self.plan_epoch, self.plan_seq = answer.plan.epoch, answer.plan.seq
            self.plan_start, self.peers = answer.plan.start, answer.plan.peers_sha256
            self.plan_bytes, self.seen_s = len(body), time.perf_counter()
            self.on_plan(self)
        return answer

    async def run(self, places: asyncio.Semaphore) -> None:
        """Beat until cancelled. As many connect at one time as there are places."""
        async with places:
            await self.beat(0)
        while True:
            await self.beat(POLL_MS)

    async def post(self, path: str, body: bytes) -> bytes:
        """One request on the connection that stays. Raises ``BadAnswer`` and ``OSError``."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                self.host, self.port, ssl=self.context, server_hostname=self.host, limit=HEAD_BYTES_MAX
            )
        assert self._reader is not None
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        answer = await self._reader.readexactly(int(fields.get("content-length", "0")))
        if lines[0].split(" ")[1] != "200":
            raise BadAnswer(f"{path}: {lines[0]} {answer[:300]!r}")
        return answer

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()
        self._reader = self._writer = None


def client_context(ca_pem: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca_pem)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


async def join_all(nodes: Sequence[SimulatedNode], token: Callable[[], str]) -> None:
    """``token`` gives a fresh join token; called on threads."""
    places = asyncio.Semaphore(JOINS_AT_ONCE)

    async def join(node: SimulatedNode) -> None:
        async with places:
            await node.join(await asyncio.to_thread(token))

    async with asyncio.TaskGroup() as group:
        for node in nodes:
            group.create_task(join(node))


@dataclass(slots=True)
class Fleet:
    """Nodes that beat. ``settled`` waits until each has the same plan."""

    nodes: Sequence[SimulatedNode]
    failed: list[BaseException] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        places = asyncio.Semaphore(JOINS_AT_ONCE)
        for node in self.nodes:
            node.on_plan = lambda _: self._news.set()
            task = asyncio.create_task(node.run(places))
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.failed.append(task.exception())  # type: ignore[arg-type]
            self._news.set()

    async def until(self, done: Callable[[SimulatedNode], bool], timeout_s: float) -> None:
        """Wait until it is true of every node. Raises what a node failed with, and ``TimeoutError``."""
        left = list(self.nodes)
        async with asyncio.timeout(timeout_s):
            while left := [node for node in left if not done(node)]:
                self._news.clear()
                await self._news.wait()
                if self.failed:
                    raise self.failed[0]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self.nodes))


def read_ca(host: str, port: int) -> str:
    """The CAs, as control shows them to whoever asks; a real node compares them with its token's pin."""
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, port, context=unverified, timeout=30)
    connection.request("GET", "/node/v1/ca")
    pem = connection.getresponse().read().decode()
    connection.close()
    return pem
