"""Nodes that lie about shares of tenants' limits, and whoever else may try to take them.

Covers: a node that claims more than it was given, gives back what is not its, speaks for another node, or
sends what no node may send; a tenant that calls everywhere at once; a node that was removed. Does not cover:
who may call the route at all (``test_control_auth``), or honest faults (``test_shares``).
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest
from running_control import FakeNode, Running, running

from packer.shares import NOTHING, WHOLE, Lags, Share, TenantShare
from packer.wire import WIRE_VERSION, SharesAnswer, SharesAsk, decode, encode

PATH = "/node/v1/shares"


class Speaker:
    """A node's side of the exchange, with whatever it likes to say."""

    def __init__(self, node: FakeNode, folder: Path) -> None:
        self.node, self.folder = node, folder
        self.session, self.number = "", 0

    async def raw(self, message: SharesAsk) -> tuple[int, bytes]:
        answer = await self.node.call("POST", PATH, BytesIO(encode(message)), folder=self.folder)
        return answer.status, answer.body

    async def say(self, shares: Sequence[TenantShare], rest: Share = NOTHING, **more: bool) -> SharesAnswer:
        while True:
            self.number += 1
            ask = SharesAsk(WIRE_VERSION, self.session, self.number, rest, tuple(shares), **more)
            status, body = await self.raw(ask)
            assert status == 200, body
            answer = decode(body, SharesAnswer)
            if answer.session == self.session:
                return answer
            self.session = answer.session


def wants(share: Share = NOTHING, want: Share = WHOLE, tenant: str = "acme") -> TenantShare:
    return TenantShare(tenant, share, want=want)


def of(answer: SharesAnswer, tenant: str = "acme") -> float:
    return sum(float(each.share.value) for each in answer.shares if each.tenant == tenant)


async def speakers(control: Running, folder: Path, *names: str) -> list[Speaker]:
    await control.tenant("acme")
    changed = await control.call("PATCH", "/api/v1/tenants/acme/quota", {"requests_per_minute": 600})
    assert changed.status == 200
    return [Speaker(await control.join(name), folder) for name in names]


async def test_a_node_that_claims_everything_takes_nothing_from_others(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        honest, liar = await speakers(control, tmp_path, "honest", "liar")
        has = Share(1, 2)
        assert of(await honest.say([wants(want=has)])) == 0.5
        assert of(await liar.say([wants(WHOLE)], WHOLE, lasting=True, divided=True)) == 0.5
        assert of(await liar.say([wants(WHOLE)], WHOLE, lasting=True, divided=True)) == 0.5
        assert of(await honest.say([wants(has, want=has)])) == 0.5
        book = control.server.control.shares.book
        assert sum(float(held.value) for held in book.tenants["acme"].held.values()) <= 1


async def test_a_node_that_wants_everything_leaves_others_their_part(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        greedy, other = await speakers(control, tmp_path, "greedy", "other")
        assert of(await greedy.say([wants()])) == 1
        assert of(await other.say([wants(want=Share(1, 4))])) == 0, "until the other has given it up"
        assert of(await greedy.say([wants(WHOLE)])) == 0.75
        assert of(await greedy.say([wants(Share(48, 64))])) == 0.75
        assert of(await other.say([wants(want=Share(1, 4))])) == 0.25


async def test_a_node_that_gives_nothing_back_keeps_no_more_than_it_was_given(tmp_path: Path) -> None:
    """It can keep a share from others (and serve with it); an operator removes it."""
    async with running(tmp_path / "control") as control:
        miser, other = await speakers(control, tmp_path, "miser", "other")
        assert of(await miser.say([wants()])) == 1
        for _ in range(3):
            assert of(await other.say([wants()])) == 0
            await miser.say([wants(WHOLE)])
        assert (await control.call("DELETE", "/api/v1/nodes/miser")).status == 204
        assert (await miser.raw(SharesAsk(WIRE_VERSION, miser.session, 99, WHOLE)))[0] in (401, 403)
        answer = await other.say([wants()])
        assert answer.rest == WHOLE, "the other one is alone now"
        assert answer.shares[0].lags.requests_ms > 9_000, "and what the miser took of it is not forgotten"


async def test_an_old_word_that_is_sent_again_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        node, other = await speakers(control, tmp_path, "node", "other")
        await node.say([wants()])
        replayed = SharesAsk(WIRE_VERSION, node.session, node.number, NOTHING, (wants(),))
        await node.say([wants(WHOLE)])
        assert (await node.raw(replayed))[0] == 200
        assert of(await other.say([wants()])) == 0, "it said that it had nothing, but that was before"


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (SharesAsk(1, "", 1, Share(2, 1)), "share"),
        (SharesAsk(1, "", 1, Share(-1, 1)), "share"),
        (SharesAsk(1, "", 1, Share(0, 0)), "share"),
        (SharesAsk(1, "", 1, Share(1, 10**30)), "share"),
        (SharesAsk(1, "", 1, NOTHING, (wants(Share(65, 65)),)), "share"),
        (SharesAsk(1, "", 1, NOTHING, (wants(want=Share(9, 8)),)), "share"),
        (SharesAsk(1, "", -1, NOTHING), "numbers"),
        (SharesAsk(1, "", 1, NOTHING, wait_ms=-5), "numbers"),
        (SharesAsk(1, "s" * 65, 1, NOTHING), "session"),
        (SharesAsk(1, "", 1, NOTHING, (wants(), wants())), "twice"),
        (SharesAsk(1, "", 1, WHOLE, (TenantShare("t" * 65, WHOLE),)), "tenant"),
        (SharesAsk(1, "", 1, NOTHING, tuple(wants(tenant=f"t{i}") for i in range(20_001))), "at most"),
        (SharesAsk(7, "", 1, NOTHING), "version"),
    ],
)
async def test_what_no_node_says_is_refused_by_name(tmp_path: Path, ask: SharesAsk, field: str) -> None:
    async with running(tmp_path / "control") as control:
        (node,) = await speakers(control, tmp_path, "node")
        status, body = await node.raw(ask)
        assert status == 400
        assert field in body.decode()
        assert not control.server.control.shares.book.tenants


async def test_tenants_that_do_not_exist_leave_no_trace(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        node, _ = await speakers(control, tmp_path, "node", "other")
        answer = await node.say([wants(tenant=f"t{i}") for i in range(1_000)])
        assert answer.shares == ()
        assert not control.server.control.shares.book.tenants


async def test_a_body_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        (node,) = await speakers(control, tmp_path, "node")
        answer = await node.node.call("POST", PATH, BytesIO(bytes(8 * 2**20 + 1)), folder=tmp_path)
        assert answer.status == 413


async def test_tenants_that_a_node_makes_up_are_in_no_book(tmp_path: Path) -> None:
    """One that was alone had the whole of everybody's limits; now each word names nobody, as if it had
    given some of each back, with debts for ever."""
    async with running(tmp_path / "control") as control:
        (liar,) = await speakers(control, tmp_path, "liar")
        await liar.say([])
        book = control.server.control.shares.book
        for turn in range(3):
            names = [f"nobody-{turn}-{number}" for number in range(200)]
            debts = Lags(*[2**52] * 4)
            made_up = [TenantShare(name, Share(1, 64), debts) for name in names]
            await liar.say([*made_up, wants()], rest=WHOLE)
            if not turn:
                await control.join("second")
        assert not [name for name in book.tenants if name.startswith("nobody")]
