"""``bunk-agent calibrate``: measure this box now, keep the result, and say what follows from it.

Covers: the command, where its result goes when an agent runs beside it, and the restore times it predicts
for models of common sizes. Does not cover: measuring (``agent/calibrate.py``) or the model of a restore
(``packer/estimate.py``). ``bunk doctor --bench`` shows what this prints.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from agent import devices
from agent.calibration import HANDED_OVER, CalibrationFailed, measure
from agent.data_dir import DataDirInUse, hold_data_dir
from agent.journal import open_journal
from packer.durable import write_private
from packer.estimate import (
    FIXED_MS,
    Mix,
    Rates,
    RestoreShape,
    choose_host_form,
    disk_shape,
    dump_rates,
    host_shape,
    named_rates,
    restore_stages,
)
from packer.types import HostForm, Tier

EXIT_FAILED = 1
# A sentence encoder, a small and a common language model in bf16.
EXAMPLE_BYTES = (100_000_000, 2_000_000_000, 16_000_000_000)


@dataclass(frozen=True, slots=True)
class Example:
    """A predicted restore. ``limit``: what sets its pace: the source, the cores or the copy to the GPU."""

    model_bytes: int
    tier: str
    source: str  # the host form, "cached" or "cold"
    chosen: bool
    restore_ms: int
    limit: str


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the command prints."""

    rates: dict[str, int]
    host_form: str
    on_cuda: bool
    kernels: bool
    huge_pages: bool
    threads: int
    cores: int
    others_percent: int
    measured_ms: int
    took_ms: int
    fingerprint: str
    kept: str  # "stored", "handed over" to the running agent
    examples: tuple[Example, ...]


def examples(rates: Rates, on_cuda: bool) -> tuple[Example, ...]:
    """Predictions for bf16 models of common sizes, from every tier and in every form."""
    chosen = choose_host_form(rates, on_cuda)
    rows = []
    for nbytes in EXAMPLE_BYTES:
        mix = Mix(bf16_bytes=nbytes)
        for form in HostForm:
            rows.append(_example(rates, host_shape(mix, form, on_cuda), form.value, form is chosen))
        for cached in (True, False):
            shape = disk_shape(mix, cached, on_cuda)
            rows.append(_example(rates, shape, "cached" if cached else "cold", True))
        origin = RestoreShape(Tier.ORIGIN, nbytes, nbytes, mix, on_cuda=on_cuda)
        rows.append(_example(rates, origin, "local, cold", True))
    return tuple(rows)


def _example(rates: Rates, shape: RestoreShape, source: str, chosen: bool) -> Example:
    stages = restore_stages(rates, shape)
    restore_ms = FIXED_MS + round(stages.moving_ms)
    return Example(shape.image_bytes, shape.tier.value, source, chosen, restore_ms, stages.limit)


def keep(data_dir: Path, rates: Rates) -> str:
    """Store the rates, or leave them for the agent that runs on this directory; says which."""
    try:
        with hold_data_dir(data_dir):
            journal = open_journal(data_dir)
            try:
                journal.save_calibration(dump_rates(rates))
            finally:
                journal.close()
        return "stored"
    except DataDirInUse:
        write_private(data_dir / HANDED_OVER, dump_rates(rates).encode())
        return "handed over"


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bunk-agent calibrate",
        description="Measure this box's disk, memory, ciphers and decoders for about three seconds, with a "
        "temporary file of up to 256 MiB beside the packs. A running agent takes the result up by itself.",
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the agent's --data-dir")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--file-bytes", metavar="SIZE", help="size of the temporary file, at most 1GiB")
    parser.add_argument("--span-bytes", metavar="SIZE", help="memory to copy from and to, at most 1GiB")
    parser.add_argument("--passes", metavar="N", help="rounds of which the median counts")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    on_cuda = bool(devices.nvml_devices())
    devices.close()
    extra = [
        word
        for name in ("file-bytes", "span-bytes", "passes")
        if (value := getattr(options, name.replace("-", "_"))) is not None
        for word in (f"--{name}", value)
    ]
    try:
        rates = asyncio.run(measure(options.data_dir, background=False, gpu=on_cuda, extra=extra))
        kept = keep(options.data_dir, rates)
    except (CalibrationFailed, OSError, sqlite3.Error, ValueError) as error:
        print(f"bunk-agent calibrate: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    findings = _findings(rates, on_cuda, kept)
    if options.json:
        print(json.dumps(asdict(findings)))
    else:
        _print_human(findings)
    return 0


def _findings(rates: Rates, on_cuda: bool, kept: str) -> Findings:
    return Findings(
        rates=named_rates(rates),
        host_form=choose_host_form(rates, on_cuda).value,
        on_cuda=on_cuda,
        kernels=rates.kernels,
        huge_pages=rates.huge_pages,
        threads=rates.threads,
        cores=rates.cores,
        others_percent=rates.others_percent,
        measured_ms=rates.measured_ms,
        took_ms=rates.took_ms,
        fingerprint=rates.fingerprint,
        kept=kept,
        examples=examples(rates, on_cuda),
    )


def _print_human(findings: Findings) -> None:
    for name, rate in findings.rates.items():
        print(f"{name:24} {rate / 1e9:8.2f} GB/s" if rate else f"{name:24} {'-':>8}")
    print(f"host form: {findings.host_form}; measured in {findings.took_ms} ms, ", end="")
    print(f"others used {findings.others_percent}% of the cores; {findings.kept}")
    for row in findings.examples:
        if row.chosen:
            size = f"{row.model_bytes / 1e9:g} GB"
            print(f"{size:>8} from {row.tier} ({row.source}): {row.restore_ms} ms, limited by {row.limit}")
