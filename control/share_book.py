"""What every node holds of every tenant's limits, as control knows it, and sums of it that are kept up. Pure.

Covers: the values of the book, adding up, who has some and who waits for some, and the invariant. Does not
cover: what changes it (``control/shares.py``), or what a share is (``packer/shares.py``).

One exchange of a node must not cost more with more nodes, so what is asked of all of them is kept as they
change: the sum of what is out of a tenant's limits, those who have some (64 at the most: nobody has less than
a grain of a limit, which has 64), and those who wait for some, the longest first. Whoever changes ``could``,
``want`` or ``since_ms`` takes the entry out before (``lift``) and puts it back after (``put``).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from fractions import Fraction

from packer.shares import NO_LAGS, NOTHING, Lags, Share

ONE, NONE = Fraction(1), Fraction(0)


@dataclass(slots=True)
class Held:
    """One tenant on one node. ``could``: what it said that it holds, and what it was answered since."""

    could: list[Share] = field(default_factory=lambda: [NOTHING])
    want: Share = NOTHING
    ahead: bool = False  # the node could serve the tenant, and may have some before it wants it
    since_ms: int = 0  # when it came to have a grain, or to want one
    wanted_ms: int | None = None  # when it wanted some last
    counted: Fraction = NONE  # in the tenant's sum

    @property
    def value(self) -> Fraction:
        return max(share.value for share in self.could)


@dataclass(slots=True)
class TenantBook:
    """One tenant: who holds or wants some, and when what was taken of the free part is paid for.

    ``out``, ``having`` and ``waiting`` follow from ``held``; nodes that are halved wait for nothing."""

    grains: int = 1
    full: Lags = NO_LAGS
    due_ms: tuple[int, ...] = (0, 0, 0, 0)
    held: dict[str, Held] = field(default_factory=dict)
    out: Fraction = NONE
    having: dict[str, None] = field(default_factory=dict)
    waiting: list[tuple[int, str]] = field(default_factory=list)  # since when, and who

    def lift(self, node: str) -> Held:
        """Take a node's entry out of what follows; a new one when there is none."""
        held = self.held.get(node)
        if held is None:
            held = self.held[node] = Held()
            return held
        if held.counted:
            self.out -= held.counted
            held.counted = NONE
            del self.having[node]
        else:
            entry = (held.since_ms, node)
            place = bisect_left(self.waiting, entry)
            if place < len(self.waiting) and self.waiting[place] == entry:
                del self.waiting[place]
        return held

    def put(self, node: str, *, halved: bool) -> None:
        """Count a node's entry as it is now."""
        held = self.held[node]
        held.counted = held.value
        if held.counted:
            self.out += held.counted
            self.having[node] = None
        elif held.want.parts and not halved:
            insort(self.waiting, (held.since_ms, node))

    def drop(self, node: str) -> Fraction:
        """Forget a node's entry; what it had."""
        part = self.held[node].counted
        self.lift(node)
        del self.held[node]
        return part


@dataclass(slots=True)
class Holder:
    """One node. ``rest``: of tenants that are not in its list."""

    session: str = ""
    number: int = 0
    rest: list[Share] = field(default_factory=lambda: [NOTHING])
    tenants: dict[str, None] = field(default_factory=dict)
    lasting: bool = False  # what it said that it holds does not halve
    alone: bool = False  # it may have been told since that nothing of it halves
    free_at_ms: int = 0
    halved: bool = False
    nudged_ms: int | None = None

    @property
    def rest_value(self) -> Fraction:
        return max(share.value for share in self.rest)


@dataclass(slots=True)
class ShareBook:
    """``name`` is of this start of control, and no other's."""

    name: str
    started_ms: int
    holders: dict[str, Holder] = field(default_factory=dict)
    tenants: dict[str, TenantBook] = field(default_factory=dict)
    unbound: dict[str, None] = field(default_factory=dict)  # nodes of which nothing is known
    resting: dict[str, None] = field(default_factory=dict)  # nodes that have some of every tenant's: few
    sessions: int = 0
    divided: bool = False  # no node that is not heard can be one that was alone


def may_have(could: list[Share], share: Share) -> None:
    if share not in could:
        could.append(share)


def out_of(book: ShareBook, known: TenantBook) -> Fraction:
    """How much of a tenant's limits nodes that were heard may hold."""
    resting = (book.holders[node].rest_value for node in book.resting if node not in known.held)
    return sum(resting, known.out)


class SharesBroken(AssertionError):
    """More was given than there is: a bug."""


def check(book: ShareBook) -> None:
    """The invariants, after a step: of no tenant's limits more is out than the whole, and what is kept up is
    what follows."""
    for tenant, known in book.tenants.items():
        waiting = dict.fromkeys(known.waiting)
        for node, held in known.held.items():
            holder = book.holders.get(node)
            if holder is None or tenant not in holder.tenants:
                raise SharesBroken(f"{node} holds a share of {tenant} and does not know")
            waits = bool(held.want.parts) and not held.value and not holder.halved
            if waits != ((held.since_ms, node) in waiting):
                raise SharesBroken(f"{node} waits for {tenant}: {waits}, and is thought not to")
        having = {node: held.value for node, held in known.held.items() if held.value}
        if known.out != sum(having.values(), NONE) or having.keys() != known.having.keys():
            raise SharesBroken(
                f"{known.out} of {tenant} is said to be with {list(known.having)}, not {having}"
            )
        if known.waiting != sorted(known.waiting) or len(known.waiting) > len(known.held) - len(having):
            raise SharesBroken(f"who waits for {tenant} is out of order: {known.waiting}")
        if (total := out_of(book, known)) > ONE:
            raise SharesBroken(f"{total} of the limits of {tenant} is with {list(known.held)}")
