"""A model that is too large for one device, on two, in a real box: the same answers, and all memory back.

Covers: pushing it with ``--devices``, what it answers, what ``bunk ps`` and ``bunk plan`` show, its end as a
victim and its return. Does not cover: GPUs, or the core's rules for gangs (``test_gangs``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from make_models import make_classifier
from process_memory import read_worker
from real_box import Box, running_box
from tiny_models import find_minilm

from bunkhouse import Client, Placement
from bunkhouse.cli.main import bunk
from packer.types import MIB

pytestmark = pytest.mark.processes

SMALL, LARGE = 64 * MIB, 128 * MIB
TEXT = "Hello, what is the weather on the range today?"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, compiled_kernels: None) -> Iterator[Box]:
    devices = (f"cpu:{SMALL}", f"cpu:{SMALL}", f"cpu:{LARGE}")
    with running_box(tmp_path_factory.mktemp("gangs"), devices) as started:
        started.add_tenant("acme")
        yield started


@pytest.fixture
def client(box: Box) -> Iterator[Client]:
    with box.tenant("acme") as made:
        yield made


def command(box: Box, *words: str) -> str:
    environment = {"BUNKHOUSE_URL": box.url, "BUNKHOUSE_API_KEY": box.keys["acme"]}
    result = CliRunner().invoke(bunk, words, env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def row(box: Box, client: Client, ref: str, device: str | None) -> Placement:
    """Its row of ``bunk ps`` once the node has reported that it lies there: answers come before reports."""
    found: list[Placement] = []

    def reported() -> bool:
        found[:] = [each for each in client.ps().items if each.ref == ref and each.device == device]
        return bool(found)

    assert box.agent is not None
    box.agent.until(reported)
    return found[0]


def arenas(box: Box) -> list[int]:
    """Memory that images lie in, of each worker."""
    found = [read_worker(pid) for pid in box.worker_pids()]
    return sorted(memory.arena_bytes for memory in found if memory is not None)


def test_a_model_too_large_for_a_device_answers_from_two_as_it_does_from_a_large_one(
    box: Box, client: Client, tmp_path: Path
) -> None:
    whole = client.push("acme/whole", find_minilm())
    box.wait_planned(1)
    assert whole.image_bytes > SMALL
    wanted, tier = box.embed("acme/whole", TEXT)
    assert tier == "origin"
    row(box, client, whole.ref, "cpu:2")
    client.delete_model("acme/whole")
    box.wait_planned(0)

    output = command(box, "model", "push", "acme/gang", str(find_minilm()), "--devices", "2")
    assert "on 2 devices" in output
    box.wait_planned(1)
    gang = client.model("acme/gang").ref
    assert client.plan(gang).items[0].device == "cpu:0+cpu:1"
    assert box.embed("acme/gang", TEXT) == (wanted, "origin")
    shown = row(box, client, gang, "cpu:0+cpu:1")
    assert [share.device for share in shown.shares] == ["cpu:0", "cpu:1"]
    assert sum(share.held_bytes for share in shown.shares) == shown.device_bytes > whole.image_bytes
    assert "cpu:0+cpu:1" in command(box, "ps")
    assert max(arenas(box)) == pytest.approx(whole.image_bytes, abs=4 * MIB)

    # Another gang finds room on one device only: the first goes from both of its own.
    other = make_classifier(tmp_path / "other", 7, hidden=512, layers=6, heads=4, positions=64)
    pushed = client.push("acme/other", other)
    box.wait_planned(2)
    client.set_model(pushed.ref, devices=2)
    box.wait_planned(2)
    assert client.classify("acme/other", TEXT)
    gone = row(box, client, gang, None)
    assert (gone.state, gone.device_bytes) == ("absent", 0)
    assert sum(arenas(box)) == pytest.approx(pushed.image_bytes, abs=4 * MIB)

    again, tier = box.embed("acme/gang", TEXT)
    assert (again, tier) == (wanted, "disk")
    row(box, client, gang, "cpu:0+cpu:1")
