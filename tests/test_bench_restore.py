"""The restore bench's own logic: fresh children, the comparison of bytes, settings, goals, reports, options.

Covers: what a figure can be trusted for (a wrong byte, a dead child or a missing tensor is no figure), and
the sections on a model of some hundred kilobytes. Does not cover: installing peers, or any speed.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import bench_restore
import bench_suite
import pytest
import restore_data
import restore_flips
import restore_node
import restore_peers
import restore_sections
import restore_setup
import restore_swaps
from bench_suite import Judgement, Section, Table
from fresh_child import FreshChildren, LoadFailed, Reference, WrongBytes
from restore_peers import Peer
from restore_setup import Setup

from packer.estimate import FIRST_RATES
from packer.types import HostForm, ModelRef, Task

SCRIPTS = Path(bench_restore.__file__).parent
TINY = restore_data.Shape("llama-tiny", 64, 128, 2, 1, 512)
REF = ModelRef("bench", "llama", "0" * 16)

JOBS = """
import os, sys, time
sys.path.insert(0, {scripts!r})
from fresh_child import Reference, serve

def work(settings, clock):
    with clock:
        kept = bytearray(settings["nbytes"])
        for at in range(0, len(kept), 4096):
            kept[at] = 1
    return {{"pid": os.getpid(), "word": os.environ.get("BENCH_WORD", "")}}

def fail(settings, clock):
    raise ValueError("no such weights")

def die(settings, clock):
    os._exit(3)

print("what libraries print is no answer")
serve({{"work": work, "fail": fail, "die": die}})
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[FreshChildren]:
    script = tmp_path / "jobs.py"
    script.write_text(JOBS.format(scripts=str(SCRIPTS)))
    with FreshChildren(Path(sys.executable), script, [], {"BENCH_WORD": "outer"}) as children:
        yield children


def test_each_job_has_a_process_and_environment_of_its_own(children: FreshChildren) -> None:
    first = children.run("work", {"nbytes": 4096})
    second = children.run("work", {"nbytes": 4096}, {"BENCH_WORD": "inner"})
    assert first.facts["pid"] != second.facts["pid"]
    assert (first.facts["word"], second.facts["word"]) == ("outer", "inner")
    assert first.taken_ms > 0
    assert first.memory is None


def test_memory_is_that_of_the_measured_part_seen_from_outside(children: FreshChildren) -> None:
    nbytes = 64 * 1024 * 1024
    memory = children.run("work", {"nbytes": nbytes}, watch=True).memory
    assert memory is not None
    assert nbytes <= memory.anonymous_bytes < nbytes + 8 * 1024 * 1024


def test_failed_and_dead_children_are_no_figures_and_the_next_one_works(children: FreshChildren) -> None:
    with pytest.raises(LoadFailed, match="no such weights"):
        children.run("fail", {})
    with pytest.raises(LoadFailed, match="status 3"):
        children.run("die", {})
    assert children.run("work", {"nbytes": 1}, touch_bytes=1 << 20).taken_ms > 0


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('torch is not here')")
    with pytest.raises(LoadFailed, match="torch is not here"):
        FreshChildren(Path(sys.executable), script, [], {})


# --- are they the right bytes? ---------------------------------------------------------------------


@pytest.fixture
def reference() -> Iterator[tuple[Reference, bytes]]:
    """Two tensors, and their bytes."""
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "first": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]},
            "second": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]},
        }
    ).encode()
    body = bytes(range(24))
    fd = os.memfd_create("reference")
    os.write(fd, struct.pack("<Q", len(header)) + header + body)
    yield Reference(fd), body
    os.close(fd)


def spans(first: bytes, second: bytes, kept: list[object]) -> list[tuple[str, int, int]]:
    """(name, address, bytes) of two tensors with these contents."""
    import ctypes

    buffers = [ctypes.create_string_buffer(data, len(data)) for data in (first, second)]
    kept.extend(buffers)
    names = ("first", "second")
    return [
        (name, ctypes.addressof(buffer), len(buffer)) for name, buffer in zip(names, buffers, strict=True)
    ]


def test_comparison_finds_one_wrong_byte(reference: tuple[Reference, bytes]) -> None:
    checker, body = reference
    kept: list[object] = []
    assert checker.check(spans(body[:16], body[16:], kept)) == 24
    with pytest.raises(WrongBytes, match="second"):
        checker.check(spans(body[:16], body[16:23] + b"\0", kept))
    with pytest.raises(WrongBytes, match="first"):
        checker.check(spans(body[:15], body[16:], kept))


def test_comparison_misses_no_tensor(reference: tuple[Reference, bytes]) -> None:
    checker, body = reference
    kept: list[object] = []
    first, second = spans(body[:16], body[16:], kept)
    with pytest.raises(WrongBytes, match="1 tensors are missing"):
        checker.check([first])
    assert checker.check([first], whole=False) == 16
    with pytest.raises(WrongBytes, match="names"):
        checker.check([first, ("third", *second[1:])])
    with pytest.raises(WrongBytes, match="names"):
        checker.check([first, first])


# --- settings of the peers -------------------------------------------------------------------------


def test_search_keeps_the_fastest_setting_of_each_loader_and_names_the_others() -> None:
    candidates = {
        "quick": [Peer("quick", words="default"), Peer("quick", words="tuned")],
        "broken": [Peer("broken")],
        "absent": [Peer("absent")],
    }
    taken = {"quick (default)": [9.0, 8.0], "quick (tuned)": [7.0, 20.0]}

    def run(peer: Peer) -> float:
        if peer.loader == "broken":
            raise LoadFailed("first line\nit needs a GPU")
        return taken[peer.name].pop(0)

    found = restore_peers.search(candidates, ("quick", "broken"), run, runs=2)
    assert [peer.name for peer in found.best] == ["quick (tuned)"]
    assert found.tried == {"quick (default)": 8.0, "quick (tuned)": 7.0}
    assert found.failed == {"broken": "it needs a GPU"}


@pytest.mark.parametrize("settings", [restore_peers.WARM, restore_peers.COLD])
def test_every_setting_has_a_name_of_its_own(settings: dict[str, tuple[Peer, ...]]) -> None:
    names = [peer.name for peers in settings.values() for peer in peers]
    assert len(set(names)) == len(names)
    assert set(settings) == set(restore_setup.STREAMERS)
    assert all(peer.loader == loader for loader, peers in settings.items() for peer in peers)


# --- goals and reports -----------------------------------------------------------------------------


def test_goals_are_reached_from_either_side_and_unjudged_ones_never() -> None:
    assert Judgement("rate", 3.0, 3).reached
    assert not Judgement("rate", 2.99, 3).reached
    assert Judgement("memory", 0.0, 0, at_least=False).reached
    assert not Judgement("memory", 1.0, 0, at_least=False).reached
    assert not Judgement("rate", None, 3, why="no peers").reached
    assert "could not be judged (no peers)" in Judgement("rate", None, 3, why="no peers").text


def make_report() -> bench_suite.SuiteReport:
    table = Table("Warm", ("case", "median"), (("ours", "10 ms"), ("theirs", "40 ms")), ("a note",))
    reached = Judgement("ours to theirs", 4.0, 3, unit="x")
    missed = Judgement("ours to physics", 0.5, 0.9, why="open")
    warm = Section("warm", (table,), (reached, missed), runs={"ours": [10.0, 11.0]})
    return bench_suite.report_of("restore", {"model": "tiny"}, [warm, Section("gpu", skipped=("no GPU",))])


def test_report_says_the_same_to_people_documentation_and_programs(tmp_path: Path) -> None:
    report = make_report()
    out = io.StringIO()
    bench_suite.print_suite(report, out)
    assert "reached  ours to theirs: at least 3x, this run: 4x" in out.getvalue()
    assert "MISSED   ours to physics: at least 0.9, this run: 0.5 (open)" in out.getvalue()
    assert "skipped  gpu: no GPU" in out.getvalue()
    at_once = io.StringIO()
    bench_suite.print_section(report.sections[0], at_once)
    assert all(line in out.getvalue() for line in at_once.getvalue().splitlines())
    assert "MISSED   ours to physics" in at_once.getvalue()
    bench_suite.write_markdown(report, tmp_path / "bench.md", "2026-11-21", "bench --quick")
    text = (tmp_path / "bench.md").read_text()
    assert "| ours | 10 ms |" in text
    assert "| **missed** | ours to physics | ≥ 0.9 | 0.5; open |" in text
    assert "Not run (gpu): no GPU" in text
    bench_suite.write_suite_json(report, tmp_path / "bench.json")
    loaded = json.loads((tmp_path / "bench.json").read_text())
    assert [verdict["reached"] for verdict in loaded["verdicts"]] == [True, False]
    assert loaded["sections"][0]["runs"] == {"ours": [10.0, 11.0]}


def test_documentation_keeps_what_is_around_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("# Ours\n<!-- begin of bench restore -->\nold\n<!-- end of bench restore -->\nMore.\n")
    bench_suite.write_markdown(make_report(), path, "2026-11-21", "bench")
    text = path.read_text()
    assert text.startswith("# Ours\n<!-- begin of bench restore -->\n\n2026-11-21, ")
    assert text.endswith("<!-- end of bench restore -->\nMore.\n")
    assert "old" not in text
    bench_suite.write_markdown(make_report(), path, "2026-11-21", "bench")
    assert path.read_text() == text


def test_documentation_without_a_place_for_the_tables_gets_them_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("# Ours\n<!-- end of bench gateway -->\nMore.\n")
    bench_suite.write_markdown(make_report(), path, "2026-11-21", "bench")
    text = path.read_text()
    assert text.startswith(
        "# Ours\n<!-- end of bench gateway -->\nMore.\n<!-- begin of bench restore -->\n\n2026"
    )
    bench_suite.write_markdown(make_report(), path, "2026-11-21", "bench")
    assert path.read_text() == text


def test_check_names_what_was_missed() -> None:
    log = io.StringIO()
    assert bench_suite.name_missed(make_report(), log) == 1
    assert log.getvalue() == "missed goal: ours to physics: at least 0.9, this run: 0.5 (open)\n"
    assert bench_suite.name_missed(bench_suite.report_of("x", {}, []), log) == 0


def test_rows_fit_their_columns() -> None:
    with pytest.raises(ValueError, match="3 words for 2 columns"):
        Table("Warm", ("case", "median"), (("ours", "10 ms", "more"),))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--only", "warm,lukewarm"], "lukewarm"),
        (["--rounds", "0"], "--rounds 0: use 1 to"),
        (["--swaps", "0"], "--swaps 0: use 1 to"),
    ],
)
def test_bad_options_say_what_to_use(
    words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_restore.main([*words, "--cache-dir", str(tmp_path)]) == 2
    assert problem in capsys.readouterr().err


def test_command_is_told_without_where_files_lie() -> None:
    words = ["--quick", "--only", "warm", "--json", "/somewhere/x.json", "--no-touch"]
    options = bench_restore._parser().parse_args(words)
    assert bench_restore._command(options) == "scripts/bench_restore.py --quick --no-touch --only warm"


def test_full_run_is_refused_where_it_would_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_restore, "MEMORY_BYTES_MIN", 1 << 60)
    assert bench_restore.main(["--cache-dir", str(tmp_path)]) == 2
    assert "free some, or use --quick" in capsys.readouterr().err


# --- sections on a tiny model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """A prepared tiny model without peers."""
    cache = tmp_path_factory.mktemp("cache")
    directory = restore_data.model_directory(cache, TINY)
    reference = os.memfd_create("reference")
    os.write(reference, (directory / "model.safetensors").read_bytes())
    segments = {form: os.memfd_create(form.value, os.MFD_ALLOW_SEALING) for form in HostForm}
    fds = [reference, *segments.values()]
    with FreshChildren(Path(sys.executable), SCRIPTS / "restore_jobs.py", fds, {}) as ours:
        setup = Setup(
            name=TINY.name,
            spec=restore_data.describe(directory, REF, Task.GENERATION),
            reference=reference,
            directory=directory,
            cache=cache,
            key=secrets.token_hex(32),
            segments=segments,
            ours=ours,
            peers=None,
            present=(),
            missing={"safetensors": "this is a test"},
            rates=FIRST_RATES,
            form=HostForm.WIRE,
            rounds=1,
            swaps=12,
            quick=True,
            touch=False,
            log=lambda line: None,
        )
        setup.pack_it()
        yield setup
    for fd in fds:
        os.close(fd)


def test_model_is_the_same_every_time(setup: Setup, tmp_path: Path) -> None:
    again = restore_data.model_directory(tmp_path, TINY)
    assert (again / "model.safetensors").read_bytes() == setup.weights.read_bytes()
    assert restore_data.model_directory(setup.cache, TINY) == setup.directory


def test_files_are_dropped_and_warmed_in_part(setup: Setup) -> None:
    restore_data.warm(setup.weights)
    assert restore_data.cached_share(setup.weights) == pytest.approx(1, abs=0.05)
    restore_data.drop(setup.weights)
    assert restore_data.cached_share(setup.weights) <= restore_data.COLD_SHARE_MAX
    restore_data.warm(setup.weights, stride_bytes=16 * 4096)
    assert restore_data.cached_share(setup.weights) == pytest.approx(0.5, abs=0.1)


def test_warm_section_without_peers_leaves_their_goals_unjudged(setup: Setup) -> None:
    section = restore_sections.warm(setup)
    unjudged = [judgement for judgement in section.judgements if judgement.value is None]
    assert len(unjudged) == 4
    assert all("this is a test" in judgement.why for judgement in unjudged)
    assert {row[0] for row in section.tables[0].rows} >= {*restore_setup.FORM_NAMES.values(), "sealed pack"}


def test_cold_restore_that_finds_a_cache_is_no_figure(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    section = restore_sections.cold(setup)
    assert section.judgements[0].value is not None
    restore_data.warm(setup.pack)
    monkeypatch.setattr(restore_data, "drop", lambda path: None)
    with pytest.raises(RuntimeError, match="a cache that was empty"):
        restore_sections.cold(setup)


def test_restore_of_other_bytes_is_no_figure(setup: Setup) -> None:
    # The server knows no other descriptors, so the reference holds the other bytes meanwhile.
    size = setup.weights.stat().st_size
    last = os.pread(setup.reference, 1, size - 1)
    os.pwrite(setup.reference, bytes([last[0] ^ 1]), size - 1)
    try:
        with pytest.raises(LoadFailed, match="WrongBytes"):
            setup.restore_pack()
    finally:
        os.pwrite(setup.reference, last, size - 1)


def test_parts_section_moves_only_what_is_missing(setup: Setup) -> None:
    section = restore_sections.parts(setup)
    assert {judgement.goal: judgement.value for judgement in section.judgements}[
        "a partial restore reads only the missing chunks, times their bytes"
    ] == 1
    assert all(judgement.reached for judgement in section.judgements)


@pytest.mark.parametrize("section", [restore_sections.paths, restore_sections.ingest])
def test_section_runs(setup: Setup, section: object) -> None:
    assert callable(section)
    found = section(setup)
    assert found.tables
    assert all(judgement.value is not None for judgement in found.judgements)


def test_flips_are_found_and_mended(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_data, "SMALL", TINY)
    monkeypatch.setattr(restore_flips, "CHUNK_FLIPS_QUICK", 50)
    monkeypatch.setattr(restore_flips, "MENDED", 3)
    section = restore_flips.flips(setup)
    assert [judgement.value for judgement in section.judgements] == [0, 0]


@pytest.mark.processes
def test_swaps_leave_nothing_and_damage_is_survived(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_data, "SMALL", TINY)
    monkeypatch.setattr(restore_swaps, "FAILURE_EVERY", 3)
    section = restore_swaps.leaks(setup)
    left = section.judgements[0]
    assert left.value == 0, left.text
    assert "12 swaps, 4 injected failures" in left.goal


@pytest.mark.processes
def test_swaps_under_tenants_are_timed_and_predicted(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_swaps, "TENANTS", 2)
    monkeypatch.setattr(restore_swaps, "SWAPS_TIMED_QUICK", 4)
    monkeypatch.setattr(restore_swaps, "DISK_SWAPS_QUICK", 2)
    try:
        section = restore_swaps.swap(setup)
    finally:
        # It gave all memory back, for the models of its tenants; its segments are sealed and stay empty.
        os.pwrite(setup.reference, setup.weights.read_bytes(), 0)
    assert len(section.runs["host"]) == 4
    assert len(section.runs["disk"]) == 2
    assert all(judgement.value is not None for judgement in section.judgements)


def test_percentiles_are_values_that_happened() -> None:
    assert restore_swaps.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert restore_swaps.percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert restore_swaps.percentile([7.0], 0.99) == 7.0


def test_step_times_belong_to_their_orders() -> None:
    times = restore_node.StepTimes()
    from packer import residency
    from packer.events import TierBudgetSeen
    from packer.types import Tier

    with times.watching():
        assert residency.step(residency.Node(), TierBudgetSeen(Tier.HOST, 1), 0) == []
    assert (times.decide_ms, times.evict_ms, times.restore_ms) == ([], [], {})
