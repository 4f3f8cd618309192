"""The requests of the tour: a skewed, seeded order of calls through the unmodified ``openai`` client.

Covers: the order, one call of each kind (embedding, completion, chat, classification; streamed and not; to
the router and to the node), and running them from several threads. Does not cover: judging the answers.
"""

from __future__ import annotations

import queue
import random
import struct
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
from tour_models import INPUTS, MODELS, TourModel

REQUEST_TIMEOUT_S = 300.0
# Popularity falls like 1/rank: half of all calls go to the first three models.
SKEW = 1.0
# Every fourth call goes to the node itself, so that both surfaces are proven to be the same.
TO_NODE_EACH = 4
TOKENS_MAX = 6
PROMPTS = ("A bunkhouse is", "When a call comes", "The cook rings", "Hello")


@dataclass(frozen=True, slots=True)
class Job:
    """One request to make."""

    number: int
    model: TourModel
    text: str
    stream: bool
    to_node: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. ``tier`` and ``restore_ms`` are what the answer's headers said."""

    job: Job
    took_ms: float
    error: str = ""
    tier: str = ""
    restore_ms: int = 0
    vector: bytes = b""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Callers:
    """The clients of each tenant: one to the router, one to the node."""

    router: Mapping[str, openai.OpenAI]
    node: Mapping[str, openai.OpenAI]

    @staticmethod
    def of(url: str, agent_url: str, keys: Mapping[str, str]) -> Callers:
        return Callers(
            {tenant: make_client(url, key) for tenant, key in keys.items()},
            {tenant: make_client(agent_url, key) for tenant, key in keys.items()},
        )

    def client(self, job: Job) -> openai.OpenAI:
        return (self.node if job.to_node else self.router)[job.model.tenant]

    def close(self) -> None:
        for client in (*self.router.values(), *self.node.values()):
            client.close()


def make_client(url: str, key: str) -> openai.OpenAI:
    """The client as its authors made it; without retries, so that every refusal is seen and counted."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=REQUEST_TIMEOUT_S)


def wait_for_models(url: str, key: str, wanted: Collection[str], timeout_s: float) -> None:
    """Wait until the node at ``url`` has heard of all these models (``tenant/name``) of the key's tenant.

    A plan brings them and no client is told, so this asks. Raises ``TimeoutError``.
    """
    deadline_s = time.monotonic() + timeout_s
    with make_client(url, key) as client:
        while missing := set(wanted) - {model.id.partition("@")[0] for model in client.models.list()}:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the node has not heard of {sorted(missing)} in {timeout_s:.0f} s")
            time.sleep(0.05)


def make_jobs(count: int, seed: int) -> list[Job]:
    """``count`` jobs in a fixed order: first every model once, then skewed. The same seed, the same jobs."""
    chance = random.Random(seed)
    first = list(MODELS)
    chance.shuffle(first)
    weights = [1 / (rank + 1) ** SKEW for rank in range(len(MODELS))]
    chosen = [*first, *chance.choices(MODELS, weights, k=max(0, count - len(first)))][:count]
    jobs = []
    for number, model in enumerate(chosen):
        generates = model.kind in {"gpt2", "llama", "llama-bf16"}
        jobs.append(
            Job(
                number=number,
                model=model,
                text=chance.choice(INPUTS if model.kind == "minilm" else PROMPTS),
                stream=generates and chance.random() < 0.5,
                to_node=number % TO_NODE_EACH == TO_NODE_EACH - 1,
            )
        )
    return jobs


def run_jobs(jobs: Sequence[Job], callers: Callers, threads: int) -> list[Outcome]:
    """Run all jobs from ``threads`` threads, each taking the next one; outcomes in the order of the jobs."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    outcomes: dict[int, Outcome] = {}

    def work() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            outcomes[job.number] = call(job, callers.client(job))

    workers = [threading.Thread(target=work, name=f"caller-{n}", daemon=True) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [outcomes[job.number] for job in jobs]


@dataclass(slots=True)
class Seen:
    """What one call saw of its answer; filled while it is read, kept if it then breaks."""

    headers: Mapping[str, str] = field(default_factory=dict)
    vector: bytes = b""
    text: str = ""


def call(job: Job, client: openai.OpenAI) -> Outcome:
    """Make one request. A refusal or a broken stream is an outcome, not an exception."""
    seen = Seen()
    error = ""
    started_s = time.perf_counter()
    try:
        match job.model.kind:
            case "minilm":
                _embed(job, client, seen)
            case "gpt2":
                _complete(job, client, seen)
            case "classifier":
                _classify(job, client, seen)
            case _:
                _chat(job, client, seen)
    except openai.OpenAIError as problem:
        error = f"{type(problem).__name__}: {problem}"
    except Exception as problem:  # a worker thread must not lose a request silently
        error = f"unexpected {type(problem).__name__}: {problem}"
    return Outcome(
        job=job,
        took_ms=(time.perf_counter() - started_s) * 1000,
        error=error,
        tier=seen.headers.get("x-bunkhouse-tier", ""),
        restore_ms=int(seen.headers.get("x-bunkhouse-restore-ms", "0")),
        vector=seen.vector,
        text=seen.text,
    )


def _embed(job: Job, client: openai.OpenAI, seen: Seen) -> None:
    raw = client.embeddings.with_raw_response.create(model=job.model.ref, input=job.text)
    seen.headers = raw.headers
    seen.vector = vector_bytes(raw.parse().data[0].embedding)


def _complete(job: Job, client: openai.OpenAI, seen: Seen) -> None:
    completions = client.completions.with_raw_response
    if job.stream:
        raw_stream = completions.create(
            model=job.model.ref, prompt=job.text, max_tokens=TOKENS_MAX, temperature=0, stream=True
        )
        seen.headers = raw_stream.headers
        for chunk in raw_stream.parse():
            seen.text += "".join(choice.text for choice in chunk.choices)
        return
    raw = completions.create(model=job.model.ref, prompt=job.text, max_tokens=TOKENS_MAX, temperature=0)
    seen.headers = raw.headers
    seen.text = raw.parse().choices[0].text


def _chat(job: Job, client: openai.OpenAI, seen: Seen) -> None:
    chat = client.chat.completions.with_raw_response
    if job.stream:
        raw_stream = chat.create(
            model=job.model.ref,
            messages=[{"role": "user", "content": job.text}],
            max_completion_tokens=TOKENS_MAX,
            temperature=0,
            stream=True,
        )
        seen.headers = raw_stream.headers
        for chunk in raw_stream.parse():
            seen.text += "".join(choice.delta.content or "" for choice in chunk.choices)
        return
    raw = chat.create(
        model=job.model.ref,
        messages=[{"role": "user", "content": job.text}],
        max_completion_tokens=TOKENS_MAX,
        temperature=0,
    )
    seen.headers = raw.headers
    seen.text = raw.parse().choices[0].message.content or ""


def _classify(job: Job, client: openai.OpenAI, seen: Seen) -> None:
    """OpenAI has no such route; the client's documented ``post`` reaches it with the same key and errors."""
    response: Any = client.post(
        "/classify", cast_to=response_class(client), body={"model": job.model.ref, "input": job.text}
    )
    seen.headers = response.headers
    seen.text = response.json()["data"][0]["label"]


def response_class(client: openai.OpenAI) -> Any:
    """The response class of the HTTP library that this version of the client is built on."""
    library = type(client.base_url).__module__.partition(".")[0]
    return sys.modules[library].Response


def vector_bytes(vector: Sequence[float]) -> bytes:
    """An embedding's bits as float32. The client decodes them from base64 unrounded."""
    return struct.pack(f"<{len(vector)}f", *vector)
