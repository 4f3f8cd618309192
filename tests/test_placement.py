"""Placement keeps every promise, finds the cheapest moves there are, and decides the same in any order.

Covers: packer/placement.py against sums of its own and against every plan of at most two moves, tried one
after the other. Does not cover: who asks it (``test_moving``, ``test_cluster``, ``test_bench_packing``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packer.placement import Bin, Move, Piece, Placing, Rule, Wanted, check, left_over, place

TWO = Rule()


def bins_of(draw: st.DrawFn, sites: int) -> list[Bin]:
    found = []
    for at in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 12), max_size=4))
        pieces = tuple(
            Piece(f"p{at}.{number}", nbytes, draw(st.one_of(st.none(), st.integers(0, 5).map(float))))
            for number, nbytes in enumerate(sizes)
        )
        found.append(
            Bin(
                f"b{at}",
                draw(st.integers(-2, 12)),
                pieces,
                f"s{draw(st.integers(1, sites))}",
                draw(st.integers(0, 4)),
            )
        )
    return found


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[Bin], Wanted, Rule]:
    bins = bins_of(draw, sites=2)
    wanted = Wanted(
        "w",
        draw(st.integers(1, 16)),
        draw(st.sampled_from((1, 1, 1, 2, 3))),
        draw(st.sampled_from((math.inf, math.inf, 6.0, 2.0, 0.0))),
    )
    rule = Rule(draw(st.integers(0, 2)), draw(st.sampled_from((math.inf, 20, 8))))
    return bins, wanted, rule


def every_plan(bins: list[Bin], wanted: Wanted, rule: Rule) -> Iterator[Placing]:
    """All ways to place something on one device with at most two moves, good or bad."""
    steps = [
        Move(piece.name, piece.nbytes, source.name, target.name, piece.cost)
        for source in bins
        for piece in source.pieces
        if piece.cost is not None
        for target in bins
        if target is not source
    ]
    for count in range(rule.moves_max + 1):
        for moves in combinations(steps, count):
            if len({move.piece for move in moves}) == count:
                yield from (Placing((each.name,), moves) for each in bins)


@settings(max_examples=250, deadline=None)
@given(instances())
def test_what_is_placed_keeps_every_promise(instance: tuple[list[Bin], Wanted, Rule]) -> None:
    bins, wanted, rule = instance
    placing = place(bins, wanted, rule)
    if placing is not None:
        assert list(check(bins, wanted, rule, placing)) == []


@settings(max_examples=120, deadline=None)
@given(instances())
def test_it_finds_the_cheapest_of_all_plans_and_moves_nothing_without_need(
    instance: tuple[list[Bin], Wanted, Rule],
) -> None:
    bins, wanted, rule = instance
    wanted = replace(wanted, devices=1)
    sound = [plan for plan in every_plan(bins, wanted, rule) if not list(check(bins, wanted, rule, plan))]
    placing = place(bins, wanted, rule)
    if not sound:
        assert placing is None
        return
    assert placing is not None
    still = [plan for plan in sound if not plan.moves]
    if still:
        room = {each.name: each.usable_bytes for each in bins}
        assert not placing.moves
        assert room[placing.bins[0]] == min(room[plan.bins[0]] for plan in still)
    else:
        assert placing.cost == min(plan.cost for plan in sound)


@settings(max_examples=200, deadline=None)
@given(instances(), st.randoms(use_true_random=False))
def test_the_order_of_bins_and_pieces_does_not_matter(
    instance: tuple[list[Bin], Wanted, Rule], chance: object
) -> None:
    bins, wanted, rule = instance
    turned = [replace(each, pieces=tuple(reversed(each.pieces))) for each in reversed(bins)]
    assert place(turned, wanted, rule) == place(bins, wanted, rule)
    assert left_over(turned, wanted) == left_over(bins, wanted)


@settings(max_examples=200, deadline=None)
@given(instances())
def test_without_moves_a_gang_is_placed_whenever_enough_bins_of_one_site_have_room(
    instance: tuple[list[Bin], Wanted, Rule],
) -> None:
    bins, wanted, _ = instance
    free: dict[str, int] = {}
    for each in bins:
        free[each.site] = free.get(each.site, 0) + (each.usable_bytes >= wanted.share_bytes)
    able = {site for site, count in free.items() if count >= wanted.devices}
    placing = place(bins, wanted)
    assert (placing is not None) == bool(able)
    assert set(left_over(bins, wanted)) == able
    assert placing is None or min(left_over(bins, wanted).values()) >= 0


def test_the_least_room_that_is_enough_is_taken() -> None:
    bins = [Bin("a", 50), Bin("b", 30), Bin("c", 20)]
    assert place(bins, Wanted("w", 25)) == Placing(("b",))
    assert place(bins, Wanted("w", 20, devices=2)) == Placing(("c", "b"))
    assert place(bins, Wanted("w", 25, devices=3)) is None


def test_of_two_sites_the_one_with_the_least_room_left_is_taken() -> None:
    bins = [Bin("wide", 9, site="a"), Bin("tight", 5, site="b")]
    placing = place(bins, Wanted("w", 4))
    assert placing is not None
    assert placing.bins == ("tight",)


def test_promised_bytes_are_not_room() -> None:
    assert place([Bin("a", 30, reserved_bytes=10)], Wanted("w", 25)) is None
    assert place([Bin("a", 30, reserved_bytes=5)], Wanted("w", 25)) == Placing(("a",))


def test_one_move_then_two_make_room() -> None:
    bins = [Bin("a", 30, (Piece("x", 20, 1.0),)), Bin("b", 25)]
    moved = place(bins, Wanted("w", 50), TWO)
    assert moved == Placing(("a",), (Move("x", 20, "a", "b", 1.0),))
    # The hole beside y is too small for x: y goes where x was.
    swap = [Bin("a", 30, (Piece("x", 30, 1.0),)), Bin("b", 10, (Piece("y", 20, 1.0),))]
    found = place(swap, Wanted("w", 40), TWO)
    assert found is not None
    assert {(move.piece, move.target) for move in found.moves} == {("x", "b"), ("y", "a")}
    assert place(swap, Wanted("w", 40), Rule(moves_max=1)) is None


def test_moves_must_be_worth_it_and_within_the_byte_budget() -> None:
    bins = [Bin("a", 30, (Piece("x", 20, 5.0),)), Bin("b", 25)]
    assert place(bins, Wanted("w", 50, worth=5.0), TWO) is None
    assert place(bins, Wanted("w", 50, worth=5.1), TWO) is not None
    assert place(bins, Wanted("w", 50), Rule(2, 19)) is None
    assert place(bins, Wanted("w", 50), Rule(2, 20)) is not None


def test_no_moves_put_two_shares_of_a_gang_into_one_bin() -> None:
    """Although making room once more where the first share lies would be the cheapest."""
    bins = [Bin("a", 60, (Piece("x", 45, 1.0),)), Bin("b", 20, (Piece("y", 40, 9.0),)), Bin("c", 45)]
    placing = place(bins, Wanted("w", 50, devices=2), TWO)
    assert placing is not None
    assert placing.bins == ("a", "b")


def test_the_site_with_the_cheapest_moves_is_chosen() -> None:
    bins = [
        Bin(f"{site}{name}", room, pieces, site=site)
        for site, cost in (("s", 5.0), ("t", 2.0), ("u", 3.0))
        for name, room, pieces in (("a", 30, (Piece("x", 20, cost),)), ("b", 25, ()))
    ]
    placing = place(bins, Wanted("w", 50), TWO)
    assert placing is not None
    assert (placing.bins, placing.cost) == (("ta",), 2.0)


def test_what_is_in_use_stays() -> None:
    assert place([Bin("a", 30, (Piece("x", 20),)), Bin("b", 25)], Wanted("w", 50), TWO) is None


def test_a_gang_never_takes_shares_on_two_nodes_or_only_some_of_them() -> None:
    bins = [Bin("a0", 10, site="a"), Bin("b0", 10, site="b"), Bin("b1", 3, (Piece("x", 7, 1.0),), site="b")]
    assert place(bins, Wanted("w", 10, devices=2), TWO) is None
    with_third = [*bins, Bin("b2", 8, site="b")]
    assert place(with_third, Wanted("w", 10, devices=2), TWO) == Placing(
        ("b0", "b1"), (Move("x", 7, "b1", "b2", 1.0),)
    )


@pytest.mark.parametrize(
    ("placing", "what"),
    [
        (Placing(("b",)), "over"),
        (Placing(("a",), (Move("x", 20, "a", "c", 1.0),)), "moves from"),
        (Placing(("a",), (Move("x", 19, "a", "b", 1.0),)), "not a piece"),
        (Placing(("a", "b")), "different bins"),
        (Placing(("a",), (Move("x", 20, "a", "b", 1.0),)), "worth"),
    ],
)
def test_the_check_finds_what_is_wrong(placing: Placing, what: str) -> None:
    bins = [Bin("a", 30, (Piece("x", 20, 1.0),)), Bin("b", 25), Bin("c", 30, site="other")]
    assert any(what in line for line in check(bins, Wanted("w", 50, worth=1.0), TWO, placing))
