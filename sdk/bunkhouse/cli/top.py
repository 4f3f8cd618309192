"""``bunk top``: the fleet as it is now, again and again.

Covers: what changed between two looks (requests and restores per second), who comes first, and the view, on a
terminal and in a pipe. Does not cover: what a look asks for (``ps``).

On a terminal the view takes the screen, as ``top`` does, and gives it back. Elsewhere it is printed once per
look, and with ``-o json`` one document per line.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import click

from bunkhouse._client import Client
from bunkhouse._types import Device, Placement, Placements
from bunkhouse.cli.api import api_command, on_terminal
from bunkhouse.cli.tables import Output, ago, printable, size, table

# Reports of nodes come every few seconds: looking more often shows the same.
EVERY_S = 2.0
EVERY_S_MIN, EVERY_S_MAX = 0.5, 3600.0
# Models shown where there is no terminal whose height says how many.
ROWS_DEFAULT = 20
ROWS_MAX = 1000
BAR_CHARS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One version on one node, and what it did since the last look."""

    ref: str
    node: str
    state: str
    device: str | None
    device_bytes: int
    leases: int
    waiting: int
    requests_per_s: float
    restores_per_s: float
    restore_ms_estimate: int
    last_used_ms: int


@dataclass(frozen=True, slots=True)
class Look:
    """The fleet at one moment. Rates are 0 in the first look, when there is nothing to compare with."""

    at_s: float
    rows: tuple[Row, ...]
    devices: tuple[Device, ...]
    requests_per_s: float
    restores_per_s: float
    leases: int
    waiting: int


SORTS: Mapping[str, Callable[[Row], float]] = {
    "requests": lambda row: row.requests_per_s,
    "waiting": lambda row: row.waiting,
    "device": lambda row: row.device_bytes,
    "restores": lambda row: row.restores_per_s,
    "used": lambda row: row.last_used_ms,
}


def compare(now: Placements, at_s: float, before: Placements | None, before_s: float, sort: str) -> Look:
    """What ``ps`` says now, with rates since it was asked before, the busiest first.

    A counter that is lower than before is that of an agent that started anew: it counts from 0.
    """
    known = {(each.ref, each.node): each for each in before.items} if before is not None else {}
    span_s = max(at_s - before_s, 1e-3)

    def row(each: Placement) -> Row:
        old = known.get((each.ref, each.node))
        requests = _since(each.requests, old.requests) if old is not None else 0
        restores = _since(_restores(each), _restores(old)) if old is not None else 0
        return Row(
            each.ref,
            each.node,
            each.state,
            each.device,
            each.device_bytes,
            each.leases,
            each.waiting,
            requests / span_s,
            restores / span_s,
            each.restore_ms_estimate,
            each.last_used_ms,
        )

    rows = [row(each) for each in now.items]
    order = SORTS[sort]
    rows.sort(key=lambda each: (-order(each), -each.last_used_ms, each.ref, each.node))
    return Look(
        at_s,
        tuple(rows),
        now.devices,
        sum(each.requests_per_s for each in rows),
        sum(each.restores_per_s for each in rows),
        sum(each.leases for each in rows),
        sum(each.waiting for each in rows),
    )


def _since(now: int, before: int) -> int:
    return now - before if now >= before else now


def _restores(row: Placement) -> int:
    return sum(each.count for each in row.restores)


# --- the view ---------------------------------------------------------------------------------------


def view(look: Look, rows: int, columns: int) -> str:
    """The look as text of at most this many models and this wide."""
    nodes = {device.node for device in look.devices}
    shown = look.rows[:rows]
    head = (
        f"{_count(len(nodes), 'node')}  {_count(len(look.rows), 'placement')}  "
        f"{look.requests_per_s:.1f} requests/s  {look.restores_per_s:.1f} restores/s  "
        f"{look.leases} running  {look.waiting} waiting"
    )
    parts = [head]
    if look.devices:
        parts += ["", _devices(look.devices)]
    if shown:
        parts += ["", _models(shown)]
    if len(look.rows) > len(shown):
        parts.append(f"and {_count(len(look.rows) - len(shown), 'placement')} more")
    return "\n".join(line[:columns] for line in "\n".join(parts).split("\n"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _devices(devices: tuple[Device, ...]) -> str:
    return table(
        devices,
        [
            ("NODE", lambda row: row.node),
            ("DEVICE", lambda row: row.device),
            ("", _bar),
            ("USED", lambda row: size(row.used_bytes)),
            ("BUDGET", lambda row: size(row.budget_bytes)),
            ("", lambda row: " " if row.healthy else "unhealthy"),
        ],
    )


def _bar(row: Device) -> str:
    full = round(BAR_CHARS * min(1.0, row.used_bytes / row.budget_bytes)) if row.budget_bytes > 0 else 0
    return "|" + "#" * full + "." * (BAR_CHARS - full) + "|"


def _models(rows: tuple[Row, ...]) -> str:
    return table(
        rows,
        [
            ("MODEL", lambda row: row.ref),
            ("NODE", lambda row: row.node),
            ("STATE", lambda row: row.state),
            ("ON", lambda row: row.device),
            ("DEVICE", lambda row: size(row.device_bytes)),
            ("REQ/S", lambda row: f"{row.requests_per_s:.1f}"),
            ("RUNNING", lambda row: row.leases),
            ("WAITING", lambda row: row.waiting),
            ("RESTORES/S", lambda row: f"{row.restores_per_s:.2f}"),
            ("NEXT", lambda row: f"{row.restore_ms_estimate} ms" if row.restore_ms_estimate else None),
            ("USED", lambda row: ago(row.last_used_ms)),
        ],
    )


# --- looking ----------------------------------------------------------------------------------------


def _looks(client: Client, every_s: float, count: int | None, sort: str) -> Iterator[Look]:
    """One look after another, the first at once."""
    before, before_s, made = None, 0.0, 0
    while count is None or made < count:
        if made:
            time.sleep(every_s)
        now, at_s = client.ps(), time.monotonic()
        yield compare(now, at_s, before, before_s, sort)
        before, before_s, made = now, at_s, made + 1


@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(EVERY_S_MIN, EVERY_S_MAX),
    default=EVERY_S,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)
@click.option("-n", "--count", type=click.IntRange(1), help="Stop after so many looks.")
@click.option("--once", is_flag=True, help="Look once and stop.")
@click.option(
    "--sort", type=click.Choice(list(SORTS)), default="requests", show_default=True, help="By what."
)
@click.option(
    "--rows", type=click.IntRange(1, ROWS_MAX), help="Models shown. Default: what the screen holds."
)
def _top(
    client: Client,
    out: Output,
    every_s: float,
    count: int | None,
    once: bool,
    sort: str,
    rows: int | None,
) -> None:
    """Show the busiest models and the devices, live. Ctrl-C ends it."""
    looks = _looks(client, every_s, 1 if once else count, sort)
    if out.json or once or not on_terminal():
        for number, look in enumerate(looks):
            if number and not out.json:
                click.echo("")
            out.line(look, view(look, rows or ROWS_DEFAULT, 10_000))
        return
    _on_screen(looks, rows)


def _on_screen(looks: Iterator[Look], rows: int | None) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(screen=True, auto_refresh=False) as live:
        for look in looks:
            place = shutil.get_terminal_size()
            # Two headings, two empty lines, the summary and the line that says how many are left out.
            room = max(1, place.lines - 6 - len(look.devices))
            shown = printable(view(look, rows or room, place.columns))
            live.update(Text(shown, no_wrap=True), refresh=True)


def add_top_command(group: click.Group) -> None:
    api_command(group, "top")(_top)
