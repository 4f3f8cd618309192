"""``bunk top`` and ``bunk completion``: rates between two looks, the view, and scripts that a shell accepts.

Covers: the comparison, the order, agents that started anew, terminals and pipes. Does not cover: ``ps``.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_control import OPERATOR_KEY, FakeControl, serving

from bunkhouse import Device, Placement, Placements, Restores
from bunkhouse.cli.completion import SHELLS
from bunkhouse.cli.main import bunk
from bunkhouse.cli.top import SORTS, compare, view

MIB = 2**20
SDK = Path(__file__).resolve().parent.parent / "sdk"


def placement(ref: str, requests: int, restores: int = 0, **more: object) -> Placement:
    base = Placement(
        node="box",
        ref=ref,
        state="resident",
        device="cpu:0",
        leases=0,
        waiting=0,
        device_bytes=MIB,
        host_bytes=0,
        disk_bytes=0,
        requests=requests,
        answers=requests,
        restores=(Restores("disk", restores, 1, 1),) if restores else (),
        last_used_ms=0,
    )
    return replace(base, **more)  # type: ignore[arg-type]


DEVICES = (
    Device("box", "cpu:0", "cpu", "cpu", 4 * MIB, 3 * MIB, 0, True),
    Device("box", "cpu:1", "cpu", "cpu", 0, 0, 0, False),
)


def test_rates_are_what_came_since_the_look_before() -> None:
    before = Placements((placement("acme/a", 10, 1), placement("acme/b", 100, 5)), DEVICES)
    now = Placements(
        (placement("acme/a", 30, 2), placement("acme/b", 104, 5), placement("acme/c", 7)), DEVICES
    )
    look = compare(now, 12.0, before, 10.0, "requests")
    assert [(row.ref, row.requests_per_s, row.restores_per_s) for row in look.rows] == [
        ("acme/a", 10.0, 0.5),
        ("acme/b", 2.0, 0.0),
        ("acme/c", 0.0, 0.0),  # new here: nothing to compare with
    ]
    assert (look.requests_per_s, look.restores_per_s) == (12.0, 0.5)


def test_an_agent_that_started_anew_counts_from_nothing() -> None:
    look = compare(
        Placements((placement("acme/a", 4),), ()),
        2.0,
        Placements((placement("acme/a", 900),), ()),
        0.0,
        "used",
    )
    assert look.rows[0].requests_per_s == 2.0


def test_the_first_look_has_no_rates() -> None:
    look = compare(Placements((placement("acme/a", 4),), ()), 5.0, None, 0.0, "requests")
    assert (look.requests_per_s, look.rows[0].requests_per_s) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("sort", "first"),
    [("requests", "a"), ("waiting", "b"), ("device", "c"), ("restores", "d"), ("used", "e")],
)
def test_who_comes_first(sort: str, first: str) -> None:
    before = Placements(tuple(placement(name, 0) for name in "abcde"), ())
    now = Placements(
        (
            placement("a", 9),
            placement("b", 1, waiting=3),
            placement("c", 1, device_bytes=9 * MIB),
            placement("d", 1, 4),
            placement("e", 1, last_used_ms=5),
        ),
        (),
    )
    assert sort in SORTS
    assert compare(now, 2.0, before, 1.0, sort).rows[0].ref == first


def test_the_view_fits_and_says_what_it_leaves_out() -> None:
    rows = tuple(placement(f"acme/model-{number}", 1, waiting=number) for number in range(9))
    look = compare(Placements(rows, DEVICES), 1.0, None, 0.0, "waiting")
    text = view(look, 3, 60)
    assert all(len(line) <= 60 for line in text.split("\n"))
    assert "acme/model-8" in text
    assert "acme/model-5" not in text
    assert text.endswith("and 6 placements more")
    assert text.startswith("1 node  9 placements")
    wide = view(look, 3, 500)
    assert "|###############.....|" in wide
    assert "unhealthy" in wide
    assert "36 waiting" in wide


@pytest.fixture
def target(tmp_path: Path) -> Iterator[list[str]]:
    control = FakeControl()
    control.ps = {
        "items": [{"node": "box", "ref": "acme/m@0123456789abcdef", "state": "resident", "requests": 3}],
        "devices": [{"node": "box", "device": "cpu:0", "budget_bytes": 5, "used_bytes": 5, "healthy": True}],
    }
    key = tmp_path / "key"
    key.write_text(OPERATOR_KEY)
    key.chmod(0o600)
    with serving(control) as url:
        yield ["--url", url, "--key-file", str(key)]


def test_in_a_pipe_each_look_is_printed(target: list[str]) -> None:
    done = CliRunner().invoke(bunk, ["top", "--every", "0.5", "-n", "2", *target])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("acme/m@0123456789abcdef") == 2
    lines = CliRunner().invoke(bunk, ["top", "--every", "0.5", "-n", "2", "-o", "json", *target]).stdout
    looks = [json.loads(line) for line in lines.splitlines()]
    assert [look["rows"][0]["ref"] for look in looks] == ["acme/m@0123456789abcdef"] * 2


def test_on_a_terminal_it_takes_the_screen_and_gives_it_back(target: list[str]) -> None:
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            seen.extend(data)

    environment = {**os.environ, "PYTHONPATH": str(SDK), "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    command = [sys.executable, "-m", "bunkhouse.cli", "top", "--every", "0.5", "-n", "2", *target]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(60) == 0, seen.decode(errors="replace")
    reader.join(60)
    os.close(ours)
    assert b"acme/m@0123456789abcdef" in seen
    assert b"\x1b[?1049h" in seen  # the other screen
    assert b"\x1b[?1049l" in seen  # and back


@pytest.mark.parametrize("words", [("--every", "0"), ("--sort", "name"), ("--rows", "0"), ("-n", "0")])
def test_wrong_words_are_named(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(bunk, ["top", *words])
    assert done.exit_code == 2
    assert words[0] in done.output


# --- completion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_each_shell(shell: str) -> None:
    done = CliRunner().invoke(bunk, ["completion", shell])
    assert done.exit_code == 0
    assert "_BUNK_COMPLETE" in done.stdout
    if shutil.which(shell):
        checked = subprocess.run(
            [shell, "-n"], input=done.stdout, capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stderr


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    """The script in a real bash, with ``bunk`` on PATH."""
    command = tmp_path / "bunk"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m bunkhouse.cli "$@"\n')
    command.chmod(0o755)
    script = CliRunner().invoke(bunk, ["completion", "bash"]).stdout
    ask = (
        script
        + """
complete_words() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _bunk_completion bunk; echo "${COMPREPLY[@]}"
}
complete_words bunk no
complete_words bunk node to
complete_words bunk top --s
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(SDK), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["node", "token", "--sort"]
