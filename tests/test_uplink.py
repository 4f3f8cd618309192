"""The node's line to control, against the real control app over real TLS sockets.

Covers: joining, plans arriving, records delivered once, the token file's end, a deleted node, what a
stranger's token leads to, a certificate of an earlier release, and asking where packs are. Does not cover:
control being away (``test_crash``) or hostile control servers (``attacks/test_join``).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from running_control import PATIENCE_S, model_files, running, until
from running_uplinks import Owner, beating, make_uplink, token_file

from agent import uplink as uplink_module
from agent.sources import ControlAway
from control.ca import Ca
from control.routing import wall_ms
from packer.control_answers import Answer
from packer.identity import BadIdentity, Identity, may_serve
from packer.joining import Removed
from packer.types import ModelRef
from packer.wire import BadMessage, OriginTurn, Record


async def test_a_node_joins_and_learns_what_changes_at_once(tmp_path: Path) -> None:
    """The first plan follows the join; a model pushed later arrives by the long poll; the spent token
    is removed."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        token = await token_file(control, tmp_path)
        uplink = make_uplink(control, tmp_path, owner, token)
        task = asyncio.create_task(uplink.run("http://127.0.0.1:9"))
        first = await owner.until_versions(0)
        assert not token.exists()
        await control.tenant("acme")
        await control.push("acme", "tiny", model_files())
        later = await owner.until_versions(1)
        assert later.epoch == first.epoch
        assert later.seq > first.seq
        assert str(later.models[0].ref.model) == "acme/tiny"
        # Every answer tells control's clock: a node's own may be off by minutes.
        assert abs(owner.control_ms - wall_ms()) < 60_000
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_records_are_delivered_and_acknowledged(tmp_path: Path) -> None:
    """What the node spooled appears in control's events, and leaves the spool only then."""
    async with running(tmp_path / "control") as control:
        owner = Owner(records=[Record(1, 5, "evicted", "acme", "acme/tiny@" + "0" * 16, "from cpu:0")])
        uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
        task = asyncio.create_task(uplink.run("http://127.0.0.1:9"))
        uplink.changed()
        event = await control.recorded("evicted")
        assert event["node"] == "box"
        async with asyncio.timeout(PATIENCE_S):
            while owner.records:
                owner.news.clear()
                await owner.news.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_deleted_node_stops(tmp_path: Path) -> None:
    """Control's delete ends the uplink with a reason that says how to come back."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
        task = asyncio.create_task(uplink.run("http://127.0.0.1:9"))
        await owner.until_versions(0)
        await control.call("DELETE", "/api/v1/nodes/box")
        with pytest.raises(Removed, match="bunk node token create"):
            async with asyncio.timeout(PATIENCE_S):
                await task
        assert not (tmp_path / "identity" / "identity.json").exists()


async def test_a_join_whose_answer_is_cut_short_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the agent; found by ``cluster_simulation``."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
        join, tries = uplink.joining._join, iter(range(9))

        async def cut_short(token: Path, gateway_url: str) -> None:
            if next(tries) == 0:
                raise BadMessage("JoinAnswer: Input data was truncated")
            await join(token, gateway_url)

        monkeypatch.setattr(uplink.joining, "_join", cut_short)
        task = asyncio.create_task(uplink.run("http://127.0.0.1:9"))
        await owner.until_versions(0)
        assert next(tries) == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_node_that_never_joined_says_what_it_needs(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        uplink = make_uplink(control, tmp_path, Owner(), None)
        with pytest.raises(BadIdentity, match="--join-token-file"):
            await uplink.run("http://127.0.0.1:9")


async def test_a_spent_token_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Another box that copies a used token gets control's words, and joins nothing."""
    async with running(tmp_path / "control") as control:
        token = await token_file(control, tmp_path)
        text = token.read_text()
        owner = Owner()
        task = asyncio.create_task(make_uplink(control, tmp_path, owner, token).run("http://127.0.0.1:9"))
        await owner.until_versions(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        token.write_text(text)
        thief = make_uplink(control, tmp_path / "thief", Owner(), token)
        with pytest.raises(BadIdentity, match="409"):
            await thief.run("http://127.0.0.1:9")


async def test_a_file_of_controls_store_is_streamed(tmp_path: Path) -> None:
    """The uplink hands on exactly the bytes that were pushed."""
    files = model_files()
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
        task = asyncio.create_task(uplink.run("http://127.0.0.1:9"))
        await control.tenant("acme")
        await control.push("acme", "tiny", files)
        plan = await owner.until_versions(1)
        for path, data in files.items():
            got = b"".join([piece async for piece in uplink.fetch(plan.models[0], path)])
            assert got == data
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_certificate_that_is_for_clients_only_is_renewed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of an earlier release can give packs without joining anew. Control that issues none but such
    is asked once, not for ever."""
    sign = Ca.sign

    def for_clients(self: Ca, key: Any, name: str, names: Any, usages: Any, *rest: Any) -> x509.Certificate:
        return sign(self, key, name, names, usages[:1], *rest)

    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
        with monkeypatch.context() as earlier:
            earlier.setattr(Ca, "sign", for_clients)
            task = asyncio.create_task(uplink.run("http://127.0.0.1:9"))
            await owner.until_versions(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            identity = Identity(tmp_path / "identity")
            assert identity.renew_due()
            assert identity.answer is not None
            identity.save(identity.answer)
            assert not identity.renew_due()
        again = make_uplink(control, tmp_path, owner, None)
        renewed = asyncio.Event()
        again._identity.watch(renewed.set)
        task = asyncio.create_task(again.run("http://127.0.0.1:9"))
        async with asyncio.timeout(PATIENCE_S):
            await renewed.wait()
        assert may_serve(again._identity._leaf())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_renewal_that_fails_is_told_as_such_and_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Control is there: it answered the beat. It was said to be away."""
    monkeypatch.setattr(uplink_module, "POLL_WAIT_MS", 20)
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
        post, asked = uplink._post, asyncio.Event()

        async def refused(path: str, *rest: Any) -> Answer:
            if path != "/node/v1/renew":
                return await post(path, *rest)
            asked.set()
            return Answer(503, b'{"error": {"code": "store_unavailable", "message": "a full disk"}}')

        async with beating(uplink):
            await owner.until_versions(0)
            with monkeypatch.context() as due:
                due.setattr(uplink, "_post", refused)
                due.setattr(uplink._identity, "renew_due", lambda: True)
                async with asyncio.timeout(PATIENCE_S):
                    await asked.wait()
                await until(lambda: "not renewed yet" in caplog.text)
                assert uplink.connected
            renewed = asyncio.Event()
            uplink._identity.watch(renewed.set)
            with monkeypatch.context() as due:
                due.setattr(uplink._identity, "renew_due", lambda: not renewed.is_set())
                async with asyncio.timeout(PATIENCE_S):
                    await renewed.wait()
        assert "a full disk" in caplog.text
        assert "control is away" not in caplog.text


async def test_control_says_where_packs_are_or_is_away(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = make_uplink(control, tmp_path, owner, await token_file(control, tmp_path))
        ref = ModelRef("acme", "tiny", "0" * 16)
        with pytest.raises(ControlAway, match="is away"):
            await uplink.sources(ref, 0)
        task = asyncio.create_task(uplink.run("http://127.0.0.1:9"))
        await control.tenant("acme")
        await control.push("acme", "tiny", model_files())
        plan = await owner.until_versions(1)
        answer = await uplink.sources(plan.models[0].ref, 0)
        assert (answer.origin, answer.peers) == (OriginTurn.GRANTED, ())
        with pytest.raises(ControlAway, match="410"):
            await uplink.sources(ref, 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
