"""A child process that computes one answer: how it is started, waited for and ended.

Covers: its environment, which has no secret of the operator, its time, and what it said when it failed. Does
not cover: workers and the nursery that forks them (``spawning``), which live on, or what children compute.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# What is kept of the agent's environment: nothing that may be a secret of the operator.
_KEPT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "PYTHONHASHSEED",
    "BUNKHOUSE_KERNELS",  # off: do without compiled kernels
)
_KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "MKL_", "KMP_", "TORCH_", "PYTORCH_")
# A reason fits into a record and a line of the log.
REASON_CHARS_MAX = 500


class ChildFailed(Exception):
    """The child gave no answer; the text says why."""


def kept_environment() -> dict[str, str]:
    """For a child that runs this very code, wherever it lies."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith(_KEPT_PREFIXES)}
    return {**kept, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def module_command(*words: str) -> list[str]:
    """``python -m`` with these words. -P: a file in the current directory must not be taken for a module."""
    return [sys.executable, "-P", "-m", *words]


async def ask_child(command: Sequence[str], what: str, timeout_s: float, asked: bytes = b"") -> bytes:
    """What a command prints, given ``asked`` on its standard input. It is ended when the caller is cancelled.
    Raises ``ChildFailed``, which calls the work ``what``."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=kept_environment(),
        )
    except OSError as error:
        raise ChildFailed(f"the process for {what} does not start: {error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate(asked)
    except TimeoutError:
        raise ChildFailed(f"{what} took more than {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        said = lines[-1][:REASON_CHARS_MAX] if lines else f"it ended with {process.returncode}"
        raise ChildFailed(said)
    return output
