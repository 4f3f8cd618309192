"""An asyncio loop whose clock jumps to the next timer: an hour of waiting takes no time.

Covers: tests of code that runs on asyncio timers and futures. Does not cover: sockets and threads, whose
readiness no clock can jump to; using them on this loop raises ``Deadlock`` at once.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Everybody waits and no timer is set: the code under test would hang for ever."""


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, clock: VirtualLoop) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("nothing is scheduled")
        self.clock.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now_s = 0.0
        selector = _JumpingSelector(self)
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s

    def now_ms(self) -> int:
        return round(self.now_s * 1000)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end on a fresh virtual loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
