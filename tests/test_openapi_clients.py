"""The unmodified ``schemathesis`` against a control server as a process of its own, by its OpenAPI document.

Covers: every operation below ``/api/v1`` and every GET below ``/v1`` and ``/v2``, with an operator's key, a
tenant's and none: no 5xx, no status, header, media type or body that the document does not know, nothing
wrong taken for right, no way past the key. Does not cover: whether what is valid is taken (a cursor and an
ETag are opaque, so that a made-up one that fits the document is refused; the rest has its own tests), and
removing a node (then there is none left to ask, which is a documented 503).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from control_process import Process, process
from running_control import FakeNode, declare, empty_report, model_files, model_report

from packer.questions import Replies, Reply
from packer.wire import WIRE_VERSION, encode

pytestmark = [pytest.mark.clients, pytest.mark.processes]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
    "ignored_auth",
)
PATIENCE_S = 240.0


async def push(server: Process, name: str) -> str:
    """A version whose name is the one that the document gives as an example."""
    files = model_files(1)
    _, upload = await server.call("POST", "/api/v1/tenants/acme/uploads", declare(name, files))
    path = f"/api/v1/uploads/{upload['upload_id']}"
    for file, data in files.items():
        headers = {"Upload-Offset": "0"}
        assert (await server.call("PATCH", f"{path}/files/{file}", data=data, headers=headers))[0] == 204
    status, model = await server.call("POST", f"{path}/commit")
    assert status == 201
    return str(model["ref"])


async def beat(node: FakeNode, folder: Path, ref: str, heard: asyncio.Event) -> None:
    """Be a node that is up and answers each question with "nothing known"."""
    report = empty_report(node.gateway_url, (model_report(ref),))
    while True:
        answer = await node.beat(folder, wait_ms=1_000 if heard.is_set() else 0, report=report)
        heard.set()
        if answer.questions:
            replies = Replies(WIRE_VERSION, tuple(Reply(each.question) for each in answer.questions))
            await node.call("POST", "/node/v1/replies", encode(replies), folder=folder)


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[tuple[Process, str]]:
    """A control server with one of everything, and the key of its tenant."""
    origins = folder / "origins"
    origins.mkdir()
    async with process(folder / "control", "--origin-root", str(origins)) as server:
        await server.call("POST", "/api/v1/tenants", {"name": "acme"})
        _, key = await server.call("POST", "/api/v1/tenants/acme/keys", {})
        ref = await push(server, "minilm")
        _, token = await server.call("POST", "/api/v1/nodes/tokens", {})
        node, heard = FakeNode(server.node_url, "box-1", "http://127.0.0.1:9"), asyncio.Event()
        assert (await node.join(token["token"])).status == 200
        beats = asyncio.create_task(beat(node, folder, ref, heard))
        try:
            await heard.wait()
            yield server, key["key"]
        finally:
            beats.cancel()
            with suppress(asyncio.CancelledError):
                await beats


async def schemathesis(server: Process, folder: Path, key: str, examples: int, *options: str) -> str:
    """Run it to its end; what it said, which must be that it found nothing."""
    words = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{server.url}/api/v1/openapi.json",
        "--header",
        f"Authorization: Bearer {key}",
        "--checks",
        ",".join(CHECKS),
        "--max-examples",
        str(examples),
        "--seed",
        "1",
        "--suppress-health-check",
        "all",
        "--no-shrink",
        "--continue-on-failure",
        "--warnings",
        "off",
        *options,
    ]
    started = await asyncio.create_subprocess_exec(
        *words, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            said, _ = await started.communicate()
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()
    text = said.decode(errors="replace")
    assert started.returncode == 0, text[-12_000:]
    return text


async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """First with a tenant's key, who may do little, then with an operator's, who may do everything."""
    management = ("--include-path-regex", "^/api/v1/")
    async with site(tmp_path) as (server, key):
        # Below /v1 and /v2 are wildcards, which answer every method themselves.
        reads = ("--include-path-regex", "^/v[12]/", "--exclude-method", "POST")
        reads += ("--exclude-checks", "unsupported_method,allow_header_conformance")
        for options in (management, reads):
            said = await schemathesis(server, tmp_path, key, 4, "--phases", "fuzzing", *options)
            assert "No issues found" in said
        removal = ("--exclude-operation-id", "removeNode")
        said = await schemathesis(server, tmp_path, server.operator_key, 3, *management, *removal)
        assert "Stateful" in said
        assert "No issues found" in said
        status, _ = await server.call("GET", "/healthz")
        assert status == 200
