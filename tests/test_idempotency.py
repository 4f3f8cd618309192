"""Requests that are sent again: every POST of the running app, once through a network that loses answers.

Covers: one effect and one answer however often a request is sent, the transaction that holds both, what is
kept and for how long, duplicates at one time, deletions. Does not cover: other callers and hostile keys
(``attacks/test_replays``), or a control server that is killed (``test_control_crash``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from losing_proxy import losing_proxy
from running_control import Answer, Running, declare, model_files, running

import bunkhouse
from bunkhouse._request import Request, json_request, resolve_address
from bunkhouse._retry import RetryPolicy
from bunkhouse._transport import AsyncSender
from control import idempotency
from control.catalog import Change, DropReplays, Joiner, PutReplay, ReplayRow
from control.server import build_public_app
from control.state import Control
from control.store import Store

TENANT = {"name": "new"}
KEYS = "/api/v1/tenants/acme/keys"


@dataclass(slots=True)
class Site:
    """A control server that can be asked everything, and the transactions that it wrote."""

    control: Running
    origin: Path
    writes: list[Sequence[Change]] = field(default_factory=list)

    @property
    def state(self) -> Control:
        return self.control.server.control

    def effects(self) -> list[Sequence[Change]]:
        """The transactions that changed more than what is kept of answers."""
        kept = (PutReplay, DropReplays)
        return [each for each in self.writes if any(not isinstance(change, kept) for change in each)]


@pytest_asyncio.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    origin = tmp_path / "origin"
    origin.mkdir()
    for path, data in model_files(9).items():
        (origin / path).write_bytes(data)
    async with running(tmp_path / "control", origin_roots=(str(tmp_path),)) as control:
        await control.tenant("acme")
        site = Site(control, origin)
        store = site.state._store
        write = store.write

        def noted(changes: Sequence[Change], seq: int) -> None:
            write(changes, seq)
            site.writes.append(tuple(changes))

        monkeypatch.setattr(store, "write", noted)
        yield site


# --- every route ----------------------------------------------------------------------------------


async def uploaded(site: Site) -> str:
    """The id of an upload that is complete."""
    files = model_files(5)
    made = await site.control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))
    upload_id = str(made.json()["upload_id"])
    for path, data in files.items():
        await site.control.send_file(upload_id, path, 0, data)
    return upload_id


async def for_tenant(site: Site) -> tuple[str, Any]:
    return "/api/v1/tenants", TENANT


async def for_key(site: Site) -> tuple[str, Any]:
    return KEYS, {"label": "laptop"}


async def for_token(site: Site) -> tuple[str, Any]:
    return "/api/v1/nodes/tokens", {}


async def for_router_token(site: Site) -> tuple[str, Any]:
    return "/api/v1/routers/tokens", {}


async def for_upload(site: Site) -> tuple[str, Any]:
    return "/api/v1/tenants/acme/uploads", declare("m", model_files(1))


async def for_commit(site: Site) -> tuple[str, Any]:
    return f"/api/v1/uploads/{await uploaded(site)}/commit", None


async def for_origin(site: Site) -> tuple[str, Any]:
    return "/api/v1/tenants/acme/models", {"name": "m", "origin": site.origin.as_uri()}


# How each route is asked for something that has an effect: one line for a new route, or its test fails.
ASKED: dict[str, Callable[[Site], Awaitable[tuple[str, Any]]]] = {
    "/api/v1/tenants": for_tenant,
    "/api/v1/tenants/{tenant}/keys": for_key,
    "/api/v1/nodes/tokens": for_token,
    "/api/v1/routers/tokens": for_router_token,
    "/api/v1/tenants/{tenant}/uploads": for_upload,
    "/api/v1/uploads/{upload_id}/commit": for_commit,
    "/api/v1/tenants/{tenant}/models": for_origin,
}


def posts(control: Control) -> list[str]:
    """Every POST of the management API, as the running app lists them."""
    return sorted(
        route.resource.canonical
        for route in build_public_app(control).router.routes()
        if route.resource is not None and route.method == "POST" and route.resource.canonical[:5] == "/api/"
    )


async def test_a_lost_answer_to_any_post_leaves_one_effect(site: Site) -> None:
    """The SDK's own retry, through a proxy that lets the request through and loses the answer, twice."""
    assert set(posts(site.state)) == set(ASKED)
    async with losing_proxy(site.control.url) as proxy:
        address = resolve_address(proxy.url, site.control.operator_key)
        for route in posts(site.state):
            path, body = await ASKED[route](site)
            site.writes.clear()
            proxy.to_lose, proxy.lost = 2, 0
            request = json_request("POST", path, body) if body is not None else Request("POST", path)
            sender = AsyncSender(address, None, RetryPolicy(backoff_s=0.001))
            answer = await sender.send(request)
            await sender.close()
            assert (proxy.lost, answer.status) == (2, 201), (route, answer.body)
            assert answer.headers["idempotency-replayed"] == "true", route
            (effect,) = site.effects()
            # Both in one transaction: a crash leaves both or neither.
            assert any(isinstance(change, PutReplay) for change in effect), route
            assert len(site.writes) == 1, route
    assert len(site.state.catalog.keys_of("acme")) == 2
    assert [token.joiner for token in site.state.catalog.tokens.values()] == [Joiner.NODE, Joiner.ROUTER]


async def test_a_lost_answer_to_a_deletion_is_no_error(site: Site) -> None:
    """The second try finds nothing, because the first one did it; nothing there at all is still an error."""
    node = await site.control.join("n1")
    model = await site.control.push("acme", "m", model_files(3))
    key_id = (await site.control.key("acme")).split("_")[1]
    async with losing_proxy(site.control.url) as proxy:
        retry = RetryPolicy(backoff_s=0.001)
        async with bunkhouse.AsyncClient(proxy.url, site.control.operator_key, retry=retry) as client:
            for delete, name in (
                (client.delete_model, model["ref"]),
                (client.revoke_key, key_id),
                (client.delete_node, node.name),
                (client.delete_tenant, "acme"),
            ):
                proxy.to_lose = 1
                await delete(name)
                with pytest.raises(bunkhouse.NotFound):
                    await delete(name)
            assert proxy.lost == 4


async def test_a_repeated_post_of_any_route_gets_the_same_answer(site: Site) -> None:
    for route in posts(site.state):
        path, body = await ASKED[route](site)
        headers = {"Idempotency-Key": route}
        first = await site.control.call("POST", path, body, headers=headers)
        again = await site.control.call("POST", path, body, headers=headers)
        assert (again.status, again.body) == (first.status, first.body), route
        assert again.headers["Content-Type"] == first.headers["Content-Type"]
        assert "Idempotency-Replayed" not in first.headers
        assert again.headers["Idempotency-Replayed"] == "true"
        other = {"name": "other"} if body is None else {**body, "extra": 1}
        refused = await site.control.call("POST", path, other, headers=headers)
        assert (refused.status, refused.error["code"]) == (422, "idempotency_key_reused"), route
        assert refused.error["field"] == "Idempotency-Key"


async def test_without_a_key_every_request_is_one_of_its_own(site: Site) -> None:
    made = [await site.control.call("POST", KEYS, {}) for _ in range(2)]
    assert made[0].json()["key_id"] != made[1].json()["key_id"]
    assert not any(isinstance(change, PutReplay) for each in site.writes for change in each)


# --- what is kept ---------------------------------------------------------------------------------


async def make_key(control: Running, name: str = "k1", **options: Any) -> Answer:
    return await control.call("POST", KEYS, {}, headers={"Idempotency-Key": name}, **options)


async def test_a_new_key_is_told_again_after_a_restart_and_never_stored_in_clear(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        await control.tenant("acme")
        first = await make_key(control, "the-name-of-this-request")
    secret = first.json()["key"].split("_", 2)[2].encode()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "control").glob("control.db*"))
    assert b"replays" in stored
    assert secret not in stored
    assert b"the-name-of-this-request" not in stored
    async with running(tmp_path / "control") as control:
        again = await make_key(control, "the-name-of-this-request")
        assert (again.status, again.body) == (201, first.body)
        assert (await control.call("GET", "/v1/models", key=again.json()["key"])).status == 200


def kept_rows(folder: Path) -> list[ReplayRow]:
    store = Store(folder / "control.db")
    try:
        slots = store._db.execute("select slot from replays").fetchall()
        return [row for (slot,) in slots if (row := store.replay(slot)) is not None]
    finally:
        store.close()


async def test_a_refusal_is_decided_anew(site: Site) -> None:
    """It had no effect, and what was in its way may be gone."""
    headers = {"Idempotency-Key": "t1"}
    refused = await site.control.call("POST", "/api/v1/tenants", {"name": "acme"}, headers=headers)
    assert refused.status == 409
    await site.control.call("DELETE", "/api/v1/tenants/acme")
    made = await site.control.call("POST", "/api/v1/tenants", {"name": "acme"}, headers=headers)
    assert (made.status, "Idempotency-Replayed" in made.headers) == (201, False)


async def test_a_refusal_that_had_an_effect_is_told_again(site: Site) -> None:
    """A commit of what can never be a version drops the upload; its repetition is not "no such upload"."""
    files = {**model_files(), "model.safetensors": b"\x08" + b"\0" * 7 + b"not json"}
    made = await site.control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))
    upload_id = made.json()["upload_id"]
    for path, data in files.items():
        await site.control.send_file(upload_id, path, 0, data)
    path, headers = f"/api/v1/uploads/{upload_id}/commit", {"Idempotency-Key": "c1"}
    refused = await site.control.call("POST", path, headers=headers)
    assert (refused.status, refused.error["code"]) == (422, "model_refused")
    again = await site.control.call("POST", path, headers=headers)
    assert (again.status, again.body) == (422, refused.body)
    assert (await site.control.call("POST", path, headers={"Idempotency-Key": "c2"})).status == 404


async def test_a_commit_that_gave_a_file_up_says_so_again(site: Site) -> None:
    """A file that is not what was declared is removed; the repetition does not only say that it is missing.
    What is sent after that is committed under a name of its own."""
    files = model_files()
    made = await site.control.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))
    upload_id = made.json()["upload_id"]
    for path, data in files.items():
        await site.control.send_file(upload_id, path, 0, data.replace(b"{}", b"[]"))
    path, headers = f"/api/v1/uploads/{upload_id}/commit", {"Idempotency-Key": "c1"}
    refused = await site.control.call("POST", path, headers=headers)
    assert (refused.status, refused.error["code"]) == (422, "wrong_sha256")
    again = await site.control.call("POST", path, headers=headers)
    assert (again.status, again.body) == (422, refused.body)
    anew = await site.control.call("POST", path, headers={"Idempotency-Key": "c2"})
    assert (anew.status, anew.error["field"]) == (409, "tokenizer.json")
    assert (await site.control.send_file(upload_id, "tokenizer.json", 0, b"{}")).status == 204
    assert (await site.control.call("POST", path, headers={"Idempotency-Key": "c2"})).status == 201


async def test_what_is_kept_ends_after_a_day(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await make_key(site.control)
    now_ms = first.json()["created_ms"]
    monkeypatch.setattr("control.routes.access.wall_ms", lambda: now_ms + idempotency.LIFE_MS - 1_000)
    assert (await make_key(site.control)).body == first.body
    monkeypatch.setattr("control.routes.access.wall_ms", lambda: now_ms + idempotency.LIFE_MS + 1_000)
    assert (await make_key(site.control)).json()["key_id"] != first.json()["key_id"]
    await site.state.sweep(now_ms + 3 * idempotency.LIFE_MS)
    assert kept_rows(site.state.config.data_dir) == []


async def test_an_answer_that_is_too_large_is_not_kept_and_found_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "ANSWER_BYTES_MAX", 100)
    path, body = await for_upload(site)
    headers = {"Idempotency-Key": "u1"}
    first = await site.control.call("POST", path, body, headers=headers)
    again = await site.control.call("POST", path, body, headers=headers)
    assert (again.status, again.body) == (201, first.body)
    assert "Idempotency-Replayed" not in again.headers


# --- duplicates at one time -----------------------------------------------------------------------


async def test_duplicates_at_one_time_get_one_answer(site: Site) -> None:
    answers = await asyncio.gather(*(make_key(site.control) for _ in range(8)))
    assert len({answer.body for answer in answers}) == 1
    assert sorted("Idempotency-Replayed" in answer.headers for answer in answers) == [False] + [True] * 7


async def test_a_duplicate_of_a_long_request_is_told_to_come_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "WAIT_S", 0.0)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def held(control: Control, changes: Sequence[Change]) -> None:
        begun.set()
        await go_on.wait()
        await write(control, changes)

    write = Control._write
    monkeypatch.setattr(Control, "_write", held)
    first = asyncio.create_task(make_key(site.control))
    await begun.wait()
    early = await make_key(site.control)
    assert (early.status, early.error["code"]) == (409, "request_in_progress")
    assert (early.headers["Retry-After"], early.headers["x-should-retry"]) == ("1", "true")
    go_on.set()
    made = await first
    assert made.status == 201
    assert (await make_key(site.control)).body == made.body


async def test_a_caller_that_leaves_gets_the_answer_when_it_comes_back(site: Site) -> None:
    """Its request runs to its end; the repetition finds what it did."""
    async with losing_proxy(site.control.url) as proxy:
        proxy.to_lose = 1
        headers = {
            "Authorization": f"Bearer {site.control.operator_key}",
            "Idempotency-Key": "k1",
        }
        with pytest.raises(aiohttp.ServerDisconnectedError):
            async with site.control.session.post(proxy.url + KEYS, data=b"{}", headers=headers) as answer:
                await answer.read()
    assert (await make_key(site.control)).headers["Idempotency-Replayed"] == "true"
    assert len(site.state.catalog.keys_of("acme")) == 2


async def test_each_request_of_a_new_name_is_new(site: Site) -> None:
    bodies = [(await make_key(site.control, name)).json() for name in ("a", "b", "~" * 255, "a")]
    assert bodies[0] == bodies[3]
    assert len({json.dumps(body) for body in bodies}) == 3
