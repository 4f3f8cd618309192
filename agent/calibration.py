"""The node's calibration: when it is measured, by whom, and whether a stored one still holds.

Covers: the fingerprint of what was measured, freshness, starting the measuring child, and the document
that ``bunk-agent calibrate`` prints. Does not cover: measuring (``agent/calibrate.py``, which may load
numpy and torch; this file may not), what rates mean (``packer/estimate.py``), or storing them
(``agent/journal.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packer.estimate import BadRates, Rates, load_rates
from packer.types import MIB

# Raised by one when the same box would be measured differently.
METHOD = 1
# The temporary file: large enough for the cache of a disk not to answer alone, small enough for any box.
FILE_BYTES = 256 * MIB
# A disk that fills up and ages is a different one after a month.
FRESH_MS = 30 * 24 * 3600 * 1000
# Measuring takes about three seconds, torch and a GPU's first context ten more; a minute is a hang.
CHILD_TIMEOUT_S = 60.0
# The child prints less than 2 KiB; its errors are a sentence.
_OUTPUT_BYTES_MAX = 64 * 1024
# What the rates depend on, as far as it is software.
_PACKAGES = ("numpy", "zstandard", "cryptography", "numba", "torch")


class CalibrationFailed(Exception):
    """The box was not measured; the text says why."""


def fingerprint(directory: Path) -> str:
    """The hardware and software that decide how fast this box is, as 16 hex digits.

    ``directory`` is where packs lie. A calibration of another fingerprint is of another box.
    """
    facts = [str(METHOD), platform.machine(), platform.release(), platform.python_version()]
    facts += [str(len(os.sched_getaffinity(0))), str(os.sysconf("SC_PHYS_PAGES"))]
    facts += [_cpu_name(), os.environ.get("BUNKHOUSE_KERNELS", "")]
    facts += [f"{name} {_version(name)}" for name in _PACKAGES]
    with suppress(OSError):
        device = os.stat(directory).st_dev
        facts.append(f"{os.major(device)}:{os.minor(device)}")
    with suppress(OSError):
        facts.append(Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def is_fresh(rates: Rates | None, directory: Path, now_ms: int) -> bool:
    """Whether these rates are of this box as it is, and not too old."""
    if rates is None or rates.fingerprint != fingerprint(directory):
        return False
    return 0 <= now_ms - rates.measured_ms < FRESH_MS


def child_command(data_dir: Path, background: bool, gpu: bool, extra: Sequence[str] = ()) -> list[str]:
    command = [sys.executable, "-m", "agent.calibrate", "--data-dir", str(data_dir), "--json"]
    if background:
        command.append("--background")
    if gpu:
        command.append("--gpu")
    return [*command, *extra]


async def measure(data_dir: Path, background: bool, gpu: bool, extra: Sequence[str] = ()) -> Rates:
    """Measure in a child. Ends it when the caller is cancelled. Raises ``CalibrationFailed``."""
    try:
        process = await asyncio.create_subprocess_exec(
            *child_command(data_dir, background, gpu, extra),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_OUTPUT_BYTES_MAX,
        )
    except OSError as error:
        raise CalibrationFailed(f"the measuring process does not start: {error}") from error
    try:
        async with asyncio.timeout(CHILD_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise CalibrationFailed(
            f"measuring took more than {CHILD_TIMEOUT_S:g} s; is the disk stuck?"
        ) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise CalibrationFailed(lines[-1][:500] if lines else f"measuring ended with {process.returncode}")
    try:
        return load_rates(output.decode(errors="replace").strip())
    except BadRates as error:
        raise CalibrationFailed(str(error)) from error
