"""A node's answer on its way back to the caller: what of it is held, passed on, and said when it breaks off.

Covers: small answers, which are here before their head goes out, streams of events, slow callers, and the
headers that pass. Does not cover: which node answers, or how it was asked (``forwarding``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
import msgspec
from aiohttp import web

from control.routing import Routing
from packer.crowd import in_time
from packer.http import CROWD, PASSED_HEADERS, ApiError, openai_error
from packer.oip import ERROR_CODE_HEADER
from packer.types import KIB
from packer.whole_answer import WholeAnswer

# Whole answers up to this size are here before their head is passed on: a node that breaks off in one is
# then an error with a status. It is what both sides' sockets hold anyway.
HELD_BYTES_MAX = 64 * KIB
# An event of a stream is passed on when it is complete, unless it is larger than this.
EVENT_BYTES_MAX = 64 * KIB
EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
ANSWER_HEADERS = frozenset(
    {
        *PASSED_HEADERS,
        "content-type",
        "cache-control",
        "www-authenticate",
        "allow",
        "inference-header-content-length",
        ERROR_CODE_HEADER,
    }
)
# A caller who was told that a node went away may come again at once.
RETRY_LOST_MS = 1_000


class NodeFailed(ApiError):
    """A node did not keep up what it had begun; no other node is asked."""


@dataclass(slots=True)
class NodeAnswer:
    """A node's answer as far as it is here: its head, and its body if that is small."""

    response: aiohttp.ClientResponse
    held: bytes = b""
    whole: bool = False
    broke: bool = False  # the node went away before the end

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def streams(self) -> bool:
        """Whether it consists of events, which may come at any time."""
        return self.response.headers.get("Content-Type", "").startswith("text/event-stream")

    @property
    def code(self) -> str:
        """The code of an error that decides about another node; empty otherwise."""
        if not self.whole or self.status < 400:
            return ""
        if (said := self.response.headers.get(ERROR_CODE_HEADER)) is not None:
            return said
        with suppress(msgspec.MsgspecError, RecursionError, UnicodeError):
            return msgspec.json.decode(self.held, type=_Refusal).error.code or ""
        return ""

    def close(self) -> None:
        self.response.close()


class _Code(msgspec.Struct):
    code: str | None = None


class _Refusal(msgspec.Struct):
    error: _Code


async def hold(control: Routing, node: str, response: aiohttp.ClientResponse) -> NodeAnswer:
    """Wait for a small answer to be whole; anything else may follow bit by bit."""
    answer = NodeAnswer(response)
    size = response.content_length
    if answer.streams or size is None or size > HELD_BYTES_MAX:
        return answer
    try:
        answer.held = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        # It may have done the work, so no other node does it again.
        response.close()
        control.log_fault(f"node {node}", error)
        control.routed.broken += 1
        raise _lost(502) from None
    except BaseException:
        response.close()
        raise
    answer.whole = True
    return answer


class _NodeBroke(Exception):
    """A node went away in mid-answer."""


async def pass_on(
    control: Routing, request: web.Request, node: str, answer: NodeAnswer, head_out: Callable[[], None]
) -> web.StreamResponse:
    """Hand the answer on piece by piece, each as soon as it is here."""
    headers = _answer_headers(answer.response)
    if answer.whole:
        head_out()
        whole = WholeAnswer(request.app, answer.held, None, answer.status, headers)
        return whole.send_now(request)
    response = web.StreamResponse(status=answer.status, headers=headers)
    if answer.response.content_length is not None:
        response.content_length = answer.response.content_length
    await response.prepare(request)
    head_out()
    try:
        pieces = _pieces(answer)
        async for piece in _whole_events(pieces) if answer.streams else pieces:
            await _write(request, response, piece)
    except _NodeBroke as error:
        answer.broke = True
        control.routed.broken += 1
        if not answer.streams:
            # It must not look complete.
            raise ConnectionResetError(f"node {node} broke off: {error}") from None
        event = b"data: " + json.dumps(openai_error(_lost(503))).encode() + b"\n\n"
        await _write(request, response, event)
    await end(request, response)
    return response


async def end(request: web.Request, response: web.StreamResponse) -> None:
    """Returns when all of the answer is taken."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the caller left")
    if not transport.get_write_buffer_size():
        await response.write_eof()  # can not have to wait
    else:
        await in_time(transport, response.write_eof(), request.app[CROWD].stall_seconds)


async def _pieces(answer: NodeAnswer) -> AsyncIterator[bytes]:
    """What comes from the node, as it comes. What is not taken is not read, so that the node waits."""
    try:
        async for piece in answer.response.content.iter_any():
            yield piece
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _NodeBroke(type(error).__name__) from None


async def _whole_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Events and comments at once when they are complete. Half of one is of no use to anybody, and after
    it no error could be said."""
    rest = b""
    async for piece in pieces:
        rest += piece
        end = max(at + len(mark) if (at := rest.rfind(mark)) >= 0 else 0 for mark in EVENT_ENDS)
        if not end and len(rest) > EVENT_BYTES_MAX:
            end = len(rest)
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


async def _write(request: web.Request, response: web.StreamResponse, piece: bytes) -> None:
    """A caller that does not read would keep the node's answer, and a place here, for ever."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the caller left")
    if len(piece) < HELD_BYTES_MAX and not transport.get_write_buffer_size():
        await response.write(piece)  # can not have to wait
    else:
        await in_time(transport, response.write(piece), request.app[CROWD].stall_seconds)


def _lost(status: int) -> NodeFailed:
    return NodeFailed(
        status,
        "node_lost",
        "The node that was answering went away; the answer is not complete. Send the request again.",
        kind="server_error",
        retry_ms=RETRY_LOST_MS,
        should_retry=True,
    )


def _answer_headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.lower() in ANSWER_HEADERS}
