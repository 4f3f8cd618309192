"""What copies are worth, and which of them must go so that another fits into the host or disk tier.

Covers: restore-time estimates, what every copy saves, and the choice of victims below the device under
the tenants' reserves and limits. Pure questions: nothing here changes the state but what was worked out
before. Does not cover: room on devices (``victims``), or acting on the answers (``queueing``, ``upkeep``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop
from itertools import chain

from packer import estimate
from packer.chosen import KEEP, Chosen
from packer.intensity import Ranking
from packer.keep import keep_index
from packer.ledger import Copy, CopyState, Gains, Model, Node, State
from packer.lending import Price
from packer.quota import Tenant, may_take
from packer.shortlist import BATCH, EXACT_MAX, SHORT_MAX
from packer.types import MIB, ModelRef, Tier

# A passing fault (a full pipe, a dropped connection) is usually over after one retry; a tier that fails
# three times in a row is left alone and the next one is asked.
TRIES_PER_TIER_MAX = 3
# The restore by which the node's own estimates are watched: when this one has moved by more than a
# quarter, what was worked out from them before is out of date. Not sooner than after ten seconds: among
# models of one node such a change moves all gains alike, so the ranking can wait for it.
PROBE_BYTES = 256 * MIB
PROBE_MOVED_PARTS = 4
PROBE_PAUSE_MS = 10_000
# Gains worked out anew in one ranking, at some 7 microseconds each; the others serve as they are.
STALE_GAINS_MAX = 12
# What a host copy counts for while its model is on a device: the next use will most likely find it there, and
# of those that do not the copy saves as much as any other. Measured in the full stack on three seeds of two
# traces (docs/benchmarks.md): a half and a fifth cost more cold time on one of the two.
BENEATH_SHARE = 0.35


# --- what a restore costs -------------------------------------------------------------------------


def has_copy(model: Model, tier: Tier) -> bool:
    return model.copy(tier).state is CopyState.HELD


def source_tier(model: Model) -> Tier | None:
    """The fastest tier to restore from that has not failed too often; None when all have."""
    for tier in (Tier.HOST, Tier.DISK):
        if has_copy(model, tier) and model.tries.get(tier, 0) < TRIES_PER_TIER_MAX:
            return tier
    return Tier.ORIGIN if model.tries.get(Tier.ORIGIN, 0) < TRIES_PER_TIER_MAX else None


def restore_ms_from(node: Node, model: Model, tier: Tier, moved_bytes: int | None = None) -> int:
    """Expected time of moving ``moved_bytes`` of the model, or all of it, from a tier."""
    nbytes = model.spec.image_bytes if moved_bytes is None else moved_bytes
    return estimate.expect_ms(node.learned, model.history, tier, nbytes)


def restore_ms(node: Node, model: Model) -> int:
    """Expected time of this model's next restore: of the chunks that are missing, if some are there."""
    source = source_tier(model) or Tier.ORIGIN
    return restore_ms_from(node, model, source, moved_bytes(model, source))


def moved_bytes(model: Model, source: Tier) -> int:
    """What a restore from this tier brings now: the missing chunks, or from the origin always all."""
    partial = model.state is State.PARTIAL and source is not Tier.ORIGIN
    return model.spec.image_bytes - (model.device_bytes if partial else 0)


def gains(node: Node, model: Model) -> Gains:
    """What each of its copies saves a use of the model; worked out anew only when something changed."""
    known = model.gains
    if known is not None and known.epoch == node.gains_epoch:
        return known
    source = source_tier(model) or Tier.ORIGIN
    image_bytes = model.spec.image_bytes
    whole_ms = restore_ms_from(node, model, source)
    fixed_ms = restore_ms_from(node, model, source, 0)
    device_ms = float(whole_ms)
    if model.state is State.PARTIAL:
        # The rest must be restored anyway: its chunks save only their own moving.
        device_ms = (whole_ms - fixed_ms) * model.device_bytes / max(image_bytes, 1)
    disk_ms, origin_ms = restore_ms_from(node, model, Tier.DISK), restore_ms_from(node, model, Tier.ORIGIN)
    below_host_ms = disk_ms if has_copy(model, Tier.DISK) else origin_ms
    host_ms = below_host_ms - restore_ms_from(node, model, Tier.HOST)
    model.gains = known = Gains(
        epoch=node.gains_epoch,
        # At least a little, so that what costs next to nothing still ranks by its use.
        device_ms=max(device_ms, 1.0),
        fixed_ms=min(float(fixed_ms), max(device_ms, 1.0)),
        host_ms=float(host_ms),
        disk_ms=float(origin_ms - disk_ms),
    )
    return known


def price(node: Node, model: Model) -> Price:
    """What bringing all or part of it back to a device costs now."""
    source = source_tier(model) or Tier.ORIGIN
    known = model.gains
    if known is not None and known.epoch == node.gains_epoch and model.state is not State.PARTIAL:
        return Price(int(known.fixed_ms), int(known.device_ms), source is not Tier.ORIGIN)
    return Price(
        restore_ms_from(node, model, source, 0),
        restore_ms_from(node, model, source),
        source is not Tier.ORIGIN,
    )


def use_slice(node: Node, model: Model) -> None:
    """Tell its tenant's private slice of a request for the model."""
    slice_, shade = model.tenant.slice, model.shade
    if not slice_.reserved_bytes:
        return
    if shade.slice_bytes < shade.size_bytes or shade.real_bytes < shade.size_bytes:
        slice_.price(shade, price(node, model))
    slice_.use(shade, node.terms)


class Renewal:
    """Gains for one ranking of many models: the missing ones are worked out, of the outdated ones a few."""

    __slots__ = ("_epoch", "_left", "_node")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._epoch = node.gains_epoch
        self._left = STALE_GAINS_MAX

    def gains(self, model: Model) -> Gains:
        known = model.gains
        if known is None:
            return gains(self._node, model)
        if known.epoch != self._epoch and self._left:
            self._left -= 1
            return gains(self._node, model)
        return known


def watch_estimates(node: Node, tier: Tier, now_ms: int) -> None:
    """Notice when what the node expects of a tier has moved, so that every gain is worked out anew."""
    if now_ms < node.probe_not_before_ms:
        return
    probe_ms = estimate.expect_ms(node.learned, estimate.History(), tier, PROBE_BYTES)
    before_ms = node.probes_ms.get(tier, 0)
    if abs(probe_ms - before_ms) * PROBE_MOVED_PARTS > before_ms:
        node.probes_ms[tier] = probe_ms
        node.probe_not_before_ms = now_ms + PROBE_PAUSE_MS
        node.gains_epoch += 1


def copy_index(known: Gains, model: Model, tier: Tier, nbytes: int, ranking: Ranking) -> float:
    """What a copy of ``nbytes`` in the host or disk tier is, or would be, worth. One beneath a model that is
    on a device, or about to be, because somebody waits for it, counts for less."""
    gain_ms = known.host_ms if tier is Tier.HOST else known.disk_ms
    if tier is Tier.HOST and (model.state is State.RESIDENT or model.waiters):
        gain_ms *= BENEATH_SHARE
    return keep_index(ranking, model.reuse, gain_ms, nbytes)


@dataclass(slots=True)
class Earlier:
    """Bytes promised to waiting models that come first: by device and, beside that, by tenant."""

    devices: dict[str, int]
    tenants: dict[str, int]

    def add(self, device: str, tenant: str, nbytes: int) -> None:
        self.devices[device] = self.devices.get(device, 0) + nbytes
        self.tenants[tenant] = self.tenants.get(tenant, 0) + nbytes


# --- a policy that was chosen instead -------------------------------------------------------------


def choose_policy(node: Node, name: str) -> None:
    """Rank by this policy from now on. What is held counts as used in the order of its last uses."""
    node.chosen = None if name == KEEP else Chosen(name)
    node.partial = node.chosen is None or node.chosen.partial
    for model in sorted(node.models.values(), key=lambda model: (model.reuse.last_ms, model.name)):
        if model.reuse.uses:
            note_use(node, model, model.reuse.last_ms)


def note_use(node: Node, model: Model, now_ms: int) -> None:
    """Tell the chosen policy of a use, in every tier that holds the model."""
    chosen = node.chosen
    if chosen is None:
        return
    known = gains(node, model)
    if model.device is not None and model.state is not State.EVICTING:
        chosen.note_use(Tier.DEVICE, model.ref, now_ms, known.device_ms, model.device_bytes)
    for tier, gain_ms in ((Tier.HOST, known.host_ms), (Tier.DISK, known.disk_ms)):
        if has_copy(model, tier):
            chosen.note_use(tier, model.ref, now_ms, max(gain_ms, 1.0), model.copy(tier).held_bytes)


def note_copy(node: Node, model: Model, tier: Tier) -> None:
    """Tell the chosen policy of a copy that came after the use for which it was made. While somebody
    waits, the use is still to come."""
    if node.chosen is not None and model.reuse.uses and not model.waiters and has_copy(model, tier):
        known = gains(node, model)
        gain_ms = known.host_ms if tier is Tier.HOST else known.disk_ms
        nbytes = model.copy(tier).held_bytes
        node.chosen.note_use(tier, model.ref, model.reuse.last_ms, max(gain_ms, 1.0), nbytes)


# A copy: what it is worth, its name, its model.
_Rated = tuple[float, str, Model]

# --- victims among copies -------------------------------------------------------------------------

# Below whatever a policy finds a copy worth: what an interrupted load left saves only a part of a load.
BEGUN_INDEX = -math.inf
AHEAD_INDEX = -1.0  # they are in order already


def droppable(copy: Copy) -> bool:
    return copy.state in (CopyState.HELD, CopyState.BEGUN) and not copy.readers


def _begun_or(value: Callable[[ModelRef], float], model: Model, tier: Tier) -> float:
    return BEGUN_INDEX if model.copy(tier).state is CopyState.BEGUN else value(model.ref)


def copy_victims(
    node: Node, wanted: Model, tier: Tier, nbytes: int, pending: int, pending_own: int, now_ms: int
) -> list[Model] | None:
    """Models whose copy in ``tier`` must go so that ``wanted`` gets ``nbytes`` there, or None.

    ``pending`` bytes were promised before in this step (``pending_own`` to the same tenant). Only copies
    that are worth less go, except that an unmet reserve is filled from whoever is above its own.
    """
    tenant = wanted.tenant
    own = tenant.account(tier)
    short = node.account(tier).short_bytes(nbytes + pending)
    short_own = own.short_bytes(nbytes + pending_own)
    if short <= 0 and short_own <= 0:
        return []
    entitled = own.kept_bytes + nbytes + pending_own <= own.reserved_bytes
    if node.chosen is not None:
        worth = node.chosen.admits(tier, wanted.ref, wanted.reuse.last_ms)
    else:
        worth = copy_index(gains(node, wanted), wanted, tier, nbytes, Ranking(node.shared, now_ms))
    below = math.inf if entitled else worth
    first = ahead_copies(node, tier, now_ms)
    early = node.prefetch.ahead if first else {}
    few = None if short_own > 0 else _shortlisted_copies(node, tier, now_ms)
    if few is not None:
        ranked = [each for each in few if each[2] is not wanted and each[0] < below]
        later = [each for each in ranked if each[2].ref not in early]
        chosen = _pick(wanted, tier, (*first, *later), worth, entitled, short, short_own)
        # Where the last of the least is worth too much, all others are.
        if chosen is not None or len(ranked) < len(few) - 1:
            return chosen
    others = [model for ref, model in node.copies(tier).items() if model is not wanted and ref not in early]
    ordered = chain(first, _ranked_copies(node, others, tier, now_ms, below))
    return _pick(wanted, tier, ordered, worth, entitled, short, short_own)


def ahead_copies(node: Node, tier: Tier, now_ms: int) -> list[_Rated]:
    """Copies that were brought in ahead of need and that no restore has read yet: they make room for any that
    somebody's restore leaves, those worth least first."""
    if tier is not Tier.HOST or not node.prefetch.ahead:
        return []
    there = [model for model in node.prefetch.ahead.values() if droppable(model.host)]
    ranked = sorted(_ranked_copies(node, there, tier, now_ms))
    return [(AHEAD_INDEX, name, model) for _, name, model in ranked]


def _pick(
    wanted: Model,
    tier: Tier,
    ranked: Iterable[_Rated],
    worth: float,
    entitled: bool,
    short: int,
    short_own: int,
) -> list[Model] | None:
    """Whole copies in the order of their rank until it is enough; None when it never is."""
    tenant = wanted.tenant
    chosen: list[Model] = []
    kept: dict[str, int] = {}
    for index, _, model in ranked:
        if short <= 0 and short_own <= 0:
            break
        held = model.copy(tier).held_bytes
        if model.tenant is tenant:
            if index >= worth:
                continue
            short_own -= held
        elif short_own > 0 and short <= 0:
            continue
        elif model.planned:
            account = model.tenant.account(tier)
            left = kept.get(model.tenant.spec.tenant, account.kept_bytes)
            if not may_take(left, account.reserved_bytes, held, entitled) or (
                index >= worth and not entitled
            ):
                continue
            kept[model.tenant.spec.tenant] = left - held
        chosen.append(model)
        short -= held
    return None if short > 0 or short_own > 0 else chosen


def _shortlisted_copies(node: Node, tier: Tier, now_ms: int) -> list[_Rated] | None:
    """Of very many copies those worth little, in order; None: look at all."""
    copies = node.copies(tier)
    if len(copies) <= EXACT_MAX or node.removed or node.chosen is not None:
        return None
    shortlist = node.short_host if tier is Tier.HOST else node.short_disk
    few = shortlist.look(copies.values())
    there = [model for model in few or copies.values() if droppable(model.copy(tier))]
    ranked = list(_ranked_copies(node, there, tier, now_ms))
    shortlist.keep(model for _, _, model in ranked)
    return ranked


def _ranked_copies(
    node: Node, models: Sequence[Model], tier: Tier, now_ms: int, below: float = math.inf
) -> Iterator[_Rated]:
    """Copies that may be dropped, least valuable first; put in order only as far as somebody looks.
    Of what is planned only copies that are worth less than ``below``."""
    if node.chosen is not None:
        value = node.chosen.values(tier, now_ms)
        free = [model for model in models if droppable(model.copy(tier))]
        yield from sorted((_begun_or(value, model, tier), model.name, model) for model in free)
        return
    ranking, gains_of, epoch = Ranking(node.shared, now_ms), Renewal(node).gains, node.gains_epoch
    in_host, held_state, resident = tier is Tier.HOST, CopyState.HELD, State.RESIDENT
    uses_per_ms = ranking.uses_per_ms
    found: list[_Rated] = []
    for model in models:
        copy = model.host if in_host else model.disk
        if copy.state is CopyState.BEGUN:
            found.append((BEGUN_INDEX, model.name, model))
            continue
        if copy.state is not held_state or copy.readers:
            continue
        use = model.reuse
        # Most were rated a moment ago, when somebody looked for room on the device.
        rate = use.per_ms if use.rated_ms == now_ms else uses_per_ms(use)
        known = model.gains
        if known is None or known.epoch != epoch:
            known = gains_of(model)
        gain_ms = known.host_ms if in_host else known.disk_ms
        # ``copy_index`` without its calls.
        if in_host and (model.state is resident or model.waiters):
            gain_ms *= BENEATH_SHARE
        index = rate * (gain_ms if gain_ms > 1 else 1) / (copy.held_bytes or 1)
        if index < below or not model.planned:
            found.append((index, model.name, model))
    if len(found) <= SHORT_MAX + BATCH:
        yield from sorted(found)
        return
    heapify(found)
    while found:
        yield heappop(found)


def copies_surplus(node: Node, tier: Tier, tenant: Tenant | None, now_ms: int) -> list[Model]:
    """Copies to drop because the tier's budget (or the tenant's max in it) sank below what is held."""
    account = node.account(tier) if tenant is None else tenant.account(tier)
    excess = account.excess_bytes
    if not excess:
        return []
    first = [each for each in ahead_copies(node, tier, now_ms) if tenant in (None, each[2].tenant)]
    early = {model.ref: None for _, _, model in first}
    models = [
        model
        for ref, model in node.copies(tier).items()
        if ref not in early and tenant in (None, model.tenant)
    ]
    going: list[Model] = []
    for _, _, model in chain(first, _ranked_copies(node, models, tier, now_ms)):
        if excess <= 0:
            break
        going.append(model)
        excess -= model.copy(tier).held_bytes
    return going
