"""What the tour proves: each check looks at what happened and says whether a promise was kept.

Covers: exact embeddings, repeatable generation, budgets (by the ledger and by the kernel), the rate limit
and its ``Retry-After``, isolation between tenants, and that the tour was a real one. Does not cover: making
the requests (``tour_calls``), the stack (``stack``) or tables (``tour``).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import openai
from process_memory import Peaks
from tour_calls import Outcome, make_client
from tour_ledger import LedgerPeaks
from tour_models import DEVICE_BYTES, DEVICES, MODELS, TENANTS, WEIGHTS_TO_BUDGET_MIN, TourModel

import bunkhouse

MIB = 1024 * 1024
# What one worker may write for itself beside its weights, by addition: a restore takes at most 120 MiB of
# buffers (76 on two cores, and only from a cold disk), a load with its pack 40; skeletons, tokenizers and
# pages of the interpreter it was forked with some 35; a request's workspace 6. Seen so far: 54 to 84 MiB.
# This bounds the process; that weights are in it only once is proved exactly by tests/test_worker_moves.py.
WORKER_ALLOWANCE_BYTES = 204 * MIB

# Ten seconds' worth of a minute may come at once: 5 of 30, then one each 2 s.
RATE_PER_MINUTE = 30
RATE_INTERVAL_MS = 60_000 / RATE_PER_MINUTE
# A request sent this long before its time must still be refused, and must be answered this long after.
RATE_EARLY_MS = 150
RATE_LATE_MS = 20
# Clocks are read on both sides of a request; the node counts whole milliseconds.
RATE_SLACK_MS = 5
RATE_LIMIT_HEADER = "x-ratelimit-limit-requests"
PLAN_TIMEOUT_S = 30.0  # a changed quota reaches the node with the next answer of its long poll


@dataclass(frozen=True, slots=True)
class Check:
    """One promise and what became of it. ``detail`` has the figures either way."""

    name: str
    passed: bool
    detail: str


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Run a check that talks to the stack; an exception in it is a failed check, not a lost tour."""
    try:
        return check()
    except (openai.OpenAIError, bunkhouse.BunkhouseError, OSError, ValueError, KeyError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


# --- answers --------------------------------------------------------------------------------------


def check_answered(outcomes: Sequence[Outcome]) -> Check:
    failed = [outcome for outcome in outcomes if outcome.error]
    detail = f"{len(outcomes) - len(failed)} of {len(outcomes)} requests answered"
    for outcome in failed[:5]:
        detail += f"\n  request {outcome.job.number} to {outcome.job.model.ref}: {outcome.error[:400]}"
    return Check("every request is answered", not failed, detail)


def check_embeddings(outcomes: Sequence[Outcome], reference: Mapping[str, bytes]) -> Check:
    """Bit for bit: what was answered, over all evictions and tiers, is what plain transformers answers."""
    compared = [outcome for outcome in outcomes if outcome.vector]
    wrong = [outcome for outcome in compared if outcome.vector != reference[outcome.job.text]]
    cold = sum(outcome.tier not in {"", "device"} for outcome in compared)
    detail = f"{len(compared)} embeddings compared, {cold} of them right after a restore"
    for outcome in wrong[:3]:
        alike = {other.vector for other in compared if other.job.text == outcome.job.text}
        detail += (
            f"\n  request {outcome.job.number} to {outcome.job.model.ref} from {outcome.tier}: differs; "
            f"{len(alike)} different answers to this input were seen"
        )
    return Check(
        "embeddings are bit-identical to plain transformers after any eviction",
        bool(compared) and not wrong,
        detail,
    )


def check_repeatable(outcomes: Sequence[Outcome]) -> Check:
    """The same model and prompt give the same text, streamed or whole, from whichever tier."""
    seen: dict[tuple[str, str], set[str]] = {}
    for outcome in outcomes:
        if not outcome.error and not outcome.vector:
            seen.setdefault((outcome.job.model.ref, outcome.job.text), set()).add(outcome.text)
    wrong = {key: texts for key, texts in seen.items() if len(texts) != 1}
    detail = f"{len(seen)} pairs of model and prompt"
    for (ref, text), texts in list(wrong.items())[:3]:
        detail += f"\n  {ref} answered {text!r} in {len(texts)} ways: {sorted(texts)!r}"
    return Check("greedy generation and classification repeat exactly", bool(seen) and not wrong, detail)


def check_real(outcomes: Sequence[Outcome], image_bytes: Mapping[str, int]) -> Check:
    """The tour squeezed what it promised to squeeze: too many weights, and restores from every tier."""
    budget = DEVICES * DEVICE_BYTES
    ratio = sum(image_bytes.values()) / budget
    tiers = {tier: sum(o.tier == tier for o in outcomes) for tier in ("device", "host", "disk", "origin")}
    restored = all(tiers[tier] for tier in ("host", "disk", "origin"))
    counts = ", ".join(f"{count} from {tier}" for tier, count in tiers.items())
    return Check(
        f"weights of {WEIGHTS_TO_BUDGET_MIN} times the devices, restored from every tier",
        ratio >= WEIGHTS_TO_BUDGET_MIN and len(image_bytes) >= 8 and restored,
        f"{len(image_bytes)} models of {sum(image_bytes.values()) / MIB:.0f} MiB on {budget / MIB:.0f} MiB "
        f"of devices ({ratio:.2f} times); answers {counts}",
    )


# --- budgets --------------------------------------------------------------------------------------


def check_ledger(peaks: LedgerPeaks) -> Check:
    over = [row for row in peaks.rows if row.used_bytes > row.budget_bytes]
    full = [row for row in peaks.rows if row.budget_bytes > 0]
    detail = f"{peaks.samples} samples; greatest use: " + ", ".join(
        f"{row.name} {row.used_bytes / MIB:.1f} of {row.budget_bytes / MIB:.0f} MiB" for row in full
    )
    return Check(
        "no budget was exceeded in the ledger", peaks.samples > 0 and bool(full) and not over, detail
    )


def check_memory(peaks: Peaks) -> Check:
    """By the kernel's books: weights never above a device's budget, and nothing much beside them."""
    by_device = {name: used for name, used in peaks.arena_bytes_by_device.items() if name}
    allowed_bytes = DEVICES * DEVICE_BYTES + peaks.workers * WORKER_ALLOWANCE_BYTES
    passed = (
        peaks.samples > 0
        and peaks.worker_arena_bytes > 0
        and all(used <= DEVICE_BYTES for used in by_device.values())
        and peaks.worker_arena_bytes <= DEVICE_BYTES
        and peaks.arena_bytes <= DEVICES * DEVICE_BYTES
        and peaks.above_baseline_bytes <= allowed_bytes
        and peaks.worker_private_bytes <= WORKER_ALLOWANCE_BYTES
    )
    devices = (
        ", ".join(f"{name} {used / MIB:.1f} MiB" for name, used in by_device.items()) or "not told apart"
    )
    return Check(
        "no budget was exceeded in the workers' memory",
        passed,
        f"{peaks.samples} samples of {peaks.workers} workers; weights: {peaks.arena_bytes / MIB:.1f} of "
        f"{DEVICES * DEVICE_BYTES / MIB:.0f} MiB ({devices}); workers' RSS above a bare nursery each: "
        f"{peaks.above_baseline_bytes / MIB:.0f} of {allowed_bytes / MIB:.0f} MiB (budgets and "
        f"{WORKER_ALLOWANCE_BYTES / MIB:.0f} MiB per worker); a worker's own memory beside weights: at most "
        f"{peaks.worker_private_bytes / MIB:.0f} of {WORKER_ALLOWANCE_BYTES / MIB:.0f} MiB; a bare nursery "
        f"{peaks.nursery_bytes / MIB:.0f} MiB",
    )


# --- rates ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Try:
    """One request against the limit, with the clock on both sides of it, in ms."""

    sent_ms: float
    read_ms: float
    refusal: openai.RateLimitError | None


def check_rate(operator: bunkhouse.Client, model: TourModel, url: str, agent_url: str, key: str) -> Check:
    """A tenant above its rate is refused with the time that is exactly owed, by the client's own clock.

    Called through the router; the node, which counts, is asked when it knows the limit.
    """
    name = "a tenant above its rate gets 429 with the right Retry-After"
    operator.set_quota(model.tenant, requests_per_minute=RATE_PER_MINUTE)
    client = make_client(url, key)
    try:
        _wait_for_limit(agent_url, key)
        tries = [_try(client, model)]
        while tries[-1].refusal is None and len(tries) <= RATE_PER_MINUTE:
            tries.append(_try(client, model))
        first, refused = tries[0], tries[-1]
        if refused.refusal is None:
            return Check(name, False, f"{len(tries)} requests at once, none refused at {RATE_PER_MINUTE}/min")
        headers = refused.refusal.response.headers
        retry_ms, retry_s = int(headers["retry-after-ms"]), int(headers["retry-after"])
        # One interval after the first request the next one may pass; the clock was read before and after.
        least_ms = first.sent_ms + RATE_INTERVAL_MS - refused.read_ms - RATE_SLACK_MS
        greatest_ms = first.read_ms + RATE_INTERVAL_MS - refused.sent_ms + RATE_SLACK_MS
        exact = least_ms <= retry_ms <= greatest_ms
        rounded = retry_s == max(1, math.ceil(retry_ms / 1000))
        _wait_until(refused.sent_ms + retry_ms - RATE_EARLY_MS)
        early = _try(client, model)
        # An answer that was on its way past the due time proves nothing either way.
        too_early = early.refusal is not None or early.read_ms >= refused.sent_ms + retry_ms
        _wait_until(refused.read_ms + retry_ms + RATE_LATE_MS)
        late = _try(client, model)
        # One that was late on its way and answered has taken the turn that this one waited for.
        on_time = late.refusal is None or early.refusal is None
        return Check(
            name,
            exact and rounded and too_early and on_time,
            f"{len(tries) - 1} passed at once, then {refused.refusal.code}: Retry-After {retry_s} s "
            f"({retry_ms} ms, owed {least_ms:.0f} to {greatest_ms:.0f}); {RATE_EARLY_MS} ms early: "
            f"{'refused' if early.refusal else 'answered'}; on time: "
            f"{'refused' if late.refusal else 'answered'}",
        )
    finally:
        client.close()
        operator.set_quota(model.tenant, requests_per_minute=None)


def _try(client: openai.OpenAI, model: TourModel) -> Try:
    refusal = None
    sent_ms = time.monotonic() * 1000
    try:
        client.embeddings.create(model=model.ref, input="hello")
    except openai.RateLimitError as error:
        refusal = error
    return Try(sent_ms, time.monotonic() * 1000, refusal)


def _wait_for_limit(agent_url: str, key: str) -> None:
    """Wait until the node has the new quota: listing models costs nothing and shows the limit."""
    deadline_s = time.monotonic() + PLAN_TIMEOUT_S
    pause = threading.Event()
    with make_client(agent_url, key) as client:
        while client.models.with_raw_response.list().headers.get(RATE_LIMIT_HEADER) != str(RATE_PER_MINUTE):
            if time.monotonic() > deadline_s:
                raise ValueError(f"the node did not show {RATE_LIMIT_HEADER} within {PLAN_TIMEOUT_S:.0f} s")
            pause.wait(0.02)


def _wait_until(at_ms: float) -> None:
    threading.Event().wait(max(0.0, at_ms / 1000 - time.monotonic()))


# --- isolation ------------------------------------------------------------------------------------


def check_isolation(urls: Sequence[str], control_url: str, keys: Mapping[str, str]) -> Check:
    """With one tenant's key, another's models can be neither seen nor called, nor told from absent ones."""
    findings: list[str] = []
    asked = 0
    for tenant, key in keys.items():
        foreign = [model for model in MODELS if model.tenant != tenant]
        for url in urls:
            client = make_client(url, key)
            listed = {model.id for model in client.models.list()}
            expected = {model.ref for model in MODELS if model.tenant == tenant}
            if {ref.partition("@")[0] for ref in listed} != expected:
                findings.append(f"{tenant} at {url} sees {sorted(listed)}")
            for model in foreign:
                asked += 1
                findings += _probe(client, tenant, model)
            client.close()
        findings += _probe_management(control_url, tenant, key)
    detail = f"{len(keys)} keys, {asked} foreign models asked for at {len(urls)} surfaces"
    return Check(
        "one tenant's key neither sees nor calls another's models",
        asked > 0 and not findings,
        "\n  ".join([detail, *findings[:5]]),
    )


def _probe(client: openai.OpenAI, tenant: str, model: TourModel) -> list[str]:
    """A foreign model must look exactly like one that does not exist."""
    absent = f"{model.tenant}/no-such-{model.name}"
    calls: dict[str, Callable[[str], object]] = {
        "retrieve": client.models.retrieve,
        "embeddings": lambda ref: client.embeddings.create(model=ref, input="hello"),
        "completions": lambda ref: client.completions.create(model=ref, prompt="hello", max_tokens=1),
        "chat": lambda ref: client.chat.completions.create(
            model=ref, messages=[{"role": "user", "content": "hello"}], max_tokens=1
        ),
    }
    findings = []
    for name, call in calls.items():
        answers = [_not_found(call, ref) for ref in (model.ref, absent)]
        if answers[0] is None or answers[0] != answers[1]:
            findings.append(f"{tenant}, {name} of {model.ref}: {answers[0]}, of an absent one: {answers[1]}")
    return findings


def _not_found(call: Callable[[str], object], ref: str) -> str | None:
    """The 404's body without the name asked for; None if the call was not refused with 404."""
    try:
        call(ref)
    except openai.NotFoundError as error:
        return f"{error.code} {str(error.body).replace(ref, '<model>')}"
    except openai.APIStatusError as error:
        return f"status {error.status_code}" if error.status_code != 404 else None
    return None


def _probe_management(url: str, tenant: str, key: str) -> list[str]:
    findings = []
    with bunkhouse.Client(url, api_key=key) as client:
        seen = {model.ref for model in client.models()} | {item.ref for item in client.ps().items}
        findings += [f"{tenant} sees {ref}" for ref in sorted(seen) if not ref.startswith(f"{tenant}/")]
        for other in TENANTS:
            if other == tenant:
                continue
            model = next(model.ref for model in MODELS if model.tenant == other)
            calls: dict[str, Callable[[], object]] = {
                f"models of {other}": partial(client.models, other),
                f"model {model}": partial(client.model, model),
                f"quota of {other}": partial(client.quota, other),
                f"keys of {other}": partial(client.keys, other),
            }
            for name, call in calls.items():
                try:
                    answer = call()
                except (bunkhouse.NotFound, bunkhouse.PermissionDenied):
                    continue
                if answer:
                    findings.append(f"{tenant} may read {name}: {str(answer)[:200]}")
    return findings
