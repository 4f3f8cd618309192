"""The tour: a whole Bunkhouse on this machine, three tenants, ten models that do not fit, 200 requests.

Starts control and one agent with two small cpu devices through ``bunk up``, creates tenants and keys with
``bunk``, pushes models whose weights are three times what the devices hold, calls all of them in a skewed
order with the unmodified ``openai`` client, prints what happened, and checks what Bunkhouse promises. Any
broken promise is named and makes the exit code 1.

Covers: the order of these steps and the tables. Does not cover: the models (``tour_models``), the calls
(``tour_calls``) or the checks (``tour_checks``). ``run_tour`` is what the end-to-end test calls.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tour_checks
from process_memory import MemoryWatch, Peaks
from stack import Stack, StackFailed, StackOptions, find_command, start_stack
from tour_calls import Callers, Outcome, make_jobs, run_jobs, wait_for_models
from tour_checks import Check
from tour_ledger import LedgerPeaks, LedgerWatch, parse_counters, read_metrics
from tour_models import (
    DEVICE,
    DEVICES,
    DISK_BYTES,
    HOST_BYTES,
    MODELS,
    TENANTS,
    make_directory,
    reference_embeddings,
)

import bunkhouse

MIB = 1024 * 1024
REQUESTS = 200
# Fewer do not reach every tier: a restore from the host needs two from below before it.
REQUESTS_MIN = 40
REQUESTS_MAX = 100_000
THREADS = 4
SEED = 20
# Control shows what the node last told it; the node tells with each beat.
BEAT_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class TourOptions:
    """``data_dir`` None: a temporary one, removed at the end unless the stack is kept."""

    requests: int = REQUESTS
    threads: int = THREADS
    seed: int = SEED
    data_dir: Path | None = None
    keep: bool = False
    say: Callable[[str], None] = print


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the table of models. ``cold`` counts answers that had to wait for a restore, by tier."""

    model: str
    kind: str
    image_bytes: int
    requests: int
    answers: int
    cold: Mapping[str, int]
    restore_ms_median: float | None
    restore_ms_greatest: int | None
    device_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class TenantRow:
    """One line of the table of tenants; a limit of None is no limit."""

    tenant: str
    requests: int
    answers: int
    refusals: int
    tokens: int
    device_bytes: int
    device_bytes_max: int | None
    host_bytes: int
    host_bytes_max: int | None
    disk_bytes: int
    disk_bytes_max: int | None


@dataclass(frozen=True, slots=True)
class TourResult:
    """Everything the tour found; ``--json`` writes this."""

    passed: bool
    checks: tuple[Check, ...]
    models: tuple[ModelRow, ...]
    tenants: tuple[TenantRow, ...]
    restore_ms_by_tier: Mapping[str, tuple[int, ...]]
    # Streams that had to begin before their restore was over; their headers could not name a tier.
    early_streams: int
    memory: Peaks
    ledger: LedgerPeaks
    seconds: Mapping[str, float]


class Stopwatch:
    """How long each part took, in the order they were done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say
        self._part = ""
        self._started_s = 0.0

    def part(self, name: str) -> None:
        self.end()
        self._part, self._started_s = name, time.monotonic()
        self._say(f"{name} …")

    def end(self) -> None:
        if self._part:
            self.seconds[self._part] = round(time.monotonic() - self._started_s, 2)
            self._part = ""


# --- steps ----------------------------------------------------------------------------------------


def run_tour(options: TourOptions) -> TourResult:
    """The whole tour. Raises ``StackFailed`` if it can not be made; broken promises are in the result."""
    root = options.data_dir or Path(tempfile.mkdtemp(prefix="bunkhouse-tour-"))
    if (root / "data").exists():
        raise StackFailed(f"{root / 'data'} exists: the tour starts a new stack, give it an empty directory")
    watch = Stopwatch(options.say)
    stack: Stack | None = None
    kept = False
    try:
        watch.part("making models")
        directories = {model.ref: make_directory(model, root / "models") for model in MODELS}
        watch.part("asking plain transformers")
        reference = reference_embeddings(directories[MODELS[0].ref])
        watch.part("starting control and one agent with two devices")
        stack = start_stack(StackOptions(root / "data", (DEVICE,) * DEVICES, HOST_BYTES, DISK_BYTES))
        try:
            result = _visit(options, stack, directories, reference, watch)
        except Exception as error:
            raise StackFailed(f"{type(error).__name__}: {error}\n{stack.logs()}") from error
        if options.keep:
            kept = True
            watch.end()
            _say_kept(options.say, stack)
            return _with_check(result, None, watch)
        watch.part("stopping")
        running, stack = stack, None
        check = _check_stopped(running)
        watch.end()
        return _with_check(result, check, watch)
    finally:
        if stack is not None and not kept:
            stack.stop()
        if options.data_dir is None and not kept:
            shutil.rmtree(root, ignore_errors=True)


def _visit(
    options: TourOptions,
    stack: Stack,
    directories: Mapping[str, Path],
    reference: Mapping[str, bytes],
    watch: Stopwatch,
) -> TourResult:
    """Everything that happens while the stack runs."""
    memory, ledger = MemoryWatch(stack.agent_pid).start(), LedgerWatch(stack.agent_url).start()
    with bunkhouse.Client(stack.url, api_key=stack.operator_key) as operator:
        watch.part("creating tenants and keys")
        keys = _create_tenants(stack)
        watch.part(f"pushing {len(MODELS)} models")
        image_bytes = _push_models(stack, directories, keys)
        for tenant, key in keys.items():
            wanted = [model.ref for model in MODELS if model.tenant == tenant]
            wait_for_models(stack.agent_url, key, wanted, READY_TIMEOUT_S)
        callers = Callers.of(stack.url, stack.agent_url, keys)
        watch.part(f"{options.requests} requests from {options.threads} threads")
        outcomes = run_jobs(make_jobs(options.requests, options.seed), callers, options.threads)
        callers.close()
        watch.part("checking")
        surfaces = (stack.url, stack.agent_url)
        isolation = tour_checks.attempt(
            "isolation", lambda: tour_checks.check_isolation(surfaces, stack.url, keys)
        )
        limited = MODELS[0]
        rate = tour_checks.attempt(
            "rate",
            lambda: tour_checks.check_rate(
                operator, limited, stack.url, stack.agent_url, keys[limited.tenant]
            ),
        )
        _wait_for_beat(stack, operator)
        models, tenants = _model_rows(operator, outcomes, image_bytes), _tenant_rows(operator)
    memory_peaks, ledger_peaks = memory.stop(), ledger.stop()
    checks = (
        tour_checks.check_answered(outcomes),
        tour_checks.check_embeddings(outcomes, reference),
        tour_checks.check_repeatable(outcomes),
        tour_checks.check_real(outcomes, image_bytes),
        tour_checks.check_ledger(ledger_peaks),
        tour_checks.check_memory(memory_peaks),
        rate,
        isolation,
    )
    restores = {
        tier: tuple(o.restore_ms for o in outcomes if o.tier == tier) for tier in ("host", "disk", "origin")
    }
    early = sum(not outcome.error and not outcome.tier for outcome in outcomes)
    return TourResult(True, checks, models, tenants, restores, early, memory_peaks, ledger_peaks, {})


def _with_check(result: TourResult, check: Check | None, watch: Stopwatch) -> TourResult:
    checks = result.checks if check is None else (*result.checks, check)
    return replace(result, passed=all(one.passed for one in checks), checks=checks, seconds=watch.seconds)


def _check_stopped(stack: Stack) -> Check:
    name = "nothing is left running"
    pids = stack.pids()
    try:
        stack.stop()
    except StackFailed as error:
        return Check(name, False, str(error))
    return Check(name, True, f"all {len(pids)} processes ended")


def _create_tenants(stack: Stack) -> dict[str, str]:
    """Three tenants, a key for each, and quotas that the tour stays below."""
    keys: dict[str, str] = {}
    for tenant in TENANTS:
        stack.bunk("tenant", "create", tenant)
        answer = stack.bunk("key", "create", tenant)
        if not isinstance(answer, dict) or not isinstance(answer.get("key"), str):
            raise StackFailed(f"bunk key create {tenant} -o json shows no key")
        keys[tenant] = answer["key"]
        stack.bunk("quota", "set", tenant, "--device-max", "200MiB", "--disk-max", "1GiB")
    return keys


def _push_models(stack: Stack, directories: Mapping[str, Path], keys: Mapping[str, str]) -> dict[str, int]:
    """Push the first model through the CLI, the rest through the SDK; returns their weights' bytes."""
    stack.bunk("model", "push", MODELS[0].ref, str(directories[MODELS[0].ref]), key=keys[MODELS[0].tenant])
    image_bytes: dict[str, int] = {}
    for tenant in TENANTS:
        with bunkhouse.Client(stack.url, api_key=keys[tenant]) as client:
            for model in MODELS:
                if model.tenant == tenant and model is not MODELS[0]:
                    client.push(model.ref, directories[model.ref])
            image_bytes |= {f"{m.tenant}/{m.name}": m.image_bytes for m in client.models() if m.latest}
    return image_bytes


def _wait_for_beat(stack: Stack, operator: bunkhouse.Client) -> None:
    """Wait until control has heard of every request that the node counted, so that the tables show all."""
    counted = parse_counters(read_metrics(stack.agent_url, stack.metrics_key_file))
    deadline_s = time.monotonic() + BEAT_TIMEOUT_S
    while True:
        usage = [usage for tenant in TENANTS for usage in operator.quota(tenant).usage]
        heard = {"requests": sum(u.requests for u in usage), "answers": sum(u.answers for u in usage)}
        if heard == counted:
            return
        if time.monotonic() > deadline_s:
            raise StackFailed(f"control has heard of {heard} after {BEAT_TIMEOUT_S:.0f} s, not of {counted}")
        time.sleep(0.1)


# --- tables ---------------------------------------------------------------------------------------


def _model_rows(
    operator: bunkhouse.Client, outcomes: Sequence[Outcome], image_bytes: Mapping[str, int]
) -> tuple[ModelRow, ...]:
    placed = {item.ref.partition("@")[0]: item for item in operator.ps().items}
    rows = []
    for model in MODELS:
        mine = [outcome for outcome in outcomes if outcome.job.model is model]
        cold = [outcome for outcome in mine if outcome.tier in {"host", "disk", "origin"}]
        item = placed.get(model.ref)
        rows.append(
            ModelRow(
                model=model.ref,
                kind=model.kind,
                image_bytes=image_bytes.get(model.ref, 0),
                requests=len(mine),
                answers=sum(not outcome.error for outcome in mine),
                cold={tier: sum(o.tier == tier for o in cold) for tier in ("host", "disk", "origin")},
                restore_ms_median=statistics.median(o.restore_ms for o in cold) if cold else None,
                restore_ms_greatest=max((o.restore_ms for o in cold), default=None),
                device_bytes=item.device_bytes if item else 0,
                host_bytes=item.host_bytes if item else 0,
                disk_bytes=item.disk_bytes if item else 0,
            )
        )
    return tuple(rows)


def _tenant_rows(operator: bunkhouse.Client) -> tuple[TenantRow, ...]:
    rows = []
    for tenant in TENANTS:
        seen = operator.quota(tenant)
        rows.append(
            TenantRow(
                tenant=tenant,
                requests=sum(usage.requests for usage in seen.usage),
                answers=sum(usage.answers for usage in seen.usage),
                refusals=sum(usage.refusals for usage in seen.usage),
                tokens=sum(usage.tokens for usage in seen.usage),
                device_bytes=sum(usage.device_bytes for usage in seen.usage),
                device_bytes_max=seen.quota.device.max,
                host_bytes=sum(usage.host_bytes for usage in seen.usage),
                host_bytes_max=seen.quota.host.max,
                disk_bytes=sum(usage.disk_bytes for usage in seen.usage),
                disk_bytes_max=seen.quota.disk.max,
            )
        )
    return tuple(rows)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.1f}"


def _of(used: int, limit: int | None) -> str:
    return f"{_mib(used)} of {_mib(limit)}" if limit is not None else _mib(used)


def format_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; the first one to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def print_result(result: TourResult, say: Callable[[str], None]) -> None:
    """The tables, the checks and the times, for people."""
    say("\nModels (restore times in ms; sizes in MiB, where they are now)")
    heads = ["model", "kind", "weights", "requests", "answers", "cold: host", "disk", "origin"]
    heads += ["median", "greatest", "device", "host", "disk"]
    lines = []
    for row in result.models:
        median = "-" if row.restore_ms_median is None else f"{row.restore_ms_median:.0f}"
        greatest = "-" if row.restore_ms_greatest is None else row.restore_ms_greatest
        lines.append(
            [row.model, row.kind, _mib(row.image_bytes), row.requests, row.answers]
            + [row.cold[tier] for tier in ("host", "disk", "origin")]
            + [median, greatest, *map(_mib, (row.device_bytes, row.host_bytes, row.disk_bytes))]
        )
    say(format_table(heads, lines))
    if result.early_streams:
        say(f"{result.early_streams} streams began while their model was restored: not counted as cold here")
    say("\nTenants (sizes in MiB, used of the greatest allowed)")
    say(
        format_table(
            ["tenant", "requests", "answers", "refusals", "tokens", "device", "host", "disk"],
            [
                [
                    *(t.tenant, t.requests, t.answers, t.refusals, t.tokens),
                    _of(t.device_bytes, t.device_bytes_max),
                    _of(t.host_bytes, t.host_bytes_max),
                    _of(t.disk_bytes, t.disk_bytes_max),
                ]
                for t in result.tenants
            ],
        )
    )
    say("\nRestores by tier (ms)")
    say(
        format_table(
            ["tier", "restores", "median", "greatest"],
            [
                [
                    tier,
                    len(times),
                    f"{statistics.median(times):.0f}" if times else "-",
                    max(times, default="-"),
                ]
                for tier, times in result.restore_ms_by_tier.items()
            ],
        )
    )
    say("")
    for check in result.checks:
        say(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}\n        {check.detail}")
    say("\n" + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in result.seconds.items()))


def _say_kept(say: Callable[[str], None], stack: Stack) -> None:
    data = stack.options.data_dir
    say(f"\nThe stack is still running: {stack.url} (data in {data})")
    say(f"  stop it:      kill -INT {stack.process.pid}")
    say(
        "  as operator:  "
        + shlex.join(["env", f"XDG_CONFIG_HOME={data / 'config'}", find_command("bunk"), "ps"])
    )


# --- command line ---------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=REQUESTS, help="how many (default %(default)s)")
    parser.add_argument("--threads", type=int, default=THREADS, help="callers at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the order of requests")
    parser.add_argument("--data-dir", type=Path, help="keep everything there (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--keep", action="store_true", help="leave the stack running")
    given = parser.parse_args()
    if not REQUESTS_MIN <= given.requests <= REQUESTS_MAX:
        parser.error(f"--requests: use {REQUESTS_MIN} to {REQUESTS_MAX}")
    if not 1 <= given.threads <= 64:
        parser.error("--threads: use 1 to 64")
    # A terminated tour stops its stack like an interrupted one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        result = run_tour(
            TourOptions(given.requests, given.threads, given.seed, given.data_dir, given.keep, say)
        )
    except StackFailed as error:
        print(f"the tour failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print_result(result, say)
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    failed = [check.name for check in result.checks if not check.passed]
    if failed:
        print(f"\nthe tour failed: {'; '.join(failed)}", file=sys.stderr)
        return 1
    say("\nThe tour passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
