"""How a box becomes a node and stays one: the CAs, join, renewal, and renewal of what has ended.

Covers: the routes that give certificates, each with what must be shown for one. Does not cover: deciding
about tokens and signing (``control.authority``), or what nodes say afterwards (``control.routes.nodes``).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from control import cluster as fleet
from control.authority import (
    LATE_RENEWAL_MAX,
    BadCertificateRequest,
    JoinRefused,
    check_redemption,
    key_sha256_of,
    parse_node,
)
from control.catalog import NODES_MAX, Change, NodeRow, PutNode, PutToken
from control.places import check_gateway_url, dialled_url, own_address
from control.routes.access import Access, Caller, Route
from control.routes.nodes import (
    decode_message,
    refuse_clone,
    row_of,
)
from control.routing import wall_ms
from control.shares import HolderJoined
from control.state import Control
from packer.certificates import CA_CHARS_MAX, Speaker, WrongSpeaker, read_late_speaker
from packer.http import ApiError
from packer.types import KIB, BadValue
from packer.wire import WIRE_VERSION, JoinAnswer, JoinAsk, LateRenewAsk, RenewAsk, encode

# A join is a token, two names and a certificate request; a late renewal a request and a certificate.
JOIN_BYTES_MAX = 32 * KIB


async def ca(control: Control, request: web.Request, caller: Caller) -> web.Response:
    return web.Response(text=control.authority.ca_pem, content_type="application/x-pem-file")


async def join(control: Control, request: web.Request, caller: Caller) -> web.Response:
    async with control.bodies.body(request, "join!", JOIN_BYTES_MAX) as body:
        ask = decode_message(body, JoinAsk)
    node = parse_node(ask.name)
    check_gateway_url(ask.gateway_url)
    gateway_url = dialled_url(ask.gateway_url, request.remote, own_address(request))
    csr = request_in(control, ask.csr_pem)
    key_sha256 = key_sha256_of(csr)
    async with control.writing:
        token = control.catalog.tokens.get(ask.token_id)
        known = control.catalog.nodes.get(node)
        try:
            check_redemption(token, ask.token_secret, node, key_sha256, known, wall_ms())
            check_key_is_free(control, f"node {node}", key_sha256)
        except JoinRefused as error:
            raise refused_join(control, error, f"{node} from {request.remote}") from None
        if known is None and len(control.catalog.nodes) >= NODES_MAX:
            raise ApiError(
                507, "too_many_nodes", f"There are {NODES_MAX} nodes, the limit; remove one first."
            )
        assert token is not None  # a token that is absent was refused above
        row = known or NodeRow(node, secrets.token_hex(8), key_sha256, gateway_url, wall_ms())
        row = replace(row, pool=token.pool)
        used = replace(token, used_key_sha256=key_sha256, used_node=node)
        await add_node(control, replace(row, gateway_url=gateway_url), [PutToken(used)])
    control.record("node_joined", detail=f"{node} from {request.remote}, token {token.token_id}")
    return certificate_answer(control, control.authority.issue_node(csr, node), node)


def refused_join(control: Control, error: JoinRefused, who: str) -> ApiError:
    """What who may not join is told; operators are told of a conflict."""
    if error.conflict:
        control.record("join_refused", detail=f"{who}: {error}")
    return ApiError(
        409 if error.conflict else 401,
        "join_conflict" if error.conflict else "join_refused",
        f"Join refused: {error}.",
        should_retry=False,
    )


def check_key_is_free(control: Control, who: str, key_sha256: str) -> None:
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


def request_in(control: Control, csr_pem: str) -> x509.CertificateSigningRequest:
    try:
        return control.authority.read_request(csr_pem)
    except BadCertificateRequest as error:
        raise BadValue("csr_pem", str(error)) from None


async def add_node(control: Control, row: NodeRow, changes: Sequence[Change]) -> None:
    """The node is one of the cluster; the caller holds ``writing`` since it looked."""
    await control.write([*changes, PutNode(row)])
    joined = fleet.NodeJoined(row.node, row.gateway_url)
    control.act(fleet.step(control.cluster, joined, control.now_ms()))
    control.feed.note_node(row.node)
    control.shares.step(HolderJoined(row.node, fresh=True))


async def renew(control: Control, request: web.Request, caller: Caller) -> web.Response:
    row = row_of(control, caller)
    async with control.bodies.body(request, caller.owner, JOIN_BYTES_MAX) as body:
        ask = decode_message(body, RenewAsk)
    csr = request_in(control, ask.csr_pem)
    if key_sha256_of(csr) != row.key_sha256:
        raise ApiError(
            409, "other_key", "A certificate is renewed for the node's own key; join again to change the key."
        )
    return certificate_answer(control, control.authority.issue_node(csr, row.node), row.node)


async def renew_late(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """For a node whose certificate ended while control was away. Anybody may ask: what is shown must be its
    last certificate and a request signed by its key, and what is given is of use to that key alone."""
    async with control.bodies.body(request, "join!", JOIN_BYTES_MAX) as body:
        ask = decode_message(body, LateRenewAsk)
    csr = request_in(control, ask.csr_pem)
    speaker = last_speaker(control, ask.certificate_pem)
    row = control.catalog.nodes.get(speaker.node)
    if row is None or not row.key_sha256 == speaker.key_sha256 == key_sha256_of(csr):
        # Whoever lacks the key learns no more than whoever names a node that never was.
        raise ApiError(
            403,
            "node_removed",
            "The certificate is not that of a node of this cluster, or the node was removed from it.",
            hint="Join again with a new token from: bunk node token create",
        )
    refuse_clone(control, row.node)
    late_s = refuse_too_late(control, speaker, "node")
    control.record("node_renewed_late", detail=f"{row.node} from {request.remote}, {late_s:.0f} s late")
    return certificate_answer(control, control.authority.issue_node(csr, row.node), row.node)


def refuse_too_late(control: Control, speaker: Speaker, what: str) -> float:
    """Seconds since the certificate ended. Raises ``ApiError`` when they are too many."""
    late_s = control.authority.now().timestamp() - speaker.ends_s
    if late_s > LATE_RENEWAL_MAX.total_seconds():
        days = f"{late_s / 86_400:.0f} days ago, more than {LATE_RENEWAL_MAX.days} days"
        raise _refused(f"the certificate ended {days}", what)
    return late_s


def last_speaker(control: Control, certificate_pem: str) -> Speaker:
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
        raise _refused(str(error)) from None


def _refused(why: str, what: str = "node") -> ApiError:
    return ApiError(
        403,
        "renewal_refused",
        f"No other certificate is given: {why}.",
        hint=f"Join again with a new token from: bunk {what} token create",
        should_retry=False,
    )


def certificate_answer(control: Control, chain_pem: str, node: str) -> web.Response:
    answer = JoinAnswer(WIRE_VERSION, control.meta.cluster, node, chain_pem, control.authority.ca_pem)
    return web.Response(body=encode(answer), content_type="application/json")


NODE_ROUTES = (
    Route("GET", "/node/v1/ca", Access.OPEN, ca),
    Route("POST", "/node/v1/join", Access.OPEN, join),
    Route("POST", "/node/v1/renew", Access.NODE, renew),
    Route("POST", "/node/v1/renew-late", Access.OPEN, renew_late),
)
