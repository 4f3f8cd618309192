"""What it gains that waiting requests share forward passes: embeddings and texts per second.

One run measures, in shuffled rounds on one machine: callers that each ask for one embedding at a time, with
a model whose inputs are computed alone and with the same model where they share passes, and plain
transformers over the same texts in a loop; and callers that each want a text, one after the other, at once in
turns, and at once in shared passes.

Covers: whole requests through a node's gateway to a real worker on a cpu device. Does not cover: what the
gateway itself takes (``bench_gateway``), or GPUs.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import bench_harness
import make_models
from bench_gateway import Client
from bench_suite import Judgement, Section, SuiteReport, Table, report_of, run_suite
from plain_transformers import ask_fresh_process
from stack import StackOptions, start_stack
from tour_calls import wait_for_models

TENANT = "default"
CALLERS = 32
ROUNDS = 5
WRITERS = 8
# Embeddings of a round, and tokens of each text.
INPUTS, INPUTS_QUICK = 1_024, 256
TOKENS, TOKENS_QUICK = 64, 24
WORDS = ("hello", "what", "is", "the", "weather", "on", "range", "today", "one", "two", "three", "horses")
ALONE, SHARED, PLAIN = "each input alone", "inputs share passes", "plain transformers, in a loop"
IN_ROW, IN_TURNS, TOGETHER = "one after the other", "at once, in turns", "at once, in shared passes"
GOAL_SHARED = 1.5
GOAL_PLAIN = 1.0
GOAL_TOGETHER = 1.5
MODELS_TIMEOUT_S = 60.0
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Site:
    """A stack with each model twice: as it is pushed, and with shared passes. ``encoder`` and ``writer`` are
    their directories."""

    url: str
    key: str
    encoder: Path
    writer: Path

    def embed(self, name: str, texts: Sequence[str], callers: int) -> float:
        """Seconds until all texts are answered."""
        pieces = [texts[at::callers] for at in range(callers)]

        def ask(mine: Sequence[str]) -> None:
            client = Client(self.url, self.key)
            for text in mine:
                asked = {"model": f"{TENANT}/{name}", "input": text, "encoding_format": "base64"}
                client.post("/v1/embeddings", json.dumps(asked).encode())
            client.close()

        return _at_once(ask, pieces)

    def write(self, name: str, prompts: Sequence[str], tokens: int, callers: int) -> tuple[float, int]:
        """Seconds until all texts are written, and how many tokens they have."""
        written: list[int] = []

        def ask(mine: Sequence[str]) -> None:
            client = Client(self.url, self.key)
            for prompt in mine:
                asked: dict[str, object] = {"model": f"{TENANT}/{name}", "prompt": prompt, "temperature": 0}
                asked |= {"max_tokens": tokens}
                answer = json.loads(client.post("/v1/completions", json.dumps(asked).encode()))
                written.append(answer["usage"]["completion_tokens"])
            client.close()

        took_s = _at_once(ask, [prompts[at::callers] for at in range(callers)])
        return took_s, sum(written)


def _at_once(ask: Callable[[Sequence[str]], None], pieces: Sequence[Sequence[str]]) -> float:
    started_s = time.perf_counter()
    with ThreadPoolExecutor(len(pieces)) as pool:
        list(pool.map(ask, pieces))
    return time.perf_counter() - started_s


def sentences(count: int, seed: int) -> list[str]:
    """Short texts of different lengths, as search queries are."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(4, 24))) for _ in range(count)]


Case = Callable[[], float]  # a run's figure: so many per second


def interleaved(cases: Mapping[str, Case], rounds: int, what: str, log: Log) -> dict[str, list[float]]:
    """Every case once to warm up, then in another order each round."""
    order = random.Random(bench_harness.ORDER_SEED)
    runs: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1, rounds):
        names = list(cases)
        order.shuffle(names)
        for name in names:
            figure = cases[name]()
            if number >= 0:
                runs[name].append(figure)
        log(f"{what}, round {number + 1}/{rounds}")
    return runs


def embeddings(site: Site, rounds: int, inputs: int, log: Log) -> Section:
    texts = sentences(inputs, 1)

    def plain() -> float:
        answer = ask_fresh_process(site.encoder, "--embed", *texts)
        return len(texts) / answer.answer_ms * 1000

    runs = interleaved(
        {
            ALONE: lambda: len(texts) / site.embed("alone", texts, CALLERS),
            SHARED: lambda: len(texts) / site.embed("shared", texts, CALLERS),
            PLAIN: plain,
        },
        rounds,
        "embeddings",
        log,
    )
    median = {name: statistics.median(found) for name, found in runs.items()}
    rows = tuple((name, f"{found:,.0f}", f"{found / median[PLAIN]:.2f}") for name, found in median.items())
    table = Table(
        f"Embeddings, {CALLERS} callers",
        ("how", "per second", "to plain"),
        rows,
        (
            f"{inputs} texts of 4 to 24 words a round, one in each request, {rounds} interleaved rounds,",
            "medians;",
            "plain: one process, no callers, each text alone, without the time to load",
        ),
    )
    goals = (
        Judgement("shared passes, to each input alone", median[SHARED] / median[ALONE], GOAL_SHARED),
        Judgement("shared passes, to plain transformers", median[SHARED] / median[PLAIN], GOAL_PLAIN),
    )
    return Section("embeddings", (table,), goals, runs=runs)


def texts(site: Site, rounds: int, tokens: int, log: Log) -> Section:
    prompts = sentences(WRITERS, 2)

    def rate(name: str, callers: int) -> float:
        took_s, written = site.write(name, prompts, tokens, callers)
        return written / took_s

    runs = interleaved(
        {
            IN_ROW: lambda: rate("teller", 1),
            IN_TURNS: lambda: rate("teller", WRITERS),
            TOGETHER: lambda: rate("choir", WRITERS),
        },
        rounds,
        "texts",
        log,
    )
    median = {name: statistics.median(found) for name, found in runs.items()}
    rows = tuple((name, f"{found:,.0f}", f"{found / median[IN_ROW]:.2f}") for name, found in median.items())
    table = Table(
        f"{WRITERS} texts of {tokens} tokens",
        ("how", "tokens per second", "to one after the other"),
        rows,
        (f"all texts together, {rounds} interleaved rounds, medians",),
    )
    goal = Judgement(
        "texts in shared passes, to one after the other", median[TOGETHER] / median[IN_ROW], GOAL_TOGETHER
    )
    return Section("texts", (table,), (goal,), runs=runs)


def run(root: Path, quick: bool, rounds: int, log: Log) -> SuiteReport:
    encoder, writer = root / "encoder", root / "writer"
    make_models.make_encoder(encoder, hidden=384, layers=6, heads=12, positions=512)
    make_models.make_llama(writer, hidden=384, layers=6, heads=6)
    options = StackOptions(root / "stack", ("cpu:1GiB",), "0", "2GiB")
    settings = {
        "alone": (encoder, 1),
        "shared": (encoder, CALLERS),
        "teller": (writer, 1),
        "choir": (writer, WRITERS),
    }
    with ExitStack() as exits:
        stack = start_stack(options)
        exits.callback(stack.stop)
        for name, (directory, batch_max) in settings.items():
            stack.bunk("model", "push", f"{TENANT}/{name}", str(directory))
            stack.bunk("model", "set", f"{TENANT}/{name}", "--batch-max", str(batch_max))
        key = (options.data_dir / "tenant.key").read_text().strip()
        wait_for_models(stack.agent_url, key, [f"{TENANT}/{name}" for name in settings], MODELS_TIMEOUT_S)
        site = Site(stack.agent_url, key, encoder, writer)
        sections = (
            embeddings(site, rounds, INPUTS_QUICK if quick else INPUTS, log),
            texts(site, rounds, TOKENS_QUICK if quick else TOKENS, log),
        )
    facts: Mapping[str, str | int | float] = {
        "encoder": "BERT of 6 layers and width 384 (as all-MiniLM-L6), float32, random weights, a cpu device",
        "writer": "Llama of 6 layers and width 384, float32, random weights, the same device",
        "shared passes": f"batch_max {CALLERS} and {WRITERS}, no delay",
    }
    return report_of("batching", facts, sections)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_suite(__doc__, run, "scripts/bench_batching.py", arguments, rounds=ROUNDS)


if __name__ == "__main__":
    sys.exit(main())
