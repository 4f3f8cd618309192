"""``bunk simulate``: how many boxes, how much RAM, for this traffic?

Covers: handing the command over to the server's own (``bunk-control simulate``), which has the cores. Does
not cover: the options, which are the server's, nor anything of the simulation.
"""

from __future__ import annotations

import subprocess
import sys

import click
from click.shell_completion import CompletionItem

from bunkhouse.cli.api import EXIT_FAILED, output_option

_EPILOG = """\
Exit codes: 0 done, 1 no fleet meets --solve or the server is not installed here, 2 wrong options, or a
trace, a list of models or a fleet that can not be used.
"""


# For shells only: what is given is handed over as it is, and the server says what it does not know.
OPTIONS = (
    "--trace", "--fleet", "--models", "--size", "--boxes", "--ram", "--solve", "--json", "--plot", "--help",
)  # fmt: skip


class HandedOver(click.Command):
    """Completes the options of the server's command, which this one has not."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            found += [CompletionItem(name) for name in OPTIONS if name.startswith(incomplete)]
        return found


@click.command(
    cls=HandedOver,
    epilog=_EPILOG,
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.Path())
@output_option
def simulate(output: str, arguments: tuple[str, ...]) -> None:
    """Replay a trace of requests on a fleet that you describe, and say what callers would have waited.

    Needs the server installed beside this command; nothing is sent anywhere. For its options:
    bunk simulate --help.
    """
    if sys.platform == "win32":
        click.echo("error: the server runs on Linux: run this there", err=True)
        raise click.exceptions.Exit(EXIT_FAILED)
    from bunkhouse.cli.supervise import UpFailed, find_executable

    try:
        control = find_executable("bunk-control")
        as_json = ("--json", "-") if output == "json" else ()
        done = subprocess.run([control, "simulate", *arguments, *as_json], check=False)
    except (UpFailed, OSError) as error:
        click.echo(f"error: {error}", err=True)
        raise click.exceptions.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        sys.exit(130)
    raise click.exceptions.Exit(done.returncode)
