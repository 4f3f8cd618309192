"""What a worker's failures look like to those whose requests they end, and errors to tenants.

Covers: frames of a worker on their way to a lease; what tenants may read of an error. Does not cover: the
frames themselves (``workers``), or the status that a caller sees (``gateway``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from agent.facade import EngineFault, EngineFrame, Refused
from agent.workers import WorkerDead, WorkerFailure
from packer.events import RefusalReason
from packer.types import ModelRef

WORKER_DIED_RETRY_MS = 1_000


class Explained:
    """A worker's frames, with its failures as its callers are told of them."""

    __slots__ = ("_frames", "_ref")

    def __init__(self, ref: ModelRef, frames: AsyncIterator[EngineFrame]) -> None:
        self._ref = ref
        self._frames = frames

    def __aiter__(self) -> Explained:
        return self

    async def __anext__(self) -> EngineFrame:
        try:
            return await self._frames.__anext__()
        except WorkerDead:
            raise worker_died(self._ref) from None
        except WorkerFailure as failure:
            if failure.gone:  # the process that held the weights has been replaced meanwhile
                raise worker_died(self._ref) from None
            # The kind of the error only: its text may quote the caller.
            raise EngineFault(f"{self._ref}: {failure.message.partition(':')[0]}") from None

    async def aclose(self) -> None:
        await self._frames.aclose()  # type: ignore[attr-defined]  # it can be closed


def worker_died(ref: ModelRef) -> Refused:
    return Refused(
        RefusalReason.WORKER_DIED,
        f"the process that held {ref.model} is gone; the same request will work again",
        WORKER_DIED_RETRY_MS,
    )


def public(error: Exception) -> str:
    """What tenants may read of an error: an ``OSError``'s own text names the node's directories."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
