"""The gateway over a node in memory in a process of its own, for tests that measure its memory.

Covers: starting and ending it, the most memory it ever had, and sending bytes as they are. Does not cover:
what is sent (``attacks/test_gateway_bodies.py``, ``attacks/test_oip_bodies.py``).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fake_node import SOON_SECONDS

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def own_process() -> Iterator[tuple[str, str, int]]:
    """The gateway in a process of its own: URL, a key, process id."""
    with process_of_two() as (url, acme, _, pid):
        yield url, acme, pid


@contextmanager
def process_of_two() -> Iterator[tuple[str, str, str, int]]:
    """The same with keys of both tenants, acme and globex."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fake_node.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        url, acme, globex = process.stdout.readline().split()
        yield url, acme, globex, process.pid
        process.stdin.close()
        assert process.wait(SOON_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def peak_bytes(pid: int) -> int:
    """The most memory that the process ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


async def first_status(url: str, sent: bytes) -> int:
    """Send bytes, read the first answer's status, hang up. 0 when the server hung up without an answer."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(SOON_SECONDS):
            writer.write(sent)
            line = await reader.readline()
            return int(line.split()[1]) if line else 0
    finally:
        writer.transport.abort()
