"""Work that goes on beside its owner's and ends with it.

Covers: holding on to tasks, which asyncio itself holds only weakly, and ending what still runs. Does not
cover: what they answer, or who hears of a failure: each piece of work sees to that itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")


class Background:
    """An owner's tasks."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[object]] = set()

    def start(self, work: Coroutine[object, None, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def finish(self, within_s: float) -> bool:
        """Let what runs now come to its end; whether all of it has in that time. Nothing is cancelled."""
        running = list(self.tasks)
        if not running:
            return True
        _, left = await asyncio.wait(running, timeout=within_s)
        return not left

    async def close(self) -> None:
        """Cancel what still runs, and return when all of it has ended."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
