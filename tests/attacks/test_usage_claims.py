"""Nodes that lie about what tenants used, and tenants that look for what others used.

Covers: amounts and times that are none, more rows than a beat has, a node that speaks for another's journal,
use that is told for nobody or in words that are no text, cursors that are made up, and what a tenant's key
sees. Does not cover: who may call the route at all (``test_control_auth``), or honest faults
(``test_usage``).

A node that is in somebody else's hands can say anything of the tenants that it serves; what it says counts
as its word does anywhere: it runs their models.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from running_control import FakeNode, Running, empty_report, running

from control.usage_tables import WORD_CHARS_MAX
from packer.usage import HOUR_MS, KEY_MARK, USAGE_ROWS_PER_BEAT_MAX, UsageBatch, UsageRow, Used, hour_of
from packer.wire import WIRE_VERSION, Beat, BeatAnswer, decode, encode

AMOUNT = 7


@dataclass(slots=True)
class Site:
    control: Running
    folder: Path
    node: FakeNode
    keys: dict[str, str]
    now: int

    async def say(self, seq: int, *rows: UsageRow, node: FakeNode | None = None, spool: str = "s") -> int:
        answer = await (node or self.node).raw_beat(self.folder, usage=UsageBatch(seq, rows), spool=spool)
        if answer.status != 200:
            assert answer.status == 400, answer.body
            return -1
        return decode(answer.body, BeatAnswer).usage_acked

    async def seen(self, key: str | None = None, query: str = "by=hour") -> list[dict[str, Any]]:
        answer = await self.control.call("GET", f"/api/v1/usage?{query}", key=self.keys[key] if key else "")
        assert answer.status == 200, answer.body
        found: list[dict[str, Any]] = answer.json()["items"]
        return found

    def used(self, tenant: str = "acme", *, requests: int = AMOUNT, model: str = "m", **at: int) -> UsageRow:
        return UsageRow(at.get("hour_ms", self.now), tenant, f"{tenant}/{model}", Used(requests))


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        keys = {name: await control.tenant(name) for name in ("acme", "globex")}
        node = await control.join("n1")
        yield Site(control, tmp_path, node, keys, hour_of(control.server.control.wall_ms()))


async def test_a_tenant_sees_what_it_used_and_nothing_of_others(site: Site) -> None:
    assert await site.say(1, site.used(), site.used("globex", requests=9)) == 1
    for name, requests in (("acme", AMOUNT), ("globex", 9)):
        for query in ("by=hour", "by=day", "by=total", f"tenant={name}"):
            (item,) = await site.seen(name, query)
            assert (item["tenant"], item["requests"]) == (name, requests)
    assert {item["tenant"] for item in await site.seen()} == {"acme", "globex"}
    for other in ("globex", "nobody"):
        answer = await site.control.call("GET", f"/api/v1/usage?tenant={other}", key=site.keys["acme"])
        assert answer.status == 404


async def test_a_tenant_sees_its_own_keys_alone_and_they_count_nothing_twice(site: Site) -> None:
    def of_key(tenant: str, key_id: str, requests: int) -> UsageRow:
        return UsageRow(site.now, tenant, KEY_MARK + key_id, Used(requests))

    rows = (site.used(), site.used("globex"), of_key("acme", "a" * 12, 5), of_key("globex", "b" * 12, 6))
    assert await site.say(1, *rows, of_key("acme", "c" * 12, AMOUNT - 5)) == 1
    found = {(each["tenant"], each["key_id"]): each["requests"] for each in await site.seen(query="by=key")}
    acmes = {("acme", "a" * 12): 5, ("acme", "c" * 12): AMOUNT - 5}
    assert found == {**acmes, ("globex", "b" * 12): 6}
    own = await site.seen("acme", "by=key")
    assert {(each["tenant"], each["key_id"]): each["requests"] for each in own} == acmes
    assert [each["model"] for each in own] == ["", ""]
    for query in ("by=hour", "by=day", "by=total"):
        (item,) = await site.seen("acme", query)
        assert (item["model"], item["key_id"], item["requests"]) == ("acme/m", "", AMOUNT)
    first = await site.control.call("GET", "/api/v1/usage?by=key&limit=1", key=site.keys["acme"])
    cursor = first.json()["next_cursor"]
    (second,) = await site.seen("acme", f"by=key&limit=1&cursor={cursor}")
    assert {first.json()["items"][0]["key_id"], second["key_id"]} == {"a" * 12, "c" * 12}


async def test_a_made_up_cursor_leads_a_tenant_to_nobody_else(site: Site) -> None:
    await site.say(1, *(site.used(tenant, model=m) for tenant in ("acme", "globex") for m in "mn"))
    first = await site.control.call("GET", "/api/v1/usage?limit=1", key=site.keys["acme"])
    scope = base64.urlsafe_b64decode(first.json()["next_cursor"] + "===")[:8]
    for position in (
        ["", "", "0"],
        ["acme", "zzz", "0"],
        ["globex", "", "0"],
        ["\x00", "\ud800", "9" * 16],
        ["acme", "acme/m", "-1"],
        ["acme", "acme/m", "9" * 17],
        ["acme", "acme/m", "\u0661"],
    ):
        for escape in (True, False):
            text = json.dumps(position, ensure_ascii=escape).encode("utf-8", "replace")
            cursor = base64.urlsafe_b64encode(scope + text).decode().rstrip("=")
            path = f"/api/v1/usage?limit=1&cursor={cursor}"
            answer = await site.control.call("GET", path, key=site.keys["acme"])
            assert answer.status in (200, 400)
            assert b"globex" not in answer.body
            other = await site.control.call("GET", path, key=site.keys["globex"])
            assert other.status == 400


NO_QUESTIONS = ("by=week", "by=", "since_ms=-1", "since_ms=1e3", "until_ms=9999999999999999999")


@pytest.mark.parametrize("query", NO_QUESTIONS)
async def test_a_question_that_is_none_is_refused_by_its_field(site: Site, query: str) -> None:
    answer = await site.control.call("GET", f"/api/v1/usage?{query}")
    assert (answer.status, answer.error["field"]) == (400, query.partition("=")[0])


@pytest.mark.parametrize("amount", [-1, -(2**62), 2**53 + 1, 2**63 - 1])
async def test_amounts_that_are_none_are_refused_whole(site: Site, amount: int) -> None:
    assert await site.say(1, site.used(), site.used(requests=amount, model="n")) == -1
    assert await site.say(1, site.used(hour_ms=amount)) == -1
    assert await site.say(amount, site.used()) == -1
    assert await site.seen() == []
    assert await site.say(1, site.used()) == 1, "and the number is still free"


async def test_a_beat_has_no_more_rows_than_its_limit(site: Site) -> None:
    rows = [site.used(model=str(i)) for i in range(USAGE_ROWS_PER_BEAT_MAX + 1)]
    assert await site.say(1, *rows) == -1
    assert await site.say(1, *rows[1:]) == 1


async def test_times_that_can_not_be_are_now(site: Site) -> None:
    """So that no row lies where nobody looks, or stays for ever."""
    await site.say(1, *(site.used(hour_ms=hour_ms) for hour_ms in (0, 1, site.now + 99 * HOUR_MS, 2**53)))
    (item,) = await site.seen()
    assert (item["begin_ms"], item["requests"]) == (site.now, 4 * AMOUNT)


async def test_use_of_nobody_and_words_that_are_no_text_break_nothing(site: Site) -> None:
    rows = [site.used("nobody"), site.used("\x00"), site.used(model="x" * 10_000), site.used(model="'; drop")]
    assert await site.say(1, *rows) == 1
    report = empty_report(site.node.gateway_url)
    beat = Beat(WIRE_VERSION, "n1", 0, 0, 0, report, spool="s", usage=(site.used(),), usage_seq=2)
    raw = encode(beat).replace(b'"acme/m"', b'"\\ud800"')
    answer = await site.node.call("POST", "/node/v1/beat", raw, folder=site.folder)
    assert answer.status in (200, 400)
    items = await site.seen()
    assert {item["tenant"] for item in items} == {"acme"}
    assert max(len(item["model"]) for item in items) == WORD_CHARS_MAX
    assert await site.say(3, site.used()) == 3


async def test_a_node_can_not_use_up_the_numbers_of_another(site: Site) -> None:
    """Numbers are told apart by the node's certificate first: a spool's name is no secret."""
    other = await site.control.join("n2")
    assert await site.say(2**53, site.used(), node=other, spool="s") == 2**53
    assert await site.say(1, site.used("globex")) == 1
    assert {item["tenant"]: item["requests"] for item in await site.seen()} == {
        "acme": AMOUNT,
        "globex": AMOUNT,
    }


async def test_a_removed_node_adds_nothing(site: Site) -> None:
    await site.control.call("DELETE", "/api/v1/nodes/n1")
    answer = await site.node.raw_beat(site.folder, usage=UsageBatch(1, (site.used(),)), spool="s")
    assert answer.status == 403
    assert await site.seen() == []
