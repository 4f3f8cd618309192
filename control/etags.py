"""ETags of single things: what a caller saw, so that it changes or deletes what it saw and nothing newer.

Covers: the tag of a thing, ``If-None-Match`` on reading and ``If-Match`` on changing it. Does not cover:
lists, which have none, or what a thing's state is (each route says).

A tag has two parts. The first is made of what can be set or replaced, the second of the whole answer, with
what nodes report and other things count. A change asks for the first alone, else nobody could change a quota
while its tenant works; a read asks for both, so that 304 is said of nothing that looks different.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from control.operations import Given, Where
from packer.http import ApiError, json_response
from packer.types import BadValue

_TAG = re.compile(r'(W/)?"([!#-~]*)"')
_LIST = re.compile(r'\s*(?:W/)?"[!#-~]*"\s*(?:,\s*(?:W/)?"[!#-~]*"\s*)*')
_DIGEST_CHARS = 16
_TagText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^(\*|{_LIST.pattern})$"})]

IF_MATCH = Given(
    "If-Match",
    _TagText,
    "Only when the thing is still as it was when this ETag was given; `*`: only when there is one.",
    Where.HEADER,
)
IF_NONE_MATCH = Given(
    "If-None-Match",
    _TagText,
    "Answer 304 when the thing still looks as when this ETag was given.",
    Where.HEADER,
)
TAGGED = {"ETag": "Of the thing as it is now."}
CHANGED = {412: "The thing is no longer as `If-Match` says; ETag says how it is."}
SAME_TEXT = "It still looks as the ETag says."


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]


def tag(state: object, shown: object) -> str:
    """The ETag of a thing: of its ``state``, and of what is ``shown`` of it."""
    return f'"{_digest(msgspec.json.encode(state))}.{_digest(msgspec.json.encode(shown))}"'


def tagged(state: object, shown: object, status: int = 200) -> web.Response:
    """An answer with the thing and its tag."""
    answer = json_response(shown, status)
    answer.headers["ETag"] = tag(state, shown)
    return answer


def read(request: web.Request, state: object, shown: object) -> web.Response:
    """The thing, or 304 when the caller has it. Raises ``BadValue``."""
    answer = tagged(state, shown)
    own = answer.headers["ETag"]
    given = _given(request, "If-None-Match")
    if given is None or (given != "*" and own.strip('"') not in [text for _, text in _TAG.findall(given)]):
        return answer
    return web.Response(status=304, headers={"ETag": own})


def check_match(request: web.Request, state: object, show: Callable[[], Any]) -> None:
    """Refuse a change of what is no longer as the caller saw it; ``show`` is asked only then.

    The caller holds ``writing``, so that nothing comes between this and the change. Raises ``ApiError`` 412
    and ``BadValue``.
    """
    given = _given(request, "If-Match")
    if given is None or given == "*":
        return
    wanted = _digest(msgspec.json.encode(state))
    # A weak tag does not say that the thing is the same in every byte: it never matches here.
    if any(not weak and text.partition(".")[0] == wanted for weak, text in _TAG.findall(given)):
        return
    raise ApiError(
        412,
        "changed_meanwhile",
        "It is no longer as If-Match says: somebody changed it. Look at it again, then decide.",
        field="If-Match",
        headers={"ETag": tag(state, show())},
    )


def _given(request: web.Request, name: str) -> str | None:
    values = request.headers.getall(name, [])
    if not values:
        return None
    text = ",".join(values).strip()
    if text != "*" and not _LIST.fullmatch(text):
        raise BadValue(name, 'must be *, or ETags in their quotes: "…", "…"')
    return text
