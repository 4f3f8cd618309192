"""The journal's own thread.

Covers: running journal calls so that the event loop never waits for the disk. Does not cover: what they do
(``journal``).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from agent.journal import Journal, JournalFailed

P = ParamSpec("P")
T = TypeVar("T")


class JournalThread:
    """Runs journal calls one after the other."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises ``JournalFailed``, which is an ``OSError``."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, partial(function, *args, **kwargs))
        except sqlite3.Error as error:
            raise JournalFailed(f"the journal: {error}") from error

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self.journal.close()
