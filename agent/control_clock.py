"""The time at control, as its answers tell a node.

Covers: the newest of what control has said, and telling people when the box's own clock is off. Does not
cover: keys and tickets (``agent/credentials.py`` takes each answer as it comes).
"""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger("bunk.uplink")

SKEW_SAID_S = 60.0  # beyond it the clocks are said to be off; certificates allow for half an hour


class ControlClock:
    """The time at control, as its answers told it: what came late or comes again can not set it back.

    Plans expire by it, so that a node whose own clock is wrong takes plans all the same.
    """

    def __init__(self) -> None:
        self._ahead_ms: int | None = None  # of this process's steady clock

    def heard(self, now_ms: int, own_s: float) -> None:
        if not now_ms:
            return
        ahead_ms = now_ms - _steady_ms()
        if self._ahead_ms is None:
            skew_s = now_ms / 1000 - own_s
            if abs(skew_s) > SKEW_SAID_S:
                log.warning(
                    "this box's clock is %d s %s control's; set both by NTP: certificates end by them",
                    abs(skew_s),
                    "behind" if skew_s > 0 else "ahead of",
                )
        self._ahead_ms = ahead_ms if self._ahead_ms is None else max(self._ahead_ms, ahead_ms)

    def is_past(self, at_ms: int) -> bool:
        return self._ahead_ms is not None and _steady_ms() + self._ahead_ms >= at_ms


def _steady_ms() -> int:
    return round(asyncio.get_running_loop().time() * 1000)
