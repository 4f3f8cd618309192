"""What all commands over the API share: their options, their client, their exit codes.

Covers: ``api_command``, values that users type (sizes, spans of time), the table of exit codes. Does
not cover: the commands.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bunkhouse import _errors
from bunkhouse.cli.context import NoTarget, StillStarting, find_target
from bunkhouse.cli.private import BadFile
from bunkhouse.cli.tables import Output, error_document, printable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# First match counts. The table is documented in README.md and promised to scripts.
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (_errors.BadValue, EXIT_USAGE),
    (NoTarget, EXIT_USAGE),
    (StillStarting, 6),
    (_errors.NotFound, 3),
    (_errors.AuthenticationFailed, 4),
    (_errors.PermissionDenied, 4),
    (_errors.QuotaRefused, 5),
    (_errors.Unreachable, 6),
    (_errors.Unavailable, 6),
    (_errors.BunkhouseError, EXIT_FAILED),
    (BadFile, EXIT_FAILED),
)

# What a person at a terminal can do, where the server or the SDK can not know that there is one.
_HINTS: tuple[tuple[type[Exception], str], ...] = (
    (_errors.AuthenticationFailed, "give a key with --key-file or BUNKHOUSE_API_KEY"),
    (_errors.Unreachable, "is the server running (`bunk up`), and is it the right --url?"),
)

output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Form of the output."
)


def exit_code(error: Exception) -> int:
    """The exit code that an exception stands for."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)


@contextmanager
def reported(output: Output) -> Iterator[None]:
    """Turn expected exceptions into a message on standard error and an exit code."""
    try:
        yield
    except tuple(kind for kind, _ in EXIT_CODES) as error:
        report(output, error)
        raise click.exceptions.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def report(output: Output, error: Exception) -> None:
    """Print an error."""
    if output.json:
        fields: dict[str, Any] = {"kind": type(error).__name__, "message": str(error)}
        for name in ("status", "code", "field", "hint", "path", "request_id", "retry_after_s"):
            fields[name] = getattr(error, name, None)
        click.echo(error_document(fields), err=True)
        return
    click.echo(printable(f"error: {error}"), err=True)
    hint = next((text for kind, text in _HINTS if isinstance(error, kind)), None)
    if hint is not None:
        click.echo(hint, err=True)
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        click.echo(f"try again in {retry_after_s:.0f} s", err=True)


def api_command(group: click.Group, name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command that gets a client and an output, then its own parameters."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(*, url: str | None, key_file: Path | None, output: str, **parameters: Any) -> None:
            from bunkhouse._client import Client

            out = Output(output)
            with reported(out):
                target = find_target(url, key_file)
                # An empty key is no key; None would look at the environment, which was done already.
                with Client(target.url, target.api_key or "") as client:
                    function(client, out, **parameters)

        return group.command(name)(target_options(output_option(run)))

    return decorate


def target_options(function: Callable[..., None]) -> Callable[..., None]:
    """Which server, and with which key."""
    url_option = click.option("--url", metavar="URL", help="The server. Default: BUNKHOUSE_URL.")
    key_option = click.option(
        "--key-file",
        type=click.Path(path_type=Path, allow_dash=True),
        metavar="FILE",
        help="File with the key, - for standard input. Default: BUNKHOUSE_API_KEY.",
    )
    return url_option(key_option(function))


def on_terminal() -> bool:
    """Whether a person can read a question and answer it."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal. Without one nobody can answer, and the command itself is the answer."""
    if not yes and on_terminal():
        click.confirm(question, abort=True, err=True)


save_option = click.option(
    "--save-to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the secret to this file, for you alone to read, instead of printing it.",
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
else:
    # Older versions of click have no generic parameter types.
    _IntParam = click.ParamType

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_SPAN = re.compile(r"(\d+)\s*([smhd]?)", re.IGNORECASE)
_SPAN_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


# A smaller number without a unit was most likely to have one.
PLAIN_BYTES_LEAST = 2**20


class Size(_IntParam):
    """Bytes: ``96MiB``, ``2GB``, ``1048576``; with ``none_allowed`` also ``none``, which gives -1."""

    name = "size"

    def __init__(self, none_allowed: bool = False) -> None:
        self._none_allowed = none_allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if self._none_allowed and value.lower() == "none":
            return NO_LIMIT
        match = _SIZE.fullmatch(value.strip())
        if not match:
            extra = ", or none" if self._none_allowed else ""
            self.fail(f"{value[:40]!r} is not a size: write for example 96MiB, 2GB or 1048576{extra}")
        if (
            not match[2]
            and not value.strip().upper().endswith("B")
            and 0 < float(match[1]) < PLAIN_BYTES_LEAST
        ):
            self.fail(
                f"{match[1]!r} has no unit, and so few bytes hold nothing: write {match[1]}MiB or "
                f"{match[1]}GiB, or {match[1]}B if it is meant so"
            )
        power = " KMGT".index((match[2] or " ").upper())
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# What "none" is parsed to, to tell it from an option that was not given.
NO_LIMIT = -1


class Rate(_IntParam):
    """A whole number from 1 on, or ``none``, which gives -1."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if value.lower() == "none":
            return NO_LIMIT
        if not re.fullmatch(r"\d{1,18}", value):
            self.fail(f"{value[:40]!r} is not a whole number, nor none")
        if int(value) == 0:
            self.fail("0 would let nothing in: write a number from 1 on, or none for no limit")
        return int(value)


class Span(_IntParam):
    """A length of time in seconds: ``900``, ``15m``, ``24h``, ``30d``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SPAN.fullmatch(value.strip())
        if not match or len(match[1]) > 12:
            self.fail(f"{value[:40]!r} is not a length of time: write for example 900, 15m, 24h or 30d")
        return int(match[1]) * _SPAN_S[match[2].lower()]


class Moment(_IntParam):
    """A moment as Unix milliseconds: a date in UTC, or how long ago (``30d``)."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip()
        if match := _SPAN.fullmatch(text):
            if match[2] and len(match[1]) <= 6:
                return max(0, int((time.time() - int(match[1]) * _SPAN_S[match[2].lower()]) * 1000))
        else:
            with suppress(ValueError, OverflowError):
                at = datetime.fromisoformat(text)
                return max(0, round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000))
        return self.fail(
            f"{value[:40]!r} is no moment: write for example 2026-11-01, 2026-11-01T08:00 or 30d"
        )


_DELAY = re.compile(r"(\d{1,6})\s*(ms|s)", re.IGNORECASE)


class Delay(_IntParam):
    """A short time in milliseconds: ``5ms``, ``1s``, ``0``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if value.strip() == "0":
            return 0
        match = _DELAY.fullmatch(value.strip())
        if not match:
            self.fail(f"{value[:40]!r} is not a short time: write for example 5ms, or 0")
        return int(match[1]) * (1000 if match[2].lower() == "s" else 1)
