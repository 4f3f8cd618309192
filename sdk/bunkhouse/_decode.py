"""Reads JSON answers into the public values, checking types on the way.

Covers: one reader per value. Unknown fields are ignored, so that a newer server may add some; a
missing or wrongly typed required field raises ``BadAnswer`` naming it. Does not cover: errors.
"""

from __future__ import annotations

import array
import base64
import binascii
import json
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from bunkhouse._errors import BadAnswer
from bunkhouse._request import Answer, Page
from bunkhouse._types import (
    About,
    ByteQuota,
    Calibration,
    Classification,
    Completion,
    Device,
    DeviceShare,
    Embeddings,
    EstimateErrors,
    Event,
    Events,
    Key,
    Label,
    Lending,
    Model,
    ModelFile,
    NewKey,
    Node,
    NodeToken,
    Placement,
    Placements,
    Quota,
    QuotaUse,
    RateUse,
    Regret,
    Restores,
    Router,
    Served,
    Tenant,
    Usage,
    UsageItem,
)

T = TypeVar("T")


class Fields:
    """A JSON object whose fields are read with their types."""

    def __init__(self, value: object, where: str = "answer") -> None:
        if not isinstance(value, dict):
            raise BadAnswer(
                f"{where}: expected a JSON object, got {type(value).__name__}: is this Bunkhouse's URL?"
            )
        self._value: dict[str, object] = value
        self._where = where

    def _wrong(self, name: str, expected: str) -> BadAnswer:
        return BadAnswer(f"{self._where}.{name}: expected {expected}, got {self._value.get(name)!r:.80}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def maybe_text(self, name: str) -> str | None:
        value = self._value.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string or null")
        return value

    def number(self, name: str, default: int | None = None) -> int:
        value = self._value.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer")
        return value

    def maybe_number(self, name: str) -> int | None:
        value = self._value.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._wrong(name, "an integer or null")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._value.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def numbers(self) -> dict[str, int]:
        """All of it, when all of it is numbers."""
        return {name: self.number(name) for name in self._value}

    def raw(self, name: str) -> object:
        return self._value.get(name)

    def inner(self, name: str) -> Fields:
        """A nested object; an absent or null one reads as empty."""
        return Fields(self._value.get(name) or {}, f"{self._where}.{name}")

    def list(self, name: str) -> list[object]:
        value = self._value.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def each(self, name: str) -> Iterator[Fields]:
        """Nested objects of a list; an absent list reads as empty."""
        for i, value in enumerate(self.list(name)):
            yield Fields(value, f"{self._where}.{name}[{i}]")


def fields_of(answer: Answer) -> Fields:
    """The JSON object of an answer."""
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        quoted = answer.body[:80].decode("utf-8", "replace")
        raise BadAnswer(f"expected JSON, got {quoted!r}: is this Bunkhouse's URL?") from None
    return Fields(value)


def nothing(answer: Answer) -> None:
    """For calls whose success says it all."""


def one(read: Callable[[Fields], T]) -> Callable[[Answer], T]:
    """A parser of an answer that is one object."""
    return lambda answer: read(fields_of(answer))


def page(read: Callable[[Fields], T]) -> Callable[[Answer], Page[T]]:
    """A parser of an answer of the form ``{"items": [...], "next_cursor": "..."}``."""

    def parse(answer: Answer) -> Page[T]:
        body = fields_of(answer)
        return Page(tuple(read(each) for each in body.each("items")), body.maybe_text("next_cursor"))

    return parse


def served(answer: Answer) -> Served:
    """The ``x-bunkhouse-*`` headers."""
    headers = answer.headers
    restore = headers.get("x-bunkhouse-restore-ms", "")
    return Served(
        request_id=headers.get("x-request-id"),
        node=headers.get("x-bunkhouse-node"),
        tier=headers.get("x-bunkhouse-tier"),
        restore_ms=int(restore) if restore.isascii() and restore.isdigit() else None,
    )


def vector(value: object) -> list[float]:
    """An embedding: base64 of little-endian float32, or a list of numbers."""
    if isinstance(value, list) and all(isinstance(each, (int, float)) for each in value):
        return [float(each) for each in value]
    if not isinstance(value, str):
        raise BadAnswer(f"data.embedding: expected base64 or numbers, got {type(value).__name__}")
    try:
        floats = array.array("f", base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError):
        raise BadAnswer("data.embedding: not base64 of float32 numbers") from None
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tolist()


def embeddings(answer: Answer) -> Embeddings:
    body = fields_of(answer)
    rows = sorted(body.each("data"), key=lambda row: row.number("index"))
    return Embeddings(
        model=body.text("model"),
        vectors=[vector(row.raw("embedding")) for row in rows],
        prompt_tokens=body.inner("usage").number("prompt_tokens", 0),
        served=served(answer),
    )


def classification(answer: Answer) -> Classification:
    body = fields_of(answer)
    rows = sorted(body.each("data"), key=lambda row: row.number("index"))
    return Classification(
        model=body.text("model"),
        labels=tuple(_label(row) for row in rows),
        prompt_tokens=body.inner("usage").number("prompt_tokens", 0),
        served=served(answer),
    )


def _label(row: Fields) -> Label:
    probs = row.list("probs")
    if not all(isinstance(each, (int, float)) for each in probs):
        raise BadAnswer("data.probs: expected numbers")
    return Label(row.text("label"), tuple(float(each) for each in probs if isinstance(each, (int, float))))


def completion(answer: Answer) -> Completion:
    """Of ``/v1/chat/completions`` and of ``/v1/completions``."""
    body = fields_of(answer)
    choice = next(body.each("choices"), None)
    if choice is None:
        raise BadAnswer("answer.choices: expected one choice, got none")
    usage = body.inner("usage")
    return Completion(
        model=body.text("model"),
        text=choice.maybe_text("text") or choice.inner("message").maybe_text("content") or "",
        finish_reason=choice.maybe_text("finish_reason"),
        prompt_tokens=usage.number("prompt_tokens", 0),
        completion_tokens=usage.number("completion_tokens", 0),
        served=served(answer),
    )


def model(row: Fields) -> Model:
    return Model(
        ref=row.text("ref"),
        tenant=row.text("tenant"),
        name=row.text("name"),
        version=row.text("version"),
        latest=row.flag("latest", True),
        task=row.text("task"),
        engine=row.text("engine"),
        image_bytes=row.number("image_bytes"),
        workspace_bytes=row.number("workspace_bytes", 0),
        origin=row.text("origin", ""),
        created_ms=row.number("created_ms", 0),
        files=tuple(
            ModelFile(each.text("path"), each.number("size_bytes"), each.text("sha256"))
            for each in row.each("files")
        ),
        batch_max=row.number("batch_max", 1),
        batch_delay_ms=row.number("batch_delay_ms", 0),
        devices=row.number("devices", 1),
        replicas=row.number("replicas", 1),
        warnings=tuple(str(each) for each in row.list("warnings")),
    )


def tenant(row: Fields) -> Tenant:
    return Tenant(
        tenant=row.text("tenant"),
        created_ms=row.maybe_number("created_ms"),
        keys=row.maybe_number("keys"),
        models=row.maybe_number("models"),
    )


def key(row: Fields) -> Key:
    return Key(
        key_id=row.text("key_id"),
        tenant=row.maybe_text("tenant"),
        label=row.maybe_text("label"),
        created_ms=row.maybe_number("created_ms"),
        expires_ms=row.maybe_number("expires_ms"),
    )


def new_key(row: Fields) -> NewKey:
    return NewKey(
        key_id=row.text("key_id"),
        tenant=row.maybe_text("tenant"),
        key=row.text("key"),
        label=row.maybe_text("label"),
        created_ms=row.maybe_number("created_ms"),
        expires_ms=row.maybe_number("expires_ms"),
    )


def _byte_quota(row: Fields) -> ByteQuota:
    return ByteQuota(row.number("reserved", 0), row.maybe_number("max"))


def quota(row: Fields) -> Quota:
    return Quota(
        device=_byte_quota(row.inner("device")),
        host=_byte_quota(row.inner("host")),
        disk=_byte_quota(row.inner("disk")),
        requests_per_minute=row.maybe_number("requests_per_minute"),
        concurrency=row.maybe_number("concurrency"),
        weight=row.number("weight", 1),
        priority=row.number("priority", 0),
        tokens_per_minute=row.maybe_number("tokens_per_minute"),
        restores_per_minute=row.maybe_number("restores_per_minute"),
        device_seconds_per_day=row.maybe_number("device_seconds_per_day"),
    )


def quota_use(answer: Answer) -> QuotaUse:
    row = fields_of(answer)
    return QuotaUse(
        row.text("tenant"),
        quota(row.inner("quota")),
        tuple(_usage(each) for each in row.each("usage")),
        tuple(str(each) for each in row.list("warnings")),
        answer.headers.get("etag"),
    )


def _rate_use(row: Fields) -> RateUse:
    return RateUse(
        name=row.text("name"),
        limit=row.number("limit"),
        burst=row.number("burst", 0),
        remaining=row.number("remaining", 0),
        reset_ms=row.number("reset_ms", 0),
    )


def _lending(row: Fields) -> Lending:
    return Lending(
        debt_ms=row.number("debt_ms", 0),
        lent_bytes=row.maybe_number("lent_bytes"),
        borrowed_bytes=row.number("borrowed_bytes", 0),
        excused_ms=row.number("excused_ms", 0),
        protected=row.flag("protected"),
    )


def _usage(row: Fields) -> Usage:
    return Usage(
        node=row.maybe_text("node"),
        tenant=row.text("tenant"),
        device_bytes=row.number("device_bytes", 0),
        host_bytes=row.number("host_bytes", 0),
        disk_bytes=row.number("disk_bytes", 0),
        in_flight=row.number("in_flight", 0),
        requests=row.number("requests", 0),
        answers=row.number("answers", 0),
        refusals=row.number("refusals", 0),
        tokens=row.number("tokens", 0),
        device_ms=row.number("device_ms", 0),
        rates=tuple(_rate_use(each) for each in row.each("rates")),
        lending=_lending(row.inner("lending")),
    )


def device(row: Fields) -> Device:
    return Device(
        node=row.maybe_text("node"),
        device=row.text("device"),
        kind=row.text("kind", ""),
        name=row.text("name", ""),
        budget_bytes=row.number("budget_bytes", 0),
        used_bytes=row.number("used_bytes", 0),
        foreign_bytes=row.number("foreign_bytes", 0),
        healthy=row.flag("healthy", True),
    )


def node(row: Fields) -> Node:
    return Node(
        node=row.text("node"),
        state=row.text("state"),
        gateway_url=row.maybe_text("gateway_url"),
        joined_ms=row.maybe_number("joined_ms"),
        heard_ago_ms=row.maybe_number("heard_ago_ms"),
        devices=tuple(device(each) for each in row.each("devices")),
        host_budget_bytes=row.number("host_budget_bytes", 0),
        host_used_bytes=row.number("host_used_bytes", 0),
        disk_budget_bytes=row.number("disk_budget_bytes", 0),
        disk_used_bytes=row.number("disk_used_bytes", 0),
        calibration=_calibration(row.inner("calibration")) if row.raw("calibration") else None,
        regret=_regret(row.inner("regret")) if row.raw("regret") else None,
        pool=row.maybe_text("pool") or "default",
        route_url=row.maybe_text("route_url") or None,
        clock_skew_ms=row.maybe_number("clock_skew_ms"),
    )


def _regret(row: Fields) -> Regret:
    return Regret(
        at_ms=row.number("at_ms", 0),
        window_ms=row.number("window_ms", 0),
        uses=row.number("uses", 0),
        counted=row.number("counted", 0),
        actual_ms=row.number("actual_ms", 0),
        lru_ms=row.number("lru_ms", 0),
        optimum_ms=row.number("optimum_ms", 0),
        bound_ms=row.number("bound_ms", 0),
    )


def _calibration(row: Fields) -> Calibration:
    return Calibration(
        measured_ms=row.number("measured_ms"),
        host_form=row.text("host_form", ""),
        kernels=row.flag("kernels"),
        huge_pages=row.flag("huge_pages"),
        others_percent=row.number("others_percent", 0),
        rates=row.inner("rates").numbers(),
        accuracy=tuple(
            EstimateErrors(
                each.text("from_tier"),
                each.number("count"),
                each.number("error_percent_p50", 0),
                each.number("error_percent_p95", 0),
            )
            for each in row.each("accuracy")
        ),
    )


def about(row: Fields) -> About:
    return About(
        version=row.text("version"),
        now_ms=row.number("now_ms"),
        key_id=row.text("key_id", ""),
        tenant=row.maybe_text("tenant"),
        expires_ms=row.maybe_number("expires_ms"),
    )


def router(row: Fields) -> Router:
    return Router(
        router=row.text("router"),
        state=row.text("state"),
        url=row.maybe_text("url") or None,
        peer=row.maybe_text("peer") or None,
        joined_ms=row.maybe_number("joined_ms"),
        heard_ago_ms=row.maybe_number("heard_ago_ms"),
        behind=row.maybe_number("behind"),
        in_flight=row.number("in_flight", 0),
        calls=row.number("calls", 0),
        release=row.maybe_text("release") or None,
        clock_skew_ms=row.maybe_number("clock_skew_ms"),
    )


def node_token(row: Fields) -> NodeToken:
    return NodeToken(row.text("token_id"), row.text("token"), row.maybe_number("expires_ms"))


def _placement(row: Fields) -> Placement:
    return Placement(
        node=row.text("node"),
        ref=row.text("ref"),
        state=row.text("state"),
        device=row.maybe_text("device"),
        leases=row.number("leases", 0),
        waiting=row.number("waiting", 0),
        device_bytes=row.number("device_bytes", 0),
        host_bytes=row.number("host_bytes", 0),
        disk_bytes=row.number("disk_bytes", 0),
        requests=row.number("requests", 0),
        answers=row.number("answers", 0),
        restores=tuple(
            Restores(
                each.text("from_tier"),
                each.number("count"),
                each.number("restore_ms_p50", 0),
                each.number("restore_ms_max", 0),
            )
            for each in row.each("restores")
        ),
        last_used_ms=row.number("last_used_ms", 0),
        restore_ms_estimate=row.number("restore_ms_estimate", 0),
        workspace_bytes=row.number("workspace_bytes", 0),
        workspace_measured=row.flag("workspace_measured"),
        deduplicated_bytes=row.number("deduplicated_bytes", 0),
        shares=tuple(
            DeviceShare(each.text("device"), each.number("held_bytes")) for each in row.each("shares")
        ),
    )


def placements(answer: Answer) -> Page[Placement | Device]:
    body = fields_of(answer)
    items = (_placement(each) for each in body.each("items"))
    return Page((*items, *(device(each) for each in body.each("devices"))), body.maybe_text("next_cursor"))


def all_placements(rows: tuple[Placement | Device, ...]) -> Placements:
    return Placements(
        tuple(row for row in rows if isinstance(row, Placement)),
        tuple(row for row in rows if isinstance(row, Device)),
    )


def usage_item(row: Fields) -> UsageItem:
    return UsageItem(
        tenant=row.text("tenant"),
        model=row.maybe_text("model") or "",
        begin_ms=row.number("begin_ms", 0),
        requests=row.number("requests", 0),
        answers=row.number("answers", 0),
        prompt_tokens=row.number("prompt_tokens", 0),
        completion_tokens=row.number("completion_tokens", 0),
        device_ms=row.number("device_ms", 0),
        restored_host_bytes=row.number("restored_host_bytes", 0),
        restored_disk_bytes=row.number("restored_disk_bytes", 0),
        restored_origin_bytes=row.number("restored_origin_bytes", 0),
        key_id=row.maybe_text("key_id") or "",
    )


def events(body: Fields) -> Events:
    found = tuple(
        Event(
            id=each.number("id"),
            node=each.maybe_text("node"),
            at_ms=each.number("at_ms"),
            kind=each.text("kind"),
            tenant=each.maybe_text("tenant") or "",
            model=each.maybe_text("model") or "",
            detail=each.maybe_text("detail") or "",
        )
        for each in body.each("items")
    )
    last = body.maybe_number("next")
    return Events(found, last if last is not None else max((each.id for each in found), default=0))
