"""Requests and answers as values: what both clients share instead of duplicated logic.

Covers: ``Request``, ``Answer``, ``Call`` (a request with the function that reads its answer), the
address of a server, and turning a status into an exception. Does no I/O and knows no HTTP library;
``_transport`` moves these values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from bunkhouse._errors import ApiError, BadAnswer, BadValue, error_from_body

T = TypeVar("T")
U = TypeVar("U")

URL_ENV = "BUNKHOUSE_URL"
KEY_ENV = "BUNKHOUSE_API_KEY"
# Answers above this are an error: 2048 embeddings of 4096 dimensions in base64 are 43 MiB.
ANSWER_BYTES_MAX = 64 * 1024 * 1024
# A key is 59 characters; the rest is room for a gateway's own credentials in front of us.
KEY_CHARS_MAX = 4096
# Loading and answering a cold model may take minutes; the server sends its own limit earlier.
INFERENCE_TIMEOUT_S = 600.0
# Management calls answer from a local database.
MANAGEMENT_TIMEOUT_S = 60.0
# One piece of an upload on a slow line: 8 MiB at 30 KB/s.
PIECE_TIMEOUT_S = 300.0
# Control checks every byte of a model and stores it again before it answers a commit.
COMMIT_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is and with which key to call it."""

    base_url: str
    api_key: str | None = field(repr=False)
    loopback: bool


def resolve_address(base_url: str | None, api_key: str | None) -> Address:
    """Check the arguments, falling back to BUNKHOUSE_URL and BUNKHOUSE_API_KEY. Raises ``BadValue``."""
    url = (base_url or os.environ.get(URL_ENV, "")).strip().rstrip("/")
    if not url:
        raise BadValue("base_url", f"give the server's URL, or set {URL_ENV}")
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise BadValue("base_url", f"{url[:120]!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise BadValue("base_url", f"{url[:120]!r} must start with http:// or https:// and name a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadValue("base_url", "must hold no user name, password, query or fragment; keys go in api_key")
    # People copy the OpenAI form of the URL; both mean the same server.
    return Address(url.removesuffix("/v1"), _check_key(api_key), host in ("localhost", "127.0.0.1", "::1"))


def _check_key(api_key: str | None) -> str | None:
    key = (api_key if api_key is not None else os.environ.get(KEY_ENV, "")).strip()
    if not key:
        return None
    # The key itself never appears in a message.
    if len(key) > KEY_CHARS_MAX or not re.fullmatch(r"[!-~]+", key):
        raise BadValue("api_key", f"must be one line of at most {KEY_CHARS_MAX} printable ASCII characters")
    return key


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, ready to send.

    ``repeatable``: sending it twice has the effect of sending it once, so it may be sent again when
    it is unknown whether the first arrived. ``accepts``: statuses of 400 and above that are handed to
    the caller instead of being raised.
    """

    method: str
    path: str  # starts with "/", already quoted
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    repeatable: bool = False
    timeout_s: float = MANAGEMENT_TIMEOUT_S
    accepts: frozenset[int] = frozenset()
    delay_s: float = 0.0  # waited before it is sent the first time
    model: str = ""  # the model that it calls, if a node may be called in the server's place


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response. ``headers`` has lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request and how to read its answer."""

    request: Request
    parse: Callable[[Answer], T]


def once(request: Request) -> Request:
    """The request as it is sent: a POST of the management API carries a name of its own.

    The server does a request of one name once and gives its answer again to every repetition, so that even a
    POST whose answer was lost may be sent again, secrets included.
    """
    if request.method != "POST" or not request.path.startswith("/api/"):
        return request
    headers = {**request.headers, "idempotency-key": os.urandom(16).hex()}
    return replace(request, headers=headers, repeatable=True)


# Pages of one list: 1,000 rows each, so far more than any server has.
PAGES_MAX = 1_000
PAGE_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows of a list; ``next_cursor`` None: there are no more."""

    rows: tuple[T, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Listing(Generic[T, U]):
    """A list that comes in pages, how to read one, and what to make of all rows together."""

    path: str
    read: Callable[[Answer], Page[T]]
    whole: Callable[[tuple[T, ...]], U]
    query: Mapping[str, str] = field(default_factory=dict)

    def request(self, cursor: str | None) -> Request:
        query = {**self.query, "limit": str(PAGE_ROWS)}
        if cursor is not None:
            query["cursor"] = cursor
        return Request("GET", f"{self.path}?{urlencode(query)}", repeatable=True)


def pages(listing: Listing[T, U]) -> Generator[Request, Answer, U]:
    """The requests of a whole list, one after another; a client sends each and hands its answer back."""
    rows: list[T] = []
    cursor: str | None = None
    for _ in range(PAGES_MAX):
        page = listing.read((yield listing.request(cursor)))
        rows += page.rows
        if page.next_cursor is None:
            return listing.whole(tuple(rows))
        cursor = page.next_cursor
    raise BadAnswer(f"{listing.path} has more than {PAGES_MAX} pages: is this Bunkhouse's URL?")


def json_request(
    method: str,
    path: str,
    body: Mapping[str, object] | None = None,
    *,
    repeatable: bool = False,
    timeout_s: float = MANAGEMENT_TIMEOUT_S,
) -> Request:
    """A request with a JSON body (or none)."""
    if body is None:
        return Request(method, path, repeatable=repeatable, timeout_s=timeout_s)
    try:
        data = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadValue("arguments", f"cannot be sent as JSON: {error}") from None
    headers = {"content-type": "application/json"}
    return Request(method, path, headers, data, repeatable=repeatable, timeout_s=timeout_s)


def segment(text: str, name: str) -> str:
    """Quote one path segment. Refuses what a URL parser would take for a step in the path."""
    if not isinstance(text, str) or text in ("", ".", ".."):
        raise BadValue(name, f"{text!r} is not a name")
    return quote(text, safe="@")


def model_path(model: str) -> str:
    """The path of a model reference, ``tenant/name[@version]``. The server judges the grammar."""
    tenant, slash, name = model.partition("/")
    if not slash or "/" in name:
        raise BadValue(
            "model", f"{model[:120]!r} is not a model reference: write tenant/name or tenant/name@version"
        )
    return f"{segment(tenant, 'model')}/{segment(name, 'model')}"


def split_model(model: str) -> tuple[str, str]:
    """Tenant and name of ``tenant/name``, for calls that create a version."""
    model_path(model)
    tenant, _, name = model.partition("/")
    if "@" in name:
        raise BadValue("model", f"{model[:120]!r} names a version; a push makes a new one: write tenant/name")
    return tenant, name


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """When the server says to come back, in seconds from now; None when it does not say."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
            return float(text) * scale
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None


def error_of(answer: Answer, now_s: float) -> ApiError | BadAnswer:
    """The exception that an answer outside 200 to 299 stands for."""
    if answer.status < 400:
        target = answer.headers.get("location", "")[:200]
        return BadAnswer(f"HTTP {answer.status} redirects to {target!r}: use the server's own URL")
    return error_from_body(
        answer.status,
        answer.body,
        request_id=answer.headers.get("x-request-id"),
        retry_after_s=retry_after_s(answer.headers, now_s),
    )
