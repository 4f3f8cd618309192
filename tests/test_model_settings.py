"""A model's settings in control: how requests share forward passes, its devices, its replicas.

Covers: changing them of one version and of all, their limits, what a new version has, the plan that nodes
get, and the SDK's and the command's way there. Does not cover: what workers make of them (``test_compute``),
or who may call the route (``attacks/test_control_auth``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from click.testing import CliRunner
from make_models import make_encoder
from running_control import Running, model_files, running

from bunkhouse import AsyncClient, BadRequest
from bunkhouse.cli.main import bunk
from packer.gangs import run_bytes
from packer.types import Batching, ModelSpec
from packer.wire import decode

PATH = "/api/v1/models/acme/m"


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path / "control") as started:
        await started.tenant("acme")
        yield started


async def settings(control: Running, ref: str) -> tuple[int, int]:
    shown = (await control.call("GET", f"/api/v1/models/{ref}")).json()
    return shown["batch_max"], shown["batch_delay_ms"]


async def test_a_model_is_pushed_with_every_input_alone(control: Running) -> None:
    pushed = await control.push("acme", "m", model_files())
    assert (pushed["batch_max"], pushed["batch_delay_ms"]) == (1, 0)


async def test_settings_reach_the_plan_and_survive_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        await control.tenant("acme")
        await control.push("acme", "m", model_files())
        node = await control.join("box")
        before = (await node.beat(tmp_path)).plan
        answer = await control.call("PATCH", PATH, {"batch_max": 32, "batch_delay_ms": 5})
        assert (answer.status, answer.json()["batch_max"], answer.json()["batch_delay_ms"]) == (200, 32, 5)
        plan = (await node.beat(tmp_path)).plan
        assert before is not None
        assert plan is not None
        assert [spec.batching for spec in before.models] == [Batching()]
        assert [spec.batching for spec in plan.models] == [Batching(32, 5)]
        assert (await control.recorded("model_changed"))["model"] == "acme/m"
        # The same again is no news, and one field leaves the other.
        assert (await control.call("PATCH", PATH, {"batch_max": 16})).json()["batch_delay_ms"] == 5
    async with running(tmp_path / "control") as control:
        assert await settings(control, "acme/m") == (16, 5)


async def test_a_version_named_is_changed_alone_and_a_new_one_has_the_latest_s_settings(
    control: Running,
) -> None:
    old = await control.push("acme", "m", model_files(1))
    await control.call("PATCH", PATH, {"batch_max": 8})
    new = await control.push("acme", "m", model_files(2))
    assert new["batch_max"] == 8
    assert (await control.call("PATCH", f"{PATH}@latest", {"batch_max": 4})).status == 200
    assert await settings(control, new["ref"]) == (4, 0)
    assert await settings(control, old["ref"]) == (8, 0)
    await control.call("PATCH", PATH, {"batch_max": 2})
    assert [await settings(control, ref) for ref in (old["ref"], new["ref"])] == [(2, 0), (2, 0)]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "batch_max"),
        ({"batch_max": 0}, "batch_max"),
        ({"batch_max": 257}, "batch_max"),
        ({"batch_max": "32"}, "batch_max"),
        ({"batch_max": 8, "batch_delay_ms": 101}, "batch_delay_ms"),
        ({"batch_max": 8, "batch_delay_ms": -1}, "batch_delay_ms"),
        ({"batch_delay_ms": 5}, "batch_delay_ms"),  # with batch_max 1 nobody ever comes
        ({"batch_mux": 5}, None),
        ({"replicas": 0}, "replicas"),
        ({"replicas": 17}, "replicas"),
        ({"replicas": "2"}, "replicas"),
        ({"batch_max": 8, "replicas": -1}, "replicas"),
    ],
)
async def test_a_wrong_setting_names_its_field_and_changes_nothing(
    control: Running, body: object, field: str | None
) -> None:
    await control.push("acme", "m", model_files())
    refused = await control.call("PATCH", PATH, body)
    assert (refused.status, refused.error["field"]) == (400, field)
    assert await settings(control, "acme/m") == (1, 0)


async def test_one_version_that_can_not_have_it_keeps_all_as_they_are(control: Running) -> None:
    old = await control.push("acme", "m", model_files(1))
    await control.push("acme", "m", model_files(2))
    await control.call("PATCH", PATH, {"batch_max": 8, "batch_delay_ms": 5})
    await control.call("PATCH", f"/api/v1/models/{old['ref']}", {"batch_max": 1, "batch_delay_ms": 0})
    refused = await control.call("PATCH", PATH, {"batch_delay_ms": 7})
    assert refused.status == 400
    assert await settings(control, "acme/m") == (8, 5)


async def test_a_change_may_depend_on_what_its_caller_saw(control: Running) -> None:
    await control.push("acme", "m", model_files(1))
    await control.push("acme", "m", model_files(2))
    seen = (await control.call("GET", PATH)).headers["ETag"]
    first = await control.call("PATCH", PATH, {"batch_max": 8}, headers={"If-Match": seen})
    again = await control.call("PATCH", PATH, {"batch_max": 16}, headers={"If-Match": seen})
    assert (first.status, again.status) == (200, 412)
    # Another version's settings are part of what the bare name means.
    older = (await control.call("GET", "/api/v1/models")).json()["items"][1]["ref"]
    await control.call("PATCH", f"/api/v1/models/{older}", {"batch_max": 3})
    late = await control.call("PATCH", PATH, {"batch_max": 16}, headers={"If-Match": first.headers["ETag"]})
    assert late.status == 412
    assert await settings(control, "acme/m") == (8, 0)


async def test_another_tenant_s_model_can_not_be_told_from_none(control: Running) -> None:
    await control.push("acme", "m", model_files())
    globex = await control.tenant("globex")
    foreign = await control.call("PATCH", PATH, {"batch_max": 8}, key=globex)
    absent = await control.call("PATCH", "/api/v1/models/globex/m", {"batch_max": 8}, key=globex)
    assert (foreign.status, absent.status) == (404, 404)
    assert foreign.error["message"] == absent.error["message"].replace("globex/m", "acme/m")
    assert await settings(control, "acme/m") == (1, 0)


async def test_the_client_and_the_command_change_them(control: Running) -> None:
    await control.push("acme", "m", model_files())
    async with AsyncClient(control.url, control.operator_key) as client:
        assert (await client.set_model("acme/m", batch_max=8)).batch_max == 8
        with pytest.raises(BadRequest, match="from 1"):
            await client.set_model("acme/m", batch_max=0)
    words = ["model", "set", "acme/m", "--batch-max", "32", "--batch-delay", "5ms", "-o", "json"]
    environment = {"BUNKHOUSE_URL": control.url, "BUNKHOUSE_API_KEY": control.operator_key}
    result = await asyncio.to_thread(CliRunner().invoke, bunk, words, env=environment)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    assert (shown["batch_max"], shown["batch_delay_ms"]) == (32, 5)


def test_a_version_of_an_earlier_release_is_batched_as_it_was() -> None:
    text = (
        b'{"ref":{"tenant":"acme","name":"m","version":"0123456789abcdef"},"origin":"control:","files":[],'
        b'"engine":"transformers","task":"embedding","image_bytes":1,"chunk_bytes":[1],"workspace_bytes":1,'
        b'"created_ms":1}'
    )
    assert decode(text, ModelSpec).batching == Batching()


# --- several devices --------------------------------------------------------------------------------


async def test_a_model_for_several_devices_is_so_in_the_plan_and_its_cuts_with_it(
    control: Running, tmp_path: Path
) -> None:
    make_encoder(tmp_path / "m", 1, hidden=512, layers=2, heads=2)
    paths = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
    files = {path.relative_to(tmp_path / "m").as_posix(): path.read_bytes() for path in paths}
    pushed = await control.push("acme", "m", files)
    assert pushed["devices"] == 1
    node = await control.join("box")
    answer = await control.call("PATCH", PATH, {"devices": 2})
    assert (answer.status, answer.json()["devices"], answer.json()["batch_max"]) == (200, 2, 1)
    plan = (await node.beat(tmp_path)).plan
    assert plan is not None
    (spec,) = plan.models
    assert spec.devices == 2
    assert len(run_bytes(spec)) == 2
    assert sum(run_bytes(spec)) == spec.image_bytes
    # A new version has it as well, where it can be cut.
    config = json.loads(files["config.json"]) | {"initializer_range": 0.5}
    newer = await control.push("acme", "m", files | {"config.json": json.dumps(config).encode()})
    assert newer["devices"] == 2
    assert (await control.push("acme", "m", model_files()))["devices"] == 1


async def test_what_can_not_be_cut_so_often_is_refused_and_nothing_is_changed(control: Running) -> None:
    await control.push("acme", "m", model_files())
    for devices, what in ((2, "the most is 1"), (0, "must be from 1 to 16"), (17, "must be from 1")):
        answer = await control.call("PATCH", PATH, {"devices": devices, "batch_max": 4})
        assert (answer.status, answer.json()["error"]["field"]) == (400, "devices")
        assert what in answer.json()["error"]["message"]
    assert (await control.call("GET", PATH)).json()["batch_max"] == 1


def test_a_plan_of_an_earlier_release_means_one_device() -> None:
    spec = decode(
        b'{"ref":{"tenant":"acme","name":"m","version":"0000000000000000"},"origin":"file:///m","files":[],'
        b'"engine":"transformers","task":"embedding","image_bytes":4096,"chunk_bytes":[4096],'
        b'"workspace_bytes":0,"created_ms":0}',
        ModelSpec,
    )
    assert (spec.devices, spec.cuts, spec.replicas) == (1, (), 1)


# --- replicas ---------------------------------------------------------------------------------------


async def test_replicas_reach_the_plan_and_what_comes_after_and_more_than_nodes_are_warned_of(
    control: Running, tmp_path: Path
) -> None:
    assert (await control.push("acme", "m", model_files()))["replicas"] == 1
    node = await control.join("box")
    answer = await control.call("PATCH", PATH, {"replicas": 3})
    assert (answer.status, answer.json()["replicas"], answer.json()["batch_max"]) == (200, 3, 1)
    (warning,) = answer.json()["warnings"]
    assert warning.startswith("replicas: 3 nodes may hold a copy each, and 1 joined")
    plan = (await node.beat(tmp_path)).plan
    assert plan is not None
    assert [spec.replicas for spec in plan.models] == [3]
    assert (await control.push("acme", "m", model_files(2)))["replicas"] == 3
    shown = (await control.call("GET", PATH)).json()
    assert (shown["replicas"], shown["warnings"]) == (3, [])
    assert (await control.call("PATCH", PATH, {"replicas": 1})).json()["warnings"] == []


async def test_the_client_and_the_command_set_replicas(control: Running) -> None:
    await control.push("acme", "m", model_files())
    async with AsyncClient(control.url, control.operator_key) as client:
        changed = await client.set_model("acme/m", replicas=2)
        assert (changed.replicas, len(changed.warnings)) == (2, 1)
    environment = {"BUNKHOUSE_URL": control.url, "BUNKHOUSE_API_KEY": control.operator_key}

    async def run(*words: str) -> tuple[int, str]:
        result = await asyncio.to_thread(CliRunner().invoke, bunk, ["model", *words], env=environment)
        return result.exit_code, result.output

    code, said = await run("set", "acme/m", "--replicas", "4")
    assert code == 0
    assert "up to 4 nodes" in said
    assert "warning: replicas" in said
    code, said = await run("ls", "-o", "json")
    assert [row["replicas"] for row in json.loads(said)["items"]] == [4]
    for number in ("0", "17"):
        code, said = await run("set", "acme/m", "--replicas", number)
        assert code == 2
        assert "--replicas" in said
