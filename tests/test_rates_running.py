"""Rates with real processes and the unmodified openai client: headers, 429, and debts that outlive a kill.

Covers: tokens from the engine's count to the client's headers, at the node and through the router, what a
tenant sees of its own limits, metrics, and ``kill -9`` of the agent. Does not cover: arithmetic
(``test_rates``).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import openai
import pytest
from make_models import make_gpt2
from real_box import CALLER, PATIENCE_S, Box, running_box

import bunkhouse

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

TOKENS_PER_MINUTE = 30


# Each test has a tenant of its own with a limit; this one has none.
FREE = "free"
TENANTS = ("direct", "routed", "ticketed", "leaver", "debtor", FREE)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("rates")
    make_gpt2(folder / "gen", 1, hidden=64, layers=2, heads=2)
    with running_box(folder / "box", devices=("cpu:48MiB",)) as box:
        for tenant in TENANTS:
            box.add_tenant(tenant)
            box.tenant(tenant).push(f"{tenant}/gen", folder / "gen")
        box.wait_planned(len(TENANTS))
        yield box


def limit(box: Box, tenant: str, **limits: int) -> None:
    """Set limits and wait until the node knows them."""
    assert box.agent is not None
    box.operator().set_quota(tenant, **limits)  # type: ignore[arg-type]
    box.wait_planned(len(TENANTS))


def client(box: Box, tenant: str, *, direct: bool) -> openai.OpenAI:
    base = box.gateway_url if direct else box.url
    return openai.OpenAI(base_url=f"{base}/v1", api_key=box.keys[tenant], max_retries=0, timeout=PATIENCE_S)


def write(api: openai.OpenAI, tenant: str, tokens: int) -> tuple[int, dict[str, str]]:
    """(tokens that the answer took, its headers)"""
    raw = api.completions.with_raw_response.create(
        model=f"{tenant}/gen", prompt="the bunk", max_tokens=tokens, temperature=0
    )
    usage = raw.parse().usage
    assert usage is not None
    return usage.total_tokens, {name.lower(): value for name, value in raw.headers.items()}


@pytest.mark.parametrize("tenant", ["direct", "routed"])
def test_a_tenant_above_its_tokens_is_told_when_to_come_back_and_its_neighbour_is_not(
    box: Box, tenant: str
) -> None:
    direct = tenant == "direct"
    limit(box, tenant, tokens_per_minute=TOKENS_PER_MINUTE)
    with client(box, tenant, direct=direct) as api, client(box, FREE, direct=direct) as neighbour:
        took, headers = write(api, tenant, 16)
        assert headers["x-ratelimit-limit-tokens"] == str(TOKENS_PER_MINUTE)
        # What is left is said before the answer is counted: the estimate is taken off.
        assert int(headers["x-ratelimit-remaining-tokens"]) <= TOKENS_PER_MINUTE - 16
        more, _ = write(api, tenant, 64)
        with pytest.raises(openai.RateLimitError) as caught:
            write(api, tenant, 1)
        answer = caught.value.response
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "tokens")
        assert f"{TOKENS_PER_MINUTE} tokens per minute" in caught.value.message
        assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
        owed_s = (took + more - TOKENS_PER_MINUTE) * 60 / TOKENS_PER_MINUTE
        assert 1 <= int(answer.headers["retry-after"]) <= min(owed_s + 3, 120)
        assert answer.headers["x-ratelimit-reset-tokens"].startswith("2m"), "the debt and the bucket"
        _, unlimited = write(neighbour, FREE, 4)
        assert not any(name.startswith("x-ratelimit") for name in unlimited)


def test_a_tickets_calls_count_as_the_keys_do(box: Box) -> None:
    """The SDK calls the agent itself; the tenant's rate is the same one."""
    limit(box, "ticketed", tokens_per_minute=TOKENS_PER_MINUTE)
    before = routed_calls(box)
    retry = bunkhouse.RetryPolicy(tries_max=1)
    with bunkhouse.Client(box.url, box.keys["ticketed"], direct=True, retry=retry) as api:
        written = api.complete("ticketed/gen", "the bunk", max_tokens=64)
        assert written.served.node == "box"
        with pytest.raises(bunkhouse.RateLimited, match="tokens per minute"):
            api.complete("ticketed/gen", "the bunk", max_tokens=1, stream=True)
    assert routed_calls(box) == before


def routed_calls(box: Box) -> str:
    """The line of control's figures that counts calls through its router."""
    text = CALLER.get(f"{box.url}/metrics", timeout=PATIENCE_S).text
    return next(line for line in text.splitlines() if line.startswith("bunkhouse_router_calls_total"))


def test_who_leaves_a_stream_pays_for_what_was_written(box: Box) -> None:
    limit(box, "leaver", tokens_per_minute=TOKENS_PER_MINUTE)
    with client(box, "leaver", direct=True) as api:
        write(api, "leaver", 1)  # the model is there
        stream = api.completions.create(model="leaver/gen", prompt="the bunk", max_tokens=200, stream=True)
        for heard, _ in enumerate(stream):
            if heard == 40:
                break
        stream.close()
        # The node may take one more before it has seen that the caller left.
        with pytest.raises(openai.RateLimitError):
            [write(api, "leaver", 1) for _ in range(TOKENS_PER_MINUTE)]


def test_a_debt_outlives_the_agent_and_everybody_concerned_sees_it(box: Box) -> None:
    limit(box, "debtor", tokens_per_minute=TOKENS_PER_MINUTE, device_seconds_per_day=3_600)
    with client(box, "debtor", direct=True) as api:
        took, _ = write(api, "debtor", 120)
        assert took > 3 * TOKENS_PER_MINUTE
        rates = {rate.name: rate for row in wait_reported(box).usage for rate in row.rates}
        assert rates["tokens_per_minute"].remaining == 0
        assert rates["device_seconds_per_day"].limit == 3_600
        metrics = box.metrics()
        line = 'bunkhouse_tenant_limit{limit="tokens_per_minute",tenant="debtor",what="remaining"} 0.0'
        assert line in metrics
        wait_kept(box)
        assert box.agent is not None
        box.agent.kill()
        box.start_agent()
        with pytest.raises(openai.RateLimitError, match="tokens per minute"):
            write(api, "debtor", 1)


def wait_reported(box: Box):  # type: ignore[no-untyped-def]  # QuotaUse, as the tenant itself sees it
    """Until control has heard that the tenant is out of tokens."""
    shown: list[Any] = []

    def heard() -> bool:
        shown[:] = [box.tenant("debtor").quota("debtor")]
        return any(rate.remaining == 0 for row in shown[0].usage for rate in row.rates)

    assert box.agent is not None
    box.agent.until(heard)
    return shown[0]


def wait_kept(box: Box) -> None:
    """Until the journal has what is owed."""
    path = box.folder / "agent" / "journal.db"

    def kept() -> bool:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
            owed = reader.execute("select tokens from spent where tenant = 'debtor'").fetchone()
        return owed is not None and owed[0] > 0

    assert box.agent is not None
    box.agent.until(kept)
