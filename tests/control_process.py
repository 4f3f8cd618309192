"""A control server as a process of its own, for tests that kill it or show it to other programs.

Covers: starting ``bunk-control serve`` on free ports with a data directory, a client for it, SIGKILL. Does
not cover: a control server inside the test's loop (``running_control``).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from running_control import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent


@dataclass(slots=True)
class Process:
    """A ``bunk-control serve`` of its own and a client for it."""

    url: str
    node_url: str
    handle: asyncio.subprocess.Process
    session: aiohttp.ClientSession
    operator_key: str

    async def call(self, method: str, path: str, body: object = None, **options: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.operator_key}", **options.pop("headers", {})}
        if body is not None:
            options["json"] = body
        async with (
            asyncio.timeout(PATIENCE_S),
            self.session.request(method, self.url + path, headers=headers, **options) as answer,
        ):
            text = await answer.read()
            return answer.status, json.loads(text) if text else None

    async def kill(self) -> None:
        self.handle.send_signal(signal.SIGKILL)
        await self.handle.wait()


@asynccontextmanager
async def process(folder: Path, *options: str) -> AsyncIterator[Process]:
    """Start the server and wait for its ready file; killed at the end if it still runs."""
    ready = folder.parent / f"ready-{os.urandom(4).hex()}"
    handle = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "control",
        "serve",
        "--data-dir",
        str(folder),
        "--listen",
        "127.0.0.1:0",
        "--node-listen",
        "127.0.0.1:0",
        "--ready-file",
        str(ready),
        *options,
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    assert handle.stderr is not None
    lines: list[bytes] = []
    async with asyncio.timeout(PATIENCE_S):
        while not ready.exists():
            line = await handle.stderr.readline()  # "serving …" follows the ready file
            assert line, b"".join(lines).decode()
            lines.append(line)
    bound = json.loads(ready.read_text())
    drain = asyncio.create_task(handle.stderr.read())
    async with aiohttp.ClientSession() as session:
        try:
            yield Process(
                bound["url"],
                bound["node_url"],
                handle,
                session,
                (folder / "operator.key").read_text().strip(),
            )
        finally:
            if handle.returncode is None:
                handle.kill()
            await handle.wait()
            await drain
