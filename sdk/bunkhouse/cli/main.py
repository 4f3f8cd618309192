"""The root of the ``bunk`` command.

Covers: the group and its subgroups. Does not cover: the commands, which live in ``accounts``,
``models``, ``fleet``, ``routers``, ``plans``, ``top``, ``doctor``, ``simulate``, ``completion`` and ``up``
and are added here.
"""

from __future__ import annotations

import click

from bunkhouse._version import __version__
from bunkhouse.cli.accounts import add_usage_command, key, quota, tenant
from bunkhouse.cli.completion import completion
from bunkhouse.cli.doctor import doctor
from bunkhouse.cli.fleet import add_fleet_commands, node
from bunkhouse.cli.models import model
from bunkhouse.cli.plans import add_plan_commands
from bunkhouse.cli.routers import router
from bunkhouse.cli.simulate import simulate
from bunkhouse.cli.top import add_top_command
from bunkhouse.cli.up import up

_EPILOG = """\
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 no key, wrong key or not allowed, 5 refused
by a quota, 6 server unreachable, 130 interrupted.
"""


# Options of every command, which people write before it as well.
_OF_COMMANDS = frozenset({"--url", "--key-file", "--output", "-o"})


class Root(click.Group):
    """Says where an option goes that stands before the command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0].partition("=")[0] if args else ""
        if first in _OF_COMMANDS:
            ctx.fail(f"{first} goes behind the command, as in: bunk ps {first} …")
        return super().parse_args(ctx, args)


@click.group(cls=Root, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bunk")
def bunk() -> None:
    """Pack many tenants' models onto the GPUs you already own."""


for _command in (up, node, router, tenant, key, quota, model, doctor, simulate, completion):
    bunk.add_command(_command)
add_usage_command(bunk)
add_fleet_commands(bunk)
add_plan_commands(bunk)
add_top_command(bunk)
