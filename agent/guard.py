"""Who may pass the gateway's door, and what every answer says about its caller's limits.

Covers: the key of each request (refused by default, whatever route is added later), the few open routes,
metrics for this machine and the operator's scraper only, rate-limit headers. Does not cover: bodies,
encodings and the error shape, which the router shares (``packer/http.py``), or what a key may see
(``gateway``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from agent.facade import NodeFacade
from agent.scrape_key import ScrapeKey
from packer.http import (
    DEVICE_HEADER,
    NODE_HEADER,
    RATE_LIMIT_HEADER,
    RATE_REMAINING_HEADER,
    RATE_RESET_HEADER,
    RESTORE_MS_HEADER,
    RESTORED_BYTES_HEADER,
    SAYS,
    TIER_HEADER,
    TOKENS_LIMIT_HEADER,
    TOKENS_REMAINING_HEADER,
    TOKENS_RESET_HEADER,
    ApiError,
    bearer_text,
    enter,
    invalid_key,
)
from packer.local_caller import is_local
from packer.rates import RateView
from packer.types import KeySpec, Tier

# The routes that answer without a key. Health says only whether, never what.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
# Needs no tenant's key: a peer on this machine sees the machine's own figures, and who has the scraper's key
# sees those of tenants too, from anywhere. A proxy that ends TLS makes every stranger a local peer.
LOCAL_PATHS = frozenset({"/metrics"})


@dataclass(slots=True)
class AnswerFacts:
    """What a request's answer will say about how it was served; filled when it is granted."""

    tier: Tier | None = None
    restore_ms: int = 0
    restored_bytes: int = 0
    device: str = ""


KEY: web.RequestKey[KeySpec] = web.RequestKey("key", KeySpec)
FACTS: web.RequestKey[AnswerFacts] = web.RequestKey("facts", AnswerFacts)
# Whether the caller has shown the scraper's key; set on ``LOCAL_PATHS`` only.
SCRAPER: web.RequestKey[bool] = web.RequestKey("scraper", bool)


def require_key(node: NodeFacade, scraper: ScrapeKey | None = None) -> Middleware:
    """Every request needs a valid key unless its route is on the written list; unknown paths need one too."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[FACTS] = AnswerFacts()
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else ""
        if path in OPEN_PATHS:
            return await handler(request)
        if path in LOCAL_PATHS:
            request[SCRAPER] = scraper is not None and scraper.matches(bearer_text(request))
            if not request[SCRAPER] and not is_local(request):
                raise ApiError(
                    403,
                    "local_only",
                    "This is answered to callers on this machine, and to those who send the key in the "
                    "node's metrics.key as 'Authorization: Bearer …'.",
                )
            return await handler(request)
        text = bearer_text(request)
        key = node.find_key(text) if text else None
        if key is None:
            raise invalid_key()
        request[KEY] = key
        enter(request, key.tenant)
        return await handler(request)

    return check


def add_headers(app: web.Application, node: NodeFacade, node_name: str) -> None:
    """Say on every answer, streamed and failed ones too, who served it, from where, and what is left."""

    def says(request: web.Request) -> Mapping[str, str]:
        headers = {NODE_HEADER: node_name}
        facts, key = request.get(FACTS), request.get(KEY)
        if facts is not None and facts.tier is not None:
            headers[TIER_HEADER] = facts.tier.value
            headers[RESTORE_MS_HEADER] = str(facts.restore_ms)
            headers[RESTORED_BYTES_HEADER] = str(facts.restored_bytes)
            headers[DEVICE_HEADER] = facts.device
        if key is not None:
            headers.update(rate_headers(node.rate_views(key.tenant)))
        return headers

    app[SAYS] = says


# OpenAI knows headers for these two; the others are said in refusals and shown by `bunk quota show`.
_HEADERS = {
    "requests_per_minute": (RATE_LIMIT_HEADER, RATE_REMAINING_HEADER, RATE_RESET_HEADER),
    "tokens_per_minute": (TOKENS_LIMIT_HEADER, TOKENS_REMAINING_HEADER, TOKENS_RESET_HEADER),
}


def rate_headers(views: Sequence[RateView]) -> dict[str, str]:
    """OpenAI's rate-limit headers; none when there is no limit, as a sentinel has broken clients before."""
    headers: dict[str, str] = {}
    for view in views:
        if (names := _HEADERS.get(view.name)) is not None:
            values = (str(view.limit), str(max(view.remaining, 0)), duration_text(max(view.reset_ms, 0)))
            headers.update(zip(names, values, strict=True))
    return headers


def duration_text(span_ms: int) -> str:
    """A span as OpenAI writes it: ``12ms``, ``1.5s``, ``6m0s``, ``1h2m3s``."""
    if span_ms < 1000:
        return f"{span_ms}ms"
    minutes, rest_ms = divmod(span_ms, 60_000)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".")
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{seconds}s"
