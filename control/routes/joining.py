"""How a box becomes a node and stays one: the CAs, and what is nodes' own about their certificates.

Covers: the route that shows the CAs, and where a node is called and what follows from its join. Does not
cover: what must be shown for a certificate (``control.routes.certifying``), or what nodes say afterwards
(``control.routes.nodes``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from aiohttp import web
from cryptography import x509

from control import cluster as fleet
from control.authority import Authority
from control.catalog import NODES_MAX, Change, Joiner, NodeRow, PutNode
from control.places import check_gateway_url, dialled_url, own_address
from control.routes.access import Access, Caller, Route
from control.routes.certifying import Entry, Kind, certificate_routes
from control.routes.nodes import refuse_clone
from control.shares import HolderJoined
from control.state import Control
from packer.certificates import Speaker
from packer.wire import JoinAsk


async def ca(control: Control, request: web.Request, caller: Caller) -> web.Response:
    return web.Response(text=control.authority.ca_pem, content_type="application/x-pem-file")


class Nodes(Kind[NodeRow]):
    joiner, access, most = Joiner.NODE, Access.NODE, NODES_MAX

    def rows(self, control: Control) -> Mapping[str, NodeRow]:
        return control.catalog.nodes

    def caller(self, caller: Caller) -> tuple[str, NodeRow]:
        assert caller.node is not None  # Access.NODE gives every handler one
        return caller.node.node, caller.node

    def named(self, speaker: Speaker) -> str:
        return speaker.node

    def url(self, ask: JoinAsk, request: web.Request) -> str:
        check_gateway_url(ask.gateway_url)
        return dialled_url(ask.gateway_url, request.remote, own_address(request))

    async def enter(self, control: Control, entry: Entry[NodeRow]) -> None:
        made = NodeRow(entry.name, entry.incarnation, entry.key_sha256, entry.url, entry.joined_ms)
        row = replace(entry.known or made, gateway_url=entry.url, pool=entry.token.pool)
        await add_node(control, row, [entry.used])

    def refuse_copy(self, control: Control, name: str) -> None:
        refuse_clone(control, name)

    def issue(self, authority: Authority, csr: x509.CertificateSigningRequest, name: str) -> str:
        return authority.issue_node(csr, name)


async def add_node(control: Control, row: NodeRow, changes: Sequence[Change]) -> None:
    """The node is one of the cluster; the caller holds ``writing`` since it looked."""
    await control.write([*changes, PutNode(row)])
    joined = fleet.NodeJoined(row.node, row.gateway_url)
    control.act(fleet.step(control.cluster, joined, control.now_ms()))
    control.feed.note_node(row.node)
    control.shares.step(HolderJoined(row.node, fresh=True))


NODE_ROUTES = (Route("GET", "/node/v1/ca", Access.OPEN, ca), *certificate_routes(Nodes()))
