"""The OpenAPI 3.1 document of the public listener, made of the routes as they are registered.

Covers: paths, parameters, bodies, answers, errors and what a caller must show, of every route that has an
operation. Does not cover: the words themselves (they stand with the routes) or the node listener, which is
between a node and its control server of one release and numbered on its own (``packer.wire``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from aiohttp import web

from control.operations import (
    IDEMPOTENCY_HEADER,
    JSON,
    MANAGEMENT,
    PATH_PARTS,
    REPLAYED_HEADER,
    Given,
    IdempotencyText,
    Operation,
    Passed,
    Result,
    Where,
)
from control.routes.access import Access, Caller, ErrorAnswer, Route
from control.state import Control
from packer.oip import OipError, is_oip
from packer.release import server_version

_SCHEMAS = "#/components/schemas/{name}"
_SECURITY = "key"

# What any route may answer beside its own; by status, in words for a person.
SHARED_REFUSALS: Mapping[int, str] = {
    # What the HTTP parser can not read never comes to a route, and its answer is plain text.
    400: "A value is wrong; `field` names it. Nothing was changed. In plain text: it is no HTTP request, or "
    "one of its lines is above 8 KiB.",
    415: "The body is compressed; send it as it is.",
    429: "Too many requests or bytes of this caller are being answered; come back as Retry-After says.",
    503: "Control's own storage can not be used now, or it is stopping; nothing was changed.",
}
KEY_REFUSALS: Mapping[int, str] = {
    401: "There is no valid key: it is absent, malformed, unknown, wrong, expired or revoked.",
}
OPERATOR_REFUSALS: Mapping[int, str] = {403: "This needs an operator's key."}
TENANT_REFUSALS: Mapping[int, str] = {403: "This needs a tenant's key."}
PART_REFUSALS: Mapping[int, str] = {404: "There is no such thing, or it is not yours: both answer alike."}
REPEAT_REFUSALS: Mapping[int, str] = {
    409: "A request with this Idempotency-Key is still being answered; ask again.",
    422: "The Idempotency-Key was used for another request.",
}
BODY_REFUSALS: Mapping[int, str] = {
    408: "The body was not complete in time.",
    413: "The body is above the limit.",
}
_COMMON_TEXTS = frozenset(
    text
    for table in (
        SHARED_REFUSALS,
        KEY_REFUSALS,
        OPERATOR_REFUSALS,
        TENANT_REFUSALS,
        PART_REFUSALS,
        BODY_REFUSALS,
    )
    for text in table.values()
)

_IDEMPOTENCY = Given(
    IDEMPOTENCY_HEADER,
    IdempotencyText,
    "A text of this one request, best a random one: sent again with it, the request has no second effect.",
    Where.HEADER,
)
_REPLAYED = {REPLAYED_HEADER: "`true`: this is the first answer again, and nothing was done."}
_HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": "Always Bearer."},
    409: {"Retry-After": "Seconds to wait, for a duplicate of a request that is still being answered."},
    412: {"ETag": "What the thing's tag is now."},
    429: {"Retry-After": "Seconds to wait, 1 to 120; `retry-after-ms` says it exactly."},
    503: {"Retry-After": "Seconds to wait, 1 to 120; `retry-after-ms` says it exactly."},
}
_ABOUT = """\
What `bunk` and the SDK call. Every answer has an `x-request-id`. Errors have one shape, `ErrorAnswer`, below
`/api`, OpenAI's below `/v1` and the Open Inference Protocol's below `/v2`. A method that a path does not have
is answered 405 with `Allow`; every GET may be asked as HEAD.

A list comes in pages: give `next_cursor` back as `cursor` until it is null. Single things have an `ETag`:
reading them knows `If-None-Match`, changing and deleting them `If-Match`. A POST below `/api` may carry an
`Idempotency-Key`: sent again by the same caller with the same key and body within 24 hours, it gets the first
answer again and has no second effect."""


def describe(routes: Iterable[Route[Control]], version: str) -> bytes:
    """The document as JSON. Raises ``ValueError`` for a part of a path that has no description."""
    operations = list(_operations(routes))
    names = [operation.name for _, _, _, operation in operations]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"operations of the same name: {doubled}")
    schemas = _Schemas([operation for _, _, _, operation in operations])
    paths: dict[str, dict[str, object]] = {}
    for method, path, access, operation in operations:
        entry = _entry(schemas, method, path, access, operation)
        paths.setdefault(plain_path(path), {})[method.lower()] = entry
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Bunkhouse", "version": version, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "responses": schemas.responses,
            "securitySchemes": {_SECURITY: {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def document_route(routes: Sequence[Route[Control]]) -> Route[Control]:
    """The route of the document about ``routes`` and itself.

    It asks for a key, any one, as ``about`` does: an open port need not say which release it is.
    """

    async def show(control: Control, request: web.Request, caller: Caller) -> web.Response:
        return web.Response(body=made(), content_type=JSON)

    @cache
    def made() -> bytes:
        return describe([route, *routes], server_version())

    operation = Operation(
        "showDocument", "This document.", [Result(200, "OpenAPI 3.1.", dict[str, msgspec.Raw])]
    )
    route = Route("GET", "/api/v1/openapi.json", Access.CALLER, show, stays=False, operation=operation)
    return route


def _may_repeat(method: str, path: str) -> bool:
    return method == "POST" and path.startswith(MANAGEMENT)


def plain_path(path: str) -> str:
    """A route's pattern as OpenAPI writes it: without the regular expressions."""
    return re.sub(r"\{(\w+):[^{}]*\}", r"{\1}", path)


def _operations(routes: Iterable[Route[Control]]) -> Iterator[tuple[str, str, Access, Operation]]:
    for route in routes:
        passes: Sequence[Passed] = route.passes
        if route.operation is not None:
            passes = (Passed(route.method, route.path, route.operation), *passes)
        for passed in passes:
            yield passed.method, passed.path, route.access, passed.operation


class OpenAiErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiErrorAnswer(msgspec.Struct):
    """OpenAI's shape of an error, as its clients read it."""

    error: OpenAiErrorBody


class _Schemas:
    """All types of all operations, described together, so that equal ones are said once."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        kinds: list[Any] = [ErrorAnswer, OpenAiErrorAnswer, OipError]
        for operation in operations:
            kinds += [result.kind for result in operation.results if result.kind is not None]
            kinds += [given.kind for given in operation.takes]
            kinds += [operation.asks] if operation.asks is not None else []
        kinds += [part.kind for part in (*PATH_PARTS.values(), _IDEMPOTENCY)]
        found, self.components = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS)
        self._found = list(zip(kinds, found, strict=True))
        # Errors that many operations have, said once.
        self.responses: dict[str, object] = {}

    def of(self, kind: Any) -> Mapping[str, Any]:
        return next(schema for each, schema in self._found if each == kind)


def _entry(
    schemas: _Schemas, method: str, path: str, access: Access, operation: Operation
) -> dict[str, object]:
    takes = [*_parts(path), *operation.takes]
    if _may_repeat(method, path):
        takes.append(_IDEMPOTENCY)
    entry: dict[str, object] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "security": [] if access in (Access.OPEN, Access.LOCAL) else [{_SECURITY: []}],
        "x-bunkhouse-access": access.value,
        "parameters": [_parameter(schemas, given) for given in takes],
        "responses": _responses(schemas, method, path, access, operation),
    }
    if operation.asks is not None:
        entry["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas.of(operation.asks)}}}
    elif operation.asks_bytes:
        entry["requestBody"] = {"required": True, "content": {"application/octet-stream": {"schema": {}}}}
    return entry


def _parts(path: str) -> list[Given]:
    names = re.findall(r"\{(\w+)\}", plain_path(path))
    missing = [name for name in names if name not in PATH_PARTS]
    if missing:
        raise ValueError(f"{path}: no description of {missing} in control.operations.PATH_PARTS")
    return [PATH_PARTS[name] for name in names]


def _parameter(schemas: _Schemas, given: Given) -> dict[str, object]:
    return {
        "name": given.name,
        "in": given.where.value,
        "required": given.required,
        "description": given.text,
        "schema": schemas.of(given.kind),
    }


def _responses(
    schemas: _Schemas, method: str, path: str, access: Access, operation: Operation
) -> dict[str, object]:
    found: dict[str, object] = {}
    for result in operation.results:
        headers = {**result.headers, **(_REPLAYED if _may_repeat(method, path) else {})}
        found[str(result.status)] = _answer(schemas, result, headers)
    error = OipError if is_oip(path) else OpenAiErrorAnswer if path.startswith("/v1/") else ErrorAnswer
    for status, text in sorted(_refusals(method, path, access, operation).items()):
        name = f"{error.__name__}{status}"
        media = (JSON, "text/plain") if status == 400 else (JSON,)
        answer = _answer(schemas, Result(status, text, error, media), _HEADERS.get(status, {}))
        if text in _COMMON_TEXTS and schemas.responses.setdefault(name, answer) == answer:
            answer = {"$ref": f"#/components/responses/{name}"}
        found.setdefault(str(status), answer)
    return found


def _refusals(method: str, path: str, access: Access, operation: Operation) -> Mapping[int, str]:
    refusals = dict(SHARED_REFUSALS)
    if access not in (Access.OPEN, Access.LOCAL):
        refusals.update(KEY_REFUSALS)
    if access is Access.OPERATOR:
        refusals.update(OPERATOR_REFUSALS)
    if access is Access.TENANT:
        refusals.update(TENANT_REFUSALS)
    if "{" in path:
        refusals.update(PART_REFUSALS)
    if operation.asks is not None or operation.asks_bytes or method == "POST":
        refusals.update(BODY_REFUSALS)
    if _may_repeat(method, path):
        refusals.update(REPEAT_REFUSALS)
    for status, text in operation.refusals.items():
        shared = refusals.get(status)
        # One status may have a reason of the route's own and one that all such routes have.
        refusals[status] = f"{text} {shared}" if status in REPEAT_REFUSALS and shared else text
    return refusals


def _answer(schemas: _Schemas, result: Result, headers: Mapping[str, str]) -> dict[str, object]:
    answer: dict[str, object] = {"description": result.text}
    if result.kind is not None:
        schema = schemas.of(result.kind)
        answer["content"] = {
            media: {"schema": schema if media == JSON else {"type": "string"}} for media in result.media
        }
    if headers:
        answer["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()
        }
    return answer
