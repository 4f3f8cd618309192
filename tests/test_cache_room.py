"""Texts start and stop within the room that there is for what was read, and all get to their end.

Covers: the deciding alone. Does not cover: passes (``test_decoding``), or requests (``test_text_turns``).
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from agent.cache_room import GROWTH_TOKENS, Places, Row, plan

ROOM = 400


@dataclass
class Simulated:
    prompt: int
    most: int
    request: int = 0
    written: int = 0
    held: int = 0
    starts: int = 0

    @property
    def row(self) -> Row:
        return Row(self.held, self.prompt + self.written, self.most - self.written)


def cost(texts: list[Simulated], joined: bool) -> int:
    held = [text.held for text in texts]
    return len(held) * max(held, default=0) if joined else sum(held)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 100), st.integers(1, 3)), min_size=1, max_size=6),
    st.integers(1, 6),
    st.booleans(),
)
def test_all_texts_end_and_no_more_is_held_than_there_is_room(
    asked: list[tuple[int, int, int]], rows_max: int, joined: bool
) -> None:
    texts = [
        Simulated(prompt, most, request)
        for request, (prompt, most, choices) in enumerate(asked)
        for _ in range(choices)
    ]
    passes = 0
    keeping: dict[int, int] = {}  # prompts of requests, oldest first
    while texts:
        passes += 1
        assert passes < 50_000
        oldest = texts[0]
        keeping = dict(sorted(keeping.items()))
        places = plan([text.row for text in texts], ROOM, rows_max, joined, list(keeping.values()))
        keeping = dict(list(keeping.items())[: places.kept])
        for place in places.stopping:
            texts[place].held = 0
        running = [texts[place] for place in places.running]
        assert len(running) <= rows_max
        assert oldest in running or (not running and places.starting == 0)
        if places.starting is not None:
            started = texts[places.starting]
            started.held, started.starts = started.prompt, started.starts + 1
            started.written = max(started.written, 1)
            to_come = any(not text.written for text in texts if text.request == started.request)
            if not to_come:
                keeping.pop(started.request, None)
            elif places.keeps:
                keeping[started.request] = started.prompt
        else:
            for text in running:
                text.held += 1
                text.written += text.held == text.prompt + text.written
        texts = [text for text in texts if text.written < text.most]
        now = [text for text in texts if text.held]
        assert (len(now) <= 1 and not keeping) or cost(now, joined) + sum(keeping.values()) <= ROOM


def test_a_text_of_the_greatest_length_runs_alone() -> None:
    assert plan([Row(0, ROOM, 0), Row(0, 1, 1)], ROOM, 8, joined=False) == Places((), starting=0)
    assert plan([Row(ROOM, ROOM, 0), Row(0, 1, 1)], ROOM, 8, joined=False) == Places((0,))


def test_who_starts_has_room_to_grow() -> None:
    half = (ROOM - GROWTH_TOKENS) // 2
    assert plan([Row(10, 10, 500), Row(0, half, 500)], ROOM, 8, joined=False).starting is None
    assert plan([Row(10, 10, 500), Row(0, 20, 500)], ROOM, 8, joined=False).starting == 1
    assert plan([Row(10, 10, 0), Row(0, ROOM - 10, 0)], ROOM, 8, joined=False).starting == 1


def test_the_youngest_stops_when_all_have_grown() -> None:
    rows = [Row(150, 150, 50), Row(150, 150, 50), Row(100, 100, 50)]
    assert plan(rows, ROOM, 8, joined=False) == Places((0, 1), (2,))
    assert plan(rows, 4 * ROOM, 8, joined=True) == Places((0, 1, 2))


def test_a_short_text_does_not_pass_a_long_one_that_waits() -> None:
    """Else a flow of short ones would keep it waiting for ever."""
    rows = [Row(200, 200, 100), Row(0, 250, 10), Row(0, 5, 5)]
    assert plan(rows, ROOM, 8, joined=False) == Places((0,))


def test_a_prompt_is_kept_for_other_choices_only_where_there_is_room_for_two() -> None:
    assert plan([Row(0, 150, 50)] * 2, ROOM, 8, joined=False).keeps
    assert not plan([Row(0, 201, 50)] * 2, ROOM, 8, joined=False).keeps
    assert not plan([Row(0, 150, 101)] * 2, ROOM, 8, joined=False).keeps


def test_a_kept_prompt_goes_before_a_text_stops() -> None:
    rows = [Row(150, 150, 50), Row(120, 120, 50), Row(0, 120, 50)]
    assert plan(rows, ROOM, 8, joined=False, kept=[100, 28]) == Places((0, 1), kept=2)
    assert plan(rows, ROOM, 8, joined=False, kept=[100, 29]) == Places((0, 1), kept=1)


def test_kept_prompts_go_before_a_text_that_is_alone_outgrows_the_room() -> None:
    assert plan([Row(0, 300, 9)], ROOM, 8, joined=False, kept=[60, 60]) == Places((), starting=0, kept=1)
    assert plan([Row(399, 399, 1)], ROOM, 8, joined=False, kept=[1]) == Places((0,), kept=0)
