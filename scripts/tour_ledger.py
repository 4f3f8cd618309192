"""Watches a node's own ledger through its metrics while something else runs.

Covers: sampling ``/metrics`` in a thread and keeping the greatest use of every device and tier. Does not
cover: what the kernel says (``process_memory``); the two are checked against each other by the tour.
"""

from __future__ import annotations

import re
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_INTERVAL_S = 0.1
READ_TIMEOUT_S = 10.0
METRICS_BYTES_MAX = 4 * 1024 * 1024
LINE = re.compile(r'bunkhouse_(device|tier)_bytes\{(?:device|tier)="([^"]+)",use="(\w+)"\} (\S+)')
COUNTER = re.compile(r'bunkhouse_(requests|answers)_total\{tenant="[^"]+"\} (\S+)')


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """A device or tier: the greatest use seen, and its budget at that moment."""

    name: str
    used_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class LedgerPeaks:
    samples: int
    rows: tuple[LedgerRow, ...]


def parse_metrics(text: str) -> list[LedgerRow]:
    """One row per device and tier of a node's exposition."""
    found: dict[str, dict[str, int]] = {}
    for _, name, use, value in LINE.findall(text):
        found.setdefault(name, {})[use] = int(float(value))
    return [LedgerRow(name, uses.get("used", 0), uses.get("budget", 0)) for name, uses in found.items()]


def parse_counters(text: str) -> dict[str, int]:
    """How many requests and answers the node counted, over all tenants."""
    found = {"requests": 0, "answers": 0}
    for name, value in COUNTER.findall(text):
        found[name] += int(float(value))
    return found


def read_metrics(agent_url: str, key_file: Path | None = None) -> str:
    """The node's exposition now; with its key (``metrics.key`` of its data directory) also of tenants.

    Loopback needs no proxy, whatever the environment says about one.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {key_file.read_text().strip()}"} if key_file is not None else {}
    request = urllib.request.Request(f"{agent_url}/metrics", headers=headers)
    with opener.open(request, timeout=READ_TIMEOUT_S) as answer:
        text: bytes = answer.read(METRICS_BYTES_MAX)
    return text.decode()


@dataclass(slots=True)
class LedgerWatch:
    """Samples from ``start`` until ``stop``, which returns the peaks."""

    agent_url: str
    samples: int = 0
    peaks: dict[str, LedgerRow] = field(default_factory=dict)
    error: Exception | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> LedgerWatch:
        self._thread = threading.Thread(target=self._run, name="ledger-watch", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> LedgerPeaks:
        """Raises what a sample raised: a watch that did not watch proves nothing."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error
        return LedgerPeaks(self.samples, tuple(self.peaks[name] for name in sorted(self.peaks)))

    def _run(self) -> None:
        try:
            while not self._stopped.wait(SAMPLE_INTERVAL_S):
                self.add(parse_metrics(read_metrics(self.agent_url)))
        except (OSError, ValueError) as error:
            self.error = error

    def add(self, rows: list[LedgerRow]) -> None:
        """Count one sample. A row above its budget stays the peak, whatever comes after."""
        self.samples += 1
        for row in rows:
            peak = self.peaks.get(row.name)
            if peak is None or _full(row) > _full(peak):
                self.peaks[row.name] = row


def _full(row: LedgerRow) -> float:
    return row.used_bytes / row.budget_bytes if row.budget_bytes else float(row.used_bytes)
