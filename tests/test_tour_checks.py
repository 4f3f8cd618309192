"""The tour's checks can fail: each is given what a broken promise looks like and must say so.

Covers: the order of the requests, the checks on made-up outcomes, the metrics parser and the tables. The
real thing is ``test_end_to_end``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tour
import tour_calls
import tour_checks
import tour_ledger
from process_memory import Peaks
from tour_calls import Job, Outcome
from tour_ledger import LedgerPeaks, LedgerRow
from tour_models import DEVICE_BYTES, INPUTS, MODELS

MIB = 1024 * 1024
MINILM = MODELS[0]
WRITER = next(model for model in MODELS if model.kind == "gpt2")
REFERENCE = {text: text.encode() for text in INPUTS}
PEAKS = Peaks(
    samples=9,
    workers=3,
    nursery_bytes=300 * MIB,
    arena_bytes=200 * MIB,
    arena_bytes_by_device={"cpu:0": 100 * MIB, "cpu:1": 100 * MIB},
    worker_arena_bytes=90 * MIB,
    worker_private_bytes=40 * MIB,
    workers_rss_bytes=1000 * MIB,
    above_baseline_bytes=100 * MIB,
)


def outcome(number: int = 0, tier: str = "host", text: str = INPUTS[0]) -> Outcome:
    job = Job(number, MINILM, text, stream=False, to_node=False)
    return Outcome(job, took_ms=5, tier=tier, restore_ms=3, vector=REFERENCE[text])


def written(number: int, text: str) -> Outcome:
    return Outcome(Job(number, WRITER, "Hello", stream=bool(number % 2), to_node=False), took_ms=5, text=text)


def test_jobs_are_skewed_repeatable_and_call_every_model() -> None:
    jobs = tour_calls.make_jobs(200, seed=20)
    assert jobs == tour_calls.make_jobs(200, seed=20)
    assert jobs != tour_calls.make_jobs(200, seed=21)
    counts = [sum(job.model is model for job in jobs) for model in MODELS]
    assert min(counts) >= 1
    assert counts[0] > 3 * counts[-1]
    assert {job.to_node for job in jobs} == {True, False}
    assert {job.stream for job in jobs if job.model is WRITER} == {True, False}
    assert {job.model.ref for job in jobs[: len(MODELS)]} == {model.ref for model in MODELS}


def test_embedding_that_differs_by_one_bit_is_found() -> None:
    good = [outcome(), outcome(1, "disk", INPUTS[1])]
    assert tour_checks.check_embeddings(good, REFERENCE).passed
    wrong = replace(good[1], vector=bytes([good[1].vector[0] ^ 1]) + good[1].vector[1:])
    check = tour_checks.check_embeddings([good[0], wrong], REFERENCE)
    assert not check.passed
    assert "from disk" in check.detail
    assert not tour_checks.check_embeddings([], REFERENCE).passed


def test_request_without_an_answer_is_found() -> None:
    assert tour_checks.check_answered([outcome()]).passed
    check = tour_checks.check_answered([outcome(), replace(outcome(1), error="InternalServerError: boom")])
    assert not check.passed
    assert "1 of 2 requests answered" in check.detail
    assert "boom" in check.detail


def test_generation_that_changes_is_found() -> None:
    assert tour_checks.check_repeatable([written(0, "a"), written(1, "a")]).passed
    assert not tour_checks.check_repeatable([written(0, "a"), written(1, "b")]).passed


def test_tour_that_proves_too_little_is_found() -> None:
    weights = {model.ref: 70 * MIB for model in MODELS}
    every_tier = [outcome(tier=tier) for tier in ("device", "host", "disk", "origin")]
    assert tour_checks.check_real(every_tier, weights).passed
    assert not tour_checks.check_real(every_tier[:-1], weights).passed
    assert not tour_checks.check_real(every_tier, {ref: 60 * MIB for ref in weights}).passed
    assert not tour_checks.check_real(every_tier, dict(list(weights.items())[:7])).passed


@pytest.mark.parametrize(
    "peaks",
    [
        replace(PEAKS, arena_bytes_by_device={"cpu:0": DEVICE_BYTES + 1, "cpu:1": 0}),
        replace(PEAKS, worker_arena_bytes=DEVICE_BYTES + 1),
        replace(PEAKS, arena_bytes=2 * DEVICE_BYTES + 1),
        replace(PEAKS, above_baseline_bytes=2 * DEVICE_BYTES + 3 * tour_checks.WORKER_ALLOWANCE_BYTES + 1),
        replace(PEAKS, worker_private_bytes=tour_checks.WORKER_ALLOWANCE_BYTES + 1),
        replace(PEAKS, samples=0),
        replace(PEAKS, worker_arena_bytes=0),
    ],
)
def test_memory_above_a_budget_or_never_seen_is_found(peaks: Peaks) -> None:
    assert tour_checks.check_memory(PEAKS).passed
    assert not tour_checks.check_memory(peaks).passed


def test_ledger_above_a_budget_or_never_read_is_found() -> None:
    good = LedgerRow("cpu:0", 100, 100)
    assert tour_checks.check_ledger(LedgerPeaks(5, (good,))).passed
    assert not tour_checks.check_ledger(LedgerPeaks(5, (good, LedgerRow("host", 101, 100)))).passed
    assert not tour_checks.check_ledger(LedgerPeaks(0, ())).passed


def test_check_that_can_not_be_made_is_a_failed_check() -> None:
    def broken() -> tour_checks.Check:
        raise OSError("connection refused")

    check = tour_checks.attempt("isolation", broken)
    assert (check.passed, check.name) == (False, "isolation")
    assert "connection refused" in check.detail


METRICS = """\
# HELP bunkhouse_device_bytes Bytes of a device by use.
bunkhouse_device_bytes{device="cpu:0",use="budget"} 1.17440512e+08
bunkhouse_device_bytes{device="cpu:0",use="used"} 9.6e+07
bunkhouse_device_bytes{device="cpu:0",use="foreign"} 0.0
bunkhouse_tier_bytes{tier="host",use="budget"} 100.0
bunkhouse_tier_bytes{tier="host",use="used"} 40.0
bunkhouse_requests_total{tenant="acme"} 7.0
bunkhouse_requests_total{tenant="bolt"} 2.0
bunkhouse_answers_total{tenant="acme"} 6.0
"""


def test_metrics_are_read() -> None:
    rows = tour_ledger.parse_metrics(METRICS)
    assert rows == [LedgerRow("cpu:0", 96_000_000, 117_440_512), LedgerRow("host", 40, 100)]
    assert tour_ledger.parse_counters(METRICS) == {"requests": 9, "answers": 6}


def test_ledger_peak_above_its_budget_stays_when_the_use_falls() -> None:
    watch = tour_ledger.LedgerWatch("http://127.0.0.1:1")
    for used, budget in ((50, 100), (101, 100), (60, 100)):
        watch.add([LedgerRow("host", used, budget)])
    assert watch.stop() == LedgerPeaks(3, (LedgerRow("host", 101, 100),))


def test_table_lines_up() -> None:
    table = tour.format_table(["name", "n"], [["a", 1], ["long name", 100]])
    assert table.splitlines() == ["name         n", "---------  ---", "a            1", "long name  100"]
