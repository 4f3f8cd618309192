"""Server-sent events and the text streams made of them.

Covers: the decoder (no I/O), and the two iterators of text deltas. Does not cover: asking for a
stream (``_calls``). Comments, which the server sends while a cold model is restored, keep the
connection alive and are not shown.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from bunkhouse._decode import Fields, served
from bunkhouse._errors import BadAnswer, StreamFailed, error_from_body
from bunkhouse._request import Answer

if TYPE_CHECKING:
    import httpx2

    from bunkhouse._transport import AsyncSender, Sender

# One event carries a token's text; a line above this is not from our server.
LINE_BYTES_MAX = 1024 * 1024
# Our events have one line each; the format allows more.
LINES_MAX = 64
_DONE = "[DONE]"


class SseDecoder:
    """Bytes in, ``data`` payloads out. Accepts lines that end in LF, CRLF or CR."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        self._rest += chunk
        # A lone CR at the very end may be half of CRLF: it waits for the next chunk.
        ready = len(self._rest) - 1 if self._rest.endswith(b"\r") else len(self._rest)
        lines = bytes(self._rest[:ready]).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = bytearray(lines.pop()) + self._rest[ready:]
        if len(self._rest) > LINE_BYTES_MAX:
            raise BadAnswer(f"a line of the stream is above the limit of {LINE_BYTES_MAX} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
                if len(self._data) > LINES_MAX:
                    raise BadAnswer(f"an event of the stream has more than {LINES_MAX} lines")
            elif not line and self._data:
                payload, self._data = "\n".join(self._data), []
                yield payload


class _Deltas:
    """Turns payloads into deltas and keeps what the stream says about itself."""

    def __init__(self, head: Answer) -> None:
        self.decoder = SseDecoder()
        self.served = served(head)
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.done = False

    def read(self, chunk: bytes) -> Iterator[str]:
        for payload in self.decoder.feed(chunk):
            if payload == _DONE:
                self.done = True
                return
            text = self._read_event(payload)
            if text:
                yield text

    def _read_event(self, payload: str) -> str:
        try:
            event = Fields(json.loads(payload), "event")
        except (ValueError, RecursionError):
            raise BadAnswer(f"an event of the stream is not JSON: {payload[:80]!r}") from None
        if event.raw("error"):
            raise error_from_body(200, payload.encode(), request_id=self.served.request_id, kind=StreamFailed)
        usage = event.inner("usage")
        if event.raw("usage"):
            self.prompt_tokens = usage.maybe_number("prompt_tokens")
            self.completion_tokens = usage.maybe_number("completion_tokens")
        choice = next(event.each("choices"), None)
        if choice is None:
            return ""
        self.finish_reason = choice.maybe_text("finish_reason") or self.finish_reason
        return choice.maybe_text("text") or choice.inner("delta").maybe_text("content") or ""

    def check_done(self) -> None:
        if not self.done:
            raise StreamFailed(
                "the stream ended before it was complete", status=200, request_id=self.served.request_id
            )


class _Told:
    """What the stream has said about itself so far; after the last delta all of it is known."""

    def __init__(self, head: Answer, response: httpx2.Response) -> None:
        self._response = response
        self._state = _Deltas(head)
        self._closed = False
        self.served = self._state.served

    @property
    def finish_reason(self) -> str | None:
        return self._state.finish_reason

    @property
    def prompt_tokens(self) -> int | None:
        return self._state.prompt_tokens

    @property
    def completion_tokens(self) -> int | None:
        return self._state.completion_tokens


class TextStream(_Told):
    """Iterates over text deltas. Leaving it early (``close`` or ``with``) cancels on the server.

    After the last delta, ``finish_reason`` and the token counts are known.
    """

    def __init__(self, sender: Sender, head: Answer, response: httpx2.Response) -> None:
        super().__init__(head, response)
        self._sender = sender
        self._texts = self._iterate()

    def _iterate(self) -> Iterator[str]:
        import httpx2

        try:
            for chunk in self._response.iter_bytes():
                yield from self._state.read(chunk)
                if self._state.done:
                    return
        except httpx2.HTTPError as error:
            raise self._sender.broken(error) from error
        finally:
            self._response.close()
        self._state.check_done()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._closed:
            raise StopIteration
        return next(self._texts)

    def text(self) -> str:
        """Read to the end and return everything that was left."""
        return "".join(self)

    def close(self) -> None:
        self._closed = True
        self._response.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncTextStream(_Told):
    """The same on asyncio: ``async for``, ``async with``, ``await stream.text()``."""

    def __init__(self, sender: AsyncSender, head: Answer, response: httpx2.Response) -> None:
        super().__init__(head, response)
        self._sender = sender
        self._texts = self._iterate()

    async def _iterate(self) -> AsyncIterator[str]:
        import httpx2

        try:
            async for chunk in self._response.aiter_bytes():
                for text in self._state.read(chunk):
                    yield text
                if self._state.done:
                    return
        except httpx2.HTTPError as error:
            raise self._sender.broken(error) from error
        finally:
            await self._response.aclose()
        self._state.check_done()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self._closed:
            raise StopAsyncIteration
        return await anext(self._texts)

    async def text(self) -> str:
        """Read to the end and return everything that was left."""
        return "".join([delta async for delta in self])

    async def close(self) -> None:
        self._closed = True
        await self._response.aclose()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
