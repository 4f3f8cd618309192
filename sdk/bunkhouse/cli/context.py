"""Which server a command talks to, and with which key.

Covers: the order of option, environment and context file, and the context file itself. Does not
cover: connecting. A key is never an argument, because other users of a machine can read arguments.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bunkhouse._request import KEY_ENV, URL_ENV
from bunkhouse.cli.private import BadFile, is_locked, others_may_read, read_private, write_private


@dataclass(frozen=True, slots=True)
class Context:
    """What ``bunk up`` leaves for the commands in other terminals: no secret, only where it is.

    While it starts, ``starting`` is the lock that it holds until it ends, and its URL is not known yet.
    """

    url: str
    key_file: str
    starting: str = ""

    @property
    def still_starts(self) -> bool:
        return bool(self.starting) and is_locked(Path(self.starting))


@dataclass(frozen=True, slots=True)
class Target:
    """The server and the key of one command."""

    url: str
    api_key: str | None = field(repr=False)


class NoTarget(Exception):
    """Nothing says which server to talk to."""


class StillStarting(Exception):
    """A ``bunk up`` runs, and nobody can talk to it yet."""


def context_path() -> Path:
    """``$XDG_CONFIG_HOME/bunkhouse/context.json``."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "bunkhouse" / "context.json"


def read_context() -> Context | None:
    """The context, or None when there is none. Raises ``BadFile`` when it is damaged."""
    path = context_path()
    if not path.exists():
        return None
    try:
        value = json.loads(read_private(path))
        url, key_file, starting = value["url"], value["key_file"], value.get("starting", "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadFile(f"{path} is damaged: delete it, or start `bunk up` again") from None
    if not (isinstance(url, str) and isinstance(key_file, str) and isinstance(starting, str)):
        raise BadFile(f"{path} is damaged: delete it, or start `bunk up` again")
    return Context(url, key_file, starting)


def write_context(context: Context) -> None:
    path = context_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(f"cannot create {path.parent}: {error.strerror}") from None
    write_private(path, json.dumps(asdict(context)) + "\n")


def remove_context(context: Context) -> None:
    """Remove the context if it is still this one: its port may soon be somebody else's."""
    try:
        if read_context() == context:
            context_path().unlink(missing_ok=True)
    except (BadFile, OSError):
        return


def find_target(url: str | None, key_file: Path | None) -> Target:
    """Options first, then the environment, then the context file."""
    context = read_context()
    chosen = url or os.environ.get(URL_ENV) or (context.url if context else None)
    if not chosen:
        if context is not None and context.still_starts:
            raise StillStarting("`bunk up` is still starting: it says when Bunkhouse is running")
        raise NoTarget(f"no server: start one with `bunk up`, or give --url or {URL_ENV}")
    if key_file is not None:
        return Target(chosen, read_key(key_file))
    from_environment = os.environ.get(KEY_ENV)
    if from_environment:
        return Target(chosen, from_environment)
    # The context's key belongs to the context's server and is never sent to another one.
    if context and chosen.rstrip("/") == context.url.rstrip("/"):
        return Target(chosen, read_key(Path(context.key_file)))
    return Target(chosen, None)


def read_key(path: Path) -> str:
    """A key from a file, or from standard input when the path is ``-``."""
    if str(path) == "-":
        text = sys.stdin.readline()
    else:
        text = read_private(path)
        if others_may_read(path):
            print(f"warning: others can read the key in {path}: chmod 600 it", file=sys.stderr)
    key = text.strip()
    if not key:
        raise BadFile(f"{path} holds no key")
    return key
