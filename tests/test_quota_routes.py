"""Quotas over the management API: every rate can be set and seen, and a promise is checked against nodes.

Covers: PATCH and PUT of rates, what a tenant sees of its own, refusals that name field, limit and way out (of
tenants and models that are not there too), and promises above what nodes have. Does not cover: merging byte
quotas (``test_control``), or what nodes do with a quota (``test_rates``, ``test_quota``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from running_control import Running, empty_report, running, tenant_report

from packer.lending import LendingView
from packer.rates import RateView
from packer.types import GIB, TenantQuota
from packer.wire import DeviceReport, Report

PATH = "/api/v1/tenants/acme/quota"
RATES = {
    "requests_per_minute": 60,
    "tokens_per_minute": 9_000,
    "restores_per_minute": 4,
    "device_seconds_per_day": 3_600,
}


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def test_every_rate_is_set_kept_and_taken_away(control: Running) -> None:
    await control.tenant("acme")
    changed = (await control.call("PATCH", PATH, RATES)).json()["quota"]
    assert {name: changed[name] for name in RATES} == RATES
    assert (await control.call("PATCH", PATH, {"weight": 3})).json()["quota"] == {**changed, "weight": 3}
    freed = (await control.call("PATCH", PATH, dict.fromkeys(RATES))).json()["quota"]
    assert {name: freed[name] for name in RATES} == dict.fromkeys(RATES)


async def test_put_sets_what_is_not_named_to_what_a_new_tenant_has(control: Running) -> None:
    await control.tenant("acme")
    await control.call("PATCH", PATH, {**RATES, "weight": 3})
    put = await control.call("PUT", PATH, {"tokens_per_minute": 5})
    assert msgspec.convert(put.json()["quota"], TenantQuota) == TenantQuota(tokens_per_minute=5)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("value", [0, -1, 2**63, 1.5, "many", True])
async def test_a_rate_that_makes_no_sense_names_its_field_and_changes_nothing(
    control: Running, name: str, value: object
) -> None:
    await control.tenant("acme")
    refused = await control.call("PATCH", PATH, {"weight": 3, name: value})
    assert (refused.status, refused.error["field"]) == (400, name)
    assert (await control.call("GET", PATH)).json()["quota"]["weight"] == 1


async def test_a_tenant_sees_what_is_left_of_its_own_rates(control: Running, tmp_path: Path) -> None:
    key = await control.tenant("acme")
    node = await control.join("n1")
    left = RateView("tokens_per_minute", 9_000, 9_000, 12, 59_920)
    report = replace(tenant_report("acme"), rates=(left,))
    await node.beat(tmp_path, report=empty_report("http://127.0.0.1:9", (), tenants=(report,)))
    (usage,) = (await control.call("GET", PATH, key=key)).json()["usage"]
    assert msgspec.convert(usage["rates"], tuple[RateView, ...]) == (left,)


def box(device_bytes: int) -> Report:
    device = DeviceReport("cpu:0", "cpu", "cpu", device_bytes, 0, 0, healthy=True)
    return empty_report("http://127.0.0.1:9", (), devices=(device,), host_budget_bytes=GIB)


async def test_a_promise_that_no_node_can_keep_is_refused_with_the_arithmetic(
    control: Running, tmp_path: Path
) -> None:
    await control.tenant("acme")
    assert (await control.call("PATCH", PATH, {"disk": {"reserved": 9}})).status == 200, "no node yet"
    for name, nbytes in (("n1", 5 * GIB), ("n2", 8 * GIB)):
        await (await control.join(name)).beat(tmp_path, report=box(nbytes))
    refused = await control.call("PATCH", PATH, {"weight": 2, "device": {"reserved": 8 * GIB + 1}})
    assert (refused.status, refused.error["field"]) == (400, "device.reserved")
    for part in (str(8 * GIB + 1), str(8 * GIB), "n2", "reserve less"):
        assert part in refused.error["message"]
    assert (await control.call("GET", PATH)).json()["quota"]["weight"] == 1, "nothing is half applied"
    assert (await control.call("PATCH", PATH, {"device": {"reserved": 8 * GIB}})).status == 200
    # What was promised before the nodes came does not stand in the way of other changes.
    assert (await control.call("PATCH", PATH, {"weight": 2})).status == 200


async def test_promises_that_one_node_can_not_keep_together_are_warned_of(
    control: Running, tmp_path: Path
) -> None:
    key = await control.tenant("acme")
    await control.tenant("globex")
    for name, nbytes in (("n1", 6 * GIB), ("n2", 100 * GIB)):
        await (await control.join(name)).beat(tmp_path, report=box(nbytes))
    await control.call("PATCH", PATH, {"device": {"reserved": 4 * GIB}})
    assert (await control.call("GET", PATH)).json()["warnings"] == []
    globex = "/api/v1/tenants/globex/quota"
    changed = (await control.call("PATCH", globex, {"device": {"reserved": 8 * GIB}})).json()
    (warning,) = changed["warnings"]
    for part in ("device.reserved", "node n1", str(12 * GIB), str(6 * GIB), f"sure of {4 * GIB} bytes"):
        assert part in warning
    own = (await control.call("GET", PATH, key=key)).json()["warnings"]
    assert own == [
        "device.reserved: not every node can keep it beside what others are promised; ask the operator"
    ], "no figure: a share of its own would tell what all others have reserved"
    await control.call("PATCH", globex, {"device": {"reserved": 90 * GIB}})
    assert (await control.call("GET", PATH, key=key)).json()["warnings"] == own


async def test_a_tenant_hears_nothing_of_lending_that_others_promises_follow_from(
    control: Running, tmp_path: Path
) -> None:
    """The node is promised to twice what it has: it keeps half of the reserve, and says figures of that."""
    key = await control.tenant("acme")
    await control.call("PATCH", PATH, {"device": {"reserved": 8 * GIB}})
    node = await control.join("n1")
    said = LendingView(debt_ms=-5, lent_bytes=3 * GIB, borrowed_bytes=5 * GIB, protected=True)
    report = replace(tenant_report("acme", device_bytes=9 * GIB), lending=said)
    await node.beat(tmp_path, report=empty_report("http://127.0.0.1:9", (), tenants=(report,)))
    (usage,) = (await control.call("GET", PATH)).json()["usage"]
    assert msgspec.convert(usage["lending"], LendingView) == said
    (usage,) = (await control.call("GET", PATH, key=key)).json()["usage"]
    assert usage["lending"] == {
        "debt_ms": -5,
        "lent_bytes": None,
        "borrowed_bytes": GIB,
        "excused_ms": 0,
        "protected": True,
    }


async def test_who_may_make_a_tenant_is_told_how_and_others_learn_nothing(control: Running) -> None:
    key = await control.tenant("acme")
    path = "/api/v1/tenants/globex/quota"
    absent = await control.call("GET", path, key=key)
    assert "bunk tenant create" in (await control.call("GET", path)).error["hint"]
    await control.tenant("globex")
    foreign = await control.call("GET", path, key=key)
    assert (absent.status, absent.body) == (foreign.status, foreign.body) == (404, absent.body)
    assert absent.error["hint"] is None


async def test_a_model_without_its_tenant_is_told_how_models_are_named(control: Running) -> None:
    key = await control.tenant("acme")
    for name, told in (("m", True), ("acme/m", False)):
        said = await control.call("POST", "/v1/embeddings", {"model": name, "input": "x"}, key=key)
        assert (said.status, "is named tenant/name" in said.error["message"]) == (404, told)
