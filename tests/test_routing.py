"""What control and routers do each second, whatever fails of it.

Covers: that a part that fails keeps neither the others nor its own next time from happening, and what is said
of it. Does not cover: the parts (``test_cluster``, ``test_ca``, ``test_control``) or the routes.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from running_control import running

from control import rooms, routing
from control.store import StoreUnavailable


async def test_time_goes_on_when_a_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a real control: before, one mistake of ours ended all of it in silence, renewals of its certificate
    and the detection of silent nodes with it."""
    monkeypatch.setattr(routing, "TICK_S", 0.001)
    failed, done = 0, asyncio.Event()

    def settle(cluster: object, most: int) -> None:
        nonlocal failed
        failed += 1
        raise KeyError("nobody foresaw this") if failed < 3 else StoreUnavailable("full")

    monkeypatch.setattr(rooms, "settle", settle)
    async with running(tmp_path) as control:

        def tick(now_ms: int) -> None:
            if failed > 3:
                done.set()

        monkeypatch.setattr(control.server.control.shown, "tick", tick)
        async with asyncio.timeout(60):
            await done.wait()
    said = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.message for record in said[:2]] == [
        "nodes: 'nobody foresaw this'",
        "nodes: full (before that 1 more times: nodes: 'nobody foresaw this')",
    ]
    assert said[0].exc_info
    assert not said[1].exc_info
