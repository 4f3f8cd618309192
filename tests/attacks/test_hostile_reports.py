"""Threat: a node in somebody else's hands reports what breaks what others see, and strangers send no text.

Covers: numbers, texts and lists of a report beyond all measure, on the lists that operators and tenants read;
bytes that are no UTF-8 in every message that a node or a stranger sends. Does not cover: plausible lies
(``control/THREATS.md`` says what a node can lie about), usage (``test_usage_claims``) or shares
(``test_share_claims``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest_asyncio
from running_control import FakeNode, Running, empty_report, model_report, running, tenant_report

from control.state import EPOCH_LEAPS_MAX
from packer.lending import LendingView
from packer.rates import RateView
from packer.types import GIB
from packer.wire import (
    NUMBER_MAX,
    PARTS_MAX,
    TEXT_CHARS_MAX,
    WIRE_VERSION,
    Beat,
    DeviceReport,
    DeviceShare,
    Report,
    RestoreReport,
    encode,
)

HUGE = 10**4000
URL = "http://127.0.0.1:9"
REF = f"acme/m@{'a' * 64}"
RATE = RateView("requests_per_minute", 1, 1, 1, 1)
DEVICE = DeviceReport("cpu:0", "cpu", "cpu", GIB, 0, 0, True)
RESTORE = RestoreReport("disk", 1, 1, 1)


def with_model(**changes: Any) -> Report:
    return empty_report(URL, (model_report(REF, **changes),))


def with_tenant(**changes: Any) -> Report:
    return empty_report(URL, (), tenants=(replace(tenant_report("acme"), **changes),))


def with_device(**changes: Any) -> Report:
    return empty_report(URL, (), devices=(replace(DEVICE, **changes),))


REPORTS: dict[str, Report] = {
    "a budget": with_device(budget_bytes=HUGE),
    "a budget below nothing": with_device(budget_bytes=-HUGE),
    "a number just too great": with_device(used_bytes=NUMBER_MAX + 1),
    "bytes of a model": with_model(device_bytes=HUGE),
    "an estimate": with_model(restore_ms_estimate=HUGE),
    "a restore": with_model(restores=(replace(RESTORE, restore_ms_max=HUGE),)),
    "a tenant's tokens": with_tenant(tokens=HUGE),
    "a tenant's rate": with_tenant(rates=(replace(RATE, remaining=HUGE),)),
    "a tenant's debt": with_tenant(lending=LendingView(debt_ms=-HUGE)),
    "a host tier": empty_report(URL, (), host_budget_bytes=HUGE),
    "a device's name": with_device(name="x" * (TEXT_CHARS_MAX + 1)),
    "a model's state": with_model(state="x" * (TEXT_CHARS_MAX + 1)),
    "a model's name": empty_report(URL, (model_report("x" * (TEXT_CHARS_MAX + 1)),)),
    "many restores": with_model(restores=(RESTORE,) * (PARTS_MAX + 1)),
    "many parts": with_model(shares=(DeviceShare("cpu:0", 1),) * (PARTS_MAX + 1)),
    "many rates": with_tenant(rates=(RATE,) * (PARTS_MAX + 1)),
}


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def test_a_report_beyond_all_measure_is_refused_and_changes_nothing_that_others_see(
    control: Running, tmp_path: Path
) -> None:
    """One number of thousands of digits made every list that shows it unreadable for clients."""
    key = await control.tenant("acme")
    node = await control.join("n1")
    await node.beat(tmp_path, report=with_device())
    for what, report in REPORTS.items():
        refused = await node.raw_beat(tmp_path, report=report)
        assert refused.status == 400, what
        assert len(refused.body) < 2_000, what
    for path in ("/api/v1/ps", "/api/v1/nodes", "/api/v1/tenants/acme/quota"):
        for shown in (await control.call("GET", path), await control.call("GET", path, key=key)):
            assert shown.status in (200, 403)
            assert json.loads(shown.body)
    (device,) = (await control.call("GET", "/api/v1/nodes")).json()["items"][0]["devices"]
    assert msgspec.convert(device, DeviceReport) == DEVICE


async def send(node: FakeNode, folder: Path | None, path: str, body: bytes) -> tuple[int, str]:
    answer = await node.call("POST", path, body, folder=folder)
    return answer.status, json.loads(answer.body)["error"]["code"]


NO_TEXT = b'{"version":1,"token_id":"\xff\xfe","session":"\xff","ref":"\xff","node":"\xff","csr_pem":"\xff"}'


async def test_bytes_that_are_no_text_are_a_clear_400(control: Running, tmp_path: Path) -> None:
    """They were a fault of control's own, with a trace in its log, for anybody who can reach the listener."""
    node = await control.join("n1")
    for path in ("/node/v1/join", "/node/v1/renew-late"):
        assert await send(node, None, path, NO_TEXT) == (400, "bad_message")
    beat = encode(Beat(WIRE_VERSION, "n1", 0, 0, 0, with_device())).replace(b'"n1"', b'"\xc3"')
    assert await send(node, tmp_path, "/node/v1/beat", beat) == (400, "bad_message")
    replies = b'{"version":1,"replies":[{"question":"\xff"}]}'
    for path, body in {"renew": NO_TEXT, "shares": NO_TEXT, "sources": NO_TEXT, "replies": replies}.items():
        assert await send(node, tmp_path, f"/node/v1/{path}", body) == (400, "bad_message")


async def test_a_node_that_claims_newer_and_newer_plans_does_not_make_all_plans_anew_each_time(
    control: Running, tmp_path: Path
) -> None:
    """Its claim is believed for the sake of a backup that was put back, a few times a minute."""
    node = await control.join("n1")
    epochs = []
    for _ in range(8):
        node.have = (control.server.control.meta.epoch + 5, 0)
        answer = await node.raw_beat(tmp_path)
        epochs.append(control.server.control.meta.epoch)
        assert answer.status in (200, 409)
    assert len(set(epochs)) == EPOCH_LEAPS_MAX
    node.have = (0, 0)
    await node.beat(tmp_path)  # and an honest word is taken as ever
