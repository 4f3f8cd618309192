"""Which texts of one model are written at a time: there is room for so many tokens that were read.

Covers: who stops when the texts have grown beyond the room, and who starts when there is some. Does not
cover: passes (``agent/engines/decoding.py``), or models' turns (``agent/compute.py``).

Pure. What a model has read of a text is its keys and values, some kilobytes a token. A text that stops gives
them up and has its own tokens read again later, one by one as they were written: it goes on as if it had
never stopped. The youngest stops and the oldest starts, so the oldest always gets to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Nobody says how long a text will be. One starts when all could grow by so much, so that none stops at once.
GROWTH_TOKENS = 128
# Texts of a model at a time; each has a cache, and one pass per token and text is made where none are joined.
TEXTS_MAX = 64


@dataclass(frozen=True, slots=True)
class Row:
    """A text. ``held``: its tokens in the cache; 0: it does not run. ``left``: what may still follow."""

    held: int
    length: int
    left: int

    @property
    def grown(self) -> int:
        return self.length + min(self.left, GROWTH_TOKENS)


@dataclass(frozen=True, slots=True)
class Places:
    """Of the rows that were asked about: those that run on, those that stop, and one that starts. The first
    ``kept`` of the prompts that are kept stay, and ``keeps``: so may that of the row that starts."""

    running: tuple[int, ...]
    stopping: tuple[int, ...] = ()
    starting: int | None = None
    kept: int = 0
    keeps: bool = False


def plan(
    rows: Sequence[Row], tokens_max: int, rows_max: int, joined: bool, kept: Sequence[int] = ()
) -> Places:
    """``rows``: all texts, oldest first. ``joined``: they are padded to the longest of them.

    ``kept``: the lengths of prompts that were read and are kept, beside the rows, for other choices of the
    same requests that start later; oldest first. They go before a text stops: a prompt is read again in one
    pass.
    """
    count = len(kept)
    while True:
        room = tokens_max - sum(kept[:count])
        places = _plan_rows(rows, room, rows_max, joined)
        held = [rows[place].held + 1 for place in places.running]
        grown = [rows[place].grown for place in places.running]
        if places.starting is not None:
            held.append(rows[places.starting].length)
            grown.append(rows[places.starting].grown)
        if not count or (not places.stopping and _cost(held, joined) <= room):
            break
        count -= 1
    keeps = places.starting is not None and (_cost(grown, joined) + rows[places.starting].length <= room)
    return replace(places, kept=count, keeps=keeps)


def _plan_rows(rows: Sequence[Row], tokens_max: int, rows_max: int, joined: bool) -> Places:
    running = [place for place, row in enumerate(rows) if row.held]
    stopping: list[int] = []
    while len(running) > 1 and _cost([rows[place].held + 1 for place in running], joined) > tokens_max:
        stopping.append(running.pop())
    if stopping or len(running) >= rows_max:
        return Places(tuple(running), tuple(stopping))
    idle = next((place for place, row in enumerate(rows) if not row.held), None)
    if idle is None:
        return Places(tuple(running))
    grown = [rows[place].grown for place in (*running, idle)]
    fits = not running or _cost(grown, joined) <= tokens_max
    return Places(tuple(running), starting=idle if fits else None)


def _cost(lengths: Sequence[int], joined: bool) -> int:
    return len(lengths) * max(lengths, default=0) if joined else sum(lengths)
