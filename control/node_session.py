"""The one HTTP session from the router to the nodes' gateways, and its connections.

Covers: how connections to nodes are made and kept, giving up one whose other end is gone without a word, and
telling a connection that was used before from a new one. Does not cover: what is sent over them
(``control.routes.forwarding``).
"""

from __future__ import annotations

import socket
from contextvars import ContextVar
from dataclasses import dataclass

import aiohttp
from aiohttp import AddrInfoType

from control.places import NodeResolver

# A node that takes no connection by then is not there; one lost packet is sent again after a second.
CONNECT_SECONDS = 3.0
# A node says something at least every few seconds (SSE comments) or answers within a restore's time.
SILENT_SECONDS = 600.0
# Idle connections are dropped before the node drops them, so that few requests
# meet one that is just being closed.
IDLE_SECONDS = 15.0
# A box that lost its power or its network says nothing, while a node may take minutes to answer. But its
# kernel confirms probes and data at once: without that for so long, nobody is there. Long enough for a node
# that does not read a large body for a while, which counts the same.
PROBE_SECONDS = 15
GONE_SECONDS = 60


@dataclass(slots=True)
class Connection:
    """What is found out about the connection that a request is sent on."""

    made: bool = False  # for this request: it was used by none before


_asked: ContextVar[Connection] = ContextVar("asked")


def ask_for_connection() -> Connection:
    """What becomes of the connection of the next request in this task. aiohttp's own traces tell it as well,
    at ten times the cost."""
    connection = Connection()
    _asked.set(connection)
    return connection


def open_session() -> aiohttp.ClientSession:
    # Connections are bounded by the router's own limit of requests.
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=IDLE_SECONDS, resolver=NodeResolver(), socket_factory=_probing
    )
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
    )


def _probing(address: AddrInfoType) -> socket.socket:
    """A socket that notices when the other end is gone."""
    if (asked := _asked.get(None)) is not None:
        asked.made = True  # aiohttp may be in a task of its own, which has the same object
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_SECONDS * 1000)
    return made
