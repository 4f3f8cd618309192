"""What a node has learned of uses and restores survives a restart, and nothing else gets in by that way.

Covers: ``packer/remember.py`` (ages over clocks and days, strange values), ``agent/remembering.py`` (what is
written when, in which pieces), the journal's table with its bounds, and a real agent that is killed with -9.
Does not cover: what is learned (``test_intensity``, ``test_estimate``).
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from make_models import make_classifier, make_gpt2
from real_box import CALLER, PATIENCE_S, Box
from scene import Scene, model, the

from agent import remembering
from agent.journal import JournalFailed, open_journal
from agent.remembering import Changed, RememberedNode, Remembering
from packer import intensity, remember
from packer.events import Evict, NodeRemembered, PackFound, PolicyChosen, UsesRemembered
from packer.intensity import Ranking
from packer.ledger import Node
from packer.types import ModelRef, Tier

A, B, C = (model(f"t/{name}", 40) for name in "abc")
DAY_MS = 86_400_000


def lived() -> Scene:
    """A node that has used A often and B once, lately."""
    made = Scene(A, B, C, host_mib=100)
    for _ in range(30):
        made.later(60_000).warm(A)
    made.later(60_000).warm(B)
    return made


def rate(node: Node, ref: ModelRef, now_ms: int) -> float:
    return Ranking(node.shared, now_ms).uses_per_ms(node.models[ref].reuse)


def restarted(before: Scene, ago_ms: int = 0, clock_ms: int = 5_000) -> Scene:
    """A new node with a new clock that was told what the other one knew."""
    after = Scene(A, B, C, host_mib=100)
    after.now_ms = clock_ms
    after.feed(replace(remember.of_node(before.node, before.now_ms), ago_ms=ago_ms))
    for spec in (A, B):
        found = remember.of_model(before.node.models[spec.ref], before.now_ms)
        after.feed(replace(found, ago_ms=ago_ms))
    return after


@pytest.mark.parametrize("ago_ms", [0, 90_000, 3 * DAY_MS])
def test_rates_after_a_restart_are_those_of_a_node_that_ran_on(ago_ms: int) -> None:
    before = lived()
    after = restarted(before, ago_ms)
    for spec in (A, B):
        ran_on = rate(before.node, spec.ref, before.now_ms + ago_ms)
        assert math.isclose(rate(after.node, spec.ref, after.now_ms), ran_on, rel_tol=1e-6)
    # Three days later the burst is forgotten and the habit is not.
    if ago_ms == 3 * DAY_MS:
        assert rate(after.node, A.ref, after.now_ms) < rate(before.node, A.ref, before.now_ms) / 10
        assert rate(after.node, A.ref, after.now_ms) > rate(after.node, B.ref, after.now_ms)


def test_a_clock_that_was_set_back_or_far_ahead_breaks_nothing() -> None:
    before = lived()
    for ago_ms in (-(10**15), 10**18):
        after = restarted(before, ago_ms)
        found = rate(after.node, A.ref, after.now_ms)
        assert 0.0 < found < 1.0
        after.warm(A)
        assert rate(after.node, A.ref, after.now_ms) > found
    back = restarted(before, -DAY_MS)
    assert math.isclose(
        rate(back.node, A.ref, back.now_ms), rate(before.node, A.ref, before.now_ms), rel_tol=1e-6
    )


def test_restores_are_expected_to_take_what_they_took_before() -> None:
    before = lived()
    after = restarted(before)
    assert before.node.models[A.ref].history.samples
    assert after.node.models[A.ref].history.samples == before.node.models[A.ref].history.samples
    assert after.node.learned.fixed_ms == before.node.learned.fixed_ms
    assert after.node.learned.factors == before.node.learned.factors


def test_what_was_measured_against_other_rates_is_not_taken_up() -> None:
    before = lived()
    found = remember.of_node(before.node, before.now_ms)
    after = Scene(A)
    after.node.learned.rates = replace(after.node.learned.rates, measured_ms=77)
    after.feed(found)
    assert not after.node.learned.fixed_ms
    assert after.node.shared.uses == before.node.shared.uses + before.node.shared.pending


def test_the_first_victim_after_a_restart_is_what_the_past_says() -> None:
    after = restarted(lived())
    after.settle(after.later(1_000).ask(B))
    after.settle(after.finish(after.requests))
    after.settle(after.later(1_000).ask(A))
    after.settle(after.finish(after.requests))
    # By this life alone A and B were used once each, B before; A's past speaks for it.
    assert the(after.settle(after.later(1_000).ask(C)), Evict).ref == B.ref


def test_packs_found_under_lru_are_as_old_as_their_last_use() -> None:
    before = lived()
    after = Scene(A, B, C)
    after.feed(PolicyChosen("lru"))
    for spec in (A, B):
        after.feed(remember.of_model(before.node.models[spec.ref], before.now_ms))
        after.feed(PackFound(spec.ref, 5, 5))
    assert after.node.chosen is not None
    value = after.node.chosen.values(Tier.DISK, after.now_ms)
    assert value(A.ref) < value(B.ref) <= 0
    assert value(C.ref) == -math.inf


def test_a_model_that_was_used_since_the_start_knows_better() -> None:
    before = lived()
    after = Scene(A)
    after.warm(A)
    after.feed(remember.of_model(before.node.models[A.ref], before.now_ms))
    assert after.node.models[A.ref].reuse.uses == 1
    uses = after.node.shared.pending + after.node.shared.uses
    after.feed(remember.of_node(before.node, before.now_ms))
    assert after.node.shared.pending + after.node.shared.uses == uses


GOOD = tuple(intensity.encode(lived().node.models[A.ref].reuse))
SHAPE = '{"tier":"disk","image_bytes":1,"stored_bytes":1,"mix":{}}'
SAMPLE = '{"disk":[{"shape":' + SHAPE + ',"moved_share":%s,"restore_ms":%s}]}'


@pytest.mark.parametrize(
    ("uses", "restores"),
    [
        ((), "{}"),
        (GOOD, "{}"),  # uses to come: times of another clock, not ages
        ((1.0,) * 28, "{}"),
        ((1.0, -5.0, -1.0, float("nan"), *(0.0,) * 24), "{}"),
        ((1.0, -5.0, -1.0, *(0.0,) * 25), "no json"),
        ((1.0, -5.0, -1.0, *(0.0,) * 25), '{"tape": []}'),
        ((1.0, -5.0, -1.0, *(0.0,) * 25), SAMPLE % ("2.0", "5")),
        ((1.0, -5.0, -1.0, *(0.0,) * 25), SAMPLE % ("1.0", "0")),
        ((1.0, -5.0, -1.0, *(0.0,) * 25), "{" + " " * remember.RESTORES_CHARS_MAX + "}"),
    ],
)
def test_what_nobody_here_wrote_is_ignored(uses: tuple[float, ...], restores: str) -> None:
    made = Scene(A)
    found = UsesRemembered(A.ref, uses, restores, 0)
    assert not remember.readable(found)
    made.feed(found)
    assert made.node.models[A.ref].reuse.uses == 0
    node = NodeRemembered(uses, restores, 0)
    assert not remember.readable(node)
    made.feed(node)
    assert made.node.shared.uses == 0


def test_a_model_that_the_plan_does_not_name_is_ignored() -> None:
    made = Scene(A)
    found = remember.of_model(lived().node.models[B.ref], 0)
    assert made.feed(found) == []
    assert B.ref not in made.node.models


# --- the journal ----------------------------------------------------------------------------------


def changed(made: Scene, *refs: ModelRef, used_ms: int = 1) -> Changed:
    rows = tuple(
        remembering.RememberedRow(remember.of_model(made.node.models[ref], made.now_ms), 100, used_ms)
        for ref in refs
    )
    node = RememberedNode(remember.of_node(made.node, made.now_ms), 100)
    return Changed(rows, tuple(made.node.models), node)


def test_the_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    made = lived()
    journal = open_journal(tmp_path)
    given = changed(made, A.ref, B.ref)
    journal.save_remembered(given)
    again = open_journal(tmp_path)
    assert tuple(again.remembered()) == given.rows
    assert again.remembered_node() == given.node


def test_models_that_left_and_tenants_that_left_are_forgotten(tmp_path: Path) -> None:
    made = lived()
    journal = open_journal(tmp_path)
    journal.save_remembered(changed(made, A.ref, B.ref))
    journal.save_remembered(replace(changed(made), known=(B.ref,)))
    assert [row.uses.ref for row in journal.remembered()] == [B.ref]
    journal.seal_new_key(B.ref)  # the tenant is known here
    journal.shred_tenants([])
    assert journal.remembered() == []


def test_the_longest_unused_are_forgotten_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent import journal as journal_module

    monkeypatch.setattr(journal_module, "REMEMBERED_MAX", 1)
    made = lived()
    journal = open_journal(tmp_path)
    old, new = changed(made, A.ref, used_ms=5), changed(made, B.ref, used_ms=6)
    journal.save_remembered(replace(old, rows=old.rows + new.rows))
    assert [row.uses.ref for row in journal.remembered()] == [B.ref]


def test_rows_of_nobody_are_left_out_and_the_others_are_read(tmp_path: Path) -> None:
    made = lived()
    open_journal(tmp_path).save_remembered(changed(made, A.ref))
    spoil(tmp_path / "journal.db")
    journal = open_journal(tmp_path)
    assert [row.uses.ref for row in journal.remembered()] == [A.ref]
    assert journal.remembered_node() is None


def spoil(path: Path) -> None:
    connection = sqlite3.connect(path)
    insert = (
        "insert into remembered (ref, tenant, uses, restores, at_ms, used_ms) values (?, 't', ?, ?, ?, 0)"
    )
    for row in [
        ("nonsense", "[1.0]", "{}", 0),
        (str(B.ref), "[1.0]", "{}", 0),
        (str(C.ref), None, None, None),
        (f"t/d@{1:016x}", b"\x00\xff", "{}", "late"),
    ]:
        connection.execute(insert, row)
    connection.execute("insert or replace into meta (key, value) values ('remembered', '[1, \"x\"]')")
    connection.commit()
    connection.close()


# --- when it is written ---------------------------------------------------------------------------


class Saved:
    """Takes what is to be written, or fails as a full disk does."""

    def __init__(self) -> None:
        self.times: list[list[str]] = []
        self.full = False

    async def __call__(self, given: Changed) -> None:
        if self.full:
            raise JournalFailed("no space left")
        self.times.append([row.uses.ref.name for row in given.rows])


def test_only_what_changed_is_written_once_a_period_and_again_after_a_failure() -> None:
    made = lived()
    saved = Saved()
    keeper = Remembering(None, (), lambda: made.node, lambda: made.now_ms, lambda: 10**9)

    async def keep() -> None:
        await keeper.keep(saved)
        assert saved.times == []  # before the first plan what is stored must stay
        assert keeper.planned() == []
        await keeper.keep(saved)
        assert saved.times == []  # not yet time
        made.later(60_000)
        await keeper.keep(saved)
        made.later(60_000)
        await keeper.keep(saved)
        made.later(60_000).warm(B)
        saved.full = True
        with pytest.raises(JournalFailed):
            await keeper.keep(saved)
        saved.full = False
        made.later(60_000)
        await keeper.keep(saved)
        await keeper.keep(saved, at_once=True)

    asyncio.run(keep())
    assert saved.times == [["a", "b"], ["b"]]


def test_a_write_is_bounded_and_the_end_writes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembering, "ROWS_PER_TIME", 1)
    made = lived()
    made.later(1_000).warm(C)
    saved = Saved()
    keeper = Remembering(None, (), lambda: made.node, lambda: made.now_ms, lambda: 10**9)
    keeper.planned()

    async def keep() -> None:
        made.later(60_000)
        await keeper.keep(saved)
        await keeper.keep(saved, at_once=True)

    asyncio.run(keep())
    assert saved.times == [["a"], ["b"], ["c"]]


def test_ages_are_by_the_wall_clock_and_a_clock_set_back_counts_as_no_time() -> None:
    made = lived()
    given = changed(made, A.ref)
    for wall_ms, ago_ms in ((100 + DAY_MS, DAY_MS), (7, 0)):
        keeper = Remembering(given.node, given.rows, lambda: made.node, lambda: 0, lambda at=wall_ms: at)
        found = keeper.planned()
        assert [event.ago_ms for event in found] == [ago_ms, ago_ms]  # type: ignore[union-attr]
        assert keeper.planned() == []


# --- a real agent ---------------------------------------------------------------------------------


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    make_gpt2(tmp_path / "gen", 1, hidden=64, layers=2, heads=2)
    make_classifier(tmp_path / "judge", 7)
    box = Box(tmp_path / "box", ("cpu:48MiB",), agent_module="tests.hasty_agent")
    try:
        box.start_control()
        box.start_agent()
        box.add_tenant("acme")
        for name in ("gen", "judge"):
            box.tenant("acme").push(f"acme/{name}", tmp_path / name)
        box.wait_planned(2)
        yield box
    finally:
        box.close()


def known_uses(box: Box) -> dict[str, float]:
    """What the journal says how often each model was used, read beside the agent."""
    connection = sqlite3.connect(box.folder / "agent" / "journal.db", timeout=PATIENCE_S)
    try:
        rows = connection.execute("select ref, json_extract(uses, '$[0]') from remembered").fetchall()
    finally:
        connection.close()
    return {ref.split("@")[0]: uses for ref, uses in rows if uses is not None}


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_an_agent_killed_with_9_knows_its_models_again(box: Box) -> None:
    complete(box, 3)
    assert box.agent is not None
    box.agent.until(lambda: known_uses(box).get("acme/gen") == 3.0)
    box.agent.kill()
    spoil(box.folder / "agent" / "journal.db")
    box.agent_module = "agent"  # which keeps nothing for a minute, but at its end
    box.start_agent(wait=r"uses of 1 versions are known from before")
    box.agent.wait_for("connected to control")
    complete(box, 1)
    assert box.agent.stop() == 0
    assert known_uses(box) == {"acme/gen": 4.0}


def complete(box: Box, times: int) -> None:

    for _ in range(times):
        answer = CALLER.post(
            f"{box.gateway_url}/v1/completions",
            headers={"Authorization": f"Bearer {box.keys['acme']}"},
            json={"model": "acme/gen", "prompt": "the bunk", "max_tokens": 2, "temperature": 0},
            timeout=PATIENCE_S,
        )
        assert answer.status_code == 200, answer.text
