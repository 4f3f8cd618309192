"""Footprints: what was measured replaces the first estimate, in the ledger at once, in the books for good.

Covers: the core's answer to ``FootprintSeen``, the rule that makes one figure of many peaks, the agent's
check of what a worker claims, the journal, and a kernel that fails to say. Does not cover: real measuring in
a worker (``test_worker.py``).
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scene import Scene, model, of, the

from agent import peak
from agent.devices import DeviceConfig
from agent.footprints import FootprintRow, Footprints, had_bytes
from agent.frames import BadFrame, decode, from_worker_decoder
from agent.journal import open_journal
from packer.events import DeviceSeen, Event, Evict, FootprintSeen, Refuse, Restore
from packer.footprint import SAMPLES_MIN, Footprint, workspace_bytes
from packer.types import GIB, MIB

SMALL, OTHER, LARGE = model("a/small", 40, 10 * MIB), model("b/other", 40, 10 * MIB), model("a/large", 60)


def _used(scene: Scene) -> int:
    return scene.node.devices["cpu:0"].account.used_bytes


def test_more_than_was_estimated_is_held_at_once_where_it_fits_and_else_from_the_next_stay_on() -> None:
    scene = Scene(SMALL, OTHER)
    scene.warm(SMALL)
    scene.feed(FootprintSeen(SMALL.ref, 12 * MIB))
    assert _used(scene) == 52 * MIB
    scene.feed(FootprintSeen(SMALL.ref, 10 * MIB))
    scene.warm(OTHER)
    assert _used(scene) == 100 * MIB
    assert scene.later(1000).feed(FootprintSeen(SMALL.ref, 30 * MIB)) == []
    assert _used(scene) == 100 * MIB, "no budget is exceeded in the books"
    scene.settle(scene.feed(DeviceSeen("cpu:0", 0)))
    scene.feed(DeviceSeen("cpu:0", 100 * MIB))
    scene.warm(SMALL)
    assert _used(scene) == 70 * MIB


def test_what_nobody_needs_is_free_for_others_at_once() -> None:
    scene = Scene(SMALL, OTHER, LARGE)
    scene.warm(SMALL)
    scene.feed(FootprintSeen(SMALL.ref, 0))
    assert _used(scene) == 40 * MIB
    # Beside the estimate it would not have fitted.
    actions = scene.ask(LARGE)
    assert the(actions, Restore).ref == LARGE.ref
    assert not of(actions, Evict)


def test_a_restore_in_progress_is_corrected_and_ends_with_the_books_in_order() -> None:
    scene = Scene(SMALL)
    order = the(scene.ask(SMALL), Restore)
    scene.feed(FootprintSeen(SMALL.ref, 25 * MIB))
    assert _used(scene) == 65 * MIB
    scene.settle(scene.restored(order))
    scene.settle(scene.finish(1))
    assert _used(scene) == 65 * MIB


def test_what_is_leaving_goes_as_it_was_held() -> None:
    scene = Scene(SMALL, LARGE)
    scene.warm(SMALL)
    order = the(scene.ask(LARGE), Evict)
    assert not of(scene.feed(FootprintSeen(SMALL.ref, 1 * MIB)), Evict)
    assert _used(scene) == 50 * MIB
    scene.settle(scene.evicted(order))
    assert _used(scene) == 60 * MIB
    # The next stay holds what was measured.
    scene.settle(scene.finish(2))
    scene.warm(SMALL)
    assert scene.node.models[SMALL.ref].device_bytes == 41 * MIB


def test_a_refusal_counts_with_what_was_measured() -> None:
    scene = Scene(SMALL)
    scene.feed(FootprintSeen(SMALL.ref, 70 * MIB))
    refusal = the(scene.ask(SMALL), Refuse)
    assert f"{70 * MIB} of workspace" in refusal.detail


def test_a_plan_with_another_estimate_does_not_move_what_is_held() -> None:
    """Else the bytes between the two estimates would be taken off the weights."""
    scene = Scene(SMALL)
    scene.warm(SMALL)
    scene.plan(model("a/small", 40, 60 * MIB))
    scene.feed(FootprintSeen(SMALL.ref, 5 * MIB))
    assert _used(scene) == 45 * MIB
    scene.feed(FootprintSeen(SMALL.ref, 20 * MIB))
    assert _used(scene) == 60 * MIB


def test_nonsense_and_strangers_change_nothing() -> None:
    scene = Scene(SMALL)
    scene.warm(SMALL)
    for event in (
        FootprintSeen(SMALL.ref, -1),
        FootprintSeen(OTHER.ref, 5),
        FootprintSeen(SMALL.ref, 10 * MIB),
    ):
        assert scene.feed(event) == []
    assert _used(scene) == 50 * MIB


# --- the rule -------------------------------------------------------------------------------------


def test_the_estimate_holds_until_something_was_measured() -> None:
    assert workspace_bytes(Footprint(), 7 * MIB, may_shrink=True) == 7 * MIB


@pytest.mark.parametrize("may_shrink", [True, False])
def test_an_excess_counts_from_the_first_measurement_on(may_shrink: bool) -> None:
    assert workspace_bytes(Footprint().seeing(100 * MIB), 7 * MIB, may_shrink) >= 100 * MIB


def test_it_sinks_after_enough_requests_with_a_floor_and_only_where_it_may() -> None:
    known = Footprint()
    for number in range(SAMPLES_MIN):
        assert workspace_bytes(known, 100 * MIB, may_shrink=True) == 100 * MIB, number
        known = known.seeing(number * MIB)
    assert workspace_bytes(known, 100 * MIB, may_shrink=True) == 25 * MIB
    assert workspace_bytes(known, 16 * MIB, may_shrink=True) == 7 * MIB + 7 * MIB // 4 + 2 * MIB
    assert workspace_bytes(known, 100 * MIB, may_shrink=False) == 100 * MIB


# --- the agent ------------------------------------------------------------------------------------

CPU = DeviceConfig("cpu:0", "cpu", "cpu", GIB)


class Core:
    """Counts what a core would be told."""

    def __init__(self) -> None:
        self.held = {SMALL.ref: SMALL.workspace_bytes}
        self.told: list[FootprintSeen] = []

    def post(self, event: Event) -> None:
        assert isinstance(event, FootprintSeen)
        self.told.append(event)
        self.held[event.ref] = event.workspace_bytes


def test_a_claim_beyond_what_the_process_ever_had_is_not_believed() -> None:
    core = Core()
    footprints = Footprints({"cpu:0": CPU}, core.post, core.held.get)
    mine = had_bytes(CPU, os.getpid())
    assert MIB < mine < 100 * GIB
    for claim in (mine * 2, 10**15, 0, -5):
        footprints.seen(SMALL, "cpu:0", os.getpid(), claim)
    assert core.told == []
    footprints.seen(SMALL, "cpu:0", os.getpid(), 20 * MIB)
    assert core.told == [FootprintSeen(SMALL.ref, 27 * MIB)]


@pytest.mark.parametrize(("budget_mib", "held_mib"), [(60, 20), (45, 10), (1024, 52)])
def test_one_greedy_request_does_not_keep_a_model_away_for_ever(budget_mib: int, held_mib: int) -> None:
    """At most what the largest device has beside the weights is held, but never less than the estimate: a
    model that never fitted is still refused with its arithmetic."""
    core = Core()
    small, large = replace(CPU, budget_bytes=MIB), replace(CPU, name="cpu:1", budget_bytes=budget_mib * MIB)
    footprints = Footprints({"cpu:0": small, "cpu:1": large}, core.post, core.held.get)
    footprints.seen(SMALL, "cpu:1", os.getpid(), 40 * MIB)
    assert core.held[SMALL.ref] == held_mib * MIB


def test_a_process_that_is_gone_had_nothing() -> None:
    # Above the greatest pid that Linux gives out.
    assert had_bytes(CPU, 2**22 + 1) == 0


def test_what_was_learned_is_there_after_a_crash_and_goes_with_its_version(tmp_path: Path) -> None:
    row = FootprintRow(SMALL.ref, "transformers", "cpu", Footprint(30 * MIB, 9))
    gone = FootprintRow(OTHER.ref, "transformers", "cuda", Footprint(1, 1))
    first = open_journal(tmp_path)
    first.save_footprints([row, gone], [SMALL.ref, OTHER.ref])
    first.save_footprints([], [SMALL.ref])
    second = open_journal(tmp_path)
    assert second.footprints() == [row]
    core = Core()
    footprints = Footprints({"cpu:0": CPU}, core.post, core.held.get)
    footprints.take_stored(second.footprints())
    footprints.planned([SMALL])
    assert [event.workspace_bytes for event in core.told] == [39 * MIB + MIB // 2]


@pytest.mark.parametrize("figure", [-1, 0, 2**60, 10**30, "9", 1.5, None, True])
def test_a_journal_that_holds_what_nobody_can_have_measured_is_not_believed(figure: Any) -> None:
    core = Core()
    footprints = Footprints({"cpu:0": CPU}, core.post, core.held.get)
    footprints.take_stored([FootprintRow(SMALL.ref, SMALL.engine, "cpu", Footprint(figure, 9))])
    footprints.take_stored([FootprintRow(SMALL.ref, SMALL.engine, "cpu", Footprint(30 * MIB, figure))])
    footprints.planned([SMALL])
    assert core.told == []


@pytest.mark.parametrize("claim", ["-1", "1125899906842625", "1e30", '"5"', "1.5", "1" + "0" * 40, "null"])
def test_no_frame_carries_a_workspace_that_no_machine_has(claim: str) -> None:
    frame = '{"type":"Measured","id":1,"ref":"a/small@0000000000000000","workspace_bytes":%s}'
    assert decode(from_worker_decoder, (frame % 5).encode())
    with pytest.raises(BadFrame, match="workspace_bytes"):
        decode(from_worker_decoder, (frame % claim).encode())


# --- measuring in a worker ------------------------------------------------------------------------


class Kernel:
    """``/proc``, as it may be when a worker has no descriptor left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing = False
        monkeypatch.setattr(peak, "_CLEAR", self)
        monkeypatch.setattr(peak, "_STATUS", self)

    def write_text(self, text: str) -> int:
        if self.failing:
            raise OSError(errno.EMFILE, "too many open files")
        return len(text)

    def read_text(self) -> str:
        self.write_text("")
        return "VmHWM:\t    40960 kB\nVmRSS:\t    30720 kB\n"


@pytest.mark.parametrize("fails_in", ["begin", "end"])
def test_a_request_that_can_not_be_measured_is_computed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_in: str
) -> None:
    kernel = Kernel(monkeypatch)
    meter = peak.PeakMeter(False, lambda: (0, 0), lambda: None)
    for _ in range(2):
        kernel.failing = fails_in == "begin"
        meter.begin(SMALL.ref, 10)
        kernel.failing = fails_in == "end"
        assert meter.end(SMALL.ref) == 0
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "what requests take beside the weights can not be measured"
    ]
    kernel.failing = False
    meter.begin(SMALL.ref, 10)
    assert meter.end(SMALL.ref) == 10 * MIB


def test_a_kernel_that_says_nothing_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    kernel.failing = True
    meter = peak.PeakMeter(False, lambda: (0, 0), lambda: None)
    kernel.failing = False
    meter.begin(SMALL.ref, 10)
    assert meter.end(SMALL.ref) == 0


def test_another_engine_or_kind_of_device_measures_anew() -> None:
    core = Core()
    footprints = Footprints({"cpu:0": CPU}, core.post, core.held.get)
    footprints.take_stored(
        [
            FootprintRow(SMALL.ref, "another", "cpu", Footprint(80 * MIB, 9)),
            FootprintRow(SMALL.ref, SMALL.engine, "cuda", Footprint(90 * MIB, 9)),
        ]
    )
    footprints.planned([SMALL])
    assert core.told == []


def test_what_the_journal_did_not_take_is_given_to_it_again() -> None:
    core = Core()
    footprints = Footprints({"cpu:0": CPU}, core.post, core.held.get)
    footprints.seen(SMALL, "cpu:0", os.getpid(), MIB)
    rows = footprints.take_unsaved()
    assert [row.footprint for row in rows] == [Footprint(MIB, 1)]
    assert footprints.take_unsaved() == ()
    footprints.put_back(rows)
    assert footprints.take_unsaved() == rows
