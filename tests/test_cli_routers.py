"""``bunk router`` and what ``bunk doctor`` says of routers, against the real control.

Covers: tokens, the list, removal, checks. Does not cover: a router that does its work
(``test_router_process``).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from click.testing import CliRunner, Result
from running_control import Running, running, until
from running_routers import router_config, serving

from bunkhouse._types import Router
from bunkhouse.cli.doctor import check_routers
from bunkhouse.cli.main import bunk
from control.router_process import Router as RouterProcess


async def command(control: Running, folder: Path, *arguments: str) -> Result:
    key = folder / "operator"
    key.write_text(control.operator_key)
    key.chmod(0o600)
    words = [*arguments, "--url", control.url, "--key-file", str(key)]
    result = await asyncio.to_thread(CliRunner().invoke, bunk, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


async def test_a_router_joins_with_a_token_of_the_command_and_is_listed(tmp_path: Path) -> None:
    async with running(tmp_path / "control") as control:
        assert "no routers" in (await command(control, tmp_path, "router", "ls")).output
        token = tmp_path / "token"
        made = await command(
            control, tmp_path, "router", "token", "create", "--name", "r1", "--save-to", str(token)
        )
        assert made.exit_code == 0, made.output
        process = RouterProcess(router_config(control, tmp_path / "r1", "r1", token))
        async with serving(process, control) as router:
            await router.until_heard()
            assert not token.exists()  # a spent token is of no use to anybody but a thief
            said = control.server.control.routers
            await until(lambda: (known := said.of("r1")) is not None and bool(known.ask.start))
            listed = await command(control, tmp_path, "router", "ls", "-o", "json")
            (row,) = json.loads(listed.output)["items"]
            assert (row["router"], row["state"], row["url"]) == ("r1", "up", router.url)
            assert "ok    router r1: up" in (await command(control, tmp_path, "doctor")).output
            removed = await command(control, tmp_path, "router", "rm", "r1", "--yes")
            assert "removed router r1" in removed.output
            gone = await command(control, tmp_path, "router", "rm", "r1", "--yes")
            assert gone.exit_code == 3


def test_the_doctor_names_routers_that_are_not_heard_or_whose_clock_is_off() -> None:
    rows = [
        Router("a", "up", "http://a", "10.0.0.1", 1, 5_000),
        Router("b", "silent", None, None, 1, 90_000),
        Router("c", "up", None, None, 1, 5, clock_skew_ms=-70_000),
        Router("d", "cloned", None, None, 1, 5),
    ]
    found = [(check.name, check.state) for check in check_routers(tuple(rows))]
    assert found == [
        ("router a", "ok"),
        ("router b", "warn"),
        ("router c", "ok"),
        ("router c", "fail"),
        ("router d", "fail"),
    ]
