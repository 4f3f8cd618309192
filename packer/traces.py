"""Request traces for the simulator: CSV or JSON lines in, columns of plain numbers out.

Covers: the columns, their units and limits, the list of models with their sizes, and every complaint about
them, which names file, line and field. Does not cover: opening files (``control.simulate_command``) or
replaying (``simulate``).

Columns of a trace: ``time_s`` or ``time_ms`` (one of them), ``model``; if they are there also ``tenant``,
``duration_s`` or ``duration_ms``, ``tokens``, and ``size`` and ``devices`` (of the model). Other columns are
passed over. A model without a tenant column is ``tenant/name`` or belongs to the tenant ``default``. Lines
need not be in order of time.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from packer.types import DEVICES_PER_MODEL_MAX, REPLICAS_PER_MODEL_MAX, BadValue, parse_bytes

# A trace is held in memory at some 100 bytes a request; more requests than this are a wrong file.
REQUESTS_MAX = 50_000_000
# Models in one trace: the largest fleets serve some ten thousand; more are request ids in the wrong column.
MODELS_MAX = 100_000
# A hundred years; beyond it a time is in another unit.
TIME_S_MAX = 100 * 366 * 86_400.0
NAME_CHARS_MAX = 200
TENANT_DEFAULT = "default"
_TIMES = {"time_s": 1000.0, "time_ms": 1.0}
_DURATIONS = {"duration_s": 1000.0, "duration_ms": 1.0}


class BadTrace(ValueError):
    """A trace or a list of models can not be used. Names the file, the line and the field."""

    def __init__(self, file: str, line: int, column: str, message: str) -> None:
        super().__init__(f"{file}: line {line}: {column}: {message}")
        self.file = file
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class Sized:
    """One model: whose, and how large. ``size_bytes`` are its weights as they are on a device."""

    tenant: str
    name: str
    size_bytes: int
    workspace_bytes: int = 0
    devices: int = 1  # of one box, that it needs together; see ``gangs``
    replicas: int | None = None  # boxes that may hold a copy each; None: as the fleet says

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time, column by column. ``models[i]`` is the number of request i's model in
    ``catalog``; ``duration_ms[i]`` how long it uses the model, -1 where the trace does not say."""

    at_ms: tuple[int, ...]
    models: tuple[int, ...]
    duration_ms: tuple[int, ...]
    catalog: tuple[Sized, ...]

    @property
    def span_ms(self) -> int:
        return self.at_ms[-1] - self.at_ms[0] if self.at_ms else 0


@dataclass(slots=True)
class Sizes:
    """How large models are: from a list, or one size for all that the list does not name."""

    known: dict[tuple[str, str], Sized] = field(default_factory=dict)
    default_bytes: int | None = None

    def of(self, tenant: str, name: str) -> Sized | None:
        found = self.known.get((tenant, name))
        if found is None and self.default_bytes is not None:
            return Sized(tenant, name, self.default_bytes)
        return found


# --- rows -----------------------------------------------------------------------------------------


def _rows(lines: Iterable[str], file: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(line, fields by name). JSON lines when the first character is a brace, else CSV with a header."""
    numbered = iter(lines)
    first = next(numbered, None)
    if first is None or not first.strip():
        raise BadTrace(file, 1, "header", "the file is empty, or its first line is")
    if first.lstrip().startswith("{"):
        yield from _json_rows(first, numbered, file)
        return
    if first.lstrip().startswith("["):
        raise BadTrace(file, 1, "row", "is a JSON list; write one object per line")
    header = [name.strip() for name in next(csv.reader([first]))]
    if len(set(header)) != len(header):
        raise BadTrace(file, 1, "header", f"a column is named twice: {', '.join(header)[:200]}")
    reader = csv.reader(numbered)
    try:
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                message = f"{len(row)} fields, the header has {len(header)}: {', '.join(header)[:200]}"
                raise BadTrace(file, reader.line_num + 1, "row", message)
            yield reader.line_num + 1, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise BadTrace(file, reader.line_num + 1, "row", f"is not CSV: {error}") from None


def _json_rows(first: str, rest: Iterator[str], file: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    number, line = 1, first
    while True:
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise BadTrace(file, number, "row", "is not JSON; write one object per line") from None
            if not isinstance(value, dict):
                raise BadTrace(file, number, "row", "is not an object")
            yield number, value
        following = next(rest, None)
        if following is None:
            return
        number, line = number + 1, following


def _missing(file: str, line: int, column: str, needed: str, row: Mapping[str, object]) -> BadTrace:
    found = ", ".join(row)[:NAME_CHARS_MAX]
    return BadTrace(file, line, column, f"this column is missing; needed are {needed}; here are: {found}")


def _number(value: object, file: str, line: int, column: str, unit_s: float) -> float:
    """A finite number from 0 to the limit of a time, in the column's unit."""
    try:
        number = (
            float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
        )
    except (ValueError, OverflowError):
        number = None
    if number is None or number != number:
        raise BadTrace(file, line, column, f"{str(value)[:40]!r} is not a number")
    if number < 0:
        raise BadTrace(file, line, column, f"{str(value)[:40]} is negative")
    if number * unit_s > TIME_S_MAX * 1000:
        raise BadTrace(file, line, column, f"{str(value)[:40]} is more than a hundred years")
    return number


def _name(value: object, file: str, line: int, column: str) -> str:
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    text = text.strip()
    if not text or len(text) > NAME_CHARS_MAX or not text.isprintable():
        shown = str(value)[:40]
        raise BadTrace(file, line, column, f"{shown!r} is not a name of 1 to {NAME_CHARS_MAX} characters")
    return text


def _named(row: Mapping[str, object], file: str, line: int) -> tuple[str, str]:
    name = _name(row["model"], file, line, "model")
    if row.get("tenant") not in (None, ""):
        return _name(row["tenant"], file, line, "tenant"), name
    tenant, slash, rest = name.partition("/")
    return (tenant, rest) if slash and tenant and rest else (TENANT_DEFAULT, name)


def _size(value: object, file: str, line: int, column: str) -> int:
    try:
        nbytes = parse_bytes(str(value), column)
    except BadValue as error:
        raise BadTrace(file, line, column, error.message) from None
    if nbytes <= 0:
        raise BadTrace(file, line, column, "must be above 0")
    return nbytes


def _one_of(row: Mapping[str, object], columns: Mapping[str, float], file: str, line: int) -> str | None:
    found = [column for column in columns if column in row]
    if len(found) > 1:
        raise BadTrace(file, line, found[1], f"is there beside {found[0]}; keep one")
    return found[0] if found else None


def _devices(row: Mapping[str, object], file: str, line: int) -> int:
    """How many devices a model needs; 1 where nothing says more."""
    return _count(row, file, line, "devices", DEVICES_PER_MODEL_MAX) or 1


def _count(row: Mapping[str, object], file: str, line: int, column: str, most: int) -> int | None:
    text = row.get(column)
    if text in (None, ""):
        return None
    number = _number(text, file, line, column, 0.0)
    if number not in range(1, most + 1):
        raise BadTrace(file, line, column, f"{str(text)[:40]} is not 1 to {most}")
    return int(number)


# --- files ----------------------------------------------------------------------------------------


def parse_models(lines: Iterable[str], file: str) -> Sizes:
    """A list of models: columns ``model`` and ``size`` (``16GB``), if they are there ``tenant``,
    ``workspace`` (on each device), ``devices`` and ``replicas``. Raises ``BadTrace``."""
    sizes = Sizes()
    for line, row in _rows(lines, file):
        for column in ("model", "size"):
            if column not in row:
                raise _missing(file, line, column, "model and size", row)
        tenant, name = _named(row, file, line)
        workspace = _size(row["workspace"], file, line, "workspace") if row.get("workspace") else 0
        if (tenant, name) in sizes.known:
            raise BadTrace(file, line, "model", f"{tenant}/{name} is there twice")
        size, devices = _size(row["size"], file, line, "size"), _devices(row, file, line)
        replicas = _count(row, file, line, "replicas", REPLICAS_PER_MODEL_MAX)
        sizes.known[tenant, name] = Sized(tenant, name, size, workspace, devices, replicas)
        if len(sizes.known) > MODELS_MAX:
            raise BadTrace(file, line, "model", f"more than {MODELS_MAX} models")
    return sizes


def parse_trace(lines: Iterable[str], file: str, sizes: Sizes, token_ms: float = 0.0) -> Trace:
    """A whole trace or nothing. ``token_ms``: how long one of a request's ``tokens`` takes, where the trace
    has no duration. Raises ``BadTrace``."""
    rows: list[tuple[int, int, int]] = []
    catalog: list[Sized] = []
    numbers: dict[tuple[str, str], int] = {}
    said: list[tuple[object, object]] = []  # what each model's first row said of its size
    for line, row in _rows(lines, file):
        time_column = _one_of(row, _TIMES, file, line)
        if time_column is None or "model" not in row:
            missing = "model" if time_column else "time_s"
            raise _missing(file, line, missing, "time_s or time_ms, and model", row)
        scale = _TIMES[time_column]
        at_ms = int(_number(row[time_column], file, line, time_column, scale) * scale)
        named = _named(row, file, line)
        number = numbers.get(named)
        if number is None:
            number = numbers[named] = len(catalog)
            catalog.append(_sized(named, row, sizes, file, line))
            said.append((row.get("size"), row.get("devices")))
            if len(catalog) > MODELS_MAX:
                raise BadTrace(file, line, "model", f"more than {MODELS_MAX} models")
        elif said[number] != (row.get("size"), row.get("devices")):
            _check_same(catalog[number], row, sizes, file, line)
        rows.append((at_ms, number, _duration_ms(row, file, line, token_ms)))
        if len(rows) > REQUESTS_MAX:
            raise BadTrace(file, line, "row", f"more than {REQUESTS_MAX} requests; cut the trace")
    if not rows:
        raise BadTrace(file, 1, "row", "there is no request in it")
    rows.sort(key=lambda row: row[0])
    at, models, durations = zip(*rows, strict=True)
    return Trace(at, models, durations, tuple(catalog))


def _sized(named: tuple[str, str], row: Mapping[str, object], sizes: Sizes, file: str, line: int) -> Sized:
    if row.get("size") not in (None, ""):
        size = _size(row["size"], file, line, "size")
        return Sized(*named, size, devices=_devices(row, file, line))
    found = sizes.of(*named)
    if found is None:
        raise BadTrace(
            file,
            line,
            "model",
            f"{named[0]}/{named[1]} is unknown: add it to the list of models (--models), give one size for "
            "all that are not there (--size), or add a column size",
        )
    return found


def _check_same(first: Sized, row: Mapping[str, object], sizes: Sizes, file: str, line: int) -> None:
    """A row that says nothing of the model agrees with all others. Raises ``BadTrace``."""
    if row.get("size") in (None, ""):
        return
    again = _sized((first.tenant, first.name), row, sizes, file, line)
    for column, before, now in (
        ("size", first.size_bytes, again.size_bytes),
        ("devices", first.devices, again.devices),
    ):
        if before != now:
            raise BadTrace(file, line, column, f"{first} has {now} here and {before} in an earlier line")


def _duration_ms(row: Mapping[str, object], file: str, line: int, token_ms: float) -> int:
    column = _one_of(row, _DURATIONS, file, line)
    if column is not None and row[column] not in (None, ""):
        scale = _DURATIONS[column]
        return int(_number(row[column], file, line, column, scale) * scale)
    if token_ms and row.get("tokens") not in (None, ""):
        return int(_number(row["tokens"], file, line, "tokens", 1.0) * token_ms)
    return -1
