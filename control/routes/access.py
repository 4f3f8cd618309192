"""Who may call what: the one table that routes are registered through, and the check before each.

Covers: the kinds of access, the caller that a handler is given, errors in the management API's shape,
and reading a JSON body. Does not cover: what an individual handler lets a tenant see (each calls
``tenant_of`` or compares with its own rows), or who a client certificate speaks for
(``control.authority``).

There is no way to add a route without stating its access, and a test enumerates all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from control.authority import NodeIdentity, NotANode
from control.catalog import Change, Joiner, NodeRow, RouterRow, TenantRow
from control.idempotency import BODY, LIFE_MS, Claim, claim_of
from control.lives import CLONE_MEMORY_MS
from control.model_store import ModelStoreError
from control.operations import IDEMPOTENCY_HEADER, MANAGEMENT, Operation, Passed
from control.questions import OPERATOR_OWNER
from control.routing import Routing, wall_ms
from control.state import Control
from control.store import StoreUnavailable
from packer.http import (
    ApiError,
    bearer_text,
    decode_json,
    enter,
    invalid_key,
    retry_headers,
)
from packer.local_caller import is_local
from packer.oip import is_oip, tenants_response
from packer.types import BadValue, parse_tenant

T = TypeVar("T")

RETRY_STORE_MS = 2_000


class Access(StrEnum):
    """What a caller must show. ``CALLER``: an operator's or any tenant's key. ``LOCAL``: nothing, but it must
    be on this machine."""

    OPEN = "open"
    LOCAL = "local"
    OPERATOR = "operator"
    CALLER = "caller"
    TENANT = "tenant"
    NODE = "node"
    ROUTER = "router"


# What keys, or nothing, are shown for; the others want a certificate.
KEY_ACCESSES = frozenset({Access.OPEN, Access.LOCAL, Access.OPERATOR, Access.CALLER, Access.TENANT})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a key's tenant (None: an operator), or a node's or a router's row on the node listener.

    ``claim``: of a POST with an Idempotency-Key.
    """

    tenant: str | None = None
    key_id: str = ""
    node: NodeRow | None = None
    router: RouterRow | None = None
    claim: Claim | None = None

    def remembering(self, answer: web.Response) -> list[Change]:
        """What goes into the same transaction as the request's effect, so that a crash leaves both or
        neither: its answer, if the caller may ask for it again."""
        return [*self.claim.keep(answer, wall_ms())] if self.claim is not None else []

    @property
    def is_operator(self) -> bool:
        return bool(self.key_id) and self.tenant is None

    @property
    def owner(self) -> str:
        """What the bytes of the caller's bodies are counted under (see ``packer.body_budget``)."""
        if self.node is not None:
            return f"node!{self.node.node}"  # no tenant's name has a '!'
        if self.router is not None:
            return f"router!{self.router.router}"
        return self.tenant or OPERATOR_OWNER


# What a handler acts on: all of control, or no more than routing needs.
S = TypeVar("S", bound=Routing, contravariant=True)
Handle = Callable[[S, web.Request, Caller], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route(Generic[S]):
    """``stays``: the handler runs to its end although its caller has left, because it changes state.

    ``operation`` is what the OpenAPI document says of it; ``passes``: operations behind its wildcard. One of
    them is needed on the public listener; here the management API is held to it, the rest by a test.
    """

    method: str
    path: str
    access: Access
    handle: Handle[S]
    stays: bool = True
    operation: Operation | None = None
    passes: Sequence[Passed] = ()

    def __post_init__(self) -> None:
        if self.path.startswith(MANAGEMENT) and self.operation is None:
            raise ValueError(f"{self.method} {self.path} needs an operation: what the document says of it")


def add_routes(
    app: web.Application, control: Control, routes: Sequence[Route[Control]], *, heads: bool = False
) -> None:
    """``heads``: every GET may be asked as HEAD; not for handlers that stream."""
    for route in routes:
        _add(app, route, _guarded(control, route), heads)


def add_passing_routes(
    app: web.Application, routing: S, routes: Sequence[Route[S]], *, heads: bool = False
) -> None:
    """The same for a process that only passes calls on: keys are checked, and nothing is changed."""
    for route in routes:
        if route.stays or route.access not in KEY_ACCESSES:
            raise ValueError(f"{route.method} {route.path} is not for a process that only passes calls on")
        _add(app, route, _handler(routing, route, identify_key), heads)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _add(app: web.Application, route: Route[S], handler: Handler, heads: bool) -> None:
    app.router.add_route(route.method, route.path, handler)
    if heads and route.method == "GET":
        app.router.add_route("HEAD", route.path, handler)


def _guarded(control: Control, route: Route[Control]) -> Handler:
    return _handler(control, replace(route, handle=_kept(route)) if route.stays else route, identify)


def _kept(route: Route[Control]) -> Handle[Control]:
    """The route's handler, in a task of its own."""

    async def handle(control: Control, request: web.Request, caller: Caller) -> web.StreamResponse:
        task = asyncio.ensure_future(_handled(control, request, caller, route))
        control.keep(task)
        return await asyncio.shield(task)

    return handle


def _handler(routing: S, route: Route[S], identify: Callable[[S, web.Request, Access], Caller]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        caller = identify(routing, request, route.access)
        if route.access not in (Access.OPEN, Access.LOCAL):
            enter(request, caller.owner)
        try:
            return await route.handle(routing, request, caller)
        except BadValue as error:
            raise ApiError(400, "invalid_value", error.message, field=error.field) from None
        except ConnectionError:
            raise  # the caller left; there is nobody to answer
        except (StoreUnavailable, ModelStoreError, OSError) as error:
            routing.log_fault(route.path, error)
            raise ApiError(
                503,
                "store_unavailable",
                "Control's own storage can not be read or written now; nothing was changed.",
                kind="server_error",
                hint="The operator finds the reason in control's log (a full disk, most often).",
                retry_ms=RETRY_STORE_MS,
                should_retry=True,
            ) from None

    return handler


async def _handled(
    control: Control, request: web.Request, caller: Caller, route: Route[Control]
) -> web.StreamResponse:
    """Handle a request that changes state; one that was sent before with its Idempotency-Key only once."""
    repeats = route.method == "POST" and route.path.startswith(MANAGEMENT)
    if not repeats or IDEMPOTENCY_HEADER not in request.headers:
        return await route.handle(control, request, caller)
    async with control.bodies.body(request, caller.owner) as body:
        request[BODY] = body
        claim = claim_of(request, caller.tenant or "", body)
        async with control.turns.turn(claim.slot):
            check_still(control, caller)
            row = await control.read(lambda store: store.replay(claim.slot))
            if row is not None and wall_ms() - row.made_ms < LIFE_MS:
                return claim.again(row)
            answer = await route.handle(control, request, replace(caller, claim=claim))
            if isinstance(answer, web.Response) and answer.status < 300 and not claim.kept:
                await _remember(control, claim, answer)
            return answer


async def _remember(control: Control, claim: Claim, answer: web.Response) -> None:
    """Keep an answer that came with no effect; if it can not be kept, a repetition is answered anew."""
    try:
        async with control.writing:
            await control.write(claim.keep(answer, wall_ms()))
    except StoreUnavailable as error:
        control.log_fault("idempotency", error)


def identify(control: Control, request: web.Request, access: Access) -> Caller:
    """The caller, if ``access`` lets them in. Raises ``ApiError`` 401 or 403."""
    if access is Access.NODE:
        return _identify_node(control, request)
    if access is Access.ROUTER:
        return _identify_router(control, request)
    return identify_key(control, request, access)


def identify_key(routing: Routing, request: web.Request, access: Access) -> Caller:
    """As ``identify``, of callers who show a key or nothing."""
    if access is Access.OPEN:
        return Caller()
    if access is Access.LOCAL:
        if not is_local(request):
            raise ApiError(403, "local_only", "This is answered to callers on this machine only.")
        return Caller()
    routing.check_ready()
    text = bearer_text(request) or ""
    known = routing.known_keys.check(routing.catalog.key_specs, text, routing.wall_ms())
    if known is None:
        raise invalid_key()
    caller = Caller(known.tenant or None, known.key_id)
    if access is Access.OPERATOR and not caller.is_operator:
        raise ApiError(403, "operator_key_required", "This needs an operator's key, not a tenant's.")
    if access is Access.TENANT and caller.is_operator:
        raise ApiError(
            403,
            "tenant_key_required",
            "Models are called with a tenant's key, not an operator's.",
            hint="Make one with: bunk key create TENANT",
        )
    return caller


def _identify_node(control: Control, request: web.Request) -> Caller:
    identity = _certified(control, request, "nodes")
    if not identity.node:
        raise ApiError(403, "not_a_node", "Only nodes may call this, and a router is none.")
    row = control.catalog.nodes.get(identity.node)
    if row is None or row.key_sha256 != identity.key_sha256:
        raise removed(Joiner.NODE, identity.node)
    return Caller(node=row)


def _identify_router(control: Control, request: web.Request) -> Caller:
    identity = _certified(control, request, "routers")
    if not identity.router:
        raise ApiError(403, "not_a_router", "Only routers may call this, and a node is none.")
    row = control.catalog.routers.get(identity.router)
    if row is None or row.key_sha256 != identity.key_sha256:
        raise removed(Joiner.ROUTER, identity.router)
    return Caller(router=row)


def removed(what: Joiner, name: str) -> ApiError:
    return ApiError(
        403,
        f"{what}_removed",
        f"The {what} {name!r} was removed from this cluster.",
        hint=f"Join again with a new token from: bunk {what} token create",
    )


# What runs on the copy, and what neither box is given.
_CLONED = {
    Joiner.NODE: ("bunk-agent", "Neither is sent requests or plans"),
    Joiner.ROUTER: ("bunk-control router", "Neither is told what is new"),
}


def cloned(what: Joiner, name: str) -> ApiError:
    """For each of two boxes that share an identity: nobody knows which is right."""
    process, withheld = _CLONED[what]
    return ApiError(
        409,
        f"{what}_cloned",
        f"Two boxes use the identity of {what} {name!r}: a machine image or data directory was copied with "
        f"it. {withheld} until one of them is silent for {CLONE_MEMORY_MS // 60_000} minutes. On the copy: "
        f"stop {process}, remove the folder 'identity' in its data directory, and join it under a name of "
        f"its own with a new token (`bunk {what} token create`). If you did not copy anything, remove the "
        f"{what}: its key was stolen.",
    )


def _certified(control: Control, request: web.Request, who: str) -> NodeIdentity:
    transport = request.transport
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    certificate = tls.getpeercert(binary_form=True) if tls is not None else None
    try:
        return control.authority.identify(certificate, control.authority.now())
    except NotANode as error:
        raise ApiError(
            401, "node_certificate_required", f"Only {who} may call this: {error}.", hint="Join first."
        ) from None


# --- for handlers ---------------------------------------------------------------------------------


def not_found(what: str, text: str, hint: str | None = None) -> ApiError:
    """The same for what does not exist and for what is somebody else's."""
    message = f"There is no {what} {text[:120]!r}, or it is not yours."
    return ApiError(404, f"{what}_not_found", message, hint=hint)


def tenant_of(control: Control, caller: Caller, text: str) -> TenantRow:
    """The tenant in a path, if it exists and the caller may act for it; else the one 404."""
    row = control.catalog.tenants.get(text)
    if row is None or not (caller.is_operator or caller.tenant == text):
        # Whoever may see all tenants may be told how to make one.
        raise not_found("tenant", text, "Make it with: bunk tenant create" if caller.is_operator else None)
    return row


def own_tenant_filter(control: Control, request: web.Request, caller: Caller) -> str | None:
    """The tenant that a list is limited to: a tenant's own, or what an operator asks for (None: all)."""
    asked = request.query.get("tenant")
    if asked is None:
        return caller.tenant
    return tenant_of(control, caller, parse_tenant(asked)).tenant


def whole_number(request: web.Request, name: str, default: int, most: int, least: int = 0) -> int:
    """A number from the query, ``least`` to ``most``."""
    text = request.query.get(name)
    if text is None:
        return default
    plain = text.isascii() and text.isdecimal() and len(text) <= 18
    if not plain or not least <= int(text) <= most:
        raise BadValue(name, f"must be a whole number from {least} to {most}")
    return int(text)


async def read_json(control: Control, request: web.Request, caller: Caller, kind: type[T]) -> T:
    """The body, decoded and checked. Raises ``ApiError`` that names the field."""
    if (held := request.get(BODY)) is not None:
        return decode_json(held, kind)
    async with control.bodies.body(request, caller.owner) as body:
        check_still(control, caller)
        return decode_json(body, kind)


def check_still(control: Control, caller: Caller) -> None:
    """Refuse whoever's key was revoked, or ended, while the request waited or its body came in, which takes
    as long as the caller likes. Raises ``ApiError`` 401."""
    key = control.catalog.key_specs.get(caller.key_id)
    if key is None or (key.expires_ms is not None and wall_ms() >= key.expires_ms):
        raise invalid_key()


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorBody:
    code: str
    message: str
    field: str | None
    hint: str | None


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    error: ErrorBody


def render_error(request: web.Request, error: ApiError) -> web.Response:
    """Each tenants' protocol's own shape below ``/v1`` and ``/v2``, the management API's elsewhere."""
    if request.path.startswith("/v1/") or request.path == "/v1" or is_oip(request.path):
        return tenants_response(request, error)
    # A caller's words that an error repeats may hold what is no valid text.
    message = error.message.encode("utf-8", "replace").decode()
    body = ErrorAnswer(ErrorBody(error.code, message, error.field, error.hint))
    return web.Response(
        status=error.status,
        body=msgspec.json.encode(body),
        content_type="application/json",
        headers={**error.headers, **retry_headers(error)},
    )
