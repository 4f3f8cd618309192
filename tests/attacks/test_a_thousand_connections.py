"""Threat: one tenant holds a thousand connections of a listener, so that others get no answer.

Covers: the node's gateway and control, each in a process of its own: all requests of another tenant are
answered, on old and new connections, what is held is bounded, and all is given back. Does not cover: times
(``scripts/bench_gateway.py`` has them, p99 beside a calm machine) or each limit by itself
(``test_held_connections``, ``test_crowds``).
"""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from control_process import process
from gateway_process import peak_bytes, process_of_two
from held_crowd import Held, HeldCrowd, stream_body
from running_control import PATIENCE_S

from packer.doors import DESCRIPTORS_WANTED, HEAD_SECONDS, OWNER_IDLE_MAX, want_descriptors

pytestmark = pytest.mark.processes

CONNECTIONS = 1_000
REQUESTS = 50
# 1,000 connections at some 30 KiB, and what the allocator keeps beside.
GROWTH_BYTES_MAX = 96 * 1024 * 1024


class Neighbour:
    """Another tenant's client."""

    def __init__(self, url: str, key: str) -> None:
        self._place = urlsplit(url).netloc
        self._headers = {"Authorization": f"Bearer {key}"}
        self._kept = self.connect()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._place, timeout=PATIENCE_S)

    def ask(self) -> list[int]:
        """The statuses of requests on the connection that stays, and of each on one of its own."""
        statuses = []
        for number in range(REQUESTS):
            line = self._kept if number % 2 else self.connect()
            line.request("GET", "/v1/models", headers=self._headers)
            answer = line.getresponse()
            answer.read()
            statuses.append(answer.status)
            if line is not self._kept:
                line.close()
        return statuses


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def crowded(url: str, key: str, path: str, body: bytes) -> Iterator[HeldCrowd]:
    want_descriptors()
    crowd = HeldCrowd(url, key, path, body)
    try:
        crowd.hold(CONNECTIONS)
        yield crowd
    finally:
        crowd.close()


def hold_and_ask(url: str, pid: int, hostile: str, other: str, path: str, body: bytes) -> None:
    neighbour = Neighbour(url, other)
    assert set(neighbour.ask()) == {200}
    calm, before, began_s = descriptors(pid), peak_bytes(pid), time.monotonic()
    with crowded(url, hostile, path, body) as crowd:
        assert set(neighbour.ask()) == {200}
        kinds = [kind for kind, _ in crowd.sockets]
        assert kinds.count(Held.IDLE) > OWNER_IDLE_MAX
        wait_for(lambda: crowd.open(Held.IDLE) <= OWNER_IDLE_MAX)
        half_heads = crowd.open(Held.HALF_HEAD)
        # They have their time, which may be over by now where a thousand connections take as long.
        assert half_heads == kinds.count(Held.HALF_HEAD) or time.monotonic() - began_s > HEAD_SECONDS
        assert descriptors(pid) <= calm + CONNECTIONS - kinds.count(Held.IDLE) + OWNER_IDLE_MAX
        assert peak_bytes(pid) - before < GROWTH_BYTES_MAX
        assert set(neighbour.ask()) == {200}
    wait_for(lambda: descriptors(pid) <= calm)
    assert set(neighbour.ask()) == {200}


def wait_for(true: Callable[[], bool]) -> None:
    async def waiting() -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(waiting())


def test_a_node_answers_others_while_one_tenant_holds_a_thousand_connections() -> None:
    with process_of_two() as (url, acme, globex, pid):
        hold_and_ask(url, pid, acme, globex, "/v1/completions", stream_body("acme/chat", 100))


async def test_control_answers_others_while_one_tenant_holds_a_thousand_connections(tmp_path: Path) -> None:
    async with process(tmp_path / "control") as control:
        keys = []
        for tenant in ("acme", "globex"):
            assert (await control.call("POST", "/api/v1/tenants", {"name": tenant}))[0] == 201
            status, made = await control.call("POST", f"/api/v1/tenants/{tenant}/keys", {})
            assert status == 201
            keys.append(made["key"])
        limits = Path(f"/proc/{control.handle.pid}/limits").read_text()
        soft, hard = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits).groups()  # type: ignore[union-attr]
        assert int(soft) >= min(int(hard), DESCRIPTORS_WANTED)
        body = stream_body("acme/chat", 100)
        acme, globex = keys
        pid = control.handle.pid
        await asyncio.to_thread(hold_and_ask, control.url, pid, acme, globex, "/v1/completions", body)
