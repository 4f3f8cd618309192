"""``bunk doctor``: what is wrong, slow or unsafe, and the way out of each.

Covers: the checks of the server, the key and the nodes over the API, the checks of this box when it is a
node's (``bunk-agent check``), and ``--bench``: measuring this box and what follows for restores
(``bunk-agent calibrate``). Does not cover: repairing anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bunkhouse._client import Client
from bunkhouse._errors import AuthenticationFailed, BadAnswer, BunkhouseError, NotFound, PermissionDenied
from bunkhouse._types import About, Node, Router
from bunkhouse._version import __version__
from bunkhouse.cli.api import EXIT_FAILED, output_option, reported, target_options
from bunkhouse.cli.context import NoTarget, StillStarting, find_target
from bunkhouse.cli.private import BadFile
from bunkhouse.cli.tables import Output, printable, span, table
from bunkhouse.cli.up import default_data_dir

# Certificates and keys are judged by the clock; a few seconds do no harm, minutes lock nodes out.
SKEW_WARN_MS = 5_000
SKEW_FAIL_MS = 60_000
# A key that ends within a week is replaced in time only if somebody is told.
KEY_WARN_MS = 7 * 24 * 3600 * 1000
# A disk that fills up and ages is a different one after a month.
CALIBRATION_WARN_MS = 30 * 24 * 3600 * 1000
# Below this many restores a percentile says little.
RESTORES_MIN = 20
ESTIMATE_WARN_PERCENT = 15
# Looking takes a moment; measuring three seconds, with a GPU's first context perhaps fifteen.
CHECK_TIMEOUT_S = 60.0
BENCH_TIMEOUT_S = 120.0

_EPILOG = """\
Exit codes: 0 nothing failed (warnings do not count), 1 a check failed or measuring did, 2 wrong usage.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line. ``state``: ok, warn (works, but worse than it could) or fail; ``hint``: the way out."""

    name: str
    state: str
    detail: str
    hint: str = ""


class BenchFailed(BunkhouseError):
    """This box can not be looked at or measured; the text says why and what to do."""


@click.command(epilog=_EPILOG)
@click.option("--bench", is_flag=True, help="Measure this box first: about three seconds, 256 MiB of disk.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="The agent's, when this box is a node. Default: that of `bunk up`, if there is one.",
)
@target_options
@output_option
def doctor(output: str, url: str | None, key_file: Path | None, data_dir: Path | None, bench: bool) -> None:
    """Say what is wrong, slow or unsafe, and what to do about it.

    Asks the server, and looks at this box when it is a node. With --bench the box is measured as well:
    what was found is kept, and its agent uses it for estimates and for the form of the host tier.
    """
    out = Output(output)
    with reported(out):
        agent_dir = data_dir or default_data_dir() / "agent"
        measured = _agent("calibrate", agent_dir, BENCH_TIMEOUT_S) if bench else None
        checks = [*_server_checks(url, key_file), *_box_checks(agent_dir, data_dir is not None)]
        if out.json:
            out.document({"checks": checks, "bench": measured}, "")
        else:
            for check in checks:
                _print_check(check)
            if measured is not None:
                _print_bench(measured)
    if any(check.state == "fail" for check in checks):
        raise click.exceptions.Exit(EXIT_FAILED)


def _print_check(check: Check) -> None:
    click.echo(printable(f"{check.state:<4}  {check.name}: {check.detail}"))
    if check.hint:
        click.echo(printable(f"      {check.hint}"))


# --- the server -----------------------------------------------------------------------------------


def _server_checks(url: str | None, key_file: Path | None) -> Iterator[Check]:
    """A server that can not be asked is a failed check and the end of its checks, not of the command."""
    try:
        target = find_target(url, key_file)
    except StillStarting as error:
        yield Check("control", "fail", str(error), "run this again then; its logs are in DATA_DIR/logs")
        return
    except (NoTarget, BadFile) as error:
        yield Check("control", "fail", str(error), "name the server with --url and its key with --key-file")
        return
    with Client(target.url, target.api_key or "") as client:
        started = time.time()
        try:
            about = client.about()
        except AuthenticationFailed as error:
            yield Check("control", "ok", f"{target.url} answers")
            yield Check("key", "fail", str(error), "give a valid one with --key-file or BUNKHOUSE_API_KEY")
            return
        except BunkhouseError as error:
            hint = "is the server running (`bunk up`), is it the right --url, and is it of this release?"
            yield Check("control", "fail", str(error), hint)
            return
        yield check_version(target.url, about.version)
        yield check_clock(about.now_ms, started, time.time())
        yield check_key(about)
        if about.tenant is not None:
            return  # nodes are the operator's business
        try:
            nodes = client.nodes()
        except (PermissionDenied, BadAnswer) as error:
            yield Check("nodes", "fail", str(error), "is the server of another release than this command?")
            return
        routers: tuple[Router, ...] = ()
        with suppress(NotFound):  # a server of an earlier release has none
            routers = client.routers()
    yield from check_nodes(nodes, round(time.time() * 1000))
    yield from check_routers(routers)


def check_version(url: str, version: str) -> Check:
    detail = f"{url} answers, version {version}"
    if version.split(".")[:2] == __version__.split(".")[:2]:
        return Check("control", "ok", detail)
    hint = "install the same release of both: newer fields and commands are missing on the older side"
    return Check("control", "warn", f"{detail}, this command is {__version__}", hint)


def check_clock(server_ms: int, started_s: float, ended_s: float) -> Check:
    """The server read its clock somewhere between the start and the end of the call."""
    early_ms, late_ms = started_s * 1000, ended_s * 1000
    skew_ms = round(max(0.0, early_ms - server_ms, server_ms - late_ms))
    detail = f"{skew_ms / 1000:g} s off the server's" if skew_ms else "as the server's"
    hint = "set both clocks by NTP (chrony): certificates and keys end by them"
    state = "fail" if skew_ms > SKEW_FAIL_MS else "warn" if skew_ms > SKEW_WARN_MS else "ok"
    return Check("clock", state, detail, "" if state == "ok" else hint)


def check_key(about: About) -> Check:
    whose = "an operator's, may do everything" if about.tenant is None else f"of tenant {about.tenant}"
    if about.expires_ms is None:
        return Check("key", "ok", f"{whose}, valid until revoked")
    left_ms = about.expires_ms - about.now_ms
    detail = f"{whose}, valid for another {span(max(0, left_ms))}"
    if left_ms < KEY_WARN_MS:
        return Check("key", "warn", detail, "make a new one in time: bunk key create TENANT")
    return Check("key", "ok", detail)


def check_nodes(nodes: tuple[Node, ...], now_ms: int) -> Iterator[Check]:
    """A line per node, and more for what is wrong with it."""
    if not nodes:
        hint = "make a join token with `bunk node token create` and start bunk-agent on a box with it"
        yield Check("nodes", "fail", "none has joined: nothing can be served", hint)
        return
    if all(node.state != "up" for node in nodes):
        drained = all(node.state in ("draining", "drained") for node in nodes)
        hint = "all drain: `bunk node drain --undo NODE`" if drained else "look at bunk-agent's log on them"
        yield Check("nodes", "fail", "none is up: nothing can be served", hint)
    for node in nodes:
        name = f"node {node.node}"
        heard = "" if node.heard_ago_ms is None else f", heard {span(node.heard_ago_ms)} ago"
        detail = f"{node.state}{heard}"
        if node.state == "up":
            yield Check(name, "ok", detail)
        elif node.state in ("draining", "drained"):
            hint = f"it takes no new requests; `bunk node drain --undo {node.node}` lets it"
            yield Check(name, "warn", detail, hint)
        elif node.state == "cloned":
            yield _cloned(name, "bunk-agent", "node")
        else:
            yield Check(name, "warn", detail, "is bunk-agent running there, and does it reach control?")
        for device in node.devices:
            if not device.healthy:
                hint = "nvidia-smi and dmesg on the box tell more"
                yield Check(name, "fail", f"{device.device} does not answer", hint)
        yield from _check_line(name, node)
        yield from _check_calibration(name, node, now_ms)


def _cloned(name: str, process: str, what: str) -> Check:
    hint = f"`bunk events` says which; on the copy stop {process}, remove the folder 'identity' in its data "
    hint += f"directory and join it with a new token; if you copied nothing: `bunk {what} rm`"
    return Check(name, "fail", "two boxes use its identity: neither is sent anything", hint)


def check_routers(routers: tuple[Router, ...]) -> Iterator[Check]:
    """A line per router that is a process of its own; none is no fault."""
    for router in routers:
        name = f"router {router.router}"
        heard = "" if router.heard_ago_ms is None else f", heard {span(router.heard_ago_ms)} ago"
        if router.state == "cloned":
            yield _cloned(name, "bunk-control router", "router")
            continue
        if router.state != "up":
            hint = "is `bunk-control router` running there, and does it reach control? Gone: `bunk router rm`"
            yield Check(name, "warn", f"{router.state}{heard}", hint)
            continue
        yield Check(name, "ok", f"{router.state}{heard}, {router.in_flight} in flight")
        yield from _check_skew(name, router.clock_skew_ms or 0)


def _check_skew(name: str, skew_ms: int) -> Iterator[Check]:
    """The clock of a box that control hears."""
    if abs(skew_ms) > SKEW_WARN_MS:
        state = "fail" if abs(skew_ms) > SKEW_FAIL_MS else "warn"
        which = "ahead of" if skew_ms > 0 else "behind"
        detail = f"its clock is {abs(skew_ms) / 1000:g} s {which} control's"
        yield Check(name, state, detail, "set both clocks by NTP (chrony): certificates end by them")


def _check_line(name: str, node: Node) -> Iterator[Check]:
    """The clock and the line between control and a node that is up."""
    if node.state == "up":
        yield from _check_skew(name, node.clock_skew_ms or 0)
    if node.state == "up" and node.route_url is None:
        hint = "run its agent without --route-listen off, or control with --plain-routes in a safe network"
        yield Check(name, "warn", "the router can not call it over mutual TLS", hint)


def _check_calibration(name: str, node: Node, now_ms: int) -> Iterator[Check]:
    found = node.calibration
    if node.state != "up":
        return
    hint = "run `bunk doctor --bench` on the box while it is idle"
    if found is None:
        yield Check(name, "warn", "was never measured: its estimates are assumptions", hint)
        return
    age_ms = max(0, now_ms - found.measured_ms)
    decoder = "compiled kernels" if found.kernels else "no compiled kernels"
    detail = f"measured {span(age_ms)} ago, host form {found.host_form}, {decoder}"
    yield Check(name, *(("warn", detail, hint) if age_ms > CALIBRATION_WARN_MS else ("ok", detail)))
    for seen in found.accuracy:
        if seen.count >= RESTORES_MIN and seen.error_percent_p95 > ESTIMATE_WARN_PERCENT:
            detail = f"restores from {seen.from_tier} are estimated {seen.error_percent_p95}% off (p95)"
            yield Check(name, "warn", detail, "other work on the box makes its restores uneven")


# --- this box -------------------------------------------------------------------------------------


def _box_checks(agent_dir: Path, asked_for: bool) -> Iterator[Check]:
    """What the agent's own command says; nothing when this box is no node."""
    if not agent_dir.is_dir():
        if asked_for:
            yield Check("this box", "fail", f"{agent_dir} is no directory", "give the agent's --data-dir")
        return
    try:
        found = _agent("check", agent_dir, CHECK_TIMEOUT_S)
        yield from (
            Check(f"this box: {each['name']}", each["state"], each["detail"], each["hint"])
            for each in found["checks"]
        )
    except BenchFailed as error:
        yield Check("this box", "warn", str(error), "install the server beside this command to look closer")
    except (KeyError, TypeError):
        yield Check("this box", "fail", "bunk-agent is of another release", "install the same release")


def _agent(command: str, agent_dir: Path, timeout_s: float) -> dict[str, Any]:
    """What ``bunk-agent COMMAND`` prints. Raises ``BenchFailed``."""
    if sys.platform != "linux":
        raise BenchFailed("boxes are Linux machines: run this there")
    from bunkhouse.cli.supervise import UpFailed, find_executable

    try:
        agent = find_executable("bunk-agent")
        done = subprocess.run(
            [agent, command, "--data-dir", str(agent_dir), "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except (UpFailed, OSError) as error:
        raise BenchFailed(str(error)) from None
    except subprocess.TimeoutExpired:
        raise BenchFailed(f"bunk-agent {command} took more than {timeout_s:g} s") from None
    try:
        value = json.loads(done.stdout)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise BenchFailed(lines[-1][:500] if lines else f"bunk-agent {command} ended with {done.returncode}")
    return value


def _print_bench(found: dict[str, Any]) -> None:
    rates = [(name, rate) for name, rate in found["rates"].items() if rate]
    click.echo(
        "\n" + table(rates, [("RATE", lambda row: row[0]), ("GB/S", lambda row: f"{row[1] / 1e9:.2f}")])
    )
    device = "GPU" if found["on_cuda"] else "cpu"
    click.echo(
        f"\nmeasured in {found['took_ms']} ms on {found['threads']} of {found['cores']} cores, others used "
        f"{found['others_percent']}% meanwhile; kernels: {'compiled' if found['kernels'] else 'numpy'}; "
        f"{found['kept']}\nhost form for {device} devices: {found['host_form']}\n"
    )
    click.echo(
        table(
            found["examples"],
            [
                ("BF16 MODEL", lambda row: f"{row['model_bytes'] / 1e9:g} GB"),
                ("FROM", lambda row: f"{row['tier']}, {row['source']}"),
                ("CHOSEN", lambda row: "yes" if row["chosen"] else "no"),
                ("RESTORE MS", lambda row: row["restore_ms"]),
                ("LIMITED BY", lambda row: row["limit"]),
            ],
        )
    )
