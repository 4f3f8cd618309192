"""Where nodes say that they are, and what of it control ever connects to.

Covers: checking the URLs in a node's messages, addresses that mean "this machine" to the node, and names that
lead to addresses nobody serves tenants at. Does not cover: who answers there (``control.node_tls`` lets
nobody but that node speak, where the line is TLS) or what is sent (``control.routes.forwarding``).

A node that was taken over chooses its URLs. What it must not get is control's hands: connections to services
of control's own machine, or of the network's metadata.
"""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache
from urllib.parse import SplitResult, urlsplit

from aiohttp import DefaultResolver, web
from aiohttp.abc import AbstractResolver, ResolveResult

from packer.types import BadValue

GATEWAY_URL_CHARS_MAX = 256
# Hosts that were read before, some 400 bytes each: every beat names the same ones again.
HOSTS_KNOWN_MAX = 16_384
# Names of this machine, which may lead to its loopback addresses.
_LOCAL_NAME = "localhost"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_gateway_url(url: str) -> None:
    """Where this router will send tenants' requests. Raises ``BadValue``."""
    check_url(url, "gateway_url", ("http", "https"))


def check_url(url: str, field: str, schemes: tuple[str, ...]) -> None:
    """Raises ``BadValue`` that names ``field``."""
    parts = _parts(url, schemes)
    if parts is None or parts.hostname is None:
        kind = "http(s)" if "http" in schemes else "https"
        raise BadValue(
            field, f"must be {kind}://host:port of at most {GATEWAY_URL_CHARS_MAX} characters, without a path"
        )
    address = literal(parts.hostname)
    if address is not None and serves_nobody(address):
        raise BadValue(field, f"{parts.hostname} is no address that a node can be called at")


def _parts(url: str, schemes: tuple[str, ...]) -> SplitResult | None:
    """A URL of the only form that is taken, or None."""
    if len(url) > GATEWAY_URL_CHARS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in schemes or not parts.hostname or port == 0:
        return None
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc or "\\" in url:
        return None
    return parts


@lru_cache(HOSTS_KNOWN_MAX)
def literal(host: str) -> _Address | None:
    """The address that a host is written as; an IPv4 address in IPv6 is that IPv4 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.sixtofour or address
    return address


def serves_nobody(address: _Address) -> bool:
    """Link-local addresses (clouds answer with a machine's credentials there), groups, and reserved ones."""
    if address.is_loopback or address.is_unspecified:
        return False  # the node's own machine: ``dialled_url``
    return address.is_link_local or address.is_multicast or address.is_reserved


def dialled_url(url: str, peer: str | None, own: str | None = None) -> str:
    """``url``, with the address that the node dials from in place of one that means the node's own machine.

    An agent that listens on 0.0.0.0 can not know under which address others reach it; the address that its
    own connection comes from is the likeliest. One that says 127.0.0.1 from another machine than this means
    that machine, and must not be called on this one. ``own``: this end's address of the node's connection.
    """
    parts = urlsplit(url)
    named, host = literal(parts.hostname or ""), literal(peer or "")
    if host is None:
        return url
    near = host.is_loopback or host == literal(own or "")
    local = (parts.hostname or "").rstrip(".") == _LOCAL_NAME or (named is not None and named.is_loopback)
    if not (named is not None and named.is_unspecified) and (near or not local):
        return url
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{f'[{host}]' if host.version == 6 else host}{port}"


def own_address(request: web.Request) -> str | None:
    """This end's address of the connection that a request came on."""
    name = request.transport.get_extra_info("sockname") if request.transport is not None else None
    return str(name[0]) if isinstance(name, tuple) else None


class NodeResolver(AbstractResolver):
    """Looks names of nodes up, and takes no address that a node's message might not name itself.

    Addresses are connected to as they were found: between the look and the connection nothing asks again.
    """

    def __init__(self, inner: AbstractResolver | None = None) -> None:
        self._inner = inner or DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        kept = [one for one in found if self._may(host, one["host"])]
        if not kept:
            raise OSError(f"{host[:80]!r} leads to no address that a node can be called at")
        return kept

    @staticmethod
    def _may(host: str, text: str) -> bool:
        address = literal(text)
        if address is None or serves_nobody(address) or address.is_unspecified:
            return False
        # 127.1, 2130706433 and names that somebody else gives addresses to are not this machine's name.
        return not address.is_loopback or host.rstrip(".").lower() in (
            _LOCAL_NAME,
            socket.gethostname().lower(),
        )

    async def close(self) -> None:
        await self._inner.close()
