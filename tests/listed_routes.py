"""The routes of an application as it lists them itself, so that a new one is tested by existing.

Covers: methods and patterns. Does not cover: what stands in a pattern's place (each test knows its things).
"""

from __future__ import annotations

from aiohttp import web


def routes_of(app: web.Application) -> set[tuple[str, str]]:
    return {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        # A HEAD is its GET without the body: one handler behind one check (``test_pages_and_tags``).
        if route.resource is not None and route.method != "HEAD"
    }


def sent_method(method: str) -> str:
    return "POST" if method == "*" else method
