"""``bunk-control rotate-ca``: replace the cluster's CA while its nodes go on.

Covers: the command. Does not cover: what a rotation does (``control.ca``) or how nodes hear of it
(``control.state``).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from control.ca import NoRotation, begin_rotation
from control.state import AlreadyRunning, lock_data_dir

EXIT_FAILED, EXIT_USAGE = 1, 2
_TEXT = """\
A next CA is made. Start control again: nodes hear of it with their next beat and trust both, join tokens
made from now on pin the next one, and nodes get its certificates as theirs are renewed. Tokens made before
stay good until the former CA ends, by itself, about a day after the last node has heard of the next one
(`bunk events` says when). A node that is away for all that time must join again with a new token.
"""


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when a rotation has begun, 1 with the reason when not, 2 when the
    directory is none of control's."""
    parser = argparse.ArgumentParser(
        prog="bunk-control rotate-ca",
        description="Begin to replace the cluster's CA; control must be stopped for this moment.",
        epilog=_TEXT,
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="control's")
    directory = parser.parse_args(arguments).data_dir
    if not (directory / "ca.pem").is_file():
        message = f"{directory} has no ca.pem; name the --data-dir of a control server that has run"
        print(f"bunk-control: --data-dir: {message}", file=sys.stderr)
        return EXIT_USAGE
    os.umask(0o077)
    try:
        descriptor = lock_data_dir(directory)
        try:
            cas = begin_rotation(directory, datetime.now(UTC))
        finally:
            os.close(descriptor)
    except (NoRotation, AlreadyRunning, OSError, ValueError) as error:
        print(f"bunk-control: {error}", file=sys.stderr)
        return EXIT_FAILED
    assert cas.next is not None
    print(f"{_TEXT}\nnext CA: {cas.next.pin}")
    return 0
