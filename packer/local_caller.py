"""Whether a caller is a process on this machine: who may read figures without a key.

Covers: the peer's address, and headers that say that a proxy stands in between. Does not cover: which routes
go by it (``agent/guard.py``, ``control/routes/access.py``).
"""

from __future__ import annotations

import ipaddress

from aiohttp import web

# A proxy on this machine would make every caller local; any of these says that one stands in between.
FORWARDED_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


def is_local(request: web.Request) -> bool:
    """Whether the peer is a process on this machine, with no proxy in between."""
    if any(name in request.headers for name in FORWARDED_HEADERS) or request.transport is None:
        return False
    peer = request.transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return True  # a unix socket has no address: its file's mode already chose who may connect
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
