"""A fleet that models come to and leave: who is placed where, who is turned away, what is moved.

Covers: the workload of the packing experiment (Poisson arrivals of models from the catalogue, lognormal
lifetimes, nobody waits), the policies and the books of one run. Does not cover: the tables and the goals
(``bench_packing``) or the best that could be done with one fixed list (``packing_optimum``).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt

from request_traces import CATALOGUE_BYTES

from packer.placement import Bin, Piece, Placing, Rule, Wanted, check, place

MEAN_BYTES = sum(CATALOGUE_BYTES) / len(CATALOGUE_BYTES)
LIFETIME_CV = 2.0
# The first part of a run fills the fleet and is not counted.
WARM_UP_SHARE = 0.2
# Ours may move at most so many times the bytes of what comes.
MOVED_PARTS = 2


@dataclass(frozen=True, slots=True)
class Fleet:
    devices: int
    gigabytes: int
    load: float  # bytes x time that arrive, of what the fleet has

    @property
    def name(self) -> str:
        return f"{self.devices} x {self.gigabytes} GB, load {self.load:g}"

    @property
    def device_bytes(self) -> int:
        return self.gigabytes * 1_000_000_000


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float  # in mean lifetimes
    nbytes: int
    lives: float


def arrivals(fleet: Fleet, count: int, seed: int) -> list[Arrival]:
    """The same for every policy."""
    chance = random.Random(seed)
    per_lifetime = fleet.load * fleet.devices * fleet.device_bytes / MEAN_BYTES
    variance = log(1 + LIFETIME_CV**2)
    now, found = 0.0, []
    for _ in range(count):
        now += chance.expovariate(per_lifetime)
        nbytes = chance.choice(CATALOGUE_BYTES)
        found.append(Arrival(now, nbytes, chance.lognormvariate(-variance / 2, sqrt(variance))))
    return found


Policy = Callable[[Sequence[Bin], Wanted], Placing | None]


def _first(key: Callable[[Bin], tuple[float, ...]]) -> Policy:
    """Of the devices with room, the first by this order."""

    def choose(bins: Sequence[Bin], wanted: Wanted) -> Placing | None:
        fitting = [each for each in bins if each.usable_bytes >= wanted.share_bytes]
        return Placing((min(fitting, key=key).name,)) if fitting else None

    return choose


def ours(bins: Sequence[Bin], wanted: Wanted) -> Placing | None:
    return place(bins, wanted, Rule(moved_bytes_max=MOVED_PARTS * wanted.share_bytes))


def one_move(bins: Sequence[Bin], wanted: Wanted) -> Placing | None:
    return place(bins, wanted, Rule(moves_max=1, moved_bytes_max=MOVED_PARTS * wanted.share_bytes))


POLICIES: dict[str, Policy] = {
    "worst fit": _first(lambda each: (-each.usable_bytes,)),
    "spread by count": _first(lambda each: (len(each.pieces), -each.usable_bytes)),
    "first fit": _first(lambda each: (0,)),
    "best fit": place,
    "ours, one move": one_move,
    "ours": ours,
}
BOUND = "volume bound"


class Turnaways:
    """The rule of worth where everything that comes counts the same: moves serve what would rather be
    turned away less than the usual, by the bytes that it takes.

    Making room for one that is larger than what is turned away on average lets that one in and several
    later ones out.
    """

    def __init__(self) -> None:
        self._nbytes = 0.0
        self._count = 0.0

    def __call__(self, bins: Sequence[Bin], wanted: Wanted) -> Placing | None:
        direct = place(bins, wanted)
        if direct is not None:
            return direct
        usual = self._nbytes / self._count if self._count else 0.0
        found = ours(bins, wanted) if wanted.share_bytes <= usual else None
        if found is None:
            # A hundred turned away are remembered, the older the less.
            self._nbytes = 0.99 * self._nbytes + wanted.share_bytes
            self._count = 0.99 * self._count + 1
        return found


@dataclass(frozen=True, slots=True)
class Books:
    """What one run did, all in percent but the moves."""

    used: float  # of the fleet's bytes, over time
    refused_bytes: float  # of the bytes that came
    refused: float  # of the models that came
    moves: float  # per arrival
    moved_bytes: float  # of the bytes that came


def run(fleet: Fleet, coming: Sequence[Arrival], policy: Policy | None) -> Books:
    """One policy, or None for the volume bound: the whole fleet as one device."""
    play = _Play(fleet, policy)
    from_number = int(len(coming) * WARM_UP_SHARE)
    for number, arrival in enumerate(coming):
        if number == from_number:
            play.count_from(arrival.at)
        play.arrive(number, arrival)
    return play.books(coming[-1].at, len(coming) - from_number)


class _Play:
    def __init__(self, fleet: Fleet, policy: Policy | None) -> None:
        devices = 1 if policy is None else fleet.devices
        size = fleet.devices * fleet.device_bytes // devices
        self._policy = policy or place
        self._bins = [Bin(f"d{at:02}", size) for at in range(devices)]
        self._at = {each.name: at for at, each in enumerate(self._bins)}
        self._where: dict[str, str] = {}
        self._ends: list[tuple[float, str]] = []
        self._total = fleet.devices * fleet.device_bytes
        self._used = 0
        self._now = self._since = self._area = 0.0
        self._came = self._refused_bytes = self._refused = self._moves = self._moved_bytes = 0

    def count_from(self, now: float) -> None:
        self._pass(now)
        self._since = now
        self._area = 0.0
        self._came = self._refused_bytes = self._refused = self._moves = self._moved_bytes = 0

    def _pass(self, now: float) -> None:
        """Time passes, and what has lived long enough leaves."""
        while self._ends and self._ends[0][0] <= now:
            end, name = heapq.heappop(self._ends)
            self._until(end)
            self._put(self._where.pop(name), take=name)
        self._until(now)

    def _until(self, now: float) -> None:
        self._area += self._used * (now - self._now)
        self._now = now

    def _put(self, bin_name: str, piece: Piece | None = None, take: str = "") -> Piece | None:
        at = self._at[bin_name]
        before = self._bins[at]
        gone = next((each for each in before.pieces if each.name == take), None)
        pieces = tuple(each for each in before.pieces if each is not gone)
        if piece is not None:
            pieces += (piece,)
        change = (gone.nbytes if gone else 0) - (piece.nbytes if piece else 0)
        self._used -= change
        self._bins[at] = replace(before, room_bytes=before.room_bytes + change, pieces=pieces)
        return gone

    def arrive(self, number: int, arrival: Arrival) -> None:
        self._pass(arrival.at)
        self._came += arrival.nbytes
        wanted = Wanted(f"m{number:06}", arrival.nbytes)
        placing = self._policy(self._bins, wanted)
        if placing is None:
            self._refused_bytes += arrival.nbytes
            self._refused += 1
            return
        for wrong in check(self._bins, wanted, Rule(), placing) if placing.moves else ():
            raise AssertionError(wrong)
        moving = [(move, self._put(move.source, take=move.piece)) for move in placing.moves]
        for move, piece in moving:
            self._put(move.target, piece)
            self._where[move.piece] = move.target
        self._moves += len(moving)
        self._moved_bytes += placing.moved_bytes
        # A model costs to move what it weighs.
        self._put(placing.bins[0], Piece(wanted.name, arrival.nbytes, float(arrival.nbytes)))
        if min(each.room_bytes for each in self._bins) < 0:
            raise AssertionError(f"{wanted.name} is more than fits")
        self._where[wanted.name] = placing.bins[0]
        heapq.heappush(self._ends, (arrival.at + arrival.lives, wanted.name))

    def books(self, now: float, came: int) -> Books:
        return Books(
            100 * self._area / ((now - self._since) * self._total),
            100 * self._refused_bytes / self._came,
            100 * self._refused / came,
            self._moves / came,
            100 * self._moved_bytes / self._came,
        )
