"""``bunk node``, ``bunk ps`` and ``bunk events``.

Covers: boxes, where bytes are, what happened. Does not cover: starting a stack (``up``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from bunkhouse._client import Client
from bunkhouse._errors import BadValue
from bunkhouse._types import Device, Event, Node, NodeToken, Placement, Regret
from bunkhouse.cli.api import Span, api_command, confirm, save_option, yes_option
from bunkhouse.cli.private import write_private
from bunkhouse.cli.tables import Output, ago, moment, printable, size, span, table

# Seconds between two looks for new events.
FOLLOW_S = 1.0
# And for the end of what runs on a box that drains.
DRAIN_LOOK_S = 1.0
# Events fetched per look while following; more are fetched at once until none are left.
FOLLOW_LIMIT = 500


@click.group()
def node() -> None:
    """Boxes that joined."""


def _of(used: int, budget: int) -> str:
    return f"{size(used)} / {size(budget)}"


def _devices(row: Node) -> str:
    return ", ".join(
        f"{each.device} {_of(each.used_bytes, each.budget_bytes)}{'' if each.healthy else ' (unhealthy)'}"
        for each in row.devices
    )


@click.option("--pool", metavar="POOL", help="Only the boxes of this pool.")
def _node_ls(client: Client, out: Output, pool: str | None) -> None:
    """List boxes."""
    out.rows(
        client.nodes(pool),
        [
            ("NODE", lambda row: row.node),
            ("POOL", lambda row: row.pool),
            ("STATE", lambda row: row.state),
            ("HEARD", lambda row: span(row.heard_ago_ms)),
            ("DEVICES", _devices),
            ("HOST", lambda row: _of(row.host_used_bytes, row.host_budget_bytes)),
            ("DISK", lambda row: _of(row.disk_used_bytes, row.disk_budget_bytes)),
            ("MEASURED", lambda row: ago(row.calibration.measured_ms) if row.calibration else None),
            ("GATEWAY", lambda row: row.gateway_url),
        ],
        "no nodes",
    )


@yes_option
@click.argument("name", metavar="NODE")
def _node_rm(client: Client, out: Output, name: str, yes: bool) -> None:
    """Remove a box: its certificate is refused from now on."""
    confirm(f"Remove node {name}?", yes)
    client.delete_node(name)
    out.document({"deleted": name}, f"removed node {name}")


@click.option("--undo", is_flag=True, help="Let it take requests again.")
@click.option("--wait", is_flag=True, help="Wait until no request runs there any more.")
@click.argument("name", metavar="NODE")
def _node_drain(client: Client, out: Output, name: str, wait: bool, undo: bool) -> None:
    """Let a box end what runs there and take no new requests, before work on it or its removal."""
    if wait and undo:
        raise BadValue("--wait", "waits for a box to be drained, which --undo ends; give one of them")
    now = client.set_node(name, draining=not undo)
    while wait and now.state == "draining":
        time.sleep(DRAIN_LOOK_S)
        now = client.set_node(name, draining=True)
    text = {
        "draining": f"{name} takes no new requests; some may still run there (--wait waits for their end)",
        "drained": f"{name} takes no new requests, and none runs there",
        "up": f"{name} takes requests again",
    }
    out.document(now, text.get(now.state, f"{name} is {now.state}: it is told when it is heard again"))


@node.group("token")
def token() -> None:
    """Join tokens."""


@save_option
@click.option("--ttl", "ttl_s", type=Span(), help="How long it is valid: 900, 15m, 24h.")
@click.option("--name", help="The only node name it may be used for.")
@click.option("--pool", metavar="POOL", help="The pool that the box will be of. Default: default.")
def _token_create(
    client: Client, out: Output, name: str | None, pool: str | None, ttl_s: int | None, save_to: Path | None
) -> None:
    """Create a join token for one box and print it. It is shown this once."""
    give_token(out, client.create_node_token(name=name, ttl_s=ttl_s, pool=pool), save_to)


def give_token(out: Output, created: NodeToken, save_to: Path | None) -> None:
    """Print it, or write it to a private file."""
    if save_to is None:
        note = f"token {created.token_id}, valid until {moment(created.expires_ms)}, shown only now:"
        out.secret(created, created.token, note)
        return
    write_private(save_to, created.token + "\n")
    shown = {"token_id": created.token_id, "expires_ms": created.expires_ms}
    out.document(shown, f"token {created.token_id} is in {save_to}")


api_command(node, "ls")(_node_ls)
api_command(node, "rm")(_node_rm)
api_command(node, "drain")(_node_drain)
api_command(token, "create")(_token_create)


def _restores(row: Placement) -> str:
    return ", ".join(
        f"{each.from_tier} {each.count}x {each.restore_ms_p50}/{each.restore_ms_max} ms"
        for each in row.restores
        if each.count
    )


def _expected(row: Placement) -> str | None:
    """What the next restore is expected to take; nothing while the bytes are on a device."""
    return f"{row.restore_ms_estimate} ms" if row.restore_ms_estimate else None


def _regrets(client: Client, out: Output) -> None:
    """How far each node was from the clairvoyant optimum: figures of all tenants together."""
    judged = [row for row in client.nodes() if row.regret is not None]

    def of(show: Callable[[Regret], str | None]) -> Callable[[Node], str | None]:
        return lambda row: show(row.regret) if row.regret is not None else None

    def cold(total_ms: int) -> str:
        return f"{total_ms / 1000:.1f} s"

    out.rows(
        judged,
        [
            ("NODE", lambda row: row.node),
            ("WINDOW", of(lambda found: span(found.window_ms))),
            ("USES", of(lambda found: str(found.counted))),
            ("ACTUAL", of(lambda found: cold(found.actual_ms))),
            ("LRU", of(lambda found: cold(found.lru_ms))),
            ("OPTIMUM", of(lambda found: cold(found.optimum_ms))),
            ("BOUND", of(lambda found: cold(found.bound_ms))),
            ("RATIO", of(lambda found: f"{found.ratio:.2f}" if found.ratio is not None else None)),
            ("JUDGED", of(lambda found: ago(found.at_ms))),
        ],
        "no node has judged itself yet: each does ten minutes after its start, and then every hour",
    )


def telling(rows: Sequence[Placement]) -> Sequence[Placement]:
    """Without nodes that hold nothing of a version and were never asked for it, but for one of a version that
    is nowhere: of many nodes nearly all rows would say so."""
    named = {row.ref for row in rows if _says_something(row)}
    shown = []
    for row in rows:
        if _says_something(row) or row.ref not in named:
            named.add(row.ref)
            shown.append(row)
    return shown


def _says_something(row: Placement) -> bool:
    held = row.device_bytes or row.host_bytes or row.disk_bytes or row.deduplicated_bytes
    return bool(held or row.requests or row.waiting or row.leases) or row.state != "absent"


@click.option("--regret", is_flag=True, help="Show how far each node was from the clairvoyant optimum.")
@click.option("--all", "whole", is_flag=True, help="Also nodes that hold nothing of a version.")
def _ps(client: Client, out: Output, regret: bool, whole: bool) -> None:
    """Show where every version's bytes are and what it has done."""
    if regret:
        _regrets(client, out)
        return
    now = client.ps()
    if out.json:
        out.document(now, "")
        return
    shown = now.items if whole else telling(now.items)
    out.rows(
        shown,
        [
            ("MODEL", lambda row: row.ref),
            ("NODE", lambda row: row.node),
            ("STATE", lambda row: row.state),
            ("ON", lambda row: row.device),
            ("DEVICE", _on_devices),
            ("HOST", lambda row: size(row.host_bytes)),
            ("DISK", lambda row: size(row.disk_bytes)),
            ("SHARED", lambda row: size(row.deduplicated_bytes) if row.deduplicated_bytes else None),
            ("LEASES", lambda row: row.leases),
            ("WAITING", lambda row: row.waiting),
            ("REQUESTS", lambda row: row.requests),
            ("ANSWERS", lambda row: row.answers),
            ("RESTORES (MEDIAN/MAX)", _restores),
            ("NEXT", _expected),
            ("USED", lambda row: ago(row.last_used_ms)),
        ],
        "no models on any node",
    )
    if len(shown) < len(now.items):
        left_out = len(now.items) - len(shown)
        click.echo(f"{left_out} rows of nodes that hold nothing of a version are left out: --all", err=True)
    if now.devices:
        click.echo("\n" + _device_table(now.devices))


def _on_devices(row: Placement) -> str:
    """Of a model on several devices, what is on each."""
    return " + ".join(size(share.held_bytes) for share in row.shares) or size(row.device_bytes)


def _device_table(devices: tuple[Device, ...]) -> str:
    return table(
        devices,
        [
            ("NODE", lambda row: row.node),
            ("DEVICE", lambda row: row.device),
            ("NAME", lambda row: row.name),
            ("USED", lambda row: size(row.used_bytes)),
            ("BUDGET", lambda row: size(row.budget_bytes)),
            ("FOREIGN", lambda row: size(row.foreign_bytes)),
            ("HEALTHY", lambda row: "yes" if row.healthy else "no"),
        ],
    )


def _event_line(event: Event) -> str:
    parts = (moment(event.at_ms), event.node or "-", event.kind, event.model or event.tenant, event.detail)
    return "  ".join(part for part in parts if part).replace("\n", " ")


@click.option("-f", "--follow", is_flag=True, help="Keep printing new ones, one per line.")
@click.option("--tenant", help="Only this tenant's.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many."
)
@click.option("--after", type=click.IntRange(min=0), help="Those after this id. Default: the newest.")
def _events(
    client: Client, out: Output, after: int | None, limit: int, tenant: str | None, follow: bool
) -> None:
    """Show what happened, oldest first."""
    if follow:
        _follow(client, out, after, tenant)
        return
    page = client.events(after=after, limit=limit, tenant=tenant)
    if out.json:
        out.document(page, "")
        return
    if not page.items:
        click.echo("no events", err=True)
    for event in page.items:
        click.echo(printable(_event_line(event)))
    # Without --after these are the newest already.
    if after is not None and len(page.items) >= limit:
        click.echo(f"go on: bunk events --after {page.next}", err=True)


def _follow(client: Client, out: Output, after: int | None, tenant: str | None) -> None:
    while True:
        page = client.events(after=after, limit=FOLLOW_LIMIT, tenant=tenant)
        for event in page.items:
            out.line(event, _event_line(event))
        after = max(after or 0, page.next)
        if len(page.items) < FOLLOW_LIMIT:
            time.sleep(FOLLOW_S)


def add_fleet_commands(group: click.Group) -> None:
    """Add the commands that are not in a subgroup."""
    api_command(group, "ps")(_ps)
    api_command(group, "events")(_events)
