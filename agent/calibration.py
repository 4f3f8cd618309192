"""The node's calibration: when it is measured, by whom, and whether a stored one still holds.

Covers: the fingerprint of what was measured, freshness, starting the measuring child, keeping a running
node's rates up to date, and timing the line to control. Does not cover: measuring (``agent/calibrate.py``,
which may load numpy and torch; this file may not), what rates mean (``packer/estimate.py``), storing them
(``agent/journal.py``), or the command (``agent/calibrate_command.py``).

``bunk-agent calibrate`` beside a running node must not open its journal. It leaves its result in
``calibration.new``, and the node takes it up.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agent.child import ChildFailed, ask_child, module_command
from packer.estimate import RATES_BYTES_MAX, BadRates, Rates, load_rates, reads_past_cache
from packer.types import MIB

log = logging.getLogger("bunk.calibration")

# Raised by one when the same box would be measured differently.
METHOD = 2
# The temporary file: large enough for the cache of a disk not to answer alone, small enough for any box.
FILE_BYTES = 256 * MIB
# A disk that fills up and ages is a different one after a month.
FRESH_MS = 30 * 24 * 3600 * 1000
# Measuring takes about three seconds, torch and a GPU's first context ten more; a minute is a hang.
CHILD_TIMEOUT_S = 60.0
# Where the command leaves its result for a running node.
HANDED_OVER = "calibration.new"
# A node that has served nobody for so long is taken to be idle; also long enough for a start to settle.
QUIET_S = 30.0
# Between two looks at whether it is idle, and whether somebody left a result.
LOOK_S = 5.0
# While others used more of the cores than this, the rates say more about them: measure again later.
OTHERS_PERCENT_MAX = 25
RETRY_S = 600.0
# A box that is never quiet keeps the quietest of so many.
TRIES_MAX = 6
# The line is timed over at least this much, so that its first round trips do not count for all of it.
LINK_BYTES_MIN = 16 * MIB
# A line that changed by less is the same line: the journal is not written for it.
LINK_CHANGE = 0.2
# What the rates depend on, as far as it is software.
_PACKAGES = ("numpy", "zstandard", "cryptography", "numba", "torch")


class CalibrationFailed(Exception):
    """The box was not measured; the text says why."""


def fingerprint(directory: Path) -> str:
    """The hardware and software that decide how fast this box is, as 16 hex digits.

    ``directory`` is where packs lie. A calibration of another fingerprint is of another box.
    """
    facts = [str(METHOD), platform.machine(), platform.release(), platform.python_version()]
    facts += [str(len(os.sched_getaffinity(0))), str(os.sysconf("SC_PHYS_PAGES"))]
    facts += [_cpu_name(), os.environ.get("BUNKHOUSE_KERNELS", "")]
    facts += [f"{name} {_version(name)}" for name in _PACKAGES]
    with suppress(OSError):
        device = os.stat(directory).st_dev
        facts.append(f"{os.major(device)}:{os.minor(device)}")
    with suppress(OSError):
        # GPUs by their place on the bus, and the driver; nothing is there without one.
        facts += [
            Path("/proc/driver/nvidia/version").read_text(),
            *sorted(os.listdir("/proc/driver/nvidia/gpus")),
        ]
    with suppress(OSError):
        facts.append(Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def is_fresh(rates: Rates | None, directory: Path, now_ms: int) -> bool:
    """Whether these rates are of this box as it is, and not too old."""
    if rates is None or rates.fingerprint != fingerprint(directory):
        return False
    return 0 <= now_ms - rates.measured_ms < FRESH_MS


def child_command(data_dir: Path, background: bool, gpu: bool, extra: Sequence[str] = ()) -> list[str]:
    command = module_command("agent.calibrate", "--data-dir", str(data_dir), "--json")
    if background:
        command.append("--background")
    if gpu:
        command.append("--gpu")
    return [*command, *extra]


async def measure(data_dir: Path, background: bool, gpu: bool, extra: Sequence[str] = ()) -> Rates:
    """Measure in a child. Ends it when the caller is cancelled. Raises ``CalibrationFailed``."""
    command = child_command(data_dir, background, gpu, extra)
    try:
        output = await ask_child(command, "measuring", CHILD_TIMEOUT_S)
    except ChildFailed as error:
        raise CalibrationFailed(str(error)) from error
    try:
        return load_rates(output.decode(errors="replace").strip())
    except BadRates as error:
        raise CalibrationFailed(str(error)) from error


class LinkMeter:
    """Times what is fetched over the line: bytes against the time during which anything was fetched."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._running = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._bytes = 0
        self.bytes_per_s = 0  # 0 until enough was fetched

    @contextmanager
    def fetching(self) -> Iterator[Callable[[int], None]]:
        """Call what this gives with the size of each piece that came."""
        if not self._running:
            self._since_s = self._clock_s()
        self._running += 1
        try:
            yield self._count
        finally:
            self._running -= 1
            if not self._running:
                self._busy_s += self._clock_s() - self._since_s
                if self._bytes >= LINK_BYTES_MIN and self._busy_s > 0:
                    self.bytes_per_s = round(self._bytes / self._busy_s)
                    self._bytes, self._busy_s = 0, 0.0

    def _count(self, nbytes: int) -> None:
        self._bytes += nbytes


class Calibrator:
    """Keeps a running node's rates. ``adopt`` is told of every change and makes it last.

    ``measure`` is replaced in tests; it must end its child when it is cancelled.
    """

    def __init__(
        self,
        data_dir: Path,
        enabled: bool,
        gpu: bool,
        adopt: Callable[[Rates], Awaitable[None]],
        link: LinkMeter,
        measure: Callable[[Path, bool, bool], Awaitable[Rates]] = measure,
        clock_s: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.rates: Rates | None = None
        self._data_dir = data_dir
        self._enabled = enabled
        self._gpu = gpu
        self._adopt = adopt
        self._link = link
        self._measure = measure
        self._clock_s = clock_s
        self._wall_ms = wall_ms
        self._busy_s = clock_s()
        self._in_use = 0
        self._tries = 0
        self._next_s = 0.0
        self._measuring: asyncio.Future[Rates] | None = None

    def reads_past_cache(self) -> bool:
        """Whether packs that are in the page cache are read faster past it here."""
        return reads_past_cache(self.rates, self._gpu)

    def take_stored(self, text: str | None) -> None:
        """What the journal had; ``adopt`` is not told. Rates of another box or old ones stand in until
        new ones are there."""
        if text is None:
            return
        try:
            rates = load_rates(text)
        except BadRates as error:
            log.warning("%s", error)
            return
        self.rates = rates

    def disturb(self) -> None:
        """The node works for somebody, until ``leave``: not a time to measure. Ends a measurement under
        way."""
        self._in_use += 1
        self._busy_s = self._clock_s()
        if self._measuring is not None:
            self._measuring.cancel()

    def leave(self) -> None:
        self._in_use -= 1
        self._busy_s = self._clock_s()

    async def run(self) -> None:
        """Until cancelled: take up what the command left, measure when it is time, follow the line."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """One look; everything that goes wrong is logged, because nothing depends on it."""
        try:
            await self._take_handed_over()
            await self._follow_link()
            if self._due():
                await self._measure_now()
        except (OSError, BadRates, CalibrationFailed) as error:
            log.warning("calibration: %s", error)

    def _due(self) -> bool:
        now_s = self._clock_s()
        if not self._enabled or self._in_use or now_s - self._busy_s < QUIET_S or now_s < self._next_s:
            return False
        if self._tries >= TRIES_MAX:
            return False
        rates = self.rates
        noisy = rates is not None and rates.others_percent > OTHERS_PERCENT_MAX
        return noisy or not is_fresh(rates, self._data_dir / "packs", self._wall_ms())

    async def _measure_now(self) -> None:
        self._tries += 1
        self._next_s = self._clock_s() + RETRY_S
        self._measuring = asyncio.ensure_future(self._measure(self._data_dir, True, self._gpu))
        try:
            rates = await self._measuring
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Somebody came, and this measurement was ended for them: as if it had not begun.
            self._tries -= 1
            self._next_s = 0.0
            return
        finally:
            self._measuring = None
        if self._is_better(rates):
            await self._take(rates)
            log.info("measured this box in %d ms, %d%% busy", rates.took_ms, rates.others_percent)

    def _is_better(self, rates: Rates) -> bool:
        known = self.rates
        if known is None or not is_fresh(known, self._data_dir / "packs", self._wall_ms()):
            return True
        return rates.others_percent <= known.others_percent

    async def _take(self, rates: Rates) -> None:
        # The line was timed here, or by the process before; the child can not.
        link = self._link.bytes_per_s or (self.rates.link if self.rates else 0)
        self.rates = replace(rates, link=rates.link or link)
        await self._adopt(self.rates)

    async def _take_handed_over(self) -> None:
        path = self._data_dir / HANDED_OVER
        if not path.exists():
            return
        try:
            with path.open(errors="replace") as file:
                text = file.read(RATES_BYTES_MAX + 1)
        finally:
            path.unlink(missing_ok=True)
        await self._take(load_rates(text.strip()))
        log.info("took up a new calibration")

    async def _follow_link(self) -> None:
        link, rates = self._link.bytes_per_s, self.rates
        if rates is None or not link or abs(link - rates.link) <= LINK_CHANGE * rates.link:
            return
        await self._take(replace(rates, link=link))
