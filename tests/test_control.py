"""The control server over real sockets: management API, uploads, nodes, plans and the router.

Covers: what each surface promises to a caller with the right credential. Does not cover: callers
without one and hostile input (``tests/attacks``), or crashes (``test_control_crash``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from running_control import Running, declare, model_files, running


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def test_push_ends_in_a_version_that_is_listed(control: Running) -> None:
    key = await control.tenant("acme")
    model = await control.push("acme", "minilm", model_files())
    print(model)
    assert model["latest"]
    assert [
        item["ref"] for item in (await control.call("GET", "/api/v1/models", key=key)).json()["items"]
    ] == [model["ref"]]


async def test_join(control: Running, tmp_path: Path) -> None:
    node = await control.join("n1")
    got = await node.beat(tmp_path)
    assert got.plan
