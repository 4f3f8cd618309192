"""``bunk-agent rotate-key``: new node or tenant keys without rewriting a byte of a pack.

Covers: the command, and the order of its steps that makes a kill at any moment harmless. Does not cover:
wrapping keys (``agent/journal.py``) or deciding when to rotate.

The node key, in four steps: the new key is written beside the old one; one transaction of the journal
wraps all tenant keys under it and says so; the new key takes the old one's name; the write-ahead log is
emptied of what the old key opened. ``journal.open_journal`` finishes whatever was cut off.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.data_dir import hold_data_dir
from agent.journal import (
    JOURNAL,
    NEXT_NODE_KEY,
    NODE_KEY,
    Journal,
    JournalFailed,
    Rewrapped,
    open_journal,
    put_in_force,
)
from packer.durable import write_private
from packer.seal import BadSeal, new_key
from packer.types import BadValue, parse_tenant

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bunk-agent rotate-key",
        description="Replace the node's key, or one tenant's, while the agent is stopped. "
        "Packs are not rewritten; a backup of the old seal.key opens nothing afterwards.",
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the agent's --data-dir")
    parser.add_argument("--tenant", help="rotate this tenant's key instead of the node's")
    options = parser.parse_args(arguments)
    try:
        tenant = None if options.tenant is None else parse_tenant(options.tenant, "--tenant")
        _check_data_dir(options.data_dir)
    except BadValue as error:
        return _fail(str(error), EXIT_USAGE)
    os.umask(0o077)
    try:
        with hold_data_dir(options.data_dir):
            print(_rotate(options.data_dir, tenant))
    except JournalFailed as error:
        return _fail(f"the key is rotated, but not all traces of the old one are gone: {error}", EXIT_FAILED)
    except (OSError, sqlite3.Error, BadSeal, LookupError, ValueError) as error:
        return _fail(str(error), EXIT_FAILED)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"bunk-agent rotate-key: {message}", file=sys.stderr)
    return code


def _check_data_dir(data_dir: Path) -> None:
    for name in (JOURNAL, NODE_KEY):
        if not (data_dir / name).is_file():
            message = f"{data_dir} has no {name}; name the --data-dir of an agent that has run"
            raise BadValue("--data-dir", message)


def _rotate(data_dir: Path, tenant: str | None) -> str:
    """Returns what to say. Raises ``JournalFailed`` only when the keys are rotated already."""
    journal = open_journal(data_dir)
    try:
        if tenant is not None:
            count = journal.rotate_tenant_key(tenant)
            journal.scrub()
            return f"tenant {tenant} has a new key; {count} data keys are wrapped under it"
        done = rotate_node_key(journal, data_dir)
    finally:
        journal.close()
    text = f"the node has a new key; the keys of {len(done.tenants)} tenants are wrapped under it"
    if done.unreadable:
        names = ", ".join(done.unreadable)
        text += f". The old key opened none of these, their packs are rebuilt from the origin: {names}"
    return text


def rotate_node_key(journal: Journal, data_dir: Path) -> Rewrapped:
    """All steps for the node key; the journal goes on working under the new one."""
    key = new_key()
    write_private(data_dir / NEXT_NODE_KEY, key)
    done = journal.rotate_node_key(key)
    put_in_force(data_dir)
    journal.scrub()
    return done
