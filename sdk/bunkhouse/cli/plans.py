"""``bunk plan`` and ``bunk explain``: what would be, and why something was.

Covers: the two commands and how their answers are printed. Does not cover: the decisions, which are a
node's, or the answers' values (``bunkhouse._types``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import click

from bunkhouse._client import Client
from bunkhouse._errors import BadValue
from bunkhouse._types import Copies, Decision, Explanation, Forecast, Forecasts, Others, RequestStory, Victim
from bunkhouse.cli.api import api_command
from bunkhouse.cli.tables import Output, moment, printable, size, table


def _victim_rows(victims: Sequence[Victim], left_out: int, others: Others) -> str:
    rows = table(
        victims,
        [
            ("  GIVES", lambda row: f"  {row.ref}"),
            ("ON", lambda row: row.device),
            ("BYTES", lambda row: size(row.freed_bytes)),
            ("KEEPS", lambda row: f"{row.kept_chunks} chunks" if row.kept_chunks else "nothing"),
            ("KEEP-INDEX", lambda row: f"{row.keep_index:.4g}" if row.keep_index is not None else None),
            ("", lambda row: f"moves to {row.moves_to}" if row.moves_to else "in use" if row.in_use else " "),
        ],
    )
    lines = [rows] if victims else []
    if left_out:
        lines.append(f"  and {left_out} more")
    if others.count:
        lines.append(f"  and {others.count} models of other tenants give {size(others.freed_bytes)}")
    return "\n".join(lines)


def _forecast_text(row: Forecast) -> str:
    where = f"{row.node}/{row.device}" if row.device else row.node
    lines = [f"{where}: {row.outcome or 'no answer'}: {row.reason}"]
    if row.by:
        lines.append(f"  for {row.by}")
    if row.from_tier:
        moved = f"{size(row.restore_bytes)} from the {row.from_tier} tier"
        lines.append(f"  restore: {moved}, about {row.restore_ms} ms")
    if row.waiting_before:
        lines.append(f"  {row.waiting_before} other models wait for room")
    if row.victims or row.others.count:
        lines.append(_victim_rows(row.victims, row.victims_left_out, row.others))
    if row.devices:
        lines.append(
            table(
                row.devices,
                [
                    ("  DEVICE", lambda each: f"  {each.device}"),
                    ("USED", lambda each: size(each.used_bytes)),
                    ("BUDGET", lambda each: size(each.budget_bytes)),
                    ("NEEDS", lambda each: size(each.needed_bytes)),
                    ("", lambda each: each.verdict),
                ],
            )
        )
    return "\n".join(lines)


def _copies_text(now: Copies) -> str:
    held = ", ".join(now.holders) or "none"
    lines = [f"copies: {len(now.holders)} of up to {now.replicas} ({held})"]
    if now.next_node is not None:
        waited = f"{now.waited_ms} ms of waiting of {now.restore_ms} ms that a restore takes there"
        lines.append(f"  the next would go to {now.next_node}: {waited}")
    if now.declined:
        lines.append(f"  declined lately by {', '.join(now.declined)}")
    return "\n".join(lines)


@click.option(
    "--node", "node", metavar="NODE", help="Ask this node. Default: where the router would try first."
)
@click.argument("model", metavar="MODEL")
def _plan(client: Client, out: Output, model: str, node: str | None) -> None:
    """Show what a request for MODEL would meet now: where it goes, who goes for it, how long it takes.

    Nothing changes. The answer holds for this moment: the next request meets it unless something else
    happens first.
    """
    found: Forecasts = client.plan(model, node=node)
    lines = [found.model, *(_forecast_text(row) for row in found.items)]
    text = "\n".join(lines + ([_copies_text(found.copies)] if found.copies is not None else []))
    out.document(found, text)


def _story_text(row: RequestStory) -> str:
    took = f" after {row.waited_ms} ms" if row.waited_ms else ""
    where = f" on {row.node}/{row.device}" if row.device else f" on {row.node}"
    tier = f", weights from the {row.from_tier} tier" if row.from_tier else ""
    why = f": {row.reason}" if row.reason else ""
    return f"{moment(row.asked_ms)}  {row.ref}: {row.outcome}{took}{where}{tier}{why}"


def _decision_text(row: Decision) -> str:
    about = row.ref or "another tenant's model"
    where = f"{row.node}/{row.device}" if row.device else row.node
    words = [moment(row.at_ms), where, f"{row.kind} {about}"]
    if row.by:
        words.append(f"for {row.by}")
    if row.from_tier:
        words.append(f"from {row.from_tier}")
    if row.nbytes:
        words.append(size(row.nbytes))
    if row.expected_ms and row.kind == "placed":
        words.append(f"about {row.expected_ms} ms")
    if row.reason:
        words.append(row.reason)
    if row.left_bytes is not None:
        words.append(f"{size(row.left_bytes)} stay free")
    lines = ["  ".join(words)]
    if row.victims or row.others.count:
        lines.append(_victim_rows(row.victims, row.victims_left_out, row.others))
    return "\n".join(lines)


def decision_lines(items: Sequence[Decision]) -> list[str]:
    """A line each; one decision that was taken again and again at once is shown with its last time."""
    lines: list[str] = []
    for alike, group in groupby(items, key=lambda row: replace(row, at_ms=0, request=None)):
        times = [row.at_ms for row in group]
        text = _decision_text(replace(alike, at_ms=times[-1]))
        first, newline, rest = text.partition("\n")
        again = f"  ({len(times)} times since {moment(times[0])})" if len(times) > 1 else ""
        lines.append(first + again + newline + rest)
    return lines


@click.option("--node", metavar="NODE", help="Ask this node only.")
@click.argument("subject", metavar="MODEL|REQUEST")
def _explain(client: Client, out: Output, subject: str, node: str | None) -> None:
    """Show why MODEL was placed, evicted or refused lately, or what became of REQUEST.

    REQUEST is the x-request-id of an answer. Nodes remember some thousands of decisions and requests since
    their agent started.
    """
    if not subject:
        raise BadValue("MODEL|REQUEST", "give a model (tenant/name) or a request's id")
    if "/" in subject:
        found: Explanation = client.explain(subject, node=node)
    else:
        found = client.explain(request=subject, node=node)
    lines = [_story_text(story) for story in found.requests]
    lines += decision_lines(found.items)
    lines += [f"{name}: no answer" for name in found.silent]
    lines += [_copies_text(found.copies)] if found.copies is not None else []
    out.document(found, printable("\n".join(lines) or f"nothing was decided about {subject} lately"))


def add_plan_commands(group: click.Group) -> None:
    """Add both."""
    api_command(group, "plan")(_plan)
    api_command(group, "explain")(_explain)
