"""The SDK against a fake control server on a real socket: calls, errors, retries, streams, imports.

Pushes have their own file (``test_sdk_push``), the command line too (``test_cli``).
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fake_control import OPERATOR_KEY, FakeControl, Fault, serving

import bunkhouse
from bunkhouse import _async_client, _client
from bunkhouse._request import Answer, Request, resolve_address, retry_after_s
from bunkhouse._retry import RetryBudget, RetryPolicy, Tries
from bunkhouse._stream import SseDecoder

SDK = Path(bunkhouse.__file__).parents[1]


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def url(control: FakeControl) -> Iterator[str]:
    with serving(control) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[bunkhouse.Client]:
    # Retries stay on; the waits are what the fake asks for, which is next to nothing.
    with bunkhouse.Client(url, OPERATOR_KEY, retry=RetryPolicy(backoff_s=0.001)) as made:
        yield made


# --- calls


def test_embed_returns_vectors_in_the_order_of_the_inputs(client: bunkhouse.Client) -> None:
    """Base64 float32 is decoded exactly, and rows are ordered by index."""
    answer = client.embed("acme/minilm", ["one", "two"])
    assert [vector[2] for vector in answer.vectors] == [0.0, 1.0]
    assert answer.vectors[0][:2] == [0.10000000149011612, -2.5]
    assert answer.served == bunkhouse.Served("req-1", "local", "disk", 42)
    assert answer.prompt_tokens == 5


def test_embed_sends_token_ids_as_they_are(client: bunkhouse.Client, control: FakeControl) -> None:
    client.embed("acme/minilm", ([1, 2, 3], [4]))
    assert control.bodies[-1]["input"] == [[1, 2, 3], [4]]
    assert "dimensions" not in control.bodies[-1]


def test_chat_complete_and_classify(client: bunkhouse.Client, control: FakeControl) -> None:
    """A string is one user message, and only what was given is sent."""
    chat = client.chat("acme/writer", "hello", max_tokens=5, stop=("\n",))
    assert (chat.text, chat.finish_reason, chat.completion_tokens) == ("Hi", "stop", 2)
    assert control.bodies[-1] == {
        "model": "acme/writer",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 5,
        "stop": ["\n"],
    }
    assert client.complete("acme/writer", "hello", temperature=0).text == " there"
    assert control.bodies[-1] == {"model": "acme/writer", "prompt": "hello", "temperature": 0}
    assert client.classify("acme/mood", "fine").labels == (bunkhouse.Label("good", (0.25, 0.75)),)


def test_operators_calls(client: bunkhouse.Client, control: FakeControl) -> None:
    """Tenants, keys, quotas, nodes and tokens go there and back."""
    assert client.create_tenant("acme").tenant == "acme"
    assert [row.tenant for row in client.tenants()] == ["acme"]
    key = client.create_key("acme", label="ci", ttl_s=60)
    assert key.key.startswith(f"bk_{key.key_id}_")
    assert key.key not in repr(key)
    assert client.keys("acme")[0].label == "ci"
    quota = client.set_quota("acme", device_max=100, requests_per_minute=30).quota
    assert (quota.device, quota.requests_per_minute) == (bunkhouse.ByteQuota(0, 100), 30)
    quota = client.set_quota("acme", device_reserved=10, requests_per_minute=None).quota
    assert (quota.device, quota.requests_per_minute) == (bunkhouse.ByteQuota(10, 100), None)
    limits = {"tokens_per_minute": 900, "restores_per_minute": 4, "device_seconds_per_day": 3600}
    shown = client.set_quota("acme", **limits)
    assert {name: getattr(shown.quota, name) for name in limits} == limits
    assert shown.usage[0].rates == (bunkhouse.RateUse("tokens_per_minute", 900, 900, 896, 267),)
    assert shown.warnings == ("too much is promised",)
    assert client.quota("acme").usage[0].requests == 7
    control.nodes["box"] = {"node": "box", "state": "up", "devices": [{"device": "cpu:0"}]}
    assert client.nodes()[0].devices[0].device == "cpu:0"
    token = client.create_node_token(name="box", ttl_s=60)
    assert token.token not in repr(token)
    assert client.set_node("box", draining=True).state == "draining"
    client.delete_node("box")
    client.revoke_key(key.key_id)
    client.delete_tenant("acme")
    assert client.tenants() == ()


def test_ps_and_events(client: bunkhouse.Client, control: FakeControl) -> None:
    restores = [{"from_tier": "disk", "count": 2, "restore_ms_p50": 12, "restore_ms_max": 30}]
    item = {"node": "box", "ref": "a/b@0", "state": "resident", "device": "cpu:0", "restores": restores}
    control.ps = {"items": [item], "devices": [{"node": "box", "device": "cpu:0", "budget_bytes": 5}]}
    now = client.ps()
    assert now.items[0].restores == (bunkhouse.Restores("disk", 2, 12, 30),)
    assert now.devices[0].budget_bytes == 5
    control.events = [{"id": n, "at_ms": n, "kind": "restored", "new": "field"} for n in range(1, 6)]
    page = client.events(after=1, limit=2)
    assert ([event.id for event in page.items], page.next) == ([2, 3], 3)


def test_models_are_listed_shown_and_deleted(client: bunkhouse.Client, control: FakeControl) -> None:
    """References go into the path segment by segment, quoted."""
    registered = client.register("acme/minilm", "file:///models/minilm")
    assert registered.origin == "file:///models/minilm"
    assert client.models("acme") == (registered,)
    assert client.model("acme/minilm") == registered
    client.delete_model(registered.ref)
    assert control.requests[-1] == ("DELETE", f"/api/v1/models/{registered.ref}")
    with pytest.raises(bunkhouse.NotFound):
        client.model("acme/minilm")


@pytest.mark.parametrize("ref", ["minilm", "acme/..", "../x", "acme/a/b", "/x", "acme/", "."])
def test_references_that_would_change_the_path_are_refused_here(client: bunkhouse.Client, ref: str) -> None:
    with pytest.raises(bunkhouse.BadValue, match="model"):
        client.delete_model(ref)


async def test_the_async_client_does_the_same(url: str) -> None:
    """One call of each kind through AsyncClient."""
    async with bunkhouse.AsyncClient(url, OPERATOR_KEY) as client:
        assert (await client.create_tenant("acme")).tenant == "acme"
        assert len((await client.embed("acme/minilm", "one")).vectors) == 1
        assert (await client.chat("acme/writer", "hello")).text == "Hi"
        async with await client.chat("acme/writer", "hello", stream=True) as stream:
            assert [text async for text in stream] == ["Hel", "lo ", "wörld"]
            assert stream.finish_reason == "stop"
        with pytest.raises(bunkhouse.NotFound):
            await client.revoke_key("nosuchkey")


# --- streams


def test_a_stream_gives_text_deltas_and_then_the_counts(
    client: bunkhouse.Client, control: FakeControl
) -> None:
    """Keep-alive comments are not shown; the final usage chunk is kept."""
    with client.complete("acme/writer", "x", stream=True) as stream:
        assert list(stream) == ["Hel", "lo ", "wörld"]
        assert (stream.finish_reason, stream.prompt_tokens, stream.completion_tokens) == ("stop", 4, 3)
        assert stream.served.tier == "disk"
    assert control.bodies[-1]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(("how", "words"), [("error", "the worker died"), ("cut", "before it was complete")])
def test_a_stream_that_breaks_off_raises(
    client: bunkhouse.Client, control: FakeControl, how: str, words: str
) -> None:
    """An error event and a missing end are errors, after the texts that came."""
    control.break_stream = how
    texts: list[str] = []
    with pytest.raises(bunkhouse.StreamFailed, match=words):
        texts.extend(client.chat("acme/writer", "x", stream=True))
    assert texts == ["Hel", "lo ", "wörld"]


def test_a_refused_stream_raises_before_it_begins(client: bunkhouse.Client, control: FakeControl) -> None:
    control.faults.append(Fault("POST", "/v1/chat", 507, body={"error": {"message": "7 bytes short"}}))
    with pytest.raises(bunkhouse.DoesNotFit, match="7 bytes short"):
        client.chat("acme/writer", "x", stream=True)


def test_a_closed_stream_ends(client: bunkhouse.Client) -> None:
    stream = client.chat("acme/writer", "x", stream=True)
    assert next(stream) == "Hel"
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_the_decoder_sees_the_same_events_however_they_are_cut(end: bytes, step: int) -> None:
    text = b"data: a\n: note\nevent: x\n\ndata:b\ndata: c\n\n\ndata: [DONE]\n\n:\n".replace(b"\n", end)
    decoder = SseDecoder()
    found = [each for i in range(0, len(text), step) for each in decoder.feed(text[i : i + step])]
    assert found == ["a", "b\nc", "[DONE]"]


def test_the_decoder_refuses_a_line_without_end() -> None:
    decoder = SseDecoder()
    for _ in range(10):
        assert list(decoder.feed(b"x" * 100_000)) == []
    with pytest.raises(bunkhouse.BadAnswer, match="limit"):
        list(decoder.feed(b"x" * 100_000))


# --- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [*bunkhouse.STATUS_ERRORS.items(), (418, bunkhouse.BadRequest), (599, bunkhouse.ServerFailed)],
)
def test_each_status_is_its_exception(
    url: str, control: FakeControl, status: int, kind: type[bunkhouse.ApiError]
) -> None:
    """The table, with the fields of the management API's error shape."""
    error = {"code": "some_code", "message": "Some words.", "field": "name", "hint": "do this"}
    headers = {"x-request-id": "req-9", "retry-after": "7"}
    control.faults.append(Fault("GET", "/api/v1/tenants", status, headers=headers, body={"error": error}))
    with bunkhouse.Client(url, OPERATOR_KEY, retry=RetryPolicy(tries_max=1)) as client:
        with pytest.raises(kind) as caught:
            client.tenants()
    found = caught.value
    assert type(found) is kind
    assert (found.status, found.code, found.field, found.hint) == (status, "some_code", "name", "do this")
    assert (found.request_id, found.retry_after_s) == ("req-9", 7.0)
    assert str(found) == "name: Some words. (do this)"


def test_openai_errors_are_read_too(client: bunkhouse.Client, control: FakeControl) -> None:
    error = {"message": "too long", "type": "invalid_request_error", "param": "input", "code": None}
    control.faults.append(Fault("POST", "/v1/embeddings", 422, body={"error": error}))
    with pytest.raises(bunkhouse.BadRequest) as caught:
        client.embed("a/b", "x")
    assert (caught.value.field, caught.value.code) == ("input", "invalid_request_error")


def test_a_page_that_is_not_ours_is_a_bad_answer() -> None:
    """HTML with status 200, JSON of another shape, a redirect, an endless body: all named, none crashes."""

    def answers(*responses: httpx2.Response) -> bunkhouse.Client:
        left = list(responses)
        return bunkhouse.Client("http://x", transport=httpx2.MockTransport(lambda _: left.pop(0)))

    with answers(
        httpx2.Response(200, text="<html>"),
        httpx2.Response(200, json=[1]),
        httpx2.Response(200, json={"items": [{"tenant": 5}]}),
        httpx2.Response(307, headers={"location": "https://x/"}),
        httpx2.Response(200, content=(b"x" * 2**20 for _ in range(100))),
    ) as client:
        for words in ("<html>", "JSON object", r"items\[0\].tenant", "redirects to 'https://x/'", "67108864"):
            with pytest.raises(bunkhouse.BadAnswer, match=words):
                client.tenants()


def test_a_wrong_key_is_an_authentication_error(url: str) -> None:
    with bunkhouse.Client(url, "bk_wrong") as client, pytest.raises(bunkhouse.AuthenticationFailed):
        client.models()


def test_nobody_there_is_unreachable(unused_tcp_port: int) -> None:
    with bunkhouse.Client(f"http://127.0.0.1:{unused_tcp_port}", retry=RetryPolicy(tries_max=1)) as client:
        with pytest.raises(bunkhouse.Unreachable, match="cannot reach"):
            client.tenants()


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- address and key


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:80", "ftp://x", "http://", "http://u:p@x", "http://x?q", "http://x:99999"]
)
def test_bad_urls_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUNKHOUSE_URL", raising=False)
    with pytest.raises(bunkhouse.BadValue, match="base_url"):
        bunkhouse.Client(url)


def test_url_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trailing slash, OpenAI's /v1 and the newline of a key file do not matter."""
    monkeypatch.setenv("BUNKHOUSE_URL", "https://bunk.example/v1/")
    monkeypatch.setenv("BUNKHOUSE_API_KEY", "bk_abc\n")
    address = resolve_address(None, None)
    assert (address.base_url, address.api_key) == ("https://bunk.example", "bk_abc")
    assert "bk_abc" not in repr(address)


@pytest.mark.parametrize("key", ["a b", "a\nb: c", "ключ", "x" * 5000])
def test_a_bad_key_is_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(bunkhouse.BadValue) as caught:
        bunkhouse.Client("http://x", key)
    assert key not in str(caught.value)


# --- retries


def outcome(status: int, **headers: str) -> Answer:
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()})


GET = Request("GET", "/", repeatable=True)
POST = Request("POST", "/")


@pytest.mark.parametrize(
    ("request_", "answer", "again"),
    [
        (GET, outcome(503), True),
        (GET, outcome(502), True),
        (GET, outcome(500), False),
        (GET, outcome(404), False),
        (GET, outcome(200), False),
        (POST, outcome(503), False),
        (POST, outcome(503, retry_after="0"), True),
        (POST, outcome(429), True),
        (POST, outcome(502), False),
        (POST, outcome(500, x_should_retry="true"), True),
        (GET, outcome(429, x_should_retry="false"), False),
        (GET, outcome(503, retry_after="121"), False),
        (GET, bunkhouse.Unreachable("", sent=True), True),
        (POST, bunkhouse.Unreachable("", sent=True), False),
        (POST, bunkhouse.Unreachable("", sent=False), True),
    ],
)
def test_what_is_sent_again(request_: Request, answer: Answer | bunkhouse.Unreachable, again: bool) -> None:
    """Refusals that say when, and whatever is safe to repeat; never what the server forbids."""
    wait_s = Tries(RetryPolicy(wait_s_max=1000), RetryBudget()).wait_s(request_, answer, 0.0)
    assert (wait_s is not None) is again


def test_retry_after_is_never_undercut_and_a_little_spread() -> None:
    """The server's milliseconds win over its seconds; jitter only adds."""
    waits = [
        Tries(RetryPolicy(), RetryBudget()).wait_s(
            GET, outcome(429, retry_after="9", retry_after_ms="2000"), 0
        )
        for _ in range(50)
    ]
    assert all(wait is not None and 2.0 <= wait <= 2.5 for wait in waits)
    assert len(set(waits)) > 1


def test_retry_after_may_be_a_date() -> None:
    assert retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0) == 60.0
    assert retry_after_s({"retry-after": "soon"}, 0.0) is None
    assert retry_after_s({}, 0.0) is None


def test_a_call_is_bounded_in_tries_and_in_time() -> None:
    tries = Tries(RetryPolicy(tries_max=3, wait_s_max=100), RetryBudget())
    assert [tries.wait_s(GET, outcome(503), 0) is not None for _ in range(3)] == [True, True, False]
    tries = Tries(RetryPolicy(tries_max=100, wait_s_max=25), RetryBudget())
    said = outcome(503, retry_after="10")
    assert [tries.wait_s(GET, said, 0) is not None for _ in range(3)] == [True, True, False]


def test_a_client_has_a_budget_of_retries() -> None:
    """Ten in a burst; after that one per ten successes."""
    budget = RetryBudget()

    def retried() -> bool:
        return Tries(RetryPolicy(), budget).wait_s(GET, outcome(503), 0) is not None

    assert [retried() for _ in range(11)] == [True] * 10 + [False]
    for _ in range(11):  # one more than ten: tenths are not exact in binary
        Tries(RetryPolicy(), budget).wait_s(GET, outcome(200), 0)
    assert [retried() for _ in range(2)] == [True, False]


def test_a_refused_call_is_sent_again_and_answers(client: bunkhouse.Client, control: FakeControl) -> None:
    control.faults.append(Fault("POST", "/v1/embeddings", 429, times=2, headers={"retry-after-ms": "1"}))
    assert client.embed("a/b", "x").vectors
    assert len(control.requests) == 3


def test_a_cut_connection_is_repeated_under_the_same_name(
    client: bunkhouse.Client, control: FakeControl
) -> None:
    """A lost answer to "create a tenant" may have left one: the server is told that it is the same request.

    Two calls are two requests, and calls of models carry no name: repeating one changes nothing.
    """
    control.faults.append(Fault("GET", "/api/v1/tenants", 0))
    assert client.tenants() == ()
    control.faults.append(Fault("POST", "/api/v1/tenants", 0))
    client.create_tenant("acme")
    client.create_key("acme")
    client.embed("acme/minilm", "one")
    methods = [method for method, _ in control.requests]
    assert methods == ["GET", "GET", "POST", "POST", "POST", "POST"]
    names = [sent.get("idempotency-key", "") for sent in control.headers]
    assert names[:2] == ["", ""] == [names[5], ""]
    assert names[2] == names[3] != names[4]
    assert len(names[2]) == len(names[4]) == 32


def test_a_call_waits_for_the_answer_to_its_own_first_try(
    client: bunkhouse.Client, control: FakeControl
) -> None:
    """More often than it would try again after a failure, and without spending its budget."""
    headers = {"retry-after-ms": "1", "x-should-retry": "true"}
    control.faults.append(Fault("POST", "/api/v1/tenants", 409, times=12, headers=headers))
    assert client.create_tenant("acme").tenant == "acme"
    assert len(control.requests) == 13
    with pytest.raises(bunkhouse.Conflict):
        client.create_tenant("acme")
    assert len(control.requests) == 14


# --- the package


def test_import_is_quick_and_light() -> None:
    """``import bunkhouse`` takes less than 150 ms and loads neither torch nor numpy nor an HTTP stack."""
    code = (
        "import time, sys; t = time.process_time(); import bunkhouse; "
        "print(time.process_time() - t, *sorted(sys.modules))"
    )

    def measured() -> tuple[float, set[str]]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(SDK)},
            capture_output=True,
            text=True,
            check=True,
        )
        first, *names = done.stdout.split()
        return float(first), set(names)

    # Processor time, and the quickest of a few: the machine may be busy, the import is what is measured.
    runs = [measured() for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.150
    heavy = {"torch", "numpy", "httpx2", "click", "rich", "agent", "packer", "control"}
    assert not heavy & runs[0][1]


def test_a_client_loads_no_server_code() -> None:
    code = (
        "import sys, bunkhouse; bunkhouse.Client('http://x').close(); import bunkhouse.cli.main; "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SDK)}, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "agent", "packer", "control", "aiohttp"} & set(done.stdout.split())


def test_all_is_complete_and_importable() -> None:
    """``__all__`` names every public name once (ruff keeps the order)."""
    names = bunkhouse.__all__
    assert len(names) == len(set(names))
    assert all(getattr(bunkhouse, name) is not None for name in names)
    public = {name for name in vars(bunkhouse) if not name.startswith("_")} - {"annotations", "TYPE_CHECKING"}
    modules = {name for name in public if inspect.ismodule(getattr(bunkhouse, name))}
    assert public - modules <= set(names)


def test_both_clients_have_the_same_methods() -> None:
    """Same names, same parameters, apart from async."""

    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in found if not name.startswith("_")}

    assert methods(_client.Client) == methods(_async_client.AsyncClient)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((SDK / "pyproject.toml").read_text())["project"]
    assert project["version"] == bunkhouse.__version__
    assert (SDK / "bunkhouse" / "py.typed").exists()


def test_every_method_is_in_the_readme() -> None:
    readme = (SDK / "README.md").read_text()
    for name, _ in inspect.getmembers(bunkhouse.Client, inspect.isfunction):
        if not name.startswith("_") and name != "close":
            assert f"`{name}" in readme, name
    for kind in set(bunkhouse.STATUS_ERRORS.values()):
        assert f"`{kind.__name__}`" in readme, kind


def test_a_call_to_a_deaf_server_times_out() -> None:
    """The limit is the caller's, and the error says that the request may have arrived."""
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        started = time.monotonic()
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with bunkhouse.Client(address, timeout_s=0.2, retry=RetryPolicy(tries_max=1)) as client:
            with pytest.raises(bunkhouse.TimedOut) as caught:
                client.tenants()
    assert caught.value.sent
    assert time.monotonic() - started < 30  # the limit is 0.2 s; without one it would be minutes
