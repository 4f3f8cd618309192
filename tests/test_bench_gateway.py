"""The gateway bench: its bare peer, its client, how it counts, and what a run of it says.

Covers: everything but a whole run, which takes a stack and a minute. Does not cover: figures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import bench_gateway
import pytest
from bench_gateway import BARE, NODE, ROUTER, WORKER, Client, Site, percentile, processor_s
from bench_suite import Section
from gateway_peers import BareHandler, bare_handler

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def bare() -> Iterator[BareHandler]:
    with bare_handler(315) as handler:
        yield handler


def quiet(line: str) -> None:
    pass


def test_the_peer_parses_and_answers_as_many_bytes(bare: BareHandler) -> None:
    client = Client(bare.url, "key")
    assert len(client.post("/v1/embeddings", b'{"input": "x"}')) == 315
    assert client.post_ms("/v1/embeddings", b"[]") > 0
    with pytest.raises(RuntimeError, match="500"):
        client.post("/v1/embeddings", b"{")
    client.close()
    with pytest.raises(RuntimeError, match="404"):
        Client(bare.url, "key").post("/elsewhere", b"{}")


def test_processor_time_is_that_of_the_process() -> None:
    before_s, used_s = processor_s(os.getpid()), time.process_time()
    while time.process_time() - used_s < 0.05:
        json.dumps(list(range(1000)))
    assert 0 < processor_s(os.getpid()) - before_s <= time.process_time() - used_s + 0.05


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100)])
def test_percentiles(share: float, wanted: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == wanted


@dataclass
class Timed:
    """In place of a site: every case takes its time, to the caller."""

    each_ms: dict[str, float]

    def once_ms(self, case: str) -> float:
        return self.each_ms[case]


def test_what_is_added_is_what_the_worker_does_not_take() -> None:
    site = Timed({WORKER: 5.0, BARE: 0.25, NODE: 5.5, ROUTER: 8.0})
    found: Section = bench_gateway.latency(cast(Site, site), 2, 10, quiet)
    assert [(goal.value, goal.reached) for goal in found.judgements] == [(0.5, True), (3.0, False)]
    assert {case: len(runs) for case, runs in found.runs.items()} == dict.fromkeys(site.each_ms, 20)


@dataclass
class Servers:
    """In place of a stack."""

    agent_pid: int
    control_pid: int
    agent_url: str
    url: str


@dataclass
class Rated:
    """In place of a site whose servers are all the bare handler."""

    bare: BareHandler
    stack: Servers
    key: str = "key"
    body: bytes = b"{}"


def test_the_same_peer_reaches_its_own_rate(bare: BareHandler) -> None:
    """All three cases asked of the bare handler: as many requests as were asked for, and a ratio near one."""

    site = cast(Site, Rated(bare, Servers(bare.pid, bare.pid, bare.url, bare.url)))
    section = bench_gateway.rates(site, 1, 1600, quiet)
    (goal,) = section.judgements
    assert goal.value is not None
    assert goal.value == section.runs[NODE][0] / section.runs[BARE][0] > 0
