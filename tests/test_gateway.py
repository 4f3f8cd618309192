"""The node's gateway over real sockets, driven by the unmodified ``openai`` client and by plain HTTP.

Covers: every route's answer, headers and refusals. Does not cover: streams that wait, fail or lose their
caller (``test_gateway_streams``), callers without a right to ask (``attacks/test_gateway_auth.py``), paths
and hostile bodies (``attacks/test_gateway_paths.py``, ``attacks/test_gateway_bodies.py``), or real models.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from fake_node import DIMENSIONS, OLDER, FakeNode, served, too_long, vector_of
from gateway_calls import chat_body, client, post

from agent.facade import EngineFrame, EngineRequest, Refused
from agent.guard import duration_text
from packer.events import RefusalReason
from packer.http import REFUSAL_STATUS, check_key, make_key, parse_key
from packer.types import KeySpec, Tier

# --- models and embeddings ------------------------------------------------------------------------------


async def test_models_lists_only_the_callers_tenant_latest_first() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        ids = [model.id async for model in await api.models.list()]
    assert ids == ["acme/chat", "acme/embed", f"acme/embed@{OLDER}", "acme/moods"]


async def test_one_model_by_raw_and_encoded_slash() -> None:
    """``openai`` encodes the slash of a model's name; other clients do not. Both find it."""
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        assert (await api.models.retrieve("acme/embed")).owned_by == "acme"
        assert (await api.models.retrieve(f"acme/embed@{OLDER}")).id == f"acme/embed@{OLDER}"
        async with aiohttp.ClientSession() as session:
            headers = {"Authorization": f"Bearer {node.acme}"}
            async with session.get(f"{url}/v1/models/acme/embed", headers=headers) as answer:
                assert (await answer.json())["id"] == "acme/embed"


async def test_embeddings_base64_and_float_agree_to_the_bit() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        default = await api.embeddings.create(model="acme/embed", input=["a", "b"])
        floats = await api.embeddings.create(model="acme/embed", input=["a", "b"], encoding_format="float")
    assert [one.embedding for one in default.data] == [vector_of("a"), vector_of("b")]
    assert [one.embedding for one in floats.data] == [vector_of("a"), vector_of("b")]
    assert [one.index for one in default.data] == [0, 1]
    assert default.usage.prompt_tokens == default.usage.total_tokens == 6


async def test_every_form_of_input_reaches_the_engine_as_a_list() -> None:
    node = FakeNode()
    forms: list[Any] = ["text", ["a", "b"], [1, 2, 3], [[1], [2, 3]]]
    async with served(node) as url, client(url, node.acme) as api:
        for form in forms:
            await api.embeddings.create(model="acme/embed", input=form)
    seen = [order.fields["inputs"] for order in node.orders]
    assert seen == [["text"], ["a", "b"], [[1, 2, 3]], [[1], [2, 3]]]


async def test_a_long_list_of_tokens_is_one_input_not_too_many() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        await api.embeddings.create(model="acme/embed", input=list(range(5000)))
    assert len(node.orders) == 1


async def test_a_large_answer_is_complete() -> None:
    """2,048 inputs, the limit: the answer is written on a thread and still in order."""
    node = FakeNode()
    inputs = [f"text {i}" for i in range(2048)]
    async with served(node) as url, client(url, node.acme) as api:
        found = await api.embeddings.create(model="acme/embed", input=inputs, encoding_format="float")
    assert [one.embedding for one in found.data] == [vector_of(one) for one in inputs]


async def test_dimensions_must_be_the_models_own() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        await api.embeddings.create(model="acme/embed", input="a", dimensions=DIMENSIONS)
        with pytest.raises(openai.BadRequestError, match="gives 8 and can not be shortened") as caught:
            await api.embeddings.create(model="acme/embed", input="a", dimensions=4)
    assert caught.value.param == "dimensions"


async def test_classify_answers_in_vllms_shape() -> None:
    node = FakeNode()
    async with served(node) as url:
        status, _, answer = await post(
            url, "/v1/classify", node.acme, {"model": "acme/moods", "input": ["a", "b"]}
        )
    assert status == 200
    item = {"index": 1, "label": "positive", "probs": [0.25, 0.75], "num_classes": 2}
    assert answer["data"][1] == item
    assert answer["labels"] == ["negative", "positive"]
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2, "completion_tokens": 0}


# --- generation -----------------------------------------------------------------------------------------


async def test_chat_answers_whole() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        answer = await api.chat.completions.create(
            model="acme/chat",
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "one two"}]},
            ],
            max_completion_tokens=3,
            temperature=0,
            top_p=0.5,
            seed=7,
            stop=["x"],
        )
    assert answer.choices[0].message.content == "be brief one "
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        4,
        3,
        7,
    )
    fields = dict(node.orders[0].fields)
    assert fields.pop("messages") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two"},
    ]
    assert fields == {"max_tokens": 3, "temperature": 0.0, "top_p": 0.5, "seed": 7, "stop": ["x"]}


async def test_chat_streams_with_usage_last() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        stream = await api.chat.completions.create(
            model="acme/chat",
            messages=[{"role": "user", "content": "one two"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "one two "
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_synchronous_client_streams_too() -> None:
    """``OpenAI`` in a thread, as most callers use it, while the server's loop runs in this one."""

    def ask(url: str, key: str) -> str:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as api:
            stream = api.completions.create(model="acme/chat", prompt="one two", stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

    async def run() -> str:
        node = FakeNode()
        async with served(node) as url:
            return await asyncio.to_thread(ask, url, node.acme)

    assert asyncio.run(run()) == "one two "


async def test_completions_takes_several_prompts_in_order() -> None:
    node = FakeNode()
    async with served(node) as url, client(url, node.acme) as api:
        answer = await api.completions.create(model="acme/chat", prompt=["one two", "three"])
        stream = await api.completions.create(model="acme/chat", prompt=["one two", "three"], stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
    assert [(one.index, one.text) for one in answer.choices] == [(0, "one two "), (1, "three ")]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 6
    assert "".join(one.text for one in chunks if one.index == 0) == "one two "
    assert "".join(one.text for one in chunks if one.index == 1) == "three "
    # What the caller did not say is the model's own to decide, but for OpenAI's default length.
    assert node.orders[0].fields == {"prompt": "one two", "max_tokens": 16, "stop": []}


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("n", chat_body(n=9)),
        ("n", chat_body(n=0)),
        ("tools", chat_body(tools=[{"type": "function"}])),
        ("response_format", chat_body(response_format={"type": "json_object"})),
        ("tool_choice", chat_body(tool_choice={"type": "function", "function": {"name": "f"}})),
        ("audio", chat_body(audio={"voice": "x"})),
        ("web_search_options", chat_body(web_search_options={})),
        ("logprobs", chat_body(logprobs=3)),
        ("top_logprobs", chat_body(top_logprobs=3)),
        ("top_logprobs", chat_body(logprobs=True, top_logprobs=21)),
        ("presence_penalty", chat_body(presence_penalty=2.5)),
        ("frequency_penalty", chat_body(frequency_penalty=-2.5)),
        ("logit_bias", chat_body(logit_bias={str(i): 1 for i in range(1025)})),
        ("logit_bias", chat_body(logit_bias={"5": 101})),
        ("logit_bias", chat_body(logit_bias={"5": None})),
        ("logit_bias", chat_body(logit_bias={"hello": 1})),
        ("logit_bias", chat_body(logit_bias={"-1": 1})),
        ("logit_bias", chat_body(logit_bias={"\u0665": 1})),
        ("repetition_penalty", chat_body(repetition_penalty=0)),
        ("min_p", chat_body(min_p=0.1)),
        ("guided_json", chat_body(guided_json={})),
        ("ignore_eos", chat_body(ignore_eos=True)),
        ("stream_options", chat_body(stream_options={"include_usage": True})),
        ("stop", chat_body(stop=["a", "b", "c", "d", "e"])),
        ("stop", chat_body(stop="")),
        ("temperature", chat_body(temperature=2.5)),
        ("top_p", chat_body(top_p=0)),
        ("max_tokens", chat_body(max_tokens=0)),
        ("max_completion_tokens", chat_body(max_tokens=1, max_completion_tokens=2)),
        ("seed", chat_body(seed=2**70)),
        ("messages", chat_body(messages=[])),
        ("messages[0].role", chat_body(messages=[{"role": "tool", "content": "x"}])),
        ("messages", {"model": "acme/chat"}),
        ("messages[0].role", chat_body(messages=[{"content": "x"}])),
        ("messages[0].content", chat_body(messages=[{"role": "user", "content": []}])),
        ("messages[0].content", chat_body(messages=[{"role": "user"}])),
        (
            "messages[0].tool_calls",
            chat_body(messages=[{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]),
        ),
        ("model", {"messages": [{"role": "user", "content": "x"}]}),
        ("stop[4]", chat_body(stop=["a", "b", "c", "d", None])),
        ("seed", chat_body(seed=-(2**63) - 1)),
        ("max_tokens", chat_body(max_tokens=10**30)),
        ("max_tokens", chat_body(max_tokens=1.5)),
        ("n", chat_body(n=129)),
        ("stream", chat_body(stream="yes")),
        ("stream_options.include_usage", chat_body(stream=True, stream_options={"include_usage": 1})),
        (
            "messages[0].content[0]",
            chat_body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        ),
        ("model", chat_body(model="acme/embed")),
    ],
)
async def test_what_can_not_be_honoured_is_refused_by_name_before_a_lease(field: str, body: object) -> None:
    node = FakeNode()
    async with served(node) as url:
        status, _, answer = await post(url, "/v1/chat/completions", node.acme, body)
    assert status == 400
    assert answer["error"]["param"] == field
    assert answer["error"]["message"].startswith(field)
    assert node.events == []


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("embeddings", "input", {"model": "acme/embed", "input": ""}),
        ("embeddings", "input[1]", {"model": "acme/embed", "input": ["a", ""]}),
        ("embeddings", "input", {"model": "acme/embed"}),
        ("completions", "prompt", {"model": "acme/chat"}),
        ("completions", "prompt", {"model": "acme/chat", "prompt": None}),
        ("completions", "prompt[0]", {"model": "acme/chat", "prompt": [[]]}),
        ("completions", "logprobs", {"model": "acme/chat", "prompt": "a", "logprobs": -1}),
        ("completions", "best_of", {"model": "acme/chat", "prompt": "a", "best_of": 0}),
    ],
)
async def test_odd_inputs_are_refused_by_name(path: str, field: str, body: object) -> None:
    node = FakeNode()
    async with served(node) as url:
        status, _, answer = await post(url, f"/v1/{path}", node.acme, body)
    assert (status, answer["error"]["param"]) == (400, field)
    assert node.events == []


@pytest.mark.parametrize("content", [b'"\\ud83d"', b'"\xed\xa0\xbd"', b'"\xff"', b"NaN", b'"a', b"[" * 5000])
async def test_what_is_no_text_is_refused(content: bytes) -> None:
    node = FakeNode()
    body = b'{"model": "acme/chat", "messages": [{"role": "user", "content": %s}]}' % content
    async with served(node) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {node.acme}", "Content-Type": "application/json"}
        async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
            told = (await answer.json())["error"]
    assert (answer.status, told["type"]) == (400, "invalid_request_error")
    assert node.events == []


async def test_fields_that_ask_for_nothing_are_accepted() -> None:
    body = chat_body(
        n=1,
        tools=[],
        response_format={"type": "text"},
        logprobs=False,
        frequency_penalty=0,
        top_p=None,
        min_p=0,
        tool_choice="auto",
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="p",
        parallel_tool_calls=True,
        reasoning_effort="low",
        a_field_of_next_year={"x": [1]},
    )
    node = FakeNode()
    async with served(node) as url:
        status, _, _ = await post(url, "/v1/chat/completions", node.acme, body)
    assert status == 200


# --- headers --------------------------------------------------------------------------------------------


async def test_answers_carry_where_they_came_from() -> None:
    node = FakeNode(tier=Tier.HOST, restore_ms=12)
    async with served(node) as url:
        for path, body in (
            ("/v1/embeddings", {"model": "acme/embed", "input": "a"}),
            ("/v1/chat/completions", chat_body()),
        ):
            _, headers, _ = await post(url, path, node.acme, body)
            assert headers["x-bunkhouse-node"] == "box-1"
            assert headers["x-bunkhouse-tier"] == "host"
            assert headers["x-bunkhouse-restore-ms"] == "12"
            assert headers["x-bunkhouse-restored-bytes"] == "4096"
            assert headers["x-request-id"] in {request_id for request_id, _ in node.events}


async def test_streams_carry_the_same_headers_and_no_limit_has_no_header() -> None:
    node = FakeNode()
    async with served(node) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {node.acme}"}
        body = chat_body(stream=True)
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
            text = await answer.text()
            assert answer.content_type == "text/event-stream"
            assert answer.headers["x-bunkhouse-tier"] == "disk"
            assert not any(name.lower().startswith("x-ratelimit") for name in answer.headers)
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("span_ms", "written"),
    [(0, "0ms"), (12, "12ms"), (1000, "1s"), (1500, "1.5s"), (360_000, "6m0s"), (3_723_000, "1h2m3s")],
)
def test_durations_are_written_as_openai_writes_them(span_ms: int, written: str) -> None:
    assert duration_text(span_ms) == written


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(RefusalReason))
@pytest.mark.parametrize("stream", [False, True])
async def test_every_refusal_has_its_status_and_tells_when_to_come_back(
    reason: RefusalReason, stream: bool
) -> None:
    """A refused stream that has said nothing yet is a plain error, not an event."""
    node = FakeNode(refused={"chat": Refused(reason, "needs 9 of 5 bytes", 1234)})
    async with served(node) as url:
        status, headers, answer = await post(url, "/v1/chat/completions", node.acme, chat_body(stream=stream))
    shape = REFUSAL_STATUS[reason]
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (
        shape.status,
        shape.code,
        shape.kind,
    )
    if reason is RefusalReason.UNKNOWN_MODEL:
        assert "retry-after" not in headers
        return
    assert answer["error"]["message"] == "needs 9 of 5 bytes"
    assert headers["x-should-retry"] == ("true" if shape.retryable else "false")
    if shape.retryable:
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1234")
    else:
        assert "retry-after" not in headers


async def test_refusal_reasons_are_all_mapped() -> None:
    assert set(REFUSAL_STATUS) == set(RefusalReason)


@pytest.mark.parametrize(
    ("retry_ms", "seconds", "exact"), [(None, "1", "1000"), (0, "1", "1"), (999_999, "120", "120000")]
)
async def test_retry_after_is_never_zero_nor_beyond_what_the_client_obeys(
    retry_ms: int | None, seconds: str, exact: str
) -> None:
    node = FakeNode(refused={"embed": Refused(RefusalReason.RATE, "60 a minute", retry_ms)})
    async with served(node) as url:
        body = {"model": "acme/embed", "input": "a"}
        status, headers, _ = await post(url, "/v1/embeddings", node.acme, body)
    assert (status, headers["retry-after"], headers["retry-after-ms"]) == (429, seconds, exact)


async def test_the_openai_client_obeys_should_retry() -> None:
    """A passing refusal is retried at once by the client itself, an impossible one is not."""
    node = FakeNode(
        refused={
            "chat": Refused(RefusalReason.WORKER_DIED, "gone", 1),
            "embed": Refused(RefusalReason.NEVER_FITS, "needs 9 of 5 bytes"),
        }
    )
    async with served(node) as url, client(url, node.acme, retries=2) as api:
        with pytest.raises(openai.InternalServerError, match="gone"):
            await api.completions.create(model="acme/chat", prompt="a")
        assert [what for _, what in node.events].count("requested") == 3
        with pytest.raises(openai.APIStatusError, match="needs 9 of 5 bytes") as caught:
            await api.embeddings.create(model="acme/embed", input="a")
        assert caught.value.status_code == 507
        assert [what for _, what in node.events].count("requested") == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_names_the_callers_field(stream: bool) -> None:
    node = FakeNode(script=too_long("tokens[1]"))
    async with served(node) as url:
        body = {"model": "acme/chat", "prompt": [1, 2], "stream": stream}
        status, headers, answer = await post(url, "/v1/completions", node.acme, body)
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["param"] == "prompt[1]"
    assert answer["error"]["message"] == "prompt[1]: 9 tokens; the model reads at most 8"
    assert headers["x-bunkhouse-tier"] == "disk"
    await node.happened("finished")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_limit_is_named_as_the_caller_named_it(stream: bool, name: str) -> None:
    node = FakeNode(script=too_long("max_tokens"))
    async with served(node) as url, client(url, node.acme) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            await api.chat.completions.create(
                model="acme/chat",
                messages=[{"role": "user", "content": "a"}],
                stream=stream,
                extra_body={name: 9},
            )
    assert (caught.value.param, caught.value.code) == (name, "context_length_exceeded")


@pytest.mark.parametrize(
    ("path", "model", "header", "body"),
    [
        ("embeddings", "acme/embed", {"count": 2, "dimensions": 8, "prompt_tokens": 1}, bytes(64)),
        ("embeddings", "acme/embed", {"count": 1, "dimensions": 8, "prompt_tokens": 1}, bytes(31)),
        ("embeddings", "acme/embed", {"count": 1, "dimensions": -8, "prompt_tokens": 1}, bytes(32)),
        ("embeddings", "acme/embed", {}, b""),
        ("classify", "acme/moods", {"labels": [], "prompt_tokens": 1}, b""),
        ("classify", "acme/moods", {"labels": ["a"], "prompt_tokens": "x"}, bytes(4)),
        ("completions", "acme/chat", {"delta": 7}, b""),
        ("completions", "acme/chat", {"delta": "never ends with a reason"}, b""),
        ("completions", "acme/chat", {"finish_reason": "stop"}, b""),
    ],
)
async def test_a_worker_that_answers_nonsense_is_a_clean_500(
    path: str, model: str, header: dict[str, Any], body: bytes
) -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        yield EngineFrame(header, body)

    node = FakeNode(script=script)
    async with served(node) as url:
        ask = {"model": model, "prompt" if path == "completions" else "input": "a"}
        status, _, answer = await post(url, f"/v1/{path}", node.acme, ask)
    assert status == 500
    assert answer["error"]["code"] == "engine_fault"
    await node.happened("finished")


async def test_a_fault_in_the_node_is_a_500_that_logs_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineFrame]:
        if request.op:
            raise RuntimeError(f"while running {request.fields}")
        yield EngineFrame()

    node = FakeNode(script=script)
    async with served(node) as url:
        body = {"model": "acme/embed", "input": "canary-3141"}
        status, headers, answer = await post(url, "/v1/embeddings", node.acme, body)
    assert status == 500
    assert headers["x-request-id"] in answer["error"]["message"]
    assert headers["x-request-id"] in caplog.text
    assert "canary" not in caplog.text + json.dumps(answer)
    assert node.acme not in caplog.text


# --- health, and keys ------------------------------------------------------------------------------------


async def test_health_and_readiness_need_no_key() -> None:
    node = FakeNode()
    async with served(node) as url, aiohttp.ClientSession() as session:
        for path, ready, status in (
            ("/healthz", False, 200),
            ("/readyz", False, 503),
            ("/readyz", True, 200),
        ):
            node.is_ready = ready
            async with session.get(url + path) as answer:
                assert answer.status == status
        async with session.get(f"{url}/metrics") as answer:
            assert "bunkhouse_up 1" in await answer.text()


def test_a_made_key_parses_and_checks_only_with_its_own_secret() -> None:
    key, other = make_key(), make_key()
    assert parse_key(key.text) == key
    keys = {key.key_id: KeySpec(key.key_id, key.secret_sha256, "acme", expires_ms=10)}
    assert check_key(keys, key.text, 9) == keys[key.key_id]
    assert check_key(keys, key.text, 10) is None
    assert check_key(keys, other.text, 9) is None
    assert check_key(keys, f"bk_{key.key_id}_{other.secret}", 9) is None
    assert key.secret not in repr(key)


def test_vectors_of_the_fake_are_exact_float32() -> None:
    """Guards the tests above: a fake that rounds would hide a gateway that does."""
    assert all(struct.unpack("<f", struct.pack("<f", one))[0] == one for one in vector_of("a"))
