"""Eviction policies behind one small interface: ours, and the well-known ones to compare with.

Covers: ``Policy``, what it keeps per model (``Item``), and ``keep`` (the keep-index), ``lru``, ``gdsf``,
``s3fifo``, ``sieve`` and ``ttl``. Does not cover: who may be evicted at all (``room``, ``quota``) or how
much of it (the core evicts by chunks under ``keep`` and whole models under the others).

A policy gives every candidate a value; what has the least goes first. Under ``keep`` the value is the
milliseconds of restoring that keeping one byte saves per millisecond: expected uses (``intensity``) times
what a restore would cost, over the bytes held.

Sources: GreedyDual-Size-Frequency (Cherkasova 1998); S3-FIFO (Yang et al., SOSP 2023); SIEVE (Zhang et
al., NSDI 2024). ``ttl`` is what model servers do by default: five minutes idle and out, LRU before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from packer.intensity import Intensity, Ranking, Shared, note_use
from packer.types import BadValue

TTL_MS = 300_000  # the keep-alive that the most used model servers have by default
# S3-FIFO: a tenth of the memory is the probation queue, uses are counted up to 3, the ghost remembers as
# many models as are held.
S3FIFO_SMALL_SHARE = 0.1
S3FIFO_USES_MAX = 3


@dataclass(slots=True, eq=False)
class Item:
    """What a policy knows of one model. ``name`` breaks ties, so that equal histories rank alike."""

    name: str
    intensity: Intensity = field(default_factory=Intensity)
    last_ms: int = -1
    uses_held: int = 0  # since it came in
    value: float = 0.0  # the policy's own
    is_held: bool = False


class Policy(Protocol):
    """How one tier of one node ranks what it holds. No clock of its own, no randomness."""

    name: str
    # May a victim be evicted in part? The classic policies are defined on whole objects.
    partial: bool
    # Does anything expire? The others are never asked.
    timed: bool

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        """The model was used; ``cost_ms`` is what restoring all its ``nbytes`` would take."""

    def note_gone(self, item: Item) -> None:
        """Nothing of the model is held any more."""

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        """The value function of this moment: (item, what keeping it saves in ms, bytes held)."""

    def expired(self, items: Iterable[Item], now_ms: int) -> list[Item]:
        """What must go although nobody needs its room: nothing, but for a timer."""


class _Plain:
    """What most policies share."""

    name = ""
    partial = False
    timed = False

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        item.last_ms = now_ms
        item.uses_held += 1
        item.is_held = True

    def note_gone(self, item: Item) -> None:
        item.uses_held = 0
        item.is_held = False

    def expired(self, items: Iterable[Item], now_ms: int) -> list[Item]:
        return []


class Keep(_Plain):
    """Ours: expected uses x restore cost / bytes."""

    name = "keep"
    partial = True

    def __init__(self) -> None:
        self._shared = Shared()

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        super().note_use(item, now_ms, cost_ms, nbytes)
        note_use(item.intensity, self._shared, now_ms)

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        uses_per_ms = Ranking(self._shared, now_ms).uses_per_ms

        def value(item: Item, gain_ms: float, nbytes: int) -> float:
            return uses_per_ms(item.intensity) * max(gain_ms, 1.0) / max(nbytes, 1)

        return value


class Lru(_Plain):
    """Longest unused first."""

    name = "lru"

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        return lambda item, gain_ms, nbytes: float(item.last_ms)


class Ttl(Lru):
    """Out after five minutes without use; longest unused first when room is needed before."""

    name = "ttl"
    timed = True

    def expired(self, items: Iterable[Item], now_ms: int) -> list[Item]:
        return [item for item in items if item.is_held and now_ms - item.last_ms >= TTL_MS]


class Gdsf(_Plain):
    """Frequency x cost / size, aged by the value of the last victim."""

    name = "gdsf"

    def __init__(self) -> None:
        self._age = 0.0

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        super().note_use(item, now_ms, cost_ms, nbytes)
        item.value = self._age + item.uses_held * cost_ms / max(nbytes, 1)

    def note_gone(self, item: Item) -> None:
        super().note_gone(item)
        self._age = max(self._age, item.value)

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        return lambda item, gain_ms, nbytes: item.value


class Sieve(_Plain):
    """One queue by time of entry; a hand passes over what was used since it last came by."""

    name = "sieve"

    def __init__(self) -> None:
        # Oldest first. ``value`` is 1 when used since the hand passed, else 0.
        self._queue: dict[Item, None] = {}
        self._hand: Item | None = None

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        super().note_use(item, now_ms, cost_ms, nbytes)
        if item in self._queue:
            item.value = 1.0
        else:
            self._queue[item] = None
            item.value = 0.0

    def _from_hand(self) -> list[Item]:
        order = list(self._queue)
        if self._hand is not None and self._hand in self._queue:
            at = order.index(self._hand)
            return order[at:] + order[:at]
        return order

    def note_gone(self, item: Item) -> None:
        super().note_gone(item)
        if item not in self._queue:
            return
        order = self._from_hand()
        at = order.index(item)
        # The hand has come from its place to the victim and cleared what it passed.
        for passed in order[:at]:
            passed.value = 0.0
        following = order[at + 1 :]
        # Behind the newest it starts over at the oldest.
        self._hand = following[0] if following and list(self._queue)[-1] is not item else None
        del self._queue[item]

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        order = self._from_hand()
        first = [item for item in order if item.value == 0.0]
        second = [item for item in order if item.value != 0.0]
        places = {item: float(place) for place, item in enumerate([*first, *second])}
        return lambda item, gain_ms, nbytes: places.get(item, -1.0)


class S3Fifo(_Plain):
    """A small queue on probation, a main queue, and a memory of what left the small one."""

    name = "s3fifo"

    def __init__(self) -> None:
        # Oldest first, with the bytes of each. ``value`` counts uses since entry, up to the limit.
        self._small: dict[Item, int] = {}
        self._main: dict[Item, int] = {}
        self._ghost: dict[Item, None] = {}

    def note_use(self, item: Item, now_ms: int, cost_ms: float, nbytes: int) -> None:
        super().note_use(item, now_ms, cost_ms, nbytes)
        if item in self._small or item in self._main:
            item.value = min(item.value + 1.0, S3FIFO_USES_MAX)
            return
        item.value = 0.0
        if item in self._ghost:
            del self._ghost[item]
            self._main[item] = nbytes
        else:
            self._small[item] = nbytes

    def _victims(self) -> list[tuple[Item, bool]]:
        """The order in which all would leave if nothing came in; the flag: from the small queue."""
        small, main = dict(self._small), dict(self._main)
        uses = {item: item.value for item in [*small, *main]}
        small_bytes, main_bytes = sum(small.values()), sum(main.values())
        order: list[tuple[Item, bool]] = []
        while small or main:
            if small and (not main or small_bytes > S3FIFO_SMALL_SHARE * (small_bytes + main_bytes)):
                item, nbytes = next(iter(small.items()))
                del small[item]
                small_bytes -= nbytes
                if uses[item] > 1.0:
                    main[item], uses[item] = nbytes, 0.0
                    main_bytes += nbytes
                else:
                    order.append((item, True))
                continue
            item, nbytes = next(iter(main.items()))
            del main[item]
            if uses[item] > 0.0:
                uses[item] -= 1.0
                main[item] = nbytes
            else:
                main_bytes -= nbytes
                order.append((item, False))
        return order

    def note_gone(self, item: Item) -> None:
        super().note_gone(item)
        if item in self._small:
            # What stood before it in the small queue and was used has moved to the main one.
            for other in list(self._small):
                if other is item:
                    break
                if other.value > 1.0:
                    self._main[other] = self._small.pop(other)
                    other.value = 0.0
            del self._small[item]
            self._ghost[item] = None
        elif item in self._main:
            for other in list(self._main):
                if other is item:
                    break
                if other.value > 0.0:
                    other.value -= 1.0
                    self._main[other] = self._main.pop(other)
            del self._main[item]
        while len(self._ghost) > max(len(self._small) + len(self._main), 1):
            del self._ghost[next(iter(self._ghost))]

    def at(self, now_ms: int) -> Callable[[Item, float, int], float]:
        places = {item: float(place) for place, (item, _) in enumerate(self._victims())}
        return lambda item, gain_ms, nbytes: places.get(item, -1.0)


_POLICIES: dict[str, Callable[[], Policy]] = {
    "keep": Keep,
    "lru": Lru,
    "gdsf": Gdsf,
    "s3fifo": S3Fifo,
    "sieve": Sieve,
    "ttl": Ttl,
}
POLICY_NAMES = tuple(_POLICIES)


def make_policy(name: str) -> Policy:
    """A fresh policy by name. Raises ``BadValue``."""
    make = _POLICIES.get(name)
    if make is None:
        raise BadValue("policy", f"{name[:40]!r} is not one of {', '.join(POLICY_NAMES)}")
    return make()
