"""``bunk up`` as a process: what it starts, how it stops, and what it says when something goes wrong.

The server and the agent are stand-ins: executables on PATH that write the ready files and answer the
calls of the real ones. Does not cover the real ones (the end-to-end test does).
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_control import OPERATOR_KEY

from bunkhouse.cli.main import bunk as bunk_command

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="bunk up is for Linux"),
]

TESTS = Path(__file__).parent
SDK = TESTS.parent / "sdk"
WAIT_S = 60

AGENT = """\
#!{python}
import json, os, signal, stat, subprocess, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
how = os.environ.get("FAKE_AGENT", "")
print("agent starts", flush=True)
if how == "dies":
    sys.exit("no device on this machine")
if how == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: (print("agent stops", flush=True), sys.exit(0)))
os.makedirs(options["--data-dir"], exist_ok=True)
token = options["--join-token-file"]
# A worker, as the nursery would make one: in the agent's group, and deaf to SIGTERM.
worker = subprocess.Popen(
    [sys.executable, "-c", "import signal as s; s.signal(15, s.SIG_IGN); print(flush=True); s.pause()"],
    stdout=subprocess.PIPE,
)
worker.stdout.readline()
seen = {{
    "argv": sys.argv, "token": open(token).read(), "mode": stat.S_IMODE(os.stat(token).st_mode),
    "worker": worker.pid, "environment": dict(os.environ),
    "context": open(os.environ["XDG_CONFIG_HOME"] + "/bunkhouse/context.json").read(),
}}
with open(os.path.join(options["--data-dir"], "seen.json"), "w") as file:
    json.dump(seen, file)
with open(options["--ready-file"] + ".tmp", "w") as file:
    json.dump({{"url": "http://127.0.0.1:9", "pid": os.getpid()}}, file)
os.replace(options["--ready-file"] + ".tmp", options["--ready-file"])
while True:
    signal.pause()
"""


@dataclass
class Up:
    """One run of ``bunk up``."""

    process: subprocess.Popen[str]
    data_dir: Path
    said: list[str] = field(default_factory=list)

    def until(self, words: str) -> str:
        """Read standard output up to a line with these words."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return "".join(self.said)
        raise AssertionError(f"ended without {words!r}: {''.join(self.said)}")

    def ready(self) -> dict[str, object]:
        self.until("Press Ctrl-C")
        found: dict[str, object] = json.loads((self.data_dir / "ready.json").read_text())
        return found

    def end(self) -> tuple[int, str]:
        """Wait for its end; the exit code and everything it said."""
        out, _ = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, "".join(self.said) + out

    def seen(self) -> dict[str, object]:
        """What the agent saw."""
        found: dict[str, object] = json.loads((self.data_dir / "agent" / "seen.json").read_text())
        return found


def pids_of(up: Up, ready: dict[str, object]) -> list[int]:
    pids = ready["pids"]
    worker = up.seen()["worker"]
    assert isinstance(pids, dict)
    assert isinstance(worker, int)
    return [pids["control"], pids["agent"], worker]


def gone(pid: int) -> bool:
    """Wait for the end of a process that may be anybody's child."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], WAIT_S)[0])
    finally:
        os.close(fd)


Start = Callable[..., Up]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python with nothing installed beside it, so that the stand-ins are found on PATH."""
    bin_dir = tmp_path / "python" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "python3").symlink_to(sys.executable)
    return bin_dir / "python3"


@pytest.fixture
def start(tmp_path: Path, python: Path) -> Iterator[Start]:
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    control = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(TESTS)!r})\n"
    for name, text in (
        ("bunk-control", control + "from fake_control import main\nmain()\n"),
        ("bunk-agent", AGENT.format(python=sys.executable)),
    ):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    started: list[Up] = []

    def run(*options: str, data_dir: str = "data", path: str | None = None, **environment: str) -> Up:
        directory = tmp_path / data_dir
        command = [str(python), "-m", "bunkhouse.cli", "up", "--data-dir", str(directory)]
        command += ["--listen", "127.0.0.1:0", "--ready-file", str(directory / "ready.json"), *options]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                "PATH": path or f"{stand_ins}:/usr/bin:/bin",
                "PYTHONPATH": f"{SDK}:{sysconfig.get_path('purelib')}",
                "XDG_CONFIG_HOME": str(tmp_path / "config"),
                **environment,
            },
        )
        started.append(Up(process, directory))
        return started[-1]

    yield run
    for up in started:
        if up.process.poll() is None:
            up.process.kill()
        up.process.communicate()


def test_up_tells_where_everything_is_and_hands_the_token_over_in_a_file(start: Start) -> None:
    """URLs, keys, process ids; the agent's arguments hold no secret and its token file is private."""
    up = start("--device", "cpu:96MiB", "--host-bytes", "1GiB", BUNKHOUSE_API_KEY="bk_mine")
    ready = up.ready()
    said = "".join(up.said)
    tenant_key = (up.data_dir / "tenant.key").read_text().strip()
    for shown in (ready["url"], ready["agent_url"], OPERATOR_KEY, tenant_key):
        assert str(shown) in said
    assert Path(str(ready["operator_key_file"])).read_text().strip() == OPERATOR_KEY
    assert ready["tenant_key_file"] == str(up.data_dir / "tenant.key")
    seen = up.seen()
    argv = seen["argv"]
    assert isinstance(argv, list)
    assert argv[argv.index("--device") + 1] == "cpu:96MiB"
    assert argv[argv.index("--control") + 1] == "https://127.0.0.1:1"
    assert "--disk-bytes" not in argv
    secrets = [str(seen["token"]).strip(), OPERATOR_KEY, tenant_key, "bk_mine"]
    assert all(secret not in text for secret in secrets for text in (*argv, str(seen["environment"])))
    assert seen["mode"] == 0o600
    assert not (up.data_dir / "run" / "join.token").exists()


def test_what_up_writes_is_private(start: Start, tmp_path: Path) -> None:
    up = start()
    up.ready()
    context = tmp_path / "config" / "bunkhouse" / "context.json"
    for path in (context, up.data_dir / "tenant.key", up.data_dir / "ready.json", up.data_dir / "up.lock"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in (up.data_dir, up.data_dir / "logs"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert "bk_" not in context.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 0, no process left, no context that points to a port that is free now."""
    old = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        up = start()
    finally:
        signal.signal(number, old)
    pids = pids_of(up, up.ready())
    up.process.send_signal(number)
    code, said = up.end()
    assert code == 0, said
    assert all(gone(pid) for pid in pids)
    assert not (tmp_path / "config" / "bunkhouse" / "context.json").exists()
    assert not (up.data_dir / "ready.json").exists()
    # The agent stopped by itself; it was not killed.
    assert "agent stops" in (up.data_dir / "logs" / "bunk-agent.log").read_text()


def test_ctrl_c_reaches_a_stack_that_a_script_put_into_the_background(start: Start) -> None:
    """A shell without job control starts `bunk up &` with SIGINT ignored."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        up = start()
    finally:
        signal.signal(signal.SIGINT, old)
    pids = pids_of(up, up.ready())
    up.process.send_signal(signal.SIGINT)
    code, said = up.end()
    assert code == 0, said
    assert all(gone(pid) for pid in pids)


def test_a_second_ctrl_c_does_not_wait(start: Start) -> None:
    """An agent that ignores SIGTERM is killed, with its workers, as soon as the user insists."""
    up = start(FAKE_AGENT="stubborn")
    pids = pids_of(up, up.ready())
    up.process.send_signal(signal.SIGINT)
    up.until("stopping")
    up.process.send_signal(signal.SIGINT)
    code, said = up.end()
    assert code == 0
    assert "bunk-agent did not stop in time and was killed" in said
    assert all(gone(pid) for pid in pids)


def test_a_child_that_cannot_start_is_named_with_its_last_words(start: Start) -> None:
    code, said = start(FAKE_AGENT="dies").end()
    assert code == 1
    assert "bunk-agent exited with status 1" in said
    assert "no device on this machine" in said
    assert "Press Ctrl-C" not in said


@pytest.mark.parametrize("name", ["control", "agent"])
def test_a_child_that_dies_later_ends_the_other_too(start: Start, name: str) -> None:
    up = start()
    ready = up.ready()
    pids = pids_of(up, ready)
    os.kill(ready["pids"][name], signal.SIGKILL)  # type: ignore[index]
    code, said = up.end()
    assert code == 1
    assert f"bunk-{name} was killed by SIGKILL" in said
    assert "start `bunk up` again" in said
    assert all(gone(pid) for pid in pids)


def test_when_up_itself_is_killed_nothing_stays(start: Start) -> None:
    """The kernel tells the children; the lock goes with the last of them."""
    up = start()
    pids = pids_of(up, up.ready())
    up.process.kill()
    up.process.wait()
    assert all(gone(pid) for pid in pids[:2])
    os.kill(pids[2], signal.SIGKILL)  # the real workers end with their socket; this one has none
    again = start()
    again.ready()


def test_the_lock_is_held_while_any_process_of_a_stack_lives(start: Start) -> None:
    """A killed ``up`` leaves a stubborn agent: the next one says so instead of starting beside it."""
    up = start(FAKE_AGENT="stubborn")
    pids = pids_of(up, up.ready())
    up.process.kill()
    up.process.wait()
    code, said = start().end()
    assert code == 1
    assert f"bunk-agent has process id {pids[1]}" in said
    for pid in pids[1:]:
        os.kill(pid, signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


def test_a_second_up_on_the_same_data_is_refused(start: Start) -> None:
    """It names the process that holds the data and the way out, and the first goes on."""
    up = start()
    up.ready()
    code, said = start().end()
    assert code == 1
    assert f"is in use by another `bunk up` (up has process id {up.process.pid}" in said
    assert "--data-dir" in said
    assert up.process.poll() is None
    assert (up.data_dir / "ready.json").exists()
    other = start(data_dir="other")
    other.ready()


def test_a_second_stack_leaves_the_commands_to_the_first(start: Start, tmp_path: Path) -> None:
    """It says how to reach itself, and its end does not leave the first without its context."""
    first = start().ready()
    context = tmp_path / "config" / "bunkhouse" / "context.json"
    second = start(data_dir="second")
    ready = second.ready()
    assert json.loads(context.read_text())["url"] == first["url"]
    second.process.send_signal(signal.SIGTERM)
    _, said = second.end()
    assert f"stay with {first['url']}" in said
    assert f"--url {ready['url']} --key-file {ready['operator_key_file']}" in said
    assert json.loads(context.read_text())["url"] == first["url"]


def test_a_stack_on_all_addresses_is_called_over_loopback(start: Start) -> None:
    """The agent checks a certificate, in which 0.0.0.0 cannot be; the names for other boxes are handed on."""
    up = start("--listen", "0.0.0.0:0", "--node-listen", "0.0.0.0:0", "--node-host", "box")
    ready = up.ready()
    assert str(ready["url"]).startswith("http://127.0.0.1:")
    argv = up.seen()["argv"]
    assert isinstance(argv, list)
    assert "0.0.0.0" not in argv[argv.index("--control") + 1]


def test_the_context_of_a_stack_that_was_killed_is_replaced(start: Start, tmp_path: Path) -> None:
    killed = start()
    pids = pids_of(killed, killed.ready())
    while_starting = {"url": "", "key_file": "", "starting": str(killed.data_dir / "up.lock")}
    assert json.loads(str(killed.seen()["context"])) == while_starting
    killed.process.kill()
    assert all(gone(pid) for pid in pids[:2])
    os.kill(pids[2], signal.SIGKILL)  # as above
    second = start(data_dir="second").ready()
    context = json.loads((tmp_path / "config" / "bunkhouse" / "context.json").read_text())
    assert context["url"] == second["url"]


def test_a_data_directory_that_is_a_file_is_said(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = start(data_dir="file").end()
    assert (code, "is not a directory: choose another --data-dir" in said) == (1, True)
    assert not (tmp_path / "config" / "bunkhouse" / "context.json").exists()


def test_the_tenants_key_is_kept_over_restarts_while_it_is_valid(start: Start) -> None:
    up = start()
    up.ready()
    key = (up.data_dir / "tenant.key").read_text()
    up.process.send_signal(signal.SIGTERM)
    up.end()
    up = start()
    up.ready()
    assert (up.data_dir / "tenant.key").read_text() == key
    up.process.send_signal(signal.SIGTERM)
    up.end()
    (up.data_dir / "control" / "keys.json").unlink()  # revoked
    up = start()
    up.ready()
    assert (up.data_dir / "tenant.key").read_text() != key


def test_a_taken_port_is_said_before_anything_starts(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = start("--listen", f"127.0.0.1:{taken.getsockname()[1]}").end()
    assert code == 1
    assert "cannot listen on 127.0.0.1:" in said
    assert "port 0" in said
    for option in ("--listen", "--node-listen", "--agent-listen"):
        code, said = start(option, "nonsense").end()
        assert (code, f"{option} nonsense: write HOST:PORT" in said) == (1, True)


def test_missing_servers_are_named(start: Start) -> None:
    code, said = start(path="/nowhere").end()
    assert code == 1
    assert "bunk-control is neither beside" in said


def test_servers_beside_this_python_come_before_path(start: Start, python: Path) -> None:
    """An installed pair is never mixed with another one on PATH."""
    (python.parent / "bunk-agent").write_text("#!/bin/sh\necho the one beside; exit 7\n")
    (python.parent / "bunk-agent").chmod(0o755)
    code, said = start().end()
    assert code == 1
    assert "the one beside" in said


def test_json_output_is_one_document(start: Start) -> None:
    up = start("-o", "json")
    said = up.until("}\n")  # of "pids"
    said = up.until("}\n")
    assert json.loads(said)["pids"]["up"] == up.process.pid
    up.process.send_signal(signal.SIGTERM)
    code, all_said = up.end()
    assert (code, all_said) == (0, said)


def test_other_terminals_find_the_stack(start: Start, python: Path, tmp_path: Path) -> None:
    """Without options, ``bunk`` uses the context; with another URL, it does not send that key there."""
    up = start()
    ready = up.ready()
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{SDK}:{sysconfig.get_path('purelib')}",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }

    def bunk(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-m", "bunkhouse.cli", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    listed = bunk("tenant", "ls", "-o", "json")
    assert [row["tenant"] for row in json.loads(listed.stdout)["items"]] == ["default"]
    same_server = str(ready["url"]).replace("127.0.0.1", "localhost")
    assert bunk("tenant", "ls", "--url", same_server).returncode == 4


def test_a_stack_that_starts_is_not_called_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as its lock is held; what a killed one left is no stack."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("BUNKHOUSE_URL", "BUNKHOUSE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    lock = tmp_path / "up.lock"
    (tmp_path / "bunkhouse").mkdir()
    context = {"url": "", "key_file": "", "starting": str(lock)}
    (tmp_path / "bunkhouse" / "context.json").write_text(json.dumps(context))
    bunk = CliRunner()
    assert bunk.invoke(bunk_command, ["ps"]).exit_code == 2
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = bunk.invoke(bunk_command, ["ps"])
        assert (result.exit_code, "is still starting" in result.stderr) == (6, True)
        result = bunk.invoke(bunk_command, ["doctor"])
        assert result.stdout.startswith("fail  control: `bunk up` is still starting")
    result = bunk.invoke(bunk_command, ["ps"])
    assert (result.exit_code, "no server" in result.stderr) == (2, True)
