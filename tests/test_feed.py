"""What routers are told: numbered words in pieces, and what a router makes of them.

Covers: that whoever hears the pieces in order knows what is so, however many answers are lost, things are no
more, or control is started again; which answers do not count; that a router orders nodes as control does,
also one that was started again. Does not cover: the way there (``test_router_process``).
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import msgspec
import pytest
from running_control import empty_report, model_report

from control import choosing, feed
from control import cluster as fleet
from control.catalog import Catalog, Change, DropModel, KeyRow, NodeRow, PutKey, PutModel, PutNode
from control.feed_desk import FeedDesk
from control.router_view import RouterView, StaleAnswer
from control.router_wire import NO_MORE, RouterAnswer, Told
from packer.types import ModelRef, ModelSpec, Task
from packer.wire import WIRE_VERSION, BadMessage

SEEDS = 60
NOW_MS = 1_000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a few words meet."""
    monkeypatch.setattr(feed, "GONE_MAX", 3)
    monkeypatch.setattr(feed, "PIECE_BYTES_MAX", 24)


def test_whoever_hears_the_pieces_knows_what_is_so() -> None:
    """Also who heard nothing for long, or lost the place; and nobody is sent a word for nothing."""
    anew = cut = 0
    for seed in range(SEEDS):
        chance, told = random.Random(seed), feed.Feed()
        truth: dict[str, bytes] = {}
        known: list[tuple[int, dict[str, bytes]]] = [(0, {}), (0, {}), (0, {})]
        for _ in range(120):
            name, text = f"key/{chance.randrange(8)}", f"{chance.randrange(3)}".encode()
            if chance.random() < 0.4:
                assert feed.drop(told, name) == (truth.pop(name, None) is not None)
            else:
                assert feed.put(told, name, text) == (truth.get(name) != text)
                truth[name] = text
            if chance.random() < 0.02:
                feed.forget(told)
                for name, text in truth.items():
                    feed.put(told, name, text)
            feed.check(told)
            who = chance.randrange(6)
            if who < len(known):
                have, mine = known[who]
                piece = feed.since(told, have)
                anew, cut = anew + (have > 0 and not piece.base), cut + piece.more
                known[who] = (piece.number, heard(mine, piece))
        for have, mine in known:
            while (piece := feed.since(told, have)).words or piece.base != have:
                have, mine = piece.number, heard(mine, piece)
            assert mine == truth
    assert anew > 10
    assert cut > 10


def heard(mine: dict[str, bytes], piece: feed.Piece) -> dict[str, bytes]:
    mine = dict(mine) if piece.base else {}
    for word in piece.words:
        if word.text is None:
            mine.pop(word.name, None)
        else:
            mine[word.name] = word.text
    return mine


# --- the desk ------------------------------------------------------------------------------------


async def test_a_poll_that_outlives_the_last_router_keeps_nothing(site: Site) -> None:
    """It was waiting when its router was removed, and is answered because of that."""
    waiting = asyncio.create_task(site.desk.piece(site.view.have, 60_000, lambda: True))
    await asyncio.sleep(0)
    site.desk.shut()
    site.desk.wake()
    assert (await waiting).words == ()
    assert not site.desk._open
    site.node("late")
    assert not site.desk._stale
    again = await site.desk.piece(0, 0, lambda: True)  # of another router, that joined since
    assert again.words


def test_what_came_and_went_while_nobody_listened_is_forgotten(site: Site) -> None:
    """A router is away for a month; a tenant that pushes and deletes meanwhile fills no memory."""
    for number in range(1_000):
        ref = replace(REF, version=f"{number:016x}")
        changes: tuple[Change, ...] = (PutModel(replace(SPEC, ref=ref)), DropModel(ref))
        for change in changes:
            site.catalog.apply(change, 2)
            site.desk.note([change])
    assert len(site.desk._stale) <= 1
    site.catalog.apply(DropModel(REF), 3)
    site.desk.note([DropModel(REF)])
    site.tell()
    assert not site.theirs.models


# --- a router's view ------------------------------------------------------------------------------

REF = ModelRef("acme", "m", "0" * 16)
SPEC = ModelSpec(REF, "control:", (), "transformers", Task.EMBEDDING, 8, (8,), 1, 0)


class Site:
    """A control reduced to what is told, and a router that hears it."""

    def __init__(self) -> None:
        self.catalog, self.cluster = Catalog(), fleet.Cluster()
        self.desk = FeedDesk(lambda: self.catalog, self.cluster, lambda: NOW_MS)
        self.start, self.epoch, self.seq, self.ask = "one", 1, 1, 0
        self.theirs, self.routed = Catalog(), fleet.Cluster()
        self.view = RouterView(self.theirs, self.routed, lambda: NOW_MS)

    def restart(self, epoch: int) -> None:
        """A control that was started again: it knows its rows, and heard of no node yet."""
        self.cluster = fleet.Cluster(newest=(epoch, self.seq))
        self.start, self.epoch = f"start {epoch}", epoch
        self.desk = FeedDesk(lambda: self.catalog, self.cluster, lambda: NOW_MS)
        for node in self.catalog.nodes.values():
            fleet.step(self.cluster, fleet.NodeJoined(node.node, node.gateway_url), NOW_MS)

    def node(self, name: str, state: str = "resident", **changes: object) -> None:
        row = NodeRow(name, name, f"key of {name}", f"http://{name}:1", 0)
        if name not in self.catalog.nodes:
            self.catalog.apply(PutNode(row), self.seq)
            fleet.step(self.cluster, fleet.NodeJoined(name, row.gateway_url), NOW_MS)
        models = (model_report(str(REF), state, disk_bytes=5, leases=3, requests=9, restore_ms_estimate=70),)
        report = empty_report(row.gateway_url, models, **changes)
        fleet.step(self.cluster, fleet.NodeBeat(name, report, self.epoch, self.seq, False), NOW_MS)
        self.desk.note_node(name)

    def answer(self) -> RouterAnswer:
        self.desk.settle(1_000_000)
        have = self.view.have if self.view.start == self.start else 0
        piece = feed.since(self.desk._feed, have)
        words = tuple(Told(w.name, msgspec.Raw(w.text) if w.text else NO_MORE) for w in piece.words)
        numbers = (piece.base, piece.number, piece.more)
        return RouterAnswer(WIRE_VERSION, "cluster", self.start, self.epoch, self.seq, "", 0, *numbers, words)

    def restart_router(self) -> None:
        """It knows what it kept, and nothing else."""
        kept = self.view.snapshot()
        self.theirs, self.routed = Catalog(), fleet.Cluster()
        self.view = RouterView(self.theirs, self.routed, lambda: NOW_MS)
        self.view.take_kept(tuple(kept.words()), kept.epoch, kept.seq, age_ms=7)

    def tell(self) -> None:
        while (answer := self.answer()).words or answer.base != self.view.have:
            self.view.take(answer)

    def order(self, cluster: fleet.Cluster) -> list[str]:
        return list(choosing.choose_node(cluster, REF, 8, NOW_MS))


@pytest.fixture
def site() -> Site:
    made = Site()
    fleet.step(made.cluster, fleet.Changed(1, 1), NOW_MS)
    made.catalog.apply(PutKey(KeyRow("k1", "hash", "acme", "label", 5, None)), 1)
    made.catalog.apply(PutKey(KeyRow("op", "hash", None, "operator", 5, None)), 1)
    made.catalog.apply(PutModel(SPEC), 1)
    made.node("far", "absent")
    made.node("near")
    made.node("gone", draining=True)
    made.tell()
    return made


def test_a_router_orders_nodes_as_control_does(site: Site) -> None:
    assert site.order(site.routed) == site.order(site.cluster) == ["near", "far"]
    assert list(site.theirs.keys) == ["k1"]
    assert site.theirs.models == {REF: replace(SPEC, origin="", chunk_bytes=())}
    assert site.theirs.key_seq == {"k1": 1}
    assert fleet.knows(site.routed, "near", 1)
    assert site.routed.nodes["near"].load_said == 3
    fleet.check(site.routed)


def test_only_what_changed_is_told_again(site: Site) -> None:
    assert site.answer().words == ()
    site.node("near")
    assert site.answer().words == ()
    site.node("near", draining=True)
    assert [word.name for word in site.answer().words] == ["node/near"]
    site.tell()
    assert site.order(site.routed) == ["far"]


def test_control_alone_says_that_a_node_is_silent(site: Site) -> None:
    """A router that hears nothing any more, for days, routes on."""
    later_ms = NOW_MS + 1_000 * fleet.SILENT_AFTER_MS
    for now_ms in (later_ms, 2 * later_ms):
        assert fleet.step(site.routed, fleet.Ticked(), now_ms) == []
    assert site.order(site.routed) == ["near", "far"]
    fleet.step(site.cluster, fleet.Ticked(), later_ms)
    site.desk.note_node("near")
    site.tell()
    assert site.order(site.routed) == ["far"]


def test_a_control_that_was_started_again_takes_nothing_back(site: Site) -> None:
    """It has heard no node yet; what nodes had counts on until it has, and a plan of before is one of its."""
    site.restart(epoch=2)
    site.tell()
    assert (site.view.start, site.view.epoch) == ("start 2", 2)
    assert site.order(site.routed) == ["near", "far"]
    assert fleet.knows(site.routed, "near", 1)
    site.node("far")
    site.tell()
    assert set(site.order(site.routed)) == {"near", "far"}
    fleet.check(site.routed)


def test_what_control_does_not_name_any_more_is_gone(site: Site) -> None:
    """After its place was lost a router hears everything anew, and forgets what is not among it."""
    site.catalog = Catalog()
    site.restart(epoch=3)
    site.tell()
    assert not site.theirs.keys
    assert not site.theirs.models
    assert not site.theirs.nodes
    assert not site.routed.nodes


def test_answers_that_do_not_follow_change_nothing(site: Site) -> None:
    have, at = site.view.have, (site.view.start, site.view.epoch)
    right = replace(site.answer(), base=have, number=have + 1, words=(Told("key/k1", NO_MORE),))
    for wrong in (
        replace(right, epoch=0),
        replace(right, start="another"),
        replace(right, base=have - 1),
        replace(right, base=have + 1),
        replace(right, number=have - 1),
    ):
        with pytest.raises(StaleAnswer):
            site.view.take(wrong)
        assert (site.view.have, site.view.start, site.view.epoch) == (have, *at)
    assert list(site.theirs.keys) == ["k1"]
    site.view.take(replace(right, epoch=2))  # a control that overtook what its nodes had seen
    assert not site.theirs.keys


def test_pieces_count_when_all_of_them_are_there(site: Site) -> None:
    """A router never goes by half of a change; what broke off is asked for again from the start."""
    have = site.view.have
    first = replace(site.answer(), base=have, number=have + 1, more=True, words=(Told("key/k1", NO_MORE),))
    site.view.take(first)
    assert list(site.theirs.keys) == ["k1"]
    assert not site.view.is_whole
    site.view.lose_pieces()
    assert site.view.have == 0
    site.tell()
    assert list(site.theirs.keys) == ["k1"]


def test_a_word_that_can_not_be_read_costs_the_answer(site: Site) -> None:
    have = site.view.have
    words = (Told("key/k1", NO_MORE), Told("node/near", msgspec.Raw(b'{"key_sha256": 5}')))
    with pytest.raises(BadMessage):
        site.view.take(replace(site.answer(), base=have, number=have + 2, words=words))
    assert list(site.theirs.keys) == ["k1"]
    assert site.view.have == 0
    unknown = (Told("moon/1", msgspec.Raw(b'"of a later release"')),)
    site.tell()
    have = site.view.have
    site.view.take(replace(site.answer(), base=have, number=have + 1, words=unknown))
    assert site.view.is_whole


def test_a_node_at_an_address_that_nobody_serves_is_not_dialled(site: Site) -> None:
    text = b"".join(w.text or b"" for w in site.desk._feed.told.values() if w.name == "node/near")
    bad = text.replace(b"http://near:1", b"http://169.254.169.254:80")
    have = site.view.have
    word = (Told("node/near", msgspec.Raw(bad)),)
    site.view.take(replace(site.answer(), base=have, number=have + 1, words=word))
    assert site.routed.nodes["near"].gateway_url == ""
    assert site.order(site.routed) == ["far"]


# --- a router that is started again ---------------------------------------------------------------


def test_what_a_router_keeps_is_what_control_told_it(site: Site) -> None:
    """Word for word: so nothing is taken up twice when control tells all of it again."""
    told = {word.name: word.text for word in site.desk._feed.told.values()}
    assert {word.name: bytes(word.text) for word in site.view.snapshot().words()} == told


def test_a_router_that_was_started_again_goes_by_what_it_kept(site: Site) -> None:
    before, keys, models = site.view, site.theirs.keys, site.theirs.models
    site.restart_router()
    assert (site.view.is_ready, site.view.is_kept, site.view.is_whole) == (True, True, True)
    assert (site.view.epoch, site.view.whole_ms) == (before.epoch, NOW_MS - 7)
    assert (site.view.have, site.view.start) == (0, "")  # all of it is asked for again
    assert (site.theirs.keys, site.theirs.models) == (keys, models)
    assert (site.theirs.key_seq, site.theirs.model_seq) == ({"k1": 1}, {REF: 1})
    assert site.theirs.latest == site.catalog.latest
    assert site.order(site.routed) == ["near", "far"]
    assert fleet.knows(site.routed, "near", 1)
    assert site.routed.nodes["near"].load_said == 3
    fleet.check(site.routed)


def test_control_has_the_last_word_over_what_was_kept(site: Site) -> None:
    """A key, a model and a node that are no more go with control's first answer."""
    site.restart_router()
    site.catalog = Catalog()
    site.restart(epoch=2)
    site.node("new")
    site.tell()
    assert (site.view.is_kept, site.view.epoch) == (False, 2)
    assert (list(site.theirs.keys), list(site.theirs.models)) == ([], [])
    assert list(site.routed.nodes) == ["new"]


def test_a_router_that_was_started_again_hears_no_older_control(site: Site) -> None:
    """As if it had not been stopped: a backup that was put back must overtake it first."""
    site.restart(epoch=4)
    site.tell()
    site.restart_router()
    site.restart(epoch=3)
    with pytest.raises(StaleAnswer):
        site.tell()
    assert list(site.theirs.keys) == ["k1"]


def test_what_a_new_control_had_not_said_yet_is_kept_as_the_one_before_said_it(site: Site) -> None:
    site.restart(epoch=2)
    site.tell()
    site.restart_router()
    assert site.order(site.routed) == ["near", "far"]
    assert fleet.knows(site.routed, "near", 1)
    site.tell()  # control still has not heard them
    assert site.order(site.routed) == ["near", "far"]


def test_words_that_can_not_be_read_are_not_taken_up_in_part(site: Site) -> None:
    words = (*site.view.snapshot().words(), Told("key/k2", msgspec.Raw(b'{"tenant": 5}')))
    view = RouterView(catalog := Catalog(), fleet.Cluster(), lambda: NOW_MS)
    with pytest.raises(BadMessage):
        view.take_kept(words, 1, 1, 0)
    assert (view.is_ready, catalog.keys, catalog.models) == (False, {}, {})
