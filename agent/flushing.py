"""Bringing into the journal, now and then, what a node has come to know.

Covers: when, one part after the other, each whatever became of the others. Does not cover: what the parts
write (``recollection``, ``footprints``, ``keeper``) or a journal that fails (``keeper``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

log = logging.getLogger("bunk.flushing")

# Records reach the journal in batches this far apart: one fsync for many records.
FLUSH_S = 0.25


class Flushing:
    """``parts`` by the name that is logged when one fails in an unforeseen way."""

    def __init__(self, parts: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self.parts = dict(parts)
        self._lock = asyncio.Lock()
        self._failed: set[str] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            # A stop does not cut off what waits for the journal's thread; whoever stops flushes after it.
            await asyncio.shield(self.once())

    async def once(self) -> None:
        """None of what is kept may keep the others from being kept."""
        async with self._lock:
            for name, keep in self.parts.items():
                try:
                    await keep()
                except Exception:
                    # A full or lost disk is no exception here, so this is our mistake: said once for each.
                    if name not in self._failed:
                        log.exception("keeping %s failed in an unforeseen way", name)
                        self._failed.add(name)
