"""Measuring a box and keeping what was found: the real child on tiny sizes, and when it is started.

No figure is compared with another: how fast this machine is, is not a test's business.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent import calibrate, calibration, codec_probes, probes
from agent.calibrate import Bounds, BusyShare
from agent.calibration import (
    HANDED_OVER,
    LINK_BYTES_MIN,
    OTHERS_PERCENT_MAX,
    QUIET_S,
    RETRY_S,
    TRIES_MAX,
    CalibrationFailed,
    Calibrator,
    LinkMeter,
    fingerprint,
    is_fresh,
)
from agent.codec_probes import sample_chunks
from agent.data_dir import hold_data_dir
from agent.journal import open_journal
from agent.probes import CanNotMeasure, Probe, measure_probes
from packer.estimate import FIRST_RATES, Rates, dump_rates, load_rates, named_rates
from packer.layout import CHUNK_BYTES
from packer.types import GIB, MIB, BadValue

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--file-bytes", "8MiB", "--span-bytes", "16MiB", "--passes", "1")


def run_module(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


# --- the child ------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_child_measures_every_rate_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run_module("agent.calibrate", "--data-dir", str(tmp_path), "--json", *TINY)
    assert done.returncode == 0, done.stderr
    rates = load_rates(done.stdout.strip())
    named = named_rates(rates)
    assert all(rate > 0 for name, rate in named.items() if name not in ("link", "device_copy"))
    assert rates.fingerprint == fingerprint(tmp_path / "packs")
    assert is_fresh(rates, tmp_path / "packs", rates.measured_ms)
    assert 1 <= rates.threads <= 2
    assert 0 <= rates.others_percent <= 100
    assert list((tmp_path / "packs").iterdir()) == []


def test_in_the_background_everybody_else_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it ends with its agent. Asked without measuring: on busy cores that would take for ever."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "nice", lambda more: asked.append((more,)))
    monkeypatch.setattr(calibrate, "_libc", SimpleNamespace(prctl=lambda *words: asked.append(words)))
    for words in ((), ("--background",)):
        assert calibrate.main(["--data-dir", str(tmp_path), "--passes", "0", *words]) == 1
    assert asked == [(1, signal.SIGKILL, 0, 0, 0), (calibrate.NICE_BACKGROUND,)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--passes", "0"), "--passes: must be 1 to"),
        (("--file-bytes", "1KiB"), "must be"),
        (("--span-bytes", "64GiB"), "must be"),
        (("--file-bytes", "much"), "is not a size"),
    ],
)
def test_what_measuring_may_take_is_bounded(
    tmp_path: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate.main(["--data-dir", str(tmp_path), *words]) == 1
    assert says in capsys.readouterr().err


def test_a_directory_that_can_not_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert calibrate.main(["--data-dir", str(tmp_path / "file")]) == 1
    assert "can not measure" in capsys.readouterr().err


def test_a_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "DISK_FREE_FLOOR_BYTES", 1 << 62)
    with pytest.raises(CanNotMeasure, match="free some, or give another --data-dir"):
        calibrate._room_bytes(tmp_path, Bounds())


def test_the_temporary_file_has_no_name_whatever_the_file_system_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError("not supported")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    real = os.open
    for without in (False, True):
        with monkeypatch.context() as patched:
            if without:
                patched.setattr(os, "open", refuse)
            with calibrate._unnamed_file(tmp_path) as descriptor:
                assert os.pwrite(descriptor, b"x", 0) == 1
                assert list(tmp_path.iterdir()) == []


def test_where_nothing_goes_past_the_cache_the_cache_is_what_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_open_direct", lambda descriptor: None)
    bounds = Bounds(file_bytes=8 * MIB, span_bytes=8 * MIB, passes=1)
    rates = calibrate.measure(tmp_path, bounds, gpu=False)
    assert rates.disk_direct == rates.disk_cached


def test_probes_take_turns_and_the_first_pass_does_not_count() -> None:
    calls: list[str] = []

    def probe(name: str) -> Probe:
        return Probe(name, 100, lambda _: calls.append(name), 1, lambda: calls.append(f"before {name}"))

    found = measure_probes([probe("a"), probe("b")], passes=2)
    assert calls == ["before a", "a", "before b", "b"] * 3
    assert set(found) == {"a", "b"}
    assert min(found.values()) >= 1


def test_an_error_in_any_thread_ends_the_measurement() -> None:
    def work(number: int) -> None:
        if number == 1:
            raise CanNotMeasure("cut short")

    with pytest.raises(CanNotMeasure, match="cut short"):
        measure_probes([Probe("x", 1, work, 2)], passes=1)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_samples_are_whole_chunks_that_compress_like_weights(dtype: str) -> None:
    from packer.codec import CodecId, encode

    for raw in sample_chunks(dtype):
        assert len(raw) == CHUNK_BYTES
        encoded = encode(dtype, memoryview(raw))
        assert encoded.codec_id != CodecId.RAW
        assert 0.6 < encoded.stored_bytes / len(raw) < 0.9


def test_a_codec_that_is_broken_here_is_found_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_probes.codec, "decode_into", lambda *_: None)
    with pytest.raises(CanNotMeasure, match="the codec is broken"):
        calibrate.measure(tmp_path, Bounds(8 * MIB, 8 * MIB, 1), gpu=False)


def test_a_file_that_is_cut_short_is_noticed(tmp_path: Path) -> None:
    with calibrate._unnamed_file(tmp_path) as descriptor:
        os.ftruncate(descriptor, 1000)
        with pytest.raises(CanNotMeasure, match="cut short"):
            calibrate._read_probe("x", descriptor, CHUNK_BYTES, 1).work(0)


def test_the_share_of_others_is_a_percentage() -> None:
    assert 0 <= BusyShare().others_percent() <= 100


# --- starting it ----------------------------------------------------------------------------------


def test_a_calibration_is_fresh_while_box_and_software_are_the_same(tmp_path: Path) -> None:
    now_ms = 10**12
    rates = replace(FIRST_RATES, fingerprint=fingerprint(tmp_path), measured_ms=now_ms)
    assert is_fresh(rates, tmp_path, now_ms)
    assert not is_fresh(None, tmp_path, now_ms)
    assert not is_fresh(rates, tmp_path, now_ms + calibration.FRESH_MS)
    assert not is_fresh(rates, tmp_path, now_ms - 1), "measured in the future: a clock was set back"
    assert not is_fresh(replace(rates, fingerprint="0"), tmp_path, now_ms)


def test_turning_the_kernels_off_makes_another_box_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(tmp_path)
    monkeypatch.setenv("BUNKHOUSE_KERNELS", "other")
    assert fingerprint(tmp_path) != before


@pytest.mark.processes
async def test_a_failed_child_says_why(tmp_path: Path) -> None:
    with pytest.raises(CalibrationFailed, match="--passes: must be"):
        await calibration.measure(tmp_path, background=False, gpu=False, extra=("--passes", "0"))


@pytest.mark.processes
async def test_a_cancelled_measurement_takes_its_child_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[asyncio.subprocess.Process] = []
    running = asyncio.Event()
    real = asyncio.create_subprocess_exec

    async def start(*words: str, **more: object) -> asyncio.subprocess.Process:
        process = await real(*words, **more)  # type: ignore[arg-type]
        started.append(process)
        running.set()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    task = asyncio.create_task(
        calibration.measure(tmp_path, background=True, gpu=False, extra=("--passes", "1000"))
    )
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert started[0].returncode == -9


@pytest.mark.parametrize("output", ["", "nonsense", "{}", dump_rates(FIRST_RATES) * 2])
async def test_what_a_child_prints_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(calibration, "child_command", lambda *_: [sys.executable, "-c", f"print({output!r})"])
    with pytest.raises(CalibrationFailed, match="calibration"):
        await calibration.measure(tmp_path, background=False, gpu=False)


# --- a running node's rates -----------------------------------------------------------------------


class Desk:
    """A calibrator with a clock, a measurement and a journal of its own."""

    def __init__(self, data_dir: Path, enabled: bool = True) -> None:
        self.now_s = 0.0
        self.adopted: list[Rates] = []
        self.measured = 0
        self.result: Callable[[], Awaitable[Rates]] = self.succeed
        self.others_percent = 0
        self.print = fingerprint(data_dir / "packs")
        self.link = LinkMeter(lambda: self.now_s)
        self.calibrator = Calibrator(
            data_dir,
            enabled,
            False,
            self.adopt,
            self.link,
            self.measure,
            lambda: self.now_s,
            lambda: 10**12,
        )

    def rates(self) -> Rates:
        return replace(
            FIRST_RATES,
            fingerprint=self.print,
            measured_ms=10**12,
            others_percent=self.others_percent,
            link=0,
        )

    async def adopt(self, rates: Rates) -> None:
        self.adopted.append(rates)

    async def succeed(self) -> Rates:
        return self.rates()

    async def measure(self, data_dir: Path, background: bool, gpu: bool) -> Rates:
        assert background
        assert not gpu
        self.measured += 1
        return await self.result()

    async def look_at(self, now_s: float) -> None:
        self.now_s = now_s
        await self.calibrator.look()


async def test_a_quiet_unmeasured_box_is_measured_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    await desk.look_at(QUIET_S - 1)
    assert desk.measured == 0
    await desk.look_at(QUIET_S)
    assert desk.measured == 1
    assert desk.adopted == [desk.rates()]
    await desk.look_at(QUIET_S + 10 * RETRY_S)
    assert desk.measured == 1


async def test_a_fresh_stored_calibration_is_enough(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.calibrator.take_stored(dump_rates(desk.rates()))
    await desk.look_at(10 * QUIET_S)
    assert (desk.measured, desk.calibrator.rates) == (0, desk.rates())


async def test_stored_rates_of_another_box_stand_in_until_this_one_is_measured(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    other = replace(desk.rates(), fingerprint="another", memcpy=5)
    desk.calibrator.take_stored(dump_rates(other))
    assert desk.calibrator.rates == other
    await desk.look_at(QUIET_S)
    assert desk.calibrator.rates == desk.rates()


@pytest.mark.parametrize("text", [None, "", "{}", "x"])
async def test_a_damaged_stored_calibration_is_as_none(tmp_path: Path, text: str | None) -> None:
    desk = Desk(tmp_path)
    desk.calibrator.take_stored(text)
    assert desk.calibrator.rates is None


async def test_an_operator_who_turned_it_off_is_obeyed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, enabled=False)
    await desk.look_at(100 * QUIET_S)
    assert desk.measured == 0


async def test_a_busy_node_is_not_measured(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.now_s = QUIET_S
    desk.calibrator.disturb()
    await desk.look_at(2 * QUIET_S)
    desk.calibrator.leave()
    await desk.look_at(2 * QUIET_S + 1)
    assert desk.measured == 0, "it was in use a second ago"
    await desk.look_at(3 * QUIET_S)
    assert desk.measured == 1


async def test_a_request_ends_a_measurement_which_is_made_up_for_later(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    begun = asyncio.Event()

    async def for_ever() -> Rates:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    desk.result = for_ever
    look = asyncio.create_task(desk.look_at(QUIET_S))
    await begun.wait()
    desk.calibrator.disturb()
    await look
    desk.calibrator.leave()
    assert desk.adopted == []
    desk.result = desk.succeed
    await desk.look_at(2 * QUIET_S)
    assert (desk.measured, len(desk.adopted)) == (2, 1)


async def test_stopping_the_node_stops_the_measurement(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def for_ever() -> Rates:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    desk.result = for_ever
    look = asyncio.create_task(desk.look_at(QUIET_S))
    await begun.wait()
    look.cancel()
    with pytest.raises(asyncio.CancelledError):
        await look
    assert ended.is_set()


async def test_a_noisy_measurement_is_repeated_and_the_quietest_is_kept(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    now_s = QUIET_S
    for others_percent in (80, 90, 40):
        desk.others_percent = others_percent
        await desk.look_at(now_s)
        await desk.look_at(now_s + RETRY_S / 2)
        now_s += RETRY_S
    assert desk.measured == 3
    assert [rates.others_percent for rates in desk.adopted] == [80, 40]
    desk.others_percent = OTHERS_PERCENT_MAX
    await desk.look_at(now_s)
    await desk.look_at(now_s + 10 * RETRY_S)
    assert desk.measured == 4


async def test_failing_for_ever_ends_after_some_tries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(tmp_path)

    async def fail() -> Rates:
        raise CalibrationFailed("no room")

    desk.result = fail
    for turn in range(3 * TRIES_MAX):
        await desk.look_at(QUIET_S + turn * RETRY_S)
    assert desk.measured == TRIES_MAX
    assert "no room" in caplog.text


async def test_what_the_command_left_is_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(tmp_path, enabled=False)
    path = tmp_path / HANDED_OVER
    path.write_text(dump_rates(desk.rates()))
    await desk.look_at(0)
    assert desk.adopted == [desk.rates()]
    assert not path.exists()
    path.write_text("nonsense")
    await desk.look_at(0)
    assert not path.exists(), "a bad one is not looked at for ever"
    assert "calibration" in caplog.text
    assert len(desk.adopted) == 1


async def test_the_line_is_timed_while_anything_is_fetched(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.calibrator.take_stored(dump_rates(desk.rates()))
    with desk.link.fetching() as came:
        desk.now_s = 1.0
        with desk.link.fetching() as came_too:
            came(LINK_BYTES_MIN)
            came_too(LINK_BYTES_MIN)
            desk.now_s = 3.0
        desk.now_s = 4.0
    assert desk.link.bytes_per_s == 2 * LINK_BYTES_MIN // 4
    await desk.look_at(4.0)
    assert desk.adopted[-1].link == desk.link.bytes_per_s
    await desk.look_at(5.0)
    assert len(desk.adopted) == 1, "an unchanged line is not written again"
    # A new measurement of the box keeps what is known of the line.
    (tmp_path / HANDED_OVER).write_text(dump_rates(desk.rates()))
    await desk.look_at(6.0)
    assert desk.adopted[-1].link == desk.link.bytes_per_s


def test_a_little_says_nothing_of_the_line() -> None:
    link = LinkMeter(lambda: 0.0)
    with link.fetching() as came:
        came(LINK_BYTES_MIN - 1)
    assert link.bytes_per_s == 0


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_command_stores_what_it_found_or_hands_it_over(tmp_path: Path) -> None:
    done = run_module("agent", "calibrate", "--data-dir", str(tmp_path), "--json", *TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kept"] == "stored"
    assert found["host_form"] in ("stored", "wire", "raw")
    tiers = {(row["model_bytes"], row["tier"], row["source"]) for row in found["examples"]}
    assert len(tiers) == 3 * 6
    assert all(row["restore_ms"] >= 20 for row in found["examples"])
    journal = open_journal(tmp_path)
    stored = journal.calibration()
    journal.close()
    assert stored is not None
    assert named_rates(load_rates(stored)) == found["rates"]
    with hold_data_dir(tmp_path):
        done = run_module("agent", "calibrate", "--data-dir", str(tmp_path), *TINY)
    assert done.returncode == 0, done.stderr
    assert "handed over" in done.stdout
    assert load_rates((tmp_path / HANDED_OVER).read_text()).fingerprint == found["fingerprint"]


@pytest.mark.processes
def test_the_command_that_can_not_measure_says_why_and_stores_nothing(tmp_path: Path) -> None:
    done = run_module("agent", "calibrate", "--data-dir", str(tmp_path), "--file-bytes", str(2 * GIB))
    assert done.returncode == 1
    assert "must be" in done.stderr
    assert not (tmp_path / HANDED_OVER).exists()


def test_bounds_name_the_limit() -> None:
    with pytest.raises(BadValue, match=str(GIB)):
        Bounds(span_bytes=2 * GIB)


def test_fresh_memory_is_judged_by_its_fastest_round_and_all_else_by_the_middle_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages that the machine has never used are slow once."""
    rounds = iter([9.0, 9.0, 4.0, 4.0, 1.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(probes, "_together", lambda work, threads: next(rounds))
    both = [Probe("usual", 8, lambda _: None), Probe("fresh", 8, lambda _: None, fresh=True)]
    assert measure_probes(both, passes=3) == {"usual": 4, "fresh": 8}
