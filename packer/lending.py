"""Reserved bytes that are lent while their owner has credit, and the proof that it is never worse off.

Covers: the ghost of a tenant's private slice (which of its models would be there if it were alone on its
reserved bytes, least recently used out first), what the tenant owes or is owed in milliseconds of
restoring, and how much of what it holds may be taken from it. Pure books: nothing here knows devices, waits
or whom to evict (``victims``), or keeps anything outside of the device tier (``quota.may_take`` does).

Three figures of one tenant, all in whole milliseconds:

- ``debt_ms``: what its restores have cost, less what they would have cost the slice. Negative: credit.
- the **gap** of one of its models: what its next use would cost more than in the slice, because bytes were
  taken that the slice still has; never negative. ``gap_ms`` is the sum over all its models.
- ``excused_ms``: gaps that were struck out because no policy could have avoided them: see ``lose``.

A taking that opens a gap is allowed only if afterwards ``debt + margin x gap <= 0``; one that opens none
(bytes that the slice would have evicted as well) is always allowed, whoever asks. With the margin at 100 %
this keeps ``debt + gap <= 0`` for ever, so **debt is never above zero**, at no instant, whatever comes:

- a use moves the model's gap into the debt, or earns credit; the sum does not grow;
- the slice evicting something closes gaps; only a taking opens them, and it is paid for beforehand;
- both sides are charged by the same price of the same model, frozen while its gap is open, so that neither
  a learned estimate that moves nor a slow disk makes debt of nothing.

And it never starves its owner: all slices together are at most the memory there is, so whoever needs room
within its reserve finds enough bytes that are in nobody's slice. This needs bytes to be divisible as in the
slice, which they are by chunks, and one device; where it fails (models that can not be cut, several
devices, models pinned by leases) the core waits, or takes and excuses, so that the real cost less the
cost alone is never above ``excused_ms`` (``tests/test_lending.py`` compares whole histories). With a margin
below 100 % the credit needs to cover that share of the gaps only: debt stays below the rest, at most
``100 % - margin`` of what restoring the whole slice costs.

What is counted: one price per restore, not the time spent in line: a request that waits for a device that
others use is a matter of fair queueing. A use that joins a restore under way costs neither side anything.
Both sides restore from the same source: copies in the host and disk tier are not lent, their reserves stay
with whoever holds them. What a fault or a restart takes from the devices, the slice loses as well.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

# The share of open gaps that credit must cover, in percent: 100 is the guarantee, 0 lends to whoever has
# any credit at all. Above 100 it covers more than there is to lose.
MARGIN_PERCENT = 100
MARGIN_PERCENT_MAX = 1000
# Credit beyond what covers open gaps is forgotten above this: ten minutes. It bounds how much worse a
# tenant may fare for a while in return for a good past, over any stretch of time and not only in all.
CREDIT_MAX_MS = 600_000
# Models that one ghost remembers, some 300 bytes each; beyond it the least recently used is forgotten.
SHADES_MAX = 4096
# What may be taken of a tenant whose credit covers everything.
UNLIMITED_MS = 1 << 62
# Who has little credit is helped before its guarantee has to: its models count for up to four times their
# worth when victims are ranked, falling to their worth where the credit reaches what restoring the whole
# slice costs. A tenant that is left its most valuable models keeps its promise more cheaply than one that is
# left its most recent ones: on ServeGen-derived traces isolation costs all together 4.3 % instead of 5.2 %
# (``scripts/bench_isolation.py``; from two to six times and from one to three slices it is much the same).
WEIGHT_MAX = 4.0
WEIGHT_SLICES = 1


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator decided about lending, for a whole node."""

    margin_percent: int = MARGIN_PERCENT
    credit_max_ms: int = CREDIT_MAX_MS


@dataclass(frozen=True, slots=True)
class Price:
    """What restoring a model costs: something whatever its size, and the rest by the bytes that move.

    ``divisible`` False: its source gives whole models only.
    """

    fixed_ms: int = 0
    whole_ms: int = 0
    divisible: bool = True

    def of(self, missing_bytes: int, image_bytes: int) -> int:
        """Milliseconds for bringing ``missing_bytes`` of its weights; nothing for none."""
        if missing_bytes <= 0:
            return 0
        if not self.divisible or missing_bytes >= image_bytes:
            return self.whole_ms
        return self.fixed_ms + (self.whole_ms - self.fixed_ms) * missing_bytes // image_bytes


@dataclass(frozen=True, slots=True)
class LendingView:
    """How a tenant stands with its reserved device bytes, for reports.

    ``lent_bytes``: of its reserve, in others' hands; ``borrowed_bytes``: what it holds beyond its reserve;
    ``protected``: nothing that its slice has may be taken now.
    """

    debt_ms: int = 0
    lent_bytes: int = 0
    borrowed_bytes: int = 0
    excused_ms: int = 0
    protected: bool = False


@dataclass(slots=True, eq=False)
class Shade:
    """One model beside the private slice of its tenant: what the slice has of it, and what is really there.

    ``size_bytes`` counts the workspace, which costs nothing to restore and goes with the last chunk.
    ``ends`` are where its chunks end; without any it can be cut at every byte. ``owed_ms`` is what the
    slice paid for a use whose restore has not begun yet.
    """

    image_bytes: int
    size_bytes: int
    ends: tuple[int, ...] = ()
    slice_bytes: int = 0
    real_bytes: int = 0
    price: Price = Price()
    owed_ms: int | None = None
    before_bytes: int = 0  # what the slice had of it before that use
    gap_ms: int = 0
    counted_ms: int = 0  # its part of ``Slice.restore_ms``

    def prefix_bytes(self, nbytes: int) -> int:
        """The largest part of the model, from its first byte on, that ``nbytes`` can hold."""
        if nbytes >= self.size_bytes:
            return self.size_bytes
        if not self.ends:
            return min(max(nbytes, 0), self.image_bytes)
        kept = bisect_right(self.ends, nbytes, 0, len(self.ends) - 1)
        return self.ends[kept - 1] if kept else 0

    def missing_bytes(self, held_bytes: int) -> int:
        """Weights that lack when this much is held."""
        return 0 if held_bytes >= self.size_bytes else self.image_bytes - min(held_bytes, self.image_bytes)

    def gap_with(self, real_bytes: int) -> int:
        """What the next use would cost more than in the slice if this much were really there."""
        cost_ms = self.price.of(self.missing_bytes(real_bytes), self.image_bytes)
        if not cost_ms:
            return 0
        owed_ms = self.owed_ms
        if owed_ms is None:
            owed_ms = self.price.of(self.missing_bytes(self.slice_bytes), self.image_bytes)
        return max(cost_ms - owed_ms, 0)


def shade_of(image_bytes: int, workspace_bytes: int, chunk_bytes: tuple[int, ...], partial: bool) -> Shade:
    """A model that the slice has nothing of. ``partial`` False: it can not be cut."""
    ends = tuple(accumulate(chunk_bytes)) if partial and chunk_bytes else (image_bytes,)
    return Shade(image_bytes, image_bytes + workspace_bytes, ends)


@dataclass(slots=True, eq=False)
class Slice:
    """The private slice of one tenant, and what it owes or is owed."""

    reserved_bytes: int = 0
    held_bytes: int = 0
    # What the slice has something of, least recently used first.
    shades: dict[Shade, None] = field(default_factory=dict)
    debt_ms: int = 0
    gap_ms: int = 0
    excused_ms: int = 0
    # What restoring all that the slice has something of would cost, at the prices of their last uses.
    restore_ms: int = 0
    # What its models count for when victims are ranked, in multiples of their worth.
    weight: float = 1.0

    # --- what happens -----------------------------------------------------------------------------

    def use(self, shade: Shade, terms: Terms) -> None:
        """A request for the model came. What it costs the slice is booked at once if the model is there,
        else when its restore begins (``pay``)."""
        if not self.reserved_bytes:
            return
        missing_bytes = shade.missing_bytes(shade.slice_bytes)
        cost_ms = shade.price.of(missing_bytes, shade.image_bytes) if missing_bytes else 0
        if shade.real_bytes < shade.size_bytes:
            if shade.owed_ms is None:
                shade.owed_ms, shade.before_bytes = 0, shade.slice_bytes
            shade.owed_ms += cost_ms
        elif cost_ms:
            self._book(-cost_ms, terms)
        self._bring(shade)

    def pay(self, shade: Shade, terms: Terms) -> None:
        """Its restore begins: all of it is really there from now on, as far as the books go."""
        if shade.owed_ms is None:
            self.use(shade, terms)
        cost_ms = shade.price.of(shade.missing_bytes(shade.real_bytes), shade.image_bytes)
        owed_ms, shade.owed_ms = shade.owed_ms, None
        shade.real_bytes = shade.size_bytes
        self._set_gap(shade, 0)
        if owed_ms is not None:
            self._book(cost_ms - owed_ms, terms)

    def keep(self, shade: Shade, real_bytes: int) -> None:
        """Bytes were taken: this many are really left. Who takes asks ``may_open_ms`` before."""
        shade.real_bytes = real_bytes
        self._set_gap(shade, shade.gap_with(real_bytes))

    def lose(self, shade: Shade, real_bytes: int) -> None:
        """Bytes are gone that no policy could have kept (a worker died, a restore failed, memory shrank):
        alone on its slice the tenant would have lost them as well, so the slice loses them too."""
        shade.real_bytes = real_bytes
        shade.owed_ms = None
        self.excused_ms += shade.gap_ms
        self._hold(shade, min(shade.slice_bytes, shade.prefix_bytes(real_bytes)))
        self._set_gap(shade, 0)

    def give_up(self, shade: Shade) -> None:
        """Nobody waits for the model any more and no restore had begun: neither side has paid."""
        if shade.owed_ms is None:
            return
        shade.owed_ms = None
        gap_ms = shade.gap_ms
        self._hold(shade, min(shade.slice_bytes, shade.before_bytes))
        if shade.gap_with(shade.real_bytes) > gap_ms:
            self.lose(shade, shade.real_bytes)
        else:
            self._set_gap(shade, shade.gap_with(shade.real_bytes))

    def forget(self, shade: Shade) -> None:
        """The model is no longer the tenant's."""
        shade.owed_ms = None
        self._hold(shade, 0)
        self._set_gap(shade, 0)

    def measure(self, shade: Shade, size_bytes: int) -> None:
        """The model takes this much beside others, with what its requests need: in the slice as well."""
        more_bytes = size_bytes - shade.size_bytes
        if not more_bytes:
            return
        if not shade.size_bytes:
            shade.size_bytes = size_bytes  # known by its pack only: nothing of it is anywhere
            return
        in_slice, is_there = shade.slice_bytes >= shade.size_bytes, shade.real_bytes >= shade.size_bytes
        if shade.before_bytes >= shade.size_bytes:
            shade.before_bytes = size_bytes
        shade.size_bytes = size_bytes
        if is_there:
            shade.real_bytes = size_bytes
        if in_slice:
            shade.slice_bytes = size_bytes
            self.held_bytes += more_bytes
            self._fit()

    def reserve(self, reserved_bytes: int, held: list[Shade]) -> None:
        """The tenant has this much reserved from now on. A slice that grows starts with what the tenant
        really holds (``held``, the most recently used first): nobody is in debt for the past."""
        before_bytes, self.reserved_bytes = self.reserved_bytes, reserved_bytes
        self._fit()
        if not before_bytes or not reserved_bytes:
            self.debt_ms = -self.gap_ms
        older: list[Shade] = []
        for shade in held if reserved_bytes > before_bytes else ():
            if shade in self.shades or len(self.shades) + len(older) >= SHADES_MAX:
                continue
            room_bytes = self.reserved_bytes - self.held_bytes
            shade.slice_bytes = shade.prefix_bytes(min(room_bytes, shade.prefix_bytes(shade.real_bytes)))
            self.held_bytes += shade.slice_bytes
            if shade.slice_bytes:
                self._count(shade, shade.price.whole_ms)
                older.append(shade)
        if older:
            self.shades = dict.fromkeys([*reversed(older), *self.shades])
        self._weigh()

    # --- what is asked ----------------------------------------------------------------------------

    def may_open_ms(self, terms: Terms) -> int:
        """By how much takings may widen the gaps now; 0: nothing may go that the slice has."""
        if self.debt_ms >= 0:
            return 0
        if not terms.margin_percent:
            return UNLIMITED_MS
        return max(-self.debt_ms * 100 // terms.margin_percent - self.gap_ms, 0)

    def spared_bytes(self, shade: Shade, wanted_bytes: int, may_open_ms: int) -> int:
        """What must stay of a model of which ``wanted_bytes`` are wanted, when takings may widen the gaps by
        ``may_open_ms``: nothing, or all but what is wanted, or whatever the slice has of it too (or had,
        for a use whose restore has not begun)."""
        if not self.reserved_bytes or shade.gap_with(0) - shade.gap_ms <= may_open_ms:
            return 0
        left_bytes = shade.prefix_bytes(max(shade.real_bytes - wanted_bytes, 0))
        if left_bytes and shade.gap_with(left_bytes) - shade.gap_ms <= may_open_ms:
            return left_bytes
        has_bytes = shade.slice_bytes if shade.owed_ms is None else shade.before_bytes
        return min(shade.real_bytes, has_bytes)

    def recall(self, debt_ms: int, terms: Terms) -> None:
        """What stood before a restart. The slice itself starts empty, as the devices do."""
        if self.reserved_bytes:
            self.debt_ms = 0
            self._book(debt_ms, terms)
            self.agree(terms)

    def agree(self, terms: Terms) -> None:
        """Other terms hold from now on; debt that they would never have allowed is struck out."""
        if terms.margin_percent >= MARGIN_PERCENT:
            self.debt_ms = min(self.debt_ms, -self.gap_ms)
        self._book(0, terms)

    def is_over(self, terms: Terms) -> bool:
        """Are gaps open that the credit does not cover as it should?"""
        return self.gap_ms > 0 and self.debt_ms * 100 + terms.margin_percent * self.gap_ms > 0

    # --- prices -----------------------------------------------------------------------------------

    def price(self, shade: Shade, price: Price) -> None:
        """State what restores of a model cost now. While bytes are taken that the slice has, or a use is
        not paid yet, the price stays what it was: a new one would open a gap by itself."""
        if shade.owed_ms is None and shade.real_bytes >= shade.slice_bytes:
            shade.price = price

    # --- books ------------------------------------------------------------------------------------

    def _book(self, ms: int, terms: Terms) -> None:
        debt_ms = self.debt_ms + ms
        self.debt_ms = max(debt_ms, -terms.credit_max_ms - self.gap_ms)
        self._weigh()

    def _weigh(self) -> None:
        wanted_ms = WEIGHT_SLICES * self.restore_ms
        if wanted_ms <= 0 or self.debt_ms <= -wanted_ms:
            self.weight = 1.0
        else:
            self.weight = 1.0 + (WEIGHT_MAX - 1.0) * min(1.0 + self.debt_ms / wanted_ms, 1.0)

    def _count(self, shade: Shade, ms: int) -> None:
        self.restore_ms += ms - shade.counted_ms
        shade.counted_ms = ms

    def _set_gap(self, shade: Shade, gap_ms: int) -> None:
        self.gap_ms += gap_ms - shade.gap_ms
        shade.gap_ms = gap_ms

    def _bring(self, shade: Shade) -> None:
        """All of the model is in the slice now, as much as it can hold, and was used last."""
        self.shades.pop(shade, None)
        self.held_bytes += shade.size_bytes - shade.slice_bytes
        shade.slice_bytes = shade.size_bytes
        self.shades[shade] = None
        self._count(shade, shade.price.whole_ms)
        if shade.gap_ms:
            self._set_gap(shade, shade.gap_with(shade.real_bytes))
        self._fit()

    def _fit(self) -> None:
        """Evict from the slice, chunk by chunk, until it fits into its bytes again."""
        while self.held_bytes > self.reserved_bytes or len(self.shades) > SHADES_MAX:
            oldest = next(iter(self.shades))
            over_bytes = self.held_bytes - self.reserved_bytes
            kept_bytes = oldest.slice_bytes - over_bytes if over_bytes > 0 else 0
            self._hold(oldest, oldest.prefix_bytes(kept_bytes) if kept_bytes > 0 else 0)

    def _hold(self, shade: Shade, nbytes: int) -> None:
        """Change what the slice has of a model; a gap closes as far as the slice now lacks the same."""
        self.held_bytes += nbytes - shade.slice_bytes
        shade.slice_bytes = nbytes
        if nbytes:
            self.shades.setdefault(shade, None)
        else:
            self.shades.pop(shade, None)
            self._count(shade, 0)
        if shade.gap_ms:
            self._set_gap(shade, shade.gap_with(shade.real_bytes))
