"""A control and nodes, reduced to their shares of one tenant's limits.

Covers: stepping control's book and proving it, and a node's part of an exchange. Does not cover: any test.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from control.share_book import ShareBook, check
from control.shares import Action, AnswerShares, Event, HolderJoined, NudgeHolder, SharesAsked, Wish, step
from packer.rates import TenantRates, full_lags, grains
from packer.shares import NO_LAGS, NOTHING, TERM_MS, NodeShares, Share, TenantShare
from packer.types import TenantQuota
from packer.wire import SharesAnswer

QUOTA = TenantQuota(requests_per_minute=600)
GRAINS = grains(QUOTA)


class Desk:
    """A control: steps the book and proves it after every step."""

    def __init__(self, *nodes: str, name: str = "c1", now_ms: int = 0, fresh: bool = True) -> None:
        self.book = ShareBook(name, now_ms)
        self.nudged: list[str] = []
        for node in nodes:
            self.step(HolderJoined(node, fresh), now_ms)

    def step(self, event: Event, now_ms: int) -> SharesAnswer | None:
        actions: list[Action] = step(self.book, event, now_ms)
        check(self.book)
        self.nudged += [action.node for action in actions if isinstance(action, NudgeHolder)]
        return next((action.said for action in actions if isinstance(action, AnswerShares)), None)


@dataclass(slots=True)
class Box:
    """A node, reduced to its shares and one tenant's requests."""

    name: str
    held: NodeShares = field(default_factory=lambda: NodeShares(NOTHING))
    rates: TenantRates = field(default_factory=TenantRates)
    session: str = ""
    number: int = 0
    lasting: bool = False
    divided: bool = False
    begun: bool = True
    ahead: bool = False

    def set_limits(self, quota: TenantQuota = QUOTA) -> None:
        self.rates.set_share(NOTHING, NO_LAGS, 0, 0)
        self.rates.set_limits(quota, 0)

    def ask(self, want: int, now_ms: int, count: int = GRAINS, quota: TenantQuota = QUOTA) -> SharesAsked:
        self.number += 1
        lags = self.rates.lags(now_ms)
        said = TenantShare("t", self.rates.share, lags, Share(want, count), self.ahead)
        wishes = (Wish(said, count, full_lags(quota)),)
        return SharesAsked(
            self.name,
            self.session,
            self.number,
            self.held.rest,
            wishes,
            self.held.halve_at_ms is None,
            self.divided,
            self.begun,
        )

    def take(self, asked: SharesAsked, answer: SharesAnswer, sent_ms: int, now_ms: int) -> None:
        if not answer.known:
            self.session = answer.session
            if not answer.lasting:
                return
        elif (answer.session, answer.number) != (self.session, asked.number):
            return
        else:
            self.begun = False
        shares = {each.tenant: each for each in answer.shares}
        self.held.rest = answer.rest
        self.held.by_tenant = {name: each.share for name, each in shares.items()}
        self.held.halve_at_ms = None if answer.lasting else sent_ms + TERM_MS
        self.lasting, self.divided = answer.lasting, answer.divided
        lags = shares["t"].lags if "t" in shares else NO_LAGS
        self.rates.set_share(self.held.share_of("t"), lags, 0, now_ms)

    def pass_to(self, now_ms: int) -> None:
        if self.held.are_due(now_ms):
            self.held.halve()
            self.rates.set_share(self.held.share_of("t"), NO_LAGS, 0, now_ms)

    def talk(self, desk: Desk, want: int, now_ms: int) -> SharesAnswer:
        """One exchange that nothing disturbs, and the first one of a session before it."""
        self.pass_to(now_ms)
        while True:
            asked = self.ask(want, now_ms)
            answer = desk.step(asked, now_ms)
            assert answer is not None
            self.take(asked, answer, now_ms, now_ms)
            if answer.known:
                return answer

    @property
    def parts(self) -> float:
        return float(self.rates.share.value)


def boxes(*names: str) -> list[Box]:
    made = [Box(name) for name in names]
    for box in made:
        box.set_limits()
    return made
