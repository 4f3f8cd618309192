"""The batching bench: its texts, its rounds, and what a run of it says.

Covers: everything but a whole run, which takes a stack and minutes. Does not cover: figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import bench_batching
import pytest
from bench_batching import ALONE, PLAIN, SHARED, Site, sentences


def quiet(line: str) -> None:
    pass


def test_texts_are_the_same_in_every_run_and_of_many_lengths() -> None:
    assert sentences(50, 1) == sentences(50, 1) != sentences(50, 2)
    assert {len(text.split()) for text in sentences(500, 1)} == set(range(4, 25))


def test_every_case_has_its_rounds_in_changing_order_after_one_to_warm_up() -> None:
    asked: list[str] = []

    def case(name: str) -> Callable[[], float]:
        def run() -> float:
            asked.append(name)
            return float(len(asked))

        return run

    runs = bench_batching.interleaved({name: case(name) for name in "abc"}, 4, "letters", quiet)
    assert {name: len(found) for name, found in runs.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(asked) == 15
    assert len({tuple(asked[at : at + 3]) for at in range(0, 15, 3)}) > 1


@dataclass
class Timed:
    """In place of a site: so many seconds for all texts, whoever asks."""

    seconds: dict[str, float]
    encoder: str = ""
    asked: list[tuple[str, int]] = field(default_factory=list)

    def embed(self, name: str, texts: Sequence[str], callers: int) -> float:
        self.asked.append((name, callers))
        return self.seconds[name]

    def write(self, name: str, prompts: Sequence[str], tokens: int, callers: int) -> tuple[float, int]:
        self.asked.append((name, callers))
        return self.seconds[name] * (8 if callers == 1 else 1), tokens * len(prompts)


def test_goals_are_ratios_of_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = type("Answer", (), {"answer_ms": 4000.0})
    monkeypatch.setattr(bench_batching, "ask_fresh_process", lambda *words: answer)
    site = Timed({"alone": 2.0, "shared": 1.0})
    section = bench_batching.embeddings(cast(Site, site), 1, 64, quiet)
    assert {name: found[0] for name, found in section.runs.items()} == {ALONE: 32, SHARED: 64, PLAIN: 16}
    assert [goal.value for goal in section.judgements] == [2.0, 4.0]
    assert set(site.asked) == {("alone", 32), ("shared", 32)}


def test_texts_are_counted_in_tokens_that_were_written() -> None:
    site = Timed({"teller": 1.0, "choir": 0.5})
    section = bench_batching.texts(cast(Site, site), 1, 10, quiet)
    assert [found[0] for found in section.runs.values()] == [10.0, 80.0, 160.0]
    assert [goal.value for goal in section.judgements] == [16.0]
    assert set(site.asked) == {("teller", 1), ("teller", 8), ("choir", 8)}
