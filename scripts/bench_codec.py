"""Codec figures: size, stored to wire planes, stored to tensor, opened and decoded, encode; against peers.

The bytes are those of all-MiniLM-L6-v2, fp32 as published, cast to the other dtypes. Peers are zipnn, plain
zstd and blosc2, installed by this bench into a virtualenv of their own; the limit is moving the raw bytes
once. Runs of all of them are interleaved, every result is compared with the original, and every goal is a
ratio within one run: of medians or of the fastest runs, whichever is smaller.

Covers: cores and memory. Does not cover: disks, packs and whole restores (``bench_restore``), or GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bench_harness
import codec_cases
import make_models
import peers_venv
from bench_harness import Bench, Case
from bench_suite import Judgement, Section, SuiteReport, Table, add_markdown, deliver, report_of
from codec_cases import OurCodec, Weights

from packer import kernels
from packer.transforms import Transforms

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bunkhouse-bench"
PACKAGES = ("zipnn", "zstandard", "blosc2")
# Names of ``codec_peers`` and the package that each needs.
NEEDS = {
    "zipnn": "zipnn",
    "zipnn, copied": "zipnn",
    "zipnn, one call": "zipnn",
    "zstd": "zstandard",
    "blosc2": "blosc2",
}
ZIPNN_WHOLE = "zipnn, one call"  # as its documentation calls it
ZIPNN = ("zipnn", "zipnn, copied", ZIPNN_WHOLE)
MIB = 1024 * 1024
# Far more than any cache of one core, and ten seconds of all codecs together.
TIMED_MIB, TIMED_MIB_QUICK = 128, 48
JOB_TIMEOUT_S = 600.0

LIMIT = "moving the raw bytes once"
WIRE = "to wire planes"
NUMPY, KERNELS = "to the tensor, numpy", "to the tensor, kernels"
SEALED = "opened and to wire planes, 2 threads"

STORED_SHARE_MAX = 0.667
ENTROPY_SHARE_MAX = 1.005
WIRE_MIN, NUMPY_MIN, KERNELS_MIN, SEALED_MIN = 4.0, 1.3, 2.5, 2.0


# --- peers ----------------------------------------------------------------------------------------


class PeerFailed(RuntimeError):
    """A peer could not do what was asked; the text is its own."""


class Peers:
    """The process that runs the peers, and which of them are there."""

    def __init__(self, python: Path, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._process = subprocess.Popen(
            [str(python), str(HERE / "codec_peers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(f"the process of the peers ended at {job}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{job.get('name', job['do'])}: {answer['error']}")
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=JOB_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Setup:
    """All that the sections need."""

    weights: Weights
    timed_bytes: int
    rounds: int
    peers: Peers | None
    why_not: str
    kernels: kernels.WarmFacts
    work: Path
    failures: dict[str, str]
    log: Callable[[str], None] = field(repr=False)

    def load(self, dtype: str) -> OurCodec:
        """The timed bytes of a dtype, on our side and on that of the peers."""
        raw = codec_cases.tiled(codec_cases.cast(self.weights, dtype), self.timed_bytes)
        if self.peers is not None:
            path = self.work / dtype
            raw.tofile(path)
            self.peers.ask(do="load", path=str(path), dtype=dtype)
            path.unlink()
        return OurCodec(raw, dtype)

    def peer_cases(self, dtype: str, do: str, **job: Any) -> Iterator[Case]:
        """A case for each peer that can do this with this dtype."""
        peers = self.peers
        if peers is None:
            return
        for name in peers.names:
            ask = partial(peers.ask, do=do, name=name, **job)
            try:
                ask()
            except PeerFailed as error:
                self.failures[name] = f"{dtype}: {error}"
                self.log(self.failures[name])
                continue
            yield Case(name, partial(_milliseconds, ask))


def _milliseconds(ask: Callable[[], dict[str, Any]]) -> float:
    return float(ask()["ms"])


@contextmanager
def running_peers(options: Any, log: Callable[[str], None]) -> Iterator[tuple[Peers | None, str]]:
    """The peers, or why there are none."""
    if options.no_peers:
        yield None, "--no-peers"
        return
    log("preparing the peers")
    try:
        directory = options.peers_dir or options.cache_dir / "codec-peers"
        venv = peers_venv.ensure(directory, PACKAGES)
    except peers_venv.CanNotInstall as error:
        yield None, str(error)
        return
    peers = Peers(venv.python, [name for name, package in NEEDS.items() if package not in venv.missing])
    try:
        yield peers, "; ".join(venv.missing.values())
    finally:
        peers.close()


# --- sections -------------------------------------------------------------------------------------


def measure(setup: Setup, name: str, cases: Sequence[Case]) -> dict[str, tuple[float, ...]]:
    """Milliseconds of every run of every case, interleaved; the first case is peer and limit of the harness,
    whose ratios are not used here."""
    first = cases[0].name
    bench = Bench(name, tuple(cases), peer=first, limit=first)
    report = bench_harness.measure(bench, setup.rounds, lambda line: setup.log(f"{name}: {line}"))
    return {row.case: row.runs_ms for row in report.rows}


def median(runs: Sequence[float]) -> float:
    return sorted(runs)[len(runs) // 2]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as zipnn in the best way to call it, by medians and by the fastest runs."""

    by_medians: float
    by_fastest: float

    @property
    def certain(self) -> float:
        """The smaller one. zipnn takes new memory all the time, so a busy machine slows it more than it
        slows us; a goal must not be reached by that."""
        return min(self.by_medians, self.by_fastest)


def ratio_to_zipnn(rows: Mapping[str, Sequence[float]], case: str) -> Ratio | None:
    peers = [rows[name] for name in ZIPNN if name in rows]
    if not peers:
        return None
    return Ratio(
        min(map(median, peers)) / median(rows[case]),
        min(map(min, peers)) / min(rows[case]),
    )


def ratio_goal(
    setup: Setup, goal: str, bound: float, rows: Mapping[str, Sequence[float]], case: str
) -> Judgement:
    """How many times as fast as zipnn at its best."""
    if not any(name in rows for name in ZIPNN):
        why = setup.why_not or "; ".join(setup.failures.get(name, "") for name in ZIPNN)
        return Judgement(goal, None, bound, unit="x", why=f"no figure of zipnn: {why}"[:300])
    if case not in rows:
        return Judgement(goal, None, bound, unit="x", why=setup.kernels.text)
    ratio, ours = ratio_to_zipnn(rows, case), median(rows[case])
    assert ratio is not None
    why = f"by medians {ratio.by_medians:.2f}x, by the fastest runs {ratio.by_fastest:.2f}x"
    if ZIPNN_WHOLE in rows:
        why += f", of zipnn called once {median(rows[ZIPNN_WHOLE]) / ours:.2f}x"
    if WIRE in rows:
        why += f"; libzstd alone takes {median(rows[WIRE]) / ours:.0%} of our time"
    return Judgement(goal, ratio.certain, bound, unit="x", why=why)


def rate_table(
    title: str, rows: Mapping[str, Sequence[float]], nbytes: int, notes: Sequence[str] = ()
) -> Table:
    """Rates of raw bytes, and ratios to zipnn and to the limit of the same run."""
    limit = median(rows[LIMIT])
    lines = []
    for case, runs in sorted(rows.items(), key=lambda row: median(row[1])):
        middle, ratio = median(runs), ratio_to_zipnn(rows, case)
        lines.append(
            (
                case,
                f"{nbytes / middle / 1e6:.2f}",
                f"{nbytes / max(runs) / 1e6:.2f}-{nbytes / min(runs) / 1e6:.2f}",
                "-" if ratio is None else f"{ratio.by_medians:.2f}x",
                "-" if ratio is None else f"{ratio.by_fastest:.2f}x",
                f"{limit / middle:.2f}",
            )
        )
    columns = ("case", "GB/s", "least-most", "to zipnn", "fastest runs", "to the limit")
    return Table(title, columns, tuple(lines), tuple(notes))


def size_section(setup: Setup) -> Section:
    """Stored sizes of the whole model, and those that the peers make of the same tensors."""
    lines: list[tuple[str, ...]] = []
    judgements: list[Judgement] = []
    peers = [name for name in ("zipnn", "zstd", "blosc2") if setup.peers and name in setup.peers.names]
    for dtype in codec_cases.DTYPES:
        weights = codec_cases.cast(setup.weights, dtype)
        size = codec_cases.stored_size(weights, dtype)
        shares = [f"{_peer_share(setup, weights, dtype, name, size.raw_bytes)}" for name in peers]
        ours = size.planes_bytes / size.raw_bytes
        lines.append(
            (
                dtype,
                f"{ours:.4f}",
                f"{size.pages_bytes / size.raw_bytes:.4f}",
                f"{size.entropy_bytes / size.raw_bytes:.4f}",
                f"{size.wire_bytes / size.raw_bytes:.4f}",
                *shares,
                size.codecs,
            )
        )
        if dtype == "bf16":
            judgements.append(
                Judgement("bf16 MiniLM, stored bytes of a raw byte", ours, STORED_SHARE_MAX, at_least=False)
            )
            bound = size.planes_bytes / size.entropy_bytes
            judgements.append(
                Judgement("bf16 MiniLM, stored bytes to order-0 entropy", bound, ENTROPY_SHARE_MAX, False)
            )
    columns = ("dtype", "stored", "in pages", "order-0", "wire", *peers, "chunks")
    note = "share of the raw bytes; order-0: entropy of each chunk's exponents (8-bit weights: of its bytes)"
    return Section(
        "size", (Table("Sizes, all of MiniLM", columns, tuple(lines), (note,)),), tuple(judgements)
    )


def _peer_share(setup: Setup, weights: Weights, dtype: str, name: str, raw_bytes: int) -> str:
    assert setup.peers is not None
    path = setup.work / "sizes"
    codec_cases.tiled(weights, raw_bytes).tofile(path)
    try:
        setup.peers.ask(do="load", path=str(path), dtype=dtype)
        return f"{setup.peers.ask(do='encode', name=name)['bytes'] / raw_bytes:.4f}"
    except PeerFailed as error:
        setup.log(f"{dtype}: {error}")
        return "-"
    finally:
        path.unlink()


def decode_section(setup: Setup, dtype: str) -> Section:
    """Stored to tensor and to wire planes, one thread; for bf16 also opened, with two."""
    ours = setup.load(dtype)
    cases = [Case(LIMIT, ours.copy), Case(NUMPY, lambda: ours.decode(Transforms))]
    if setup.kernels.ready:
        cases.append(Case(KERNELS, lambda: ours.decode(kernels.transforms)))
    if ours.has_wire_form:
        cases.append(Case(WIRE, ours.to_wire))
    cases += setup.peer_cases(dtype, "decode")
    rows = measure(setup, f"decode {dtype}", cases)
    tables = [rate_table(f"Stored to tensor, {dtype}, one thread", rows, len(ours.raw))]
    judgements: list[Judgement] = []
    runs = {f"decode {dtype}, {case}": times for case, times in rows.items()}
    if dtype == "bf16":
        judgements += [
            ratio_goal(setup, "stored to wire planes, one core, to zipnn", WIRE_MIN, rows, WIRE),
            ratio_goal(setup, "stored to tensor, one core, numpy, to zipnn", NUMPY_MIN, rows, NUMPY),
            ratio_goal(setup, "stored to tensor, one core, kernels, to zipnn", KERNELS_MIN, rows, KERNELS),
        ]
        opened = _opened_rows(setup, ours)
        tables.append(rate_table("Opened (AES-256-GCM), bf16, two threads", opened, len(ours.raw)))
        goal = "opened and to wire planes, two threads, to zipnn without encryption"
        judgements.append(ratio_goal(setup, goal, SEALED_MIN, opened, SEALED))
        runs |= {f"opened {dtype}, {case}": times for case, times in opened.items()}
    return Section(f"decode {dtype}", tuple(tables), tuple(judgements), runs=runs)


def _opened_rows(setup: Setup, ours: OurCodec) -> dict[str, tuple[float, ...]]:
    cases = [
        Case(LIMIT, ours.copy),
        Case(SEALED, lambda: ours.open_to_wire(2)),
        Case("to wire planes, 2 threads, not sealed", lambda: ours.to_wire(2)),
        *setup.peer_cases("bf16", "decode", threads=2),
    ]
    return measure(setup, "opened bf16", cases)


def encode_section(setup: Setup, dtype: str) -> Section:
    ours = setup.load(dtype)
    cases = [Case(LIMIT, ours.copy), Case("ours, numpy", lambda: ours.encode(Transforms))]
    if setup.kernels.ready:
        cases.append(Case("ours, kernels", lambda: ours.encode(kernels.transforms)))
    cases += [case for case in setup.peer_cases(dtype, "encode") if case.name != "zipnn, copied"]
    rows = measure(setup, f"encode {dtype}", cases)
    table = rate_table(f"Encode, {dtype}, one thread", rows, len(ours.raw))
    return Section(f"encode {dtype}", (table,), runs={f"encode {dtype}, {k}": v for k, v in rows.items()})


# --- start ----------------------------------------------------------------------------------------


def sections(setup: Setup, quick: bool) -> Iterator[Section]:
    yield size_section(setup)
    for dtype in ("bf16", "fp32", "fp16", "fp8", "int8"):
        yield decode_section(setup, dtype)
    for dtype in ("bf16",) if quick else ("bf16", "fp32", "fp16", "fp8", "int8"):
        yield encode_section(setup, dtype)


def weights_file() -> Path:
    """The real model that a test package carries."""
    return next(Path(make_models.find_minilm()).rglob("*.safetensors"))


def run(options: Any, log: Callable[[str], None]) -> SuiteReport:
    """Everything; raises ``NotExact`` when any codec of ours is not."""
    rounds = options.rounds or (bench_harness.ROUNDS_QUICK if options.quick else bench_harness.ROUNDS)
    timed_mib = options.mib or (TIMED_MIB_QUICK if options.quick else TIMED_MIB)
    log("preparing weights and kernels")
    weights = codec_cases.real_weights(weights_file())
    facts = kernels.warm()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bunkhouse-bench-")))
        peers, why_not = stack.enter_context(running_peers(options, log))
        setup = Setup(
            weights=weights,
            timed_bytes=timed_mib * MIB,
            rounds=rounds,
            peers=peers,
            why_not=why_not,
            kernels=facts,
            work=work,
            failures={},
            log=log,
        )
        found = tuple(sections(setup, options.quick))
    about: dict[str, str | int | float] = {
        "weights": "all-MiniLM-L6-v2, fp32, cast",
        "timed": f"{timed_mib} MiB of them, {rounds} interleaved rounds, medians; chunks of 4 MiB",
        "kernels": facts.text,
        "peers": ", ".join(peers.names) if peers is not None else "none",
    }
    if why_not:
        about["peers that are missing"] = why_not[:300]
    return report_of("codec", about, found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = bench_harness.parser(__doc__)
    parser.add_argument("--mib", type=int, help="how much of each dtype is timed")
    parser.add_argument("--no-peers", action="store_true", help="measure our own codecs only")
    parser.add_argument("--peers-dir", type=Path, help="virtualenv of the peers (default: in the cache)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE, help=f"default: {CACHE}")
    add_markdown(parser)
    options = parser.parse_args(arguments)
    if options.rounds is not None and not 1 <= options.rounds <= bench_harness.ROUNDS_MAX:
        parser.error(f"--rounds {options.rounds}: use 1 to {bench_harness.ROUNDS_MAX}")
    if options.mib is not None and not 1 <= options.mib <= 4096:
        parser.error(f"--mib {options.mib}: use 1 to 4096")
    report = run(options, lambda line: print(line, file=sys.stderr, flush=True))
    return deliver(report, options, "scripts/bench_codec.py")


if __name__ == "__main__":
    sys.exit(main())
