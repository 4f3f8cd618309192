"""Threat: a body that costs the node more than it costs the caller, or that breaks a handler.

Covers: compression bombs (with the server's memory measured), huge, endless, slow and withheld bodies, deep
JSON, NUL bytes, wrong types everywhere, mutated bodies, contradictory lengths, overlong headers. None may be
a 5xx, and the gateway answers the next caller. Does not cover: what an engine makes of a legal input.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import zlib
from collections.abc import Iterator

import aiohttp
import pytest
import zstandard
from fake_node import SOON_SECONDS, FakeNode, served
from gateway_process import first_status, own_process, peak_bytes
from json_pieces import JSON_PIECES

import packer.body_budget
from packer.body_budget import OWNER_BODIES_BYTES_MAX
from packer.http import JSON_BYTES_MAX, ApiError, decode_json

VALID: dict[str, dict[str, object]] = {
    "/v1/embeddings": {"model": "acme/embed", "input": ["a"], "encoding_format": "float"},
    "/v1/classify": {"model": "acme/moods", "input": "a"},
    "/v1/completions": {"model": "acme/chat", "prompt": "a", "max_tokens": 2, "stop": ["b"], "seed": 1},
    "/v1/chat/completions": {
        "model": "acme/chat",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.5,
        "stream": False,
    },
}
BOMB_BYTES = 300 * 1024 * 1024
MEMORY_GROWTH_BYTES_MAX = 24 * 1024 * 1024


def bombs() -> Iterator[tuple[str, bytes]]:
    zeros = bytes(BOMB_BYTES)
    yield "gzip", gzip.compress(zeros, 9)
    yield "deflate", zlib.compress(zeros, 9)
    yield "zstd", zstandard.ZstdCompressor(19).compress(zeros)


@pytest.mark.processes
async def test_compression_bombs_are_refused_in_bounded_memory() -> None:
    """300 MiB of zeros in a body below the limit; the server's peak memory stays where it was."""
    with own_process() as (url, key, pid):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        async with aiohttp.ClientSession() as session:
            async with session.post(
                f"{url}/v1/embeddings", json=VALID["/v1/embeddings"], headers=headers
            ) as answer:
                assert answer.status == 200
            before = peak_bytes(pid)
            for encoding, bomb in bombs():
                assert len(bomb) < JSON_BYTES_MAX
                for path in VALID:
                    for name in (encoding, encoding.upper(), f"identity, {encoding}"):
                        encoded = {**headers, "Content-Encoding": name}
                        async with session.post(url + path, data=bomb, headers=encoded) as answer:
                            assert answer.status == 415, (path, name)
                            assert (await answer.json())["error"]["code"] == "unsupported_content_encoding"
            assert peak_bytes(pid) - before < MEMORY_GROWTH_BYTES_MAX
            async with session.post(
                f"{url}/v1/embeddings", json=VALID["/v1/embeddings"], headers=headers
            ) as answer:
                assert answer.status == 200


@pytest.mark.processes
async def test_a_hundred_withheld_giant_bodies_cost_no_memory() -> None:
    """Declared as 10 GiB each, sent as nothing: each is refused from its header alone."""
    with own_process() as (url, key, pid):
        before = peak_bytes(pid)
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Length: {10 * 1024**3}\r\n\r\n"
        ).encode()
        statuses = await asyncio.gather(*(first_status(url, head) for _ in range(100)))
        assert set(statuses) == {413}
        assert peak_bytes(pid) - before < MEMORY_GROWTH_BYTES_MAX


async def test_a_body_over_the_limit_is_413_and_one_at_it_is_read() -> None:
    node = FakeNode()
    headers = {"Authorization": f"Bearer {node.acme}"}
    empty = json.dumps({"model": "acme/embed", "input": ""}).encode()
    async with served(node) as url, aiohttp.ClientSession() as session:
        for size, status in ((JSON_BYTES_MAX, 200), (JSON_BYTES_MAX + 1, 413)):
            filler = b"a" * (size - len(empty))
            body = empty.replace(b'""', b'"' + filler + b'"')
            assert len(body) == size
            async with session.post(f"{url}/v1/embeddings", data=io.BytesIO(body), headers=headers) as answer:
                assert answer.status == status
                if status == 413:
                    assert str(JSON_BYTES_MAX) in (await answer.json())["error"]["message"]


async def test_an_endless_chunked_body_is_cut_off() -> None:
    node = FakeNode()
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n" % node.acme.encode()
    async with served(node) as url:
        sent = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17
        assert await first_status(url, sent) == 413


async def test_a_body_that_never_comes_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer.body_budget, "BODY_READ_SECONDS", 0.05)
    node = FakeNode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n" % node.acme.encode()
    async with served(node) as url:
        assert await first_status(url, head + b"Content-Length: 100\r\n\r\n{") == 408


async def test_one_tenants_open_bodies_are_bounded_and_do_not_harm_another() -> None:
    """81 connections that promise 1 MiB each: the one beyond the tenant's share gets 429 at once."""
    node = FakeNode()
    count = OWNER_BODIES_BYTES_MAX // JSON_BYTES_MAX + 1
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {node.acme}\r\n"
        f"Content-Length: {JSON_BYTES_MAX}\r\n\r\n"
    ).encode()
    async with served(node) as url, aiohttp.ClientSession() as session:
        held = [asyncio.create_task(first_status(url, head)) for _ in range(count)]
        done, waiting = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [429]

        async def ask(key: str, model: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            body = {"model": model, "input": "a"}
            async with session.post(f"{url}/v1/embeddings", json=body, headers=headers) as answer:
                return answer.status

        assert await ask(node.acme, "acme/embed") == 429
        assert await ask(node.globex, "globex/embed") == 200
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        async with asyncio.timeout(SOON_SECONDS):
            while await ask(node.acme, "acme/embed") != 200:
                pass


HOSTILE = {
    "empty": b"",
    "space": b"   ",
    "NUL": b"\x00",
    "NULs": b"\x00" * 1000,
    "NUL inside": b'{"model": "acme/embed", "input": "a\x00b"}',
    "NUL after": b'{"model": "acme/embed", "input": "a"}\x00',
    "not UTF-8": b'{"model": "acme/embed", "input": "\xff\xfe"}',
    "not UTF-8 in the model": b'{"model": "\xff", "input": "a", "prompt": "a", "messages": []}',
    "lone surrogate": b'{"model": "acme/embed", "input": "\\ud800"}',
    "lone surrogate in the model": b'{"model": "\\udfff", "input": "a"}',
    "byte order mark": b'\xef\xbb\xbf{"model": "acme/embed", "input": "a"}',
    "UTF-16": '{"model": "acme/embed"}'.encode("utf-16"),
    "null": b"null",
    "number": b"1e400",
    "text": b'"text"',
    "list": b"[]",
    "cut": b'{"model": "acme/embed", "input": "a',
    "two documents": b"{}{}",
    "form": b"model=acme%2Fembed&input=a",
    "deep list": b'{"model": "acme/embed", "input": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep list, never closed": b"[" * 1_000_000,
    "deep unknown field": b'{"zz": ' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "deep objects": b'{"model": ' * 80_000,
    "deep known field": b'{"model": "acme/chat", "prompt": "a", "logit_bias": ' + b'{"a":' * 150_000,
    "NaN": b'{"model": "acme/chat", "prompt": "a", "temperature": NaN}',
    "huge number": b'{"model": "acme/chat", "prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "huge float": b'{"model": "acme/chat", "prompt": "a", "temperature": 1e999999}',
    "huge token": b'{"model": "acme/embed", "input": [99999999999999999999]}',
    "many inputs": b'{"model": "acme/embed", "input": [' + b'"a",' * 200_000 + b'"a"]}',
    "empty inputs": b'{"model": "acme/embed", "input": []}',
    "empty text": b'{"model": "acme/embed", "input": ["a", ""]}',
    "mixed inputs": b'{"model": "acme/embed", "input": ["a", 1]}',
    "empty tokens": b'{"model": "acme/embed", "input": [[]]}',
}


HALF: dict[bytes, str] = {
    rb'{"model": "\ud800"}': r"\ud800 at byte 11",
    rb'{"model": "\uDBFF", "input": "a"}': r"\uDBFF at byte 11",
    rb'{"model": "a\udc00b"}': r"\udc00 at byte 12",
    rb'{"model": "\ud83d\ude00\\\ud83d\n"}': r"\ud83d at byte 25",
    rb'{"model": "\ud800\ud800\udc00"}': r"\ud800 at byte 11",
}


@pytest.mark.parametrize("body", list(HALF))
def test_half_of_a_surrogate_pair_is_called_that(body: bytes) -> None:
    """The decoder says that the text is cut short, which nobody would find in it."""
    with pytest.raises(ApiError) as error:
        decode_json(body, dict)
    assert HALF[body] in error.value.message
    assert "half of a surrogate pair" in error.value.message
    assert "truncated" not in error.value.message


@pytest.mark.parametrize("body", [rb'{"a": "\\ud800', rb'{"a": "\ud83d\ude00', rb'{"a": "\\\\udc00"'])
def test_what_is_cut_short_is_called_that(body: bytes) -> None:
    with pytest.raises(ApiError, match="truncated"):
        decode_json(body, dict)


@pytest.mark.parametrize("path", list(VALID))
@pytest.mark.parametrize("name", list(HOSTILE))
async def test_a_hostile_body_is_a_clear_400(path: str, name: str) -> None:
    node = FakeNode()
    headers = {"Authorization": f"Bearer {node.acme}", "Content-Type": "application/json"}
    async with served(node) as url, aiohttp.ClientSession() as session:
        async with session.post(url + path, data=HOSTILE[name], headers=headers) as answer:
            body = await answer.json()
            assert answer.status == 400
            assert body["error"]["message"]
            assert body["error"]["code"] in ("invalid_json", "invalid_value", "wrong_task")
            assert len(body["error"]["message"]) < 1000
        async with session.post(url + path, json=VALID[path], headers=headers) as answer:
            assert answer.status == 200
    assert len(node.orders) == 1


WRONG: list[object] = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    "",
    "x" * 300,
    [],
    [None],
    [[[]]],
    {},
    {"a": []},
    "\x00",
    "\u202e",
]


@pytest.mark.parametrize("path", list(VALID))
async def test_no_wrong_type_anywhere_is_a_5xx(path: str) -> None:
    """Every value in every place of every valid body, and every known field added with every value."""
    node = FakeNode()
    headers = {"Authorization": f"Bearer {node.acme}"}
    more = [
        "n",
        "tools",
        "logprobs",
        "stream_options",
        "stop",
        "max_completion_tokens",
        "dimensions",
        "logit_bias",
    ]
    more += ["echo", "suffix", "response_format", "modalities", "audio", "presence_penalty", "top_p", "user"]
    async with served(node) as url, aiohttp.ClientSession() as session:
        for field in [*VALID[path], *more]:
            for value in WRONG:
                body = {**VALID[path], field: value}
                async with session.post(url + path, json=body, headers=headers) as answer:
                    assert answer.status in (200, 400, 404), (field, value)
                    if answer.status == 400:
                        assert (await answer.json())["error"]["param"].startswith(field)


@pytest.mark.parametrize("path", list(VALID))
async def test_no_mutated_body_is_a_5xx(path: str) -> None:
    chance = random.Random(f"mutations of {path}")
    node = FakeNode()
    headers = {"Authorization": f"Bearer {node.acme}", "Content-Type": "application/json"}
    pieces = [*JSON_PIECES, b"\\"]
    async with served(node) as url, aiohttp.ClientSession() as session:
        for _ in range(400):
            body = bytearray(json.dumps(VALID[path]).encode())
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(body) + 1)
                body[at : at + chance.randint(0, 3)] = chance.choice(pieces)
            async with session.post(url + path, data=bytes(body), headers=headers) as answer:
                assert answer.status in (200, 400, 404), bytes(body)


async def test_contradictory_lengths_and_overlong_heads_are_refused() -> None:
    node = FakeNode()
    key = node.acme.encode()
    body = json.dumps(VALID["/v1/embeddings"]).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + key + b"\r\n"
    length = b"Content-Length: %d\r\n" % len(body)
    cases = {
        "length and chunked": head + length + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "two lengths": head + length + b"Content-Length: 1\r\n\r\n" + body,
        "negative length": head + b"Content-Length: -1\r\n\r\n" + body,
        "unknown transfer encoding": head + b"Transfer-Encoding: gzip\r\n\r\n" + body,
        "bad chunk": head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        "long header": head + b"X-Long: " + b"a" * 70_000 + b"\r\n\r\n",
        "long line": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        "NUL in a header": head + b"X-Nul: a\x00b\r\n\r\n",
        "unknown expectation": head + length + b"Expect: a-miracle\r\n\r\n" + body,
        "folded header": head + b"X-Folded: a\r\n b\r\n\r\n",
    }
    async with served(node) as url:
        for name, sent in cases.items():
            status = await first_status(url, sent)
            assert status == 0 or 400 <= status < 500, (name, status)
    assert node.events == []
