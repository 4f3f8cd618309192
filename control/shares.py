"""Which node may grant which share of a tenant's limits. Pure: no clock, no I/O, no chance.

``step(book, event, now_ms)`` changes the book and returns orders. Covers: dividing a tenant's limits among
the nodes that want them, taking shares back, and what is known after a restart of control. Does not cover:
the book itself (``control/share_book.py``), what a share does to a rate (``packer/rates.py``), how messages
travel (``control/routes/shares.py``), or what a node wants (``agent/shares.py``).

The promise: at every moment all nodes together hold no more than the whole of any tenant's limits,
whatever is lost, repeated, late, cut off or crashed. A share is given to another only after the node that
had it said that it has less now, or after its term, and then only the half that it gives up by itself
(``packer/shares.py``). What was taken of a part goes with it (``Lags``).

A node's word counts only in an exchange of the present session: control names a session, and a node that
repeats the name has heard it from this control in this life of its process. Exchanges are numbered and a
node has one at a time, so the newest one says all that it holds, and what was answered to an earlier one
without effect is void. Of nodes not heard since control's start nothing is known: until each of them was
heard nothing is given to anybody, and after a term they count as holding half of everything, or all of it
when one of them may have been alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor

from control.share_book import (
    NONE,
    ONE,
    Held,
    Holder,
    ShareBook,
    TenantBook,
    may_have,
    out_of,
)
from packer.shares import MARGIN_MS, NO_LAGS, NOTHING, TERM_MS, WHOLE, Lags, Share, TenantShare
from packer.wire import WIRE_VERSION, SharesAnswer

# Where a limit has fewer grains than nodes want it, who has one keeps it this long: a few requests.
HOLD_MS = 500
# Nobody else in need, a node keeps this part of what it uses no more, for this long: it has something to
# serve with should control go away just then.
KEPT_PART = 8
KEPT_MS = 3_600_000
# Who could serve a tenant has this part of it ahead at the most.
AHEAD_PART = 4
# Who has wanted some for so long is no passer-by, and may have more than it wants.
STEADY_MS = 30_000
# A nudge may be lost; a node that was not heard since is nudged again.
NUDGE_AGAIN_MS = 1_000
# After so long without a word from a node, what it gives up by itself is free.
FREE_AFTER_MS = TERM_MS + MARGIN_MS

# --- events and actions ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HolderJoined:
    """A node exists. ``fresh``: it joined just now and holds nothing; else control remembers it."""

    node: str
    fresh: bool


@dataclass(frozen=True, slots=True)
class HolderRemoved:
    """An operator said that the node is gone."""

    node: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What a node holds and wants of one tenant's limits, which divide into ``grains``."""

    held: TenantShare
    grains: int
    full: Lags  # of a part of which nothing is left


@dataclass(frozen=True, slots=True)
class SharesAsked:
    """One exchange. ``lasting``: what it holds does not halve (any more). ``divided``: the node was told
    that no node is alone any more."""

    node: str
    session: str
    number: int
    rest: Share
    wishes: tuple[Wish, ...] = ()
    lasting: bool = False
    divided: bool = False
    begun: bool = False  # the first of a process, which does not know what an earlier one took


@dataclass(frozen=True, slots=True)
class SharesAwaited:
    """What would be answered to the node's last exchange now?"""

    node: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed."""


Event = HolderJoined | HolderRemoved | SharesAsked | SharesAwaited | Ticked


@dataclass(frozen=True, slots=True)
class AnswerShares:
    """What the node is answered; ``want`` in its shares is what it will have when others gave up theirs."""

    node: str
    said: SharesAnswer
    unmet: bool = False  # it wants something that others are asked for
    recalls: bool = False  # it must give something up


@dataclass(frozen=True, slots=True)
class NudgeHolder:
    """Let the node come for an exchange: others want what it has."""

    node: str


@dataclass(frozen=True, slots=True)
class WakeAsks:
    """Something is free: whoever waits may be answered."""


Action = AnswerShares | NudgeHolder | WakeAsks


# --- the step ------------------------------------------------------------------------------------


def step(book: ShareBook, event: Event, now_ms: int) -> list[Action]:
    """Take one fact in, return what is to be done about it."""
    match event:
        case HolderJoined(node, fresh):
            if node not in book.holders:
                book.holders[node] = Holder()
                book.divided = book.divided and fresh
                if not fresh:
                    book.unbound[node] = None
        case HolderRemoved(node):
            return _removed(book, node, now_ms)
        case SharesAsked():
            return _asked(book, event, now_ms)
        case SharesAwaited(node):
            holder = book.holders.get(node)
            return [] if holder is None else _answer(book, node, holder, now_ms)
        case Ticked():
            return _tick(book, now_ms)
    return []


def _unknown(book: ShareBook, now_ms: int) -> Fraction:
    """How much nodes hold, at the most, that were not heard since control started."""
    if not book.unbound:
        return NONE
    if now_ms - book.started_ms < FREE_AFTER_MS or not book.divided:
        return ONE
    return ONE / 2


def free_part(book: ShareBook, tenant: str, now_ms: int) -> Fraction:
    """What nobody holds of a tenant's limits."""
    return _free(book, book.tenants.get(tenant) or TenantBook(), now_ms)


def _free(book: ShareBook, known: TenantBook, now_ms: int) -> Fraction:
    return max(ONE - out_of(book, known) - _unknown(book, now_ms), NONE)


# --- exchanges ------------------------------------------------------------------------------------


def _asked(book: ShareBook, event: SharesAsked, now_ms: int) -> list[Action]:
    holder = book.holders.get(event.node)
    if holder is None:
        return []
    if not holder.session or event.session != holder.session:
        book.sessions += 1
        holder.session, holder.number = f"{book.name}:{book.sessions}", 0
        return [_greeting(book, event, holder, now_ms)]
    woken: list[Action] = []
    if event.number > holder.number:
        if _take_report(book, event, holder, now_ms):
            woken = [WakeAsks()]
        holder.number, holder.nudged_ms = event.number, None
    return [*_answer(book, event.node, holder, now_ms), *woken]


def _greeting(book: ShareBook, event: SharesAsked, holder: Holder, now_ms: int) -> AnswerShares:
    """The first answer of a session says its name. Who is alone need not wait for another."""
    if len(book.holders) > 1:
        said = SharesAnswer(WIRE_VERSION, holder.session, event.number, NOTHING, known=False)
        return AnswerShares(event.node, said)
    return _whole(book, event.node, holder, now_ms, known=False)


def _whole(book: ShareBook, node: str, holder: Holder, now_ms: int, *, known: bool) -> AnswerShares:
    may_have(holder.rest, WHOLE)
    book.resting[node] = None
    holder.alone = True
    owed = []
    for tenant, each in book.tenants.items():
        lags = _lags(each, now_ms)
        if node in each.held:
            _may_have(each, node, holder, WHOLE)
        if lags != NO_LAGS:
            owed.append(TenantShare(tenant, WHOLE, lags, WHOLE))
    said = SharesAnswer(
        WIRE_VERSION, holder.session, holder.number, WHOLE, tuple(owed), lasting=True, known=known
    )
    return AnswerShares(node, said)


def _take_report(book: ShareBook, event: SharesAsked, holder: Holder, now_ms: int) -> bool:
    """What the node says that it holds; is anything free now that was not? It may say less than it was
    given. More than that counts for nothing, so that no node can talk others out of their shares."""
    node, binding = event.node, event.node in book.unbound
    names = [*(wish.held.tenant for wish in event.wishes), *holder.tenants]
    before = {name: _value(book, holder, node, name) for name in names}
    freed = holder.rest_value > event.rest.value
    rest = event.rest if binding or event.rest.value <= holder.rest_value else NOTHING
    holder.rest, holder.lasting = [rest], event.lasting
    holder.alone = holder.halved = False
    holder.free_at_ms = now_ms + FREE_AFTER_MS
    book.unbound.pop(node, None)
    if rest.parts:
        book.resting[node] = None
    else:
        book.resting.pop(node, None)
    unnamed = dict.fromkeys(holder.tenants)
    for wish in event.wishes:
        said = wish.held
        unnamed.pop(said.tenant, None)
        known = book.tenants.setdefault(said.tenant, TenantBook())
        known.grains, known.full = wish.grains, wish.full
        share = _believed(
            said.share, _others_leave(book, known, node) if binding else before[said.tenant], known
        )
        gone = _lost(event, known, said.lags, now_ms)
        _report(known, holder, node, said, share, now_ms)
        if binding:
            known.due_ms = tuple(
                max(due, now_ms + lag) for due, lag in zip(known.due_ms, gone.each(), strict=True)
            )
        freed |= _give_back(book, known, before[said.tenant] - share.value, gone, now_ms)
    for name in unnamed:
        known = book.tenants[name]
        share = _believed(rest, before[name], known)
        gone = _lost(event, known, NO_LAGS, now_ms)
        _report(known, holder, node, TenantShare(name, share), share, now_ms)
        freed |= _give_back(book, known, before[name] - share.value, gone, now_ms)
    if binding and rest.parts:
        _make_way(book, node, holder)
    if event.divided or (len(book.holders) > 1 and not book.unbound and not book.resting):
        book.divided = True
    _forget(book, holder, node, now_ms)
    return freed


def _believed(share: Share, most: Fraction, known: TenantBook) -> Share:
    return share if share.value <= most else Share(floor(most * known.grains), known.grains)


def _lost(event: SharesAsked, known: TenantBook, lags: Lags, now_ms: int) -> Lags:
    """The lags of what a node gives back. What it was given and never heard of has those it came with. A
    process that has just begun does not know which requests and restores an earlier one let in."""
    held = known.held.get(event.node)
    if event.begun:
        full = known.full
        lags = replace(
            lags,
            requests_ms=max(lags.requests_ms, full.requests_ms),
            restores_ms=max(lags.restores_ms, full.restores_ms),
        )
    if held is None or held.value == held.could[0].value:
        return lags
    return Lags(*(max(pair) for pair in zip(lags.each(), _lags(known, now_ms).each(), strict=True)))


def _make_way(book: ShareBook, node: str, holder: Holder) -> None:
    """A node comes that has the whole of everything, and others have some: it must give that up."""
    for tenant, known in book.tenants.items():
        if node not in known.held and holder.rest_value > _others_leave(book, known, node):
            known.lift(node)
            holder.tenants[tenant] = None


def _others_leave(book: ShareBook, known: TenantBook, node: str) -> Fraction:
    if (held := known.held.get(node)) is not None:
        own = held.counted
    else:
        own = book.holders[node].rest_value if node in book.resting else NONE
    return max(ONE - out_of(book, known) + own, NONE)


def _value(book: ShareBook, holder: Holder, node: str, tenant: str) -> Fraction:
    known = book.tenants.get(tenant)
    held = known.held.get(node) if known is not None else None
    return holder.rest_value if held is None else held.value


def _report(
    known: TenantBook, holder: Holder, node: str, said: TenantShare, share: Share, now_ms: int
) -> None:
    is_new = node not in known.held
    held = known.lift(node)
    if is_new:
        holder.tenants[said.tenant] = None
    if is_new or (share.parts > 0) != (held.could[0].parts > 0) or (said.want.parts and not held.want.parts):
        held.since_ms = now_ms
    held.could, held.want, held.ahead = [share], said.want, said.ahead
    if said.want.parts:
        held.wanted_ms = now_ms
    known.put(node, halved=holder.halved)


def _may_have(known: TenantBook, node: str, holder: Holder, share: Share) -> None:
    held = known.held[node]
    if share not in held.could:
        known.lift(node)
        may_have(held.could, share)
        known.put(node, halved=holder.halved)


def _give_back(book: ShareBook, known: TenantBook, part: Fraction, lags: Lags, now_ms: int) -> bool:
    """A part is free again, and what was taken of it is still owed: the free part's mean."""
    if part <= 0:
        return False
    free = max(ONE - out_of(book, known), part)
    rest = free - part
    known.due_ms = tuple(
        now_ms + ceil((rest * max(due - now_ms, 0) + part * lag) / free)
        for due, lag in zip(known.due_ms, lags.each(), strict=True)
    )
    return True


def _lags(known: TenantBook, now_ms: int) -> Lags:
    return Lags(*(max(due - now_ms, 0) for due in known.due_ms))


def _forget(book: ShareBook, holder: Holder, node: str, now_ms: int) -> None:
    """Who wants nothing of a tenant, and has of it what it has of every other, is not in its book; a book of
    nobody is none."""
    for name in list(holder.tenants):
        known = book.tenants[name]
        held = known.held[node]
        if held.want.parts or held.ahead or held.counted != holder.rest_value:
            continue
        _drop(book, holder, node, name, now_ms)


def _drop(book: ShareBook, holder: Holder, node: str, name: str, now_ms: int) -> None:
    known = book.tenants[name]
    known.drop(node)
    del holder.tenants[name]
    if not known.held and max(known.due_ms) <= now_ms:
        del book.tenants[name]


# --- who gets how much ----------------------------------------------------------------------------


def _answer(book: ShareBook, node: str, holder: Holder, now_ms: int) -> list[Action]:
    if len(book.holders) == 1:
        return [_whole(book, node, holder, now_ms, known=True)]
    shares, actions, unmet, recalls = [], [], False, False
    nudged: dict[str, None] = {}
    for name in list(holder.tenants):
        known = book.tenants[name]
        held = known.held[node]
        targets = _targets(book, known, now_ms)
        grains = _more(known, targets, node, now_ms) or _kept(known, held, targets, now_ms)
        grains = max(grains, _ahead(known, node, held, targets))
        share, target = _next(book, known, held, grains, now_ms)
        grown = share.value > held.could[0].value
        lags = _lags(known, now_ms) if grown else NO_LAGS
        _may_have(known, node, holder, share)
        recalls = recalls or share.value < held.could[0].value
        # What it should have; in turns a node that has none comes to have one soon.
        due = max(targets.get(node, 0), bool(held.want.parts))
        soon = max(
            min(target.value, Fraction(due, known.grains)), Fraction(bool(held.want.parts), known.grains)
        )
        if share.parts or held.want.parts:
            shares.append(TenantShare(name, share, lags, Share(ceil(soon * known.grains), known.grains)))
        elif not held.counted:
            _drop(book, holder, node, name, now_ms)  # it stood by and there is nothing for it
        if share.value < soon:
            unmet = True
            nudged |= dict.fromkeys(_above(book, known, targets, node))
    for other in nudged:
        nudged_ms = book.holders[other].nudged_ms
        if nudged_ms is None or now_ms - nudged_ms >= NUDGE_AGAIN_MS:
            book.holders[other].nudged_ms = now_ms
            actions.append(NudgeHolder(other))
    said = SharesAnswer(
        WIRE_VERSION, holder.session, holder.number, NOTHING, tuple(shares), divided=book.divided
    )
    return [AnswerShares(node, said, unmet, recalls), *actions]


def _kept(known: TenantBook, held: Held, targets: dict[str, int], now_ms: int) -> int:
    """What a node that wants nothing may keep of what it has, while nobody else is short of it."""
    if held.want.parts or held.wanted_ms is None or now_ms - held.wanted_ms >= KEPT_MS:
        return 0
    if _is_short(known, targets):
        return 0
    return min(floor(held.could[0].value * known.grains), max(known.grains // KEPT_PART, 1))


def _ahead(known: TenantBook, node: str, held: Held, targets: dict[str, int]) -> int:
    """What a node that could serve the tenant may have before it wants it, while nobody else is short of it:
    should control go away, its first requests find some. Of what those who want some leave (``_more``) half
    stays free for who comes. The rest is divided among those who have some and one more, who may come next:
    so after a few exchanges all have the same, and nobody but those who have some need be known."""
    if not held.ahead or node in targets or _is_short(known, targets):
        return 0
    left = known.grains - sum(targets.values())
    most = (left - left // 2 if targets else left) // 2
    others = [known.held[each].counted for each in known.having if each != node and each not in targets]
    rest = floor(most - sum(others, NONE) * known.grains)
    return max(min(max(most // (len(others) + 2), 1), max(known.grains // AHEAD_PART, 1), rest), 0)


def _is_short(known: TenantBook, targets: dict[str, int]) -> bool:
    return any(_compared(known, node, target) < 0 for node, target in targets.items())


def _compared(known: TenantBook, node: str, target: int) -> int:
    """Less than 0 when the node holds less than so many grains, more when it holds more."""
    part = known.held[node].counted
    return part.numerator * known.grains - target * part.denominator


def _next(book: ShareBook, known: TenantBook, held: Held, target: int, now_ms: int) -> tuple[Share, Share]:
    """What the node may have now, and what it should have."""
    has, wanted = held.could[0], Share(target, known.grains)
    if wanted.value <= has.value:
        return (has if wanted.value == has.value else wanted), wanted
    # What it was answered already and may have is not given to anybody else, so it can be given again.
    possible = floor((held.value + _free(book, known, now_ms)) * known.grains)
    most = Share(min(target, possible), known.grains)
    return (most if most.value > has.value else has), wanted


def _targets(book: ShareBook, known: TenantBook, now_ms: int) -> dict[str, int]:
    """Grains by node: everybody gets what it wants, or an equal part of what those who want less leave.
    Where there are fewer grains than nodes that want one, they take turns."""
    grains = known.grains
    has = [
        (known.held[node].since_ms, node)
        for node in known.having
        if known.held[node].want.parts and not book.holders[node].halved
    ]
    if len(has) + len(known.waiting) > grains:
        return dict.fromkeys(_turns(known, sorted(has), now_ms), 1)
    wants = sorted(
        (min(-(-known.held[node].want.parts * grains // known.held[node].want.of), grains), node)
        for _, node in (*has, *known.waiting)
    )
    left, targets = grains, {}
    for place, (want, node) in enumerate(wants):
        targets[node] = min(want, left // (len(wants) - place))
        left -= targets[node]
    return targets


def _more(known: TenantBook, targets: dict[str, int], node: str, now_ms: int) -> int:
    """What a node may have of a tenant: what it wants and, once it has wanted some for a while, its part of
    half of what nobody wants. Should control go away, only what is with nodes serves anybody. The other half
    is for those who come to want some, who need not wait then. Until then it keeps what it has ahead."""
    wanted, held = targets.get(node, 0), known.held[node]
    if not wanted:
        return 0
    more = wanted + (known.grains - sum(targets.values())) // (2 * len(targets))
    if now_ms - held.since_ms >= STEADY_MS:
        return more
    return max(wanted, min(floor(held.could[0].value * known.grains), more)) if held.ahead else wanted


def _turns(known: TenantBook, has: Sequence[tuple[int, str]], now_ms: int) -> list[str]:
    """Who has one keeps it for a while, then it is the turn of those who wait, the longest first."""
    kept: list[str] = []
    over: list[str] = []
    for since_ms, node in has:
        (kept if now_ms - since_ms < HOLD_MS else over).append(node)
    waiting = [node for _, node in known.waiting[: known.grains]]
    return [*kept, *waiting, *over][: known.grains]


def _above(book: ShareBook, known: TenantBook, targets: dict[str, int], node: str) -> Iterator[str]:
    """Who has more than its part, or may have."""
    for other in known.having:
        if other != node and _compared(known, other, targets.get(other, 0)) > 0:
            yield other
    yield from (other for other in book.resting if other != node and other not in known.held)


# --- nodes that are gone, and time ----------------------------------------------------------------


def _removed(book: ShareBook, node: str, now_ms: int) -> list[Action]:
    holder = book.holders.pop(node, None)
    if holder is None:
        return []
    book.unbound.pop(node, None)
    book.resting.pop(node, None)
    for name in holder.tenants:
        known = book.tenants[name]
        part = known.drop(node)
        _give_back(book, known, part, known.full, now_ms)
    if len(book.holders) < 2:
        book.divided = False
    return [WakeAsks()]


def _tick(book: ShareBook, now_ms: int) -> list[Action]:
    """Half of what a node held that was not heard for the whole term is free."""
    woken = False
    for name in [name for name, known in book.tenants.items() if not known.held]:
        if max(book.tenants[name].due_ms) <= now_ms:
            del book.tenants[name]
    for node, holder in book.holders.items():
        if node in book.unbound or holder.alone or holder.halved or now_ms < holder.free_at_ms:
            continue
        holder.halved = True
        holder.rest = _halved(holder, holder.rest)
        for name in holder.tenants:
            known = book.tenants[name]
            before = known.held[node].value
            held = known.lift(node)
            held.could = _halved(holder, held.could)
            known.put(node, halved=True)
            woken |= _give_back(book, known, before - held.value, known.full, now_ms)
    return [WakeAsks()] if woken else []


def _halved(holder: Holder, could: list[Share]) -> list[Share]:
    """Whoever halved already keeps what it said, but what it was answered since halves again."""
    first = could[0] if holder.lasting else could[0].halved()
    return [first, *(share.halved() for share in could[1:])]
