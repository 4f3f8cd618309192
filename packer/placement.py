"""Placement: which bins something goes to, and which few things must move so that it fits. Pure.

Covers: best fit on exact bytes, at most two moves under a byte budget and a rule of worth when nothing fits,
and gangs that need several bins of one site. Does not cover: evicting (``victims``), whose turn it is
(``queueing``), carrying a move out (``moving``), or keeping copies apart (``control.copies``: a node holds a
version once). One function for a node's devices, for control's nodes and for the packing bench.

A **bin** is a device; its **site** is the node that it is in. A gang takes its shares, and a move takes
place, within one site: between nodes nothing is moved, it is only restored elsewhere. Costs and worth are in
whatever unit the caller chose, the same for both. A caller counts foreign processes' memory, what is in
flight and what was promised to others out of ``room_bytes`` and ``reserved_bytes``, and leaves out bins that
are not healthy.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# More moves for one arrival would each wait for the one before; measured, two find nearly all there is.
MOVES_MAX = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """Something in a bin. ``cost`` is what moving it costs; None: it must stay, it is in use."""

    name: str
    nbytes: int
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Bin:
    """A device: its free bytes, of which ``reserved_bytes`` are promised to others, and what lies in it."""

    name: str
    room_bytes: int
    pieces: tuple[Piece, ...] = ()
    site: str = ""
    reserved_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        return self.room_bytes - self.reserved_bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be placed: ``share_bytes`` on each of ``devices`` bins of one site. ``worth`` is lost if it
    is not placed: moves must cost less."""

    name: str
    share_bytes: int
    devices: int = 1
    worth: float = math.inf


@dataclass(frozen=True, slots=True)
class Rule:
    """How much may be moved for one arrival."""

    moves_max: int = MOVES_MAX
    moved_bytes_max: float = math.inf


@dataclass(frozen=True, slots=True)
class Move:
    """One piece from one bin of a site to another. All moves of a placing happen together: what leaves
    makes room for what comes."""

    piece: str
    nbytes: int
    source: str
    target: str
    cost: float


@dataclass(frozen=True, slots=True)
class Placing:
    """Where it goes, one bin for each share, and what moves before."""

    bins: tuple[str, ...]
    moves: tuple[Move, ...] = ()

    @property
    def cost(self) -> float:
        return sum(move.cost for move in self.moves)

    @property
    def moved_bytes(self) -> int:
        return sum(move.nbytes for move in self.moves)


NO_MOVES = Rule(moves_max=0, moved_bytes_max=0)


def place(bins: Sequence[Bin], wanted: Wanted, rule: Rule = NO_MOVES) -> Placing | None:
    """The bins with the least room left over; where none have room, the cheapest moves that make it.

    None: it does not fit, or making it fit is not worth it. Ties go by name, so the order of ``bins`` and
    of what is in them does not matter.
    """
    sites = _sites_of(bins, wanted)
    fits = [found for site in sites if (found := _direct(site, wanted)) is not None]
    if fits:
        return Placing(min(fits)[1])
    if rule.moves_max <= 0 or wanted.worth <= 0:
        return None
    plans = [plan for site in sites if (plan := _with_moves(site, wanted, rule)) is not None]
    return min(plans, key=_rank) if plans else None


def left_over(bins: Sequence[Bin], wanted: Wanted) -> dict[str, int]:
    """Of every site that can take it without a move, the room that would be left in the bins it took: the
    least is the best fit. For who has to choose among sites by more than their room."""
    taken = wanted.share_bytes * wanted.devices
    return {
        site[0].site: direct[0] - taken
        for site in _sites_of(bins, wanted)
        if (direct := _direct(site, wanted)) is not None
    }


def _rank(plan: Placing) -> tuple[float, int, int, tuple[str, ...], tuple[str, ...]]:
    return plan.cost, len(plan.moves), plan.moved_bytes, plan.bins, tuple(move.piece for move in plan.moves)


def _sites_of(bins: Sequence[Bin], wanted: Wanted) -> list[list[Bin]]:
    """The bins of each site that may take it, in the order of their names."""
    sites: dict[str, list[Bin]] = {}
    for each in sorted(bins, key=lambda each: (each.site, each.name)):
        sites.setdefault(each.site, []).append(each)
    return [site for site in sites.values() if len(site) >= wanted.devices]


def _direct(site: list[Bin], wanted: Wanted) -> tuple[int, tuple[str, ...]] | None:
    """The room in the bins that it would take, and these; None: it does not fit as they are."""
    share = wanted.share_bytes
    fitting = sorted((each.usable_bytes, each.name) for each in site if each.usable_bytes >= share)
    if len(fitting) < wanted.devices:
        return None
    chosen = fitting[: wanted.devices]
    return sum(usable for usable, _ in chosen), tuple(name for _, name in chosen)


# --- moves ----------------------------------------------------------------------------------------


def _with_moves(site: list[Bin], wanted: Wanted, rule: Rule) -> Placing | None:
    """Moves within one site that make room for every share, or None."""
    share, missing = wanted.share_bytes, wanted.devices
    if sum(max(each.usable_bytes, 0) for each in site) < share * missing:
        return None
    search = _Search(site)
    for at in [at for _, at in search.order if search.rooms[at] >= share]:
        search.take(at, share)
        missing -= 1
    moves: list[Move] = []
    cost_max, bytes_max = wanted.worth, rule.moved_bytes_max
    while missing:
        found = search.best(share, rule.moves_max - len(moves), cost_max, bytes_max)
        if found is None:
            return None
        target, steps = found
        for step in steps:
            moves.append(search.carry_out(step))
            cost_max -= step.piece.cost
            bytes_max -= step.piece.nbytes
        search.take(target, share)
        missing -= 1
    return Placing(tuple(sorted(site[at].name for at in search.taken)), tuple(moves))


@dataclass(frozen=True, slots=True)
class _Movable:
    """A piece that may move."""

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class _Step:
    """A piece goes from one bin to another, by their places."""

    piece: _Movable
    source: int
    target: int


@dataclass(slots=True)
class _Best:
    """The cheapest plan so far, and what a plan must stay below."""

    share: int
    moves_max: int
    cost_max: float
    bytes_max: float
    rank: tuple[float, int, int, int] | None = None
    target: int = -1
    steps: tuple[_Step, ...] = ()

    def may_cost(self, cost: float, nbytes: int) -> bool:
        """Could a plan that costs this be chosen? Ties may: fewer moves or bytes decide between them."""
        if nbytes > self.bytes_max or cost >= self.cost_max:
            return False
        return self.rank is None or cost <= self.rank[0]

    def offer(self, target: int, room: int, steps: tuple[_Step, ...]) -> None:
        cost = sum(step.piece.cost for step in steps)
        nbytes = sum(step.piece.nbytes for step in steps)
        if len(steps) > self.moves_max or not self.may_cost(cost, nbytes):
            return
        rank = (cost, len(steps), nbytes, room)
        if self.rank is None or rank < self.rank:
            self.rank, self.target, self.steps = rank, target, steps


@dataclass(slots=True)
class _Search:
    """The bins of one site by their places, in the order of their names; pieces by their cost."""

    site: list[Bin]
    rooms: list[int] = field(init=False)
    pieces: list[list[_Movable]] = field(init=False)
    order: list[tuple[int, int]] = field(init=False)  # by room
    taken: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rooms = [each.usable_bytes for each in self.site]
        self.pieces = [_movable(each) for each in self.site]
        self.order = sorted((room, at) for at, room in enumerate(self.rooms))
        self.taken = []

    # --- the state of the search ---

    def take(self, at: int, nbytes: int) -> None:
        """A share lies there now; no second one of the same gang may."""
        self._grow(at, -nbytes)
        self.taken.append(at)

    def carry_out(self, step: _Step) -> Move:
        piece = step.piece
        self._grow(step.source, piece.nbytes)
        self._grow(step.target, -piece.nbytes)
        # Moved once, it stays: one arrival does not move the same thing twice.
        self.pieces[step.source].remove(piece)
        source, target = self.site[step.source].name, self.site[step.target].name
        return Move(piece.name, piece.nbytes, source, target, piece.cost)

    def _grow(self, at: int, nbytes: int) -> None:
        del self.order[bisect_left(self.order, (self.rooms[at], at))]
        self.rooms[at] += nbytes
        insort(self.order, (self.rooms[at], at))

    def _fit(self, nbytes: int, without: tuple[int, ...]) -> int:
        """The bin with the least sufficient room; -1: none."""
        order = self.order
        place = bisect_left(order, (nbytes, -1))
        while place < len(order):
            at = order[place][1]
            if at not in without:
                return at
            place += 1
        return -1

    # --- the search ---

    def best(
        self, share: int, moves_max: int, cost_max: float, bytes_max: float
    ) -> tuple[int, tuple[_Step, ...]] | None:
        """The cheapest moves, at most so many, after which a bin has room for a share, and that bin."""
        best = _Best(share, moves_max, cost_max, bytes_max)
        for target, room in enumerate(self.rooms):
            if target in self.taken or moves_max < 1:
                continue
            gap = share - room
            for at, first in enumerate(self.pieces[target]):
                if not best.may_cost(first.cost, first.nbytes):
                    if first.cost >= best.cost_max or (best.rank and first.cost > best.rank[0]):
                        break  # the others cost more
                    continue
                if first.nbytes >= gap:
                    self._one(best, target, first)
                    if moves_max > 1:
                        self._chains(best, target, first)
                elif moves_max > 1:
                    self._pairs(best, target, first, at)
        return None if best.rank is None else (best.target, best.steps)

    def _one(self, best: _Best, target: int, piece: _Movable) -> None:
        to = self._fit(piece.nbytes, (target,))
        if to >= 0:
            left = self.rooms[target] + piece.nbytes - best.share
            best.offer(target, left, (_Step(piece, target, to),))

    def _pairs(self, best: _Best, target: int, first: _Movable, at: int) -> None:
        """Two pieces that are enough together leave the target."""
        gap = best.share - self.rooms[target]
        for second in self.pieces[target][at + 1 :]:
            freed = first.nbytes + second.nbytes
            if freed < gap or second.nbytes >= gap or not best.may_cost(first.cost + second.cost, freed):
                continue
            large, small = (first, second) if first.nbytes >= second.nbytes else (second, first)
            to = self._fit(large.nbytes, (target,))
            if to < 0:
                continue
            other = self._fit(small.nbytes, (target, to))
            if self.rooms[to] - large.nbytes >= small.nbytes:
                other = to
            if other >= 0:
                left = self.rooms[target] + freed - best.share
                best.offer(target, left, (_Step(large, target, to), _Step(small, target, other)))

    def _chains(self, best: _Best, target: int, first: _Movable) -> None:
        """The piece that leaves the target takes the place of another, which goes into the hole of the
        target or to a third bin."""
        gap = best.share - self.rooms[target]
        for to, room in enumerate(self.rooms):
            if to == target or room >= first.nbytes:
                continue
            for second in self.pieces[to]:
                if second.nbytes < first.nbytes - room:
                    continue
                moved = first.nbytes + second.nbytes
                if not best.may_cost(first.cost + second.cost, moved):
                    continue
                left = self.rooms[target] + first.nbytes - best.share
                if first.nbytes - second.nbytes >= gap:
                    steps = (_Step(second, to, target), _Step(first, target, to))
                    best.offer(target, left - second.nbytes, steps)
                    break  # the others cost more
                third = self._fit(second.nbytes, (target, to))
                if third >= 0:
                    best.offer(target, left, (_Step(second, to, third), _Step(first, target, to)))
                    break


def _movable(each: Bin) -> list[_Movable]:
    free = (_Movable(p.name, p.nbytes, p.cost) for p in each.pieces if p.cost is not None and p.nbytes > 0)
    return sorted(free, key=lambda piece: (piece.cost, piece.nbytes, piece.name))


def check(bins: Sequence[Bin], wanted: Wanted, rule: Rule, placing: Placing) -> Iterator[str]:
    """What is wrong with a placing, by arithmetic of its own; nothing: it keeps every promise."""
    room = {each.name: each.usable_bytes for each in bins}
    site = {each.name: each.site for each in bins}
    held = {(each.name, piece.name): piece for each in bins for piece in each.pieces}
    for move in placing.moves:
        piece = held.pop((move.source, move.piece), None)
        if piece is None or piece.cost is None or (piece.nbytes, piece.cost) != (move.nbytes, move.cost):
            yield f"{move.piece} is not a piece of {move.source} that may move"
        if move.source == move.target or site[move.source] != site[move.target]:
            yield f"{move.piece} moves from {move.source} to {move.target}"
        room[move.source] += move.nbytes
        room[move.target] -= move.nbytes
    for name in placing.bins:
        room[name] -= wanted.share_bytes
    before = {each.name: each.usable_bytes for each in bins}
    for name, left in room.items():
        if left < 0 and left < before[name]:
            yield f"{name} is {-left} bytes over"
    if len(placing.bins) != wanted.devices or len({*placing.bins}) != wanted.devices:
        yield f"{placing.bins} are not {wanted.devices} different bins"
    if len({site[name] for name in placing.bins}) > 1:
        yield f"{placing.bins} are not of one site"
    if len(placing.moves) > rule.moves_max or placing.moved_bytes > rule.moved_bytes_max:
        yield f"{len(placing.moves)} moves of {placing.moved_bytes} bytes"
    if placing.moves and placing.cost >= wanted.worth:
        yield f"moves cost {placing.cost}, and it is worth {wanted.worth}"
