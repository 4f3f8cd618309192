"""Draining a node: what an operator says, what the node's plan says then, and where calls go meanwhile.

Covers: a real control server in front of fake nodes, and ``bunk node drain``. Does not cover: what a real
node does with such a plan (``test_residency``, ``test_questions``), or its removal (``test_control``).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from click.testing import CliRunner, Result
from routed_fleet import Fleet, routed_fleet
from running_control import Answer, empty_report, model_report, running

from bunkhouse.cli.main import bunk

N0 = "/api/v1/nodes/n0"


async def ask(fleet: Fleet, draining: object, headers: dict[str, str] | None = None) -> Answer:
    return await fleet.control.call("PATCH", N0, {"draining": draining}, headers=headers)


async def obey(fleet: Fleet, leases: int) -> bool:
    """The first node takes its plan, and reports as a node does that goes by it. Whether it drains."""
    node, url = fleet.nodes[0], fleet.gateways[0].url
    said = await node.beat(fleet.folder)
    draining = said.plan is not None and said.plan.draining
    models = (model_report(fleet.ref, "resident", leases=leases),)
    await node.beat(fleet.folder, report=empty_report(url, models, draining=draining))
    return draining


async def state(fleet: Fleet) -> str:
    return str((await fleet.control.call("GET", N0)).json()["state"])


async def test_a_drained_node_is_asked_nothing_until_that_is_taken_back(tmp_path: Path) -> None:
    async with routed_fleet(tmp_path) as fleet:
        answer = await ask(fleet, True)
        assert (answer.status, answer.json()["state"]) == (200, "draining")
        assert await obey(fleet, leases=2)
        assert await state(fleet) == "draining"
        assert (await fleet.embed()).json() == {"node": "n1"}
        await fleet.nodes[0].beat(
            tmp_path, report=empty_report(fleet.gateways[0].url, (model_report(fleet.ref),), draining=True)
        )
        assert await state(fleet) == "drained"
        assert (await ask(fleet, True)).json()["state"] == "drained"
        assert (await ask(fleet, False)).status == 200
        assert not await obey(fleet, leases=0)
        assert await state(fleet) == "up"
        assert (await fleet.embed()).json() == {"node": "n0"}
        events = (await fleet.control.call("GET", "/api/v1/events")).json()["items"]
        said = [event["kind"] for event in events if "drain" in event["kind"]]
        assert said == ["node_draining", "node_undrained"]


async def test_only_its_own_plan_says_so_and_control_remembers(tmp_path: Path) -> None:
    async with routed_fleet(tmp_path) as fleet:
        await ask(fleet, True)
        other = (await fleet.nodes[1].beat(tmp_path)).plan
        assert other is not None
        assert not other.draining
    async with running(tmp_path / "control") as control:
        plan = control.server.control.plan_for("n0")
        assert (plan.draining, control.server.control.plan_for("n1").draining) == (True, False)


async def test_a_wrong_word_changes_nothing(tmp_path: Path) -> None:
    async with routed_fleet(tmp_path) as fleet:
        answer = await ask(fleet, "yes")
        assert (answer.status, answer.error["field"]) == (400, "draining")
        assert (await fleet.control.call("PATCH", N0, {"drains": True})).status == 400
        assert (await fleet.control.call("PATCH", "/api/v1/nodes/n9", {"draining": True})).status == 404
        seen = (await fleet.control.call("GET", N0)).headers["ETag"]
        assert (await ask(fleet, True, {"If-Match": seen})).status == 200
        assert (await ask(fleet, False, {"If-Match": seen})).status == 412
        assert await state(fleet) == "draining"


async def command(fleet: Fleet, *arguments: str) -> Result:
    key = fleet.folder / "operator"
    key.write_text(fleet.control.operator_key)
    key.chmod(0o600)
    words = ["node", "drain", *arguments, "--url", fleet.control.url, "--key-file", str(key)]
    return await asyncio.to_thread(CliRunner().invoke, bunk, words)


async def test_the_command_waits_for_the_end_of_what_runs(tmp_path: Path) -> None:
    async with routed_fleet(tmp_path) as fleet:
        assert "some may still run there" in (await command(fleet, "n0")).output
        waiting = asyncio.create_task(command(fleet, "n0", "--wait", "-o", "json"))
        assert await obey(fleet, leases=0)
        assert json.loads((await waiting).output)["state"] == "drained"
        assert "none runs there" in (await command(fleet, "n0")).output
        assert (await command(fleet, "n0", "--undo", "--wait")).exit_code == 2
        assert (await command(fleet, "n0", "--undo")).exit_code == 0
        assert not await obey(fleet, leases=0)
        assert (await command(fleet, "n9")).exit_code == 3
