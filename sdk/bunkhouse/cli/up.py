"""``bunk up``: a control server and an agent on this machine, for one person's daily use.

Covers: what is started with which arguments, the first tenant and its key, the context file, what is
printed. Does not cover: processes and signals (``supervise``). The data directory holds::

    control/  agent/     their state (control/operator.key: the operator's key)
    tenant.key           key of the tenant "default"
    logs/  run/          of the running stack
    up.lock              held while any process of it lives
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bunkhouse._errors import BunkhouseError, Conflict, Unreachable
from bunkhouse.cli.api import EXIT_FAILED, output_option, report, reported
from bunkhouse.cli.context import Context, read_context, remove_context, write_context
from bunkhouse.cli.private import BadFile, read_private, write_private
from bunkhouse.cli.tables import Output

if TYPE_CHECKING:
    from bunkhouse._client import Client
    from bunkhouse.cli.supervise import Child, Supervisor

LISTEN_DEFAULT = "127.0.0.1:8520"
NODE = "local"
TENANT = "default"
# Control opens its database and two sockets.
CONTROL_READY_S = 60.0
# The agent imports torch and transformers, from a cold disk perhaps.
AGENT_READY_S = 170.0
# A join is three requests on loopback.
JOIN_S = 30.0
# Calls to a server on the same machine; signals wait while one runs.
CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for."""

    data_dir: Path
    devices: tuple[str, ...]
    host_bytes: str | None
    disk_bytes: str | None
    listen: str
    node_listen: str
    node_hosts: tuple[str, ...]
    agent_listen: str
    origin_roots: tuple[str, ...]
    ready_file: Path | None

    @property
    def operator_key_file(self) -> Path:
        return self.data_dir / "control" / "operator.key"

    @property
    def tenant_key_file(self) -> Path:
        return self.data_dir / "tenant.key"

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"


@dataclass(frozen=True, slots=True)
class Ready:
    """A running stack, as ``--ready-file`` tells it."""

    url: str
    agent_url: str
    data_dir: str
    operator_key_file: str
    tenant_key_file: str
    tenant: str
    pids: dict[str, int]


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/bunkhouse``."""
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(base) / "bunkhouse"


def _address(name: str, default: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    help_text = f"{what}; port 0 picks a free one."
    return click.option(name, default=default, show_default=True, metavar="HOST:PORT", help=help_text)


_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--data-dir", type=_PATH, help="Default: $XDG_DATA_HOME/bunkhouse.")
@click.option("--device", "devices", multiple=True, metavar="D", help="cpu:96MiB, cuda, cuda:0 (repeatable).")
@click.option("--host-bytes", metavar="SIZE", help="Budget of the host-RAM tier.")
@click.option("--disk-bytes", metavar="SIZE", help="Budget of the disk tier.")
@_address("--listen", LISTEN_DEFAULT, "Address of the API")
@_address("--node-listen", "127.0.0.1:0", "Address that nodes dial")
@click.option(
    "--node-host",
    "node_hosts",
    multiple=True,
    metavar="NAME",
    help="Name or address under which other boxes reach --node-listen (repeatable).",
)
@_address("--agent-listen", "127.0.0.1:0", "Address of this machine's gateway")
@click.option(
    "--origin-root",
    "origin_roots",
    multiple=True,
    metavar="DIR",
    help="Allow `bunk model push --from` below this directory (repeatable).",
)
@click.option("--ready-file", type=_PATH, help="Write URLs, key files and process ids here, as JSON.")
@output_option
def up(output: str, data_dir: Path | None, ready_file: Path | None, **given: Any) -> None:
    """Start a control server and an agent on this machine. Ctrl-C stops both.

    On the first start a tenant "default" with a key is made. The commands in other terminals find the
    stack and the operator's key by themselves.
    """
    out = Output(output)
    with reported(out):
        if sys.platform != "linux":
            raise BadFile("bunk up needs Linux, as agents do: run it there and use bunk --url URL here")
        wanted = Wanted(
            data_dir=(data_dir or default_data_dir()).absolute(),
            ready_file=ready_file.absolute() if ready_file else None,
            **given,
        )
        code = _run(wanted, out)
    raise click.exceptions.Exit(code)


def _run(wanted: Wanted, out: Output) -> int:
    from bunkhouse.cli.supervise import DataDirLock, StopAsked, Supervisor, UpFailed

    os.umask(0o077)
    supervisor: Supervisor | None = None
    lock: DataDirLock | None = None
    code = 0
    starting = Context("", "", str(wanted.data_dir / "up.lock"))
    try:
        _make_directories(wanted)
        lock = DataDirLock(wanted.data_dir / "up.lock")
        _check_port("--listen", wanted.listen, UpFailed)
        _check_port("--node-listen", wanted.node_listen, UpFailed)
        _check_port("--agent-listen", wanted.agent_listen, UpFailed)
        supervisor = Supervisor(wanted.data_dir / "logs", lock)
        _say_starting(starting)
        _serve(wanted, supervisor, out)
    except StopAsked:
        _note(out, "stopping")
    except (UpFailed, BunkhouseError, BadFile, OSError) as error:
        report(out, error)
        code = EXIT_FAILED
    finally:
        if supervisor is not None:
            for complaint in supervisor.stop():
                _note(out, f"warning: {complaint}")
            supervisor.close()
        if lock is not None:
            remove_context(starting)
            lock.close()
    return code


def _say_starting(starting: Context) -> None:
    """Commands in other terminals say that it starts, and not that there is no server. What can not be
    written now is complained about when it matters."""
    with suppress(BadFile):
        if _other_context(starting) is None:
            write_context(starting)


def _note(out: Output, text: str) -> None:
    """Say something beside the output. With ``-o json`` standard error holds errors only."""
    if not out.json:
        click.echo(text, err=True)


def _make_directories(wanted: Wanted) -> None:
    for directory in (wanted.data_dir, wanted.data_dir / "logs", wanted.run_dir):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise BadFile(f"{directory} is not a directory: choose another --data-dir") from None
        except OSError as error:
            hint = "make it yours to write, or choose another --data-dir"
            raise BadFile(f"cannot create {directory}: {error.strerror}; {hint}") from None


def _check_port(option: str, listen: str, failure: type[Exception]) -> None:
    """A taken port is the most common reason not to start; say so before anything is started."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise failure(f"{option} {listen}: write HOST:PORT, for example {LISTEN_DEFAULT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            hint = f"choose another with {option}, or port 0 for a free one"
            raise failure(f"cannot listen on {listen} ({error.strerror}): {hint}") from None


def _serve(wanted: Wanted, supervisor: Supervisor, out: Output) -> None:
    """Start everything, tell the user, and watch until a signal or a death."""
    from bunkhouse._client import Client
    from bunkhouse._retry import RetryPolicy

    if wanted.ready_file is not None:
        wanted.ready_file.unlink(missing_ok=True)
    _note(out, "starting control")
    control, control_ready = _start_control(wanted, supervisor)
    url, node_url = _local(control_ready["url"]), _local(control_ready["node_url"])
    operator_key = read_private(wanted.operator_key_file).strip()
    with Client(url, operator_key, timeout_s=CALL_TIMEOUT_S, retry=RetryPolicy(wait_s_max=5.0)) as client:
        tenant_key = _ensure_tenant(client, wanted)
        token_file = wanted.run_dir / "join.token"
        write_private(token_file, client.create_node_token(name=NODE).token + "\n")
        _note(out, "starting the agent")
        agent, agent_ready = _start_agent(wanted, supervisor, node_url, token_file)
        supervisor.wait(lambda: _joined(client), JOIN_S, "joining the agent to control")
        # Single use: it is spent, and a spent secret is still not something to keep.
        token_file.unlink(missing_ok=True)
    ready = Ready(
        url=url,
        agent_url=_local(agent_ready["url"]),
        data_dir=str(wanted.data_dir),
        operator_key_file=str(wanted.operator_key_file),
        tenant_key_file=str(wanted.tenant_key_file),
        tenant=TENANT,
        pids={"up": os.getpid(), "control": control.pid, "agent": agent.pid},
    )
    context = Context(url, str(wanted.operator_key_file))
    found = _leave_context(context, out)
    try:
        if wanted.ready_file is not None:
            write_private(wanted.ready_file, json.dumps(asdict(ready)) + "\n")
        out.document(ready, _announcement(ready, operator_key, tenant_key, found))
        sys.stdout.flush()
        supervisor.watch()
    finally:
        remove_context(context)
        if wanted.ready_file is not None:
            wanted.ready_file.unlink(missing_ok=True)


def _local(url: str) -> str:
    """``url`` as this machine calls it: no certificate and no proxy knows "all addresses" as a host."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:", 1).replace("//[::]:", "//[::1]:", 1)


def _leave_context(context: Context, out: Output) -> bool:
    """Whether the commands in other terminals will find this stack.

    A stack that runs already keeps them: a second one must not take them over, nor leave them with
    nothing when it ends.
    """
    try:
        other = _other_context(context)
        if other is None:
            write_context(context)
            return True
        which = other.url or f"the stack in {Path(other.starting).parent}"
        _note(out, f"warning: commands in other terminals stay with {which}, which runs too")
    except BadFile as error:
        _note(out, f"warning: other terminals will need --url and --key-file: {error}")
    return False


def _other_context(context: Context) -> Context | None:
    """The context of another stack, if its server answers."""
    from bunkhouse._client import Client
    from bunkhouse._retry import RetryPolicy

    try:
        other = read_context()
        if other is None or other.key_file == context.key_file:
            return None
        if other.starting:
            ours = Path(other.starting).parent in Path(context.starting or context.key_file).parents
            return None if ours or not other.still_starts else other
        key = read_private(Path(other.key_file)).strip()
        with Client(other.url, key, timeout_s=CALL_TIMEOUT_S, retry=RetryPolicy(tries_max=1)) as client:
            client.nodes()
    except (BadFile, BunkhouseError):
        return None
    return other


def _start_control(wanted: Wanted, supervisor: Supervisor) -> tuple[Child, dict[str, str]]:
    from bunkhouse.cli.supervise import find_executable

    ready_file = wanted.run_dir / "control.json"
    arguments = [find_executable("bunk-control"), "serve", "--data-dir", str(wanted.data_dir / "control")]
    arguments += ["--listen", wanted.listen, "--node-listen", wanted.node_listen]
    arguments += ["--ready-file", str(ready_file)]
    for root in wanted.origin_roots:
        arguments += ["--origin-root", root]
    for host in wanted.node_hosts:
        arguments += ["--node-host", host]
    return _start(supervisor, "bunk-control", arguments, ready_file, ("url", "node_url"), CONTROL_READY_S)


def _start_agent(
    wanted: Wanted, supervisor: Supervisor, node_url: str, token_file: Path
) -> tuple[Child, dict[str, str]]:
    from bunkhouse.cli.supervise import find_executable

    ready_file = wanted.run_dir / "agent.json"
    arguments = [find_executable("bunk-agent"), "run", "--data-dir", str(wanted.data_dir / "agent")]
    arguments += ["--control", node_url, "--join-token-file", str(token_file), "--name", NODE]
    arguments += ["--listen", wanted.agent_listen, "--ready-file", str(ready_file)]
    arguments += ["--control-store", str(wanted.data_dir / "control" / "models")]
    for device in wanted.devices:
        arguments += ["--device", device]
    for option, value in (("--host-bytes", wanted.host_bytes), ("--disk-bytes", wanted.disk_bytes)):
        if value is not None:
            arguments += [option, value]
    return _start(supervisor, "bunk-agent", arguments, ready_file, ("url",), AGENT_READY_S)


def _start(
    supervisor: Supervisor,
    name: str,
    arguments: list[str],
    ready_file: Path,
    fields: tuple[str, ...],
    limit_s: float,
) -> tuple[Child, dict[str, str]]:
    """Start a child and wait for its ready file, which it writes atomically."""
    from bunkhouse.cli.supervise import UpFailed

    ready_file.unlink(missing_ok=True)
    child = supervisor.start(name, arguments)
    supervisor.wait(ready_file.exists, limit_s, f"starting {name}")
    try:
        value = json.loads(read_private(ready_file))
        found = {field: str(value[field]) for field in fields}
    except (ValueError, KeyError, TypeError):
        raise UpFailed(f"{name} wrote a ready file without {' and '.join(fields)}: {ready_file}") from None
    return child, found


def _joined(client: Client) -> bool:
    """Whether control has heard from the agent: it was started a moment ago and has heard from no other."""
    try:
        nodes = client.nodes()
    except Unreachable:
        # Control died, or is slow: the supervisor finds out which.
        return False
    return any(node.node == NODE and node.state in ("up", "draining", "drained") for node in nodes)


def _ensure_tenant(client: Client, wanted: Wanted) -> str:
    """The default tenant's key: the one kept from an earlier start if it is still valid, else a new one."""
    if all(tenant.tenant != TENANT for tenant in client.tenants()):
        _unless_conflict(lambda: client.create_tenant(TENANT))
    if wanted.tenant_key_file.exists():
        kept = read_private(wanted.tenant_key_file).strip()
        valid = {f"bk_{key.key_id}_" for key in client.keys(TENANT) if not _expired(key.expires_ms)}
        if any(kept.startswith(each) for each in valid):
            return kept
    created = client.create_key(TENANT, label="bunk up").key
    write_private(wanted.tenant_key_file, created + "\n")
    return created


def _unless_conflict(call: Callable[[], object]) -> None:
    try:
        call()
    except Conflict:
        return


def _expired(expires_ms: int | None) -> bool:
    return expires_ms is not None and expires_ms <= time.time() * 1000


def _announcement(ready: Ready, operator_key: str, tenant_key: str, found: bool) -> str:
    target = "" if found else f" --url {ready.url} --key-file {ready.operator_key_file}"
    return f"""\
Bunkhouse is running.

  URL           {ready.url}   (for OpenAI clients: {ready.url}/v1)
  node          {ready.agent_url}
  operator key  {operator_key}
  tenant key    {tenant_key}   (tenant {ready.tenant})
  data          {ready.data_dir}

In another terminal: bunk model push {ready.tenant}/my-model ./directory{target}
Press Ctrl-C to stop."""
