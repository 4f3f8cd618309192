"""``bunk tenant``, ``bunk key``, ``bunk quota`` and ``bunk usage``.

Covers: accounts, their keys, their promises and limits, what they used. Does not cover: what they run
(``models``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bunkhouse import _admin, _types
from bunkhouse._client import Client
from bunkhouse._errors import BadValue
from bunkhouse.cli.api import (
    NO_LIMIT,
    Moment,
    Rate,
    Size,
    Span,
    api_command,
    confirm,
    save_option,
    yes_option,
)
from bunkhouse.cli.private import write_private
from bunkhouse.cli.tables import Column, Output, moment, size


@click.group()
def tenant() -> None:
    """Accounts."""


@click.argument("name", metavar="TENANT")
def _tenant_create(client: Client, out: Output, name: str) -> None:
    """Create an account."""
    created = client.create_tenant(name)
    out.document(created, f"created tenant {created.tenant}")


def _tenant_ls(client: Client, out: Output) -> None:
    """List accounts."""
    out.rows(
        client.tenants(),
        [
            ("TENANT", lambda row: row.tenant),
            ("KEYS", lambda row: row.keys),
            ("MODELS", lambda row: row.models),
            ("CREATED", lambda row: moment(row.created_ms)),
        ],
        "no tenants",
    )


@yes_option
@click.argument("name", metavar="TENANT")
def _tenant_rm(client: Client, out: Output, name: str, yes: bool) -> None:
    """Delete an account with its keys and models."""
    confirm(f"Delete tenant {name} with all its keys and models?", yes)
    client.delete_tenant(name)
    out.document({"deleted": name}, f"deleted tenant {name}")


api_command(tenant, "create")(_tenant_create)
api_command(tenant, "ls")(_tenant_ls)
api_command(tenant, "rm")(_tenant_rm)


@click.group()
def key() -> None:
    """API keys."""


@save_option
@click.option("--ttl", "ttl_s", type=Span(), help="How long it is valid: 15m, 24h, 30d. Default: for ever.")
@click.option("--label", help="A note for people.")
@click.argument("name", metavar="TENANT")
def _key_create(
    client: Client, out: Output, name: str, label: str | None, ttl_s: int | None, save_to: Path | None
) -> None:
    """Create a key and print it. It is shown this once."""
    created = client.create_key(name, label=label, ttl_s=ttl_s)
    if save_to is None:
        out.secret(created, created.key, f"key {created.key_id} of tenant {name}, shown only now:")
        return
    write_private(save_to, created.key + "\n")
    shown = _types.Key(created.key_id, created.tenant, created.label, created.created_ms, created.expires_ms)
    out.document(shown, f"key {created.key_id} of tenant {name} is in {save_to}")


@click.argument("name", metavar="TENANT")
def _key_ls(client: Client, out: Output, name: str) -> None:
    """List an account's keys, without their secrets."""
    out.rows(
        client.keys(name),
        [
            ("KEY ID", lambda row: row.key_id),
            ("TENANT", lambda row: row.tenant),
            ("LABEL", lambda row: row.label),
            ("CREATED", lambda row: moment(row.created_ms)),
            ("EXPIRES", lambda row: moment(row.expires_ms)),
        ],
        "no keys",
    )


@click.argument("key_id", metavar="KEY_ID")
def _key_revoke(client: Client, out: Output, key_id: str) -> None:
    """Revoke a key, by its id."""
    if re.match(r"bk_.*_", key_id):
        # The message does not repeat it: it may end up in a log.
        raise BadValue("KEY_ID", "give the key's id as `bunk key ls` shows it, not the key itself")
    client.revoke_key(key_id)
    out.document({"revoked": key_id}, f"revoked key {key_id}")


api_command(key, "create")(_key_create)
api_command(key, "ls")(_key_ls)
api_command(key, "revoke")(_key_revoke)


@click.group()
def quota() -> None:
    """Bytes per tier, rates and weights of a tenant, per node."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """One line of ``quota show``: the promise, the limit, and the greatest use on a node."""

    name: str
    reserved: str
    max: str
    used: str


_RATES = ("requests_per_minute", "tokens_per_minute", "restores_per_minute", "device_seconds_per_day")


def _limits(shown: _types.QuotaUse) -> list[_Limit]:
    quota, usage = shown.quota, shown.usage
    limits = [
        _Limit(
            f"{tier} bytes",
            size(each.reserved),
            "none" if each.max is None else size(each.max),
            size(max((getattr(row, f"{tier}_bytes") for row in usage), default=0)),
        )
        for tier, each in (("device", quota.device), ("host", quota.host), ("disk", quota.disk))
    ]
    in_flight = str(sum(row.in_flight for row in usage))
    return [
        *limits,
        *(
            _Limit(name.replace("_", " "), "-", _rate(getattr(quota, name)), _used(shown, name))
            for name in _RATES
        ),
        _Limit("concurrency", "-", _rate(quota.concurrency), in_flight),
        _Limit("weight", "-", str(quota.weight), "-"),
        _Limit("priority", "-", str(quota.priority), "-"),
    ]


def _used(shown: _types.QuotaUse, name: str) -> str:
    """What is used of what may come at once on all nodes: they have the tenant's limit together."""
    rates = [rate for row in shown.usage for rate in row.rates if rate.name == name]
    if not rates:
        return "-"
    burst = sum(rate.burst for rate in rates)
    return f"{sum(rate.burst - rate.remaining for rate in rates)} of {burst} at once"


def _rate(limit: int | None) -> str:
    return "none" if limit is None else str(limit)


def _print_quota(out: Output, shown: _types.QuotaUse) -> None:
    if out.json:
        out.document(shown, "")
        return
    for warning in shown.warnings:
        click.echo(f"warning: {warning}", err=True)
    out.rows(
        _limits(shown),
        [
            ("LIMIT", lambda row: row.name),
            ("RESERVED", lambda row: row.reserved),
            ("MAX", lambda row: row.max),
            ("USED (GREATEST NODE)", lambda row: row.used),
        ],
        "",
    )
    if shown.usage:
        click.echo()
    out.rows(
        shown.usage,
        [
            ("NODE", lambda row: row.node),
            ("DEVICE", lambda row: size(row.device_bytes)),
            ("HOST", lambda row: size(row.host_bytes)),
            ("DISK", lambda row: size(row.disk_bytes)),
            ("IN FLIGHT", lambda row: row.in_flight),
            ("REQUESTS", lambda row: row.requests),
            ("ANSWERS", lambda row: row.answers),
            ("REFUSALS", lambda row: row.refusals),
            ("TOKENS", lambda row: row.tokens),
            ("DEVICE MS", lambda row: row.device_ms),
            ("LENT", lambda row: size(row.lending.lent_bytes)),
            ("BORROWED", lambda row: size(row.lending.borrowed_bytes)),
            ("DEBT MS", lambda row: row.lending.debt_ms),
        ],
        "no use on any node yet",
    )


@click.argument("name", metavar="TENANT")
def _quota_show(client: Client, out: Output, name: str) -> None:
    """Show a tenant's quota and its use on each node."""
    _print_quota(out, client.quota(name))


# Fields whose -1 is a number and not "none".
_SIGNED = frozenset({"priority"})


@click.option(
    "--if-match", metavar="ETAG", help="Only if nobody changed it since: `etag` of quota show -o json."
)
@click.option("--priority", type=int, help="Higher goes first.")
@click.option("--weight", type=click.IntRange(min=1), help="Share of a busy device. Default 1.")
@click.option("--concurrency", type=Rate(), help="Requests at once, or none.")
@click.option("--device-seconds-per-day", type=Rate(), help="Of engines at work and restores, or none.")
@click.option("--restores-per-minute", type=Rate(), help="Or none.")
@click.option("--tokens-per-minute", "--tpm", type=Rate(), help="Read and written, or none.")
@click.option("--requests-per-minute", "--rpm", type=Rate(), help="Or none.")
@click.option("--disk-max", type=Size(none_allowed=True), help="Or none.")
@click.option("--disk-reserved", type=Size())
@click.option("--host-max", type=Size(none_allowed=True), help="Or none.")
@click.option("--host-reserved", type=Size())
@click.option("--device-max", type=Size(none_allowed=True), help="Greatest bytes per node, or none.")
@click.option("--device-reserved", type=Size(), help="Guaranteed bytes per node: 96MiB.")
@click.argument("name", metavar="TENANT")
def _quota_set(client: Client, out: Output, name: str, if_match: str | None, **given: Any) -> None:
    """Change what is given and keep the rest."""
    if all(value is None for value in given.values()):
        raise BadValue("options", "give at least one, for example --device-max 96MiB")
    change: dict[str, Any] = {
        field: None if value == NO_LIMIT and field not in _SIGNED else value
        for field, value in given.items()
        if value is not None
    }
    _print_quota(out, client.set_quota(name, if_match=if_match, **change))


api_command(quota, "show")(_quota_show)
api_command(quota, "set")(_quota_set)


@click.option("--until", "until_ms", type=Moment(), help="Before this: 2026-12-01 (UTC), or 2h ago as 2h.")
@click.option(
    "--since",
    "since_ms",
    type=Moment(),
    help="From then on: 2026-11-01 (UTC), or so long ago: 30d.",
)
@click.option(
    "--by",
    type=click.Choice(["total", "day", "hour", "key"]),
    default="total",
    show_default=True,
    help="One row for each model, or for each day (UTC) or hour of it; or for each API key.",
)
@click.option("--tenant", help="Only this tenant's.")
def _usage(
    client: Client,
    out: Output,
    tenant: str | None,
    by: _admin.UsageSpan,
    since_ms: int | None,
    until_ms: int | None,
) -> None:
    """Show what tenants used: requests, tokens, device time and restored bytes."""
    found = client.usage(tenant=tenant, by=by, since_ms=since_ms, until_ms=until_ms)
    began: list[Column[_types.UsageItem]] = [("FROM", lambda row: moment(row.begin_ms))]
    out.rows(
        found,
        [
            ("TENANT", lambda row: row.tenant),
            ("KEY", lambda row: row.key_id) if by == "key" else ("MODEL", lambda row: row.model or "-"),
            *(began if by in ("day", "hour") else []),
            ("REQUESTS", lambda row: row.requests),
            ("ANSWERS", lambda row: row.answers),
            ("TOKENS READ", lambda row: row.prompt_tokens),
            ("WRITTEN", lambda row: row.completion_tokens),
            ("DEVICE MS", lambda row: row.device_ms),
            ("FROM HOST", lambda row: size(row.restored_host_bytes)),
            ("FROM DISK", lambda row: size(row.restored_disk_bytes)),
            ("FROM ORIGIN", lambda row: size(row.restored_origin_bytes)),
        ],
        "nothing was used",
    )


def add_usage_command(group: click.Group) -> None:
    """Add the command that is not in a subgroup."""
    api_command(group, "usage")(_usage)
