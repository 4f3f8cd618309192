"""The documents keep up with the code: every command is in the README, and what it names exists.

Covers: the README's two commands, every ``bunk`` command, response headers, scripts, files and links it
names, the changelog and the licence. Does not cover: prose.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import agent.config
import packer.http
from bunkhouse.cli.main import bunk

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands(group: click.Group, path: tuple[str, ...] = ("bunk",)) -> Iterator[str]:
    """Every command that does something, as a user types it."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name))


@pytest.mark.parametrize("command", list(commands(bunk)))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"{re.escape(command)}\b", README), f"README.md does not show `{command}`"


def test_readme_names_no_command_that_does_not_exist() -> None:
    known = set(commands(bunk))
    groups = {name.rpartition(" ")[0] for name in known} - {"bunk"}
    for line in re.findall(r"^bunk ([a-z ]+)", README, re.MULTILINE):
        words = ("bunk " + line).split()
        candidates = {" ".join(words[:count]) for count in range(2, 5)}
        assert candidates & (known | groups), f"README.md shows `{' '.join(words)}`"


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", ".ci/run"])
def test_readme_commands_exist_parse_and_may_be_run(script: str) -> None:
    path = ROOT / script
    assert script in README
    assert os.access(path, os.X_OK), f"{script} is not executable"
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=120)


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test"])
def test_readme_commands_explain_themselves_and_refuse_half_an_option(script: str) -> None:
    """Neither needs a virtualenv for that, so neither makes one."""
    shown = subprocess.run(
        [str(ROOT / script), "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert script in shown.stdout
    refused = subprocess.run(
        [str(ROOT / script), "--venv"], capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 1
    assert "--venv needs a directory" in refused.stderr


def test_ci_runs_what_developers_run() -> None:
    assert "exec scripts/test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(("name", "said"), [("python3", "3.11 or newer"), ("", "no python3 here")])
def test_old_or_missing_python_is_named_with_the_way_out(tmp_path: Path, name: str, said: str) -> None:
    """A machine whose python3 is too old, or that has none, gets one clear message."""
    for tool in ("bash", "env", "dirname", "sed", "uname"):
        found = next(p for d in os.get_exec_path() if (p := Path(d) / tool).exists())
        (tmp_path / tool).symlink_to(found)
    if name:
        (tmp_path / name).write_text(
            '#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n'
        )
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "scripts/test"), "--venv", str(tmp_path / "venv")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "Debian" in done.stderr or "BUNKHOUSE_PYTHON" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    "header", sorted({value for name, value in vars(packer.http).items() if name.endswith("_HEADER")})
)
def test_every_answer_header_is_in_the_readme(header: str) -> None:
    assert f"`{header}`" in README


def test_options_of_the_agent_in_the_readme_exist() -> None:
    """The README's ``bunk-agent run`` line parses."""
    shown = re.search(r"bunk-agent run ((?:.*\\\n)*.*)", README)
    assert shown is not None
    words = shown[1].replace("\\\n", " ").split()
    parsed = agent.config.arguments().parse_args(["run", *words])
    assert isinstance(parsed, argparse.Namespace)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:packer|scripts|tests|sdk|agent)/[\w./]+)`", README)))
)
def test_files_named_in_the_readme_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_relative_links_lead_somewhere() -> None:
    for document in (README, (ROOT / "CHANGELOG.md").read_text(), (ROOT / "sdk/README.md").read_text()):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document):
            assert (ROOT / target).exists(), target


def test_changelog_and_licence_are_what_they_say() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog.startswith("# Changelog\n")
    assert "## [Unreleased]" in changelog
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
