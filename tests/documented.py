"""Whether an answer of the public listener is one that its OpenAPI document knows.

Covers: the status of every answer that a test gets through ``running_control``, so that each test of a route
is also one of the document. Does not cover: bodies and headers (``test_openapi_clients``).
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from control.openapi import describe
from control.server import PUBLIC_ROUTES

# Parts of paths that may hold a slash.
_DEEP = {"ref", "path"}


@cache
def _operations() -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """Paths as patterns, the most literal ones first."""
    paths = json.loads(describe(PUBLIC_ROUTES, "1"))["paths"]

    def pattern(path: str) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", path)
        return re.compile(
            "".join(
                re.escape(part) if at % 2 == 0 else (".+" if part in _DEEP else "[^/]+")
                for at, part in enumerate(parts)
            )
        )

    return [(pattern(path), paths[path]) for path in sorted(paths, key=lambda path: (path.count("{"), path))]


def undocumented(method: str, path: str, status: int) -> str | None:
    """What is wrong with an answer, if it is none that the document has for this method and path."""
    plain = path.partition("?")[0]
    wanted = "get" if method == "HEAD" else method.lower()
    for pattern, entry in _operations():
        if pattern.fullmatch(plain) and wanted in entry:
            known = entry[wanted]["responses"]
            if status == 405 or str(status) in known:
                return None  # a 405 of a wildcard: the path is not one of those behind it
            return f"{method} {plain} answered {status}, documented are {sorted(known)}"
    return None  # no such route or method: 404 and 405 are everywhere
