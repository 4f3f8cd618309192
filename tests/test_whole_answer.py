"""A small answer that is written in one piece is the answer that aiohttp would have written.

Covers: ``packer/whole_answer.py`` against aiohttp's own way, and when that is taken instead. Does not cover:
what apps say in their headers (``test_gateway``, ``test_forwarding``), or slow callers
(``tests/attacks/test_crowds``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from packer.crowd import SMALL_BYTES_MAX
from packer.http import SAYS, openai_response, protect
from packer.whole_answer import WholeAnswer


@asynccontextmanager
async def asked(
    body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return WholeAnswer(request.app, body, "application/json", status, headers).send_now(request)

    app = web.Application()
    protect(app, openai_response)
    app[SAYS] = lambda request: {"x-said": request.method}
    app.add_routes([web.post("/", answer), web.get("/", answer)])
    async with TestClient(TestServer(app)) as client:
        yield client


def told(response: ClientResponse) -> dict[str, str]:
    """Headers but for those that differ from one request to the next."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    assert headers.pop("date").endswith(" GMT")
    assert headers.pop("x-request-id").startswith("req_")
    headers.pop("connection", None)
    return headers


@pytest.mark.parametrize("size", [0, 1, 4_000, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1])
async def test_it_is_the_answer_that_aiohttp_would_have_written(size: int) -> None:
    async with asked(b"x" * size, headers={"X-Own": "yes"}) as client:
        for _ in range(2):  # the connection stays and is used again
            kept = await client.post("/", data=b"{}")
            assert await kept.read() == b"x" * size
        ended = await client.post("/", data=b"{}", headers={"Connection": "close"})
        assert await ended.read() == b"x" * size
        assert kept.status == ended.status == 200
        assert told(kept) == told(ended)
        assert kept.headers["x-said"] == "POST"
        assert kept.headers["X-Own"] == "yes"
        assert kept.headers["Server"] == "bunkhouse"


async def test_aiohttp_never_hears_of_one_that_is_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would compare aiohttp's way with itself."""
    taken: list[str] = []
    real = web.Response.prepare

    async def watched(self: web.Response, request: web.BaseRequest) -> object:
        taken.append(request.headers.get("Connection", "keep"))
        return await real(self, request)

    monkeypatch.setattr(web.Response, "prepare", watched)
    async with asked(b"{}") as client:
        await client.post("/", data=b"{}")
        assert taken == []
        await client.post("/", data=b"{}", headers={"Connection": "close"})
        await client.head("/")
        await client.get("/")
    assert taken == ["close", "keep"]


async def test_another_status_goes_aiohttps_way() -> None:
    async with asked(b"{}", status=503) as client:
        response = await client.post("/", data=b"{}")
        assert (response.status, await response.read()) == (503, b"{}")


async def test_a_head_is_answered_without_a_body() -> None:
    async with asked(b"{}") as client:
        response = await client.head("/")
        assert (response.status, response.headers["Content-Length"]) == (200, "2")
        assert await response.read() == b""


async def test_a_header_that_would_be_two_lines_is_never_written() -> None:
    answer = WholeAnswer(web.Application(), b"{}", "application/json")
    answer.headers["x-bad"] = "a\r\nx-worse: b"

    async def handler(request: web.Request) -> web.StreamResponse:
        return answer.send_now(request)

    app = web.Application()
    protect(app, openai_response)
    app.add_routes([web.get("/", handler)])
    async with TestClient(TestServer(app)) as client:
        response = await client.get("/")
        assert (response.status, (await response.json())["error"]["code"]) == (500, "internal_error")
        assert "x-worse" not in response.headers
