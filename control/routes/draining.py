"""Draining a node: it takes no new requests, and those that run there end in peace.

Covers: telling a node so, and taking it back. Does not cover: what the node does then (its plan says it:
``packer.facts``, ``packer.admission``), who is asked instead (``control.rooms``), or removing it (``nodes``).
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from control import etags
from control.catalog import DrainNode
from control.etags import CHANGED, IF_MATCH, TAGGED
from control.operations import Operation, Result
from control.routes.access import Access, Caller, Route, not_found, read_json
from control.routes.nodes import ONE_NODE, NodeAnswer, shown, state_of
from control.state import Control


class NodeAsk(msgspec.Struct, forbid_unknown_fields=True):
    draining: bool


async def change(control: Control, request: web.Request, caller: Caller) -> web.Response:
    """The node hears of it with its next plan, at once where it listens."""
    ask = await read_json(control, request, caller, NodeAsk)
    node = request.match_info["node"]
    async with control.writing:
        row = control.catalog.nodes.get(node)
        if row is None:
            raise not_found("node", node)
        etags.check_match(request, state_of(row), lambda: shown(control, row))
        changes = row.draining != ask.draining
        if changes:
            await control.write([DrainNode(node, ask.draining)])
        now = control.catalog.nodes[node]
        answer = etags.tagged(state_of(now), shown(control, now))
    if changes:
        kind = "node_draining" if ask.draining else "node_undrained"
        control.record(kind, detail=f"{node}, by key {caller.key_id}")
    return answer


ROUTES = (
    Route(
        "PATCH",
        ONE_NODE,
        Access.OPERATOR,
        change,
        operation=Operation(
            "changeNode",
            "Drain a node: it takes no new requests until this is taken back. State `drained` says that none "
            "runs there any more.",
            [Result(200, "The node.", NodeAnswer, headers=TAGGED)],
            NodeAsk,
            takes=[IF_MATCH],
            refusals=CHANGED,
        ),
    ),
)
