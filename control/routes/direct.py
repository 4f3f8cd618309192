"""Where a tenant's program may call nodes itself, past this router.

Covers: the nodes that have a model, their URLs, and a ticket for each. Does not cover: what a ticket is
(``packer/tickets.py``) or who checks it (``agent/credentials.py``).

An answer without nodes is no error: the router is always there. A URL is the node's listener for tenants
as the node stated it; whether it can be reached, and whether to trust the way there, is the caller's to
find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from control import choosing, copies
from control import cluster as fleet
from control.operations import Given, ModelText, Operation, Result
from control.routes.access import Access, Caller, Handle, Route, S, check_still
from control.routes.forwarding import candidates, seq_needed
from control.routes.router import resolve
from control.routing import Routing
from control.state import Control
from packer.gangs import share_bytes
from packer.http import json_response
from packer.tickets import TICKET_LIFE_MS
from packer.types import BadValue, ModelSpec

# Nodes named at once: those that have the model on a device share its calls.
NODES_MAX = 3
# How long a caller should go by one answer: where models are changes within minutes.
REFRESH_MS = 60_000


@dataclass(frozen=True, slots=True)
class DirectNode:
    """``ticket`` takes the place of the API key at this node and nowhere else."""

    node: str
    url: str
    ticket: str


@dataclass(frozen=True, slots=True)
class DirectAnswer:
    """``items``: nodes that are as good as each other. Ask again after ``refresh_ms``; the tickets end
    after ``expires_ms``. Both count from now, since clocks differ."""

    model: str
    items: Sequence[DirectNode]
    refresh_ms: int
    expires_ms: int


def asked_model(control: Routing, request: web.Request, caller: Caller) -> ModelSpec:
    text = request.query.get("model")
    if text is None:
        raise BadValue("model", "is missing: tenant/name or tenant/name@version")
    return resolve(control, caller, text)


async def show_route(control: Control, request: web.Request, caller: Caller) -> web.Response:
    spec = asked_model(control, request, caller)
    nodes: list[str] = []
    if control.config.direct:
        found = await candidates(control, caller, spec)
        check_still(control, caller)
        seq = seq_needed(control, caller, spec)
        nodes = [node for node in found if fleet.knows(control.cluster, node, seq)]
    if nodes and copies.is_further(control.cluster, spec, nodes[0]):
        direct: Sequence[str] = nodes[:1]  # this caller brings it there
    else:
        direct = choosing.equally_good(control.cluster, nodes, spec.ref, control.now_ms())[:NODES_MAX]
    life_ms = TICKET_LIFE_MS
    key = control.catalog.key_specs.get(caller.key_id)
    if key is not None and key.expires_ms is not None:
        life_ms = max(0, min(life_ms, key.expires_ms - control.wall_ms()))
    items = []
    for node in direct:
        ticket = control.tickets.give(node, spec.ref.tenant, caller.key_id, control.wall_ms() + life_ms)
        items.append(DirectNode(node, control.cluster.nodes[node].gateway_url, ticket))
    if direct:
        pointed = fleet.Pointed(direct[0], spec.ref, share_bytes(spec), spec.devices)
        control.act(fleet.step(control.cluster, pointed, control.now_ms()))
    return json_response(DirectAnswer(str(spec.ref), items, min(REFRESH_MS, life_ms), life_ms))


def routes(handle: Handle[S]) -> tuple[Route[S], ...]:
    """``handle``: control's own, or that of a router that asks control."""
    return (
        Route(
            "GET",
            "/api/v1/route",
            Access.TENANT,
            handle,
            stays=False,
            operation=Operation(
                "showRoute",
                "Nodes that answer for a model themselves, with a ticket for each; possibly none.",
                [Result(200, "Nodes that are as good as each other.", DirectAnswer)],
                takes=(Given("model", ModelText, "The model, tenant/name[@version].", required=True),),
                refusals={404: "There is no such model, or it is not yours."},
            ),
        ),
    )


ROUTES = routes(show_route)
