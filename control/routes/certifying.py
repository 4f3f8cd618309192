"""How a box gets its certificate from control, and another in time or late: nodes and routers alike.

Covers: what must be shown for each certificate, and the routes where it is. Does not cover: what is a kind's
own (``control.routes.joining`` for nodes, ``control.routes.routers``), deciding about tokens and signing
(``control.authority``), or the box's side (``packer.joining``).
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Generic, TypeVar

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from control.authority import (
    LATE_RENEWAL_MAX,
    Authority,
    BadCertificateRequest,
    JoinRefused,
    check_redemption,
    key_sha256_of,
    parse_node,
)
from control.catalog import Joiner, NodeRow, PutToken, RouterRow, TokenRow
from control.routes.access import Access, Caller, Route, removed
from control.routes.nodes import decode_message
from control.routing import wall_ms
from control.state import Control
from packer.certificates import CA_CHARS_MAX, Speaker, WrongSpeaker, read_late_speaker
from packer.http import ApiError
from packer.types import KIB, BadValue
from packer.wire import WIRE_VERSION, JoinAnswer, JoinAsk, LateRenewAsk, RenewAsk, encode

# A join is a token, two names and a certificate request; a late renewal a request and a certificate.
JOIN_BYTES_MAX = 32 * KIB

R = TypeVar("R", NodeRow, RouterRow)


@dataclass(frozen=True, slots=True)
class Entry(Generic[R]):
    """A join that may be made. ``known``: the row that the box has already, if it asks again. ``used`` is
    written with the row, so that a crash leaves both or neither."""

    name: str
    url: str
    key_sha256: str
    incarnation: str
    joined_ms: int
    token: TokenRow
    used: PutToken
    known: R | None


class Kind(ABC, Generic[R]):
    """What is a kind's own: nodes, or routers."""

    joiner: ClassVar[Joiner]
    access: ClassVar[Access]
    most: ClassVar[int]  # of one cluster

    @abstractmethod
    def rows(self, control: Control) -> Mapping[str, R]:
        """All of this kind, by name."""

    @abstractmethod
    def caller(self, caller: Caller) -> tuple[str, R]:
        """The name and the row of who calls with a certificate."""

    @abstractmethod
    def named(self, speaker: Speaker) -> str:
        """The name in a certificate; empty: it is of another kind."""

    @abstractmethod
    def url(self, ask: JoinAsk, request: web.Request) -> str:
        """Where the box that asks is called; empty for what nobody calls. Raises ``BadValue``."""

    @abstractmethod
    async def enter(self, control: Control, entry: Entry[R]) -> None:
        """It is one of the cluster from now on; the caller holds ``writing`` since it looked."""

    @abstractmethod
    def refuse_copy(self, control: Control, name: str) -> None:
        """Raises ``ApiError`` 409 while two boxes use that identity."""

    @abstractmethod
    def issue(self, authority: Authority, csr: x509.CertificateSigningRequest, name: str) -> str:
        """A certificate in PEM form, with its chain."""


def certificate_routes(kind: Kind[R]) -> tuple[Route[Control], ...]:
    prefix = f"/{kind.joiner}/v1"
    return (
        Route("POST", f"{prefix}/join", Access.OPEN, partial(join, kind)),
        Route("POST", f"{prefix}/renew", kind.access, partial(renew, kind)),
        Route("POST", f"{prefix}/renew-late", Access.OPEN, partial(renew_late, kind)),
    )


# --- joining --------------------------------------------------------------------------------------


async def join(kind: Kind[R], control: Control, request: web.Request, caller: Caller) -> web.Response:
    async with control.bodies.body(request, "join!", JOIN_BYTES_MAX) as body:
        ask = decode_message(body, JoinAsk)
    what, name = kind.joiner, parse_node(ask.name)
    url = kind.url(ask, request)
    csr = _request_in(control, ask.csr_pem)
    key_sha256 = key_sha256_of(csr)
    async with control.writing:
        token = control.catalog.tokens.get(ask.token_id)
        rows = kind.rows(control)
        known = rows.get(name)
        try:
            check_redemption(token, ask.token_secret, name, key_sha256, known, wall_ms(), what)
            _check_key_is_free(control, f"{what} {name}", key_sha256)
        except JoinRefused as error:
            raise _refused_join(control, error, f"{what} {name} from {request.remote}") from None
        if known is None and len(rows) >= kind.most:
            raise ApiError(
                507, f"too_many_{what}s", f"There are {kind.most} {what}s, the limit; remove one first."
            )
        assert token is not None  # a token that is absent was refused above
        used = PutToken(replace(token, used_key_sha256=key_sha256, used_node=name))
        await kind.enter(
            control, Entry(name, url, key_sha256, secrets.token_hex(8), wall_ms(), token, used, known)
        )
    control.record(f"{what}_joined", detail=f"{name} from {request.remote}, token {token.token_id}")
    return _certificate(kind, control, csr, name)


def _refused_join(control: Control, error: JoinRefused, who: str) -> ApiError:
    """What who may not join is told; operators are told of a conflict."""
    if error.conflict:
        control.record("join_refused", detail=f"{who}: {error}")
    return ApiError(
        409 if error.conflict else 401,
        "join_conflict" if error.conflict else "join_refused",
        f"Join refused: {error}.",
        should_retry=False,
    )


def _check_key_is_free(control: Control, who: str, key_sha256: str) -> None:
    """Raises ``JoinRefused`` when somebody else has this key: the box was made from a copy of that one.
    ``who``: the kind and the name."""
    catalog = control.catalog
    holders = [f"node {row.node}" for row in catalog.nodes.values() if row.key_sha256 == key_sha256]
    holders += [f"router {row.router}" for row in catalog.routers.values() if row.key_sha256 == key_sha256]
    holder = next((holder for holder in holders if holder != who), None)
    if holder is not None:
        kind, _, name = holder.partition(" ")
        raise JoinRefused(
            f"this box has the key of the {kind} {name!r}: its data directory was copied. Remove the folder "
            "'identity' in the copy and start it again with the same token",
            conflict=True,
        )


def _request_in(control: Control, csr_pem: str) -> x509.CertificateSigningRequest:
    try:
        return control.authority.read_request(csr_pem)
    except BadCertificateRequest as error:
        raise BadValue("csr_pem", str(error)) from None


def _certificate(
    kind: Kind[R], control: Control, csr: x509.CertificateSigningRequest, name: str
) -> web.Response:
    chain_pem = kind.issue(control.authority, csr, name)
    answer = JoinAnswer(WIRE_VERSION, control.meta.cluster, name, chain_pem, control.authority.ca_pem)
    return web.Response(body=encode(answer), content_type="application/json")


# --- another certificate --------------------------------------------------------------------------


async def renew(kind: Kind[R], control: Control, request: web.Request, caller: Caller) -> web.Response:
    what, (name, row) = kind.joiner, kind.caller(caller)
    async with control.bodies.body(request, caller.owner, JOIN_BYTES_MAX) as body:
        ask = decode_message(body, RenewAsk)
    csr = _request_in(control, ask.csr_pem)
    if key_sha256_of(csr) != row.key_sha256:
        raise ApiError(
            409,
            "other_key",
            f"A certificate is renewed for the {what}'s own key; join again to change the key.",
        )
    current = kind.rows(control).get(name)
    if current is None or current.incarnation != row.incarnation:
        raise removed(what, name)  # while its body was on its way
    kind.refuse_copy(control, name)
    return _certificate(kind, control, csr, name)


async def renew_late(kind: Kind[R], control: Control, request: web.Request, caller: Caller) -> web.Response:
    """For a box whose certificate ended while control was away. Anybody may ask: what is shown must be its
    last certificate and a request signed by its key, and what is given is of use to that key alone."""
    async with control.bodies.body(request, "join!", JOIN_BYTES_MAX) as body:
        ask = decode_message(body, LateRenewAsk)
    csr, what = _request_in(control, ask.csr_pem), kind.joiner
    speaker = _last_speaker(kind, control, ask.certificate_pem)
    name = kind.named(speaker)
    row = kind.rows(control).get(name)
    if row is None or not row.key_sha256 == speaker.key_sha256 == key_sha256_of(csr):
        # Whoever lacks the key learns no more than whoever names a box that never was.
        raise ApiError(
            403,
            f"{what}_removed",
            f"The certificate is not that of a {what} of this cluster, or the {what} was removed from it.",
            hint=f"Join again with a new token from: bunk {what} token create",
        )
    kind.refuse_copy(control, name)
    late_s = control.authority.now().timestamp() - speaker.ends_s
    if late_s > LATE_RENEWAL_MAX.total_seconds():
        days = f"{late_s / 86_400:.0f} days ago, more than {LATE_RENEWAL_MAX.days} days"
        raise _refused(kind, f"the certificate ended {days}")
    control.record(f"{what}_renewed_late", detail=f"{name} from {request.remote}, {late_s:.0f} s late")
    return _certificate(kind, control, csr, name)


def _last_speaker(kind: Kind[R], control: Control, certificate_pem: str) -> Speaker:
    if len(certificate_pem) > CA_CHARS_MAX:
        raise BadValue("certificate_pem", f"at most {CA_CHARS_MAX} characters")
    try:
        leaf = x509.load_pem_x509_certificates(certificate_pem.encode())[0]
        der = leaf.public_bytes(serialization.Encoding.DER)
    except (ValueError, IndexError):
        raise BadValue("certificate_pem", "is not a certificate in PEM form") from None
    try:
        return read_late_speaker(der, control.meta.cluster, control.authority.cas)
    except WrongSpeaker as error:
        raise _refused(kind, str(error)) from None


def _refused(kind: Kind[R], why: str) -> ApiError:
    return ApiError(
        403,
        "renewal_refused",
        f"No other certificate is given: {why}.",
        hint=f"Join again with a new token from: bunk {kind.joiner} token create",
        should_retry=False,
    )
