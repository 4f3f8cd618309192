"""The one HTTP session from the router to the nodes' gateways, and its connections.

Covers: how connections to nodes are made and kept, and telling a connection that was used before from a
new one. Does not cover: what is sent over them (``control.routes.forwarding``).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp

from control.places import NodeResolver

# A node that takes no connection by then is not there; one lost packet is sent again after a second.
CONNECT_SECONDS = 3.0
# A node says something at least every few seconds (SSE comments) or answers within a restore's time.
SILENT_SECONDS = 600.0
# Idle connections are dropped before the node drops them, so that few requests
# meet one that is just being closed.
IDLE_SECONDS = 15.0


@dataclass(slots=True)
class Connection:
    """What is found out about the connection that a request was sent on."""

    reused: bool = False


def open_session() -> aiohttp.ClientSession:
    """Requests name themselves to it with ``trace_request_ctx=Connection()``."""
    # Connections are bounded by the router's own limit of requests.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS, resolver=NodeResolver())
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_reused)
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trace_configs=[trace],
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
    )


async def _reused(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    parameters: aiohttp.TraceConnectionReuseconnParams,
) -> None:
    asked = context.trace_request_ctx
    if isinstance(asked, Connection):
        asked.reused = True
