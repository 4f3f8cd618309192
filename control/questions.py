"""Questions to nodes that wait for an answer: nodes dial, so a question rides on the answer to a beat.

Covers: which questions are open, which a node has not been handed yet, and whose answers count. Does not
cover: who may ask (``control.routes.plans``) or long polls (``control.state``), which a question ends.
Each costs its node a beat, so a tenant has a rate of them, and never the last places.
Everything is in memory: a question is worth no more than the wait of who asked it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packer.http import ApiError
from packer.questions import QUESTIONS_MAX, Asks, Question, Reply
from packer.rates import Rate

# Open questions of one node: what one beat can carry. More means that people ask faster than it answers.
OPEN_PER_NODE_MAX = QUESTIONS_MAX
# Open questions of one tenant at one node: less than a node takes, so that nobody shuts others out.
OPEN_PER_TENANT_MAX = 2
# Open questions of all tenants at one node; the operator, who looks for what is wrong, has the rest.
OPEN_OF_TENANTS_MAX = OPEN_PER_NODE_MAX - 2
# Questions of one tenant, to how many nodes they ever go: a person at a terminal, or a page that looks every
# two seconds. Ten seconds' worth may come at once.
TENANT_QUESTIONS_PER_MINUTE = 30
# Open questions of one owner over all nodes: what one ``explain`` of a fleet needs, and another.
OPEN_PER_OWNER_MAX = 32
# A node answers in milliseconds once it hears of it; a node between two beats hears within a second.
ANSWER_WAIT_S = 5.0
RETRY_MS = 1_000
# Whoever is not a tenant; see ``control.routes.access``.
OPERATOR_OWNER = "operator!"


@dataclass(slots=True)
class _Open:
    node: str
    owner: str
    question: Question
    reply: asyncio.Future[Reply]


class Questions:
    """``wake`` ends a node's long poll, so that it comes for its questions; ``now_ms`` never goes back."""

    def __init__(self, wake: Callable[[str], None], now_ms: Callable[[], int]) -> None:
        self._wake = wake
        self._now_ms = now_ms
        # Of tenants that asked lately: those that may ask at full rate again are forgotten.
        self._rates: dict[str, Rate] = {}
        self._open: dict[str, _Open] = {}
        self._pending: dict[str, list[Question]] = {}

    def pending(self, node: str) -> bool:
        return bool(self._pending.get(node))

    def take(self, node: str) -> tuple[Question, ...]:
        """What the answer to this node's beat carries; handed over once."""
        return tuple(self._pending.pop(node, ()))

    def admit(self, owner: str) -> None:
        """Count a question that is about to be put to some nodes. Raises ``ApiError`` 429."""
        if owner == OPERATOR_OWNER:
            return
        now_ms = self._now_ms()
        self._rates = {name: rate for name, rate in self._rates.items() if rate.reset_ms(now_ms)}
        rate = self._rates.setdefault(owner, Rate(TENANT_QUESTIONS_PER_MINUTE))
        if wait_ms := rate.wait_ms(now_ms):
            raise ApiError(
                429,
                "too_many_questions",
                f"A tenant may ask {TENANT_QUESTIONS_PER_MINUTE} questions per minute, {rate.burst} at once; "
                "come back after Retry-After.",
                retry_ms=wait_ms,
            )
        rate.take(now_ms)

    async def ask(self, node: str, owner: str, asks: Asks, subject: str) -> Reply | None:
        """The node's reply, or None when none came in time. Raises ``ApiError`` 429."""
        self._check(node, owner)
        question = Question(secrets.token_hex(8), asks, subject)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._open[question.question] = _Open(node, owner, question, reply)
        self._pending.setdefault(node, []).append(question)
        self._wake(node)
        try:
            async with asyncio.timeout(ANSWER_WAIT_S):
                return await reply
        except TimeoutError:
            return None
        finally:
            del self._open[question.question]
            self._withdraw(node, question)

    def _check(self, node: str, owner: str) -> None:
        there = [each.owner for each in self._open.values() if each.node == node]
        mine = sum(each.owner == owner for each in self._open.values())
        limits = [(len(there), OPEN_PER_NODE_MAX, f"to node {node}"), (mine, OPEN_PER_OWNER_MAX, "of yours")]
        if owner != OPERATOR_OWNER:
            of_tenants = len(there) - there.count(OPERATOR_OWNER)
            limits += [
                (there.count(owner), OPEN_PER_TENANT_MAX, "of yours"),
                (of_tenants, OPEN_OF_TENANTS_MAX, f"of tenants to node {node}"),
            ]
        for count, limit, whose in limits:
            if count >= limit:
                raise ApiError(
                    429,
                    "too_many_questions",
                    f"{limit} questions {whose} are open, the limit; wait for their answers.",
                    retry_ms=RETRY_MS,
                )

    def _withdraw(self, node: str, question: Question) -> None:
        waiting = self._pending.get(node)
        if waiting is not None and question in waiting:
            waiting.remove(question)
            if not waiting:
                del self._pending[node]

    def settle(self, node: str, replies: Sequence[Reply]) -> None:
        """A node's replies; those to what nobody asked it (any more) are ignored."""
        for reply in replies:
            known = self._open.get(reply.question)
            if known is not None and known.node == node and not known.reply.done():
                known.reply.set_result(reply)
