"""The policies' bench runs, judges what it says, and its models of memory keep their own books.

Covers: scripts/bench_policies.py on a tiny trace, scripts/stack_pool.py, scripts/stress_traces.py. Does not
cover: any figure, or the pool that policies are compared in (``test_policies``).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import bench_policies
import pytest
from bench_policies import Found, Job, optimum_s, policies_section, stack_section
from pool_model import BYTES_PER_MS, FIXED_MS, replay
from request_traces import GB, Trace
from stack_pool import STEPS, Stack, Step, replay_stack
from stress_traces import MODELS, SHAPES, stress


def trace_of(order: str, gap_ms: int = 60_000, size_gb: int = 10) -> Trace:
    names = tuple(sorted(set(order)))
    return Trace(
        "made up",
        tuple(at * gap_ms for at in range(len(order))),
        tuple(names.index(name) for name in order),
        names,
        (size_gb * GB,) * len(names),
    )


PLAIN = Step("plain", "lru", fixed_ms=100.0)


def test_what_leaves_the_devices_is_found_in_ram() -> None:
    """One device for one model, RAM for one: a and b change places, c comes and goes from disk."""
    cold = replay_stack(trace_of("abab"), PLAIN, 10, 10)
    disk_ms, ram_ms = 100 + 10_000 / 7, 100 + 10_000 / 45
    assert cold.cold_s_mean == pytest.approx((2 * disk_ms + 2 * ram_ms) / 4 / 1000)
    assert cold.moved_bytes == 40 * GB


@pytest.mark.parametrize("step", [step for step in STEPS if step.ram], ids=lambda step: step.name)
def test_neither_memory_ever_holds_more_than_it_has(step: Step) -> None:
    trace = trace_of("abcdefgabcgfedcbaabacadaeafag" * 3)
    stack = Stack(step, trace, 30 * GB, 20 * GB)
    for model, at_ms in zip(trace.models, trace.at_ms, strict=True):
        stack.use(model, at_ms)
        assert sum(stack._on_device.values()) <= 30 * GB
        assert sum(stack._in_ram.values()) * step.ram_ratio <= 20 * GB + 1


def test_without_ram_everything_comes_from_disk() -> None:
    bare = replay_stack(trace_of("abab"), Step("bare", "lru", ram=False, fixed_ms=100.0), 10, 10)
    assert bare.cold_s_mean == pytest.approx((100 + 10_000 / 7) / 1000)


def test_compression_makes_room_in_ram_and_moves_less() -> None:
    half = Step("half", "lru", ram_ratio=0.5, disk_ratio=0.5, fixed_ms=0.0)
    cold = replay_stack(trace_of("abcabc"), half, 10, 10)
    assert cold.cold_s_mean == pytest.approx((3 * 5_000 / 7 + 3 * 5_000 / 45) / 6 / 1000)


def test_partial_residency_moves_only_what_is_missing() -> None:
    step = Step("part", "keep", ram=False, partial=True, fixed_ms=0.0)
    cold = replay_stack(trace_of("ababab"), step, 15, 0)
    assert cold.moved_bytes == 20 * GB + 4 * 5 * GB


def test_a_timer_throws_out_what_was_idle_for_five_minutes() -> None:
    step = Step("timer", "ttl", ram=False, fixed_ms=0.0)
    assert replay_stack(trace_of("aaaa", gap_ms=200_000), step, 100, 0).cold_s_mean < 0.5
    assert replay_stack(trace_of("aaaa", gap_ms=400_000), step, 100, 0).cold_s_mean > 1.4


def test_every_step_of_the_stack_is_no_worse_than_the_one_before_on_calm_traffic() -> None:
    trace = trace_of("abcdabcaabdcabcd" * 20)
    means = [replay_stack(trace, step, 20, 10).cold_s_mean for step in STEPS[1:8]]
    assert all(later <= before * 1.02 for before, later in itertools.pairwise(means))


def test_the_optimum_is_below_every_policy_without_fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool_model.FIXED_MS", 0.0)
    monkeypatch.setattr(bench_policies, "FIXED_MS", 0.0)
    trace = stress("bursts", 1)
    least = optimum_s(trace, 300 * GB)
    for name in ("keep", "lru", "sieve", "belady"):
        assert replay(trace, name, 300 * GB).cold_s_mean >= least * 0.999


def test_the_optimum_counts_bytes_and_restores() -> None:
    assert optimum_s(trace_of("aab"), 20 * GB) == pytest.approx(
        2 * (10 * GB / BYTES_PER_MS + FIXED_MS) / 3 / 1000
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_in_order_and_the_same_from_its_seed(shape: str) -> None:
    trace = stress(shape, 1)
    assert trace == stress(shape, 1)
    assert list(trace.at_ms) == sorted(trace.at_ms)
    assert trace.at_ms[0] >= 0
    assert len(set(trace.models)) > MODELS // 2
    assert trace.models != stress(shape, 2).models or shape == "loop"


def found_of(keep: float, peer: float, ttl: float) -> list[Found]:
    values = dict.fromkeys(bench_policies.PEERS, peer) | {
        "keep": keep,
        "ttl": ttl,
        "belady": 1.0,
        "optimum": 1.0,
    }
    return [
        Found(Job("policy", name, f"{thinning:g}", gb, 1, 14.0, ""), cold_s, 0.0)
        for name, cold_s in values.items()
        for thinning in bench_policies.THINNINGS
        for gb in bench_policies.MEMORY_GB
    ]


@pytest.mark.parametrize(
    ("keep", "ttl", "reached"),
    [(1.8, 6.0, (True, True)), (1.9, 6.0, (False, True)), (1.8, 4.0, (True, False))],
)
def test_goals_are_judged_against_the_best_peer_and_the_timer(
    keep: float, ttl: float, reached: tuple[bool, bool]
) -> None:
    *columns, timer = policies_section(found_of(keep, 2.0, ttl)).judgements
    assert len(columns) == 6
    assert all(column.reached is reached[0] for column in columns)
    assert timer.reached is reached[1]


def test_the_full_stack_and_the_cores_are_judged_by_themselves() -> None:
    names = [step.name for step in STEPS] + [bench_policies.CORES]
    found = [
        Found(
            Job("stack", name, f"{thinning:g}", 1, 1, 14.0, ""),
            0.01 if name == bench_policies.OURS.name else 1.0,
            2.0,
        )
        for name in names
        for thinning in bench_policies.THINNINGS
    ]
    section = stack_section(found, quick=False)
    assert [each.reached for each in section.judgements] == [True, False, True, False]
    assert len(section.tables[0].rows) == len(names)
    assert len(stack_section(found, quick=True).judgements) == 2


def test_a_run_needs_the_traces_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_policies.main(["--quick", "--traces", str(tmp_path)]) == 2
    assert "servegen_client_rates" in capsys.readouterr().err


def test_a_whole_run_on_a_small_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, so that what is replaced here is replaced there."""
    small = trace_of("abcdabcaabdcabcd" * 4, size_gb=200)
    monkeypatch.setattr(bench_policies, "_trace", lambda source, seed, days, folder: small)
    monkeypatch.setattr(bench_policies, "MEMORY_GB", (400, 600, 900))
    monkeypatch.setattr(
        bench_policies,
        "STACKS",
        ((1e-5, 400, 512, "2x200GB,ram=512GB", 0.2), (1e-4, 600, 512, "3x200GB,ram=512GB", 0.02)),
    )
    monkeypatch.setattr(
        bench_policies, "run_all", lambda jobs, processes, log: [bench_policies.run_job(job) for job in jobs]
    )
    file = tmp_path / "policies.json"
    assert bench_policies.main(["--quick", "--json", str(file), "--check"]) == 1
    shown = capsys.readouterr()
    assert "keep below the best peer" in shown.out
    assert "missed goal: production cores" in shown.err
    report = json.loads(file.read_text())
    assert [section["name"] for section in report["sections"]] == ["policies", "stack"]
