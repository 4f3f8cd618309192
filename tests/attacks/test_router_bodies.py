"""Threat: a body that costs control more than it costs the caller.

Covers: compression and JSON bombs, and bodies that are declared and withheld, against a control server in a
process of its own whose memory is measured. Does not cover: the node's gateway (``test_gateway_bodies``),
uploads of models (``test_uploads``) or tensors (``test_oip_bodies``).
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from pathlib import Path

import pytest
import zstandard
from control_process import Process, process
from gateway_process import first_status, peak_bytes

from packer.http import JSON_BYTES_MAX

pytestmark = pytest.mark.processes

INFLATED_BYTES = 128 * 1024 * 1024
GROWTH_BYTES_MAX = 24 * 1024 * 1024
# What a million bytes of JSON become at most in a decoder that keeps all of it is some 60 MiB.
PATHS = (
    "/v1/embeddings",
    "/v1/nothing",
    "/v2/models/acme/m/infer",
    "/api/v1/tenants",
    "/api/v1/nodes/tokens",
)


async def keys(control: Process) -> tuple[str, str]:
    """A tenant's and the operator's."""
    assert (await control.call("POST", "/api/v1/tenants", {"name": "acme"}))[0] == 201
    status, made = await control.call("POST", "/api/v1/tenants/acme/keys", {})
    assert status == 201
    return str(made["key"]), control.operator_key


def head(path: str, key: str, length: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def bombs() -> dict[str, bytes]:
    zeros = bytes(INFLATED_BYTES)
    return {
        "gzip": gzip.compress(zeros, 6),
        "deflate": zlib.compress(zeros, 6),
        "zstd": zstandard.ZstdCompressor(3).compress(zeros),
        "br": bytes(1000),  # refused by its name
    }


def json_bombs() -> dict[str, bytes]:
    room = JSON_BYTES_MAX - 100
    return {
        "deep lists": b"[" * room,
        "deep objects": b'{"a":' * (room // 5),
        "empty lists": b'{"model":"acme/m","x":[' + b"[]," * (room // 3) + b"[]]}",
        "small numbers": b'{"model":"acme/m","name":[' + b"7," * (room // 2) + b"7]}",
        "many keys": b'{"model":"acme/m",'
        + b",".join(b'"%d":0' % number for number in range(room // 10))
        + b"}",
        "a number": b'{"model":' + b"9" * room + b"}",
        "a text": b'{"model":"' + b"\\u0041" * (room // 6) + b'"}',
    }


async def test_no_body_makes_control_grow(tmp_path: Path) -> None:
    compressed, nested = bombs(), json_bombs()
    async with process(tmp_path / "control") as control:
        for key in await keys(control):
            for path in PATHS:  # warms up
                await first_status(control.url, head(path, key, 2) + b"{}")
            before = peak_bytes(control.handle.pid)
            for path in PATHS:
                for name, bomb in compressed.items():
                    sent = head(path, key, len(bomb), f"Content-Encoding: {name}") + bomb
                    assert await first_status(control.url, sent) == 415, (path, name)
                for name, body in nested.items():
                    status = await first_status(control.url, head(path, key, len(body)) + body)
                    assert 400 <= status < 500, (path, name)
            withheld = head("/v1/embeddings", key, 10 * 1024**3)
            statuses = await asyncio.gather(*(first_status(control.url, withheld) for _ in range(50)))
            assert set(statuses) <= {403, 413}
            assert peak_bytes(control.handle.pid) - before < GROWTH_BYTES_MAX
        assert (await control.call("GET", "/api/v1/tenants"))[0] == 200
