"""Two real agents, control and two routers that are processes of their own: a tenant's rate holds over all
five doors, whoever dies meanwhile.

Covers: requests counted from outside against the limit and the time that passed, with control away, control
back, a router and an agent that were killed; what the headers say; that routers route on without control,
also one that is started then, and past a node that is gone. Does not cover: who gets which share
(``test_shares``), or all that a network may do (``test_cluster_simulation``). Routers count nothing, nodes
do, so what is shown is that calls through several of them are not let in several times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import httpx2
import pytest
from make_models import make_gpt2
from real_box import CALLER, PATIENCE_S, Box, Process

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

PER_MINUTE = 120
BURST = 20


@dataclass(slots=True)
class Crowd:
    """Everybody who calls for one tenant, and what came of it since the first call."""

    box: Box
    urls: list[str]
    routers: dict[str, Process] = field(default_factory=dict)
    spare_key: str = ""  # another one of the tenant's
    answers: dict[str, int] = field(default_factory=dict)  # 200s by whom they came from
    first_s: float | None = None

    def ask(self, url: str, key: str) -> httpx2.Response:
        return CALLER.post(
            f"{url}/v1/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"model": "acme/gen", "prompt": "the bunk", "max_tokens": 1, "temperature": 0},
            timeout=PATIENCE_S,
        )

    def call(self, url: str) -> httpx2.Response:
        if self.first_s is None:
            self.first_s = time.monotonic()
        got = self.ask(url, self.box.keys["acme"])
        assert got.status_code in (200, 429, 502, 503), got.text
        if got.status_code == 200:
            self.answers[url] = self.answers.get(url, 0) + 1
        return got

    def rush(self, calls: int) -> None:
        """All doors in turn, as fast as they answer."""
        for i in range(calls):
            self.call(self.urls[i % len(self.urls)])
        self.judge()

    def judge(self) -> None:
        """More time than this has passed for the nodes since they let the first one in."""
        assert self.first_s is not None
        passed_s = time.monotonic() - self.first_s
        let_in = sum(self.answers.values())
        assert let_in <= BURST + passed_s * PER_MINUTE / 60, self.answers

    def revoke_spare_key(self) -> None:
        """After r1, which keeps that it is good, was killed; nodes know."""
        r1 = self.routers["r1"]
        r1.until(lambda: (self.box.folder / "r1" / "view.kept").exists())
        r1.kill()
        self.box.operator().revoke_key(self.spare_key.split("_")[1])
        for node in self.urls[:2]:
            self.routers["r2"].until(lambda at=node: self.ask(at, self.spare_key).status_code == 401)  # type: ignore[misc]

    def until_let_in(self, url: str) -> None:
        def let_in() -> bool:
            got = self.call(url)
            assert got.status_code in (200, 429), got.text
            return got.status_code == 200

        self.routers["r2"].until(let_in)  # which lives all the time
        self.judge()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    folder = tmp_path_factory.mktemp("shares")
    make_gpt2(folder / "gen", 1, hidden=64, layers=2, heads=2)
    box = Box(folder / "box", ("cpu:48MiB",))
    with closing(box), ExitStack() as others:
        box.start_control()
        box.start_agent()
        box.add_tenant("acme")
        box.tenant("acme").push("acme/gen", folder / "gen")
        planned = r"plan \d+\.\d+: 1 tenants, 1 versions"
        second, port = box.another_agent("cpu:48MiB", wait=planned)
        others.callback(second.stop)
        spare = box.operator().create_key("acme").key
        crowd = Crowd(box, [box.gateway_url, f"http://127.0.0.1:{port}", box.url], spare_key=spare)
        for name in ("r1", "r2"):
            crowd.routers[name], url = box.another_router(name)
            others.callback(crowd.routers[name].stop)
            crowd.urls.append(url)
        for url in crowd.urls:
            assert crowd.call(url).status_code == 200, "nothing is limited yet"
        box.operator().set_quota("acme", requests_per_minute=PER_MINUTE)
        box.wait_planned(1)
        second.wait_for(planned)
        crowd.answers, crowd.first_s = {}, None
        yield crowd


def test_one_limit_holds_over_all_nodes_and_routers_whoever_is_away(crowd: Crowd) -> None:
    box = crowd.box
    crowd.rush(5 * BURST)
    for url in crowd.urls:
        crowd.until_let_in(url)  # every door lets somebody in
    headers = [crowd.call(url).headers for url in crowd.urls]
    assert {each["x-ratelimit-limit-requests"] for each in headers} == {str(PER_MINUTE)}
    first, second, own, _, r2 = crowd.urls
    assert box.control is not None
    crowd.revoke_spare_key()
    box.control.kill()
    for url in (first, second, r2):
        crowd.until_let_in(url)
    crowd.routers["r1"], again = box.another_router("r1", wait="routing as it said")
    try:
        crowd.until_let_in(again)
        assert crowd.ask(again, crowd.spare_key).status_code == 401, "the nodes have the word"
        health = CALLER.get(f"{again}/healthz").json()
        assert (health["connected"], health["kept"]) == (False, True)
        box.start_control()
        for name in ("r1", "r2"):
            crowd.routers[name].wait_for("connected to control")
        crowd.urls = [first, second, own, r2, again]
        crowd.rush(BURST)
        assert box.agent is not None
        box.agent.kill()
        for url in (second, r2, again):
            crowd.until_let_in(url)
        box.start_agent()
        crowd.rush(2 * BURST)
        for url in (first, again):
            crowd.until_let_in(url)
    finally:
        crowd.routers["r1"].stop()
