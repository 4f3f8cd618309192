"""``bunk-agent check``: what about this box would make a node slow, unsafe or short-lived.

Covers: looking at the disk, the certificate, the kernel's settings, the optional kernels and the stored
calibration, each with a way out. Does not cover: control's side (``bunk doctor`` asks it), or changing
anything. Never opens the journal for writing: an agent may be running on it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from agent.calibration import FRESH_MS, OTHERS_PERCENT_MAX, fingerprint
from agent.devices import nvml_devices
from agent.journal import JOURNAL
from agent.packs import DISK_FREE_FLOOR_BYTES
from packer.estimate import BadRates, Rates, choose_host_form, load_rates
from packer.identity import Identity
from packer.types import GIB, MIB
from packer.wire import BadMessage

# With less than this above the floor the next pack of a common model will not fit.
DISK_ROOM_WARN_BYTES = 4 * GIB
# A certificate lives for a day and is renewed at two thirds of it; below this a renewal has failed.
CERTIFICATE_WARN_S = 4 * 3600.0
# One descriptor per connection, worker, segment and pack being read.
DESCRIPTORS_WARN = 4096
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Check:
    """One line. ``state``: ok, warn (works, but worse than it could) or fail; ``hint``: the way out."""

    name: str
    state: str
    detail: str
    hint: str = ""


def check_disk(data_dir: Path, free_bytes: int | None = None) -> Check:
    free = shutil.disk_usage(data_dir).free if free_bytes is None else free_bytes
    room = free - DISK_FREE_FLOOR_BYTES
    hint = "free some space on this file system, or start the agent with another --data-dir"
    if room <= 0:
        detail = (
            f"{free // MIB} MiB free, the floor is {DISK_FREE_FLOOR_BYTES // MIB} MiB: no packs are written"
        )
        return Check("disk space", "fail", detail, hint)
    detail = f"{room // MIB} MiB free above the floor of {DISK_FREE_FLOOR_BYTES // MIB} MiB"
    return (
        Check("disk space", "warn", detail, hint)
        if room < DISK_ROOM_WARN_BYTES
        else _ok("disk space", detail)
    )


def check_certificate(data_dir: Path, now_s: float) -> Check:
    name = "certificate"
    hint = "join it: `bunk node token create`, then bunk-agent run --control … --join-token-file …"
    absent = Check(name, "warn", "this node has not joined a cluster", hint)
    if not (data_dir / "identity").is_dir():
        return absent
    try:
        identity = Identity(data_dir / "identity")
        if identity.answer is None:
            return absent
        left_s = identity.expires_s() - now_s
    except (OSError, ValueError, BadMessage) as error:
        return Check(name, "fail", f"the identity can not be read: {error}", "join again with a new token")
    if left_s <= 0:
        hint = "does this box reach control? After a week it takes a new token of `bunk node token create`"
        return Check(name, "fail", "it has ended; the agent renews it when control answers", hint)
    detail = f"valid for another {round(left_s / 3600, 1):g} h"
    if left_s < CERTIFICATE_WARN_S:
        return Check(name, "warn", detail, "it should have been renewed: does this box reach control?")
    return _ok(name, detail)


def check_huge_pages(text: str | None) -> Check:
    """``text``: what the kernel says of transparent huge pages; None when it does not."""
    name = "huge pages"
    if text is None:
        return Check(
            name, "warn", "this kernel has none", "restores fill small pages, at a third of the speed"
        )
    if "[never]" in text:
        hint = f"echo madvise > {_THP}: filling fresh memory becomes three times as fast"
        return Check(name, "warn", "the kernel grants none (never)", hint)
    return _ok(name, "the kernel grants them: " + ("always" if "[always]" in text else "on request"))


def check_kernels(switch: str, installed: bool) -> Check:
    name = "compiled kernels"
    if switch == "off":
        return Check(name, "warn", "BUNKHOUSE_KERNELS=off", "unset it: cpu devices then decode faster")
    if not installed:
        hint = "install the server's extra 'fast' (numba): cpu devices then decode faster"
        return Check(name, "warn", "numba is not installed; numpy decodes", hint)
    return _ok(name, "installed")


def check_swap(swaps: str) -> Check:
    """``swaps``: /proc/swaps."""
    devices = [line.split()[0] for line in swaps.splitlines()[1:] if line.strip()]
    if not devices:
        return _ok("swap", "none")
    hint = "swapoff -a, or encrypt it: weights and prompts in memory could reach the disk in the clear"
    return Check("swap", "warn", f"on {', '.join(devices)}", hint)


def check_memlock(limit_bytes: int, gpu: bool) -> Check:
    name = "locked memory"
    if limit_bytes == resource.RLIM_INFINITY:
        return _ok(name, "not limited")
    detail = f"limited to {limit_bytes // MIB} MiB"
    if not gpu:
        return _ok(name, f"{detail}; cpu devices lock none")
    return Check(name, "warn", detail, "ulimit -l unlimited (LimitMEMLOCK=infinity): GPU copies pin memory")


def check_descriptors(hard_limit: int) -> Check:
    detail = f"up to {hard_limit}" if hard_limit != resource.RLIM_INFINITY else "not limited"
    if hard_limit != resource.RLIM_INFINITY and hard_limit < DESCRIPTORS_WARN:
        return Check("open files", "warn", detail, f"raise the hard limit (ulimit -Hn) to {DESCRIPTORS_WARN}")
    return _ok("open files", detail)


def check_calibration(rates: Rates | None, now_ms: int, print_now: str, on_cuda: bool) -> Check:
    name = "calibration"
    hint = "run `bunk doctor --bench` while this box is idle"
    if rates is None:
        return Check(name, "warn", "this box was never measured; estimates are assumptions", hint)
    age_ms = now_ms - rates.measured_ms
    detail = f"{max(0, age_ms) // 86_400_000} days old, host form {choose_host_form(rates, on_cuda).value}"
    if rates.fingerprint != print_now:
        return Check(name, "warn", f"{detail}; hardware or software has changed since", hint)
    if not 0 <= age_ms < FRESH_MS:
        return Check(name, "warn", detail, hint)
    if rates.others_percent > OTHERS_PERCENT_MAX:
        return Check(name, "warn", f"{detail}; others used {rates.others_percent}% of the cores", hint)
    return _ok(name, detail)


def _ok(name: str, detail: str) -> Check:
    return Check(name, "ok", detail)


def stored_rates(data_dir: Path) -> Rates | None:
    """What the journal has, read beside a running agent. Raises ``sqlite3.Error`` and ``BadRates``."""
    path = data_dir / JOURNAL
    if not path.exists():
        return None
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        row = connection.execute("select value from meta where key = 'calibration'").fetchone()
    return None if row is None else load_rates(str(row[0]))


def run_checks(data_dir: Path) -> list[Check]:
    """Everything, in the order of a person's interest. A check that breaks is a failed check."""
    gpu = bool(nvml_devices())
    looks: list[tuple[str, Callable[[], Check]]] = [
        ("disk space", lambda: check_disk(data_dir)),
        ("certificate", lambda: check_certificate(data_dir, time.time())),
        (
            "calibration",
            lambda: check_calibration(
                stored_rates(data_dir),
                time.time_ns() // 1_000_000,
                fingerprint(data_dir / "packs"),
                gpu,
            ),
        ),
        ("huge pages", lambda: check_huge_pages(_THP.read_text() if _THP.exists() else None)),
        (
            "compiled kernels",
            lambda: check_kernels(
                os.environ.get("BUNKHOUSE_KERNELS", "").lower(), find_spec("numba") is not None
            ),
        ),
        ("swap", lambda: check_swap(Path("/proc/swaps").read_text())),
        ("locked memory", lambda: check_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1], gpu)),
        ("open files", lambda: check_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
    ]
    done = []
    for name, look in looks:
        try:
            done.append(look())
        except (OSError, sqlite3.Error, BadRates) as error:
            done.append(Check(name, "fail", f"can not be checked: {error}", "run this as the agent's user"))
    return done


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit 0 unless a check failed (1)."""
    parser = argparse.ArgumentParser(
        prog="bunk-agent check", description="Look at this box without changing anything."
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the agent's --data-dir")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if not options.data_dir.is_dir():
        print(f"bunk-agent check: --data-dir {options.data_dir} is not a directory", file=sys.stderr)
        return 2
    checks = run_checks(options.data_dir)
    if options.json:
        print(json.dumps({"checks": [asdict(each) for each in checks]}))
    else:
        for each in checks:
            print(f"{each.state:4}  {each.name}: {each.detail}")
            if each.hint:
                print(f"      {each.hint}")
    return 1 if any(each.state == "fail" for each in checks) else 0
