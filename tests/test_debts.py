"""What a node keeps and tells of lending: debts over a restart, the operator's margin, reports, metrics.

Covers: ``agent/debts.py``, the journal's table, the option, and a node that is real but not started. Does not
cover: the arithmetic and its guarantee (``test_lending``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from scene import Scene, device_quota, model

from agent.config import load
from agent.debts import KEEP_S, Debts
from agent.journal import open_journal
from agent.node import RunningNode
from packer import residency
from packer.events import DebtFound, LendingChosen, Planned
from packer.lending import LendingView
from packer.types import MIB, BadValue, ByteQuota, TenantQuota, TenantSpec
from packer.wire import WIRE_VERSION, Plan


class Clock:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


def test_debts_are_written_now_and_then_and_when_they_changed() -> None:
    owed, clock = {"acme": -5}, Clock()
    debts = Debts({"acme": -7}, lambda: dict(owed), clock)
    clock.ms += int(KEEP_S * 1000)
    assert debts.due() is None, "before the first plan what is stored must stay"
    assert debts.planned() == [DebtFound("acme", -7)]
    assert debts.planned() == []
    found = debts.due()
    assert found == {"acme": -5}
    debts.kept(found)
    owed["acme"] = -9
    assert debts.due() is None, "not so soon"
    assert debts.due(at_once=True) == {"acme": -9}
    owed["acme"] = -5
    clock.ms += int(KEEP_S * 1000)
    assert debts.due() is None, "nothing changed"


def test_what_was_not_written_is_tried_again() -> None:
    clock = Clock()
    debts = Debts({}, lambda: {"acme": -5}, clock)
    debts.planned()
    assert debts.due(at_once=True) == debts.due(at_once=True) == {"acme": -5}


def test_the_journal_keeps_the_debts_of_now_and_no_others(tmp_path: Path) -> None:
    first = open_journal(tmp_path)
    first.save_debts({"acme": -5, "beta": 10**30})
    again = open_journal(tmp_path)
    assert again.debts() == {"acme": -5, "beta": 2**63 - 1}
    again.save_debts({"acme": -4})
    assert first.debts() == {"acme": -4}


def started(folder: Path, *words: str) -> RunningNode:
    folder.mkdir(parents=True, exist_ok=True)
    base = ["run", "--data-dir", str(folder), "--listen", "127.0.0.1:0", "--device", "cpu:64MiB"]
    node = RunningNode(load([*base, "--host-bytes", "1MiB", "--disk-bytes", "1MiB", *words]))
    node.device_watch.look()
    node.loop.post(LendingChosen(node.config.lending_margin_percent))
    return node


async def test_a_node_takes_up_its_tenants_credit_after_a_restart(tmp_path: Path) -> None:
    quota = TenantQuota(device=ByteQuota(reserved=16 * MIB))
    plan = Plan(WIRE_VERSION, "c", "n", 1, 1, (TenantSpec("acme", quota), TenantSpec("beta")), (), ())
    before = started(tmp_path)
    await before.accept_plan(plan)
    before.loop.core.tenants["acme"].slice.debt_ms = -4_321
    await before._recollection.keep_debts(at_once=True)
    await before.loop.close()
    before._journal.close()
    after = started(tmp_path)
    try:
        await after.accept_plan(Plan(WIRE_VERSION, "c", "n", 1, 2, plan.tenants, (), ()))
        (acme, _) = after.report().tenants
        assert acme.lending == LendingView(debt_ms=-4_321)
        text = after.metrics_text()
        assert 'bunkhouse_tenant_debt_seconds{tenant="acme"} -4.321' in text
        assert 'bunkhouse_tenant_lent_bytes{tenant="acme"} 0.0' in text
        assert 'bunkhouse_tenant_protected{tenant="acme"} 0.0' in text
    finally:
        await after.loop.close()
        after._journal.close()


def test_the_margin_is_an_option_of_the_node(tmp_path: Path) -> None:
    words = ["run", "--data-dir", str(tmp_path), "--device", "cpu:64MiB"]
    assert load(words).lending_margin_percent == 100
    assert load([*words, "--lending-margin", "0"]).lending_margin_percent == 0
    for wrong in ("-1", "1001"):
        with pytest.raises(BadValue, match="0 to 1000 percent") as error:
            load([*words, "--lending-margin", wrong])
        assert error.value.field == "--lending-margin"


# --- in the core ----------------------------------------------------------------------------------


def test_a_debt_of_nobody_and_of_who_has_nothing_reserved_is_ignored() -> None:
    scene = Scene(model("acme/a"))
    scene.feed(DebtFound("acme", -5))
    scene.feed(DebtFound("nobody", -5))
    assert residency.debts(scene.node) == {}


def test_debt_that_the_margin_would_never_have_allowed_is_struck_out() -> None:
    scene = Scene(model("acme/a"), quotas={"acme": device_quota(20)})
    scene.feed(LendingChosen(0))
    scene.feed(DebtFound("acme", 700))
    assert residency.debts(scene.node) == {"acme": 700}
    scene.feed(LendingChosen(100))
    assert residency.debts(scene.node) == {}


def test_a_view_tells_what_is_lent_and_what_is_borrowed() -> None:
    specs = [model("beta/b1", 40), model("beta/b2", 40)]
    scene = Scene(model("acme/a", 20), *specs, quotas={"acme": device_quota(60), "beta": device_quota(10)})
    for spec in specs:
        scene.warm(spec)
    views = {name: residency.tenant_view(scene.node, name, 0) for name in ("acme", "beta")}
    acme, beta = views["acme"], views["beta"]
    assert acme is not None
    assert beta is not None
    assert (acme.lending.lent_bytes, acme.lending.borrowed_bytes) == (40 * MIB, 0), "20 MiB are free"
    assert (beta.lending.lent_bytes, beta.lending.borrowed_bytes) == (0, 70 * MIB)
    assert acme.lending.protected


def test_a_plan_without_a_tenant_ends_its_books() -> None:
    scene = Scene(model("acme/a"), quotas={"acme": device_quota(20)})
    scene.feed(DebtFound("acme", -50))
    scene.feed(Planned((), ()))
    assert residency.debts(scene.node) == {}
