"""A well-known eviction policy in place of the keep-index: what the core asks when an operator chose one.

Covers: one ``policies.Policy`` per tier, what each knows of every model, when a copy that was dropped may
be made again, and what a timer wants gone. Does not cover: how a policy ranks (``policies``), the
keep-index, which the core works out itself and faster (``keep``, ``victims``, ``room``), or who may be
taken from at all (``quota``).

A request counts as a use in every tier that holds the model, so that the lower tiers see all of its past
and not only what the tiers above could not answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from packer.policies import TTL_MS, Item, Policy, make_policy
from packer.types import ModelRef, Tier

KEEP = "keep"
# Tiers that a timer empties. Packs stay: they cost nothing but disk, and the origin may be far.
TIMED_TIERS = (Tier.DEVICE, Tier.HOST)


@dataclass(slots=True, eq=False)
class _Ranked:
    """One tier: its policy, what that knows of each model, and when a model's copy was last ordered away."""

    policy: Policy
    items: dict[ModelRef, Item] = field(default_factory=dict)
    left_ms: dict[ModelRef, int] = field(default_factory=dict)


class Chosen:
    """The policy of every tier. Bounded by the models of the node: ``forget`` those that leave it."""

    __slots__ = ("_tiers", "name", "next_expiry_ms", "partial", "timed", "woken_ms")

    def __init__(self, name: str) -> None:
        """Raises ``BadValue`` for a name that is none."""
        self.name = name
        self._tiers = {tier: _Ranked(make_policy(name)) for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK)}
        policy = self._tiers[Tier.DEVICE].policy
        self.partial, self.timed = policy.partial, policy.timed
        # Nothing expires before this; the next time at which the core is woken to look.
        self.next_expiry_ms = self.woken_ms = 0

    def _item(self, tier: Tier, ref: ModelRef) -> Item:
        items = self._tiers[tier].items
        item = items.get(ref)
        if item is None:
            item = items[ref] = Item(str(ref))
        return item

    def note_use(self, tier: Tier, ref: ModelRef, now_ms: int, cost_ms: float, nbytes: int) -> None:
        """The model was used and the tier holds it; ``cost_ms``: what restoring it would take without."""
        self._tiers[tier].policy.note_use(self._item(tier, ref), now_ms, cost_ms, nbytes)

    def note_end(self, ref: ModelRef, now_ms: int) -> None:
        """A use has ended; to a timer it counts from here."""
        for tier in TIMED_TIERS if self.timed else ():
            item = self._item(tier, ref)
            if item.is_held:
                item.last_ms = max(item.last_ms, now_ms)
                self.next_expiry_ms = min(self.next_expiry_ms, item.last_ms + TTL_MS)

    def note_gone(self, tier: Tier, ref: ModelRef, now_ms: int) -> None:
        """All that the tier held of the model was ordered away, or is gone."""
        ranked = self._tiers[tier]
        item = ranked.items.get(ref)
        if item is not None and item.is_held:
            ranked.policy.note_gone(item)
            ranked.left_ms[ref] = now_ms

    def forget(self, ref: ModelRef) -> None:
        """The node knows the model no more."""
        for tier, ranked in self._tiers.items():
            self.note_gone(tier, ref, 0)
            ranked.items.pop(ref, None)
            ranked.left_ms.pop(ref, None)

    def counts(self, tier: Tier, ref: ModelRef) -> bool:
        """Does the policy count the model as held in the tier?"""
        item = self._tiers[tier].items.get(ref)
        return item is not None and item.is_held

    def values(self, tier: Tier, now_ms: int) -> Callable[[ModelRef], float]:
        """What each copy is worth to the policy at this moment; what it never saw used goes first."""
        ranked = self._tiers[tier]
        items, value = ranked.items, ranked.policy.at(now_ms)

        def of(ref: ModelRef) -> float:
            item = items.get(ref)
            return -math.inf if item is None or not item.is_held else value(item, 0.0, 0)

        return of

    def admits(self, tier: Tier, ref: ModelRef, last_use_ms: int) -> float:
        """Above what value others keep their copies when this model wants one: always room for what was
        used since its own copy went, never for the others. So two models can not take turns at throwing
        each other out while nobody asks for either."""
        left_ms = self._tiers[tier].left_ms.get(ref)
        return math.inf if left_ms is None or last_use_ms > left_ms else -math.inf

    def expires_ms(self, tier: Tier, ref: ModelRef) -> int | None:
        """From when on the timer wants it gone although nobody needs its room; None: never."""
        if not self.timed or tier not in TIMED_TIERS:
            return None
        item = self._tiers[tier].items.get(ref)
        return item.last_ms + TTL_MS if item is not None and item.is_held else None
