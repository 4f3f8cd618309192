"""Telling a box that was started again from a second box with the same identity. Pure.

A process names its life at random and says it with every beat. Of two lives of one node, which may be a
restart or a copy, nothing follows: what the first one sent last may even arrive after the second's first
word. So every answer carries a number that rises with each new life, and beats repeat the newest that they
were told. A life that was there before another began, and repeats a number that was given out after that, was
alive on both sides of the other's beginning: they run at the same time, with one key.

Covers: that proof, and when only one is left. Does not cover: what follows from it (``control.cluster``,
``control.routes.nodes``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Of two boxes with one identity, when one was not heard for so long, it is gone.
CLONE_MEMORY_MS = 300_000
# Lives of one node that are remembered; the one heard the longest ago goes first.
LIVES_MAX = 8


@dataclass(slots=True)
class Life:
    """``began``: the turn that its first beat was."""

    began: int
    heard_ms: int


@dataclass(slots=True)
class Lives:
    """The lives of one node since control started. ``turn`` counts them."""

    turn: int = 0
    known: dict[str, Life] = field(default_factory=dict)


def hear(lives: Lives, name: str, told: int, now_ms: int) -> str | None:
    """A beat of the life ``name``, which was told the turn ``told`` (0: none). The name of another life that
    certainly runs at the same time, if there is one."""
    life = lives.known.get(name)
    if life is None:
        lives.turn += 1
        lives.known[name] = Life(lives.turn, now_ms)
        if len(lives.known) > LIVES_MAX:
            del lives.known[min(lives.known, key=lambda each: lives.known[each].heard_ms)]
        return None
    life.heard_ms = now_ms
    for other, theirs in lives.known.items():
        if life.began < theirs.began <= told:
            return other
    return None


def alone(lives: Lives, now_ms: int) -> bool:
    """Whether no two of them were heard lately."""
    return sum(now_ms - life.heard_ms < CLONE_MEMORY_MS for life in lives.known.values()) < 2
