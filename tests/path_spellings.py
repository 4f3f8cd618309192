"""Paths to somebody else's model in every spelling, and sending them byte for byte.

Covers: the spellings of ``/v1`` and ``/v2``, requests whose paths no client library tidies. Does not cover:
what must be answered (``attacks/test_gateway_paths.py``, ``attacks/test_router_paths.py``).
"""

from __future__ import annotations

import asyncio

# {m} is the foreign tenant's model "secret", or "absent", which nobody has.
VARIANTS = [
    "/v1/models/globex/{m}",
    "/v1/models/globex%2F{m}",
    "/v1/models/globex%2f{m}",
    "/v1/models/globex%252F{m}",
    "/v1/models/globex%25252F{m}",
    "/v1/models/globex//{m}",
    "/v1/models//globex/{m}",
    "/v1/models/%2Fglobex/{m}",
    "/v1/models/globex/{m}/",
    "/v1/models/globex/{m}%2F",
    "/v1/models/globex/{m}%00",
    "/v1/models/globex/{m}%0a",
    "/v1/models/globex/{m}%20",
    "/v1/models/globex/{m};x",
    "/v1/models/globex/{m}?tenant=globex",
    "/v1/models/globex/{m}#acme/embed",
    "/v1/models/globex/{m}@latest",
    "/v1/models/globex/{m}%40latest",
    "/v1/models/globex/{m}@0123456789abcdef",
    "/v1/models/globex/{m}@0123456789ABCDEF",
    "/v1/models/acme/../globex/{m}",
    "/v1/models/acme%2F..%2Fglobex%2F{m}",
    "/v1/models/acme/%2e%2e/globex/{m}",
    "/v1/models/acme/%2E%2E%2Fglobex%2F{m}",
    "/v1/models/acme/embed/../../globex/{m}",
    "/v1/models/acme/embed%2F..%2F..%2Fglobex%2F{m}",
    "/v1/models/./globex/{m}",
    "/v1/models/%2e/globex/{m}",
    "/v1/models/acme\\globex/{m}",
    "/v1/models/acme%5C..%5Cglobex%5C{m}",
    "/v1/models/GLOBEX/{m}",
    "/v1/models/%67lobex/{m}",
    "/v1/models/globex%EF%BC%8F{m}",
    "/v1/models/globex%C0%AF{m}",
    "/v1/models/globex%FF/{m}",
    "/v1/models/acme,globex/{m}",
    "/v1/models/acme%00globex/{m}",
    "/v1/models/" + "x" * 7000 + "/{m}",
]

# The same below /v2, with and without a word after the model; and versions, which only it writes as a part.
OIP_VARIANTS = [
    variant.replace("/v1/", "/v2/").replace("{m}", "{m}" + word)
    for variant in VARIANTS
    for word in ("", "/ready", "/config", "/stats", "%2Fstats")
] + [
    "/v2/models/globex/{m}/versions/0123456789abcdef",
    "/v2/models/globex/{m}/versions/latest/ready",
    "/v2/models/globex/{m}/versions/../stats",
    "/v2/models/globex/{m}/versions/",
    "/v2/models/globex/{m}/versions/0123456789abcdef/versions/0123456789abcdef",
    "/v2/models/globex/{m}@0123456789abcdef/versions/0123456789abcdef",
    "/v2/models/acme/embed/versions/../../globex/{m}",
    "/v2/models/acme/embed/versions/0123456789abcdef%2F..%2F..%2Fglobex%2F{m}",
    "/v2/models/globex/{m}/infer",
    "/v2/repository/models/globex/{m}/load",
]


async def get_raw(url: str, path: str, key: str) -> tuple[int, str]:
    """Send the path as it is written; status and body."""
    return await send_raw(url, "GET", path, key)


async def post_raw(url: str, path: str, key: str, body: bytes) -> tuple[int, str]:
    return await send_raw(url, "POST", path, key, body)


async def send_raw(url: str, method: str, path: str, key: str, body: bytes | None = None) -> tuple[int, str]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    length = f"Content-Length: {len(body)}\r\n" if body is not None else ""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {key}\r\n"
        f"{length}Connection: close\r\n\r\n"
    )
    writer.write(head.encode() + (body or b""))
    async with asyncio.timeout(60):
        answer = (await reader.read()).decode()
    writer.close()
    head, _, text = answer.partition("\r\n\r\n")
    return int(head.split()[1]), text
