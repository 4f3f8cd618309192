"""Installs what the restore and codec benches compare with, into a virtualenv of their own.

Covers: making the virtualenv once, torch before everything else, and saying what could not be installed.
Does not cover: running them (``peer_loaders``). What is installed comes from wherever pip looks.

Nothing of this project is installed beside them: their requirements must not change what we run with.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# As pip knows them; ``peer_loaders`` has one loader for each.
PEERS = ("safetensors", "fastsafetensors", "runai-model-streamer", "tensorizer")
# torch is some hundred MB, with CUDA some GB.
INSTALL_TIMEOUT_S = 1800
_STAMP = "peers-stamp"


class CanNotInstall(RuntimeError):
    """There is no virtualenv for peers; the text is pip's."""


@dataclass(frozen=True, slots=True)
class PeersVenv:
    """A virtualenv with those peers that could be installed, and why the others could not."""

    python: Path
    missing: dict[str, str]


def ensure(directory: Path, peers: Sequence[str] = PEERS, *, tensors: bool = True) -> PeersVenv:
    """Make the virtualenv, or use the one that a run before has made. Raises ``CanNotInstall``."""
    python = directory / "bin" / "python"
    stamp = directory / _STAMP
    # The same torch as ours: a peer must not win or lose by another version of what both stand on.
    base = (f"torch=={version('torch').partition('+')[0]}",) if tensors else ()
    wanted = " ".join((*base, *peers))
    if not stamp.exists() or stamp.read_text() != wanted:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(directory)], "making a virtualenv")
        # Before anything else, so that no requirement of a peer picks another one.
        if base:
            _pip(python, *base, "numpy")
    missing: dict[str, str] = {}
    for peer in peers:
        if stamp.exists() and stamp.read_text() == wanted:
            break
        try:
            # The constraint keeps the torch that is there.
            _pip(python, peer, *base)
        except CanNotInstall as error:
            missing[peer] = str(error)
    if not missing:
        stamp.write_text(wanted)
    return PeersVenv(python, missing)


def _pip(python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    _run(command, f"pip install {' '.join(words)}")


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CanNotInstall(f"{what}: {error}") from None
    if done.returncode != 0:
        raise CanNotInstall(f"{what}: {done.stderr.strip()[-1000:]}")
