"""What breaks on a running stack, and what everybody notices: one control server, two nodes, real processes.

Covers: control killed while nodes serve, agents and workers killed under load, a network that swallows,
answers nothing or resets, and a disk of control's that is full. Each test leaves the stack as it found it:
``docs/failures.md`` is the list for operators. Does not cover: what a restarted agent finds (``test_crash``),
management calls whose answer is lost (``test_idempotency``), clocks and certificates (``test_identity``), or
a node's own full disk (``test_full_disk``, ``test_worker_moves``).
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import openai
import pytest
from failing_stack import Stack, failing_stack
from hasty_control import TICKET_LIFE_MS
from losing_proxy import Line
from process_memory import children
from real_box import CALLER, PATIENCE_S, wait_gone

import bunkhouse

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

# So long that a stream of them does not end before a test has killed something.
LONG = 1_500


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with failing_stack(tmp_path_factory.mktemp("failures")) as stack:
        yield stack


def back(stack: Stack) -> None:
    """Start control again, and wait until the first node has found it."""
    stack.box.start_control()
    stack.agent.wait_for("connected to control")


# --- control is killed ----------------------------------------------------------------------------


def test_while_control_is_dead_no_request_fails_and_its_use_is_told_afterwards(stack: Stack) -> None:
    """Control hangs first, with beats that it has received and not stored, and is killed then. It is away for
    longer than tickets live and than a node keeps all of its part of a limit."""
    stack.until_delivered()
    stack.box.operator().set_quota("acme", requests_per_minute=60_000)
    stack.until(lambda: room_of(stack.answered("acme/gen0")) > 0)
    answers, tokens = stack.counted("acme")
    charged = stack.charged("acme")
    sdk = bunkhouse.Client(
        stack.box.url, stack.box.keys["acme"], direct=True, retry=bunkhouse.RetryPolicy(tries_max=1)
    )
    got = [sdk.complete("acme/gen0", "x", max_tokens=1)]  # with a ticket from here on
    ends_s = time.monotonic() + 2 * TICKET_LIFE_MS / 1000
    stack.control.handle.send_signal(signal.SIGSTOP)
    # Two of the three have room.
    served = [stack.answered(f"acme/{name}") for name in ("gen1", "gen2", "gen0", "gen0")]
    tiers = [each.headers["x-bunkhouse-tier"] for each in served]
    assert tiers[-1] == "device"
    assert "origin" not in tiers
    assert set(tiers) != {"device"}
    stack.agent.wait_for("control is away")
    stack.control.kill()

    def answered_to_the_end() -> bool:
        got.append(sdk.complete("acme/gen0", "x", max_tokens=1))
        return time.monotonic() >= ends_s

    stack.agent.until(answered_to_the_end, pause_s=0.1)

    def a_part_of_its_part_went() -> bool:
        served.append(stack.answered("acme/gen0"))
        return 0 < room_of(served[-1]) < 0.7 * room_of(served[0])

    stack.agent.until(a_part_of_its_part_went, pause_s=0.1)
    used = sum(each.json()["usage"]["total_tokens"] for each in served)
    used += sum(each.prompt_tokens + each.completion_tokens for each in got)
    with stack.api("acme") as api:
        stream = api.completions.create(
            model="acme/gen0", prompt="the bunk", max_tokens=8, stream=True, temperature=0,
            stream_options={"include_usage": True},
        )  # fmt: skip
        (last,) = [chunk.usage for chunk in stream if chunk.usage is not None]
        used += last.total_tokens
        with pytest.raises(openai.AuthenticationError):
            api.with_options(api_key="bk_no").models.list()
    back(stack)
    count = len(served) + len(got) + 1
    stack.until_used("acme", answers + count, tokens + used)
    assert stack.charged("acme") == (charged[0] + count, charged[1] + used)
    sdk.close()
    stack.box.operator().set_quota("acme", requests_per_minute=None)
    stack.until_delivered()


def room_of(got: httpx2.Response) -> int:
    """How many requests the node may still let in at once, of a tenant with limits."""
    return int(got.headers.get("x-ratelimit-remaining-requests", 0))


def test_records_whose_receipt_is_lost_with_control_are_there_once(stack: Stack) -> None:
    """Control has stored them, the node never hears so, and control is killed: they come again."""
    swaps = iter(["acme/gen1", "acme/gen2", "acme/gen0"] * 9)
    stack.until_delivered()
    known = stack.stored()
    while stack.stored() == known:  # the node may have had no connection open on which to deliver
        stack.cable.become(Line.WHOLE)
        stack.until_delivered()
        known = stack.stored()
        stack.cable.become(Line.DEAF)
        stack.answered(next(swaps))
        stack.answered(next(swaps))
        stack.agent.wait_for("control is away")
    assert stack.spooled()[0] > 0
    stack.control.kill()
    stack.cable.become(Line.WHOLE)
    stack.answered(next(swaps))
    back(stack)
    stack.until_delivered()


def test_what_was_used_before_an_agent_was_killed_is_told_by_the_next(stack: Stack) -> None:
    """Control is cut off, so that the dead agent can have told nothing of it; the journal has it."""
    answers, tokens = stack.charged("acme")
    stack.cable.become(Line.HOLE)
    got = [stack.answered(model) for model in ("acme/gen1", "acme/gen2", "acme/gen0")]
    stack.until_journaled(len(got))
    stack.agent.kill()
    stack.cable.become(Line.WHOLE)
    stack.box.start_agent()
    tokens += sum(each.json()["usage"]["total_tokens"] for each in got)
    assert stack.charged("acme") == (answers + len(got), tokens)
    stack.until_delivered()


# --- an agent is killed under load ----------------------------------------------------------------


@dataclass(slots=True)
class Caller:
    """One of many who call through the router at one time."""

    stack: Stack
    model: str
    streams: bool
    began: threading.Event = field(default_factory=threading.Event)
    said: str = ""
    text: str = ""

    def call(self) -> None:
        try:
            with self.stack.api("acme", routed=True, retries=6) as api:
                if self.streams:
                    self._stream(api)
                else:
                    self.began.set()
                    got = api.completions.create(model=self.model, prompt="x", max_tokens=150, temperature=0)
                    self.said, self.text = "answered", got.choices[0].text
        except Exception as error:
            self.said = repr(error)
        finally:
            self.began.set()

    def _stream(self, api: openai.OpenAI) -> None:
        """Another time, if it is broken off: what was begun is never answered twice behind one's back."""
        for said in ("answered", "answered again"):
            self.text = ""
            try:
                for chunk in api.completions.create(
                    model=self.model, prompt="x", max_tokens=150, temperature=0, stream=True
                ):
                    self.text += chunk.choices[0].text
                    self.began.set()
            except openai.APIError as error:
                if error.code != "node_lost":
                    raise
            else:
                self.said = said
                return


def test_requests_of_a_killed_agent_are_answered_by_another_node(stack: Stack) -> None:
    """The router goes to the other node with what was not begun; a stream that was ends with an error, and
    the caller's next try is answered. Nothing of the dead agent stays, and the next one has its packs."""
    stack.until_delivered()
    stack.answered("acme/gen0")
    stack.until_here("acme/gen0")
    callers = [Caller(stack, "acme/gen0", number % 2 == 0) for number in range(4)]
    threads = [threading.Thread(target=caller.call) for caller in callers]
    for thread in threads:
        thread.start()
    for caller in callers:
        assert caller.began.wait(PATIENCE_S)
    nurseries = children(stack.agent.handle.pid)
    pids = [*nurseries, *stack.box.worker_pids()]
    private = [path for pid in pids for path in Path("/dev/shm").glob(f"bunkhouse-nursery-*/{pid}")]
    assert len(pids) >= 2
    assert private
    pidfds = [os.pidfd_open(pid) for pid in pids]
    stack.agent.kill()
    wait_gone(pidfds)
    assert not any(path.exists() for path in private)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert {caller.said for caller in callers} <= {"answered", "answered again"}
    assert "answered again" in {caller.said for caller in callers}
    assert len({caller.text for caller in callers}) == 1
    stack.box.start_agent()
    got = stack.answered("acme/gen0")
    assert got.headers["x-bunkhouse-tier"] == "disk"
    stack.until_delivered()


# --- a worker is killed in mid-stream -------------------------------------------------------------


def test_a_killed_worker_breaks_its_tenants_stream_and_no_other(stack: Stack) -> None:
    """One SSE error, at which openai's client raises; the model answers again without anybody's help."""
    stack.answered("acme/gen0")
    (victim,) = stack.box.worker_pids()
    alone = stack.ask("globex/gen0", tokens=200).json()["choices"][0]["text"]
    body = {"model": "acme/gen0", "prompt": "x", "max_tokens": LONG, "stream": True, "temperature": 0}
    headers = {"Authorization": f"Bearer {stack.box.keys['acme']}"}
    url = f"{stack.box.gateway_url}/v1/completions"
    with stack.api("globex") as neighbour, stack.api("acme") as api:
        others = neighbour.completions.create(
            model="globex/gen0", prompt="the bunk", max_tokens=200, stream=True, temperature=0
        )
        text = next(others).choices[0].text
        broken = api.completions.create(
            model="acme/gen0", prompt="x", max_tokens=LONG, stream=True, temperature=0
        )
        next(broken)
        with CALLER.stream("POST", url, headers=headers, json=body, timeout=PATIENCE_S) as raw:
            lines = raw.iter_lines()
            next(lines)
            os.kill(victim, signal.SIGKILL)
            data = [line for line in lines if line.startswith("data: ")]
        assert [line for line in data if '"error"' in line] == data[-1:]
        assert "worker_died" in data[-1]
        with pytest.raises(openai.APIError) as caught:
            list(broken)
        assert caught.value.code == "worker_died"
        assert text + "".join(chunk.choices[0].text for chunk in others) == alone
    with stack.api("acme", retries=2) as api:
        assert api.completions.create(model="acme/gen0", prompt="x", max_tokens=1).choices
    assert victim not in stack.box.worker_pids()


# --- the network is cut ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "model"), [(Line.HOLE, "globex/gen1"), (Line.CUT, "globex/gen2")], ids=["swallows", "resets"]
)
def test_a_node_that_is_cut_off_serves_on_and_is_left_out_until_it_is_back(
    stack: Stack, line: Line, model: str
) -> None:
    """``model`` is on this node alone, so that the router has every reason to ask it."""
    stack.answered(model)
    stack.until_here(model)
    stack.until_delivered()
    answers, tokens = stack.counted("acme")
    assert stack.answered(model, routed=True).headers["x-bunkhouse-node"] == "box"
    stack.cable.become(line)
    served = [stack.answered(each) for each in ("acme/gen1", "acme/gen2", "acme/gen0")]
    stack.until(lambda: stack.state() == "silent")
    assert stack.answered(model, routed=True).headers["x-bunkhouse-node"] == "second"
    served.append(stack.answered("acme/gen0"))
    stack.cable.become(Line.WHOLE)
    stack.until(lambda: stack.state() == "up")
    tokens += sum(got.json()["usage"]["total_tokens"] for got in served)
    stack.until_used("acme", answers + len(served), tokens)
    stack.until_delivered()


# --- control's disk is full -----------------------------------------------------------------------


def test_a_full_disk_of_control_stops_what_must_be_written_and_nothing_else(stack: Stack) -> None:
    stack.until_delivered()
    known = stack.stored()
    headers = {
        "Authorization": f"Bearer {(stack.box.folder / 'control' / 'operator.key').read_text().strip()}"
    }
    tenants = f"{stack.box.url}/api/v1/tenants"
    pid = stack.control.handle.pid
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
    try:
        for _ in range(2):
            refused = CALLER.post(tenants, json={"name": "initech"}, headers=headers, timeout=PATIENCE_S)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "store_unavailable"
            assert "full disk" in refused.json()["error"]["hint"]
            assert int(refused.headers["retry-after"]) <= 120
        listed = CALLER.get(tenants, headers=headers, timeout=PATIENCE_S).json()["items"]
        assert {item["tenant"] for item in listed} == {"acme", "globex"}
        for model in ("acme/gen1", "acme/gen2", "acme/gen0"):
            stack.answered(model)
        assert stack.answered("acme/gen0", routed=True).status_code == 200
        assert stack.state() == "up"
        assert stack.stored() == known
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    assert CALLER.post(tenants, json={"name": "initech"}, headers=headers).status_code == 201
    stack.box.operator().delete_tenant("initech")
    stack.until_delivered()
    assert stack.stored() > known
