"""``plan`` and ``explain`` over the wire: control asks in the answer to a beat, the node answers at once.

Covers: the routes, the transport and its limits, what the node remembers of decisions and requests. Does
not cover: what is foretold (``test_forecast``) or what tenants may see (``attacks/test_plans``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from asked_node import WALL_MS, AskedNode, joined, spec_like
from running_control import Running, model_files, running
from scene import Scene, model

from agent.decisions import DECISIONS_KEPT_MAX, Decisions
from control import questions
from packer.decisions import VICTIMS_MAX, Decision, Kind, Victim
from packer.events import Cancelled, Finished, Planned, Requested
from packer.http import ApiError
from packer.questions import (
    DECISIONS_MAX,
    QUESTIONS_MAX,
    REPLIES_BYTES_MAX,
    Asks,
    Question,
    Replies,
    Reply,
)
from packer.types import ModelSpec, TenantSpec
from packer.wire import WIRE_VERSION, encode


@dataclass(slots=True)
class Site:
    control: Running
    node: AskedNode
    a: ModelSpec
    b: ModelSpec
    c: ModelSpec

    def ask(self, request: str, spec: ModelSpec, later_ms: int = 1000) -> None:
        self.node.scene.later(later_ms)
        self.node.feed(Requested(request, spec.ref, self.node.scene.now_ms + 60_000))

    def use(self, request: str, spec: ModelSpec) -> None:
        self.ask(request, spec)
        self.node.feed(Finished(request))


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Three versions of two tenants that control knows, and a node with room for two of them."""
    async with running(tmp_path / "control") as control:
        names = (("acme", "a"), ("acme", "b"), ("bolt", "c"))
        for tenant in ("acme", "bolt"):
            await control.tenant(tenant)
        specs = [
            spec_like((await control.push(tenant, name, model_files()))["ref"]) for tenant, name in names
        ]
        node = AskedNode(scene=Scene(*specs))
        async with joined(control, tmp_path / "node", node):
            yield Site(control, node, *specs)


async def test_a_plan_is_the_nodes_own_forecast(site: Site) -> None:
    site.use("r1", site.a)
    site.use("r2", site.c)
    answer = await site.control.call("GET", f"/api/v1/plan?model={site.b.ref}")
    assert answer.status == 200
    found = answer.json()
    assert found["model"] == str(site.b.ref)
    (item,) = found["items"]
    assert (item["node"], item["error"], item["others"]) == ("box", None, {"count": 0, "freed_bytes": 0})
    forecast = item["forecast"]
    assert (forecast["outcome"], forecast["device"], forecast["at_ms"]) == ("evicts", "cpu:0", WALL_MS)
    assert [victim["ref"] for victim in forecast["victims"]] == [str(site.a.ref)]
    assert forecast["victims"][0]["keep_index"] > 0
    assert forecast["restore_ms"] > 0
    assert forecast["devices"][0]["verdict"] == "chosen"
    assert site.node.asked[-1].asks is Asks.PLAN


async def test_a_plan_names_a_node_and_a_model_that_exist(site: Site) -> None:
    async def status(query: str) -> tuple[int, str]:
        answer = await site.control.call("GET", f"/api/v1/plan{query}")
        return answer.status, answer.error["code"]

    assert await status("") == (400, "invalid_value")
    assert await status("?model=acme") == (400, "invalid_value")
    assert await status("?model=acme/none") == (404, "model_not_found")
    assert await status("?model=acme/a&node=none") == (404, "node_not_found")
    await site.control.join("deaf")
    assert await status("?model=acme/a&node=deaf") == (503, "node_silent")
    answer = await site.control.call("GET", "/api/v1/plan?model=acme/a&node=box")
    assert answer.json()["items"][0]["forecast"]["outcome"] == "fits"


async def test_what_was_decided_about_a_model_is_explained_oldest_first(site: Site) -> None:
    site.use("r1", site.a)
    site.use("r2", site.c)
    site.use("r3", site.b)
    answer = await site.control.call("GET", f"/api/v1/explain?model={site.a.ref}")
    found = answer.json()
    assert (found["requests"], found["silent"]) == ([], [])
    told = [(item["decision"]["kind"], item["decision"]["ref"]) for item in found["items"]]
    a, b = str(site.a.ref), str(site.b.ref)
    assert told == [("placed", a), ("restored", a), ("claimed", b)]
    restored, claimed = found["items"][1]["decision"], found["items"][2]["decision"]
    assert (restored["took_ms"], restored["from_tier"]) == (7, "origin")
    assert restored["expected_ms"] > 0
    assert [victim["ref"] for victim in claimed["victims"]] == [a]


async def test_a_request_is_told_from_its_arrival_to_its_end(site: Site) -> None:
    site.ask("req_cold", site.a)
    site.ask("req_warm", site.a)
    site.node.scene.node.draining = True
    site.ask("req_late", site.a)

    async def story(request: str) -> dict[str, object]:
        answer = await site.control.call("GET", f"/api/v1/explain?request={request}")
        assert answer.status == 200, answer.body
        (found,) = answer.json()["requests"]
        kinds = [item["decision"]["kind"] for item in answer.json()["items"]]
        return {**found["story"], "kinds": kinds}

    cold = await story("req_cold")
    assert (cold["outcome"], cold["from_tier"], cold["device"]) == ("granted", "origin", "cpu:0")
    assert cold["kinds"][:2] == ["placed", "restored"]  # type: ignore[index]
    warm = await story("req_warm")
    assert (warm["outcome"], warm["from_tier"], warm["kinds"]) == ("granted", "device", [])
    late = await story("req_late")
    assert late["outcome"] == "refused"
    assert str(late["reason"]).startswith("draining: ")
    unknown = await site.control.call("GET", "/api/v1/explain?request=req_none")
    assert (unknown.status, unknown.error["code"]) == (404, "request_not_found")
    for query in ("", "?model=acme/a&request=r", "?request=a%20b", f"?request={'r' * 65}"):
        wrong = await site.control.call("GET", f"/api/v1/explain{query}")
        assert (wrong.status, wrong.error["code"]) == (400, "invalid_value")


async def test_a_node_that_does_not_answer_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "ANSWER_WAIT_S", 0.05)
    site.node.mute = True
    answer = await site.control.call("GET", "/api/v1/plan?model=acme/a")
    (item,) = answer.json()["items"]
    assert (item["forecast"], item["error"]) == (None, "it did not answer in time")
    explained = await site.control.call("GET", "/api/v1/explain?model=acme/a")
    assert explained.json()["silent"] == ["box"]
    assert not site.control.server.control.questions._open, "nothing stays open"


async def test_open_questions_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.node.mute = True
    monkeypatch.setattr(questions, "ANSWER_WAIT_S", 1.0)
    asks = [site.control.call("GET", "/api/v1/plan?model=acme/a") for _ in range(12)]
    answers = await asyncio.gather(*asks)
    refused = [answer for answer in answers if answer.status == 429]
    assert len(refused) == 12 - questions.OPEN_PER_NODE_MAX
    assert refused[0].error["code"] == "too_many_questions"
    assert "Retry-After" in refused[0].headers


async def test_a_question_to_a_node_between_two_beats_waits_for_the_next(tmp_path: Path) -> None:
    asked = questions.Questions(lambda node: None, lambda: 0)
    asking = asyncio.create_task(asked.ask("box", "operator!", Asks.PLAN, "acme/a"))
    await asyncio.sleep(0)
    assert asked.pending("box")
    (question,) = asked.take("box")
    assert asked.take("box") == ()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not asked.pending("box")
    assert question.subject == "acme/a"


async def test_a_tenant_asks_at_a_rate_and_never_takes_the_last_places() -> None:
    """Six tenants with two questions each leave room for the operator; what waited is given back its rate."""
    now_ms = 0
    asked = questions.Questions(lambda node: None, lambda: now_ms)
    burst = questions.TENANT_QUESTIONS_PER_MINUTE // 6
    for _ in range(burst):
        asked.admit("acme")
    with pytest.raises(ApiError, match="30 questions per minute") as refused:
        asked.admit("acme")
    assert refused.value.retry_ms == 2_000
    asked.admit("bolt")
    asked.admit(questions.OPERATOR_OWNER)
    now_ms = 2_000
    asked.admit("acme")
    now_ms = 60_000
    asked.admit("cone")
    assert list(asked._rates) == ["cone"], "who may ask at full rate again is forgotten"

    owners = [f"t{number // 2}" for number in range(questions.OPEN_OF_TENANTS_MAX)]
    owners.append(questions.OPERATOR_OWNER)
    asking = [asyncio.create_task(asked.ask("box", owner, Asks.PLAN, "acme/a")) for owner in owners]
    await asyncio.sleep(0)
    with pytest.raises(ApiError, match="of tenants to node box are open"):
        await asked.ask("box", "late", Asks.PLAN, "acme/a")
    assert len(asked.take("box")) == questions.OPEN_PER_NODE_MAX - 1, "one is left for the operator"
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


# --- what the node remembers ----------------------------------------------------------------------


def test_the_ring_is_bounded_and_answers_are_too() -> None:
    spec = model("acme/a", 40)
    node = AskedNode(scene=Scene(spec, devices_mib=(30,)), decisions=Decisions(lambda: WALL_MS))
    for number in range(DECISIONS_KEPT_MAX + 10):
        node.feed(Requested(f"r{number}", spec.ref, 60_000))
    assert len(node.decisions._ring) == DECISIONS_KEPT_MAX
    reply = node.decisions.reply(Question("q", Asks.MODEL, str(spec.ref)))
    assert len(reply.decisions) == DECISIONS_MAX
    assert reply.decisions[-1].request == f"r{DECISIONS_KEPT_MAX + 9}"
    assert {decision.kind for decision in reply.decisions} == {Kind.REFUSED}


def test_answers_with_the_longest_names_are_within_what_control_takes() -> None:
    """One message above the limit was refused with all its answers: the oldest decisions stay behind."""
    ref = f"{'t' * 39}/{'m' * 64}@{'0' * 16}"
    victim = Victim(ref, "cuda:" + "9" * 59, 2**53, 2**31, 1 / 3, True, "cuda:" + "9" * 59)
    decisions = Decisions(lambda: WALL_MS)
    decisions._ring.extend(
        Decision(Kind.CLAIMED, ref, "r" * 200, by=ref, victims=(victim,) * VICTIMS_MAX, at_ms=at_ms)
        for at_ms in range(DECISIONS_MAX)
    )
    whole = Reply("q" * 16, decisions=tuple(decisions._ring))
    assert len(encode(Replies(WIRE_VERSION, (whole,) * QUESTIONS_MAX))) > REPLIES_BYTES_MAX
    reply = decisions.reply(Question("q" * 16, Asks.MODEL, ref))
    assert len(encode(Replies(WIRE_VERSION, (reply,) * QUESTIONS_MAX))) <= REPLIES_BYTES_MAX
    times = [decision.at_ms for decision in reply.decisions]
    assert times == list(range(DECISIONS_MAX))[-len(times) :]
    assert len(times) > DECISIONS_MAX // 3


def test_decisions_are_forgotten_with_a_tenant_that_they_name() -> None:
    """Else a new tenant of the old name could read what its predecessor did."""
    ours, theirs = model("acme/a", 20), model("bolt/b", 20)
    node = AskedNode(scene=Scene(ours, theirs, devices_mib=(30,)), decisions=Decisions(lambda: WALL_MS))
    for number, spec in enumerate((ours, theirs)):
        node.feed(Requested(f"r{number}", spec.ref, 60_000))
        node.feed(Finished(f"r{number}"))

    def asked(asks: Asks, subject: str) -> Reply:
        return node.decisions.reply(Question("q", asks, subject))

    assert asked(Asks.MODEL, str(theirs.ref)).decisions
    assert asked(Asks.REQUEST, "r1").story is not None
    node.feed(Planned((TenantSpec("acme"),), (ours,)))
    assert not asked(Asks.MODEL, str(theirs.ref)).decisions
    assert asked(Asks.REQUEST, "r1").story is None
    kept = asked(Asks.MODEL, str(ours.ref)).decisions
    assert kept, "what concerns nobody else stays"
    assert all(not decision.victims and "bolt" not in decision.by for decision in kept)


def test_a_caller_that_left_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.decisions.REQUESTS_KEPT_MAX", 2)
    spec = model("acme/a", 40)
    scene = Scene(spec)
    decisions = Decisions(lambda: WALL_MS)
    for event in (Requested("r1", spec.ref, 60_000), Cancelled("r1")):
        decisions.observe(scene.node, event, scene.feed(event))
    left = decisions.reply(Question("q", Asks.REQUEST, "r1")).story
    assert left is not None
    assert left.outcome == "left"
    for number in (2, 3):
        event = Requested(f"r{number}", spec.ref, 60_000)
        decisions.observe(scene.node, event, scene.feed(event))
    assert decisions.reply(Question("q", Asks.REQUEST, "r1")).story is None
    waiting = decisions.reply(Question("q", Asks.REQUEST, "r3"))
    assert waiting.story is not None
    assert waiting.story.outcome == "waiting"
    assert [decision.kind for decision in waiting.decisions] == [Kind.PLACED]
