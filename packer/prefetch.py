"""Filling the host tier from disk ahead of need, while nobody needs the disk.

Covers: when a copy is brought in that nobody asked for, which one, whose room it takes, what ends it. Does
not cover: carrying it out (the agent's ``filling``), what a copy is worth (``room``), or devices: nothing is
ever brought onto one ahead of need.

In normal running a model becomes worth more by being used, and then it leaves its copy in host memory on the
way. After a restart the host tier is empty and the journal still knows what is worth having: that is where
this pays (``docs/benchmarks.md``).

Never at another tenant's expense:
- It begins only while nobody waits and nothing comes from disk or an origin, and ends as soon as something
  does.
- It takes free room, or that of its own tenant's copies which are worth less by a margin, and leaves as much
  free as the largest copy takes: the next restore leaves its copy on the way as if nothing had been brought.
- What it brings makes room for any copy that a restore leaves, until a restore has read it.
- It takes no turn, and no restore of anybody's rates: its bytes count in its own tenant's quota.
"""

from __future__ import annotations

from itertools import islice

from packer import explain
from packer.events import (
    Action,
    Cancelled,
    Event,
    Fill,
    Filled,
    FillFailed,
    Finished,
    PrefetchChosen,
    Requested,
)
from packer.intensity import Ranking
from packer.ledger import (
    CopyState,
    Model,
    Node,
    State,
    hold_copy,
    next_order,
    release_copy,
    settle_copy,
)
from packer.queueing import order_drop, stop_fill, wake_at
from packer.room import Renewal, ahead_copies, copy_index, droppable
from packer.types import Tier

# At most a tenth of the disk's time: after each copy this many times what it took. Measured in the model of
# the stack: a tenth takes a quarter to a third off the cold time of the hours after a restart, and reads
# 7 to 8 % more bytes in normal running.
PAUSE_PARTS = 9
# A copy that took no time at all, and one that took long because the disk was slow.
PAUSE_MS_MIN, PAUSE_MS_MAX = 100, 600_000
# After the first plan: until then packs are being found, and the best one may be the last.
FIRST_MS = 5_000
# What is on disk is gone through this often at the most, ...
LOOK_MS = 10_000
# ... and so many models of it at a time, at some 2.5 microseconds each (ten times that the first time, when
# nothing is worked out yet); the others the next time.
LOOKED_MAX = 256
# Candidates for which room is looked for in one step.
TRIED_MAX = 8
# A copy replaces only what is worth less by a tenth, or two models would change places for ever.
MARGIN = 1.1
# A model that is used less than once a week is not worth the reading.
USES_PER_MS_MIN = 1 / 604_800_000
# A pack that could not be opened is left to a restore, which mends it, and is tried again after this long.
RETRY_MS = 600_000


def choose(node: Node, event: PrefetchChosen) -> None:
    node.prefetch.on = event.on
    node.dirty = True


def begin(node: Node, now_ms: int) -> None:
    """The first plan was taken up."""
    node.prefetch.not_before_ms = now_ms + FIRST_MS


def look(node: Node, event: Event, now_ms: int, out: list[Action]) -> None:
    """Something changed: end what may not go on, or begin what may.

    What callers do makes nothing possible here that was not before, so nothing begins for that: the shortcut
    for hits (``hits``) need not come by.
    """
    state = node.prefetch
    if state.filling is not None or state.ahead:
        _make_way(node, now_ms, out)
    if state.filling is not None:
        if not _may_stay(node, state.filling):
            stop_fill(node, out)
        return
    due = state.wakes and now_ms >= state.not_before_ms
    if not state.on or (isinstance(event, Requested | Finished | Cancelled) and not due):
        return
    if now_ms < state.not_before_ms:
        if not state.wakes:
            state.wakes = True
            wake_at(node, state.not_before_ms)
        return
    state.wakes = False
    if not _is_quiet(node):
        return
    chosen = _choose(node, now_ms)
    if chosen is None:
        state.not_before_ms = now_ms + LOOK_MS
        if state.looked:
            state.wakes = True
            wake_at(node, state.not_before_ms)
        return
    model, going = chosen
    for victim in going:
        order_drop(node, victim, Tier.HOST, out)
    nbytes = model.opened_bytes
    if node.host.fits(nbytes + _spare_bytes(node)) and model.tenant.host.fits(nbytes):
        _order(node, model, nbytes, now_ms, out)


def _may_stay(node: Node, model: Model) -> bool:
    accounts = (node.host, node.disk, model.tenant.host, model.tenant.disk)
    over = any(account.excess_bytes for account in accounts)
    return node.prefetch.on and model.planned and not node.draining and not over


def _spare_bytes(node: Node) -> int:
    """What stays free in the host tier: room for the largest copy, but for one that is above half of it."""
    state, limit_bytes = node.prefetch, node.host.limit_bytes or 0
    if state.spare_of != limit_bytes:
        sizes = (model.opened_bytes for model in node.in_disk.values())
        state.spare_bytes = max((size for size in sizes if 2 * size <= limit_bytes), default=0)
        state.spare_of = limit_bytes
    return state.spare_bytes


def _make_way(node: Node, now_ms: int, out: list[Action]) -> None:
    """A restore has taken of the room that stays free: make it free again."""
    short = node.host.short_bytes(_spare_bytes(node))
    if short <= 0:
        return
    stop_fill(node, out)
    for _, _, model in ahead_copies(node, Tier.HOST, now_ms):
        if short <= 0:
            break
        short -= model.host.held_bytes
        order_drop(node, model, Tier.HOST, out)


def _is_quiet(node: Node) -> bool:
    if node.waiting or node.draining or not node.has_plan or node.chosen is not None:
        return False
    if not node.host.limit_bytes or node.host.excess_bytes or node.disk.excess_bytes:
        return False
    return not any(
        model.state is State.RESTORING and model.source is not Tier.HOST
        for device in node.devices.values()
        for model in device.models.values()
    )


def _choose(node: Node, now_ms: int) -> tuple[Model, list[Model]] | None:
    """The copy that is worth most of those for which there is room, and what must go for it."""
    ranking, renewal = Ranking(node.shared, now_ms), Renewal(node)
    rated: list[tuple[float, str, Model]] = []
    for model in _next_models(node):
        if not _lacks_copy(model, now_ms) or ranking.uses_per_ms(model.reuse) < USES_PER_MS_MIN:
            continue
        worth = copy_index(renewal.gains(model), model, Tier.HOST, model.opened_bytes, ranking)
        rated.append((worth, model.name, model))
    rated.sort(key=lambda each: (-each[0], each[1]))
    for worth, _, model in rated[:TRIED_MAX]:
        going = _own_victims(node, model, worth, ranking, renewal)
        if going is not None:
            return model, going
    return None


def _next_models(node: Node) -> list[Model]:
    """Of what is on disk the part whose turn it is; after the last part ``looked`` is 0."""
    start = node.prefetch.looked
    end = start + LOOKED_MAX
    node.prefetch.looked = end if end < len(node.in_disk) else 0
    return list(islice(node.in_disk.values(), start, end))


def _lacks_copy(model: Model, now_ms: int) -> bool:
    return (
        model.planned
        and model.state is State.ABSENT
        and model.host.state is CopyState.ABSENT
        and model.disk.state is CopyState.HELD
        and model.opened_bytes > 0
        and model.reuse.uses > 0
        and now_ms >= model.fill_not_before_ms
    )


def _own_victims(
    node: Node, wanted: Model, worth: float, ranking: Ranking, renewal: Renewal
) -> list[Model] | None:
    """Less valuable copies of the same tenant that make the room which is not free; None: they do not."""
    tenant, nbytes = wanted.tenant, wanted.opened_bytes
    short = max(node.host.short_bytes(nbytes + _spare_bytes(node)), tenant.host.short_bytes(nbytes))
    if short <= 0:
        return []
    own: list[tuple[float, str, Model]] = []
    for model in node.in_host.values():
        if model.tenant is tenant and droppable(model.host):
            held_bytes = model.host.held_bytes
            index = copy_index(renewal.gains(model), model, Tier.HOST, held_bytes, ranking)
            if index * MARGIN < worth:
                own.append((index, model.name, model))
    going: list[Model] = []
    for _, _, model in sorted(own, key=lambda each: each[:2]):
        if short <= 0:
            break
        going.append(model)
        short -= model.host.held_bytes
    return going if short <= 0 else None


def _order(node: Node, model: Model, nbytes: int, now_ms: int, out: list[Action]) -> None:
    hold_copy(node, model, Tier.HOST, nbytes)
    model.disk.readers += 1
    state = node.prefetch
    state.filling, state.stopping, state.started_ms = model, False, now_ms
    model.host.order = next_order(node)
    explain.prefetched(node, model, nbytes)
    out.append(Fill(model.ref, nbytes, model.host.order))


def ended(node: Node, event: Filled | FillFailed, now_ms: int) -> None:
    """The answer to ``Fill``; any other is nobody's."""
    state = node.prefetch
    model = state.filling
    if model is None or model.ref != event.ref or event.order not in (0, model.host.order):
        return
    model.disk.readers -= 1
    state.filling = None
    if isinstance(event, Filled):
        settle_copy(node, model, Tier.HOST, model.host.held_bytes)
        state.ahead[model.ref] = model
    else:
        if not event.stopped:
            model.fill_not_before_ms = now_ms + RETRY_MS
        release_copy(node, model, Tier.HOST)
    pause_ms = min(max(PAUSE_PARTS * (now_ms - state.started_ms), PAUSE_MS_MIN), PAUSE_MS_MAX)
    state.not_before_ms = now_ms + pause_ms
    node.dirty = True
