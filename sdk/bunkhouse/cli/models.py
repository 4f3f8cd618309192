"""``bunk model``: push, list, change settings, remove.

Covers: the commands and the progress bar of a push. Does not cover: what a push takes and how it
resumes (``bunkhouse._push``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from bunkhouse._client import Client
from bunkhouse._errors import BadValue, BunkhouseError
from bunkhouse._types import Model, Progress, ProgressCallback
from bunkhouse.cli.api import Delay, api_command, confirm, yes_option
from bunkhouse.cli.tables import Output, moment, printable, size


@click.group()
def model() -> None:
    """Models."""


@contextmanager
def _progress(quiet: bool) -> Iterator[ProgressCallback]:
    """Progress on standard error: bars on a terminal, and in any case what is left out."""

    def tell_skipped(step: Progress) -> None:
        if step.step == "skip" and not quiet:
            click.echo(printable(f"{step.path}: {step.message}"), err=True)

    if quiet or not sys.stderr.isatty():
        yield tell_skipped
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    numbers = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars("{task.description}", BarColumn(), *numbers, console=Console(stderr=True)) as bars:
        tasks = {"hash": bars.add_task("hash", total=None), "upload": bars.add_task("upload", total=None)}

        def tell(step: Progress) -> None:
            if step.step == "skip":
                bars.console.print(printable(f"{step.path}: {step.message}"), markup=False, highlight=False)
            else:
                bars.update(tasks[step.step], completed=step.done_bytes, total=step.total_bytes)

        yield tell


_devices_option = click.option(
    "--devices",
    type=int,
    metavar="K",
    help="Devices of one node that hold it together, for a model too large for one of them.",
)
_replicas_option = click.option(
    "--replicas",
    type=click.IntRange(1, 16),  # refused before anything is uploaded
    metavar="N",
    help="Nodes that may hold a copy each, when one is too busy with it.",
)


@_replicas_option
@_devices_option
@click.option("--ignore", multiple=True, metavar="GLOB", help="Leave out files that match (repeatable).")
@click.option("--from", "origin", metavar="URL", help="Register a directory that the server reads: file:///…")
@click.argument("name", metavar="MODEL")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
def _model_push(
    client: Client,
    out: Output,
    name: str,
    directory: Path | None,
    origin: str | None,
    ignore: tuple[str, ...],
    devices: int | None,
    replicas: int | None,
) -> None:
    """Upload DIRECTORY as a new version of MODEL (tenant/name), or register it with --from.

    An interrupted push continues where it stopped when it is run again.
    """
    if (directory is None) == (origin is None):
        raise BadValue("DIRECTORY", "give either a directory to upload, or --from URL")
    if origin is not None:
        if ignore:
            raise BadValue("--ignore", "works with a directory only: the server reads the whole origin")
        pushed = client.register(name, origin)
    else:
        assert directory is not None
        try:
            with _progress(quiet=out.json) as progress:
                pushed = client.push(
                    name, directory, progress, ignore=ignore, devices=devices, replicas=replicas
                )
        except KeyboardInterrupt:
            click.echo("run it again to go on from here", err=True)
            raise
    if devices not in (None, pushed.devices) or replicas not in (None, pushed.replicas):
        try:
            pushed = client.set_model(pushed.ref, devices=devices, replicas=replicas)
        except BunkhouseError:
            on = "1 device" if pushed.devices == 1 else f"{pushed.devices} devices"
            click.echo(
                f"{pushed.ref} is registered, on {on} and up to {pushed.replicas} nodes as before; "
                f"`bunk model rm {pushed.ref}` removes it",
                err=True,
            )
            raise
    _warn(pushed)
    on = "a device" if pushed.devices == 1 else f"{pushed.devices} devices"
    nodes = f" of up to {pushed.replicas} nodes" if pushed.replicas > 1 else ""
    out.document(pushed, f"{pushed.ref}  {pushed.task}, {size(pushed.image_bytes)} on {on}{nodes}")


def _warn(changed: Model) -> None:
    for warning in changed.warnings:
        click.echo(printable(f"warning: {warning}"), err=True)


@click.argument("name", metavar="[TENANT]", required=False)
def _model_ls(client: Client, out: Output, name: str | None) -> None:
    """List the versions this key may see, or one tenant's."""
    out.rows(
        client.models(name),
        [
            ("MODEL", lambda row: row.ref),
            ("LATEST", lambda row: "yes" if row.latest else ""),
            ("TASK", lambda row: row.task),
            ("IMAGE", lambda row: size(row.image_bytes)),
            ("WORKSPACE", lambda row: size(row.workspace_bytes)),
            ("DEVICES", lambda row: row.devices),
            ("REPLICAS", lambda row: row.replicas),
            ("ORIGIN", lambda row: row.origin),
            ("CREATED", lambda row: moment(row.created_ms)),
        ],
        "no models",
    )


@click.option(
    "--batch-max",
    type=int,
    metavar="N",
    help="Inputs of waiting requests that share a forward pass; 1: none do.",
)
@click.option(
    "--batch-delay", type=Delay(), metavar="TIME", help="How long an input waits for company, as 5ms."
)
@_devices_option
@_replicas_option
@click.argument("name", metavar="MODEL")
def _model_set(
    client: Client,
    out: Output,
    name: str,
    batch_max: int | None,
    batch_delay: int | None,
    devices: int | None,
    replicas: int | None,
) -> None:
    """Change settings of tenant/name@version, or with tenant/name of all its versions.

    Nothing is loaded again: nodes go by the new settings within moments, and by another number of devices
    when the model next comes to them. Copies above a lower number of replicas go when others need the room.
    """
    if batch_max is None and batch_delay is None and devices is None and replicas is None:
        words = "--batch-max, --batch-delay, --devices and --replicas"
        raise BadValue("--batch-max", f"give at least one of {words}")
    changed = client.set_model(
        name, batch_max=batch_max, batch_delay_ms=batch_delay, devices=devices, replicas=replicas
    )
    _warn(changed)
    text = f"{name}  batch max {changed.batch_max}, batch delay {changed.batch_delay_ms} ms"
    text += f", {changed.devices} devices" if changed.devices > 1 else ""
    out.document(changed, text + (f", up to {changed.replicas} nodes" if changed.replicas > 1 else ""))


@yes_option
@click.argument("name", metavar="MODEL")
def _model_rm(client: Client, out: Output, name: str, yes: bool) -> None:
    """Delete tenant/name@version, or with tenant/name all its versions."""
    what = name if "@" in name else f"all versions of {name}"
    confirm(f"Delete {what}?", yes)
    client.delete_model(name)
    out.document({"deleted": name}, f"deleted {what}")


api_command(model, "push")(_model_push)
api_command(model, "ls")(_model_ls)
api_command(model, "set")(_model_set)
api_command(model, "rm")(_model_rm)
