"""Bodies that arrive at one time: whose bytes count, who gives way, and that the bound holds.

Covers: ``packer/body_budget.py`` on a clock that jumps. Does not cover: real sockets
(``attacks/test_oip_bodies``, ``attacks/test_gateway_bodies``) or the memory of processes
(``attacks/test_router_bodies``).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from unittest import mock

import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request
from virtual_clock import run_virtual

from packer.body_budget import BODY_READ_SECONDS, BodyBudget
from packer.http import JSON_BYTES_MAX, ApiError
from packer.types import MIB

LARGE = 64 * MIB
TOTAL = 512 * MIB


@dataclass(slots=True)
class Sender:
    """One request: ``size`` bytes announced, of which ``send`` brings some."""

    budget: BodyBudget
    owner: str
    size: int
    chunked: bool = False
    stream: StreamReader = field(init=False)
    task: asyncio.Task[int | str] = field(init=False)
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        protocol = mock.Mock(spec=BaseProtocol, _reading_paused=False)
        self.stream = StreamReader(protocol, 2**16, loop=loop)
        headers = {"Transfer-Encoding": "chunked"} if self.chunked else {"Content-Length": str(self.size)}
        request = make_mocked_request("POST", "/", headers, payload=self.stream)
        self.task = asyncio.create_task(self._read(request))

    async def _read(self, request: web.Request) -> int | str:
        """The size of the body, or the code of the refusal."""
        try:
            async with self.budget.body(request, self.owner, LARGE) as body:
                await self.answered.wait()
                return len(body)
        except ApiError as error:
            return error.code

    async def send(self, count: int) -> None:
        self.stream.feed_data(bytes(count))
        await settle()

    async def end(self) -> None:
        self.stream.feed_eof()
        await settle()

    async def whole(self) -> int | str:
        """Send all at once and be answered."""
        for _ in range(self.size // MIB):
            await self.send(MIB)
        await self.end()
        self.answered.set()
        return await self.task


async def settle() -> None:
    """Let everybody run who can without time."""
    for _ in range(4):
        await asyncio.sleep(0)


def test_bodies_that_are_announced_and_come_slowly_keep_nobody_else_from_sending() -> None:
    """Six tenants that announced 64 MiB each had everybody else's large bodies refused for 94 s."""

    async def scenario() -> None:
        budget = BodyBudget()
        slow = [Sender(budget, f"slow{n}", LARGE) for n in range(12)]
        for sender in slow:
            await sender.send(1000)
        for _ in range(3):
            await asyncio.sleep(30)
            assert await Sender(budget, "honest", LARGE).whole() == LARGE
            for sender in slow:
                await sender.send(1000)
        await asyncio.sleep(5)
        assert [await sender.task for sender in slow] == ["body_timeout"] * 12
        assert budget.held_bytes == 0

    run_virtual(scenario())


def test_what_arrived_slowly_gives_way_when_the_memory_is_full_and_what_is_answered_does_not() -> None:
    async def scenario() -> None:
        budget = BodyBudget()
        answered = Sender(budget, "answered", LARGE)
        for _ in range(64):
            await answered.send(MIB)
        await answered.end()
        slow = [Sender(budget, f"slow{n}", LARGE) for n in range(5)]
        for n, sender in enumerate(slow):
            for _ in range(63 - n):
                await sender.send(MIB)
        assert budget.held_bytes == (64 + 63 + 62 + 61 + 60 + 59) * MIB
        early = Sender(budget, "early", LARGE)
        assert await early.task == "too_many_bytes_in_flight", "how fast they are is not known yet"
        await asyncio.sleep(60)
        assert await Sender(budget, "honest", LARGE).whole() == LARGE
        assert await slow[0].task == "too_many_bytes_in_flight", "it held most of those that were slow"
        assert [sender.task.done() for sender in slow] == [True, False, False, False, False]
        answered.answered.set()
        assert await answered.task == LARGE
        for sender in slow[1:]:
            sender.stream.set_exception(ConnectionResetError())
            with pytest.raises(ConnectionResetError):
                await sender.task
        assert budget.held_bytes == 0

    run_virtual(scenario())


def test_a_slow_body_that_needs_room_itself_is_the_one_that_goes() -> None:
    async def scenario() -> None:
        budget = BodyBudget(total_bytes=16 * MIB, owner_bytes=16 * MIB)
        held = Sender(budget, "a", 6 * MIB)
        await held.send(6 * MIB)
        await held.end()
        slow = Sender(budget, "b", 8 * MIB)
        await slow.send(6 * MIB)
        await asyncio.sleep(20)
        await slow.send(MIB)
        assert await slow.task == "too_many_bytes_in_flight"
        assert budget.held_bytes == 6 * MIB
        held.answered.set()
        assert await held.task == 6 * MIB

    run_virtual(scenario())


def test_one_owner_has_its_share_by_what_it_announces() -> None:
    """What it sends at one time can all arrive; beyond it is refused before a byte is read."""

    async def scenario() -> None:
        budget = BodyBudget()
        first, second = Sender(budget, "a", LARGE), Sender(budget, "a", LARGE)
        await settle()
        assert await second.task == "too_many_bytes_in_flight"
        assert await first.whole() == LARGE
        assert await Sender(budget, "a", LARGE).whole() == LARGE

    run_virtual(scenario())


def test_a_body_without_a_length_counts_as_it_comes_and_ends_at_its_limit() -> None:
    async def scenario() -> None:
        budget = BodyBudget(owner_bytes=2 * MIB)
        sender = Sender(budget, "a", 0, chunked=True)
        await sender.send(2 * MIB)
        assert budget.held_bytes == 2 * MIB
        await sender.send(1)
        assert await sender.task == "too_many_bytes_in_flight"
        endless = Sender(BodyBudget(), "a", 0, chunked=True)
        for _ in range(64):
            await endless.send(MIB)
        await endless.send(1)
        assert await endless.task == "body_too_large"
        late = Sender(budget, "a", JSON_BYTES_MAX)
        await asyncio.sleep(BODY_READ_SECONDS + JSON_BYTES_MAX / MIB + 1)
        assert await late.task == "body_timeout"
        assert budget.held_bytes == 0

    run_virtual(scenario())


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_in_whatever_order_no_more_is_held_than_may_be(seed: int) -> None:
    """And afterwards nothing is: every body ended in one way."""

    async def scenario() -> None:
        chance = Random(seed)
        budget = BodyBudget(total_bytes=32 * MIB, owner_bytes=12 * MIB)
        senders: list[Sender] = []
        for _ in range(300):
            await asyncio.sleep(chance.choice((0, 0, 0.1, 2)))
            if len(senders) < 30 and chance.random() < 0.3:
                size = chance.choice((1000, MIB, 8 * MIB))
                senders.append(Sender(budget, f"t{chance.randrange(6)}", size, chance.random() < 0.3))
            for sender in chance.sample(senders, min(len(senders), 3)):
                if not sender.stream.is_eof():
                    left = sender.size - sender.stream.total_bytes
                    await sender.send(min(left, chance.choice((100, MIB)))) if left else await sender.end()
                elif chance.random() < 0.5:
                    sender.answered.set()
            assert budget.held_bytes <= budget.total_bytes
            for sender in [each for each in senders if each.task.done()]:
                senders.remove(sender)
                assert await sender.task in (sender.size, "too_many_bytes_in_flight", "body_timeout")
        for sender in senders:
            sender.task.cancel()
        await asyncio.gather(*(sender.task for sender in senders), return_exceptions=True)
        assert (budget.held_bytes, budget._promised, budget._arriving) == (0, {}, {})

    run_virtual(scenario())
