"""What a request pays on its way to a worker and back: the node's gateway, and control's router before it.

One run measures, in shuffled rounds, the same request to the same model: the worker asked over its own
socket, a bare aiohttp handler that parses and answers as many bytes and does nothing, the node, and the
router. The model is a tiny one on purpose: what is looked for is the way, not the work.

Covers: added latency (p50, p99), requests per second and core, tokens per second of a stream, latency while
another tenant holds a thousand connections. Does not cover:
batching (``bench_batching``), first requests (``bench_cold``) or control's own work (``bench_control``).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import bench_harness
import make_models
from bench_suite import Judgement, Section, SuiteReport, Table, report_of, run_suite
from gateway_peers import AskedWorker, BareHandler, asked_worker, bare_handler
from held_crowd import Held, HeldCrowd, stream_body
from process_memory import processor_s
from stack import Stack, StackOptions, start_stack
from tour_calls import wait_for_models

from packer.types import Task

TENANT = "default"
TEXT = "Hello, what is the weather on the range today?"
TASKS = {"way": Task.EMBEDDING, "teller": Task.GENERATION}
WORKER, BARE, NODE, ROUTER = "the worker, asked directly", "a bare aiohttp handler", "the node", "the router"
CASES = (WORKER, BARE, NODE, ROUTER)
# Requests of a case in one round, one after the other.
BLOCK, BLOCK_QUICK = 300, 100
# Connections that ask at once, and how many requests they make together.
CONNECTIONS = 8
LOAD, LOAD_QUICK = 4_000, 1_000
STREAM_TOKENS = 256
STREAMS, STREAMS_QUICK = 5, 3
GOAL_NODE_MS = 1.0
GOAL_ROUTER_MS = 2.0
GOAL_RATE = 0.5
# What another tenant's thousand connections may make of p99.
GOAL_CROWD = 2.0
HELD = 1_000
CROWD_TENANT = "crowd"
CROWDED, CROWDED_QUICK = 2_000, 500
MODELS_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 60.0
Log = Callable[[str], None]


@dataclass(slots=True)
class Site:
    """Everything that answers the same request."""

    loop: asyncio.AbstractEventLoop
    worker: AskedWorker
    bare: BareHandler
    stack: Stack
    key: str
    body: bytes
    clients: dict[str, Client] = field(default_factory=dict)

    def client(self, case: str) -> Client:
        if case not in self.clients:
            url = {BARE: self.bare.url, NODE: self.stack.agent_url, ROUTER: self.stack.url}[case]
            self.clients[case] = Client(url, self.key)
        return self.clients[case]

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    def once_ms(self, case: str) -> float:
        """One request; how long its caller waits."""
        if case == WORKER:
            return self.loop.run_until_complete(self._ask_worker())
        return self.client(case).post_ms("/v1/embeddings", self.body)

    async def _ask_worker(self) -> float:
        started_s = time.perf_counter()
        await self.worker.ask("way", "embed", inputs=[TEXT])
        return (time.perf_counter() - started_s) * 1000


class Client:
    """One connection that stays; as little of a client as there can be."""

    def __init__(self, url: str, key: str) -> None:
        place = urlsplit(url)
        assert place.hostname is not None
        self._connection = http.client.HTTPConnection(place.hostname, place.port, timeout=REQUEST_TIMEOUT_S)
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def post(self, path: str, body: bytes) -> bytes:
        self._connection.request("POST", path, body, self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {answer[:300]!r}")
        return answer

    def post_ms(self, path: str, body: bytes) -> float:
        started_s = time.perf_counter()
        self.post(path, body)
        return (time.perf_counter() - started_s) * 1000

    def close(self) -> None:
        self._connection.close()


# --- latency ----------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def latency(site: Site, rounds: int, block: int, log: Log) -> Section:
    runs: dict[str, list[float]] = {case: [] for case in CASES}
    order = random.Random(bench_harness.ORDER_SEED)
    for number in range(-1, rounds):  # the first one warms up
        cases = list(CASES)
        order.shuffle(cases)
        for case in cases:
            took = [site.once_ms(case) for _ in range(block)]
            if number >= 0:
                runs[case] += took
        log(f"latency, round {number + 1}/{rounds}")
    p50 = {case: statistics.median(values) for case, values in runs.items()}
    p99 = {case: percentile(values, 0.99) for case, values in runs.items()}
    rows = tuple(
        (
            case,
            f"{p50[case]:.2f} ms",
            f"{p99[case]:.2f} ms",
            "" if case == WORKER else f"{p50[case] - p50[WORKER]:+.2f} ms",
            "" if case == WORKER else f"{p99[case] - p99[WORKER]:+.2f} ms",
        )
        for case in CASES
    )
    table = Table(
        "One request at a time",
        ("asked", "p50", "p99", "added, p50", "added, p99"),
        rows,
        (f"{rounds * block} requests each, {rounds} interleaved rounds; one connection that stays open",),
    )
    goals = (
        Judgement("added by the node, p50", p50[NODE] - p50[WORKER], GOAL_NODE_MS, False, " ms"),
        Judgement("added by router and node, p50", p50[ROUTER] - p50[WORKER], GOAL_ROUTER_MS, False, " ms"),
    )
    return Section("latency", (table,), goals, runs=runs)


# --- requests per second and core -------------------------------------------------------------------


def rate(site: Site, case: str, requests: int) -> tuple[float, float]:
    """Requests per second of wall time, and per second of the server's own processor time."""
    pids = {BARE: [site.bare.pid], NODE: [site.stack.agent_pid], ROUTER: [site.stack.control_pid]}[case]
    url = {BARE: site.bare.url, NODE: site.stack.agent_url, ROUTER: site.stack.url}[case]

    def ask(count: int) -> None:
        client = Client(url, site.key)
        for _ in range(count):
            client.post("/v1/embeddings", site.body)
        client.close()

    before_s, started_s = sum(map(processor_s, pids)), time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(ask, [requests // CONNECTIONS] * CONNECTIONS))
    took_s, used_s = time.perf_counter() - started_s, sum(map(processor_s, pids)) - before_s
    done = requests // CONNECTIONS * CONNECTIONS
    return done / took_s, done / used_s


def rates(site: Site, rounds: int, requests: int, log: Log) -> Section:
    cases = (BARE, NODE, ROUTER)
    walls: dict[str, list[float]] = {case: [] for case in cases}
    cores: dict[str, list[float]] = {case: [] for case in cases}
    order = random.Random(bench_harness.ORDER_SEED)
    for number in range(rounds):
        shuffled = list(cases)
        order.shuffle(shuffled)
        for case in shuffled:
            per_s, per_core_s = rate(site, case, requests)
            walls[case].append(per_s)
            cores[case].append(per_core_s)
        log(f"requests per second, round {number + 1}/{rounds}")
    median = {case: statistics.median(values) for case, values in cores.items()}
    rows = tuple(
        (
            case,
            f"{median[case]:,.0f}",
            f"{median[case] / median[BARE]:.2f}",
            f"{statistics.median(walls[case]):,.0f}",
        )
        for case in cases
    )
    table = Table(
        f"{CONNECTIONS} connections at once",
        ("server", "requests per second of its processor time", "to the bare handler", "per second"),
        rows,
        (
            f"{requests} requests a round, {rounds} rounds; processor time of the server's process alone,",
            "of the router without the node behind it; per second: with client and worker on this machine",
        ),
    )
    goal = Judgement(
        "requests per second and core of the node, to the bare handler",
        median[NODE] / median[BARE],
        GOAL_RATE,
    )
    return Section("requests per second", (table,), (goal,), runs=cores)


# --- streams ----------------------------------------------------------------------------------------


def stream_s(site: Site, case: str) -> float:
    """Seconds from asking to the end of a stream of ``STREAM_TOKENS`` tokens."""
    prompt = "A bunkhouse is"
    started_s = time.perf_counter()
    if case == WORKER:
        asking = site.worker.ask("teller", "generate", prompt=prompt, max_tokens=STREAM_TOKENS, temperature=0)
        frames = site.loop.run_until_complete(asking)
        count = frames[-1].header["completion_tokens"]
    else:
        asked: dict[str, object] = {"model": f"{TENANT}/teller", "prompt": prompt, "temperature": 0}
        asked |= {"max_tokens": STREAM_TOKENS, "stream": True, "stream_options": {"include_usage": True}}
        answer = site.client(case).post("/v1/completions", json.dumps(asked).encode())
        events = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
        count = json.loads(events[-1])["usage"]["completion_tokens"]
    took_s = time.perf_counter() - started_s
    if count != STREAM_TOKENS:
        raise RuntimeError(f"{case}: {count} tokens instead of {STREAM_TOKENS}")
    return took_s


def streams(site: Site, rounds: int, log: Log) -> Section:
    cases = (WORKER, NODE, ROUTER)
    found: dict[str, list[float]] = {case: [] for case in cases}
    order = random.Random(bench_harness.ORDER_SEED)
    for number in range(-1, rounds):
        shuffled = list(cases)
        order.shuffle(shuffled)
        for case in shuffled:
            took_s = stream_s(site, case)
            if number >= 0:
                found[case].append(STREAM_TOKENS / took_s)
        log(f"streams, round {number + 1}/{rounds}")
    median = {case: statistics.median(values) for case, values in found.items()}
    rows = tuple((case, f"{median[case]:,.0f}", f"{median[case] / median[WORKER]:.2f}") for case in cases)
    table = Table(
        "One stream",
        ("asked", "tokens per second", "to the worker"),
        rows,
        (f"{STREAM_TOKENS} tokens, one event each, {rounds} interleaved rounds, medians",),
    )
    return Section("streams", (table,), runs=found)


# --- a crowd ----------------------------------------------------------------------------------------


def crowds(site: Site, requests: int, log: Log) -> Section:
    """One request at a time, on a calm listener and while another tenant holds ``HELD`` connections."""
    site.stack.bunk("tenant", "create", CROWD_TENANT)
    made = site.stack.bunk("key", "create", CROWD_TENANT)
    assert isinstance(made, dict)
    # The other tenant has no model: what it holds is connections, not the device.
    body = stream_body(f"{CROWD_TENANT}/none", 1)
    rows, goals, runs = [], [], {}
    for case, url in ((NODE, site.stack.agent_url), (ROUTER, site.stack.url)):
        for _ in range(requests // 4):
            site.once_ms(case)  # warms up
        calm = [site.once_ms(case) for _ in range(requests)]
        crowd = HeldCrowd(url, str(made["key"]), "/v1/completions", body)
        try:
            crowd.hold(HELD)
            busy = [site.once_ms(case) for _ in range(requests)]
        finally:
            crowd.close()
        log(f"a crowd at {case}")
        runs[f"{case}, calm"], runs[f"{case}, crowded"] = calm, busy
        p99 = percentile(calm, 0.99), percentile(busy, 0.99)
        p50 = statistics.median(calm), statistics.median(busy)
        rows.append((case, *(f"{value:.2f} ms" for value in (*p50, *p99)), f"{p99[1] / p99[0]:.2f}"))
        goals.append(Judgement(f"p99 beside a crowd at {case}, to calm", p99[1] / p99[0], GOAL_CROWD, False))
    table = Table(
        f"Another tenant holds {HELD:,} connections",
        ("asked", "p50 calm", "p50 crowded", "p99 calm", "p99 crowded", "p99, crowded to calm"),
        tuple(rows),
        (
            f"{requests} requests each, one at a time; held: {', '.join(kind.value for kind in Held)};",
            "the server hangs up on what is above its limits while it goes on",
        ),
    )
    return Section("crowd", (table,), tuple(goals), runs=runs)


# --- the run ----------------------------------------------------------------------------------------


def run(root: Path, quick: bool, rounds: int, log: Log) -> SuiteReport:
    directories = {"way": root / "way", "teller": root / "teller"}
    make_models.make_encoder(directories["way"])
    make_models.make_llama(directories["teller"], hidden=32, layers=2, heads=4)
    options = StackOptions(root / "stack", ("cpu:256MiB",), "0", "1GiB")
    with ExitStack() as exits:
        stack = start_stack(options)
        exits.callback(stack.stop)
        for name, directory in directories.items():
            stack.bunk("model", "push", f"{TENANT}/{name}", str(directory))
        key = (options.data_dir / "tenant.key").read_text().strip()
        wait_for_models(stack.agent_url, key, [f"{TENANT}/{name}" for name in directories], MODELS_TIMEOUT_S)
        loop = asyncio.new_event_loop()
        exits.callback(loop.close)
        body = json.dumps({"model": f"{TENANT}/way", "input": TEXT, "encoding_format": "base64"}).encode()
        answer = Client(stack.agent_url, key).post("/v1/embeddings", body)
        bare = exits.enter_context(bare_handler(len(answer)))
        asking = asked_worker(directories, TASKS)
        worker = loop.run_until_complete(asking.__aenter__())
        exits.callback(lambda: loop.run_until_complete(asking.__aexit__(None, None, None)))
        site = Site(loop, worker, bare, stack, key, body)
        exits.callback(site.close)
        sections = (
            latency(site, rounds, BLOCK_QUICK if quick else BLOCK, log),
            rates(site, 3 if quick else min(rounds, 5), LOAD_QUICK if quick else LOAD, log),
            streams(site, STREAMS_QUICK if quick else STREAMS, log),
            crowds(site, CROWDED_QUICK if quick else CROWDED, log),
        )
    facts: Mapping[str, str | int | float] = {
        "model": "BERT of 0.2 MB, one short input; GPT of two layers for streams; a cpu device",
        "answer": f"{len(answer)} bytes",
    }
    return report_of("gateway", facts, sections)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_suite(__doc__, run, "scripts/bench_gateway.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
