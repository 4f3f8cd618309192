"""Which inputs share a pass: never passed over, never too many, never much padding, never late.

Covers: the deciding alone, on a clock that the test moves. Does not cover: passes (``test_compute``).
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.batching import PADDING_PARTS, Item, choose, due_ms, window
from packer.types import ALONE, Batching

TOKENS_MAX = 64
LATER_MS = 1e9  # whatever is waited for is over


def items(*tokens: int, arrived_ms: float = 0.0) -> list[Item]:
    return [Item(count, arrived_ms) for count in tokens]


@given(
    st.lists(st.integers(1, 2 * TOKENS_MAX), min_size=1, max_size=40),
    st.integers(1, 32),
)
def test_every_pass_keeps_to_its_bounds_and_takes_the_oldest(lengths: list[int], inputs_max: int) -> None:
    chosen = choose(items(*lengths), Batching(inputs_max), TOKENS_MAX, LATER_MS)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) <= inputs_max
    taken = [lengths[place] for place in chosen]
    padded = max(taken) * len(taken)
    assert len(taken) == 1 or padded <= TOKENS_MAX
    assert (padded - sum(taken)) * PADDING_PARTS <= padded


@given(st.lists(st.integers(1, 2 * TOKENS_MAX), min_size=1, max_size=40), st.integers(1, 32))
def test_all_are_computed_once_in_as_many_passes_as_there_are_inputs(
    lengths: list[int], inputs_max: int
) -> None:
    waiting = list(enumerate(lengths))
    done: list[int] = []
    while waiting:
        offered = waiting[: window(Batching(inputs_max))]
        chosen = choose(items(*(n for _, n in offered)), Batching(inputs_max), TOKENS_MAX, 0.0)
        done += [offered[place][0] for place in chosen]
        waiting = [each for place, each in enumerate(waiting) if place not in chosen]
    assert sorted(done) == list(range(len(lengths)))


def test_alone_is_alone() -> None:
    assert choose(items(5, 5, 5), ALONE, TOKENS_MAX, 0.0) == (0,)
    assert window(ALONE) == 1


def test_what_is_nearest_in_length_is_joined() -> None:
    assert choose(items(10, 40, 11, 9, 10), Batching(3), TOKENS_MAX, 0.0) == (0, 4, 2)


def test_without_a_delay_what_waits_is_joined_and_nothing_is_waited_for() -> None:
    assert choose(items(8, 8), Batching(32), TOKENS_MAX, 0.0) == (0, 1)


def test_the_oldest_waits_no_longer_than_the_delay() -> None:
    batching = Batching(32, delay_ms=5)
    waiting = [Item(8, 100.0), Item(8, 104.0)]
    assert due_ms(waiting[0], batching) == 105.0
    assert choose(waiting, batching, TOKENS_MAX, 104.9) == ()
    assert choose(waiting, batching, TOKENS_MAX, 105.0) == (0, 1)


def test_a_full_pass_does_not_wait() -> None:
    by_inputs, by_tokens = Batching(2, delay_ms=5), Batching(32, delay_ms=5)
    assert choose(items(8, 8), by_inputs, TOKENS_MAX, 0.0) == (0, 1)
    assert choose(items(40), by_tokens, TOKENS_MAX, 0.0) == (0,)
    assert choose(items(200), by_tokens, TOKENS_MAX, 0.0) == (0,)
