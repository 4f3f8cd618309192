"""A lock for each version of a model whose files somebody writes or removes.

Covers: that only. Does not cover: what is locked for (``control.routes.commits``, ``control.routes.models``).
"""

from __future__ import annotations

import asyncio

from packer.types import ModelRef


class RefLock:
    """A lock per version that exists only while somebody holds or wants it."""

    def __init__(self, locks: dict[ModelRef, tuple[asyncio.Lock, int]], ref: ModelRef) -> None:
        self._locks = locks
        self._ref = ref

    async def __aenter__(self) -> None:
        lock, users = self._locks.get(self._ref, (asyncio.Lock(), 0))
        self._locks[self._ref] = (lock, users + 1)
        try:
            await lock.acquire()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._locks[self._ref][0].release()
        self._leave()

    def _leave(self) -> None:
        lock, users = self._locks[self._ref]
        if users == 1:
            del self._locks[self._ref]
        else:
            self._locks[self._ref] = (lock, users - 1)
