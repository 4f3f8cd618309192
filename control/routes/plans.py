"""``bunk plan`` and ``bunk explain``: what would be, and why something was.

Covers: asking the nodes on behalf of an operator, or of a tenant about its own models, and taking out of
their answers what a tenant may not know. Does not cover: how a question travels (``control.questions``) or
the decisions (``packer/forecast.py``, ``agent/decisions.py``).

A tenant sees its own models by name and others' only as how many and how many bytes; never a device's
figures, which would tell it about others.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from aiohttp import web

from control import copies
from control.choosing import is_there
from control.copies import Stand
from control.operations import Given, ModelText, NodeText, Operation, Result, worded
from control.routes.access import Access, Caller, Route, not_found
from control.state import Control
from packer.decisions import Decision, DeviceRoom, Forecast, Victim
from packer.http import ApiError, json_response
from packer.questions import Asks, Reply, RequestStory
from packer.types import BadValue, ModelSpec, parse_model

# Nodes asked at once: where the router would try first, or, for the past, those that are heard.
PLAN_NODES_MAX = 4
EXPLAIN_NODES_MAX = 16
REQUEST_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Others:
    """Models of other tenants among the victims."""

    count: int = 0
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One node's forecast. ``forecast`` None: it did not answer, ``error`` says why."""

    node: str
    forecast: Forecast | None
    others: Others
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """``items`` in the order in which the router would try the nodes."""

    model: str
    items: Sequence[PlanItem]
    copies: Stand | None = None  # of a version with more than one replica


@dataclass(frozen=True, slots=True)
class DecisionItem:
    node: str
    decision: Decision
    others: Others


@dataclass(frozen=True, slots=True)
class StoryItem:
    node: str
    story: RequestStory


@dataclass(frozen=True, slots=True)
class ExplainAnswer:
    """Oldest first. ``silent``: nodes that did not answer."""

    requests: Sequence[StoryItem]
    items: Sequence[DecisionItem]
    silent: Sequence[str]
    copies: Stand | None = None  # of a version with more than one replica


async def plan(control: Control, request: web.Request, caller: Caller) -> web.Response:
    spec = _model(control, caller, request.query.get("model"))
    nodes = _nodes(control, request, spec)[:PLAN_NODES_MAX]
    replies = await _ask(control, caller, nodes, Asks.PLAN, str(spec.ref))
    items = []
    for node, reply in zip(nodes, replies, strict=True):
        forecast = reply.forecast if reply is not None else None
        if forecast is None or forecast.ref != str(spec.ref):
            items.append(PlanItem(node, None, Others(), "it did not answer in time"))
            continue
        victims, others = _seen(caller, forecast.victims)
        items.append(PlanItem(node, _forecast_seen(caller, forecast, victims), others))
    return json_response(PlanAnswer(str(spec.ref), items, _stand(control, spec)))


def _stand(control: Control, spec: ModelSpec | None) -> Stand | None:
    if spec is None or spec.replicas == 1:
        return None
    return copies.stand(control.cluster, spec, control.now_ms())


async def explain(control: Control, request: web.Request, caller: Caller) -> web.Response:
    text = request.query.get("request")
    if (text is None) == ("model" not in request.query):
        raise BadValue("model", "give either a model or a request")
    spec: ModelSpec | None = None
    if text is None:
        spec = _model(control, caller, request.query.get("model"))
        asks, subject = Asks.MODEL, str(spec.ref)
    else:
        if not REQUEST_PATTERN.fullmatch(text):
            raise BadValue("request", "is the x-request-id of an answer, 1 to 64 letters, digits, - and _")
        asks, subject = Asks.REQUEST, text
    nodes = list(_nodes(control, request))
    if spec is not None:  # those that have it have most to say of it
        ref = spec.ref
        nodes.sort(key=lambda node: not is_there(control.cluster, node, ref))
    nodes = nodes[:EXPLAIN_NODES_MAX]
    replies = await _ask(control, caller, nodes, asks, subject)
    stories: list[StoryItem] = []
    items: list[DecisionItem] = []
    silent = [node for node, reply in zip(nodes, replies, strict=True) if reply is None]
    for node, reply in zip(nodes, replies, strict=True):
        if reply is None or (reply.story is not None and not _may_know(caller, reply.story.ref)):
            continue
        if reply.story is not None and reply.story.request != subject:
            continue
        if reply.story is not None:
            stories.append(StoryItem(node, reply.story))
        elif asks is Asks.REQUEST:
            continue
        items += [_decision_seen(caller, node, decision) for decision in reply.decisions]
    if asks is Asks.REQUEST and not stories and not silent:
        raise not_found("request", subject)
    items.sort(key=lambda item: item.decision.at_ms)
    return json_response(ExplainAnswer(stories, items, silent, _stand(control, spec)))


# --- who and where --------------------------------------------------------------------------------


def _model(control: Control, caller: Caller, text: str | None) -> ModelSpec:
    if text is None:
        raise BadValue("model", "is missing: tenant/name or tenant/name@version")
    model, version = parse_model(text)
    spec = control.catalog.resolve(model, version)
    if spec is None or not _may_know(caller, str(spec.ref)):
        raise not_found("model", text)
    return spec


def _nodes(control: Control, request: web.Request, spec: ModelSpec | None = None) -> Sequence[str]:
    """The node that is asked for, or those that may answer, the likeliest first."""
    asked = request.query.get("node")
    heard = [
        view.node
        for view in sorted(control.cluster.nodes.values(), key=lambda view: view.node)
        if not view.silent and view.report is not None
    ]
    if asked is not None:
        if asked not in control.catalog.nodes:
            raise not_found("node", asked)
        if asked not in heard:
            raise ApiError(503, "node_silent", f"Nothing is heard of the node {asked!r} now.", retry_ms=2_000)
        return [asked]
    if spec is not None:
        heard = list(copies.choose_all(control.cluster, spec, control.now_ms())) or heard
    if not heard:
        raise ApiError(503, "no_node", "No node is up.", hint="See: bunk node ls", retry_ms=2_000)
    return heard


async def _ask(
    control: Control, caller: Caller, nodes: Sequence[str], asks: Asks, subject: str
) -> list[Reply | None]:
    owner = caller.owner
    control.questions.admit(owner)
    return list(await asyncio.gather(*(control.questions.ask(node, owner, asks, subject) for node in nodes)))


# --- what a tenant may see ------------------------------------------------------------------------


def _may_know(caller: Caller, ref: str) -> bool:
    return caller.is_operator or ref.partition("/")[0] == caller.tenant


def _seen(caller: Caller, victims: Sequence[Victim]) -> tuple[tuple[Victim, ...], Others]:
    mine = tuple(victim for victim in victims if _may_know(caller, victim.ref))
    others = [victim for victim in victims if not _may_know(caller, victim.ref)]
    return mine, Others(len(others), sum(victim.freed_bytes for victim in others))


def _forecast_seen(caller: Caller, forecast: Forecast, victims: tuple[Victim, ...]) -> Forecast:
    by = forecast.by if _may_know(caller, forecast.by) else ""
    devices: tuple[DeviceRoom, ...] = forecast.devices if caller.is_operator else ()
    return replace(forecast, victims=victims, by=by, devices=devices)


def _decision_seen(caller: Caller, node: str, decision: Decision) -> DecisionItem:
    """Of a decision about another tenant's model a tenant sees what it did to its own."""
    victims, others = _seen(caller, decision.victims)
    if not caller.is_operator:
        decision = replace(decision, left_bytes=None)
    if not _may_know(caller, decision.ref):
        decision = replace(decision, ref="", request="", reason="", nbytes=0, expected_ms=0, took_ms=0)
        decision = replace(decision, from_tier="")
        others = Others()
    if not _may_know(caller, decision.by):
        decision = replace(decision, by="")
    return DecisionItem(node, replace(decision, victims=victims), others)


_RequestText = Annotated[str, worded(REQUEST_PATTERN.pattern, "req_0123456789abcdef01234567")]
OF_NODE = Given("node", NodeText, "Ask this node alone.")
_REFUSALS = {404: "There is no such model, request or node, or it is not yours.", 503: "No node is up."}
ROUTES = (
    Route(
        "GET",
        "/api/v1/plan",
        Access.CALLER,
        plan,
        stays=False,
        operation=Operation(
            "showPlan",
            "What a request for a model would meet now, on one node or where the router would try first.",
            [Result(200, "A forecast of each node that was asked.", PlanAnswer)],
            takes=(Given("model", ModelText, "The model, tenant/name[@version].", required=True), OF_NODE),
            refusals=_REFUSALS,
        ),
    ),
    Route(
        "GET",
        "/api/v1/explain",
        Access.CALLER,
        explain,
        stays=False,
        operation=Operation(
            "explain",
            "What nodes decided about a model lately, or about one request, and why.",
            [Result(200, "Their decisions, oldest first.", ExplainAnswer)],
            takes=(
                Given("model", ModelText, "The model; either it or a request."),
                Given("request", _RequestText, "The x-request-id of an answer."),
                OF_NODE,
            ),
            refusals=_REFUSALS,
        ),
    ),
)
