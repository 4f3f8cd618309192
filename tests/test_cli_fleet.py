"""What ``bunk`` says of many nodes: ``ps``, ``events``, ``explain``, and a push whose settings are refused.

Covers: what is left out or put together, against rows of a fake and a real control. Does not cover: the
commands' options and exit codes (``test_cli``).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from routed_fleet import Fleet, routed_fleet
from running_control import model_files

from bunkhouse._types import Decision, Others, Placement
from bunkhouse.cli.fleet import telling
from bunkhouse.cli.main import bunk
from bunkhouse.cli.plans import decision_lines


def row(ref: str, node: str, state: str = "absent", **figures: int) -> Placement:
    names = ("leases", "waiting", "device_bytes", "host_bytes", "disk_bytes", "requests", "answers")
    counted: dict[str, Any] = {**dict.fromkeys(names, 0), **figures}
    return Placement(node=node, ref=ref, state=state, device=None, restores=(), last_used_ms=0, **counted)


def test_nodes_that_hold_nothing_are_left_out_and_every_version_is_there() -> None:
    rows = [
        row("a@0", "n0"),
        row("a@0", "n1", "resident", device_bytes=1),
        row("a@0", "n2", disk_bytes=1),
        row("b@0", "n0"),
        row("b@0", "n1"),
        row("c@0", "n0"),
        row("c@0", "n1", requests=1),
    ]
    shown = [(each.ref, each.node) for each in telling(rows)]
    assert shown == [("a@0", "n1"), ("a@0", "n2"), ("b@0", "n0"), ("c@0", "n1")]


def test_a_decision_taken_again_and_again_is_one_line() -> None:
    refused = Decision(
        "n0",
        1_000,
        "refused",
        "a/m@0",
        "too many",
        None,
        None,
        None,
        "req_1",
        None,
        0,
        0,
        0,
        (),
        0,
        Others(0, 0),
    )
    again = [replace(refused, at_ms=1_000 + each, request=f"req_{each}") for each in range(3)]
    other = replace(refused, at_ms=9_000, reason="too late")
    first, second = decision_lines([*again, other])
    assert first.endswith("refused a/m@0  too many  (3 times since 1970-01-01 00:00:01Z)")
    assert second.endswith("refused a/m@0  too late")


async def command(fleet: Fleet, *words: str) -> Result:
    key = fleet.folder / "operator"
    key.write_text(fleet.control.operator_key)
    key.chmod(0o600)
    target = ["--url", fleet.control.url, "--key-file", str(key)]
    return await asyncio.to_thread(CliRunner().invoke, bunk, [*words, *target])


async def test_rows_left_out_are_counted_and_there_when_asked_for(tmp_path: Path) -> None:
    async with routed_fleet(tmp_path) as fleet:
        short = await command(fleet, "ps")
        assert "1 rows of nodes that hold nothing of a version are left out: --all" in short.stderr
        assert short.stdout.count(fleet.ref) == 1
        assert (await command(fleet, "ps", "--all")).stdout.count(fleet.ref) == 2
        assert "go on" not in (await command(fleet, "events", "--limit", "2")).stderr
        assert (
            "go on: bunk events --after"
            in (await command(fleet, "events", "--limit", "2", "--after", "0")).stderr
        )


async def test_a_push_whose_settings_are_refused_makes_no_version(tmp_path: Path) -> None:
    """And what was uploaded is there for the next try. A version that there was keeps its settings."""
    model = tmp_path / "model"
    model.mkdir()
    for name, data in model_files().items():
        (model / name).write_bytes(data)
    async with routed_fleet(tmp_path) as fleet:

        async def versions() -> list[tuple[int, int]]:
            items = (await fleet.control.call("GET", "/api/v1/models?tenant=acme")).json()["items"]
            return [(each["devices"], each["replicas"]) for each in items if each["name"] == "cut"]

        for _ in range(2):
            result = await command(fleet, "model", "push", "acme/cut", str(model), "--devices", "2")
            assert (result.exit_code, "devices: acme/cut@" in result.stderr) == (1, True)
            assert await versions() == []
        result = await command(fleet, "model", "push", "acme/cut", str(model), "--replicas", "2")
        assert result.exit_code == 0
        assert await versions() == [(1, 2)]
        result = await command(fleet, "model", "push", "acme/cut", str(model), "--devices", "3")
        assert (result.exit_code, await versions()) == (1, [(1, 2)])
        result = await command(fleet, "model", "push", "acme/cut", str(model), "--replicas", "3")
        assert (result.exit_code, await versions()) == (0, [(1, 3)])


async def test_an_explanation_of_a_model_with_replicas_ends_with_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.questions.ANSWER_WAIT_S", 0.01)  # these nodes answer no questions
    async with routed_fleet(tmp_path) as fleet:
        assert "copies" not in (await command(fleet, "explain", "acme/m")).stdout
        await command(fleet, "model", "set", "acme/m", "--replicas", "2")
        said = (await command(fleet, "explain", "acme/m")).stdout
        assert "copies: 1 of up to 2 (n0)" in said
        assert "the next would go to n1" in said
