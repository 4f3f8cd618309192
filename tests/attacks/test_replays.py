"""Kept answers of POSTs: who may get them again, what hostile Idempotency-Keys do, and how many are kept.

Covers: other tenants, other keys and revoked keys with the same Idempotency-Key, malformed ones, a flood of
them, and a database whose kept answers were changed. Does not cover: honest repetitions
(``test_idempotency``).
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from running_control import Answer, Running, declare, model_files, running

NAME = {"Idempotency-Key": "the-same-for-all"}


@dataclass(slots=True)
class Site:
    control: Running
    acme: str
    globex: str

    async def declare(self, tenant: str, key: str, name: str = "", **files: int) -> Answer:
        body = declare("m", model_files(**files))
        headers = {"Idempotency-Key": name} if name else NAME
        return await self.control.call(
            "POST", f"/api/v1/tenants/{tenant}/uploads", body, key=key, headers=headers
        )

    def kept(self) -> dict[str, int]:
        path = self.control.server.config.data_dir / "control.db"
        with sqlite3.connect(path) as database:
            return dict(database.execute("select owner, count(*) from replays group by owner").fetchall())


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path / "control") as control:
        yield Site(control, await control.tenant("acme"), await control.tenant("globex"))


async def test_another_caller_gets_nothing_of_what_was_kept(site: Site) -> None:
    """Not another tenant, not the operator, not another key of the same tenant: each has names of its own."""
    first = await site.declare("acme", site.acme)
    assert first.status == 201
    foreign = await site.declare("acme", site.globex)
    assert (foreign.status, "Idempotency-Replayed" in foreign.headers) == (404, False)
    own = await site.declare("globex", site.globex)
    assert own.json()["upload_id"] != first.json()["upload_id"]
    for key in (site.control.operator_key, await site.control.key("acme")):
        answer = await site.declare("acme", key)
        assert "Idempotency-Replayed" not in answer.headers
    assert (await site.declare("acme", site.acme)).headers["Idempotency-Replayed"] == "true"


async def test_a_revoked_key_gets_nothing_again(site: Site) -> None:
    await site.declare("acme", site.acme)
    await site.control.call("DELETE", f"/api/v1/keys/{site.acme.split('_')[1]}")
    assert (await site.declare("acme", site.acme)).status == 401


async def test_a_deleted_tenants_answers_are_gone(site: Site) -> None:
    await site.declare("acme", site.acme)
    await site.declare("globex", site.globex)
    assert site.kept() == {"acme": 1, "globex": 1}
    await site.control.call("DELETE", "/api/v1/tenants/acme")
    assert site.kept() == {"globex": 1}


@pytest.mark.parametrize("name", ["", " ", "a b", "x" * 256, "\xe9", "a\tb"])
async def test_a_malformed_name_is_refused_and_nothing_done(site: Site, name: str) -> None:
    before = dict(site.control.server.control.catalog.tenants)
    headers = {"Idempotency-Key": name}
    refused = await site.control.call("POST", "/api/v1/tenants", {"name": "new"}, headers=headers)
    assert (refused.status, refused.error["field"]) == (400, "Idempotency-Key")
    assert site.control.server.control.catalog.tenants == before


async def test_two_names_are_none(site: Site) -> None:
    headers = [
        ("Authorization", f"Bearer {site.control.operator_key}"),
        ("Idempotency-Key", "a"),
        ("Idempotency-Key", "b"),
    ]
    async with site.control.session.post(
        f"{site.control.url}/api/v1/tenants", data=b'{"name":"new"}', headers=headers
    ) as answer:
        assert answer.status == 400


async def test_a_flood_of_names_costs_its_own_tenant_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest of the same tenant go; what others kept stays."""
    monkeypatch.setattr("control.catalog.REPLAYS_PER_TENANT_MAX", 5)
    await site.declare("globex", site.globex)
    for number in range(12):
        answer = await site.declare("acme", site.acme, f"n{number}")
        assert answer.status == 201
    assert site.kept() == {"acme": 5, "globex": 1}
    assert "Idempotency-Replayed" not in (await site.declare("acme", site.acme, "n1")).headers
    assert "Idempotency-Replayed" in (await site.declare("acme", site.acme, "n11")).headers
    assert "Idempotency-Replayed" in (await site.declare("globex", site.globex)).headers


async def test_a_kept_answer_that_was_changed_is_not_given(site: Site) -> None:
    """Nor is one that was put in another's place: it opens under its own name only."""
    await site.declare("acme", site.acme, "one")
    await site.declare("acme", site.acme, "two", seed=2)
    path = site.control.server.config.data_dir / "control.db"
    database = sqlite3.connect(path)
    with database:
        (one, seal), (two, other) = database.execute(
            "select slot, sealed from replays order by rowid"
        ).fetchall()
        database.execute("update replays set sealed = ? where slot = ?", (other, one))
        database.execute("update replays set sealed = ? where slot = ?", (seal[:-1] + b"\0", two))
    database.close()
    for name, seed in (("one", 0), ("two", 2)):
        answer = await site.declare("acme", site.acme, name, seed=seed)
        assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
