"""A node's identity over its life: renewal on a moved clock, ends while control was away, removal, copies.

Covers: real uplinks and a real control in one process, over real TLS. Does not cover: what a token decides
(``test_authority``), thieves (``attacks/test_join``, ``attacks/test_late_renewals``), rotation of the CA
(``test_ca``).
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import aiohttp
import pytest
from cryptography import x509
from running_control import PATIENCE_S, Running, empty_report, model_files, running, until
from running_peers import Site
from running_uplinks import GATEWAY, Owner, beating, ended, make_uplink, token_file

from agent.uplink import Uplink
from control import authority as authority_module
from control.authority import LATE_RENEWAL_MAX
from control.ca import CLOCK_SKEW, NODE_CERTIFICATE_LIFE
from control.lives import CLONE_MEMORY_MS
from control.routes.nodes import answer_beat
from packer.http import ApiError
from packer.identity import RENEW_AT_SHARE, RENEW_JITTER_SHARE, BadIdentity, Identity
from packer.joining import Removed
from packer.wire import WIRE_VERSION, Beat, BoxFacts, SourcesAsk, encode


@contextmanager
def long_ago(control: Running, ended: timedelta) -> Iterator[None]:
    """Nodes get certificates that ended so long ago."""
    authority = control.server.control.authority
    then = datetime.now(UTC) - NODE_CERTIFICATE_LIFE - ended
    with mock.patch.object(authority, "now", return_value=then):
        yield


async def joined(control: Running, folder: Path, owner: Owner, name: str = "box") -> Uplink:
    """An uplink that has joined, and is not running any more."""
    folder.mkdir(exist_ok=True)
    uplink = make_uplink(control, folder, owner, await token_file(control, folder, name), name)
    async with beating(uplink):
        await owner.until_versions(0)
    return uplink


async def join_only(uplink: Uplink, token: Path) -> None:
    """Join, and say nothing more."""
    await uplink.joining._join(token, GATEWAY)


def serial(identity: Identity) -> int:
    assert identity.answer is not None
    return x509.load_pem_x509_certificates(identity.answer.certificate_pem.encode())[0].serial_number


def in_control(control: Running, name: str = "box") -> bool:
    return name in control.server.control.catalog.nodes


# --- renewal --------------------------------------------------------------------------------------


async def test_a_certificate_is_renewed_at_two_thirds_of_its_life(tmp_path: Path) -> None:
    """Not before, and then at once; the key stays."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = await joined(control, tmp_path / "box", owner)
        identity = uplink._identity
        key, before = (tmp_path / "box" / "identity" / "node.key").read_bytes(), serial(identity)
        due_s, ends_s = identity.renew_at_s(), identity.expires_s()
        life_s = (NODE_CERTIFICATE_LIFE + CLOCK_SKEW).total_seconds()
        assert abs(due_s - (ends_s - life_s * (1 - RENEW_AT_SHARE))) <= life_s * RENEW_JITTER_SHARE / 2
        identity.now_s = lambda: due_s - 1
        assert not identity.renew_due()
        identity.now_s = lambda: due_s
        assert identity.renew_due()
        renewed = asyncio.Event()
        identity.watch(renewed.set)
        async with beating(uplink):
            async with asyncio.timeout(PATIENCE_S):
                await renewed.wait()
        assert serial(identity) != before
        assert (tmp_path / "box" / "identity" / "node.key").read_bytes() == key


def test_nodes_that_joined_together_do_not_renew_together(tmp_path: Path) -> None:
    """A certificate's own number spreads them over a tenth of its life; a restart changes nothing."""
    site = Site(tmp_path)
    due = []
    for number in range(12):
        folder = tmp_path / f"n{number}"
        site.certify(Identity(folder), f"n{number}")
        first, again = Identity(folder).renew_at_s(), Identity(folder).renew_at_s()
        assert first == again
        due.append(first - Identity(folder).expires_s())
    assert len({round(each) for each in due}) > 8
    life_s = (NODE_CERTIFICATE_LIFE + CLOCK_SKEW).total_seconds()
    assert max(due) - min(due) <= life_s * RENEW_JITTER_SHARE + 2


async def test_a_node_keeps_its_name_over_restarts(tmp_path: Path) -> None:
    """Another --name changes nothing once it has joined, and nothing is joined twice."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        await joined(control, tmp_path / "box", owner)
        again = make_uplink(control, tmp_path / "box", owner, None, "another")
        async with beating(again):
            await until(lambda: again.connected)
        assert set(control.server.control.catalog.nodes) == {"box"}


async def test_the_key_never_leaves_the_box(tmp_path: Path) -> None:
    """A request for a certificate carries no more than its public half; control's files hold no more."""
    sent: list[bytes] = []

    def seen(message: object) -> bytes:
        sent.append(encode(message))
        return sent[-1]

    async with running(tmp_path / "control") as control:
        with mock.patch("packer.control_line.encode", seen), mock.patch("packer.joining.encode", seen):
            await joined(control, tmp_path / "box", Owner())
        private = "".join((tmp_path / "box" / "identity" / "node.key").read_text().splitlines()[1:-1])
        assert any(b"csr_pem" in data for data in sent)
        sent += [path.read_bytes() for path in (tmp_path / "control").rglob("*") if path.is_file()]
        assert not any(private[-60:].encode() in data for data in sent)


# --- a certificate that ended while control was away ----------------------------------------------


async def test_a_certificate_that_ended_while_control_was_away_is_renewed(tmp_path: Path) -> None:
    """Without a token: the node shows its last certificate and proves that it has the key. Plans go on."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        with long_ago(control, timedelta(hours=1)):
            folder = tmp_path / "box"
            folder.mkdir()
            uplink = make_uplink(control, folder, owner, await token_file(control, folder))
            await join_only(uplink, folder / "join.token")
        assert uplink._identity.expired()
        async with beating(uplink):
            await control.tenant("acme")
            await control.push("acme", "tiny", model_files())
            await owner.until_versions(1)
        assert not uplink._identity.expired()
        assert (await control.recorded("node_renewed_late"))["detail"].startswith("box from 127.0.0.1, 36")


async def test_a_node_whose_certificate_ended_waits_for_control(tmp_path: Path) -> None:
    """It neither gives up nor forgets who it is, however often control does not answer."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = await joined(control, tmp_path / "box", owner)
        identity, at = uplink._identity, uplink.joining._url
        identity.now_s = lambda: identity.expires_s() + 1
        tries = 0
        real = uplink.joining._ask_late

        async def away() -> object:
            nonlocal tries
            tries += 1
            uplink.joining._url = "https://127.0.0.1:9" if tries < 3 else at
            return await real()

        joining = uplink.joining
        with mock.patch.object(joining, "_ask_late", away), mock.patch("packer.joining.RETRY_MAX_S", 0.01):
            async with beating(uplink):
                before = serial(identity)
                await until(lambda: identity.answer is not None and serial(identity) != before)
        assert tries >= 3


async def test_after_a_week_only_a_new_token_helps(tmp_path: Path) -> None:
    """The node says so and keeps its identity; with a token it goes on under its name and key."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        folder = tmp_path / "box"
        folder.mkdir()
        with long_ago(control, LATE_RENEWAL_MAX + timedelta(hours=1)):
            uplink = make_uplink(control, folder, owner, await token_file(control, folder))
            await join_only(uplink, folder / "join.token")
        with pytest.raises(BadIdentity, match=r"more than 7 days.*bunk node token create"):
            async with asyncio.timeout(PATIENCE_S):
                await uplink.run(GATEWAY)
        assert in_control(control)
        key = (folder / "identity" / "node.key").read_bytes()
        with_token = make_uplink(control, folder, owner, await token_file(control, folder))
        async with beating(with_token):
            await owner.until_versions(0)
        assert (folder / "identity" / "node.key").read_bytes() == key


async def test_a_certificate_that_control_does_not_accept_ends_no_node(tmp_path: Path) -> None:
    """By control's clock it ended on an open connection: the node gets another and is not forgotten."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        uplink = await joined(control, tmp_path / "box", owner)
        before = serial(uplink._identity)
        authority = control.server.control.authority
        later = datetime.now(UTC) + timedelta(hours=25)
        async with beating(uplink) as task:
            await until(lambda: uplink.connected)
            with mock.patch.object(authority, "now", return_value=later):
                uplink.changed()
                await until(lambda: serial(uplink._identity) != before)
            assert not task.done()


# --- clocks that are off --------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [timedelta(minutes=-10), timedelta(minutes=10)], ids=["behind", "ahead"])
async def test_ten_minutes_between_the_clocks_hinder_nothing(tmp_path: Path, skew: timedelta) -> None:
    """Control's certificates and times are ten minutes off the node's: it joins, beats, takes plans and
    renews, and an operator is told."""
    with (
        mock.patch.object(
            authority_module.Authority, "__init__", _skewed(authority_module.Authority.__init__, skew)
        ),
        mock.patch("control.routes.nodes.wall_ms", partial(_wall_ms, skew)),
        mock.patch("control.routing.wall_ms", partial(_wall_ms, skew)),
        mock.patch("control.state.wall_ms", partial(_wall_ms, skew)),
        mock.patch("control.routes.certifying.wall_ms", partial(_wall_ms, skew)),
    ):
        async with running(tmp_path / "control") as control:
            owner = Owner()
            uplink = await joined(control, tmp_path / "box", owner)
            identity = uplink._identity
            due_s = identity.renew_at_s()
            identity.now_s = lambda: due_s
            before = serial(identity)
            async with beating(uplink):
                await until(lambda: serial(identity) != before)
                identity.now_s = time.time
                await control.tenant("acme")
                await control.push("acme", "tiny", model_files())
                await owner.until_versions(1)
                said, minutes = control.server.control.said, round(-skew.total_seconds() / 60)
                uplink.changed()
                await until(lambda: round((said.clock_skew_ms("box") or 0) / 60_000) == minutes)
                (node,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
            assert round(node["clock_skew_ms"] / 60_000) == minutes


def _wall_ms(skew: timedelta) -> int:
    return round((datetime.now(UTC) + skew).timestamp() * 1000)


def _skewed(init: object, skew: timedelta) -> object:
    def made(self: object, directory: Path, cluster: str) -> None:
        init(self, directory, cluster, lambda: datetime.now(UTC) + skew)  # type: ignore[operator]

    return made


# --- removal --------------------------------------------------------------------------------------


async def test_a_removed_node_joins_afresh_in_the_same_directory(tmp_path: Path) -> None:
    """Its long poll ends at once, its former identity is put aside and said, and a new token makes it another
    node of the same name: with a key of its own."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        folder = tmp_path / "box"
        uplink = await joined(control, folder, owner)
        key = (folder / "identity" / "node.key").read_bytes()
        async with beating(uplink) as task:
            await until(lambda: "box" in control.server.control._polls)
            await control.call("DELETE", "/api/v1/nodes/box")
            with pytest.raises(Removed, match=r"former-1.*join again with a new token"):
                async with asyncio.timeout(PATIENCE_S):
                    await asyncio.shield(task)
        aside = folder / "identity" / "former-1"
        assert (aside / "node.key").read_bytes() == key
        assert (aside / "identity.json").exists()
        assert not (folder / "identity" / "identity.json").exists()
        again = await joined(control, folder, Owner())
        assert (folder / "identity" / "node.key").read_bytes() != key
        assert again._identity.answer is not None
        assert in_control(control)


async def test_a_removed_node_is_cut_off_in_the_middle(tmp_path: Path) -> None:
    """While it waits for its turn at an origin, and while it reads a file of control's store."""
    async with running(tmp_path / "control") as control:
        await control.tenant("acme")
        ref = (await control.push("acme", "tiny", model_files(rows=1 << 17)))["ref"]
        nodes = [await control.join(name) for name in ("reads", "waits", "loads")]
        for node in nodes:
            await node.beat(tmp_path, report=empty_report(GATEWAY, peer_url="https://127.0.0.1:9"))
        ask = encode(SourcesAsk(WIRE_VERSION, ref, 20_000))
        assert (await nodes[0].call("POST", "/node/v1/sources", ask, folder=tmp_path)).status == 200
        waits = asyncio.create_task(nodes[1].call("POST", "/node/v1/sources", ask, folder=tmp_path))
        await until(lambda: bool(control.server.control._source_waits))
        await control.call("DELETE", "/api/v1/nodes/waits")
        assert (await waits).status == 403
        place = ref.replace("@", "/")
        url = f"{control.bound.node_url}/node/v1/origins/{place}/model.safetensors"
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, ssl=nodes[2].context(tmp_path)) as answer,
        ):
            assert answer.status == 200
            await answer.content.readexactly(1)
            await control.call("DELETE", "/api/v1/nodes/loads")
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()


def test_former_identities_are_few(tmp_path: Path) -> None:
    """The oldest goes; none of them is taken up."""
    identity = Identity(tmp_path)
    keys = []
    for _ in range(5):
        identity.csr_pem("box")
        keys.append((tmp_path / "node.key").read_bytes())
        identity.forget()
    kept = [(tmp_path / f"former-{number}" / "node.key").read_bytes() for number in (1, 2, 3)]
    assert kept == keys[-3:]
    assert not (tmp_path / "former-4").exists()
    assert not (tmp_path / "node.key").exists()


def test_a_former_identity_that_can_not_be_moved_is_not_taken_up_again(tmp_path: Path) -> None:
    """The node goes on as one that has none, and does not end with an error of the disk."""
    site = Site(tmp_path / "site")
    identity = site.join("box", listens=False).identity
    assert identity.answer is not None
    for number in (1, 2, 3):
        (identity._directory / f"former-{number}").mkdir()
    with mock.patch.object(Path, "rename", side_effect=OSError("read-only")):
        assert identity.forget() is None
    assert identity.answer is None
    assert Identity(identity._directory).answer is None


async def test_a_word_of_a_node_that_was_removed_on_its_way_is_not_taken(tmp_path: Path) -> None:
    """A beat's body may take long: nothing of it is known of the node that has the name by then."""
    async with running(tmp_path / "control") as control:
        state = control.server.control
        node = await control.join("box")
        await node.beat(tmp_path)
        row = state.catalog.nodes["box"]
        await control.call("DELETE", "/api/v1/nodes/box")
        beat = Beat(WIRE_VERSION, "box", 0, 0, 0, empty_report(GATEWAY), sent_ms=1)
        with pytest.raises(ApiError, match="was removed"):
            await answer_beat(state, row, beat, None)
        assert state.said.clock_skew_ms("box") is None


# --- a machine image that was copied --------------------------------------------------------------


async def test_two_boxes_with_one_identity_are_both_sent_nothing(tmp_path: Path) -> None:
    """They are found out by speaking turn by turn; both are told, and so is the operator. When one of them is
    gone for long enough, the other goes on."""
    async with running(tmp_path / "control") as control:
        state = control.server.control
        first, second = Owner(), Owner()
        await joined(control, tmp_path / "box", first)
        shutil.copytree(tmp_path / "box", tmp_path / "copy")
        one = make_uplink(control, tmp_path / "box", first, None)
        one._identity.box = BoxFacts("box")
        two = make_uplink(control, tmp_path / "copy", second, None)
        two._identity.box = BoxFacts("copy", "another boot", ("GPU-2",))
        async with beating(one):
            await until(lambda: one.connected)
            task = asyncio.create_task(two.run(GATEWAY))
            event = await control.recorded("node_cloned")
            assert "host box" in event["detail"]
            assert "host copy, at 127.0.0.1, GPU-2, boot another" in event["detail"]
            await until(lambda: one._complaint == two._complaint == "node_cloned")
            (node,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
            assert node["state"] == "cloned"
            assert "box" not in state._polls
            await ended(task)
            later_ms = state.now_ms() + CLONE_MEMORY_MS + 1
            with mock.patch.object(state, "now_ms", return_value=later_ms):
                await until(lambda: not one._complaint)
                await control.recorded("node_alone")
                (node,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
                assert node["state"] == "up"


async def test_a_restart_is_no_copy(tmp_path: Path) -> None:
    """Another process after another boot, again and again: nobody is suspected."""
    async with running(tmp_path / "control") as control:
        owner = Owner()
        await joined(control, tmp_path / "box", owner)
        for boot in range(12):
            uplink = make_uplink(control, tmp_path / "box", owner, None)
            uplink._identity.box = BoxFacts("box", f"boot {boot}")
            async with beating(uplink):
                await until(lambda uplink=uplink: uplink.connected)  # type: ignore[misc]
                uplink.changed()
        (node,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
        assert node["state"] != "cloned"


async def test_a_copy_that_joins_under_another_name_is_told_what_to_do(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        await joined(control, tmp_path / "box", Owner())
        shutil.copytree(tmp_path / "box", tmp_path / "copy")
        (tmp_path / "copy" / "identity" / "identity.json").unlink()
        token = await token_file(control, tmp_path / "copy", "copy")
        copy = make_uplink(control, tmp_path / "copy", Owner(), token, "copy")
        with pytest.raises(BadIdentity, match=r"409.*key of the node 'box'.*Remove the folder"):
            async with asyncio.timeout(PATIENCE_S):
                await copy.run(GATEWAY)
        shutil.rmtree(tmp_path / "copy" / "identity")
        owner = Owner()
        async with beating(make_uplink(control, tmp_path / "copy", owner, token, "copy")):
            await owner.until_versions(0)
        assert in_control(control, "copy")


# --- pools ----------------------------------------------------------------------------------------


async def test_a_node_is_of_the_pool_that_its_token_says(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        made = await control.call("POST", "/api/v1/nodes/tokens", {"name": "box", "pool": "l40s"})
        assert made.json()["pool"] == "l40s"
        (tmp_path / "join.token").write_text(made.json()["token"])
        owner = Owner()
        async with beating(make_uplink(control, tmp_path, owner, tmp_path / "join.token")):
            await owner.until_versions(0)
        await control.join("other")
        shown = (await control.call("GET", "/api/v1/nodes?pool=l40s")).json()["items"]
        assert [(node["node"], node["pool"]) for node in shown] == [("box", "l40s")]
        shown = (await control.call("GET", "/api/v1/nodes?pool=default")).json()["items"]
        assert [node["node"] for node in shown] == ["other"]
        assert (await control.call("GET", "/api/v1/nodes?pool=a%20b")).error["field"] == "pool"
        bad = await control.call("POST", "/api/v1/nodes/tokens", {"pool": "../x"})
        assert (bad.status, bad.error["field"]) == (400, "pool")
    async with running(tmp_path / "control") as control:
        shown = (await control.call("GET", "/api/v1/nodes?pool=l40s")).json()["items"]
        assert [node["node"] for node in shown] == ["box"]
