"""The unmodified ``openai`` client against one real running stack: through the router and on the node.

Covers: models, embeddings in all forms, text and chat completions whole and streamed, choices, log
probabilities, stops, seeds, usage, headers, the client's exception classes, and a worker that dies in
mid-stream. Does not cover: each refusal (``test_gateway``), tokens against plain ``generate``
(``test_generation``), or rates (``test_rates_running``).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from make_models import make_encoder, make_llama
from real_box import PATIENCE_S, Box, running_box
from test_engines import plain_text

pytestmark = [pytest.mark.clients, pytest.mark.processes, pytest.mark.timeout(600)]

WRITER, ENCODER = "acme/writer", "acme/encoder"
PROMPT = "Hello, what"
MESSAGES: Any = [{"role": "user", "content": "Hello, what"}]
DRAWN: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "max_tokens": 12}
# A tenant with a rate of its own, one whose models may have no room, and for each way one with a worker to
# kill.
OTHERS = ("limited", "small", "victim-router", "victim-node")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openai")


@pytest.fixture(scope="module")
def box(folder: Path) -> Iterator[Box]:
    make_llama(folder / "writer", 2, hidden=64, layers=2, heads=4, positions=4096)
    make_encoder(folder / "encoder", 3, shorter=[16])
    with running_box(folder / "box", devices=("cpu:96MiB",)) as box:
        box.add_tenant("acme")
        box.tenant("acme").push(ENCODER, folder / "encoder")
        box.tenant("acme").push(WRITER, folder / "writer")
        for tenant in OTHERS:
            box.add_tenant(tenant)
            box.tenant(tenant).push(f"{tenant}/writer", folder / "writer")
        box.operator().set_quota("limited", requests_per_minute=1)
        box.operator().set_quota("small", device_max=65_536)
        box.wait_planned(2 + len(OTHERS))
        yield box


@pytest.fixture(params=["router", "node"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(way: str, box: Box) -> str:
    return f"{box.url if way == 'router' else box.gateway_url}/v1"


@pytest.fixture
def api(box: Box, url: str) -> Iterator[openai.OpenAI]:
    with client(url, box.keys["acme"]) as made:
        yield made


def client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE_S)


# --- models and embeddings ------------------------------------------------------------------------


def test_models_are_listed_and_found(api: openai.OpenAI) -> None:
    assert [(model.id, model.object, model.owned_by) for model in api.models.list()] == [
        (ENCODER, "model", "acme"),
        (WRITER, "model", "acme"),
    ]
    assert api.models.retrieve(WRITER).id == WRITER


def test_embeddings_in_every_form_are_the_same(api: openai.OpenAI) -> None:
    floats = api.embeddings.create(model=ENCODER, input=["hello horses", "stew"], encoding_format="float")
    packed = api.embeddings.create(model=ENCODER, input=["hello horses", "stew"])
    assert [one.embedding for one in packed.data] == [one.embedding for one in floats.data]
    assert [one.index for one in floats.data] == [0, 1]
    assert floats.usage == packed.usage
    alone = api.embeddings.create(model=ENCODER, input="stew")
    assert alone.data[0].embedding == pytest.approx(floats.data[1].embedding, abs=1e-6)
    tokens = [2, 17, 18, 3]
    one, several = (
        api.embeddings.create(model=ENCODER, input=form).data[0].embedding
        for form in (tokens, [tokens, [2, 3]])
    )
    assert one == pytest.approx(several, abs=1e-6)
    assert api.embeddings.create(model=ENCODER, input=[tokens, [2, 3]]).usage.prompt_tokens == 6


def test_embeddings_are_cut_where_the_model_says_so(api: openai.OpenAI) -> None:
    whole = api.embeddings.create(model=ENCODER, input="stew", dimensions=32).data[0].embedding
    cut = api.embeddings.create(model=ENCODER, input="stew", dimensions=16).data[0].embedding
    length = sum(one * one for one in whole[:16]) ** 0.5
    assert cut == pytest.approx([one / length for one in whole[:16]], abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="one of 16, or 32") as caught:
        api.embeddings.create(model=ENCODER, input="stew", dimensions=8)
    assert caught.value.param == "dimensions"


# --- writing --------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_plain_transformers(api: openai.OpenAI, folder: Path) -> None:
    answer = api.completions.create(model=WRITER, prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == plain_text(folder / "writer", PROMPT, 24)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24 or answer.choices[0].finish_reason == "stop"


def test_a_seed_repeats_streamed_or_not_and_choices_are_the_next_seeds(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model=WRITER, messages=MESSAGES, n=3, **DRAWN)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    used = 0
    for index, text in enumerate(texts):
        alone = api.chat.completions.create(
            model=WRITER, messages=MESSAGES, **{**DRAWN, "seed": DRAWN["seed"] + index}
        )
        assert (alone.choices[0].message.content, alone.choices[0].finish_reason) == (
            text,
            whole.choices[index].finish_reason,
        )
        assert alone.usage is not None
        used += alone.usage.completion_tokens
    assert whole.usage is not None
    assert whole.usage.completion_tokens == used
    stream = api.chat.completions.create(
        model=WRITER,
        messages=MESSAGES,
        n=3,
        stream=True,
        stream_options={"include_usage": True},
        **DRAWN,
    )
    chunks = list(stream)
    for index, text in enumerate(texts):
        mine = [one for chunk in chunks for one in chunk.choices if one.index == index]
        assert "".join(one.delta.content or "" for one in mine) == text
        assert mine[-1].finish_reason == whole.choices[index].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_log_probabilities_of_chat_whole_and_streamed(api: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": WRITER,
        "messages": MESSAGES,
        "logprobs": True,
        "top_logprobs": 3,
        **DRAWN,
    }
    choice = api.chat.completions.create(**ask).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    said = b"".join(bytes(one.bytes or []) for one in content)
    assert said.decode(errors="replace") == choice.message.content
    for one in content:
        best = [top.logprob for top in one.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
        assert one.logprob <= best[0] <= 0
    chunks = [chunk.choices[0] for chunk in api.chat.completions.create(**ask, stream=True)]
    assert [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content or []] == content


def test_log_probabilities_of_completions(api: openai.OpenAI) -> None:
    answer = api.completions.create(model=WRITER, prompt=PROMPT, logprobs=2, temperature=0, max_tokens=6)
    figures = answer.choices[0].logprobs
    assert figures is not None
    assert figures.token_logprobs is not None
    assert figures.top_logprobs is not None
    for token, logprob, top in zip(
        figures.tokens or [], figures.token_logprobs, figures.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()), "greedy takes the likeliest"
    assert len(figures.text_offset or []) == len(figures.tokens or []) > 0


def test_a_stop_string_is_never_seen(api: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": WRITER, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    whole = api.completions.create(**ask).choices[0].text
    stop = whole[5:8]
    cut = whole[: whole.index(stop)]
    answer = api.completions.create(**ask, stop=[stop, "nowhere"], logprobs=0).choices[0]
    assert (answer.text, answer.finish_reason) == (cut, "stop")
    assert answer.logprobs is not None
    assert all(at < len(cut) for at in answer.logprobs.text_offset or [])
    chunks = [chunk.choices[0] for chunk in api.completions.create(**ask, stop=stop, stream=True)]
    assert ("".join(one.text for one in chunks), chunks[-1].finish_reason) == (cut, "stop")


async def test_the_asynchronous_client_asks_many_at_a_time(box: Box, url: str) -> None:
    async def write(api: openai.AsyncOpenAI, seed: int) -> str:
        stream = await api.chat.completions.create(
            model=WRITER, messages=MESSAGES, stream=True, **{**DRAWN, "seed": seed}
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with openai.AsyncOpenAI(base_url=url, api_key=box.keys["acme"], timeout=PATIENCE_S) as api:
        alone = [await write(api, seed) for seed in range(3)]
        embedded = asyncio.create_task(api.embeddings.create(model=ENCODER, input=["stew"] * 3))
        together = await asyncio.gather(*(write(api, seed % 3) for seed in range(6)))
        vectors = await embedded
        models = [model.id async for model in api.models.list()]
    assert together == alone + alone
    assert len(vectors.data) == 3
    assert models == [ENCODER, WRITER]


# --- headers and errors ---------------------------------------------------------------------------


def test_every_answer_has_a_request_id_and_says_where_it_comes_from(api: openai.OpenAI) -> None:
    raw = api.embeddings.with_raw_response.create(model=ENCODER, input="stew")
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["x-bunkhouse-node"] == "box"
    assert raw.headers["x-bunkhouse-tier"] in ("device", "host", "disk", "origin")
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("acme/nothing")
    assert (caught.value.request_id or "").startswith("req_")


def test_errors_are_the_clients_own_classes(box: Box, url: str, api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools") as bad:
        api.chat.completions.create(
            model=WRITER, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "tools",
        "unsupported_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="model's context of 4096") as long:
        api.completions.create(model=WRITER, prompt="a", max_tokens=5000)
    assert (long.value.param, long.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.AuthenticationError) as stranger:
        client(url, "bk_nobody").models.list()
    assert stranger.value.code == "invalid_api_key"
    for model in ("acme/nothing", "small/writer"):
        with pytest.raises(openai.NotFoundError) as absent:
            api.completions.create(model=model, prompt="a")
        assert (absent.value.param, absent.value.code) == ("model", "model_not_found")
    with client(url, box.keys["small"]) as small, pytest.raises(openai.InternalServerError) as room:
        small.completions.create(model="small/writer", prompt="a")
    assert (room.value.status_code, room.value.response.headers["x-should-retry"]) == (507, "false")


def _write_until_refused(api: openai.OpenAI) -> None:
    for _ in range(3):
        raw = api.completions.with_raw_response.create(model="limited/writer", prompt="a", max_tokens=1)
        assert raw.headers["x-ratelimit-limit-requests"] == "1"


def test_a_rate_is_an_error_of_its_own_with_the_time_to_come_back(box: Box, url: str) -> None:
    with client(url, box.keys["limited"]) as api, pytest.raises(openai.RateLimitError) as caught:
        _write_until_refused(api)
    headers = caught.value.response.headers
    assert 1 <= int(headers["retry-after"]) <= 120
    assert 0 < int(headers["retry-after-ms"]) <= 120_000
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("1", "0")
    assert headers["x-ratelimit-reset-requests"]
    assert headers["x-request-id"]
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")


def test_a_worker_that_dies_in_mid_stream_is_one_error_and_then_answers_again(
    box: Box, url: str, way: str
) -> None:
    tenant = f"victim-{way}"
    ask: dict[str, Any] = {"model": f"{tenant}/writer", "prompt": PROMPT, "temperature": 0}
    others = set(box.worker_pids())
    with client(url, box.keys[tenant]) as api:
        first = api.completions.create(**ask, max_tokens=4).choices[0].text
        (worker,) = set(box.worker_pids()) - others
        # The end of text is forbidden, so that it would write for seconds.
        stream = iter(api.completions.create(**ask, max_tokens=4000, stream=True, logit_bias={"0": -100}))
        next(stream)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "worker_died"
        assert api.completions.create(**ask, max_tokens=4).choices[0].text == first
