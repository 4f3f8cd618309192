"""How fast a model that is not loaded comes back: against other loaders, and against what the machine can do.

One run measures peers, limits and us in shuffled rounds, compares every loaded tensor with the origin's
bytes, and prints ratios. The model is Llama-shaped, about 2 GB of bf16 (0.5 GB with ``--quick``), made once
and kept in the cache directory; peers are installed once into a virtualenv of their own beside it.

``--only warm,cold,…`` runs some sections: warm (host tier and sealed pack in memory), cold (page cache
dropped), paths (choice of the read path), ingest, parts (memory, partial restores, evict), swap (a model
under eight tenants through real workers, and predicted times), leaks (thousands of swaps with injected
failures), flips (damaged packs), minilm (a real model), gpu.

Covers: preparation, the order of the sections, the report. Does not cover: the sections (``restore_*``).
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bench_suite
import make_models
import peers_venv
import restore_data
import restore_flips
import restore_gpu
import restore_sections
import restore_swaps
from bench_suite import Section
from fresh_child import FreshChildren, LoadFailed
from restore_setup import Setup

from packer.estimate import Rates, choose_host_form, load_rates, reads_past_cache
from packer.types import GIB, MIB, HostForm, ModelRef, ModelSpec, Task

ROUNDS, ROUNDS_QUICK = 5, 3
ROUNDS_MAX = 100
SWAPS, SWAPS_QUICK = 10_000, 300
SWAPS_MAX = 1_000_000
# The swaps hold the model of eight tenants in the host tier, raw, and one that is restored.
MEMORY_BYTES_MIN, MEMORY_BYTES_MIN_QUICK = 18 * GIB, 6 * GIB
DISK_BYTES_MIN, DISK_BYTES_MIN_QUICK = 12 * GIB, 4 * GIB
COPY_BYTES = 16 * MIB
CALIBRATE_TIMEOUT_S = 120
NO_ENVIRONMENT: Mapping[str, str] = {}
REF = ModelRef("bench", "llama", "0" * 16)
HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bunkhouse-bench"

SECTIONS: Mapping[str, Callable[[Setup], Section]] = {
    "warm": restore_sections.warm,
    "cold": restore_sections.cold,
    "paths": restore_sections.paths,
    "ingest": restore_sections.ingest,
    "parts": restore_sections.parts,
    "minilm": restore_sections.minilm,
    "flips": restore_flips.flips,
    "gpu": restore_gpu.gpu,
    "leaks": restore_swaps.leaks,
    # Needs the memory that the host segments of the sections before took.
    "swap": restore_swaps.swap,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the model, fewer rounds and swaps")
    parser.add_argument("--only", metavar="LIST", help=f"sections to run, of {','.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds, 1 to {ROUNDS_MAX}")
    parser.add_argument("--swaps", type=int, help=f"swaps of the leak section (default {SWAPS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    bench_suite.add_markdown(parser)
    parser.add_argument("--check", action="store_true", help="exit 1 and name every goal that was missed")
    parser.add_argument("--cache-dir", type=Path, default=CACHE, help="models, peers (default %(default)s)")
    parser.add_argument("--peers-dir", type=Path, help="the peers' virtualenv (default: in the cache)")
    parser.add_argument("--no-peers", action="store_true", help="install nothing; their goals stay unjudged")
    parser.add_argument(
        "--no-touch",
        action="store_true",
        help="do not make free memory this machine's own before each run (see fresh_child.own_memory)",
    )
    return parser


class BadOption(ValueError):
    """An option is outside of its limits; the text says what to use."""


def _sections(options: argparse.Namespace) -> list[str]:
    names = options.only.split(",") if options.only else list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise BadOption(f"--only {','.join(unknown)}: use some of {','.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


def _bounded(value: int | None, default: int, greatest: int, name: str) -> int:
    chosen = default if value is None else value
    if not 1 <= chosen <= greatest:
        raise BadOption(f"{name} {chosen}: use 1 to {greatest}")
    return chosen


def _check_room(cache: Path, quick: bool) -> None:
    """A bench that swaps or fills a disk measures nothing. Raises ``BadOption``."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    room = os.statvfs(cache)
    free = room.f_bavail * room.f_frsize
    memory_min = MEMORY_BYTES_MIN_QUICK if quick else MEMORY_BYTES_MIN
    disk_min = DISK_BYTES_MIN_QUICK if quick else DISK_BYTES_MIN
    way_out = "free some" if quick else "free some, or use --quick"
    if available < memory_min:
        raise BadOption(
            f"{available / GIB:.1f} GiB of memory are available, this needs {memory_min / GIB:.0f}: {way_out}"
        )
    if free < disk_min:
        raise BadOption(
            f"{free / GIB:.1f} GiB are free in {cache}, this needs {disk_min / GIB:.0f}: {way_out}"
        )


# --- preparation ----------------------------------------------------------------------------------


def calibrate(cache: Path) -> Rates:
    """What the agent measures of this box, the way it does it. Raises ``LoadFailed``."""
    command = [sys.executable, "-m", "agent.calibrate", "--data-dir", str(cache), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CALIBRATE_TIMEOUT_S, cwd=HERE.parent, check=False
    )
    if done.returncode != 0:
        raise LoadFailed(f"calibration failed: {done.stderr.strip()[-1000:]}")
    return load_rates(done.stdout.strip())


@contextmanager
def _memory_file(name: str) -> Iterator[int]:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fill(descriptor: int, path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while data := file.read(COPY_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]


def _peers(
    options: argparse.Namespace, references: Sequence[int], stack: ExitStack
) -> tuple[FreshChildren | None, tuple[str, ...], dict[str, str]]:
    """The server of the peers, those that are there, and why the others are not."""
    if options.no_peers:
        return None, (), {name: "--no-peers" for name in peers_venv.PEERS}
    try:
        venv = peers_venv.ensure(options.peers_dir or options.cache_dir / "peers")
        peers = stack.enter_context(
            FreshChildren(venv.python, HERE / "peer_loaders.py", references, NO_ENVIRONMENT)
        )
    except (peers_venv.CanNotInstall, LoadFailed) as error:
        return None, (), {name: str(error) for name in peers_venv.PEERS}
    found = peers.run("list", {}).facts
    missing = {name: why for name, why in venv.missing.items() if name.replace("-", "_") not in found}
    return peers, tuple(found), missing


@dataclass(frozen=True, slots=True)
class _Model:
    """A model's directory, its bytes in memory to compare with, and empty files for its host segments."""

    directory: Path
    spec: ModelSpec
    reference: int
    segments: Mapping[HostForm, int]


def _hold(directory: Path, task: Task, stack: ExitStack) -> _Model:
    reference = stack.enter_context(_memory_file("bench-reference"))
    _fill(reference, directory / "model.safetensors")
    segments = {form: stack.enter_context(_memory_file(f"bench-{form.value}")) for form in HostForm}
    return _Model(directory, restore_data.describe(directory, REF, task), reference, segments)


@contextmanager
def prepared(
    options: argparse.Namespace, rounds: int, swaps: int, log: Callable[[str], None]
) -> Iterator[Setup]:
    """Models, packs, host segments in all forms, and the servers of both sides."""
    shape = restore_data.QUICK if options.quick else restore_data.FULL
    with ExitStack() as stack:
        log("preparing the model")
        model = _hold(restore_data.model_directory(options.cache_dir, shape), Task.GENERATION, stack)
        held = [model]
        with suppress(FileNotFoundError):
            held.append(_hold(make_models.find_minilm(), Task.EMBEDDING, stack))
        log("preparing the peers")
        references = [each.reference for each in held]
        peers, present, missing = _peers(options, references, stack)
        fds = [*references, *(fd for each in held for fd in each.segments.values())]
        ours = stack.enter_context(
            FreshChildren(Path(sys.executable), HERE / "restore_jobs.py", fds, NO_ENVIRONMENT)
        )
        log("calibrating")
        rates = calibrate(options.cache_dir)
        setup = Setup(
            name=shape.name,
            spec=model.spec,
            reference=model.reference,
            directory=model.directory,
            cache=options.cache_dir,
            key=secrets.token_hex(32),
            segments=model.segments,
            ours=ours,
            peers=peers,
            present=present,
            missing=missing,
            rates=rates,
            form=choose_host_form(rates),
            rounds=rounds,
            swaps=swaps,
            quick=options.quick,
            touch=not options.no_touch,
            log=log,
        )
        for each in held[1:]:
            setup.minilm = setup.of_model(each.directory, each.spec, each.reference, each.segments)
        log("packing")
        for one in (setup, setup.minilm):
            if one is not None:
                stack.callback(one.pack.unlink, missing_ok=True)
                one.pack_it()
        if peers is not None and "tensorizer" in present and not setup.tensors.exists():
            settings = {"path": str(setup.weights), "tensorizer_path": str(setup.tensors)}
            peers.run("write_tensorizer", settings)
        yield setup


def _facts(setup: Setup) -> dict[str, str | int | float]:
    """What must be known to read the figures."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    raw = setup.spec.image_bytes
    sizes = [f"{form.value} {nbytes / raw:.4f}" for form, nbytes in setup.segment_bytes.items()]
    chunks = len(setup.spec.chunk_bytes)
    packages = ("torch", "numpy", "cryptography", "numba")
    return {
        "model": f"{setup.name}, {setup.nbytes / 1e9:.3f} GB of bf16, {chunks} chunks",
        "pack": f"{setup.pack.stat().st_size / raw:.4f} of the raw size, AES-256-GCM",
        "host segment": ", ".join(sizes) + " of the raw size",
        "host form chosen by calibration": setup.form.value,
        "packs in the page cache, by calibration": (
            "read past it" if reads_past_cache(setup.rates) else "read through it"
        ),
        "compiled kernels": "used" if setup.rates.kernels else "not used",
        "free memory before each run": "touched and freed" if setup.touch else "as it is",
        "commit": commit or "unknown",
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
        "peers": ", ".join(f"{name} {text}" for name, text in _peer_versions(setup).items()) or "none",
    }


def _peer_versions(setup: Setup) -> Mapping[str, str]:
    return setup.peers.run("list", {}).facts if setup.peers is not None else {}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _command(options: argparse.Namespace) -> str:
    """The command that measures the same again, without where files lie."""
    words = ["scripts/bench_restore.py"]
    words += [flag for flag in ("--quick", "--no-peers", "--no-touch") if getattr(options, _name(flag))]
    for flag in ("--only", "--rounds", "--swaps"):
        if (value := getattr(options, _name(flag))) is not None:
            words += [flag, str(value)]
    return " ".join(words)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


# --- the run --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    started_s = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {line}", file=sys.stderr, flush=True)

    try:
        names = _sections(options)
        rounds = _bounded(options.rounds, ROUNDS_QUICK if options.quick else ROUNDS, ROUNDS_MAX, "--rounds")
        swaps = _bounded(options.swaps, SWAPS_QUICK if options.quick else SWAPS, SWAPS_MAX, "--swaps")
        options.cache_dir.mkdir(parents=True, exist_ok=True)
        _check_room(options.cache_dir, options.quick)
    except BadOption as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sections: list[Section] = []
    with prepared(options, rounds, swaps, log) as setup:
        for name in names:
            log(f"section {name}")
            sections.append(SECTIONS[name](setup))
            bench_suite.print_section(sections[-1], sys.stderr)
        facts = _facts(setup)
    facts["took"] = f"{time.monotonic() - started_s:.0f} s"
    report = bench_suite.report_of("restore", facts, sections)
    return bench_suite.deliver(report, options, _command(options))


if __name__ == "__main__":
    sys.exit(main())
