"""The ``bunk`` command: a thin layer over ``bunkhouse.Client``, and ``bunk up``.

Covers: the entry point, and the message when the extra is not installed. Does not cover: commands
(``main``, ``accounts``, ``models``, ``fleet``, ``up``).
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError:
        print("bunk needs the extra 'cli': pip install 'bunkhouse[cli]'", file=sys.stderr)
        sys.exit(1)
    from bunkhouse.cli.main import bunk

    bunk(prog_name="bunk")
