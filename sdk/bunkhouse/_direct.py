"""Which calls go to a node directly, past the router, and with which ticket.

Covers: what is remembered of each model's nodes, when to ask the server for them, which URLs are called at
all, and when a call falls back to the router. Does no I/O and has no clock: the senders of ``_transport``
bring both. Does not cover: what a ticket is; the server makes it and the node checks it.

The router always works, so nothing here may fail a call or make it wait for long. The API key goes to no
URL but the client's own: a node gets a ticket, which is worth nothing elsewhere and ends in minutes.
"""

from __future__ import annotations

import ipaddress
import json
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from bunkhouse._errors import Unreachable
from bunkhouse._request import Address, Answer, Request

# A call that is the only one for its model does not pay for asking where it could go.
CALLS_BEFORE_ASKING = 2
# A server that does not say quickly is asked another time; the call goes through it meanwhile.
ASK_TIMEOUT_S = 5.0
# A node takes a connection in milliseconds, or can not be reached from here.
NODE_CONNECT_TIMEOUT_S = 1.0
# A node that could not be reached is left alone for this long.
AVOID_S = 60.0
# When the server names no node, or does not answer.
ASK_AGAIN_S = 60.0
# When a node did not take a ticket, or has no room: where the model is may just have changed.
ASK_AGAIN_SOON_S = 5.0
# A server of an earlier release, or a node, does not know the question.
NOT_KNOWN_S = 600.0
# Models remembered; the oldest go first. One is about 2 KB.
MODELS_MAX = 1_000
# Of one answer: more is not from our server.
WAYS_MAX = 8
# What a node may answer that the router may do better: it does not know the ticket or the model (any more),
# or can not now.
_ELSEWHERE = frozenset({401, 403, 404, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Way:
    """One node's URL, and what it takes in place of the API key."""

    url: str
    ticket: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ask:
    """The server is to be asked where ``model`` can be called; ``DirectWays.told`` takes the answer."""

    model: str
    request: Request


@dataclass(slots=True)
class _Known:
    """What is known of one model's nodes. Times are of the sender's steady clock."""

    calls: int = 0
    asking: bool = False
    ways: Sequence[Way] = ()
    refresh_s: float = 0.0  # the ways are as good as new until then
    expires_s: float = 0.0  # the tickets end
    ask_after_s: float = 0.0


class DirectWays:
    """Shared by all threads of a client. ``direct`` None: once a model is called a second time."""

    def __init__(
        self,
        address: Address,
        direct: bool | None,
        choose: Callable[[Sequence[Way]], Way] = random.choice,
    ) -> None:
        self._address = address
        self._direct = direct if address.api_key else False
        self._choose = choose
        self._lock = threading.Lock()
        self._models: dict[str, _Known] = {}
        self._avoided: dict[str, float] = {}  # until when, by URL

    def way(self, request: Request, now_s: float) -> Way | Ask | None:
        """Where to send a call: to a node, to the router (None), or first ask."""
        if self._direct is False or not request.model:
            return None
        with self._lock:
            known = self._models.get(request.model)
            if known is None:
                while len(self._models) >= MODELS_MAX:
                    del self._models[next(iter(self._models))]
                known = self._models[request.model] = _Known()
            known.calls += 1
            early = self._direct is None and known.calls < CALLS_BEFORE_ASKING
            if now_s < max(known.refresh_s, known.ask_after_s) or known.asking or early:
                return self._pick(known, now_s)
            known.asking = True
        path = f"/api/v1/route?model={quote(request.model, safe='')}"
        return Ask(request.model, Request("GET", path, timeout_s=ASK_TIMEOUT_S))

    def told(self, model: str, answer: Answer | None, now_s: float) -> Way | None:
        """Take the server's answer (None: there was none); where this call goes."""
        found = _read(answer) if answer is not None and answer.status == 200 else None
        with self._lock:
            known = self._models.setdefault(model, _Known())
            known.asking = False
            if found is not None:
                known.ways = [way for way in found.ways if allowed(way.url, self._address)]
                known.refresh_s, known.expires_s = now_s + found.refresh_s, now_s + found.expires_s
            elif answer is not None and 400 <= answer.status < 500 and answer.status != 429:
                known.ways = ()
            elif known.ways:
                # Nobody says anything: nodes that hear nothing of it either take the tickets that are out.
                known.expires_s = max(known.expires_s, now_s + ASK_AGAIN_S + ASK_TIMEOUT_S)
            if found is None or not known.ways:
                known.ask_after_s = now_s + (NOT_KNOWN_S if _knows_nothing(answer) else ASK_AGAIN_S)
            return self._pick(known, now_s)

    def falls_back(self, request: Request, way: Way, outcome: Answer | Unreachable, now_s: float) -> bool:
        """Whether the router is asked in the node's place. Remembers what that says about the node."""
        if isinstance(outcome, Unreachable):
            with self._lock:
                while len(self._avoided) >= MODELS_MAX:
                    del self._avoided[next(iter(self._avoided))]
                self._avoided[way.url] = now_s + AVOID_S
            return request.repeatable or not outcome.sent
        if outcome.status not in _ELSEWHERE:
            return False
        with self._lock:
            known = self._models.get(request.model)
            if known is not None:
                known.ways = [other for other in known.ways if other.url != way.url]
                if not known.ways:
                    known.refresh_s = 0.0
                    known.ask_after_s = now_s + ASK_AGAIN_SOON_S
        return True

    def _pick(self, known: _Known, now_s: float) -> Way | None:
        if now_s >= known.expires_s:
            return None
        ways = [way for way in known.ways if self._avoided.get(way.url, 0.0) <= now_s]
        return self._choose(ways) if ways else None


def allowed(url: str, address: Address) -> bool:
    """Whether a node's URL, as the server stated it, may be called from here.

    Never in the clear where the server itself is not called in the clear. An address of "this machine" means
    the node's: it is this one only if the server is here as well.
    """
    try:
        parts, base = urlsplit(url), urlsplit(address.base_url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
        return False
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        return False
    if (parts.scheme, host, port) == (base.scheme, base.hostname, base.port):
        return False  # the server itself: its own key is for that
    if _is_loopback(host):
        return address.loopback
    return parts.scheme == "https" or base.scheme == "http"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_loopback or found.is_unspecified


def _knows_nothing(answer: Answer | None) -> bool:
    """Whether the server does not know the question itself, or not this key."""
    if answer is None or answer.status not in (401, 403, 404, 405):
        return False
    return b"model_not_found" not in answer.body


@dataclass(frozen=True, slots=True)
class _Found:
    ways: Sequence[Way]
    refresh_s: float
    expires_s: float


def _read(answer: Answer) -> _Found | None:
    """The server's answer, if it is one. It decides about nothing but shortcuts, so a bad one is none."""
    try:
        data: Any = json.loads(answer.body)
        ways = [
            Way(_text(item["url"]).rstrip("/"), _text(item["ticket"])) for item in data["items"][:WAYS_MAX]
        ]
        return _Found(ways, _seconds(data["refresh_ms"]), _seconds(data["expires_ms"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4_096 or not value.isascii() or not value.isprintable():
        raise ValueError("not a line of text")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("not a number")
    return min(max(value, 0) / 1000, NOT_KNOWN_S)
