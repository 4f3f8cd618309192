"""``bunk router``.

Covers: routers that are processes of their own: listing and removing them, and tokens for further ones. Does
not cover: running one, which is ``bunk-control router`` on its box.
"""

from __future__ import annotations

from pathlib import Path

import click

from bunkhouse._client import Client
from bunkhouse.cli.api import Span, api_command, confirm, save_option, yes_option
from bunkhouse.cli.fleet import give_token
from bunkhouse.cli.tables import Output, span


@click.group()
def router() -> None:
    """Routers beside control's own."""


def _router_ls(client: Client, out: Output) -> None:
    """List routers that are processes of their own."""
    out.rows(
        client.routers(),
        [
            ("ROUTER", lambda row: row.router),
            ("STATE", lambda row: row.state),
            ("HEARD", lambda row: span(row.heard_ago_ms)),
            ("BEHIND", lambda row: row.behind),
            ("IN FLIGHT", lambda row: row.in_flight),
            ("CALLS", lambda row: row.calls),
            ("RELEASE", lambda row: row.release),
            ("FROM", lambda row: row.peer),
            ("URL", lambda row: row.url),
        ],
        "no routers but control's own",
    )


@yes_option
@click.argument("name", metavar="ROUTER")
def _router_rm(client: Client, out: Output, name: str, yes: bool) -> None:
    """Remove a router: its certificate is refused from now on."""
    confirm(f"Remove router {name}?", yes)
    client.delete_router(name)
    out.document({"deleted": name}, f"removed router {name}")


@router.group("token")
def token() -> None:
    """Join tokens of routers."""


@save_option
@click.option("--ttl", "ttl_s", type=Span(), help="How long it is valid: 900, 15m, 24h.")
@click.option("--name", help="The only router name it may be used for.")
def _token_create(
    client: Client, out: Output, name: str | None, ttl_s: int | None, save_to: Path | None
) -> None:
    """Create a join token for one router and print it. It is shown this once."""
    give_token(out, client.create_router_token(name=name, ttl_s=ttl_s), save_to)


api_command(router, "ls")(_router_ls)
api_command(router, "rm")(_router_rm)
api_command(token, "create")(_token_create)
