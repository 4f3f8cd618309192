"""A node whose disk is full, with real processes on a file system that is: nothing is refused for it.

Covers: packs, the journal, records and use while there is no room, and what is told when there is some again.
Does not cover: each of these by itself (``test_full_disk``, ``test_worker_moves``, ``test_usage``), or
control's disk (``test_failures``).
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from make_models import make_gpt2
from real_box import CALLER, PATIENCE_S, Box
from small_disk_agent import NOT_ALLOWED

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

PIECE = bytes(64 * 1024)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """One of its three models fits on the device at a time."""
    folder = tmp_path_factory.mktemp("node-disk")
    box = Box(folder, ("cpu:24MiB",), agent_module="tests.small_disk_agent")
    with closing(box):
        box.start_control()
        try:
            box.start_agent()
        except AssertionError:
            if box.agent is not None and box.agent.handle.wait(PATIENCE_S) == NOT_ALLOWED:
                pytest.skip("this user may mount no file system of its own")
            raise
        box.add_tenant("acme")
        for seed, name in enumerate(("old", "new")):
            make_gpt2(folder / name, seed, hidden=256, layers=4, heads=4)
        box.tenant("acme").push("acme/old", folder / "old")
        box.wait_planned(1)
        yield box


def kinds(box: Box, model: str) -> list[str]:
    return [item.kind for item in box.operator().events(limit=1000).items if item.model.startswith(model)]


def until(box: Box, true: Callable[[], bool]) -> None:
    """Other processes' state has no event to wait for: ask again, for as long as the agent lives."""
    assert box.agent is not None
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, box.agent.log()
        with suppress(subprocess.TimeoutExpired):
            box.agent.handle.wait(0.05)
            pytest.fail("the agent has ended:\n" + box.agent.log())


def ask(box: Box, model: str) -> tuple[str, int]:
    """(the tier that it came from, tokens)"""
    got = CALLER.post(
        f"{box.gateway_url}/v1/completions",
        headers={"Authorization": f"Bearer {box.keys['acme']}"},
        json={"model": model, "prompt": "the bunk", "max_tokens": 4, "temperature": 0},
        timeout=PATIENCE_S,
    )
    assert got.status_code == 200, got.text
    return got.headers["x-bunkhouse-tier"], got.json()["usage"]["total_tokens"]


def fill(path: Path) -> None:
    """Until not a byte is left."""
    with path.open("wb", buffering=0) as file:
        for piece in (PIECE, b"x"):
            with suppress(OSError):
                while True:
                    file.write(piece)
    assert shutil.disk_usage(path.parent).free == 0


def test_a_full_disk_of_a_node_costs_packs_and_no_answer_and_no_use(box: Box) -> None:
    answered = [ask(box, "acme/old")]
    until(box, lambda: "packed" in kinds(box, "acme/old"))
    assert box.agent is not None
    filler = Path(f"/proc/{box.agent.handle.pid}/root{box.folder}/agent/filler")
    fill(filler)
    box.tenant("acme").push("acme/new", box.folder / "new")
    until(box, lambda: len(box.operator().models()) == 2)
    box.wait_planned(2)
    answered += [ask(box, model) for model in ("acme/new", "acme/old", "acme/new", "acme/old")]
    assert [tier for tier, _ in answered[1:4]] == ["origin", "disk", "origin"]
    assert answered[4][0] in ("disk", "host")
    assert "database or disk is full; serving on" in box.agent.whole_log()
    filler.unlink()
    until(box, lambda: "pack_failed" in kinds(box, "acme/new"))
    answered += [ask(box, "acme/new")]
    used = len(answered), sum(tokens for _, tokens in answered)

    def told() -> tuple[int, int]:
        rows = box.operator().usage(tenant="acme")
        return sum(row.answers for row in rows), sum(
            row.prompt_tokens + row.completion_tokens for row in rows
        )

    until(box, lambda: told() >= used)
    assert told() == used
