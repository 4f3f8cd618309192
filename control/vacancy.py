"""Nodes that take requests, in the order of how busy they are and then of their room. Pure.

Covers: keeping that order as nodes report and are sent requests, and finding a few of the first for
something of a size without a look at all others. Does not cover: what a node's room is (``control.cluster``),
or which of the few is asked (``control.choosing``).

Where many are as good as each other, those are taken that follow the thing's own point on a ring of all
nodes: other things find others, and the same thing the same ones again.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain


def ring_point(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Noted:
    """One node. ``rooms``: the free bytes of each device that is healthy."""

    point: int
    band: int
    rooms: tuple[int, ...]


@dataclass(slots=True)
class Band:
    """Nodes that are as busy as each other, by room and by their points on the ring."""

    rooms: list[tuple[int, int, str]] = field(default_factory=list)
    nodes: list[tuple[int, str]] = field(default_factory=list)


@dataclass(slots=True)
class Vacancy:
    """``note`` and ``drop`` keep it, ``first`` asks."""

    at: dict[str, Noted] = field(default_factory=dict)
    bands: dict[int, Band] = field(default_factory=dict)

    def note(self, node: str, band: int, rooms: Sequence[int]) -> None:
        known = self.at.get(node)
        noted = Noted(known.point if known is not None else ring_point(node), band, tuple(rooms))
        if noted == known:
            return
        self.drop(node)
        self.at[node] = noted
        place = self.bands.setdefault(band, Band())
        insort(place.nodes, (noted.point, node))
        for room in noted.rooms:
            insort(place.rooms, (room, noted.point, node))

    def drop(self, node: str) -> None:
        noted = self.at.pop(node, None)
        if noted is None:
            return
        place = self.bands[noted.band]
        del place.nodes[bisect_left(place.nodes, (noted.point, node))]
        for room in noted.rooms:
            del place.rooms[bisect_left(place.rooms, (room, noted.point, node))]
        if not place.nodes:
            del self.bands[noted.band]

    def first(self, nbytes: int, point: int, count: int, good: Callable[[str], bool]) -> list[str]:
        """``count`` nodes that are ``good``: the least busy first, and of those the ones in whose best device
        the least is left over; where too few have room, others."""
        found: dict[str, None] = {}
        for node in chain(self._with_room(nbytes, point), self._any(point)):
            if node not in found and good(node):
                found[node] = None
                if len(found) >= count:
                    break
        return list(found)

    def _with_room(self, nbytes: int, point: int) -> Iterator[str]:
        for _, band in sorted(self.bands.items()):
            rooms = band.rooms
            begin = bisect_left(rooms, (nbytes, -1, ""))
            while begin < len(rooms):
                room = rooms[begin][0]
                end = bisect_left(rooms, (room + 1, -1, ""), begin)
                middle = bisect_left(rooms, (room, point, ""), begin, end)
                for place in chain(range(middle, end), range(begin, middle)):
                    yield rooms[place][2]
                begin = end

    def _any(self, point: int) -> Iterator[str]:
        for _, band in sorted(self.bands.items()):
            middle = bisect_left(band.nodes, (point, ""))
            for place in chain(range(middle, len(band.nodes)), range(middle)):
                yield band.nodes[place][1]
