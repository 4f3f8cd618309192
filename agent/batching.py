"""Which inputs share the next forward pass of a model.

Covers: how many, of which lengths, and whether to wait for more. Does not cover: which model is next, what an
input is, or the pass (``agent/compute.py``, ``agent/engines/vectors.py``).

Pure: times come in as numbers, so that a test moves the clock.

An input that has waited longest is in the next pass, whatever its length, so none is passed over for ever.
The others are those nearest to it in length, because what is shorter than the longest is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packer.types import Batching

# At most one in so many tokens of a pass is padding: it is computed for nobody.
PADDING_PARTS = 4
# So many passes' inputs are looked at for those of like length; more would be sorted for nothing.
WINDOW_PASSES = 4


@dataclass(frozen=True, slots=True)
class Item:
    """An input that waits, and since when."""

    tokens: int
    arrived_ms: float


def window(batching: Batching) -> int:
    """How many waiting inputs to offer: where all are alone, the first is the next."""
    return 1 if batching.inputs_max == 1 else WINDOW_PASSES * batching.inputs_max


def due_ms(first: Item, batching: Batching) -> float:
    """When the pass of the oldest input starts at the latest."""
    return first.arrived_ms + batching.delay_ms


def choose(items: Sequence[Item], batching: Batching, tokens_max: int, now_ms: float) -> tuple[int, ...]:
    """Places of the inputs of the next pass, the oldest one's first; none: wait until it is due.

    ``items``: what waits, oldest first. ``tokens_max``: of a pass, padding included; an input alone may have
    more. A pass that has no room for another input does not wait.
    """
    first = items[0]
    chosen = [0]
    longest = total = first.tokens
    near = sorted(range(1, len(items)), key=lambda place: (abs(items[place].tokens - first.tokens), place))
    for place in near:
        if len(chosen) == batching.inputs_max:
            break
        tokens = items[place].tokens
        padded = max(longest, tokens) * (len(chosen) + 1)
        if padded > tokens_max or (padded - total - tokens) * PADDING_PARTS > padded:
            continue
        chosen.append(place)
        longest, total = max(longest, tokens), total + tokens
    has_room = len(chosen) < batching.inputs_max and longest * (len(chosen) + 1) <= tokens_max
    if has_room and now_ms < due_ms(first, batching):
        return ()
    return tuple(chosen)
