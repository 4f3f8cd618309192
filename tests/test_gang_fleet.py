"""Fleets whose models need several devices: what a trace says of them, and what they would have cost.

Covers: the replay of gangs, the forms that name their devices, and what is wrong with them. Does not cover:
all else of the simulator (``test_simulate``).
"""

from __future__ import annotations

import pytest

from control.simulated_router import Router
from packer.fleet import Fleet, parse_fleet, parse_fleet_file
from packer.simulate import Simulation, simulate
from packer.traces import BadTrace, Sized, Sizes, Trace, parse_models, parse_trace
from packer.types import BadValue

GB = 1_000_000_000


def fleet(shape: str, ram: int = 0) -> Fleet:
    """Moves 10 GB in exactly 1 s from disk and 0.25 s over one link."""
    return parse_fleet(f"{shape},ram={ram}GB,disk=1TB,disk_gbps=10,host_gbps=40,fixed_ms=0,service_ms=100")


def trace(*requests: tuple[int, str]) -> Trace:
    sizes = parse_models(["model,size,devices", "large,40GB,2", "small,10GB,", "other,40GB,2"], "m.csv")
    return parse_trace(["time_ms,model", *(f"{at},{model}" for at, model in requests)], "t.csv", sizes)


def test_a_gang_is_refused_where_no_box_has_its_devices_and_comes_where_one_has() -> None:
    asked = trace((0, "large"), (10_000, "large"))
    assert simulate(asked, fleet("1x80GB")).refusals == {"never_fits": 2}
    assert simulate(asked, fleet("2x15GB")).refusals == {"never_fits": 2}
    outcome = simulate(asked, fleet("2x30GB"))
    assert outcome.cold == ((0, 0, 4_000),)


def test_its_shares_come_from_ram_over_all_their_links_at_once() -> None:
    asked = trace(*((place * 20_000, ("large", "other")[place % 2]) for place in range(4)))
    outcome = simulate(asked, fleet("2x30GB", ram=200))
    waited = [cold_ms for _, _, cold_ms in outcome.cold]
    assert waited[:2] == [4_000, 4_000]
    assert all(500 <= cold_ms <= 502 for cold_ms in waited[2:])  # the halves differ by part of a chunk
    assert len(waited) == 4
    assert outcome.least_cold_s_mean <= outcome.all.cold_s_mean


def test_control_sends_it_to_a_box_with_room_on_two_devices() -> None:
    asked = trace((0, "large"), (20_000, "other"), (40_000, "large"), (60_000, "other"))
    outcome = Simulation(asked, fleet("2x2x25GB"), Router().choose).run()
    assert [cold_ms for _, _, cold_ms in outcome.cold] == [4_000, 4_000]


def test_devices_are_named_in_traces_lists_and_fleet_files() -> None:
    inline = parse_trace(["time_s,model,size,devices", "0,a/m,4GB,3"], "t.csv", Sizes())
    assert inline.catalog == (Sized("a", "m", 4 * GB, devices=3),)
    lines = ["model,size,workspace,devices", "a/m,4GB,1GB,2"]
    assert parse_models(lines, "m.csv").of("a", "m") == Sized("a", "m", 4 * GB, GB, 2)
    text = 'fleet = "2x80GB"\n[models]\n"a/m" = {size = "4GB", devices = 2}\n"a/n" = "1GB"\n'
    sizes = parse_fleet_file(text, "f.toml").sizes
    assert sizes.of("a", "m") == Sized("a", "m", 4 * GB, devices=2)
    assert sizes.of("a", "n") == Sized("a", "n", GB)


@pytest.mark.parametrize("devices", ["0", "17", "1.5", "-1", "two"])
def test_a_number_of_devices_that_can_not_be_is_named_by_line_and_field(devices: str) -> None:
    with pytest.raises(BadTrace, match=r"m\.csv: line 2: devices") as caught:
        parse_models(["model,size,devices", f"a/m,4GB,{devices}"], "m.csv")
    assert (caught.value.line, caught.value.column) == (2, "devices")


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ('{size = "4GB", devices = 0}', "models.a/m.devices"),
        ('{size = "4GB", devices = "2"}', "models.a/m.devices"),
        ('{size = "4GB", device = 2}', "models.a/m.device"),
        ("{devices = 2}", "models.a/m"),
    ],
)
def test_a_fleet_file_names_what_is_wrong_with_them(entry: str, field: str) -> None:
    with pytest.raises(BadValue) as caught:
        parse_fleet_file(f'fleet = "2x80GB"\n[models]\n"a/m" = {entry}\n', "f.toml")
    assert caught.value.field == f"f.toml: {field}"
