"""What control answers to a node: bodies that come in pieces, end too early or never end, and refusals.

Covers: ``packer/control_answers.py`` over a real socket. Does not cover: what the uplink makes of an answer
(``test_uplink``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from packer.control_answers import Answer, read_answer, refusal_of, text_of
from packer.wire import BadMessage


@asynccontextmanager
async def answering(
    pieces: Sequence[bytes], stated: int | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer whose first piece is here; the others come when somebody reads on."""
    more = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(status=201)
        if stated is not None:
            answer.content_length = stated
        await answer.prepare(request)
        await answer.write(pieces[0])
        await more.wait()
        for piece in pieces[1:]:
            await answer.write(piece)
        if stated is not None and request.transport is not None:
            request.transport.close()
        return answer

    app = web.Application()
    app.router.add_get("/", handle)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        async with session.get(server.make_url("/")) as answer:
            asyncio.get_running_loop().call_soon(more.set)
            yield answer


async def test_an_answer_is_read_to_its_end_in_however_many_pieces_it_comes() -> None:
    async with answering([b"{", b'"a": ', b"1}"]) as answer:
        assert await read_answer(answer) == Answer(201, b'{"a": 1}')


async def test_an_answer_that_breaks_off_or_is_too_long_is_none() -> None:
    async with answering([b"abc"], stated=9) as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await read_answer(answer)
    async with answering([b"abc", b"d"]) as answer:
        with pytest.raises(BadMessage, match="limit of 3 bytes"):
            await read_answer(answer, 3)


def test_a_refusal_has_a_code_and_a_text_whatever_its_body_is() -> None:
    assert refusal_of(b'{"error": {"code": "x", "message": "y"}}') == ("x", "y")
    assert refusal_of(b"no JSON") == ("", "no JSON")
    assert text_of(b"\xff") == "1 bytes"
