"""Load for a real box: many callers with mixed calls, some of whom leave, and what must hold for all.

Covers: sending a seeded mix of calls (whole and streamed, through the router and to the node), leaving in
the middle of some, judging each answer by itself, and reading what the kernel says about a box's
processes. Does not cover: starting the box (``real_box``) or deciding what to break meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from process_memory import children, read_rss, read_worker
from real_box import Box

# A call that has no answer by then hangs; the slowest true ones wait for a few restores.
HANG_S = 60.0
# Callers that leave do so within this time: before the grant, during a restore or in mid-answer.
LEAVE_S_MAX = 0.3
# Statuses that tell the caller to come again, and those that a right call may get for good.
RETRYABLE = (429, 503)
SEGMENT = "/memfd:bunk-host"


@dataclass(frozen=True, slots=True)
class Called:
    """A model to call, and how: ``generate``, ``chat`` or ``classify``."""

    model: str
    key: str
    how: str


@dataclass(slots=True)
class Tally:
    """What became of all calls; ``faults`` are those that must not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.outcomes["fault"] += 1
        self.faults.append(text[:600])


async def load(
    urls: Sequence[str],
    called: Sequence[Called],
    *,
    calls: int,
    at_once: int,
    seed: int,
    leaving: float = 0.15,
    gone: tuple[type[Exception], ...] = (),
) -> Tally:
    """Send ``calls`` calls, ``at_once`` at a time, skewed to the first models.

    ``leaving`` of the callers leave before the end. ``gone``: errors of the connection itself that are to
    be expected because the test stops what answers.
    """
    draw = random.Random(seed)
    tally = Tally()
    plan = iter(
        [
            (
                draw.choice(urls),
                called[min(int(draw.expovariate(3 / len(called))), len(called) - 1)],
                draw.random() < 0.5,
                draw.uniform(0, LEAVE_S_MAX) if draw.random() < leaving else None,
                draw.randrange(1 << 30),
            )
            for _ in range(calls)
        ]
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def caller() -> None:
            for url, model, stream, leave_s, number in plan:
                try:
                    async with asyncio.timeout(leave_s or HANG_S):
                        await _call(session, url, model, stream, number, tally)
                except TimeoutError:
                    if leave_s is None:
                        tally.fault(f"no answer in {HANG_S:g} s: {model.how} {model.model} at {url}")
                    else:
                        tally.outcomes["left"] += 1
                except (aiohttp.ClientError, OSError) as error:
                    if isinstance(error, gone):
                        tally.outcomes["connection lost"] += 1
                    else:
                        tally.fault(f"{type(error).__name__}: {error}: {model.how} {model.model} at {url}")

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(caller())
    return tally


async def _call(
    session: aiohttp.ClientSession, url: str, called: Called, stream: bool, number: int, tally: Tally
) -> None:
    body: dict[str, object] = {"model": called.model}
    stream = stream and called.how != "classify"
    if called.how == "classify":
        path = "classify"
        body["input"] = [f"The stew was good, said rider {number}."] * (1 + number % 3)
    else:
        path = "chat/completions" if called.how == "chat" else "completions"
        text = f"rider {number} says"
        body |= (
            {"messages": [{"role": "user", "content": text}]} if called.how == "chat" else {"prompt": text}
        )
        body |= {"max_tokens": 1 + number % 12, "stream": stream}
    headers = {"Authorization": f"Bearer {called.key}"}
    async with session.post(f"{url}/v1/{path}", json=body, headers=headers) as answer:
        text = await answer.text()
        what = f"{called.how} {called.model} at {url}: {answer.status} {text}"
        if answer.status in RETRYABLE and "Retry-After" in answer.headers:
            code = json.loads(text)["error"]["code"]
            tally.outcomes[f"{answer.status} {code}"] += 1
        elif answer.status != 200:
            tally.fault(what)
        elif stream:
            _judge_stream(text, what, tally)
        else:
            json.loads(text)
            tally.outcomes["answered"] += 1


def _judge_stream(text: str, what: str, tally: Tally) -> None:
    """A stream ends with ``[DONE]``, or with one error event that says that it is the node's fault."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if events and events[-1] == "[DONE]":
        tally.outcomes["streamed"] += 1
        return
    error = json.loads(events[-1]).get("error") if events else None
    if error is None:
        tally.fault(f"a stream ended without an end: {what}")
    elif error["code"] in ("internal_error", "engine_fault"):
        tally.fault(what)
    else:
        tally.outcomes[f"stream broken off: {error['code']}"] += 1


# --- what the kernel says ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Books:
    """Bytes by device and in the cache tiers; models by what they hold."""

    arena_bytes: dict[str, int]
    host_bytes: int
    disk_bytes: int
    segments: int
    packs: int


def kernel_books(box: Box) -> Books:
    """What the box's processes and files really hold."""
    arena = {f"cpu:{index}": 0 for index in range(len(box.devices))}
    for pid in box.worker_pids():
        memory = read_worker(pid)
        if memory is not None and memory.arena_bytes:
            arena[memory.device] += memory.arena_bytes
    assert box.agent is not None
    segments = [status for link, status in _open_files(box.agent.handle.pid) if link.startswith(SEGMENT)]
    files = [path for path in (box.folder / "agent" / "packs").glob("*/*") if path.is_file()]
    return Books(
        arena,
        sum(status.st_size for status in segments),
        sum(path.stat().st_size for path in files),
        len(segments),
        len(files),
    )


def ledger_books(box: Box) -> Books:
    """What the node reports it holds: weights without workspace on devices, every copy in the tiers."""
    operator = box.operator()
    image_bytes = {model.ref: model.image_bytes for model in operator.models()}
    arena = {f"cpu:{index}": 0 for index in range(len(box.devices))}
    rows = operator.ps().items
    for row in rows:
        if row.device is not None:
            # A part that stayed needs no workspace, so what it holds is weights alone.
            part = row.state == "partial"
            arena[row.device] += row.device_bytes if part else image_bytes.get(row.ref, 0)
    return Books(
        arena,
        sum(row.host_bytes for row in rows),
        sum(row.disk_bytes for row in rows),
        sum(row.host_bytes > 0 for row in rows),
        sum(row.disk_bytes > 0 for row in rows),
    )


def _open_files(pid: int) -> list[tuple[str, os.stat_result]]:
    found: list[tuple[str, os.stat_result]] = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append((os.readlink(entry), entry.stat()))
        except OSError:
            continue  # closed since it was listed
    return found


@dataclass(frozen=True, slots=True)
class Size:
    """A process: open descriptors, threads, those of the file reader's pool apart, resident bytes."""

    descriptors: int
    threads: int
    pool_threads: int
    rss_bytes: int


# obstore reads files on a pool of tokio's, which grows when reads coincide and keeps idle threads a while.
POOL_THREAD_NAME = "tokio-rt-worker"


def _thread_names(pid: int) -> list[str]:
    names: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            continue  # ended since it was listed
    return names


def _size(pid: int) -> Size:
    names = _thread_names(pid)
    pool = names.count(POOL_THREAD_NAME)
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Size(descriptors, len(names) - pool, pool, read_rss(pid))


def sizes(box: Box) -> dict[str, Size]:
    """By role; workers by process number, since each is a process for life."""
    assert box.agent is not None
    assert box.control is not None
    pids = {"control": box.control.handle.pid, "agent": box.agent.handle.pid}
    for pid in children(box.agent.handle.pid):
        pids["nursery"] = pid
    pids |= {f"worker {pid}": pid for pid in box.worker_pids()}
    return {role: _size(pid) for role, pid in pids.items()}
