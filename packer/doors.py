"""Connections that wait at a listener: for how long, how many of whom, and who goes when there are too many.

Covers: connections whose first request is not complete, and those that are kept open between requests.
Does not cover: requests that are being read or answered (``packer/crowd.py``), bodies that come slowly
(``packer/body_budget.py``), or TLS handshakes.

Nobody is refused a connection. When more wait than may, the one goes that waits longest of those who have
most: a request that is sent at once is answered, however many connections somebody else holds.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from aiohttp import web

# A connection's first request must have its whole head here by then. A slow line needs a second.
HEAD_SECONDS = 30.0
# A connection without a request is closed after this, also when half of a later request's head has come.
# Longer than load balancers keep theirs (600 s at most), so that they close first and lose no request.
KEEPALIVE_SECONDS = 620.0
# Connections of one tenant that are kept open between requests: more than any client's pool has.
OWNER_IDLE_MAX = 256
# Connections that have shown no good key, of one address (IPv6: one /64, which one machine may have whole).
ADDRESS_STRANGERS_MAX = 512
# All waiting connections of those kinds. Each costs some 30 KiB and a descriptor.
STRANGERS_MAX = 2_048
IDLE_MAX = 8_192
# Descriptors that a process asks for at its start: one per connection, and on a node per worker, segment and
# pack being read. The usual soft limit of 1,024 is used up by one hostile tenant.
DESCRIPTORS_WANTED = 65_536

Handler: TypeAlias = web.RequestHandler


class Group(NamedTuple):
    """Who waits: a tenant (or another owner of requests), or strangers of one address."""

    stranger: bool
    name: str


@dataclass(slots=True)
class _Open:
    """A connection. ``group``: it waits in this one; None while a request of it is answered."""

    transport: asyncio.Transport
    stranger: Group
    head_timer: asyncio.TimerHandle
    group: Group | None = None


class Doors:
    """The connections of one listener, and those of them that wait."""

    def __init__(
        self,
        head_seconds: float = HEAD_SECONDS,
        owner_idle: int = OWNER_IDLE_MAX,
        address_strangers: int = ADDRESS_STRANGERS_MAX,
        strangers: int = STRANGERS_MAX,
        idle: int = IDLE_MAX,
    ) -> None:
        self.head_seconds = head_seconds
        self.owner_idle = owner_idle
        self.address_strangers = address_strangers
        self.strangers = strangers
        self.idle = idle
        self._open: dict[Handler, _Open] = {}
        # In each group the connection that waits longest comes first.
        self._groups: dict[Group, dict[Handler, None]] = {}
        self._waiting = {True: 0, False: 0}  # of strangers, of owners

    @property
    def connections(self) -> int:
        return len(self._open)

    def idle_of(self, owner: str) -> int:
        """Connections of an owner that wait."""
        return len(self._groups.get(Group(False, owner), ()))

    @property
    def strangers_waiting(self) -> int:
        return self._waiting[True]

    def opened(self, handler: Handler, transport: asyncio.Transport) -> None:
        timer = asyncio.get_running_loop().call_later(self.head_seconds, self._hang_up, handler)
        place = address_group(transport.get_extra_info("peername"))
        one = self._open[handler] = _Open(transport, Group(True, place), timer)
        self._wait(handler, one, one.stranger)

    def asked(self, handler: Handler) -> None:
        """The head of a request is here; other limits bound it until it is answered."""
        one = self._open.get(handler)
        if one is not None:
            one.head_timer.cancel()
            self._leave(handler, one)

    def answered(self, handler: Handler, owner: str | None) -> None:
        """It waits again: as its owner's, or as a stranger's if the request showed no good key."""
        one = self._open.get(handler)
        if one is not None and not one.transport.is_closing():
            self._wait(handler, one, one.stranger if owner is None else Group(False, owner))

    def closed(self, handler: Handler) -> None:
        one = self._open.pop(handler, None)
        if one is not None:
            one.head_timer.cancel()
            self._leave(handler, one)

    def _wait(self, handler: Handler, one: _Open, group: Group) -> None:
        self._leave(handler, one)
        one.group = group
        members = self._groups.setdefault(group, {})
        members[handler] = None
        self._waiting[group.stranger] += 1
        if len(members) > (self.address_strangers if group.stranger else self.owner_idle):
            self._hang_up(next(iter(members)))
        elif self._waiting[group.stranger] > (self.strangers if group.stranger else self.idle):
            alike = [found for name, found in self._groups.items() if name.stranger == group.stranger]
            most = max(alike, key=len)
            self._hang_up(next(iter(most)))

    def _leave(self, handler: Handler, one: _Open) -> None:
        if one.group is None:
            return
        members = self._groups[one.group]
        del members[handler]
        if not members:
            del self._groups[one.group]
        self._waiting[one.group.stranger] -= 1
        one.group = None

    def _hang_up(self, handler: Handler) -> None:
        one = self._open[handler]
        self._leave(handler, one)
        # An answer that its caller does not take is not waited for.
        if one.transport.get_write_buffer_size():
            one.transport.abort()
        else:
            one.transport.close()


def address_group(peer: object) -> str:
    """Whom an address belongs to, as far as one can tell: an IPv4 address, or a /64 of IPv6."""
    if not isinstance(peer, tuple):
        return "local"  # a unix socket
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address.packed[:8] + bytes(8), 64)))
    return str(address)


class DoorRunner(web.AppRunner):
    """An application's runner whose server tells the doors of its connections."""

    def __init__(self, app: web.Application, doors: Doors, **options: Any) -> None:
        super().__init__(app, **options)
        self._doors = doors

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _DoorServer(self._doors, made)


class _DoorServer(web.Server):
    """Another server with the same settings; aiohttp lets no application choose its class."""

    def __init__(self, doors: Doors, made: web.Server) -> None:
        super().__init__(made.request_handler)
        self.__dict__.update(vars(made))
        self._doors = doors

    def connection_made(self, handler: Handler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._doors.opened(handler, transport)

    def connection_lost(self, handler: Handler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._doors.closed(handler)


def want_descriptors() -> None:
    """Raise this process's own limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_WANTED)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
