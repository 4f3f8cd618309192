"""Restarts and copies of a node told apart: only what is certain counts.

Covers: ``control.lives`` on scripted words. Does not cover: what follows from a copy (``test_identity``), or
lost and late words in a cluster (``test_cluster_simulation``, where no restart may ever look like a copy).
"""

from __future__ import annotations

import pytest

from control.lives import CLONE_MEMORY_MS, LIVES_MAX, Lives, alone, hear


def told(lives: Lives) -> int:
    return lives.turn


def test_one_life_is_alone() -> None:
    lives = Lives()
    assert hear(lives, "a", 0, 0) is None
    assert all(hear(lives, "a", told(lives), at) is None for at in range(1, 9))
    assert alone(lives, 9)


def test_restarts_are_no_copies_however_late_the_last_words_come() -> None:
    """What the first life sent before it ended arrives again and again after the second began."""
    lives = Lives()
    hear(lives, "a", 0, 0)
    before = told(lives)
    for name in ("b", "c", "d"):
        assert hear(lives, name, 0, 1) is None
        assert hear(lives, "a", before, 2) is None
        assert hear(lives, name, told(lives), 3) is None


def test_a_life_that_goes_on_after_another_began_is_a_copy() -> None:
    lives = Lives()
    hear(lives, "a", 0, 0)
    hear(lives, "b", 0, 1)
    assert hear(lives, "a", 1, 2) is None  # sent before b began, for all that is known
    assert hear(lives, "a", told(lives), 3) == "b"


@pytest.mark.parametrize("order", ["abab", "aabb", "abba"])
def test_it_does_not_matter_who_speaks_when(order: str) -> None:
    """As long as both are answered, the elder one is caught by its next word."""
    lives = Lives()
    heard = {"a": 0, "b": 0}
    found = []
    for name in (*order, "a", "b", "a"):
        found.append(hear(lives, name, heard[name], 0))
        heard[name] = told(lives)
    assert "b" in found


def test_who_is_silent_for_long_is_gone() -> None:
    lives = Lives()
    hear(lives, "a", 0, 0)
    hear(lives, "b", 0, 10)
    assert not alone(lives, CLONE_MEMORY_MS - 1)
    assert alone(lives, CLONE_MEMORY_MS)


def test_few_lives_are_remembered() -> None:
    lives = Lives()
    for number in range(3 * LIVES_MAX):
        hear(lives, f"life {number}", 0, number)
    assert len(lives.known) == LIVES_MAX
    assert f"life {3 * LIVES_MAX - 1}" in lives.known
