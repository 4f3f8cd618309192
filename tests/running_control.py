"""A control server for tests: started inside the test's loop, called over real sockets.

Covers: starting it on free ports, keys, small model directories made without torch, pushing one, and
being a node (join, beat, certificates). Does not cover: the real agent, or a control server as a process
of its own (``test_control_crash``).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from documented import undocumented
from yarl import URL

from control.config import Config
from control.server import Bound, Server
from packer.usage import NO_USAGE, UsageBatch
from packer.wire import (
    WIRE_VERSION,
    Beat,
    BeatAnswer,
    DeviceReport,
    JoinAnswer,
    JoinAsk,
    ModelReport,
    Record,
    Report,
    TenantReport,
    decode,
    encode,
)

# Nothing in these tests takes longer unless something hangs.
PATIENCE_S = 60.0


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that has no event of its own, letting everybody else run meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        for looks in itertools.count():
            if true():
                return
            # What takes longer than some turns of the loop waits for another process or thread, which needs
            # the processor more than this does.
            await asyncio.sleep(0 if looks < 100 else 0.002)


# --- model directories ----------------------------------------------------------------------------


def safetensors(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file written by hand: name to (dtype, shape, bytes)."""
    header: dict[str, object] = {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def model_files(seed: int = 0, rows: int = 8) -> dict[str, bytes]:
    """The smallest directory that control accepts; another ``seed`` is another version."""
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 16}
    weights = bytes((seed + i) % 251 for i in range(rows * 16 * 4))
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors({"embeddings.word_embeddings.weight": ("F32", [rows, 16], weights)}),
        "tokenizer.json": b"{}",
    }


def declare(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The body that declares an upload."""
    return {
        "name": name,
        "files": [
            {"path": path, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in files.items()
        ],
    }


# --- the server -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json()["error"]


@dataclass(slots=True)
class Running:
    """A served control server and a client for it."""

    server: Server
    bound: Bound
    session: aiohttp.ClientSession
    operator_key: str

    @property
    def url(self) -> str:
        return self.bound.url

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = "",
        data: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request; with the operator's key unless another (or None) is given."""
        sent = dict(headers or {})
        chosen = self.operator_key if key == "" else key
        if chosen is not None:
            sent["Authorization"] = f"Bearer {chosen}"
        if body is not None:
            data = json.dumps(body).encode()
        if isinstance(data, bytes):
            data = BytesIO(data)  # large bytes would be sent in one piece
        # A str path is sent as it is written, dots and percent signs included.
        url = URL(self.url + path, encoded=True)
        async with asyncio.timeout(PATIENCE_S):
            async with self.session.request(method, url, data=data, headers=sent) as answer:
                got = Answer(answer.status, answer.headers, await answer.read())
        wrong = undocumented(method, path, got.status)
        assert wrong is None, f"{wrong}: {got.body[:300]!r}"
        return got

    async def tenant(self, name: str) -> str:
        """Create a tenant with one key; returns the key's text."""
        assert (await self.call("POST", "/api/v1/tenants", {"name": name})).status == 201
        return await self.key(name)

    async def key(self, tenant: str, **ask: object) -> str:
        made = await self.call("POST", f"/api/v1/tenants/{tenant}/keys", ask)
        assert made.status == 201, made.body
        return str(made.json()["key"])

    async def push(self, tenant: str, name: str, files: Mapping[str, bytes]) -> Any:
        """Declare, send and commit; returns the model's JSON."""
        declared = await self.call("POST", f"/api/v1/tenants/{tenant}/uploads", declare(name, files))
        assert declared.status == 201, declared.body
        upload = declared.json()
        for file in upload["files"]:
            data = files[file["path"]][file["offset_bytes"] :]
            if data:
                sent = await self.send_file(upload["upload_id"], file["path"], file["offset_bytes"], data)
                assert sent.status == 204, sent.body
        committed = await self.call("POST", f"/api/v1/uploads/{upload['upload_id']}/commit")
        assert committed.status in (200, 201), committed.body
        return committed.json()

    async def send_file(self, upload_id: str, path: str, offset: int, data: Any) -> Answer:
        return await self.call(
            "PATCH",
            f"/api/v1/uploads/{upload_id}/files/{path}",
            data=data,
            headers={"Upload-Offset": str(offset)},
        )

    async def recorded(self, kind: str) -> Any:
        """The first event of a kind; control stores its own a moment after it answers."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                events = (await self.call("GET", "/api/v1/events?after=0&limit=1000")).json()["items"]
                found = [event for event in events if event["kind"] == kind]
                if found:
                    return found[0]

    async def join(self, name: str, gateway_url: str = "http://127.0.0.1:9") -> FakeNode:
        """Make a token and join with it over TLS."""
        made = await self.call("POST", "/api/v1/nodes/tokens", {})
        assert made.status == 201, made.body
        node = FakeNode(self.bound.node_url, name, gateway_url)
        answer = await node.join(made.json()["token"])
        assert answer.status == 200, answer.body
        return node


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[Running]:
    """A control server with its data in ``folder``, stopped in order at the end.

    Gateways of fake nodes speak plain HTTP; ``test_control_listener`` has the real thing.
    """
    server = Server(Config(data_dir=folder, **{"plain_routes": True, **options}))
    bound = await server.start()
    operator_key = (folder / "operator.key").read_text().strip()
    # Nothing is followed, inflated or kept between calls that a test does not see.
    session = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0))
    try:
        yield Running(server, bound, session, operator_key)
    finally:
        await session.close()
        await server.stop()


# --- a node ---------------------------------------------------------------------------------------


def empty_report(gateway_url: str, models: tuple[ModelReport, ...] = (), **changes: Any) -> Report:
    device = DeviceReport("cpu:0", "cpu", "cpu", 96 << 20, 0, 0, True)
    report: dict[str, Any] = {
        "gateway_url": gateway_url,
        "started_ms": 1,
        "draining": False,
        "devices": (device,),
        "host_budget_bytes": 0,
        "host_used_bytes": 0,
        "disk_budget_bytes": 0,
        "disk_used_bytes": 0,
        "models": models,
        "tenants": (),
    }
    return Report(**{**report, **changes})


def tenant_report(tenant: str, **changes: Any) -> TenantReport:
    return replace(TenantReport(tenant, 0, 0, 0, 0, 0, 0, 0, 0, 0), **changes)


def model_report(ref: str, state: str = "absent", **changes: Any) -> ModelReport:
    names = ("leases", "waiting", "device_bytes", "host_bytes", "disk_bytes", "requests", "answers")
    values: dict[str, Any] = {**dict.fromkeys(names, 0), "device": None, "restores": (), "last_used_ms": 0}
    return ModelReport(ref=ref, state=state, **{**values, **changes})


@dataclass(slots=True)
class FakeNode:
    """Speaks the node's side of the wire with a key of its own."""

    node_url: str
    name: str
    gateway_url: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    chain_pem: str = ""
    ca_pem: str = ""
    have: tuple[int, int] = (0, 0)
    have_start: str = ""

    def csr_pem(self) -> str:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)])
        made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(self.key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM).decode()

    def context(self, folder: Path | None = None) -> ssl.SSLContext:
        """TLS with the node's certificate if ``folder`` is given to keep it in, else without."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=self.ca_pem)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if folder is not None:
            path = folder / f"{self.name}.pem"
            pem = self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            path.write_bytes(pem + self.chain_pem.encode())
            context.load_cert_chain(path)
        return context

    async def join(self, token: str) -> Answer:
        _, token_id, secret = token.split(".")
        answer = await self.call("GET", "/node/v1/ca", verify=False)
        self.ca_pem = answer.body.decode()
        ask = JoinAsk(WIRE_VERSION, token_id, secret, self.csr_pem(), self.name, self.gateway_url)
        joined = await self.call("POST", "/node/v1/join", encode(ask))
        if joined.status == 200:
            self.chain_pem = decode(joined.body, JoinAnswer).certificate_pem
        return joined

    async def call(
        self,
        method: str,
        path: str,
        data: bytes | BinaryIO | None = None,
        *,
        folder: Path | None = None,
        verify: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own; with the certificate if ``folder`` is given."""
        tls: ssl.SSLContext | bool = self.context(folder) if verify else False
        async with (
            asyncio.timeout(PATIENCE_S),
            aiohttp.ClientSession() as session,
            session.request(method, self.node_url + path, data=data, ssl=tls, headers=headers) as answer,
        ):
            return Answer(answer.status, answer.headers, await answer.read())

    async def beat(
        self,
        folder: Path,
        *,
        wait_ms: int = 0,
        report: Report | None = None,
        records: tuple[Record, ...] = (),
    ) -> BeatAnswer:
        """One beat; takes the plan of the answer as its own."""
        answer = await self.raw_beat(folder, wait_ms=wait_ms, report=report, records=records)
        assert answer.status == 200, answer.body
        got = decode(answer.body, BeatAnswer)
        if got.plan is not None:
            self.have = (got.plan.epoch, got.plan.seq)
            self.have_start = got.plan.start
        return got

    async def raw_beat(
        self,
        folder: Path,
        *,
        wait_ms: int = 0,
        report: Report | None = None,
        records: tuple[Record, ...] = (),
        node: str | None = None,
        usage: UsageBatch = NO_USAGE,
        spool: str = "",
    ) -> Answer:
        message = Beat(
            WIRE_VERSION,
            node or self.name,
            *self.have,
            wait_ms,
            report or empty_report(self.gateway_url),
            records,
            self.have_start,
            spool,
            usage=usage.rows,
            usage_seq=usage.seq,
        )
        return await self.call("POST", "/node/v1/beat", encode(message), folder=folder)
