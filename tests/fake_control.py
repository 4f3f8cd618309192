"""A control server and gateway in memory, for tests of the SDK and the command line.

Covers: the routes of the management API and of ``/v1`` with their shapes, statuses and headers, and
faults on demand. Does not cover: limits, durability or real models; a contract test runs the SDK
against the real apps. Also runs as a process (``python fake_control.py serve ...``), as a stand-in for
``bunk-control``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import secrets
import signal
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

OPERATOR_KEY = "bk_operatoraaaa_" + "o" * 43
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Fault:
    """Answers ``status`` instead of the route's own answer, ``times`` times."""

    method: str
    path: str  # a prefix
    status: int  # 0: cut the connection
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    after_bytes: int | None = None  # of an upload: store this much, then cut the connection


def refuse(status: int, code: str, message: str, **extra: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message, **extra}}, status=status)


class FakeControl:
    """State and routes."""

    def __init__(self) -> None:
        self.tenants: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, dict[str, Any]] = {}
        self.quotas: dict[str, dict[str, Any]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.routers: dict[str, dict[str, Any]] = {"r1": {"router": "r1", "state": "up"}}
        self.tokens: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.usage: list[dict[str, Any]] = []
        self.ps: dict[str, Any] = {"items": [], "devices": []}
        self.plan: dict[str, Any] = {"model": "acme/m@0", "items": []}
        self.explanation: dict[str, Any] = {"requests": [], "items": [], "silent": []}
        self.asked: dict[str, str] = {}  # the query of the last plan or explanation
        self.about: dict[str, Any] = {"version": "0.1.0", "key_id": "op", "tenant": None, "expires_ms": None}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # method and raw path
        self.bodies: list[dict[str, Any]] = []  # of /v1 calls
        self.headers: list[dict[str, str]] = []
        self.received_bytes = 0  # of uploads
        self.texts = ["Hel", "lo ", "wörld"]
        self.break_stream: str | None = None  # "error": an error event, "cut": no [DONE]

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=64 * 1024 * 1024)
        t = "/api/v1/tenants"
        app.add_routes(
            [
                web.post(t, self.create_tenant),
                web.get(t, self.list_tenants),
                web.delete(t + "/{tenant}", self.delete_tenant),
                web.post(t + "/{tenant}/keys", self.create_key),
                web.get(t + "/{tenant}/keys", self.list_keys),
                web.delete("/api/v1/keys/{key_id}", self.revoke_key),
                web.get(t + "/{tenant}/quota", self.show_quota),
                web.patch(t + "/{tenant}/quota", self.set_quota),
                web.post(t + "/{tenant}/uploads", self.declare),
                web.get("/api/v1/uploads/{upload}", self.show_upload),
                web.patch("/api/v1/uploads/{upload}/files/{path:.*}", self.send_piece),
                web.post("/api/v1/uploads/{upload}/commit", self.commit),
                web.post(t + "/{tenant}/models", self.register),
                web.get("/api/v1/models", self.list_models),
                web.get("/api/v1/models/{ref:.+}", self.show_model),
                web.delete("/api/v1/models/{ref:.+}", self.delete_model),
                web.get("/api/v1/nodes", self.list_nodes),
                web.post("/api/v1/nodes/tokens", self.create_token),
                web.patch("/api/v1/nodes/{node}", self.set_node),
                web.delete("/api/v1/nodes/{node}", self.delete_node),
                web.get("/api/v1/routers", self.list_routers),
                web.post("/api/v1/routers/tokens", self.create_token),
                web.delete("/api/v1/routers/{router}", self.delete_router),
                web.get("/api/v1/about", self.show_about),
                web.get("/api/v1/ps", self.show_ps),
                web.get("/api/v1/plan", self.show_plan),
                web.get("/api/v1/explain", self.show_explanation),
                web.get("/api/v1/events", self.list_events),
                web.get("/api/v1/usage", self.list_usage),
                web.post("/v1/embeddings", self.embeddings),
                web.post("/v1/classify", self.classify),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.requests.append((request.method, request.raw_path))
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key != OPERATOR_KEY and all(key != row["key"] for row in self.keys.values()):
            return refuse(401, "invalid_api_key", "The key is not valid.")
        for fault in self.faults:
            if fault.times and fault.method == request.method and request.path.startswith(fault.path):
                fault.times -= 1
                if fault.after_bytes is not None:
                    await self._store_some(request, fault.after_bytes)
                if fault.status == 0:
                    assert request.transport is not None
                    request.transport.abort()
                    return web.Response()
                return web.json_response(fault.body, status=fault.status, headers=fault.headers)
        return await handler(request)

    def _may(self, request: web.Request) -> str | None:
        """The tenant in the path, if it exists and the key may act for it."""
        tenant = request.match_info["tenant"]
        key = request.headers["authorization"].removeprefix("Bearer ")
        owners = {row["tenant"] for row in self.keys.values() if row["key"] == key}
        return tenant if tenant in self.tenants and (key == OPERATOR_KEY or tenant in owners) else None

    # Tenants, keys, quotas.

    async def create_tenant(self, request: web.Request) -> web.Response:
        name = (await request.json())["name"]
        if name in self.tenants:
            return refuse(409, "tenant_exists", f"The tenant {name!r} exists already.", field="name")
        if not name.islower():
            return refuse(400, "invalid_value", "not a tenant name", field="name", hint="use a-z")
        self.tenants[name] = {"tenant": name, "created_ms": 1_700_000_000_000, "keys": 0, "models": 0}
        return web.json_response(self.tenants[name], status=201)

    async def list_tenants(self, request: web.Request) -> web.Response:
        return web.json_response({"items": list(self.tenants.values())})

    async def delete_tenant(self, request: web.Request) -> web.Response:
        if self.tenants.pop(request.match_info["tenant"], None) is None:
            return refuse(404, "tenant_not_found", "There is no such tenant, or it is not yours.")
        return web.Response(status=204)

    async def create_key(self, request: web.Request) -> web.Response:
        tenant = self._may(request)
        if tenant is None:
            return refuse(404, "tenant_not_found", "There is no such tenant, or it is not yours.")
        return web.json_response(self.add_key(tenant, await request.json()), status=201)

    def add_key(self, tenant: str, ask: dict[str, Any]) -> dict[str, Any]:
        key_id = base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]
        self.keys[key_id] = {
            "key_id": key_id,
            "key": f"bk_{key_id}_{secrets.token_urlsafe(32)}",
            "tenant": tenant,
            "label": ask.get("label", ""),
            "created_ms": 1_700_000_000_000,
            "expires_ms": None if "ttl_s" not in ask else 4_000_000_000_000 + ask["ttl_s"],
        }
        return self.keys[key_id]

    async def list_keys(self, request: web.Request) -> web.Response:
        tenant = self._may(request)
        rows = [
            {name: value for name, value in row.items() if name != "key"}
            for row in self.keys.values()
            if row["tenant"] == tenant
        ]
        return web.json_response({"items": rows})

    async def revoke_key(self, request: web.Request) -> web.Response:
        if self.keys.pop(request.match_info["key_id"], None) is None:
            return refuse(404, "key_not_found", "There is no such key.")
        return web.Response(status=204)

    def _quota(self, tenant: str) -> dict[str, Any]:
        none = {"reserved": 0, "max": None}
        start = {"device": none, "host": none, "disk": none, "weight": 1, "priority": 0}
        return self.quotas.setdefault(tenant, {**start, "requests_per_minute": None, "concurrency": None})

    def _quota_answer(self, tenant: str) -> web.Response:
        usage = {
            "node": "local",
            "tenant": tenant,
            "device_bytes": 3 * 1024 * 1024,
            "requests": 7,
            "answers": 6,
            "rates": [
                {"name": "tokens_per_minute", "limit": 900, "burst": 900, "remaining": 896, "reset_ms": 267}
            ],
        }
        return web.json_response(
            {
                "tenant": tenant,
                "quota": self._quota(tenant),
                "usage": [usage],
                "warnings": ["too much is promised"],
            }
        )

    async def show_quota(self, request: web.Request) -> web.Response:
        tenant = self._may(request)
        return self._quota_answer(tenant) if tenant else refuse(404, "tenant_not_found", "no such tenant")

    async def set_quota(self, request: web.Request) -> web.Response:
        tenant = self._may(request)
        if tenant is None:
            return refuse(404, "tenant_not_found", "no such tenant")
        quota = self._quota(tenant)
        for name, value in (await request.json()).items():
            quota[name] = {**quota[name], **value} if isinstance(value, dict) else value
        return self._quota_answer(tenant)

    # Models and uploads.

    async def declare(self, request: web.Request) -> web.Response:
        tenant = self._may(request)
        if tenant is None:
            return refuse(404, "tenant_not_found", "There is no such tenant, or it is not yours.")
        ask = await request.json()
        digest = hashlib.sha256(json.dumps([tenant, ask], sort_keys=True).encode()).hexdigest()
        upload = self.uploads.setdefault(
            digest[:16],
            {"tenant": tenant, "name": ask["name"], "files": ask["files"], "data": {}},
        )
        for file in ask["files"]:
            upload["data"].setdefault(file["path"], bytearray())
        return self._upload_answer(digest[:16], 201)

    def _upload_answer(self, upload_id: str, status: int = 200) -> web.Response:
        data = self.uploads[upload_id]["data"]
        files = [{"path": path, "offset_bytes": len(part)} for path, part in data.items()]
        return web.json_response({"upload_id": upload_id, "files": files}, status=status)

    async def show_upload(self, request: web.Request) -> web.Response:
        if request.match_info["upload"] not in self.uploads:
            return refuse(404, "upload_not_found", "There is no such upload.")
        return self._upload_answer(request.match_info["upload"])

    async def send_piece(self, request: web.Request) -> web.Response:
        upload = self.uploads.get(request.match_info["upload"])
        if upload is None or request.match_info["path"] not in upload["data"]:
            return refuse(404, "upload_not_found", "There is no such upload.")
        part = upload["data"][request.match_info["path"]]
        if int(request.headers["upload-offset"]) != len(part):
            answer = refuse(409, "wrong_offset", f"go on from {len(part)}")
            answer.headers["Upload-Offset"] = str(len(part))
            return answer
        piece = await request.read()
        self.received_bytes += len(piece)
        part += piece
        return web.Response(status=204, headers={"Upload-Offset": str(len(part))})

    async def _store_some(self, request: web.Request, count: int) -> None:
        _, _, _, _, upload_id, _, path = request.path.split("/", 6)
        part = self.uploads[upload_id]["data"][path]
        some = await request.content.read(count)
        part += some
        self.received_bytes += len(some)

    async def commit(self, request: web.Request) -> web.Response:
        upload = self.uploads.get(request.match_info["upload"])
        if upload is None:
            return refuse(404, "upload_not_found", "There is no such upload.")
        for file in upload["files"]:
            part = bytes(upload["data"][file["path"]])
            if (len(part), hashlib.sha256(part).hexdigest()) != (file["size_bytes"], file["sha256"]):
                return refuse(409, "upload_incomplete", f"{file['path']} is not complete.")
        return web.json_response(self.add_model(upload, "control:"), status=201)

    def add_model(self, source: dict[str, Any], origin: str) -> dict[str, Any]:
        version = hashlib.sha256(json.dumps(source["files"], sort_keys=True).encode()).hexdigest()[:16]
        ref = f"{source['tenant']}/{source['name']}@{version}"
        for row in self.models.values():
            if (row["tenant"], row["name"]) == (source["tenant"], source["name"]):
                row["latest"] = False
        self.models[ref] = {
            "ref": ref,
            "tenant": source["tenant"],
            "name": source["name"],
            "version": version,
            "latest": True,
            "task": "embedding",
            "engine": "transformers",
            "image_bytes": sum(file["size_bytes"] for file in source["files"]),
            "workspace_bytes": 1024,
            "origin": origin,
            "created_ms": 1_700_000_000_000,
            "files": source["files"],
        }
        return self.models[ref]

    async def register(self, request: web.Request) -> web.Response:
        ask = await request.json()
        source = {"tenant": request.match_info["tenant"], "name": ask["name"], "files": []}
        return web.json_response(self.add_model(source, ask["origin"]), status=201)

    def _find_model(self, ref: str) -> list[dict[str, Any]]:
        return [row for row in self.models.values() if ref in (row["ref"], row["ref"].partition("@")[0])]

    async def list_models(self, request: web.Request) -> web.Response:
        tenant = request.query.get("tenant")
        return web.json_response(
            {"items": [r for r in self.models.values() if tenant in (None, r["tenant"])]}
        )

    async def show_model(self, request: web.Request) -> web.Response:
        found = self._find_model(request.match_info["ref"])
        return web.json_response(found[-1]) if found else refuse(404, "model_not_found", "no such model")

    async def delete_model(self, request: web.Request) -> web.Response:
        found = self._find_model(request.match_info["ref"])
        for row in found:
            del self.models[row["ref"]]
        return web.Response(status=204) if found else refuse(404, "model_not_found", "no such model")

    # The fleet.

    async def list_nodes(self, request: web.Request) -> web.Response:
        return web.json_response({"items": list(self.nodes.values())})

    async def create_token(self, request: web.Request) -> web.Response:
        ask = await request.json()
        text = f"pin.token{len(self.tokens)}.{'s' * 43}"
        row = {"token": text, "token_id": f"token{len(self.tokens)}", "expires_ms": 4_000_000_000_000, **ask}
        self.tokens.append(row)
        return web.json_response(row, status=201)

    async def set_node(self, request: web.Request) -> web.Response:
        row = self.nodes.get(request.match_info["node"])
        if row is None:
            return refuse(404, "node_not_found", "There is no such node.")
        row["state"] = "draining" if (await request.json())["draining"] else "up"
        return web.json_response(row)

    async def delete_node(self, request: web.Request) -> web.Response:
        if self.nodes.pop(request.match_info["node"], None) is None:
            return refuse(404, "node_not_found", "There is no such node.")
        return web.Response(status=204)

    async def list_routers(self, request: web.Request) -> web.Response:
        return web.json_response({"items": list(self.routers.values())})

    async def delete_router(self, request: web.Request) -> web.Response:
        if self.routers.pop(request.match_info["router"], None) is None:
            return refuse(404, "router_not_found", "There is no such router.")
        return web.Response(status=204)

    async def show_about(self, request: web.Request) -> web.Response:
        return web.json_response({"now_ms": time.time_ns() // 1_000_000, **self.about})

    async def show_plan(self, request: web.Request) -> web.Response:
        self.asked = dict(request.query)
        return web.json_response(self.plan)

    async def show_explanation(self, request: web.Request) -> web.Response:
        self.asked = dict(request.query)
        return web.json_response(self.explanation)

    async def show_ps(self, request: web.Request) -> web.Response:
        return web.json_response(self.ps)

    async def list_events(self, request: web.Request) -> web.Response:
        after, limit = int(request.query.get("after", 0)), int(request.query.get("limit", 100))
        items = [row for row in self.events if row["id"] > after][:limit]
        return web.json_response({"items": items, "next": items[-1]["id"] if items else after})

    async def list_usage(self, request: web.Request) -> web.Response:
        self.asked = dict(request.query)
        return web.json_response({"items": self.usage, "next_cursor": None})

    # OpenAI-compatible calls.

    async def _call(self, request: web.Request) -> tuple[dict[str, Any], dict[str, str]]:
        body = await request.json()
        self.bodies.append(body)
        headers = {"x-request-id": "req-1", "x-bunkhouse-node": "local", "x-bunkhouse-tier": "disk"}
        return body, {**headers, "x-bunkhouse-restore-ms": "42"}

    async def embeddings(self, request: web.Request) -> web.Response:
        body, headers = await self._call(request)
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        rows = []
        for i in range(len(inputs)):
            packed = base64.b64encode(struct.pack("<3f", 0.1, -2.5, float(i))).decode()
            rows.append({"object": "embedding", "index": i, "embedding": packed})
        usage = {"prompt_tokens": 5, "total_tokens": 5}
        answer = {"object": "list", "data": rows[::-1], "model": body["model"], "usage": usage}
        return web.json_response(answer, headers=headers)

    async def classify(self, request: web.Request) -> web.Response:
        body, headers = await self._call(request)
        data = [{"index": 0, "label": "good", "probs": [0.25, 0.75], "num_classes": 2}]
        return web.json_response(
            {"model": body["model"], "data": data, "usage": {"prompt_tokens": 3}}, headers=headers
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body, headers = await self._call(request)
        if body.get("stream"):
            return await self._stream(request, headers, lambda text: {"delta": {"content": text}})
        choice = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
        return self._completion(body, choice, headers)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body, headers = await self._call(request)
        if body.get("stream"):
            return await self._stream(request, headers, lambda text: {"text": text})
        return self._completion(body, {"index": 0, "text": " there", "finish_reason": "length"}, headers)

    def _completion(
        self, body: dict[str, Any], choice: dict[str, Any], headers: dict[str, str]
    ) -> web.Response:
        usage = {"prompt_tokens": 4, "completion_tokens": 2}
        return web.json_response(
            {"model": body["model"], "choices": [choice], "usage": usage}, headers=headers
        )

    async def _stream(
        self, request: web.Request, headers: dict[str, str], choice: Callable[[str], dict[str, Any]]
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={**headers, "content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b": restoring\n\n")
        for text in self.texts:
            data = json.dumps({"choices": [{"index": 0, **choice(text)}]}, ensure_ascii=False).encode()
            # In two parts, and a line of its own ending, so that the decoder sees every seam.
            event = b"data: " + data + b"\r\n\r\n"
            await answer.write(event[: len(event) - 3])
            await answer.write(event[len(event) - 3 :])
        if self.break_stream == "error":
            await answer.write(b'data: {"error": {"message": "the worker died", "code": "worker_died"}}\n\n')
            return answer
        if self.break_stream == "cut":
            return answer
        await answer.write(b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n')
        await answer.write(
            b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}\n\n'
        )
        await answer.write(b"data: [DONE]\n\n")
        return answer


@contextmanager
def serving(control: FakeControl) -> Iterator[str]:
    """Serve in a thread of its own; yields the URL. So that blocking clients can be tested."""
    loop = asyncio.new_event_loop()
    started: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def run() -> None:
        runner = web.AppRunner(control.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert ready.wait(60)
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


async def _serve(options: argparse.Namespace) -> None:
    """As ``bunk-control serve``: one node joins as soon as anybody asks for the nodes."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    control = FakeControl()
    control.nodes["local"] = {"node": "local", "state": "up", "gateway_url": "http://127.0.0.1:1"}
    saved = options.data_dir / "keys.json"
    if saved.exists():
        control.keys = json.loads(saved.read_text())
        control.tenants = {row["tenant"]: {"tenant": row["tenant"]} for row in control.keys.values()}
    options.data_dir.mkdir(parents=True, exist_ok=True)
    (options.data_dir / "operator.key").write_text(OPERATOR_KEY + "\n")
    runner = web.AppRunner(control.app(), shutdown_timeout=0.1)
    await runner.setup()
    host, _, port = options.listen.rpartition(":")
    await web.TCPSite(runner, host, int(port)).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    temporary = options.ready_file.with_suffix(".tmp")
    node_url = f"https://{options.node_listen.rpartition(':')[0]}:1"
    temporary.write_text(json.dumps({"url": url, "node_url": node_url}))
    os.replace(temporary, options.ready_file)
    await stop.wait()
    saved.write_text(json.dumps(control.keys))
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--node-listen", required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--origin-root", action="append", default=[])
    parser.add_argument("--node-host", action="append", default=[])
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
