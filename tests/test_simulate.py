"""Replaying traces through the production cores: the clock, the figures, and what bad input says.

Covers: ``packer/simulate.py`` with its box, tally, traces and fleets, ``control/simulate_command.py`` and
``bunk simulate``. Does not cover: whether the cores decide well (``test_residency``, ``bench_policies``).
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from bunkhouse.cli.main import bunk
from bunkhouse.cli.simulate import OPTIONS
from control.simulate_command import EXIT_UNMET, EXIT_USAGE, _parser, main
from control.simulated_router import Router
from packer import remember, residency
from packer import simulate as simulate_module
from packer.fleet import Fleet, check_quotas, parse_fleet, parse_fleet_file
from packer.outcome import Outcome, percentile
from packer.simulate import Simulation, least_cold_ms, simulate
from packer.simulated_box import Pipe, Transfer
from packer.traces import BadTrace, Sized, Sizes, Trace, parse_models, parse_trace
from packer.types import BadValue

GB = 1_000_000_000
ONE_SIZE = Sizes(default_bytes=10 * GB)
# Moves 10 GB in exactly 1 s from disk and 0.25 s from RAM, and costs nothing else.
PLAIN = {"disk": "1TB", "disk_gbps": 10, "host_gbps": 40, "fixed_ms": 0, "service_ms": 100}


def fleet_of(device: int, ram: int = 0, boxes: int = 1, **settings: object) -> Fleet:
    words = {**PLAIN, "ram": f"{ram}GB", **settings}
    return parse_fleet(
        ",".join((f"{boxes}x1x{device}GB", *(f"{name}={value}" for name, value in words.items())))
    )


def trace_of(*requests: tuple[int, str], sizes: Sizes = ONE_SIZE) -> Trace:
    lines = ["time_ms,model", *(f"{at_ms},{model}" for at_ms, model in requests)]
    return parse_trace(lines, "trace.csv", sizes)


# --- the replay -----------------------------------------------------------------------------------


def test_a_cold_request_waits_for_its_bytes_and_a_warm_one_for_nothing() -> None:
    outcome = simulate(trace_of((0, "a"), (5_000, "a"), (9_000, "a")), fleet_of(20))
    assert outcome.cold == ((0, 0, 1_000),)
    assert outcome.all.cold_s_mean == pytest.approx(1 / 3)
    assert outcome.all.hit_shares == pytest.approx({"device": 2 / 3, "host": 0, "disk": 1 / 3, "origin": 0})
    assert outcome.moved_bytes == {"host": 0, "disk": 10 * GB, "origin": 0}


def test_who_comes_during_a_restore_waits_for_the_rest_of_it() -> None:
    outcome = simulate(trace_of((0, "a"), (400, "a")), fleet_of(20))
    assert [cold_ms for _, _, cold_ms in outcome.cold] == [1_000, 600]


@pytest.mark.parametrize("gap_ms", [40, 700, 30_000])
def test_uses_that_are_granted_and_ended_at_once_change_no_figure(
    gap_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "abacabadabacabae" * 12
    trace = trace_of(*((at * gap_ms, name) for at, name in enumerate(names)))
    fleet = fleet_of(25, ram=20, service_ms=200)
    short = Simulation(trace, fleet)
    found = short.run()
    uses: list[int] = []
    monkeypatch.setattr(simulate_module, "use_at_once", lambda *given: uses.append(1))
    long = Simulation(trace, fleet)
    assert (long.run(), long.boxes[0].steps) == (found, short.boxes[0].steps)
    assert uses if gap_ms > 200 else not short.boxes[0].node.requests


def test_a_box_fills_its_memory_ahead_of_need_with_what_was_used_before_it_was_started_again() -> None:
    before = Simulation(
        trace_of((0, "c"), *((at * 20_000, "ab"[at % 7 == 6]) for at in range(1, 70))), fleet_of(15)
    )
    before.run()
    known = [remember.of_model(model, before.boxes[0].node.now_ms) for model in before.boxes[0].models]
    after = trace_of((0, "c"), (20_000, "a"), (40_000, "b"))
    plain = fleet_of(15, ram=50)
    assert [cold_ms for *_, cold_ms in simulate(after, plain).cold] == [1_000, 1_000, 1_000]
    filled = Simulation(after, fleet_of(15, ram=50, prefetch="yes"), remembered=known).run()
    assert [cold_ms for *_, cold_ms in filled.cold] == [1_000, 250, 250]


def test_two_restores_at_once_share_the_disk() -> None:
    outcome = simulate(trace_of((0, "a"), (0, "b")), fleet_of(20))
    assert [cold_ms for _, _, cold_ms in outcome.cold] == [2_000, 2_000]


def test_a_model_that_was_in_ram_comes_back_faster() -> None:
    order = [(place * 10_000, "ab"[place % 2]) for place in range(6)]
    outcome = simulate(trace_of(*order), fleet_of(10, ram=20))
    assert [cold_ms for _, _, cold_ms in outcome.cold] == [1_000, 1_000, 250, 250, 250, 250]
    assert outcome.moved_bytes["host"] == 40 * GB


def test_only_the_bytes_that_are_missing_are_moved() -> None:
    """15 GB for two models of 10: each gives up no more than the half of itself."""
    order = [(place * 10_000, "ab"[place % 2]) for place in range(6)]
    outcome = simulate(trace_of(*order), fleet_of(15))
    later = [cold_ms for _, _, cold_ms in outcome.cold[2:]]
    assert all(490 <= cold_ms <= 530 for cold_ms in later)


def test_fixed_costs_compression_and_origin_count() -> None:
    once = trace_of((0, "a"))
    assert simulate(once, fleet_of(20, fixed_ms=300)).cold[0][2] == 1_300
    assert simulate(once, fleet_of(20, ratio=0.5)).cold[0][2] == 500
    assert simulate(once, fleet_of(20, packs="no", origin_gbps=2)).cold[0][2] == 5_000


def test_a_model_that_never_fits_is_refused_with_its_bytes() -> None:
    outcome = simulate(trace_of((0, "a"), (1, "a")), fleet_of(5))
    assert outcome.all.refused == 2
    assert outcome.refusals == {"never_fits": 2}
    assert outcome.all.rejected_bytes == 20 * GB
    assert outcome.all.cold_s_mean == 0


def test_figures_are_by_tenant_as_well() -> None:
    outcome = simulate(trace_of((0, "x/a"), (2_000, "x/a"), (3_000, "y/b")), fleet_of(40))
    assert {name: found.requests for name, found in outcome.tenants.items()} == {"x": 2, "y": 1}
    assert outcome.tenants["x"].cold_s_mean == 0.5
    assert outcome.tenants["y"].cold_s_mean == 1.0


def test_a_request_pins_its_model_for_its_duration() -> None:
    lines = ["time_ms,model,duration_ms", "0,a,60000", "2000,b,10"]
    outcome = simulate(parse_trace(lines, "t", ONE_SIZE), fleet_of(10))
    # A claim condemns after its patience, and what runs goes on to its end.
    assert outcome.cold[1][2] == 60_000 + 1_000 + 1_000 - 2_000


def test_boxes_share_the_models_as_control_would_send_them() -> None:
    order = [(place * 5_000, "abcd"[place % 4]) for place in range(40)]
    alone = simulate(trace_of(*order), fleet_of(20))
    four = simulate(trace_of(*order), fleet_of(20, boxes=2), Router().choose)
    assert len(alone.cold) > 20
    assert len(four.cold) == 4
    assert four.all.hit_shares["device"] == 0.9


def test_a_warm_model_stays_with_its_box() -> None:
    simulation = Simulation(
        trace_of((0, "a"), (5_000, "a"), (9_000, "a")),
        fleet_of(20, boxes=3),
        Router().choose,
    )
    simulation.run()
    used = [box for box in simulation.boxes if residency.device_bytes_used(box.node, "gpu:0")]
    assert len(used) == 1


def test_the_same_trace_gives_the_same_outcome() -> None:
    order = [(place * 700, "abcdefg"[place * place % 7]) for place in range(200)]
    assert simulate(trace_of(*order), fleet_of(30, 20)) == simulate(trace_of(*order), fleet_of(30, 20))


@pytest.mark.parametrize("policy", ["keep", "lru", "gdsf", "s3fifo", "sieve", "ttl"])
def test_every_policy_of_the_core_can_be_simulated(policy: str) -> None:
    order = [(place * 7_000, "abcdefg"[place * place % 7]) for place in range(60)]
    outcome = simulate(trace_of(*order), fleet_of(30, 20, policy=policy))
    assert outcome.all.requests == 60
    assert not outcome.all.refused
    assert outcome.all.cold_s_mean >= outcome.least_cold_s_mean


def test_nobody_is_below_the_bound_and_a_pool_that_holds_all_is_at_it() -> None:
    order = [(place * 7_000, "abcdefg"[place * place % 7]) for place in range(60)]
    for device, ram in ((10, 0), (30, 20), (45, 0), (100, 0)):
        outcome = simulate(trace_of(*order), fleet_of(device, ram))
        assert outcome.regret >= 1.0 - 1e-9, (device, ram)
    assert simulate(trace_of(*order), fleet_of(100)).regret == pytest.approx(1.0)


def test_the_bound_counts_each_byte_once_per_level() -> None:
    """a b a b on a device for one, RAM for the other: two come from disk, two from RAM."""
    order = trace_of((0, "a"), (9_000, "b"), (18_000, "a"), (27_000, "b"))
    assert least_cold_ms(order, fleet_of(10, ram=10)) == pytest.approx(2 * 1_000 + 2 * 250)


def test_a_pipe_gives_each_transfer_its_part() -> None:
    order = simulate  # any object: a pipe does not look into its orders
    pipe = Pipe(10.0)
    pipe.add(Transfer(order, 0, 100, 100.0), 0)  # type: ignore[arg-type]
    assert pipe.next_ms() == 10
    pipe.add(Transfer(order, 5, 100, 100.0), 5)  # type: ignore[arg-type]
    assert pipe.next_ms() == 15
    assert [each.started_ms for each in pipe.done(15)] == [0]
    assert pipe.next_ms() == 20
    assert [each.started_ms for each in pipe.done(20)] == [5]
    assert pipe.next_ms() is None


def test_percentiles_count_the_zeros() -> None:
    assert percentile([5, 7], 98, 0.5) == 0
    assert percentile([5, 7], 98, 0.99) == 7
    assert percentile([5, 7], 98, 0.98) == 5
    assert percentile([], 0, 0.99) == 0


# --- traces ---------------------------------------------------------------------------------------


def test_all_forms_of_a_trace_say_the_same() -> None:
    forms = (
        ["time_s,tenant,model,duration_s", "1.5,x,a,0.25", "0,y,b,1"],
        ["model,time_ms,duration_ms,other", "x/a,1500,250,?", "y/b,0,1000,?"],
        [
            '{"time_s": 1.5, "model": "x/a", "duration_s": 0.25}',
            "",
            '{"time_s": 0, "model": "b", "tenant": "y", "duration_s": 1}',
        ],
    )
    for lines in forms:
        trace = parse_trace(lines, "t", ONE_SIZE)
        assert trace.at_ms == (0, 1_500)
        assert [str(trace.catalog[model]) for model in trace.models] == ["y/b", "x/a"]
        assert trace.duration_ms == (1_000, 250)


def test_tokens_give_a_duration_and_sizes_come_from_list_column_or_default() -> None:
    sizes = parse_models(["model,size,workspace", "x/a,16GB,1GB"], "models.csv")
    assert sizes.of("x", "a") == Sized("x", "a", 16 * GB, GB)
    sizes.default_bytes = GB
    trace = parse_trace(
        ["time_s,model,tokens,size", "0,x/a,100,", "1,c,,3GB", "2,d,7,"], "t", sizes, token_ms=20
    )
    assert trace.duration_ms == (2_000, -1, 140)
    assert [each.size_bytes for each in trace.catalog] == [16 * GB, 3 * GB, GB]
    assert trace.catalog[1].tenant == "default"


@pytest.mark.parametrize(
    ("lines", "line", "column", "word"),
    [
        ([""], 1, "header", "empty"),
        ([], 1, "header", "empty"),
        (["time_s,model"], 1, "row", "no request"),
        (["time_s,time_s", "1,2"], 1, "header", "twice"),
        (["model", "a"], 2, "time_s", "missing"),
        (["time_s,name", "1,a"], 2, "model", "missing"),
        (["time_s,model", "1,a", "-3,a"], 3, "time_s", "negative"),
        (["time_s,model", "x,a"], 2, "time_s", "not a number"),
        (["time_s,model", "nan,a"], 2, "time_s", "not a number"),
        (["time_s,model", "inf,a"], 2, "time_s", "hundred years"),
        (["time_ms,model", "1e20,a"], 2, "time_ms", "hundred years"),
        (["time_s,model", "1"], 2, "row", "1 fields"),
        (["time_s,model", "1,"], 2, "model", "not a name"),
        (["time_s,model", "1," + "a" * 300], 2, "model", "not a name"),
        (["time_s,model,duration_s", "1,a,-1"], 2, "duration_s", "negative"),
        (["time_s,time_ms,model", "1,1,a"], 2, "time_ms", "keep one"),
        (["time_s,model,size", "1,a,big"], 2, "size", "not a size"),
        (["time_s,model,size", "1,a,0"], 2, "size", "above 0"),
        (['{"time_s": 1, "model": "a"}', "{"], 2, "row", "not JSON"),
        (['{"time_s": 1, "model": "a"}', "[1]"], 2, "row", "not an object"),
        (["time_s;model", "1;a"], 2, "time_s", "here are: time_s;model"),
        (['[{"time_s": 1, "model": "a"}]'], 1, "row", "is a JSON list"),
        (["time_s,model,size", "1,a,1GB", "2,b,2GB", "3,a,2GB"], 4, "size", "1000000000 in an earlier line"),
        (["time_s,model,size,devices", "1,a,1GB,2", "2,a,1GB,"], 3, "devices", "has 1 here and 2 in"),
        (['{"time_s": true, "model": "a"}'], 1, "time_s", "not a number"),
        (['{"time_s": 1, "model": ["a"]}'], 1, "model", "not a name"),
    ],
)
def test_a_bad_trace_is_named_by_line_and_field(lines: list[str], line: int, column: str, word: str) -> None:
    with pytest.raises(BadTrace, match=word) as caught:
        parse_trace(lines, "trace.csv", ONE_SIZE)
    assert (caught.value.file, caught.value.line, caught.value.column) == ("trace.csv", line, column)
    assert str(caught.value).startswith(f"trace.csv: line {line}: {column}: ")


def test_rows_that_say_a_models_size_in_other_words_or_not_at_all_agree() -> None:
    lines = ["time_s,model,size", "1,a,1GB", "2,a,", "3,a,1000MB"]
    assert parse_trace(lines, "t", ONE_SIZE).catalog[0].size_bytes == GB


def test_an_unknown_model_says_how_to_make_it_known() -> None:
    with pytest.raises(BadTrace, match=r"line 3: model: x/b is unknown.*--models.*--size"):
        trace_of((0, "x/a"), (1, "x/b"), sizes=parse_models(["model,size", "x/a,1GB"], "m"))


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["model", "a"], "line 2: size: this column is missing"),
        (["model,size", "a,1GB", "a,2GB"], "line 3: model: default/a is there twice"),
        (["model,size", "a,-1"], "line 2: size"),
    ],
)
def test_a_bad_list_of_models_is_named_by_line_and_field(lines: list[str], word: str) -> None:
    with pytest.raises(BadTrace, match=word):
        parse_models(lines, "models.csv")


# --- fleets ---------------------------------------------------------------------------------------


def test_a_fleet_in_one_line() -> None:
    fleet = parse_fleet("4x8x141GB, ram=2TB, disk=8TB, ratio=0.67, fixed_ms=400, packs=no, policy=lru")
    assert (fleet.boxes, fleet.devices, fleet.device_bytes) == (4, 8, 141 * GB)
    assert (fleet.ram_bytes, fleet.disk_bytes) == (2_000 * GB, 8_000 * GB)
    assert (fleet.ratio, fleet.fixed_ms, fleet.packs, fleet.policy) == (0.67, 400, False, "lru")
    assert parse_fleet("1x80GiB").boxes == 1


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "does not say what a box is"),
        ("eight GPUs", "does not say what a box is"),
        ("8x141", "does not say what a box is"),
        ("0x141GB", "devices: '0'"),
        ("2000x8x141GB", "boxes: '2000'"),
        ("8x141GB,ram", "ram: 'ram' is not one of"),
        ("8x141GB,cpu=3", "cpu: 'cpu=3' is not one of"),
        ("8x141GB,ram=many", "ram: 'many' is not a size"),
        ("8x141GB,ram=1GB,ram=2GB", "ram: is there twice"),
        ("8x141GB,ratio=3", "ratio: '3'"),
        ("8x141GB,disk_gbps=nan", "disk_gbps: 'nan'"),
        ("8x141GB,policy=best", "policy: 'best'"),
        ("8x141GB,packs=perhaps", "packs: 'perhaps'"),
    ],
)
def test_a_bad_fleet_names_the_setting(text: str, word: str) -> None:
    with pytest.raises(BadValue, match=word):
        parse_fleet(text)


TOML = """
[fleet]
shape = "2x8x141GB"
ram = "2TB"
packs = true

[tenants.acme]
device = {reserved = "80GB", max = "200GB"}
concurrency = 4

[models]
"acme/chat" = "16GB"
"""


def test_a_fleet_in_a_file_has_tenants_and_models() -> None:
    found = parse_fleet_file(TOML, "fleet.toml")
    assert (found.fleet.boxes, found.fleet.ram_bytes, found.fleet.packs) == (2, 2_000 * GB, True)
    (tenant,) = found.fleet.tenants
    assert (tenant.tenant, tenant.quota.device.reserved, tenant.quota.concurrency) == ("acme", 80 * GB, 4)
    assert found.sizes.known["acme", "chat"].size_bytes == 16 * GB


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("[fleet]", "[fleet", r"fleet.toml: is not TOML.*line 2"),
        ("[models]", "[model]", "fleet.toml: model: is unknown"),
        ('shape = "2x8x141GB"', "", "fleet.shape: is missing"),
        ("ram =", "rom =", "fleet: rom"),
        ("concurrency = 4", "concurrency = -4", "tenants.acme.concurrency"),
        ("concurrency = 4", "speed = 4", "tenants.acme.speed: is unknown"),
        ('max = "200GB"', 'max = "20GB"', "tenants.acme.device.reserved: .* is above max"),
        ('"acme/chat"', '"chat"', "models.chat: name it by its tenant"),
        ('= "16GB"', "= 16", "models.acme/chat: is not a size"),
    ],
)
def test_a_bad_fleet_file_names_the_field(old: str, new: str, word: str) -> None:
    assert old in TOML
    with pytest.raises(BadValue, match=word):
        parse_fleet_file(TOML.replace(old, new), "fleet.toml")


def test_reserves_above_what_a_box_has_are_refused() -> None:
    fleet = parse_fleet_file(TOML.replace("80GB", "150GB").replace("2x8x141GB", "2x1x141GB"), "f").fleet
    with pytest.raises(BadValue, match=r"tenants.\*.device.reserved: 150000000000 bytes .* 141000000000"):
        check_quotas(fleet, "fleet.toml")
    check_quotas(parse_fleet_file(TOML, "f").fleet, "fleet.toml")


def test_a_reserve_keeps_a_tenant_warm_beside_a_scan() -> None:
    """A scan over many models takes nothing of what a tenant reserved and uses."""
    lines = ["time_s,model"]
    lines += [f"{at},calm/a" for at in range(0, 3_000, 100)]
    lines += [f"{at + 7},scan/m{at % 29}" for at in range(0, 3_000, 10)]
    fleet = """
[fleet]
shape = "1x30GB"
disk_gbps = 10
[tenants.calm]
device = {reserved = "10GB"}
"""
    outcome = simulate(parse_trace(lines, "t", ONE_SIZE), parse_fleet_file(fleet, "f").fleet)
    assert outcome.tenants["calm"].hit_shares["device"] > 0.9
    assert outcome.tenants["scan"].hit_shares["device"] < 0.9


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv.gz"
    lines = ["time_s,model", *(f"{at * 20},{'xy'[at % 2]}/{'abcde'[at % 5]}" for at in range(100))]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_one_fleet_prints_its_figures_and_writes_json(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.json"
    status = main(
        ["--trace", str(trace_file), "--fleet", "2x20GB,ram=40GB", "--size", "10GB", "--json", str(target)]
    )
    shown = capsys.readouterr().out
    assert status == 0
    for word in ("all (10 models)", "p99 s", "rejected", "regret", "from disk", "assumed", "\nx ", "\ny "):
        assert word in shown, word
    (found,) = json.loads(target.read_text())["fleets"]
    assert found["all"]["requests"] == 100
    assert set(found["tenants"]) == {"x", "y"}
    assert set(found["moved_bytes"]) == {"host", "disk", "origin"}


def test_solve_stops_at_the_first_fleet_that_is_good_enough(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trace", str(trace_file), "--fleet", "1x30GB,disk_gbps=10", "--size", "10GB", "--json", "-"]
    assert main([*words, "--boxes", "1..6", "--solve", "p50=100ms"]) == 0
    found = json.loads(capsys.readouterr().out)
    solved = found["solve"]["fleet"]["boxes"]
    p50s = [each["all"]["cold_s_p50"] for each in found["fleets"]]
    assert solved == len(p50s) > 1
    assert all(p50 > 0.1 for p50 in p50s[:-1])
    assert p50s[-1] <= 0.1
    assert main([*words, "--boxes", "1..2", "--solve", "mean=0s"]) == EXIT_UNMET
    assert "try more boxes or RAM" in capsys.readouterr().err


def test_many_fleets_end_with_a_line_each_and_what_no_longer_helps_is_said(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten models of 10 GB: from four boxes of 30 GB on, only first uses wait."""
    words = ["--trace", str(trace_file), "--fleet", "1x30GB", "--size", "10GB", "--boxes", "4..5"]
    assert main([*words, "--solve", "p99=1ms"]) == EXIT_UNMET
    shown = capsys.readouterr()
    summary = shown.out.partition("all fleets that were tried\n")[2].splitlines()
    assert [line.split()[0] for line in summary] == ["boxes", "4", "5"]
    assert "all models fit the devices of the last one" in shown.err


def test_a_spreadsheets_csv_is_read_and_a_tenant_that_never_calls_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, fleet = tmp_path / "trace.csv", tmp_path / "fleet.toml"
    trace.write_bytes(b"\xef\xbb\xbftime_s,model\r\n1,x/a\r\n")
    fleet.write_text('fleet = "1x30GB"\n[tenants.x]\nweight = 2\n[tenants.zed]\nweight = 2\n')
    assert main(["--trace", str(trace), "--fleet", str(fleet), "--size", "1GB"]) == 0
    assert "no request of zed\n" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_of_one_fleet_and_of_many(trace_file: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    one, many = tmp_path / f"one.{suffix}", tmp_path / f"many.{suffix}"
    words = ["--trace", str(trace_file), "--fleet", "1x30GB", "--size", "10GB"]
    assert main([*words, "--plot", str(one)]) == 0
    assert main([*words, "--ram", "0GB,20GB", "--boxes", "1..2", "--plot", str(many)]) == 0
    begin = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert one.read_bytes().startswith(begin)
    assert many.read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fleet", "huge"], "--fleet: 'huge' does not say"),
        (["--fleet", "1x30GB"], r"line 2: model: x/a is unknown"),
        (["--fleet", "1x30GB", "--size", "0"], "--size: must be above 0"),
        (["--fleet", "1x30GB", "--size", "1GB", "--boxes", "5..2"], "--boxes: '5..2'"),
        (["--fleet", "1x30GB", "--size", "1GB", "--boxes", "1..900"], "900 fleets, at most 200"),
        (["--fleet", "1x30GB", "--size", "1GB", "--solve", "p98=1s"], "--solve: 'p98=1s'"),
        (["--fleet", "1x30GB", "--size", "1GB", "--plot", "a.gif"], "--plot: 'a.gif'"),
        (["--fleet", "none.toml"], "none.toml: can not be read"),
        (["--fleet", "1x30GB", "--models", "none.csv"], "none.csv: can not be read"),
    ],
)
def test_bad_words_end_with_2_and_no_figures(
    trace_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(["--trace", str(trace_file), *words]) == EXIT_USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err


def test_without_matplotlib_the_message_says_what_to_do(
    trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("control.simulate_plot.find_spec", lambda name: None)
    words = ["--trace", str(trace_file), "--fleet", "1x30GB", "--size", "1GB", "--plot", "a.png"]
    assert main(words) == EXIT_USAGE
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_a_file_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "noise"
    path.write_bytes(bytes(range(128, 256)) * 10)
    assert main(["--trace", str(path), "--fleet", "1x30GB"]) == EXIT_USAGE
    assert "not UTF-8" in capsys.readouterr().err
    path.write_bytes(gzip.compress(b"time_s,model\n" * 1000)[:20])
    assert main(["--trace", str(path), "--fleet", "1x30GB"]) == EXIT_USAGE
    assert "can not be read" in capsys.readouterr().err


def test_bunk_hands_over_to_the_server(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def run(words: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        called.append(words)
        return subprocess.CompletedProcess(words, 1)

    monkeypatch.setattr("bunkhouse.cli.simulate.subprocess.run", run)
    found = CliRunner().invoke(bunk, ["simulate", "--trace", str(trace_file), "--help"])
    assert found.exit_code == 1
    assert called[0][1:] == ["simulate", "--trace", str(trace_file), "--help"]
    assert CliRunner().invoke(bunk, ["simulate", "-o", "json", "--size", "1GB"]).exit_code == 1
    assert called[1][1:] == ["simulate", "--size", "1GB", "--json", "-"]


def test_shells_complete_the_servers_options() -> None:
    servers = {
        option for action in _parser()._actions for option in action.option_strings if option[1] == "-"
    }
    assert set(OPTIONS) == servers
    completed = ShellComplete(bunk, {}, "bunk", "_BUNK_COMPLETE").get_completions(["simulate"], "--")
    assert servers < {item.value for item in completed}
    (value,) = ShellComplete(bunk, {}, "bunk", "X").get_completions(["simulate", "--trace"], "tr")
    assert value.type == "file"


def test_control_has_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "control", "simulate", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--solve" in done.stdout


def test_no_outcome_has_more_cold_requests_than_answers() -> None:
    outcome: Outcome = simulate(trace_of((0, "a"), (10, "b"), (20, "c")), fleet_of(10, 10))
    assert len(outcome.cold) == outcome.all.requests - outcome.all.refused == 3


def test_room_is_made_on_the_device_where_it_costs_least() -> None:
    """Two devices, each full: one with a model used every minute, one with a model used once. The newcomer
    takes the place of the latter, although both would give the same bytes."""
    lines = ["time_ms,model"]
    lines += [f"{at * 60_000},often" for at in range(60)]
    lines += ["1000,once", "1830000,new", "3030000,new"]
    fleet = parse_fleet("1x2x10GB,disk_gbps=10,fixed_ms=0,service_ms=100")
    outcome = simulate(parse_trace(lines, "t", ONE_SIZE), fleet)
    assert len(outcome.cold) == 3
