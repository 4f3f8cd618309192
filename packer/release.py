"""Which release of the server's code this is.

Covers: the version of the installed distribution. Does not cover: who may be told (a key is needed
everywhere), or versions of formats and messages.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def server_version() -> str:
    """Of the installed distribution; a checkout that was never installed has none."""
    try:
        return version("bunkhouse-server")
    except PackageNotFoundError:
        return "unknown"
