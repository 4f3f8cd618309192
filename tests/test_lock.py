"""The agent's lock file: complete, hashed, and free of addresses."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "scripts" / "agent.lock"
PINNED = re.compile(r"([a-z0-9][a-z0-9._-]*)==([^ ]+) \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def locked() -> dict[str, str]:
    """Package to version."""
    lines = LOCK.read_text().splitlines()
    return {match[1]: match[2] for line in lines if (match := PINNED.fullmatch(line))}


def test_every_line_is_a_pin_or_a_hash() -> None:
    """No range, no address, no option: what is installed is decided here and nowhere else."""
    for line in LOCK.read_text().splitlines():
        assert line.startswith("#") or PINNED.fullmatch(line) or HASH.fullmatch(line), line


def test_every_pin_has_a_hash() -> None:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if PINNED.fullmatch(line):
            assert HASH.fullmatch(following), line


def test_the_lock_satisfies_what_the_project_asks_for() -> None:
    """A requirement that was added or raised without locking again is named here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = locked()
    for text in (*project["dependencies"], *project["optional-dependencies"]["agent"]):
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is not in {LOCK.name}"
        assert requirement.specifier.contains(pins[name]), f"{text}, locked {pins[name]}"
