"""What commands print: aligned tables for people, JSON for programs.

Covers: both forms, and short forms of sizes, times and ages. Does not cover: progress bars
(``models``). Text from a server is printed without control characters, so that a model's name
cannot drive a terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

T = TypeVar("T")
Column = tuple[str, Callable[[T], object]]
# A cell longer than this is cut in tables; JSON has it whole.
CELL_CHARS_MAX = 100


def plain(value: object) -> object:
    """A value as JSON can hold it: dataclasses become objects."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value


class Output:
    """Prints results in the form the user chose."""

    def __init__(self, form: str) -> None:
        self.json = form == "json"

    def document(self, value: object, text: str) -> None:
        """One result: as JSON, or as a sentence."""
        click.echo(json.dumps(plain(value), indent=2) if self.json else printable(text))

    def secret(self, value: object, text: str, note: str) -> None:
        """A result whose secret goes alone to standard output, and what to know about it beside it."""
        if not self.json:
            click.echo(printable(note), err=True)
        self.document(value, text)

    def rows(self, values: Sequence[T], columns: Sequence[Column[T]], empty: str) -> None:
        """A list: as JSON ``{"items": [...]}``, or as a table."""
        if self.json:
            click.echo(json.dumps({"items": plain(list(values))}, indent=2))
        elif not values:
            click.echo(empty, err=True)
        else:
            click.echo(table(values, columns))

    def line(self, value: object, text: str) -> None:
        """One of an endless list: one JSON document per line, or a line."""
        click.echo(json.dumps(plain(value)) if self.json else printable(text))


def table(values: Iterable[T], columns: Sequence[Column[T]]) -> str:
    """Aligned columns, two spaces apart; numbers to the right."""
    cells = [[_cell(read(value)) for _, read in columns] for value in values]
    lines = [[name for name, _ in columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    right = [all(_numeric(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if on_right else text.ljust(width)
            for text, width, on_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    text = printable("-" if value is None or value == "" else str(value)).replace("\n", " ")
    return text if len(text) <= CELL_CHARS_MAX else text[: CELL_CHARS_MAX - 1] + "…"


def _numeric(text: str) -> bool:
    return text == "-" or text[0].isdigit()


def printable(text: str) -> str:
    """``text`` with control and other unprintable characters made visible; newlines stay."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


def size(count: int | None) -> str:
    """Bytes in binary units, exact where they are whole: ``96 MiB``, ``1.5 GiB``, ``17 B``."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + " TiB"


def moment(at_ms: int | None) -> str:
    """A point in time, UTC; ``-`` when never or unknown."""
    if not at_ms:
        return "-"
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return str(at_ms)


def ago(at_ms: int | None) -> str:
    """How long ago, roughly; ``-`` when never or unknown."""
    return span(max(0, round(time.time() * 1000) - at_ms)) if at_ms else "-"


def span(length_ms: int | None) -> str:
    """A length of time, roughly; ``-`` when unknown."""
    if length_ms is None:
        return "-"
    seconds = length_ms // 1000
    for unit, unit_s in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= unit_s:
            return f"{seconds // unit_s}{unit}"
    return f"{seconds}s"


def error_document(fields: dict[str, Any]) -> str:
    """An error as JSON."""
    return json.dumps({"error": {name: value for name, value in fields.items() if value is not None}})
