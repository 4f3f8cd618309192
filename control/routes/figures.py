"""What this control server counts of its own work, for a Prometheus on this machine.

Covers: the router's counters and how many nodes there are. Does not cover: what nodes count (each has its own
``/metrics``), or anything of a tenant or a model: no name of either is here.
"""

from __future__ import annotations

from aiohttp import web

from control.operations import Operation, Result
from control.routes.access import Access, Caller, Route
from control.routing import Routing

TEXT = "text/plain; version=0.0.4; charset=utf-8"


async def metrics(control: Routing, request: web.Request, caller: Caller) -> web.Response:
    views = control.cluster.nodes.values()
    states = {
        "silent": sum(view.silent for view in views),
        "draining": sum(view.report is not None and view.report.draining for view in views),
        "joined": len(views),
    }
    lines = ["# TYPE bunkhouse_control_nodes gauge"]
    lines += [f'bunkhouse_control_nodes{{state="{state}"}} {count}' for state, count in states.items()]
    text = "\n".join(lines) + "\n" + control.routed.text(control.cluster.in_flight)
    return web.Response(text=text, headers={"Content-Type": TEXT})


ROUTES = (
    Route(
        "GET",
        "/metrics",
        Access.LOCAL,
        metrics,
        stays=False,
        operation=Operation(
            "showMetrics",
            "The router's own figures, for callers on this machine.",
            [Result(200, "Prometheus' text format.", str, ("text/plain",))],
            refusals={403: "The caller is not on this machine."},
        ),
    ),
)
