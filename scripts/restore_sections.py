"""Sections of the restore bench that run in fresh children: warm, cold, read paths, ingest, parts, MiniLM.

Covers: the cases of each section, their interleaved rounds, tables and goals. Does not cover: worker
processes (``restore_swaps``), damaged packs (``restore_flips``), GPUs (``restore_gpu``), or the command line
and the preparation (``bench_restore``).

All loads of a section run in one shuffled order per round. Each is compared with the origin's bytes, and
raises when one differs: then there is no figure at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import restore_data
import restore_peers
from bench_harness import Case
from bench_suite import Judgement, Section, Table
from fresh_child import Outcome
from restore_peers import PLAIN, Peer
from restore_setup import (
    FORM_NAMES,
    INGEST,
    PACK,
    STREAMERS,
    TOUCHED,
    Rivals,
    Setup,
    best_of,
    cpu_words,
    ingest_once,
    measure,
    missing_words,
    rate,
    rivals_of,
    runs_of,
    timed_table,
    times_as_fast,
)

from packer.index import up_to_page
from packer.types import MIB, HostForm

MEMCPY = "copying memory to memory, 2 threads"
INTO_ARENA = "reading the raw file into the arena, 2 threads"
INTO_FRESH = "reading the raw file into fresh memory, 2 threads"
DIRECT_READ = "reading the raw file past the cache, 4 threads"
THERE = "host tier, form chosen, into pages that are there"
MAPPED_NOTE = (
    "the raw form is not copied: its segment's pages are mapped and all page tables filled inside the clock; "
    "'every byte read' is inside the clock too, two threads, the same for everybody"
)
# Every second stretch of this length is cached in the half-cached state.
STRETCH_BYTES = 16 * MIB
STRETCHES_MIN = 16
PEAK_BYTES_MAX = 256 * MIB
INGEST_ROUNDS = 3


# --- warm -----------------------------------------------------------------------------------------


def warm(setup: Setup) -> Section:
    """Everything in memory: the host tier and the pack against loaders that read the plain file."""
    restore_data.warm(setup.weights)
    rivals = rivals_of(setup, restore_peers.WARM, cold=False)
    path = str(setup.weights)
    reading: dict[str, Any] = {"path": path, "threads": 2, "piece_bytes": 4 * MIB}
    streamers = [peer for peer in rivals.peers if peer.loader in STREAMERS]
    cases = [
        Case(MEMCPY, lambda: setup.ours_once(MEMCPY, "memcpy", nbytes=setup.nbytes, threads=2).taken_ms),
        Case(INTO_ARENA, lambda: setup.ours_once(INTO_ARENA, "read", **reading).taken_ms),
        Case(INTO_FRESH, lambda: setup.ours_once(INTO_FRESH, "read", **reading, fresh=True).taken_ms),
        *(Case(peer.name, _running_peer(setup, peer)) for peer in rivals.peers),
        *(Case(peer.name + TOUCHED, _touching_peer(setup, peer)) for peer in streamers),
        *(Case(FORM_NAMES[form], _running_segment(setup, form)) for form in HostForm),
        Case(
            FORM_NAMES[setup.form] + TOUCHED,
            lambda: setup.restore_segment(setup.form, FORM_NAMES[setup.form] + TOUCHED, touch=True).taken_ms,
        ),
        Case(PACK, lambda: setup.restore_pack().taken_ms),
    ]
    if setup.form is not HostForm.RAW:
        cases.append(Case(THERE, lambda: setup.restore_segment(setup.form, THERE, populated=True).taken_ms))
    report, medians = measure(setup, "warm", cases, peer=INTO_ARENA, limit=MEMCPY)
    judgements = _judge_warm(setup, medians, rivals)
    notes = [MAPPED_NOTE, rivals.note]
    table = timed_table(setup, "Warm: to tensors on a cpu device", report, notes)
    return Section("warm", (table,), judgements, runs=runs_of(report))


def _judge_warm(setup: Setup, medians: Mapping[str, float], rivals: Rivals) -> tuple[Judgement, ...]:
    chosen = FORM_NAMES[setup.form]
    # Mapped pages are there already.
    there = chosen if setup.form is HostForm.RAW else THERE
    ours = medians[chosen]
    best, best_name = rivals.best_streamer(medians)
    touched = {name.removesuffix(TOUCHED): each for name, each in medians.items() if name.endswith(TOUCHED)}
    read, read_name = rivals.best_streamer(touched)
    missing = missing_words(setup)
    size = f"{setup.nbytes / 1e9:.1f} GB bf16"
    host = f"{size}, host tier ({setup.form.value} form, chosen by calibration) to the arena"
    streamer = f"times as fast as the best streaming loader ({best_name})"
    plain = medians.get(PLAIN.name)
    why = f"{cpu_words(setup, chosen)}; {setup.stages()}"
    return (
        times_as_fast(f"{host}, times as fast as {PLAIN.name}", 3, ours, plain, why, missing),
        times_as_fast(f"{host}, {streamer}", 3, ours, best, why, missing),
        times_as_fast(
            f"{host}, and every byte read once, times as fast as the best streaming loader and the same "
            f"({read_name})",
            3,
            touched[chosen],
            read,
            cpu_words(setup, chosen + TOUCHED),
            missing,
        ),
        times_as_fast(
            f"{host}, times as fast as raw two-thread reads into the same pages, which are there",
            0.9,
            medians[there],
            medians[INTO_ARENA],
            f"{cpu_words(setup, there)}; {setup.stages()}",
        ),
        times_as_fast(
            f"{size}, sealed pack, warm, {streamer}",
            1.3,
            medians[PACK],
            best,
            f"{cpu_words(setup, PACK)}; {setup.stages()}",
            missing,
        ),
    )


def _touching_peer(setup: Setup, peer: Peer) -> Callable[[], float]:
    return lambda: setup.peer_once(peer, touch=True)


def _running_peer(setup: Setup, peer: Peer, before: Callable[[], None] | None = None) -> Callable[[], float]:
    def run() -> float:
        if before is not None:
            before()
        return setup.peer_once(peer)

    return run


def _running_segment(setup: Setup, form: HostForm) -> Callable[[], float]:
    return lambda: setup.restore_segment(form).taken_ms


def minilm(setup: Setup) -> Section:
    """A real model in fp32, warm, against the plain way: no goal, but the synthetic ones must not mislead."""
    small = setup.minilm
    if small is None:
        return Section("minilm", skipped=("the package with all-MiniLM-L6-v2 is not installed",))
    plain = [PLAIN] if setup.peers is not None and PLAIN.loader in setup.present else []
    cases = [
        *(Case(peer.name, _running_peer(small, peer)) for peer in plain),
        *(Case(FORM_NAMES[form], _running_segment(small, form)) for form in HostForm),
        Case(PACK, lambda: small.restore_pack().taken_ms),
    ]
    report, _ = measure(small, "minilm", cases, peer=PACK, limit=PACK)
    sizes = ", ".join(
        f"{form.value} {nbytes / small.spec.image_bytes:.4f}" for form, nbytes in small.segment_bytes.items()
    )
    note = f"{small.nbytes / 1e6:.0f} MB of fp32; host segments of the raw size: {sizes}"
    return Section(
        "minilm", (timed_table(small, "all-MiniLM-L6-v2, warm", report, [note]),), runs=runs_of(report)
    )


# --- cold -----------------------------------------------------------------------------------------


def cold(setup: Setup) -> Section:
    """Nothing in the page cache, which is made sure of before every run."""
    rivals = rivals_of(setup, restore_peers.COLD, cold=True)
    reading: dict[str, Any] = {"path": str(setup.weights), "threads": 4, "piece_bytes": 2 * MIB}

    def read_raw() -> float:
        restore_data.drop(setup.weights)
        return setup.ours_once(DIRECT_READ, "read", **reading, direct=True).taken_ms

    def restore() -> float:
        restore_data.drop(setup.pack)
        outcome = setup.restore_pack(COLD_PACK)
        if outcome.facts["direct_bytes"] < 0.99 * outcome.facts["read_bytes"]:
            raise RuntimeError(f"a cold restore read {outcome.facts} from a cache that was empty")
        return outcome.taken_ms

    cases = [
        Case(DIRECT_READ, read_raw),
        *(Case(peer.name, _running_peer(setup, peer, setup.drop_origin)) for peer in rivals.peers),
        Case(COLD_PACK, restore),
    ]
    report, medians = measure(setup, "cold", cases, peer=DIRECT_READ, limit=DIRECT_READ)
    best, best_name = best_of(rivals, medians)
    why = f"{cpu_words(setup, COLD_PACK)}; {setup.stages()}"
    judgements = (
        times_as_fast(
            "sealed pack, cold, times the disk's own O_DIRECT rate for the raw bytes",
            1.2,
            medians[COLD_PACK],
            medians[DIRECT_READ],
            why,
        ),
        times_as_fast(
            f"sealed pack, cold, times as fast as the best loader ({best_name})",
            1.8,
            medians[COLD_PACK],
            best,
            why,
            missing_words(setup),
        ),
    )
    table = timed_table(setup, "Cold: page cache dropped before every run", report, [rivals.note])
    return Section("cold", (table,), judgements, runs=runs_of(report))


COLD_PACK = "sealed pack, cold"


# --- read paths -----------------------------------------------------------------------------------

PATHS = {"": "chosen per extent", "buffered": "all through the cache", "direct": "all past the cache"}
STATES = ("cached", "cold", "half cached")
# Nine cases, each with a cache to be made ready.
PATH_ROUNDS_MAX = 3


def paths(setup: Setup) -> Section:
    """The choice of the read path against both ways forced, in three states of the cache."""
    cases = [
        Case(_path_name(state, force), _running_path(setup, state, force))
        for state in STATES
        for force in PATHS
    ]
    first = cases[0].name
    report, medians = measure(setup, "paths", cases, first, first, PATH_ROUNDS_MAX)
    judgements = []
    for state in STATES:
        chosen = medians[_path_name(state, "")]
        better, better_name = min(
            (medians[_path_name(state, force)], PATHS[force]) for force in PATHS if force
        )
        goal = f"read path chosen, {state}, times as fast as the better of both ways ({better_name})"
        why = cpu_words(setup, _path_name(state, ""))
        judgements.append(times_as_fast(goal, 0.9, chosen, better, why))
    table = timed_table(setup, "Read paths: a sealed pack in three states of the page cache", report)
    return Section("paths", (table,), tuple(judgements), runs=runs_of(report))


def _path_name(state: str, force: str) -> str:
    return f"{state}, {PATHS[force]}"


def _running_path(setup: Setup, state: str, force: str) -> Callable[[], float]:
    def run() -> float:
        wanted = {"cached": 1.0, "cold": 0.0, "half cached": 0.5}[state]
        if state == "cached":
            restore_data.warm(setup.pack)
        else:
            restore_data.drop(setup.pack)
        if state == "half cached":
            size = setup.pack.stat().st_size
            restore_data.warm(setup.pack, min(STRETCH_BYTES, up_to_page(size // STRETCHES_MIN)))
        share = restore_data.cached_share(setup.pack)
        if abs(share - wanted) > 0.1:
            raise RuntimeError(f"{share:.0%} of the pack are cached, this case wants {wanted:.0%}")
        return setup.restore_pack(_path_name(state, force), force=force).taken_ms

    return run


# --- ingest ---------------------------------------------------------------------------------------


def ingest(setup: Setup) -> Section:
    """First use of a version, streaming, from files that are in the page cache."""
    restore_data.warm(setup.weights)
    taken: list[float] = []
    serving: list[float] = []
    extra: list[int] = []
    beside = setup.cache / "bench-ingest.pack"
    try:
        for number in range(INGEST_ROUNDS):
            beside.unlink(missing_ok=True)
            outcome = ingest_once(setup, beside)
            taken.append(outcome.taken_ms)
            serving.append(outcome.facts["serving_ms"])
            assert outcome.memory is not None
            extra.append(outcome.memory.anonymous_bytes - outcome.facts["image_bytes"])
            setup.log(f"ingest {number + 1}/{INGEST_ROUNDS}: {outcome.taken_ms:.0f} ms")
    finally:
        beside.unlink(missing_ok=True)
    median = statistics.median(taken)
    rows = (
        ("every hash right, may serve", f"{statistics.median(serving):.0f} ms", _rated(setup, serving)),
        ("pack finished and synced", f"{median:.0f} ms", _rated(setup, taken)),
    )
    notes = (
        f"{INGEST_ROUNDS} rounds; pack {outcome.facts['pack_bytes'] / setup.nbytes:.4f} of the raw size; "
        f"at most {max(extra) / MIB:.0f} MiB beside the image",
    )
    goal = "ingest on two cores, streaming, GB/s of weights"
    judgement = Judgement(goal, setup.nbytes / median / 1e6, 0.8, why=cpu_words(setup, INGEST))
    table = Table(
        "Ingest: origin to image and sealed pack", ("until", "median", "GB/s of weights"), rows, notes
    )
    return Section("ingest", (table,), (judgement,), runs={"ingest": taken, "serving": serving})


def _rated(setup: Setup, taken_ms: Sequence[float]) -> str:
    return rate(setup.nbytes, statistics.median(taken_ms))


# --- parts: a part of a model, memory, evict ------------------------------------------------------

SHARES = (0.25, 0.5, 0.75)


def parts(setup: Setup) -> Section:
    """What a restore takes beside the image, what a partial one moves, and what evicting costs."""
    memory_rows, peak = _peaks(setup)
    partial_rows, moved = _partial(setup)
    evict_ms, written = _evict(setup)
    size = setup.spec.image_bytes
    judgements = (
        Judgement(
            "peak memory of a restore beside its image, from outside",
            peak / MIB,
            PEAK_BYTES_MAX / MIB,
            at_least=False,
            unit=" MiB",
        ),
        Judgement(
            "a partial restore reads only the missing chunks, times their bytes",
            moved,
            1.0,
            at_least=False,
            unit="x",
        ),
        Judgement("bytes written by an evict", written, 0, at_least=False),
    )
    columns = ("restore", "median", "peak beside the image", "pages looked at")
    tables = (
        Table("Memory of a restore, seen from outside", columns, memory_rows),
        Table(
            "Restoring a part of the model from the pack",
            ("missing", "median", "read", "needed"),
            partial_rows,
        ),
        Table(
            "Giving the memory of an image back",
            ("image", "median", "written"),
            ((f"{size / MIB:.0f} MiB", f"{evict_ms:.2f} ms", f"{written} bytes"),),
        ),
    )
    return Section("parts", tables, judgements)


def _peaks(setup: Setup) -> tuple[tuple[tuple[str, ...], ...], int]:
    """Peaks of restores from every source; the greatest of them."""
    rows: list[tuple[str, ...]] = []
    greatest = 0
    runs: list[tuple[str, Callable[[], Outcome]]] = [
        (FORM_NAMES[form], _watching_segment(setup, form)) for form in HostForm
    ]
    runs.append((PACK, lambda: setup.restore_pack(watch=True)))
    runs.append((COLD_PACK, lambda: _cold_watched(setup)))
    for name, run in runs:
        outcomes = [run() for _ in range(3)]
        peaks = [outcome.memory for outcome in outcomes if outcome.memory is not None]
        # What is mapped is not memory of its own.
        image = 0 if outcomes[0].facts["mapped"] else outcomes[0].facts["image_bytes"]
        # An image may end in the middle of a huge page; all else above it is ours.
        extra = max(peak.anonymous_bytes for peak in peaks) - image
        greatest = max(greatest, extra)
        median = statistics.median(outcome.taken_ms for outcome in outcomes)
        shared = max(peak.shared_bytes for peak in peaks)
        rows.append((name, f"{median:.0f} ms", f"{extra / MIB:.1f} MiB", f"{shared / MIB:.0f} MiB"))
    return tuple(rows), greatest


def _watching_segment(setup: Setup, form: HostForm) -> Callable[[], Outcome]:
    return lambda: setup.restore_segment(form, watch=True)


def _cold_watched(setup: Setup) -> Outcome:
    restore_data.drop(setup.pack)
    return setup.restore_pack(COLD_PACK, watch=True)


def _partial(setup: Setup) -> tuple[tuple[tuple[str, ...], ...], float]:
    """Restores from a chunk on; the greatest share of bytes read above those that were missing."""
    rows: list[tuple[str, ...]] = []
    ratios: list[float] = []
    chunks = len(setup.spec.chunk_bytes)
    for share in SHARES:
        first = chunks - max(1, round(chunks * share))
        outcomes = [setup.restore_pack("partial", first_chunk=first) for _ in range(3)]
        facts = outcomes[0].facts
        ratios.append(facts["read_bytes"] / facts["wanted_bytes"])
        median = statistics.median(outcome.taken_ms for outcome in outcomes)
        rows.append(
            (
                f"the last {share:.0%} of the chunks",
                f"{median:.0f} ms",
                f"{facts['read_bytes'] / MIB:.0f} MiB",
                f"{facts['wanted_bytes'] / MIB:.0f} MiB",
            )
        )
    return tuple(rows), max(ratios)


def _evict(setup: Setup) -> tuple[float, int]:
    outcomes = [setup.ours_once("evict", "evict", nbytes=setup.spec.image_bytes) for _ in range(5)]
    written = max(outcome.facts["written_bytes"] for outcome in outcomes)
    return statistics.median(outcome.taken_ms for outcome in outcomes), int(written)
