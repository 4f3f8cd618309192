"""``bunk doctor``: what it says of a server, a key, nodes and this box, and what it shows of a measurement.

The API's side runs against the fake control server, and once against the real one, so that the two can
not drift apart. ``bunk-agent`` is a stand-in, but for one test with the real one on tiny sizes.
"""

from __future__ import annotations

import asyncio
import json
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_control import OPERATOR_KEY, FakeControl, Fault, serving
from running_control import empty_report, model_files, model_report, running

from bunkhouse import About, Calibration, Client, EstimateErrors, Node
from bunkhouse._types import Device
from bunkhouse.cli import doctor as doctors
from bunkhouse.cli.doctor import check_clock, check_key, check_nodes, check_version
from bunkhouse.cli.main import bunk as bunk_command
from packer.wire import AccuracyReport, CalibrationReport, encode

DAY_MS = 24 * 3600 * 1000
NOW_MS = 1_800_000_000_000
CALIBRATION = Calibration(NOW_MS - DAY_MS, "raw", True, True, 3, {"memcpy": 5}, ())
BOX = Node("box", "up", "http://10.0.0.1:8100", 1, 3000, (), 0, 0, 0, 0, CALIBRATION, route_url="https://h:1")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The developer's own server, key and node are not this test's."""
    for name in ("BUNKHOUSE_URL", "BUNKHOUSE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def control() -> FakeControl:
    made = FakeControl()
    made.nodes["box"] = {
        "node": "box",
        "state": "up",
        "heard_ago_ms": 3000,
        "gateway_url": "http://10.0.0.1:8100",
        "route_url": "https://10.0.0.1:8101",
        "calibration": {
            "measured_ms": time.time_ns() // 1_000_000 - 2 * DAY_MS,
            "host_form": "wire",
            "kernels": True,
            "rates": {"disk_direct": 1_200_000_000},
        },
    }
    return made


@pytest.fixture
def url(control: FakeControl) -> Iterator[str]:
    with serving(control) as address:
        yield address


def key_file(folder: Path, key: str = OPERATOR_KEY) -> Path:
    path = folder / "a.key"
    path.write_text(key + "\n")
    path.chmod(0o600)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(bunk_command, ["doctor", *map(str, words)])


def checks(result: Result) -> dict[str, dict[str, str]]:
    """The last check of each name, from ``-o json``."""
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


# --- the server -----------------------------------------------------------------------------------


def test_a_healthy_cluster_is_all_ok(url: str, tmp_path: Path) -> None:
    result = run("--url", url, "--key-file", key_file(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"ok    control: {url} answers, version 0.1.0" in result.stdout
    assert "ok    clock: as the server's" in result.stdout
    assert "ok    key: an operator's, may do everything, valid until revoked" in result.stdout
    assert "ok    node box: up, heard 3s ago" in result.stdout
    assert "ok    node box: measured 2d ago, host form wire, compiled kernels" in result.stdout
    assert "this box" not in result.stdout, "it is no node"
    as_json = run("--url", url, "--key-file", key_file(tmp_path), "-o", "json")
    assert json.loads(as_json.stdout)["bench"] is None
    assert {check["state"] for check in json.loads(as_json.stdout)["checks"]} == {"ok"}


def test_no_server_a_deaf_one_and_a_wrong_key_are_failed_checks_with_a_way_out(
    url: str, control: FakeControl, tmp_path: Path
) -> None:
    nowhere = run("-o", "json")
    assert nowhere.exit_code == 1
    assert "--url" in checks(nowhere)["control"]["hint"]
    deaf = run("--url", "http://127.0.0.1:1", "-o", "json")
    assert (deaf.exit_code, checks(deaf)["control"]["state"]) == (1, "fail")
    assert "bunk up" in checks(deaf)["control"]["hint"]
    wrong = run("--url", url, "--key-file", key_file(tmp_path, "bk_x_y"), "-o", "json")
    assert (wrong.exit_code, checks(wrong)["control"]["state"], checks(wrong)["key"]["state"]) == (
        1,
        "ok",
        "fail",
    )
    control.faults.append(Fault("GET", "/api/v1/about", 404))
    old = run("--url", url, "--key-file", key_file(tmp_path), "-o", "json")
    assert "of this release" in checks(old)["control"]["hint"]


def test_a_tenants_key_is_told_apart_and_its_nodes_are_not_asked_for(
    url: str, control: FakeControl, tmp_path: Path
) -> None:
    control.about = {"version": "0.1.0", "key_id": "k", "tenant": "acme"}
    result = run("--url", url, "--key-file", key_file(tmp_path))
    assert (result.exit_code, "of tenant acme" in result.stdout) == (0, True)
    assert ("GET", "/api/v1/nodes") not in control.requests


def test_a_servers_text_cannot_drive_the_terminal(url: str, control: FakeControl, tmp_path: Path) -> None:
    control.nodes["box"]["state"] = "\x1b[2Jup"
    assert "\x1b" not in run("--url", url, "--key-file", key_file(tmp_path)).stdout


def test_versions_clocks_and_keys_are_judged() -> None:
    assert check_version("http://x", "0.1.7").state == "ok"
    assert check_version("http://x", "0.2.0").state == "warn"
    assert check_version("http://x", "").state == "warn"
    for skew_ms, state in ((0, "ok"), (4_000, "ok"), (6_000, "warn"), (61_000, "fail"), (-61_000, "fail")):
        check = check_clock(NOW_MS + skew_ms, NOW_MS / 1000 - 0.01, NOW_MS / 1000 + 0.01)
        assert check.state == state, skew_ms
        assert bool(check.hint) == (state != "ok")
    # A slow call says nothing about the clock.
    assert check_clock(NOW_MS, NOW_MS / 1000 - 90, NOW_MS / 1000).detail == "as the server's"
    about = About("0.1.0", NOW_MS, "k", None, None)
    assert check_key(about).state == "ok"
    assert check_key(replace(about, expires_ms=NOW_MS + 30 * DAY_MS)).state == "ok"
    soon = check_key(replace(about, tenant="acme", expires_ms=NOW_MS + 2 * DAY_MS))
    assert (soon.state, soon.detail) == ("warn", "of tenant acme, valid for another 2d")
    assert "bunk key create" in soon.hint


@pytest.mark.parametrize(
    ("node", "state", "says"),
    [
        (BOX, "ok", "measured 1d ago, host form raw"),
        (replace(BOX, state="silent"), "warn", "silent, heard 3s ago"),
        (replace(BOX, state="unheard", heard_ago_ms=None), "warn", "unheard"),
        (replace(BOX, state="draining"), "warn", "draining"),
        (replace(BOX, calibration=None), "warn", "never measured"),
        (replace(BOX, calibration=replace(CALIBRATION, measured_ms=1)), "warn", "measured 20833d ago"),
        (replace(BOX, calibration=replace(CALIBRATION, kernels=False)), "ok", "no compiled kernels"),
        (
            replace(BOX, devices=(Device(None, "cuda:GPU-1", "cuda", "H200", 1, 0, 0, False),)),
            "fail",
            "cuda:GPU-1 does not answer",
        ),
        (replace(BOX, state="cloned"), "fail", "two boxes use its identity"),
        (replace(BOX, clock_skew_ms=-600_000), "fail", "600 s behind control's"),
        (replace(BOX, clock_skew_ms=7_000), "warn", "7 s ahead of control's"),
        (replace(BOX, route_url=None), "warn", "can not call it over mutual TLS"),
        (
            replace(BOX, calibration=replace(CALIBRATION, accuracy=(EstimateErrors("disk", 50, 5, 40),))),
            "warn",
            "restores from disk are estimated 40% off (p95)",
        ),
        (
            replace(BOX, calibration=replace(CALIBRATION, accuracy=(EstimateErrors("disk", 3, 5, 40),))),
            "ok",
            "measured",
        ),
    ],
)
def test_nodes_are_judged(node: Node, state: str, says: str) -> None:
    found = list(check_nodes((replace(BOX, node="other"), node), NOW_MS))
    worst = {"ok": 0, "warn": 1, "fail": 2}
    assert max((check.state for check in found), key=worst.__getitem__) == state
    said = [check for check in found if says in check.detail]
    assert said
    assert said[-1].state == state
    assert all(check.hint for check in found if check.state != "ok")


def test_a_cluster_that_can_serve_nothing_has_failed() -> None:
    assert next(check_nodes((), NOW_MS)).state == "fail"
    assert next(check_nodes((replace(BOX, state="silent"),), NOW_MS)).name == "nodes"


# --- this box -------------------------------------------------------------------------------------


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``bunk-agent`` that prints what is in ``answer.json`` beside it, and what it was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "bunk-agent"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nhere = pathlib.Path(__file__).parent\n"
        "(here / 'words').write_text(' '.join(sys.argv[1:]))\n"
        "print((here / f'{sys.argv[1]}.json').read_text())\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (folder / "python").write_text("")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


BENCH: dict[str, Any] = {
    "rates": {"memcpy": 16_000_000_000, "link": 0},
    "host_form": "raw",
    "on_cuda": False,
    "kernels": False,
    "threads": 2,
    "cores": 2,
    "others_percent": 1,
    "took_ms": 2900,
    "kept": "handed over",
    "examples": [
        {
            "model_bytes": 2_000_000_000,
            "tier": "host",
            "source": "raw",
            "chosen": True,
            "restore_ms": 307,
            "limit": "cores",
        }
    ],
}


def test_a_node_box_is_looked_at_too(url: str, tmp_path: Path, agent: Path) -> None:
    """The default directory is that of ``bunk up``."""
    (tmp_path / "data" / "bunkhouse" / "agent").mkdir(parents=True)
    line = {"name": "swap", "state": "fail", "detail": "on /dev/sda2", "hint": "swapoff -a"}
    (agent / "check.json").write_text(json.dumps({"checks": [line]}))
    result = run("--url", url, "--key-file", key_file(tmp_path))
    assert result.exit_code == 1, "a failed check of the box counts"
    assert "fail  this box: swap: on /dev/sda2\n      swapoff -a\n" in result.stdout
    assert (agent / "words").read_text().startswith(f"check --data-dir {tmp_path}/data/bunkhouse/agent")


def test_an_agent_of_another_release_and_a_wrong_directory_are_said(
    url: str, tmp_path: Path, agent: Path
) -> None:
    where = ("--url", url, "--key-file", key_file(tmp_path), "-o", "json")
    (agent / "check.json").write_text(json.dumps({"checks": [{}]}))
    assert checks(run(*where, "--data-dir", tmp_path))["this box"]["state"] == "fail"
    (agent / "check.json").write_text("[]")
    assert checks(run(*where, "--data-dir", tmp_path))["this box"]["state"] == "warn"
    gone = run(*where, "--data-dir", tmp_path / "gone")
    assert "--data-dir" in checks(gone)["this box"]["hint"]
    assert gone.exit_code == 1


def test_bench_shows_rates_the_form_and_predictions(url: str, tmp_path: Path, agent: Path) -> None:
    (agent / "check.json").write_text(json.dumps({"checks": []}))
    (agent / "calibrate.json").write_text(json.dumps(BENCH))
    where = ("--bench", "--data-dir", tmp_path, "--url", url, "--key-file", key_file(tmp_path))
    result = run(*where)
    assert result.exit_code == 0, result.output
    assert "memcpy  16.00" in result.stdout
    assert "link" not in result.stdout, "what was not measured is not shown"
    assert "host form for cpu devices: raw" in result.stdout
    assert "2 GB  host, raw  yes            307  cores" in result.stdout
    as_json = run(*where, "-o", "json")
    assert json.loads(as_json.stdout)["bench"] == BENCH


def test_bench_without_an_agent_or_with_one_that_fails_says_why(
    url: str, tmp_path: Path, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--bench", "--data-dir", tmp_path, "--url", url, "--key-file", key_file(tmp_path))
    failing = run(*where)  # there is no calibrate.json: it ends with a traceback
    assert failing.exit_code == 1
    assert "FileNotFoundError" in failing.stderr
    (agent / "bunk-agent").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = run(*where, "-o", "json")
    assert absent.exit_code == 1
    assert "install the server" in json.loads(absent.stderr)["error"]["message"]


def test_boxes_are_linux_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctors.sys, "platform", "darwin")
    result = run("--bench", "--data-dir", tmp_path)
    assert (result.exit_code, "Linux" in result.stderr) == (1, True)


# --- the real apps --------------------------------------------------------------------------------


async def test_the_real_control_answers_what_the_doctor_asks(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as real:
        tenant_key = await real.tenant("acme")
        node = await real.join("box")
        report = CalibrationReport(
            measured_ms=time.time_ns() // 1_000_000,
            fingerprint="0" * 16,
            host_form="raw",
            kernels=True,
            huge_pages=True,
            others_percent=3,
            rates={"disk_direct": 1_200_000_000},
            accuracy=(AccuracyReport("disk", 40, 4, 9),),
        )
        ref = (await real.push("acme", "m", model_files()))["ref"]
        absent = model_report(ref, restore_ms_estimate=47)
        beat = empty_report("http://127.0.0.1:9", (absent,), calibration=encode(report).decode())
        await node.beat(tmp_path, report=beat)

        def ask() -> tuple[Result, Result, tuple[Node, ...], int]:
            operator = key_file(tmp_path, real.operator_key)
            all_of_it = run("--url", real.url, "--key-file", operator)
            own = run("--url", real.url, "--key-file", key_file(tmp_path, tenant_key))
            with Client(real.url, real.operator_key) as client:
                return all_of_it, own, client.nodes(), client.ps().items[0].restore_ms_estimate

        all_of_it, own, nodes, estimate_ms = await asyncio.to_thread(ask)
        assert all_of_it.exit_code == own.exit_code == 0, all_of_it.output + own.output
        assert "ok    key: an operator's" in all_of_it.stdout
        assert "measured 0s ago, host form raw, compiled kernels" in all_of_it.stdout
        assert "ok    key: of tenant acme" in own.stdout
        assert nodes[0].calibration is not None
        assert nodes[0].calibration.rates == {"disk_direct": 1_200_000_000}
        assert nodes[0].calibration.accuracy == (EstimateErrors("disk", 40, 4, 9),)
        assert estimate_ms == 47


@pytest.mark.parametrize("calibration", ["nonsense", "{}", "[" * 100, '{"rates":' * 3000])
async def test_a_node_that_reports_nonsense_does_not_break_the_list(tmp_path: Path, calibration: str) -> None:
    async with running(tmp_path / "control") as real:
        node = await real.join("box")
        await node.beat(tmp_path, report=empty_report("http://127.0.0.1:9", calibration=calibration))
        listed = (await real.call("GET", "/api/v1/nodes")).json()["items"]
        assert [(each["node"], each["calibration"]) for each in listed] == [("box", None)]


@pytest.mark.processes
def test_the_real_agent_checks_and_its_checks_are_shown(url: str, tmp_path: Path) -> None:
    result = run("--url", url, "--key-file", key_file(tmp_path), "--data-dir", tmp_path, "-o", "json")
    found = checks(result)
    assert "this box: disk space" in found
    assert found["this box: calibration"]["state"] == "warn"
    assert result.exit_code in (0, 1), result.output
