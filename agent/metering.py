"""What a request takes: an estimate of its tokens before it runs, and their count while it does.

Covers: the estimate that is reserved of a tenant's tokens per minute, and reading the engine's counts off
its frames, also of answers that were broken off. Does not cover: device time (``agent/due.py`` measures it,
``loop`` adds it up), limits (``packer/rates.py``), or usage in what the caller is told (``openai_shapes``).

A worker's counts are taken on trust for its own tenant alone: it runs that tenant's models and no other's,
so a lie costs or spares nobody else a token. Device time is measured on this side, whatever it says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from agent.facade import JSON, EngineFrame, EngineRequest
from agent.loop import HeldLease
from packer.rates import REQUEST_TOKENS_MAX, bounded
from packer.types import Tier

# English has about four characters per token, other scripts fewer; what is wrong is put right by the count.
CHARS_PER_TOKEN = 4
# Written when the caller does not say how much at most, and what is reserved of what it does say: callers
# name a large limit to be safe, and answers seldom come near it.
OUTPUT_TOKENS_ASSUMED = 512
OUTPUT_TOKENS_RESERVED_MAX = 4096
# Fields of an order whose texts or tokens the engine reads.
_READ = ("inputs", "prompt", "tokens", "messages")


def expected_tokens(orders: Sequence[EngineRequest]) -> int:
    """What these orders will read and write, by the size of their input and the limits that they name."""
    return sum(read_tokens(order) + _written_tokens(order) for order in orders)


def read_tokens(order: EngineRequest) -> int:
    """Tokens of the input: exact when the caller sent token numbers, else by its characters."""
    fields = order.fields
    return sum(_tokens_of(fields[name]) for name in _READ if name in fields)


def _tokens_of(value: JSON) -> int:
    if value is None:
        return 0
    if isinstance(value, str):
        return len(value) // CHARS_PER_TOKEN + 1
    if isinstance(value, Mapping):
        return _tokens_of(value.get("content"))
    if isinstance(value, Sequence):
        if value and isinstance(value[0], int):
            return len(value)
        return sum(_tokens_of(each) for each in value)
    return 0


def _written_tokens(order: EngineRequest) -> int:
    if order.op != "generate":
        return 0
    most, choices = order.fields.get("max_tokens"), order.fields.get("n", 1)
    each = bounded(most, OUTPUT_TOKENS_RESERVED_MAX) if isinstance(most, int) else OUTPUT_TOKENS_ASSUMED
    return each * (choices if isinstance(choices, int) else 1)


class MeteredLease:
    """A lease that reads the token counts off the engine's frames.

    An engine counts in every frame what it has read and written so far; the last frame seen is the count.
    A request that was broken off before its first frame has been read, as far as anybody knows.
    """

    def __init__(self, held: HeldLease) -> None:
        self._held = held
        # Of the calls that have ended, and of the one that runs.
        self._ended = self._running = (0, 0)

    @property
    def tokens(self) -> int:
        return self._held.tokens

    @property
    def prompt_tokens(self) -> int:
        return self._ended[0] + self._running[0]

    @property
    def completion_tokens(self) -> int:
        return self._ended[1] + self._running[1]

    @property
    def device_ms(self) -> int:
        return self._held.device_ms

    @property
    def tier(self) -> Tier:
        return self._held.tier

    @property
    def restore_ms(self) -> int:
        return self._held.restore_ms

    @property
    def restored_bytes(self) -> int:
        return self._held.restored_bytes

    @property
    def device(self) -> str:
        return self._held.device

    def run(self, request: EngineRequest) -> AsyncIterator[EngineFrame]:
        return _Counted(self, self._held.run(request), request)

    def counted(self, read: int, written: int) -> None:
        """What the call that runs has come to so far."""
        self._running = (read, written)

    def ended(self, read: int, written: int) -> None:
        """What it came to."""
        self._ended, self._running = (self._ended[0] + read, self._ended[1] + written), (0, 0)
        self._held.tokens += read + written


class _Counted:
    """Frames on their way by. An iterator of its own: every request comes by here, and a generator that
    must be closed costs as much as reading a frame."""

    __slots__ = ("_counts", "_frames", "_lease", "_over", "_request")

    def __init__(
        self, lease: MeteredLease, frames: AsyncIterator[EngineFrame], request: EngineRequest
    ) -> None:
        self._lease = lease
        self._frames = frames
        self._request = request
        self._counts: tuple[int, int] | None = None
        self._over: bool | None = None  # None: nobody has asked for a frame

    def __aiter__(self) -> _Counted:
        return self

    async def __anext__(self) -> EngineFrame:
        if self._over:
            raise StopAsyncIteration
        self._over = False
        try:
            frame = await self._frames.__anext__()
        except StopAsyncIteration:
            await self._end()
            raise
        except Exception:
            await self._end(failed=True)  # refused or broken by the engine
            raise
        except BaseException:  # the caller leaves
            await self._end()
            raise
        counts = counts_of(frame)
        if counts is not None:
            self._counts = counts
            self._lease.counted(*counts)
        return frame

    async def aclose(self) -> None:
        if self._over is False:
            await self._end()
        self._over = True

    async def _end(self, failed: bool = False) -> None:
        self._over = True
        if self._counts is None and not failed:
            self._counts = (read_tokens(self._request), 0)
        self._lease.ended(*(self._counts or (0, 0)))
        await self._frames.aclose()  # type: ignore[attr-defined]  # it can be closed


def counts_of(frame: EngineFrame) -> tuple[int, int] | None:
    """The tokens that a frame says were read and written; None when it says nothing of the kind."""
    read, written = _count(frame.header.get("prompt_tokens")), _count(frame.header.get("completion_tokens"))
    return None if read is None and written is None else (read or 0, written or 0)


def _count(said: JSON) -> int | None:
    if not isinstance(said, int) or isinstance(said, bool):
        return None
    return bounded(said, REQUEST_TOKENS_MAX)
