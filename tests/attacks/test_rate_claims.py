"""Threat: claims about tokens and limits that are absurd, from callers, operators' scripts and workers.

Covers: what a body may claim it will take, quotas that are no numbers, and a worker that says it used more
or less than can be. Does not cover: the arithmetic (``test_rates``) or keys (``test_control_auth``).
"""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest
from fake_node import FakeNode, served
from running_control import running
from scene import Scene, model, of, the

from agent.facade import EngineFrame
from agent.metering import OUTPUT_TOKENS_RESERVED_MAX, counts_of
from agent.openai_shapes import CHOICES_MAX, OUTPUT_TOKENS_MAX, PROMPT_CHOICES_MAX, PROMPTS_MAX
from packer.events import Grant, Refuse, TookLate
from packer.http import JSON_BYTES_MAX
from packer.rates import REQUEST_TOKENS_MAX
from packer.types import TenantQuota

RATES = ("requests_per_minute", "tokens_per_minute", "restores_per_minute", "device_seconds_per_day")


@pytest.mark.parametrize("claim", ["-1", "0", "1e309", "NaN", "Infinity", "9" * 400, "true", '"9"', "1.5"])
async def test_a_body_can_not_claim_an_absurd_answer(claim: str) -> None:
    """Refused by name before anything is reserved for it."""
    node = FakeNode()
    body = f'{{"model": "acme/chat", "prompt": "a", "max_tokens": {claim}}}'
    headers = {"Authorization": f"Bearer {node.acme}", "Content-Type": "application/json"}
    async with served(node) as url, aiohttp.ClientSession(headers=headers) as session:
        async with session.post(f"{url}/v1/completions", data=body) as answer:
            assert answer.status == 400
            assert json.loads(await answer.read())["error"]["message"]
    assert node.expected_tokens == []


async def test_the_largest_claim_reserves_a_bounded_number_of_tokens() -> None:
    node = FakeNode()
    body = {"model": "acme/chat", "prompt": ["a b"] * PROMPTS_MAX, "max_tokens": 1_000_000}
    async with served(node) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {node.acme}"}
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
            assert answer.status == 200
    (expected,) = node.expected_tokens
    assert expected == PROMPTS_MAX * (OUTPUT_TOKENS_RESERVED_MAX + 1) < REQUEST_TOKENS_MAX


async def test_the_largest_claim_of_choices_reserves_a_bounded_number_of_tokens() -> None:
    node = FakeNode()
    body: dict[str, object] = {"model": "acme/chat", "max_tokens": 1_000_000, "n": PROMPT_CHOICES_MAX}
    most = CHOICES_MAX // PROMPT_CHOICES_MAX
    async with served(node) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {node.acme}"}
        for prompts, status in ((most, 200), (most + 1, 400), (PROMPTS_MAX, 400)):
            asked = body | {"prompt": ["a b"] * prompts}
            async with session.post(f"{url}/v1/completions", json=asked, headers=headers) as answer:
                assert answer.status == status
    (expected,) = node.expected_tokens
    assert expected == most + CHOICES_MAX * OUTPUT_TOKENS_RESERVED_MAX
    # What such a request may really take is counted to the last token.
    assert JSON_BYTES_MAX + CHOICES_MAX * OUTPUT_TOKENS_MAX < REQUEST_TOKENS_MAX


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1", "9" * 4000, "[1]", "{}"])
async def test_a_limit_that_is_no_number_is_refused_and_nothing_changes(tmp_path: Path, value: str) -> None:
    async with running(tmp_path / "control") as control, aiohttp.ClientSession() as session:
        await control.tenant("acme")
        url = f"{control.url}/api/v1/tenants/acme/quota"
        before = (await control.call("GET", "/api/v1/tenants/acme/quota")).json()
        headers = {"Authorization": f"Bearer {control.operator_key}", "Content-Type": "application/json"}
        for method in ("PATCH", "PUT"):
            for name in RATES:
                body = f'{{"weight": 7, "{name}": {value}}}'
                async with session.request(method, url, data=body, headers=headers) as answer:
                    assert answer.status == 400, (method, name)
        assert (await control.call("GET", "/api/v1/tenants/acme/quota")).json() == before


@pytest.mark.parametrize("count", [-(2**70), -1, 2**62, 2**70])
def test_a_worker_that_lies_hurts_its_own_tenant_at_the_most(count: int) -> None:
    mine, other = model("acme/m", 10), model("bolt/m", 10)
    limits = TenantQuota(tokens_per_minute=1_000, device_seconds_per_day=1_000)
    scene = Scene(mine, other, quotas={"acme": limits, "bolt": limits})
    scene.settle(scene.ask(mine, tokens=5))
    counted = counts_of(EngineFrame({"prompt_tokens": count, "completion_tokens": count}))
    scene.finish(1, device_ms=1, tokens=sum(counted or ()))
    scene.feed(TookLate("acme", count))
    scene.feed(TookLate("nobody", count))
    own = scene.ask(mine)
    assert bool(of(own, Refuse)) == (count > 0)
    tokens_ms = 2 * REQUEST_TOKENS_MAX * 60
    assert all((refusal.retry_ms or 0) <= tokens_ms for refusal in of(own, Refuse)), "it ends one day"
    scene.settle(scene.ask(other, tokens=5))
    scene.finish(scene.requests, tokens=3)
    assert the(scene.ask(other), Grant)
