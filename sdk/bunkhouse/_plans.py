"""What ``plan`` and ``explain`` send and how their answers are read.

Covers: both calls. Does not cover: the values (``_types``) or how they are printed (``cli.plans``).
"""

from __future__ import annotations

from urllib.parse import urlencode

from bunkhouse import _decode
from bunkhouse._decode import Fields
from bunkhouse._errors import BadValue
from bunkhouse._request import Call, json_request
from bunkhouse._types import (
    Copies,
    Decision,
    DeviceRoom,
    Explanation,
    Forecast,
    Forecasts,
    Others,
    RequestStory,
    Victim,
)


def plan(model: str, node: str | None) -> Call[Forecasts]:
    query = _query(model=model, node=node)
    return Call(json_request("GET", f"/api/v1/plan?{query}", repeatable=True), _decode.one(_forecasts))


def explain(model: str | None, request: str | None, node: str | None) -> Call[Explanation]:
    if (model is None) == (request is None):
        raise BadValue("model", "give either a model or a request")
    query = _query(model=model, request=request, node=node)
    return Call(json_request("GET", f"/api/v1/explain?{query}", repeatable=True), _decode.one(_explanation))


def _query(**given: str | None) -> str:
    return urlencode({name: value for name, value in given.items() if value is not None})


def _some(fields: Fields, name: str) -> str | None:
    """An empty text means that there is none."""
    return fields.maybe_text(name) or None


def _victims(fields: Fields) -> tuple[Victim, ...]:
    return tuple(
        Victim(
            ref=each.text("ref"),
            device=each.text("device", ""),
            freed_bytes=each.number("freed_bytes"),
            kept_chunks=each.number("kept_chunks", 0),
            keep_index=_index(each),
            in_use=each.flag("in_use"),
            moves_to=_some(each, "moves_to"),
        )
        for each in fields.each("victims")
    )


def _index(fields: Fields) -> float | None:
    value = fields.raw("keep_index")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _others(fields: Fields) -> Others:
    inner = fields.inner("others")
    return Others(inner.number("count", 0), inner.number("freed_bytes", 0))


def _forecasts(body: Fields) -> Forecasts:
    items = tuple(_forecast(each) for each in body.each("items"))
    return Forecasts(body.text("model"), items, _copies_of(body))


def _copies_of(body: Fields) -> Copies | None:
    if body.raw("copies") is None:
        return None
    found = body.inner("copies")
    return Copies(
        replicas=found.number("replicas"),
        holders=tuple(str(node) for node in found.list("holders")),
        next_node=found.maybe_text("next_node"),
        restore_ms=found.number("restore_ms", 0),
        waited_ms=found.number("waited_ms", 0),
        declined=tuple(str(node) for node in found.list("declined")),
    )


def _forecast(item: Fields) -> Forecast:
    found = item.inner("forecast")
    return Forecast(
        node=item.text("node"),
        outcome=_some(found, "outcome"),
        reason=_some(item, "error") or found.text("reason", ""),
        device=_some(found, "device"),
        from_tier=_some(found, "from_tier"),
        restore_bytes=found.number("restore_bytes", 0),
        restore_ms=found.number("restore_ms", 0),
        victims=_victims(found),
        victims_left_out=found.number("victims_left_out", 0),
        others=_others(item),
        devices=tuple(
            DeviceRoom(
                each.text("device"),
                each.number("budget_bytes"),
                each.number("used_bytes"),
                each.number("needed_bytes"),
                each.text("verdict"),
            )
            for each in found.each("devices")
        ),
        by=_some(found, "by"),
        waiting_before=found.number("waiting_before", 0),
        refusal=_some(found, "refusal"),
        at_ms=found.number("at_ms", 0),
    )


def _explanation(body: Fields) -> Explanation:
    return Explanation(
        tuple(_story(each.text("node"), each.inner("story")) for each in body.each("requests")),
        tuple(_decision(each) for each in body.each("items")),
        tuple(str(node) for node in body.list("silent")),
        _copies_of(body),
    )


def _story(node: str, story: Fields) -> RequestStory:
    return RequestStory(
        node=node,
        request=story.text("request"),
        ref=story.text("ref"),
        asked_ms=story.number("asked_ms"),
        outcome=story.text("outcome"),
        device=_some(story, "device"),
        from_tier=_some(story, "from_tier"),
        waited_ms=story.number("waited_ms", 0),
        reason=story.text("reason", ""),
    )


def _decision(item: Fields) -> Decision:
    found = item.inner("decision")
    return Decision(
        node=item.text("node"),
        at_ms=found.number("at_ms", 0),
        kind=found.text("kind"),
        ref=_some(found, "ref"),
        reason=found.text("reason", ""),
        device=_some(found, "device"),
        by=_some(found, "by"),
        left_bytes=found.maybe_number("left_bytes"),
        request=_some(found, "request"),
        from_tier=_some(found, "from_tier"),
        nbytes=found.number("nbytes", 0),
        expected_ms=found.number("expected_ms", 0),
        took_ms=found.number("took_ms", 0),
        victims=_victims(found),
        victims_left_out=found.number("victims_left_out", 0),
        others=_others(item),
    )
