"""Starts and stops a whole Bunkhouse on this machine, the way a user does: through ``bunk up``.

Covers: finding the commands, starting the embedded stack with given devices, waiting until it is ready,
running ``bunk`` against it, and stopping it so that nothing of it stays. Used by the tour, the end-to-end
test and the benches. Does not cover: what is done with the stack.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from process_memory import children

# Importing torch and transformers from a cold disk takes most of it.
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 300.0  # pushing a model is the longest command
KEY = re.compile(r"\bbk_[a-z2-7]+_[A-Za-z0-9_-]+")
LOG_LINES = 25  # of each log, shown when something failed


class StackFailed(RuntimeError):
    """The stack did not start, a command failed or something did not stop; the text says what and why."""


def find_command(name: str) -> str:
    """A command installed beside this Python, else on PATH. Raises ``StackFailed``."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise StackFailed(
            f"{name} is not installed beside {sys.executable}: pip install -e . -e './sdk[cli]'"
        )
    return found


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What to start. ``devices`` are as ``--device`` takes them."""

    data_dir: Path
    devices: tuple[str, ...]
    host_bytes: str
    disk_bytes: str
    ready_timeout_s: float = READY_TIMEOUT_S


@dataclass(slots=True)
class Stack:
    """A running stack."""

    options: StackOptions
    process: subprocess.Popen[bytes]
    url: str
    agent_url: str
    operator_key: str
    control_pid: int
    agent_pid: int

    def bunk(self, *words: str, key: str | None = None) -> object:
        """Run ``bunk … -o json`` as the operator or with ``key``; returns the parsed answer."""
        command = [find_command("bunk"), *words, "-o", "json"]
        done = subprocess.run(
            command,
            env=_environment(self.options)
            | {"BUNKHOUSE_URL": self.url, "BUNKHOUSE_API_KEY": key or self.operator_key},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout)[-2000:]
            raise StackFailed(f"bunk {' '.join(words)} exited {done.returncode}:\n{said}")
        try:
            return json.loads(done.stdout) if done.stdout.strip() else None
        except json.JSONDecodeError as error:
            raise StackFailed(
                f"bunk {' '.join(words)} -o json is not JSON: {error}: {done.stdout[:500]!r}"
            ) from error

    def pids(self) -> set[int]:
        """Every process of the stack that lives now."""
        return {self.process.pid, *descendants(self.process.pid)}

    def stop(self) -> None:
        """Stop like Ctrl-C does. Raises ``StackFailed`` if a process outlives it, after killing that too."""
        pids = self.pids() - {self.process.pid}
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        left = _wait_gone(pids, STOP_TIMEOUT_S)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        if left:
            raise StackFailed(f"still running after bunk up had ended: process ids {sorted(left)}")

    @property
    def metrics_key_file(self) -> Path:
        """With the key in it the agent shows figures of tenants."""
        return self.options.data_dir / "agent" / "metrics.key"

    def logs(self) -> str:
        return read_logs(self.options.data_dir)


def start_stack(options: StackOptions) -> Stack:
    """Run ``bunk up`` on free loopback ports and wait until it is ready. Raises ``StackFailed``."""
    ready_file = options.data_dir / "ready.json"
    options.data_dir.mkdir(parents=True, exist_ok=True)
    ready_file.unlink(missing_ok=True)
    words = [find_command("bunk"), "up", "--data-dir", str(options.data_dir), "--listen", "127.0.0.1:0"]
    for device in options.devices:
        words += ["--device", device]
    words += ["--host-bytes", options.host_bytes, "--disk-bytes", options.disk_bytes]
    words += ["--ready-file", str(ready_file)]
    with (options.data_dir / "up.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches the caller first, which then stops the stack in order.
        process = subprocess.Popen(
            words,
            env=_environment(options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        return _wait_ready(options, process, ready_file)
    except BaseException:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _wait_ready(options: StackOptions, process: subprocess.Popen[bytes], ready_file: Path) -> Stack:
    deadline_s = time.monotonic() + options.ready_timeout_s
    while not ready_file.exists():
        try:
            code = process.wait(0.05)
        except subprocess.TimeoutExpired:
            if time.monotonic() < deadline_s:
                continue
            raise StackFailed(
                f"bunk up was not ready after {options.ready_timeout_s:.0f} s\n{read_logs(options.data_dir)}"
            ) from None
        raise StackFailed(f"bunk up exited {code} before it was ready\n{read_logs(options.data_dir)}")
    ready = json.loads(ready_file.read_text())
    return Stack(
        options=options,
        process=process,
        url=ready["url"].rstrip("/"),
        agent_url=ready["agent_url"].rstrip("/"),
        operator_key=Path(ready["operator_key_file"]).read_text().strip(),
        control_pid=ready["pids"]["control"],
        agent_pid=ready["pids"]["agent"],
    )


def read_logs(data_dir: Path) -> str:
    """The last lines of everything the stack wrote."""
    parts = []
    for path in [data_dir / "up.log", *sorted((data_dir / "logs").glob("*.log"))]:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        if lines:
            parts.append("\n".join([f"--- last lines of {path.name}", *lines[-LOG_LINES:]]))
    # What `bunk up` prints for its user does not belong in a test's report.
    return KEY.sub("bk_…", "\n".join(parts))


def descendants(pid: int) -> set[int]:
    """All processes below ``pid``."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = [child for child in children(waiting.pop()) if child not in found]
        found.update(new)
        waiting += new
    return found


def _wait_gone(pids: set[int], timeout_s: float) -> set[int]:
    """Wait until these processes are gone; returns those that are not."""
    deadline_s = time.monotonic() + timeout_s
    left = {pid for pid in pids if _alive(pid)}
    while left and time.monotonic() < deadline_s:
        time.sleep(0.02)
        left = {pid for pid in left if _alive(pid)}
    return left


def _alive(pid: int) -> bool:
    """True unless gone or a zombie that only waits for its parent to look."""
    try:
        stat = (Path("/proc") / str(pid) / "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def _environment(options: StackOptions) -> dict[str, str]:
    """The caller's environment without its own Bunkhouse settings, and offline: nothing asks a model hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BUNKHOUSE_")}
    # The user's own context file must neither be used nor overwritten.
    return kept | {"XDG_CONFIG_HOME": str(options.data_dir / "config"), "HF_HUB_OFFLINE": "1"}
