"""Every exception of the SDK, and the one table from HTTP status to exception.

Covers: the classes, ``STATUS_ERRORS``, and reading an error body (Bunkhouse's own and OpenAI's
shape). Does not cover: whether to try again (``_retry``).
"""

from __future__ import annotations

import json

# Longer texts are cut: an error message is for a person, and a proxy may answer with a whole page.
MESSAGE_CHARS_MAX = 2000


class BunkhouseError(Exception):
    """Base of all errors that this package raises on purpose."""


class BadValue(BunkhouseError, ValueError):
    """An argument is wrong; nothing was sent. Names the argument, what is wrong and the way out."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class BadDirectory(BunkhouseError, ValueError):
    """A model directory cannot be pushed; nothing was sent. ``path`` is the file in question."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


class Unreachable(BunkhouseError):
    """The server could not be reached, or the connection broke.

    ``sent`` tells whether the request may have reached it.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class TimedOut(Unreachable):
    """No answer within the time limit."""


class BadAnswer(BunkhouseError):
    """The server answered something that is not Bunkhouse's API. Is the URL right?"""


class ApiError(BunkhouseError):
    """The server refused or failed. Its words are in ``message``; ``field`` and ``hint`` may be None."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        field: str | None = None,
        hint: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.field = field
        self.hint = hint
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        text = (
            self.message if not self.field or self.field in self.message else f"{self.field}: {self.message}"
        )
        return f"{text} ({self.hint})" if self.hint else text


class BadRequest(ApiError):
    """400, 415, 422: the request is wrong and will stay wrong."""


class TooLarge(BadRequest):
    """413: the request is above a limit."""


class AuthenticationFailed(ApiError):
    """401: no key, or not a valid one."""


class PermissionDenied(ApiError):
    """403: the key is valid and may not do this."""


class NotFound(ApiError):
    """404: no such thing, or not yours: both answer alike."""


class Conflict(ApiError):
    """409: the state of the thing does not allow this."""


class ChangedMeanwhile(Conflict):
    """412: somebody else changed the thing since you looked (``if_match``)."""


class QuotaRefused(ApiError):
    """Base of the refusals by quota or capacity: ``RateLimited`` and ``DoesNotFit``."""


class RateLimited(QuotaRefused):
    """429: come back after ``retry_after_s`` seconds."""


class DoesNotFit(QuotaRefused):
    """507: waiting cannot help; the message holds the arithmetic."""


class ServerFailed(ApiError):
    """5xx: the server failed."""


class Unavailable(ServerFailed):
    """502, 503, 504: no node can answer now; ``retry_after_s`` may say when to come back."""


class StreamFailed(ApiError):
    """The server broke off a stream after it had begun. Texts received so far stay valid."""


# The one table. A status that is not here falls back to its hundred: BadRequest or ServerFailed.
STATUS_ERRORS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    412: ChangedMeanwhile,
    413: TooLarge,
    415: BadRequest,
    422: BadRequest,
    429: RateLimited,
    500: ServerFailed,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
    507: DoesNotFit,
}


def error_class(status: int) -> type[ApiError]:
    """The exception for a status of 400 and above."""
    return STATUS_ERRORS.get(status, ServerFailed if status >= 500 else BadRequest)


def error_from_body(
    status: int,
    body: bytes,
    *,
    request_id: str | None = None,
    retry_after_s: float | None = None,
    kind: type[ApiError] | None = None,
) -> ApiError:
    """Build the exception for an answer. Never fails: a body of another shape is quoted, shortened."""
    make = kind or error_class(status)
    error = _error_object(body)
    message = _text(error, "message")
    if message is None:
        quoted = body[:200].decode("utf-8", "replace").strip()
        message = f"HTTP {status}" + (f": {quoted}" if quoted else "")
    return make(
        message,
        status=status,
        code=_text(error, "code") or _text(error, "type"),
        # OpenAI's shape calls the field "param".
        field=_text(error, "field") or _text(error, "param"),
        hint=_text(error, "hint"),
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


def _error_object(body: bytes) -> dict[str, object]:
    try:
        outer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    inner = outer.get("error") if isinstance(outer, dict) else None
    if isinstance(inner, str):
        return {"message": inner}
    return inner if isinstance(inner, dict) else {}


def _text(error: dict[str, object], name: str) -> str | None:
    value = error.get(name)
    return value[:MESSAGE_CHARS_MAX] if isinstance(value, str) and value else None
