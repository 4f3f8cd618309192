"""Replicas in the simulator: requests wait for each other, and the production core sends for copies.

Covers: turns, what replicas spare and cost, a copy that a box has no room for, and how both are said in
fleets and lists of models. Does not cover: the rule itself (``test_copies``) or everything else that is
simulated (``test_simulate``).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from control.simulate_command import EXIT_USAGE, main, run_fleet
from packer.fleet import Fleet, parse_fleet, parse_fleet_file
from packer.outcome import Outcome
from packer.simulated_turns import Turns
from packer.traces import BadTrace, Sizes, Trace, parse_models, parse_trace
from packer.types import BadValue

GB = 10**9
SIZES = Sizes(default_bytes=10 * GB)
# One model is asked for every 200 ms and takes 500: one box can not keep up, three can.
BUSY = [f"{at / 5},a/busy,0.5" for at in range(300)]
THREE = "3x1x10GB,disk_gbps=10,together=1"


def trace_of(*lines: str) -> Trace:
    return parse_trace(["time_s,model,duration_s", *lines], "t", SIZES)


def run(trace: Trace, fleet: Fleet) -> Outcome:
    return run_fleet(trace, fleet)[0]


def waited(outcome: Outcome) -> tuple[float, int]:
    assert outcome.waited is not None
    return outcome.waited.waited_s_mean, outcome.waited.copies


def test_so_many_run_at_once_and_the_others_in_the_order_of_their_coming() -> None:
    turns = Turns(2)
    begun = [turns.take(0, 7, at_ms, 100) for at_ms in (0, 10, 20, 30, 500)]
    assert begun == [0, 10, 100, 110, 500]
    assert turns.take(1, 7, 20, 100) == 20, "another box"
    assert turns.take(0, 8, 20, 100) == 20, "another model"
    found = turns.waited()
    assert found.waited_s_most == 0.08
    assert found.waited_s_mean == pytest.approx(0.16 / 7)


def test_copies_spare_what_callers_wait_for_each_other() -> None:
    trace = trace_of(*BUSY)
    alone, alone_copies = waited(run(trace, parse_fleet(THREE)))
    spread, copies = waited(run(trace, parse_fleet(f"{THREE},replicas=3")))
    assert alone_copies == 0
    assert alone > 30
    assert copies == 2
    assert spread < alone / 10


def test_a_model_that_nobody_waits_for_gets_no_copy() -> None:
    trace = trace_of(*(f"{at * 5},a/calm,0.5" for at in range(50)))
    outcome = run(trace, parse_fleet(f"{THREE},replicas=3"))
    assert waited(outcome) == (0.0, 0)
    assert len(outcome.cold) == 1


def test_whom_no_further_box_takes_is_answered_by_the_holder() -> None:
    """The other box's only device is kept busy by a request, so the copy's caller is turned away there."""
    trace = trace_of("0,b/long,900", *(f"{1 + at / 5},a/busy,0.5" for at in range(60)))
    outcome = run(trace, parse_fleet("2x1x10GB,disk_gbps=10,together=1,replicas=2,deadline_s=3"))
    assert waited(outcome)[1] >= 1
    assert (outcome.all.refused, outcome.all.requests) == (0, 61)


def test_the_same_again_gives_the_same() -> None:
    fleet = parse_fleet(f"{THREE},replicas=2")
    assert run(trace_of(*BUSY), fleet) == run(trace_of(*BUSY), fleet)


def test_where_any_number_runs_at_once_nothing_is_said_of_waiting() -> None:
    fleet = parse_fleet("3x1x10GB,disk_gbps=10")
    assert run(trace_of(*BUSY), fleet).waited is None
    one = run(trace_of(*BUSY), replace(fleet, together=256))
    assert waited(one) == (0.0, 0)
    assert one.all == run(trace_of(*BUSY), fleet).all


def test_lists_and_files_say_which_models_may_have_replicas() -> None:
    known = parse_models(["model,size,replicas", "a/x,1GB,3", "a/y,1GB,"], "m").known
    assert [known["a", name].replicas for name in "xy"] == [3, None]
    text = 'fleet = "2x80GB"\n[models]\n"a/x" = {size = "1GB", replicas = 2}\n'
    assert parse_fleet_file(text, "f").sizes.known["a", "x"].replicas == 2
    for wrong in ("0", "17", '"2"', "true"):
        with pytest.raises(BadValue, match=r"models\.a/x\.replicas: must be from 1 to 16"):
            parse_fleet_file(text.replace("replicas = 2", f"replicas = {wrong}"), "f")
    with pytest.raises(BadTrace, match="line 2: replicas: 17 is not 1 to 16"):
        parse_models(["model,size,replicas", "a/x,1GB,17"], "m")
    with pytest.raises(BadValue, match="together: '0'"):
        parse_fleet("2x80GB,together=0")


def test_the_command_prints_them_and_wants_to_know_how_many_run_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["time_s,model,duration_s", *BUSY]))
    words = ["--trace", str(trace), "--size", "10GB", "--fleet"]
    assert main([*words, "3x1x10GB,replicas=3"]) == EXIT_USAGE
    assert "--fleet: together: a/busy may have replicas" in capsys.readouterr().err
    assert main([*words, f"{THREE},replicas=3"]) == 0
    assert "2 times a further box was sent for a copy" in capsys.readouterr().out
    assert main([*words, f"{THREE},replicas=3", "--json", "-"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["fleets"]
    assert found["waited"]["copies"] == 2
