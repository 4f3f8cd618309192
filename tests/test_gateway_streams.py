"""Streams of the node's gateway over real sockets: waiting, failing, losing their caller.

Covers: comments during a restore, errors before and after the first event, callers that leave or stop
reading, and when a lease ends. Does not cover: what the chunks hold (``test_gateway``, ``test_choices``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
from fake_node import SOON_SECONDS, FakeNode, served
from gateway_calls import chat_body, client

from agent.facade import EngineError, EngineFrame, EngineRequest, Refused
from packer.events import RefusalReason


async def test_a_stream_says_that_it_is_restoring_and_then_answers() -> None:
    """Comments keep the connection alive; OpenAI's client ignores them and gets the whole answer."""
    node = FakeNode(hold=True)
    async with served(node, keep_alive_ms=5) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {node.acme}"}
        body = chat_body(stream=True)
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
            assert await answer.content.readline() == b": restoring\n"
            node.go.set()
            rest = await answer.content.read()
    assert b": restored tier=disk restore_ms=37\n" in rest
    assert rest.endswith(b"data: [DONE]\n\n")

    node = FakeNode(hold=True)
    async with served(node, keep_alive_ms=5) as url, client(url, node.acme) as api:
        stream = await api.completions.create(model="acme/chat", prompt="one two", stream=True)
        node.go.set()
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "one two "


async def test_a_refusal_after_the_first_comment_is_an_event_that_the_client_raises() -> None:
    node = FakeNode(
        hold=True, refused={"chat": Refused(RefusalReason.RESTORE_FAILED, "every tier failed", 500)}
    )
    async with served(node, keep_alive_ms=5) as url, client(url, node.acme) as api:
        stream = await api.completions.create(model="acme/chat", prompt="one", stream=True)
        node.go.set()
        with pytest.raises(openai.APIError, match="every tier failed"):
            await anext(aiter(stream))


@pytest.mark.parametrize(
    "error",
    [EngineError("invalid_request", "stopped making sense"), Refused(RefusalReason.WORKER_DIED, "gone")],
)
async def test_an_error_in_mid_stream_is_an_event_that_the_client_raises(error: Exception) -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        yield EngineFrame({"delta": "one "})
        raise error

    node = FakeNode(script=script)
    async with served(node) as url, client(url, node.acme) as api:
        stream = await api.completions.create(model="acme/chat", prompt="one", stream=True)
        chunks = aiter(stream)
        assert (await anext(chunks)).choices[0].text == "one "
        with pytest.raises(openai.APIError, match=r"stopped making sense|gone"):
            await anext(chunks)


async def test_a_fault_in_mid_stream_is_one_event_that_does_not_look_like_an_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        yield EngineFrame({"delta": "one "})
        raise RuntimeError(f"while running {request.fields}")

    node = FakeNode(script=script)
    async with served(node) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {node.acme}"}
        body = {"model": "acme/chat", "prompt": "canary-2718", "stream": True}
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
            events = (await answer.text()).strip().split("\n\n")
            request_id = answer.headers["x-request-id"]
    assert len(events) == 2
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"], error["param"]) == ("internal_error", "server_error", None)
    assert request_id in error["message"]
    assert request_id in caplog.text
    assert "canary" not in caplog.text + str(events)
    await node.happened("finished")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_while_waiting_withdraws_its_request(stream: bool) -> None:
    node = FakeNode(hold=True)
    async with served(node) as url, client(url, node.acme) as api:
        asking = asyncio.create_task(api.completions.create(model="acme/chat", prompt="a", stream=stream))
        await node.happened("requested")
        asking.cancel()
        await node.happened("withdrawn")
    assert "granted" not in {what for _, what in node.events}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_while_it_is_answered_stops_the_engine(stream: bool) -> None:
    never = asyncio.Event()
    running = asyncio.Event()

    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        yield EngineFrame({"delta": "one "})
        running.set()
        await never.wait()

    node = FakeNode(script=script)
    async with served(node) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {node.acme}"}
        body = {"model": "acme/chat", "prompt": "a", "stream": stream}
        asking = asyncio.create_task(session.post(f"{url}/v1/completions", json=body, headers=headers))
        async with asyncio.timeout(SOON_SECONDS):
            await running.wait()
        if stream:
            answer = await asking
            assert await answer.content.readline() != b""
            answer.close()
        asking.cancel()
        await node.happened("stopped")
        await node.happened("finished")


async def test_a_caller_that_stops_reading_loses_its_lease() -> None:
    """The engine could write for ever; the gateway buffers little and gives up on the caller."""

    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        while True:
            yield EngineFrame({"delta": "x" * 65536})

    node = FakeNode(script=script)
    async with served(node, stall_seconds=0.2) as url:
        host, port = url.removeprefix("http://").split(":")
        # A small window from the start, so that the kernel takes little.
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = json.dumps({"model": "acme/chat", "prompt": "a", "stream": True}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (node.acme.encode(), len(body), body)
        )
        assert b"200 OK" in await reader.readline()
        await node.happened("finished")
        writer.transport.abort()


async def test_the_lease_is_over_before_the_caller_has_its_whole_answer() -> None:
    """So that a caller with a concurrency of one may ask again at once."""
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        await api.embeddings.create(model="acme/embed", input="a")
        assert node.events[-1][1] == "finished"
        stream = await api.completions.create(model="acme/chat", prompt="a", stream=True)
        async for _ in stream:
            pass
        assert node.events[-1][1] == "finished"
