"""Threat: a tenant that asks ``plan`` and ``explain`` to learn of others, or to keep a node busy; a node that
answers for another.

Covers: names, devices and figures in the answers to tenants, models and requests of others, forged replies,
floods. Does not cover: who may call at all (``test_control_auth``), what operators see (``test_questions``).
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from asked_node import AskedNode, joined, spec_like
from running_control import PATIENCE_S, Running, model_files, running, until
from scene import Scene

from control import questions
from packer.decisions import Forecast, Outcome
from packer.events import Finished, Requested
from packer.questions import QUESTIONS_MAX, REPLIES_BYTES_MAX, Replies, Reply
from packer.types import ModelSpec
from packer.wire import WIRE_VERSION, encode

SECRET = "merger-with-initech"


@dataclass(slots=True)
class Site:
    """A tenant that asks, another with a telling name, and a node with room for two models."""

    control: Running
    folder: Path
    node: AskedNode
    mine: ModelSpec
    theirs: ModelSpec
    other: ModelSpec
    key: str

    async def ask(self, path: str) -> tuple[int, bytes]:
        answer = await self.control.call("GET", f"/api/v1/{path}", key=self.key)
        return answer.status, answer.body


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        key = await control.tenant("acme")
        await control.tenant("globex")
        mine = spec_like((await control.push("acme", "mine", model_files()))["ref"])
        theirs = spec_like((await control.push("globex", SECRET, model_files()))["ref"])
        other = spec_like((await control.push("globex", f"{SECRET}-2", model_files()))["ref"])
        node = AskedNode(scene=Scene(mine, theirs, other, devices_mib=(90,)))
        async with joined(control, tmp_path / "node", node):
            yield Site(control, tmp_path, node, mine, theirs, other, key)


def use(site: Site, request: str, spec: ModelSpec, *, finish: bool = True) -> None:
    site.node.scene.later(1000)
    site.node.feed(Requested(request, spec.ref, site.node.scene.now_ms + 60_000))
    if finish:
        site.node.feed(Finished(request))


def must_not_show(body: bytes) -> None:
    for word in (b"globex", SECRET.encode(), b"budget_bytes", b"used_bytes"):
        assert word not in body, body


async def test_victims_of_others_are_only_counted(site: Site) -> None:
    use(site, "r1", site.theirs)
    use(site, "r2", site.other)
    status, body = await site.ask(f"plan?model={site.mine.ref}")
    assert status == 200
    assert b'"outcome":"evicts"' in body
    assert b'"others":{"count":1,"freed_bytes":41943040}' in body
    must_not_show(body)
    # The operator, by the same path, sees who.
    seen = await site.control.call("GET", f"/api/v1/plan?model={site.mine.ref}")
    assert SECRET.encode() in seen.body


async def test_whoever_it_waits_for_has_no_name(site: Site) -> None:
    for number, spec in enumerate((site.theirs, site.other)):
        use(site, f"r{number}", spec, finish=False)
    status, body = await site.ask(f"plan?model={site.mine.ref}")
    assert status == 200
    assert b'"outcome":"waits"' in body
    must_not_show(body)
    use(site, "mine", site.mine, finish=False)
    site.node.scene.later(5_000)
    use(site, "r3", site.theirs, finish=False)
    for path in (f"plan?model={site.mine.ref}", f"explain?model={site.mine.ref}", "explain?request=mine"):
        status, body = await site.ask(path)
        assert status == 200
        must_not_show(body)


async def test_what_was_done_to_ones_own_model_is_told_without_for_whom(site: Site) -> None:
    use(site, "r1", site.mine)
    use(site, "r2", site.theirs)
    use(site, "r3", site.other)
    status, body = await site.ask(f"explain?model={site.mine.ref}")
    assert status == 200
    assert str(site.mine.ref).encode() in body
    assert b'"kind":"claimed","ref":"","reason":""' in body
    must_not_show(body)


async def test_foreign_models_and_requests_look_like_those_that_do_not_exist(site: Site) -> None:
    use(site, "req_theirs", site.theirs)
    for path, nothing in (
        (f"plan?model={site.theirs.ref}", "plan?model=globex/none"),
        (f"plan?model=globex/{SECRET}", "plan?model=globex/none"),
        (f"explain?model={site.theirs.ref}", "explain?model=globex/none"),
        ("explain?request=req_theirs", "explain?request=req_none"),
    ):
        (status, body), (like, absent) = await site.ask(path), await site.ask(nothing)
        assert (status, like) == (404, 404)
        words = [path.partition("=")[2].encode(), nothing.partition("=")[2].encode()]
        assert body.replace(words[0], b"X") == absent.replace(words[1], b"X")


async def test_a_node_can_not_answer_for_another_or_for_another_model(site: Site) -> None:
    """A reply counts only from the node that was asked; and only for what it was asked about."""
    control = site.control.server.control
    other = await site.control.join("other")
    forged = Forecast(str(site.theirs.ref), Outcome.RESIDENT, f"forged {SECRET}")

    async def forge(question: str) -> int:
        message = encode(Replies(WIRE_VERSION, (Reply(question, forecast=forged),)))
        return (await other.call("POST", "/node/v1/replies", message, folder=site.folder)).status

    site.node.mute = True
    asking = asyncio.create_task(site.ask(f"plan?model={site.mine.ref}&node=box"))
    await until(lambda: bool(site.node.asked) or asking.done())
    assert site.node.asked
    (question,) = control.questions._open
    assert await forge(question) == 204
    assert not asking.done()
    control.questions.settle("box", [Reply(question, forecast=forged)])
    status, body = await asking
    assert status == 200
    must_not_show(body)
    assert b"did not answer" in body


async def test_replies_are_bounded(site: Site) -> None:
    other = await site.control.join("other")
    many = encode(Replies(WIRE_VERSION, (Reply("q"),) * (QUESTIONS_MAX + 1)))
    answer = await other.call("POST", "/node/v1/replies", many, folder=site.folder)
    assert (answer.status, answer.error["field"]) == (400, "replies")
    huge = io.BytesIO(b" " * (REPLIES_BYTES_MAX + 1))
    answer = await other.call("POST", "/node/v1/replies", huge, folder=site.folder)
    assert answer.status == 413
    answer = await other.call("POST", "/node/v1/replies", b'{"version":1}', folder=site.folder)
    assert answer.status == 400


async def test_a_tenant_that_floods_is_refused_and_others_are_answered(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's share of open questions is smaller than a node's, so the operator still gets through."""
    monkeypatch.setattr(questions, "ANSWER_WAIT_S", PATIENCE_S)
    site.node.mute = True
    flood = [asyncio.create_task(site.ask(f"plan?model={site.mine.ref}")) for _ in range(20)]
    open_now = site.control.server.control.questions._open
    refused = len(flood) - questions.OPEN_PER_TENANT_MAX
    await until(lambda: sum(asked.done() for asked in flood) == refused)
    assert len(open_now) == questions.OPEN_PER_TENANT_MAX
    site.node.mute = False
    operator = await site.control.call("GET", f"/api/v1/plan?model={site.theirs.ref}")
    assert operator.json()["items"][0]["forecast"]["outcome"] == "fits"
    assert [asked.result()[0] for asked in flood if asked.done()].count(429) == refused
    for asked in flood:
        asked.cancel()
