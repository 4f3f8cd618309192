"""Kill -9 of a real control process: nothing that it acknowledged is lost, and it starts again.

Covers: kills between and in the middle of writes, a process at a time on one data directory, and an
orderly stop by SIGTERM. Does not cover: power cuts (``test_store`` checks that commits are synced).
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from control_process import ROOT, Process, process
from running_control import PATIENCE_S, declare, model_files

pytestmark = pytest.mark.processes


@dataclass(slots=True)
class Acknowledged:
    """What the server has answered with success: exactly this must be there afterwards."""

    tenants: set[str] = field(default_factory=set)
    keys: dict[str, str] = field(default_factory=dict)  # text to tenant
    quotas: dict[str, int] = field(default_factory=dict)
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)


async def work(server: Process, done: Acknowledged, name: str, seed: int) -> None:
    """Create one tenant and everything it may have, noting each acknowledgement as it comes."""
    status, _ = await server.call("POST", "/api/v1/tenants", {"name": name})
    assert status == 201
    done.tenants.add(name)
    for _ in range(2):
        _, key = await server.call("POST", f"/api/v1/tenants/{name}/keys", {})
        done.keys[key["key"]] = name
    _, quota = await server.call("PATCH", f"/api/v1/tenants/{name}/quota", {"requests_per_minute": 7 + seed})
    done.quotas[name] = quota["quota"]["requests_per_minute"]
    files = model_files(seed)
    _, upload = await server.call("POST", f"/api/v1/tenants/{name}/uploads", declare("m", files))
    for path, data in files.items():
        status, _ = await server.call(
            "PATCH",
            f"/api/v1/uploads/{upload['upload_id']}/files/{path}",
            data=data,
            headers={"Upload-Offset": "0"},
        )
        assert status == 204
    status, model = await server.call("POST", f"/api/v1/uploads/{upload['upload_id']}/commit")
    assert status == 201
    done.models[model["ref"]] = files
    text = next(text for text, tenant in done.keys.items() if tenant == name)
    # From the moment it is asked for, a revocation may have happened; once acknowledged, it has.
    del done.keys[text]
    status, _ = await server.call("DELETE", f"/api/v1/keys/{text.split('_')[1]}")
    assert status == 204
    done.revoked.add(text)


async def check(server: Process, done: Acknowledged, folder: Path) -> None:
    _, tenants = await server.call("GET", "/api/v1/tenants")
    assert done.tenants <= {item["tenant"] for item in tenants["items"]}
    for text in done.keys:
        status, _ = await server.call("GET", "/v1/models", headers={"Authorization": f"Bearer {text}"})
        assert status == 200
    for text in done.revoked:
        status, _ = await server.call("GET", "/v1/models", headers={"Authorization": f"Bearer {text}"})
        assert status == 401
    for tenant, rate in done.quotas.items():
        _, quota = await server.call("GET", f"/api/v1/tenants/{tenant}/quota")
        assert quota["quota"]["requests_per_minute"] == rate
    _, models = await server.call("GET", "/api/v1/models")
    known = {item["ref"]: item for item in models["items"]}
    assert done.models.keys() <= known.keys()
    # Whatever is listed is whole, acknowledged or not.
    for item in known.values():
        place = folder / "models" / item["tenant"] / item["name"] / item["version"]
        for file in item["files"]:
            assert (place / file["path"]).stat().st_size == file["size_bytes"]
    for ref, files in done.models.items():
        place = folder / "models" / known[ref]["tenant"] / "m" / known[ref]["version"]
        assert {path: (place / path).read_bytes() for path in files} == files


async def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """Rounds of work, each cut by SIGKILL after a number of acknowledgements drawn from a seed."""
    folder = tmp_path / "control"
    chance = random.Random(7)
    done = Acknowledged()
    for round_number in range(6):
        async with process(folder) as server:
            await check(server, done, folder)
            tasks = [
                asyncio.create_task(work(server, done, f"t{round_number}-{n}", 10 * round_number + n))
                for n in range(3)
            ]
            # Some rounds end in the middle of the work, the rest right after it.
            wanted = len(done.tenants) + chance.randint(0, 3)
            while len(done.tenants) < wanted and not all(task.done() for task in tasks):
                await asyncio.wait(tasks, timeout=0.001, return_when=asyncio.FIRST_COMPLETED)
            if round_number % 2:
                await asyncio.wait(tasks)
            await server.kill()
            await asyncio.gather(*tasks, return_exceptions=True)
    assert done.models
    async with process(folder) as server:
        await check(server, done, folder)
        await work(server, done, "last", 200)
        await check(server, done, folder)


async def test_a_kill_in_mid_upload_keeps_the_acknowledged_offset(tmp_path: Path) -> None:
    folder = tmp_path / "control"
    files = model_files(rows=16_384)
    data = files["model.safetensors"]
    async with process(folder) as server:
        await server.call("POST", "/api/v1/tenants", {"name": "acme"})
        _, upload = await server.call("POST", "/api/v1/tenants/acme/uploads", declare("m", files))
        path = f"/api/v1/uploads/{upload['upload_id']}/files/model.safetensors"
        status, _ = await server.call("PATCH", path, data=data[:300_000], headers={"Upload-Offset": "0"})
        assert status == 204
        sent = asyncio.Event()

        async def rest() -> AsyncIterator[bytes]:
            yield data[300_000:600_000]
            sent.set()
            await asyncio.Event().wait()

        unfinished = asyncio.create_task(
            server.call("PATCH", path, data=rest(), headers={"Upload-Offset": "300000"})
        )
        await sent.wait()
        await server.kill()
        await asyncio.wait([unfinished])
        assert unfinished.exception() is not None
    async with process(folder) as server:
        _, shown = await server.call("GET", f"/api/v1/uploads/{upload['upload_id']}")
        (offset,) = (f["offset_bytes"] for f in shown["files"] if f["path"] == "model.safetensors")
        assert 300_000 <= offset <= 600_000
        headers = {"Upload-Offset": str(offset)}
        assert (await server.call("PATCH", path, data=data[offset:], headers=headers))[0] == 204
        for name in ("config.json", "tokenizer.json"):
            other = f"/api/v1/uploads/{upload['upload_id']}/files/{name}"
            await server.call("PATCH", other, data=files[name], headers={"Upload-Offset": "0"})
        status, _ = await server.call("POST", f"/api/v1/uploads/{upload['upload_id']}/commit")
        assert status == 201


async def test_a_kill_in_mid_delete_leaves_no_half_tenant(tmp_path: Path) -> None:
    folder = tmp_path / "control"
    done = Acknowledged()
    async with process(folder) as server:
        await work(server, done, "acme", 1)
        await work(server, done, "globex", 2)
        deletion = asyncio.create_task(server.call("DELETE", "/api/v1/tenants/acme"))
        await asyncio.sleep(0)
        await server.kill()
        await asyncio.wait([deletion])
    async with process(folder) as server:
        _, tenants = await server.call("GET", "/api/v1/tenants")
        _, models = await server.call("GET", "/api/v1/models")
        there = {item["tenant"] for item in tenants["items"]}
        assert {item["tenant"] for item in models["items"]} == there
        assert {path.name for path in (folder / "models").iterdir()} == there
        assert "globex" in there


async def test_a_kill_between_an_effect_and_its_answer_does_not_double_it(tmp_path: Path) -> None:
    """Who sends a request again after the crash, with its Idempotency-Key, gets the first one's effect."""
    folder = tmp_path / "control"
    names = [f"request-{number}" for number in range(24)]
    path = "/api/v1/tenants/acme/keys"

    async def make(server: Process, name: str) -> str:
        status, made = await server.call("POST", path, {}, headers={"Idempotency-Key": name})
        assert status == 201
        return str(made["key"])

    async with process(folder) as server:
        await server.call("POST", "/api/v1/tenants", {"name": "acme"})
        tasks = [asyncio.create_task(make(server, name)) for name in names]
        # The others are anywhere between not begun and answered.
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await server.kill()
        first = await asyncio.gather(*tasks, return_exceptions=True)
    told = [key for key in first if isinstance(key, str)]
    assert told
    async with process(folder) as server:
        again = [await make(server, name) for name in names]
        _, listed = await server.call("GET", path)
    assert [key for key, answer in zip(again, first, strict=True) if isinstance(answer, str)] == told
    assert {item["key_id"] for item in listed["items"]} == {key.split("_")[1] for key in again}
    assert len(set(again)) == len(names)


async def test_sigterm_stops_in_order(tmp_path: Path) -> None:
    async with process(tmp_path / "control") as server:
        await server.call("POST", "/api/v1/tenants", {"name": "acme"})
        server.handle.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert await server.handle.wait() == 0
    assert not list(tmp_path.glob("ready-*"))


async def test_files_of_control_are_private(tmp_path: Path) -> None:
    async with process(tmp_path / "control") as server:
        done = Acknowledged()
        await work(server, done, "acme", 1)
        open_to_others = [path for path in (tmp_path / "control").rglob("*") if path.stat().st_mode & 0o077]
        assert open_to_others == []
        assert (tmp_path / "control").stat().st_mode & 0o077 == 0


async def test_wrong_arguments_are_told(tmp_path: Path) -> None:
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "control", "serve", "--data-dir", str(tmp_path), "--listen", "nowhere",
        cwd=ROOT, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await started.communicate()
    assert started.returncode == 2
    assert b"--listen: 'nowhere' is not an address" in stderr
