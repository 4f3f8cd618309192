"""A control server and two nodes as real processes, one of them behind a line that tests cut.

Covers: starting it, calls at the node and through the router, and whether every record of the first node is
in control's database exactly once. Does not cover: what fails (``test_failures``).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
from losing_proxy import Cable, cable
from make_models import make_gpt2
from real_box import CALLER, PATIENCE_S, Box, Process

from packer.usage import KEY_MARK

TENANTS = ("acme", "globex")
# Two of these fit on the first node's device at a time.
MODELS = ("gen0", "gen1", "gen2")


@dataclass(slots=True)
class Stack:
    """``box`` is the node ``box`` with control; ``second`` is a node that dials control directly."""

    box: Box
    cable: Cable
    second: Process

    @property
    def agent(self) -> Process:
        assert self.box.agent is not None
        return self.box.agent

    @property
    def control(self) -> Process:
        assert self.box.control is not None
        return self.box.control

    def ask(self, model: str, *, routed: bool = False, tokens: int = 8) -> httpx2.Response:
        """One completion, at the first node itself unless ``routed``."""
        return CALLER.post(
            f"{self.box.url if routed else self.box.gateway_url}/v1/completions",
            headers={"Authorization": f"Bearer {self.box.keys[model.split('/')[0]]}"},
            json={"model": model, "prompt": "the bunk", "max_tokens": tokens, "temperature": 0},
            timeout=PATIENCE_S,
        )

    def answered(self, model: str, *, routed: bool = False) -> httpx2.Response:
        got = self.ask(model, routed=routed)
        assert got.status_code == 200, got.text
        return got

    def api(self, tenant: str, *, routed: bool = False, retries: int = 0) -> openai.OpenAI:
        base = self.box.url if routed else self.box.gateway_url
        return openai.OpenAI(
            base_url=f"{base}/v1", api_key=self.box.keys[tenant], max_retries=retries, timeout=PATIENCE_S
        )

    # --- what control knows -----------------------------------------------------------------------

    def used(self, tenant: str) -> tuple[int, int]:
        """(answers, tokens) of a tenant at the first node, as control knows them."""
        for row in self.box.operator().quota(tenant).usage:
            if row.node == "box":
                return row.answers, row.tokens
        return -1, -1

    def counted(self, tenant: str) -> tuple[int, int]:
        """The same as the node itself counts it, once control knows as much."""
        counts = (0, 0)

        def told() -> bool:
            nonlocal counts
            figures = dict(line.rsplit(" ", 1) for line in self.box.metrics().splitlines() if line[0] != "#")
            names = [f'bunkhouse_{what}_total{{tenant="{tenant}"}}' for what in ("answers", "tokens")]
            counts = int(float(figures[names[0]])), int(float(figures[names[1]]))
            return self.used(tenant) == counts

        self.until(told)
        return counts

    def charged(self, tenant: str) -> tuple[int, int]:
        """(answers, tokens) of a tenant in control's ledger, once the nodes have nothing more to tell."""
        self.until(lambda: "bunkhouse_usage_waiting 0.0" in self.box.metrics())
        self.until(lambda: not self._untold("second")[0])
        rows = self.box.operator().usage(tenant=tenant)
        tokens = sum(row.prompt_tokens + row.completion_tokens for row in rows)
        return sum(row.answers for row in rows), tokens

    def until_journaled(self, requests: int) -> None:
        """So many requests are in the first node's journal that control has not confirmed."""
        self.until(lambda: self._untold("agent")[1] >= requests)

    def _untold(self, node: str) -> tuple[int, int]:
        """(rows, requests) in a node's journal that control has not confirmed."""
        rows = " union all ".join(
            f"select requests from {table} where model not like '{KEY_MARK}%'"  # which count them once more
            for table in ("usage_open", "usage_told")
        )
        found = self._row(f"{node}/journal.db", f"select count(*), coalesce(sum(requests), 0) from ({rows})")
        return found[0], found[1]

    def state(self, node: str = "box") -> str:
        return next(item.state for item in self.box.operator().nodes() if item.node == node)

    def stored(self) -> tuple[int, int, int]:
        """(records of the first node in control's database, different ones, the newest one's number)"""
        found = self._row(
            "control/control.db",
            "select count(*), count(distinct seq), coalesce(max(seq), 0) from records where node = 'box'",
        )
        return found[0], found[1], found[2]

    def spooled(self) -> tuple[int, int]:
        """(records that the first node has not delivered, the number of the newest one it ever had)"""
        found = self._row(
            "agent/journal.db",
            "select (select count(*) from spool), coalesce(max(seq), 0) from sqlite_sequence "
            "where name = 'spool'",
        )
        return found[0], found[1]

    def _row(self, path: str, query: str) -> tuple[int, ...]:
        with closing(sqlite3.connect(f"file:{self.box.folder / path}?mode=ro", uri=True)) as reader:
            row: tuple[int, ...] = reader.execute(query).fetchone()
        return row

    def until_packed(self, count: int) -> None:
        """So many models of the first node can be restored without control, which has their origin."""
        self.box.events("packed", least=count)

    def until_here(self, model: str) -> None:
        """Control knows that the first node has the model on its device."""

        def here() -> bool:
            rows = [row for row in self.box.operator().ps().items if row.ref.startswith(f"{model}@")]
            return any((row.node, row.state) == ("box", "resident") for row in rows)

        self.until(here)

    def until_delivered(self) -> None:
        """Every record that the node ever had is in control, and none is twice."""

        def delivered() -> bool:
            waiting, newest = self.spooled()
            stored = self.stored()
            if waiting or self.spooled() != (0, newest):
                return False  # there was a new one meanwhile
            assert stored == (newest, newest, newest)
            return True

        self.until(delivered)

    def until_used(self, tenant: str, answers: int, tokens: int) -> None:
        """Control has heard of so much use, and not of more."""
        self.until(lambda: self.used(tenant) >= (answers, tokens))
        assert self.used(tenant) == (answers, tokens)

    def until(self, true: Callable[[], bool]) -> None:
        """For as long as the first node's agent lives."""
        self.agent.until(true)


@contextmanager
def failing_stack(folder: Path) -> Iterator[Stack]:
    """Two tenants with three models each, packed on the first node; ``acme/gen0`` is on its device."""
    for seed, name in enumerate(MODELS):
        make_gpt2(folder / name, seed, hidden=256, layers=4, heads=4, positions=2048)
    box = Box(folder, ("cpu:56MiB",), agent_module="tests.hasty_agent", control_module="tests.hasty_control")
    second: Process | None = None
    with cable(box.node_url) as line:
        try:
            box.control_at = f"https://{line.address}"
            box.start_control()
            box.start_agent()
            for tenant in TENANTS:
                box.add_tenant(tenant)
                for name in MODELS:
                    box.tenant(tenant).push(f"{tenant}/{name}", folder / name)
            box.wait_planned(len(TENANTS) * len(MODELS))
            planned = rf"plan \d+\.\d+: {len(TENANTS)} tenants, {len(TENANTS) * len(MODELS)} versions"
            second, _ = box.another_agent("cpu:56MiB", wait=planned)
            stack = Stack(box, line, second)
            for name in (*MODELS[1:], MODELS[0]):
                stack.answered(f"acme/{name}")
            stack.until_packed(len(MODELS))
            yield stack
        finally:
            if second is not None:
                second.stop()
            box.close()
