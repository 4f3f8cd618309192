"""Plans that are not control's present wish for this very node: nothing of them may come into force.

Covers: another cluster's, another node's, one of an earlier epoch, an old or replayed number, one that comes
too late, and answers to another beat, at the node's edge and where plans are kept. Does not cover: who may
answer at all (``test_join``: TLS), or control's numbers (``test_cluster``, ``test_control_recovers``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from running_control import PATIENCE_S
from running_peers import Site
from running_uplinks import Owner, beating

from agent.counters import Counters
from agent.journal import open_journal
from agent.journal_thread import JournalThread
from agent.keeper import Keeper
from agent.uplink import Uplink
from packer.control_answers import Answer
from packer.identity import Identity
from packer.wire import WIRE_VERSION, Beat, BeatAnswer, Plan, encode

HOUR_MS = 3_600_000
NOW_MS = 1_800_000_000_000
GOOD = Plan(WIRE_VERSION, "c1", "box", 3, 7, (), (), (), start="s", expires_ms=NOW_MS + HOUR_MS)


# --- at the edge ----------------------------------------------------------------------------------

Make = Callable[[Beat], BeatAnswer]


def answer(beat: Beat, plan: Plan | None = GOOD, now_ms: int = NOW_MS) -> BeatAnswer:
    return BeatAnswer(WIRE_VERSION, plan, 0, now_ms=now_ms, life=beat.life, number=beat.number)


@dataclass
class ScriptedUplink(Uplink):
    """The real one; what control answers is written down, the rest is silence."""

    owner: Owner
    folder: Path
    script: list[Make]
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        identity = Identity(self.folder / "box")
        Site(self.folder).certify(identity, "box")
        super().__init__(self.owner, identity, "https://127.0.0.1:9", "box", None)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        yield

    async def _post(self, path: str, message: object, timeout_s: float, connect_s: float) -> Answer:
        if not isinstance(message, Beat) or not self.script:
            self.asked.set()
            await asyncio.Event().wait()
        assert isinstance(message, Beat)
        return Answer(200, encode(self.script.pop(0)(message)))


async def taken(folder: Path, *script: Make) -> Plan | None:
    """What is in force after these answers."""
    uplink = ScriptedUplink(Owner(), folder, list(script))
    async with beating(uplink):
        async with asyncio.timeout(PATIENCE_S):
            await uplink.asked.wait()
    return uplink.owner.plan


async def test_the_right_plan_is_taken(tmp_path: Path) -> None:
    assert await taken(tmp_path, answer) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": "c2"},
        {"cluster": ""},
        {"node": "other"},
        {"node": "box2"},
        {"expires_ms": NOW_MS},
        {"expires_ms": NOW_MS - HOUR_MS},
        {"expires_ms": 1},
    ],
    ids=str,
)
async def test_a_plan_for_others_or_of_the_past_is_not(tmp_path: Path, change: dict[str, object]) -> None:
    wrong = replace(GOOD, **change)  # type: ignore[arg-type]
    assert await taken(tmp_path, lambda beat: answer(beat, wrong)) is None


@pytest.mark.parametrize("change", [{"number": 99}, {"life": "another"}], ids=str)
async def test_an_answer_to_another_beat_is_not_listened_to(
    tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to its plan, and not to what it says of records either."""
    monkeypatch.setattr("agent.uplink.RETRY_FIRST_S", 0.0)
    silence = replace(GOOD, seq=8)
    found = await taken(
        tmp_path,
        lambda beat: replace(answer(beat, silence), **change),  # type: ignore[arg-type]
        answer,
    )
    assert found == GOOD


async def test_an_answer_that_comes_again_does_not_set_the_clock_back(tmp_path: Path) -> None:
    """A whole answer of long ago, with the time of long ago in it: its plan has expired all the same."""
    older = replace(GOOD, seq=6, expires_ms=NOW_MS - HOUR_MS)
    found = await taken(
        tmp_path,
        lambda beat: answer(beat, None),
        lambda beat: answer(beat, older, NOW_MS - 2 * HOUR_MS),
    )
    assert found is None


async def test_the_nodes_own_clock_does_not_matter(tmp_path: Path) -> None:
    """Control's time is in its answers: a box that is days off takes plans like any other."""
    far_ms = NOW_MS - 400 * 24 * HOUR_MS
    plan = replace(GOOD, expires_ms=far_ms + HOUR_MS)
    assert await taken(tmp_path, lambda beat: answer(beat, plan, far_ms)) == plan


async def test_after_control_set_its_clock_back_one_plan_is_lost_and_no_more(tmp_path: Path) -> None:
    def back(beat: Beat) -> BeatAnswer:
        return answer(beat, GOOD)

    found = await taken(tmp_path, lambda beat: answer(beat, None, NOW_MS + 9 * HOUR_MS), back, back)
    assert found == GOOD


# --- where plans are kept -------------------------------------------------------------------------


@dataclass(slots=True)
class Kept:
    keeper: Keeper
    applied: list[tuple[int, int]]

    async def accept(self, *plans: Plan) -> list[tuple[int, int]]:
        for plan in plans:
            await self.keeper.accept(plan)
        return self.applied


@asynccontextmanager
async def keeping(folder: Path) -> AsyncIterator[Kept]:
    applied: list[tuple[int, int]] = []

    async def settle(plan: Plan) -> None:
        pass

    thread = JournalThread(open_journal(folder))
    keeper = Keeper(
        thread, Counters(), lambda: NOW_MS, lambda plan: applied.append((plan.epoch, plan.seq)), settle
    )
    await keeper.take_up()
    try:
        yield Kept(keeper, applied)
    finally:
        thread.close()


@pytest.mark.parametrize(
    ("change", "comes"),
    [
        ({"seq": 6}, False),
        ({"seq": 7}, False),
        ({"seq": 8}, True),
        ({"epoch": 2, "seq": 99}, False),
        ({"epoch": 4, "seq": 1}, True),
        ({"start": "another"}, False),
    ],
    ids=str,
)
async def test_only_a_higher_number_comes_into_force(
    tmp_path: Path, change: dict[str, object], comes: bool
) -> None:
    """And stays so over a restart, when the same plans come again."""
    other = replace(GOOD, **change)  # type: ignore[arg-type]
    async with keeping(tmp_path) as kept:
        expected = [(3, 7), (other.epoch, other.seq)] if comes else [(3, 7)]
        assert await kept.accept(GOOD, other, GOOD) == expected
    async with keeping(tmp_path) as kept:
        assert await kept.accept(GOOD, other) == expected[-1:]


async def test_a_plan_in_force_stays_however_old_it_is(tmp_path: Path) -> None:
    """Static stability: expiry is of plans on their way."""
    async with keeping(tmp_path) as kept:
        await kept.accept(replace(GOOD, expires_ms=1))
    async with keeping(tmp_path) as kept:
        assert kept.applied == [(3, 7)]


async def test_another_clusters_number_says_nothing(tmp_path: Path) -> None:
    """A node that joined another cluster takes that one's first plan, and has none of it before."""
    async with keeping(tmp_path) as kept:
        await kept.accept(GOOD)
        assert kept.keeper.number_in("c1") == GOOD.number
        assert kept.keeper.number_in("c2").epoch == 0
        assert await kept.accept(replace(GOOD, cluster="c2", epoch=1, seq=1)) == [(3, 7), (1, 1)]
