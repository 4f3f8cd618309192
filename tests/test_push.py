"""What the uplink does when control takes a beat badly, on a clock that jumps; and the bound of a message.

Covers: records that control did not take, a push that failed, growing pauses, and that nothing above the
limit is decoded. Does not cover: joining and plans over real sockets (``test_uplink``), or histories of
faults (``test_cluster_simulation``).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from running_control import empty_report
from running_uplinks import OwnersUsage
from virtual_clock import VirtualLoop, run_virtual

from agent.uplink import Uplink
from packer import wire
from packer.control_answers import Answer
from packer.wire import (
    NO_PLAN,
    BadMessage,
    Beat,
    BeatAnswer,
    BoxFacts,
    PlanNumber,
    Record,
    Report,
    decode,
    encode,
)


@dataclass(slots=True)
class Owner:
    records: list[Record] = field(default_factory=lambda: [Record(7, 1, "restored", "acme", "acme/m", "")])
    spool_id: str = "a spool"
    usage: OwnersUsage = field(default_factory=OwnersUsage)

    def report(self) -> Report:
        return empty_report("http://127.0.0.1:9")

    def have_plan(self) -> PlanNumber:
        return NO_PLAN

    async def spooled(self, limit: int) -> tuple[Record, ...]:
        return tuple(self.records)

    async def acknowledge(self, acked_seq: int) -> None:
        self.records = [record for record in self.records if record.seq > acked_seq]


class Scripted(Uplink):
    """Control's answers to pushes, one after the other; None: it breaks off."""

    def __init__(self, owner: Owner, acked: list[int | None]) -> None:
        identity = SimpleNamespace(
            answer=SimpleNamespace(node="box"), now_s=lambda: 1.0, ca_sha256="", box=BoxFacts()
        )
        super().__init__(cast(Any, owner), cast(Any, identity), "", "box", None)
        self.acked = acked
        self.at_s: list[float] = []

    async def _post(self, path: str, message: object, timeout_s: float, connect_s: float) -> Answer:
        assert isinstance(message, Beat)
        self.at_s.append(asyncio.get_running_loop().time())
        acked = self.acked.pop(0)
        if acked is None:
            raise aiohttp.ServerDisconnectedError
        return Answer(200, encode(BeatAnswer(wire.WIRE_VERSION, None, acked)))


def pushed(monkeypatch: pytest.MonkeyPatch, acked: list[int | None]) -> tuple[Owner, list[float]]:
    """Push until nothing is left to say; what is left with the node, and when it spoke."""
    monkeypatch.setattr("packer.joining.jitter", lambda: 1.0)
    owner = Owner()

    async def push() -> list[float]:
        assert isinstance(asyncio.get_running_loop(), VirtualLoop)
        uplink = Scripted(owner, acked)
        uplink._online.set()
        uplink.changed()
        task = asyncio.create_task(uplink._push())
        await asyncio.sleep(120)
        task.cancel()
        return uplink.at_s

    return owner, run_virtual(push())


@pytest.mark.parametrize("answer", [0, None], ids=["not-taken", "broken-off"])
def test_what_control_did_not_take_is_brought_again_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch, answer: int | None
) -> None:
    """Nothing else changes meanwhile. It was five times a second, with all records each time; found by
    reading what ``cluster_simulation`` drives."""
    owner, at_s = pushed(monkeypatch, [answer] * 4 + [7])
    assert owner.records == []
    assert len(at_s) == 5
    pauses = [after - before for before, after in pairwise(at_s)]
    assert all(after > before for before, after in pairwise(pauses))


@pytest.mark.parametrize("ahead", [-1, 1])
def test_a_message_of_another_release_is_refused_with_the_way_out(ahead: int) -> None:
    body = encode(BeatAnswer(wire.WIRE_VERSION + ahead, None, 1))
    with pytest.raises(BadMessage, match="this side speaks 1: upgrade the older"):
        decode(body, BeatAnswer)


def test_nothing_above_the_limit_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encode(BeatAnswer(wire.WIRE_VERSION, None, 1))
    monkeypatch.setattr(wire, "MESSAGE_BYTES_MAX", len(body))
    assert decode(body, BeatAnswer).acked_seq == 1
    monkeypatch.setattr(wire, "MESSAGE_BYTES_MAX", len(body) - 1)
    with pytest.raises(BadMessage, match="above the limit"):
        decode(body, BeatAnswer)
