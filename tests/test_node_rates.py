"""A node and its rates: what a calibration changes at once, what is exported, and what an operator fixes.

The node is real but not started: no worker runs. Measuring has its own file (``test_calibrate``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from agent.calibration import HANDED_OVER
from agent.config import AgentConfig, load
from agent.journal import PackRow, open_journal
from agent.node import RunningNode
from packer import residency
from packer.estimate import FIRST_RATES, Rates, dump_rates, load_rates, named_rates
from packer.events import PackFound, Planned, RatesSeen, TierBudgetSeen
from packer.types import MIB, HostForm, HostSizes, ModelRef, ModelSpec, Task, TenantSpec, Tier
from packer.wire import CalibrationReport, decode

REF = ModelRef("acme", "m", "0" * 16)
SPEC = ModelSpec(REF, "file:///models/m", (), "transformers", Task.EMBEDDING, 900, (900,), 0, 0)
ROW = PackRow(REF, 600, 610, HostSizes(610, 700, 910))
# The fixed rates with a decoder so fast that the form follows: wire or stored.
FAST = 10**12
WIRE_RATES = replace(FIRST_RATES, measured_ms=5, bf16=replace(FIRST_RATES.bf16, wire_to_final=FAST))
STORED_RATES = replace(FIRST_RATES, measured_ms=6, bf16=replace(FIRST_RATES.bf16, stored_to_final=FAST))


def config(folder: Path, *words: str) -> AgentConfig:
    base = ["run", "--data-dir", str(folder), "--listen", "127.0.0.1:0", "--device", "cpu:64MiB"]
    return load([*base, "--host-bytes", "1MiB", "--disk-bytes", "1MiB", *words])


@asynccontextmanager
async def node_of(folder: Path, *words: str) -> AsyncIterator[RunningNode]:
    """Made, told of its tiers, a plan and a pack; not started."""
    node = RunningNode(config(folder, *words))
    node.device_watch.look()
    for tier in (Tier.HOST, Tier.DISK):
        node.loop.post(TierBudgetSeen(tier, MIB))
    node.loop.post(RatesSeen(node.rates or FIRST_RATES, node.host_form, node._on_cuda))
    node.loop.post(Planned((TenantSpec("acme"),), (SPEC,)))
    node._specs[REF] = SPEC
    await node._journal.call(node._journal.journal.add_pack, ROW, b"key", 1)
    node.loop.post(PackFound(REF, ROW.disk_bytes, ROW.host.of(node.host_form)))
    charges = {REF: ROW.disk_bytes}
    try:
        with patch.object(node.orders.holdings, "charge", lambda ref: charges.get(ref, 0)):
            yield node
    finally:
        await node.loop.close()
        node._journal.close()


def keep(folder: Path, rates: Rates) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    journal = open_journal(folder)
    journal.save_calibration(dump_rates(rates))
    journal.close()


async def hand_over(node: RunningNode, rates: Rates) -> None:
    """As ``bunk-agent calibrate`` does beside a running node."""
    (node.config.data_dir / HANDED_OVER).write_text(dump_rates(rates))
    await node.calibrator.look()
    assert node.rates == rates


async def test_an_unmeasured_cpu_box_keeps_the_smallest_form_and_says_that_it_was_not_measured(
    tmp_path: Path,
) -> None:
    async with node_of(tmp_path) as node:
        assert node.host_form is node.orders.host_form is HostForm.STORED
        assert node.report().calibration == ""
        assert "bunkhouse_calibration" not in node.metrics_text()
        assert 'bunkhouse_host_form{form="stored"} 1.0' in node.metrics_text()


@pytest.mark.parametrize(
    ("rates", "form"), [(FIRST_RATES, "raw"), (WIRE_RATES, "wire"), (STORED_RATES, "stored")]
)
async def test_a_stored_calibration_decides_from_the_start_and_is_exported(
    tmp_path: Path, rates: Rates, form: str
) -> None:
    keep(tmp_path, rates)
    async with node_of(tmp_path) as node:
        assert node.host_form.value == node.orders.host_form.value == form
        assert node.loop.core.learned.rates == rates
        found = decode(node.report().calibration.encode(), CalibrationReport)
        assert (found.host_form, found.measured_ms) == (form, rates.measured_ms)
        assert found.rates == named_rates(rates)
        assert 'bunkhouse_calibration_bytes_per_second{rate="disk_direct"}' in node.metrics_text()


async def test_a_new_calibration_changes_estimates_and_the_form_at_once_and_is_kept(tmp_path: Path) -> None:
    async with node_of(tmp_path) as node:
        core = node.loop.core
        assert core.models[REF].opened_bytes == ROW.host.stored_bytes
        slow_ms = residency.restore_ms_estimate(core, REF)
        slower = replace(WIRE_RATES, disk_direct=1000)
        await hand_over(node, slower)
        assert node.host_form is node.orders.host_form is HostForm.WIRE
        assert core.models[REF].opened_bytes == ROW.host.wire_bytes
        assert residency.restore_ms_estimate(core, REF) > slow_ms + 500, "600 bytes at 1000 a second"
        report = node.report()
        assert report.models[0].restore_ms_estimate == residency.restore_ms_estimate(core, REF)
        stored = await node._journal.call(node._journal.journal.calibration)
        assert stored is not None
        assert load_rates(stored) == slower


async def test_a_pack_that_is_gone_is_not_found_again_by_a_change_of_form(tmp_path: Path) -> None:
    async with node_of(tmp_path) as node:
        other = replace(ROW, ref=replace(REF, name="gone"))
        await node._journal.call(node._journal.journal.add_pack, other, b"key", 1)
        await node._journal.call(node._journal.journal.add_pack, replace(ROW, disk_bytes=601), b"key", 1)
        with patch.object(node.orders.holdings, "charge", lambda ref: 601):
            await hand_over(node, WIRE_RATES)
        assert other.ref not in node.loop.core.models
        assert node.loop.core.models[REF].opened_bytes == ROW.host.stored_bytes, "its file is another one"


async def test_a_form_that_the_operator_chose_stays(tmp_path: Path) -> None:
    keep(tmp_path, WIRE_RATES)
    async with node_of(tmp_path, "--host-form", "raw") as node:
        assert node.host_form is HostForm.RAW
        await hand_over(node, STORED_RATES)
        assert node.host_form is node.orders.host_form is HostForm.RAW
        assert node.loop.core.learned.rates == STORED_RATES


async def test_a_request_keeps_the_box_from_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_of(tmp_path) as node:
        lease = node.lease(SPEC, "r1", 1000, 0)
        entering = asyncio.create_task(lease.__aenter__())
        await asyncio.sleep(0)
        assert node.calibrator._in_use == 1
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert node.calibrator._in_use == 0


def test_options_are_parsed(tmp_path: Path) -> None:
    assert config(tmp_path).calibrate
    assert config(tmp_path).host_form is None
    assert not config(tmp_path, "--calibrate", "off").calibrate
    assert config(tmp_path, "--host-form", "wire").host_form is HostForm.WIRE
    for words in (("--calibrate", "always"), ("--host-form", "gzip")):
        with pytest.raises(SystemExit):
            config(tmp_path, *words)
