"""A real box for tests: control and agent as processes of their own, on loopback, killable one by one.

Covers: starting, waiting for a line of a process's log, killing and starting again on the same ports and
data directories, and the SDK as operator and tenants. Does not cover: ``bunk up`` (``test_up``).
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from process_memory import children

from bunkhouse import Client, Event

ROOT = Path(__file__).resolve().parent.parent
# Importing torch from a cold disk on a busy machine; nothing else here takes longer.
PATIENCE_S = 120.0
# One client for all calls without the SDK, each on a connection of its own: a client for each call would read
# anew whom TLS trusts, which takes longer than a call.
CALLER = httpx2.Client(timeout=PATIENCE_S, limits=httpx2.Limits(max_keepalive_connections=0))


class Process:
    """A child whose log lines can be waited for."""

    def __init__(self, *words: str) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.handle = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._seen = 0
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.handle.stderr is not None
        with self.handle.stderr:
            for line in self.handle.stderr:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The next line, after those that earlier calls matched, that holds the pattern."""
        with self._news:
            while True:
                while self._seen < len(self._lines):
                    line = self._lines[self._seen]
                    self._seen += 1
                    if match := re.search(pattern, line):
                        return match
                assert not self._ended, f"ended without {pattern!r}:\n" + self.log()
                assert self._news.wait(PATIENCE_S), f"no {pattern!r} in {PATIENCE_S} s:\n" + self.log()

    def until(self, true: Callable[[], bool], pause_s: float = 0.02) -> None:
        """Other processes' state has no event to wait for: look again, for as long as this one lives. A look
        without a pause would take the time that they need."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline_s, f"still not so after {PATIENCE_S} s:\n" + self.log()
            with suppress(subprocess.TimeoutExpired):
                self.handle.wait(pause_s)
                pytest.fail("the process has ended:\n" + self.log())

    def log(self) -> str:
        return "".join(self._lines[-60:])

    def whole_log(self) -> str:
        """Every line so far."""
        return "".join(self._lines)

    def kill(self) -> None:
        self.handle.send_signal(signal.SIGKILL)
        self.handle.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM and the exit status."""
        if self.handle.poll() is None:
            self.handle.send_signal(signal.SIGTERM)
        try:
            return self.handle.wait(PATIENCE_S)
        finally:
            self._reader.join(PATIENCE_S)


def wait_gone(pidfds: list[int]) -> None:
    """Until the processes behind these descriptors have ended; a pidfd becomes readable then."""
    for pidfd in pidfds:
        ready, _, _ = select.select([pidfd], [], [], PATIENCE_S)
        assert ready, "a process was left behind"
        os.close(pidfd)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to hear so."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Box:
    """Control and one agent with two cpu devices."""

    folder: Path
    devices: tuple[str, ...] = ("cpu:48MiB", "cpu:48MiB")
    ports: list[int] = field(default_factory=lambda: [free_port() for _ in range(3)])
    control: Process | None = None
    agent: Process | None = None
    keys: dict[str, str] = field(default_factory=dict)
    agent_module: str = "agent"  # what the agent's process runs
    tokens: list[str] = field(default_factory=list)  # that were made for joining
    control_module: str = "control"
    control_at: str = ""  # where the agent dials control; empty: directly

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def node_url(self) -> str:
        return f"https://127.0.0.1:{self.ports[1]}"

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[2]}"

    def start_control(self) -> None:
        listen = ["--listen", f"127.0.0.1:{self.ports[0]}", "--node-listen", f"127.0.0.1:{self.ports[1]}"]
        folder = str(self.folder / "control")
        self.control = Process(self.control_module, "serve", "--data-dir", folder, *listen)
        self.control.wait_for("serving http")

    def start_agent(self, *more: str, wait: str = r"connected to control") -> None:
        token_file = self.folder / "join.token"
        if not (self.folder / "agent" / "identity" / "identity.json").exists():
            self.tokens.append(self.operator().create_node_token(name="box").token)
            token_file.write_text(self.tokens[-1])
        at = self.control_at or self.node_url
        self.agent = self._agent("agent", "box", at, token_file, self.ports[2], self.devices, more)
        self.agent.wait_for(wait)

    def another_agent(self, device: str, *more: str, wait: str) -> tuple[Process, int]:
        """A node ``second`` beside this one, and the port of its gateway. It is the caller's to stop."""
        token_file = self.folder / "second.token"
        token_file.write_text(self.operator().create_node_token(name="second").token)
        port = free_port()
        agent = self._agent("second", "second", self.node_url, token_file, port, (device,), more)
        try:
            agent.wait_for(wait)
        except BaseException:
            agent.stop()
            raise
        return agent, port

    def _agent(
        self,
        folder: str,
        name: str,
        control: str,
        token_file: Path,
        port: int,
        devices: tuple[str, ...],
        more: tuple[str, ...],
    ) -> Process:
        words = ["run", "--data-dir", str(self.folder / folder), "--control", control, "--name", name]
        words += ["--join-token-file", str(token_file), "--host-bytes", "64MiB", "--disk-bytes", "1GiB"]
        # These tests count processes and copies: none is there for nobody.
        words += ["--standbys", "0", "--prefetch", "off", "--listen", f"127.0.0.1:{port}"]
        # Measuring the box takes ten seconds of processor time as soon as nobody asks for anything.
        words += ["--calibrate", "off", *more]
        for device in devices:
            words += ["--device", device]
        return Process(self.agent_module, *words)

    def another_router(self, name: str, *, wait: str = "connected to control") -> tuple[Process, str]:
        """A router that is a process of its own, and its URL; again with the identity that it has, if it was
        here before. It is the caller's to stop."""
        token_file = self.folder / f"{name}.token"
        if not (self.folder / name / "identity" / "identity.json").exists():
            token_file.write_text(self.operator().create_router_token(name=name).token)
        words = ["router", "--data-dir", str(self.folder / name), "--control", self.node_url, "--name", name]
        words += ["--join-token-file", str(token_file), "--listen", "127.0.0.1:0"]
        router = Process("control", *words)
        try:
            url = router.wait_for(r"routing at (\S+)")[1]
            router.wait_for(wait)
        except BaseException:
            router.stop()
            raise
        return router, url

    def operator(self) -> Client:
        key = (self.folder / "control" / "operator.key").read_text().strip()
        return Client(self.url, key)

    def add_tenant(self, tenant: str) -> None:
        self.operator().create_tenant(tenant)
        self.keys[tenant] = self.operator().create_key(tenant).key

    def tenant(self, tenant: str, *, direct: bool = False) -> Client:
        """The tenant's client at the router, or at the node itself."""
        return Client(self.gateway_url if direct else self.url, self.keys[tenant])

    def embed(self, model: str, text: str) -> tuple[bytes, str]:
        """One embedding from the node itself: (the JSON numbers as sent, the tier it came from)."""
        answer = CALLER.post(
            f"{self.gateway_url}/v1/embeddings",
            headers={"Authorization": f"Bearer {self.keys[model.split('/')[0]]}"},
            json={"model": model, "input": text, "encoding_format": "float"},
            timeout=PATIENCE_S,
        )
        assert answer.status_code == 200, answer.text
        numbers = answer.json()["data"][0]["embedding"]
        return json.dumps(numbers).encode(), answer.headers["x-bunkhouse-tier"]

    def metrics(self) -> str:
        """The node's figures, those of tenants too."""
        key = (self.folder / "agent" / "metrics.key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        answer = CALLER.get(f"{self.gateway_url}/metrics", headers=headers, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return answer.text

    def worker_pids(self) -> list[int]:
        """Workers are the nursery's children; the nursery is the agent's only child. One that has ended is
        none, also while the nursery has not heard so."""
        assert self.agent is not None
        workers = [worker for nursery in children(self.agent.handle.pid) for worker in children(nursery)]
        return [worker for worker in workers if not has_ended(worker)]

    def wait_planned(self, versions: int) -> None:
        """Until the agent has a plan with this many model versions."""
        assert self.agent is not None
        self.agent.wait_for(rf"plan \d+\.\d+: \d+ tenants, {versions} versions")

    def events(self, kind: str, model: str = "", *, least: int = 1) -> list[Event]:
        """At least so many events of a kind, perhaps of one model; they reach control a moment later."""
        assert self.agent is not None
        found: list[Event] = []

        def enough() -> bool:
            items = self.operator().events(limit=1000).items
            mine = [item for item in items if item.kind == kind]
            found[:] = [item for item in mine if not model or item.model.startswith(f"{model}@")]
            return len(found) >= least

        self.agent.until(enough)
        return found

    def close(self) -> None:
        for process in (self.agent, self.control):
            if process is not None and process.handle.poll() is None:
                process.stop()


@contextmanager
def running_box(
    folder: Path, devices: tuple[str, ...] = ("cpu:48MiB", "cpu:48MiB"), more: tuple[str, ...] = ()
) -> Iterator[Box]:
    """A started box, its agent with ``more`` options; everything is stopped on leaving."""
    box = Box(folder, devices)
    try:
        box.start_control()
        box.start_agent(*more)
        yield box
    finally:
        box.close()
