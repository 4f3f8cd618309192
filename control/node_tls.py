"""The router's way to nodes: where each is called, and TLS that lets it be that node only.

Covers: a client context per node that shows the router's certificate and takes no other node than the one in
the catalog, with its key; keeping and renewing them. Does not cover: sending (``control.routes.forwarding``),
or issuing (``control.authority``).

Use: ``line = control.lines.to(node)``, then ``control.session.post(line.url + path, ssl=line.tls)``. aiohttp
keeps connections apart by their context, so one session serves all nodes.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography import x509

from control import cluster as fleet
from control.authority import Authority
from control.catalog import NODES_MAX, Catalog, NodeRow
from packer.certificates import CheckedContext, WrongSpeaker, checked_context, read_speaker


class NoLine(Exception):
    """The router has no way to this node; the text says why."""


@dataclass(frozen=True, slots=True)
class Line:
    """Where a node is called: ``url`` without a path, and what aiohttp's ``ssl=`` takes."""

    url: str
    tls: ssl.SSLContext | bool


class Papers(Protocol):
    """Who a router is, and whom it trusts: of control (``ControlPapers``), or of a process of its own."""

    @property
    def cluster(self) -> str: ...
    @property
    def cas(self) -> Sequence[x509.Certificate]: ...
    def now_s(self) -> float: ...
    def load(self, context: ssl.SSLContext) -> None: ...  # CAs and the certificate to show
    def renew(self) -> None: ...


class ControlPapers:
    """The router inside control shows a certificate that names control."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._shown = authority.make_control_certificate()

    @property
    def cluster(self) -> str:
        return self._authority.cluster

    @property
    def cas(self) -> Sequence[x509.Certificate]:
        return self._authority.cas

    def now_s(self) -> float:
        return self._authority.now().timestamp()

    def load(self, context: ssl.SSLContext) -> None:
        context.load_verify_locations(cadata=self._authority.ca_pem)
        context.load_cert_chain(self._shown)

    def renew(self) -> None:
        self._shown = self._authority.make_control_certificate()


class NodeLines:
    """``renew`` when the router's certificate or the CAs change; connections made later follow."""

    def __init__(
        self,
        papers: Papers,
        catalog: Callable[[], Catalog],
        cluster: fleet.Cluster,
        *,
        plain: bool,
    ) -> None:
        self._papers = papers
        self._catalog = catalog
        self._cluster = cluster
        self._plain = plain
        self._contexts: dict[tuple[str, str], CheckedContext] = {}  # by node and its key

    def to(self, node: str) -> Line:
        """The way to a node as it is now. Raises ``NoLine``."""
        view, row = self._cluster.nodes.get(node), self._catalog().nodes.get(node)
        if view is None or row is None:
            raise NoLine("removed")
        if view.route_url:
            return Line(view.route_url.rstrip("/"), self._context(row))
        if self._plain or view.gateway_url.startswith("https:"):
            return Line(view.gateway_url.rstrip("/"), True)
        raise NoLine("it has no --route-listen, and the router was started without --plain-routes")

    def renew(self) -> None:
        self._papers.renew()
        self._contexts.clear()

    def _context(self, row: NodeRow) -> CheckedContext:
        place = (row.node, row.key_sha256)
        context = self._contexts.get(place)
        if context is None:
            if len(self._contexts) >= NODES_MAX:
                self._contexts.clear()
            context = self._contexts[place] = self._make(row)
        return context

    def _make(self, row: NodeRow) -> CheckedContext:
        papers = self._papers

        def check(certificate_der: bytes | None) -> float:
            speaker = read_speaker(certificate_der, papers.cluster, papers.cas, papers.now_s())
            if (speaker.node, speaker.key_sha256) != (row.node, row.key_sha256):
                raise WrongSpeaker(f"not node {row.node} answers there, or not with its key")
            return speaker.ends_s

        context = checked_context(check, server=False)
        papers.load(context)
        return context
