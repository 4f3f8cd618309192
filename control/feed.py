"""What routers are told, as one numbered list of things that are so. Pure.

Covers: the newest word about each thing (a key, a version, a node), the number of its last change, and what
somebody who has heard up to a number must still hear, in pieces. Does not cover: what is told
(``control.feed_desk``), or its way (``control.routes.routers``).

No log of changes is kept: of a thing that changed a hundred times only the last word is sent. What takes
memory is what is so, and a bounded number of things that are no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from packer.types import MIB

# Things that are no more, and are remembered for whoever has not heard so. Beyond it the oldest are
# forgotten, and who has heard less than that begins anew.
GONE_MAX = 10_000
# Words in one piece, by their bytes: what is held twice while it is sent. At least one word is.
PIECE_BYTES_MAX = 4 * MIB


@dataclass(frozen=True, slots=True)
class Word:
    """``text``: what is so, encoded; None: there is no such thing any more."""

    name: str
    text: bytes | None
    number: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What follows on ``base``; 0: forget everything, this begins anew. ``number``: what whoever took it has.
    ``more``: it is to be used only with what follows."""

    base: int
    number: int
    words: tuple[Word, ...]
    more: bool


@dataclass(slots=True)
class Feed:
    """Both in the order of their numbers."""

    number: int = 0
    told: dict[str, Word] = field(default_factory=dict)
    gone: dict[str, Word] = field(default_factory=dict)
    floor: int = 0  # the number of the newest word that is forgotten


def put(feed: Feed, name: str, text: bytes) -> bool:
    """It is so from now on; False when it was before."""
    known = feed.told.get(name)
    if known is not None and known.text == text:
        return False
    feed.told.pop(name, None)
    feed.gone.pop(name, None)
    feed.number += 1
    feed.told[name] = Word(name, text, feed.number)
    return True


def drop(feed: Feed, name: str) -> bool:
    """There is no such thing from now on; False when there was none."""
    if feed.told.pop(name, None) is None:
        return False
    feed.number += 1
    feed.gone[name] = Word(name, None, feed.number)
    if len(feed.gone) > GONE_MAX:
        oldest = next(iter(feed.gone))
        feed.floor = feed.gone.pop(oldest).number
    return True


def forget(feed: Feed) -> None:
    """Nobody listens. Numbers are not counted again: whoever comes begins anew."""
    feed.number += 1
    feed.floor = feed.number
    feed.told.clear()
    feed.gone.clear()


def since(feed: Feed, have: int) -> Piece:
    """What somebody must hear who has heard up to the number ``have`` (0: nothing)."""
    base = have if feed.floor <= have <= feed.number else 0
    words = _newer(feed.told, base)
    if base:
        words = sorted([*words, *_newer(feed.gone, base)], key=lambda word: word.number)
    size = 0
    for at, word in enumerate(words):
        size += len(word.name) + len(word.text or b"")
        if at and size > PIECE_BYTES_MAX:
            return Piece(base, words[at - 1].number, tuple(words[:at]), True)
    return Piece(base, feed.number, tuple(words), False)


def _newer(words: dict[str, Word], base: int) -> list[Word]:
    """Costs what there is, not what there was."""
    found = []
    for word in reversed(words.values()):
        if word.number <= base:
            break
        found.append(word)
    found.reverse()
    return found


class FeedBroken(AssertionError):
    """The numbers of the feed do not agree: a bug."""


def check(feed: Feed) -> None:
    for words in (feed.told, feed.gone):
        numbers = [word.number for word in words.values()]
        if numbers != sorted(set(numbers)) or (numbers and numbers[-1] > feed.number):
            raise FeedBroken(f"numbers out of order: {numbers}, the newest is {feed.number}")
    if feed.told.keys() & feed.gone.keys():
        raise FeedBroken("something is both told and gone")
    if any(word.number <= feed.floor for word in feed.gone.values()) or len(feed.gone) > GONE_MAX:
        raise FeedBroken("things that are no more are forgotten in the wrong order")
