"""Lists in pages: how many rows an answer has, and where the next one goes on.

Covers: the page as it is answered, cursors, cutting a sorted list, and the words of it in the OpenAPI
document. Does not cover: what is in a list or who may see it; a route filters first and pages then.

A cursor says after which row to go on, by what the list is sorted by, and not by count: rows that come or go
between two pages are neither shown twice nor make others vanish. It carries a digest of the list that it was
made for, so one that belongs to another list, another filter or another tenant's view is refused. It is no
secret and needs no seal: who makes one up goes on somewhere else in a list that they may see anyway.
"""

from __future__ import annotations

import base64
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import msgspec
from aiohttp import web

from control.operations import Given
from control.routes.access import whole_number
from packer.types import MIB, BadValue

T = TypeVar("T")
R = TypeVar("R")

PAGE_ROWS_DEFAULT = 100
# Rows of one answer: a person's list in one request, and no more work than some 10 ms of the event loop.
PAGE_ROWS_MAX = 1_000
# A version with 256 files is 60 KB of JSON; a page of such ends early.
PAGE_BYTES_MAX = 4 * MIB
# Ours are below 400: a digest and a few names.
CURSOR_CHARS_MAX = 1_024
_SCOPE_BYTES = 8
# Of a list's query what says where in it a page begins and ends, and not what is in the list.
_NO_FILTERS = frozenset({"limit", "cursor", "after"})

Position = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows of a list. `next_cursor` is null on the last page."""

    items: Sequence[T]
    next_cursor: str | None


Cursor = Annotated[str, msgspec.Meta(max_length=CURSOR_CHARS_MAX)]
PAGED = (
    Given(
        "limit",
        Annotated[int, msgspec.Meta(ge=1, le=PAGE_ROWS_MAX)],
        f"Greatest number of rows, {PAGE_ROWS_DEFAULT} when it is not given; a page may have fewer.",
    ),
    Given("cursor", Cursor, "`next_cursor` of the page before; the same filters must be given again."),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """Which rows of which list a request wants."""

    scope: bytes
    limit: int
    after: Position | None

    def cursor(self, position: Position) -> str:
        """What to give back to go on after the row at ``position``."""
        text = msgspec.json.encode(position)
        return base64.urlsafe_b64encode(self.scope + text).decode().rstrip("=")


def asked_page(request: web.Request, seen_by: str | None, parts: int) -> Asked:
    """Read ``limit`` and ``cursor``. ``seen_by``: the tenant that the list is limited to; ``parts``: how many
    texts a position of this list has. Raises ``BadValue``."""
    limit = whole_number(request, "limit", PAGE_ROWS_DEFAULT, PAGE_ROWS_MAX, least=1)
    resource = request.match_info.route.resource
    filters = sorted((name, text) for name, text in request.query.items() if name not in _NO_FILTERS)
    place = resource.canonical if resource is not None else ""
    view = [place, *request.match_info.values(), seen_by or "", *(text for each in filters for text in each)]
    scope = hashlib.sha256(msgspec.json.encode(view)).digest()[:_SCOPE_BYTES]
    text = request.query.get("cursor")
    after = _read_cursor(text, scope, parts) if text is not None else None
    return Asked(scope, limit, after)


def _read_cursor(text: str, scope: bytes, parts: int) -> Position:
    wrong = BadValue("cursor", "is not one that this list gave; leave it out to start at the first page")
    if len(text) > CURSOR_CHARS_MAX or not text.isascii():
        raise wrong
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        if data[:_SCOPE_BYTES] != scope:
            raise wrong
        position = msgspec.json.decode(data[_SCOPE_BYTES:], type=Position)
    except (ValueError, msgspec.MsgspecError):
        raise wrong from None
    if len(position) != parts:
        raise wrong
    return position


def page_of(
    asked: Asked, rows: Sequence[R], position: Callable[[R], Position], show: Callable[[R], T]
) -> Page[T]:
    """The asked ones of ``rows``, sorted by ``position``; ``show`` makes of one what is answered."""
    first = bisect_right(rows, asked.after, key=position) if asked.after is not None else 0
    shown: list[T] = []
    nbytes = 0
    for row in rows[first : first + asked.limit]:
        each = show(row)
        nbytes += len(msgspec.json.encode(each))
        if shown and nbytes > PAGE_BYTES_MAX:
            break
        shown.append(each)
    last = first + len(shown)
    more = asked.cursor(position(rows[last - 1])) if 0 < last < len(rows) else None
    return Page(shown, more)


def falling(number: int) -> str:
    """A part of a position for what is sorted from large to small: times, newest first."""
    return f"{2**63 - number:020d}"
