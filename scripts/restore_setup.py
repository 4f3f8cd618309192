"""What all sections of the restore bench stand on: the prepared model, single runs, tables, the peers' best.

Covers: ``Setup``, which runs one load of ours or of a peer, tables and ratios of interleaved reports, and the
settings at which each peer is measured. Does not cover: what the sections measure (``restore_sections``,
``restore_swaps``, ``restore_flips``, ``restore_gpu``), or making the setup (``bench_restore``).
"""

from __future__ import annotations

import fcntl
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bench_harness
import msgspec
import restore_data
import restore_peers
from bench_harness import ROUNDS_MAX, Bench, Case
from bench_suite import Judgement, Table
from fresh_child import FreshChildren, Outcome
from restore_peers import PLAIN, Peer

from packer.estimate import Rates, reads_past_cache
from packer.types import MIB, HostForm, ModelSpec

PACK = "sealed pack"
INGEST = "ingest: image and sealed pack"
STREAMERS = ("fastsafetensors", "runai_model_streamer", "tensorizer")
TOUCHED = ", then every byte read"
FORM_NAMES = {form: f"host tier, {form.value} form" for form in HostForm}


@dataclass(slots=True)
class Setup:
    """What every section works on: one model with its directory and segments, and all that runs it."""

    name: str
    spec: ModelSpec
    reference: int
    directory: Path
    cache: Path
    key: str
    segments: Mapping[HostForm, int]
    ours: FreshChildren
    peers: FreshChildren | None
    present: Sequence[str]
    missing: Mapping[str, str]
    rates: Rates
    form: HostForm
    rounds: int
    swaps: int
    quick: bool
    touch: bool
    log: Callable[[str], None]
    # By case: the processor time of every run.
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    stage_words: dict[str, str] = field(default_factory=dict)
    segment_bytes: dict[HostForm, int] = field(default_factory=dict)
    minilm: Setup | None = None

    @property
    def weights(self) -> Path:
        return self.directory / "model.safetensors"

    @property
    def pack(self) -> Path:
        return self.cache / f"bench-{self.name}.pack"

    @property
    def tensors(self) -> Path:
        return self.cache / f"{self.name}.tensors"

    @property
    def nbytes(self) -> int:
        return self.weights.stat().st_size

    @property
    def touch_bytes(self) -> int:
        """Memory that is made this machine's own before every run: an image and its loader's buffers."""
        return self.nbytes * 3 // 2 + 256 * MIB if self.touch else 0

    # --- one run each ---

    def ours_once(self, name: str, job: str, watch: bool = False, **settings: Any) -> Outcome:
        settings = {"reference": self.reference, **settings}
        outcome = self.ours.run(job, settings, watch=watch, touch_bytes=self.touch_bytes)
        self.cpu_ms.setdefault(name, []).append(outcome.cpu_ms)
        return outcome

    def restore_pack(self, name: str = PACK, watch: bool = False, **settings: Any) -> Outcome:
        """``force``: through the page cache or past it, whatever a node with these rates would choose."""
        choice = {"past_cache": reads_past_cache(self.rates) and not settings.get("force")}
        return self.ours_once(name, "restore", watch, path=str(self.pack), key=self.key, **choice, **settings)

    def restore_segment(
        self, form: HostForm, name: str = "", watch: bool = False, **settings: Any
    ) -> Outcome:
        name = name or FORM_NAMES[form]
        return self.ours_once(name, "restore", watch, fd=self.segments[form], **settings)

    def peer_once(self, peer: Peer, device: str = "cpu", touch: bool = False) -> float:
        assert self.peers is not None
        settings = {
            "reference": self.reference,
            "loader": peer.loader,
            "path": str(self.weights),
            "tensorizer_path": str(self.tensors),
            "device": device,
            "touch": touch,
            **peer.settings,
        }
        outcome = self.peers.run("load", settings, peer.environment, touch_bytes=self.touch_bytes)
        self.cpu_ms.setdefault(peer.name + TOUCHED * touch, []).append(outcome.cpu_ms)
        return outcome.taken_ms

    def drop_origin(self) -> None:
        restore_data.drop(self.weights)
        if self.tensors.exists():
            restore_data.drop(self.tensors)

    def of_model(
        self, directory: Path, spec: ModelSpec, reference: int = -1, segments: Mapping[HostForm, int] = {}
    ) -> Setup:
        """The same for another model; ``reference`` -1: nothing is compared with it."""
        return replace(
            self,
            name=directory.name,
            directory=directory,
            spec=spec,
            reference=reference,
            segments=segments,
            cpu_ms={},
            stage_words={},
            segment_bytes={},
        )

    def pack_it(self) -> None:
        """Write the pack and fill the host segments."""
        ingest_once(self, compare=self.reference >= 0)
        for form, descriptor in self.segments.items():
            settings = {"path": str(self.pack), "key": self.key, "form": form, "segment_fd": descriptor}
            self.segment_bytes[form] = self.ours.run("segment", settings).facts["segment_bytes"]
            # As the agent does: from here on nobody can change it, so workers map it.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)

    def free_memory(self) -> None:
        """Give the memory of host segments and reference back; sections that need them come before."""
        for descriptor in (self.reference, *self.segments.values()):
            os.ftruncate(descriptor, 0)

    def stages(self) -> str:
        """What each stage of a restore from the pack takes on one thread, in words."""
        if PACK not in self.stage_words:
            settings = {"path": str(self.pack), "key": self.key}
            facts = self.ours.run("stages", settings, touch_bytes=self.touch_bytes).facts
            words = ", ".join(f"{name[:-3]} {value:.0f} ms" for name, value in facts.items())
            self.stage_words[PACK] = f"stages of the whole pack on one thread: {words}"
        return self.stage_words[PACK]


# --- tables ---------------------------------------------------------------------------------------


def _short(taken_ms: float) -> str:
    return f"{taken_ms:.0f}" if taken_ms >= 10 else f"{taken_ms:.1f}"


def rate(nbytes: int, taken_ms: float) -> str:
    return f"{nbytes / taken_ms / 1e6:.2f}"


def timed_table(
    setup: Setup, title: str, report: bench_harness.Report, notes: Sequence[str] = (), nbytes: int = 0
) -> Table:
    """Rows of an interleaved report, the fastest first; rates are of the model's raw weights."""
    nbytes = nbytes or setup.nbytes
    rows = []
    for row in sorted(report.rows, key=lambda row: row.median_ms):
        cpu = setup.cpu_ms.get(row.case)
        rows.append(
            (
                row.case,
                f"{_short(row.median_ms)} ms",
                _short(row.least_ms),
                _short(row.greatest_ms),
                rate(nbytes, row.median_ms),
                f"{statistics.median(cpu):.0f} ms" if cpu else "",
            )
        )
    columns = ("case", "median", "least", "greatest", "GB/s of weights", "processor")
    rounds = f"{report.rounds} interleaved rounds, every run compared byte for byte"
    return Table(title, columns, tuple(rows), (rounds, *notes))


def measure(
    setup: Setup, name: str, cases: Sequence[Case], peer: str, limit: str, rounds_max: int = ROUNDS_MAX
) -> tuple[bench_harness.Report, Mapping[str, float]]:
    """An interleaved report of these cases, and their medians."""
    bench = Bench(name, tuple(cases), peer=peer, limit=limit)
    # Every run is a fresh process: there is nothing to warm up.
    report = bench_harness.measure(bench, min(setup.rounds, rounds_max), setup.log, warm_up=False)
    return report, {row.case: row.median_ms for row in report.rows}


def runs_of(report: bench_harness.Report) -> dict[str, Sequence[float]]:
    return {row.case: row.runs_ms for row in report.rows}


def times_as_fast(
    goal: str, bound: float, ours: float, theirs: float | None, why: str, missing: str = ""
) -> Judgement:
    """How many times as fast ours is; ``theirs`` None: nobody to compare with."""
    if theirs is None:
        return Judgement(goal, None, bound, unit="x", why=missing)
    return Judgement(goal, theirs / ours, bound, unit="x", why=why)


@dataclass(frozen=True, slots=True)
class Rivals:
    """The peers of one section at their best settings."""

    peers: tuple[Peer, ...]
    note: str

    def best_streamer(self, medians: Mapping[str, float]) -> tuple[float | None, str]:
        """The least median of the streaming loaders, and whose it is."""
        found = [(medians[peer.name], peer.name) for peer in self.peers if peer.loader in STREAMERS]
        return min(found) if found else (None, "no streaming loader could be run")


def rivals_of(
    setup: Setup, candidates: Mapping[str, Sequence[Peer]], cold: bool, device: str = "cpu"
) -> Rivals:
    """Every loader that is there with the settings that are the fastest here."""
    if setup.peers is None:
        return Rivals((), "")

    def run(peer: Peer) -> float:
        if cold:
            setup.drop_origin()
        taken_ms = setup.peer_once(peer, device)
        setup.log(f"trying settings: {peer.name}: {taken_ms:.0f} ms")
        return taken_ms

    found = restore_peers.search(candidates, setup.present, run, runs=1 if cold else 2)
    tried = "; ".join(f"{name} {taken_ms:.0f} ms" for name, taken_ms in found.tried.items())
    failed = "; ".join(f"{name}: {why}" for name, why in found.failed.items())
    note = f"settings tried: {tried}" + (f"; failed: {failed}" if failed else "")
    plain = (PLAIN,) if PLAIN.loader in setup.present else ()
    return Rivals((*plain, *found.best), note)


def ingest_once(setup: Setup, pack: Path | None = None, compare: bool = True) -> Outcome:
    """Bring the model in from its directory and write its pack."""
    settings = {
        "compare": compare,
        "directory": str(setup.directory),
        "spec": msgspec.json.encode(setup.spec).decode(),
        "pack_path": str(pack or setup.pack),
        "key": setup.key,
    }
    return setup.ours_once(INGEST, "ingest", watch=True, **settings)


def missing_words(setup: Setup) -> str:
    return "; ".join(f"{name} is not here: {why}" for name, why in setup.missing.items()) or "no peers"


def cpu_words(setup: Setup, name: str) -> str:
    cpu = statistics.median(setup.cpu_ms[name])
    return f"{cpu:.0f} ms of processor time over {len(os.sched_getaffinity(0))} cores"


def best_of(rivals: Rivals, medians: Mapping[str, float]) -> tuple[float | None, str]:
    found = [(medians[peer.name], peer.name) for peer in rivals.peers]
    return min(found) if found else (None, "none could be run")
