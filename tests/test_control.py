"""The control server over real sockets: management API, uploads, nodes and plans.

Covers: what each surface promises to a caller with the right credential. Does not cover: the router
(``test_router``), callers without a credential and hostile input (``tests/attacks``), or crashes
(``test_control_crash``).
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
import pytest_asyncio
from running_control import (
    FakeNode,
    Running,
    declare,
    empty_report,
    model_files,
    model_report,
    running,
    tenant_report,
    until,
)

from control.state import AlreadyRunning, Control
from control.store import StoreUnavailable
from packer.directory import manifest_digest
from packer.types import MIB, OriginFile
from packer.wire import BeatAnswer, JoinAnswer, Plan, Record, RenewAsk, RestoreReport, decode, encode


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        yield started


async def plan_of(node: FakeNode, folder: Path) -> Plan:
    """The newest plan, whatever the node had before."""
    node.have = (0, 0)
    plan = (await node.beat(folder)).plan
    assert plan is not None
    return plan


# --- tenants, keys, quotas ------------------------------------------------------------------------


async def test_health_needs_no_key(control: Running) -> None:
    answer = await control.call("GET", "/healthz", key=None)
    assert (answer.status, answer.json()) == (200, {"status": "ok"})


async def test_tenants_are_created_listed_and_deleted(control: Running) -> None:
    made = await control.call("POST", "/api/v1/tenants", {"name": "acme"})
    assert (made.status, made.json()["tenant"]) == (201, "acme")
    again = await control.call("POST", "/api/v1/tenants", {"name": "acme"})
    assert (again.status, again.error["code"], again.error["field"]) == (409, "tenant_exists", "name")
    listed = await control.call("GET", "/api/v1/tenants")
    assert [item["tenant"] for item in listed.json()["items"]] == ["acme"]
    assert (await control.call("DELETE", "/api/v1/tenants/acme")).status == 204
    assert (await control.call("DELETE", "/api/v1/tenants/acme")).status == 404


async def test_a_key_is_shown_once_and_listed_without_its_secret(control: Running) -> None:
    await control.tenant("acme")
    made = await control.call("POST", "/api/v1/tenants/acme/keys", {"label": "laptop", "ttl_s": 60})
    key = made.json()
    assert key["expires_ms"] - key["created_ms"] == 60_000
    listed = await control.call("GET", "/api/v1/tenants/acme/keys")
    (item,) = (item for item in listed.json()["items"] if item["key_id"] == key["key_id"])
    assert (item["label"], item["tenant"]) == ("laptop", "acme")
    secret = key["key"].split("_", 2)[2]
    assert secret.encode() not in listed.body
    database = (control.server.config.data_dir / "control.db").read_bytes()
    wal = (control.server.config.data_dir / "control.db-wal").read_bytes()
    assert secret.encode() not in database + wal


async def test_a_revoked_key_is_refused_at_once(control: Running) -> None:
    key = await control.tenant("acme")
    assert (await control.call("GET", "/v1/models", key=key)).status == 200
    assert (await control.call("DELETE", f"/api/v1/keys/{key.split('_')[1]}")).status == 204
    assert (await control.call("GET", "/v1/models", key=key)).status == 401


async def test_the_last_operator_key_can_not_be_revoked(control: Running) -> None:
    refused = await control.call("DELETE", f"/api/v1/keys/{control.operator_key.split('_')[1]}")
    assert (refused.status, refused.error["code"]) == (409, "last_operator_key")


async def test_a_quota_is_merged_field_by_field(control: Running) -> None:
    key = await control.tenant("acme")
    path = "/api/v1/tenants/acme/quota"
    await control.call("PATCH", path, {"device": {"reserved": 5, "max": 9}, "requests_per_minute": 60})
    changed = await control.call("PATCH", path, {"device": {"max": 7}, "concurrency": 2})
    quota = changed.json()["quota"]
    assert quota["device"] == {"reserved": 5, "max": 7}
    assert (quota["requests_per_minute"], quota["concurrency"], quota["weight"]) == (60, 2, 1)
    freed = await control.call("PATCH", path, {"requests_per_minute": None, "device": {"max": None}})
    assert freed.json()["quota"]["requests_per_minute"] is None
    assert (await control.call("GET", path, key=key)).json() == freed.json()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"device": {"reserved": 5, "max": 4}}, "device.reserved"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"concurrency": -1}, "concurrency"),
        ({"device": {"max": 2**60}}, "device.max"),
        ({"weight": "heavy"}, "weight"),
        ({"rpm": 5}, None),
    ],
)
async def test_a_wrong_quota_names_its_field(control: Running, body: object, field: str | None) -> None:
    await control.tenant("acme")
    refused = await control.call("PATCH", "/api/v1/tenants/acme/quota", body)
    assert (refused.status, refused.error["field"]) == (400, field)


# --- uploads --------------------------------------------------------------------------------------


async def test_a_push_becomes_a_version_with_exact_facts(control: Running) -> None:
    key = await control.tenant("acme")
    files = model_files()
    model = await control.push("acme", "minilm", files)
    digest = manifest_digest(
        [OriginFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()]
    )
    assert model["ref"] == f"acme/minilm@{digest}"
    assert (model["latest"], model["task"], model["origin"]) == (True, "embedding", "control:")
    assert model["image_bytes"] == 4096
    assert (await control.call("GET", "/api/v1/models", key=key)).json()["items"] == [model]
    for written in ("acme/minilm", "acme%2Fminilm", f"acme/minilm@{digest}", quote(model["ref"], safe="")):
        shown = await control.call("GET", f"/api/v1/models/{written}", key=key)
        assert shown.json() == model, written


async def test_an_upload_is_resumed_where_it_broke_off(control: Running) -> None:
    await control.tenant("acme")
    files = model_files(rows=3 * MIB // 64)
    upload = (await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))).json()
    data = files["model.safetensors"]
    position = [file["path"] for file in upload["files"]].index("model.safetensors")
    part = control.server.control.upload_dir / upload["upload_id"] / f"{position:04d}"

    async def cut_short() -> AsyncIterator[bytes]:
        yield data[: 2 * MIB]
        await until(lambda: part.exists() and part.stat().st_size >= MIB)
        raise OSError("the line broke")

    with pytest.raises((OSError, aiohttp.ClientError)):
        await control.send_file(upload["upload_id"], "model.safetensors", 0, cut_short())
    await until(lambda: not control.server.control.busy_parts)
    again = (await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))).json()
    assert again["upload_id"] == upload["upload_id"]
    offsets = {file["path"]: file["offset_bytes"] for file in again["files"]}
    reached = offsets["model.safetensors"]
    assert MIB <= reached <= 2 * MIB
    wrong = await control.send_file(upload["upload_id"], "model.safetensors", 0, data)
    assert (wrong.status, wrong.headers["Upload-Offset"]) == (409, str(reached))
    pushed = await control.push("acme", "m", files)
    assert {file["path"]: file["sha256"] for file in pushed["files"]}["model.safetensors"] == (
        hashlib.sha256(data).hexdigest()
    )


async def test_an_upload_survives_a_restart_of_control(tmp_path: Path) -> None:
    files = model_files()
    async with running(tmp_path / "control") as first:
        await first.tenant("acme")
        upload = (await first.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))).json()
        sent = await first.send_file(
            upload["upload_id"], "model.safetensors", 0, files["model.safetensors"][:50]
        )
        assert (sent.status, sent.headers["Upload-Offset"]) == (204, "50")
    async with running(tmp_path / "control") as second:
        shown = (await second.call("GET", f"/api/v1/uploads/{upload['upload_id']}")).json()
        assert [file["offset_bytes"] for file in shown["files"]] == [0, 50, 0]
        assert (await second.push("acme", "m", files))["latest"]


async def test_a_commit_can_be_repeated(control: Running) -> None:
    """Its answer may have been lost: the same upload commits to the same version again."""
    await control.tenant("acme")
    files = model_files()
    model = await control.push("acme", "m", files)
    (row,) = control.server.control.catalog.uploads.values()
    for _ in range(2):
        again = await control.call("POST", f"/api/v1/uploads/{row.upload_id}/commit")
        assert (again.status, again.json()) == (200, model)


async def test_two_commits_at_once_make_one_version(control: Running) -> None:
    await control.tenant("acme")
    files = model_files()
    upload = (await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))).json()
    for path, data in files.items():
        await control.send_file(upload["upload_id"], path, 0, data)
    path = f"/api/v1/uploads/{upload['upload_id']}/commit"
    answers = await asyncio.gather(*(control.call("POST", path) for _ in range(8)))
    assert sorted(answer.status for answer in answers) == [200] * 7 + [201]
    assert len({answer.body for answer in answers}) == 1


async def test_the_same_content_is_the_same_version_and_is_not_sent_again(control: Running) -> None:
    await control.tenant("acme")
    first = await control.push("acme", "m", model_files(1))
    second = await control.push("acme", "m", model_files(2))
    declared = await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", model_files(1)))
    assert all(file["offset_bytes"] == file["size_bytes"] for file in declared.json()["files"])
    back = await control.push("acme", "m", model_files(1))
    assert back["ref"] == first["ref"]
    listed = {
        item["ref"]: item["latest"] for item in (await control.call("GET", "/api/v1/models")).json()["items"]
    }
    # Pushing an older version again is how one goes back to it.
    assert listed == {first["ref"]: True, second["ref"]: False}


async def test_an_incomplete_upload_does_not_commit_and_says_what_is_missing(control: Running) -> None:
    await control.tenant("acme")
    files = model_files()
    upload = (await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))).json()
    await control.send_file(upload["upload_id"], "config.json", 0, files["config.json"])
    refused = await control.call("POST", f"/api/v1/uploads/{upload['upload_id']}/commit")
    assert (refused.status, refused.error["field"]) == (409, "model.safetensors")


async def test_a_deleted_upload_is_gone_with_its_bytes(control: Running) -> None:
    await control.tenant("acme")
    upload = (await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", model_files()))).json()
    path = f"/api/v1/uploads/{upload['upload_id']}"
    assert (await control.call("DELETE", path)).status == 204
    assert (await control.call("GET", path)).status == 404
    await until(lambda: not list((control.server.config.data_dir / "uploads").iterdir()))


async def test_abandoned_uploads_and_ended_tokens_are_swept(control: Running) -> None:
    await control.tenant("acme")
    await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", model_files()))
    await control.call("POST", "/api/v1/nodes/tokens", {"ttl_s": 60})
    state = control.server.control
    created_ms = next(iter(state.catalog.uploads.values())).created_ms
    await state.sweep(created_ms + 59_000)
    assert (len(state.catalog.uploads), len(state.catalog.tokens)) == (1, 1)
    await state.sweep(created_ms + state.config.upload_life_s * 1000 + 1)
    assert (len(state.catalog.uploads), len(state.catalog.tokens)) == (0, 0)


async def test_a_full_table_of_tokens_says_when_the_first_ends(
    control: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.routes.nodes.TOKENS_MAX", 1)
    await control.call("POST", "/api/v1/nodes/tokens", {"ttl_s": 60})
    full = await control.call("POST", "/api/v1/nodes/tokens", {})
    assert (full.status, full.error["code"]) == (429, "too_many_tokens")
    assert 0 < int(full.headers["Retry-After"]) <= 60
    assert full.headers["x-should-retry"] == "false"
    # One that has ended takes no place, and is not what anybody waits for.
    monkeypatch.setattr("control.routes.nodes.TOKENS_MAX", 2)
    await control.call("POST", "/api/v1/nodes/tokens", {"ttl_s": 30})
    monkeypatch.setattr("control.routes.nodes.TOKENS_MAX", 1)
    monkeypatch.setattr("control.routes.nodes.wall_ms", lambda: control.server.control.wall_ms() + 40_000)
    full = await control.call("POST", "/api/v1/nodes/tokens", {})
    assert full.status == 429
    assert 1 < int(full.headers["Retry-After"]) <= 20


async def test_a_tenant_can_not_fill_controls_disk(tmp_path: Path) -> None:
    async with running(tmp_path / "control", tenant_store_bytes=2_000) as control:
        await control.tenant("acme")
        await control.push("acme", "m", model_files(1))
        refused = await control.call(
            "POST", "/api/v1/tenants/acme/uploads", declare("m", model_files(2, rows=20))
        )
        assert (refused.status, refused.error["code"]) == (507, "tenant_store_full")
        assert "the limit is 2000" in refused.error["message"]


async def test_a_full_disk_is_told_and_what_was_acknowledged_stays(
    control: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await control.tenant("acme")
    files = model_files()
    upload = (await control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))).json()

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("control.routes.uploads._write_all", full)
        refused = await control.send_file(upload["upload_id"], "config.json", 0, files["config.json"])
    assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
    assert refused.headers["Retry-After"] == "2"
    with monkeypatch.context() as patched:

        def unwritable(*_: object) -> None:
            raise StoreUnavailable("control's database: database or disk is full")

        patched.setattr(control.server.control._store, "write", unwritable)
        refused = await control.call("POST", "/api/v1/tenants", {"name": "globex"})
    assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
    # Nothing is visible that is not durable.
    listed = (await control.call("GET", "/api/v1/tenants")).json()["items"]
    assert [item["tenant"] for item in listed] == ["acme"]
    assert (await control.push("acme", "m", files))["latest"]


# --- models and deletion --------------------------------------------------------------------------


async def test_deleting_one_version_leaves_the_others(control: Running, tmp_path: Path) -> None:
    await control.tenant("acme")
    old = await control.push("acme", "m", model_files(1))
    new = await control.push("acme", "m", model_files(2))
    assert (await control.call("DELETE", f"/api/v1/models/{new['ref']}")).status == 204
    assert (await control.call("GET", "/api/v1/models/acme/m")).json()["ref"] == old["ref"]
    assert (await control.call("DELETE", "/api/v1/models/acme/m")).status == 204
    assert (await control.call("GET", "/api/v1/models")).json()["items"] == []
    assert not list((tmp_path / "control" / "models").rglob("*.safetensors"))


async def test_latest_in_a_path_is_an_alias(control: Running) -> None:
    await control.tenant("acme")
    old = await control.push("acme", "m", model_files(1))
    await control.push("acme", "m", model_files(2))
    assert (await control.call("DELETE", "/api/v1/models/acme/m@latest")).status == 204
    assert (await control.call("GET", "/api/v1/models/acme/m@latest")).json()["ref"] == old["ref"]


async def test_a_deleted_tenant_takes_everything_with_it(control: Running, tmp_path: Path) -> None:
    key = await control.tenant("acme")
    other = await control.tenant("globex")
    kept = await control.push("globex", "m", model_files(3))
    await control.push("acme", "m", model_files(1))
    await control.call("POST", "/api/v1/tenants/acme/uploads", declare("half", model_files(2)))
    node = await control.join("n1")
    assert {spec.ref.tenant for spec in (await plan_of(node, tmp_path)).models} == {"acme", "globex"}
    assert (await control.call("DELETE", "/api/v1/tenants/acme")).status == 204
    plan = await plan_of(node, tmp_path)
    assert [spec.tenant for spec in plan.tenants] == ["globex"]
    assert {row.tenant for row in plan.keys} == {"globex"}
    assert [str(spec.ref) for spec in plan.models] == [kept["ref"]]
    assert (await control.call("GET", "/v1/models", key=key)).status == 401
    assert (await control.call("GET", "/v1/models", key=other)).status == 200
    await until(lambda: not list((tmp_path / "control" / "uploads").iterdir()))
    left = [path for path in (tmp_path / "control").rglob("*") if path.is_file() and "acme" in str(path)]
    assert left == []
    # A tenant of the same name starts with nothing.
    fresh = await control.tenant("acme")
    assert (await control.call("GET", "/api/v1/models", key=fresh)).json()["items"] == []
    events = (await control.call("GET", "/api/v1/events?after=0", key=fresh)).json()["items"]
    assert {event["kind"] for event in events} <= {"tenant_created", "key_created"}


async def test_an_origin_is_registered_and_stays_where_it_is(tmp_path: Path) -> None:
    directory = tmp_path / "origins" / "my model"
    directory.mkdir(parents=True)
    for path, data in model_files().items():
        (directory / path).write_bytes(data)
    async with running(tmp_path / "control", origin_roots=(str(tmp_path / "origins"),)) as control:
        await control.tenant("acme")
        ask = {"name": "m", "origin": directory.as_uri()}
        made = await control.call("POST", "/api/v1/tenants/acme/models", ask)
        assert (made.status, made.json()["origin"]) == (201, directory.as_uri())
        assert (await control.call("POST", "/api/v1/tenants/acme/models", ask)).status == 200
        # The same content pushed is the same version; it needs no copy here.
        pushed = await control.push("acme", "m", model_files())
        assert pushed["ref"] == made.json()["ref"]
        assert not list((tmp_path / "control" / "models").rglob("*.safetensors"))


# --- nodes ----------------------------------------------------------------------------------------


async def test_a_node_joins_over_mutual_tls_and_is_listed(control: Running, tmp_path: Path) -> None:
    node = await control.join("n1", "http://127.0.0.1:7777")
    assert (await control.call("GET", "/api/v1/nodes")).json()["items"][0]["state"] == "unheard"
    await node.beat(tmp_path)
    (item,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
    assert (item["node"], item["state"], item["gateway_url"]) == ("n1", "up", "http://127.0.0.1:7777")
    assert item["devices"][0]["budget_bytes"] == 96 << 20


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
async def test_a_gateway_on_all_addresses_is_called_where_its_node_dials_from(
    control: Running, tmp_path: Path, host: str
) -> None:
    """0.0.0.0 would be control's own machine, on which nobody or somebody else listens."""
    node = await control.join("n1", f"http://{host}:7777")
    (item,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
    assert item["gateway_url"] == "http://127.0.0.1:7777"
    await node.beat(tmp_path)
    (item,) = (await control.call("GET", "/api/v1/nodes")).json()["items"]
    assert (item["state"], item["gateway_url"]) == ("up", "http://127.0.0.1:7777")


async def test_a_join_can_be_repeated_by_the_same_key_only(control: Running) -> None:
    token = (await control.call("POST", "/api/v1/nodes/tokens", {})).json()["token"]
    node = FakeNode(control.bound.node_url, "n1", "http://127.0.0.1:9")
    assert [(await node.join(token)).status for _ in range(2)] == [200, 200]
    thief = FakeNode(control.bound.node_url, "n1", "http://127.0.0.1:9")
    refused = await thief.join(token)
    assert (refused.status, refused.error["code"]) == (409, "join_conflict")
    assert "another key" in (await control.recorded("join_refused"))["detail"]


async def test_a_removed_node_is_refused_and_may_join_afresh(control: Running, tmp_path: Path) -> None:
    node = await control.join("n1")
    await node.beat(tmp_path)
    waiting = asyncio.create_task(node.raw_beat(tmp_path, wait_ms=20_000))
    await until(lambda: bool(control.server.control._polls))
    assert (await control.call("DELETE", "/api/v1/nodes/n1")).status == 204
    assert (await waiting).status == 403
    assert (await node.raw_beat(tmp_path)).status == 403
    assert (await node.call("POST", "/node/v1/renew", b"{}", folder=tmp_path)).status == 403
    token = (await control.call("POST", "/api/v1/nodes/tokens", {"name": "n1"})).json()["token"]
    assert (await node.join(token)).status == 200
    node.have = (0, 0)
    assert (await node.beat(tmp_path)).plan is not None


async def test_a_certificate_is_renewed_for_the_same_key(control: Running, tmp_path: Path) -> None:
    node = await control.join("n1")
    ask = encode(RenewAsk(1, node.csr_pem()))
    renewed = await node.call("POST", "/node/v1/renew", ask, folder=tmp_path)
    assert decode(renewed.body, JoinAnswer).node == "n1"
    other = encode(RenewAsk(1, FakeNode("", "n1", "").csr_pem()))
    assert (await node.call("POST", "/node/v1/renew", other, folder=tmp_path)).status == 409


async def test_a_long_poll_gets_a_newer_plan_at_once(control: Running, tmp_path: Path) -> None:
    node = await control.join("n1")
    await node.beat(tmp_path)
    waiting = asyncio.create_task(node.beat(tmp_path, wait_ms=20_000))
    await until(lambda: bool(control.server.control._polls))
    # A short beat meanwhile (that is how reports and records come) leaves the long one open.
    assert (await node.beat(tmp_path)).plan is None
    assert not waiting.done()
    begun = asyncio.get_running_loop().time()
    await control.call("POST", "/api/v1/tenants", {"name": "acme"})
    plan = (await waiting).plan
    assert asyncio.get_running_loop().time() - begun < 5.0
    assert plan is not None
    assert [spec.tenant for spec in plan.tenants] == ["acme"]
    assert (plan.node, plan.cluster) == ("n1", control.server.control.meta.cluster)


async def test_a_long_poll_without_news_ends_without_a_plan(control: Running, tmp_path: Path) -> None:
    node = await control.join("n1")
    await node.beat(tmp_path)
    assert (await node.beat(tmp_path, wait_ms=50)).plan is None


async def test_plans_are_numbered_upwards_across_restarts(tmp_path: Path) -> None:
    seen = []
    node: FakeNode | None = None
    for round_number in range(3):
        async with running(tmp_path / "control") as control:
            node = node or await control.join("n1")
            node.node_url = control.bound.node_url
            await control.call("POST", "/api/v1/tenants", {"name": f"t{round_number}"})
            # What the node has is of the epoch before, so a plan comes at once.
            plan = (await node.beat(tmp_path)).plan
            assert plan is not None
            seen.append((plan.epoch, plan.seq))
    assert seen == sorted(seen)
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert len({seq for _, seq in seen}) == 3


async def test_records_are_acknowledged_once_stored_and_shown_once(control: Running, tmp_path: Path) -> None:
    key = await control.tenant("acme")
    other = await control.tenant("globex")
    created_ms = control.server.control.catalog.tenants["acme"].created_ms
    node = await control.join("n1")
    records = tuple(
        Record(seq, created_ms + seq, "restored", "acme", "acme/m@x", f"#{seq}") for seq in (1, 2, 3)
    )
    for _ in range(2):  # the acknowledgement may be lost
        assert (await node.beat(tmp_path, records=records)).acked_seq == 3
    assert (await node.beat(tmp_path)).acked_seq == 3
    page = (await control.call("GET", "/api/v1/events?after=0&limit=2", key=key)).json()
    assert len(page["items"]) == 2
    rest = (await control.call("GET", f"/api/v1/events?after={page['next']}", key=key)).json()
    details = [item["detail"] for item in page["items"] + rest["items"] if item["node"] == "n1"]
    assert details == ["#1", "#2", "#3"]
    assert b"restored" not in (await control.call("GET", "/api/v1/events", key=other)).body
    filtered = await control.call("GET", "/api/v1/events?tenant=globex", key=key)
    assert filtered.status == 404


async def test_ps_and_usage_show_the_last_report(control: Running, tmp_path: Path) -> None:
    key = await control.tenant("acme")
    await control.tenant("globex")
    node = await control.join("n1")
    restores = (RestoreReport("disk", 2, 30, 40),)
    models = (
        model_report(f"acme/m@{'0' * 16}", "resident", device="cpu:0", device_bytes=7, restores=restores),
        model_report(f"globex/m@{'0' * 16}", "absent", disk_bytes=5),
    )
    tenants = (tenant_report("acme", requests=3, tokens=9), tenant_report("globex"))
    await node.beat(tmp_path, report=empty_report("http://127.0.0.1:9", models, tenants=tenants))
    everything = (await control.call("GET", "/api/v1/ps")).json()
    assert [item["ref"].split("/")[0] for item in everything["items"]] == ["acme", "globex"]
    assert everything["devices"][0]["device"] == "cpu:0"
    own = (await control.call("GET", "/api/v1/ps", key=key)).json()
    (item,) = own["items"]
    assert (item["state"], item["device_bytes"], item["restores"][0]["from_tier"]) == ("resident", 7, "disk")
    assert own["devices"] == []
    usage = (await control.call("GET", "/api/v1/tenants/acme/quota", key=key)).json()["usage"]
    assert [(entry["node"], entry["requests"], entry["tokens"]) for entry in usage] == [("n1", 3, 9)]


async def test_a_node_reads_origins_whole_and_in_ranges(control: Running, tmp_path: Path) -> None:
    await control.tenant("acme")
    files = {**model_files(), "1_Pooling/config.json": b'{"x": 1}'}
    model = await control.push("acme", "m", files)
    node = await control.join("n1")
    base = f"/node/v1/origins/acme/m/{model['version']}"
    for path, data in files.items():
        whole = await node.call("GET", f"{base}/{path}", folder=tmp_path)
        assert (whole.status, whole.body) == (200, data)
    data = files["model.safetensors"]
    for text, start, end in (
        ("5-9", 5, 10),
        (f"{len(data) - 3}-", len(data) - 3, len(data)),
        ("-4", -4, None),
    ):
        part = await node.call(
            "GET", f"{base}/model.safetensors", folder=tmp_path, headers={"Range": f"bytes={text}"}
        )
        assert (part.status, part.body) == (206, data[start:end])
    beyond = await node.call(
        "GET", f"{base}/model.safetensors", folder=tmp_path, headers={"Range": f"bytes={len(data)}-"}
    )
    assert beyond.status == 416
    # Not 404: to a node that would mean that it was removed itself.
    assert (await node.call("GET", f"{base}/other.json", folder=tmp_path)).status == 410


async def test_many_nodes_beat_at_once_without_losing_a_record(control: Running, tmp_path: Path) -> None:
    """Records of many nodes share a transaction; none waits for the database's lock."""
    nodes = [await control.join(f"n{number}") for number in range(12)]
    records = tuple(Record(seq, 1, "restored", "", "", "") for seq in range(1, 51))
    answers: list[BeatAnswer] = await asyncio.gather(
        *(node.beat(tmp_path, records=records) for node in nodes)
    )
    assert {answer.acked_seq for answer in answers} == {50}
    events = await control.server.control.read(lambda store: store.events(0, 1000))
    assert sum(event.kind == "restored" for event in events) == 600


# --- life -----------------------------------------------------------------------------------------


async def test_two_servers_do_not_share_a_data_directory(control: Running) -> None:
    second = Control(control.server.config)
    with pytest.raises(AlreadyRunning, match="another control server"):
        await second.start()


async def test_files_that_no_version_claims_are_swept_at_the_start(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as first:
        await first.tenant("acme")
        model = await first.push("acme", "m", model_files())
    stray = tmp_path / "control" / "models" / "ghost" / "m" / ("0" * 16)
    stray.mkdir(parents=True)
    (stray / "config.json").write_bytes(b"{}")
    leftover = tmp_path / "control" / "uploads" / "abc"
    leftover.mkdir()
    async with running(tmp_path / "control") as second:
        assert not (tmp_path / "control" / "models" / "ghost").exists()
        assert not leftover.exists()
        node = await second.join("n1")
        kept = await node.call(
            "GET", f"/node/v1/origins/acme/m/{model['version']}/config.json", folder=tmp_path
        )
        assert kept.status == 200


async def test_a_stop_answers_the_long_polls(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        node = await control.join("n1")
        await node.beat(tmp_path)
        waiting = asyncio.create_task(node.beat(tmp_path, wait_ms=20_000))
        await until(lambda: bool(control.server.control._polls))
        begun = asyncio.get_running_loop().time()
    assert (await waiting).plan is None
    assert asyncio.get_running_loop().time() - begun < 8.0
