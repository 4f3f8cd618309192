"""The regret meter: a node's own log, its replay beside the node, and where the figures are seen.

Covers: ``agent/use_log.py`` and its bounds, ``agent/regret.py`` with a real child, the metrics, ``bunk ps
--regret`` on a real box, and that tenants see nothing of it. Does not cover: the arithmetic
(``test_regret``).
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from click.testing import CliRunner
from make_models import make_gpt2
from real_box import CALLER, PATIENCE_S, Box
from running_control import Running, empty_report, running
from scene import Scene, model, of

from agent import regret as meter_module
from agent import use_log
from agent.accuracy import Accuracy
from agent.counters import Counters
from agent.metrics import render
from agent.regret import RegretMeter, ReplayFailed, question, read_question, replay
from agent.use_log import UseLog
from bunkhouse.cli.main import bunk as bunk_command
from packer import regret, residency
from packer.events import (
    Action,
    Event,
    Grant,
    Restore,
    RestoreFailed,
    ServingBegun,
    ServingEnded,
    Ticked,
)
from packer.types import MIB, HostForm, ModelRef, Tier
from packer.wire import RegretReport, Report, encode

A, B, C = (model(f"acme/{name}", 40) for name in "abc")
FOUND = RegretReport(90, 80, 3_600_000, 12_500, 20_000, 10_000, 9_000, at_ms=1_800_000_000_000)


class Logged(Scene):
    """A scene whose node keeps the log."""

    uses = UseLog()

    def feed(self, event: Event) -> list[Action]:
        actions = super().feed(event)
        self.uses.observe(self.now_ms, event, actions)
        return actions


def lived(host_mib: int = 0) -> Logged:
    """Three models take turns on a device that holds two of them."""
    made = Logged(A, B, C, host_mib=host_mib)
    made.uses = UseLog()
    for number in range(30):
        spec = (A, B, C)[number * 7 % 3]
        made.settle(made.later(10_000).ask(spec))
        made.settle(made.finish(made.requests))
    return made


# --- the log --------------------------------------------------------------------------------------


def test_every_grant_is_a_use_and_a_restore_has_its_cost_once() -> None:
    made = Logged(A)
    made.uses = UseLog()
    order = next(iter(of(made.ask(A), Restore)))
    made.later(50).ask(A)
    granted = made.later(50).restored(order, restore_ms=70)
    assert len(of(granted, Grant)) == 2
    made.later(10).ask(A)
    assert list(made.uses.columns.cold_ms) == [70, 0, 0]
    assert list(made.uses.columns.at_ms) == [100, 100, 110]
    assert made.uses.columns.refs == [A.ref]


def early(made: Logged) -> Restore:
    """A restore whose waiter was let in after 40 ms, and one more at once."""
    order = next(iter(of(made.ask(A), Restore)))
    begun = ServingBegun(A.ref, order.device, order.order)
    assert len(of(made.later(40).feed(begun), Grant)) == 1
    assert len(of(made.ask(A), Grant)) == 1
    return order


def test_whoever_is_let_in_early_pays_the_whole_restore_once() -> None:
    made = Logged(A)
    made.uses = UseLog()
    made.later(30).restored(early(made), restore_ms=70)
    made.ask(A)
    assert list(made.uses.columns.cold_ms) == [70, 0, 0]


def test_nobody_pays_for_a_restore_that_sent_them_away() -> None:
    made = Logged(A)
    made.uses = UseLog()
    order = early(made)
    made.feed(ServingEnded(A.ref, order.device, order.order))
    made.ask(A)
    made.later(500).restored(order, restore_ms=600)
    assert list(made.uses.columns.cold_ms) == [0, 0, 600]
    # The same when it fails for good, and the next one has its own price.
    made = Logged(A)
    made.uses = UseLog()
    order = early(made)
    failed = RestoreFailed(A.ref, order.device, order.from_tier, "a fault", order=order.order)
    made.settle(made.feed(failed) + made.later(60_000).ask(A))
    assert list(made.uses.columns.cold_ms[:2]) == [0, 0]
    assert made.uses.columns.cold_ms[2] > 0


def test_the_price_of_a_use_that_is_forgotten_meanwhile_goes_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(use_log, "USES_MAX", 10)
    monkeypatch.setattr(use_log, "USES_DROPPED", 5)
    made = Logged(A, B)
    made.uses = UseLog()
    made.warm(B)
    order = early(made)
    for _ in range(20):
        made.ask(B)
    made.restored(order, restore_ms=70)
    assert not any(made.uses.columns.cold_ms)


def test_the_log_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use_log, "USES_MAX", 50)
    monkeypatch.setattr(use_log, "USES_DROPPED", 10)
    uses = UseLog()
    for at in range(1_000):
        uses.observe(at, Ticked(), [Grant(f"r{at}", A.ref, "cpu:0", Tier.DEVICE, 0)])
        assert len(uses) <= 50
    assert list(uses.columns.at_ms) == list(range(1_000 - len(uses), 1_000))
    monkeypatch.setattr(use_log, "MODELS_MAX", 5)
    for number in range(23):
        ref = ModelRef("acme", f"m{number}", "0" * 16)
        uses.observe(number, Ticked(), [Grant(f"q{number}", ref, "cpu:0", Tier.DEVICE, 0)])
        assert len(uses.columns.refs) <= 5
        assert max(uses.columns.models) < len(uses.columns.refs)


# --- the replay -----------------------------------------------------------------------------------


def test_the_question_names_nobody_and_is_read_as_it_was_written() -> None:
    made = lived(host_mib=100)
    asked = question(made.uses.columns, made.node)
    assert b"acme" not in asked
    assert not any(spec.ref.version.encode() in asked for spec in (A, B, C))
    header, at_ms, models, cold_ms = read_question(asked)
    columns = made.uses.columns
    assert (at_ms, models, cold_ms) == (columns.at_ms, columns.models, columns.cold_ms)
    assert header.sizes == [40 * MIB] * 3
    assert header.memory.device_bytes == 100 * MIB
    # A copy of 5 MiB stands for 40 MiB of weights.
    assert header.memory.host_bytes == 800 * MIB
    assert 0 < header.costs.host_ms_per_byte < header.costs.disk_ms_per_byte
    assert header.costs.fixed_ms > 0


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-1], lambda data: data + b"x"])
def test_a_question_that_was_cut_is_refused(spoil) -> None:  # type: ignore[no-untyped-def]
    made = lived()
    with pytest.raises(ValueError, match=r"header|uses"):
        read_question(spoil(question(made.uses.columns, made.node)))


def test_a_model_that_left_counts_for_nobody() -> None:
    made = lived()
    del made.node.models[C.ref]
    header, *_ = read_question(question(made.uses.columns, made.node))
    assert header.sizes.count(40 * MIB) == 2
    assert max(header.sizes) > header.memory.device_bytes


async def test_a_real_child_finds_what_the_arithmetic_says() -> None:
    made = lived()
    asked = question(made.uses.columns, made.node)
    header, at_ms, models, cold_ms = read_question(asked)
    expected = regret.replay(regret.UseLog(at_ms, models, cold_ms, header.sizes), header.memory, header.costs)
    found = await replay(asked)
    assert (found.uses, found.counted) == (30, 27)
    assert found.actual_ms == round(expected.actual_ms) > 0
    assert found.optimum_ms == round(expected.optimum_ms) > 0
    assert found.bound_ms <= found.optimum_ms < found.lru_ms


async def test_a_child_that_can_not_answer_says_why() -> None:
    with pytest.raises(ReplayFailed, match="no header"):
        await replay(b"")


async def test_a_child_that_takes_too_long_is_ended_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of processor time, and a million uses in a memory that is always short."""
    monkeypatch.setattr(meter_module, "CPU_S_MAX", 1)
    uses, models = 1_000_000, 4_000
    header = {
        "uses": uses,
        "sizes": [1 + number % 97 for number in range(models)],
        "memory": {"device_bytes": 900, "host_bytes": 9_000},
        "costs": {"fixed_ms": 1.0, "host_ms_per_byte": 1.0, "disk_ms_per_byte": 2.0},
    }
    columns = (
        array("q", range(uses)),
        array("I", [number % models for number in range(uses)]),
        array("Q", bytes(8 * uses)),
    )
    body = b"".join(column.tobytes() for column in columns)
    with pytest.raises(ReplayFailed, match="ended with -"):
        await replay(json.dumps(header).encode() + b"\n" + body)


class Asked:
    """Answers in place of a child."""

    def __init__(self) -> None:
        self.questions: list[bytes] = []
        self.news = asyncio.Event()
        self.fails = False

    async def __call__(self, asked: bytes) -> RegretReport:
        self.questions.append(asked)
        self.news.set()
        if self.fails:
            raise ReplayFailed("no memory")
        return replace(FOUND, at_ms=0)


async def test_a_meter_looks_when_asked_and_keeps_the_last_result_over_a_failure() -> None:
    made, asked = lived(), Asked()
    meter = RegretMeter(made.uses, lambda: made.node, lambda: 77, every_s=3_600.0, ask=asked)
    running = asyncio.create_task(meter.run())
    await asyncio.sleep(0)
    assert meter.last is None
    meter.look_now()
    await asked.news.wait()
    assert meter.last == replace(FOUND, at_ms=77)
    running.cancel()
    asked.fails = True
    await meter.look()
    assert meter.last == replace(FOUND, at_ms=77)
    assert len(asked.questions) == 2


async def test_an_empty_log_is_not_replayed() -> None:
    asked = Asked()
    await RegretMeter(UseLog(), residency.Node, lambda: 1, ask=asked).look()
    assert asked.questions == []


# --- where it is seen -----------------------------------------------------------------------------


def test_metrics_say_what_was_found_and_nothing_before() -> None:
    report = Report("", 0, False, (), 0, 0, 0, 0, (), ())
    before = render(report, Counters(), Accuracy(), None, HostForm.STORED)
    assert "bunkhouse_regret" not in before
    judged = replace(report, regret=encode(FOUND).decode())
    text = render(judged, Counters(), Accuracy(), None, HostForm.STORED)
    assert 'bunkhouse_regret_cold_seconds{schedule="actual"} 12.5' in text
    assert 'bunkhouse_regret_cold_seconds{schedule="bound"} 9.0' in text
    assert "bunkhouse_regret_ratio 1.25" in text
    assert "bunkhouse_regret_window_seconds 3600.0" in text
    idle = replace(report, regret=encode(replace(FOUND, optimum_ms=0)).decode())
    assert "bunkhouse_regret_ratio" not in render(idle, Counters(), Accuracy(), None, HostForm.STORED)


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def test_a_nodes_regret_is_the_operators_and_nonsense_does_not_break_the_list(
    control: Running, tmp_path: Path
) -> None:
    key = await control.tenant("acme")
    node = await control.join("n1")
    found = RegretReport(90, 80, 3_600_000, 12_500, 20_000, 10_000, 9_000, at_ms=5)
    report = empty_report("http://127.0.0.1:9", ())
    await node.beat(tmp_path, report=replace(report, regret=encode(found).decode()))
    (item,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
    assert item["regret"]["optimum_ms"] == 10_000
    assert (await control.call("GET", "/api/v1/nodes", key=key)).status in (403, 404)
    assert b"optimum" not in (await control.call("GET", "/api/v1/ps", key=key)).body
    for text in ("nonsense", "{}", '{"uses": "many"}'):
        await node.beat(tmp_path, report=replace(report, regret=text))
        (item,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
        assert item["regret"] is None
    too_long = await node.raw_beat(tmp_path, report=replace(report, regret="x" * 2_000))
    assert too_long.status == 400


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    for seed in range(3):
        make_gpt2(tmp_path / f"gen{seed}", seed, hidden=256, layers=4, heads=4)
    box = Box(tmp_path / "box", ("cpu:32MiB",))
    try:
        box.start_control()
        box.start_agent("--regret-every", "1", "--host-bytes", "0MiB")
        box.add_tenant("acme")
        for seed in range(3):
            box.tenant("acme").push(f"acme/gen{seed}", tmp_path / f"gen{seed}")
        box.wait_planned(3)
        yield box
    finally:
        box.close()


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_a_real_box_shows_its_regret_to_operators_alone(box: Box, tmp_path: Path) -> None:
    for number in range(9):
        ask(box, f"acme/gen{number % 3}")
    operator = box.operator()
    assert box.agent is not None
    box.agent.until(
        lambda: any(node.regret is not None and node.regret.counted >= 6 for node in operator.nodes()), 0.1
    )
    found = operator.nodes()[0].regret
    assert found is not None
    assert found.uses == 9
    assert 0 < found.bound_ms <= found.optimum_ms <= found.lru_ms
    assert found.actual_ms > 0
    shown = run(tmp_path, box, (box.folder / "control" / "operator.key").read_text())
    assert shown.exit_code == 0, shown.output
    assert "OPTIMUM" in shown.output
    assert "box" in shown.output
    assert "bunkhouse_regret_ratio" in CALLER.get(f"{box.gateway_url}/metrics", timeout=PATIENCE_S).text
    refused = run(tmp_path, box, box.keys["acme"])
    assert refused.exit_code != 0
    assert "OPTIMUM" not in refused.output
    assert '"regret"' not in json.dumps(str(box.tenant("acme").ps()))


def ask(box: Box, name: str) -> None:
    answer = CALLER.post(
        f"{box.gateway_url}/v1/completions",
        headers={"Authorization": f"Bearer {box.keys['acme']}"},
        json={"model": name, "prompt": "the bunk", "max_tokens": 2, "temperature": 0},
        timeout=PATIENCE_S,
    )
    assert answer.status_code == 200, answer.text


def run(folder: Path, box: Box, key: str):  # type: ignore[no-untyped-def]
    path = folder / "a.key"
    path.write_text(key.strip() + "\n")
    path.chmod(0o600)
    return CliRunner().invoke(bunk_command, ["ps", "--regret", "--url", box.url, "--key-file", str(path)])
