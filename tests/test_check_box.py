"""What ``bunk-agent check`` says about a box, and how far estimates were off as a node exports it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from agent import check_box
from agent.accuracy import BUCKETS, ERRORS_MAX, Accuracy
from agent.calibration import FRESH_MS, fingerprint
from agent.check_box import (
    check_calibration,
    check_certificate,
    check_descriptors,
    check_disk,
    check_huge_pages,
    check_kernels,
    check_memlock,
    check_swap,
    run_checks,
    stored_rates,
)
from agent.counters import Counters
from agent.journal import open_journal
from agent.metrics import render
from packer import residency, room
from packer.estimate import FIRST_RATES, dump_rates
from packer.events import Planned, Restore, Restored, RestoreFailed, Ticked, WorkerDied
from packer.types import GIB, MIB, HostForm, ModelRef, ModelSpec, Task, TenantSpec, Tier
from packer.wire import Report

ROOT = Path(__file__).resolve().parent.parent
NOW_MS = 1_800_000_000_000
RATES = replace(FIRST_RATES, fingerprint="here", measured_ms=NOW_MS)


def test_the_disk_is_judged_against_the_floor(tmp_path: Path) -> None:
    assert check_disk(tmp_path, 100 * GIB).state == "ok"
    assert check_disk(tmp_path, GIB).state == "warn"
    full = check_disk(tmp_path, 200 * MIB)
    assert full.state == "fail"
    assert "no packs are written" in full.detail
    assert "--data-dir" in full.hint
    assert check_disk(tmp_path).name == "disk space"


def test_a_node_without_a_certificate_is_told_how_to_join(tmp_path: Path) -> None:
    check = check_certificate(tmp_path, 0.0)
    assert (check.state, list(tmp_path.iterdir())) == ("warn", [])
    assert "bunk node token create" in check.hint
    (tmp_path / "identity").mkdir()
    assert check_certificate(tmp_path, 0.0).state == "warn"
    (tmp_path / "identity" / "identity.json").write_text("damaged")
    assert check_certificate(tmp_path, 0.0).state == "fail"


@pytest.mark.parametrize(
    ("left_s", "state"), [(86_400.0, "ok"), (3600.0, "warn"), (-1.0, "fail"), (0.0, "fail")]
)
def test_a_certificate_is_judged_by_what_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float, state: str
) -> None:
    class Known:
        answer = object()

        def __init__(self, directory: Path) -> None:
            assert directory == tmp_path / "identity"

        def expires_s(self) -> float:
            return 1000.0 + left_s

    (tmp_path / "identity").mkdir()
    monkeypatch.setattr(check_box, "Identity", Known)
    assert check_certificate(tmp_path, 1000.0).state == state


def test_kernel_settings() -> None:
    assert check_huge_pages("always [madvise] never\n").state == "ok"
    assert check_huge_pages("[always] madvise never\n").detail.endswith("always")
    assert "echo madvise" in check_huge_pages("always madvise [never]\n").hint
    assert check_huge_pages(None).state == "warn"
    assert check_swap("Filename Type Size\n").state == "ok"
    swap = check_swap("Filename Type Size\n/dev/sda2 partition 100\n/swap file 5\n")
    assert (swap.state, swap.detail) == ("warn", "on /dev/sda2, /swap")
    assert check_memlock(resource.RLIM_INFINITY, gpu=True).state == "ok"
    assert check_memlock(8 * MIB, gpu=False).state == "ok"
    assert "LimitMEMLOCK" in check_memlock(8 * MIB, gpu=True).hint
    assert check_descriptors(resource.RLIM_INFINITY).state == "ok"
    assert check_descriptors(65_536).state == "ok"
    assert check_descriptors(1024).state == "warn"


def test_optional_kernels() -> None:
    assert check_kernels("", installed=True).state == "ok"
    assert "'fast'" in check_kernels("", installed=False).hint
    assert "BUNKHOUSE_KERNELS" in check_kernels("off", installed=True).detail


def test_a_calibration_is_judged_by_age_box_and_noise() -> None:
    assert check_calibration(RATES, NOW_MS, "here", on_cuda=False).state == "ok"
    assert "host form raw" in check_calibration(RATES, NOW_MS, "here", on_cuda=False).detail
    assert "host form wire" in check_calibration(RATES, NOW_MS, "here", on_cuda=True).detail
    for rates, now_ms, here, says in [
        (None, NOW_MS, "here", "never measured"),
        (RATES, NOW_MS + FRESH_MS, "here", "30 days old"),
        (RATES, NOW_MS - 1, "here", "0 days old"),
        (RATES, NOW_MS, "there", "has changed"),
        (replace(RATES, others_percent=50), NOW_MS, "here", "50% of the cores"),
    ]:
        check = check_calibration(rates, now_ms, here, on_cuda=False)
        assert check.state == "warn"
        assert says in check.detail
        assert "bunk doctor --bench" in check.hint


def test_the_stored_calibration_is_read_beside_a_running_agent(tmp_path: Path) -> None:
    assert stored_rates(tmp_path) is None
    with closing(open_journal(tmp_path)) as journal:
        assert stored_rates(tmp_path) is None
        journal.save_calibration(dump_rates(RATES))
        assert stored_rates(tmp_path) == RATES


def test_a_check_that_breaks_is_a_failed_check(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_text("not a database, and long enough to be taken for one" * 100)
    by_name = {check.name: check for check in run_checks(tmp_path)}
    assert by_name["calibration"].state == "fail"
    assert "can not be checked" in by_name["calibration"].detail


@pytest.mark.processes
def test_the_command_prints_every_check_and_changes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent", "check", "--data-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    checks = json.loads(done.stdout)["checks"]
    assert [check["name"] for check in checks[:3]] == ["disk space", "certificate", "calibration"]
    assert all(check["state"] == "ok" or check["hint"] for check in checks)
    assert done.returncode == any(check["state"] == "fail" for check in checks)
    assert list(tmp_path.iterdir()) == []
    people = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "certificate: this node has not joined" in people.stdout


def test_a_directory_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_box.main(["--data-dir", "/nowhere/at/all"]) == 2
    assert "--data-dir" in capsys.readouterr().err


# --- how far estimates were off -------------------------------------------------------------------

REF = ModelRef("acme", "m", "0" * 16)
OTHER = ModelRef("globex", "m", "0" * 16)


def test_errors_are_shares_of_the_real_time() -> None:
    accuracy = Accuracy()
    for expected_ms, real_ms in ((110, 100), (100, 200), (101, 100), (300, 100)):
        accuracy.ordered(REF, Tier.DISK, expected_ms)
        accuracy.restored(REF, Tier.DISK, real_ms)
    seen = accuracy.tiers[Tier.DISK]
    assert list(seen.last) == [0.1, 0.5, 0.0, 2.0]
    assert seen.count == sum(seen.buckets) == 4
    assert seen.buckets[BUCKETS.index(0.1)] == 1
    assert (seen.quantile(0.0), seen.quantile(0.95)) == (0.0, 2.0)


def test_only_a_restore_that_was_expected_and_happened_counts() -> None:
    accuracy, core = Accuracy(), residency.Node()
    accuracy.observe(core, Restored(REF, "cpu:0", Tier.DISK, 100), [])
    accuracy.ordered(REF, Tier.DISK, 100)
    accuracy.observe(core, RestoreFailed(REF, "cpu:0", Tier.DISK, "bad"), [])
    accuracy.observe(core, Restored(REF, "cpu:0", Tier.DISK, 100), [])
    accuracy.ordered(REF, Tier.HOST, 100)
    accuracy.observe(core, Restored(REF, "cpu:0", Tier.DISK, 100), [])
    for ref in (REF, OTHER):
        accuracy.ordered(ref, Tier.DISK, 100)
    accuracy.observe(core, WorkerDied("acme", "cpu:0"), [])
    accuracy.observe(core, Restored(REF, "cpu:0", Tier.DISK, 100), [])
    assert accuracy.tiers == {}
    accuracy.observe(core, Restored(OTHER, "cpu:0", Tier.DISK, 100), [])
    assert accuracy.tiers[Tier.DISK].count == 1


def test_an_order_is_expected_to_take_what_the_core_says_of_the_chunks_it_names() -> None:
    accuracy, core = Accuracy(), residency.Node()
    spec = ModelSpec(
        REF, "file:///m", (), "transformers", Task.EMBEDDING, 1_200_000_000, (400_000_000,) * 3, 0, 0
    )
    residency.step(core, Planned((TenantSpec("acme"),), (spec,)), 0)
    model = core.models[REF]
    for first_chunk, host_bytes in ((0, 0), (2, 0), (2, 9)):
        accuracy.observe(core, Ticked(), [Restore(REF, "cpu:0", Tier.DISK, first_chunk, host_bytes)])
        moved_bytes = (3 if host_bytes else 3 - first_chunk) * 400_000_000
        expected_ms = room.restore_ms_from(core, model, Tier.DISK, moved_bytes)
        assert expected_ms > 100
        accuracy.observe(core, Restored(REF, "cpu:0", Tier.DISK, expected_ms), [])
    assert list(accuracy.tiers[Tier.DISK].last) == [0.0] * 3


def test_what_is_remembered_of_errors_is_bounded() -> None:
    accuracy = Accuracy()
    for number in range(ERRORS_MAX + 10):
        accuracy.ordered(REF, Tier.HOST, 100 + number)
        accuracy.restored(REF, Tier.HOST, 100)
    assert accuracy.tiers[Tier.HOST].count == ERRORS_MAX + 10
    assert len(accuracy.tiers[Tier.HOST].last) == ERRORS_MAX
    accuracy.start_anew()
    assert (accuracy.tiers[Tier.HOST].count, accuracy.tiers[Tier.HOST].quantile(0.95)) == (ERRORS_MAX + 10, 0)
    accuracy.ordered(OTHER, Tier.HOST, 1)
    accuracy.forget(frozenset())
    accuracy.restored(OTHER, Tier.HOST, 100)
    assert accuracy.tiers[Tier.HOST].count == ERRORS_MAX + 10


def test_metrics_have_rates_the_form_and_the_errors() -> None:
    accuracy = Accuracy()
    accuracy.ordered(REF, Tier.HOST, 112)
    accuracy.restored(REF, Tier.HOST, 100)
    report = Report("", 0, False, (), 0, 0, 0, 0, (), ())
    text = render(report, Counters(), accuracy, RATES, HostForm.WIRE)
    assert 'bunkhouse_calibration_bytes_per_second{rate="disk_direct"} 5e+08' in text
    assert 'rate="device_copy"' not in text, "what is not there has no rate"
    assert 'bunkhouse_host_form{form="wire"} 1.0' in text
    assert 'bunkhouse_restore_estimate_error_ratio_bucket{from_tier="host",le="0.1"} 0.0' in text
    assert 'bunkhouse_restore_estimate_error_ratio_bucket{from_tier="host",le="0.15"} 1.0' in text
    assert 'bunkhouse_restore_estimate_error_ratio_bucket{from_tier="host",le="+Inf"} 1.0' in text
    unmeasured = render(report, Counters(), Accuracy(), None, HostForm.STORED)
    assert "bunkhouse_calibration" not in unmeasured


def test_fingerprints_are_short_and_stable(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) == fingerprint(tmp_path)
    assert len(fingerprint(tmp_path)) == 16
