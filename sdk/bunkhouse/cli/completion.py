"""``bunk completion``: what a shell needs to complete commands, options and their values.

Covers: bash, zsh and fish, by the scripts that click writes. Does not cover: completing names of models or
tenants, which would ask a server at each press of a key.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
# click's own name for it: the program's name in capitals.
_VARIABLE = "_BUNK_COMPLETE"

_HELP = """Print a script that completes bunk's commands and options in a shell.

\b
bash:  bunk completion bash > ~/.local/share/bash-completion/completions/bunk
zsh:   bunk completion zsh > "${fpath[1]}/_bunk"
fish:  bunk completion fish > ~/.config/fish/completions/bunk.fish
"""


@click.command(help=_HELP)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    kind = get_completion_class(shell)
    assert kind is not None  # one of the three that click brings
    # Not ``source()``: that runs the shell to look at its version, and a build machine may not have it.
    made = kind(context.find_root().command, {}, "bunk", _VARIABLE)
    click.echo(made.source_template % made.source_vars())
