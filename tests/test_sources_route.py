"""Control's answer to "where do I get this pack from", over the real node listener.

Covers: the first asker's turn, the long poll of those who wait and what ends it, the peer in the answer,
nodes in the plan, refusals. Does not cover: the decision itself (``test_cluster``), or who may ask
(``attacks/test_control_auth``).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from running_control import Answer, FakeNode, Running, empty_report, model_files, model_report, running, until

from packer.wire import (
    WIRE_VERSION,
    OriginTurn,
    PeerSpec,
    Report,
    SourcesAnswer,
    SourcesAsk,
    decode,
    encode,
)

LONG_MS = 25_000


def sharing(node: FakeNode, *refs: str) -> Report:
    models = tuple(model_report(ref, disk_bytes=1, packed=True) for ref in refs)
    return empty_report(node.gateway_url, models, peer_url=f"https://10.0.0.9:{len(node.name)}")


async def raw(node: FakeNode, folder: Path, ref: str, wait_ms: int = 0, **more: object) -> Answer:
    ask = SourcesAsk(WIRE_VERSION, ref, wait_ms, **more)  # type: ignore[arg-type]
    return await node.call("POST", "/node/v1/sources", encode(ask), folder=folder)


async def ask(node: FakeNode, folder: Path, ref: str, wait_ms: int = 0, **more: object) -> SourcesAnswer:
    answer = await raw(node, folder, ref, wait_ms, **more)
    assert answer.status == 200, answer.body
    return decode(answer.body, SourcesAnswer)


async def two_nodes(control: Running, folder: Path) -> tuple[FakeNode, FakeNode, str]:
    await control.tenant("acme")
    ref = str((await control.push("acme", "m", model_files()))["ref"])
    first, second = await control.join("first"), await control.join("second")
    for node in (first, second):
        await node.beat(folder, report=sharing(node))
    return first, second, ref


async def waiting(control: Running, count: int = 1) -> None:
    await until(lambda: len(control.server.control._source_waits) == count)


async def test_who_waits_is_told_of_the_peer_when_it_has_the_pack(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        first, second, ref = await two_nodes(control, tmp_path)
        granted = await ask(first, tmp_path, ref, LONG_MS)
        assert (granted.origin, granted.peers) == (OriginTurn.GRANTED, ())
        assert granted.wait_ms > 0
        waits = await ask(second, tmp_path, ref)
        assert (waits.origin, waits.peers) == (OriginTurn.WAIT, ())
        polling = asyncio.create_task(ask(second, tmp_path, ref, LONG_MS))
        await waiting(control)
        await first.beat(tmp_path, report=sharing(first, ref))
        found = await polling
        key_sha256 = control.server.control.catalog.nodes["first"].key_sha256
        assert found.peers == (PeerSpec("first", key_sha256, "https://10.0.0.9:5"),)
        again = await ask(second, tmp_path, ref, failed=("first",))
        assert again.origin is OriginTurn.GRANTED


@pytest.mark.parametrize("how", ["ended", "removed", "stopping"])
async def test_who_waits_is_told_when_the_turn_ends_without_a_pack(tmp_path: Path, how: str) -> None:
    async with running(tmp_path / "control") as control:
        first, second, ref = await two_nodes(control, tmp_path)
        await ask(first, tmp_path, ref)
        polling = asyncio.create_task(ask(second, tmp_path, ref, LONG_MS))
        await waiting(control)
        if how == "ended":
            await ask(first, tmp_path, ref, ended=True)
        elif how == "removed":
            assert (await control.call("DELETE", "/api/v1/nodes/first")).status == 204
        else:
            await control.server.control.end_polls()
        turn = OriginTurn.WAIT if how == "stopping" else OriginTurn.GRANTED
        assert (await polling).origin is turn


async def test_nodes_learn_of_each_other_in_the_plan_at_once(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        first = await control.join("first")
        plan = (await first.beat(tmp_path)).plan
        assert plan is not None
        assert [peer.node for peer in plan.peers] == ["first"]
        polling = asyncio.create_task(first.beat(tmp_path, wait_ms=LONG_MS))
        await until(lambda: "first" in control.server.control._polls)
        await control.join("second")
        told = (await polling).plan
        assert told is not None
        rows = control.server.control.catalog.nodes
        assert told.peers == tuple(PeerSpec(name, rows[name].key_sha256) for name in ("first", "second"))
        polling = asyncio.create_task(first.beat(tmp_path, wait_ms=LONG_MS))
        await until(lambda: "first" in control.server.control._polls)
        await control.call("DELETE", "/api/v1/nodes/second")
        told = (await polling).plan
        assert told is not None
        assert [peer.node for peer in told.peers] == ["first"]


async def test_what_can_not_be_answered_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        first, _, ref = await two_nodes(control, tmp_path)
        absent = ref.replace("acme/m@", "acme/none@")
        assert (await raw(first, tmp_path, absent)).status == 410
        for text in ("", "acme/m", "../../etc/passwd@" + "0" * 16, "x" * 3000):
            assert (await raw(first, tmp_path, text)).status == 400, text
        assert (await raw(first, tmp_path, ref, -1)).error["field"] == "wait_ms"
        assert (await raw(first, tmp_path, ref, failed=("n",) * 9)).error["field"] == "failed"
        assert (await raw(first, tmp_path, "x" * 5000)).status == 413
        assert control.server.control.cluster.turns == {}


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:1", "https://10.0.0.1:1/path", "https://u@h:1", "ftp://h:1"]
)
async def test_a_peer_url_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    async with running(tmp_path / "control") as control:
        node = await control.join("first")
        answer = await node.raw_beat(tmp_path, report=empty_report(node.gateway_url, peer_url=url))
        assert (answer.status, answer.error["field"]) == (400, "peer_url")


async def test_a_peer_that_listens_on_all_addresses_is_known_by_the_one_it_calls_from(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        node = await control.join("first")
        await node.beat(tmp_path, report=empty_report(node.gateway_url, peer_url="https://0.0.0.0:9"))
        assert control.server.control.cluster.nodes["first"].peer_url == "https://127.0.0.1:9"
