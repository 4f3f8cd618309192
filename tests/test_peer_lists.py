"""Lists of peers: told whole once, then by what changed, and never taken when they do not follow.

Covers: the changes over random histories with nodes that miss some, bounds, and plans of earlier releases.
Does not cover: beats (``test_uplink``) or who is a peer (``test_peers``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer import peer_lists
from packer.peer_lists import LISTS_FOLLOWED_MAX, KnownPeers, PeerChange, PeerLists, changed, list_sha256
from packer.wire import WIRE_VERSION, PeerSpec, Plan

LISTS = st.lists(
    st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), min_size=1, max_size=12
)


def peers_of(names: dict[str, str]) -> tuple[PeerSpec, ...]:
    return tuple(PeerSpec(name, key) for name, key in sorted(names.items()))


def plan_with(change: PeerChange) -> Plan:
    plan = Plan(WIRE_VERSION, "c", "n", 1, 1, (), (), ())
    return replace(
        plan,
        peers=change.peers,
        peers_base=change.base,
        peers_gone=change.gone,
        peers_sha256=change.result,
    )


@given(LISTS, st.data())
def test_whoever_missed_some_changes_ends_with_the_same_list(
    lists: list[dict[str, str]], data: st.DataObject
) -> None:
    control, nodes = PeerLists(), [KnownPeers() for _ in range(3)]
    for names in lists:
        peers = peers_of(names)
        control.take(peers)
        for node in nodes:
            if data.draw(st.booleans()):
                plan = node.complete(plan_with(control.change_from(node.known)))
                assert plan is not None
                assert (plan.peers, plan.peers_base, plan.peers_gone) == (peers, "", ())


def test_only_what_changed_is_told() -> None:
    control = PeerLists()
    first = peers_of({f"n{number:03}": "k" for number in range(200)})
    control.take(first)
    known = control.change_from("")
    assert known.peers == first
    control.take((*first[:50], *first[51:-1], PeerSpec("n199", "other"), PeerSpec("n200", "k")))
    change = control.change_from(known.result)
    assert [peer.node for peer in change.peers] == ["n199", "n200"]
    assert change.gone == ("n050",)
    assert control.change_from(change.result) == PeerChange(change.result, (), (), change.result)
    assert control.change_from("nonsense").base == ""


def test_answers_to_two_beats_that_were_sent_together_both_follow() -> None:
    """The second says what changed from the list that the node had when it sent the beat."""
    control, node = PeerLists(), KnownPeers()
    control.take(peers_of({"a": "x"}))
    assert node.complete(plan_with(control.change_from(node.known))) is not None
    sent_with = node.known
    for number in range(3):
        newest = peers_of({"a": "x", "b": str(number)})
        control.take(newest)
        plan = node.complete(plan_with(control.change_from(sent_with)))
        assert plan is not None
        assert plan.peers == newest
        assert node.known == list_sha256(newest)


def test_a_node_follows_from_few_lists() -> None:
    control, node = PeerLists(), KnownPeers()
    control.take(peers_of({"a": "first"}))
    node.complete(plan_with(control.change_from("")))
    first = node.known
    for number in range(LISTS_FOLLOWED_MAX):
        control.take(peers_of({"a": str(number)}))
        assert node.complete(plan_with(control.change_from(node.known))) is not None
    assert node.complete(plan_with(control.change_from(first))) is None
    assert node.known == ""


def test_lists_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_lists, "LISTS_KEPT_MAX", 3)
    control = PeerLists()
    known = []
    for number in range(6):
        control.take(peers_of({"a": str(number)}))
        known.append(control.change_from("").result)
    assert [bool(control.change_from(each).base) for each in known] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": "elsewhere"},
        {"gone": ("a", "b")},
        {"peers": (PeerSpec("a", "forged"),)},
        {"result": "0" * 64},
    ],
)
def test_a_change_that_does_not_follow_is_refused_and_the_next_comes_whole(wrong: dict[str, object]) -> None:
    control, node = PeerLists(), KnownPeers()
    control.take(peers_of({"a": "x", "b": "y"}))
    assert node.complete(plan_with(control.change_from(""))) is not None
    control.take(peers_of({"a": "x", "b": "z"}))
    good = control.change_from(node.known)
    assert node.complete(plan_with(replace(good, **wrong))) is None  # type: ignore[arg-type]
    assert node.known == ""
    plan = node.complete(plan_with(control.change_from(node.known)))
    assert plan is not None
    assert plan.peers == peers_of({"a": "x", "b": "z"})


def test_a_control_of_an_earlier_release_sends_whole_lists() -> None:
    node, peers = KnownPeers(), peers_of({"b": "y", "a": "x"})
    plan = node.complete(Plan(WIRE_VERSION, "c", "n", 1, 1, (), (), (), peers=peers[::-1]))
    assert plan is not None
    assert plan.peers == peers[::-1]
    assert node.known == list_sha256(peers[::-1])
    assert changed((), PeerChange("", peers, (), list_sha256(peers))) == peers
