"""Several choices, log probabilities and usage as OpenAI's clients see them, over a real socket.

Covers: indexes, ends and counts of choices, whole and streamed, of one prompt and of several; both shapes of
log probabilities; and frames that no engine may send. Does not cover: tokens (``test_generation``), other
fields and refusals (``test_gateway``), or real models (``test_openai_client``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from fake_node import VERSION, FakeNode, served
from gateway_calls import client

from agent.facade import JSON, EngineFrame, EngineRequest
from agent.openai_answers import ANSWER_FIGURES_MAX, token_name

MESSAGES: Any = [{"role": "user", "content": "one two"}]


# --- choices --------------------------------------------------------------------------------------


async def test_every_choice_has_its_index_its_end_and_its_text() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        answer = await api.chat.completions.create(model="acme/chat", messages=MESSAGES, n=3)
    assert [one.index for one in answer.choices] == [0, 1, 2]
    assert {(one.message.content, one.finish_reason) for one in answer.choices} == {("one two ", "stop")}
    assert answer.system_fingerprint == VERSION
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)
    (order,) = node.orders
    assert order.fields["n"] == 3


async def test_choices_of_several_prompts_are_numbered_through() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        answer = await api.completions.create(model="acme/chat", prompt=["one two", "three"], n=2)
        stream = await api.completions.create(
            model="acme/chat",
            prompt=["one two", "three"],
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    texts = ["one two ", "one two ", "three ", "three "]
    assert [(one.index, one.text) for one in answer.choices] == list(enumerate(texts))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
    for index, text in enumerate(texts):
        mine = [one for chunk in chunks for one in chunk.choices if one.index == index]
        assert "".join(one.text for one in mine) == text
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], answer.usage)


async def test_a_stream_of_chat_begins_each_choice_with_its_role() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        stream = await api.chat.completions.create(
            model="acme/chat", messages=MESSAGES, n=2, stream=True, max_tokens=1
        )
        choices = [chunk.choices[0] async for chunk in stream]
    for index in range(2):
        mine = [one for one in choices if one.index == index]
        assert [one.delta.role for one in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(one.delta.content or "" for one in mine) == "one "
        assert mine[-1].finish_reason == "length"


async def test_too_many_answers_in_one_request_are_refused_before_a_lease() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        with pytest.raises(openai.BadRequestError, match="40 answers; the limit is 32") as caught:
            await api.completions.create(model="acme/chat", prompt=["a"] * 5, n=8)
        assert caught.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="best_of") as caught:
            await api.completions.create(model="acme/chat", prompt="a", n=2, best_of=3)
        assert caught.value.param == "best_of"
        assert node.events == []
        assert await api.completions.create(model="acme/chat", prompt="a", n=2, best_of=2)


async def test_every_field_of_sampling_reaches_the_engine() -> None:
    node = FakeNode()
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -100},
        "seed": 3,
    }
    async with served(node) as url, client(url, node.acme) as api:
        await api.completions.create(
            model="acme/chat", prompt="a", **given, extra_body={"top_k": -1, "repetition_penalty": 1.1}
        )
    fields = {**given, "top_k": 0, "repetition_penalty": 1.1, "max_tokens": 16, "stop": [], "prompt": "a"}
    assert node.orders[0].fields == fields


# --- log probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_chat(stream: bool) -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        ask: dict[str, Any] = {
            "model": "acme/chat",
            "messages": MESSAGES,
            "logprobs": True,
            "top_logprobs": 2,
        }
        if stream:
            chunks = [
                chunk.choices[0] async for chunk in await api.chat.completions.create(**ask, stream=True)
            ]
            found = [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content or []]
        else:
            logprobs = (await api.chat.completions.create(**ask)).choices[0].logprobs
            assert logprobs is not None
            assert logprobs.refusal is None
            found = logprobs.content or []
    assert [(one.token, one.logprob, one.bytes) for one in found] == [
        ("one ", -0.5, list(b"one ")),
        ("two ", -0.5, list(b"two ")),
    ]
    assert [(top.token, top.logprob, top.bytes) for top in found[0].top_logprobs] == [
        ("0", -0.25, [48]),
        ("1", -0.5, [49]),
    ]


async def test_chat_without_alternatives_tells_the_tokens_alone() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        answer = await api.chat.completions.create(model="acme/chat", messages=MESSAGES, logprobs=True)
        silent = await api.chat.completions.create(model="acme/chat", messages=MESSAGES)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [one.top_logprobs for one in logprobs.content or []] == [[], []]
    assert silent.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_completions(stream: bool) -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        ask: dict[str, Any] = {"model": "acme/chat", "prompt": "one two", "logprobs": 1}
        if stream:
            chunks = [
                chunk.choices[0].logprobs async for chunk in await api.completions.create(**ask, stream=True)
            ]
            found = [one for one in chunks if one is not None]
        else:
            whole = (await api.completions.create(**ask)).choices[0].logprobs
            assert whole is not None
            found = [whole]
    assert [name for one in found for name in one.tokens or []] == ["one ", "two "]
    assert [figure for one in found for figure in one.token_logprobs or []] == [-0.5, -0.5]
    assert [at for one in found for at in one.text_offset or []] == [0, 4]
    tops = [top for one in found for top in one.top_logprobs or []]
    assert tops == [{"0": -0.25, "one ": -0.5}, {"0": -0.25, "two ": -0.5}]


async def test_an_answer_with_too_many_log_probabilities_is_to_be_streamed() -> None:
    figures: JSON = [{"bytes": "61", "logprob": -1.0, "at": 0, "top": [["61", -1.0]] * 20}] * 1000

    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        for _ in range(ANSWER_FIGURES_MAX // 21_000 + 1):
            yield EngineFrame({"delta": "a" * 1000, "logprobs": figures})
        yield EngineFrame({"finish_reason": "length", "prompt_tokens": 1, "completion_tokens": 1})

    node = FakeNode(script=script)
    async with served(node) as url, client(url, node.acme) as api:
        with pytest.raises(openai.BadRequestError, match="stream it") as caught:
            await api.completions.create(model="acme/chat", prompt="a", logprobs=20)
        assert caught.value.param == "logprobs"
        stream = await api.completions.create(model="acme/chat", prompt="a", logprobs=20, stream=True)
        assert [chunk.choices[0].finish_reason async for chunk in stream][-1] == "length"
    await node.happened("finished", 2)


@pytest.mark.parametrize(
    ("token", "plain", "prefixed"),
    [
        (b"a", "a", "a"),
        ("é".encode(), "é", "é"),
        (b"\xe2\x82", r"\xe2\x82", r"bytes:\xe2\x82"),
        (b"", "", ""),
    ],
)
def test_a_part_of_a_character_is_named_by_its_bytes(token: bytes, plain: str, prefixed: str) -> None:
    assert (token_name(token), token_name(token, "bytes:")) == (plain, prefixed)


# --- engines are not trusted ----------------------------------------------------------------------

END = {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}


async def _ask(api: openai.AsyncOpenAI, stream: bool) -> None:
    """Two choices, read to the end."""
    if stream:
        async for _ in await api.completions.create(model="acme/chat", prompt="a", n=2, stream=True):
            pass
    else:
        await api.completions.create(model="acme/chat", prompt="a", n=2)


@pytest.mark.parametrize(
    "frames",
    [
        [{"delta": "a", "choice": 2}],
        [{"delta": "a", "choice": -1}],
        [{"delta": "a", "choice": "0"}],
        [END],  # one choice of two
        [END, END],
        [{**END, "choice": 1}, {"delta": "a", "choice": 1}, END],
        [{"delta": "a", "logprobs": 7}],
        [{"delta": "a", "logprobs": [{"bytes": "6", "logprob": -1.0, "at": 0, "top": []}]}],
        [{"delta": "a", "logprobs": [{"bytes": "zz", "logprob": -1.0, "at": 0, "top": []}]}],
        [{"delta": "a", "logprobs": [{"bytes": "61", "logprob": None, "at": 0, "top": []}]}],
        [{"delta": "a", "logprobs": [{"bytes": "61", "logprob": -1.0, "at": -1, "top": []}]}],
        [{"delta": "a", "logprobs": [{"bytes": "61", "logprob": -1.0, "at": 0, "top": [["61", -1.0]] * 21}]}],
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_frames_that_can_not_be_are_the_engines_fault(
    frames: list[dict[str, Any]], stream: bool
) -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        for header in frames:
            yield EngineFrame(header)

    node = FakeNode(script=script)
    async with served(node) as url, client(url, node.acme) as api:
        with pytest.raises(openai.APIError) as caught:
            await _ask(api, stream)
    assert caught.value.code == "engine_fault"
    await node.happened("finished")
