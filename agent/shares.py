"""A node's part of its tenants' limits: what it asks control for, and what it was given.

Covers: exchanges with control, keeping what was given over a restart, how much of each tenant's limits the
node could use, and letting a request wait for a moment while more is on its way. Does not cover: dividing
(``control/shares.py``), what a share does to a rate (``packer/rates.py``), or the connection
(``agent/uplink.py``).

One exchange at a time: the next one says what is held now, so an answer that was lost is void. A share
that shrinks is on disk before it is in force, and control hears of it after that. A node that begins anew
goes on with half of what it had, used up, until control answers; one that was alone, with the whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import aiohttp
import msgspec

from packer.events import Event, SharesSeen
from packer.ledger import Node
from packer.quota import Tenant
from packer.rates import Rate, TenantRates, grains
from packer.shares import NO_LAGS, NOTHING, TERM_MS, WHOLE, Share, TenantShare, part_needed
from packer.wire import WIRE_VERSION, BadMessage, SharesAnswer, SharesAsk, decode

log = logging.getLogger("bunk.shares")

PATH = "/node/v1/shares"
# How often a node looks at what it used of its shares, and gives back what it has too much.
LOOK_MS = 15_000
# How often one that uses none renews what it has: five times in a term.
RENEW_MS = TERM_MS // 5
# Control holds an answer this long while other nodes give up what this one wants.
ASK_WAIT_MS = 400
# A request waits this long at the most for a greater share before it is looked at like any other.
PATIENCE_MS = 1_500
# Requests that wait so at one time; others are looked at at once.
WAITING_MAX = 1_024
# Whoever was told that there is no more is not asked for more again before this time.
BARREN_MS = 500
# An answer that takes longer than this beyond the wait is lost.
TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
# Who has too little wants this part of everything at the least: a single grain may be used up as it comes.
FIRST_PART = 8
# Tenants of which a node asks for some before anybody calls; those with bytes on its devices come first. One
# costs control 20 us a minute and node: 64 of each of 5,000 nodes, a tenth of a core.
AHEAD_MAX = 64
# Where no more tenants than this have limits, of all of them: a few tenants may call any node.
AHEAD_ALL_MAX = 16
# Between two exchanges, so that a flood of requests is not one of messages.
PAUSE_S = 0.02
RETRY_S = 1.0


class Answer(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def body(self) -> bytes: ...


Post = Callable[[str, object, float, float], Awaitable[Answer]]


class Stored(msgspec.Struct):
    """What outlives the process."""

    rest: Share
    shares: tuple[TenantShare, ...] = ()
    lasting: bool = False
    divided: bool = False


@dataclass(slots=True)
class Use:
    """What a tenant used of its limits here since ``looked_ms``, and the grains that follow from it."""

    looked_ms: int
    taken: tuple[int, ...]
    grains: int = 0
    most_in_flight: int = 0


class Shares:
    """``save`` writes a text to the journal and says whether it is there; ``stored`` is what it wrote."""

    def __init__(
        self,
        core: Callable[[], Node],
        post: Callable[[Event], None],
        clock_ms: Callable[[], int],
        save: Callable[[str], Awaitable[bool]],
        stored: str | None,
    ) -> None:
        self._core = core
        self._post = post
        self._clock_ms = clock_ms
        self._save = save
        self._stored = stored
        self._session = self._maker = ""
        self._number = 0
        self._begun = True
        self._divided = False
        self._lasting = True
        self._uses: dict[str, Use] = {}
        self._pressing: dict[str, None] = {}
        self._barren_ms: dict[str, int] = {}
        self._due = asyncio.Event()
        self._changed = asyncio.Event()
        self._online = asyncio.Event()
        self._waiting = 0
        self._ahead: dict[str, None] = {}
        self._ahead_until_ms = 0

    # --- lives ------------------------------------------------------------------------------------

    def take_up(self) -> None:
        """At a start, before the first plan: what the node had before, less what it may have lost since. With
        nothing on disk that is nothing: the disk may have failed when it was given up."""
        if self._stored is None:
            self._lasting = False
            self._post(SharesSeen(NOTHING))
            return
        try:
            known = msgspec.json.decode(self._stored, type=Stored)
        except (msgspec.DecodeError, msgspec.ValidationError):
            log.error("the journal's shares can not be read; there are none until control answers")
            known = Stored(NOTHING)
        self._divided, self._lasting = known.divided, known.lasting
        if known.lasting:
            self._post(SharesSeen(known.rest, known.shares))
            return
        halves = tuple(TenantShare(each.tenant, each.share.halved()) for each in known.shares)
        self._post(SharesSeen(known.rest.halved(), halves, used_up=True))

    async def forget(self) -> None:
        """The node has joined (again): what it held in an earlier life is others' by now."""
        self._session, self._divided, self._lasting = "", False, False
        self._post(SharesSeen(NOTHING))
        if await self._save(nothing := _text(Stored(NOTHING))):
            self._stored = nothing

    # --- exchanges --------------------------------------------------------------------------------

    def nudge(self) -> None:
        """There is a reason to talk to control now."""
        self._due.set()

    def planned(self, maker: str) -> None:
        """A plan came into force. ``maker`` is another when another start of control made it, which knows
        nothing of this node, and when this node is alone now; whoever is alone may not be any more."""
        if maker != self._maker or self._core().shares.rest.parts:
            self._maker = maker
            self._due.set()

    async def run(self, post: Post, online: asyncio.Event) -> None:
        """Exchanges over one session of the uplink, until cancelled."""
        self._online = online
        self._due.set()
        while True:
            await online.wait()
            try:
                async with asyncio.timeout(self._rest_s()):
                    await self._due.wait()
            except TimeoutError:
                if not self._has_news():
                    continue
            self._due.clear()
            try:
                if not await self._exchange(post):
                    await asyncio.Event().wait()
                pause_s = PAUSE_S
            except (aiohttp.ClientError, TimeoutError, OSError, BadMessage, RuntimeError) as error:
                # RuntimeError: the session is just being made anew.
                log.debug("no shares: %s", error)
                self._due.set()
                pause_s = RETRY_S
            await asyncio.sleep(pause_s)

    def _rest_s(self) -> float | None:
        if self._lasting:
            return None
        return (LOOK_MS if self._uses else RENEW_MS) / 1000

    def _has_news(self) -> bool:
        """Whether there is something to renew, or tenants that could be served here."""
        shares = self._core().shares
        if self._uses or shares.by_tenant or shares.rest.parts:
            return True
        return bool(self._could_serve())

    def _could_serve(self) -> dict[str, None]:
        """Tenants with limits whose requests may come here at any time: their models lie here."""
        now_ms = self._clock_ms()
        if now_ms < self._ahead_until_ms:
            return self._ahead
        limited = [
            (name, known)
            for name, known in self._core().tenants.items()
            if known.planned and grains(known.quota)
        ]
        ahead = dict.fromkeys(name for name, known in limited if known.device.used_bytes)
        ahead |= dict.fromkeys(name for name, known in limited if known.host.used_bytes)
        ahead |= dict.fromkeys(name for name, known in limited if known.disk.used_bytes)
        if len(limited) <= AHEAD_ALL_MAX:
            ahead |= dict.fromkeys(name for name, _ in limited)
        self._ahead = dict.fromkeys(islice(ahead, AHEAD_MAX))
        self._ahead_until_ms = now_ms + LOOK_MS
        return self._ahead

    async def _exchange(self, post: Post) -> bool:
        """Say what is held and wanted, and take what is answered; False when control divides nothing."""
        sent_ms = self._clock_ms()
        ask = self.ask()
        answer = await post(PATH, ask, ASK_WAIT_MS / 1000 + TIMEOUT_S, CONNECT_TIMEOUT_S)
        if answer.status == 404:
            log.info("this control divides no limits: the node enforces them by itself")
            self._lasting = True
            self._post(SharesSeen(WHOLE))
            return False
        if answer.status != 200:
            raise aiohttp.ClientError(f"shares: control answered {answer.status}")
        await self.take(ask, decode(answer.body, SharesAnswer), sent_ms)
        return True

    def ask(self) -> SharesAsk:
        """What is held now, of everybody who has or wants a share or owes something of one."""
        core, now_ms = self._core(), self._clock_ms()
        self._number += 1
        ahead = self._could_serve() if self._session else {}
        if core.shares.rest.parts:
            names = dict.fromkeys(core.tenants)
        else:
            names = dict.fromkeys((*core.shares.by_tenant, *self._uses, *ahead))
        said = []
        for name in names:
            tenant = core.tenants.get(name)
            if tenant is None or not tenant.planned:
                share = core.shares.share_of(name)
                self._uses.pop(name, None)
                if share != core.shares.rest:
                    said.append(TenantShare(name, share))
                continue
            count = grains(tenant.quota)
            want = Share(self._wanted(name, tenant, count, now_ms), count) if count else NOTHING
            share, lags = tenant.rates.share, tenant.rates.lags(now_ms)
            if want.parts or share != core.shares.rest or lags != NO_LAGS or name in ahead:
                said.append(TenantShare(name, share, lags, want, name in ahead))
            elif not share.parts:
                self._uses.pop(name, None)
        wait_ms = ASK_WAIT_MS if self._pressing else 0
        return SharesAsk(
            WIRE_VERSION,
            self._session,
            self._number,
            core.shares.rest,
            tuple(said),
            wait_ms,
            lasting=core.shares.halve_at_ms is None,
            divided=self._divided,
            begun=self._begun,
        )

    async def take(self, ask: SharesAsk, answer: SharesAnswer, sent_ms: int) -> None:
        """Do as control says, if it is the answer to what the node said last."""
        if not answer.known:
            # A new session: what is said under its name is known to be said to this control.
            self._session = answer.session
            self._due.set()
            if not answer.lasting:
                return
        elif answer.session != self._session or answer.number != ask.number:
            return
        else:
            self._begun = False
        if not await self._keep(answer):
            return
        pressing, self._pressing = self._pressing, {}
        named = {**dict.fromkeys(said.tenant for said in ask.shares), **pressing}
        before = {name: self._share_of(name) for name in named}
        self._divided, self._lasting = answer.divided, answer.lasting
        halve_at_ms = None if answer.lasting else sent_ms + TERM_MS
        self._post(SharesSeen(answer.rest, answer.shares, halve_at_ms))
        promised = {each.tenant: each.want for each in answer.shares}
        for name in pressing:
            share = self._share_of(name)
            if share.value == before[name].value and share.value >= promised.get(name, answer.rest).value:
                self._barren_ms[name] = self._clock_ms() + BARREN_MS
        self._barren_ms = {n: ms for n, ms in self._barren_ms.items() if ms > self._clock_ms()}
        self._changed.set()
        self._changed = asyncio.Event()
        if any(self._share_of(name).value < share.value for name, share in before.items()):
            self._due.set()  # control can give it to others as soon as it hears that it is given up

    async def _keep(self, answer: SharesAnswer) -> bool:
        """On disk, or no less than before. Without a journal a node can get more and give nothing back."""
        core = self._core()
        kept = tuple(TenantShare(each.tenant, each.share) for each in answer.shares if each.share.parts)
        text = _text(Stored(answer.rest, kept, answer.lasting, answer.divided))
        if text == self._stored:
            return True
        if await self._save(text):
            self._stored = text
            return True
        new = {each.tenant: each.share for each in answer.shares}
        names = dict.fromkeys((*core.shares.by_tenant, *new))
        less = any(new.get(name, answer.rest).value < core.shares.share_of(name).value for name in names)
        return not less and answer.rest.value >= core.shares.rest.value

    def _share_of(self, name: str) -> Share:
        tenant = self._core().tenants.get(name)
        return tenant.rates.share if tenant is not None else self._core().shares.share_of(name)

    # --- what is wanted ---------------------------------------------------------------------------

    def _wanted(self, name: str, tenant: Tenant, count: int, now_ms: int) -> int:
        """How many grains the tenant could use here: twice what it used lately, twice what it has when that
        was not enough, nothing when it did not come."""
        rates = tenant.rates
        use = self._uses.get(name)
        if use is None:
            if not tenant.in_flight and name not in self._pressing:
                return 0
            use = self._uses[name] = Use(now_ms, _taken(rates), 1)
        span_ms = now_ms - use.looked_ms
        if span_ms >= LOOK_MS:
            used = [
                part_needed(2 * (now - then) * rate.period_ms, (rate.limit or 0) * span_ms, count)
                for rate, now, then in zip(_each(rates), _taken(rates), use.taken, strict=True)
            ]
            slots = part_needed(2 * use.most_in_flight, rates.concurrency, count)
            use.grains = max(*used, slots)
            use.looked_ms, use.taken, use.most_in_flight = now_ms, _taken(rates), 0
        has = -(-rates.share.parts * count // rates.share.of)
        if name in self._pressing or (tenant.waiting and rates.restores.wait_ms(now_ms)):
            self._pressing[name] = None
            use.grains = max(use.grains, 2 * has, -(-count // FIRST_PART))
        if tenant.in_flight:
            use.most_in_flight = max(use.most_in_flight, tenant.in_flight)
            use.grains = max(use.grains, part_needed(tenant.in_flight, rates.concurrency, count), 1)
        use.grains = min(use.grains, count)
        if not use.grains:
            del self._uses[name]
        return use.grains

    def note(self, name: str) -> None:
        """A request of this tenant comes; ask for more at once if its share lets it not in."""
        core = self._core()
        tenant = core.tenants.get(name)
        if tenant is None or tenant.rates.share.is_whole or not grains(tenant.quota):
            return
        now_ms = self._clock_ms()
        use = self._uses.get(name)
        if use is None:
            use = self._uses[name] = Use(now_ms, _taken(tenant.rates), 1)
        use.most_in_flight = max(use.most_in_flight, tenant.in_flight + 1)
        if _presses(tenant, now_ms) and self._barren_ms.get(name, 0) <= now_ms:
            self._pressing[name] = None
            self._due.set()

    async def until_let_in(self, name: str, patience_ms: int) -> None:
        """Before a request is looked at: wait while the node's share is too small for it and more of it is
        on its way. Returns at once for whoever has the whole, or can not get more."""
        until_ms = self._clock_ms() + min(PATIENCE_MS, patience_ms)
        while True:
            self.note(name)
            left_ms = until_ms - self._clock_ms()
            if name not in self._pressing or left_ms <= 0 or self._waiting >= WAITING_MAX:
                return
            if not self._online.is_set():
                return
            self._waiting += 1
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left_ms / 1000):
                        await self._changed.wait()
            finally:
                self._waiting -= 1


def _presses(tenant: Tenant, now_ms: int) -> bool:
    """Would a request wait or be refused for this node's share of the tenant's limits?"""
    rates = tenant.rates
    if rates.slots is not None and tenant.in_flight >= rates.slots:
        return True
    return rates.blocked(now_ms, tenant.in_flight * tenant.use_ms) or bool(rates.restores.wait_ms(now_ms))


def _each(rates: TenantRates) -> tuple[Rate, ...]:
    return rates.requests, rates.tokens, rates.restores, rates.device


def _taken(rates: TenantRates) -> tuple[int, ...]:
    return tuple(rate.taken for rate in _each(rates))


def _text(stored: Stored) -> str:
    return msgspec.json.encode(stored).decode()
