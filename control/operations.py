"""What a route of the public listener says of itself, so that the OpenAPI document is made of the code.

Covers: the values that a route is registered with beside its access, and the words for what many routes
share. Does not cover: making the document (``control.openapi``) or checking access
(``control.routes.access``).

A route is written once, with what it takes and answers next to its handler; ``Route`` refuses one of the
management API that has no operation, so no route can be there without being in the document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from control.authority import NODE_PATTERN
from packer.types import MODEL_NAME_PATTERN, TENANT_PATTERN, VERSION_PATTERN

JSON = "application/json"
IDEMPOTENCY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotency-Replayed"
# Routes below it are refused without an operation.
MANAGEMENT = "/api/"


class Where(StrEnum):
    """Where a parameter stands."""

    PATH = "path"
    QUERY = "query"
    HEADER = "header"


def worded(pattern: str, example: str) -> msgspec.Meta:
    """Marks a text with a pattern that the document shows and the handler's own parser checks.

    The parser's refusal says more than a decoder's "does not match": what to write instead.
    """
    return msgspec.Meta(extra_json_schema={"pattern": f"^{pattern}$"}, examples=[example])


_NO_DOUBLE_DOT = r"(?!.*\.\.)"
TenantText = Annotated[str, worded(TENANT_PATTERN.pattern, "acme")]
NodeText = Annotated[str, worded(_NO_DOUBLE_DOT + NODE_PATTERN.pattern, "box-1")]
NameText = Annotated[str, worded(_NO_DOUBLE_DOT + MODEL_NAME_PATTERN.pattern, "minilm")]
KeyIdText = Annotated[str, worded("[a-z2-7]{12}", "abcdefghijkl")]
UploadIdText = Annotated[str, worded("[0-9a-f]{32}", "0" * 32)]
ModelText = Annotated[
    str,
    worded(r"[a-z0-9-]{1,39}/[A-Za-z0-9._-]{1,64}(@(latest|[0-9a-f]{16}))?", "acme/minilm"),
]
IdempotencyText = Annotated[
    str, msgspec.Meta(min_length=1, max_length=255, extra_json_schema={"pattern": "^[!-~]{1,255}$"})
]
VersionText = Annotated[str, worded(f"({VERSION_PATTERN.pattern}|latest)", "latest")]
FileText = Annotated[str, worded(r"[A-Za-z0-9._-]{1,100}(/[A-Za-z0-9._-]{1,99})?", "config.json")]


@dataclass(frozen=True, slots=True)
class Given:
    """A parameter. ``kind`` is a type that msgspec can describe."""

    name: str
    kind: Any
    text: str
    where: Where = Where.QUERY
    required: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """An answer that is no error. ``kind`` None: it has no body. ``headers``: names to what they say."""

    status: int
    text: str
    kind: Any = None
    media: Sequence[str] = (JSON,)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the document. ``refusals`` are those that not every route has."""

    name: str
    summary: str
    results: Sequence[Result]
    asks: Any = None  # type of the JSON body; None: none is read
    asks_bytes: bool = False  # the body is bytes as they are
    takes: Sequence[Given] = ()
    refusals: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passed:
    """An operation behind a route with a wildcard: nodes answer it, the router hands it through."""

    method: str
    path: str
    operation: Operation


# Parts of paths, by the name that they have in every route.
PATH_PARTS: Mapping[str, Given] = {
    part.name: part
    for part in (
        Given("tenant", TenantText, "A tenant's name.", Where.PATH, True),
        Given("key_id", KeyIdText, "A key's id, which is no secret.", Where.PATH, True),
        Given("node", NodeText, "A node's name.", Where.PATH, True),
        Given("router", NodeText, "A router's name.", Where.PATH, True),
        Given("upload_id", UploadIdText, "An upload's id.", Where.PATH, True),
        Given(
            "ref",
            ModelText,
            "tenant/name, or tenant/name@version; the slash may be sent as it is or as %2F.",
            Where.PATH,
            True,
        ),
        Given("version", VersionText, "A version's digest, or latest.", Where.PATH, True),
        Given(
            "path",
            FileText,
            "A declared file's path; a slash may be sent as it is or as %2F.",
            Where.PATH,
            True,
        ),
    )
}
