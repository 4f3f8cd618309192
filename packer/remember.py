"""What a node has learned of its models' uses and restores, as values that outlive the process.

Covers: putting it into plain events with ages instead of times, since a new process has a new clock, and
taking such events up. Does not cover: keeping them (the agent's journal), or what is learned
(``intensity``, ``estimate``).

Everything here is bounded: an intensity is 28 numbers whatever its past, a model has at most five restores
per tier, a node fifteen. What another version wrote, or nobody, is ignored: the node learns it anew.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from packer import intensity
from packer.estimate import SAMPLES_MAX, TIER_SAMPLES_MAX, Sample
from packer.events import NodeRemembered, UsesRemembered
from packer.intensity import Intensity
from packer.ledger import Model, Node
from packer.types import Tier

T = TypeVar("T")

# The longest kernel is ten days: after a year nothing is left but counts. A clock that is further off is
# wrong.
AGO_MS_MAX = 366 * 86_400_000
# Five restores from each of three tiers take some 5 KiB.
RESTORES_CHARS_MAX = 16 * 1024
_LIMIT = 10**15  # above any byte count and any time in milliseconds of a restore


def of_model(model: Model, now_ms: int) -> UsesRemembered:
    """What is known of a model that was used, as of now."""
    return UsesRemembered(model.ref, _aged(model.reuse, now_ms), _text(model.history.samples), ago_ms=0)


def of_node(node: Node, now_ms: int) -> NodeRemembered:
    """What all models have in common, as of now."""
    shared = intensity.encode_shared(node.shared, -now_ms)
    known = node.learned
    offsets = _Offsets(known.rates.measured_ms, known.factors, known.fixed_ms)
    return NodeRemembered(tuple(shared), _text(offsets), ago_ms=0)


class _Offsets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far real restores were off the rates that were measured then."""

    measured_ms: int
    factors: dict[Tier, list[float]]
    fixed_ms: dict[Tier, list[float]]


_Samples = dict[Tier, list[Sample]]


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _aged(known: Intensity, now_ms: int) -> tuple[float, ...]:
    numbers = intensity.encode(known)
    numbers[1] -= now_ms
    numbers[2] = min(numbers[2] - now_ms, 0.0)
    numbers[1] = min(numbers[1], numbers[2])
    return tuple(numbers)


def readable(found: UsesRemembered | NodeRemembered) -> bool:
    """Would a node take this up?"""
    try:
        if isinstance(found, NodeRemembered):
            intensity.decode_shared(found.shared)
            _offsets(found.restores)
        else:
            _decode(found, 0)
            _samples(found.restores)
    except ValueError:
        return False
    return True


def _samples(text: str) -> _Samples:
    """Raises ``ValueError``."""
    samples = _decoded(text, _Samples)
    for each in (sample for of_tier in samples.values() for sample in of_tier):
        shape = each.shape
        mix = shape.mix
        sizes = [shape.image_bytes, shape.stored_bytes, shape.fill_bytes]
        sizes += [mix.bf16_bytes, mix.fp32_bytes, mix.other_bytes]
        if not 0.0 <= each.moved_share <= 1.0 or not 1 <= each.restore_ms < _LIMIT:
            raise ValueError("a restore that took no time, or moved more than all")
        if not all(0 <= size < _LIMIT for size in sizes):
            raise ValueError("a restore of an impossible size")
    if any(len(of_tier) > SAMPLES_MAX for of_tier in samples.values()):
        raise ValueError(f"more than {SAMPLES_MAX} restores from one tier")
    return samples


def _offsets(text: str) -> _Offsets:
    """Raises ``ValueError``."""
    offsets = _decoded(text, _Offsets)
    for values in (*offsets.factors.values(), *offsets.fixed_ms.values()):
        if len(values) > TIER_SAMPLES_MAX or not all(0 < value < _LIMIT for value in values):
            raise ValueError("what restores were off by is out of range")
    return offsets


def _decoded(text: str, kind: type[T]) -> T:
    if len(text) > RESTORES_CHARS_MAX:
        raise ValueError(f"{len(text)} characters are above the limit of {RESTORES_CHARS_MAX}")
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _decode(found: UsesRemembered, now_ms: int) -> Intensity:
    numbers = list(found.uses)
    if len(numbers) > 2 and not numbers[2] <= 0.0:
        raise ValueError("a learned intensity of uses to come")
    return intensity.decode(numbers, now_ms - _ago(found.ago_ms))


def _ago(ago_ms: int) -> int:
    return min(max(ago_ms, 0), AGO_MS_MAX)


def take_up_uses(node: Node, found: UsesRemembered, now_ms: int) -> None:
    """Know again what was known of a model, unless it was used already since the start."""
    model = node.models.get(found.ref)
    if model is None or model.reuse.uses or not readable(found):
        return
    model.reuse = _decode(found, now_ms)
    model.history.samples.update(_samples(found.restores))
    model.history.epoch = -1
    model.gains = None


def take_up_node(node: Node, found: NodeRemembered, now_ms: int) -> None:
    """Know again what all models have in common, unless something was learned already since the start."""
    if node.shared.uses or node.shared.pending or not readable(found):
        return
    node.shared = intensity.decode_shared(found.shared, now_ms - _ago(found.ago_ms))
    offsets = _offsets(found.restores)
    if offsets.measured_ms == node.learned.rates.measured_ms:
        # Of other rates nobody knows how far restores are off them.
        node.learned.factors.update(offsets.factors)
        node.learned.fixed_ms.update(offsets.fixed_ms)
        node.learned.epoch += 1
    node.gains_epoch += 1
