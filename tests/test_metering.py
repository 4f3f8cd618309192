"""What requests take: the estimate before, the count during, and what outlives a restart.

Covers: ``agent/metering.py``, ``agent/spending.py``, the gateway's headers about
rates, and the journal's table. Does not cover: limits (``test_rates``) or device
time (``test_due``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import aiohttp
import openai
import pytest
from fake_node import FakeNode, served

from agent.facade import EngineError, EngineFrame, EngineRequest, Refused
from agent.journal import SPENT_MAX, open_journal
from agent.loop import HeldLease
from agent.metering import (
    OUTPUT_TOKENS_ASSUMED,
    OUTPUT_TOKENS_RESERVED_MAX,
    MeteredLease,
    counts_of,
    expected_tokens,
)
from agent.spending import KEEP_S, Spending, SpentRow
from packer.events import RefusalReason, SpentFound
from packer.rates import REQUEST_TOKENS_MAX, RateView
from packer.types import ModelRef, Tier

# --- estimates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "tokens"),
    [
        (EngineRequest("embed", {"inputs": ["x" * 40, "y"]}), 12),
        (EngineRequest("embed", {"inputs": [[1, 2, 3], [4]]}), 4),
        (EngineRequest("classify", {"inputs": ["abcd"]}), 2),
        (EngineRequest("generate", {"prompt": "x" * 8, "max_tokens": 16}), 19),
        (EngineRequest("generate", {"tokens": [1, 2, 3], "max_tokens": 7}), 10),
        (EngineRequest("generate", {"messages": [{"role": "user", "content": "x" * 8}]}), 3),
    ],
)
def test_the_estimate_is_the_input_and_what_may_be_written(order: EngineRequest, tokens: int) -> None:
    open_ended = order.op == "generate" and "max_tokens" not in order.fields
    assert expected_tokens([order]) == tokens + OUTPUT_TOKENS_ASSUMED * open_ended
    assert expected_tokens([order, order]) == 2 * expected_tokens([order])


def test_a_huge_limit_of_the_caller_reserves_what_answers_take_at_most() -> None:
    order = EngineRequest("generate", {"tokens": [1], "max_tokens": 1_000_000})
    assert expected_tokens([order]) == 1 + OUTPUT_TOKENS_RESERVED_MAX
    each = replace(order, fields={**order.fields, "n": 3})
    assert expected_tokens([each]) == 1 + 3 * OUTPUT_TOKENS_RESERVED_MAX, "read once, written three times"


# --- counts -------------------------------------------------------------------------------------------


class Engine:
    """Answers with these frames; ``fails`` afterwards."""

    def __init__(self, *frames: EngineFrame, fails: Exception | None = None, device_ms: int = 5) -> None:
        self.frames, self.fails, self.device_ms = frames, fails, device_ms

    async def run(
        self, ref: ModelRef, device: str, request: EngineRequest, took: Callable[[int], None]
    ) -> AsyncIterator[EngineFrame]:
        try:
            for frame in self.frames:
                yield frame
            if self.fails is not None:
                raise self.fails
        finally:
            took(self.device_ms)


def lease_on(engine: Engine) -> tuple[MeteredLease, HeldLease]:
    held = HeldLease(engine, ModelRef("acme", "m", "0" * 16), "cpu:0", Tier.DEVICE, 0)  # type: ignore[arg-type]
    return MeteredLease(held), held


ORDER = EngineRequest("generate", {"prompt": "x" * 400, "max_tokens": 50})


def said(prompt: int, written: int, **more: str) -> EngineFrame:
    return EngineFrame({"delta": "a", "prompt_tokens": prompt, "completion_tokens": written, **more})


async def test_the_last_count_of_each_call_is_what_it_took() -> None:
    lease, held = lease_on(Engine(said(90, 1), said(90, 2), said(90, 3, finish_reason="stop")))
    for _ in range(2):
        assert len([frame async for frame in lease.run(ORDER)]) == 3
    assert (held.tokens, held.device_ms) == (186, 10)
    assert (lease.prompt_tokens, lease.completion_tokens) == (180, 6)


async def test_a_caller_that_leaves_pays_for_what_was_read_and_written_by_then() -> None:
    lease, held = lease_on(Engine(said(90, 1), said(90, 2), said(90, 3)))
    frames = lease.run(ORDER)
    await anext(frames)
    await anext(frames)
    assert (held.tokens, lease.completion_tokens) == (0, 2), "known while it runs"
    await frames.aclose()  # type: ignore[attr-defined]
    assert (held.tokens, held.device_ms) == (92, 5)
    assert (lease.prompt_tokens, lease.completion_tokens) == (90, 2)


async def test_a_caller_that_leaves_before_the_first_word_pays_for_its_input() -> None:
    started = asyncio.Event()

    class Reading(Engine):
        async def run(
            self, ref: ModelRef, device: str, request: EngineRequest, took: Callable[[int], None]
        ) -> AsyncIterator[EngineFrame]:
            started.set()
            await asyncio.Event().wait()
            yield said(1, 1)

    lease, held = lease_on(Reading())

    async def call() -> None:
        async for _ in lease.run(ORDER):
            raise AssertionError("nothing is ever said")

    task = asyncio.create_task(call())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.tokens == 101


@pytest.mark.parametrize(
    "error", [EngineError("context_length_exceeded", "too long"), Refused(RefusalReason.WORKER_DIED, "gone")]
)
async def test_a_request_that_the_engine_did_not_carry_out_costs_no_tokens(error: Exception) -> None:
    lease, held = lease_on(Engine(fails=error))
    with pytest.raises(type(error)):
        await anext(lease.run(ORDER))
    assert held.tokens == 0


async def test_an_engine_that_counts_nothing_is_charged_by_the_estimate() -> None:
    lease, held = lease_on(Engine(EngineFrame({"delta": "a"})))
    assert [frame async for frame in lease.run(ORDER)]
    assert held.tokens == 101


@pytest.mark.parametrize(
    ("header", "count"),
    [
        ({}, None),
        ({"prompt_tokens": "7"}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": float("nan")}, None),
        ({"prompt_tokens": -5, "completion_tokens": 3}, 3),
        ({"prompt_tokens": 10**30}, REQUEST_TOKENS_MAX),
    ],
)
def test_a_worker_can_not_say_anything_else_than_a_bounded_count(
    header: dict[str, str | int | float], count: int | None
) -> None:
    counts = counts_of(EngineFrame(header))
    assert (None if counts is None else sum(counts)) == count


# --- over a restart -----------------------------------------------------------------------------------


class Wall:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


def test_what_is_owed_is_written_now_and_then_and_told_once_after_the_first_plan() -> None:
    wall, owed = Wall(), {"acme": (7, 900)}
    spending = Spending([SpentRow("acme", 5, 800, 400_000)], lambda: owed, wall)
    assert spending.due(at_once=True) is None, "the core knows of nobody before the first plan"
    assert spending.planned() == [SpentFound("acme", 5, 800, 600_000)]
    assert spending.planned() == []
    assert spending.due() == (SpentRow("acme", 7, 900, 1_000_000),)
    wall.ms += int(KEEP_S * 1000) - 1
    assert spending.due() is None
    wall.ms += 1
    owed.clear()
    assert spending.due() == (), "what is paid is taken out of the journal"
    assert spending.due(at_once=True) is None
    wall.ms -= 3_600_000
    owed["acme"] = (1, 0)
    assert spending.due() is not None, "a clock that was set back does not stop the writing"


def test_a_clock_that_was_set_back_forgives_nothing() -> None:
    wall = Wall()
    spending = Spending([SpentRow("acme", 5, 800, wall.ms + 3_600_000)], dict, wall)
    assert spending.planned() == [SpentFound("acme", 5, 800, 0)]


def test_the_journal_keeps_what_is_owed_and_nothing_older(tmp_path: Path) -> None:
    first = open_journal(tmp_path)
    first.save_spent([SpentRow("acme", 1, 2, 3), SpentRow("bolt", 10**40, 5, 6)])
    again = open_journal(tmp_path)
    assert again.spent() == [SpentRow("acme", 1, 2, 3), SpentRow("bolt", SPENT_MAX, 5, 6)]
    again.save_spent([SpentRow("bolt", 7, 8, 9)])
    assert first.spent() == [SpentRow("bolt", 7, 8, 9)]


# --- what callers see ---------------------------------------------------------------------------------

RATES = (
    RateView("requests_per_minute", 60, 10, 59, 361_000),
    RateView("tokens_per_minute", 9000, 9000, -5, 1_500),
    RateView("device_seconds_per_day", 3600, 3600, 7, 9),
)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embeddings", {"model": "acme/embed", "input": [], "x": 1}, 400),
        ("/v1/embeddings", {"model": "acme/nothing", "input": "a"}, 404),
        ("/v1/nothing", {}, 404),
        ("/v1/models", {}, 405),
        ("/v1/embeddings", {"model": "acme/embed", "input": "a" * 1_100_000}, 413),
        ("/v1/embeddings", {"model": "acme/embed", "input": "a"}, 429),
        ("/v1/chat/completions", {"model": "acme/chat", "messages": [{"role": "user", "content": "a"}]}, 503),
    ],
)
async def test_failures_say_what_is_left_too(path: str, body: dict[str, object], status: int) -> None:
    node = FakeNode(rates=RATES)
    node.refused["embed"] = Refused(RefusalReason.RATE, "60 a minute", 999_999)
    node.refused["chat"] = Refused(RefusalReason.WORKER_DIED, "gone", None)
    async with served(node) as url, aiohttp.ClientSession(headers=bearer(node.acme)) as session:
        async with session.post(f"{url}{path}", data=BytesIO(json.dumps(body).encode())) as answer:
            assert answer.status == status, await answer.text()
            assert answer.headers["x-ratelimit-limit-requests"] == "60"
            assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
            assert answer.headers["x-request-id"].startswith("req_")
            error = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if status in (429, 503):
        assert 1 <= int(answer.headers["Retry-After"]) <= 120
        assert 1 <= int(answer.headers["retry-after-ms"]) <= 120_000


async def test_answers_say_what_is_left_of_requests_and_tokens() -> None:
    node = FakeNode(rates=RATES)
    body = {"model": "acme/embed", "input": ["a" * 40]}
    async with served(node) as url, aiohttp.ClientSession(headers=bearer(node.acme)) as session:
        async with session.post(f"{url}/v1/embeddings", json=body) as answer:
            assert answer.status == 200
            headers = {name.lower(): value for name, value in answer.headers.items()}
    assert node.expected_tokens == [11]
    assert {name: value for name, value in headers.items() if name.startswith("x-ratelimit")} == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "6m1s",
        "x-ratelimit-limit-tokens": "9000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1.5s",
    }


async def test_a_limit_that_is_hours_away_is_said_and_not_waited_for() -> None:
    """``Retry-After`` stops at what clients obey; a client that retried then would be refused again."""
    detail = "tenant acme may use 60 device seconds per day; there are some again in 3 h"
    node = FakeNode(refused={"embed": Refused(RefusalReason.DEVICE_TIME, detail, 3 * 3_600_000)})
    async with served(node) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=node.acme, max_retries=2) as api:
            with pytest.raises(openai.RateLimitError, match="again in 3 h") as caught:
                await api.embeddings.create(model="acme/embed", input="a")
    assert caught.value.response.headers["retry-after"] == "120"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert [what for _, what in node.events].count("requested") == 1


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
