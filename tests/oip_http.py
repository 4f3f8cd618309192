"""The Open Inference Protocol over plain HTTP, for tests that say exactly what is sent.

Covers: requests with JSON and raw tensors, and taking an answer apart. Does not cover: real clients
(``test_oip_clients.py``).
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import aiohttp
from yarl import URL

HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Answer:
    """``raw``: what follows the JSON."""

    status: int
    headers: Mapping[str, str]
    json: Any
    raw: bytes = b""

    @property
    def error(self) -> str:
        assert list(self.json) == ["error"], self.json
        assert isinstance(self.json["error"], str)
        return self.json["error"]

    def output(self, name: str) -> Any:
        (found,) = [one for one in self.json["outputs"] if one["name"] == name]
        return found


async def call(
    url: str,
    method: str,
    path: str,
    key: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request, its path sent as it is written."""
    # Large bytes would be sent in one piece.
    data = None if body is None else BytesIO(body)
    sent = {"Authorization": f"Bearer {key}", **(headers or {})}
    async with aiohttp.ClientSession() as session:
        async with session.request(method, URL(url + path, encoded=True), data=data, headers=sent) as answer:
            found = await answer.read()
            length = int(answer.headers.get(HEADER_LENGTH, len(found)))
            lowered = {name.lower(): value for name, value in answer.headers.items()}
            return Answer(answer.status, lowered, json.loads(found[:length]), found[length:])


async def get(url: str, path: str, key: str) -> Answer:
    return await call(url, "GET", path, key)


async def infer(
    url: str, model: str, key: str, ask: object, raw: bytes | None = None, length: int | None = None
) -> Answer:
    """``ask`` as JSON; with ``raw`` its bytes follow. ``length``: what the header claims, not the truth."""
    head = ask if isinstance(ask, bytes) else json.dumps(ask).encode()
    headers = {}
    if raw is not None or length is not None:
        headers[HEADER_LENGTH] = str(len(head) if length is None else length)
    return await call(url, "POST", f"/v2/models/{model}/infer", key, head + (raw or b""), headers)


async def declare(
    url: str, path: str, key: str, nbytes: int, headers: Mapping[str, str] | None = None
) -> Answer:
    """A POST that states the length of its body and sends nothing of it."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = {"Host": host, "Authorization": f"Bearer {key}", "Content-Length": str(nbytes), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode())
    try:
        async with asyncio.timeout(60):
            said = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(said.partition("content-length: ")[2].split()[0])
            body = await reader.readexactly(length)
    finally:
        writer.transport.abort()
    return Answer(int(said.split()[1]), {}, json.loads(body))


def texts(*values: str, **more: object) -> dict[str, Any]:
    """A request of an embedding or classification model, as JSON."""
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(values)], "data": list(values)}
    return {"inputs": [tensor], **more}


def packed(*values: bytes) -> bytes:
    """A BYTES tensor."""
    return b"".join(struct.pack("<I", len(one)) + one for one in values)


def raw_input(name: str, datatype: str, shape: Sequence[int], nbytes: int) -> dict[str, Any]:
    parameters = {"binary_data_size": nbytes}
    return {"name": name, "datatype": datatype, "shape": list(shape), "parameters": parameters}


def json_input(name: str, datatype: str, shape: Sequence[int], data: object) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}
