"""What both HTTP surfaces must do alike: API keys, guards on requests, errors in OpenAI's shape.

Covers: header names, the text of an API key and its check, decoding JSON, the error shape and the status
of every refusal, the middleware that turns errors into answers, and the shape of a model in ``/v1/models``.
Does not cover: routes, who may call them, what a key may see (``agent/gateway.py``, ``control/routes``), or
bodies in memory (``body_budget``).

It lives in the leaf because a tenant may call the same paths on the router and on a node and must not
be able to tell them apart by an error or a limit, while agent and control never import each other.
It is the one file of the leaf that knows HTTP; no core imports it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from packer.crowd import SMALL_BYTES_MAX, Crowd, Crowded, in_time
from packer.doors import KEEPALIVE_SECONDS, DoorRunner, Doors
from packer.events import RefusalReason
from packer.json_words import told
from packer.types import KIB, MIB, KeySpec, ModelSpec

T = TypeVar("T")

logger = logging.getLogger("bunkhouse.http")

REQUEST_ID_HEADER = "x-request-id"
NODE_HEADER = "x-bunkhouse-node"
TIER_HEADER = "x-bunkhouse-tier"
RESTORE_MS_HEADER = "x-bunkhouse-restore-ms"
RESTORED_BYTES_HEADER = "x-bunkhouse-restored-bytes"
DEVICE_HEADER = "x-bunkhouse-device"
RATE_LIMIT_HEADER = "x-ratelimit-limit-requests"
RATE_REMAINING_HEADER = "x-ratelimit-remaining-requests"
RATE_RESET_HEADER = "x-ratelimit-reset-requests"
TOKENS_LIMIT_HEADER = "x-ratelimit-limit-tokens"
TOKENS_REMAINING_HEADER = "x-ratelimit-remaining-tokens"
TOKENS_RESET_HEADER = "x-ratelimit-reset-tokens"
# What a router hands on from a node's answer, beside content type and length.
PASSED_HEADERS = (
    REQUEST_ID_HEADER,
    NODE_HEADER,
    TIER_HEADER,
    RESTORE_MS_HEADER,
    RESTORED_BYTES_HEADER,
    DEVICE_HEADER,
    RATE_LIMIT_HEADER,
    RATE_REMAINING_HEADER,
    RATE_RESET_HEADER,
    TOKENS_LIMIT_HEADER,
    TOKENS_REMAINING_HEADER,
    TOKENS_RESET_HEADER,
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
)

# What a node answers to a router on a connection that it takes nothing from any more: the router's
# certificate ended, or its CA is trusted no more, or it was removed. A new connection may be let in.
CONNECT_ANEW = 421

# One JSON request. 1 MiB is about 250,000 tokens of text, more than any model here reads at once.
JSON_BYTES_MAX = 1 * MIB
# One request or header line; also the longest path.
HEADER_LINE_BYTES_MAX = 8 * KIB
# Headers of one request; a client with all of OpenAI's and a proxy's has some 40.
HEADERS_MAX = 128
# What an error repeats of the caller's own words.
ECHO_CHARS_MAX = 120
# openai-python gives up at once when told to wait longer than 120 s.
RETRY_SECONDS_MAX = 120
# When a refusal is worth retrying but nothing measured says when.
RETRY_MS_DEFAULT = 1000

OWNER: web.RequestKey[str] = web.RequestKey("owner", str)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
HEAD_SENT: web.RequestKey[bool] = web.RequestKey("head_sent", bool)


# --- API keys ---------------------------------------------------------------------------------------

_KEY = re.compile(r"bk_([a-z2-7]{12})_([A-Za-z0-9_-]{43})")
_ABSENT_SHA256 = "0" * 64


@dataclass(frozen=True, slots=True)
class KeyText:
    """An API key taken apart. Holds the secret: never log, store or send it."""

    key_id: str
    secret: str = field(repr=False)

    @property
    def text(self) -> str:
        return f"bk_{self.key_id}_{self.secret}"

    @property
    def secret_sha256(self) -> str:
        return secret_sha256(self.secret)


def make_key() -> KeyText:
    """A new key: 60 random bits of name, 256 of secret."""
    key_id = base64.b32encode(secrets.token_bytes(8)).decode("ascii").lower()[:12]
    return KeyText(key_id, base64.urlsafe_b64encode(secrets.token_bytes(32)).decode("ascii").rstrip("="))


def parse_key(text: str) -> KeyText | None:
    """Take ``bk_<key_id>_<secret>`` apart; None when it is not written like a key."""
    match = _KEY.fullmatch(text)
    return KeyText(match[1], match[2]) if match else None


def secret_sha256(secret: str) -> str:
    """What is stored of a secret. A fast hash is right for 256 random bits (see ``KeySpec``)."""
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def check_key(keys: Mapping[str, KeySpec], text: str, now_ms: int) -> KeySpec | None:
    """The key that ``text`` proves, from ``keys`` by id; None when unknown, wrong or expired.

    An unknown id costs the same hash and comparison as a known one. ``now_ms`` is wall-clock time.
    """
    parsed = parse_key(text)
    if parsed is None:
        return None
    known = keys.get(parsed.key_id)
    stored = known.secret_sha256 if known else _ABSENT_SHA256
    right = hmac.compare_digest(parsed.secret_sha256, stored)
    if known is None or not right:
        return None
    if known.expires_ms is not None and now_ms >= known.expires_ms:
        return None
    return known


def bearer_text(request: web.Request) -> str | None:
    """The credential of the one ``Authorization: Bearer`` header; None when absent, doubled or other."""
    values = request.headers.getall("Authorization", [])
    if len(values) != 1:
        return None
    scheme, _, credential = values[0].strip().partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else None


# --- errors -----------------------------------------------------------------------------------------


class ApiError(Exception):
    """An answer that is an error. Raise it anywhere below ``protect``; the guard renders it.

    ``kind`` is OpenAI's ``type``, ``field`` its ``param``. ``retry_ms`` becomes ``Retry-After``;
    ``should_retry`` overrides the openai client's own judgement of the status.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        field: str | None = None,
        hint: str | None = None,
        retry_ms: int | None = None,
        should_retry: bool | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind
        self.field = field
        self.hint = hint
        self.retry_ms = retry_ms
        self.should_retry = should_retry
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class RefusalStatus:
    """How a refusal of the residency core looks over HTTP."""

    status: int
    code: str
    kind: str
    retryable: bool


REFUSAL_STATUS: Mapping[RefusalReason, RefusalStatus] = {
    RefusalReason.UNKNOWN_MODEL: RefusalStatus(404, "model_not_found", "invalid_request_error", False),
    RefusalReason.RATE: RefusalStatus(429, "rate_limit_exceeded", "requests", True),
    RefusalReason.TOKENS: RefusalStatus(429, "rate_limit_exceeded", "tokens", True),
    RefusalReason.DEVICE_TIME: RefusalStatus(429, "device_time_exceeded", "device_time", True),
    RefusalReason.RESTORE_RATE: RefusalStatus(429, "restore_rate_exceeded", "restores", True),
    RefusalReason.CONCURRENCY: RefusalStatus(429, "concurrency_limit_exceeded", "requests", True),
    RefusalReason.QUEUE_FULL: RefusalStatus(429, "queue_full", "requests", True),
    RefusalReason.NEVER_FITS: RefusalStatus(507, "never_fits", "insufficient_storage", False),
    RefusalReason.QUOTA_BYTES: RefusalStatus(507, "insufficient_quota", "insufficient_storage", False),
    RefusalReason.RESTORE_FAILED: RefusalStatus(503, "restore_failed", "server_error", True),
    RefusalReason.MODEL_BROKEN: RefusalStatus(422, "model_broken", "invalid_request_error", False),
    RefusalReason.TIMEOUT: RefusalStatus(503, "restore_timeout", "server_error", True),
    RefusalReason.WORKER_DIED: RefusalStatus(503, "worker_died", "server_error", True),
    RefusalReason.DRAINING: RefusalStatus(503, "node_draining", "server_error", True),
}


def refusal(reason: RefusalReason, detail: str, retry_ms: int | None, model: str = "") -> ApiError:
    """The answer to a request that the residency core refused."""
    if reason is RefusalReason.UNKNOWN_MODEL:
        return model_not_found(model)
    shape = REFUSAL_STATUS[reason]
    if shape.retryable and retry_ms is None:
        retry_ms = RETRY_MS_DEFAULT
    # A client that obeys Retry-After would come back in vain: the text says when it helps.
    soon = retry_ms is not None and retry_ms <= RETRY_SECONDS_MAX * 1000
    return ApiError(
        shape.status,
        shape.code,
        detail or reason.value,
        kind=shape.kind,
        retry_ms=retry_ms if shape.retryable else None,
        should_retry=shape.retryable and soon,
    )


def model_not_found(text: str) -> ApiError:
    """The one answer for a model that is absent, malformed, or somebody else's."""
    named = "" if "/" in text else " A model is named tenant/name."
    return ApiError(
        404,
        "model_not_found",
        f"The model {text[:ECHO_CHARS_MAX]!r} does not exist or your key has no access to it; "
        f"GET /v1/models lists the models that it may use.{named}",
        field="model",
    )


def invalid_key() -> ApiError:
    """The one answer for a key that is absent, malformed, unknown, wrong or expired."""
    return ApiError(
        401,
        "invalid_api_key",
        "No valid API key: send 'Authorization: Bearer bk_…' with a key that exists and has not expired.",
        headers={"WWW-Authenticate": "Bearer"},
    )


def retry_headers(error: ApiError) -> dict[str, str]:
    """``Retry-After`` in whole seconds (never 0), ``retry-after-ms`` exactly, ``x-should-retry``."""
    headers: dict[str, str] = {}
    if error.retry_ms is not None:
        exact_ms = min(max(error.retry_ms, 1), RETRY_SECONDS_MAX * 1000)
        headers["Retry-After"] = str(-(-exact_ms // 1000))
        headers["retry-after-ms"] = str(exact_ms)
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    return headers


def openai_error(error: ApiError) -> dict[str, dict[str, str | None]]:
    """The body of an error as OpenAI writes it; also what goes into a stream that fails half-way."""
    message = f"{error.message} {error.hint}" if error.hint else error.message
    return {"error": {"message": message, "type": error.kind, "param": error.field, "code": error.code}}


def openai_response(request: web.Request, error: ApiError) -> web.Response:
    """Render for ``/v1``: OpenAI's error shape with the headers that its client obeys."""
    return web.Response(
        status=error.status,
        body=json.dumps(openai_error(error)).encode(),
        content_type="application/json",
        headers={**error.headers, **retry_headers(error)},
    )


# --- requests ---------------------------------------------------------------------------------------


CROWD: web.AppKey[Crowd] = web.AppKey("crowd", Crowd)
DOORS: web.AppKey[Doors] = web.AppKey("doors", Doors)
# What else an app says on every answer, streamed and failed ones too.
Says = Callable[[web.Request], Mapping[str, str]]
SAYS: web.AppKey[Says] = web.AppKey("says")


def enter(request: web.Request, owner: str) -> None:
    """Count a request whose key is good as its owner's, until it is answered. Raises ``ApiError`` 429."""
    try:
        request.app[CROWD].enter(owner)
    except Crowded as error:
        raise _crowded(error) from None
    request[OWNER] = owner


def _crowded(error: Crowded) -> ApiError:
    return ApiError(
        429, error.code, error.message, kind="requests", retry_ms=RETRY_MS_DEFAULT, should_retry=True
    )


async def _send(request: web.Request, response: web.Response) -> None:
    """Send a whole answer within the limits. Raises ``Crowded`` and ``ConnectionResetError``."""
    crowd, transport = request.app[CROWD], request.transport
    size = len(response.body) if isinstance(response.body, bytes | bytearray) else 0
    if size <= SMALL_BYTES_MAX or transport is None:
        return  # aiohttp sends it
    with crowd.holding(request.get(OWNER, ""), size):
        await response.prepare(request)
        await in_time(transport, response.write_eof(), crowd.stall_seconds)
    # aiohttp keeps an answer until the next one on the same connection, which nobody counts.
    response.body = None


def too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"The request's body is larger than the limit of {limit_bytes} bytes; send fewer inputs at one time.",
    )


# A high surrogate without a low one behind it, or a low one without a high one before it.
_HALF = re.compile(
    rb"(?<!\\)(?:\\\\)*(?=(\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|"
    rb"(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


def decode_json(body: bytes, kind: type[T]) -> T:
    """Decode and check a JSON body; raises ``ApiError`` 400 that names the field.

    Nesting is limited by the decoder's own recursion check; it is an error, never a crash.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        name, said = told(str(error))
        missing = _MISSING.fullmatch(said)
        if missing is not None:  # that is the field to name
            name, said = f"{name}.{missing[1]}".lstrip("."), "is missing."
        said = said[: 2 * ECHO_CHARS_MAX]
        raise ApiError(400, "invalid_value", f"{name or 'body'}: {said}", field=name or None) from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "The request's body is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        # The decoder looks for the other half and says that the text ends there.
        half = _HALF.search(body)
        message = str(error)[: 2 * ECHO_CHARS_MAX]
        if half is not None:
            message = (
                f"{half[1].decode()} at byte {half.start(1)} is half of a surrogate pair, which is no "
                "character; send both halves, or the character as UTF-8."
            )
        raise ApiError(400, "invalid_json", f"The request's body is not JSON: {message}") from None


def refuse_encoding(request: web.Request) -> None:
    """Refuse a compressed body before a byte of it is read.

    aiohttp would inflate it before any size limit is looked at (see ``runner``, which turns that off).
    """
    headers = request.headers
    if "Content-Encoding" not in headers and "Transfer-Encoding" not in headers:
        return
    for value in headers.getall("Content-Encoding", []):
        if value.strip().lower() not in ("", "identity"):
            raise ApiError(
                415,
                "unsupported_content_encoding",
                f"Content-Encoding {value[:ECHO_CHARS_MAX]!r} is not accepted; send the body uncompressed.",
                headers={"Accept-Encoding": "identity"},
            )
    for value in headers.getall("Transfer-Encoding", []):
        if value.strip().lower() != "chunked":
            # aiohttp takes "gzip, chunked" and ignores the first word; whoever stands before us may not.
            raise ApiError(
                400, "unsupported_transfer_encoding", "Only Transfer-Encoding: chunked is accepted."
            )


# --- the guard --------------------------------------------------------------------------------------

Render = Callable[[web.Request, ApiError], web.Response]


def protect(
    app: web.Application, render: Render, crowd: Crowd | None = None, doors: Doors | None = None
) -> None:
    """Install the guard on ``app``, outermost: every answer gets a request id, every error a body.

    Whoever checks keys tells by ``enter`` whose request it is.
    """
    app[CROWD] = crowd = crowd or Crowd()
    app[DOORS] = doors = doors or Doors()
    app.middlewares.insert(0, request_guard(render, crowd, doors))

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(own_headers(app, request, response.headers))

    app.on_response_prepare.append(mark)


def runner(app: web.Application, shutdown_seconds: float = 60.0) -> web.AppRunner:
    """The one way to serve an app: bodies never inflated, a handler cancelled when its caller leaves,
    connections that wait bounded.

    ``shutdown_seconds``: how long requests that are being answered may take to end at an orderly stop.
    """
    return DoorRunner(
        app,
        app[DOORS],
        access_log=None,
        shutdown_timeout=shutdown_seconds,
        auto_decompress=False,
        handler_cancellation=True,
        keepalive_timeout=KEEPALIVE_SECONDS,
        max_headers=HEADERS_MAX,
        max_line_size=HEADER_LINE_BYTES_MAX,
        max_field_size=HEADER_LINE_BYTES_MAX,
    )


def new_request_id() -> str:
    return f"req_{os.urandom(12).hex()}"


def request_guard(render: Render, crowd: Crowd, doors: Doors) -> Middleware:
    """The outermost middleware: a request id, no compressed bodies, and never a bare error."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = new_request_id()
        doors.asked(request.protocol)
        try:
            response = await answer(request, handler)
            if response.prepared:
                return response
            if "Upgrade" in request.headers:
                response.force_close()  # aiohttp reads no further request after one that asks for it
            if isinstance(response, web.Response):
                try:
                    await _send(request, response)
                except Crowded as error:
                    return render(request, _crowded(error))
            return response
        finally:
            owner = request.get(OWNER)
            if owner is not None:
                crowd.leave(owner)
            doors.answered(request.protocol, owner)

    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            refuse_encoding(request)
            return await handler(request)
        except ApiError as error:
            if request.get(HEAD_SENT, False):
                raise ConnectionResetError("failed after the answer's head was sent") from None
            return render(request, error)
        except web.HTTPException as error:
            return render(request, _from_aiohttp(request, error))
        except Exception as error:
            if isinstance(error, ConnectionError) and (request.transport is None or request.get(HEAD_SENT)):
                raise  # the caller left; there is nobody to tell
            broken = internal_error(request, error)
            if request.get(HEAD_SENT, False):
                raise ConnectionResetError("failed after the answer's head was sent") from None
            return render(request, broken)

    return guard


BASELESS = frozenset({"/models", "/embeddings", "/completions", "/chat/completions"})


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> ApiError:
    if error.status == 404:
        path = request.path[:ECHO_CHARS_MAX]
        # The first mistake of most who set an OpenAI client up.
        hint = "; OpenAI clients want a base_url that ends with /v1" if path in BASELESS else ""
        return ApiError(404, "unknown_route", f"There is no {request.method[:16]} {path!r} here{hint}.")
    if error.status == 405:
        allow = error.headers.get("Allow", "")
        return ApiError(
            405,
            "method_not_allowed",
            f"{request.method[:16]} is not possible here; possible: {allow}.",
            headers={"Allow": allow},
        )
    return ApiError(error.status, "http_error", error.reason)


def internal_error(request: web.Request, error: Exception) -> ApiError:
    """Log an error that nobody expected; returns what its caller is told."""
    _log_fault(request, error)
    return ApiError(
        500,
        "internal_error",
        f"An internal error; its log line carries {request[REQUEST_ID]}.",
        kind="server_error",
    )


def _log_fault(request: web.Request, error: Exception) -> None:
    """Log where, never what: an exception's text may hold a caller's words."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unknown route"
    logger.error("%s %s failed: %s\n%s", request[REQUEST_ID], route, type(error).__name__, frames)


def own_headers(app: web.Application, request: web.Request, present: Mapping[str, str]) -> dict[str, str]:
    """What every answer says, whatever it is; ``present`` are the headers that it has already. Its head goes
    out now."""
    request[HEAD_SENT] = True
    headers = {"Server": "bunkhouse", "X-Content-Type-Options": "nosniff"}
    # A router hands on the node's id, so that one id finds the request on both.
    if REQUEST_ID_HEADER not in present and REQUEST_ID in request:
        headers[REQUEST_ID_HEADER] = request[REQUEST_ID]
    if (say := app.get(SAYS)) is not None:
        headers.update(say(request))
    return headers


# --- the shape of a model ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model in ``/v1/models``: OpenAI's four fields, then ours."""

    id: str
    created: int  # seconds
    owned_by: str
    version: str
    task: str
    object: str = "model"


@dataclass(frozen=True, slots=True)
class ModelList:
    data: tuple[ModelCard, ...]
    object: str = "list"


def model_id(spec: ModelSpec) -> str:
    """The latest version goes by its plain name, an older one by ``tenant/name@version``."""
    return str(spec.ref.model) if spec.latest else str(spec.ref)


def model_card(spec: ModelSpec) -> ModelCard:
    return ModelCard(
        model_id(spec), spec.created_ms // 1000, spec.ref.tenant, spec.ref.version, spec.task.value
    )


def model_list(specs: Sequence[ModelSpec]) -> ModelList:
    """A tenant's models by name, the latest version of each before its older ones."""
    ordered = sorted(specs, key=lambda spec: (spec.ref.model, not spec.latest, -spec.created_ms))
    return ModelList(tuple(model_card(spec) for spec in ordered))


def json_response(value: object, status: int = 200) -> web.Response:
    """An answer from a value that msgspec can encode."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
