"""Two versions of one model on a real box: stored once, kept as long as needed, gone when both are.

Covers: disk blocks as the file system counts them, what ``ps`` and the metrics say, answers of every version
bit by bit from disk after kill -9, a version that is deleted, another tenant with the same weights. Does not
cover: the mechanics (``test_holdings``, ``test_bases``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from real_box import Box, running_box
from tiny_models import copy_minilm

from bunkhouse import Client

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]
BUDGET = ("cpu:200MiB",)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with running_box(tmp_path, BUDGET) as box:
        for tenant in ("acme", "bank"):
            box.add_tenant(tenant)
        yield box


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """MiniLM, and the same with one of its 103 tensors changed."""
    folder = tmp_path_factory.mktemp("models")
    first, second = copy_minilm(folder / "first"), folder / "second"
    shutil.copytree(first, second)
    tensors = safetensors.numpy.load_file(second / "model.safetensors")
    tensors["encoder.layer.3.output.dense.weight"] += np.float32(0.01)
    safetensors.numpy.save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    return first, second


def blocks_bytes(box: Box) -> int:
    """What the packs take on disk, each file once."""
    states = {
        state.st_ino: state for state in map(os.stat, (box.folder / "agent" / "packs").rglob("*.pack*"))
    }
    return sum(512 * state.st_blocks for state in states.values())


def until(box: Box, operator: Client, holds: Callable[[], bool]) -> None:
    """Once the node has told what it holds, until this holds."""
    assert box.agent is not None
    box.agent.until(lambda: operator.ps().devices is not None and holds())


def report(operator: Client, ref: str) -> tuple[int, int]:
    """What the node says a version takes on disk, and does not store again."""
    [row] = [row for row in operator.ps().items if row.ref == ref]
    return row.disk_bytes, row.deduplicated_bytes


def test_a_second_version_is_stored_beside_the_first_and_outlives_it(
    box: Box, versions: tuple[Path, Path]
) -> None:
    tenant, operator = box.tenant("acme"), box.operator()
    refs = []
    answers = []
    sizes = []
    for number, directory in enumerate(versions, start=1):
        refs.append(tenant.push("acme/minilm", directory).ref)
        box.wait_planned(number)
        answers.append(box.embed(refs[-1], "the bunk")[0])
        box.events("packed", least=number)
        sizes.append(blocks_bytes(box))
    assert answers[0] != answers[1]
    whole, grown = sizes[0], sizes[1] - sizes[0]
    print(f"first version {whole} bytes on disk, second {grown} more")
    # One tensor of 2.25 MiB of 87, an index, tokenizer and configuration.
    assert grown < whole // 12
    until(box, operator, lambda: report(operator, refs[1])[1] > 0)
    disk_bytes, deduplicated_bytes = report(operator, refs[1])
    assert disk_bytes <= grown + 64 * 1024
    assert deduplicated_bytes > 80 * 1024 * 1024
    metrics = box.metrics()
    assert 'bunkhouse_deduplicated_bytes{tenant="acme"}' in metrics

    # Another tenant's equal weights are stored as if these were not there.
    other = box.tenant("bank").push("bank/minilm", versions[0]).ref
    box.wait_planned(3)
    box.embed(other, "the bunk")
    box.events("packed", least=3)
    assert blocks_bytes(box) - sizes[1] > 0.98 * whole
    assert report(operator, other)[1] == 0
    operator.delete_tenant("bank")
    until(box, operator, lambda: blocks_bytes(box) == sizes[1])

    # Killed, both come back from disk, bit by bit.
    assert box.agent is not None
    box.agent.kill()
    box.start_agent()
    assert [box.embed(ref, "the bunk") for ref in refs] == [(answer, "disk") for answer in answers]

    # The first goes; what the second needs of it stays, and is on the second's account.
    tenant.delete_model(refs[0])
    until(box, operator, lambda: report(operator, refs[1])[0] > whole // 2)
    kept = blocks_bytes(box)
    print(f"the second alone takes {kept} bytes")
    assert kept < whole + 64 * 1024
    assert kept <= report(operator, refs[1])[0] + 64 * 1024
    box.agent.kill()
    box.start_agent()
    assert blocks_bytes(box) == kept
    assert box.embed(refs[1], "the bunk") == (answers[1], "disk")

    # Then all of it.
    tenant.delete_model(refs[1])
    until(box, operator, lambda: not list((box.folder / "agent" / "packs").rglob("*.pack*")))
